"""One process at a time in a run directory: filelock's lock on a file that names the holder."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

NAME = ".lock"

_held: dict[Path, FileLock] = {}


def hold(root: Path) -> None:
    """Keeps the directory to this process until `release`, or until it ends, however it ends.

    Of several processes that train together, the first holds it for all.

    Raises:
        UserError: if another process has it, which is named, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    if os.environ.get("RANK", "0") != "0" or root.resolve() in _held:
        return
    lock = FileLock(root / NAME, blocking=False, thread_local=False)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        (root / NAME).write_text(json.dumps(_this_process()), encoding="utf-8")
    except Timeout:
        raise UserError(f"{root} is in use by {_holder(root)}") from None
    except OSError as error:
        lock.release()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _not_writable(root, error.strerror) from None
    _held[root.resolve()] = lock


def check_writable(root: Path) -> None:
    """Checks that the directory could be made and written; makes nothing.

    Raises:
        UserError: if not.
    """
    there = root
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise _not_writable(root, os.strerror(errno.ENOTDIR))
    if not os.access(there, os.W_OK | os.X_OK):
        raise _not_writable(root, os.strerror(errno.EACCES))


def _not_writable(root: Path, reason: str) -> UserError:
    return UserError(
        f"{root}: cannot be written ({reason}): make it writable, or give another folder with "
        "output_dir=FOLDER"
    )


def release() -> None:
    """Gives back what this process holds."""
    while _held:
        _held.popitem()[1].release()


def _this_process() -> dict[str, int | str]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300],
    }


def _holder(root: Path) -> str:
    """The process that the file names, and what to do about it."""
    try:
        holder = json.loads((root / NAME).read_text(encoding="utf-8"))
        process = f"process {holder['pid']} on {holder['host']}, since {holder['since']} "
        process += f"({holder['command']})"
    except (OSError, ValueError, TypeError, KeyError):  # it is being written at this moment
        process = "another process"
    return f"{process}: wait until it has ended, stop it, or give another output_dir=FOLDER"
