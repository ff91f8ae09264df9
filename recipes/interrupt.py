"""Ctrl-C, `kill` and a closed terminal: what was begun is saved, and a second one ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

ONE = 1.0
"""Seconds within which signals count as one: a launcher passes on what its processes got too."""

GOES_ON = "the same command goes on from here"


class Interrupted(KeyboardInterrupt):
    """A signal, and what became of the work."""

    def __init__(self, number: int, message: str = GOES_ON) -> None:
        super().__init__(message)
        self.number = number

    @property
    def code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}: {self.args[0]}"


class Wish:
    """That of somebody who sent a signal."""

    number: int | None = None


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals raise Interrupted in the block."""

    def stop(number: int) -> None:
        raise Interrupted(number)

    with _handled(stop):
        yield


@contextmanager
def put_off() -> Iterator[Wish]:
    """Signals in the block are only noted; whoever runs in it asks for them and saves first."""
    wish = Wish()

    def note(number: int) -> None:
        wish.number = number
        # Not print: the signal may have come in the middle of one, which may not be entered again.
        with suppress(OSError):  # of a terminal that was closed
            os.write(2, b"stopping after this step; once more ends at once\n")

    with _handled(note):
        yield wish


def passed_on(process: subprocess.Popen) -> int:
    """Waits for a process and those it starts, and passes signals on to them; its exit code."""
    import psutil

    family: list[psutil.Process] = []

    def send(number: int) -> None:
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(process.pid)
            family[:] = [leader, *leader.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(number)

    with _handled(send, at_once=send):
        code = process.wait()
        # A launcher may end before what it launched has saved its work.
        psutil.wait_procs(family)
    return code


@contextmanager
def _handled(
    first: Callable[[int], None], at_once: Callable[[int], None] | None = None
) -> Iterator[None]:
    """`first` is called for the first signal, `at_once` for later ones: by default, the end.

    A signal that is ignored already (nohup) stays so.
    """
    seen: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(time.monotonic())
        if len(seen) == 1:
            first(number)
        elif seen[-1] - seen[0] > ONE:
            (at_once or _end)(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number in SIGNALS if before[number] != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def _end(number: int) -> None:
    os._exit(128 + number)
