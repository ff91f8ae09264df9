"""Rotates a model: its outputs stay the same, but outliers are spread over all channels.

A few large weights or activations make their group's scale large, and the rest is rounded away.
Orthogonal matrices spread such outliers, and two of these matrices fold into a decoder's weights,
so that they cost nothing at run time (QuaRot, https://arxiv.org/abs/2404.00456): R rotates the
residual stream, after the weights of each norm are folded into the layers that read from it; H
rotates each head's values.

SmoothQuant (https://arxiv.org/abs/2211.10438) and AWQ (https://arxiv.org/abs/2306.00978) scale
channels instead. They are not used here because they depend on calibration data and only move
outliers between activations and weights, while a rotation spreads both.
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
    stream, values = orthogonal(config.hidden_size), orthogonal(head_dim(config))
    inputs = anatomy(config).inputs
    norms = {layer: shared.norm for shared in inputs for layer in shared.layers}
    norms[HEAD] = NORM
    gives_values, reads_values = architecture(config).values
    lock = Lock()  # when several threads rotate rows of a layer, one of them reads it

    @lru_cache(maxsize=2)
    def whole(name: str) -> torch.Tensor:
        return weights(name, WHOLE).float()

    def writer(name: str, rows: slice) -> torch.Tensor:
        with lock:
            layer = whole(name)
        rotated_rows = stream[:, rows].T @ layer
        if name.endswith(f"{reads_values}.weight"):
            rotated_rows = (rotated_rows.unflatten(1, (-1, len(values))) @ values).flatten(1)
        return rotated_rows

    def reader(name: str, rows: slice, norm: str | None) -> torch.Tensor:
        weight = weights(name, rows).float()
        if name.endswith(f"{gives_values}.weight"):
            weight = (values.T @ weight.unflatten(0, (-1, len(values)))).flatten(0, 1)
        if norm:
            weight = weight * weights(f"{norm}.weight", WHOLE).float()
        return weight @ stream

    def bias(name: str, inside: str) -> torch.Tensor:
        whole_bias = weights(name, WHOLE).float()
        if inside == gives_values:
            return (whole_bias.unflatten(0, (-1, len(values))) @ values).flatten()
        return stream.T @ whole_bias if norms[inside] is None else whole_bias

    def rotated_rows(name: str, rows: slice) -> torch.Tensor:
        layer, _, kind = name.rpartition(".")
        block, inside = re.fullmatch(r"(model\.layers\.\d+\.)?(.*)", layer).groups()
        if kind == "bias":
            return bias(name, inside)[rows]
        if inside in norms.values():  # a norm, whose weights are folded into the layers after it
            return torch.ones_like(weights(name, rows), dtype=torch.float32)
        if layer != EMBEDDING and inside not in norms:  # a norm of queries or keys
            return weights(name, rows).float()
        if layer != EMBEDDING and norms[inside] is None:
            return writer(name, rows)
        norm = None if layer == EMBEDDING else f"{block or ''}{norms[inside]}"
        step = math.lcm(MIN_ROWS, len(values)) if inside == gives_values else MIN_ROWS
        wider, inner = _aligned(rows, step)
        return reader(name, wider, norm)[inner]

    return rotated_rows


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
