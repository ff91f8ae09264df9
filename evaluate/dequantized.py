"""Speeds up measuring a quantized model: its weights are dequantized once, not at each forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from finequant.finetune.device import device
from finequant.quantize.rounding import SharedInputs
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from finequant.finetune.architecture import Decoder

CHECKED_TOKENS = 32
"""Tokens of the prompt to check: few are enough, as each goes through every layer. Where the
processor emulates bfloat16, a whole window would take longer than the perplexity itself."""


def dequantize_once(model: Decoder, prompt: list[int]) -> Decoder:
    """Moves a quantized model to the GPU, if there is one, and replaces integer weights, in place,
    with the floats that torchao computes at each forward.

    The arithmetic stays the same, so the logits must be identical; this is checked on the first
    tokens of the prompt.

    Raises:
        UserError: if the logits differ, because then another model would be measured.
    """
    _move(model)
    ids = torch.tensor([prompt[:CHECKED_TOKENS]], device=model.device)
    with torch.inference_mode():
        expected = model(ids).logits
    quantizing = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "qdata"):
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
            if weight.activation_quantization:  # an embedding has none
                quantizing.append(module)
    quantize_inputs(quantizing)
    with torch.inference_mode():
        actual = model(ids).logits
    # At two bits, logits can be NaN: NaNs in the same positions count as equal.
    if not torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True):
        raise UserError(
            "evaluate: the dequantized model's logits differ from the quantized model's: install "
            "the versions in constraints.txt, as another torchao may compute differently"
        )
    return model


def _move(model: Decoder) -> None:
    """Moves a quantized model to the GPU, if there is one, and keeps its scales as they ship:
    torchao 0.18 rounds them to the model's dtype wherever a model is moved to, even to the CPU."""
    weights = [getattr(module, "weight", None) for module in model.modules()]
    scales = [getattr(weight, "scale", None) for weight in weights]
    model.to(device())
    for module, scale in zip(model.modules(), scales, strict=True):
        if scale is not None:
            module.weight.scale = scale.to(device())


def quantize_inputs(modules: Iterable[torch.nn.Module]) -> None:
    """Makes layers quantize their inputs to int8, per token; a shared input is quantized once."""
    shared = SharedInputs()
    for module in modules:
        module.register_forward_pre_hook(lambda _, inputs: (shared(inputs[0]), *inputs[1:]))
