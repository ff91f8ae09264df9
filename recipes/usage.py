"""Measures what a stage takes: seconds, memory, and GPU memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path

LINUX_STATUS = Path("/proc/self/status")


class Stopwatch:
    """Counts the seconds since it was created."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 1)


def peak_memory() -> int:
    """Returns the peak resident memory of this process in bytes, without GPU memory."""
    if LINUX_STATUS.exists():  # on Linux, getrusage starts with the peak of the parent process
        return 1024 * int(re.search(r"^VmHWM:\s*(\d+)", LINUX_STATUS.read_text(), re.M)[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory() -> int:
    """Returns the peak bytes that torch allocated on this process's GPU; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
