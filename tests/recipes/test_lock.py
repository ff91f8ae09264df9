"""One process at a time in a run directory, and no lock that outlives its process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from conftest import refused

from finequant.recipes import lock
from finequant.recipes.errors import UserError, report_user_errors

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
    assert f"run is in use by process {other.pid} on {socket.gethostname()}, since 2" in message
    assert "recipe.yaml" in message
    assert "wait for it to finish, stop it, or choose another output_dir" in message


def test_a_second_run_is_refused_before_its_checks(recipe_file, tmp_path, other, here, monkeypatch):
    monkeypatch.setattr("finequant.recipes.commands.pipeline.refuse_early", pytest.fail)
    said = here("run", str(recipe_file))
    assert said.returncode == 2
    assert f"run is in use by process {other.pid} on" in said.stderr


def test_looking_whether_a_directory_is_free_leaves_it_so(tmp_path):
    lock.check_free(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    lock.hold(tmp_path / "run")
    lock.check_free(tmp_path / "run")
    assert tmp_path / "run" in lock._held
    lock.release()
    lock.check_free(tmp_path / "run")
    assert not lock._held


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_process(tmp_path, other, number):
    other.send_signal(number)
    other.wait()
    lock.hold(tmp_path / "run")
    assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_lock_can_be_released_and_taken_again(tmp_path):
    for _ in range(2):
        lock.hold(tmp_path)
        lock.hold(tmp_path)  # ours already
        lock.release()


def test_other_processes_of_one_training_skip_the_lock(tmp_path, other, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    lock.hold(tmp_path / "run")


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\0" * 9])
def test_a_damaged_lock_is_ignored(tmp_path, content):
    (tmp_path / lock.NAME).write_text(content, encoding="utf-8")
    lock.hold(tmp_path)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    victim = tmp_path / "mine.txt"
    victim.write_text("mine", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(victim)
    with pytest.raises(UserError, match="cannot be written"):
        lock.hold(tmp_path / "run")
    assert victim.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("root", ["disk", "disk/run"])
@pytest.mark.parametrize("check", [lock.hold, lock.check_writable])
def test_a_link_to_a_disk_that_is_not_mounted_is_named(tmp_path, check, root):
    (tmp_path / "disk").symlink_to(tmp_path / "mounted")
    with pytest.raises(UserError) as refused:
        check(tmp_path / root)
    reason = f"{tmp_path}/disk links to {tmp_path}/mounted, which does not exist"
    assert str(refused.value).startswith(f"{tmp_path / root}: cannot be written ({reason}): ")


@pytest.mark.parametrize("error", [FileNotFoundError, UserError])
@pytest.mark.parametrize("again", [False, True])
def test_a_directory_that_is_removed_while_it_is_held_is_named(tmp_path, capsys, error, again):
    """Even if what failed was said to be bad input, or has made a part of the directory again."""
    with pytest.raises(SystemExit) as exit_, report_user_errors():
        lock.hold(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
        if again:
            (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        raise error("adapter/ does not exist")
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/run was removed, or its disk unmounted, while this")
    assert said.count("\n") == 1


def test_a_run_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"run: cannot be written \(.*output_dir=FOLDER"):
        lock.hold(tmp_path / "run")


@pytest.mark.parametrize("stage", ["train", "quantize", "evaluate", "sweep"])
def test_every_stage_takes_the_lock(recipe_file, tmp_path, other, stage):
    from finequant.recipes.run import main

    assert f"in use by process {other.pid}" in refused(main, [stage, str(recipe_file)])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [lock.NAME]
