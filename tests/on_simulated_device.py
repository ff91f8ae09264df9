"""Every stage on a device that refuses to mix with the CPU gives the CPU's results.

These tests need a separate process, which `test_simulated_device.py` starts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import simulated_device
import torch
from conftest import make_llama, make_recipe
from safetensors.torch import load_file
from test_gpu import METHODS

from finequant.evaluate.compare import main as compare
from finequant.finetune.train import main as train
from finequant.quantize.checkpoint.stored import read_checkpoint
from finequant.quantize.convert import main as convert
from finequant.quantize.methods import gptq
from finequant.quantize.rounding import CODES
from finequant.quantize.size import placement
from finequant.quantize.training.train import main as qat
from finequant.recipes.rundir import RunDir
from finequant.recipes.stages import STARTING_CODES

DEVICE = simulated_device.install()
PLACES = ("device", "cpu")
METHODS = {
    name: [text.replace("steps: 4", "steps: 2") for text in overrides]
    for name, overrides in METHODS.items()
}
TRAINED = ("trained scales", "block training")
TASK = """\
task: color
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}} color:"
doc_to_target: red
doc_to_choice: [red, green, blue, grey]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""

Stage = Callable[[list[str]], None]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return make_recipe(folder, make_llama(folder / "base", hidden_size=32, intermediate_size=64))


@pytest.fixture(scope="session")
def run_on(recipe) -> Callable[..., None]:
    """Runs a stage on the `device`, or on the `cpu` as accelerate's configuration may say."""

    def run(place: str, stage: Stage, folder: Path, *overrides: str) -> None:
        steps = ("train.max_steps=2", "train.save_steps=1")
        simulated_device.copies.clear()
        with pytest.MonkeyPatch.context() as patch:
            if place == "cpu":
                patch.setenv("ACCELERATE_USE_CPU", "true")
            stage([str(recipe), f"output_dir={folder}", *steps, *overrides])
        assert bool(simulated_device.copies) == (place == "device")

    return run


