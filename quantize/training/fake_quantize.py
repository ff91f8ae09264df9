"""Trainable layers that compute exactly as the shipped model's do: y = Qa(x) Qw^T + bias.

Other tools train Qw(W) x + s B A x, a model that nobody ships. Here, one of two things is trained:

- A LoRA moves the weights from code to code. Gradients pass the rounding unchanged (the
  straight-through estimator, https://arxiv.org/abs/1308.3432), so the gradients of A and B need
  only products of rank r, and no gradient of W is ever formed. Training starts from the codes of
  the recipe's method and keeps their scales. Each weight also keeps its latent value, clamped to
  the cell of its code:

      code = round(latent + s B A / scale),  latent = start + clamp(W / scale - start, -0.49, 0.49)

  So the first forward pass is exactly that of the calibrated model, and yet the smallest change of
  the adapter can move weights that lie near the edge of a cell. (With codes alone, the adapter
  would have to cross half a step before anything changed; with W alone, all that calibration found
  would be lost.)

- The scale of each group is trained, and the codes stay fixed (the second phase of EfficientQAT,
  https://arxiv.org/abs/2407.11062; the gradient is that of LSQ, https://arxiv.org/abs/1902.08153).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import embedding, linear

from finequant.finetune.device import product
from finequant.finetune.processes import whole
from finequant.quantize.rounding import Rounded, SharedInputs, code_range, row_chunks, stored_scale

_shared_inputs = SharedInputs()


class _StraightThrough(torch.autograd.Function):
    """Forward through quantized activations and weight, backward as if nothing were rounded."""

    @staticmethod
    def forward(ctx, x, a, b, weight, bias, scaling):
        x = _shared_inputs(x.to(weight.dtype))
        ctx.save_for_backward(x, a, b, weight)
        ctx.scaling = scaling
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, a, b, weight = ctx.saved_tensors
        grad_x = product(gradient, weight) if ctx.needs_input_grad[0] else None
        if a is None:
            return grad_x, None, None, None, None, None
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        grad_a = (gradient @ b.to(x.dtype)).T @ x * ctx.scaling
        grad_b = gradient.T @ (x @ a.to(x.dtype).T) * ctx.scaling
        return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None, None


class _LearnedScale(torch.autograd.Function):
    """Forward through quantized activations and weight, backward to the layer's scales."""

    @staticmethod
    def forward(ctx, x, scale_delta, weight, layer):
        x = _shared_inputs(x.to(weight.dtype))
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return linear(x, weight, layer.bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        grad_x = product(gradient, weight) if ctx.needs_input_grad[0] else None
        x, gradient = x.flatten(0, -2), gradient.flatten(0, -2).T.contiguous()
        return grad_x, ctx.layer.gradient_of_delta(gradient, x), None, None


class FakeQuantized(torch.nn.Module):
    """Holds codes and scales as they will ship, in place of a weight [out, in], and trains nothing.

    start: the codes and scales to start from.
    dtype: the dtype of the shipped model's arithmetic.
    float_weight: the teacher's weight [out, in], used while fake quantization is disabled.

    All tensors are parameters, most of them frozen, because FSDP shards only parameters, by rows.

    Every forward pass computes the weight anew. It is not cached, because not every optimizer marks
    the parameters that it changes (torch's fused AdamW leaves `Tensor._version` as it is).
    """

    def __init__(
        self,
        start: Rounded,
        bits: int,
        dtype: torch.dtype,
        float_weight: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.dtype, self.enabled = bits, dtype, True
        self.latent, self.scale = _frozen(start.codes), _frozen(start.scale)
        self.register_parameter("float_weight", _frozen(float_weight))

    @torch.no_grad()
    def weight(self) -> torch.Tensor:
        """Computes the weight [out, in] as the shipped model dequantizes it."""
        weight = torch.empty_like(self.latent, dtype=self.dtype)
        for rows, codes in self.codes():
            scale = self.scales(rows)[:, :, None]
            weight[rows] = codes.unflatten(1, (scale.shape[1], -1)).mul_(scale).flatten(1)
        return weight

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """Returns codes and scales as they ship, on the CPU. All processes have to call it, because
        each may hold only a part of the layer."""
        with _gathered(self):
            codes = self.latent.detach()
            if codes.dtype != torch.int8:  # an adapter moves them
                codes = torch.empty_like(codes, dtype=torch.int8)
                for rows, part in self.codes():
                    codes[rows] = part.to(torch.int8)
            scale = self.scales(slice(None)).to(self.scale.dtype)
            return Rounded(codes.cpu(), scale.cpu())

    @torch.no_grad()
    def codes(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields slices of rows, each with the rows' codes as float32."""
        for rows in row_chunks(self.latent):
            yield rows, self.latent_rows(rows).round_().clamp_(*code_range(self.bits))

    def latent_rows(self, rows: slice) -> torch.Tensor:
        """Returns a copy of the rows' latent weights as training has moved them: float32, in steps
        of their scales."""
        return self.latent[rows].to(torch.float32, copy=True)

    def scales(self, rows: slice) -> torch.Tensor:
        """Returns float32 scales [rows, groups], all of them values of the dtype that ships."""
        return self.scale[rows].float()


class FakeQuantEmbedding(FakeQuantized):
    """An embedding with rounded weights; nothing in it is trained."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return embedding(ids, self.weight() if self.enabled else self.float_weight)


class FakeQuantLinear(FakeQuantized):
    """A linear layer with int8 dynamic activations; nothing in it is trained."""

    def __init__(self, *args, bias: torch.Tensor | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_parameter("bias", _frozen(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():  # no weight has to be formed for that
            return x.new_empty(*x.shape[:-1], self.latent.shape[0])
        if not self.enabled:
            return linear(x, self.float_weight, self.bias)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the shipped layer's output [..., out] for its input [..., in]."""
        return _StraightThrough.apply(x, None, None, self.weight(), self.bias, 0.0)


def latent_dtype(bits: int) -> torch.dtype:
    """Returns the dtype of latent weights: from 7 bits on, float16 is too coarse for those near the
    largest codes."""
    return torch.float16 if bits <= 6 else torch.float32


class FakeQuantLora(FakeQuantLinear):
    """A layer whose latent weights are moved by a LoRA.

    latent: what the LoRA moves, [out, in], in steps of the scales; see `latent_dtype`.
    scaling: s of s B A.
    generator: draws the values of A; B starts at zero.
    """

    def __init__(
        self,
        start: Rounded,
        bits: int,
        dtype: torch.dtype,
        *,
        latent: torch.Tensor,
        rank: int,
        scaling: float,
        generator: torch.Generator,
        **kwargs,
    ) -> None:
        super().__init__(start, bits, dtype, **kwargs)
        self.latent = _frozen(latent)
        self.scaling = scaling
        rows, columns = latent.shape
        bound = 1 / math.sqrt(columns)  # as in peft
        a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.lora_A = torch.nn.Parameter(a)
        self.lora_B = torch.nn.Parameter(torch.zeros(rows, rank))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight()
        return _StraightThrough.apply(x, self.lora_A, self.lora_B, weight, self.bias, self.scaling)

    def latent_rows(self, rows: slice) -> torch.Tensor:
        delta = (self.lora_B[rows].float() * self.scaling) @ self.lora_A.float()
        steps = self.scale[rows].float().reciprocal()[:, :, None]
        delta.unflatten(1, (steps.shape[1], -1)).mul_(steps)
        return delta.add_(self.latent[rows])


class FakeQuantScales(FakeQuantLinear):
    """A layer with fixed codes and trained scales, one per group."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Change of each scale, relative to the one that training started from.
        self.scale_delta = torch.nn.Parameter(torch.zeros_like(self.scale, dtype=torch.float32))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return _LearnedScale.apply(x, self.scale_delta, self.weight(), self)

    @torch.no_grad()
    def codes(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows in row_chunks(self.latent):
            yield rows, self.latent[rows].float()

    @torch.no_grad()
    def scales(self, rows: slice) -> torch.Tensor:
        scale = self.scale[rows].float() * (1 + self.scale_delta[rows])
        scale.clamp_(max=torch.finfo(self.scale.dtype).max)  # a step may overshoot
        return stored_scale(scale, self.scale.dtype).float()

    @torch.no_grad()
    def gradient_of_delta(self, gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Computes the gradient [out, groups] of the scale deltas.

        The gradient passes the rounding of the scale to its dtype unchanged.

        gradient: the gradient of the output, [out, tokens].
        x: the input, [tokens, in].
        """
        grad_delta = torch.empty_like(self.scale_delta)
        for rows, codes in self.codes():
            grad_weight = product(gradient[rows], x).float()
            grad_scale = (grad_weight * codes).unflatten(1, (grad_delta.shape[1], -1)).sum(-1)
            grad_delta[rows] = grad_scale * self.scale[rows].float()
        return grad_delta


@contextmanager
def disabled(layers: Iterable[FakeQuantized]) -> Iterator[None]:
    """Makes the layers compute with their float weights while the context is open, like the tuned
    model's."""
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def _frozen(tensor: torch.Tensor | None) -> torch.nn.Parameter | None:
    return None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)


@contextmanager
def _gathered(layer: FakeQuantized) -> Iterator[None]:
    """Gives the layer its unsharded tensors while the context is open, as FSDP does in a forward
    pass."""
    sharded = dict(layer._parameters)
    layer._parameters.update({name: whole(tensor) for name, tensor in sharded.items()})
    try:
        yield
    finally:
        layer._parameters.update(sharded)
