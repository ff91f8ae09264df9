"""Rounding and calibration: codes, scales, and the benefit of gptq."""

from __future__ import annotations

import pytest
import torch

from finequant.finetune.architecture import ARCHITECTURES
from finequant.quantize.methods.gptq import METHOD, Statistics, gptq
from finequant.quantize.rounding import (
    Rounded,
    choose_scale,
    quantize_activations,
    round_to_nearest,
)
from finequant.quantize.scheme import LayerScheme
from finequant.recipes.errors import UserError


def scheme(bits: int = 4) -> LayerScheme:
    return LayerScheme(bits, 32, "search", torch.float32)


def statistics(inputs: torch.Tensor) -> Statistics:
    sums = Statistics()
    sums.add(inputs, inputs)
    return sums


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_equals_torchaos(bits):
    from torchao.quantization import IntxUnpackedToInt8Tensor

    weight = torch.randn(70, 96)
    theirs = IntxUnpackedToInt8Tensor.from_hp(weight, (1, 32), getattr(torch, f"int{bits}"))
    ours = round_to_nearest(weight, bits, 32, "max")
    assert torch.equal(ours.codes, theirs.qdata)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.dequantize(torch.float32), theirs.dequantize())


def test_searched_scales_lower_the_weighted_error():
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


def test_gptq_handles_dead_columns_and_singular_hessians():
    inputs, weight = torch.zeros(10, 64), torch.randn(8, 64)
    inputs[:, 0] = 1.0  # rank one; all other columns are dead
    found = gptq(weight, statistics(inputs), scheme())
    values = found.dequantize(torch.float32)
    assert torch.isfinite(values).all()
    step = found.scale.repeat_interleave(32, dim=1)
    assert ((values - weight).abs()[:, 1:] <= 1.5 * step[:, 1:]).float().mean() > 0.95


