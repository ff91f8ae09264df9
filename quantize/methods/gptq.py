"""GPTQ of one layer (https://arxiv.org/abs/2210.17323).

It rounds column by column, and lets the columns that follow make up for the error. Before that, it
corrects the weights for the drift of the layer's inputs, which come from quantized layers, away
from the float model's, so that errors do not add up (as in https://arxiv.org/abs/2504.02692).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from finequant.finetune.processes import refuse
from finequant.quantize.methods.method import Calibrated, rows_at_once
from finequant.quantize.rounding import Rounded, choose_scale, code_range, stored_scale
from finequant.quantize.scheme import LayerScheme

COLUMNS = 128
"""Columns whose errors are spread together to all columns that follow."""

DAMPING = 0.01
"""Added to the Hessian's diagonal, relative to its mean."""

CORRECTION = 0.5
"""Share of the drift that is corrected; correcting all of it overfits the calibration text."""


@dataclass
class Statistics:
    """Sums over tokens of a layer's inputs: x after the quantized blocks, y in the float model."""

    hessian: torch.Tensor | None = None
    """sum of x x^T, [in, in]"""
    drift: torch.Tensor | None = None
    """sum of (y - x) x^T, [in, in]"""
    solved: Solved | None = None

    @property
    def sums(self) -> list[torch.Tensor]:
        return [self.hessian, self.drift]

    def add(self, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        """Adds both models' inputs for the same tokens, [..., in]."""
        x, y = (tensor.float().flatten(0, -2) for tensor in (quantized, exact))
        if self.hessian is None:
            self.hessian = x.new_zeros(x.shape[1], x.shape[1])
            self.drift = torch.zeros_like(self.hessian)
        self.hessian.addmm_(x.T, x)
        self.drift.addmm_((y - x).T, x)

    def solve(self) -> Solved:
        """Computes the upper Cholesky factor of the inverse Hessian, and frees the Hessian.

        The inverse itself is never formed, as each such matrix takes 0.8 GB with 14,336 columns:
        the factor is the inverse of the lower factor of the Hessian with rows and columns in
        reverse order, put in order again.
        """
        if self.solved is None:
            self.hessian = self.hessian.flip(0, 1)
            factor, self.hessian = _lower_factor(self.hessian), None
            _invert_lower(factor)
            self.solved = Solved(self.drift, factor.flip(0, 1))
        return self.solved


class Solved(NamedTuple):
    """The solution that layers with the same inputs share."""

    drift: torch.Tensor
    factor: torch.Tensor
    """upper Cholesky factor of the damped Hessian's inverse"""


def gptq(weight: torch.Tensor, statistics: Statistics, scheme: LayerScheme) -> Rounded:
    """Returns codes and scales of a weight [out, in] that preserve the layer's outputs; each row is
    rounded independently.

    Columns whose inputs are always zero are rounded to nearest. A Hessian that is not positive
    definite is damped until it is.
    """
    solved = statistics.solve()
    groups = weight.shape[1] // scheme.group_size
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), groups, dtype=scheme.scale_dtype, device=weight.device)
    step = rows_at_once(*weight.shape[1:], weight.device)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].detach().float()
        moved = part @ solved.drift @ solved.factor.T @ solved.factor
        corrected = part + CORRECTION * moved
        _round_columns(corrected, solved.factor, scheme, Rounded(codes[rows], scale[rows]))
    return Rounded(codes, scale)


def _round_columns(
    weight: torch.Tensor, factor: torch.Tensor, scheme: LayerScheme, rounded: Rounded
) -> None:
    """Rounds rows of a weight into `rounded`, and overwrites `weight`.

    factor: upper Cholesky factor of the inverse Hessian.
    """
    size = scheme.group_size
    width = size * max(1, COLUMNS // size)
    importance = factor.diagonal().square().reciprocal()
    round_block = _Replayed(scheme) if weight.is_cuda else partial(_round_block, scheme)
    for first in range(0, weight.shape[1], width):
        last = min(first + width, weight.shape[1])
        block = weight[:, first:last].T.contiguous()  # so that each column is contiguous
        codes, scales, errors = round_block(
            block, factor[first:last, first:last], importance[first:last]
        )
        rounded.codes[:, first:last] = codes.T
        rounded.scale[:, first // size : last // size] = scales.T
        weight[:, last:].addmm_(errors.T.contiguous(), factor[first:last, last:], alpha=-1)


def _round_block(
    scheme: LayerScheme, block: torch.Tensor, triangle: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds columns [columns, rows] one after another, and overwrites `block`.

    Returns:
        Their codes [columns, rows] as float32, scales [groups, rows], and the errors
        [columns, rows] for which the columns after them have to make up.
    """
    size, (low, high) = scheme.group_size, code_range(scheme.bits)
    codes, errors, scales = torch.empty_like(block), torch.empty_like(block), []
    for column in range(len(block)):
        if column % size == 0:
            within = slice(column, column + size)
            group = block[within].T.contiguous()
            chosen = choose_scale(group, scheme.bits, size, scheme.rule, importance[within])
            scales.append(stored_scale(chosen[:, 0], scheme.scale_dtype))
            scale = scales[-1].float()
            inverse = scale.reciprocal()
        code = torch.mul(block[column], inverse, out=codes[column]).round_().clamp_(low, high)
        error = torch.mul(code, scale, out=errors[column])
        torch.sub(block[column], error, out=error).div_(triangle[column, column])
        block[column + 1 :].addr_(triangle[column, column + 1 :], error, alpha=-1)
    return codes, torch.stack(scales), errors


class _Replayed:
    """Runs `_round_block` as a CUDA graph: one launch for a thousand kernels of microseconds."""

    def __init__(self, scheme: LayerScheme) -> None:
        self._scheme, self._graph = scheme, None

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            first = _round_block(self._scheme, *inputs)  # lazy loading must precede the capture
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = _round_block(self._scheme, *self._inputs)
            return first
        if inputs[0].shape != self._inputs[0].shape:  # the last columns, when they are fewer
            return _round_block(self._scheme, *inputs)
        for kept, tensor in zip(self._inputs, inputs, strict=True):
            kept.copy_(tensor)
        self._graph.replay()
        return self._outputs


def _lower_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Returns the lower Cholesky factor of the Hessian, damped in place, and ten times as much
    after each attempt that fails in float32."""
    if not hessian.diagonal().isfinite().all():
        refuse(
            "quantize: the activations of the calibration text are not finite: the merged weights "
            "are damaged, or overflow in quantize.dtype; train again, or use float32"
        )
    exact = hessian.diagonal().clone()
    damping = DAMPING * hessian.diagonal().mean() or 1.0  # there may be no input at all
    while True:
        hessian.diagonal().copy_(exact + damping)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            return factor
        damping *= 10


def _invert_lower(factor: torch.Tensor) -> None:
    """Inverts a lower triangular matrix in place: [[A, 0], [B, C]] to [[A', 0], [-C' B A', C']]."""
    if len(factor) <= COLUMNS:
        unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        factor.copy_(torch.linalg.solve_triangular(factor, unit, upper=False))
        return
    half = len(factor) // 2
    first, last, below = factor[:half, :half], factor[half:, half:], factor[half:, :half]
    _invert_lower(first)
    _invert_lower(last)
    below.copy_(last @ below @ first).neg_()


METHOD = Calibrated(Statistics, gptq)
