"""Calibrated quantization without labels: GPTQ, block by block (https://arxiv.org/abs/2210.17323).

Each block sees the inputs that the already quantized blocks before it produce. Its weights are
first corrected for how far those inputs are from the float model's, so that errors do not add up
(as in https://arxiv.org/abs/2504.02692), then rounded column by column, then trained together for
some steps if the recipe says so. Memory holds the activations and one block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from finequant.quantize.blocks import Rotary, decoder_block, embed, normed, rotary_of
from finequant.quantize.reconstruct import TrainedLayer, reconstruct
from finequant.quantize.rounding import (
    Rounded,
    choose_scale,
    code_range,
    quantize_activations,
    round_to_nearest,
)
from finequant.quantize.scheme import EMBEDDING, HEAD, LayerScheme, Plan
from finequant.quantize.tensors import WHOLE, Weights, filled, row_slices
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig
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


Piece = tuple[str, slice, Rounded]
"""A layer's name, rows of it, and what they are rounded to."""


def nothing(name: str, rows: slice) -> Rounded | None:
    """Of what is known before the first block."""
    return None


@torch.no_grad()
def calibrate(
    weights: Weights,
    config: LlamaConfig,
    sequences: torch.Tensor,
    plan: Plan,
    dtype: torch.dtype,
    known: Callable[[str, slice], Rounded | None] = nothing,
    steps: int = 0,
) -> Iterator[Piece]:
    """Codes and scales of the linear layers that the plan rounds, as soon as they are found.

    weights: of the float model, by name; read a block at a time.
    sequences: token ids [rows, length].
    dtype: of the shipped model's arithmetic, in which the activations are computed.
    known: what an earlier call found; a block that is known is only run.
    steps: of training each block after gptq.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = sequences.split(max(1, TOKENS // sequences.shape[1]))
    exact = [embed(weights, ids).to(device, dtype) for ids in batches]
    shipped = _rounded_rows(weights, plan[EMBEDDING], dtype)
    quantized = [embed(shipped, ids).to(device, dtype) for ids in batches]
    rotary = rotary_of(config, exact[0])
    for number in _shown(config.num_hidden_layers):
        block = decoder_block(config, number, weights, dtype).to(device)
        prefix = f"model.layers.{number}."
        schemes = {name: plan[prefix + name] for name in _layers(LEADERS) if plan[prefix + name]}
        found = {name: known(prefix + name, WHOLE) for name in schemes}
        if all(found.values()):
            exact = [block(hidden, position_embeddings=rotary) for hidden in exact]
        else:
            float_weights = {}
            for leader, sums in _block_statistics(block, quantized, exact, rotary):
                for name in (leader, *LEADERS[leader]):
                    if name in schemes:
                        shape = block.get_submodule(name).weight.shape
                        weight = filled(weights, f"{prefix}{name}.weight", shape, torch.float32)
                        found[name] = gptq(weight.to(device), sums, schemes[name])
                        if steps:
                            float_weights[name] = weight.to(device)
            if steps:
                start = {
                    name: TrainedLayer(float_weights.pop(name), found[name], scheme)
                    for name, scheme in schemes.items()
                }
                found = reconstruct(block, start, quantized, exact, rotary, steps)
            for name, rounded in found.items():
                yield prefix + name, WHOLE, _on_cpu(rounded)
        for name, rounded in found.items():
            _install(block.get_submodule(name), rounded, dtype)
        quantized = [block(hidden, position_embeddings=rotary) for hidden in quantized]
    if plan[HEAD]:
        sums = Statistics()
        for one, other in zip(quantized, exact, strict=True):
            x, y = (normed(config, weights, hidden) for hidden in (one, other))
            sums.add(quantize_activations(x), y)
        del exact, quantized, one, other, x, y
        yield from _calibrate_head(weights, config, sums, plan[HEAD], known, device)


def _rounded_rows(weights: Weights, scheme: LayerScheme | None, dtype: torch.dtype) -> Weights:
    """Of the embedding, as the shipped model has them: it is rounded to nearest."""
    if not scheme:
        return weights
    return lambda name, rows: round_to_nearest(weights(name, rows), *scheme).dequantize(dtype)


def _shown(blocks: int) -> Iterator[int]:
    """Their numbers, with a progress bar or, without a terminal, a line for every ten."""
    console = Console(stderr=True)
    quiet = not console.is_terminal
    shown = track(range(blocks), "gptq: blocks", console=console, transient=True, disable=quiet)
    for number in shown:
        yield number
        if quiet and number % 10 == 9:
            print(f"gptq: {number + 1} of {blocks} blocks", file=sys.stderr, flush=True)


def _layers(leaders: dict[str, tuple[str, ...]]) -> list[str]:
    return [name for leader, others in leaders.items() for name in (leader, *others)]


def _calibrate_head(
    weights: Weights,
    config: LlamaConfig,
    sums: Statistics,
    scheme: LayerScheme,
    known: Callable[[str, slice], Rounded | None],
    device: torch.device,
) -> Iterator[Piece]:
    """Some rows at a time: it may be larger than a block."""
    pieces = list(row_slices((config.vocab_size, config.hidden_size)))
    step = max(1, ROWS // (pieces[0].stop - pieces[0].start))
    for first in range(0, len(pieces), step):
        rows = slice(pieces[first].start, pieces[first : first + step][-1].stop)
        if known(HEAD, rows) is None:
            weight = weights(f"{HEAD}.weight", rows).to(device)
            yield HEAD, rows, _on_cpu(gptq(weight, sums, scheme))


@dataclass
class Statistics:
    """Sums over tokens of a layer's inputs: x after the quantized blocks, y in the float model."""

    hessian: torch.Tensor | None = None
    """sum of x x^T, [in, in]"""
    drift: torch.Tensor | None = None
    """sum of (y - x) x^T, [in, in]"""
    solved: Solved | None = None

    def add(self, quantized: torch.Tensor, exact: torch.Tensor) -> None:
        """Inputs of the same tokens, [..., in]."""
        x, y = (tensor.float().flatten(0, -2) for tensor in (quantized, exact))
        if self.hessian is None:
            self.hessian = x.new_zeros(x.shape[1], x.shape[1])
            self.drift = torch.zeros_like(self.hessian)
        self.hessian.addmm_(x.T, x)
        self.drift.addmm_((y - x).T, x)

    def solve(self) -> Solved:
        """Takes the Hessian's place, which is not needed any more."""
        if self.solved is None:
            dead = self.hessian.diagonal() == 0
            self.hessian.diagonal()[dead] = 1.0
            inverse, factor = _inverse(self.hessian)
            self.solved, self.hessian = Solved(self.drift, inverse, factor, dead), None
        return self.solved


