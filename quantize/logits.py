"""Logits on real prompts, by which the stages compare models: merged, reloaded, exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PROMPTS = 4


def check_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns token ids of the first validation rows or, if there are none, training rows."""
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.finetune.data.tokens import encode

    splits = prepared_splits(recipe)
    rows = (splits.validation or splits.train)[:PROMPTS]
    return [encode(row, tokenizer, recipe.data).input_ids for row in rows]


def last_logits(model: torch.nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    """Computes float32 logits [prompts, vocabulary] after the last token of each prompt."""
    import torch

    with torch.inference_mode():
        rows = [model(torch.tensor([prompt])).logits[0, -1].float() for prompt in prompts]
    return torch.stack(rows)


def relative_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Computes the root mean square of the difference, relative to that of `expected`."""
    return ((logits - expected).norm() / expected.norm()).item()
