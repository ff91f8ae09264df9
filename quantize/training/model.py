"""The model of quantization-aware training: the tuned model with fake-quantized layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from finequant.finetune.model import load_base
from finequant.finetune.processes import filled_by_first
from finequant.quantize.checkpoint.reading import WHOLE, Weights, filled
from finequant.quantize.rounding import Rounded
from finequant.quantize.scheme import EMBEDDING, HEAD, Plan, untie_head, unties_head
from finequant.quantize.training.fake_quantize import (
    FakeQuantEmbedding,
    FakeQuantized,
    FakeQuantLinear,
    FakeQuantLora,
    FakeQuantScales,
)

if TYPE_CHECKING:
    from finequant.finetune.architecture import Decoder
    from finequant.recipes.schema import Lora, Recipe


def fake_quantized_model(
    recipe: Recipe, weights: Weights, start: dict[str, Rounded], plan: Plan, dtype: torch.dtype
) -> Decoder:
    """Builds the tuned model in the shipped dtype, with the layers of `start` fake-quantized.

    weights: float32 rows of the tuned model, merged, and transformed as the recipe says.
    Only what learns requires a gradient: nothing that the plan leaves in float does.
    """
    model = load_base(recipe.model, dtype)
    if unties_head(plan):
        untie_head(model)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in start:
            parameter.data = filled(weights, name, parameter.shape, dtype)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(recipe.seed)
    # In the plan's order: that of `start`, read from a file's metadata, is another in each process,
    # and what is drawn for each layer depends on it.
    for name in filter(plan.get, plan):
        layer = _fake_quantized(name, model, weights, start[name], plan, dtype, recipe, generator)
        if filled_by_first():
            _empty(layer)
        model.set_submodule(name, layer)
    return model


def _empty(layer: FakeQuantized) -> None:
    """Drops what is frozen, which the first process will send; the optimizer holds the rest."""
    for name, tensor in layer.named_parameters():
        if not tensor.requires_grad:
            setattr(layer, name, torch.nn.Parameter(tensor.to("meta"), requires_grad=False))


def fake_quantized_layers(model: torch.nn.Module) -> dict[str, FakeQuantized]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, FakeQuantized)}


def _fake_quantized(
    name: str,
    model: Decoder,
    weights: Weights,
    start: Rounded,
    plan: Plan,
    dtype: torch.dtype,
    recipe: Recipe,
    generator: torch.Generator,
) -> FakeQuantized:
    training, lora, bits = recipe.quantize.training, recipe.lora, plan[name].bits
    exact = weights(f"{name}.weight", WHOLE).float()
    float_weight = exact.to(dtype) if training.distillation else None
    if name == EMBEDDING:
        return FakeQuantEmbedding(start, bits, dtype, float_weight)
    shared = {"float_weight": float_weight, "bias": model.get_submodule(name).bias}
    if shared["bias"] is not None:
        shared["bias"] = shared["bias"].detach()
    if training.learns == "scales":
        return FakeQuantScales(start, bits, dtype, **shared)
    if not _has_lora(name, lora):
        return FakeQuantLinear(start, bits, dtype, **shared)
    return FakeQuantLora(
        start,
        bits,
        dtype,
        exact=exact,
        rank=lora.rank,
        scaling=lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank),
        generator=generator,
        **shared,
    )


def _has_lora(name: str, lora: Lora) -> bool:
    """Says whether a layer gets a LoRA, matching target modules like peft: by ends of names."""
    if lora.target_modules == "all-linear":
        return name != HEAD
    return any(f".{name}".endswith(f".{target}") for target in lora.target_modules)
