"""Float weights -> a checkpoint, in pieces: reading, arithmetic and writing at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from finequant.quantize.checkpoint.reading import WHOLE, Weights
from finequant.quantize.checkpoint.writing import Checkpoint
from finequant.quantize.rounding import Rounded

Rounding = Callable[[str, slice, torch.Tensor], Rounded]
"""A function that quantizes rows of a layer: its name, the rows, and their float32 weights."""


def write_data_free(
    checkpoint: Checkpoint,
    weights: Weights,
    names: Iterable[str],
    rounding: Rounding | None = None,
    whole: bool = False,
) -> None:
    """Parameters whose pieces depend on no others: each is read, rounded and written by a thread.

    names: those of them that the checkpoint's plan has are rounded.
    whole: rounded parameters are one piece each.
    """

    def convert(piece: tuple[str, slice]) -> None:
        name, rows = piece
        if not checkpoint.has(name, rows):
            weight = weights(name, rows)
            rounds = name in checkpoint.plan
            layer = name.removesuffix(".weight")
            checkpoint.write(name, rows, weight, rounding(layer, rows, weight) if rounds else None)

    each_piece(convert, _pieces(checkpoint, names, whole))


def each_piece(
    convert: Callable[[tuple[str, slice]], None], pieces: Iterable[tuple[str, slice]]
) -> None:
    """Converts the pieces in threads; the first error of one of them is raised."""
    with _threads() as pool:
        for _ in pool.map(convert, pieces):
            pass


def _pieces(
    checkpoint: Checkpoint, names: Iterable[str], whole: bool
) -> Iterator[tuple[str, slice]]:
    for name in names:
        undivided = whole and name in checkpoint.plan
        for rows in [WHOLE] if undivided else checkpoint.pieces(name):
            yield name, rows


def write_pieces(
    checkpoint: Checkpoint, weights: Weights, pieces: Iterable[tuple[str, slice, Rounded]]
) -> None:
    """Writes quantized layers as they arrive, each while the next one is being computed."""

    def write(layer: str, rows: slice, rounded: Rounded) -> None:
        name = f"{layer}.weight"
        checkpoint.write(name, rows, weights(name, rows), rounded)

    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(lambda: None)
        for layer, rows, rounded in pieces:
            before.result()
            before = pool.submit(write, layer, rows, rounded)
        before.result()


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
