"""A full or read-only disk at any stage gives one message, and nothing is lost.

The disk is a small tmpfs, which only root can mount: `make torture` runs these tests.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train": ROOT / "finetune" / "train.py",
    "quantize": ROOT / "quantize" / "convert.py",
    "export": ROOT / "quantize" / "export.py",
    "evaluate": ROOT / "evaluate" / "compare.py",
}
OPTIONS = {"export": ["--to", "gguf"]}
pytestmark = [pytest.mark.slow, pytest.mark.torture]


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=64m")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Writes a file that leaves `left` bytes of the disk."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    os.truncate(ballast, max(0, ballast.stat().st_size - left))
    return ballast


def run(stage: str, recipe: Path, disk: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(COMMANDS[stage]), str(recipe), f"output_dir={disk / 'run'}"]
        + OPTIONS.get(stage, []),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


def one_error(done: subprocess.CompletedProcess, code: int) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


# Bytes that are left: none; enough for the lock; enough for a part of the artifact.
LEFT = {
    "train": (0, 8192, 60_000),
    "quantize": (0, 100_000),
    "export": (0, 60_000),
    "evaluate": (0, 8192),
}


def test_a_full_disk_gives_one_message_and_loses_nothing(recipe_file, disk):
    for stage, amounts in LEFT.items():
        for left in amounts:
            ballast = fill(disk, left)
            line = one_error(run(stage, recipe_file, disk), 1)
            assert line.startswith("error: no space left on the disk")
            assert "run the same command again to continue from here" in line
            assert f"(least is left at {disk / 'run'}: 0." in line
            made = {"train": "adapter", "export": "exports/gguf"}.get(stage, "report.json")
            assert not (disk / "run" / made).exists()
            ballast.unlink()
        done = run(stage, recipe_file, disk)
        assert done.returncode == 0, done.stderr
    assert (disk / "run" / "report.json").exists()


def test_a_read_only_disk_gives_one_message(recipe_file, disk):
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for stage in COMMANDS:
        line = one_error(run(stage, recipe_file, disk), 2)
        assert line.startswith(f"error: {disk / 'run'}: cannot be written (Read-only file system)")
        assert "output_dir=FOLDER" in line
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    done = run("train", recipe_file, disk)
    assert done.returncode == 0, done.stderr


def test_init_works_again_once_a_full_disk_has_space(recipe_file, tiny_base, disk):
    rows, new = recipe_file.with_name("train.jsonl"), disk / "new.yaml"
    command = [sys.executable, "-m", "finequant.recipes.run", "init", f"output_dir={disk / 'run'}"]
    command += ["--data", str(rows), "--base", str(tiny_base), "--to", str(new)]
    ballast = fill(disk, 0)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert "no space left on the disk: free some space" in one_error(done, 1)
    ballast.unlink()
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    assert new.read_text(encoding="utf-8").startswith("#")
