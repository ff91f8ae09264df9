"""Groupwise rounding: float weights -> integer codes and scales, and back.

Every method takes the range of its codes and the scales that are stored from here, and so does the
forward pass of quantization-aware training: the model that was trained is the one that ships.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from finequant.finetune.device import weights_at_once

RATIOS = tuple(0.60 + 0.025 * step for step in range(18))
"""Scales to try, relative to the one that just reaches the largest weight of the group."""

INT8_RANGE = torch.tensor(255.0, device="cpu")
INT8_LOWEST = torch.tensor(-128.0, device="cpu")
"""Range of activation codes. They are tensors because decoding divides only a few numbers by them,
and torch would take longer to make a tensor of a Python number than to divide."""

MAX_DISTANCE = 0.49
"""Maximum distance of a latent weight from its code, in steps of the scale; less than a half, so
that it rounds to that code even when the latent weight is stored in float16."""

CODES = "codes.safetensors"
"""The file in trained_codes/ that holds codes and scales of every quantized layer."""


class Rounded(NamedTuple):
    """int8 codes [out, in] and their scales [out, in / group_size]; code x scale is the weight."""

    codes: torch.Tensor
    scale: torch.Tensor

    def cpu(self) -> Rounded:
        return Rounded(self.codes.cpu(), self.scale.cpu())

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Dequantizes to [out, in] in `dtype`, exactly as torchao's tensors do."""
        groups = self.codes.unflatten(1, (self.scale.shape[1], -1)).float()
        return groups.mul_(self.scale.float()[:, :, None]).to(dtype).flatten(1)


def save_rounded(layers: dict[str, Rounded], path: Path) -> None:
    """Writes NAME.codes and NAME.scale of every layer, as safetensors."""
    tensors = {
        f"{name}.{part}": tensor.contiguous().cpu()
        for name, rounded in layers.items()
        for part, tensor in rounded._asdict().items()
    }
    save_file(tensors, path)


