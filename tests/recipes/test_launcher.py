"""A launcher of several processes ends as the first that failed, and adds nothing to its output."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing import get_context
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest

from finequant.recipes.commands import launcher, pipeline
from finequant.recipes.run import PANELS

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
WORKER = """
import os, signal, sys, time
if os.environ["RANK"] != "1":
    time.sleep(60)  # until the launcher ends it
print("error: as it is", file=sys.stderr)
{}
"""


@pytest.fixture
def launched(tmp_path, capfd):
    """Runs a launcher whose second process executes the line while the others wait; returns its
    exit code and output. It is forked, as importing torch would take most of the time."""

    def run(line: str, worker: str = WORKER) -> tuple[int, str]:
        script = tmp_path / "worker.py"
        script.write_text(worker.format(line))
        arguments = [*TORCHRUN, str(script)]
        process = get_context("fork").Process(target=launcher.main, args=(arguments,))
        process.start()
        process.join()
        return process.exitcode, capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("sys.exit(2)", 2),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", 143),
    ],
    ids=["refusal", "killed", "launcher stopped"],
)
def test_the_first_process_that_fails_decides_the_exit_code(launched, line, code):
    assert launched(line) == (code, "error: as it is\n")


REFUSES = """
import os, time
from finequant.recipes.errors import UserError, report_user_errors
with report_user_errors():
    {}
    raise UserError("as it is")
"""


@pytest.mark.parametrize(
    "line", ["time.sleep(-time.time() % 4)", "os.environ['RANK'] == '1' or time.sleep(60)"]
)
def test_a_mistake_is_told_once_whichever_processes_find_it(launched, line):
    code, said = launched(line, REFUSES)
    assert code == 2
    assert said.count("error: as it is") == 1


def test_a_killed_process_decides_before_those_that_lost_it():
    lost, killed, later = (
        SimpleNamespace(exitcode=code, timestamp=second)
        for code, second in ((1, 10), (-signal.SIGKILL, 10), (-signal.SIGKILL, 40))
    )
    assert launcher._first_exit_code([lost, killed, later]) == -signal.SIGKILL
    assert launcher._first_exit_code([lost, later]) == 1  # its launcher waited for it in vain


def test_accelerate_with_one_process_ends_with_its_code(monkeypatch):
    def run_module(*_, **__):
        raise CalledProcessError(2, "train.py")

    monkeypatch.setattr(launcher, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as end:
        launcher.main(["accelerate.commands.launch"])
    assert end.value.code == 2


def test_ctrl_c_ends_accelerate_with_one_process_without_a_traceback(monkeypatch):
    def run_module(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as end:
        launcher.main(["accelerate.commands.launch"])
    assert end.value.code == 130


SAVES = """
import os, pathlib, signal, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
pathlib.Path({file!r} + os.environ["RANK"]).touch()
if os.environ["RANK"] == "0":
    while not all(pathlib.Path({file!r} + rank).exists() for rank in "012"): time.sleep(0.01)
    time.sleep(1)  # a launcher that is still starting processes does not wait for any
    os.kill(os.getppid(), signal.SIGTERM)
    while not stopped: time.sleep(0.01)
    time.sleep(35)
    pathlib.Path({file!r}).touch()
"""


@pytest.mark.slow
def test_a_launcher_waits_for_a_process_that_saves(tmp_path):
    """torchrun alone kills it after 30 seconds."""
    saved = tmp_path / "saved"
    (tmp_path / "worker.py").write_text(SAVES.format(file=str(saved)))
    pipeline._start(["train"], '["1/1", []]', [], [*TORCHRUN, str(tmp_path / "worker.py")])
    assert saved.exists()


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (137, "train was killed, perhaps out of memory: run the same command again"),
        (139, "train crashed in a library (SIGSEGV): run the same command again"),
    ],
)
def test_a_launched_stage_that_crashes_is_one_line(tmp_path, monkeypatch, capfd, code, line):
    (tmp_path / "ends.py").write_text(f"import sys; sys.exit({code})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(pipeline, "LAUNCHER", "ends")
    assert pipeline._start(["train"], '["1/1", []]', [], ["torch.distributed.run"]) == code
    assert capfd.readouterr().err.startswith(line)


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
EVERY = [command.__name__ for commands in PANELS.values() for command in commands]
ALONE = [name for name in EVERY if name not in ("train", "qat", "quantize", "evaluate")]


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_shared_is_left_to_the_first_process(here, monkeypatch, name):
    given = ["init", "--data", "no-rows"] if name == "init" else [name, "no-recipe"]
    given = given if name != "schema" else [name]
    for variable, value in (LAUNCHED | {"RANK": "1"}).items():
        monkeypatch.setenv(variable, value)
    assert here(*given) == (0, "", "")
    for variable, value in LAUNCHED.items():
        monkeypatch.setenv(variable, value)
    code, shown, said = here(*given)
    assert (code, bool(shown)) == ((0, True) if name == "schema" else (2, False))
    assert f"{name}: only the first of 2 processes works; the others have ended\n" in said
    assert ("error: " in said) == (name != "schema")


def test_the_first_process_goes_on_as_if_it_were_alone(here, recipe_file, monkeypatch):
    """Otherwise libraries, and the stages of `run`, would wait for the others, which have ended."""
    for variable, value in (LAUNCHED | {"ACCELERATE_USE_FSDP": "true"}).items():
        monkeypatch.setenv(variable, value)
    assert here("validate", str(recipe_file)).returncode == 0
    assert not os.environ.keys() & {*LAUNCHED, "ACCELERATE_USE_FSDP"}


@pytest.mark.parametrize("name", sorted({*EVERY} - {*ALONE}))
def test_every_process_takes_part_in_what_is_shared(here, monkeypatch, name):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert here(name, "no-recipe").returncode == 2
