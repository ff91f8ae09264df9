"""Checks, before any stage starts, whether `train` would refuse the rows, the base, LoRA or nf4."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from finequant.recipes.errors import UserError, listed, refuse_all
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.architecture import DecoderConfig
    from finequant.finetune.data.splits import Splits


def check_training(
    recipe: Recipe, config: DecoderConfig, splits: Splits, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Tokenizes the rows, and looks for LoRA's target modules in a model without weights.

    Returns:
        The number of tokens of each training row.

    Raises:
        UserError: for rows that cannot be trained on, target modules that the base does not have,
            a base without weight files, or one that cannot be held in nf4.
    """
    from finequant.finetune.adapter import lora_config
    from finequant.finetune.architecture import skeleton, trained_positions
    from finequant.finetune.data.dataset import lengths, to_dataset
    from finequant.finetune.model import check_files
    from finequant.finetune.nf4 import check_nf4

    positions = trained_positions(config)
    checks = [
        partial(to_dataset, rows, tokenizer, recipe.data, positions)
        for rows in (splits.train, splits.validation)
        if rows
    ]
    targets = partial(lora_config, recipe.lora, skeleton(config))
    files = partial(check_files, recipe.model)
    stopping = partial(check_stopping, recipe, splits)
    train, *_ = refuse_all([*checks, targets, files, partial(check_nf4, recipe), stopping])
    return lengths(train)


def check_stopping(recipe: Recipe, splits: Splits) -> None:
    """Refuses early stopping if the sources of validation rows leave none."""
    if recipe.train.early_stopping_patience and not splits.validation:
        raise UserError(
            "train.early_stopping_patience: no validation rows are left to measure the loss on: "
            "add rows to data.validation, or raise their weight\n  " + listed(splits.notes)
        )
