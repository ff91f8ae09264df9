"""Refuses, before anything is trained, what `evaluate` would refuse.

`check_texts` and `check_rows` do not import torch: they report a misspelled column in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from finequant.evaluate.metrics.corpora import read_texts
from finequant.evaluate.metrics.text_metrics import (
    after_thoughts,
    calls_in,
    canonical_json,
    last_number,
)
from finequant.recipes.errors import UserError, counted, listed, refuse_all
from finequant.recipes.schema import Evaluate, Recipe
from finequant.recipes.stages import EXPORT_KEYS, exports_of
from finequant.recipes.task_files import read_task_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.data.messages import Message
    from finequant.finetune.data.row import Row
    from finequant.finetune.data.splits import Splits

SPEED_PROMPT, SPEED_ANSWER = 256, 64
"""Tokens for timing an export: a prompt, read in one call, and an answer, decoded one by one."""


def check_texts(evaluate: Evaluate) -> None:
    """Reads every corpus and task file.

    Raises:
        UserError: for each file that cannot be read or lacks the named column.
    """
    checks = [partial(read_texts, corpus) for corpus in evaluate.perplexity]
    refuse_all([*checks, partial(check_task_files, evaluate)])


def check_rows(recipe: Recipe, splits: Splits) -> list[Row]:
    """Checks metrics, choices, and gate against the held-out rows, and returns these rows.

    Raises:
        UserError: listing everything that measuring would refuse.
    """
    evaluate = recipe.evaluate
    test = _chosen(splits.test, evaluate.limit, recipe.seed)
    answers = [(row.where, row.messages[-1]["content"]) for row in test if row.messages]
    scored = [(where, after_thoughts(answer)) for where, answer in answers]
    refuse_all(
        [
            partial(_check_something_to_measure, evaluate, test),
            partial(_check_gate, recipe, test),
            partial(_check_references, evaluate, scored),
            partial(_check_lengths_for_bleu, evaluate, scored),
            partial(_check_letters_for_rouge, evaluate, scored),
            partial(_check_some_calls, evaluate, test),
            partial(_check_some_numbers, evaluate, scored),
            partial(_check_choices, evaluate, answers),
        ]
    )
    return test


def _chosen(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """Returns a seeded choice of `limit` rows, in their order; None: all.

    Published test files are often sorted by class: the first 500 of banking77's 3,080 rows have 13
    of its 77 intents.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(Random(seed).sample(range(len(rows)), limit))]


def asked_rows(row: Row) -> list[Row]:
    """Returns one row for each answer to generate: the last or, in a row with calls, which may be
    text, as in Hermes' rows, all."""
    if any(_makes_call(message) for message in row.messages):
        return [replace(row, messages=row.messages[: index + 1]) for index in row.targets]
    return [row] if row.messages else []


def _makes_call(message: Message) -> bool:
    return message["role"] == "assistant" and bool(
        message.get("tool_calls") or calls_in(message["content"])
    )


def _check_something_to_measure(evaluate: Evaluate, test: list[Row]) -> None:
    """Refuses a comparison of nothing, and metrics that the recipe names where nothing is asked."""
    if not test and not evaluate.perplexity and not evaluate.tasks:
        raise UserError(
            "evaluate: nothing to measure on; set data.test, data.test_fraction, "
            "evaluate.perplexity or evaluate.tasks"
        )
    # The default, which the recipe need not name, is left out without a word.
    asked = evaluate.metrics if evaluate.metrics != Evaluate().metrics else []
    if asked and not any(row.messages for row in test):
        raise UserError(
            f"evaluate.metrics: {', '.join(asked)}: no held-out row has an answer: set data.test "
            "to rows with questions and answers, or set evaluate.metrics=[]"
        )