def code_range(bits: int) -> tuple[int, int]:
    """Returns the smallest and largest code: (-8, 7) for 4 bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def round_to_nearest(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    rule: str,
    scale_dtype: torch.dtype = torch.float32,
) -> Rounded:
    """Returns codes and scales of a weight [out, in], each number rounded by itself."""
    scale = stored_scale(choose_scale(weight, bits, group_size, rule), scale_dtype)
    return Rounded(nearest_codes(weight, scale, bits), scale)


def nearest_codes(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns int8 codes [out, in] of a weight, given the scales [out, groups] that ship."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in row_chunks(weight):
        groups = weight[rows].float().unflatten(1, (scale.shape[1], -1))
        codes[rows] = _codes(groups, scale[rows].float(), *code_range(bits)).flatten(1)
    return codes


def choose_scale(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    rule: str,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Chooses float32 scales [out, in / group_size] for a weight [out, in].

    rule: `max` reaches the largest weight, as torchao does by default; `search` takes the scale
    with the least squared error, where `importance` [in] weighs the columns.

    With 1 bit, the codes are -1 and 0, and `max` takes the largest weight itself as the scale;
    torchao takes twice as much and so rounds every weight to 0.
    """
    low, high = code_range(bits)
    scales = torch.empty(weight.shape[0], weight.shape[1] // group_size, device=weight.device)
    weigh = None if importance is None else importance.float().view(-1, group_size)
    for rows in row_chunks(weight, 1 if rule == "max" else len(RATIOS)):
        groups = weight[rows].float().unflatten(1, (-1, group_size))
        scales[rows] = _scales(groups, low, high, rule, weigh)
    return scales


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns scales in the dtype that is stored, all of them positive.

    Without a limit, the scale of a group of zeros would round to zero in float16, and its codes
    would be NaN. And XNNPACK loads no program with a scale that is subnormal in bfloat16. A scale
    too large for the dtype becomes infinite; the checkpoint refuses it.
    """
    limits = torch.finfo(dtype)
    least = max(limits.smallest_normal * limits.eps, torch.finfo(torch.bfloat16).smallest_normal)
    return scale.clamp(min=least).to(dtype)


def _scales(
    groups: torch.Tensor, low: int, high: int, rule: str, importance: torch.Tensor | None
) -> torch.Tensor:
    largest = groups.abs().amax(-1).div_(max((high - low) / 2, 1.0))
    largest.clamp_(min=torch.finfo(torch.float32).smallest_normal)
    return largest if rule == "max" else _search(groups, largest, low, high, importance)


def _search(
    groups: torch.Tensor,
    largest: torch.Tensor,
    low: int,
    high: int,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Tries several scales [rows, groups], then fits the scale to the best one's codes by least
    squares."""
    tried = largest[:, :, None] * _ratios(largest.device)
    each = groups[:, :, None]  # [rows, groups, 1, size], rounded with every scale
    error = _codes(each, tried, low, high).mul_(tried[..., None]).sub_(each).square_()
    if importance is not None:
        error.mul_(importance[:, None])
    scale = tried.gather(-1, error.sum(-1).argmin(-1, keepdim=True))[:, :, 0]
    codes = _codes(groups, scale, low, high)
    weighed = codes if importance is None else codes * importance
    power = (weighed * codes).sum(-1)
    refined = (weighed * groups).sum(-1) / power
    return torch.where((power > 0) & (refined > 0), refined, scale)


@cache
def _ratios(device: torch.device) -> torch.Tensor:
    return torch.tensor(RATIOS, device=device)


def _codes(groups: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (groups * scale.reciprocal()[..., None]).round_().clamp_(low, high)


@torch.no_grad()
def latent_weights(weight: torch.Tensor, rounded: Rounded, dtype: torch.dtype) -> torch.Tensor:
    """Computes latent weights [out, in] in steps of their scale, clamped to their code's cell."""
    codes, scale = (tensor.to(weight.device) for tensor in rounded)
    latent = torch.empty_like(codes, dtype=dtype)
    for rows in row_chunks(weight):
        groups = weight[rows].float().unflatten(1, (scale.shape[1], -1))
        exact = (groups * scale[rows].float().reciprocal()[:, :, None]).flatten(1)
        code = codes[rows].float()
        latent[rows] = code + (exact - code).clamp_(-MAX_DISTANCE, MAX_DISTANCE)
    return latent


def quantize_activations(activations: torch.Tensor) -> torch.Tensor:
    """Rounds activations to int8, asymmetric per token, and back, as the shipped model does before
    each layer.

    This is torchao's arithmetic, step by step in the same dtype, so the result is the same bit for
    bit. torchao's own function is private, and takes five times as long for a single token.
    """
    low = activations.amin(-1, keepdim=True).clamp_max_(0)
    high = activations.amax(-1, keepdim=True).clamp_min_(0)
    tiny = torch.finfo(activations.dtype).smallest_normal
    scale = high.sub_(low).div_(INT8_RANGE).clamp_min_(tiny)
    # low is never above 0, so no zero point is below the lowest code.
    zero = INT8_LOWEST.sub(low.div_(scale).round_()).clamp_max_(127)
    codes = (activations * scale.reciprocal()).round_().add_(zero).clamp_(-128, 127)
    return codes.sub_(zero).mul_(scale)


class SharedInputs:
    """Quantizes an input once for consecutive layers that share it: q, k and v, gate and up."""

    def __init__(self) -> None:
        self._last: Callable[[], torch.Tensor | None] = lambda: None

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        if self._last() is not activations:
            self._quantized = quantize_activations(activations)
            self._last = weakref.ref(activations)  # does not keep its autograd graph alive
        return self._quantized


def row_chunks(weight: torch.Tensor, copies: int = 1) -> Iterator[slice]:
    """Yields slices of rows of [out, in] to handle at a time, with `copies` of each in memory."""
    step = max(1, weights_at_once(weight.device) // (copies * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)
