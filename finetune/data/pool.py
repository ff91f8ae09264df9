"""Computes a function of many batches on all cores, in bounded memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

from finequant.recipes.interrupt import SIGNALS

Item = TypeVar("Item")
Result = TypeVar("Result")

FEW_BATCHES = 10
"""Batches that are computed before other processes start: fewer are not worth it."""
UNDERWAY = 3
"""Batches per process that are computed or wait, so that no process is idle."""
_function: Callable | None = None


def computed(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields what a function returns for each item, in their order.

    Where processes can be forked, several of them share the work; `function` is not pickled, items
    and results are.
    """
    items = iter(items)
    # macOS can fork, too, but its system libraries break in the children.
    few = islice(items, FEW_BATCHES) if sys.platform == "linux" and cores() > 1 else items
    return chain(map(function, few), _in_processes(function, items))


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields the items in lists of `size`; the last may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _in_processes(function: Callable[[Item], Result], items: Iterator[Item]) -> Iterator[Result]:
    """Yields the results in order; starts the processes only if there is a first item."""
    first = next(items, None)
    if first is None:
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(cores(), context, _begin, (function,))
    underway: deque[Future[Any]] = deque()
    try:
        for item in chain([first], items):
            underway.append(pool.submit(_call, item))
            if len(underway) == UNDERWAY * cores():
                yield underway.popleft().result()
        while underway:
            yield underway.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable) -> None:
    """Prepares a process: it leaves signals to its parent, and ends with it."""
    global _function
    _function = function
    gc.freeze()  # forked objects are never garbage, and scanning them would take half the time
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
