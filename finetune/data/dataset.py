"""Encodes rows, on all cores, as an Arrow dataset of tokens that trl's SFTTrainer takes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finequant.finetune.data.pool import computed
from finequant.finetune.data.rendering import TemplateCheck
from finequant.finetune.data.row import Row
from finequant.finetune.data.table import COLUMN, ROWS_AT_ONCE, TOKEN_KEYS, Rows
from finequant.finetune.data.tokens import IGNORED, encode_rows, pieces_of
from finequant.recipes.errors import UserError, counted, listed
from finequant.recipes.freshness import digest, made_once
from finequant.recipes.schema import Data
from finequant.recipes.terminal import Progress, say

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch, Schema
    from transformers import PreTrainedTokenizerBase

TOKENS = ["input_ids", "labels"]
TOKENS_FILE = "tokens.arrow"


def to_dataset(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    positions: int | None = None,
) -> Dataset:
    """Returns the columns `input_ids` and `labels`, which trl's SFTTrainer takes as they are.

    positions: those of the base, if rows with more tokens are to be refused.

    Raises:
        UserError: naming rows in which no target token is left, or that are too long for the base
            or, where data.long_rows is error, for the recipe.
    """
    return _to_learn(encoded_rows(rows, tokenizer, data), rows, data, positions)


def dataset_for_training(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, data: Data, positions: int
) -> Dataset:
    """Does what `to_dataset` does, and says how many rows are left out or cut, as too long."""
    encoded = encoded_rows(rows, tokenizer, data)
    tokens = _to_learn(encoded, rows, data, positions)
    if note := long_rows_note(encoded, rows, data):
        say(f"data.{note}")
    return tokens


def _to_learn(encoded: Dataset, rows: Sequence[Row], data: Data, positions: int | None) -> Dataset:
    kept = _usable(encoded, rows, data)
    if positions is not None and positions < data.max_length:
        _check_positions(encoded.select(kept), rows, data, positions)
    tokens = encoded.select_columns(TOKENS)
    return tokens if len(kept) == len(tokens) else tokens.select(kept)


def encoded_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: Data) -> Dataset:
    """Returns all rows as tokens, even those without target tokens; those of a table on disk are
    stored beside it.

    Columns: `input_ids`, `labels`, `length` before truncation, `targets` (the number of target
    tokens), and `row`, the index in `rows`.

    Raises:
        UserError: for what the chat template refuses or leaves out.
    """
    from datasets import Dataset, disable_caching

    disable_caching()  # or `map`, which trl's packing calls, writes into the folder of these files
    if not isinstance(rows, Rows):
        rows = Rows.of(rows)
    if not tokenizer.is_fast and data.loss_on == "assistant":
        say(
            "data: this tokenizer gives no offsets: prompts and answers are tokenized separately, "
            "so ids can differ from those of the whole text"
        )
    if rows.folder is None or not os.access(rows.folder.parent, os.W_OK):
        return _encoded(rows, Encoder(rows, tokenizer, data), None)

    def write(folder: Path) -> None:
        _encoded(rows, Encoder(rows, tokenizer, data), folder)

    inputs = _inputs(rows, tokenizer, data)
    folder = made_once(rows.folder.with_name(f"tokens-{digest(inputs)}"), inputs, write)
    os.utime(folder)  # the oldest folders are removed first
    return Dataset.from_file(str(folder / TOKENS_FILE))


def _encoded(rows: Rows, encoder: Encoder, folder: Path | None) -> Dataset:
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    file = folder / TOKENS_FILE if folder else None
    sink = pyarrow.OSFile(str(file), "wb") if file else pyarrow.BufferOutputStream()
    starts = range(0, len(rows), ROWS_AT_ONCE)
    with (
        sink,
        pyarrow.ipc.new_stream(sink, _schema()) as writer,
        closing(Progress(f"data: tokens of {rows.name} rows", len(rows))) as progress,
    ):
        for start, batch in zip(starts, computed(encoder, starts), strict=True):
            writer.write_batch(batch)
            progress.show(min(start + ROWS_AT_ONCE, len(rows)))
    if file:
        return Dataset.from_file(str(file))
    return Dataset(InMemoryTable(pyarrow.ipc.open_stream(sink.getvalue()).read_all()))


def _inputs(rows: Rows, tokenizer: PreTrainedTokenizerBase, data: Data) -> dict[str, Any]:
    """Returns everything that decides the tokens of a table's rows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "rows": f"{rows.folder.name}/{rows.name}",
        "data": data.model_dump(mode="json", include=set(TOKEN_KEYS) - {"packing"}),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "class": type(tokenizer).__name__,
        "template": tokenizer.chat_template,
        "special": {key: str(token) for key, token in tokenizer.special_tokens_map.items()},
    }


class Encoder:
    """Encodes a batch of rows; each process has a copy."""

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        self.rows, self.tokenizer, self.data = rows, tokenizer, data
        self._check = TemplateCheck(tokenizer, data)

    def __call__(self, start: int) -> RecordBatch:
        """Returns the tokens of the rows from index `start` on."""
        import pyarrow

        rows = list(self.rows[start : start + ROWS_AT_ONCE])
        self._check(rows)
        encoded = encode_rows(rows, self.tokenizer, self.data)
        pieces = [
            (piece, index)
            for index, (item, row) in enumerate(zip(encoded, rows, strict=True), start)
            for piece in pieces_of(item, row, self.data)
        ]
        columns = {
            "input_ids": [piece.input_ids for piece, _ in pieces],
            "labels": [piece.labels for piece, _ in pieces],
            "length": [piece.full_length for piece, _ in pieces],
            # Nothing predicts the first token of a row.
            "targets": [_targets(piece.labels[1:]) for piece, _ in pieces],
            COLUMN: [index for _, index in pieces],
        }
        return pyarrow.RecordBatch.from_pydict(columns, _schema())


