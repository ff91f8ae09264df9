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
    """Replaces weights by others that compute the same but lose less when they are rounded."""

    description: str
    """How quantization.json, the record that ships, describes the transformed weights."""

    check: Callable[[Plan, DecoderConfig], None]
    """Raises a UserError for a model that it cannot transform, before anything is loaded."""

    weights: Callable[[Weights, DecoderConfig], Weights]
    """Returns float32 rows of the transformed model, given those of the float model, whose head is
    not tied or is read as if it were not; rows have the same bits however they are split."""
