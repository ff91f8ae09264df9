"""Liger's kernels (https://github.com/linkedin/Liger-Kernel) for one model's norms and MLPs."""

from __future__ import annotations

import importlib.util
import sys

import torch

from finequant.recipes.errors import UserError
from finequant.recipes.terminal import say


def use_liger(model: torch.nn.Module, kernels: str) -> None:
    """Replaces the norms and MLPs of a transformers model with Liger's, which compute the same up
    to rounding, faster and in less memory.

    kernels: `liger`, `plain`, or `auto`: Liger's where it is installed and there is a CUDA GPU.

    Raises:
        UserError: if the recipe asks for Liger's and they are not available.
    """
    absent = _why_not()
    if kernels == "liger" and absent:
        raise UserError(f"train.kernels: liger: {absent}; use train.kernels=plain")
    if kernels == "plain" or absent:
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    module = vars(sys.modules[type(model).__module__])
    before = dict(module)
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False)  # trl has a loss
    # It also patches the module's classes, for all models that are made later, even on a CPU.
    module.update(before)
    say("train: Liger's kernels")


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed: pip install 'finequant[gpu]'"
    return None
