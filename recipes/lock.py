"""Lets one process at a time use a run directory, by a filelock on a file that names the holder."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from finequant.recipes.errors import UserError
from finequant.recipes.terminal import is_first

if TYPE_CHECKING:
    from filelock import FileLock

NAME = ".lock"

roots: set[Path] = set()
"""The directories that this command writes to, locked or not yet."""

_held: dict[Path, FileLock] = {}


def hold(root: Path) -> None:
    """Locks the directory for this process until `release`, or until the process ends in any way.

    When several processes train together, the first holds the lock for all of them.

    Raises:
        UserError: if another process, which is named, holds it, or if it is not writable.
    """
    from filelock import FileLock, Timeout

    roots.add(root.absolute())
    if not is_first() or root.resolve() in _held:
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


def check_free(root: Path) -> None:
    """Checks that no other process holds the lock, without keeping it.

    Raises:
        UserError: naming the process that does.
    """
    roots.add(root.absolute())
    if (root / NAME).exists() and root.resolve() not in _held:
        hold(root)
        release()


def removed() -> Path | None:
    """Returns a directory that is gone, with its lock, though this process holds it."""
    return next((root for root in _held if not (root / NAME).exists()), None)


def check_writable(root: Path) -> None:
    """Checks that the directory can be created and written to, without creating it.

    Raises:
        UserError: if it cannot.
    """
    existing = root
    while not existing.exists() and existing != existing.parent:
        if existing.is_symlink():
            raise _not_writable(root, os.strerror(errno.ENOENT))
        existing = existing.parent
    if not existing.is_dir():
        raise _not_writable(root, os.strerror(errno.ENOTDIR))
    try:  # the permissions alone do not say: root may do anything, but not in /proc
        TemporaryFile(dir=existing).close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _not_writable(root, error.strerror) from None


def _not_writable(root: Path, reason: str) -> UserError:
    for path in (root, *root.parents):
        if path.is_symlink() and not path.exists():  # as to a disk that is not mounted
            reason = f"{path} links to {path.readlink()}, which does not exist"
    return UserError(
        f"{root}: cannot be written ({reason}): make it writable, or choose another folder with "
        "output_dir=FOLDER"
    )


def release() -> None:
    """Releases every lock that this process holds."""
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
    """Names the process that holds the lock, and says what to do about it."""
    try:
        holder = json.loads((root / NAME).read_text(encoding="utf-8"))
        process = f"process {holder['pid']} on {holder['host']}, since {holder['since']} "
        process += f"({holder['command']})"
    except (OSError, ValueError, TypeError, KeyError):  # the file is being written right now
        process = "another process"
    return f"{process}: wait for it to finish, stop it, or choose another output_dir=FOLDER"
