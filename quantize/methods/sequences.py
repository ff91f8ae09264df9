"""The text that calibration and budgets read: rows of the recipe as sequences of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finequant.recipes.errors import UserError, counted
from finequant.recipes.methods import METHODS
from finequant.recipes.schema import Calibration, Quantize, Recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.data.table import Rows

SCALE_TOKENS = 1024
"""Tokens of an optimizer step that trains scales."""

LOGITS_TOKENS = 256
"""Tokens of such a step whose logits are in memory at a time."""


def calibrates(recipe: Recipe) -> bool:
    """Says whether the stage `quantize` reads calibration text, which several processes share."""
    return recipe.quantize.reads_calibration_text and not recipe.quantize.training


def sequences_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """Returns the sequences that quantization reads, those for the method first; None if it reads
    none.

    Raises:
        UserError: if there is nothing to calibrate on.
    """
    calibration = recipe.quantize.calibration
    say_what_has_no_effect(recipe.quantize)
    if not recipe.quantize.reads_calibration_text:
        return None
    tokens, length = _tokens(calibration), _length(recipe)
    sequences = calibration_sequences(recipe, tokenizer, tokens)
    read = sequences.numel()
    if read < tokens // length * length:
        say(
            f"quantize: the rows have text for only {read:,} of the {tokens:,} tokens of "
            "calibration: quantize.calibration.data can name more text"
        )
    return sequences


def check_calibration(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reads what quantization will read of `quantize.calibration.data`, if it reads any text.

    Raises:
        UserError: for rows that cannot be used, or too few tokens.
    """
    quantize = recipe.quantize
    say_what_has_no_effect(quantize)
    if quantize.calibration.data and (quantize.reads_calibration_text or quantize.budget):
        calibration_sequences(recipe, tokenizer, _tokens(quantize.calibration))


def say_what_has_no_effect(quantize: Quantize) -> None:
    """Names what a recipe sets for calibration that its method does not read."""
    method, calibration = quantize.method, quantize.calibration
    unread = ["steps"] if calibration.steps and not METHODS[method].is_calibrated else []
    if calibration.data and not (quantize.reads_calibration_text or quantize.budget):
        unread.append("data")
    for key in unread:
        say(f"quantize: quantize.calibration.{key} has no effect with quantize.method={method}")


def _tokens(calibration: Calibration) -> int:
    """Returns how many tokens the method and the training of scales read."""
    return max(calibration.tokens, calibration.scale_steps * SCALE_TOKENS)


def sequences_for_method(sequences: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """Returns the first of `sequences`: as many tokens as the method reads."""
    return sequences[: max(1, calibration.tokens // sequences.shape[1])]


def calibration_sequences(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> torch.Tensor:
    """Returns token ids [rows, length]: a seeded choice of rows in the chat template, end to end.

    If all rows together have fewer tokens than a sequence, the result is one shorter sequence.

    Raises:
        UserError: if they have fewer than two tokens.
    """
    from finequant.finetune.data.tokens import encode

    rows, length, ids = _calibration_rows(recipe), _length(recipe), []
    generator = torch.Generator().manual_seed(recipe.seed)
    for index in torch.randperm(len(rows), generator=generator).tolist():
        ids += encode(rows[index], tokenizer, recipe.data, whole=True).input_ids
        if len(ids) >= max(tokens, length):
            break
    if len(ids) < 2:
        raise UserError(
            f"quantize.calibration: {counted(len(ids), 'token')} in {counted(len(rows), 'row')} "
            "are too few to calibrate on: name more text in quantize.calibration.data, or set "
            "quantize.method=rtn"
        )
    length = min(length, len(ids))
    sequences = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    chosen = torch.randperm(len(sequences), generator=generator)
    return sequences[chosen[: max(1, tokens // length)]]


def _length(recipe: Recipe) -> int:
    from finequant.finetune.architecture import sequence_length
    from finequant.finetune.model import load_config

    return sequence_length(recipe.quantize.calibration, load_config(recipe.model))


def _calibration_rows(recipe: Recipe) -> Rows:
    """Returns the rows of `quantize.calibration.data` or, without it, the training rows."""
    from finequant.finetune.data.prepared import prepared_splits

    if sources := recipe.quantize.calibration.data:
        only = {"train": sources, "validation": [], "test": []}
        only |= {"validation_fraction": 0.0, "test_fraction": 0.0}
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=only)})
    return prepared_splits(recipe).train
