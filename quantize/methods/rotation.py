"""A model that computes the same, in turned coordinates where outliers are spread over all places.

A few large weights or activations make their whole group's scale large, and the rest is rounded
away. An orthogonal matrix spreads them, and two of them fold into a Llama's weights, so that
nothing is left to do at run time (https://arxiv.org/abs/2404.00456): R turns the residual stream,
once the weights of each norm are in the layers that read from it; H turns each head's values.
"""

from __future__ import annotations

import math
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

import torch

from finequant.quantize.checkpoint.reading import FEWEST, WHOLE, Weights, filled
from finequant.quantize.scheme import EMBEDDING, HEAD, untie_head

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

NORMS = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}
"""Before the layers of a block that read from the residual stream; the others write to it."""


def rotate(model: LlamaForCausalLM) -> None:
    """Turns a whole float model, in place; a tied head gets weights of its own."""
    untie_head(model)
    parameters = dict(model.named_parameters())
    turned = rotated(lambda name, rows: parameters[name].detach()[rows], model.config)
    # The layers first: the weights of the norms go into them.
    for name, tensor in sorted(parameters.items(), key=lambda item: "norm" in item[0]):
        tensor.data = filled(turned, name, tensor.shape, tensor.dtype)


def rotated(weights: Weights, config: LlamaConfig) -> Weights:
    """float32 rows of the turned model, the same bits in whatever pieces they are read.

    weights: of the float model; its head is not tied, or is read as if it were not.
    """
    stream, values = orthogonal(config.hidden_size), orthogonal(config.head_dim)
    lock = Lock()  # of threads that turn rows of one layer, one reads it

    @lru_cache(maxsize=2)
    def whole(name: str) -> torch.Tensor:
        return weights(name, WHOLE).float()

    def writer(name: str, rows: slice) -> torch.Tensor:
        with lock:
            layer = whole(name)
        turned = stream[:, rows].T @ layer
        if name.endswith("o_proj.weight"):
            turned = (turned.unflatten(1, (-1, len(values))) @ values).flatten(1)
        return turned

    def reader(name: str, rows: slice, norm: str | None) -> torch.Tensor:
        weight = weights(name, rows).float()
        if name.endswith("v_proj.weight"):
            weight = (values.T @ weight.unflatten(0, (-1, len(values)))).flatten(0, 1)
        if norm:
            weight = weight * weights(f"{norm}.weight", WHOLE).float()
        return weight @ stream

    def turned(name: str, rows: slice) -> torch.Tensor:
        block, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind.endswith("norm"):
            return torch.ones_like(weights(name, rows), dtype=torch.float32)
        if kind in ("o_proj", "down_proj"):
            return writer(name, rows)
        if name == f"{EMBEDDING}.weight":
            norm = None
        elif name == f"{HEAD}.weight":
            norm = "model.norm"
        else:
            norm = f"{block.rpartition('.')[0]}.{NORMS[kind]}"
        step = math.lcm(FEWEST, len(values)) if kind == "v_proj" else FEWEST
        wider, own = _aligned(rows, step)
        return reader(name, wider, norm)[own]

    return turned


def _aligned(rows: slice, step: int) -> tuple[slice, slice]:
    """Whole steps around some rows, and where the rows are in these."""
    if rows == WHOLE:
        return WHOLE, WHOLE
    first = rows.start // step * step
    wider = slice(first, -(-rows.stop // step) * step)
    return wider, slice(rows.start - first, rows.stop - first)


def orthogonal(size: int) -> torch.Tensor:
    """float32 [size, size], always the same: a Hadamard matrix with random signs.

    It is as large as the powers of two in the size; the rest is a random orthogonal matrix.
    """
    generator = torch.Generator().manual_seed(size)
    signs = torch.randint(2, (size, 1), generator=generator).double() * 2 - 1
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while size // len(matrix) % 2 == 0:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), matrix)
    matrix /= len(matrix) ** 0.5
    rest = torch.randn(2 * [size // len(matrix)], generator=generator, dtype=torch.float64)
    matrix = torch.kron(matrix, torch.linalg.qr(rest).Q.contiguous())
    return (signs * matrix).float()
