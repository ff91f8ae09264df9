"""A layer plan within a budget of bits, by measured sensitivity.

Rounding a layer changes its output for each token by dz = dW x. With g, the gradient of the
token's loss with respect to that output, the loss increases by half the mean of (g . dz)^2: to
second order, with the Fisher information as the Hessian (BRECQ, https://arxiv.org/abs/2102.05426).
The loss is that of next tokens drawn from the model itself, so its increase is the divergence from
the float model. One forward and one backward pass, a block at a time, measure every layer with
every number of bits; then each bit goes where it helps most (Shoham and Gersho, 1988,
https://doi.org/10.1109/29.90373).

Each token is treated by itself, although attention combines the errors that a layer makes at
several tokens. The result, in nats per token, is therefore approximate, within a factor of two or
so of the measured divergence on small models. It ranks layers; it does not predict what the model
loses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from finequant.finetune.architecture import EMBEDDING, layer_shapes
from finequant.finetune.device import arithmetic_dtype, device
from finequant.quantize.checkpoint.blocks import decoder_block, embed, norm_and_head, rotary_of
from finequant.quantize.checkpoint.reading import WHOLE, Weights
from finequant.quantize.methods.sequences import calibration_sequences
from finequant.quantize.rounding import round_to_nearest
from finequant.quantize.scheme import (
    CANDIDATES,
    LayerScheme,
    Plan,
    as_layers,
    bits_per_weight,
    layer_plan,
    packed_bits,
    undecided,
)
from finequant.recipes.schema import Quantize, Recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.architecture import DecoderConfig

TOKENS = 2048
"""Maximum number of tokens to measure on, all in one pass."""

LossIncreases = dict[str, dict[int, float]]
"""Sensitivity: the increase of the loss, in nats per token, by layer and bits. It is approximate,
but good for ranking layers."""

Seen = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Inputs [rows, length, in] and gradients of outputs [rows, length, out], by linear layer."""


