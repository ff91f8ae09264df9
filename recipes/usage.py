"""Measures what a stage takes: seconds, memory, and GPU memory."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

LINUX_STATUS = Path("/proc/self/status")

OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUP = Path("/sys/fs/cgroup")

CGROUPS = {
    "": (Path(), "memory.max", "memory.current"),
    "memory": (Path("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""Where a cgroup's folder lies in CGROUP, and the files of its limit and of its bytes in use; by
controller, which has no name in version 2."""


class Stopwatch:
    """Counts the seconds since it was created."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 1)


def peak_memory() -> int:
    """Returns the peak resident memory of this process in bytes, without GPU memory."""
    status = LINUX_STATUS.read_text() if LINUX_STATUS.exists() else ""
    # On Linux, getrusage starts with the peak of the parent process. gVisor writes no VmHWM.
    if high_water_mark := re.search(r"^VmHWM:\s*(\d+)", status, re.M):
        return 1024 * int(high_water_mark[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory() -> int:
    """Returns the bytes of memory, with swap, of this machine, or the limit of its container."""
    import psutil

    total = psutil.virtual_memory().total + psutil.swap_memory().total
    return min([total, *(limit for limit, _ in _limits())])


def available_memory() -> int:
    """Returns the bytes of memory that are available now, without swap."""
    import psutil

    room = psutil.virtual_memory().available
    return min([room, *(max(0, limit - used) for limit, used in _limits())])


def return_freed_memory() -> None:
    """Returns memory to the system that this process has freed and its C library has kept.

    Only glibc keeps much of it and can be asked for it:
    https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)


def _limits() -> list[tuple[int, int]]:
    """Lists the limits of this process's cgroups, and of those around them, with the bytes in use:
    without page cache, which the kernel can reclaim."""
    limits = []
    for folder, limit, usage in _cgroups():
        if (most := _number(folder / limit)) is not None:
            statistics = folder / "memory.stat"
            text = statistics.read_text() if statistics.exists() else ""
            # Version 1 has another line for a group with those inside it; it comes later.
            cache = re.findall(r"^(?:total_)?inactive_file (\d+)", text, re.M)
            used = (_number(folder / usage) or 0) - int(cache[-1] if cache else 0)
            limits.append((most, used))
    return limits


def _cgroups() -> Iterator[tuple[Path, str, str]]:
    """Yields the folders of this process's cgroups, innermost first, with the names of their files.

    A container sees its own group as the outermost; a path beyond it does not exist there.
    """
    lines = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []
    paths = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for controller, (root, limit, usage) in CGROUPS.items():
        group = PurePosixPath(paths.get(controller, "/"))
        for folder in [group, *group.parents]:
            yield CGROUP / root / folder.relative_to("/"), limit, usage


def _number(file: Path) -> int | None:
    """Reads the number in a file; None if there is no file, or no number in it, such as `max`."""
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.isdigit() else None


def peak_gpu_memory() -> int:
    """Returns the peak bytes that torch allocated on this process's GPU; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
