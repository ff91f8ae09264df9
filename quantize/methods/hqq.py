"""Half-quadratic quantization (https://mobiusml.github.io/hqq_blog/), as in torchao."""

from __future__ import annotations

import torch

from finequant.quantize.methods.method import DataFree
from finequant.quantize.rounding import Rounded, nearest_codes, stored_scale
from finequant.quantize.scheme import LayerScheme


def hqq(weight: torch.Tensor, scheme: LayerScheme) -> Rounded:
    """Returns codes and scales, without zero points, of a whole weight [out, in]."""
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
        IntxChooseQParamsAlgorithm,
    )

    quantized = IntxUnpackedToInt8Tensor.from_hp(
        weight.float(),
        (1, scheme.group_size),
        getattr(torch, f"int{scheme.bits}"),
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    scale = stored_scale(quantized.scale, scheme.scale_dtype)
    return Rounded(nearest_codes(weight, scale, scheme.bits), scale)


METHOD = DataFree(hqq, by_rows=False)  # it iterates until no scale of the weight changes
