"""Reads and writes rows of safetensors files at their offsets, without mapping the files.

Pages of a mapped file count as memory of the process until the kernel reclaims them, so a mapped
checkpoint looks like a loaded one and runs into the same limits. The format:
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from finequant.recipes.errors import UserError

# In the order in which safetensors stores a file's tensors: wide types first, then by name.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
}
PIECE_WEIGHTS = 1 << 19
"""Weights to handle at a time: with fewer, threads wait for the interpreter, with more, for
memory."""

MIN_ROWS = 32
"""Minimum rows of a piece: a matrix product rounds a handful of rows differently from the same rows
among many, so results would depend on where the pieces are cut."""

WHOLE = slice(None)

Weights = Callable[[str, slice], torch.Tensor]
"""A function that returns rows of a parameter, given its name, in the dtype in which they are kept.
Callers must not change them."""


class Entry(NamedTuple):
    """A tensor of a file; `start` counts from the beginning of the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def bytes_of(self, rows: slice) -> tuple[int, int]:
        """Returns the rows' offset in the file, and their number of bytes."""
        first, last, _ = rows.indices(self.shape[0])
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self.start + first * row, (last - first) * row


class TensorFile:
    """A safetensors file, from which any thread can read tensors on demand.

    Raises:
        UserError: for a file that is damaged, or has types other than floats and int8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            length = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            self.entries = {
                name: Entry(
                    DTYPES[description["dtype"]], tuple(description["shape"]), 8 + length + start
                )
                for name, description in header.items()
                for start, _ in [description["data_offsets"]]
            }
        except KeyError as error:
            raise UserError(f"{path}: tensors of type {error} are not supported") from None
        except (ValueError, AttributeError, TypeError, OverflowError, MemoryError):
            raise UserError(f"{path}: damaged, not a safetensors file: copy it again") from None

    def read(self, name: str, rows: slice = WHOLE) -> torch.Tensor:
        """Reads rows [rows, ...] in the dtype of the file."""
        entry = self.entries[name]
        start, size = entry.bytes_of(rows)
        first, last, _ = rows.indices(entry.shape[0])
        tensor = torch.empty(last - first, *entry.shape[1:], dtype=entry.dtype)
        buffer = memoryview(tensor.flatten().view(torch.uint8).numpy())
        done = 0
        while done < size:
            count = os.preadv(self._file.fileno(), [buffer[done:]], start + done)
            if not count:
                raise UserError(f"{self.path}: ends in the middle of {name}: copy it again")
            done += count
        return tensor


def header(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """Makes a file's first bytes, as safetensors writes them, and the entries of its tensors."""
    order = list(DTYPES.values())
    names = sorted(tensors, key=lambda name: (order.index(tensors[name][0]), name))
    codes, described, offsets, end = dict(zip(order, DTYPES, strict=True)), {}, {}, 0
    for name in names:
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        description = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
        described[name], offsets[name] = description, (dtype, shape, start)
    content = {"__metadata__": dict(sorted(metadata.items())), **described}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-len(text) // 8 * -8)
    first = 8 + len(text)
    entries = {
        name: Entry(dtype, shape, first + start) for name, (dtype, shape, start) in offsets.items()
    }
    return len(text).to_bytes(8, "little") + text, entries


def write_rows(descriptor: int, entry: Entry, rows: slice, tensor: torch.Tensor) -> None:
    """Writes the rows of a tensor at their offset in an open file."""
    start, _ = entry.bytes_of(rows)
    data = bytes_of(tensor)
    while data:
        count = os.pwrite(descriptor, data, start)
        data, start = data[count:], start + count


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the tensor's memory, or that of a contiguous copy."""
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yields slices that cover a tensor: about PIECE_WEIGHTS weights, at least MIN_ROWS rows."""
    total = shape[0]
    step = max(MIN_ROWS, PIECE_WEIGHTS // max(1, math.prod(shape[1:])) // MIN_ROWS * MIN_ROWS)
    starts = list(range(0, max(1, total - MIN_ROWS + 1), step))
    yield from (slice(start, end) for start, end in zip(starts, [*starts[1:], total], strict=True))


def weights_of(model: torch.nn.Module) -> Weights:
    """Returns a function that reads a model in memory; it also knows a tied head by its name."""
    tensors = model.state_dict()
    return lambda name, rows: tensors[name][rows]


def filled(weights: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Reads a whole parameter in `dtype`, without a copy in any other dtype."""
    tensor = torch.empty(shape, dtype=dtype)
    read_into(tensor, weights, name)
    return tensor


def read_into(tensor: torch.Tensor, weights: Weights, name: str) -> None:
    """Copies a whole parameter into a tensor, a piece at a time."""
    for rows in row_slices(tensor.shape):
        tensor[rows] = weights(name, rows)
