"""Rotates a model: its outputs stay the same, but outliers are spread over all channels.

A few large weights or activations make their group's scale large, and the rest is rounded away.
Orthogonal matrices spread such outliers, and two of these matrices fold into a decoder's weights,
so that they cost nothing at run time (QuaRot, https://arxiv.org/abs/2404.00456): R rotates the
residual stream, after the weights of each norm are folded into the layers that read from it; H
rotates each head's values.

SmoothQuant (https://arxiv.org/abs/2211.10438) and AWQ (https://arxiv.org/abs/2306.00978) scale
channels instead, which moves outliers between activations and weights, while a rotation spreads
both. On top of a rotation, scaling the inputs of down_proj did not help (docs/what-helped.md).
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

import torch

from finequant.finetune.architecture import EMBEDDING, HEAD, NORM, anatomy, architecture, head_dim
from finequant.quantize.checkpoint.reading import MIN_ROWS, WHOLE, Weights
from finequant.quantize.methods.transform import Transform
from finequant.quantize.scheme import Plan, keeps_tied_head
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig


def check(plan: Plan, config: DecoderConfig) -> None:
    """Refuses a model that cannot be rotated.

    Raises:
        UserError: for a head that stays tied.
    """
    if keeps_tied_head(plan, config):
        raise UserError(
            "quantize.rotate: the head is tied to the embedding, and would need weights of its "
            "own: set quantize.head=quantize, or quantize.rotate=false"
        )


def rotated(weights: Weights, config: DecoderConfig) -> Weights:
    """Returns float32 rows of the rotated model, with the same bits however they are split.

    weights: the float model's; its head is not tied, or is read as if it were not.
    """
    return _Rotation(weights, config).rows


class _Rotation:
    """The rotated model, whose rows are computed when they are read.

    A layer inside a block is known by its name there, such as `mlp.up_proj`.
    """

    def __init__(self, weights: Weights, config: DecoderConfig) -> None:
        self._weights = weights
        self._stream, self._values = orthogonal(config.hidden_size), orthogonal(head_dim(config))
        inputs = anatomy(config).inputs
        self._norms = {layer: shared.norm for shared in inputs for layer in shared.layers}
        self._norms[HEAD] = NORM
        self._gives_values, self._reads_values = architecture(config).values
        self._lock = Lock()  # when several threads rotate rows of a layer, one of them reads it
        self._whole = lru_cache(maxsize=2)(lambda name: weights(name, WHOLE).float())

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Returns float32 rows of a parameter of the rotated model."""
        layer, _, kind = name.rpartition(".")
        block, inside = re.fullmatch(r"(model\.layers\.\d+\.)?(.*)", layer).groups()
        if kind == "bias":
            return self._bias(name, inside)[rows]
        if inside in self._norms.values():  # its weights are folded into the layers after it
            return torch.ones_like(self._weights(name, rows), dtype=torch.float32)
        if layer != EMBEDDING and inside not in self._norms:  # a norm of queries or keys
            return self._weights(name, rows).float()
        if layer != EMBEDDING and self._norms[inside] is None:
            return self._writer(name, rows)
        norm = None if layer == EMBEDDING else f"{block or ''}{self._norms[inside]}"
        gives_values = inside == self._gives_values
        step = math.lcm(MIN_ROWS, len(self._values)) if gives_values else MIN_ROWS
        wider, inner = _aligned(rows, step)
        return self._reader(name, wider, norm)[inner]

    def _writer(self, name: str, rows: slice) -> torch.Tensor:
        """Rotates rows of a layer that writes to the residual stream, each from the whole layer."""
        with self._lock:
            layer = self._whole(name)
        rotated_rows = self._stream[:, rows].T @ layer
        if name.endswith(f"{self._reads_values}.weight"):
            heads = rotated_rows.unflatten(1, (-1, len(self._values)))
            rotated_rows = (heads @ self._values).flatten(1)
        return rotated_rows

    def _reader(self, name: str, rows: slice, norm: str | None) -> torch.Tensor:
        """Rotates rows of a layer that reads the residual stream, and folds its norm into them."""
        weight = self._weights(name, rows).float()
        if name.endswith(f"{self._gives_values}.weight"):
            heads = weight.unflatten(0, (-1, len(self._values)))
            weight = (self._values.T @ heads).flatten(0, 1)
        if norm:
            weight = weight * self._weights(f"{norm}.weight", WHOLE).float()
        return weight @ self._stream

    def _bias(self, name: str, inside: str) -> torch.Tensor:
        """Rotates a whole bias of a layer that gives values or writes to the residual stream."""
        bias = self._weights(name, WHOLE).float()
        if inside == self._gives_values:
            return (bias.unflatten(0, (-1, len(self._values))) @ self._values).flatten()
        return self._stream.T @ bias if self._norms[inside] is None else bias


