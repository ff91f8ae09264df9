"""`finequant run`: the stages of a recipe, each in its process, unless its result is up to date."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finequant.recipes.commands.parameters import Overrides, RecipePath
from finequant.recipes.commands.preflight import refuse_early
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from finequant.recipes.rundir import RunDir

MODULES = {
    "train": "finequant.finetune.train",
    "qat": "finequant.quantize.training.train",
    "quantize": "finequant.quantize.convert",
    "evaluate": "finequant.evaluate.compare",
}  # and each export: finequant.quantize.export


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    launch: Annotated[
        Path | None,
        typer.Option(help="accelerate configuration for training, as in recipes/accelerate/"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="start even if memory or disk seem too small")
    ] = False,
) -> None:
    """Run all stages in turn, skipping those whose inputs have not changed."""
    from finequant.recipes.hub import COMMITS, pinned
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir
    from finequant.recipes.stages import stages_of
    from finequant.recipes.terminal import say

    loaded, commits = pinned(load_recipe(recipe, overrides or []))
    os.environ[COMMITS] = json.dumps(commits)  # for the stages
    directory, stages = RunDir.of(loaded), stages_of(loaded)
    started, ran = time.monotonic(), False
    for number, stage in enumerate(stages, start=1):
        changes = directory.what_changed(loaded, stage)
        if changes == []:
            say(f"[{number}/{len(stages)}] {stage}: up to date")
            continue
        remaining = stages[number - 1 :]
        if not ran:
            refuse_early(loaded, directory, remaining, launch, force)
        say(f"[{number}/{len(stages)}] {stage}{_remaining(directory, remaining)}")
        for change in changes or []:
            say(f"  because {change}")
        trains = stage in ("train", "qat")
        _start(stage, [str(recipe), *(overrides or [])], launch if trains else None)
        ran = True
    if ran:
        say(f"done in {time.monotonic() - started:.0f} s: {directory.root}")
        return
    passed = _show_report(directory)
    say(f"nothing to do: {directory.root} is up to date")
    if not passed:
        sys.exit(1)


def _start(stage: str, arguments: list[str], launch: Path | None) -> None:
    """Runs a stage in its own process, which returns its memory and contains its crashes."""
    from finequant.recipes.interrupt import RESUME_HINT, wait_and_forward_signals

    command = [sys.executable, "-m"]
    if launch:
        command += ["accelerate.commands.launch", "--config_file", str(launch), "--module"]
    if stage in MODULES:
        command += [MODULES[stage], *arguments]
    else:
        command += ["finequant.quantize.export", *arguments, "--to", stage]
    try:
        code = wait_and_forward_signals(subprocess.Popen(command))
    except FileNotFoundError as error:
        raise UserError(f"{stage}: cannot start {error.filename}") from None
    if code == -signal.SIGKILL:
        print(f"{stage} was killed, perhaps out of memory: {RESUME_HINT}", file=sys.stderr)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def _remaining(directory: RunDir, stages: list[str]) -> str:
    """Estimates the remaining time from what the stages took last time in this run directory."""
    manifest = directory.manifest()
    known = [manifest[stage]["seconds"] for stage in stages if stage in manifest]
    if len(known) < len(stages):
        return ""
    return f" (about {sum(known) / 60:.0f} min to go, by the last run)"


def _show_report(directory: RunDir) -> bool:
    """Prints the table of the last evaluation, and returns whether its gate passed."""
    from finequant.evaluate.report.report import print_table

    report = json.loads(directory.report.read_text(encoding="utf-8"))
    print_table(report)
    return report["gate"]["passed"]
