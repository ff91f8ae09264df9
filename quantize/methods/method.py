"""Defines the interface of a method: each has a file here that sets METHOD, and an entry in
recipes/methods.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from finequant.finetune.device import weights_at_once
from finequant.recipes.methods import METHODS

if TYPE_CHECKING:
    import torch

    from finequant.quantize.rounding import Rounded
    from finequant.quantize.scheme import LayerScheme

ROWS = 2048
"""Rows of a weight that a calibrated method takes at a time on a CPU."""


@dataclass(frozen=True)
class DataFree:
    """A method that looks at weights only."""

    quantize: Callable[[torch.Tensor, LayerScheme], Rounded]
    """Returns codes and scales of a float32 weight [out, in]."""

    by_rows: bool = True
    """Whether rows are rounded independently, so that a weight may come in pieces."""


class Statistics(Protocol):
    """What a calibrated method remembers of an input, which several layers may share."""

    @property
    def sums(self) -> Sequence[torch.Tensor]:
        """Returns the tensors that `add` adds to; processes that share the tokens sum them up."""
        ...

    def add(self, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        """Adds both models' inputs for the same tokens, [..., in].

        quantized: inputs after the quantized blocks, rounded to 8 bits as in the shipped model.
        exact: inputs in the float model.
        """
        ...


@dataclass(frozen=True)
class Calibrated:
    """A method that looks at a layer's inputs, too; the embedding, which has none, is rounded to
    nearest."""

    statistics: Callable[[], Statistics]
    """Makes empty statistics for one input."""

    quantize: Callable[[torch.Tensor, Any, LayerScheme], Rounded]
    """Returns codes and scales of a float32 weight [out, in], given the statistics of its input. It
    has to round rows independently: the head, which may be larger than a block, comes in pieces,
    and several processes share the rows."""


def load_method(name: str) -> DataFree | Calibrated:
    """Imports the method that has this name in METHODS."""
    return import_module(METHODS[name].module).METHOD


def rows_at_once(columns: int, device: torch.device) -> int:
    """Returns how many rows of so many columns to round at a time; an accelerator takes as many as
    `weights_at_once` allows."""
    return ROWS if device.type == "cpu" else max(1, weights_at_once(device) // columns)
