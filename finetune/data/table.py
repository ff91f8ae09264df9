"""Keeps rows in an Arrow table: written once, batch by batch, and parsed on access."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np

from finequant.finetune.data.pool import in_batches
from finequant.finetune.data.row import Row

if TYPE_CHECKING:
    from pyarrow import ChunkedArray

ROWS_AT_ONCE = 1000
COLUMN = "row"
TABLE = "rows.arrow"
TOKEN_KEYS = ("template_arguments", "max_length", "long_rows", "loss_on", "missing_end", "packing")
"""Keys of the section `data` that decide what tokens the rows become, not which rows there are."""


class Hashes(NamedTuple):
    """64-bit hashes: the chance that any of a million rows collide is below 1 in 30 million."""

    prompts: np.ndarray
    rows: np.ndarray
    """Hashes of prompt and answer together."""


def hashed(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())


class Rows(Sequence[Row]):
    """A selection of a table's rows, in any order; a row of weight 2 occurs twice."""

    def __init__(
        self,
        column: ChunkedArray,
        indices: np.ndarray,
        folder: Path | None = None,
        name: str = "",
        hashes: Hashes | None = None,
    ) -> None:
        """
        column: the JSON of all rows.
        indices: which rows of the table these are.
        folder, name: where the tokens of these rows may be kept, and the name of their split.
        hashes: of all rows of the table.
        """
        self.column, self.indices, self.folder, self.name = column, indices, folder, name
        self.of_table = hashes

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Rows:
        """Makes a table of rows in memory."""
        with TableWriter(None) as table:
            for batch in in_batches(rows, ROWS_AT_ONCE):
                table.write([row.to_json() for row in batch])
        return cls(table.column, np.arange(len(table.column)))

    @property
    def hashes(self) -> Hashes:
        """Returns the hashes of these rows."""
        if self.of_table is None:
            pairs = [(hashed(row.prompt_key), hashed(row.key)) for row in self]
            return Hashes(*np.array(pairs, np.uint64).reshape(-1, 2).T)
        return Hashes(*(column[self.indices] for column in self.of_table))

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Rows: ...
    def __getitem__(self, at: int | slice) -> Row | Rows:
        if isinstance(at, slice):
            return Rows(self.column, self.indices[at], hashes=self.of_table)
        return Row.from_json(self.column[int(self.indices[at])].as_py())

    def __iter__(self) -> Iterator[Row]:
        return (Row.from_json(self.column[int(index)].as_py()) for index in self.indices)

    def __eq__(self, rows: object) -> bool:
        return isinstance(rows, Sequence) and list(self) == list(rows)


class TableWriter:
    """Writes rows to a file or to memory; after the block, `column` holds them.

    A file is mapped into memory: processes that read it share its pages.
    """

    def __init__(self, file: Path | None) -> None:
        import pyarrow

        self._file = file
        self._sink = (
            pyarrow.BufferOutputStream() if file is None else pyarrow.OSFile(str(file), "wb")
        )
        self._schema = pyarrow.schema({COLUMN: pyarrow.large_binary()})
        self._writer = pyarrow.ipc.new_stream(self._sink, self._schema)

    def write(self, rows: list[bytes]) -> None:
        """Appends a batch of rows as JSON."""
        import pyarrow

        self._writer.write_batch(pyarrow.record_batch([rows], schema=self._schema))

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: object) -> None:
        import pyarrow

        self._writer.close()
        if self._file is None:
            self.column = read_table(pyarrow.BufferReader(self._sink.getvalue()))
        else:
            self._sink.close()
            self.column = open_table(self._file)


def open_table(file: Path) -> ChunkedArray:
    """Maps a table's column of rows into memory."""
    import pyarrow

    return read_table(pyarrow.memory_map(str(file)))


def read_table(source) -> ChunkedArray:
    import pyarrow

    return pyarrow.ipc.open_stream(source).read_all()[COLUMN]
