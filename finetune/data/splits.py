"""Sources -> training, validation and test rows, kept apart."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finequant.finetune.data.card import names_from
from finequant.finetune.data.columns import columns_of
from finequant.finetune.data.files import BadRowError, Unparsed, parsed
from finequant.finetune.data.pool import computed, in_batches
from finequant.finetune.data.readers import files_of_no_split, read_unparsed
from finequant.finetune.data.row import Row
from finequant.finetune.data.rows import Findings, RowReader
from finequant.finetune.data.table import ROWS_AT_ONCE, TABLE, Hashes, Rows, TableWriter, hashed
from finequant.recipes.errors import UserError, counted, listed
from finequant.recipes.schema import Data, Source
from finequant.recipes.sources import kind_of

FEW_PROMPTS = 10
"""Rows with fewer distinct prompts cannot be split by prompt: data.same_rows is then `row`."""

NAMED = 20
"""Rows that an error names for each reason."""

SHOWN = 5


class Splits(NamedTuple):
    train: Rows
    validation: Rows
    test: Rows
    notes: list[str]
    """Notes on what was detected, left out, repaired, split off, and dropped."""


def load_splits(data: Data, seed: int, folder: Path | None = None) -> Splits:
    """Reads every source and keeps the three splits disjoint.

    folder: where the table of all rows is written; None keeps it in memory.

    Raises:
        UserError: naming file and line of every row that cannot be used, or the rows that two
            splits share.
    """
    with TableWriter(folder / TABLE if folder else None) as table:
        reading = _Reading(data, seed, table)
        train, validation, test = map(reading.indices_of, (data.train, data.validation, data.test))
    reading.refuse_bad_rows()
    split = _Splitting(data, seed, reading, table.column)
    return split(train, validation, test)


@dataclass
class _Reading:
    """Reads sources into a table; collects notes, bad rows, and, for each row in the table, what
    decides its split."""

    data: Data
    seed: int
    table: TableWriter
    notes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    prompts: list[np.ndarray] = field(default_factory=list)
    """Hashes of the prompts, batch by batch."""
    answers: list[np.ndarray] = field(default_factory=list)
    """Hashes of prompt and answer."""
    weights: list[np.ndarray] = field(default_factory=list)
    size: int = 0
    """Rows in the table."""

    def indices_of(self, sources: list[Source]) -> np.ndarray:
        """Reads sources and returns the indices of their rows in the table."""
        indices = [self._indices_of(at, source) for at, source in enumerate(sources)]
        return np.concatenate([np.empty(0, int), *indices])

    def _indices_of(self, number: int, source: Source) -> np.ndarray:
        read, findings, start = _BatchReader(source, self.data), Findings(), self.size
        for rows in computed(read, in_batches(read_unparsed(source), ROWS_AT_ONCE)):
            read.form = rows.form
            findings.add(rows.findings)
            self._add(rows, source.weight)
        indices = np.arange(start, self.size)
        if source.limit is not None and source.limit < len(indices):
            pick = random.Random(f"{self.seed}/{number}")
            indices = indices[sorted(pick.sample(range(len(indices)), source.limit))]
        self._note(source, read.form, findings, len(indices))
        return indices

    def _add(self, rows: _Batch, weight: float) -> None:
        self.table.write(rows.contents)
        self.prompts.append(rows.prompts)
        self.answers.append(rows.answers)
        self.weights.append(np.full(len(rows.contents), weight))
        self.size += len(rows.contents)

    def _note(self, source: Source, form: str, findings: Findings, count: int) -> None:
        name, bad = Path(source.source).name, findings.bad
        name += f" ({source.split})" if source.split != "train" else ""
        if _content(source) not in self.read:  # training and test may read the same file
            self.bad += bad
        self.read.add(_content(source))
        weight = "" if source.weight == 1 else f", weight {source.weight:g}"
        first = " (the first ones)" if source.streaming and count == source.limit else ""
        self.notes.append(f"{name}: {counted(count, 'row')}{first}, format {form}{weight}")
        self.notes += [f"{name}: {what}: {number}" for what, number in findings.counts.items()]
        if files := files_of_no_split(source):
            self.notes.append(
                f"{name}: files that belong to no split, not read: {columns_of(files)}"
            )
        if named := names_from(source):
            self.notes.append(f"{name}: {named}")
        if findings.unread:
            self.notes.append(f"{name}: not read: {', '.join(findings.unread)}")
        for what, rows in (("repairs", findings.repaired), ("bad rows dropped", bad)):
            if rows and not (what.startswith("bad") and self.data.bad_rows == "error"):
                self.notes.append(f"{name}: {what}: {len(rows)}\n  {listed(rows, most=SHOWN)}")

    def refuse_bad_rows(self) -> None:
        if not self.bad or self.data.bad_rows != "error":
            return
        problems = _by_reason(self.bad)
        if len(problems) == 1:
            others = "; or leave such rows out with data.bad_rows=drop" if self.size else ""
            raise UserError(problems[0] + others)
        raise UserError(
            f"data: {len(self.bad)} rows cannot be used; correct them, or set data.bad_rows to "
            f"drop, or to repair what can be repaired\n  {listed(problems)}"
        )


def _content(source: Source) -> str:
    """Returns a key that sources share if they read the same rows, however many they use."""
    return source.model_dump_json(exclude={"weight", "limit"})


def _by_reason(bad: list[str]) -> list[str]:
    """Makes one line for all rows with the same problem, which names the first NAMED of them."""
    rows: dict[str, list[str]] = {}
    for problem in bad:
        where, _, reason = problem.partition(": ")
        rows.setdefault(reason, []).append(where)
    return [
        ", ".join(lines[:NAMED])
        + (f" and {rest} more" if (rest := len(lines) - NAMED) > 0 else "")
        + f": {reason}"
        for reason, lines in rows.items()
    ]


class _Batch(NamedTuple):
    """Some rows of a source as JSON, with their hashes, and findings about them."""

    contents: list[bytes]
    prompts: np.ndarray
    answers: np.ndarray
    form: str
    findings: Findings


@dataclass
class _BatchReader:
    """Parses and checks a batch of a source's entries."""

    source: Source
    data: Data
    form: str = ""

    def __call__(self, batch: list[Unparsed]) -> _Batch:
        reader, contents = RowReader(self.source, self.data, self.form), []
        prompts, answers = array("Q"), array("Q")
        for where, unparsed in batch:
            try:
                content = parsed(unparsed)
                if isinstance(content, BadRowError):
                    raise content
                if row := reader.read(where, content):
                    contents.append(row.to_json())
                    prompts.append(hashed(row.prompt_key))
                    answers.append(hashed(row.key))
            except BadRowError as error:
                reader.findings.bad.append(str(error))
        hashes = np.array(prompts), np.array(answers)
        return _Batch(contents, *hashes, reader.form, reader.findings)


