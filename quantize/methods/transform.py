"""Defines a transform of the float model's weights before they are quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finequant.quantize.checkpoint.reading import Weights

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.scheme import Plan


@dataclass(frozen=True)
class Transform:
    """Other weights that compute the same, and lose less when they are rounded."""

    description: str
    """What the record that ships says of the weights."""

    check: Callable[[Plan, DecoderConfig], None]
    """Raises a UserError for a model that it cannot transform, before anything is loaded."""

    weights: Callable[[Weights, DecoderConfig], Weights]
    """float32 rows of the transformed model, from rows of the float model, whose head is not tied
    or is read as if it were not; with the same bits however they are split."""
