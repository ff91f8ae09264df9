"""Counts the operators that a GPU is asked to start, on a CPU that takes an accelerator's pieces.

python benchmarks/launches.py

The model has the blocks and layers of Llama-3-8B, but a hidden size of 64. That changes no count:
an accelerator takes all rows of a layer at once, and gptq's operators are counted per column.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import typer
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from finequant.finetune import device
from finequant.quantize.methods import method

BEFORE = {"max": 9.3, "search": 17.1}
"""Operators per column and 2,048 rows, when that many rows were rounded at a time."""

PIECES = 14
"""Pieces of 2,048 rows in gate_proj and up_proj of 8B, which share their inputs."""

STEP_BEFORE = {"adapter learns": 100_000, "scales learn": 130_000}
"""Operators of a step, when weights were computed in pieces that fit a CPU's caches."""

BLOCKS = 32

NO_KERNEL = ("empty", "_unsafe_view", "_local_scalar_dense", "profiler")
"""Parts of the names of operators that only allocate, reshape, or read a scalar."""

LISTED = 30
"""Minimum number of tensors that a kernel for lists of tensors handles."""


class Launches(TorchDispatchMode):
    """Counts the operators that would start a kernel or more on a GPU; one for lists of tensors
    counts once for every LISTED tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "_foreach_" in func.name():
            self.count += math.ceil(len(args[0]) / LISTED)
        else:
            self.count += not (func.is_view or any(part in func.name() for part in NO_KERNEL))
        return result


@contextmanager
def accelerator() -> Iterator[None]:
    """Makes a CPU work, inside the block, in an accelerator's pieces and lists of tensors; in
    float32 on every processor, as for the counts of before."""
    at_once, devices = device.IN_ONE_LAUNCH, "_get_foreach_kernels_supported_devices"
    with (
        patch.object(device, "_bf16", lambda: (False, "this CPU")),
        patch.object(device, "IN_CACHE", at_once),
        patch.object(method, "ROWS", 1 << 20),
        patch.object(optimizer, devices, lambda: ["cpu"]),
        patch.object(_foreach_utils, devices, lambda: ["cpu"]),
    ):
        yield


def main() -> None:
    """Prints the counts as Markdown."""
    print("| operators started | now | before |\n| :--- | ---: | ---: |")
    for rule, before in BEFORE.items():
        now = f"{gptq_operators(rule):.1f}"
        print(f"| gptq, `scale: {rule}`, a column of all rows | {now} | {PIECES * before:.0f} |")
    for learns, before in STEP_BEFORE.items():
        print(f"| quantization-aware step, {learns} | {step_operators(learns):,} | {before:,} |")


def gptq_operators(rule: str) -> float:
    """Counts the operators for each column of a layer."""
    from finequant.quantize.methods import gptq
    from finequant.quantize.scheme import LayerScheme

    columns, x = 256, torch.randn(512, 256)
    statistics = gptq.Statistics()
    statistics.add(x, x)
    statistics.solve()
    scheme = LayerScheme(4, 32, rule, torch.float32)
    with accelerator(), Launches() as launches:
        gptq.gptq(torch.randn(3000, columns), statistics, scheme)
    return launches.count / columns


def step_operators(learns: str) -> int:
    """Counts the operators of a first training step: forward, backward, and optimizer.

    learns: a key of STEP_BEFORE.
    """
    from datasets import Dataset
    from gpu import WARM_UP, a_recipe, a_tokenizer, fake_quantized, our_arguments
    from transformers import LlamaConfig

    from finequant.quantize.training.trainer import QuantizationAwareTrainer

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    ids = torch.randint(256, (2, 32)).tolist()
    with tempfile.TemporaryDirectory() as folder, accelerator():
        trainer = QuantizationAwareTrainer(
            model=fake_quantized(config, learns.split()[0]),
            args=our_arguments(a_recipe(), folder, 1 - WARM_UP, autocast=False),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
            processing_class=a_tokenizer(),
        )
        with Launches() as launches:
            trainer.train()
    return launches.count


if __name__ == "__main__":
    typer.run(main)