class _Splitting:
    """Assigns rows, given as indices into the table, to splits."""

    def __init__(self, data: Data, seed: int, reading: _Reading, column) -> None:
        self.data, self.seed, self.notes, self.column = data, seed, reading.notes, column
        prompts, answers = (
            [np.empty(0, np.uint64), *h] for h in (reading.prompts, reading.answers)
        )
        self.hashes = Hashes(np.concatenate(prompts), np.concatenate(answers))
        self.weights = np.concatenate([np.empty(0), *reading.weights])

    def __call__(self, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Splits:
        """Returns the splits.

        Raises:
            UserError: for rows that two splits share, or if none are left for training.
        """
        data, seed, notes = self.data, self.seed, self.notes
        self.keys = self._keys(train)
        validation, test = self._weighted(validation), self._weighted(test)
        validation = self._without_overlap(validation, test, "validation", "test")
        held_out = np.concatenate([validation, test])
        train = self._without_overlap(train, held_out, "train", "validation or test")
        if not len(validation) and data.validation_fraction:
            train, validation = self._split_off(train, data.validation_fraction, seed)
            notes.append(f"validation: {counted(len(validation), 'row')} split off, seed {seed}")
        if not len(test) and data.test_fraction:
            train, test = self._split_off(train, data.test_fraction, seed + 1)
            notes.append(f"test: {counted(len(test), 'row')} split off, seed {seed}")
        if data.duplicates == "drop":
            first = _firsts(self.keys[train])
            notes.append(f"train: {counted(len(train) - len(first), 'repeated row')} dropped")
            train = train[first]
        train = self._weighted(train)
        if not len(train):
            has_text = any(kind_of(Path(source.source))[0] == ".txt" for source in data.train)
            raise UserError(
                "data.train: no rows are left to train on"
                + (" (a .txt file is one row)" if has_text else "")
                + "; add rows, or set a larger weight, or a smaller data.validation_fraction or "
                "data.test_fraction\n  " + listed(notes)
            )
        splits = [
            Rows(self.column, rows, name=name, hashes=self.hashes)
            for name, rows in zip(Splits._fields, (train, validation, test), strict=False)
        ]
        return Splits(*splits, notes)

    def _keys(self, train: np.ndarray) -> np.ndarray:
        """Returns the keys by which two rows are the same: the prompt, or prompt and answer."""
        by = self.data.same_rows
        if by is None:
            prompts = len(np.unique(self.hashes.prompts[train]))
            answers = len(np.unique(self.hashes.rows[train]))
            by = "row" if prompts < min(FEW_PROMPTS, answers) else "prompt"
            if by == "row":
                self.notes.append(
                    f"train: few prompts ({prompts}): rows with the same prompt and different "
                    "answers are treated as different rows (data.same_rows=row)"
                )
        return {"prompt": self.hashes.prompts, "row": self.hashes.rows}[by]

    def _weighted(self, rows: np.ndarray) -> np.ndarray:
        """Repeats each row by its weight; a fractional weight makes a seeded choice."""
        seen = [np.empty(0, int)]
        for weight in dict.fromkeys(self.weights[rows].tolist()):
            alike = rows[self.weights[rows] == weight]
            whole, part = divmod(weight, 1)
            pick = random.Random(f"{self.seed}/{weight}")
            extra = sorted(pick.sample(range(len(alike)), round(part * len(alike))))
            seen += [np.tile(alike, int(whole)), alike[extra]]
        return np.concatenate(seen)

    def _split_off(
        self, rows: np.ndarray, fraction: float, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Splits by key, so that repetitions of a row stay on one side."""
        keys = self.keys[rows][_firsts(self.keys[rows])]
        order = list(range(len(keys)))
        random.Random(seed).shuffle(order)
        chosen = keys[order[: max(1, round(fraction * len(keys)))]]
        is_chosen = np.isin(self.keys[rows], chosen)
        return rows[~is_chosen], rows[is_chosen]

    def _without_overlap(
        self, rows: np.ndarray, others: np.ndarray, name: str, where: str
    ) -> np.ndarray:
        """Returns the rows that are not among the others; `name` and `where` say which these are.

        Raises:
            UserError: naming the shared rows, unless they may be dropped.
        """
        keys, data = self.keys, self.data
        is_shared = np.isin(keys[rows], keys[others])
        shared = rows[is_shared]
        if not len(shared):
            return rows
        if data.overlap == "error":
            held_out = {keys[row]: row for row in others}
            pairs = [(row, held_out[keys[row]]) for row in shared]
            names = Rows(self.column, np.array(pairs).ravel())
            listing = [f"{row.where} = {same.where}" for row, same in _in_pairs(names[:20])]
            answers = any(self.hashes.rows[row] != self.hashes.rows[same] for row, same in pairs)
            count = len(shared)
            kind = "training" if name == "train" else name
            these = "it" if count == 1 else "them"
            advice = f"remove {these}, or leave {these} out of {kind} with data.overlap=drop"
            sources = [{*map(_content, part)} for part in (data.train, data.validation, data.test)]
            if sum(map(len, sources)) > len(set.union(*sources)):
                advice = "name other rows there, or none, and let data.test_fraction split some off"
            shared_rows = (
                f"1 {kind} row also occurs" if count == 1 else f"{count} {kind} rows also occur"
            )
            raise UserError(
                f"data: {shared_rows} in {where}; {advice}"
                + ("; answers differ: data.same_rows=row compares them too" if answers else "")
                + f"\n  {listed(listing, 10, len(pairs))}"
            )
        self.notes.append(f"{name}: {counted(len(shared), 'row')} dropped, in {where} too")
        return rows[~is_shared]


def _in_pairs(rows: Rows) -> list[tuple[Row, Row]]:
    return list(zip(rows[::2], rows[1::2], strict=True))


def _firsts(keys: np.ndarray) -> np.ndarray:
    """Returns the indices at which keys occur for the first time, in order."""
    return np.sort(np.unique(keys, return_index=True)[1])
