"""`finequant run`: runs a recipe's stages, each in its own process, unless they are up to date."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import chain, groupby
from math import gcd
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finequant.recipes.commands.parameters import Overrides, RecipePath
from finequant.recipes.commands.preflight import refuse_early
from finequant.recipes.errors import CRASHES, OutsideError, report_user_errors
from finequant.recipes.interrupt import SIGNALS
from finequant.recipes.locate import locate_launch
from finequant.recipes.terminal import (
    STAGE,
    as_argument,
    close,
    doing,
    duration,
    restart_clock,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

    from finequant.recipes.rundir import RunDir
    from finequant.recipes.schema import Recipe

MODULES = {
    "train": "finequant.finetune.train",
    "qat": "finequant.quantize.training.train",
    "quantize": "finequant.quantize.convert",
    "evaluate": "finequant.evaluate.compare",
}

LIBRARIES = "finequant.recipes.commands.libraries"
LAUNCHER = "finequant.recipes.commands.launcher"
SAVING_SECONDS = 600
"""Seconds that torchrun waits after a signal for its processes, which save the step that is
running; by default, it kills them after 30."""
FORK_SERVER_LOST = 255
"""The exit code that multiprocessing returns for a process whose fork server is gone."""


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    launch: Annotated[
        Path | None,
        typer.Option(
            help="an accelerate configuration for training, calibration and evaluation: a file, or "
            "the name of one that comes with finequant, such as several_gpus"
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="start even if memory or disk seems too small")
    ] = False,
) -> None:
    """Run all stages in turn; skip those whose inputs have not changed."""
    from finequant.recipes.hub import COMMITS, pinned
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir
    from finequant.recipes.stages import stages_of

    launch = locate_launch(launch) if launch else None
    loaded, commits = pinned(load_recipe(recipe, overrides or []))
    os.environ[COMMITS] = json.dumps(commits)  # for the stages
    directory, started = RunDir.of(loaded), time.monotonic()
    say(f"{loaded.name}: {', '.join(stages_of(loaded))}, in {directory.root}")
    code = _run_stale(loaded, directory, [str(recipe), *(overrides or [])], launch, force)
    if code is None:
        passed = _show_report(directory)
        say(f"nothing to do: {directory.root} is up to date")
        sys.exit(0 if passed else 1)
    say(f"done in {duration(time.monotonic() - started)}; the page to open: {directory.page}")
    _say_what_next(loaded, directory, code == 0)
    sys.exit(code)


def _run_stale(
    recipe: Recipe, directory: RunDir, arguments: list[str], launch: Path | None, force: bool
) -> int | None:
    """Runs the stages that are not up to date, and exits if one of them fails.

    arguments: the recipe and its overrides, for the stages' own command lines.

    Returns:
        0, 1 if the gate failed, or None if all stages are up to date.
    """
    from finequant.recipes import lock
    from finequant.recipes.stages import stages_of

    steps, code = _steps(stages_of(recipe)), None
    for number, step in enumerate(steps, start=1):
        position = f"{number}/{len(steps)}"
        changes = {stage: directory.what_changed(recipe, stage) for stage in step}
        stale = [stage for stage in step if changes[stage] != []]
        if current := [stage for stage in step if changes[stage] == []]:
            say(f"[{position}] {', '.join(current)}: up to date")
        if not stale:
            continue
        remaining = [stale, *steps[number:]]
        if code is None:
            lock.check_free(directory.root)
            stages_left = [*chain(*remaining)]
            refuse_early(recipe, directory, stages_left, launch, force, _start_importing)
        seconds = _seconds(directory, remaining)
        left = f", {duration(sum(seconds))} left if it goes as fast as last time" if seconds else ""
        say(f"[{position}] {', '.join(stale)}{left}")
        for change in dict.fromkeys(chain(*(changes[stage] or [] for stage in stale))):
            say(f"  because {change}")
        launcher, changed = _launched(stale[0], recipe, launch)
        code = _start(stale, json.dumps([position, seconds]), [*arguments, *changed], launcher)
        gate_failed = code == 1 and directory.what_changed(recipe, step[-1]) == []
        if code and not gate_failed:
            sys.exit(code)
    return code


def _steps(stages: list[str]) -> list[list[str]]:
    """Groups the stages by process: a single one writes all exports, so that it opens the
    checkpoint and computes its logits only once."""
    return [list(step) for _, step in groupby(stages, module_of)]


def module_of(stage: str) -> str:
    """Returns the module whose `main` runs a stage; all exports have the same one."""
    return MODULES.get(stage, "finequant.quantize.export")


def export_options(step: list[str]) -> list[str]:
    """Returns the arguments that name the exports of a step."""
    return [word for stage in step if stage not in MODULES for word in ("--to", stage)]


def _run_stage(module: str, arguments: list[str], position: str) -> None:
    """Does, in a new process, what `python -m MODULE ARGUMENTS` does."""
    parent = parent_process()
    if parent and not parent.is_alive():  # Ctrl-C while the fork server imported the libraries
        return
    os.environ[STAGE] = position
    restart_clock()
    with report_user_errors():  # importing takes seconds
        main = import_module(module).main
    # A signal that a terminal sends to all processes is also forwarded, perhaps after the stage's
    # last line: it must not change the exit code.
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    main(arguments)


def _say_what_next(recipe: Recipe, directory: RunDir, passed: bool) -> None:
    """Names the commands that may follow a run; a model that failed its gate is not shipped."""
    from finequant.publish.license import likely_start

    start = likely_start(Path(recipe.publish.base_model or recipe.model.base).name)
    name = recipe.name if recipe.name.startswith(start) else f"{start}-{recipe.name}"
    repo = recipe.publish.repo_id or f"YOUR-NAME/{name}"
    run = as_argument(directory.root)
    take = f"publish {run} --dry-run publish.repo_id={repo}"
    if not recipe.quantize.exports:
        take = f"export {run} --to gguf"
    lines = [f"report {run} --open", f"chat {run}"]
    if passed:
        lines.append(take)
    say("\n".join(["next:", *(f"  finequant {line}" for line in lines)]))


def _launched(stage: str, recipe: Recipe, launch: Path | None) -> tuple[list[str], list[str]]:
    """Returns the launcher of the stage's processes, and the overrides of the recipe that it needs.

    That is accelerate if `launch` is given, and otherwise torchrun on all GPUs, or, in training, on
    as many as can share a step's rows. A single process exports, quantizes without calibration, and
    evaluates a model that is spread over GPUs.
    """
    if stage not in MODULES or (stage == "evaluate" and _spreads(recipe)):
        return [], []
    if stage == "quantize":
        from finequant.quantize.methods.sequences import calibrates  # only now: it imports torch

        if not calibrates(recipe):
            return [], []
    if launch:
        return ["accelerate.commands.launch", "--config_file", str(launch), "--module"], []
    import torch

    from finequant.finetune.device import trains_on_cpu

    gpus, overrides = 0 if trains_on_cpu() else torch.cuda.device_count(), []
    processes, rows = gpus, recipe.train.batch_size
    if stage in ("train", "qat") and gpus > 1:
        processes = max(number for number in range(1, gpus + 1) if rows % number == 0)
        micro = gcd(recipe.train.micro_batch_size, rows // processes)
        overrides = [f"train.micro_batch_size={micro}"]
    if processes < 2:
        return [], []
    say(f"{stage}: on {processes} of {gpus} GPUs")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return torchrun, overrides


def _spreads(recipe: Recipe) -> bool:
    """Says whether a model is too large for one GPU, or for the memory of a machine without."""
    from finequant.finetune.model import load_config
    from finequant.quantize.size.machine import this_machine
    from finequant.quantize.size.placement import fits_one_device

    return not fits_one_device(recipe, load_config(recipe.model), this_machine())


def processes() -> BaseContext:
    """Returns the multiprocessing context in which stages start.

    A fork server imports the libraries once for all stages, which saves ten seconds for each. It
    does not work with an accelerator: libraries look for one when they are imported, and CUDA
    refuses to work in processes forked after that. macOS's libraries break in forked processes.
    """
    from finequant.finetune.device import trains_on_cpu

    if sys.platform != "linux" or not trains_on_cpu():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([LIBRARIES])
    return context


def _start_importing() -> None:
    """Lets the fork server, if there is one, import libraries while this process goes on."""
    from multiprocessing import resource_tracker
    from multiprocessing.forkserver import ensure_running

    # A closed terminal would end the tracker of semaphores, which ignores other signals: a stage
    # would then start another one, which does not know its semaphores and prints tracebacks.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource_tracker.ensure_running()
    signal.signal(signal.SIGHUP, before)
    if processes().get_start_method() == "forkserver":
        ensure_running()


def _start(step: list[str], position: str, arguments: list[str], launcher: list[str]) -> int:
    """Runs a stage, or all exports, in a process, which frees its memory and contains crashes.

    position: as `terminal.STAGE` describes it.

    Returns:
        The exit code as in a shell: 0, 1 if the gate failed, or what to exit with.

    Raises:
        Interrupted: after a signal that came too late to stop the stage, such as while training
            saved its last checkpoint.
    """
    from finequant.recipes.interrupt import RESUME_HINT, Interrupted, erase_line

    name, module = ", ".join(step), module_of(step[0])
    arguments = [*arguments, *export_options(step)]
    if launcher:
        code, signaled = _run_launched([*launcher, module, *arguments], position)
    else:
        code, signaled = _run_forked(name, (module, arguments, position))
    if code == -signal.SIGKILL and signaled:  # by the second signal, or it reached the fork server
        erase_line()
        return 128 + signaled
    if code == 0 and signaled:
        raise Interrupted(signaled)
    if -code in CRASHES:
        erase_line()
        say(f"{name} {CRASHES[-code]}: {RESUME_HINT}")
    return code if code >= 0 else 128 - code


def _run_launched(arguments: list[str], position: str) -> tuple[int, int | None]:
    """Runs a launcher, and returns its exit code, negative after a crash, and the signal it got."""
    from finequant.recipes.interrupt import start_and_forward_signals

    command = [sys.executable, "-m", LAUNCHER, *arguments]
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_SECONDS)}
    environment |= os.environ | {STAGE: position}
    code, signaled = start_and_forward_signals(partial(_started, command, environment))
    crashed = code - 128 in CRASHES  # one of the launcher's processes
    return 128 - code if crashed else code, signaled


def _run_forked(name: str, work: tuple[str, list[str], str]) -> tuple[int, int | None]:
    """Runs `_run_stage`, and returns what `_run_launched` does."""
    from finequant.recipes.interrupt import start_and_forward_signals

    doing(f"{name}: loading torch and transformers")
    process = processes().Process(name=name, target=_run_stage, args=work)
    code, signaled = start_and_forward_signals(partial(_forked, process))
    if code == FORK_SERVER_LOST:
        _end_orphan(process.pid)
        code = -signal.SIGKILL
    return code, signaled


def _started(command: list[str], environment: dict[str, str]) -> tuple[int, Callable[[], int]]:
    process = subprocess.Popen(command, env=environment)
    return process.pid, process.wait


def _forked(process: BaseProcess) -> tuple[int, Callable[[], int]]:
    from finequant.recipes.interrupt import RESUME_HINT

    def exit_code() -> int:
        process.join()
        return process.exitcode

    try:
        process.start()
    except (EOFError, OSError) as error:  # the fork server was killed
        raise OutsideError(
            f"{process.name}: its process did not start ({error}): {RESUME_HINT}"
        ) from None
    close()
    return process.pid, exit_code


def _end_orphan(pid: int) -> None:
    """Stops a stage whose fork server was killed; it saves what it can."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        orphan = psutil.Process(pid)
        orphan.terminate()
        orphan.wait()


def _seconds(directory: RunDir, steps: list[list[str]]) -> list[float]:
    """Returns what each step took last time in this run directory; [] if one never ran, or then
    only finished what an earlier call had begun."""
    manifest = directory.manifest()
    entries = [manifest.get(stage) for stage in chain(*steps)]
    if not all(entry and not entry.get("resumed") for entry in entries):
        return []
    return [sum(manifest[stage]["seconds"] for stage in step) for step in steps]


def _show_report(directory: RunDir) -> bool:
    """Prints the table of the last evaluation, and returns whether its gate passed.

    The stage is finished before its page is written: a kill or a full disk in between leaves the
    page of an earlier evaluation, or none.
    """
    from finequant.evaluate.report.report import print_table
    from finequant.recipes.commands.results import rewrite_page

    report = json.loads(directory.report.read_text(encoding="utf-8"))
    print_table(report)
    page, finished = directory.page, directory.manifest_file.stat().st_mtime_ns
    if not page.exists() or page.stat().st_mtime_ns < finished:
        rewrite_page(directory)
    return report["gate"]["passed"]
