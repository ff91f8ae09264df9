"""Quantization-aware LoRA on the merged weight: y = Qa(x) Qw(W + s B A)^T.

The forward is that of the model that will be shipped; others train Qw(W) x + s B A x, a model
that nobody ships. Gradients pass the rounding unchanged, so those of A and B need products of
rank r only and no gradient of W is ever formed: a step costs little more than one of plain LoRA.

It starts from the codes of the recipe's method, gptq's best of all, and keeps their scales. Each
weight keeps its place between two codes as well, as far as that is inside its own code's cell:

    code = round(place + s B A / scale),  place = start + clamp(W / scale - start, -1/2, 1/2)

So the first forward is exactly the calibrated model, and yet the smallest change of the adapter
can move the weights that lie near an edge. (With codes alone it would have to cross half a step
before anything changes, and with W alone all that calibration found would be lost.)

Or the codes stay and the scales learn (the second phase of https://arxiv.org/abs/2407.11062): what
calibration found stays as well, for which an adapter's moves across edges are noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch.nn.functional import embedding, linear

from finequant.quantize.rounding import (
    Rounded,
    code_range,
    places,
    quantize_activations,
    row_chunks,
)

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel

    from finequant.quantize.scheme import Plan

SCALES = "scales.safetensors"
"""In a checkpoint."""

ADAPTER = "default"
"""peft's name for the one adapter of a model."""


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


class _LearnedScale(torch.autograd.Function):
    """Forward through rounded activations and weight, backward to the layer's scales."""

    @staticmethod
    def forward(ctx, x, growth, layer):
        weight = layer.rounded_weight()
        x = quantize_activations(x.to(weight.dtype))
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2).T.contiguous()
        return of_x, ctx.layer.gradient_of_growth(gradient, x), None


