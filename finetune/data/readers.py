"""Files, folders and Hub datasets -> rows, each with its place: "file:line" or "dataset[index]"."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from finequant.recipes.errors import UserError
from finequant.recipes.schema import Source
from finequant.recipes.sources import COMPRESSIONS, TABLES, matching_files, parallel_files
from finequant.recipes.terminal import Progress, tracked

Content = TypeVar("Content")
CSV_CELL_LIMIT = 2**27
LARGE = 2**26
"""Bytes of a file that is worth a line of progress."""
SEPARATORS = ",;\t|"
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval"},
}
EXPECTED = (
    f"expected a file that ends in {', '.join(TABLES)} or .txt (or in one of them and "
    f"{', '.join(COMPRESSIONS)}), or a folder of such files"
)


class BadRowError(UserError):
    """A row that cannot be used; `data.bad_rows` decides what happens to it."""


class Line(NamedTuple):
    """A line of JSON that is not parsed yet, which other processes can do."""

    text: str
    where: str


Read = tuple[str, dict[str, Any] | BadRowError]
"""The location of a row, and the row or the error in it."""
Unparsed = tuple[str, dict[str, Any] | BadRowError | Line]


def read_source(source: Source) -> Iterator[Read]:
    """Rows of files, which the recipe's loader made absolute paths, or of a Hub dataset.

    Raises:
        UserError: a file or dataset that cannot be read, or that is empty.
    """
    return ((where, parsed(content)) for where, content in read_unparsed(source))


def read_unparsed(source: Source) -> Iterator[Unparsed]:
    """Yields what `read_source` does, but lines of JSON Lines as they are: see `parsed`."""
    path = Path(source.source)
    if not path.is_absolute():
        return _read_hub(source)
    if source.streaming:
        raise UserError(f"{path}: streaming is for datasets of the Hub: leave it out for a file")
    if path.is_dir():
        return _read_folder(path, source.split)
    if columns := parallel_files(path):
        return _read_parallel(columns)
    return chain.from_iterable(_read_file(file, source.split) for file in matching_files(path))


def parsed(content: dict[str, Any] | BadRowError | Line) -> dict[str, Any] | BadRowError:
    """Parses what is not parsed yet."""
    return _json_object(*content) if isinstance(content, Line) else content


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Yields all rows of a file or folder as (where, row); a .txt file is one row with a text.

    Raises:
        UserError: naming the line that cannot be read.
    """
    rows = []
    for where, row in read_source(Source(source=str(path))):
        if isinstance(row, BadRowError):
            raise row
        rows.append((where, row))
    return rows


