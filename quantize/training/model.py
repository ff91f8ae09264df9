"""Builds the model of quantization-aware training: the tuned model with fake-quantized layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from finequant.finetune.architecture import EMBEDDING, HEAD, rotary_embedding, skeleton
from finequant.finetune.model import load_config
from finequant.finetune.processes import filled_by_first
from finequant.quantize.checkpoint.reading import Weights, filled, row_slices
from finequant.quantize.rounding import Rounded, latent_weights
from finequant.quantize.scheme import (
    Plan,
    keeps_tied_head,
    shares_table,
    untie_head,
    unties_head,
)
from finequant.quantize.training.fake_quantize import (
    FakeQuantEmbedding,
    FakeQuantized,
    FakeQuantLinear,
    FakeQuantLora,
    FakeQuantScales,
    latent_dtype,
)

if TYPE_CHECKING:
    from finequant.finetune.architecture import Decoder, DecoderConfig
    from finequant.quantize.checkpoint.stored import StoredLayers
    from finequant.recipes.schema import Recipe


def fake_quantized_model(
    recipe: Recipe,
    weights: Weights,
    start: StoredLayers | dict[str, Rounded],
    plan: Plan,
    dtype: torch.dtype,
) -> Decoder:
    """Builds the tuned model in the shipped dtype, with the layers of the plan fake-quantized.

    Only the parameters that the recipe trains require a gradient.

    weights: float32 rows of the tuned model, merged, and transformed as the recipe says.
    start: codes and scales of each layer.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    config = load_config(recipe.model)
    trained = trained_layers(recipe, plan, config)

    def make(name: str, bias: torch.Tensor | None) -> FakeQuantized:
        about = (name in trained, recipe, generator)
        layer = _fake_quantized(name, bias, weights, start[name], plan, dtype, *about)
        if filled_by_first():
            _empty(layer)
        return layer

    return assembled(config, weights, plan, dtype, make)


def trained_layers(recipe: Recipe, plan: Plan, config: DecoderConfig) -> list[str]:
    """Lists the layers that get an adapter, or whose scales are trained: all quantized ones but a
    head that shares the embedding's table, which it could not do with scales of its own."""
    quantized = [name for name in plan if plan[name] and name != EMBEDDING]
    if recipe.quantize.training.learns == "adapter":
        return [name for name in quantized if recipe.lora.targets(name)]
    shares = shares_table(recipe.quantize, plan, config)
    return [name for name in quantized if not (shares and name == HEAD)]


def assembled(
    config: DecoderConfig,
    weights: Weights,
    plan: Plan,
    dtype: torch.dtype,
    make: Callable[[str, torch.Tensor | None], FakeQuantized],
) -> Decoder:
    """Builds a model in `dtype` in which the plan's quantized layers are made by `make`, so that
    their float weights are never in memory.

    weights: weights of the float model.
    make: makes a layer, given its name and bias.
    """
    config = deepcopy(config)
    config.dtype = dtype
    model = skeleton(config)
    if unties_head(plan):
        untie_head(model)
    for name, parameter in list(model.named_parameters()):
        if not plan.get(name.removesuffix(".weight")):
            owner, _, attribute = name.rpartition(".")
            tensor = filled(weights, name, parameter.shape, dtype)
            tensor = torch.nn.Parameter(tensor, requires_grad=False)
            setattr(model.get_submodule(owner), attribute, tensor)
    # In the plan's order, which is the same in every process: initial values are drawn in turn.
    for name in filter(plan.get, plan):
        bias = getattr(model.get_submodule(name), "bias", None)
        model.set_submodule(name, make(name, None if bias is None else bias.detach()))
    if keeps_tied_head(plan, config):
        model.tie_weights()
    model.model.rotary_emb = rotary_embedding(config)
    return model


def _empty(layer: FakeQuantized) -> None:
    """Drops frozen tensors, which the first process will send; the optimizer holds the others."""
    for name, tensor in layer.named_parameters():
        if not tensor.requires_grad:
            setattr(layer, name, torch.nn.Parameter(tensor.to("meta"), requires_grad=False))


def fake_quantized_layers(model: torch.nn.Module) -> dict[str, FakeQuantized]:
    """Returns the fake-quantized layers of a model by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, FakeQuantized)}


def _fake_quantized(
    name: str,
    bias: torch.Tensor | None,
    weights: Weights,
    start: Rounded,
    plan: Plan,
    dtype: torch.dtype,
    is_trained: bool,
    recipe: Recipe,
    generator: torch.Generator,
) -> FakeQuantized:
    training, lora, bits = recipe.quantize.training, recipe.lora, plan[name].bits
    float_weight = None
    if training.distillation:
        float_weight = filled(weights, f"{name}.weight", start.codes.shape, dtype)
    if name == EMBEDDING:
        return FakeQuantEmbedding(start, bits, dtype, float_weight)
    shared = {"float_weight": float_weight, "bias": bias}
    if not is_trained:
        return FakeQuantLinear(start, bits, dtype, **shared)
    if training.learns == "scales":
        return FakeQuantScales(start, bits, dtype, **shared)
    return FakeQuantLora(
        start,
        bits,
        dtype,
        latent=_latent(f"{name}.weight", weights, start, latent_dtype(bits)),
        rank=lora.rank,
        scaling=lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank),
        generator=generator,
        **shared,
    )


def _latent(name: str, weights: Weights, start: Rounded, dtype: torch.dtype) -> torch.Tensor:
    """Computes a layer's latent weights from pieces of its float32 weight."""
    latent = torch.empty(start.codes.shape, dtype=dtype)
    for rows in row_slices(latent.shape):
        piece = Rounded(start.codes[rows], start.scale[rows])
        latent[rows] = latent_weights(weights(name, rows), piece, dtype)
    return latent
