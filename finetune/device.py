"""Chooses the device of every stage, its dtype, and how many weights it handles at a time."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    import torch

# Names of torch.cpu.get_capabilities. Processors without any of them, even those with AVX-512, only
# emulate bf16.
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")

# On Hopper torch prefers cuDNN, which builds a plan for each new length: a decoded token of 32 rows
# takes 80 ms, but 11 ms with flash attention (seen with torch 2.11, and reported in
# https://github.com/modelscope/FunASR/issues/3704). To be removed once decoding is as fast.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

IN_CACHE, IN_ONE_LAUNCH = 1 << 19, 1 << 27


def device() -> torch.device:
    """Returns the accelerator (cuda, xpu, mps) of this process, or the CPU where there is none or
    accelerate's configuration says not to use it."""
    import torch

    if trains_on_cpu():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    return torch.device(torch.accelerator.current_accelerator().type, number)


def weights_at_once(device: torch.device) -> int:
    """Returns how many weights to handle at a time.

    On a CPU, a piece that does not fit in the cache waits for memory. An accelerator waits for the
    launches of small pieces; its pieces take half a gigabyte in float32.
    """
    return IN_CACHE if device.type == "cpu" else IN_ONE_LAUNCH


def trains_on_cpu() -> bool:
    """Says whether there is no GPU, or accelerate's configuration says not to use it (use_cpu)."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def training_precision(precision: str) -> tuple[torch.dtype, str]:
    """Chooses the dtype to train in, and says why.

    `auto` is bf16 where the hardware multiplies it natively; elsewhere it is emulated and slow.

    Raises:
        UserError: if the recipe asks for bf16 on a GPU that does not have it.
    """
    import torch

    if precision == "fp32":
        return torch.float32, "as the recipe says"
    native, where = _bf16()
    if precision == "bf16":
        if where == "this GPU" and not native:
            raise UserError("train.precision: this GPU has no bf16: use train.precision=fp32")
        return torch.bfloat16, "as the recipe says"
    if native:
        return torch.bfloat16, f"{where} computes in bf16"
    return torch.float32, f"{where} does not compute in bf16"


def arithmetic_dtype(shipped: torch.dtype) -> torch.dtype:
    """Returns the dtype to run a model of `shipped` weights in: float32 where bf16 is emulated.

    The weights keep their bf16 values; only products and activations are more precise.
    """
    import torch

    return torch.float32 if shipped == torch.bfloat16 and not _bf16()[0] else shipped


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype as recipes and config.json write it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiplies `rows` [..., out] by `weight` [out, in].

    Where a processor emulates bf16, torch is slow unless the weight is stored transposed: 64 rows
    times [8192, 2048] take an AVX2 core 9 s (torch 2.13), and 0.2 s in pieces of float32.
    To be removed once torch is as fast.
    """
    import torch

    if rows.device.type != "cpu" or rows.dtype != torch.bfloat16 or _bf16()[0]:
        return rows @ weight
    flat, step = rows.flatten(0, -2), max(1, IN_CACHE // weight.shape[1])
    total = torch.zeros(len(flat), weight.shape[1])
    for first in range(0, len(weight), step):
        part = slice(first, first + step)
        total.addmm_(flat[:, part].float(), weight[part].float())
    return total.to(rows.dtype).unflatten(0, rows.shape[:-1])


def _bf16() -> tuple[bool, str]:
    """Says whether the hardware multiplies bf16 natively, and names the hardware."""
    import torch

    if trains_on_cpu():
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS), "this CPU"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    return True, f"this GPU ({torch.accelerator.current_accelerator().type})"