def _check_gate(recipe: Recipe, test: list[Row]) -> None:
    """Refuses a limit for something that is not measured."""
    evaluate, asked = recipe.evaluate, any(row.messages for row in test)
    gate = evaluate.gate
    if gate.max_accuracy_drop is not None and not (evaluate.tasks or asked and evaluate.metrics):
        raise UserError(
            "evaluate.gate.max_accuracy_drop: no accuracy is measured; set data.test to "
            "conversations, or set evaluate.tasks"
        )
    exported = evaluate.exports and exports_of(recipe)
    if gate.min_same_answers is not None and not (exported and asked):
        raise UserError(
            "evaluate.gate.min_same_answers: no answers of exports are measured; set data.test "
            "to conversations, evaluate.exports to true, and quantize.exports to a format such as "
            "gguf"
        )
    if gate.max_perplexity_increase is not None and not (evaluate.perplexity or test):
        raise UserError(
            "evaluate.gate.max_perplexity_increase: no perplexity is measured; set data.test or "
            "evaluate.perplexity"
        )


def _check_references(evaluate: Evaluate, answers: list[tuple[str, str]]) -> None:
    if "json_match" not in evaluate.metrics:
        return
    broken = [
        f"{where}: {answer!r:.80}" for where, answer in answers if canonical_json(answer) is None
    ]
    if broken:
        raise UserError(
            "evaluate.metrics: json_match needs JSON, but the answer is not JSON in "
            f"{counted(len(broken), 'held-out row')}: correct it, or remove json_match\n  "
            + listed(broken, most=10)
        )


def _check_lengths_for_bleu(evaluate: Evaluate, answers: list[tuple[str, str]]) -> None:
    """Refuses bleu, which counts sequences of four words, where even right answers score 0."""
    if "bleu" not in evaluate.metrics or not answers:
        return
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    longest = max(len(Tokenizer13a()(answer).split()) for _, answer in answers)
    if longest < 4:
        raise UserError(
            "evaluate.metrics: bleu counts sequences of four words, but no answer of the held-out "
            f"rows has more than {longest}, so even the right ones would score 0: use exact_match "
            "or chrf"
        )


def _check_letters_for_rouge(evaluate: Evaluate, answers: list[tuple[str, str]]) -> None:
    """Refuses rouge, which reads a-z and 0-9 only, for other scripts: right answers score 0."""
    if "rouge" not in evaluate.metrics:
        return
    text = "".join(answer for _, answer in answers).lower()
    if 2 * len(re.findall("[a-z]", text)) < sum(map(str.isalpha, text)):
        raise UserError(
            "evaluate.metrics: rouge reads only the letters from a to z and digits, but most "
            "letters of the held-out answers are others, so even the right ones may score 0: use "
            "chrf"
        )


def _check_some_calls(evaluate: Evaluate, test: list[Row]) -> None:
    """Refuses metrics of calls for answers without any: a model that never calls would be right."""
    asked = [metric for metric in evaluate.metrics if metric.startswith("tool_call_")]
    answers = [row.messages[-1] for whole in test for row in asked_rows(whole)]
    if asked and answers and not any(map(_makes_call, answers)):
        hint = f", or raise evaluate.limit={evaluate.limit}" if evaluate.limit else ""
        raise UserError(
            f"evaluate.metrics: {', '.join(asked)}: no answer of the held-out rows makes a call: "
            f"add rows with calls to data.test{hint}"
        )


def _check_some_numbers(evaluate: Evaluate, answers: list[tuple[str, str]]) -> None:
    """Refuses number_match for answers without any: every answer without one would be right."""
    if "number_match" not in evaluate.metrics or not answers:
        return
    if all(last_number(answer) is None for _, answer in answers):
        raise UserError(
            "evaluate.metrics: number_match: no answer of the held-out rows has a number in "
            "digits, so every answer without one would be right: use exact_match or f1"
        )


def _check_choices(evaluate: Evaluate, answers: list[tuple[str, str]]) -> None:
    if "multiple_choice" not in evaluate.metrics or evaluate.choices == "completions":
        return
    if "" in evaluate.choices:
        raise UserError("evaluate.choices: an empty choice has no likelihood; remove it")
    unknown = [
        f"{where}: {answer!r:.80}" for where, answer in answers if answer not in evaluate.choices
    ]
    if unknown:
        raise UserError(
            f"evaluate.choices: in {counted(len(unknown), 'held-out row')}, the answer is none of "
            f"{', '.join(map(repr, evaluate.choices[:20]))}: add it, or set "
            "evaluate.choices=completions\n  " + listed(unknown, most=10)
        )


