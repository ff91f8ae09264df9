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
CHAT_COLUMNS = ("messages", "conversations")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
CSV_CELL_LIMIT = 2**27
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
UNREADABLE = re.compile(r"[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One training or evaluation row: a conversation, or raw text."""

    where: str
    """File and line, or dataset and index: what an error names."""
    messages: tuple[Message, ...] = ()
    text: str = ""
    weight: float = 1.0
    """How often it is seen in an epoch."""

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


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a .jsonl, .json, .csv, .parquet or .txt file as (where, row), where = "file:line"; a
    .txt file is one row with a text.

    Raises:
        UserError: naming the line that cannot be read.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".txt": _read_text}
    try:
        if path.suffix.lower() == ".parquet":
            rows = _read_parquet(path)
        elif path.suffix.lower() in readers:
            rows = list(readers[path.suffix.lower()](path))
        else:
            raise UserError(f"{path}: expected a .jsonl, .json, .csv, .parquet or .txt file")
    except UnicodeDecodeError:
        where = f"{path}:{_line_not_in_utf8(path)}"
        raise UserError(f"{where}: not UTF-8 text: save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{path}: no rows in this file")
    return rows


def _line_not_in_utf8(path: Path) -> int:
    """The error itself counts from the beginning of a buffer, not of the file."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    return re.split(r"[\udc80-\udcff]", text, maxsplit=1)[0].count("\n") + 1


def _read_jsonl(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", _json_object(line, f"{path}:{number}")


def _read_text(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8-sig")
    return [(path.name, {"text": text})] if text.strip() else []


def _read_json(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8-sig")
    rows = _parse_json(text, str(path), "a list of objects", lines=True) if text.strip() else []
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of objects, found {_shown(rows)}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}[{index}]: expected a JSON object, found {_shown(row)}")
        yield f"{path.name}[{index}]", row


def _read_csv(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(CSV_CELL_LIMIT)
    header: list[str] = []
    end = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for cells in reader:
                # A quoted cell may run over several lines; the row is named by its first.
                start, end = end + 1, reader.line_num
                if not cells:
                    continue
                if not header:
                    header = _unique(cells, f"{path}:{start}")
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}:{start}: {len(cells)} columns, where the header has "
                        f"{len(header)}: quote cells that contain a comma"
                    )
                yield f"{path.name}:{start}", dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{path}:{end + 1}: broken CSV: {error}: a stray quote? Double it inside a cell"
            ) from None


def _unique(header: list[str], where: str) -> list[str]:
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"{where}: two columns are called {repeated!r}: rename one of them")
    return header


def _read_parquet(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a parquet file: {reason}") from None
    return [(f"{path.name}[{index}]", row) for index, row in enumerate(rows)]


def _json_object(line: str, where: str) -> dict[str, Any]:
    row = _parse_json(line.strip(), where, "one whole object on each line")
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: expected a JSON object on each line, found {_shown(row)}; "
            "a JSON list belongs in a .json file"
        )
    return row


def _parse_json(text: str, where: str, expected: str, lines: bool = False) -> Any:
    """With `lines`, text is all of a file, and an error adds its line to `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if lines else ""
        raise UserError(
            f"{where}{line}: broken JSON at column {error.colno}: {error.msg}; expected {expected}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise UserError(f"{where}: this JSON cannot be read: {error}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _read_sources(sources: list[Source], data: Data, seed: int, notes: list[str]) -> list[Row]:
    rows: list[Row] = []
    for number, source in enumerate(sources):
        raw = _read_hub(source) if not _is_file(source) else read_rows(Path(source.source))
        form = _detect_format(source, raw[0][1])
        read = [_to_row(where, row, form, source, data.system) for where, row in raw]
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
        raise UserError(
            f"data: cannot load the dataset {source.source}: {reason}; check its id, name, split "
            "and revision, the network, and `hf auth login` if it is gated"
        ) from None
    if not len(dataset):
        raise UserError(f"data: no rows in the dataset {source.source}, split {source.split}")
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
        f"{source.source}: cannot tell the format from the columns {_columns(row)}; "
        "expected messages, prompt and completion, instruction and output, or text. "
        "Map your own: columns: {prompt: QUESTION_COLUMN, completion: ANSWER_COLUMN}"
    )


def _to_row(where: str, row: dict[str, Any], form: str, source: Source, system: str | None) -> Row:
    def field(name: str, default: str | None = None) -> str:
        template = source.columns.get(name, name)
        if "{" not in template:
            return _cell(row, template, where, default)
        text, found = PLACEHOLDER.subn(lambda match: _cell(row, match[1], where), template)
        if not found:
            raise UserError(
                f"{where}: columns.{name}: {template!r} names no column; write {{COLUMN}} "
                f"with one of {_columns(row)}"
            )
        return text

    if form == "text":
        text = field("text")
        if not text.strip():
            raise UserError(f"{where}: empty text: remove the row or fill it in")
        _check_characters(text, where)
        return Row(where, text=text, weight=source.weight)
    if form == "messages":
        messages = _chat(row, source.columns.get("messages"), where)
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
    _check_conversation(messages, where)
    if system and messages[0]["role"] != "system":
        _check_characters(system, where)
        messages.insert(0, _message("system", system))
    return Row(where, messages=tuple(messages), weight=source.weight)


def _cell(row: dict[str, Any], column: str, where: str, default: str | None = None) -> str:
    value = row.get(column)
    if value is None:
        value = default
    if value is None:
        what = f"{column} is null" if column in row else f"no column {column}"
        raise UserError(f"{where}: {what}; the columns are {_columns(row)}")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        raise UserError(
            f"{where}: {column} is a list of messages, expected text; put the whole "
            "conversation into one column `messages`"
        )
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # a date, bytes; NaN, which stands for a missing value
        raise UserError(
            f"{where}: {column} is {_shown(value)}, expected text: convert it or remove the row"
        ) from None


def _columns(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _chat(row: dict[str, Any], column: str | None, where: str) -> list[Message]:
    column = column or next((name for name in CHAT_COLUMNS if name in row), CHAT_COLUMNS[0])
    if column not in row:
        raise UserError(f"{where}: no column {column}; the columns are {_columns(row)}")
    turns = row[column]
    if isinstance(turns, str):  # a cell of a CSV file
        turns = _parse_json(turns, f"{where}: {column}", "a list of role and content")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(
            f"{where}: {column}: expected a list of role and content, found {_shown(turns)}"
        )
    messages = []
    for turn in turns:
        speaker = turn.get("from")
        role = turn.get("role", SHAREGPT_ROLES.get(str(speaker), speaker))
        content = turn.get("content", turn.get("value"))
        if not isinstance(content, str):
            raise UserError(
                f"{where}: {column}: a turn whose content is no text: {_shown(turn)}; "
                "write the content as a string, or remove the row"
            )
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
    for message in messages:
        _check_characters(message["content"], where)


def _check_characters(text: str, where: str) -> None:
    """Refuses what JSON can write but no tokenizer reads, and the traces of a damaged file."""
    wrong = UNREADABLE.search(text)
    if wrong:
        raise UserError(
            f"{where}: character {wrong.start() + 1} is U+{ord(wrong[0]):04X}, which is no text "
            "(half a surrogate pair, or NUL): write the file as plain UTF-8, or remove the row"
        )


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
