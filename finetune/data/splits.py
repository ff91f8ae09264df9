"""Sources -> training, validation and test rows, kept apart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from finequant.finetune.data.readers import read_source
from finequant.finetune.data.rows import Row, detect_format, to_row
from finequant.recipes.errors import UserError, listed
from finequant.recipes.schema import Data, Source


class Splits(NamedTuple):
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    notes: list[str]
    """What was detected, split off, repeated and dropped, in words."""


def load_splits(data: Data, seed: int) -> Splits:
    """Reads every source and keeps the three splits disjoint.

    Raises:
        UserError: naming file and line of a broken row, or the rows that training shares with
            validation or test.
    """
    notes: list[str] = []
    train = _read_sources(data.train, data, seed, notes)
    validation = _weighted(_read_sources(data.validation, data, seed, notes), seed)
    test = _weighted(_read_sources(data.test, data, seed, notes), seed)
    if not validation and data.validation_fraction:
        train, validation = _split_off(train, data.validation_fraction, seed)
        notes.append(f"validation: {len(validation)} rows split off, seed {seed}")
    if not test and data.test_fraction:
        train, test = _split_off(train, data.test_fraction, seed + 1)
        notes.append(f"test: {len(test)} rows split off, seed {seed}")
    train = _without_overlap(train, validation, test, data.overlap, notes)
    if data.duplicates == "drop":
        first: dict[str, Row] = {}
        for row in train:
            first.setdefault(row.key, row)
        notes.append(f"train: {len(train) - len(first)} repeated rows dropped")
        train = list(first.values())
    train = _weighted(train, seed)
    if not train:
        raise UserError(
            "data.train: no rows are left to train on; give more rows, a larger weight, or a "
            f"smaller data.validation_fraction or data.test_fraction\n  {listed(notes)}"
        )
    return Splits(train, validation, test, notes)


def _read_sources(sources: list[Source], data: Data, seed: int, notes: list[str]) -> list[Row]:
    rows: list[Row] = []
    for number, source in enumerate(sources):
        raw = read_source(source)
        form = detect_format(source, raw[0][1])
        read = [to_row(where, row, form, source, data.system) for where, row in raw]
        pick = random.Random(f"{seed}/{number}")
        if source.limit is not None and source.limit < len(read):
            read = [read[index] for index in sorted(pick.sample(range(len(read)), source.limit))]
        rows += read
        weight = "" if source.weight == 1 else f", weight {source.weight:g}"
        notes.append(f"{Path(source.source).name}: {len(read)} rows, format {form}{weight}")
    return rows


def _weighted(rows: list[Row], seed: int) -> list[Row]:
    """Each row as often as its weight says; of a fraction, a seeded choice."""
    seen: list[Row] = []
    for weight in dict.fromkeys(row.weight for row in rows):
        alike = [row for row in rows if row.weight == weight]
        whole, part = divmod(weight, 1)
        pick = random.Random(f"{seed}/{weight}")
        extra = sorted(pick.sample(range(len(alike)), round(part * len(alike))))
        seen += alike * int(whole) + [alike[index] for index in extra]
    return seen


def _split_off(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits by key, so that repetitions of a row stay on one side."""
    keys = list(dict.fromkeys(row.key for row in rows))
    random.Random(seed).shuffle(keys)
    chosen = set(keys[: max(1, round(fraction * len(keys)))])
    return (
        [row for row in rows if row.key not in chosen],
        [row for row in rows if row.key in chosen],
    )


def _without_overlap(
    train: list[Row], validation: list[Row], test: list[Row], policy: str, notes: list[str]
) -> list[Row]:
    held_out = {row.key: row.where for row in [*validation, *test]}
    shared = [row for row in train if row.key in held_out]
    if not shared:
        return train
    if policy == "error":
        pairs = [f"{row.where} = {held_out[row.key]}" for row in shared]
        raise UserError(
            f"data: {len(shared)} training rows also occur in validation or test; remove them, "
            f"or leave them out of training with data.overlap=drop\n  {listed(pairs, most=10)}"
        )
    notes.append(f"train: {len(shared)} rows dropped that occur in validation or test")
    return [row for row in train if row.key not in held_out]
