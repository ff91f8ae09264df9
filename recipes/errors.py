"""Errors that a person can act on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Turns a UserError into its message and exit code, Ctrl-C into exit code 130, and a disk
    that is full, whichever library says so, into exit code 1."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "No space left on device" not in str(error):
            raise
        print(
            f"error: no space left on the disk ({' '.join(str(error).split())[:200]}): free some; "
            "the same command goes on from here",
            file=sys.stderr,
        )
        sys.exit(1)


def listed(problems: list[str], most: int = 20) -> str:
    """One problem a line; beyond `most` only their number."""
    rest = len(problems) - most
    return "\n  ".join(problems[:most] + ([f"... and {rest} more"] if rest > 0 else []))
