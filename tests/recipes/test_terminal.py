"""A command's output: whole lines in a log; in a terminal, a status line below lines that stay."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from finequant.recipes import terminal


def in_a_terminal(code: str, columns: int = 80) -> str:
    """Returns what a process writes to a terminal."""
    leader, follower = pty.openpty()
    os.set_blocking(leader, True)
    setup = f"import fcntl, struct, termios; size = struct.pack('HHHH', 24, {columns}, 0, 0)\n"
    setup += "fcntl.ioctl(2, termios.TIOCSWINSZ, size)\n"
    process = subprocess.Popen([sys.executable, "-c", setup + code], stderr=follower)
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # on Linux, at the end of the output
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert process.wait(timeout=120) == 0
    return written.decode()


def screen(written: str) -> list[str]:
    """Returns the lines that a reader sees at the end."""
    lines = []
    for line in written.split("\r\n"):
        shown = ""
        for part in re.split(r"\r|\x1b\[K", line):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


LOOP = """
import time
from finequant.recipes.terminal import doing, say, tracked
doing("loading torch")
for number in tracked(range(5), "train: step", 5):
    time.sleep(0.12)
    if number == 2:
        say("a line that stays " * 8)
say("done")
"""


def test_a_terminal_has_one_status_line_which_disappears():
    written = in_a_terminal(LOOP)
    assert "loading torch" in written
    assert re.search(r"train: step 3/5, 0:00 left", written)
    lines = screen(written)
    assert lines[-2:] == ["done", ""]
    assert not [line for line in lines if "step" in line or "loading" in line]
    assert max(map(len, lines)) <= 80
    assert sum("stays" in line for line in lines) == 2
    assert "a line that stays" in lines[0] + lines[1]


LIBRARIES = """
from finequant.recipes.terminal import say, without_bars
from tqdm import tqdm
list(tqdm(range(2), "a bar"))
with without_bars():
    list(tqdm(range(2), "a bar in any case", disable=False))
say("done")
"""


def test_bars_of_libraries_are_not_shown():
    assert in_a_terminal(LIBRARIES) == "done\r\n"


EMPTY = """
from finequant.recipes.terminal import tracked, tracked_batches
list(tracked([], "rows", 0)), list(tracked_batches([], "evaluate: perplexity"))
"""


def test_a_terminal_shows_no_progress_of_nothing():
    assert in_a_terminal(EMPTY) == ""


def test_a_terminal_that_does_not_know_its_width_has_80_columns():
    lines = screen(in_a_terminal(LOOP, columns=0))
    assert max(map(len, lines)) in range(60, 81)


def test_a_log_file_has_whole_lines_now_and_then(capsys, monkeypatch):
    list(terminal.tracked(range(3), "train: step", 3))
    assert capsys.readouterr().err == ""  # it took no time
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setenv(terminal.STAGE, '["1/4", [0, 100, 20]]')
    terminal.doing("loading torch")
    list(terminal.tracked_batches([[1, 2], [3]], "evaluate: answers"))
    written = capsys.readouterr().err
    assert written == (
        "evaluate: answers 2/3, 0:00 left (run 2:00)\nevaluate: answers 3/3, 0:00 left (run 2:00)\n"
    )


def test_the_remaining_time_includes_further_work(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0)
    progress = terminal.Progress("train: step", 6)
    progress.show(6, ", validating 1/9", further=80)
    assert capsys.readouterr().err == "train: step 6/6, validating 1/9, 1:20 left\n"


def test_only_the_first_process_prints(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setenv("RANK", "1")
    terminal.say("a line")
    list(terminal.tracked(range(3), "train: step", 3))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "0:00"), (80, "1:20"), (3599.7, "1:00:00"), (7380, "2:03:00")]
)
def test_a_time_reads_as_on_a_clock(seconds, shown):
    assert terminal.duration(seconds) == shown
