"""The recipe's method: float weights -> codes and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finequant.quantize.checkpoint.reading import WHOLE, weights_of
from finequant.quantize.rounding import Rounded, nearest_codes, round_to_nearest, stored_scale
from finequant.quantize.scheme import EMBEDDING, LayerScheme, layer_plan
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def round_model(
    model: LlamaForCausalLM,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> dict[str, Rounded]:
    """Codes and scales of every layer that the recipe's plan rounds, by name, in its order.

    model: float weights, the head untied if the plan needs it; it stays as it is.
    dtype: of the arithmetic in which gptq computes activations, that of the shipped model.

    Raises:
        UserError: if there is nothing to calibrate on.
    """
    from finequant.quantize.methods.calibrate import calibrate

    plan, method = layer_plan(recipe.quantize, model.config), recipe.quantize.method
    weights = weights_of(model)
    data_free = [name for name in plan if plan[name] and not is_calibrated(name, method)]
    rounded = {
        name: round_data_free(weights(f"{name}.weight", WHOLE), plan[name], method)
        for name in data_free
    }
    if method == "gptq":
        sequences = calibration_sequences(recipe, tokenizer)
        parts: dict[str, list[Rounded]] = {}
        steps = recipe.quantize.calibration.steps
        pieces = calibrate(weights, model.config, sequences, plan, dtype, steps=steps)
        for name, _, part in pieces:
            parts.setdefault(name, []).append(part)
        rounded |= {
            name: Rounded(*map(torch.cat, zip(*p, strict=True))) for name, p in parts.items()
        }
    return {name: rounded[name] for name in plan if name in rounded}


def is_calibrated(name: str, method: str) -> bool:
    """Says whether a layer is calibrated on its inputs; the others are quantized data-free."""
    return method == "gptq" and name != EMBEDDING


def round_data_free(weight: torch.Tensor, scheme: LayerScheme, method: str) -> Rounded:
    """Quantizes a weight [out, in] without its inputs; hqq needs the whole weight."""
    if method == "hqq":
        return _half_quadratic(weight, scheme)
    return round_to_nearest(weight, *scheme)


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


def _half_quadratic(weight: torch.Tensor, scheme: LayerScheme) -> Rounded:
    """torchao's HQQ for scales without zero points (https://mobiusml.github.io/hqq_blog/)."""
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
        IntxChooseQParamsAlgorithm,
    )

    quantized = IntxUnpackedToInt8Tensor.from_hp(
        weight.float(),
        (1, scheme.group_size),
        getattr(torch, f"int{scheme.bits}"),
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    scale = stored_scale(quantized.scale, scheme.scale_dtype)
    return Rounded(nearest_codes(weight, scale, scheme.bits), scale)
