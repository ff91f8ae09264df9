"""The recipe's method, applied to a whole model: float weights -> codes and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finequant.quantize.rounding import Rounded, round_to_nearest
from finequant.quantize.scheme import linear_shapes
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Quantize, Recipe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def round_model(
    model: LlamaForCausalLM,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> dict[str, Rounded]:
    """Codes and scales of every layer that the recipe quantizes, by the layer's name.

    model: float weights, the head untied if it is quantized; it stays as it is.
    dtype: of the arithmetic in which gptq computes activations, that of the shipped model.

    Raises:
        UserError: if there is nothing to calibrate on.
    """
    from finequant.quantize.calibrate import calibrate

    scheme = recipe.quantize
    if scheme.method == "gptq":
        return calibrate(model, calibration_sequences(recipe, tokenizer), scheme, dtype)
    return {name: _round(module.weight, scheme) for name, module in quantized_layers(model, scheme)}


def quantized_layers(
    model: LlamaForCausalLM, scheme: Quantize
) -> list[tuple[str, torch.nn.Linear]]:
    """The linear layers of every decoder block, and the head if the recipe says so."""
    kinds = linear_shapes(model.config, scheme.head)
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(kinds))
    ]


def calibration_sequences(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [rows, length]: a seeded choice of rows through the chat template, end to end.

    Raises:
        UserError: if the rows have fewer tokens than one sequence needs.
    """
    from finequant.finetune.data import load_splits
    from finequant.finetune.tokens import encode

    wish = recipe.quantize.calibration
    data = recipe.data
    if wish.data:
        data = data.model_copy(
            update={"train": wish.data, "validation": [], "test": [], "validation_fraction": 0.0}
        )
    rows = load_splits(data, recipe.seed).train
    generator = torch.Generator().manual_seed(recipe.seed)
    length, ids = wish.length, []
    for index in torch.randperm(len(rows), generator=generator).tolist():
        ids += encode(rows[index], tokenizer, data, whole=True).input_ids
        if len(ids) >= max(wish.tokens, length):
            break
    if len(ids) < length:
        raise UserError(
            f"quantize.calibration: {len(rows)} rows have only {len(ids)} tokens, fewer than a "
            f"sequence of quantize.calibration.length={length}: make it smaller, or name more data"
        )
    sequences = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    chosen = torch.randperm(len(sequences), generator=generator)
    return sequences[chosen[: max(1, wish.tokens // length)]]


def _round(weight: torch.Tensor, scheme: Quantize) -> Rounded:
    dtype = getattr(torch, scheme.scale_dtype)
    weight = weight.detach().float()
    if scheme.method == "rtn":
        return round_to_nearest(weight, scheme.bits, scheme.group_size, scheme.scale, dtype)
    return _half_quadratic(weight, scheme, dtype)


def _half_quadratic(weight: torch.Tensor, scheme: Quantize, dtype: torch.dtype) -> Rounded:
    """torchao's HQQ for scales without zero points (https://mobiusml.github.io/hqq_blog/)."""
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
        IntxChooseQParamsAlgorithm,
    )

    found = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, scheme.group_size),
        getattr(torch, f"int{scheme.bits}"),
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    return Rounded(found.qdata, found.scale.to(dtype))
