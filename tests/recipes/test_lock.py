"""One process at a time in a run directory, and no lock that outlives its process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finequant.recipes import lock
from finequant.recipes.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from finequant.recipes import lock
lock.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def given_back():
    yield
    lock.release()


@pytest.fixture
def other(tmp_path):
    """Another process that holds tmp_path / "run"."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), "recipe.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_refused_and_told_of_the_first(tmp_path, other):
    with pytest.raises(UserError) as caught:
        lock.hold(tmp_path / "run")
    message = str(caught.value)
    assert f"run is in use by process {other.pid}, since 2" in message
    assert "recipe.yaml" in message
    assert "wait until it has ended, stop it, or give another output_dir" in message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(tmp_path, other, number):
    other.send_signal(number)
    other.wait()
    lock.hold(tmp_path / "run")
    assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()


def test_given_back_it_names_nobody_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        lock.hold(tmp_path)
        lock.hold(tmp_path)  # ours already
        lock.release()
        assert (tmp_path / lock.NAME).read_text() == ""


def test_other_processes_of_one_training_do_not_ask(tmp_path, other, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    lock.hold(tmp_path / "run")


def write_lock(folder: Path, host: str, seconds_ago: float) -> os.stat_result:
    file = folder / lock.NAME
    holder = {"pid": 7, "host": host, "since": "2026-01-02 03:04:05", "command": "train.py"}
    file.write_text(json.dumps(holder), encoding="utf-8")
    os.utime(file, ns=(file.stat().st_mtime_ns - int(seconds_ago * 1e9),) * 2)
    return file.stat()


def test_another_machine_on_a_shared_disk_counts_while_it_gives_signs_of_life(tmp_path):
    """Its `flock` is not seen here on every file system."""
    before = write_lock(tmp_path, "elsewhere", lock.SILENT / 2)
    for _ in range(2):  # asking is no sign of life
        with pytest.raises(UserError, match="process 7 on elsewhere, since 2026-01-02 03:04:05"):
            lock.hold(tmp_path)
        assert (tmp_path / lock.NAME).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("host", "seconds_ago"), [("elsewhere", lock.SILENT + 1), (socket.gethostname(), 1)]
)
def test_a_stale_lock_is_taken(tmp_path, host, seconds_ago):
    """That of a machine that fell silent, or of a process that was killed here."""
    write_lock(tmp_path, host, seconds_ago)
    lock.hold(tmp_path)
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\0" * 9])
def test_a_damaged_lock_is_no_lock(tmp_path, content):
    (tmp_path / lock.NAME).write_text(content, encoding="utf-8")
    lock.hold(tmp_path)


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    before = write_lock(tmp_path, socket.gethostname(), 1000)
    lock.hold(tmp_path)
    for _ in range(500):
        os.utime(tmp_path / lock.NAME, ns=(before.st_mtime_ns,) * 2)
        lock.threading.Event().wait(0.02)
        if (tmp_path / lock.NAME).stat().st_mtime_ns > before.st_mtime_ns:
            return
    pytest.fail("none")


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    victim = tmp_path / "mine.txt"
    victim.write_text("mine", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(victim)
    with pytest.raises(UserError, match="cannot be written"):
        lock.hold(tmp_path / "run")
    assert victim.read_text(encoding="utf-8") == "mine"


def test_a_run_directory_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"run: cannot be written \(.*output_dir=FOLDER"):
        lock.hold(tmp_path / "run")


@pytest.mark.parametrize("stage", ["train", "quantize", "evaluate", "sweep"])
def test_every_stage_asks(recipe_file, tmp_path, other, capsys, stage):
    from finequant.recipes.run import main

    with pytest.raises(SystemExit) as exit_:
        main([stage, str(recipe_file)])
    assert exit_.value.code == 2
    assert f"in use by process {other.pid}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [lock.NAME]
