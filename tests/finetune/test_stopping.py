"""When training is killed or fails, nothing is lost, and nothing incomplete is used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_recipe, refused

from finequant.recipes.artifact import SUMS

ROOT = Path(__file__).parents[2]
STEPS = ["train.max_steps=40", "train.save_steps=3", "lora.dropout=0.1", "train.logging_steps=5"]
BEST = ["train.epochs=10", "train.eval_steps=3", "train.save_steps=3"]
BEST += ["train.early_stopping_patience=3", "train.learning_rate=0.05", "train.schedule=constant"]


def train(recipe: Path, *overrides: str) -> bytes:
    """Trains in this process, and returns the adapter's weights."""
    from finequant.finetune.train import main

    main([str(recipe), *overrides])
    return (recipe.parent / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


def start(recipe: Path, *overrides: str) -> subprocess.Popen:
    script = ROOT / "finetune" / "train.py"
    command = [sys.executable, "-u", str(script), str(recipe), *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    pytest.fail(f"no {path}")


def checkpoints(recipe: Path) -> list[Path]:
    found = (recipe.parent / "run" / "checkpoints").glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_base):
    """Trains undisturbed, once per overrides; returns the run directory and the weights.

    The directory is shared: tests must not write into it.
    """
    runs: dict[tuple[str, ...], tuple[Path, bytes]] = {}

    def run(*overrides: str) -> tuple[Path, bytes]:
        if overrides not in runs:
            recipe = make_recipe(tmp_path_factory.mktemp("undisturbed"), tiny_base)
            weights = train(recipe, *overrides)
            runs[overrides] = recipe.parent / "run", weights
        return runs[overrides]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [STEPS, BEST], ids=["dropout", "early stopping"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_disturbed_run_ends_with_the_bytes_of_an_undisturbed_one(
    recipe_file, undisturbed, capsys, number, overrides
):
    _, expected = undisturbed(*overrides)
    process = start(recipe_file, *overrides)
    wait_for(recipe_file.parent / "run" / "checkpoints" / "checkpoint-6" / SUMS, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    if number == signal.SIGTERM:
        assert process.returncode == 143, said
        last = said.splitlines()[-1]
        assert last.startswith("stopped by SIGTERM: ")
        assert last.endswith("run the same command again to continue from here")
    assert not (recipe_file.parent / "run" / "adapter").exists()
    capsys.readouterr()
    assert train(recipe_file, *overrides) == expected
    assert "train: continuing from" in capsys.readouterr().err


def read_log(run: Path) -> list[dict]:
    return json.loads((run / "adapter" / "training_log.json").read_text(encoding="utf-8"))


@pytest.fixture
def interrupt_in_step(monkeypatch):
    """Makes the first training that comes to a step receive Ctrl-C in it."""
    from finequant.finetune.training_status import ShowsTraining

    def arrange(step: int) -> None:
        stopped = []

        def stop_once(self, args, state, control, **_) -> None:
            if state.global_step == step and not stopped:
                stopped.append(state.global_step)
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(ShowsTraining, "on_step_end", stop_once)

    return arrange


@pytest.mark.parametrize("limit", ["train.epochs=2", "train.max_steps=9"])
def test_the_best_epoch_is_kept_although_a_signal_came_at_its_end(
    recipe_file, undisturbed, interrupt_in_step, limit
):
    patience = ["train.early_stopping_patience=3", "train.learning_rate=0.05", limit]
    whole, expected = undisturbed(*patience)
    log = read_log(whole)
    (_, first), (last_step, last) = [
        (entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry
    ]
    assert last < first
    interrupt_in_step(last_step)
    with pytest.raises(SystemExit) as exit_:
        train(recipe_file, *patience)
    assert exit_.value.code == 130
    assert train(recipe_file, *patience) == expected


ENDS_IN_EPOCH = ["train.max_steps=9", "train.schedule=constant"]  # the second of 6 steps


def test_a_signal_in_the_last_step_adds_none(recipe_file, undisturbed, interrupt_in_step):
    whole, expected = undisturbed(*ENDS_IN_EPOCH)
    interrupt_in_step(9)
    with pytest.raises(SystemExit) as exit_:
        train(recipe_file, *ENDS_IN_EPOCH)
    assert exit_.value.code == 130
    assert train(recipe_file, *ENDS_IN_EPOCH) == expected
    logs = [read_log(run) for run in (whole, recipe_file.parent / "run")]
    losses = [{e["step"]: e["eval_loss"] for e in log if "eval_loss" in e} for log in logs]
    assert losses[0] == losses[1]
    assert [*losses[0]] == [6, 9]


@pytest.mark.parametrize("overrides", [ENDS_IN_EPOCH, BEST], ids=["steps", "early stopping"])
def test_a_run_killed_after_its_last_checkpoint_adds_no_step_and_keeps_the_best(
    recipe_file, overrides
):
    """Its folder may have moved since."""
    from finequant.finetune.train import main

    before, run = (recipe_file.parent / name for name in ("before", "run"))
    main([str(recipe_file), f"output_dir={before}", *overrides])
    expected = (before / "adapter" / "adapter_model.safetensors").read_bytes()
    steps = [entry["step"] for entry in read_log(before)]
    assert not json.loads((before / "manifest.json").read_text())["train"]["resumed"]
    before.rename(run)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "plain")
    (run / "manifest.json").unlink()
    assert train(recipe_file, *overrides) == expected
    assert sorted({entry["step"] for entry in read_log(run)}) == sorted(set(steps))
    assert json.loads((run / "manifest.json").read_text())["train"]["resumed"]


@pytest.mark.slow
def test_a_signal_saves_the_current_step(recipe_file):
    """This holds even if no checkpoint is due before the end of an epoch."""
    process = start(recipe_file, "train.epochs=500", "train.save_steps=5000")
    assert any("validation loss" in line for line in process.stderr)  # after an epoch of 6 steps
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    saved = checkpoints(recipe_file)[-1]
    step = int(saved.name.split("-")[1])
    assert f"stopped by SIGINT: step {step} is saved" in said
    log = json.loads((saved / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry][-1] == step


# What a kill during the writing of a checkpoint, or a bad disk, leaves of it.
DAMAGE = {
    "not sealed": lambda folder: (folder / SUMS).unlink(),
    "without its optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "truncated": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08"),
    "altered": lambda folder: (folder / "trainer_state.json").write_text("{}"),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_incomplete_checkpoint_is_not_resumed(recipe_file, undisturbed, capsys, damage):
    steps = ["train.max_steps=9", "train.save_steps=3", "train.save_total_limit=9"]
    whole, expected = undisturbed(*steps)
    run = shutil.copytree(whole, recipe_file.parent / "run")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "plain")
    (run / "manifest.json").unlink()
    DAMAGE[damage](checkpoints(recipe_file)[-1])
    capsys.readouterr()
    assert train(recipe_file, *steps) == expected
    said = capsys.readouterr().err
    assert "checkpoint-9, which is incomplete (" in said
    assert f"continuing from {run / 'checkpoints' / 'checkpoint-6'}" in said


def test_the_older_of_two_checkpoints_goes_once_the_newer_is_complete(recipe_file):
    train(recipe_file, "train.max_steps=9", "train.save_steps=2", "train.save_total_limit=1")
    (last,) = checkpoints(recipe_file)
    assert last.name == "checkpoint-9"


def test_a_finished_phase_that_was_altered_is_trained_again(recipe_file, undisturbed):
    whole, expected = undisturbed()
    run = shutil.copytree(whole, recipe_file.parent / "run")
    (run / "checkpoints" / "plain" / "adapter_model.safetensors").write_bytes(b"\x08")
    assert train(recipe_file) == expected


def test_a_users_folder_called_checkpoints_is_kept(recipe_file):
    mine = recipe_file.parent / "run" / "checkpoints" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    train(recipe_file, "train.max_steps=1")
    kept = recipe_file.parent / "run" / "previous" / "checkpoints-1" / "mine.txt"
    assert kept.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_loss_that_is_not_finite_ends_at_its_step_and_names_the_rows(recipe_file, packing):
    """With such a rate, one step moves the weights out of range."""
    rows = (recipe_file.parent / "train.jsonl").read_text(encoding="utf-8").splitlines()
    said = refused(
        train,
        recipe_file,
        "train.learning_rate=1e30",
        "train.schedule=constant",
        "train.warmup=0.0",
        "train.save_steps=1",
        f"data.packing={packing}",
    )
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: train: step 2: the loss is nan; its rows are train.jsonl:")
    named = line.partition("its rows are ")[2].partition(". Lower")[0].split(", ")
    numbers = [int(name.removeprefix("train.jsonl:")) for name in named]
    assert 4 <= len(set(numbers)) == len(numbers) <= len(rows)
    assert max(numbers) <= len(rows)
    assert "Lower train.learning_rate (it is 1e+30 there)" in line
    assert line.endswith("checkpoint-1 is kept")
    assert not (recipe_file.parent / "run" / "adapter").exists()


def test_a_gradient_that_is_not_finite_ends_at_its_step(recipe_file):
    """The loss is finite, but its gradient exceeds float32, as LoRA's scale is absurd."""
    said = refused(train, recipe_file, "lora.alpha=1e38", "train.max_steps=9", "train.warmup=0.0")
    assert "train: step 1: the norm of the gradient is" in said
    assert "train.jsonl:" in said
    assert "no checkpoint was made yet" in said


def test_infinite_and_nan_weights_of_the_base_are_refused(recipe_file, llama):
    from safetensors.torch import load_file, save_file

    for number, name in ((float("nan"), "one"), (float("inf"), "two")):
        folder = llama(name)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = number
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        said = refused(train, recipe_file, f"model.base={folder}")
        assert f"model.layers.1.mlp.up_proj.weight of {folder} has values" in said
        assert "copy or download it again" in said


def test_a_killed_run_leaves_a_log_of_all_steps(recipe_file):
    steps = ["train.max_steps=6", "train.save_steps=2", "train.logging_steps=1"]
    train(recipe_file, *steps)
    run = recipe_file.parent / "run"
    shutil.rmtree(run / "checkpoints" / "plain")
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    (run / "manifest.json").unlink()
    train(recipe_file, *steps)
    log = read_log(run)
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    seen = {entry["step"]: entry["num_input_tokens_seen"] for entry in log if "loss" in entry}
    figures = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["train"]
    tokens = figures["tokens_per_second"] * log[-1]["train_runtime"]
    assert tokens == pytest.approx(seen[6] - seen[4], rel=1e-3)


def test_an_interrupted_validation_is_in_the_log_of_the_whole_run(recipe_file, monkeypatch):
    from finequant.finetune.training_status import ShowsTraining

    interrupted = []

    def stop_once(self, args, state, control, **_) -> None:
        if not interrupted:
            interrupted.append(state.global_step)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ShowsTraining, "on_prediction_step", stop_once)
    with pytest.raises(SystemExit) as exit_:
        train(recipe_file, "train.epochs=2")
    assert (exit_.value.code, interrupted) == (130, [6])
    train(recipe_file, "train.epochs=2")
    file = recipe_file.parent / "run" / "adapter" / "training_log.json"
    log = json.loads(file.read_text(encoding="utf-8"))
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [6, 12]
