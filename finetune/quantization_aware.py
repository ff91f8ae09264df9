"""Quantization-aware LoRA on the merged weight: y = Qa(x) Qw(W + s B A)^T.

The forward is that of the model that will be shipped; others train Qw(W) x + s B A x, a model
that nobody ships. Gradients pass the rounding unchanged, so those of A and B need products of
rank r only and no gradient of W is ever formed: a step costs little more than one of plain LoRA.

It starts from the codes of the recipe's method, gptq's best of all, and keeps their scales. Each
weight keeps its place between two codes as well, as far as that is inside its own code's cell:

    code = round(start + clamp(W / scale - start, -1/2, 1/2) + s B A / scale)

So the first forward is exactly the calibrated model, and yet the smallest change of the adapter
can move the weights that lie near an edge. (With codes alone it would have to cross half a step
before anything changes, and with W alone all that calibration found would be lost.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.nn.functional import linear
from transformers import TrainerCallback

from finequant.quantize.rounding import Rounded, code_range, quantize_activations, row_chunks

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
"""peft's name for the one adapter of a model."""

INSIDE = 0.499
"""Of a step: how far from its code a weight may lie; less than a half, so that it rounds to it."""


class _StraightThrough(torch.autograd.Function):
    """Forward through rounded activations and weight, backward as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, x, a, b, weight, scaling):
        x = quantize_activations(x.to(weight.dtype))
        ctx.save_for_backward(x, a, b, weight)
        ctx.scaling = scaling
        return linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, a, b, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        if a is None:
            return of_x, None, None, None, None
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        of_a = (gradient @ b.to(x.dtype)).T @ x * ctx.scaling
        of_b = gradient.T @ (x @ a.to(x.dtype).T) * ctx.scaling
        return of_x, of_a.to(a.dtype), of_b.to(b.dtype), None, None


class _Rounding:
    """Mixed into a linear layer's class: its rounded weight, made once for every optimizer step."""

    def start(self, rounded: Rounded, bits: int, dtype: torch.dtype) -> None:
        """Starts from these codes; `dtype` is that of the shipped arithmetic."""
        device = self.weight.device
        self._start = Rounded(*(tensor.to(device) for tensor in rounded))
        self._bits, self._dtype = bits, dtype
        self._weight = self._made_of = None
        self.rounds = False

    def rounded_weight(self) -> torch.Tensor:
        """[out, in], as the shipped model dequantizes it."""
        if self._made_of != self._adapter_version():
            self._weight = self.rounded().dequantize(self._dtype)
            self._made_of = self._adapter_version()
        return self._weight


class RoundedLinear(_Rounding, torch.nn.Linear):
    """A layer without adapter, the head: its codes stay."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounds:
            return super().forward(x)
        return _StraightThrough.apply(x, None, None, self.rounded_weight(), 0.0)

    def rounded(self) -> Rounded:
        return self._start

    def _adapter_version(self) -> tuple[int, ...]:
        return (0,)


class RoundedLora(_Rounding, LoraLinear):
    """peft's LoRA layer, its forward replaced by that of the merged and rounded weight."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not self.rounds:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return _StraightThrough.apply(x, a, b, self.rounded_weight(), self.scaling[ADAPTER])

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """Codes and scales of the merged weight."""
        base, start = self.get_base_layer().weight, self._start
        a = self.lora_A[ADAPTER].weight.float()
        b = self.lora_B[ADAPTER].weight.float() * self.scaling[ADAPTER]
        codes, shape = torch.empty_like(start.codes), (start.scale.shape[1], -1)
        limits = code_range(self._bits)
        with torch.autocast(base.device.type, enabled=False):
            for rows in row_chunks(base):
                step = start.scale[rows].float().reciprocal()[:, :, None]
                first = start.codes[rows].float().unflatten(1, shape)
                moved = base[rows].float().unflatten(1, shape) * step
                moved = moved.sub_(first).clamp_(-INSIDE, INSIDE).add_(first)
                moved.add_((b[rows] @ a).unflatten(1, shape).mul_(step))
                codes[rows] = moved.round_().clamp_(*limits).flatten(1).to(torch.int8)
        return Rounded(codes, start.scale)

    def _adapter_version(self) -> tuple[int, ...]:
        weights = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return tuple(
            number for weight in weights for number in (weight.data_ptr(), weight._version)
        )


class RoundFrom(TrainerCallback):
    """Switches rounding on once so many optimizer steps are done, also in a resumed run."""

    def __init__(self, layers: dict[str, _Rounding], steps: int) -> None:
        self._layers, self._steps = layers, steps

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step >= self._steps:
            for layer in self._layers.values():
                layer.rounds = True


def round_in_training(
    model: PeftModel, start: dict[str, Rounded], bits: int, dtype: torch.dtype
) -> dict[str, _Rounding]:
    """Makes the layers that `start` names round in training; rounding is still switched off.

    Their classes are exchanged, so that peft saves, loads and counts them as before.
    """
    layers = {}
    for name, rounded in start.items():
        layer = model.get_base_model().get_submodule(name)
        layer.__class__ = RoundedLora if isinstance(layer, LoraLinear) else RoundedLinear
        layer.start(rounded, bits, dtype)
        layers[name] = layer
    return layers
