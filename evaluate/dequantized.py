"""The quantized model for measuring: weights dequantized once, activations as ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from finequant.quantize.rounding import quantize_activations
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def dequantize_once(model: LlamaForCausalLM, prompt: list[int]) -> LlamaForCausalLM:
    """Replaces integer weights by the floats that torchao makes of them at each forward, in place.

    The arithmetic is the same, so are the logits of `prompt`, bit for bit: that is checked.

    Raises:
        UserError: if the logits differ, which would mean to measure another model.
    """
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        expected = model(ids).logits
    quantize_inputs = _quantizing_hook()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "qdata"):
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
            if weight.activation_quantization:  # not so for an embedding
                module.register_forward_pre_hook(quantize_inputs)
    with torch.inference_mode():
        actual = model(ids).logits
    # Two bits can leave a model whose logits are no numbers: these are equal, too.
    if not torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True):
        raise UserError("evaluate: the dequantized model differs from the quantized one: torchao?")
    return model


def _quantizing_hook() -> Callable[..., tuple[torch.Tensor, ...]]:
    """Quantizes a layer's input once for all layers in turn that get the same: q, k and v."""
    last = quantized = None

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal last, quantized
        if inputs[0] is not last:
            last, quantized = inputs[0], quantize_activations(inputs[0])
        return (quantized, *inputs[1:])

    return hook
