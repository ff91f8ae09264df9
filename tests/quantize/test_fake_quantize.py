"""Single fake-quantized layers: the forward equals torchao's, the gradients autograd's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from finequant.quantize.rounding import (
    Rounded,
    latent_weights,
    quantize_activations,
    round_to_nearest,
)
from finequant.quantize.scheme import LayerScheme
from finequant.quantize.training.fake_quantize import (
    FakeQuantLinear,
    FakeQuantLora,
    FakeQuantScales,
    _StraightThrough,
    disabled,
    latent_dtype,
)

SCHEME = LayerScheme(4, 32, "search", torch.float32)


def make_layer(
    kind: type, dtype: torch.dtype = torch.float32, bias: bool = True
) -> FakeQuantLinear:
    """Makes a layer of 24 x 64, whose LoRA or scales have moved away from their start."""
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    start = round_to_nearest(weight, *SCHEME)
    arguments = {"float_weight": weight.to(dtype), "bias": torch.randn(24, dtype=dtype)}
    if not bias:
        arguments["bias"] = None
    if kind is FakeQuantLora:
        generator = torch.Generator().manual_seed(1)
        latent = latent_weights(weight, start, latent_dtype(SCHEME.bits))
        arguments |= {"latent": latent, "rank": 4, "scaling": 2.0, "generator": generator}
    layer = kind(start, SCHEME.bits, dtype, **arguments)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and name != "lora_A":
                parameter.normal_(std=0.1)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FakeQuantLinear, FakeQuantLora, FakeQuantScales])
def test_the_forward_equals_torchaos_with_the_codes_that_ship(kind, dtype, bias):
    from finequant.quantize.checkpoint.writing import torchao_tensor

    layer = make_layer(kind, dtype, bias)
    shipped = torch.nn.Linear(64, 24, bias=bias, dtype=dtype)
    tensor = torchao_tensor("layer", layer.rounded(), SCHEME, dtype)
    shipped.weight = torch.nn.Parameter(tensor, requires_grad=False)
    shipped.bias = torch.nn.Parameter(layer.bias) if bias else None
    x = torch.randn(3, 5, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), shipped(x))
        with disabled([layer]):
            assert torch.equal(layer(x), linear(x, layer.float_weight, layer.bias))
        assert torch.equal(layer(x), shipped(x))


def test_gradients_are_those_of_the_merged_weight():
    """Compares with autograd through the full weight, where rounding changes nothing."""
    torch.manual_seed(0)
    x, a, b = torch.randn(3, 5, 8), torch.randn(2, 8), torch.randn(6, 2)
    weight, bias = torch.randn(6, 8), torch.randn(6)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    rounded = quantize_activations(x.detach())
    through = x + (rounded - x).detach()
    exact = through @ (weight + 0.5 * (b @ a - (b @ a).detach())).T + bias
    (exact * torch.arange(6.0)).sum().backward()
    expected = [tensor.grad.clone() for tensor in leaves]
    for tensor in leaves:
        tensor.grad = None
    ours = _StraightThrough.apply(x, a, b, weight, bias, 0.5)
    torch.testing.assert_close(ours, exact)
    (ours * torch.arange(6.0)).sum().backward()
    for tensor, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_the_scales_is_that_of_autograd():
    layer = make_layer(FakeQuantScales)
    x = torch.randn(3, 5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    found, of_x = layer.scale_delta.grad.clone(), x.grad.clone()
    codes, scale = layer.rounded().codes.float(), layer.scale
    layer.scale_delta.grad = x.grad = None
    steps = (scale * (1 + layer.scale_delta))[:, :, None]
    weight = (codes.unflatten(1, (scale.shape[1], -1)) * steps).flatten(1)
    through = x + (quantize_activations(x.detach()) - x.detach())
    linear(through, weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(found, layer.scale_delta.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(of_x, x.grad, rtol=1e-4, atol=1e-4)


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
"""Optimizers that a recipe may name, without those that need a package or compile something."""


@pytest.mark.parametrize("kind", [FakeQuantLora, FakeQuantScales])
def test_every_optimizer_changes_the_forward_and_what_ships(kind, tmp_path):
    """torch's fused AdamW changes a parameter without increasing its version."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    x, target = torch.randn(32, 64), torch.randn(32, 24)
    for name in OPTIMIZERS:
        layer = make_layer(kind)
        arguments = TrainingArguments(
            tmp_path, optim=name, learning_rate=1e-2, use_cpu=True, report_to="none"
        )
        optimizer = Trainer(torch.nn.Sequential(layer), arguments).create_optimizer()
        outputs, shipped = [], []
        for _ in range(3):
            outputs.append(layer(x).detach())
            shipped.append(layer.rounded())
            assert torch.equal(layer.weight(), shipped[-1].dequantize(torch.float32))
            (layer(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(outputs[0], outputs[1]), name
        assert not torch.equal(outputs[1], outputs[2]), name
        part = "scale" if kind is FakeQuantScales else "codes"
        assert not torch.equal(getattr(shipped[0], part), getattr(shipped[2], part)), name


def test_learned_scales_that_ship_are_positive_and_finite():
    """They are even after a step that is far too long, and in a narrow dtype."""
    start = Rounded(torch.ones(2, 64, dtype=torch.int8), torch.full((2, 2), 1e-4).half())
    layer = FakeQuantScales(start, 4, torch.float32)
    with torch.no_grad():
        layer.scale_delta.copy_(torch.tensor([[-2.0, -1.0], [1e12, 0.0]]))
    scale = layer.rounded().scale
    assert scale.dtype == torch.float16
    assert (scale > 0).all() and scale.isfinite().all()
    assert torch.equal(layer.weight(), layer.rounded().dequantize(torch.float32))


@pytest.mark.parametrize("kind", [FakeQuantLinear, FakeQuantLora, FakeQuantScales])
def test_no_weight_is_formed_for_an_input_without_positions(kind, monkeypatch):
    layer = make_layer(kind)
    monkeypatch.setattr(layer, "weight", lambda: pytest.fail("formed"))
    assert layer(torch.empty(2, 0, 64)).shape == (2, 0, 24)
    with pytest.raises(pytest.fail.Exception, match="formed"):
        layer(torch.empty(2, 1, 64))
