"""Finds a layer whose numbers exceed float16's largest, 65504, before long work begins."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from finequant.finetune.architecture import HEAD, NORM
from finequant.finetune.device import device
from finequant.quantize.checkpoint.blocks import (
    decoder_block,
    embed,
    head_logits,
    normed,
    rotary_of,
    run_block,
)
from finequant.quantize.checkpoint.reading import Weights
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig


@torch.inference_mode()
def check_range(
    config: DecoderConfig, weights: Weights, prompts: list[list[int]], dtype: torch.dtype
) -> None:
    """Runs prompts through the float model in the shipped dtype, a block in memory at a time.

    Raises:
        UserError: naming the first layer whose inputs or outputs are not finite in float16.
    """
    if dtype != torch.float16:
        return
    hidden = [embed(weights, torch.tensor([prompt])).to(device(), dtype) for prompt in prompts]
    rotary = [rotary_of(config, states) for states in hidden]
    for number in range(config.num_hidden_layers):
        block = decoder_block(config, number, weights, dtype).to(device())
        for name, module in block.named_modules():
            full = f"model.layers.{number}.{name}".rstrip(".")
            module.register_forward_pre_hook(partial(_look_at_inputs, full))
            module.register_forward_hook(partial(_look_at_outputs, full))
        hidden = run_block(block, hidden, rotary)
    last = normed(config, weights, torch.cat([states[:, -1] for states in hidden]))
    _look(f"the outputs of {NORM}", (last,))
    logits = head_logits(config, weights, last)
    _look(f"the outputs of {HEAD}", (logits,))


def _look_at_inputs(name: str, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
    _look(f"the inputs of {name}", inputs)


def _look_at_outputs(name: str, _: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    _look(f"the outputs of {name}", output if isinstance(output, tuple) else (output,))


def _look(source: str, tensors: tuple[Any, ...]) -> None:
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
            raise UserError(
                f"quantize.dtype: in float16, whose largest number is 65504, {source} are not "
                "finite: set quantize.dtype=bfloat16 (or float32)"
            )
