"""Two and four processes with gloo give the files of one, and none waits for one that stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import difference, make_recipe, make_rows, write_jsonl
from double_sums import sums_in_double
from filelock import FileLock
from safetensors.torch import load_file
from scenarios import (
    AWARE,
    CALIBRATED,
    DATA_FREE,
    GPTQ,
    LORA,
    MEASURED,
    PACKED,
    SHARDED,
    TRAINED,
)

from finequant.finetune.train import LOG

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ZERO3 = HERE.parents[1] / "recipes" / "accelerate" / "deepspeed_zero3.yaml"
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_base, worker_id) -> Path:
    """The folder with the results of several.py's scenarios, run once for all pytest workers."""
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "several"
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return folder
        folder.mkdir()
        make_recipe(folder, tiny_base)
        write_jsonl(folder / "uneven.jsonl", make_rows(range(0, 45)))
        write_jsonl(folder / "five.jsonl", make_rows(range(60, 65)))
        command = [sys.executable, str(HERE / "several.py"), str(folder)]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def by_one(folder):
    """Trains in this process, and returns the run directory."""
    from finequant.finetune.train import main

    def train(name: str, *overrides: str) -> Path:
        main([str(folder / "recipe.yaml"), f"output_dir={folder / name}", *overrides])
        return folder / name

    return train


def results(folder: Path, name: str, processes: int = 2) -> tuple[list[int], list[str]]:
    """Reads the exit codes and outputs of all processes."""
    files = [folder / f"{name}-{rank}" for rank in range(processes)]
    codes = [int(Path(f"{file}.code").read_text()) for file in files]
    return codes, [Path(f"{file}.txt").read_text() for file in files]


def read_log(run: Path) -> list[dict]:
    return json.loads((run / "adapter" / LOG).read_text(encoding="utf-8"))


def relative_difference(one: Path, other: Path) -> float:
    one, other = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert one.keys() == other.keys()
    return max(((one[name] - other[name]).norm() / one[name].norm()).item() for name in one)


ENDS = (
    "error: another process of this run has ended, or cannot be reached",
    "stopped by SIGTERM: ",  # where the launcher was faster than the connection
)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    ("stage", "resumed"),
    [
        ("uneven", "train: continuing from {}/checkpoints/checkpoint-2"),
        ("adapter learns", "train: continuing from {}/checkpoints/qat/steps/checkpoint-2"),
        ("gptq", "quantizing model.layers.1."),
        ("evaluated", "evaluate: base: measured before, unchanged"),
    ],
)
def test_a_killed_process_ends_the_others_with_one_line(folder, processes, stage, resumed):
    """The same command resumes, and ends with the results that the other tests expect."""
    name = f"{stage} by {processes}"
    texts = [(folder / f"{name}, killed-{rank}.txt").read_text() for rank in range(processes)]
    ended = [any(line.startswith(ENDS) for line in text.splitlines()) for text in texts]
    assert sum(ended) == processes - 1, texts
    codes, (first, *others) = results(folder, name, processes)
    assert codes == [0] * processes
    assert resumed.format(folder / name) in first.splitlines()
    assert "quantizing model.layers.0." not in first


def test_rows_that_cannot_be_shared_equally_give_the_adapter_of_one_process(folder, by_one):
    """45 rows in steps of 8: of the last five, four processes get two, one, one and one; the same
    goes for validation."""
    rows = [f"data.train={folder / 'uneven.jsonl'}", f"data.validation={folder / 'five.jsonl'}"]
    alone = by_one("uneven alone", *rows, *TRAINED)
    one = [step["eval_loss"] for step in read_log(alone) if "eval_loss" in step]
    assert len(one) > 0
    for processes in (2, 4):
        run = folder / f"uneven by {processes}"
        assert relative_difference(alone, run) < 1e-6
        several = [step["eval_loss"] for step in read_log(run) if "eval_loss" in step]
        assert several == pytest.approx(one, rel=1e-5)
        manifest = json.loads((run / "manifest.json").read_text())
        assert manifest["train"]["processes"] == processes
    assert relative_difference(by_one("packed alone", *PACKED), folder / "packed") < 1e-6


def test_a_loss_that_is_not_finite_on_one_process_ends_all(folder):
    codes, (said, other) = results(folder, "nan")
    assert codes == [2, 2]
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: train: step 2: the loss is nan; its rows are train.jsonl:")
    named = line.partition("its rows are ")[2].partition(". Lower")[0].split(", ")
    assert len(set(named)) == len(named) == 4  # of this process
    assert line.endswith("checkpoint-1 is kept")
    assert "error" not in other


