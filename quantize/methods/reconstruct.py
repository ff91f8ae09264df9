"""Trains a block's codes and scales to give the float block's outputs.

GPTQ rounds each layer by itself. Here all layers of one decoder block are trained together, for a
few dozen steps, to find the better of two neighboring codes for each weight (the first phase of
https://arxiv.org/abs/2407.11062). Memory holds one block, its gradients and Adam's moments.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from finequant.finetune.processes import add_up, add_up_gradients, gathered, share
from finequant.quantize.rounding import (
    Rounded,
    code_range,
    latent_weights,
    quantize_activations,
    stored_scale,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finequant.quantize.checkpoint.blocks import Rotary
    from finequant.quantize.scheme import LayerScheme

LEARNING_RATE = 0.002
"""Learning rate of the latent weights, in steps of their scale."""

SCALE_LEARNING_RATE = 1e-3
"""Learning rate of the scales, relative to each scale."""

TOKENS = 1024
"""Tokens of an optimizer step."""


class _Round(torch.autograd.Function):
    """Fake-quantizes latent weights [out, groups, size], with scales x factors, to [out, in]."""

    @staticmethod
    def forward(ctx, latent_weights, factor, scale, scale_dtype, bits, dtype):
        low, high = code_range(bits)
        codes = latent_weights.round().clamp_(low, high)
        scaled = stored_scale(scale * factor, scale_dtype).float()  # as it ships
        ctx.save_for_backward(latent_weights, codes, scaled)
        ctx.scale, ctx.limits = scale, (low, high)
        return codes.mul(scaled[:, :, None]).to(dtype).flatten(1)

    @staticmethod
    def backward(ctx, gradient):
        latent_weights, codes, scale = ctx.saved_tensors
        low, high = ctx.limits
        gradient = gradient.float().unflatten(1, (scale.shape[1], -1))
        grad_factor = (gradient * codes).sum(-1).mul_(ctx.scale)
        inside = (latent_weights > low - 0.5) & (latent_weights < high + 0.5)
        return gradient.mul(scale[:, :, None]).mul_(inside), grad_factor, None, None, None, None


class TrainedLayer:
    """The trained parameters of a linear layer: its latent weights, and factors of its scales."""

    def __init__(self, weight: torch.Tensor, start: Rounded, scheme: LayerScheme) -> None:
        """Takes the float model's weight [out, in], and the codes and scales to start from."""
        self._bits, self._scale_dtype = scheme.bits, start.scale.dtype
        self._scale = start.scale.float()
        latent = latent_weights(weight, start, torch.float32)
        self.latent_weights = latent.unflatten(1, (self._scale.shape[1], -1)).requires_grad_()
        self.factor = torch.ones_like(self._scale).requires_grad_()

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        return _Round.apply(
            self.latent_weights, self.factor, self._scale, self._scale_dtype, self._bits, dtype
        )

    def rounded(self) -> Rounded:
        codes = self.latent_weights.detach().round().clamp_(*code_range(self._bits))
        scale = stored_scale(self._scale * self.factor.detach(), self._scale_dtype)
        return Rounded(codes.flatten(1).to(torch.int8), scale)


def reconstruct(
    block: torch.nn.Module,
    layers: dict[str, TrainedLayer],
    inputs: list[torch.Tensor],
    targets: list[torch.Tensor],
    rotary: Rotary,
    steps: int,
) -> dict[str, Rounded]:
    """Trains a block's layers, and returns their codes and scales.

    block: the float block, in the dtype of the shipped arithmetic.
    layers: by their names inside the block.
    inputs, targets: hidden states [rows, tokens, hidden] of this process's share of all rows: the
        outputs of the quantized blocks before this one, and of the float block.
    """
    modules = {name: block.get_submodule(name) for name in layers}
    for name, module in modules.items():
        module.forward = partial(_product, layer=layers[name], bias=module.bias)
    latent_weights = [layer.latent_weights for layer in layers.values()]
    factors = [layer.factor for layer in layers.values()]
    optimizer = torch.optim.Adam(
        [
            {"params": latent_weights, "lr": LEARNING_RATE},
            {"params": factors, "lr": SCALE_LEARNING_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    with torch.enable_grad():
        for hidden, exact, tokens in _batches(inputs, targets, steps):
            # The error is relative to each token's power, as it is to the norms that follow: some
            # tokens' power is very large, and that of a padding token is zero.
            power = exact.float().square().sum(-1)
            total = power.sum()
            add_up([total])
            if len(hidden):
                output = block(hidden, position_embeddings=rotary)
                error = (output.float() - exact.float()).square().sum(-1)
                (error / (power + 1e-6 * total / tokens)).sum().div(tokens).backward()
            add_up_gradients(latent_weights + factors)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for module in modules.values():
        del module.forward
    return {name: layer.rounded() for name, layer in layers.items()}


def _batches(
    inputs: list[torch.Tensor], targets: list[torch.Tensor], steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yields for each step this process's rows of inputs and targets, perhaps none, and the step's
    number of tokens in all processes."""
    hidden, exact = ([row for batch in states for row in batch] for states in (inputs, targets))
    none, length = inputs[0][:0], inputs[0].shape[1]
    count = sum(gathered(len(hidden)))
    numbers, rows = share(range(count)), max(1, TOKENS // length)
    starts = range(0, count, rows)
    for step in range(steps):
        first = starts[step % len(starts)]
        last = min(first + rows, count)
        mine = slice(bisect_left(numbers, first), bisect_left(numbers, last))
        pair = (torch.cat([none, *(row[None] for row in part[mine])]) for part in (hidden, exact))
        yield *pair, (last - first) * length


def _product(x: torch.Tensor, layer: TrainedLayer, bias: torch.Tensor | None) -> torch.Tensor:
    """Computes a layer's output with activations rounded as in the shipped model; their gradient
    passes the rounding unchanged."""
    rounding = quantize_activations(x.detach()) - x.detach()
    return linear(x + rounding, layer.weight(x.dtype), bias)
