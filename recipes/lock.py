"""One process at a time in a run directory: a file that names it, and a lock that ends with it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from finequant.recipes.errors import UserError

NAME = ".lock"

BEAT = 20
"""Seconds between signs of life: the file's time of change."""

SILENT = 120
"""Seconds after which a process of another machine is taken for dead. Some shared file systems
keep `flock` to each machine, so there the signs of life decide."""

NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

_held: dict[Path, tuple[int, threading.Event]] = {}


def hold(root: Path) -> None:
    """Keeps the directory to this process until `release`, or until it ends, however it ends.

    Of several processes that train together, the first holds it for all.

    Raises:
        UserError: if another process has it, which is named, or it cannot be written.
    """
    if os.environ.get("RANK", "0") != "0" or root.resolve() in _held:
        return
    file = _open(root)
    try:
        if not _lock(file) or _lives_elsewhere(file):
            raise UserError(f"{root} is in use by {_holder(file)}")
        _write(file, json.dumps(_ourselves()))
    except BaseException:
        os.close(file)
        raise
    ended = threading.Event()
    threading.Thread(target=_beat, args=(file, ended), daemon=True).start()
    _held[root.resolve()] = file, ended


def release() -> None:
    """Gives back what this process holds."""
    while _held:
        _, (file, ended) = _held.popitem()
        ended.set()
        with suppress(OSError):  # the disk may be gone by now
            _write(file, "")
        os.close(file)


def _open(root: Path) -> int:
    try:
        root.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(root / NAME, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{root}: cannot be written ({error.strerror}): make it writable, or give another "
            "folder with output_dir=FOLDER"
        ) from None


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
    return True


def _lives_elsewhere(file: int) -> bool:
    """Whether a process of another machine has given a sign of life of late.

    Ages are told by the file system's own clock, which both machines share.
    """
    holder, last = _read(file), os.fstat(file).st_mtime_ns
    if holder.get("host", socket.gethostname()) == socket.gethostname():
        return False
    os.utime(file)
    age = os.fstat(file).st_mtime_ns - last
    os.utime(file, ns=(last, last))
    return age < SILENT * 10**9


def _holder(file: int) -> str:
    holder = _read(file)
    if not holder:
        return "another process: wait until it has ended, or give another output_dir=FOLDER"
    elsewhere = holder["host"] != socket.gethostname()
    machine = f" on {holder['host']}" if elsewhere else ""
    hint = f" (if it died, the same command works {SILENT} s later)" if elsewhere else ""
    return (
        f"process {holder['pid']}{machine}, since {holder['since']} ({holder['command']}): "
        f"wait until it has ended, stop it, or give another output_dir=FOLDER{hint}"
    )


def _ourselves() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300],
    }


def _read(file: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return holder if holder.keys() >= {"pid", "host", "since", "command"} else {}
    except (ValueError, AttributeError):  # half-written, or by nobody
        return {}


def _write(file: int, text: str) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)


def _beat(file: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        os.utime(file)
