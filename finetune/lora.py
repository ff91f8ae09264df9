"""LoRA's product, y = W x + s B A x, in one step, forward and backward.

peft's layer makes six passes over the output for it, and casts A and B each time; beside products
of a small rank those take most of the time on a CPU. On a GPU a step of 8B is 15 % faster without
them, and takes 9 GB less. Not for sharded weights: they are gathered by the forward of peft's
modules, which is not called.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.nn.functional import linear

from finequant.finetune.device import product

ADAPTER = "default"
"""peft's name for the one adapter of a model."""


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, weight, scaling):
        a, b = a.to(weight.dtype), b.to(weight.dtype)
        rows = x.to(weight.dtype).flatten(0, -2)
        inner = linear(rows, a)
        y = linear(rows, weight)
        y.addmm_(inner, b.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, a, b, weight)
        ctx.scaling = scaling
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, gradient):
        rows, inner, a, b, weight = ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.to(weight.dtype).flatten(0, -2)
        of_inner = (gradient @ b).mul_(ctx.scaling)
        of_a, of_b = of_inner.T @ rows, (gradient.T @ inner).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = product(gradient, weight)
            of_x = of_x.addmm_(of_inner, a).unflatten(0, shape[:-1])
        return of_x, of_a.float(), of_b.float(), None, None


class FusedLora(LoraLinear):
    """peft's LoRA layer with the product above."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return _Product.apply(x, a, b, self.get_base_layer().weight, self.scaling[ADAPTER])


def fuse(model: torch.nn.Module) -> None:
    """Exchanges the class of peft's plain LoRA layers; those with dropout, DoRA or bias stay."""
    for layer in model.modules():
        if type(layer) is LoraLinear and _is_plain(layer):
            layer.__class__ = FusedLora


def _is_plain(layer: LoraLinear) -> bool:
    return (
        isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and layer.get_base_layer().bias is None
    )
