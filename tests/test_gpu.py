"""What the CPU's tests prove, on an accelerator: `pytest -m gpu`, left out elsewhere."""

from __future__ import annotations

import json

import pytest
import torch

pytestmark = pytest.mark.gpu

GPTQ = ("quantize.method=gptq", "quantize.calibration={tokens: 512, length: 32}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_stages_run_there_and_quantized_is_near_tuned(recipe_file, precision):
    from finequant.evaluate.compare import main as compare
    from finequant.finetune.train import main as train
    from finequant.quantize.convert import main as convert

    assert torch.accelerator.is_available(), "no accelerator here"
    arguments = [str(recipe_file), *GPTQ, f"train.precision={precision}"]
    arguments += ["train.learning_rate=1e-2", "quantize.bits=8"]
    for stage in (train, convert, compare):
        stage(arguments)
    run = recipe_file.parent / "run"
    models = json.loads((run / "report.json").read_text())["models"]
    base, tuned, quantized = (
        models[name]["perplexity"]["held_out"]["token"] for name in ("base", "tuned", "quantized")
    )
    assert tuned < base
    assert quantized == pytest.approx(tuned, rel=0.02)


def test_a_calibrated_quantization_goes_on_where_it_was_interrupted(recipe_file, monkeypatch):
    """The codes that were kept are on the CPU, the blocks are not."""
    from finequant.finetune.train import main as train
    from finequant.quantize.convert import main as convert
    from finequant.quantize.methods import calibrate

    assert torch.accelerator.is_available(), "no accelerator here"
    arguments = [str(recipe_file), *GPTQ]
    train(arguments)
    found, gptq = [], calibrate.gptq

    def interrupted(*inputs):
        if len(found) == 9:  # in the second block
            raise KeyboardInterrupt
        found.append(gptq(*inputs))
        return found[-1]

    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        patched.setattr(calibrate, "gptq", interrupted)
        convert(arguments)
    convert(arguments)
    assert (recipe_file.parent / "run" / "quantized" / "model.safetensors").exists()
