"""logits(base + adapter) = logits(merged), on real prompts, a block in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finequant.quantize.checkpoint.blocks import (
    decoder_block,
    embed,
    fill,
    head_logits,
    normed,
    rotary_of,
)
from finequant.quantize.checkpoint.reading import Weights, filled
from finequant.quantize.merge.adapter import (
    PREFIX,
    Adapter,
    Base,
    checked_difference,
    merged_weights,
)
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_NAME = "default"


@torch.no_grad()
def check_merge(base: Base, adapter: Adapter, folder: Path, prompts: list[list[int]]) -> float:
    """How far the merged logits are from those of peft's base + adapter, relative to the largest.

    Both models go through their blocks side by side, each on its own hidden states.

    Raises:
        UserError: if it is more than rounding, or peft does not take the adapter.
    """
    merged, tuned = merged_weights(base, adapter), _without_weights(base, folder)
    exact = [embed(base.weights, torch.tensor([prompt])).float() for prompt in prompts]
    found = list(exact)
    rotary = [rotary_of(base.config, hidden) for hidden in exact]
    for number, layer in enumerate(tuned.get_base_model().model.layers):
        _fill_tuned(layer, number, base.weights, adapter)
        exact = _run(layer, exact, rotary)
        layer.to("meta")
        found = _run(decoder_block(base.config, number, merged, torch.float32), found, rotary)
    logits = [
        _last_logits(base, weights, hidden)
        for weights, hidden in ((base.weights, exact), (merged, found))
    ]
    return checked_difference(*logits, folder)


def _without_weights(base: Base, folder: Path) -> PeftModel:
    """Base and adapter as peft joins them, neither with any memory."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        empty = LlamaForCausalLM(base.config)
    try:
        return PeftModel.from_pretrained(empty, folder, low_cpu_mem_usage=True).eval()
    except (RuntimeError, ValueError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: peft does not take this adapter: {reason}") from None


def _fill_tuned(layer: torch.nn.Module, number: int, weights: Weights, adapter: Adapter) -> None:
    prefix = f"model.layers.{number}."

    def read(name: str, shape: torch.Size) -> torch.Tensor:
        if ".lora_" not in name:
            plain = name.replace(".base_layer", "")
            return filled(weights, prefix + plain, shape, torch.float32)
        key = f"{PREFIX}{prefix}{name.replace(f'.{ADAPTER_NAME}', '')}"
        # In its file a magnitude vector has no `.weight` at its end.
        return adapter.read(key.replace("magnitude_vector.weight", "magnitude_vector"))

    fill(layer, read)


def _run(block: torch.nn.Module, hidden: list[torch.Tensor], rotary: list) -> list[torch.Tensor]:
    pairs = zip(hidden, rotary, strict=True)
    return [block(one, position_embeddings=angles) for one, angles in pairs]


def _last_logits(base: Base, weights: Weights, hidden: list[torch.Tensor]) -> torch.Tensor:
    last = torch.cat([one[:, -1] for one in hidden])
    shape = base.shapes["lm_head.weight"]
    return head_logits(weights, shape, normed(base.config, weights, last))
