"""Shows rows as the model sees them: target tokens in color, lengths, truncation, duplicates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finequant.finetune.architecture import trained_positions
from finequant.finetune.data.dataset import column, encoded_rows, long_rows_note, to_dataset
from finequant.finetune.data.duplicates import (
    MOST_ROWS,
    near_duplicates,
    prompts_with_several_answers,
    repeated_rows,
)
from finequant.finetune.data.messages import strings_of
from finequant.finetune.data.page import Run, html_page
from finequant.finetune.data.rendering import Rendering
from finequant.finetune.data.row import Row
from finequant.finetune.data.splits import Splits
from finequant.finetune.data.table import Rows
from finequant.finetune.data.tokens import IGNORED, Encoded, encode
from finequant.finetune.data.turns import answer_end, end_tokens, template_notes
from finequant.finetune.model import load_config, load_tokenizer
from finequant.recipes.errors import counted
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import close

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

FIGURES = ("rows", "repeated", "tokens", "targets", "median", "95%", "longest")
EXTREMES = 3
FEW_ANSWERS = 20
PAGE_ROWS = 50
QUESTION, ANSWER = "QUESTION", "ANSWER"
INVISIBLE = re.compile(r"[\x01-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2028\u2029\ufeff]")
RARE = "\U00012345"
"""A character, of cuneiform, that no tokenizer knows unless it writes unknown ones as bytes."""


def preview(recipe: Recipe, splits: Splits, count: int, page: Path | None = None) -> None:
    """Prints the first `count` training rows and statistics of every split.

    page: an HTML file to write with fifty rows in color.

    Raises:
        UserError: for whatever training would refuse in the data.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    tokenizer = load_tokenizer(recipe.model)
    figures = _Figures(recipe, tokenizer, splits)
    close()
    for note in splits.notes:
        console.print(note, markup=False, highlight=False)
    for row in splits.train[:count]:
        console.rule(Text(row.where))
        console.print(_colored(encode(row, tokenizer, recipe.data), tokenizer), soft_wrap=True)
    console.rule()
    console.print(figures.table())
    lines = figures.lines()
    for line in lines:
        console.print(line, markup=False, highlight=False)
    console.print("target tokens are green and bold; the loss mask leaves out the others")
    if page:
        chosen = np.unique(np.linspace(0, len(splits.train) - 1, PAGE_ROWS).astype(int))
        rows = [splits.train[int(at)] for at in chosen]
        runs = [(row.where, _runs(encode(row, tokenizer, recipe.data), tokenizer)) for row in rows]
        page.write_bytes(html_page(recipe.name, [*splits.notes, *lines], runs))
        console.print(f"{page} written", markup=False, highlight=False)
    positions = trained_positions(load_config(recipe.model))
    for rows in (splits.train, splits.validation):
        if rows:
            to_dataset(rows, tokenizer, recipe.data, positions)


