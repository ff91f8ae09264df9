"""The quantized model for measuring: weights dequantized once, activations as ever."""

from __future__ import annotations

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
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "qdata"):
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
            if weight.activation_quantization:  # not so for an embedding
                module.register_forward_pre_hook(_quantize_inputs)
    with torch.inference_mode():
        actual = model(ids).logits
    # Two bits can leave a model whose logits are no numbers: these are equal, too.
    if not torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True):
        raise UserError("evaluate: the dequantized model differs from the quantized one: torchao?")
    return model


def _quantize_inputs(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return (quantize_activations(inputs[0]), *inputs[1:])
