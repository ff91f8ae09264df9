"""Calibrated quantization without training: GPTQ, block by block (https://arxiv.org/abs/2210.17323).

Each block sees the inputs that the already quantized blocks before it produce. Its weights are
first corrected for how far those inputs are from the float model's, so that errors do not add up
(as in https://arxiv.org/abs/2504.02692), then rounded column by column. Memory holds the
activations and one block beside the model.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import embedding

from finequant.quantize.rounding import (
    Rounded,
    choose_scale,
    code_range,
    quantize_activations,
    round_to_nearest,
)
from finequant.quantize.scheme import EMBEDDING, HEAD, LayerScheme, Plan

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

COLUMNS = 128
"""Columns whose errors are spread at once to those behind them."""

ROWS = 2048
"""Rows whose columns are rounded at a time."""

DAMPING = 0.01
"""Added to the Hessian's diagonal, relative to its mean."""

CORRECTION = 0.5
"""Share of the drift that is corrected: the whole of it fits the calibration text too well."""

TOKENS = 4096
"""Tokens of a forward pass."""

# The layers of a block whose inputs are kept; others have the input of one of these.
LEADERS = {
    "self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": (),
    "mlp.gate_proj": ("mlp.up_proj",),
    "mlp.down_proj": (),
}


Rotary = tuple[torch.Tensor, torch.Tensor]


