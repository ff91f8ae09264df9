"""The table of methods: a new one is one file and one entry."""

from __future__ import annotations

import json

import pytest
import torch
import toy_method
from transformers import AutoModelForCausalLM

from finequant.quantize.checkpoint.stored import read_checkpoint
from finequant.quantize.methods.method import Calibrated, load_method
from finequant.quantize.scheme import layer_plan
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.methods import METHODS, Entry
from finequant.recipes.schema import Recipe


def test_a_method_is_one_file_and_one_entry(recipe_file, tiny_base, train_once, monkeypatch):
    """Quantizes with tests/toy_method.py, trains from its codes, writes and reloads them."""
    from finequant.quantize.convert import main as convert
    from finequant.quantize.training.train import main as qat

    monkeypatch.setitem(METHODS, "clipped", Entry("clipped", "toy_method"))
    arguments = [str(recipe_file), "train.max_steps=1", "quantize.method=clipped"]
    train_once(arguments)
    convert([*arguments, "quantize.keep_merged=true"])
    run = recipe_file.parent / "run"
    stored = read_checkpoint(run / "quantized")
    assert json.loads((run / "quantized/quantization.json").read_text())["method"] == "clipped"
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    plan = layer_plan(load_recipe(recipe_file).quantize, merged.config)
    for name, (codes, scale) in stored.rounded.items():
        weight = merged.get_submodule(name).weight.detach()
        expected = toy_method.clipped(weight, plan[name])
        assert torch.equal(codes, expected.codes) and torch.equal(scale, expected.scale), name
        assert (codes == 7).float().mean() > 0.02  # more than only the largest of each group
    training = "quantize.training={steps: 1, learns: scales}"
    qat([*arguments, training])
    convert([*arguments, training])
    trained = read_checkpoint(run / "quantized").rounded
    assert all(
        torch.equal(trained[name].codes, codes) for name, (codes, _) in stored.rounded.items()
    )


def test_the_table_says_which_methods_calibrate():
    for name, entry in METHODS.items():
        assert entry.is_calibrated == isinstance(load_method(name), Calibrated)


def test_an_unknown_method_is_refused_and_the_known_ones_are_named(recipe_file):
    with pytest.raises(UserError, match=r"expected 'rtn', 'hqq' or 'gptq' \(value 'awq'\)"):
        load_recipe(recipe_file, ["quantize.method=awq"])
    schema = Recipe.model_json_schema()["$defs"]["Quantize"]["properties"]["method"]
    assert schema["enum"] == ["rtn", "hqq", "gptq"]
