"""base + adapter -> merged weights, checked against base + adapter on real prompts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from finequant.finetune.model import load_base
from finequant.recipes.errors import UserError
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LARGEST_DIFFERENCE = 1e-3
"""Of merged logits, relative to the largest logit. float32 rounding stays below 1e-4."""


def merge(recipe: Recipe, run: RunDir, prompts: list[list[int]]) -> tuple[LlamaForCausalLM, float]:
    """The merged model in float32, and how far its logits are from base + adapter.

    Raises:
        UserError: if the adapter is not one of this base, or the logits differ.
    """
    from peft import PeftModel

    base = load_base(recipe.model, torch.float32)
    try:
        tuned = PeftModel.from_pretrained(base, run.adapter).eval()
    except (RuntimeError, ValueError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{run.adapter}: not an adapter of {recipe.model.base}: {reason}") from None
    before = last_logits(tuned, prompts)
    try:
        merged = tuned.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"{run.adapter}: cannot be merged: {error}") from None
    difference = _relative_difference(before, last_logits(merged, prompts))
    if not difference < LARGEST_DIFFERENCE:
        raise UserError(
            f"{run.adapter}: merged logits differ from base + adapter by {difference:.1e} of the "
            f"largest; expected below {LARGEST_DIFFERENCE:.0e}: train the adapter again"
        )
    return merged, difference


def last_logits(model: torch.nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    """float32 logits [prompts, vocabulary] after the last token of each prompt."""
    with torch.inference_mode():
        rows = [model(torch.tensor([prompt])).logits[0, -1].float() for prompt in prompts]
    return torch.stack(rows)


def _relative_difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()