class Rounding:
    """Mixed into a linear layer's class: its rounded weight, made once for every optimizer step."""

    def start(self, rounded: Rounded, bits: int, dtype: torch.dtype) -> None:
        """Starts from these codes; `dtype` is that of the shipped arithmetic."""
        self._scale = rounded.scale.to(self.weight.device)
        self._bits, self._dtype = bits, dtype
        self._place = self._first_places(rounded)
        self._weight = self._made_of = None
        self.rounds = True

    def _first_places(self, rounded: Rounded) -> torch.Tensor:
        """[out, in], in steps of the scale."""
        # From 7 bits on float16 cannot tell the places beside the largest codes apart.
        dtype = torch.float16 if self._bits <= 6 else torch.float32
        return places(self.weight, rounded, dtype)

    def rounded_weight(self) -> torch.Tensor:
        """[out, in], as the shipped model dequantizes it."""
        if self._made_of != self._adapter_version():
            weight = torch.empty_like(self._place, dtype=self._dtype)
            for rows, codes in self._codes():
                scale = self._scales(rows)[:, :, None]
                weight[rows] = codes.unflatten(1, (scale.shape[1], -1)).mul_(scale).flatten(1)
            self._weight, self._made_of = weight, self._adapter_version()
        return self._weight

    def rounded(self) -> Rounded:
        """Codes and scales of the merged weight."""
        codes = torch.empty_like(self._place, dtype=torch.int8)
        for rows, some in self._codes():
            codes[rows] = some.to(torch.int8)
        scale = self._scales(slice(None)).to(self._scale.dtype)
        return Rounded(codes.cpu(), scale.cpu())

    @torch.no_grad()
    def _codes(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some rows at a time, and their codes as float32."""
        limits = code_range(self._bits)
        with torch.autocast(self._place.device.type, enabled=False):
            for rows in row_chunks(self._place):
                yield rows, self._moved(rows).round_().clamp_(*limits)

    def _moved(self, rows: slice) -> torch.Tensor:
        """Where the adapter has moved these rows, in steps of their scales."""
        return self._place[rows].float()

    def _scales(self, rows: slice) -> torch.Tensor:
        """float32 [rows, groups], of the dtype's values that are shipped."""
        return self._scale[rows].float()

    def _adapter_version(self) -> tuple[int, ...]:
        return (0,)


class RoundedLinear(Rounding, torch.nn.Linear):
    """A layer without adapter, the head: its codes stay."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounds:
            return super().forward(x)
        return _StraightThrough.apply(x, None, None, self.rounded_weight(), 0.0)


class RoundedEmbedding(Rounding, torch.nn.Embedding):
    """Weight-only: its codes stay."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return embedding(ids, self.rounded_weight()) if self.rounds else super().forward(ids)


class RoundedLora(Rounding, LoraLinear):
    """peft's LoRA layer, its forward replaced by that of the merged and rounded weight."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not self.rounds:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return _StraightThrough.apply(x, a, b, self.rounded_weight(), self.scaling[ADAPTER])

    def _moved(self, rows: slice) -> torch.Tensor:
        b = self.lora_B[ADAPTER].weight[rows].float() * self.scaling[ADAPTER]
        delta = b @ self.lora_A[ADAPTER].weight.float()
        steps = self._scale[rows].float().reciprocal()[:, :, None]
        delta.unflatten(1, (steps.shape[1], -1)).mul_(steps)
        return delta.add_(self._place[rows])

    def _adapter_version(self) -> tuple[int, ...]:
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return a.data_ptr(), a._version, b.data_ptr(), b._version


class LearnedScales(Rounding):
    """Mixed in before the classes above: the codes stay, and the scale of each group learns."""

    def start(self, rounded: Rounded, bits: int, dtype: torch.dtype) -> None:
        super().start(rounded, bits, dtype)
        # What each scale grows by, as a share of it.
        self.growth = torch.nn.Parameter(torch.zeros_like(self._scale, dtype=torch.float32))

    def _first_places(self, rounded: Rounded) -> torch.Tensor:
        return rounded.codes.to(self.weight.device)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not self.rounds:
            return super().forward(x, *args, **kwargs)
        return _LearnedScale.apply(x, self.growth, self)

    def gradient_of_growth(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[out, groups], for the layer's output [out, tokens] and its input [tokens, in]."""
        found = torch.empty_like(self.growth)
        for rows, codes in self._codes():
            of_weight = (gradient[rows] @ x).float()
            of_scale = (of_weight * codes).unflatten(1, (found.shape[1], -1)).sum(-1)
            found[rows] = of_scale * self._scale[rows].float()
        return found

    def _moved(self, rows: slice) -> torch.Tensor:
        return Rounding._moved(self, rows)  # not by the adapter

    @torch.no_grad()
    def _scales(self, rows: slice) -> torch.Tensor:
        scale = self._scale[rows].float() * (1 + self.growth[rows])
        return scale.to(self._scale.dtype).float()

    def _adapter_version(self) -> tuple[int, ...]:
        return self.growth.data_ptr(), self.growth._version


class LoraWithScales(LearnedScales, RoundedLora):
    """A layer whose adapter stays as it is, zero."""


class LinearWithScales(LearnedScales, RoundedLinear):
    """The head."""


KINDS = {
    "adapter": {LoraLinear: RoundedLora, torch.nn.Linear: RoundedLinear},
    "scales": {LoraLinear: LoraWithScales, torch.nn.Linear: LinearWithScales},
}


def round_in_training(
    model: PeftModel,
    start: dict[str, Rounded],
    plan: Plan,
    dtype: torch.dtype,
    learns: str = "adapter",
) -> dict[str, Rounding]:
    """Makes the layers that `start` names compute with rounded weights; all others, in `dtype`.

    model: of float32 weights, of which the places between two codes are kept. The layers'
    classes are exchanged, so that peft saves, loads and counts them as before.
    learns: "adapter" or "scales"; the others stay.
    """
    if learns == "scales":
        model.requires_grad_(False)
    layers = {}
    for name, rounded in start.items():
        layer = model.get_base_model().get_submodule(name)
        layer.__class__ = {**KINDS[learns], torch.nn.Embedding: RoundedEmbedding}[type(layer)]
        layer.start(rounded, plan[name].bits, dtype)
        layers[name] = layer
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)
    return layers


def save_scales(model: torch.nn.Module, folder: Path) -> None:
    """Writes what the scales have grown by, if they learn: peft saves adapters only."""
    if growth := _growths(model):
        save_file({name: weight.detach().cpu() for name, weight in growth.items()}, folder / SCALES)


def load_scales(model: torch.nn.Module, folder: Path) -> None:
    if growth := _growths(model):
        saved = load_file(folder / SCALES)
        with torch.no_grad():
            for name, weight in growth.items():
                weight.copy_(saved[name])


def _growths(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    layers = model.named_modules()
    return {name: layer.growth for name, layer in layers if isinstance(layer, LearnedScales)}


def keep_float_layers(model: PeftModel) -> None:
    """Trains no layer that the plan leaves in float: what ships there is the tuned model's."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and not isinstance(layer, Rounding):
            layer.requires_grad_(False)


@contextmanager
def not_rounded(layers: Iterable[Rounding]) -> Iterator[None]:
    """Inside, the layers compute as those of plain LoRA do."""
    for layer in layers:
        layer.rounds = False
    yield
    for layer in layers:
        layer.rounds = True
