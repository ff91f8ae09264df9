"""Errors that the user can act on."""

from __future__ import annotations

import errno
import os
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

# Every entry imports this module first; others would fail where Windows lacks a signal or a module.
if sys.platform == "win32":
    print("error: finequant needs Linux or macOS: on Windows, install it in WSL", file=sys.stderr)
    sys.exit(2)

CRASHES = {
    signal.SIGKILL: "was killed, perhaps out of memory",
    signal.SIGSEGV: "crashed in a library (SIGSEGV)",
    signal.SIGABRT: "was aborted by a library (SIGABRT)",
    signal.SIGBUS: "lost the memory or the file that it was reading (SIGBUS)",
    signal.SIGILL: "used an instruction that this processor does not have (SIGILL)",
    signal.SIGFPE: "crashed in a library (SIGFPE)",
}
"""Signals that end a process before it can say so -> what happened to it."""


def why_failed(process: CompletedProcess[str]) -> str:
    """Says what ended a process: a signal, or else the last line of its stderr."""
    if crash := CRASHES.get(-process.returncode):
        return f"it {crash}"
    return (process.stderr.strip().splitlines() or ["no message"])[-1]


class UserError(Exception):
    """Bad input: says what is wrong, where, the value, what was expected, and the next step.

    Entry scripts print the message without a traceback and exit with `code`.
    """

    code = 2


class OutsideError(UserError):
    """A network, a server or this machine failed: says what, and whether to try again."""

    code = 1


def process_error(what: str, process: CompletedProcess[str]) -> UserError:
    """Returns the error about a process that failed. A crash, a full disk or a lack of memory is
    not bad input: the same command may succeed later."""
    from finequant.recipes.interrupt import RESUME_HINT

    reason = why_failed(process)
    if process.returncode < 0:
        return OutsideError(f"{what}: {reason}; {RESUME_HINT}")
    if limit := _outside_cause(RuntimeError(reason)):
        return OutsideError(f"{what}: {limit}; {RESUME_HINT} ({one_line(reason)})")
    return UserError(f"{what}: {reason}")


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Wraps every entry point: turns errors into a message and an exit code, and releases locks.

    The exit code is that of a UserError, 128 plus the number of a signal, or 1 if disk or memory is
    full, or another process is lost. Any other exception passes through with its traceback.
    """
    from finequant.recipes.interrupt import Interrupted, erase_line, interruptible

    _open_closed_streams()
    # Signals stay handled until the last line is written: by default they end a process silently.
    with interruptible() as request:
        try:
            with _lines_for_errors(), _flushed():
                try:
                    yield
                except Exception as error:
                    # Some libraries catch whatever ends an import in them, and fail later.
                    if request.number is None:
                        raise
                    raise Interrupted(request.number) from error
        except Interrupted as stop:
            erase_line()  # the terminal has echoed ^C there
            _print(stop)
            sys.exit(stop.code)


def _open_closed_streams() -> None:
    """Opens /dev/null in place of each stream that the caller has closed, as `2>&-` does: the next
    file to be opened would get its number, and with it what libraries write to the stream."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # numbers 0, 1, 2
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _require_current_folder() -> None:
    """Refuses to start where paths cannot be found; the libraries would crash there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError(
            "the folder in which this command was started no longer exists: change to one that "
            "does, such as with `cd`"
        ) from None


@contextmanager
def _flushed() -> Iterator[None]:
    """Writes at the end what `print` still holds, so that a full disk is noticed by the command."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _drop_output() -> None:
    """Drops what cannot be written to stdout: Python would try again, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _has_lost_its_reader() -> bool:
    """Says whether stdout or stderr is a pipe that nobody reads anymore, as after `| head -1`."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def _lines_for_errors() -> Iterator[None]:
    """Prints an error that the user can act on as one line, and exits; releases locks."""
    from finequant.recipes import lock
    from finequant.recipes.interrupt import RESUME_HINT

    try:
        _require_current_folder()
        yield
    except Exception as error:
        if removed := lock.removed():
            _print(
                f"error: {removed} was removed, or its disk unmounted, while this command wrote to "
                f"it: run the same command again ({one_line(error)})"
            )
            sys.exit(1)
        if isinstance(error, UserError):
            _print_once(f"error: {error}")
            sys.exit(error.code)
        if isinstance(error, BrokenPipeError) and _has_lost_its_reader():
            sys.exit(128 + signal.SIGPIPE)  # silently, as other commands do
        if isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename:
            _print_once(f"error: {error.filename}: {error.strerror}: use another path")
            sys.exit(UserError.code)
        if (reason := _outside_cause(error)) is None:
            raise
        _print(f"error: {reason}; {RESUME_HINT} ({one_line(error)})")
        sys.exit(1)
    finally:
        _drop_output()
        lock.release()


