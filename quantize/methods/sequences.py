"""The text that calibration and budgets measure on: rows of the recipe as sequences of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finequant.recipes.errors import UserError
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def calibration_sequences(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [rows, length]: a seeded choice of rows through the chat template, end to end.

    Raises:
        UserError: if the rows have fewer tokens than one sequence needs.
    """
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.data.tokens import encode

    calibration = recipe.quantize.calibration
    data = recipe.data
    if calibration.data:
        data = data.model_copy(
            update={
                "train": calibration.data,
                "validation": [],
                "test": [],
                "validation_fraction": 0.0,
            }
        )
    rows = load_splits(data, recipe.seed).train
    generator = torch.Generator().manual_seed(recipe.seed)
    length, ids = calibration.length, []
    for index in torch.randperm(len(rows), generator=generator).tolist():
        ids += encode(rows[index], tokenizer, data, whole=True).input_ids
        if len(ids) >= max(calibration.tokens, length):
            break
    if len(ids) < length:
        raise UserError(
            f"quantize.calibration: {len(rows)} rows have only {len(ids)} tokens, fewer than a "
            f"sequence of quantize.calibration.length={length}: make it smaller, or name more data"
        )
    sequences = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    chosen = torch.randperm(len(sequences), generator=generator)
    return sequences[chosen[: max(1, calibration.tokens // length)]]
