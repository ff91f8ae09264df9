"""Sources -> training, validation and test rows, kept apart."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from finequant.finetune.data.readers import BadRowError, read_source
from finequant.finetune.data.rows import Row, RowReader
from finequant.recipes.errors import UserError, listed
from finequant.recipes.schema import Data, Source

FEW_PROMPTS = 10
"""Fewer distinct prompts than this can't be split by prompt: data.same_rows is then `row`."""
SHOWN = 5


class Splits(NamedTuple):
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    notes: list[str]
    """Notes on what was detected, left out, repaired, split off, repeated, and dropped."""


def load_splits(data: Data, seed: int) -> Splits:
    """Reads every source and keeps the three splits disjoint.

    Raises:
        UserError: naming file and line of every row that cannot be used, or the rows that training
            shares with validation or test.
    """
    reading = _Reading(data, seed)
    train, validation, test = map(reading.rows_of, (data.train, data.validation, data.test))
    reading.refuse_bad_rows()
    notes = reading.notes
    key = _identity(data, train, notes)
    validation, test = _weighted(validation, seed), _weighted(test, seed)
    if not validation and data.validation_fraction:
        train, validation = _split_off(train, data.validation_fraction, seed, key)
        notes.append(f"validation: {len(validation)} rows split off, seed {seed}")
    if not test and data.test_fraction:
        train, test = _split_off(train, data.test_fraction, seed + 1, key)
        notes.append(f"test: {len(test)} rows split off, seed {seed}")
    train = _without_overlap(train, validation, test, data, notes, key)
    if data.duplicates == "drop":
        first: dict[str, Row] = {}
        for row in train:
            first.setdefault(key(row), row)
        notes.append(f"train: {len(train) - len(first)} repeated rows dropped")
        train = list(first.values())
    train = _weighted(train, seed)
    if not train:
        raise UserError(
            "data.train: no rows are left to train on; give more rows, a larger weight, or a "
            f"smaller data.validation_fraction or data.test_fraction\n  {listed(notes)}"
        )
    return Splits(train, validation, test, notes)


@dataclass
class _Reading:
    """Reads sources; collects what there is to say about them, and the rows that are bad."""

    data: Data
    seed: int
    notes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def rows_of(self, sources: list[Source]) -> list[Row]:
        return [row for at, source in enumerate(sources) for row in self._rows_of(at, source)]

    def _rows_of(self, number: int, source: Source) -> list[Row]:
        reader, bad, rows = RowReader(source, self.data), [], []
        for where, read in read_source(source):
            try:
                if isinstance(read, BadRowError):
                    raise read
                rows.append(reader.read(where, read))
            except BadRowError as error:
                bad.append(str(error))
        rows = [row for row in rows if row is not None]
        if source.limit is not None and source.limit < len(rows):
            pick = random.Random(f"{self.seed}/{number}")
            rows = [rows[index] for index in sorted(pick.sample(range(len(rows)), source.limit))]
        self._note(Path(source.source).name, source, reader, bad, len(rows))
        return rows

    def _note(
        self, name: str, source: Source, reader: RowReader, bad: list[str], count: int
    ) -> None:
        self.bad += bad
        weight = "" if source.weight == 1 else f", weight {source.weight:g}"
        self.notes.append(f"{name}: {count} rows, format {reader.form}{weight}")
        self.notes += [f"{name}: {what}: {number}" for what, number in reader.counts.items()]
        if reader.unread:
            self.notes.append(f"{name}: not read: {', '.join(reader.unread)}")
        for what, rows in (("repaired", reader.repaired), ("bad rows dropped", bad)):
            if rows and not (what.startswith("bad") and self.data.bad_rows == "error"):
                self.notes.append(f"{name}: {len(rows)} {what}\n  {listed(rows, most=SHOWN)}")

    def refuse_bad_rows(self) -> None:
        if not self.bad or self.data.bad_rows != "error":
            return
        if len(self.bad) == 1:
            raise UserError(f"{self.bad[0]}; or leave such rows out with data.bad_rows=drop")
        raise UserError(
            f"data: {len(self.bad)} rows cannot be used; correct them, or set data.bad_rows to "
            f"drop, or to repair what can be repaired\n  {listed(self.bad)}"
        )


def _identity(data: Data, train: list[Row], notes: list[str]) -> Callable[[Row], str]:
    """Returns the key by which two rows are the same: the prompt, or prompt and answer."""
    by = data.same_rows
    if by is None:
        prompts = {row.prompt_key for row in train}
        answers = {row.key for row in train}
        by = "row" if len(prompts) < min(FEW_PROMPTS, len(answers)) else "prompt"
        if by == "row":
            notes.append(
                f"train: few prompts ({len(prompts)}): rows with the same prompt and different "
                "answers are treated as different rows (data.same_rows=row)"
            )
    return {"prompt": lambda row: row.prompt_key, "row": lambda row: row.key}[by]


def _weighted(rows: list[Row], seed: int) -> list[Row]:
    """Repeats each row by its weight; a fractional weight makes a seeded choice."""
    seen: list[Row] = []
    for weight in dict.fromkeys(row.weight for row in rows):
        alike = [row for row in rows if row.weight == weight]
        whole, part = divmod(weight, 1)
        pick = random.Random(f"{seed}/{weight}")
        extra = sorted(pick.sample(range(len(alike)), round(part * len(alike))))
        seen += alike * int(whole) + [alike[index] for index in extra]
    return seen


def _split_off(
    rows: list[Row], fraction: float, seed: int, key: Callable[[Row], str]
) -> tuple[list[Row], list[Row]]:
    """Splits by key, so that repetitions of a row stay on one side."""
    keys = list(dict.fromkeys(map(key, rows)))
    random.Random(seed).shuffle(keys)
    chosen = set(keys[: max(1, round(fraction * len(keys)))])
    return (
        [row for row in rows if key(row) not in chosen],
        [row for row in rows if key(row) in chosen],
    )


def _without_overlap(
    train: list[Row],
    validation: list[Row],
    test: list[Row],
    data: Data,
    notes: list[str],
    key: Callable[[Row], str],
) -> list[Row]:
    held_out = {key(row): row for row in [*validation, *test]}
    shared = [row for row in train if key(row) in held_out]
    if not shared:
        return train
    if data.overlap == "error":
        pairs = [f"{row.where} = {held_out[key(row)].where}" for row in shared]
        answers = any(row.key != held_out[key(row)].key for row in shared)
        raise UserError(
            f"data: {len(shared)} training rows also occur in validation or test; remove them, or "
            "leave them out of training with data.overlap=drop"
            + ("; answers differ: data.same_rows=row compares them too" if answers else "")
            + f"\n  {listed(pairs, most=10)}"
        )
    notes.append(f"train: {len(shared)} rows dropped that occur in validation or test")
    return [row for row in train if key(row) not in held_out]
