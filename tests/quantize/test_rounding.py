"""Activations as the shipped model rounds them, and scales that every runtime takes."""

from __future__ import annotations

import pytest
import torch

from finequant.quantize.rounding import quantize_activations, round_to_nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_rounded_as_torchao_does_bit_for_bit(dtype):
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        _apply_int8_act_asym_per_token_quant_dequant as expected,
    )

    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.arange(-4, 4)
    values = torch.randn(8, 16, 96, generator=generator) * sizes[:, None, None]
    values[:, 0] = 0
    values[:, 1].abs_()
    values[:, 2] = -values[:, 2].abs()
    values[:, 3, 5] *= 1000  # one outlier
    values[:, 4] += 100
    values.clamp_(-30_000, 30_000)  # within float16, and so is their range
    for case in (values, values[:1, :1], values[0], values / 1e38):
        case = case.to(dtype)
        before = case.clone()
        assert torch.equal(quantize_activations(case), expected(case))
        assert torch.equal(case, before)
    assert len(quantize_activations(values[0, 5]).unique()) > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["max", "search"])
def test_the_scale_of_a_group_of_zeros_is_a_normal_number(dtype, rule):
    """The head's row of a padding token is zeros; XNNPACK refuses the program with its scale."""
    codes, scale = round_to_nearest(torch.zeros(2, 64), 4, 32, rule, dtype)
    assert not codes.any()
    assert scale.dtype == dtype
    assert scale.to(torch.bfloat16).min() >= torch.finfo(torch.bfloat16).smallest_normal
