"""Ctrl-C, `kill`, and a closed terminal: the first signal saves the work, the second quits."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

DEBOUNCE_SECONDS = 1.0
"""Signals within so many seconds count as one: a launcher forwards what its processes got too."""

AGAIN_SECONDS = 0.05
"""Seconds after which an Interrupted that was lost is raised again."""

RESUME_HINT = "run the same command again to continue from here"


class Interrupted(BaseException):
    """Raised when a signal stops the command; the message says what happened to the work, if any.

    Not a KeyboardInterrupt, for which typer would exit with 130 whatever the signal, and silently.
    """

    def __init__(self, number: int, message: str = RESUME_HINT) -> None:
        super().__init__(message)
        self.number = number

    @property
    def code(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        name, message = signal.Signals(self.number).name, self.args[0]
        return f"stopped by {name}" + (f": {message}" if message else "")


class StopRequest:
    """The request to stop a command, if there was one."""

    number: int | None = None
    """The signal's number; None as long as no signal has come."""


@contextmanager
def interruptible() -> Iterator[StopRequest]:
    """Makes signals raise Interrupted in the block, which can also see whether one came.

    What is raised in a `__del__` or another callback, Python prints, and goes on; what is raised
    while a library frees memory, or in a block that catches everything, may vanish silently. An
    Interrupted that nobody holds anymore is therefore raised again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()  # only the main thread gets signals
        return
    request = StopRequest()

    def stop(number: int) -> NoReturn:
        request.number = number
        _interrupt(number)

    alarm = signal.getsignal(signal.SIGALRM)
    with _unprinted_interrupts(), _handled(stop):
        try:
            yield request
        finally:
            if request.number is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, alarm)


@contextmanager
def _unprinted_interrupts() -> Iterator[None]:
    """Keeps Python from printing an Interrupted that was raised in a callback."""
    usual = sys.unraisablehook

    def print_others(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            usual(unraisable)

    sys.unraisablehook = print_others
    try:
        yield
    finally:
        sys.unraisablehook = usual


def _interrupt(number: int) -> NoReturn:
    """Raises Interrupted, and again for as long as it is lost; `interruptible` ends that."""
    handler, interrupted = signal.getsignal(number), Interrupted(number)
    held = weakref.ref(interrupted)

    def again(alarm: int, frame: FrameType | None) -> None:
        if held() is not None:  # the block is being left
            return
        if signal.getsignal(number) == handler:
            _interrupt(number)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.raise_signal(number)  # to another block, which handles signals by now

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
    try:
        raise interrupted
    finally:
        del interrupted  # which its traceback, and so it itself, would hold


@contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Only records signals in the block, which checks the request, and saves before it stops."""
    request = StopRequest()

    def note(number: int) -> None:
        request.number = number
        # Not print: it is not reentrant, and the signal may have interrupted one.
        with suppress(OSError):  # the terminal may be closed
            message = b"stopping after this step; another signal quits immediately\n"
            erase_line()
            os.write(2, message)

    with _handled(note):
        yield request


@contextmanager
def starting_over(what: str) -> Iterator[None]:
    """Says, if a signal stops the block, what the same command will do again from its beginning."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(stop.number, f"{RESUME_HINT}; {what} starts over") from None


@contextmanager
def ignored_signals() -> Iterator[None]:
    """Ignores the first signal in the block, in which the command is ending anyway."""
    with _handled(lambda number: None):
        yield


def start_and_forward_signals(
    start: Callable[[], tuple[int, Callable[[], int]]],
) -> tuple[int, int | None]:
    """Starts a process, waits for it and its children, and forwards the first signal to them. The
    second kills them: one that waits in a library for another that has ended handles no signal.

    start: starts the process. It returns the process ID and a function that waits until the process
        has ended and returns the exit code.

    Returns:
        The exit code, and the number of the last signal that was forwarded.

    Raises:
        Interrupted: after a signal before the process has started.
    """
    import psutil

    pid: int | None = None
    family: list[psutil.Process] = []
    forwarded: list[int] = []

    def send(number: int, sent: int | None = None) -> None:
        if pid is None:
            raise Interrupted(number)
        forwarded.append(number)
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(pid)
            family[:] = [leader, *leader.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(sent or number)

    with _handled(send, at_once=lambda number: send(number, signal.SIGKILL)):
        pid, wait = start()
        code = wait()
        # A launcher may end before what it launched has saved its work.
        psutil.wait_procs(family)
    return code, forwarded[-1] if forwarded else None


@contextmanager
def _handled(
    first: Callable[[int], None], at_once: Callable[[int], None] | None = None
) -> Iterator[None]:
    """Calls `first` on the first signal and `at_once`, by default an exit, on later ones.

    A signal that is already ignored (nohup) stays ignored.
    """
    seen: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(time.monotonic())
        if len(seen) == 1:
            first(number)
        elif seen[-1] - seen[0] > DEBOUNCE_SECONDS:
            (at_once or _end)(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


def erase_line() -> None:
    """Erases the last line of a terminal, where a killed process may have left its status."""
    if os.isatty(2):
        os.write(2, b"\r\x1b[K")


def _end(number: int) -> None:
    with suppress(OSError):
        erase_line()
    os._exit(128 + number)