def test_a_hessian_that_is_not_positive_definite_is_damped_until_it_is():
    """Sums in float32 can be off by more than the usual damping."""
    hessian, weight = torch.eye(64), torch.randn(8, 64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -0.05, and a damping of 0.01
    found = gptq(weight, Statistics(hessian, torch.zeros(64, 64)), scheme())
    nearest = round_to_nearest(weight, *scheme())
    assert torch.equal(found.codes[:, 32:], nearest.codes[:, 32:])
    assert found.dequantize(torch.float32).isfinite().all()


def test_gptq_does_not_depend_on_the_scale_of_the_inputs():
    """Inputs that are small everywhere must not give way to columns without any."""
    torch.manual_seed(0)
    inputs, weight = torch.randn(100, 64), torch.randn(8, 64)
    inputs[:, ::3] = 0.0
    usual, small = (gptq(weight, statistics(x), scheme()) for x in (inputs, inputs / 1024))
    assert torch.equal(small.codes, usual.codes)
    assert torch.equal(small.scale, usual.scale)


def test_gptq_without_any_input_rounds_to_nearest():
    weight = torch.randn(8, 64)
    rounded = gptq(weight, statistics(torch.zeros(10, 64)), scheme())
    nearest = round_to_nearest(weight, *scheme())
    assert torch.equal(rounded.codes, nearest.codes)


def test_drift_of_the_inputs_is_corrected():
    """Where quantized inputs are always half the float ones, weights must grow."""
    torch.manual_seed(0)
    exact, weight = torch.randn(4000, 64), torch.randn(16, 64)
    sums = Statistics()
    sums.add(exact / 2, exact)
    found = gptq(weight, sums, scheme(bits=8)).dequantize(torch.float32)
    assert 1.4 < (found.norm() / weight.norm()).item() < 1.6  # half of the way to 2


def test_all_rows_that_are_named_for_calibration_are_read(recipe_file, tokenizer):
    """None is split off to be held out, as it is from the training rows."""
    from finequant.quantize.methods.sequences import calibration_sequences
    from finequant.recipes.load import load_recipe

    words = (recipe_file.parent / "text.txt").read_text(encoding="utf-8")
    overrides = ["quantize.calibration={data: text.txt, length: 16}"]
    overrides += ["data.test=[]", "data.test_fraction=0.1"]
    recipe = load_recipe(recipe_file, overrides)
    sequences = calibration_sequences(recipe, tokenizer, 10**6)
    ids = tokenizer(words)["input_ids"]
    assert sequences.numel() == (len(ids) + 1) // 16 * 16  # and the end of a text


def test_sequences_fit_the_base_unless_the_recipe_says_how_long_they_are(recipe_file, llama):
    from finequant.finetune.architecture import check_positions
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.quantize.methods.sequences import calibration_sequences
    from finequant.recipes.errors import UserError
    from finequant.recipes.load import load_recipe

    base = llama("short", max_position_embeddings=128)
    overrides = [f"model.base={base}", "quantize.method=gptq", "data.max_length=128"]
    recipe = load_recipe(recipe_file, overrides)
    check_positions(recipe, load_config(recipe.model))
    sequences = calibration_sequences(recipe, load_tokenizer(recipe.model), 512)
    assert sequences.shape == (4, 128)
    recipe = load_recipe(recipe_file, [*overrides, "quantize.calibration.length=129"])
    with pytest.raises(UserError, match="129 tokens are more than the 128 positions"):
        check_positions(recipe, load_config(recipe.model))


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


@pytest.mark.slow
def test_a_trained_block_is_nearer_to_the_float_block_and_repeatable(tiny_base):
    from transformers import AutoModelForCausalLM

    from finequant.quantize.methods.calibrate import Calibrator
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
        calibrator = Calibrator(
            METHOD, weights, model.config, sequences, plan, torch.float32, steps=steps
        )
        return {piece.layer: piece.rounded for piece in calibrator.pieces()}

    def error(layers: dict[str, Rounded]) -> float:
        ours = AutoModelForCausalLM.from_pretrained(tiny_base)
        for name, rounded in layers.items():
            ours.get_submodule(name).weight.data = rounded.dequantize(torch.float32)
        with torch.no_grad():
            hidden = [one.model(held_out).last_hidden_state for one in (model, ours)]
        return (hidden[0] - hidden[1]).square().mean().item()

    alone, together = found(0), found(100)
    assert alone.keys() == together.keys()
    assert "model.layers.1.self_attn.o_proj" not in together
    assert error(together) < 0.9 * error(alone)
    assert all(rounded.codes.abs().max() <= 4 for rounded in together.values())
    again = found(100)
    for name, (codes, scale) in together.items():
        assert torch.equal(codes, again[name].codes) and torch.equal(scale, again[name].scale)


def test_a_layers_inputs_come_from_quantized_layers_of_its_own_block(tiny_base):
    from transformers import AutoModelForCausalLM

    from finequant.quantize.methods.calibrate import Calibrator
    from finequant.quantize.methods.method import Calibrated
    from finequant.quantize.scheme import layer_plan
    from finequant.recipes.schema import Quantize

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    plan = layer_plan(Quantize(head="float"), model.config)
    sequences = torch.randint(model.config.vocab_size, (4, 32))
    inputs = []

    class Kept:
        sums = ()

        def add(self, quantized: torch.Tensor, exact: torch.Tensor) -> None:
            inputs.append((quantized, exact))

    method = Calibrated(Kept, lambda weight, _, scheme: round_to_nearest(weight, *scheme))
    weights = dict(model.named_parameters())
    calibrator = Calibrator(
        method,
        lambda name, rows: weights[name].detach()[rows],
        model.config,
        sequences,
        plan,
        torch.float32,
    )
    pieces = list(calibrator.pieces())
    shared = ["q_proj", "o_proj", "gate_proj", "down_proj"] * model.config.num_hidden_layers
    assert len(inputs) == len(shared)

    def inputs_of(decoder: torch.nn.Module) -> list[torch.Tensor]:
        kept = []
        for name, module in decoder.named_modules():
            if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")):
                module.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
        with torch.no_grad():
            decoder(sequences)
        return kept

    expected = inputs_of(model)
    for (_, exact), theirs in zip(inputs, expected, strict=True):
        torch.testing.assert_close(exact, theirs)
    shipped = AutoModelForCausalLM.from_pretrained(tiny_base)
    for piece in pieces:
        module = shipped.get_submodule(piece.layer)
        module.weight.data = piece.rounded.dequantize(torch.float32)
        module.register_forward_pre_hook(lambda _, args: (quantize_activations(args[0]),))
    for (quantized, _), theirs in zip(inputs, inputs_of(shipped), strict=True):
        torch.testing.assert_close(quantized, theirs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_halves_of_a_block_compute_what_the_block_does(name):
    import transformers

    from finequant.finetune.architecture import block_layers
    from finequant.quantize.checkpoint.blocks import HALVES, decoder_block, rotary_of

    torch.manual_seed(0)
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        architectures=[name],
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = dict(model.named_parameters())
    block = decoder_block(config, 0, lambda name, rows: weights[name].detach()[rows], torch.float32)
    hidden = torch.randn(3, 20, 32)
    rotary = rotary_of(config, hidden)
    expected = block(hidden, position_embeddings=rotary)
    for half in HALVES.values():
        hidden = half(block, hidden, rotary)
    assert torch.equal(hidden, expected)
    assert all(name.startswith(tuple(HALVES)) for name in block_layers(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "trained"])
def test_a_group_of_zeros_has_a_scale_in_every_dtype(method, dtype):
    """float16 has no number as small as the scale that zeros have in float32."""
    from finequant.quantize.methods.method import load_method
    from finequant.quantize.methods.reconstruct import TrainedLayer

    torch.manual_seed(0)
    weight, zeros = torch.randn(4, 64), slice(32, 64)
    weight[1, zeros] = weight[2] = 0
    wanted = LayerScheme(4, 32, "search", dtype)
    if method == "gptq":
        rounded = gptq(weight, statistics(torch.randn(200, 64)), wanted)
    else:
        rounded = load_method("hqq" if method == "hqq" else "rtn").quantize(weight, wanted)
    if method == "trained":
        rounded = TrainedLayer(weight, rounded, wanted).rounded()
    assert rounded.scale.dtype == dtype
    assert rounded.scale.isfinite().all() and (rounded.scale > 0).all()
    found = rounded.dequantize(torch.float32)
    assert found.isfinite().all()
    assert not found[2].any()
    assert (found[0] - weight[0]).norm() < 0.2 * weight[0].norm()


def test_small_weights_keep_their_codes_in_float16():
    """Scales below float16's normal numbers are not taken for those of zeros."""
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


@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_of_trained_codes_are_those_of_torchs_fake_quantization(bits):
    from finequant.quantize.methods.reconstruct import TrainedLayer

    torch.manual_seed(0)
    weight, plan = torch.randn(6, 64), scheme(bits)
    start = round_to_nearest(weight, *plan)
    layer = TrainedLayer(weight, start, plan)
    with torch.no_grad():
        layer.latent_weights += 3 * torch.randn(6, 2, 32)  # some beyond the codes' range
        layer.factor += 0.1 * torch.randn(6, 2)
    found = layer.weight(torch.float32)
    ours = [layer.latent_weights, layer.factor]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.fake_quantize_per_tensor_affine(theirs[0], 1.0, 0, low, high)
    expected = (codes * (start.scale * theirs[1])[:, :, None]).flatten(1)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn(6, 64)
    torch.testing.assert_close(
        torch.autograd.grad(found, ours, gradient), torch.autograd.grad(expected, theirs, gradient)
    )


def test_a_block_is_trained_although_some_tokens_are_zero(tiny_base):
    """The embedding of a padding token may be; the error is relative to each token's power."""
    from transformers import AutoModelForCausalLM

    from finequant.quantize.checkpoint.blocks import rotary_of
    from finequant.quantize.methods.reconstruct import TrainedLayer, reconstruct

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    block, hidden = model.model.layers[0].requires_grad_(False), torch.randn(2, 16, 64)
    hidden[:, :3] = 0
    rotary = rotary_of(model.config, hidden)
    target = block(hidden, position_embeddings=rotary)
    assert not target[:, :3].any()
    weight = block.mlp.down_proj.weight
    start = round_to_nearest(weight, *scheme())
    layers = {"mlp.down_proj": TrainedLayer(weight, start, scheme())}
    found = reconstruct(block, layers, [hidden], [target], rotary, 2)["mlp.down_proj"]
    assert found.scale.isfinite().all() and not torch.equal(found.scale, start.scale)
    assert (found.codes - start.codes).abs().max() <= 1


def test_resumed_codes_move_to_the_blocks_device(llama, monkeypatch):
    """After a kill, codes come from the CPU, and the block may be on a GPU (here: on `meta`)."""
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
    calibrator = calibrate.Calibrator(
        METHOD, base.weights, base.config, sequences, plan, torch.float32, known
    )
    assert not list(calibrator.pieces())  # no codes are computed again
    assert sorted(asked) == sorted(name for name in plan if plan[name])


@pytest.mark.parametrize("steps", [0, 2])
def test_codes_that_are_known_lead_to_the_same_codes_after_them(tiny_base, steps):
    from finequant.quantize.merge.adapter import open_base
    from finequant.quantize.methods.calibrate import Calibrator
    from finequant.quantize.scheme import layer_plan
    from finequant.recipes.schema import Model, Quantize

    base = open_base(Model(base=str(tiny_base)))
    plan = layer_plan(Quantize(bits=3), base.config)
    sequences = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))

    def pieces(known: dict[str, Rounded]) -> dict[str, list[Rounded]]:
        calibrator = Calibrator(
            METHOD,
            base.weights,
            base.config,
            sequences,
            plan,
            torch.float32,
            lambda layer, rows: known.get(layer),
            steps,
        )
        found: dict[str, list[Rounded]] = {}
        for piece in calibrator.pieces():
            found.setdefault(piece.layer, []).append(piece.rounded)
        return found

    every = pieces({})
    first = {name: part for name, (part, *_) in every.items() if name.startswith("model.layers.0.")}
    later = pieces(first)
    assert later.keys() == every.keys() - first.keys() and len(first) == 7
    for name, parts in later.items():
        for ours, theirs in zip(parts, every[name], strict=True):
            assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale)