def shown(value: Any) -> str:
    """Formats a value for an error message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def parse_json(text: str, where: str, expected: str) -> Any:
    """
    Raises:
        BadRowError: naming the column where the JSON breaks.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise BadRowError(
            f"{where}: broken JSON at column {error.colno}{line}: {error.msg}; expected {expected}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise BadRowError(f"{where}: this JSON cannot be read: {error}") from None


def _read_folder(folder: Path, split: str) -> Iterator[Unparsed]:
    """Rows of what `save_to_disk` wrote, or of all files that hold rows, in the order of their
    names; where names speak of splits (train-00000.parquet, test.jsonl), those of `split`."""
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        yield from _read_saved(folder, split)
        return
    files = [file for file in sorted(folder.iterdir()) if _is_table(file)]
    named = [name for name, words in SPLITS.items() if any(_words(file) & words for file in files)]
    if named:
        files = [file for file in files if _words(file) & SPLITS.get(split, {split})]
    if not files:
        what = f"only files of {', '.join(named)}; set `split` of the source" if named else EXPECTED
        raise UserError(f"{folder}: no file of rows for {split} in this folder; {what}")
    for file in files:
        yield from _read_file(file, split)


def _kind(file: Path) -> tuple[str, str]:
    """Returns the suffix of the format, and that of the compression, if any."""
    last = file.suffix.lower()
    return (file.with_suffix("").suffix.lower(), last) if last in COMPRESSIONS else (last, "")


def _is_table(file: Path) -> bool:
    return file.is_file() and _kind(file)[0] in TABLES


def _words(file: Path) -> set[str]:
    return set(re.split("[^a-z]+", file.name.lower()))


def _read_saved(folder: Path, split: str) -> Iterator[Unparsed]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    # `datasets` raises its own errors and those of the file readers.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: `datasets` cannot load this folder: {reason}") from None
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(
                f"{folder}: no split {split} in this folder, only {', '.join(dataset)}; "
                "set `split` of the source"
            )
        dataset = dataset[split]
    if not len(dataset):
        raise UserError(f"{folder}: no rows in this folder")
    for index, row in enumerate(_tracked(folder.name, dataset)):
        yield f"{folder.name}[{index}]", row


def _read_hub(source: Source) -> Iterator[Unparsed]:
    from datasets import load_dataset

    name, index = source.source, -1
    try:
        dataset = load_dataset(
            name,
            source.name,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        rows = islice(dataset, source.limit) if source.streaming else _tracked(name, dataset)
        for index, row in enumerate(rows):
            yield f"{name}[{index}]", row
    # `datasets` raises its own errors, those of the Hub client, of HTTP and of the file readers.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"data: cannot load the dataset {name}: {reason}; check its id, name, split "
            "and revision, the network, and `hf auth login` if it is gated"
        ) from None
    if index < 0:
        raise UserError(f"data: no rows in the dataset {name}, split {source.split}")


def _tracked(name: str, dataset: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return tracked(dataset, f"data: rows of {name}", len(dataset))


def _read_file(path: Path, split: str) -> Iterator[Unparsed]:
    kind = _kind(path)[0]
    if kind not in (*TABLES, ".txt"):
        excel = "; from Excel: save the sheet as CSV UTF-8" if kind in (".xlsx", ".xls") else ""
        raise UserError(f"{path}: {EXPECTED}{excel}")
    yield from _checked(path, _rows_of(path, kind, split))


def _checked(path: Path, content: Iterable[Content]) -> Iterator[Content]:
    """Yields what a file holds.

    Raises:
        UserError: naming the file, if it cannot be read or is empty.
    """
    empty = True
    try:
        for item in content:
            empty = False
            yield item
    except UnicodeDecodeError as error:
        where = f"{path}:{_line_that_breaks(path, error.encoding)}"
        raise UserError(
            f"{where}: not {error.encoding.upper()} text: save the file as UTF-8 "
            "(in Excel: CSV UTF-8)"
        ) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if empty:
        raise UserError(f"{path}: no rows in this file")


def _rows_of(path: Path, kind: str, split: str) -> Iterator[Unparsed]:
    if kind in (".parquet", ".arrow"):
        yield from _read_arrow(path, kind)
    elif kind in (".csv", ".tsv"):
        yield from _read_csv(path, kind)
    elif kind == ".txt":
        yield from _read_text(path)
    elif _has_json_lines(path, kind):
        yield from _read_json_lines(path)
    else:
        yield from _read_json(path, split)


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
    compression = _kind(path)[1]
    file = io.BufferedReader(_TrackedFile(path)) if is_tracked else path.open("rb")
    if compression == ".zst":
        import pyarrow

        return pyarrow.input_stream(file, compression="zstd")
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(compression)
    return opened(file, "rb") if opened else file


def _open_text(path: Path, newline: str | None = None, is_tracked: bool = False) -> IO[str]:
    """UTF-8, or the UTF-16 that a byte order mark tells."""
    with _open(path) as file:
        start = file.read(4)
    if len(start) == 4 and start.count(0) == 2 and b"\0\0" not in start:
        raise UserError(f"{path}: UTF-16 without a byte order mark: save the file as UTF-8")
    encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return io.TextIOWrapper(_open(path, is_tracked), encoding, newline=newline)


def _line_that_breaks(path: Path, encoding: str) -> int:
    """The error itself counts from the beginning of a buffer, not of the file."""
    with _open(path) as file:
        content = file.read()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        return content[: error.start].decode(encoding, errors="replace").count("\n") + 1
    return 1


def _read_text(path: Path) -> Iterator[Unparsed]:
    with _open_text(path) as file:
        text = file.read()
    if text.strip():
        yield path.name, {"text": text}


def _read_parallel(columns: dict[str, Path]) -> Iterator[Unparsed]:
    """Reads each row from the same line of several files, as corpora of translations have it."""
    files = list(columns.values())
    lines_of_files = [_checked(file, _lines(file)) for file in files]
    for number, lines in enumerate(zip_longest(*lines_of_files), start=1):
        if None in lines:
            raise UserError(
                f"{files[lines.index(None)]}: ends after {number - 1} lines, and others of "
                f"{', '.join(columns)} go on: each line of one belongs to a line of the others"
            )
        yield f"{files[0].name}:{number}", dict(zip(columns, lines, strict=True))


def _lines(file: Path) -> Iterator[str]:
    with _open_text(file) as opened:
        for line in opened:
            yield line.rstrip("\n")


def _has_json_lines(path: Path, kind: str) -> bool:
    """JSON Lines or one JSON value: what is in a file decides, as its name may say either."""
    with _open_text(path) as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines, ""), next(lines, None)
    try:
        whole = json.loads(first)
    except (ValueError, RecursionError):
        # Of a list or object that begins here and goes on below, the first line is a beginning.
        return kind != ".json" and not _is_json(path)
    if second is None and not isinstance(whole, dict):  # a list of all rows
        return False
    return second is not None or kind != ".json" or _wrapped(whole) is None


def _is_json(path: Path) -> bool:
    with _open_text(path) as file:
        try:
            json.load(file)
        except (ValueError, RecursionError):
            return False
    return True


def _read_json_lines(path: Path) -> Iterator[Unparsed]:
    with _open_text(path, is_tracked=True) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", Line(line.strip(), f"{path}:{number}")


def _json_object(line: str, where: str) -> dict[str, Any] | BadRowError:
    try:
        row = parse_json(line, where, "one whole object on each line")
    except BadRowError as error:
        return error
    if not isinstance(row, dict):
        return BadRowError(f"{where}: expected a JSON object on each line, found {shown(row)}")
    return row


def _read_json(path: Path, split: str) -> Iterator[Unparsed]:
    """Reads a list of rows, or an object that contains one: see `_wrapped`."""
    with _open_text(path) as file:
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
    """Lists of rows by the keys of the object that holds them; None for what is a row itself.

    Known are {"data": [rows]} with any keys, {"train": [rows], "test": [rows]}, {id: row, ...},
    and {column: [values], ...}, whose columns are of one length.
    """
    values = list(content.values())
    if values and all(isinstance(value, dict) for value in values):
        return {"": values}
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


def _unwrapped(content: dict[str, Any], path: Path, split: str) -> Any:
    lists = _wrapped(content)
    if lists is None:
        return content
    names = SPLITS.get(split, {split}) & lists.keys()
    if len(lists) > 1 and not names:
        raise UserError(
            f"{path}: several lists of rows: {', '.join(lists)}; name one of them as `split` of "
            "the source, or keep each in a file of its own"
        )
    return lists[names.pop() if names else next(iter(lists))]


def _read_csv(path: Path, kind: str) -> Iterator[Unparsed]:
    csv.field_size_limit(CSV_CELL_LIMIT)
    header: list[str] = []
    end = 0
    with _open_text(path, newline="", is_tracked=True) as file:
        separator = "\t" if kind == ".tsv" else _separator(path)
        reader = csv.reader(file, strict=True, delimiter=separator)
        try:
            for cells in reader:
                # A quoted cell may run over several lines; the row is named by its first.
                start, end = end + 1, reader.line_num
                if not cells or (not header and cells[0].startswith("sep=")):
                    continue
                if not header:
                    header = _unique(cells, f"{path}:{start}")
                    continue
                row: dict[str, Any] | BadRowError = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    row = BadRowError(
                        f"{path}:{start}: {len(cells)} columns, where the header has "
                        f"{len(header)}: quote cells that contain a {_name(separator)}"
                    )
                yield f"{path.name}:{start}", row
        except csv.Error as error:
            raise UserError(
                f"{path}:{end + 1}: broken CSV: {error}: a stray quote? Double it inside a cell"
            ) from None


def _separator(path: Path) -> str:
    """Chooses the separator with the most columns: Excel writes semicolons in many locales."""
    with _open_text(path, newline="") as file:
        header = next((line for line in file if line.strip()), "").strip()
    if header.startswith("sep=") and len(header) == 5:  # Excel's own way to name it
        return header[4]
    counts = {
        separator: len(next(csv.reader([header], delimiter=separator), []))
        for separator in SEPARATORS
    }
    return max(counts, key=lambda separator: counts[separator])


def _name(separator: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab"}.get(separator, repr(separator))


def _unique(header: list[str], where: str) -> list[str]:
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"{where}: two columns are called {repeated!r}: rename one of them")
    return header


def _read_arrow(path: Path, kind: str) -> Iterator[Unparsed]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        for batch in _batches(path, kind):
            for row in batch.to_pylist():
                yield f"{path.name}[{index}]", row
                index += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as a {kind[1:]} file: {reason}") from None


def _batches(path: Path, kind: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if kind == ".parquet":
        yield from pyarrow.parquet.ParquetFile(path).iter_batches()
        return
    with pyarrow.memory_map(str(path)) as file:
        try:
            reader = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:  # `datasets` writes streams
            yield from pyarrow.ipc.open_stream(file)
            return
        yield from map(reader.get_batch, range(reader.num_record_batches))
