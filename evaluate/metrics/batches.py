"""Batches of sequences of about equal lengths, which several processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from finequant.finetune.processes import shared_out
from finequant.recipes.terminal import tracked_batches

Item, Value = TypeVar("Item"), TypeVar("Value")


def batches_by_length(lengths: Mapping[int, int], batch_size: int) -> list[list[int]]:
    """Puts the indices of sequences into batches of about equal lengths.

    Longest first: if a batch does not fit into memory, it fails right away.

    lengths: numbers of tokens by index.
    """
    order = sorted(lengths, key=lengths.__getitem__, reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def in_batches(
    batches: list[list[Item]], compute: Callable[[list[Item]], list[Value]], description: str
) -> Iterator[Value]:
    """Yields what `compute` returns for the items of each batch; processes share the batches."""

    def work(share: Sequence[list[Item]]) -> list[list[Value]]:
        return [compute(batch) for batch in tracked_batches(share, f"evaluate: {description}")]

    return chain(*shared_out(batches, work))
