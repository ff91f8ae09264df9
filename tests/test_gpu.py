"""Repeats on an accelerator what other tests check on a CPU: `pytest -m gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.gpu

CALIBRATED = "quantize.calibration={tokens: 512, length: 32}"
GPTQ = ("quantize.method=gptq", CALIBRATED)
METHODS = {
    "rtn": ("quantize.scale=search",),
    "hqq": ("quantize.method=hqq",),
    "gptq": (*GPTQ, "quantize.scale=search", "quantize.rotate=true"),
    "trained scales": ("quantize.method=gptq", CALIBRATED.replace("}", ", scale_steps: 4}")),
    "block training": ("quantize.method=gptq", CALIBRATED.replace("}", ", steps: 4}")),
    "budget": (CALIBRATED, "quantize.budget=6", "quantize.rotate=true", "quantize.embedding=8"),
}


@pytest.fixture(autouse=True)
def accelerator() -> torch.device:
    assert torch.accelerator.is_available(), "no accelerator here"
    return torch.accelerator.current_accelerator()


def run_stages(arguments: list[str]) -> None:
    """Trains (with `quantize.training`, also quantization-aware), quantizes, and compares."""
    from finequant.evaluate.compare import main as compare
    from finequant.finetune.train import main as train
    from finequant.quantize.convert import main as convert
    from finequant.quantize.training.train import main as qat

    train(arguments)
    if any(argument.startswith("quantize.training=") for argument in arguments):
        qat(arguments)
    convert(arguments)
    compare(arguments)


def perplexities(run) -> list[float]:
    models = json.loads((run / "report.json").read_text())["models"]
    return [models[name]["perplexity"]["held_out"]["token"] for name in models]


@pytest.mark.fresh_process
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_stages_run_and_quantized_is_near_tuned(recipe_file, precision):
    arguments = [str(recipe_file), *GPTQ, f"train.precision={precision}"]
    run_stages([*arguments, "train.learning_rate=1e-2", "quantize.bits=8"])
    run = recipe_file.parent / "run"
    base, tuned, quantized = perplexities(run)
    assert tuned < base
    assert quantized == pytest.approx(tuned, rel=0.02)
    manifest = json.loads((run / "manifest.json").read_text())
    assert all(
        manifest[stage]["peak_gpu_memory_bytes"] for stage in ("train", "quantize", "evaluate")
    )


@pytest.mark.fresh_process
def test_the_command_runs_all_stages(recipe_file):
    arguments = ["run", str(recipe_file), "train.max_steps=2"]
    subprocess.run([sys.executable, "-m", "finequant", *arguments], check=True)
    assert (recipe_file.parent / "run" / "report.json").exists()


@pytest.mark.parametrize("method", METHODS)
def test_each_method_quantizes(recipe_file, method):
    run_stages([str(recipe_file), *METHODS[method], "quantize.bits=8", "train.max_steps=2"])
    _, tuned, quantized = perplexities(recipe_file.parent / "run")
    assert quantized == pytest.approx(tuned, rel=0.1)


@pytest.mark.parametrize("distillation", [0.0, 0.5])
@pytest.mark.parametrize("learns", ["adapter", "scales"])
def test_training_through_the_quantized_weights_lowers_their_loss(
    recipe_file, learns, distillation
):
    training = {"steps": 12, "learns": learns, "distillation": distillation, "learning_rate": 5e-3}
    run_stages(
        [str(recipe_file), *GPTQ, f"quantize.training={json.dumps(training)}", "quantize.bits=4"]
    )
    log = json.loads(
        (recipe_file.parent / "run" / "trained_codes" / "training_log.json").read_text()
    )
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]


def test_packed_rows_train_with_gradient_checkpointing(recipe_file):
    from finequant.finetune.train import main as train

    changes = ("data.packing=true", "train.gradient_checkpointing=true", "lora.use_dora=true")
    train([str(recipe_file), *changes, "train.max_steps=4", "lora.dropout=0.1"])
    assert (recipe_file.parent / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_choices_are_ranked_and_files_written_for_other_runtimes(recipe_file):
    from finequant.quantize.export import main as export

    run_stages(
        [str(recipe_file), "evaluate.metrics=[exact_match, json_match]", "train.max_steps=2"]
    )
    export([str(recipe_file), "--to", "gguf"])
    assert list((recipe_file.parent / "run" / "exports" / "gguf").glob("*.gguf"))


def test_an_interrupted_calibration_resumes(recipe_file, monkeypatch):
    """Kept codes are on the CPU, and the blocks are not."""
    from finequant.finetune.train import main as train
    from finequant.quantize.convert import main as convert
    from finequant.quantize.methods import gptq

    arguments = [str(recipe_file), *GPTQ]
    train(arguments)
    found, method = [], gptq.METHOD

    def interrupted(*inputs):
        if len(found) == 6:  # in the second block
            raise KeyboardInterrupt
        found.append(method.quantize(*inputs))
        return found[-1]

    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        patched.setattr(gptq, "METHOD", replace(method, quantize=interrupted))
        convert(arguments)
    convert(arguments)
    assert (recipe_file.parent / "run" / "quantized" / "model.safetensors").exists()


@pytest.mark.parametrize("rule", ["max", "search"])
def test_calibrated_codes_are_nearly_those_of_a_cpu(accelerator, rule):
    from finequant.quantize.methods.gptq import Statistics, gptq
    from finequant.quantize.scheme import LayerScheme

    torch.manual_seed(0)
    weight, x = torch.randn(4096, 512), torch.randn(2048, 512)
    scheme, codes = LayerScheme(4, 32, rule, torch.float32), []
    for device in (torch.device("cpu"), accelerator):
        statistics = Statistics()
        statistics.add(x.to(device), (x * 1.01).to(device))
        codes.append(gptq(weight.to(device), statistics, scheme).codes.cpu())
    assert (codes[0] != codes[1]).float().mean() < 0.01


def test_liger_patches_only_the_trained_model(llama):
    pytest.importorskip("liger_kernel")
    from transformers import LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    from finequant.finetune.kernels import use_liger

    before = dict(vars(modeling_llama))
    model = LlamaForCausalLM.from_pretrained(llama("base")).cuda()
    ids = torch.arange(40)[None].cuda()
    plain = model(ids).logits
    use_liger(model, "liger")
    assert vars(modeling_llama) == before
    assert type(model.model.norm).forward != model.model.norm.forward.__func__
    assert torch.allclose(model(ids).logits, plain, atol=1e-4)
