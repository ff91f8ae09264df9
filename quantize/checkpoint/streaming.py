"""Float weights -> a checkpoint, in pieces: reading, arithmetic and writing at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from finequant.finetune.processes import decided_by_first
from finequant.quantize.checkpoint.reading import WHOLE, Weights
from finequant.quantize.rounding import Rounded
from finequant.quantize.scheme import LayerScheme

Rounding = Callable[[str, slice, torch.Tensor], Rounded]
"""A function that quantizes rows of a layer: its name, the rows, and their float32 weights."""


class Target(Protocol):
    """Takes the parameters of a model piece by piece: a checkpoint on disk, or codes in memory."""

    shapes: dict[str, tuple[int, ...]]
    """Shapes of the parameters that it takes, by name."""
    plan: dict[str, LayerScheme]
    """Schemes of the parameters that come quantized, by name."""

    def pieces(self, name: str) -> list[slice]:
        """Lists the slices of rows that it takes at a time."""
        ...

    def has(self, name: str, rows: slice) -> bool:
        """Says whether it has these rows already."""
        ...

    def known(self, layer: str, rows: slice) -> Rounded | None:
        """Returns the codes and scales of a layer's rows if it has them already."""
        ...

    def write(
        self, name: str, rows: slice, weight: torch.Tensor, rounded: Rounded | None = None
    ) -> None:
        """Takes rows: their float32 weights and, if they are quantized, codes and scales."""
        ...


class Piece(NamedTuple):
    """Rows of a layer that a calibrated method has quantized."""

    layer: str
    rows: slice
    rounded: Rounded
    weight: torch.Tensor | None
    """float32 [rows, in]; None if it is no longer in memory."""


def write_data_free(
    target: Target,
    weights: Weights,
    names: Iterable[str],
    rounding: Rounding | None = None,
    whole: bool = False,
) -> None:
    """Writes parameters whose pieces are independent: a thread reads, rounds and writes each piece.

    names: the parameters to write; those in the target's plan are rounded.
    whole: whether each rounded parameter is a single piece.
    """

    def convert(piece: tuple[str, slice]) -> None:
        name, rows = piece
        if not target.has(name, rows):
            weight = weights(name, rows)
            rounds = name in target.plan
            layer = name.removesuffix(".weight")
            target.write(name, rows, weight, rounding(layer, rows, weight) if rounds else None)

    each_piece(convert, _pieces(target, names, whole))


def each_piece(
    convert: Callable[[tuple[str, slice]], None], pieces: Iterable[tuple[str, slice]]
) -> None:
    """Converts the pieces in threads, and raises the first error of any of them."""
    with _threads() as pool:
        for _ in pool.map(convert, pieces):
            pass


def _pieces(target: Target, names: Iterable[str], whole: bool) -> Iterator[tuple[str, slice]]:
    for name in names:
        undivided = whole and name in target.plan
        for rows in [WHOLE] if undivided else target.pieces(name):
            yield name, rows


def write_pieces(target: Target | None, weights: Weights, pieces: Iterable[Piece]) -> None:
    """Writes quantized layers as they arrive, each while the next one is being computed.

    target: None in all processes but the first; an error in the first ends them all.
    """

    def write(piece: Piece) -> None:
        name, weight = f"{piece.layer}.weight", piece.weight
        weight = weights(name, piece.rows) if weight is None else weight
        target.write(name, piece.rows, weight, piece.rounded)

    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(lambda: None)
        for piece in pieces:
            decided_by_first(before.result)
            if target is not None:
                before = pool.submit(write, piece)
            del piece
        decided_by_first(before.result)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Starts as many threads as torch has, each with single-threaded torch; more would wait for the
    interpreter."""
    together = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(together, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(together)
