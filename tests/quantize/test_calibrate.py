"""Rounding and calibration: codes, scales, and what gptq is for."""

from __future__ import annotations

import pytest
import torch

from finequant.quantize.methods.gptq import Statistics, gptq
from finequant.quantize.rounding import Rounded, choose_scale, round_to_nearest
from finequant.quantize.scheme import LayerScheme
from finequant.recipes.errors import UserError


def scheme(bits: int = 4) -> LayerScheme:
    return LayerScheme(bits, 32, "search", torch.float32)


def statistics(inputs: torch.Tensor) -> Statistics:
    sums = Statistics()
    sums.add(inputs, inputs)
    return sums


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_is_torchaos(bits):
    from torchao.quantization import IntxUnpackedToInt8Tensor

    weight = torch.randn(70, 96)
    theirs = IntxUnpackedToInt8Tensor.from_hp(weight, (1, 32), getattr(torch, f"int{bits}"))
    ours = round_to_nearest(weight, bits, 32, "max")
    assert torch.equal(ours.codes, theirs.qdata)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.dequantize(torch.float32), theirs.dequantize())


def test_searched_scales_lower_the_error_that_counts():
    torch.manual_seed(1)
    weight, importance = torch.randn(64, 128), torch.rand(128).square()

    def error(scale: torch.Tensor) -> torch.Tensor:
        codes = (weight.unflatten(1, (4, 32)) / scale[:, :, None]).round().clamp(-8, 7)
        difference = (codes * scale[:, :, None]).flatten(1) - weight
        return (difference.square() * importance).unflatten(1, (4, 32)).sum(-1)

    largest = error(choose_scale(weight, 4, 32, "max"))
    searched = error(choose_scale(weight, 4, 32, "search", importance))
    assert searched.sum() < 0.8 * largest.sum()
    assert (searched <= largest * 1.001).all()


def test_gptq_keeps_outputs_better_than_rounding_and_is_repeatable():
    torch.manual_seed(0)
    correlated = torch.randn(2000, 24) @ torch.randn(24, 96)
    inputs, weight = correlated + 0.1 * torch.randn(2000, 96), torch.randn(40, 96)
    found = gptq(weight, statistics(inputs), scheme())
    nearest = round_to_nearest(weight, 4, 32, "search")

    def loss(rounded: Rounded) -> float:
        return (inputs @ (rounded.dequantize(torch.float32) - weight).T).square().sum().item()

    assert loss(found) < 0.5 * loss(nearest)
    again = gptq(weight, statistics(inputs), scheme())
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(found.scale, again.scale)


def test_dead_columns_and_singular_hessians():
    inputs, weight = torch.zeros(10, 64), torch.randn(8, 64)
    inputs[:, 0] = 1.0  # rank one; all other columns are dead
    found = gptq(weight, statistics(inputs), scheme())
    values = found.dequantize(torch.float32)
    assert torch.isfinite(values).all()
    step = found.scale.repeat_interleave(32, dim=1)
    assert ((values - weight).abs()[:, 1:] <= 1.5 * step[:, 1:]).float().mean() > 0.95


def test_drift_of_the_inputs_is_corrected():
    """Where quantized inputs are always half the float ones, weights have to grow."""
    torch.manual_seed(0)
    exact, weight = torch.randn(4000, 64), torch.randn(16, 64)
    sums = Statistics()
    sums.add(exact / 2, exact)
    found = gptq(weight, sums, scheme(bits=8)).dequantize(torch.float32)
    assert 1.4 < (found.norm() / weight.norm()).item() < 1.6  # half of the way to 2


def test_activations_that_are_not_finite_are_refused():
    inputs = torch.randn(50, 32)
    inputs[3, 5] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        gptq(torch.randn(8, 32), statistics(inputs), scheme())


def test_a_zero_weight_stays_zero():
    for rule in ("max", "search"):
        rounded = round_to_nearest(torch.zeros(2, 64), 4, 32, rule)
        assert not rounded.codes.any()
        assert torch.isfinite(rounded.scale).all()


