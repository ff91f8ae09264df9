"""Checks that plain `from_pretrained` in a fresh process loads a model with the same logits."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from finequant.finetune.architecture import HEAD
from finequant.quantize.checkpoint.blocks import decoder_block, embed, normed, rotary_of, run_block
from finequant.quantize.checkpoint.reading import WHOLE, Weights, filled
from finequant.quantize.checkpoint.writing import weight_bytes
from finequant.quantize.rounding import quantize_activations
from finequant.quantize.scheme import Plan
from finequant.recipes.errors import UserError, process_error
from finequant.recipes.terminal import say
from finequant.recipes.usage import available_memory, return_freed_memory

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.checkpoint.writing import Checkpoint
    from finequant.quantize.merge.adapter import Base

PROCESS_BYTES = 10**9
"""Upper bound for the bytes of Python, torch, transformers and torchao before a model is loaded."""

# Runs without importing finequant, like a user who downloads the model.
RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, blocks, prompts, logits = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, num_hidden_layers=int(blocks), output_loading_info=True
)
if info["missing_keys"] or info["mismatched_keys"]:
    sys.exit(f"not in the files as the model needs them: {info}")
with torch.inference_mode():
    rows = {
        name: model(ids[None]).logits[0, -1].float().clone()
        for name, ids in load_file(prompts).items()
    }
save_file(rows, logits)
"""


def blocks_that_fit(checkpoint: Checkpoint, config: DecoderConfig) -> int:
    """Counts the blocks of the model that a fresh process can load into free memory."""
    largest = max(math.prod(shape) for shape in checkpoint.shapes.values())
    # Python with its libraries; the largest layer in float32 and in the model's dtype.
    fixed = PROCESS_BYTES + largest * (4 + checkpoint.dtype.itemsize)
    room = (available_memory() - fixed) / max(1, weight_bytes(checkpoint.folder))
    every = config.num_hidden_layers
    return every if room >= 1 else max(1, int(room * every))


@torch.inference_mode()
def shipped_logits(
    config: DecoderConfig,
    plan: Plan,
    weights: Weights,
    dtype: torch.dtype,
    prompts: list[list[int]],
    blocks: int,
) -> torch.Tensor:
    """Computes float32 logits [prompts, vocabulary] after each prompt, one block at a time.

    On the CPU, like what they are compared with: on a GPU the same products of the same numbers
    differ in their last bit from one memory to another (seen on an H200).

    weights: as they are shipped, codes times scales.
    blocks: the first so many are run.
    """
    hidden = [embed(weights, torch.tensor([prompt])) for prompt in prompts]
    rotary = [rotary_of(config, states) for states in hidden]
    for number in range(blocks):
        block = decoder_block(config, number, weights, dtype)
        for name, module in block.named_modules():
            if plan.get(f"model.layers.{number}.{name}"):
                module.register_forward_pre_hook(lambda _, x: (quantize_activations(x[0]),))
        hidden = run_block(block, hidden, rotary)
    hidden = [normed(config, weights, states) for states in hidden]
    if plan[HEAD]:
        hidden = [quantize_activations(states) for states in hidden]
    # In one piece, because a part of it may be multiplied in another order.
    shape = (config.vocab_size, config.hidden_size)
    head = filled(weights, f"{HEAD}.weight", shape, dtype)
    return torch.stack([linear(states, head)[0, -1].float() for states in hidden])


def check_quantized(
    checkpoint: Checkpoint, base: Base, plan: Plan, prompts: list[list[int]]
) -> tuple[int, torch.Tensor]:
    """Checks that every byte is in its file, and that `from_pretrained` loads the same model.

    Returns:
        How many blocks were run, the first ones, and the logits [prompts, vocabulary] after them.

    Raises:
        UserError: if not.
    """
    for name in checkpoint.shapes:
        if not checkpoint.has(name, WHOLE):
            raise UserError(
                f"{checkpoint.folder}: {name} is not what was written: a disk error? Quantize again"
            )
    config = base.config
    return_freed_memory()  # calibration leaves up to as much as the model takes
    blocks = blocks_that_fit(checkpoint, config)
    expected = shipped_logits(config, plan, checkpoint.weights(), checkpoint.dtype, prompts, blocks)
    checkpoint.write_index()
    check_reload(expected, checkpoint.folder, prompts, blocks)
    checkpoint.finish()
    every, part = config.num_hidden_layers, ""
    if blocks < every:
        part = f" of the first {blocks} of {every} blocks, for which there is memory,"
    say(f"quantize: reloaded in a fresh process, the logits{part} are the same, bit for bit")
    return blocks, expected


def check_reload(
    expected: torch.Tensor, folder: Path, prompts: list[list[int]], blocks: int
) -> None:
    """Loads the folder in a process without finequant and compares logits, exactly.

    Raises:
        UserError: if loading fails or any logit differs.
    """
    from safetensors.torch import load_file, save_file

    exchange = folder / "reload"
    shutil.rmtree(exchange, ignore_errors=True)
    exchange.mkdir()
    rows = {f"{index:03}": torch.tensor(prompt) for index, prompt in enumerate(prompts)}
    save_file(rows, exchange / "prompts.safetensors")
    files = [str(exchange / name) for name in ("prompts.safetensors", "logits.safetensors")]
    command = [sys.executable, "-P", "-c", RELOAD, str(folder), str(blocks), *files]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise process_error(f"{folder}: from_pretrained fails in a fresh process", process)
    reloaded = load_file(files[1])
    actual = torch.stack([reloaded[name] for name in sorted(reloaded)])
    shutil.rmtree(exchange)
    if not torch.equal(actual, expected):
        worst = (actual - expected).abs().max().item()
        raise UserError(
            f"{folder}: reloaded logits differ by {worst}: the checkpoint is not kept: install the "
            "versions in constraints.txt, and quantize again"
        )
