"""JSON files -> rows: lines, lists, and objects that hold lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from finequant.finetune.data.files import BadRowError, Line, Unparsed, open_text
from finequant.recipes.errors import UserError, shown

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval"},
}
"""Names of splits -> the words for them in the names of files and keys."""
NAME_SPLIT = "choose by `split` of the source, or by --split of `finequant init`"


def read_json_file(path: Path, kind: str, split: str) -> Iterator[Unparsed]:
    """Yields the rows of JSON Lines, or of one JSON value."""
    if _has_json_lines(path, kind):
        yield from _read_json_lines(path)
    else:
        yield from _read_json(path, split)


def _has_json_lines(path: Path, kind: str) -> bool:
    """Says whether a file is JSON Lines, judging by its content, because its name may mislead."""
    with open_text(path) as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines, ""), next(lines, None)
    try:
        whole = json.loads(first)
    except (ValueError, RecursionError):
        # The first line may be the beginning of a list or object that goes on below.
        return kind != ".json" and not _is_json(path)
    if second is None and not isinstance(whole, dict):  # a list of all rows
        return False
    return second is not None or kind != ".json" or _wrapped(whole) is None


def _is_json(path: Path) -> bool:
    with open_text(path) as file:
        try:
            json.load(file)
        except (ValueError, RecursionError):
            return False
    return True


def _read_json_lines(path: Path) -> Iterator[Unparsed]:
    with open_text(path, is_tracked=True) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", Line(line.strip(), f"{path}:{number}")


def _read_json(path: Path, split: str) -> Iterator[Unparsed]:
    """Reads a list of rows, or an object that contains one: see `_wrapped`."""
    with open_text(path) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}; expected "
            "a list of objects"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: this JSON cannot be read: {error}") from None
    if isinstance(content, dict):
        content = _unwrapped(content, path, split)
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a JSON list of objects, found {shown(content)}")
    for index, row in enumerate(content):
        where = f"{path.name}[{index}]"
        if not isinstance(row, dict):
            row = BadRowError(f"{path}[{index}]: expected a JSON object, found {shown(row)}")
        yield where, row


def _wrapped(content: dict[str, Any]) -> dict[str, list] | None:
    """Returns the lists of rows in an object, by key; None if the object is itself a row.

    Known forms are {"data": [rows]} with any keys, {"train": [rows], "test": [rows]},
    {id: row, ...}, {column: [values], ...} with columns of equal length, and what pandas writes:
    {column: {"0": value, ...}, ...} and {"columns": [names], "data": [[values], ...]}.
    """
    values = list(content.values())
    if values and all(isinstance(value, dict) for value in values):
        index = list(values[0])
        if (
            index
            and all(key.isdecimal() for key in index)
            and all(list(c) == index for c in values)
        ):
            columns = (column.values() for column in values)
            return {
                "": [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
            }
        return {"": values}
    names, cells = content.get("columns"), content.get("data")
    if _are_rows_of(names, cells):
        return {"": [dict(zip(names, row, strict=True)) for row in cells]}
    lists = {
        key: value
        for key, value in content.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    turns = [key for key, items in lists.items() if {"role", "from"} & items[0].keys()]
    if lists and not turns:
        return lists
    columns = [value for value in values if isinstance(value, list)]
    if len(columns) == len(values) > 1 and len({len(column) for column in columns}) == 1:
        rows = [dict(zip(content, cells, strict=True)) for cells in zip(*values, strict=True)]
        return {"": rows} if rows else None
    return None


def lists_of(path: Path, kind: str) -> list[str]:
    """Returns the keys under which a JSON file has lists of rows; none if it is broken."""
    with open_text(path) as file:
        if not file.read(1000).lstrip().startswith("{"):
            return []
    if _has_json_lines(path, kind):
        return []
    with open_text(path) as file, suppress(ValueError, RecursionError):
        return list(_wrapped(json.load(file)) or {})
    return []


def _are_rows_of(names: Any, cells: Any) -> bool:
    """Says whether `names` are those of columns, and `cells` has as many values for each row."""
    return (
        isinstance(names, list)
        and isinstance(cells, list)
        and all(isinstance(name, str) for name in names)
        and all(isinstance(row, list) and len(row) == len(names) for row in cells)
    )


def _unwrapped(content: dict[str, Any], path: Path, split: str) -> Any:
    lists = _wrapped(content)
    if lists is None:
        return content
    names = SPLITS.get(split, {split}) & lists.keys()
    if len(lists) > 1 and not names:
        raise UserError(
            f"{path}: several lists of rows: {', '.join(lists)}; {NAME_SPLIT}, or keep each in a "
            "file of its own"
        )
    return lists[names.pop() if names else next(iter(lists))]