def calibrate(
    model: LlamaForCausalLM, sequences: torch.Tensor, plan: Plan, dtype: torch.dtype
) -> dict[str, Rounded]:
    """Codes and scales of all that the plan rounds; the embedding is rounded to nearest.

    model: float weights; it stays as it is.
    sequences: token ids [rows, length].
    dtype: of the shipped model's arithmetic, in which the activations are computed.
    """
    layers, rounded = model.model.layers, {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = sequences.split(max(1, TOKENS // sequences.shape[1]))
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with torch.no_grad():
        exact = [model.model.embed_tokens(ids).to(device, dtype) for ids in batches]
        quantized = list(exact)
        if scheme := plan[EMBEDDING]:
            rounded[EMBEDDING] = round_to_nearest(model.model.embed_tokens.weight, *scheme)
            table = rounded[EMBEDDING].dequantize(dtype)
            quantized = [embedding(ids, table).to(device) for ids in batches]
        rotary = rotary_of(model, exact[0])
        blocks = track(layers, "gptq: blocks", console=console, transient=True, disable=quiet)
        for number, layer in enumerate(blocks):
            block = deepcopy(layer).to(device, dtype)
            statistics = _block_statistics(block, quantized, exact, rotary)
            for name, sums in statistics.items():
                if scheme := plan[f"model.layers.{number}.{name}"]:
                    found = gptq(layer.get_submodule(name).weight.to(device), sums, scheme)
                    _install(block.get_submodule(name), found, dtype)
                    rounded[f"model.layers.{number}.{name}"] = _on_cpu(found)
            quantized = [block(hidden, position_embeddings=rotary) for hidden in quantized]
            if quiet and number % 10 == 9:
                print(f"gptq: {number + 1} of {len(layers)} blocks", file=sys.stderr, flush=True)
        if scheme := plan[HEAD]:
            norm, sums = deepcopy(model.model.norm).to(device, dtype), Statistics()
            for one, other in zip(quantized, exact, strict=True):
                sums.add(quantize_activations(norm(one)), norm(other))
            rounded[HEAD] = _on_cpu(gptq(model.lm_head.weight.to(device), sums, scheme))
    return rounded


@dataclass
class Statistics:
    """Sums over tokens of a layer's inputs: x after the quantized blocks, y in the float model."""

    hessian: torch.Tensor | None = None
    """sum of x x^T, [in, in]"""
    drift: torch.Tensor | None = None
    """sum of (y - x) x^T, [in, in]"""

    def add(self, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        """Inputs of the same tokens, [..., in]."""
        x, y = (tensor.float().flatten(0, -2) for tensor in (quantized, exact))
        if self.hessian is None:
            self.hessian = x.new_zeros(x.shape[1], x.shape[1])
            self.drift = torch.zeros_like(self.hessian)
        self.hessian.addmm_(x.T, x)
        self.drift.addmm_((y - x).T, x)


def gptq(weight: torch.Tensor, statistics: Statistics, scheme: LayerScheme) -> Rounded:
    """Codes and scales of a weight [out, in] that keep the layer's outputs.

    Columns whose inputs are always zero take part in no correction. A Hessian that is not
    positive definite is damped until it is.
    """
    weight = weight.detach().float()
    hessian = statistics.hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    inverse = _inverse(hessian)
    moved = weight @ statistics.drift @ inverse
    weight = weight + CORRECTION * moved.masked_fill_(dead, 0.0)
    factor = torch.linalg.cholesky(inverse, upper=True)
    groups = weight.shape[1] // scheme.group_size
    scale = weight.new_empty(weight.shape[0], groups, dtype=scheme.scale_dtype)
    rounded = Rounded(torch.empty_like(weight, dtype=torch.int8), scale)
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        part = Rounded(rounded.codes[rows], rounded.scale[rows])
        _round_columns(weight[rows].clone(), factor, scheme, part)
    return rounded


def _round_columns(
    weight: torch.Tensor, factor: torch.Tensor, scheme: LayerScheme, rounded: Rounded
) -> None:
    """Rounds some rows into `rounded`; `weight` is used up.

    factor: upper Cholesky factor of the inverse Hessian.
    """
    size = scheme.group_size
    width = size * max(1, COLUMNS // size)
    importance = factor.diagonal().square().reciprocal()
    low, high = code_range(scheme.bits)
    for first in range(0, weight.shape[1], width):
        last = min(first + width, weight.shape[1])
        block = weight[:, first:last].T.contiguous()  # so that a column lies together
        triangle, errors = factor[first:last, first:last], []
        for column in range(last - first):
            here = first + column
            if column % size == 0:
                group = block[column : column + size].T.contiguous()
                found = choose_scale(
                    group, scheme.bits, size, scheme.rule, importance[here : here + size]
                )
                rounded.scale[:, here // size] = found[:, 0]
                scale = rounded.scale[:, here // size].float()
            codes = (block[column] * scale.reciprocal()).round_().clamp_(low, high)
            rounded.codes[:, here] = codes
            error = (block[column] - codes * scale) / triangle[column, column]
            block[column + 1 :].addr_(triangle[column, column + 1 :], error, alpha=-1)
            errors.append(error)
        weight[:, last:].addmm_(torch.stack(errors, dim=1), factor[first:last, last:], alpha=-1)


def _inverse(hessian: torch.Tensor) -> torch.Tensor:
    """Of the damped Hessian; ten times the damping until float32 can factor it."""
    damping = DAMPING * hessian.diagonal().mean()
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            if not torch.linalg.cholesky_ex(inverse, upper=True).info:
                return inverse
        damping *= 10


def rotary_of(model: LlamaForCausalLM, hidden: torch.Tensor) -> Rotary:
    """Cosines and sines, computed where the model is, for the device of `hidden`."""
    positions = torch.arange(hidden.shape[1], device=model.device)[None]
    cos, sin = model.model.rotary_emb(hidden.to(model.device), positions)
    return cos.to(hidden.device), sin.to(hidden.device)


def _on_cpu(rounded: Rounded) -> Rounded:
    return Rounded(rounded.codes.cpu(), rounded.scale.cpu())


def _install(module: torch.nn.Linear, rounded: Rounded, dtype: torch.dtype) -> None:
    module.weight = torch.nn.Parameter(rounded.dequantize(dtype), requires_grad=False)
    module.register_forward_pre_hook(lambda _, inputs: (quantize_activations(inputs[0]),))


def _block_statistics(
    block: LlamaDecoderLayer,
    quantized: list[torch.Tensor],
    exact: list[torch.Tensor],
    rotary: Rotary,
) -> dict[str, Statistics]:
    """Of each linear layer of a float block; `exact` moves on to the block's outputs."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda _, arguments: inputs.__setitem__(name, arguments[0])

    hooks = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in LEADERS]
    statistics = {name: Statistics() for name in LEADERS}
    for index, (one, other) in enumerate(zip(quantized, exact, strict=True)):
        exact[index] = block(other, position_embeddings=rotary)
        exact_inputs = dict(inputs)
        block(one, position_embeddings=rotary)
        for name, sums in statistics.items():
            sums.add(quantize_activations(inputs[name]), exact_inputs[name])
    for hook in hooks:
        hook.remove()
    shared = {name: sums for leader, sums in statistics.items() for name in LEADERS[leader]}
    return statistics | shared
