"""recipes/errors.py: the machine's limits are reported without a traceback."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finequant.recipes import lock
from finequant.recipes.errors import report_user_errors


def test_windows_is_refused_in_one_line():
    # What is imported while sys.platform still tells the truth works here.
    code = """if True:
        import signal, subprocess, sys, typer
        del signal.SIGKILL, signal.SIGHUP, signal.SIGALRM
        sys.modules["resource"], sys.platform = None, "win32"
        import finequant.recipes.run
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 2
    said = process.stderr
    assert said == "error: finequant needs Linux or macOS: on Windows, install it in WSL\n"


def test_running_out_of_memory_says_what_to_make_smaller(capsys):
    with pytest.raises(SystemExit) as exit_, report_user_errors():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: use smaller batches (train.micro_batch_size")
    assert said.count("\n") == 1


def test_a_limit_of_file_sizes_is_one_line(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SystemExit) as exit_, report_user_errors():
            save_file({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: a file is larger than `ulimit -f`")
    assert said.count("\n") == 1


FULL = Path("/dev/full")
"""Linux's device on which every write fails. Nothing that renames a file to it may be tried."""

WRITERS = {
    "Python": lambda: FULL.write_text("x" * 10**5, encoding="utf-8"),
    "numpy": lambda: np.zeros(10**5).tofile(FULL),
    "torch": lambda: torch.save(torch.zeros(10**5), FULL),
}


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_line_that_names_the_disk_with_the_least_room(
    tmp_path, monkeypatch, capsys, write
):
    def disk_usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=2e4 if folder == tmp_path else 9e9)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    with pytest.raises(SystemExit) as exit_, report_user_errors():
        lock.hold(tmp_path)
        write()
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: no space left on the disk")
    assert f" (least is left at {tmp_path}: 0.0 MB); run the same command again" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("path", ["{folder}", "{folder}/file/below", "{folder}/" + "a" * 300])
def test_a_path_that_cannot_be_meant_is_bad_input(tmp_path, capsys, path):
    (tmp_path / "file").write_text("")
    given = path.format(folder=tmp_path)
    with pytest.raises(SystemExit) as exit_, report_user_errors():
        Path(given).write_text("x")
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {given}: ")
    assert said.endswith(": use another path\n")


def test_a_current_folder_that_was_deleted_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    with pytest.raises(SystemExit) as exit_, report_user_errors():
        pytest.fail("nothing can be found from here")
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the folder in which this command was started no longer exists")
    assert said.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), report_user_errors():
        1 / 0  # noqa: B018


def test_words_that_numpy_uses_for_a_full_disk_may_mean_something_else():
    with pytest.raises(RuntimeError), report_user_errors():
        raise RuntimeError("bf16 was requested and is not there")


@pytest.mark.parametrize(
    "original",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:24971: "
        "Connection reset by peer",
        "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error\n"
        "ncclRemoteError: A call failed possibly due to a network error",
    ],
    ids=["gloo", "NCCL"],
)
def test_the_end_of_another_process_is_one_line(capsys, original):
    with pytest.raises(SystemExit) as exit_, report_user_errors():
        raise RuntimeError(original)
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: another process of this run has ended, or cannot be reached")
    assert "run the same command again to continue from here" in said
    assert said.count("\n") == 1


STREAMS = """
from finequant.recipes.errors import report_user_errors
with report_user_errors():
    print("a result", flush=True)
    with open("number", "w") as file:
        file.write(str(file.fileno()))
    raise SystemExit(3)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_number_of_a_stream_that_is_closed(tmp_path, closed):
    """What libraries print would be written into it."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, STREAMS]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    assert run.stderr == ""
    assert int((tmp_path / "number").read_text()) > 2


BUFFERED = os.environ | {"PYTHONUNBUFFERED": ""}
READ_NO_MORE = """
from finequant.recipes.errors import report_user_errors
with report_user_errors():
    print("ready", flush=True)
    {}
    print("another", flush={})
"""


@pytest.mark.parametrize("flush", [True, False])
def test_a_command_whose_output_nobody_reads_any_more_ends_silently(flush):
    code = READ_NO_MORE.format("input()", flush)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=BUFFERED,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    _, said = process.communicate("\n")
    assert process.returncode == 128 + signal.SIGPIPE
    assert said == ""


def test_another_broken_pipe_keeps_its_traceback():
    with pytest.raises(BrokenPipeError), report_user_errors():
        raise BrokenPipeError(32, "of a connection")


def test_results_that_do_not_fit_on_the_disk_are_an_error():
    code = READ_NO_MORE.format("import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", False)
    run = subprocess.run([sys.executable, "-c", code], env=BUFFERED, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("error: no space left on the disk")
    assert run.stderr.count("\n") == 1
