"""The machine that a recipe is planned for: this one, or a GPU by its name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from finequant.recipes.errors import UserError
from finequant.recipes.usage import total_memory

if TYPE_CHECKING:
    import torch

GPUS = {
    "T4": 16,
    "V100": 32,
    "L4": 24,
    "A10": 24,
    "A10G": 24,
    "RTX 3090": 24,
    "RTX 4090": 24,
    "RTX 5090": 32,
    "A6000": 48,
    "L40S": 48,
    "A100 40GB": 40,
    "A100": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
"""Memory in GB."""

WITHOUT_BF16 = ("T4", "V100")
UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


class Machine(NamedTuple):
    """The machine on which the stages run."""

    name: str
    memory: int
    """Bytes of one GPU, or of the host."""
    kind: Literal["cpu", "gpu"]
    gpus: int = 1
    sharded: bool = False
    """Whether FSDP splits the weights over the GPUs in training."""

    def training_dtype(self, precision: str) -> torch.dtype:
        """Returns bfloat16 or float32, as `training_precision` chooses here, or would on a GPU that
        is not here."""
        import torch

        from finequant.finetune.device import training_precision

        if precision != "auto" and self.kind == "gpu":
            return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        if self.name in GPUS or (self.kind == "gpu" and not torch.cuda.is_available()):
            return torch.float32 if self.name in WITHOUT_BF16 else torch.bfloat16
        return training_precision(precision)[0]


def this_machine() -> Machine:
    """Returns this machine: with its GPU's memory if it has one, else the host's or container's."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpus = torch.cuda.device_count()
        return Machine(properties.name, properties.total_memory, "gpu", gpus)
    return this_host()


def this_host() -> Machine:
    """Returns this machine without its GPU."""
    return Machine("this machine", total_memory(), "cpu")


def named_gpu(text: str) -> Machine:
    """Returns a GPU by its name, or with an amount of memory.

    Raises:
        UserError: for a name that is not known.
    """
    names = {re.sub("^rtx", "", _letters(name)): name for name in GPUS}
    if name := names.get(re.sub("^rtx", "", _letters(text))):
        return Machine(name, GPUS[name] * 10**9, "gpu")
    try:
        return Machine(text, bytes_of(text, "--gpu"), "gpu")
    except UserError:
        raise UserError(
            f"--gpu: {text!r}: expected one of {', '.join(GPUS)}, or its memory, such as 24GB"
        ) from None


def _letters(name: str) -> str:
    """Reduces `RTX 4090` and `rtx-4090` to `rtx4090`."""
    return re.sub(r"[\s_-]", "", name).lower()


def bytes_of(text: str, option: str) -> int:
    """Parses a size in bytes: `6GB` is 6,000,000,000.

    option: the option of the command line that gives it, for the error.

    Raises:
        UserError: for a text that is no size, or zero.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if not size:
        raise UserError(
            f"{option}: {text!r}: expected a number with MB, GB, MiB or GiB, such as 6GB"
        )
    return size


def free_disk(folder: Path) -> int:
    """Returns the free bytes of the file system where the folder is, or will be."""
    return shutil.disk_usage(_nearest(folder)).free


def on_one_disk(first: Path, second: Path) -> bool:
    """Says whether two folders are, or will be, in the same file system."""
    return _nearest(first).stat().st_dev == _nearest(second).stat().st_dev


def _nearest(folder: Path) -> Path:
    """Returns the folder if it exists, or else its innermost parent that does."""
    while not folder.exists():
        folder = folder.resolve().parent
    return folder