@pytest.fixture(scope="session")
def tuned(run_on, tmp_path_factory) -> Path:
    """The run directory of an adapter that the device trained. It is shared: tests copy it."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    run_on("device", train, folder)
    return folder


@pytest.fixture(scope="session")
def quantized(run_on, tuned, tmp_path_factory) -> Callable[[str, str], Path]:
    """Quantizes the tuned model by one of METHODS once; returns the run directory."""

    @cache
    def run(place: str, method: str) -> Path:
        folder = tmp_path_factory.mktemp(place) / "run"
        shutil.copytree(tuned, folder)
        run_on(place, convert, folder, *METHODS[method])
        return folder

    return run


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


@pytest.mark.parametrize(
    "mixed",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: here.add_(there),
        lambda here, there: there.sum().add_(here.sum()),
        lambda here, there: here[there[0].long()],
        lambda here, there: torch.nn.functional.embedding(there[0].long(), here),
        lambda here, there: torch.nn.functional.linear(here, there, there[0]),
        lambda here, there: torch.add(there, there, out=here),
        lambda here, there: here.normal_(generator=torch.Generator()),
        lambda here, there: here.requires_grad_().square().backward(there),
    ],
)
def test_an_operation_on_both_devices_is_refused(mixed):
    here, there = torch.ones(3, 3, device=DEVICE), torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"same device|expected device|is on cpu|is the CPU's"):
        mixed(here, there)


def test_the_device_computes_what_the_cpu_does():
    weights = []
    for place in (DEVICE, torch.device("cpu")):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3).to(place)
        optimizer = torch.optim.AdamW(layer.parameters())
        x = torch.rand(5, 4, device=place)
        x[1:, 2] *= 2
        simulated_device.copies.clear()
        (layer(x).softmax(-1)[::2] * torch.tensor(3.0)).square().sum().backward()
        optimizer.step()
        assert not simulated_device.copies
        assert layer.weight.grad.device == place
        weights.append(layer.weight.detach().cpu())
        assert simulated_device.copies["to the CPU"] == (place == DEVICE)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    "overrides",
    [(), ("data.packing=true", "train.gradient_checkpointing=true", "lora.use_dora=true")],
    ids=["plain", "packed, checkpointed, DoRA"],
)
def test_the_adapter_equals_the_cpus(run_on, tuned, tmp_path, overrides):
    for place in PLACES:
        if place == "cpu" or overrides:
            run_on(place, train, tmp_path / place, *overrides)
    of_device = tmp_path / "device" if overrides else tuned
    torch.testing.assert_close(adapter(of_device), adapter(tmp_path / "cpu"), rtol=1e-3, atol=1e-5)


def test_training_resumes_from_a_checkpoint(run_on, tuned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    for name in ("adapter", "checkpoints/plain", "checkpoints/checkpoint-2"):
        shutil.rmtree(run / name)
    run_on("device", train, run)
    torch.testing.assert_close(adapter(run), adapter(tuned), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_makes_the_codes_that_it_makes_on_the_cpu(quantized, method):
    """Where inputs are calibrated on, the last bit of a sum can change codes, and those of all
    later layers: a device rounds several layers at once, and with AVX-512, a product of more rows
    ends in other bits. Then only the first layer's codes are the same. Without training, nine of
    ten others are, too; in any case, the logits are as far from the tuned model's.
    """
    runs = [quantized(place, method) for place in PLACES]
    of_device, of_cpu = (read_checkpoint(run / "quantized").rounded for run in runs)
    assert of_device.keys() == of_cpu.keys()
    is_calibrated = method in (*TRAINED, "gptq")
    same = {name: codes == of_cpu[name].codes for name, (codes, _) in of_device.items()}
    for name, equal in same.items():
        if not is_calibrated or name == "model.layers.0.self_attn.q_proj":
            assert equal.all(), name
    if method == "gptq":
        assert torch.cat([equal.flatten() for equal in same.values()]).float().mean() > 0.9
    errors = [
        json.loads((run / "manifest.json").read_text())["quantize"]["logit_error"] for run in runs
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.1 if is_calibrated else 1e-4)


@pytest.fixture(scope="session")
def starting(tuned, tmp_path_factory) -> dict[str, Path]:
    """Run directories, by device, in which the device has made the starting codes, once."""
    folders = {place: tmp_path_factory.mktemp(place) / "run" for place in PLACES}
    for folder in folders.values():
        shutil.copytree(tuned, folder)
    return folders


@pytest.mark.parametrize(("learns", "distillation"), [("adapter", 0.5), ("scales", 0.0)])
def test_trained_codes_equal_the_cpus(run_on, starting, learns, distillation):
    training = {"steps": 2, "learns": learns, "distillation": distillation, "learning_rate": 0.05}
    trained = []
    for place, run in starting.items():
        run_on(place, qat, run, f"quantize.training={json.dumps(training)}")
        trained.append(load_file(run / "trained_codes" / CODES))
    (folder,) = RunDir(run).outputs(STARTING_CODES)
    before = read_checkpoint(folder).rounded
    for name, tensor in trained[0].items():
        if name.endswith(".codes"):
            assert (tensor != trained[1][name]).float().mean() < 0.01
        else:
            torch.testing.assert_close(tensor, trained[1][name], rtol=1e-3, atol=0)
    assert not all(
        torch.equal(start, trained[0][f"{name}.{part}"])
        for name, rounded in before.items()
        for part, start in rounded._asdict().items()
    )


def test_an_interrupted_calibration_in_bf16_resumes(run_on, tuned, tmp_path, monkeypatch):
    """Kept codes are on the CPU, and the weights are read again in float32."""
    run, method, calls = tmp_path / "run", gptq.METHOD, []
    shutil.copytree(tuned, run)

    def interrupted(*inputs):
        calls.append(inputs)
        if len(calls) == 6:  # in the second block
            raise KeyboardInterrupt
        return method.quantize(*inputs)

    overrides = (*METHODS["gptq"], "quantize.dtype=bfloat16")
    with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        patched.setattr(gptq, "METHOD", replace(method, quantize=interrupted))
        run_on("device", convert, run, *overrides)
    run_on("device", convert, run, *overrides)
    assert (run / "quantized" / "model.safetensors").exists()


def test_measurements_equal_the_cpus(recipe, run_on, quantized, monkeypatch):
    """Compares perplexities, divergence, answers, choices and an lm-eval task: of a model on the
    device, and of one whose blocks stay on the CPU and on disk while they are not in use."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from finequant.evaluate import models
    from finequant.evaluate.metrics import tasks

    run, folder, reports = quantized("device", "rtn"), recipe.parent, []
    (folder / "color.yaml").write_text(TASK.format(rows=folder / "test.jsonl"))
    overrides = ["evaluate.metrics=[exact_match, multiple_choice]", "evaluate.choices=completions"]
    overrides += ["evaluate.limit=2", f"evaluate.task_folder={folder}", "evaluate.tasks=[color]"]
    # Most of lm-eval's time goes into its own tasks, and into a look at the machine.
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(tasks, "_task_manager", lambda *_: manager)
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)
    load, devices = models.load_model, []

    def load_model(*arguments, **named):
        model = load(*arguments, **named)
        devices.append(model.device.type)
        return model

    monkeypatch.setattr("finequant.evaluate.compare.load_model", load_model)
    rooms = {str(DEVICE): 0, "cpu": 1}
    spread = placement.filled_in_turn(2, tables=0, block=1, rooms=rooms)
    for place, device_map in (("device", None), ("device", spread), ("cpu", None)):
        monkeypatch.setattr(placement, "device_map_of", lambda *_, where=device_map: where)
        shutil.rmtree(run / "measurements", ignore_errors=True)
        run_on(place, compare, run, *METHODS["rtn"], *overrides)
        reports.append(report(run))
    assert devices == [DEVICE.type] * 6 + ["cpu"] * 3
    for other in reports[:2]:
        for name, model in reports[-1]["models"].items():
            figures = other["models"][name]
            assert figures["tasks"] == model["tasks"]
            for text, perplexity in model["perplexity"].items():
                assert figures["perplexity"][text] == pytest.approx(perplexity, rel=1e-3)
        assert other["divergence"]["kl"] == pytest.approx(reports[-1]["divergence"]["kl"], rel=1e-2)
