"""CSV, TSV, Parquet and Arrow files -> rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finequant.finetune.data.arrow_values import features_of, restored
from finequant.finetune.data.files import BadRowError, Unparsed, open_text
from finequant.recipes.errors import UserError

CSV_CELL_LIMIT = 2**27
SEPARATORS = ",;\t|"


def read_csv(path: Path, kind: str) -> Iterator[Unparsed]:
    csv.field_size_limit(CSV_CELL_LIMIT)
    header: list[str] = []
    end = 0
    with open_text(path, newline="", is_tracked=True) as file:
        separator = "\t" if kind == ".tsv" else _separator(path)
        reader = csv.reader(file, strict=True, delimiter=separator)
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
                    row = BadRowError(
                        f"{path}:{start}: {len(cells)} columns, where the header has "
                        f"{len(header)}: quote cells that contain a {_name(separator)}"
                    )
                elif cells == header:
                    row = BadRowError(f"{path}:{start}: repeats the header: remove this line")
                yield f"{path.name}:{start}", row
        except csv.Error as error:
            raise UserError(
                f"{path}:{end + 1}: broken CSV: {error}: a stray quote? Double it inside a cell"
            ) from None


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
            for row in restored(batch.to_pylist(), features_of(batch.schema)):
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
