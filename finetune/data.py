"""Files and Hub datasets -> rows -> conversations; training, validation and test kept apart."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finequant.recipes.errors import UserError, listed
from finequant.recipes.schema import Data, Source

Message = dict[str, str]
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
CSV_CELL_LIMIT = 2**27


@dataclass(frozen=True)
class Row:
    """One training or evaluation row: a conversation, or raw text."""

    where: str
    """File and line, or dataset and index: what an error names."""
    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def key(self) -> str:
        """What a model is shown, case and white space aside: equal keys are the same row."""
        shown = [message["content"] for message in self.messages[:-1]] or [self.text]
        return " ".join("\n".join(shown).casefold().split())


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
    validation = _read_sources(data.validation, data, seed, notes)
    test = _read_sources(data.test, data, seed, notes)
    if not validation and data.validation_fraction:
        train, validation = _split_off(train, data.validation_fraction, seed)
        notes.append(f"validation: {len(validation)} rows split off, seed {seed}")
    if not test and data.test_fraction:
        train, test = _split_off(train, data.test_fraction, seed + 1)
        notes.append(f"test: {len(test)} rows split off, seed {seed}")
    train = _without_overlap(train, validation, test, data.overlap, notes)
    if data.duplicates == "drop":
        kept = list({row.key: row for row in reversed(train)}.values())[::-1]
        notes.append(f"train: {len(train) - len(kept)} repeated rows dropped")
        train = kept
    if not train:
        raise UserError("data.train: no rows are left to train on")
    return Splits(train, validation, test, notes)


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a .jsonl, .json, .csv or .parquet file as (where, row), where = "file:line".

    Raises:
        UserError: naming the line that cannot be read.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    try:
        if path.suffix == ".parquet":
            rows = _read_parquet(path)
        elif path.suffix in readers:
            rows = list(readers[path.suffix](path))
        else:
            raise UserError(f"{path}: expected a .jsonl, .json, .csv or .parquet file")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text ({error.reason}): save the file as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{path}: no rows in this file")
    return rows


def _read_jsonl(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", _json_object(line, f"{path}:{number}")


def _read_json(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a JSON list of objects, one for each row")
    return [(f"{path.name}[{index}]", row) for index, row in enumerate(rows)]


def _read_csv(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(CSV_CELL_LIMIT)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        start = 2
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}:{start}: not as many columns as the header's "
                        f"{len(reader.fieldnames or [])}: quote cells that contain a comma"
                    )
                yield f"{path.name}:{start}", row
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{path}:{start}: broken CSV: {error}: a stray quote? Double it inside a cell"
            ) from None


def _read_parquet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None
    return [(f"{path.name}[{index}]", row) for index, row in enumerate(rows)]


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _read_sources(sources: list[Source], data: Data, seed: int, notes: list[str]) -> list[Row]:
    rows: list[Row] = []
    for number, source in enumerate(sources):
        raw = _read_hub(source) if not _is_file(source) else read_rows(Path(source.source))
        form = _detect_format(source, raw[0][1])
        read = [_to_row(where, row, form, source, data.system) for where, row in raw]
        pick = random.Random(f"{seed}/{number}")
        if source.limit is not None and source.limit < len(read):
            read = [read[index] for index in sorted(pick.sample(range(len(read)), source.limit))]
        whole, part = divmod(source.weight, 1)
        extra = sorted(pick.sample(range(len(read)), round(part * len(read))))
        rows += read * int(whole) + [read[index] for index in extra]
        notes.append(f"{Path(source.source).name}: {len(read)} rows, format {form}")
    return rows


def _is_file(source: Source) -> bool:
    return Path(source.source).is_absolute()


def _read_hub(source: Source) -> list[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(
            source.source, source.name, split=source.split, revision=source.revision
        )
    # `datasets` raises its own errors, those of the Hub client, of HTTP and of the file readers.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"data: cannot load the dataset {source.source}: {reason}") from None
    return [(f"{source.source}[{index}]", row) for index, row in enumerate(dataset)]


def _detect_format(source: Source, row: dict[str, Any]) -> str:
    if source.columns:
        mapped = set(source.columns)
        return next((form for form in ("messages", "text") if form in mapped), "prompt_completion")
    if source.format != "auto":
        return source.format
    for form, columns in (
        ("messages", {"messages"}),
        ("messages", {"conversations"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("alpaca", {"instruction", "output"}),
        ("text", {"text"}),
    ):
        if columns <= row.keys():
            return form
    raise UserError(
        f"{source.source}: cannot tell the format from the columns {', '.join(map(str, row))}; "
        "expected messages, prompt and completion, instruction and output, or text. "
        "Map your own: columns: {prompt: QUESTION_COLUMN, completion: ANSWER_COLUMN}"
    )


def _to_row(where: str, row: dict[str, Any], form: str, source: Source, system: str | None) -> Row:
    def field(name: str, default: str | None = None) -> str:
        template = source.columns.get(name, name)
        if "{" not in template:
            return _cell(row, template, where, default)
        return re.sub(r"\{([^{}]+)\}", lambda match: _cell(row, match[1], where), template)

    if form == "text":
        text = field("text")
        if not text.strip():
            raise UserError(f"{where}: empty text")
        return Row(where, text=text)
    if form == "messages":
        messages = _chat(row, source.columns.get("messages", "messages"), where)
    elif form == "alpaca":
        extra = field("input", default="")
        prompt = field("instruction") + (f"\n\n{extra}" if extra.strip() else "")
        messages = [_message("user", prompt), _message("assistant", field("output"))]
    else:
        messages = [
            _message("user", field("prompt")),
            _message("assistant", field("completion")),
        ]
    if "system" in source.columns:
        system = field("system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, _message("system", system))
    _check_conversation(messages, where)
    return Row(where, messages=tuple(messages))


def _cell(row: dict[str, Any], column: str, where: str, default: str | None = None) -> str:
    value = row.get(column, default)
    if value is None:
        what = f"{column} is null" if column in row else f"no column {column}"
        raise UserError(f"{where}: {what}; the columns are {', '.join(map(str, row))}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _chat(row: dict[str, Any], column: str, where: str) -> list[Message]:
    turns = row.get(column, row.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: {column}: expected a list of role and content")
    messages = []
    for turn in turns:
        role = turn.get("role", SHAREGPT_ROLES.get(str(turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if not isinstance(content, str):
            raise UserError(f"{where}: {column}: a turn without text content: {turn}")
        messages.append(_message(str(role), content))
    return messages


def _check_conversation(messages: list[Message], where: str) -> None:
    roles = [message["role"] for message in messages]
    strange = sorted(set(roles) - {"system", "user", "assistant"})
    if strange:
        raise UserError(f"{where}: role {strange[0]!r}: expected system, user or assistant")
    turns = roles[1:] if roles and roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise UserError(
            f"{where}: the turns are {', '.join(roles) or 'none'}; expected an optional system "
            "message, then user and assistant in turn, ending with assistant"
        )
    empty = [message["role"] for message in messages if not message["content"].strip()]
    if empty:
        raise UserError(f"{where}: empty {empty[0]} message: remove the row or fill it in")


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