def _aligned(rows: slice, step: int) -> tuple[slice, slice]:
    """Returns the whole steps around some rows, and where the rows lie in them."""
    if rows == WHOLE:
        return WHOLE, WHOLE
    first = rows.start // step * step
    wider = slice(first, -(-rows.stop // step) * step)
    return wider, slice(rows.start - first, rows.stop - first)


def orthogonal(size: int) -> torch.Tensor:
    """Makes an orthogonal float32 matrix [size, size] from integers and square roots, so that its
    bits are the same on every machine.

    It is a Hadamard matrix with random signs if one of this size is known, as it is for hidden
    sizes such as 576, 960, 2048, 3072, 3200 and 5120: its entries all have the same magnitude,
    which spreads outliers best. For other sizes, it is a Kronecker product of a Hadamard matrix and
    an orthogonal matrix for each odd prime that remains.
    """
    divisors = [divisor for divisor in range(1, size + 1) if size % divisor == 0]
    largest = max(divisor for divisor in divisors if hadamard_orders(divisor) is not None)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in hadamard_orders(largest):
        matrix = torch.kron(matrix, _hadamard(order))
    matrix /= largest**0.5
    for prime in _prime_factors(size // largest):
        # Q Q^T = prime I - J and Q J = 0, so this is orthogonal.
        matrix = torch.kron(matrix, _jacobsthal(prime) / prime**0.5 + 1 / prime)
    generator = torch.Generator().manual_seed(size)
    signs = torch.randint(2, (size, 1), generator=generator).double() * 2 - 1
    return (signs * matrix).float()


@lru_cache
def hadamard_orders(size: int) -> tuple[int, ...] | None:
    """Returns orders of Hadamard matrices whose product is `size`, each 2 or one of Paley's; None
    if there are none.

    https://en.wikipedia.org/wiki/Paley_construction
    """
    if size & (size - 1) == 0:
        return (2,) * (size.bit_length() - 1)
    if size % 4:
        return None
    if rest := hadamard_orders(size // 2):
        return (2, *rest)
    if len(_prime_factors(size - 1)) == 1 or len(_prime_factors(size // 2 - 1)) == 1:
        return (size,)
    for divisor in (d for d in range(12, math.isqrt(size) + 1, 4) if size % d == 0):
        left, right = hadamard_orders(divisor), hadamard_orders(size // divisor)
        if left and right:
            return (*left, *right)
    return None


def _hadamard(order: int) -> torch.Tensor:
    """Makes a Hadamard matrix, float64 [order, order] of 1 and -1: Sylvester's of 2, or Paley's."""
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order == 2:
        return sylvester
    first = len(_prime_factors(order - 1)) == 1
    prime = order - 1 if first else order // 2 - 1
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(prime)
    if first:  # the prime is 3 modulo 4
        conference[1:, 0] = -1
        return torch.eye(order, dtype=torch.float64) + conference
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    identity = torch.eye(prime + 1, dtype=torch.float64)
    return torch.kron(conference, sylvester) + torch.kron(identity, diagonal)


def _jacobsthal(prime: int) -> torch.Tensor:
    """Makes float64 [prime, prime]: 0 on the diagonal, 1 where row - column is a square modulo the
    odd prime, and -1 elsewhere."""
    numbers = torch.arange(prime)
    residue = -torch.ones(prime, dtype=torch.float64)
    residue[numbers * numbers % prime] = 1
    residue[0] = 0
    return residue[(numbers[:, None] - numbers) % prime]


def _prime_factors(number: int) -> list[int]:
    """Lists the prime factors with multiplicity, in order."""
    factors, divisor = [], 2
    while divisor * divisor <= number:
        if number % divisor:
            divisor += 1
        else:
            factors.append(divisor)
            number //= divisor
    return [*factors, number] if number > 1 else factors


TRANSFORM = Transform("rotated", check, rotated)
