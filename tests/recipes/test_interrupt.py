"""Signals: the first ends work in order, the second at once, and launched processes get them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from finequant.recipes.errors import report_user_errors
from finequant.recipes.interrupt import (
    DEBOUNCE_SECONDS,
    RESUME_HINT,
    SIGNALS,
    Interrupted,
    deferred_signals,
    interruptible,
    start_and_forward_signals,
)

PATIENCE = 120
"""Seconds after which a process hangs; on a busy machine, all takes long."""

COMMON = """
import subprocess, sys, time
from finequant.recipes.errors import report_user_errors
from finequant.recipes.interrupt import deferred_signals, start_and_forward_signals, Interrupted
def wait():
    for _ in range(600):
        time.sleep(0.05)
"""
AT_ONCE = COMMON + "with report_user_errors():\n    print('ready', flush=True)\n    wait()"
COMMAND = """
import time
from finequant.recipes import run
@run.app.command()
def wait():
    print('ready', flush=True)
    time.sleep(30)
run.main(['wait'])
"""
SAVES = (
    COMMON
    + """
with report_user_errors(), deferred_signals() as request:
    print('ready', flush=True)
    while not request.number:
        time.sleep(0.05)
    time.sleep(float(sys.argv[1]))
    raise Interrupted(request.number, "step 7 is saved")
"""
)
LAUNCHES = (
    COMMON
    + """
def start():
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "0.5"])
    return child.pid, child.wait
with report_user_errors():
    sys.exit(start_and_forward_signals(start)[0])
"""
)


IMPORTS = """
import sys
from finequant.recipes.commands import pipeline
from finequant.recipes.errors import report_user_errors
pipeline.LIBRARIES = "slow_libraries"
with report_user_errors():
    sys.exit(pipeline._start(["train"], '["1/1", []]', [], []))
"""
SLOW_LIBRARIES = """
import sys, time, types

def slow(name):
    if name != "quiet_libraries":
        raise AttributeError(name)
    print("ready", flush=True)
    time.sleep(1)
    return lambda: time.sleep(1)

for name in ("recipes.command_line", "finetune.trainer", "quantize.checkpoint.reload"):
    sys.modules[f"finequant.{name}"] = library = types.ModuleType(name)
    library.__getattr__ = slow
import finequant.recipes.commands.libraries
"""


HANGS_UP = """
import sys
from multiprocessing import get_context
from finequant.recipes.commands import pipeline
from finequant.recipes.errors import report_user_errors
pipeline.processes = lambda: get_context("forkserver")
pipeline.MODULES["train"] = "the_stage"
with report_user_errors():
    pipeline._start_importing()
    sys.exit(pipeline._start(["train"], '["1/1", []]', [], []))
"""
HAS_A_LOCK = """
import os, time
from multiprocessing import RLock, util
from finequant.recipes.interrupt import SIGNALS
from finequant.recipes.errors import report_user_errors

def main(arguments):
    with report_user_errors():
        lock = RLock()
        for number in SIGNALS:  # forwarded after the last line
            util.Finalize(None, os.kill, args=(os.getpid(), number), exitpriority=1)
        print("ready", flush=True)
        time.sleep(60)
"""

IMPORTS_FOR_LONG = """
import time
print("ready", flush=True)
time.sleep(60)
"""


def start(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("code", [AT_ONCE, COMMAND], ids=["script", "finequant"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_with_its_code_and_one_line(number, code):
    process = start(code)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert said == f"stopped by {number.name}: run the same command again to continue from here\n"


def test_a_closed_terminal_does_not_change_the_exit_code():
    process = start(AT_ONCE)
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(PATIENCE) == 128 + signal.SIGHUP


LAST_LINES = """
import os, signal
from finequant.recipes import interrupt
from finequant.recipes.errors import UserError, report_user_errors
def signaled():
    os.kill(os.getpid(), signal.SIGTERM)
    return "the reason"
class Refused(UserError):
    def __str__(self):
        return signaled()
class NoRoom(OSError):
    def __str__(self):
        return "No space left on device " + signaled()
class Twice(interrupt.Interrupted):
    def __str__(self):
        return f"stopped, as another process was: {signaled()}"
print('ready', flush=True)
with report_user_errors():
    raise """


@pytest.mark.parametrize("error", ["Refused", "NoRoom", "Twice(signal.SIGTERM)"])
def test_a_signal_while_the_last_line_is_made_still_prints_one_line(error):
    """A launcher sends it when it stops the others because one has failed."""
    process = start(LAST_LINES + error)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert stderr.startswith("stopped")
    assert stderr.count("\n") == 1


SWALLOWS = """
import time
from finequant.recipes.errors import report_user_errors
with report_user_errors():
    print('ready', flush=True)
    try:
        time.sleep(30)
    except BaseException:  # as numpy does while it is imported
        pass
    raise ModuleNotFoundError("Could not import module 'LlamaConfig'")