def test_a_process_without_sequences_takes_part(tiny_base, monkeypatch):
    """There may be fewer sequences than processes."""
    from finequant.quantize.merge.adapter import open_base
    from finequant.quantize.methods import calibrate
    from finequant.quantize.scheme import layer_plan
    from finequant.recipes.schema import Model, Quantize

    monkeypatch.setattr(calibrate, "share", lambda sequences: sequences[1::2])
    base = open_base(Model(base=str(tiny_base)))
    plan = layer_plan(Quantize(), base.config)
    sequences = torch.randint(300, (1, 16))
    calibrator = calibrate.Calibrator(
        METHOD, base.weights, base.config, sequences, plan, torch.float32
    )
    assert {piece.layer for piece in calibrator.pieces()} == {name for name in plan if plan[name]}


def textbook_gptq(
    weight: torch.Tensor, inputs: torch.Tensor, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds by algorithm 1 of https://arxiv.org/abs/2210.17323, a column at a time."""
    weight, inputs = weight.double().clone(), inputs.double()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    hessian = inputs.T @ inputs
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes, scales = torch.zeros_like(weight), []
    for column in range(weight.shape[1]):
        if column % group_size == 0:
            group = weight[:, column : column + group_size]
            scales.append(group.abs().amax(1) / ((high - low) / 2))
        codes[:, column] = (weight[:, column] / scales[-1]).round().clamp(low, high)
        error = (weight[:, column] - codes[:, column] * scales[-1]) / factor[column, column]
        weight[:, column:] -= error[:, None] * factor[column, column:]
    return codes.to(torch.int8), torch.stack(scales, 1).float()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_equals_the_textbook_where_inputs_have_not_drifted(bits):
    torch.manual_seed(0)
    inputs = torch.randn(2000, 40) @ torch.randn(40, 320) / 6 + torch.randn(2000, 320)
    weight = torch.randn(48, 320)
    codes, scale = gptq(weight, statistics(inputs), LayerScheme(bits, 32, "max", torch.float32))
    expected_codes, expected_scale = textbook_gptq(weight, inputs, bits, 32)
    # float32 here, float64 there: where a tie is broken differently, the rest of the row differs.
    equal = (codes == expected_codes).all(1)
    assert equal.float().mean() > 0.85
    torch.testing.assert_close(scale[equal], expected_scale[equal], rtol=1e-3, atol=0)
    nearest = round_to_nearest(weight, bits, 32, "max").codes
    assert not (nearest == expected_codes).all(1).any()


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_that_ship_are_finite_and_codes_are_chosen_for_them(method, dtype):
    from finequant.quantize.methods.method import load_method

    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    weight[3, :32] = 0.0  # like a padding token's row in the head
    weight[4] *= 1e-4  # whose scales are below the normal numbers of float16
    plan = LayerScheme(4, 32, "search", dtype)
    if method == "gptq":
        inputs = torch.eye(64).repeat(4, 1)  # no column compensates for another
        codes, scale = gptq(weight, statistics(inputs), plan)
    else:
        codes, scale = load_method(method).quantize(weight, plan)
    assert scale.dtype == dtype
    assert (scale > 0).all() and scale.isfinite().all()
    steps = (weight.unflatten(1, (2, 32)) / scale.float()[:, :, None]).flatten(1)
    nearest = steps.round().clamp(-8, 7).to(torch.int8)
    assert torch.equal(codes, nearest)
    assert not codes[3, :32].any()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_a_block_with_biases_is_trained_as_it_ships(llama, scale_dtype):
    """Training lowers the error of the block that ships, without compensating for its large biases,
    and the scales that it trains are those that ship."""
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    from finequant.quantize.checkpoint.blocks import rotary_of
    from finequant.quantize.methods.calibrate import _install
    from finequant.quantize.methods.reconstruct import TrainedLayer, reconstruct

    model = AutoModelForCausalLM.from_pretrained(
        llama("biased", attention_bias=True, mlp_bias=True)
    )
    block = model.model.layers[0].requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    hidden = torch.randn(8, 64, model.config.hidden_size)
    scheme = LayerScheme(3, 32, "search", scale_dtype)
    rotary = rotary_of(model.config, hidden)
    target = block(hidden, position_embeddings=rotary)
    linear = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    start = {name: round_to_nearest(layer.weight, *scheme) for name, layer in linear.items()}
    layers = {n: TrainedLayer(linear[n].weight, rounded, scheme) for n, rounded in start.items()}
    found = reconstruct(block, layers, [hidden], [target], rotary, 30)

    def error(rounded: dict[str, Rounded]) -> float:
        shipped = deepcopy(block)
        for name, part in rounded.items():
            _install(shipped.get_submodule(name), part, torch.float32)
        return (shipped(hidden, position_embeddings=rotary) - target).square().mean().item()

    assert error(found) < 0.9 * error(start)
    for name, layer in layers.items():
        assert torch.equal(layer.weight(torch.float32), found[name].dequantize(torch.float32))
