"""Opens, decompresses and decodes files of rows, and parses JSON in them."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import IO, Any, NamedTuple

from finequant.recipes.errors import UserError, shown
from finequant.recipes.sources import kind_of
from finequant.recipes.terminal import Progress

LARGE = 2**26
"""Bytes from which a file gets a line of progress."""


class BadRowError(UserError):
    """A row that cannot be used; `data.bad_rows` decides what happens to it."""


class Line(NamedTuple):
    """A line of JSON that is not parsed yet, so that other processes can parse it."""

    text: str
    where: str


Read = tuple[str, dict[str, Any] | BadRowError]
"""The location of a row, and the row or the error in it."""
Unparsed = tuple[str, dict[str, Any] | BadRowError | Line]


def parsed(content: dict[str, Any] | BadRowError | Line) -> dict[str, Any] | BadRowError:
    """Parses a line; returns anything else as it is."""
    return _parsed_object(*content) if isinstance(content, Line) else content


def _parsed_object(line: str, where: str) -> dict[str, Any] | BadRowError:
    try:
        row = parse_json(line, where, "one whole object on each line")
    except BadRowError as error:
        return error
    if not isinstance(row, dict):
        return BadRowError(f"{where}: expected a JSON object on each line, found {shown(row)}")
    return row


def parse_json(text: str, where: str, expected: str) -> Any:
    """Parses a JSON value.

    Raises:
        BadRowError: naming the column where the JSON breaks.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[error.pos :].strip() == ",":  # as in a list
            raise BadRowError(f"{where}: a comma follows the JSON: remove it") from None
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        python = "{'" in text  # as `str` writes objects
        expected += "; write it with json.dumps, not with str" if python else ""
        raise BadRowError(
            f"{where}: broken JSON at column {error.colno}{line}: {error.msg}; expected {expected}"
        ) from None
    except (ValueError, RecursionError) as error:  # such as 5000 digits, or 1000 brackets
        raise BadRowError(f"{where}: this JSON cannot be read: {error}") from None


class _TrackedFile(io.FileIO):
    """A file that shows how many of its megabytes were read, and the time that is left."""

    _progress: Progress | None = None

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if (size := path.stat().st_size) >= LARGE:
            self._progress = Progress(f"data: megabytes of {path.name}", size >> 20)

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        if self._progress is not None:
            self._progress.show(self.tell() >> 20)
        return count

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        super().close()


def _open(path: Path, is_tracked: bool = False) -> IO[bytes]:
    """Opens a file that may be compressed, and decompresses it."""
    compression = kind_of(path)[1]
    file = io.BufferedReader(_TrackedFile(path)) if is_tracked else path.open("rb")
    if compression == ".zst":
        import pyarrow

        return pyarrow.input_stream(file, compression="zstd")
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(compression)
    return opened(file, "rb") if opened else file


def open_text(path: Path, newline: str | None = None, is_tracked: bool = False) -> IO[str]:
    """Opens a file as UTF-8, or as UTF-16 or UTF-32 if it starts with a byte order mark of that.

    Raises:
        UserError: for UTF-16 without a byte order mark.
    """
    with _open(path) as file:
        start = file.read(4)
    if len(start) == 4 and start.count(0) == 2 and b"\0\0" not in start:
        raise UserError(f"{path}: UTF-16 without a byte order mark: save the file as UTF-8")
    marked = "utf-16" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    encoding = "utf-32" if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE) else marked
    return io.TextIOWrapper(_open(path, is_tracked), encoding, newline=newline)


def line_that_breaks(path: Path, encoding: str) -> int:
    """Returns the line that cannot be decoded: the error counts from the beginning of a buffer."""
    with _open(path) as file:
        content = file.read()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        return content[: error.start].decode(encoding, errors="replace").count("\n") + 1
    return 1