"""


def test_a_failure_of_a_library_that_a_signal_interrupted_is_an_interruption():
    process = start(SWALLOWS)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert said == "stopped by SIGTERM: run the same command again to continue from here\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_work_in_progress_is_saved_first(number):
    process = start(SAVES, "0")
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == f"stopped by {number.name}: step 7 is saved"


def test_a_second_signal_ends_at_once():
    process = start(SAVES, "50")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("stopping after this step")
    time.sleep(DEBOUNCE_SECONDS + 0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("whom", ["leader", "group"])
def test_a_launched_process_saves_before_its_launcher_ends(whom):
    """A terminal sends Ctrl-C to all, `kill` only to the launcher: it counts once."""
    process = start(LAUNCHES, SAVES, start_new_session=True)
    if whom == "group":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped by SIGINT: step 7 is saved"


STUCK = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('ready', flush=True)
time.sleep(600)
"""


def test_a_second_signal_kills_a_launched_process_that_handles_none():
    process = start(LAUNCHES, STUCK)
    process.send_signal(signal.SIGTERM)
    time.sleep(DEBOUNCE_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 256 - signal.SIGKILL  # of the launched process


def test_a_signal_before_the_launched_process_exists_ends_the_launcher():
    def start():
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal came too late")

    with pytest.raises(Interrupted):
        start_and_forward_signals(start)


@pytest.mark.skipif(sys.platform != "linux", reason="only there is a fork server")
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path):
    (tmp_path / "slow_libraries.py").write_text(SLOW_LIBRARIES)
    process = start(IMPORTS, start_new_session=True, cwd=tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert said == "stopped by SIGINT: run the same command again to continue from here\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only there is a fork server")
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("stage", [HAS_A_LOCK, IMPORTS_FOR_LONG], ids=["working", "importing"])
def test_a_signal_to_all_processes_of_a_run_is_one_line(tmp_path, stage, number):
    """A closed terminal sends SIGHUP, which multiprocessing's resource tracker does not ignore."""
    (tmp_path / "the_stage.py").write_text(stage)
    process = start(HANGS_UP, start_new_session=True, cwd=tmp_path)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert said == f"stopped by {number.name}: run the same command again to continue from here\n"


def test_an_ignored_signal_stays_ignored():
    """nohup ignores SIGHUP, for example."""
    process = start("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SAVES, "0")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143


def test_a_signal_in_the_middle_of_a_print_is_noted(monkeypatch, capfd):
    """Python refuses to write to a stream inside another write to it."""

    class Entered:
        def write(self, text: str) -> None:
            raise RuntimeError("reentrant call")

        flush = write

    monkeypatch.setattr(sys, "stderr", Entered())
    with deferred_signals() as request:
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.number == signal.SIGTERM
    assert capfd.readouterr().err == "stopping after this step; another signal quits immediately\n"


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with report_user_errors(), deferred_signals() as request:
        assert request.number is None
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_except_exception_does_not_swallow_an_interruption():
    assert not issubclass(Interrupted, Exception)


@pytest.mark.parametrize(("command", "continues"), [("chat", False), ("sweep", True)])
def test_a_command_with_nothing_to_continue_does_not_advise_to(
    monkeypatch, capsys, command, continues
):
    from finequant.recipes.run import main

    def interrupted(*_: object) -> None:
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(f"finequant.evaluate.{command}.{command}", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main([command, "quickstart"])
    hint = f": {RESUME_HINT}" if continues else ""
    assert capsys.readouterr().err == f"stopped by SIGINT{hint}\n"


class Deleted:
    """Gets a signal while it is deleted: Python prints and ignores what is raised in __del__."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_comes_while_an_object_is_deleted_stops_the_command(capfd):
    with pytest.raises(Interrupted) as stop, interruptible() as request:
        Deleted()
        assert request.number == signal.SIGINT
        time.sleep(10)
    assert stop.value.number == signal.SIGINT
    assert capfd.readouterr().err == ""


def test_a_signal_that_a_library_swallows_stops_the_command():
    """As torch may, while a model is deleted: what a handler raises there vanishes silently."""
    with pytest.raises(Interrupted) as stop, interruptible():
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            except BaseException:  # noqa: BLE001, S110
                pass
        time.sleep(10)
    assert stop.value.number == signal.SIGTERM


def test_a_signal_is_not_raised_again_while_the_block_is_left():
    done = []
    with pytest.raises(Interrupted) as stop, interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            time.sleep(0.3)
            done.append("saved")
    assert done == ["saved"]
    time.sleep(0.1)  # nor later
    assert stop.value.number == signal.SIGTERM


def test_a_signal_that_python_ignored_is_deferred_in_a_block_that_saves():
    with interruptible():
        Deleted()
        with deferred_signals() as request:
            time.sleep(0.2)
        assert request.number == signal.SIGINT