class Solved(NamedTuple):
    """What layers with the same inputs share."""

    drift: torch.Tensor
    inverse: torch.Tensor
    """of the damped Hessian"""
    factor: torch.Tensor
    """its upper Cholesky factor"""
    dead: torch.Tensor
    """columns whose inputs are always zero, [in]"""


def gptq(weight: torch.Tensor, statistics: Statistics, scheme: LayerScheme) -> Rounded:
    """Codes and scales of a weight [out, in] that keep the layer's outputs; rows by themselves.

    Columns whose inputs are always zero take part in no correction. A Hessian that is not
    positive definite is damped until it is.
    """
    solved = statistics.solve()
    groups = weight.shape[1] // scheme.group_size
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), groups, dtype=scheme.scale_dtype, device=weight.device)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        part = weight[rows].detach().float()
        moved = (part @ solved.drift @ solved.inverse).masked_fill_(solved.dead, 0.0)
        corrected = part + CORRECTION * moved
        _round_columns(corrected, solved.factor, scheme, Rounded(codes[rows], scale[rows]))
    return Rounded(codes, scale)


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


def _inverse(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the damped Hessian, with its upper Cholesky factor; ten times the damping until float32
    can factor it. The Hessian is used up: with 14,336 columns each of these takes 0.8 GB."""
    if not hessian.isfinite().all():
        raise UserError(
            "quantize: the activations of the calibration text are not finite: the merged weights "
            "are damaged, or overflow in quantize.dtype; train again, or use float32"
        )
    damping = DAMPING * hessian.diagonal().mean()
    exact = hessian.diagonal().clone()
    while True:
        hessian.diagonal().copy_(exact + damping)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            del factor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return inverse, upper
        damping *= 10


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
) -> Iterator[tuple[str, Statistics]]:
    """By leader, of a float block; `exact` moves on to the block's outputs."""
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
    inputs.clear()
    del exact_inputs, one, other
    for name in LEADERS:
        yield name, statistics.pop(name)
