"""GPTQ with sums over tokens in float64, so that their order does not show in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finequant.quantize.methods.gptq import Solved, Statistics


@contextmanager
def sums_in_double() -> Iterator[None]:
    add, solve = Statistics.add, Statistics.solve

    def add_in_double(self: Statistics, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        x, y = (tensor.double().flatten(0, -2) for tensor in (quantized, exact))
        if self.hessian is None:
            self.hessian = self.drift = 0.0
        self.hessian, self.drift = self.hessian + x.T @ x, self.drift + (y - x).T @ x

    def solve_in_float(self: Statistics) -> Solved:
        if self.solved is None:
            self.hessian, self.drift = self.hessian.float(), self.drift.float()
        return solve(self)

    Statistics.add, Statistics.solve = add_in_double, solve_in_float
    yield
    Statistics.add, Statistics.solve = add, solve
