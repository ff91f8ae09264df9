"""Errors that a person can act on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Bad input: what is wrong, where, the value, what was expected and the next step.

    Entry scripts print it without a traceback and exit with `code`.
    """

    code = 2


class OutsideError(UserError):
    """Something else failed, such as a network or a server: what, and whether to try again."""

    code = 1


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """The frame of every entry: a UserError becomes its message and exit code, a signal 128 and its
    number, a full disk or memory exit code 1; whatever the command held is given back."""
    from finequant.recipes import lock
    from finequant.recipes.interrupt import GOES_ON, Interrupted, interruptible

    try:
        with interruptible():
            yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.code)
    except Exception as error:
        if (reason := _of_the_machine(error)) is None:
            raise
        said = " ".join(str(error).split())[:200]
        print(f"error: {reason}; {GOES_ON} ({said})", file=sys.stderr)
        sys.exit(1)
    finally:
        lock.release()


MEMORY = (
    "out of memory: give smaller batches (train.micro_batch_size, evaluate.batch_size) or a "
    "smaller data.max_length"
)

# What libraries say when the machine is at its end -> what to do. torch.save hides the reason.
LIMITS = {
    "No space left on device": "no space left on the disk: free some",
    "Disk quota exceeded": "no space left on the disk: free some",
    "PytorchStreamWriter failed": "no space left on the disk, or it failed: free some",
    "unexpected pos": "no space left on the disk, or it failed: free some",
    "Read-only file system": "the disk can only be read: make it writable",
    "Permission denied": "no permission to write here: make it writable",
    "out of memory": MEMORY,
    "not enough memory": MEMORY,
    "allocate memory": MEMORY,
}


def _of_the_machine(error: BaseException | None) -> str | None:
    """What to do about an error that no input explains, looked for in its causes too."""
    if error is None:
        return None
    said = f"{error} {'out of memory' if isinstance(error, MemoryError) else ''}"
    for theirs, ours in LIMITS.items():
        if theirs.lower() in said.lower():
            return ours
    return _of_the_machine(error.__cause__ or error.__context__)


def refuse_all(checks: Iterable[Callable[[], Any]]) -> list[Any]:
    """Runs every check, so that a person hears of all problems at once; returns their results.

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
        raise UserError("\n".join(problems))
    return results


def listed(problems: list[str], most: int = 20) -> str:
    """One problem a line; beyond `most` only their number."""
    rest = len(problems) - most
    return "\n  ".join(problems[:most] + ([f"... and {rest} more"] if rest > 0 else []))