def check_task_files(evaluate: Evaluate) -> None:
    """Reads the YAML of the user's own tasks; lm-eval skips broken files silently.

    Raises:
        UserError: naming the file and line of each error; for a folder that does not exist, or a
            task that is listed twice.
    """
    names = [task.task for task in evaluate.tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"evaluate.tasks: list each task once; repeated: {', '.join(repeated)}")
    if not evaluate.task_folder:
        return
    folder = Path(evaluate.task_folder)
    if not folder.is_dir():
        raise UserError(
            f"evaluate.task_folder: there is no folder {folder}\n"
            "Expected a folder with lm-eval task files (*.yaml)."
        )
    problems = [problem for file in sorted(folder.rglob("*.yaml")) if (problem := _broken(file))]
    if problems:
        raise UserError(f"evaluate.task_folder: {listed(problems)}")


def _broken(file: Path) -> str | None:
    """Says why a task file cannot be read; None if it can."""
    import yaml

    try:
        content = read_task_file(file)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: month 13 of a date
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        reason = getattr(error, "problem", None) or error
        return f"{where}: not valid YAML: {' '.join(str(reason).split())}"
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    return None if isinstance(content, dict) else f"{file}: expected a mapping with the key `task`"


def check_chat_template(evaluate: Evaluate, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a task with apply_chat_template if the base has no chat template."""
    names = [task.task for task in evaluate.tasks if task.apply_chat_template]
    if names and not tokenizer.chat_template:
        raise UserError(
            f"evaluate.tasks: {', '.join(names)}: apply_chat_template is set, but this base has no "
            "chat template: set model.chat_template"
        )


def check_runtimes(recipe: Recipe) -> None:
    """Refuses a limit for the answers of exports that cannot run here: the gate would fail.

    Raises:
        UserError: naming the packages to install.
    """
    from finequant.quantize.formats.formats import FORMATS  # imports torch

    if recipe.evaluate.gate.min_same_answers is None:
        return
    for name in exports_of(recipe):
        if missing := FORMATS[name].missing_runtime():
            raise UserError(
                f"evaluate.gate.min_same_answers: {name} cannot run here: {missing}, or remove "
                "this limit"
            )


def check_lengths(
    recipe: Recipe, positions: int, prompts: list[tuple[str, int]], scored: int, tables: int
) -> None:
    """Checks that everything fits into the base's positions and the exports whose length is fixed.

    prompts: the location of each held-out row, and the number of tokens in its prompt.
    scored: input tokens of the longest sequence whose likelihood is measured.
    tables: positions that a rotary table can hold.

    Raises:
        UserError: naming the rows that are too long, and a setting that fits.
    """
    answer = recipe.evaluate.max_new_tokens
    longest = max((tokens for _, tokens in prompts), default=0)
    long = [f"{where}: {tokens} tokens" for where, tokens in prompts if tokens + answer > positions]
    if long:
        hint = f"set evaluate.max_new_tokens={positions - longest}"
        if longest >= positions:
            hint = "remove rows with longer prompts" + (
                " from data.test" if recipe.data.test else ""
            )
        raise UserError(
            f"evaluate: {counted(len(long), 'held-out prompt')} too long for the {positions} "
            "positions of the base with an answer of up to "
            f"evaluate.max_new_tokens={answer}: {hint}\n  {listed(long, most=10)}"
        )
    exports = recipe.quantize.exports
    limited = [name for name in exports if "quantize.cache_length" in EXPORT_KEYS.get(name, ())]
    needed = max(scored, longest + answer if prompts else 0, SPEED_PROMPT + SPEED_ANSWER)
    needed, held = min(needed, positions), min(recipe.quantize.cache_length, tables)
    if limited and recipe.evaluate.exports and held < needed:
        original = ", LongRoPE's original positions," if held == tables else ""
        larger = f"set quantize.cache_length={needed}, " if needed <= tables else ""
        raise UserError(
            f"quantize.cache_length: {held} tokens{original} are too few to measure the "
            f"{limited[0]} export: the longest window, or prompt and answer, takes {needed}: "
            f"{larger}set evaluate.exports=false, or remove {', '.join(limited)} from "
            "quantize.exports"
        )
