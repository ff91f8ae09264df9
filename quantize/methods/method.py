"""Defines a method. Each has a file here that fills in METHOD, which recipes/methods.py lists."""

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
    """Codes and scales of a float32 weight [out, in]."""

    by_rows: bool = True
    """Whether some rows get the same codes as among all rows, so that they may come in pieces."""


class Statistics(Protocol):
    """What a calibrated method keeps of the inputs that some layers share."""

    @property
    def sums(self) -> Sequence[torch.Tensor]:
        """What `add` has added to. Several processes, which share the tokens, add theirs up."""
        ...

    def add(self, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        """Adds inputs of the same tokens, [..., in].

        quantized: after the quantized blocks, and rounded to 8 bits as in the shipped model.
        exact: those in the float model.
        """
        ...


@dataclass(frozen=True)
class Calibrated:
    """A method that looks at a layer's inputs, too; the embedding, which has none, is rounded to
    nearest."""

    statistics: Callable[[], Statistics]
    """Makes empty statistics of one input."""

    quantize: Callable[[torch.Tensor, Any, LayerScheme], Rounded]
    """Codes and scales of a float32 weight [out, in], by the statistics of its input. The rows do
    not depend on each other: the head, which may be larger than a block, comes in pieces, and
    several processes share the rows."""


def load_method(name: str) -> DataFree | Calibrated:
    """Imports the method of this name in the table."""
    return import_module(METHODS[name].module).METHOD


def rows_at_once(columns: int, device: torch.device) -> int:
    """Returns how many rows of that many columns to round at a time: on an accelerator, all."""
    return ROWS if device.type == "cpu" else max(1, weights_at_once(device) // columns)