class _Figures:
    """Statistics of the rows, from the tokens that training reads, too."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> None:
        self.recipe, self.tokenizer, self.splits = recipe, tokenizer, splits
        self.rows = {rows.name: rows for rows in splits[:3] if rows}
        self.tokens = {
            name: encoded_rows(rows, tokenizer, recipe.data) for name, rows in self.rows.items()
        }

    def lengths(self, name: str) -> np.ndarray:
        """Returns the number of tokens of each row, before truncation."""
        tokens = self.tokens[name]
        parts = column(tokens, "row"), column(tokens, "length")
        return np.bincount(parts[0], parts[1], len(self.rows[name])).astype(int)

    def table(self) -> Table:
        from rich.table import Table

        limit = self.recipe.data.max_length
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("split")
        for heading in (*FIGURES, f"over {limit}"):
            table.add_column(heading, justify="right", overflow="fold")
        for name, rows in self.rows.items():
            lengths = self.lengths(name)
            kept = np.minimum(column(self.tokens[name], "length"), limit).sum()
            learned = column(self.tokens[name], "targets").sum() / kept
            median, most = (round(float(np.quantile(lengths, share))) for share in (0.5, 0.95))
            figures = [len(rows), repeated_rows(rows), lengths.sum(), f"{learned:.0%}"]
            figures += [median, most, lengths.max(), (lengths > limit).sum()]
            table.add_row(name, *map(str, figures))
        return table

    def lines(self) -> list[str]:
        train = self.splits.train
        return [
            *self._extremes(),
            *self._long(),
            *self._special(),
            *self._invisible(),
            *self._unknown(),
            *_answers(train),
            *self._duplicates(),
            *_template(self.recipe, self.tokenizer, train),
            *_ends(self.recipe, self.tokenizer, train),
        ]

    def _extremes(self) -> list[str]:
        lengths = self.lengths("train")
        order = np.argsort(lengths, kind="stable")
        named = {"shortest": order[:EXTREMES], "longest": order[::-1][:EXTREMES]}
        return [
            f"{what}: "
            + ", ".join(f"{self.splits.train[int(at)].where} ({lengths[at]} tokens)" for at in rows)
            for what, rows in named.items()
        ]

    def _long(self) -> list[str]:
        """Says what happens to rows for training and validation that are too long."""
        trained = [name for name in ("train", "validation") if name in self.rows]
        data = self.recipe.data
        notes = [long_rows_note(self.tokens[name], self.rows[name], data) for name in trained]
        return list(filter(None, notes))

    def _special(self) -> list[str]:
        """Counts the rows whose own texts contain special tokens, such as the end of an answer."""
        added = self.tokenizer.added_tokens_decoder
        end = answer_end(self.tokenizer, self.recipe.data).id
        marks = [token.content for at, token in added.items() if token.special or at == end]
        pattern = re.compile("|".join(map(re.escape, marks)))
        return [
            f"{rows} special tokens of the base in the texts, such as {where} ({mark}): the model "
            "reads them as tokens"
            for rows, where, mark in (self._with(pattern) if marks else ())
        ]

    def _invisible(self) -> list[str]:
        """Counts the rows with characters that this preview does not show, such as carriage returns
        of Windows in the cells of a table."""
        return [
            f"{rows} characters that are not shown, such as {mark!r} in {where}: the model reads "
            "them, too"
            for rows, where, mark in self._with(INVISIBLE)
        ]

    def _with(self, pattern: re.Pattern[str]) -> Iterator[tuple[str, str, str]]:
        """Yields, for each split that has any, how many rows contain a pattern, the first of them,
        and what it contains."""
        for name, rows in self.rows.items():
            matches = ((row.where, pattern.search(_texts(row))) for row in rows)
            if marked := [(where, match[0]) for where, match in matches if match]:
                yield f"{name}: {_have(len(marked), 'row')}", *marked[0]

    def _unknown(self) -> list[str]:
        """Counts the rows with characters that the tokenizer does not know."""
        unknown = self.tokenizer.unk_token_id
        if unknown not in self.tokenizer(RARE, add_special_tokens=False)["input_ids"]:
            return []
        lines = []
        for name, rows in self.rows.items():
            pairs = zip(
                column(self.tokens[name], "row"), self.tokens[name]["input_ids"], strict=True
            )
            if indices := sorted({int(at) for at, ids in pairs if unknown in ids}):
                lines.append(
                    f"{name}: {_have(len(indices), 'row')} characters that the base's tokenizer "
                    f"does not know, such as {rows[indices[0]].where}: the model reads "
                    f"{self.tokenizer.unk_token} for them"
                )
        return lines

    def _duplicates(self) -> list[str]:
        train, lines = self.splits.train, []
        if noisy := prompts_with_several_answers(train):
            lines.append(f"train: {_have(noisy, 'prompt')} several answers")
        for held_out in filter(None, (self.splits.validation, self.splits.test)):
            pairs = near_duplicates(train, held_out)
            name = f"{held_out.name}: prompts that are nearly those of training rows"
            if pairs is None:
                lines.append(f"{name}: not looked for among more than {MOST_ROWS:,} rows")
            elif pairs:
                shown = ", ".join(f"{row} ~ {similar}" for row, similar in pairs[:EXTREMES])
                lines.append(f"{name}: {len(pairs)}, such as {shown}")
        return lines


def _have(count: int, noun: str) -> str:
    return f"{counted(count, noun)} {'has' if count == 1 else 'have'}"


def _texts(row: Row) -> str:
    """Returns the text of a row, or all texts in its messages and functions."""
    messages = [{**message, "role": ""} for message in row.messages]
    return row.text or "\0".join(strings_of([messages, row.tools]))


def _answers(rows: Rows) -> list[str]:
    """Counts each answer, if few answers make up all rows."""
    counts: Counter[str] = Counter()
    for row in rows:
        if row.messages:
            counts[row.messages[-1]["content"]] += 1
            if len(counts) > FEW_ANSWERS or row.messages[-1].get("tool_calls"):
                return []
    if not counts or 2 * len(counts) > counts.total():
        return []
    return ["answers: " + ", ".join(f"{answer} {n}" for answer, n in counts.most_common())]


def _template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[str]:
    """Describes what the chat template writes around a question and its answer."""
    if not rows[0].messages:
        return []
    turns = [("user", QUESTION), ("assistant", ANSWER)]
    if recipe.data.system:
        turns.insert(0, ("system", recipe.data.system))
    row = Row("", tuple({"role": role, "content": content} for role, content in turns))
    before, _, rest = Rendering(row, tokenizer, recipe.data).text.partition(QUESTION)
    between, _, after = rest.partition(ANSWER)
    pieces = [before, between, after]
    count = sum(len(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces)
    return [
        f"the chat template adds {counted(count, 'token')}: {before!r} before a question, "
        f"{between!r} before its answer, {after!r} after it",
        *template_notes(tokenizer, recipe.data),
    ]


def _ends(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[str]:
    """Describes which token ends an answer or a text, and where generation stops."""

    def shown(end: int | None) -> str:
        return "no token" if end is None else f"{tokenizer.decode([end])} ({end})"

    lines = []
    kinds = {bool(row.messages) for row in (rows[0], rows[-1])}
    if True in kinds:
        lines.append(f"answers end in {shown(answer_end(tokenizer, recipe.data).id)}")
    if False in kinds:
        lines.append(f"texts end in {shown(tokenizer.eos_token_id)}")
    stops = map(shown, end_tokens(recipe.model, recipe.data, tokenizer))
    return [*lines, f"generation stops at {', '.join(stops) or 'no token'}"]


def _runs(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Run]:
    """Returns the text in runs of target tokens and others, and which of them are targets.

    A token alone need not be a whole character, so the tokens of a run are decoded together.
    """
    pairs = zip(encoded.input_ids, encoded.labels, strict=True)
    return [
        (tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False), target)
        for target, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    ]


def _colored(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Text:
    from rich.text import Text

    text = Text()
    for shown, is_target in _runs(encoded, tokenizer):
        text.append(shown, style="bold green" if is_target else "dim")
    return text
