"""Models too large for any device, whose weights are read from disk at each use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finequant.quantize.size import placement
from finequant.quantize.size.estimate import memory_of
from finequant.quantize.size.machine import Machine
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_models_give_the_same_report_to_the_last_digit(
    recipe_file, tiny_base, tmp_path, train_once, monkeypatch, capsys, dtype
):
    """Compares perplexities, answers, likelihoods of choices, and divergence, for each model."""
    from finequant.evaluate.compare import main as compare
    from finequant.quantize.convert import main as convert

    run = recipe_file.parent / "run"
    arguments = [str(recipe_file), "train.max_steps=2", "train.learning_rate=1e-2"]
    arguments += ["quantize.embedding=8", "quantize.method=rtn", "evaluate.limit=4"]
    arguments += ["evaluate.metrics=[multiple_choice, f1]", "evaluate.choices=completions"]
    base = shutil.copytree(tiny_base, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype).save_pretrained(base)
    arguments.append(f"model.base={base}")
    train_once(arguments)
    convert(arguments)
    reports = []
    for memory in (10**12, 10**6):
        machine = Machine("a machine", memory, "cpu")
        monkeypatch.setattr(placement, "this_machine", lambda machine=machine: machine)
        compare(arguments)
        reports.append(json.loads((run / "report.json").read_text()))
        said = capsys.readouterr().err
        assert ("2 of 6 parts on disk" in said) == (memory == 10**6)
        for measurement in (run / "measurements").iterdir():
            measurement.unlink()
    assert reports[0] == reports[1]


def test_blocks_fill_devices_in_turn_and_the_rest_stays_on_disk():
    rooms = {"cuda:0": 45, "cuda:1": 25, "cpu": 12}
    device_map = placement.filled_in_turn(7, tables=20, block=10, rooms=rooms)
    blocks = [device_map[f"model.layers.{number}"] for number in range(7)]
    assert blocks == ["cuda:0"] * 2 + ["cuda:1"] * 2 + ["cpu"] + ["disk"] * 2
    assert {device_map[name] for name in device_map if ".layers." not in name} == {"cuda:0"}


def test_an_offloaded_model_mixes_no_devices(tiny_base):
    """The device is `meta`, which computes nothing, and refuses tensors of the CPU."""
    from finequant.quantize.merge.adapter import open_base
    from finequant.quantize.merge.model import spread_model

    base = open_base(Model(base=str(tiny_base)))
    device_map = placement.filled_in_turn(2, 1, 1, {"meta": 1, "cpu": 1})
    assert list(device_map.values())[-2:] == ["cpu", "disk"]
    model = spread_model(base, base.weights, torch.bfloat16, torch.float32, device_map)
    logits = model(torch.tensor([[5, 6, 7]], device=model.device)).logits
    assert (logits.device.type, logits.dtype) == ("meta", torch.float32)


def test_a_model_too_large_for_a_gpu_is_spread_or_read_and_not_refused(recipe_file, monkeypatch):
    from finequant.recipes.commands import pipeline

    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    config = LlamaConfig(**shape, **heads, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    recipe = load_recipe(recipe_file)
    for memory, gpus, weights in (
        (200, 1, "weights"),
        (80, 4, "weights, a share"),
        (24, 2, "weights in use, the others are read each time"),
    ):
        machine = Machine("H100", memory * 10**9, "gpu", gpus)
        needed = memory_of("evaluate", recipe, config, machine)
        assert weights in needed
        assert sum(needed.values()) < machine.memory
        assert placement.fits_one_device(recipe, config, machine) == (memory == 200)
        monkeypatch.setattr("finequant.quantize.size.machine.this_machine", lambda m=machine: m)
        monkeypatch.setattr("finequant.finetune.model.load_config", lambda _: config)
        monkeypatch.setattr("finequant.finetune.device.trains_on_cpu", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        several = pipeline._launched("evaluate", recipe, Path("several_gpus.yaml"))
        assert bool(several[0]) == (memory == 200)
        assert pipeline._launched("evaluate", recipe, None) == ([], [])
