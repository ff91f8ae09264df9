"""A base in four bits (nf4): training uses it, and the adapter is merged into the float base."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from finequant.finetune.nf4 import check_nf4, load_trained_base
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe


@pytest.fixture
def base(llama) -> Path:
    """A tiny Llama whose rows consist of whole blocks of 64 weights."""
    return llama("of_blocks", intermediate_size=192)


@pytest.mark.slow
def test_training_sees_nf4_and_the_adapter_is_merged_into_the_float_base(recipe_file, base):
    from safetensors.torch import load_file

    from finequant.finetune.train import main as train
    from finequant.quantize.convert import main as quantize
    from finequant.quantize.export import main as export

    overrides = [str(recipe_file), f"model.base={base}", "model.load=nf4", "train.epochs=4"]
    overrides += ["train.learning_rate=1e-2"]
    overrides += ["quantize.method=rtn", "quantize.rotate=false", "quantize.keep_merged=true"]
    train(overrides)
    run = recipe_file.parent / "run"
    losses = [
        entry["eval_loss"]
        for entry in json.loads((run / "adapter" / "training_log.json").read_text())
        if "eval_loss" in entry
    ]
    assert losses[-1] < losses[0] - 0.1
    quantize(overrides)  # compares with plain transformers and peft on the float base
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    merged = load_file(run / "merged" / "model.safetensors")
    weights = load_file(base / "model.safetensors")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    name, scaling = "model.layers.0.self_attn.q_proj", config["lora_alpha"] / config["r"]
    up, down = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
    expected = weights[f"{name}.weight"].float() + scaling * up.float() @ down.float()
    torch.testing.assert_close(
        merged[f"{name}.weight"].float(), expected, atol=1e-2 * expected.std(), rtol=0.01
    )
    export([*overrides, "--to", "gguf"])  # checks that the codes are those of quantized/
    assert list((run / "exports" / "gguf").glob("*.gguf"))


def test_every_linear_layer_but_the_head_is_nf4(recipe_file, base):
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit

    from finequant.finetune.model import load_base

    recipe = load_recipe(recipe_file, [f"model.base={base}", "model.load=nf4"])
    held, stored = (load(recipe) for load in (_held, lambda r: load_base(r.model, torch.float32)))
    linear = [
        name
        for name, module in stored.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    for name in linear:
        layer, weight = held.get_submodule(name), stored.get_submodule(name).weight
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        error = dequantize_4bit(layer.weight, layer.weight.quant_state) - weight
        assert 0.02 < error.norm() / weight.norm() < 0.15  # about 0.09 for a normal distribution
    assert torch.equal(held.lm_head.weight, stored.lm_head.weight)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_a_base_in_nf4_does_not_keep_its_files_mapped(recipe_file, base):
    held = _held(load_recipe(recipe_file, [f"model.base={base}", "model.load=nf4"]))
    assert held.lm_head.weight.device.type == "cpu"
    assert str(base) not in Path("/proc/self/maps").read_text()


def test_gradients_after_an_evaluation_are_those_before_it(recipe_file, base):
    """bitsandbytes packs weights to evaluate on avx512_bf16: no gradient passed them then."""
    held = _held(load_recipe(recipe_file, [f"model.base={base}", "model.load=nf4"]))
    embedded = torch.randn(1, 5, held.config.hidden_size)

    def gradient() -> torch.Tensor:
        inputs = embedded.clone().requires_grad_()
        held.train()(inputs_embeds=inputs).logits.square().sum().backward()
        return inputs.grad

    before = gradient()
    with torch.no_grad():
        held.eval()(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(gradient(), before)


def test_rows_of_broken_blocks_are_refused_on_a_cpu(recipe_file, llama):
    base = llama("broken", intermediate_size=160)
    recipe = load_recipe(recipe_file, [f"model.base={base}", "model.load=nf4"])
    with pytest.raises(UserError, match=r"model.load: .* multiple of 64 .*down_proj has 160"):
        check_nf4(recipe)


@pytest.mark.parametrize("load", ["float", "nf4"])
@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_infinite_and_nan_weights_are_refused_in_float_and_nf4(recipe_file, base, load, number):
    """Packed weights are integers, which are always finite."""
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(base / "model.safetensors")
    tensors[name][7, 3] = number
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    recipe = load_recipe(recipe_file, [f"model.base={base}", f"model.load={load}"])
    with pytest.raises(UserError, match=f"model.base: {name} of .* infinite or NaN"):
        load_trained_base(recipe, torch.float32)


def _held(recipe):
    return load_trained_base(recipe, torch.float32)


@pytest.mark.parametrize(
    ("override", "sharded", "installed", "message"),
    [
        ("lora.init_lora_weights=pissa", False, True, "moves a part of the base"),
        ("lora.init_lora_weights=olora", False, True, "moves a part of the base"),
        ("lora.rank=4", True, True, "splits the base over"),
        ("lora.rank=4", False, False, r"pip install 'finequant\[nf4\]'"),
    ],
)
def test_settings_that_nf4_does_not_support_are_refused(
    recipe_file, monkeypatch, override, sharded, installed, message
):
    if sharded:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if not installed:
        find = importlib.util.find_spec
        missing = {"bitsandbytes"}
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in missing else find(name)
        )
    check_nf4(load_recipe(recipe_file, [override]))  # float has none of these limits
    with pytest.raises(UserError, match=message):
        check_nf4(load_recipe(recipe_file, [override, "model.load=nf4"]))


def test_changing_model_load_keeps_the_bases_measurements(recipe_file):
    from finequant.recipes.rundir import RunDir

    recipes = [load_recipe(recipe_file, [f"model.load={load}"]) for load in ("float", "nf4")]
    runs = [RunDir.of(recipe) for recipe in recipes]
    for stage, same in (("train", False), ("measurements/base", True)):
        inputs = [run.inputs(recipe, stage) for recipe, run in zip(recipes, runs, strict=True)]
        assert (inputs[0] == inputs[1]) is same
