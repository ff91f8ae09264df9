"""Scales trained to reproduce the float model's predictions."""

from __future__ import annotations

import json
import shutil
import signal
import weakref
from copy import deepcopy

import pytest
import torch
from torch.nn.functional import kl_div

from finequant.quantize.checkpoint.reading import weights_of
from finequant.quantize.rounding import Rounded, quantize_activations, round_to_nearest
from finequant.quantize.scheme import layer_plan, untie_head
from finequant.quantize.training.scales import train_scales
from finequant.recipes.interrupt import RESUME_HINT, Interrupted
from finequant.recipes.schema import Quantize


def divergence(model, rounded: dict[str, Rounded], ids: torch.Tensor) -> float:
    """Computes the quantized model's KL divergence from the float one, by plain transformers."""
    quantized = deepcopy(model)
    for name, codes in rounded.items():
        module = quantized.get_submodule(name)
        module.weight.data = codes.dequantize(torch.float32)
        if "embed" not in name:
            module.register_forward_pre_hook(lambda _, x: (quantize_activations(x[0].clone()),))
    exact, logits = (m(ids).logits.log_softmax(-1) for m in (model, quantized))
    return kl_div(logits, exact, log_target=True, reduction="sum").item() / ids.numel()


@pytest.mark.parametrize("settings", [{}, {"embedding": 8}, {"head": "float"}])
@torch.no_grad()
def test_scales_are_trained_and_codes_stay(tiny_base, settings):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    quantize = Quantize(bits=3, scale_dtype="bfloat16", **settings)
    plan = layer_plan(quantize, model.config)
    config = deepcopy(model.config)
    if "head" not in settings:
        untie_head(model)
    start = {
        name: round_to_nearest(model.get_submodule(name).weight, *scheme)
        for name, scheme in plan.items()
        if scheme
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (4, 64), generator=generator)
    trained = train_scales(weights_of(model), config, ids, start, plan, torch.float32, 30)
    assert divergence(model, trained, ids) < 0.96 * divergence(model, start, ids)
    for name, (codes, scale) in trained.items():
        assert torch.equal(codes, start[name].codes)
        assert scale.dtype == torch.bfloat16
        assert torch.equal(scale, start[name].scale) == ("embed" in name)


@pytest.mark.parametrize(("steps", "alive"), [(3, [1, 1, 1]), (5, [1, 2, 3, 2, 1])])
def test_the_teachers_states_are_kept_only_for_text_that_comes_again(
    tiny_base, monkeypatch, steps, alive
):
    from transformers import AutoModelForCausalLM

    from finequant.quantize.training import scales

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    plan = layer_plan(Quantize(head="float"), model.config)
    name, scheme = next((name, scheme) for name, scheme in plan.items() if scheme)
    plan = dict.fromkeys(plan) | {name: scheme}
    start = {name: round_to_nearest(model.get_submodule(name).weight.detach(), *scheme)}
    states, seen = [], []
    compute, use = scales._float_states, scales._backward

    def computing(*arguments):
        computed = compute(*arguments)
        states.append(weakref.ref(computed))
        return computed

    def using(*arguments):
        seen.append(sum(reference() is not None for reference in states))
        use(*arguments)

    monkeypatch.setattr(scales, "_float_states", computing)
    monkeypatch.setattr(scales, "_backward", using)
    monkeypatch.setattr(scales, "SCALE_TOKENS", 32)
    ids = torch.arange(96).view(3, 32)  # three steps' text
    train_scales(weights_of(model), model.config, ids, start, plan, torch.float32, steps)
    assert len(states) == 3
    assert seen == alive


@pytest.mark.parametrize("layers", [{}, {"model.*": "float"}])
@torch.no_grad()
def test_a_head_still_shares_the_table_of_the_embedding(tiny_base, layers):
    """Its own scales made a second table of it in GGUF, ONNX and MLX."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    quantize = Quantize(head=8, embedding=8, layers=layers, scale_dtype="float32")
    plan = layer_plan(quantize, model.config)
    config = deepcopy(model.config)
    untie_head(model)
    start = {
        name: round_to_nearest(model.get_submodule(name).weight, *scheme)
        for name, scheme in plan.items()
        if scheme
    }
    ids = torch.arange(64).view(2, 32)
    trained = train_scales(weights_of(model), config, ids, start, plan, torch.float32, 2)
    changed = {name for name in start if not torch.equal(trained[name].scale, start[name].scale)}
    assert changed == start.keys() - {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize(
    "calibration", ["{tokens: 256, length: 32}", "{tokens: 256, length: 32, scale_steps: 2}"]
)
def test_codes_are_kept_when_their_reload_is_interrupted(
    recipe_file, train_once, monkeypatch, calibration
):
    """Reloading a large model takes minutes."""
    from finequant.quantize.checkpoint import reload
    from finequant.quantize.convert import main as convert
    from finequant.quantize.methods import calibrate
    from finequant.quantize.training import scales

    arguments = [str(recipe_file), "train.max_steps=2", "quantize.method=gptq"]
    arguments.append(f"quantize.calibration={calibration}")
    train_once(arguments)
    run = recipe_file.parent / "run"
    quantized = run / "quantized"

    def is_resumed() -> bool:
        return json.loads((run / "manifest.json").read_text())["quantize"]["resumed"]

    convert(arguments)
    assert not is_resumed()
    expected = (quantized / "model.safetensors").read_bytes()
    shutil.rmtree(quantized)

    def interrupted(*_):
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(reload, "check_reload", interrupted)
        convert(arguments)
    monkeypatch.setattr(calibrate.Calibrator, "_quantize", interrupted)
    monkeypatch.setattr(scales, "train_scales", interrupted)
    convert(arguments)
    assert is_resumed()
    assert (quantized / "model.safetensors").read_bytes() == expected


def test_codes_are_kept_when_the_training_of_scales_is_interrupted(
    recipe_file, train_once, monkeypatch, capsys
):
    from finequant.quantize.convert import main as convert
    from finequant.quantize.methods import calibrate
    from finequant.quantize.training import scales

    calibration = "quantize.calibration={tokens: 256, length: 32, scale_steps: 2}"
    arguments = [str(recipe_file), "train.max_steps=2", "quantize.method=gptq", calibration]
    train_once(arguments)

    def interrupted(*_):
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="143"):
        patched.setattr(scales, "train_scales", interrupted)
        convert(arguments)
    assert f"{RESUME_HINT}; the training of the scales starts over\n" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(calibrate.Calibrator, "_quantize", interrupted)
        convert(arguments)
    quantized = recipe_file.parent / "run" / "quantized"
    assert not (quantized / "start").exists()
    assert "its scales trained" in (quantized / "quantization.json").read_text()