def test_a_signal_to_one_process_saves_the_step_of_all(folder):
    codes, (said, _) = results(folder, "stopped")
    assert codes == [143, 143]
    assert "stopped by SIGTERM: step 3 is saved" in said
    codes, (said, _) = results(folder, "gone on")
    assert codes == [0, 0]
    assert f"continuing from {folder / 'stopped' / 'checkpoints' / 'checkpoint-3'}" in said
    stopped, undisturbed = (folder / name / WEIGHTS for name in ("stopped", "undisturbed"))
    assert stopped.read_bytes() == undisturbed.read_bytes()


def test_processes_that_resume_within_a_later_epoch_read_its_rows(folder):
    codes, (said, _) = results(folder, "gone on in the second")
    assert codes == [0, 0]
    assert f"continuing from {folder / 'stopped in the second' / 'checkpoints'}" in said
    stopped, whole = (folder / name / WEIGHTS for name in ("stopped in the second", "two epochs"))
    assert stopped.read_bytes() == whole.read_bytes()


def test_a_folder_that_machines_do_not_share_is_refused(folder):
    codes, (said, _) = results(folder, "shared")
    assert codes == [2, 2]
    assert f"error: output_dir: {folder / 'shared'} on " in said
    assert "is not seen by the processes on" in said
    assert "output_dir=/SHARED/FOLDER" in said
    assert not list((folder / "shared").glob(".shared-*"))


@pytest.mark.parametrize(
    ("name", "run", "saved", "here", "way_out"),
    [
        (
            "whole weights opened by FSDP",
            "stopped/checkpoints/checkpoint-3",
            "2 processes without FSDP or DeepSpeed",
            "2 processes with FSDP",
            "one process, torchrun or recipes/accelerate/several_gpus.yaml",
        ),
        (
            "split weights opened by DDP",
            "lora/checkpoints/checkpoint-2",
            "2 processes with FSDP",
            "2 processes without FSDP or DeepSpeed",
            "recipes/accelerate/fsdp.yaml",
        ),
    ],
)
def test_a_checkpoint_of_another_launcher_is_refused(folder, name, run, saved, here, way_out):
    codes, (said, other) = results(folder, name)
    assert codes == [2, 2]
    assert f"error: train: {folder / run} was saved by {saved}, and {here} cannot resume" in said
    assert f"train with {way_out} again, or delete {(folder / run).parent} to start over" in said
    assert "error" not in other


