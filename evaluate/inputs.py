"""The inputs that every model is measured on: held-out rows and texts, tokenized once for all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from finequant.recipes.errors import UserError, counted
from finequant.recipes.schema import Evaluate, Recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finequant.evaluate.metrics.corpora import Document
    from finequant.evaluate.metrics.perplexity import ScoredSequence
    from finequant.finetune.architecture import DecoderConfig
    from finequant.finetune.data.row import Row
    from finequant.finetune.data.splits import Splits
    from finequant.quantize.size.terms import Lengths

HELD_OUT = "held_out"
"""The name of the held-out rows among corpora and tasks."""


@dataclass(frozen=True)
class Material:
    """The inputs that every model is measured on, as token ids that all models share."""

    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    """Token ids that end an answer."""
    corpora: dict[str, tuple[list[ScoredSequence], list[Document]]]
    rows: list[Row]
    prompts: list[list[int]]
    groups: list[int]
    """A number for each row. Rows share it if their prompts are equal, or if they are answers of
    the same conversation: their scores are not independent."""
    references: list[str]
    choices: list[str]
    probes: list[list[int]]
    """Token ids on which a loaded model is checked: prompts, or training rows if there are none."""
    cut: dict[str, int]
    """What `cut_answers` returns."""

    def lengths(self, training: list[int] | None = None) -> Lengths:
        """Returns the lengths that the memory of activations depends on.

        training: tokens of each training row.
        """
        from finequant.quantize.size.terms import Lengths

        longest_prompt = max(map(len, self.prompts), default=0)
        sequences = chain(*(sequences for sequences, _ in self.corpora.values()))
        compared = sum(sum(item.scored) for item in sequences)
        return Lengths(training or [], longest_scored(self.corpora), longest_prompt, compared)


def prepare(recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Material:
    """Reads all texts, and tokenizes texts and held-out rows once for all models.

    Raises:
        UserError: for whatever `evaluate.check` refuses.
    """
    from finequant.evaluate.check import (
        asked_rows,
        check_chat_template,
        check_lengths,
        check_rows,
        check_texts,
    )
    from finequant.finetune.architecture import table_positions, usable_positions
    from finequant.finetune.data.tokens import answer_text, encode, encode_prompt
    from finequant.finetune.data.turns import as_generated, end_tokens
    from finequant.finetune.model import load_config

    ends = end_tokens(recipe.model, recipe.data, tokenizer)
    rows = check_rows(recipe, splits)
    check_texts(recipe.evaluate)
    check_chat_template(recipe.evaluate, tokenizer)
    config = load_config(recipe.model)
    corpora = _corpora(recipe, rows, tokenizer, config)
    asked = [row for whole in rows for row in asked_rows(whole)]
    references = [
        as_generated(answer_text(row, tokenizer, recipe.data), tokenizer, ends) for row in asked
    ]
    _check_calls(asked, references)
    prompts = [encode_prompt(row, tokenizer, recipe.data) for row in asked]
    read = [(row.where, len(prompt)) for row, prompt in zip(asked, prompts, strict=True)]
    positions, tables = usable_positions(config), table_positions(config)
    check_lengths(recipe, positions, read, longest_scored(corpora), tables)
    _say_what_has_no_effect(recipe.evaluate)
    cut = cut_answers(recipe.evaluate, references, tokenizer)
    if cut:
        say(f"evaluate: {cut_line(cut)}; set evaluate.max_new_tokens={cut['longest']}")
    return Material(
        tokenizer=tokenizer,
        ends=ends,
        corpora=corpora,
        rows=asked,
        prompts=prompts,
        groups=_groups([len(asked_rows(row)) for row in rows], prompts),
        references=references,
        choices=_choices(recipe, chain(splits.train, asked), tokenizer, ends),
        probes=prompts[:2]
        or [encode(row, tokenizer, recipe.data).input_ids for row in splits.train[:2]],
        cut=cut,
    )


def _corpora(
    recipe: Recipe, rows: list[Row], tokenizer: PreTrainedTokenizerBase, config: DecoderConfig
) -> dict[str, tuple[list[ScoredSequence], list[Document]]]:
    """Reads the recipe's corpora and cuts them into windows; the held-out rows are one, too."""
    from finequant.evaluate.metrics.corpora import read_corpus
    from finequant.evaluate.metrics.perplexity import corpus_windows
    from finequant.finetune.architecture import trained_positions, usable_positions
    from finequant.finetune.data.rendering import check_template

    positions = usable_positions(config)
    for corpus in recipe.evaluate.perplexity:
        if corpus.max_length > positions:
            say(
                f"evaluate: {corpus.name}: windows of {positions} tokens, all that the base "
                f"attends to, instead of {corpus.max_length} (max_length)"
            )
    corpora = {
        corpus.name: corpus_windows(read_corpus(corpus), tokenizer, corpus, positions)
        for corpus in recipe.evaluate.perplexity
    }
    check_template(rows, tokenizer, recipe.data)
    if rows:
        corpora[HELD_OUT] = _answers_as_corpus(rows, tokenizer, recipe)
        _check_some_are_scored(corpora[HELD_OUT][0], recipe)
        _check_held_out(longest_scored({HELD_OUT: corpora[HELD_OUT]}), trained_positions(config))
    return corpora


