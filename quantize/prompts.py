"""The recipe's rows on which the stages compare logits: merged, reloaded, exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = 4


def check_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns token ids of the first validation rows or, if there are none, training rows."""
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.finetune.data.tokens import encode

    splits = prepared_splits(recipe)
    rows = (splits.validation or splits.train)[:PROMPTS]
    return [encode(row, tokenizer, recipe.data).input_ids for row in rows]