def _schema() -> Schema:
    import pyarrow

    number, ids = pyarrow.int32(), pyarrow.list_(pyarrow.int32())
    return pyarrow.schema(
        {"input_ids": ids, "labels": ids, "length": number, "targets": number}
        | {COLUMN: pyarrow.int64()}
    )


def _targets(labels: list[int]) -> int:
    return len(labels) - labels.count(IGNORED)


def column(dataset: Dataset, name: str) -> np.ndarray:
    """Returns a column of numbers."""
    parts = dataset.select_columns([name]).with_format("numpy").iter(batch_size=100_000)
    return np.concatenate([np.empty(0, int), *(part[name] for part in parts)])


def lengths(dataset: Dataset) -> list[int]:
    """Returns the number of tokens of each row."""
    import pyarrow.compute

    parts = dataset.select_columns(TOKENS[:1]).with_format("arrow").iter(batch_size=10_000)
    return [
        length
        for part in parts
        for length in pyarrow.compute.list_value_length(part[TOKENS[0]]).to_pylist()
    ]


def long_rows_note(encoded: Dataset, rows: Rows, data: Data) -> str | None:
    """Says how many rows are longer than data.max_length, and what happens to them."""
    count = len(np.unique(column(encoded, COLUMN)[column(encoded, "length") > data.max_length]))
    done = "left out" if data.long_rows == "drop" else "cut to that length"
    longer = f"{counted(count, 'row')} longer than data.max_length={data.max_length}"
    return f"{rows.name}: {longer} {done}" if count else None


def _usable(encoded: Dataset, rows: Sequence[Row], data: Data) -> np.ndarray:
    """Returns the indices of the rows to train on.

    Raises:
        UserError: if there are none, or for rows that the recipe does not allow.
    """
    length, targets, index = (column(encoded, name) for name in ("length", "targets", COLUMN))
    which, is_long = _name_of(rows), length > data.max_length
    if is_long.any() and data.long_rows == "error":
        raise UserError(
            f"{which}: {counted(is_long.sum(), 'row')} longer than data.max_length="
            f"{data.max_length}; raise it, or set data.long_rows to truncate or drop\n  "
            f"{_lengths_of(rows, index, length, is_long)}"
        )
    left = ~is_long if data.long_rows == "drop" else np.ones(len(length), bool)
    is_empty = left & (targets == 0)
    kept = np.flatnonzero(left & ~is_empty)
    if count := is_empty.sum():
        names = [row.where for row, _ in _first(rows, index, length, is_empty)]
        why = f"within data.max_length={data.max_length} tokens there is no answer"
        if data.bad_rows == "error" or not len(kept):
            drop = ", or set data.long_rows=drop" if len(kept) else ""  # some would be left
            raise UserError(
                f"{which}: nothing is left to learn in {counted(count, 'row')}: {why}; raise "
                f"data.max_length{drop}\n  {listed(names, SHOWN, count)}"
            )
        say(f"{which}: bad rows dropped: {count}: {why}\n  {listed(names, SHOWN, count)}")
    elif not len(kept):
        raise _all_too_long(rows, index, length, data)
    return kept


def _all_too_long(
    rows: Sequence[Row], index: np.ndarray, length: np.ndarray, data: Data
) -> UserError:
    which, shortest = _name_of(rows), int(length.argmin())
    every = "the only row is" if len(rows) == 1 else f"all {len(rows)} rows are"
    is_split_off = which == "data.validation" and not data.validation
    return UserError(
        f"{which}: {every} longer than data.max_length={data.max_length}, and "
        "data.long_rows=drop leaves none; raise data.max_length, or set data.long_rows=truncate"
        + (", or set data.validation_fraction=0 to split none off" if is_split_off else "")
        + f"\n  {rows[int(index[shortest])].where}: {length[shortest]} tokens"
        + (", the shortest" if len(rows) > 1 else "")
    )


def _check_positions(encoded: Dataset, rows: Sequence[Row], data: Data, positions: int) -> None:
    """Refuses rows, cut to data.max_length, that have more tokens than the base has positions."""
    length, index = column(encoded, "length"), column(encoded, COLUMN)
    is_long = length > positions
    if is_long.any():
        raise UserError(
            f"{_name_of(rows)}: {counted(is_long.sum(), 'row')} longer than the {positions} "
            f"positions of the base, which data.max_length={data.max_length} allows: set "
            f"data.max_length={positions}; data.long_rows decides what happens to longer rows\n  "
            f"{_lengths_of(rows, index, length, is_long)}"
        )


SHOWN = 10


def _name_of(rows: Sequence[Row]) -> str:
    return f"data.{rows.name}" if isinstance(rows, Rows) and rows.name else "data"


def _lengths_of(
    rows: Sequence[Row], index: np.ndarray, length: np.ndarray, chosen: np.ndarray
) -> str:
    """Lists the first of the chosen rows with their lengths."""
    lines = [f"{row.where}: {n} tokens" for row, n in _first(rows, index, length, chosen)]
    return listed(lines, SHOWN, chosen.sum())


def _first(
    rows: Sequence[Row], index: np.ndarray, length: np.ndarray, chosen: np.ndarray
) -> Iterator[tuple[Row, int]]:
    """Yields the first of the chosen rows, and their lengths."""
    at = np.flatnonzero(chosen)[:SHOWN]
    return ((rows[int(index[position])], int(length[position])) for position in at)