def _say_what_has_no_effect(evaluate: Evaluate) -> None:
    if evaluate.choices and "multiple_choice" not in evaluate.metrics:
        say("evaluate: evaluate.choices has no effect without multiple_choice in evaluate.metrics")
    if evaluate.task_folder and not evaluate.tasks:
        say("evaluate: evaluate.task_folder has no effect without names of tasks in evaluate.tasks")


def cut_answers(
    evaluate: Evaluate, references: list[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, int]:
    """Counts the reference answers that are longer than evaluate.max_new_tokens.

    Returns:
        {"longer": answers, "n": all answers, "longest": tokens, "limit": tokens}; empty if none is
        longer, or no metric reads the answers.
    """
    if not references or not set(evaluate.metrics) - {"multiple_choice"}:
        return {}
    tokens = tokenizer(references, add_special_tokens=False)["input_ids"]
    lengths, limit = list(map(len, tokens)), evaluate.max_new_tokens
    longer = sum(length > limit for length in lengths)
    counts = {"longer": longer, "n": len(lengths), "longest": max(lengths), "limit": limit}
    return counts if longer else {}


def cut_line(cut: dict[str, int]) -> str:
    """Says in words what `cut_answers` counted."""
    longer, n = cut["longer"], cut["n"]
    are, them = ("are longer, up to", "them") if longer > 1 else ("has", "it")
    which = f"{longer} of the {n} reference answers"
    if longer == n:
        few = {1: "the only reference answer", 2: "both reference answers"}
        which = few.get(n, f"all {n} reference answers")
    return (
        f"answers are cut after {counted(cut['limit'], 'token')}, but {which} {are} "
        f"{cut['longest']} tokens: no model can give {them} in full"
    )


def _groups(answers: list[int], prompts: list[list[int]]) -> list[int]:
    """Returns the number of each prompt's conversation; those with the same first prompt share one.

    answers: how many of the prompts, which are in order, each conversation has.
    """
    number: dict[tuple[int, ...], int] = {}
    groups: list[int] = []
    for count in filter(None, answers):
        first = tuple(prompts[len(groups)])
        groups += [number.setdefault(first, len(number))] * count
    return groups


def longest_scored(corpora: dict[str, tuple[list[ScoredSequence], list[Document]]]) -> int:
    """Counts the input tokens of the longest sequence; its last token is only predicted."""
    lengths = [len(item.ids) - 1 for sequences, _ in corpora.values() for item in sequences]
    return max(lengths, default=0)


def _check_held_out(longest: int, positions: int) -> None:
    if longest > positions:
        raise UserError(
            f"evaluate: a held-out row, cut to data.max_length, has {longest + 1} tokens, more "
            f"than the {positions} positions of the base: set data.max_length={positions}"
        )


def _check_some_are_scored(sequences: list[ScoredSequence], recipe: Recipe) -> None:
    if not any(any(sequence.scored) for sequence in sequences):
        raise UserError(
            f"evaluate: no held-out row has an answer within data.max_length="
            f"{recipe.data.max_length} tokens: raise it"
        )


def _answers_as_corpus(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> tuple[list[ScoredSequence], list[Document]]:
    """Makes a corpus of the held-out rows, whose target tokens are scored.

    Words and bytes are counted in the scored part of the answers.
    """
    from finequant.evaluate.metrics.corpora import count
    from finequant.evaluate.metrics.perplexity import ScoredSequence, scored_part
    from finequant.finetune.data.tokens import IGNORED, answer_text, encode, pieces_of

    sequences, documents = [], []
    for row in rows:
        pieces = pieces_of(encode(row, tokenizer, recipe.data, whole=True), row, recipe.data)
        scored = [
            ScoredSequence(ids, [False, *(label != IGNORED for label in labels[1:])])
            for ids, labels, _ in pieces
        ]
        sequences += scored
        if len(pieces) > 1 or pieces[0].full_length > len(pieces[0].input_ids):
            documents.append(scored_part(scored, tokenizer))
        else:
            answers = [answer_text(row, tokenizer, recipe.data, index) for index in row.targets]
            documents.append(count("\n".join(answers) or row.text))
    return sequences, documents


def _check_calls(rows: list[Row], references: list[str]) -> None:
    """Checks that calls can be parsed from the text that the chat template renders.

    Raises:
        UserError: if the template writes calls in another form, so that none would match.
    """
    from finequant.evaluate.metrics.text_metrics import calls_in, canonical_call

    for row, reference in zip(rows, references, strict=True):
        calls = [call["function"] for call in row.messages[-1].get("tool_calls", ())]
        if calls and calls_in(reference) != [canonical_call(call) for call in calls]:
            raise UserError(
                f"{row.where}: the chat template writes calls as {reference[:80]!r}, which cannot "
                "be parsed; expected JSON objects with name and arguments or parameters"
            )


def _choices(
    recipe: Recipe, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> list[str]:
    """Lists the answers that `multiple_choice` chooses from.

    Raises:
        UserError: if there is only one, which every model would get right.
    """
    from finequant.finetune.data.turns import as_generated

    if recipe.evaluate.choices != "completions":
        return list(recipe.evaluate.choices or [])
    answers = {row.messages[-1]["content"] for row in rows if row.messages}
    choices = sorted({as_generated(answer, tokenizer, ends) for answer in answers})
    if "multiple_choice" in recipe.evaluate.metrics and len(choices) == 1:
        raise UserError(
            f"evaluate.choices: completions: all rows have the answer {choices[0]!r}: add rows "
            "with other answers (is the file sorted?), or leave multiple_choice out of "
            "evaluate.metrics"
        )
    return choices
