"""Prints what a command is doing: lines that stay and, in a terminal, a status line below them
with the progress and the time that is left."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

# The libraries' progress bars would break the status line, and fill a log file; those of downloads,
# which have no status line here, are shown all the same. tqdm reads this when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")

STAGE = "FINEQUANT_STAGE"
"""The environment variable by which `finequant run` tells a stage its number, such as "2/4", and
what this stage and each later one took last time: seconds, or nothing if they never ran."""

SECONDS_BETWEEN_LINES = 30.0
"""How often a loop reports its progress in a log file; a shorter loop reports nothing."""

SECONDS_BETWEEN_FRAMES = 0.1
"""How often the status line of a terminal is redrawn."""

Item, Batch = TypeVar("Item"), TypeVar("Batch", bound=Sized)

_started = time.monotonic()

_line: tqdm | None = None
"""The status line, the last one of the terminal, if there is something on it."""


def is_first() -> bool:
    """Says whether this is the first of the processes that work together, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def as_argument(path: Path) -> str:
    """Writes a path as a shell takes it, also one that would be read as an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def restart_clock() -> None:
    """Starts to count the seconds of a stage."""
    global _started
    _started = time.monotonic()


def say(message: str) -> None:
    """Prints a line that stays, from the first process only."""
    if not is_first():
        return
    if _line is not None and not _line.total:
        close()  # what the status line says is done by now
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(wrapped(message), file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Prints a result to stdout, and removes the status line."""
    close()
    print(wrapped(text, sys.stdout), flush=True)


def wrapped(message: str, stream: TextIO | None = None) -> str:
    """Breaks lines between words where the stream is a terminal, which would break them anywhere.

    stream: stderr by default.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        return message
    fill = textwrap.TextWrapper(
        width=max(os.get_terminal_size(stream.fileno()).columns or 80, 20),  # some say 0
        subsequent_indent="    " if message.startswith(" ") else "  ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    ).fill
    return "\n".join(map(fill, message.split("\n")))


def doing(text: str) -> None:
    """Shows in a terminal what is being done, until the next message."""
    _open(text)


def close() -> None:
    """Removes the status line."""
    global _line
    if _line is not None:
        _line.close()
    _line = None


@contextmanager
def without_bars() -> Iterator[None]:
    """Silences libraries that draw progress bars in spite of TQDM_DISABLE."""
    from tqdm import tqdm

    shown = tqdm.__init__

    def hidden(self: tqdm, *args, **kwargs) -> None:
        shown(self, *args, **kwargs | {"disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = shown


class Progress:
    """Shows how many of `total` items are done, some figures, and the time that is left.

    In a terminal this is the status line; in a log file, a line now and then.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        """done: how many an earlier command did, which do not count for the speed of this one."""
        self._what, self._total, self._before = what, total, done
        self._started = self._shown = time.monotonic()
        self._line = _open(f"{what} {done}/{total}", total)
        self._is_drawn = not self._line.disable
        self._pause = SECONDS_BETWEEN_FRAMES if self._is_drawn else SECONDS_BETWEEN_LINES

    def show(self, done: int, figures: str = "", further: float = 0.0) -> None:
        """Draws the line again, unless it was drawn a moment ago.

        figures: for example ", loss 0.41".
        further: the seconds that something else will take before this goes on.
        """
        now = time.monotonic()
        if now - self._shown < self._pause:
            return
        self._shown = now
        if new := done - self._before:
            rest = (now - self._started) / new * (self._total - done) + further
            figures += f", {duration(rest)} left{_left_of_run(rest)}"
        text = f"{self._what} {done}/{self._total}{figures}"
        if self._is_drawn:
            self._line.set_description_str(_numbered(text))
        else:
            say(text)

    def close(self) -> None:
        """Removes the line."""
        if self._line is _line:
            close()


def tracked(
    items: Iterable[Item], what: str, total: int, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yields the items, and shows how much of `total` is done; nothing if there are none.

    size: how much of the total an item is.
    """
    if not total:
        yield from items
        return
    progress, done = Progress(what, total), 0
    try:
        for item in items:
            yield item
            done += size(item)
            progress.show(done)
    finally:
        progress.close()


def tracked_batches(batches: Sequence[Batch], what: str) -> Iterator[Batch]:
    """Yields the batches, and shows how many of their items are done; nothing without batches."""
    return tracked(batches, what, sum(map(len, batches)), len)


def duration(seconds: float) -> str:
    """Formats a time as a clock does: 1:20, 2:03:00."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _open(text: str, total: int | None = None) -> tqdm:
    """Puts a text on the status line; with a total it stays there, below the lines that follow."""
    global _line
    close()
    from tqdm import tqdm

    _line = tqdm(
        desc=_numbered(text),
        total=total,
        bar_format="{desc}",
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
        disable=not (is_first() and sys.stderr.isatty()),
    )
    return _line


def _stage() -> tuple[str, list[float]]:
    return json.loads(os.environ.get(STAGE) or '["", []]')


def _numbered(text: str) -> str:
    number, _ = _stage()
    return f"[{number}] {text}" if number else text


def _left_of_run(rest: float) -> str:
    """Says how long the rest of the run will take; `rest` is the seconds left in this loop."""
    _, seconds = _stage()
    if not seconds:
        return ""
    rest = max(rest, seconds[0] - (time.monotonic() - _started))
    return f" (run {duration(rest + sum(seconds[1:]))})"
