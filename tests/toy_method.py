"""A method in one file, like those in quantize/methods/: it clips a group's largest weights."""

from __future__ import annotations

import torch

from finequant.quantize.methods.method import DataFree
from finequant.quantize.rounding import Rounded, code_range, nearest_codes, stored_scale
from finequant.quantize.scheme import LayerScheme

KEPT = 0.9
"""Share of a group's weights that are within the range of the codes."""


def clipped(weight: torch.Tensor, scheme: LayerScheme) -> Rounded:
    """Rounds a weight [out, in]; a percentile of each group sets its scale."""
    groups = weight.float().unflatten(1, (-1, scheme.group_size))
    reached = groups.abs().quantile(KEPT, dim=-1)
    scale = stored_scale(reached / code_range(scheme.bits)[1], scheme.scale_dtype)
    return Rounded(nearest_codes(weight, scale, scheme.bits), scale)


METHOD = DataFree(clipped)