VARIANTS = {
    "lora": LORA,
    "dora": ["lora.use_dora=true", "train.max_steps=2"],
    "pissa": ["lora.init_lora_weights=pissa", "train.max_steps=2"],
    "olora": ["lora.init_lora_weights=olora", "train.max_steps=2"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_fsdp_saves_the_adapter_of_one_process(folder, by_one, name):
    codes, said = results(folder, name)
    assert codes == [0, 0], said
    alone = by_one(f"{name} alone", *VARIANTS[name])
    assert relative_difference(alone, folder / name) < 1e-5
    config, expected = (
        json.loads((run / "adapter" / "adapter_config.json").read_text())
        for run in (folder / name, alone)
    )
    assert config == expected


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3_saves_the_adapter_of_one_process(folder, by_one):
    """The first run on a CPU compiles an operator, which takes minutes."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", str(ZERO3), "--num_processes", "2", "--main_process_port", "0"]
    steps = "train.max_steps=3"
    run = subprocess.run(
        [*launch, str(HERE / "zero3.py"), str(folder / "recipe.yaml"), steps]
        + [f"output_dir={folder / 'zero3'}"],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert relative_difference(by_one("zero3 alone", steps), folder / "zero3") < 1e-5


def differ(one: Path, other: Path) -> tuple[float, float]:
    """Compares two checkpoints: the share of different codes, and the largest ratio of scales."""
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    scales = [name for name in one if name.endswith("_weight_scale")]
    ratios = torch.cat([(one[name] / other[name]).flatten() for name in scales])
    codes = [name.replace("_scale", "_qdata") for name in scales]
    others = torch.cat([(one[name] != other[name]).flatten() for name in codes])
    return others.float().mean().item(), (ratios - 1).abs().max().item()


def test_two_processes_train_the_codes_of_one(folder):
    """They start from the same codes, bit for bit, although making the codes was interrupted."""
    from finequant.quantize.training.train import main

    codes, said = results(folder, "calibration stopped")
    assert codes == [143, 143], said
    codes, said = results(folder, "codes")
    assert codes == [0, 0], said
    assert said[1] == "quantizing model.layers.1.\n"  # the block before was known
    trained = folder / "undisturbed" / "trained_codes" / "codes.safetensors"
    alone = folder / "codes of one"
    shutil.copytree(
        folder / "undisturbed", alone, ignore=shutil.ignore_patterns("trained_*", "qat")
    )
    with sums_in_double():
        main([str(folder / "recipe.yaml"), f"output_dir={alone}", *AWARE])
    start = "checkpoints/qat/start"
    other_codes, ratio = differ(alone / start, folder / "undisturbed" / start)
    assert other_codes == 0
    assert ratio < 1e-6
    one, two = load_file(alone / "trained_codes" / trained.name), load_file(trained)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor != two[name]).float().mean() < 0.01, name
    manifest = json.loads((folder / "undisturbed" / "manifest.json").read_text())
    assert manifest["qat"]["processes"] == 2


@pytest.fixture(scope="module")
def sharded(folder):
    """Trains codes in this process as several did; returns its run directory, and theirs: of two
    with FSDP first, then of two and four without, and of four with it."""
    from finequant.quantize.training.train import main

    def train(name: str) -> tuple[Path, list[Path]]:
        numbers = {name: 2, f"{name} by 2": 2, f"{name} by 4": 4, f"{name}, split by 4": 4}
        runs = [run for run in numbers if (folder / run).exists()]
        for run in runs:
            codes, said = results(folder, run, numbers[run])
            assert codes == [0] * numbers[run], said
        alone = folder / f"{name} alone"
        shutil.copytree(folder / name, alone, ignore=shutil.ignore_patterns("trained_*", "steps"))
        main([str(folder / "recipe.yaml"), f"output_dir={alone}", *SHARDED[name]])
        return alone, [folder / run for run in runs]

    return train


def trained_parameters(run: Path) -> torch.Tensor:
    steps = run / "checkpoints" / "qat" / "steps"
    tensors = load_file(steps / "checkpoint-3" / "parameters.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def ends(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads all codes that training ended with, and all scales."""
    tensors = load_file(run / "trained_codes" / "codes.safetensors")
    codes, scales = (
        [tensor.flatten() for name, tensor in sorted(tensors.items()) if name.endswith(part)]
        for part in ("codes", "scale")
    )
    return torch.cat(codes), torch.cat(scales)


def starts(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from finequant.quantize.checkpoint.stored import read_checkpoint

    start = read_checkpoint(run / "checkpoints" / "qat" / "start").rounded
    codes, scales = zip(*(start[name] for name in sorted(start)), strict=True)
    return torch.cat([part.flatten() for part in codes]), torch.cat(
        [part.flatten() for part in scales]
    )


@pytest.mark.parametrize(("name", "number"), [("adapter learns", 4), ("adapter learns, taught", 1)])
def test_several_processes_train_the_codes_of_one(sharded, name, number):
    """The number of parts in which processes compute logits does not matter."""
    alone, runs = sharded(name)
    (expected, same), (before, _) = ends(alone), starts(alone)
    assert (expected != before).float().mean() > 0.01
    assert len(runs) == number
    for run in runs:
        assert difference(trained_parameters(run), trained_parameters(alone)) < 1e-6, run
        codes, scales = ends(run)
        assert torch.equal(scales, same)
        assert (codes != expected).float().mean() < 1e-4  # the last bit may decide at an edge


def test_several_processes_keep_the_best_scales_of_one(sharded):
    alone, runs = sharded("scales learn")
    (expected, same), (before, _) = ends(alone), starts(alone)
    assert torch.equal(expected, before)
    assert len(runs) == 4
    for run in runs:
        last = run / "checkpoints" / "qat" / "steps" / "checkpoint-3" / "trainer_state.json"
        assert json.loads(last.read_text())["best_model_checkpoint"].endswith("checkpoint-2")
        assert difference(trained_parameters(run), trained_parameters(alone)) < 1e-5, run
        codes, scales = ends(run)
        assert torch.equal(codes, expected)
        assert difference(scales, same) < 1e-6


def test_fsdp_resumes_with_its_optimizer(sharded, folder):
    """Adam divides small gradients by their size, and so their last bits show."""
    assert results(folder, "scales learn, taught, ended")[0] == [143, 143]
    alone, (two,) = sharded("scales learn, taught")
    _, (said, _) = results(folder, "scales learn, taught")
    assert f"continuing from {two / 'checkpoints' / 'qat' / 'steps' / 'checkpoint-2'}" in said
    assert difference(trained_parameters(two), trained_parameters(alone)) < 1e-4


def test_fsdp_shards_codes_that_only_the_first_process_loads(folder):
    for name in SHARDED:
        first, second = (
            json.loads((folder / f"{name}-{rank}-bytes.json").read_text()) for rank in (0, 1)
        )
        assert first["whole"] == second["whole"] == pytest.approx(first["loaded"], rel=1e-3)
        assert first["share"] + second["share"] == first["whole"]
        assert first["share"] == pytest.approx(second["share"], rel=0.01)
        assert second["loaded"] < 0.2 * second["whole"]  # trained parameters, and the norms


def test_an_error_in_quantizing_ends_both_processes(folder):
    codes, (said, other) = results(folder, "groups that do not fit")
    assert codes == [2, 2]
    assert "error: quantize.group_size: 80 does not divide the input features" in said
    assert not other


@pytest.fixture(scope="module")
def from_undisturbed(folder):
    """Calls a stage's entry in this process, in a copy of a run that two processes trained."""

    def run(entry, name: str, *overrides: str, source: str = "undisturbed") -> Path:
        made = ("trained_*", "qat", "measurements", "report*", "predictions*", "plots")
        ignored = made if source != "undisturbed" else (*made, "quantized*")
        shutil.copytree(folder / source, folder / name, ignore=shutil.ignore_patterns(*ignored))
        with sums_in_double():
            entry([str(folder / "recipe.yaml"), f"output_dir={folder / name}", *overrides])
        return folder / name

    return run


def test_two_processes_train_a_block_and_scales_as_one(folder, from_undisturbed, monkeypatch):
    """There are nine sequences, two per step: only one process has the last one."""
    from finequant.quantize.convert import main
    from finequant.quantize.methods import reconstruct
    from finequant.quantize.training import scales

    codes, said = results(folder, "quantized")
    assert codes == [0, 0], said
    assert "written in" in said[0] and not said[1]
    monkeypatch.setattr(reconstruct, "TOKENS", 64)
    monkeypatch.setattr(scales, "SCALE_TOKENS", 64)
    alone = from_undisturbed(main, "quantized alone", *CALIBRATED)
    other_codes, ratio = differ(alone / "quantized", folder / "undisturbed" / "quantized")
    assert other_codes < 0.001
    assert ratio < 1e-4


@pytest.mark.parametrize("method", [*DATA_FREE, "gptq"])
def test_several_processes_quantize_as_one(folder, from_undisturbed, method):
    """This holds for GPTQ, too, if its sums are in float64."""
    from finequant.quantize.convert import main

    overrides = GPTQ if method == "gptq" else [f"quantize.method={method}"]
    alone = from_undisturbed(main, f"{method} alone", *overrides)
    for processes in (2, 4):
        name = f"{method} by {processes}"
        codes, (first, *others) = results(folder, name, processes)
        assert codes == [0] * processes
        assert "written in" in first
        assert not any("written in" in said for said in others)
        other_codes, ratio = differ(alone / "quantized", folder / name / "quantized")
        assert other_codes == 0
        assert ratio < 1e-6 if method == "gptq" else ratio == 0


def test_several_processes_measure_what_one_does(folder, from_undisturbed):
    """There are three batches, so that one of four processes has none."""
    from finequant.evaluate.compare import main

    alone = from_undisturbed(main, "measured alone", *GPTQ, *MEASURED, source="gptq by 2")
    expected = json.loads((alone / "report.json").read_text(encoding="utf-8"))["models"]
    assert expected["tuned"]["tasks"]["held_out"]["multiple_choice"]["n"] == 8
    for processes in (2, 4):
        run = folder / f"evaluated by {processes}"
        codes, (first, *others) = results(folder, run.name, processes)
        assert codes == [0] * processes
        assert "held-out" in first and not any(others)
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        assert report["models"] == expected  # to the last digit
        rows = [(made / "predictions.jsonl").read_bytes() for made in (alone, run)]
        assert rows[0] == rows[1]
