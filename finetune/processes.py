"""Coordinates several processes: the first decides, all learn the decision, and all stop together.

Every process has to call each function, at the same point.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import ceil
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch import distributed

from finequant.recipes.command_line import SPLITTING
from finequant.recipes.errors import UserError
from finequant.recipes.terminal import is_first

Item, Value = TypeVar("Item"), TypeVar("Value")
Items = TypeVar("Items", bound="Sequence | torch.Tensor")

TIMEOUT = 24 * 3600
"""Seconds that processes wait for each other: the first may hash or write a large base for
hours. A process that dies is noticed by the launcher, which ends the others."""

APPEARS_WITHIN = 60
"""Seconds within which every machine sees a new file; NFS caches for up to 30, by default, that a
file does not exist."""

LAUNCHERS = {
    "FSDP": "recipes/accelerate/fsdp.yaml",
    "DeepSpeed": "recipes/accelerate/deepspeed_zero3.yaml",
    None: "one process, torchrun or recipes/accelerate/several_gpus.yaml",
}
"""How the weights are split -> what launches such processes."""


def number_of_processes() -> int:
    """Reads the number that torchrun or accelerate set: accelerate's state may not exist yet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> str | None:
    """Returns FSDP or DeepSpeed if the launcher asks for one of them to split the weights."""
    from accelerate.utils import parse_flag_from_env

    return next((name for flag, name in SPLITTING.items() if parse_flag_from_env(flag)), None)


def decided_by_first(decide: Callable[[], Value]) -> Value:
    """Returns the result of `decide`, which only the first process calls.

    Raises:
        UserError: if `decide` raises it; all processes end.
    """
    if not distributed.is_initialized():
        return decide()
    outcome: list = [None, None]
    if is_first():
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        refuse(outcome[1])
    return outcome[0]


def first_before_others(work: Callable[[], Value]) -> Value:
    """Calls `work` in the first process, then in the others, which can reuse files that the first
    made; returns each process's result.

    Raises:
        UserError: if `work` raises it in the first process; all processes end.
    """
    results = []
    decided_by_first(lambda: results.append(work()))
    return results[0] if results else work()


@contextmanager
def entered_by_first(context: AbstractContextManager[Value]) -> Iterator[Value]:
    """Enters the context in the first process only, and yields its value in all."""
    with context if is_first() else nullcontext() as value:
        yield decided_by_first(lambda: value)


def join_processes() -> None:
    """Joins the launcher's processes, which share the work; each of them holds a whole model."""
    from datetime import timedelta

    from accelerate import PartialState

    from finequant.finetune.device import trains_on_cpu

    if number_of_processes() == 1:
        return
    for variable in SPLITTING:  # transformers would load the weights in the first process only
        os.environ.pop(variable, None)
    PartialState(cpu=trains_on_cpu(), timeout=timedelta(seconds=TIMEOUT))


def leave_processes() -> None:
    """Waits for all processes and leaves their group for good: each then goes on by itself."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def shared_out(items: Sequence[Item], work: Callable[[Sequence[Item]], list[Value]]) -> list[Value]:
    """Returns one result for each item; the processes share the work.

    Neighboring items go to different processes, so that each process gets long and short ones.
    """
    shares = gathered(work(share(items)))
    return [shares[index % len(shares)][index // len(shares)] for index in range(len(items))]


def share(items: Items) -> Items:
    """Returns this process's items: of n processes, process r gets items r, r + n, r + 2n, ..."""
    if not distributed.is_initialized():
        return items
    return items[distributed.get_rank() :: distributed.get_world_size()]


ROWS_TOGETHER = 16
"""Rows that stay in one process: operators take up to this many numbers at a time, and the
remainder one by one, which rounds differently."""


def rows_of_share(rows: int) -> slice:
    """Returns this process's slice of the rows, cut so that results round as in one process."""
    if not distributed.is_initialized():
        return slice(0, rows)
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    pieces = ceil(rows / ROWS_TOGETHER)
    first, last = (ROWS_TOGETHER * (pieces * r // processes) for r in (rank, rank + 1))
    return slice(first, min(last, rows))


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each tensor with its sum over all processes, which has the same bits in each."""
    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def add_up_gradients(parameters: Iterable[torch.nn.Parameter | torch.Tensor]) -> None:
    """Sums gradients over all processes; a process without items contributes zeros."""
    if distributed.is_initialized():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.all_reduce(parameter.grad)


def is_fsdp2() -> bool:
    """Says whether the launcher asks for FSDP 2, which shards each tensor separately, by rows."""
    return sharding() == "FSDP" and os.environ.get("FSDP_VERSION") == "2"


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the whole tensor, gathered from all processes if FSDP has sharded it."""
    from torch.distributed.tensor import DTensor  # takes long to import

    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def filled_by_first() -> bool:
    """Says whether this process gets its share of the weights from the first one, so that it may
    start with empty ones: with `fsdp_cpu_ram_efficient_loading`, accelerate shards a model so."""
    from accelerate.utils import parse_flag_from_env

    is_efficient = parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")
    return sharding() == "FSDP" and is_efficient and not is_first()


def gathered(value: Value) -> list[Value]:
    """Returns the values of all processes, in order."""
    if not distributed.is_initialized():
        return [value]
    values: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def refuse(message: str) -> NoReturn:
    """Ends all processes; only the first one shows the message.

    Raises:
        UserError: in the first process.
        SystemExit: in the others.
    """
    if is_first():
        raise UserError(message)
    sys.exit(UserError.code)


def require_shared(folder: Path) -> None:
    """Checks that all processes see the folder that the first one writes.

    Raises:
        UserError: naming the machines that do not see it.
    """
    marker = decided_by_first(lambda: _leave_marker(folder))
    seen = gathered((socket.gethostname(), _appears(folder / marker)))
    if is_first():
        (folder / marker).unlink()
    if blind := sorted({host for host, sees in seen if not sees}):
        refuse(
            f"output_dir: {folder} on {seen[0][0]} is not seen by the processes on "
            f"{', '.join(blind)}: all need the same folder, where checkpoints are written and "
            "read: give one that the machines share, output_dir=/SHARED/FOLDER"
        )


def _leave_marker(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".shared-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def _appears(file: Path) -> bool:
    until = time.monotonic() + APPEARS_WITHIN
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