def _print_once(message: str) -> None:
    """Prints what the user has to change. All processes of a launcher find it, as a rule, and the
    first one of the machine says so; the launcher then ends the others, which wait for that."""
    from finequant.recipes.interrupt import Interrupted

    if os.environ.get("LOCAL_RANK", "0") != "0":
        try:
            time.sleep(SECONDS_FOR_FIRST)
        except Interrupted:
            return
    _print(message)


def _print(message: object) -> None:
    """Prints the last line of a command, from whichever process it comes."""
    from finequant.recipes import terminal
    from finequant.recipes.interrupt import ignored_signals

    with ignored_signals():
        try:
            terminal.close()
            print(terminal.wrapped(str(message)), file=sys.stderr)
        except OSError:  # the terminal is closed; Python would try again, and exit with 120
            sys.stderr = None


MEMORY = (
    "out of memory: use smaller batches (train.micro_batch_size, evaluate.batch_size) or a "
    "smaller data.max_length"
)

SECONDS_FOR_FIRST = 10.0
"""Seconds in which the first process finds what another has found: it may have more to do before
that. After these, the other one prints its error itself."""

WRONG_PATH = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR)
"""What the system says of a path that cannot be meant."""

MOST_ROOM = 10**9
"""Bytes that may be free on a disk that was too full to write to: what failed may be removed."""

DISK = "no space left on the disk, or the disk failed: free some space"

LOST = "another process of this run has ended, or cannot be reached; its last line says why"

TOO_LARGE = (
    "a file is larger than `ulimit -f` or the file system allows: raise the limit, or use another "
    "disk"
)

# Patterns of what libraries say when a resource runs out, or when a process that computes with this
# one is gone (gloo, NCCL, torch's store) -> what to do. torch.save and numpy's tofile hide the
# reason.
LIMITS = {
    "No space left on device": "no space left on the disk: free some space",
    "Disk quota exceeded": "your quota of the disk is used up: free some space",
    "File too large": TOO_LARGE,
    "PytorchStreamWriter failed": DISK,
    "unexpected pos": DISK,
    r"\d requested and \d+ written": DISK,
    "Read-only file system": "the file system is read-only: make it writable",
    "Permission denied": "no permission to write here: make it writable",
    "Operation not permitted": "no permission to write here: make it writable",
    "out of memory": MEMORY,
    "not enough memory": MEMORY,
    "allocate memory": MEMORY,
    "gloo/transport": LOST,
    "ncclRemoteError": LOST,
    "Connection was likely closed": LOST,
}


def _outside_cause(error: BaseException | None) -> str | None:
    """Says what to do when the error, or one of its causes, comes from outside: the machine
    hit a limit, or another process has ended."""
    if error is None:
        return None
    message = f"{error} {'out of memory' if isinstance(error, MemoryError) else ''}"
    for pattern, advice in LIMITS.items():
        if re.search(pattern, message, re.IGNORECASE):
            return advice + (_least_room() if advice.startswith("no space") else "")
    return _outside_cause(error.__cause__ or error.__context__)


def _least_room() -> str:
    """Names the disk that is probably meant, in parentheses: a failed write does not say where."""
    from finequant.recipes import lock
    from finequant.recipes.freshness import cache_folder

    folders = [*lock.roots, cache_folder(), Path(os.environ.get("TMPDIR") or "/tmp"), Path()]
    free = {}
    with suppress(OSError):  # one of them was removed
        for folder in folders:
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free[folder] = shutil.disk_usage(there).free
    least = min(free, key=free.__getitem__, default=None)
    if least is None or free[least] > MOST_ROOM:  # another disk, such as that of stdout
        return ""
    return f" (least is left at {least}: {free[least] / 1e6:.1f} MB)"


def refuse_all(checks: Iterable[Callable[[], Any]]) -> list[Any]:
    """Runs every check and returns their results; reports all problems at once, each one once.

    Raises:
        UserError: with the messages of all checks that raised one.
    """
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return results


def shown(value: Any) -> str:
    """Formats a value for an error message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def one_line(message: object) -> str:
    """Writes a library's message or exception on one line, cut after 300 characters."""
    return " ".join(str(message).split())[:300]


def listed(problems: list[str], most: int = 20, total: int | None = None) -> str:
    """Lists one problem per line; beyond `most`, only says how many more there are.

    total: the number of problems, if only the first ones are given.
    """
    first = problems[:most]
    rest = (len(problems) if total is None else total) - len(first)
    return "\n  ".join(first + ([f"... and {rest} more"] if rest > 0 else []))


def counted(count: int, noun: str) -> str:
    """Writes a number and what it counts: 1 row, 2 rows."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
