"""Files and Hub datasets -> rows, each with its place: "file:line" or "dataset[index]"."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finequant.recipes.errors import UserError
from finequant.recipes.schema import Source

CSV_CELL_LIMIT = 2**27


def read_source(source: Source) -> list[tuple[str, dict[str, Any]]]:
    """Rows of a file, which the recipe's loader made an absolute path, or of a Hub dataset."""
    path = Path(source.source)
    return read_rows(path) if path.is_absolute() else _read_hub(source)


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
    rows = parse_json(text, str(path), "a list of objects", lines=True) if text.strip() else []
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of objects, found {shown(rows)}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}[{index}]: expected a JSON object, found {shown(row)}")
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
    row = parse_json(line.strip(), where, "one whole object on each line")
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: expected a JSON object on each line, found {shown(row)}; "
            "a JSON list belongs in a .json file"
        )
    return row


def parse_json(text: str, where: str, expected: str, lines: bool = False) -> Any:
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


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


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
