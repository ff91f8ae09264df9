"""Round to nearest: each weight by itself."""

from __future__ import annotations

import torch

from finequant.quantize.methods.method import DataFree
from finequant.quantize.rounding import Rounded, round_to_nearest
from finequant.quantize.scheme import LayerScheme


def rtn(weight: torch.Tensor, scheme: LayerScheme) -> Rounded:
    """Returns codes and scales of a weight [out, in]."""
    return round_to_nearest(weight, *scheme)


METHOD = DataFree(rtn)