def test_a_trained_block_is_nearer_to_the_float_block_and_repeatable(tiny_base):
    from transformers import AutoModelForCausalLM

    from finequant.quantize.methods.calibrate import calibrate
    from finequant.quantize.scheme import layer_plan
    from finequant.recipes.schema import Quantize

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    quantize = Quantize(bits=3, layers={"*.1.self_attn.o_proj": "float"}, head="float")
    plan = layer_plan(quantize, model.config)
    torch.manual_seed(0)
    sequences = torch.randint(model.config.vocab_size, (64, 32))
    held_out = torch.randint(model.config.vocab_size, (16, 32))

    def weights(name: str, rows: slice) -> torch.Tensor:
        return model.get_parameter(name).detach()[rows]

    def found(steps: int) -> dict[str, Rounded]:
        pieces = calibrate(weights, model.config, sequences, plan, torch.float32, steps=steps)
        return {name: rounded for name, _, rounded in pieces}

    def error(layers: dict[str, Rounded]) -> float:
        ours = AutoModelForCausalLM.from_pretrained(tiny_base)
        for name, rounded in layers.items():
            ours.get_submodule(name).weight.data = rounded.dequantize(torch.float32)
        with torch.no_grad():
            hidden = [one.model(held_out).last_hidden_state for one in (model, ours)]
        return (hidden[0] - hidden[1]).square().mean().item()

    alone, together = found(0), found(40)
    assert alone.keys() == together.keys()
    assert "model.layers.1.self_attn.o_proj" not in together
    assert error(together) < 0.9 * error(alone)
    assert all(rounded.codes.abs().max() <= 4 for rounded in together.values())
    again = found(40)
    for name, (codes, scale) in together.items():
        assert torch.equal(codes, again[name].codes) and torch.equal(scale, again[name].scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "trained"])
def test_a_group_of_zeros_has_a_scale_in_every_dtype(method, dtype):
    """float16 has no number as small as the scale of zeros is in float32."""
    from finequant.quantize.methods.method import round_alone
    from finequant.quantize.methods.reconstruct import TrainedLayer

    torch.manual_seed(0)
    weight, zeros = torch.randn(4, 64), slice(32, 64)
    weight[1, zeros] = weight[2] = 0
    wanted = LayerScheme(4, 32, "search", dtype)
    if method == "gptq":
        rounded = gptq(weight, statistics(torch.randn(200, 64)), wanted)
    else:
        rounded = round_alone(weight, wanted, "hqq" if method == "hqq" else "rtn")
    if method == "trained":
        rounded = TrainedLayer(weight, rounded, wanted).rounded()
    assert rounded.scale.dtype == dtype
    assert rounded.scale.isfinite().all() and (rounded.scale > 0).all()
    found = rounded.dequantize(torch.float32)
    assert found.isfinite().all()
    assert not found[2].any()
    assert (found[0] - weight[0]).norm() < 0.2 * weight[0].norm()


def test_small_weights_keep_their_codes_in_float16():
    """Scales below float16's normal numbers are not those of zeros."""
    weight = 1e-4 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    found = round_to_nearest(weight, 4, 32, "max", torch.float16).dequantize(torch.float32)
    assert (found - weight).norm() < 0.2 * weight.norm()


def test_a_trained_layer_computes_as_torchaos_with_its_bias():
    from finequant.quantize.checkpoint.writing import torchao_tensor
    from finequant.quantize.methods.reconstruct import TrainedLayer, _product

    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48)
    start = round_to_nearest(layer.weight.detach(), *scheme())
    x = torch.randn(5, 64)
    found = _product(x, TrainedLayer(layer.weight.detach(), start, scheme()), layer.bias)
    shipped = torchao_tensor("layer", start, scheme(), torch.float32)
    layer.weight = torch.nn.Parameter(shipped, requires_grad=False)
    torch.testing.assert_close(found, layer(x))


def test_known_codes_go_where_the_block_is(llama, monkeypatch):
    """After a kill they come from the CPU, and the block may be on a GPU: here, on no device."""
    from finequant.quantize.merge.adapter import open_base
    from finequant.quantize.methods import calibrate
    from finequant.quantize.scheme import layer_plan
    from finequant.recipes.schema import Model, Quantize

    base = open_base(Model(base=str(llama("base", attention_bias=True))))
    plan = layer_plan(Quantize(head="float"), base.config)
    asked = []

    def known(layer: str, rows: slice) -> Rounded:
        asked.append(layer)
        return round_to_nearest(base.weights(f"{layer}.weight", rows), *plan[layer])

    monkeypatch.setattr(calibrate, "device", lambda: torch.device("meta"))
    sequences = torch.randint(300, (4, 16))
    pieces = calibrate.calibrate(base.weights, base.config, sequences, plan, torch.float32, known)
    assert not list(pieces)  # nothing is sought again
    assert sorted(asked) == sorted(name for name in plan if plan[name])
