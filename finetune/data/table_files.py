"""CSV, TSV, Parquet and Arrow files -> rows."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from finequant.finetune.data.arrow_values import features_of, restored
from finequant.finetune.data.files import BadRowError, Unparsed, open_text
from finequant.recipes.errors import UserError, counted, one_line
from finequant.recipes.terminal import say

CSV_CELL_LIMIT = 2**27
SEPARATORS = ",;\t|"
Quotes = Literal["text", "around cells", "unclear"]


def read_csv(path: Path, kind: str) -> Iterator[Unparsed]:
    csv.field_size_limit(CSV_CELL_LIMIT)
    header: list[str] = []
    end, is_checked = 0, False
    with open_text(path, newline="", is_tracked=True) as file:
        separator = "\t" if kind == ".tsv" else _separator(path)
        quotes = _quotes(path, separator) if separator == "\t" else None
        quoting = csv.QUOTE_NONE if quotes == "text" else csv.QUOTE_MINIMAL
        reader = csv.reader(
            file,
            strict=True,
            delimiter=separator,
            quoting=quoting,
            skipinitialspace=_is_spaced(path, separator),
        )
        try:
            for cells in reader:
                # A quoted cell may contain line breaks; a row's location is its first line.
                start, end = end + 1, reader.line_num
                if not cells or (not header and cells[0].startswith("sep=")):
                    continue
                if not header:
                    header = _unique(cells, f"{path}:{start}")
                    continue
                row: dict[str, Any] | BadRowError = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    remedy = _remedy(len(cells), len(header), separator, quotes)
                    row = BadRowError(
                        f"{path}:{start}: {counted(len(cells), 'column')}, where the header has "
                        f"{len(header)}: {remedy}"
                    )
                elif cells == header:
                    row = BadRowError(f"{path}:{start}: repeats the header: remove this line")
                elif not is_checked and _are_rows(cells, separator):
                    is_sure = (quotes or _quotes(path, separator)) == "unclear"
                    _report_open_quote(f"{path}:{start}", end, is_sure)
                    is_checked = True
                yield f"{path.name}:{start}", row
        except csv.Error as error:
            raise UserError(
                f"{path}:{end + 1}: broken CSV: {error}: a stray quote? Double it inside a cell"
            ) from None


def _remedy(cells: int, columns: int, separator: str, quotes: Quotes | None) -> str:
    """Says how to correct a row that has more or fewer cells than the header has columns."""
    if cells < columns:
        return "add the missing cells, and quote those that contain a line break"
    title = "if the first line is a title, remove it; otherwise " if columns == 1 else ""
    change = "remove it from" if quotes == "text" else "quote"
    return f"{title}{change} cells that contain a {_name(separator)}"


def _quotes(path: Path, separator: str) -> Quotes:
    """Says what quotes are in a file: around cells, which may then contain separators and line
    breaks, or text like any other character, as in most TSV files of public datasets.

    A line with as many cells as the header, and a stray quote in one of them, was written without
    quoting, unless a quoted cell of several lines begins or ends there: then another of its lines
    has fewer cells, or quotes are doubled. Without quoting, texts cannot contain a comma: a file
    with commas and nothing but stray quotes is unclear. Quotes around the names of all columns
    settle it.
    """
    lines: Counter[str] = Counter()
    columns = 0
    with open_text(path, newline="") as file:
        for line in file:
            if (columns and '"' not in line) or not line.strip() or line.startswith("sep="):
                continue
            cells = line.rstrip("\r\n").split(separator)
            if not columns and all(cell[:1] == '"' and _is_enclosed(cell) for cell in cells):
                return "around cells"
            columns = columns or len(cells)
            if len(cells) != columns or any('""' in cell.strip('"') for cell in cells):
                lines["quoted"] += 1
            elif all(map(_is_enclosed, cells)):
                lines["enclosed"] += '"' in line
            elif '\\"' not in line:  # a quote in a quoted cell, as R escapes it
                lines["stray"] += 1
    if separator == "\t" and columns > 1 and lines["stray"] > lines["quoted"]:
        return "text"
    return "around cells" if lines["quoted"] or lines["enclosed"] else "unclear"


def _is_enclosed(cell: str) -> bool:
    """Says whether a cell has quotes around it, with those inside it doubled, or has none."""
    inside = cell[1:-1].replace('""', "")
    return '"' not in cell or (len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside)


def _are_rows(cells: list[str], separator: str) -> bool:
    """Says whether each line of a row that spans several could be a row by itself."""
    lines = separator.join(cells).split("\n")
    return len(cells) > 1 < len(lines) and all(
        len(parts := line.split(separator)) == len(cells) and all(map(str.strip, parts))
        for line in lines
    )


def _report_open_quote(where: str, end: int, is_sure: bool) -> None:
    """Reports a row that spans several lines, each of which could be a row by itself.

    Raises:
        UserError: if no cell of the file shows that quotes are put around cells.
    """
    if is_sure:
        raise UserError(
            f"{where}: a cell begins with a quote that only line {end} closes, although each line "
            "could be a row by itself: put quotes around the cell and double those inside it, or "
            "write JSON Lines"
        )
    say(
        f"data: {where}: a quote makes one row of the lines up to {end}, although each could be a "
        "row by itself: if they are rows, double the quote and put quotes around its cell"
    )


def _separator(path: Path) -> str:
    """Chooses the separator with the most columns: Excel writes semicolons in many locales."""
    with open_text(path, newline="") as file:
        header = next((line for line in file if line.strip()), "").strip()
    if header.startswith("sep=") and len(header) == 5:  # Excel's way to name the separator
        return header[4]
    counts = {
        separator: len(next(csv.reader([header], delimiter=separator), []))
        for separator in SEPARATORS
    }
    return max(counts, key=lambda separator: counts[separator])


def _is_spaced(path: Path, separator: str) -> bool:
    """Says whether spaces follow the separators of the header, as in `text, label`: they belong to
    no cell, and quotes after them enclose cells."""
    with open_text(path, newline="") as file:
        lines = (line for line in file if line.strip() and not line.startswith("sep="))
        names = next(lines, "").split(separator)[1:]
    return separator != "\t" and bool(names) and all(name.startswith(" ") for name in names)


def _name(separator: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab"}.get(separator, repr(separator))


def _unique(header: list[str], where: str) -> list[str]:
    if header.count("") > 1:  # empty columns of a spreadsheet
        header = [name or f"Unnamed: {at}" for at, name in enumerate(header)]  # as pandas does
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"{where}: two columns are called {repeated!r}: rename one of them")
    return header


def read_arrow(path: Path, kind: str) -> Iterator[Unparsed]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        for batch in _batches(path, kind):
            rows = batch.to_pylist(maps_as_pydicts="strict")
            for row in restored(rows, features_of(batch.schema)):
                yield f"{path.name}[{index}]", row
                index += 1
    # The others are for types of columns that this version of `datasets` does not know, labels
    # without a name, and maps with the same key twice.
    except (pyarrow.ArrowException, ValueError, KeyError) as error:
        reason = one_line(error)
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