def within_budget(
    recipe: Recipe,
    weights: Weights,
    config: DecoderConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> Recipe:
    """Replaces a recipe's budget by `quantize.layers`; without a budget, returns it unchanged.

    weights: the float model's, read a decoder block at a time.
    dtype: the shipped model's; where the processor only emulates it, float32 takes its place.

    Raises:
        UserError: if there is nothing to measure on.
    """
    quantize = recipe.quantize
    if quantize.budget is None:
        return recipe
    plan = layer_plan(quantize, config)
    free = {name: plan[name] for name in undecided(quantize, plan)}
    sequences = calibration_sequences(recipe, tokenizer, quantize.calibration.tokens)
    sequences = sequences[: max(1, TOKENS // sequences.shape[1])]
    say(f"quantize: measuring how sensitive {len(free)} layers are, on {sequences.numel()} tokens")
    arithmetic = arithmetic_dtype(dtype)
    loss_increases = sensitivity(weights, config, sequences, free, arithmetic, recipe.seed)
    shapes = layer_shapes(config)
    counts = {name: math.prod(shapes[name]) for name in free}
    bits = allocate(loss_increases, counts, _allowance(quantize, plan, free, config))
    plan |= {name: scheme._replace(bits=bits[name]) for name, scheme in free.items()}
    chosen = ", ".join(f"{count} at {b}" for b, count in sorted(Counter(bits.values()).items()))
    say(f"quantize: {bits_per_weight(plan, config):.3f} bits per weight; layers: {chosen}")
    planned = quantize.model_dump() | {"layers": as_layers(plan), "budget": None}
    return recipe.model_copy(update={"quantize": Quantize.model_validate(planned)})


def sensitivity(
    weights: Weights,
    config: DecoderConfig,
    sequences: torch.Tensor,
    schemes: dict[str, LayerScheme],
    dtype: torch.dtype,
    seed: int,
) -> LossIncreases:
    """Estimates the cost of rounding each layer by itself, to nearest.

    sequences: token ids [rows, length].
    dtype: the dtype of the arithmetic.
    """
    count, inputs = config.num_hidden_layers, []
    where = device()
    with torch.no_grad():
        hidden = embed(weights, sequences).to(where, dtype)
        rotary = {"position_embeddings": rotary_of(config, hidden)}
        for number in range(count):
            inputs.append(hidden)
            block = decoder_block(config, number, weights, dtype).to(where)
            hidden = block(hidden, **rotary)
    top = norm_and_head(config, weights, dtype).to(where)
    seen, gradient = _backward(top, hidden, lambda logits: _drawn_gradient(logits, seed))
    loss_increases = _loss_increases(weights, "", seen, schemes)
    del top
    for number in reversed(range(count)):
        block = decoder_block(config, number, weights, dtype).to(where)
        seen, gradient = _backward(block, inputs.pop(), lambda _, above=gradient: above, **rotary)
        loss_increases |= _loss_increases(weights, f"model.layers.{number}.", seen, schemes)
    return {name: loss_increases[name] for name in schemes}


def _backward(
    block: torch.nn.Module,
    hidden: torch.Tensor,
    loss_gradient: Callable[[torch.Tensor], torch.Tensor],
    **arguments,
) -> tuple[Seen, torch.Tensor]:
    """Returns the linear layers' inputs and output gradients, and the gradient of `hidden`.

    loss_gradient: called with the block's output; returns the loss's gradient with respect to it.
    """
    inputs, outputs = {}, {}

    def keep(name: str, module_inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        inputs[name], outputs[name] = module_inputs[0].detach(), output

    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, *tensors, name=name: keep(name, *tensors))
    hidden = hidden.detach().requires_grad_()
    output = block(hidden, **arguments)
    grad_hidden, *grad_outputs = torch.autograd.grad(
        output, [hidden, *outputs.values()], loss_gradient(output.detach())
    )
    pairs = zip(inputs.items(), grad_outputs, strict=True)
    return {name: (x, gradient) for (name, x), gradient in pairs}, grad_hidden


def _drawn_gradient(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Computes the gradient of the summed loss for tokens drawn from the logits [rows, length,
    vocabulary]."""
    probabilities = logits.float().softmax(-1)
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
    drawn = drawn.view(*logits.shape[:2], 1)
    minus_one = probabilities.new_full(drawn.shape, -1.0)
    return probabilities.scatter_add_(-1, drawn, minus_one).to(logits.dtype)


@torch.no_grad()
def _loss_increases(
    weights: Weights, prefix: str, seen: Seen, schemes: dict[str, LayerScheme]
) -> LossIncreases:
    """Estimates what rounding each layer in `seen` to each number of bits costs, by half the mean
    of (g . dW x)^2; `prefix` comes before the names in the plan."""
    loss_increases: LossIncreases = {}
    for name, (x, gradient) in seen.items():
        if scheme := schemes.get(prefix + name):
            weight = weights(f"{prefix}{name}.weight", WHOLE).to(x.device).float()
            loss_increases[prefix + name] = {}
            for bits in CANDIDATES:
                rounded = round_to_nearest(weight, *scheme._replace(bits=bits))
                error = rounded.dequantize(torch.float32).sub_(weight).to(x.dtype)
                change = linear(x, error).float().mul_(gradient).sum(-1)
                loss_increases[prefix + name][bits] = change.square().mean().item() / 2
    return loss_increases


def allocate(
    loss_increases: LossIncreases, weights: dict[str, int], allowance: float
) -> dict[str, int]:
    """Chooses the bits of each layer: starts from the fewest, and always takes the step that lowers
    the summed loss increase most per bit.

    weights: the number of weights in each layer.
    allowance: bits for all codes together.
    """
    chosen = {name: min(options) for name, options in loss_increases.items()}
    left = allowance - sum(weights[name] * bits for name, bits in chosen.items())
    while True:
        steps = []
        for name, options in loss_increases.items():
            for bits, increase in options.items():
                cost = weights[name] * (bits - chosen[name])
                if 0 < cost <= left:
                    steps.append(((options[chosen[name]] - increase) / cost, name, bits))
        gain, name, bits = max(steps, default=(0.0, "", 0))
        if gain <= 0:
            return chosen
        left -= weights[name] * (bits - chosen[name])
        chosen[name] = bits


def _allowance(
    quantize: Quantize, plan: Plan, free: Collection[str], config: DecoderConfig
) -> float:
    """Computes how many bits the budget leaves for the codes of all free layers together."""
    shapes = layer_shapes(config)
    rounded = [name for name in plan if plan[name] and name != EMBEDDING]
    decided = plan | {name: plan[name]._replace(bits=0) for name in free}
    total = sum(rows * columns for rows, columns in map(shapes.get, rounded))
    return quantize.budget * total - sum(packed_bits(shapes[n], decided[n]) for n in rounded)
