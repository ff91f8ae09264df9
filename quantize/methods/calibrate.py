"""Calibrated quantization without labels, block by block.

Each layer is quantized by the recipe's method, with the inputs that the already quantized layers
before it produce, those of its own block included. Then a block's layers are trained together for
some steps if the recipe says so. Memory holds the activations, one block, and its quantized copy.

Several processes share the sequences, whose statistics they add up, and the rows of each layer. In
a different order of summation, as with a different number of threads, the last bits of the sums
differ: in the first layers, one code in a thousand is rounded the other way, and the codes that
make up for it differ, too (docs/running.md has figures).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from finequant.finetune.architecture import EMBEDDING, HEAD, anatomy, block_layers
from finequant.finetune.device import arithmetic_dtype, device
from finequant.finetune.processes import add_up, decided_by_first, rows_of_share, share
from finequant.quantize.checkpoint.blocks import (
    HALVES,
    Rotary,
    add_attention,
    decoder_block,
    embed,
    normed,
    rotary_of,
)
from finequant.quantize.checkpoint.reading import WHOLE, Weights, filled, row_slices
from finequant.quantize.checkpoint.streaming import Piece
from finequant.quantize.methods.method import Calibrated, Statistics, rows_at_once
from finequant.quantize.methods.reconstruct import TrainedLayer, reconstruct
from finequant.quantize.rounding import Rounded, quantize_activations, round_to_nearest
from finequant.quantize.scheme import LayerScheme, Plan, is_calibrated
from finequant.recipes.terminal import doing, tracked

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig

TOKENS = 4096
"""Tokens of a forward pass."""

Part = Callable[[torch.nn.Module, torch.Tensor, Rotary], torch.Tensor]
"""Maps hidden states to the outputs of a block, or of half of it."""


class _Blocks(NamedTuple):
    """A float block, and a copy of it whose layers are quantized one after another."""

    prefix: str
    """How the names of the block's layers begin in the model."""
    exact: torch.nn.Module
    quantized: torch.nn.Module


def none_known(name: str, rows: slice) -> Rounded | None:
    """Returns None: no earlier call has computed any codes."""
    return None


@dataclass
class Calibrator:
    """Passes activations through the float and the quantized model, and quantizes each block.

    A block and the statistics of its inputs are freed before the next block is read.
    """

    method: Calibrated
    weights: Weights
    """The float model's, by name; read a block at a time."""
    config: DecoderConfig
    sequences: torch.Tensor
    """Token ids [rows, length]."""
    plan: Plan
    dtype: torch.dtype
    """The shipped model's; activations are computed in it, or in float32 where the processor only
    emulates it."""
    known: Callable[[str, slice], Rounded | None] = none_known
    """Returns codes and scales that an earlier call computed, or None; a block whose layers are all
    known is only run. Only the first process calls it."""
    steps: int = 0
    """The number of steps that train each block after its layers are quantized."""

    @torch.no_grad()
    def __post_init__(self) -> None:
        self._arithmetic, self._device = arithmetic_dtype(self.dtype), device()
        self._exact = self._embedded(self.weights)
        self._quantized = list(self._exact)
        if scheme := self.plan[EMBEDDING]:
            shipped = _rounded_rows(self.weights, scheme, self._arithmetic)
            self._quantized = self._embedded(shipped)
        self._rotary = rotary_of(self.config, self._exact[0])

    def _embedded(self, weights: Weights) -> list[torch.Tensor]:
        """Returns the hidden states before the first block, in batches; it reads each row of the
        embedding only once, because rows of a rotated model have to be computed."""
        ids = share(self.sequences)
        known, rows = ids.unique(return_inverse=True)
        table = embed(weights, known).to(self._device, self._arithmetic)
        batches = rows.to(self._device).split(max(1, TOKENS // ids.shape[1]))
        return [table[batch] for batch in batches]

    @torch.no_grad()
    def pieces(self) -> Iterator[Piece]:
        """Yields codes and scales of the linear layers that the plan rounds, as soon as it has
        them."""
        blocks = self.config.num_hidden_layers
        for number in tracked(range(blocks), "quantize: calibrating, block", blocks):
            yield from self._block(number)
        if self.plan[HEAD] and is_calibrated(HEAD, self.plan[HEAD]):
            doing("quantize: calibrating, head")
            yield from self._head()

    def _block(self, number: int) -> Iterator[Piece]:
        """Quantizes the block's layers, and advances the activations to its outputs."""
        block = decoder_block(self.config, number, self.weights, self._arithmetic).to(self._device)
        prefix = f"model.layers.{number}."
        names = [name for name in block_layers(self.config) if self.plan[prefix + name]]
        results = {name: self._known_to_first(prefix + name, WHOLE) for name in names}
        if not all(results.values()):
            for piece in self._quantize(block, prefix, names):
                yield piece._replace(rounded=piece.rounded.cpu())
            return
        self._advance(self._exact, _whole, block)
        for name, rounded in results.items():
            _install(block.get_submodule(name), rounded, self._arithmetic)
        self._advance(self._quantized, _whole, block)

    def _known_to_first(self, layer: str, rows: slice) -> Rounded | None:
        return decided_by_first(lambda: self.known(layer, rows))

    def _advance(self, states: list[torch.Tensor], part: Part, block: torch.nn.Module) -> None:
        """Replaces hidden states by the outputs of the block, or of half of it, a batch at a
        time."""
        for index, hidden in enumerate(states):
            states[index] = self._run(part, block, hidden)

    def _run(self, part: Part, block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if not len(hidden):  # more processes than sequences; transformers needs at least one
            return hidden
        return part(block, hidden, self._rotary)

    def _quantize(self, block: torch.nn.Module, prefix: str, names: list[str]) -> Iterator[Piece]:
        """Quantizes a float block's layers, and advances both models' activations to its outputs.

        Half a block at a time, so that its attention is not computed again for the MLP's inputs.
        """
        start: dict[str, TrainedLayer] = {}
        inputs = list(self._quantized) if self.steps else []
        # The copy shares the parameters of the float block until its layers are quantized.
        copy = deepcopy(block, {id(shared): shared for shared in block.parameters()})
        blocks = _Blocks(prefix, block, copy)
        for beginning, half in HALVES.items():
            for sharing in anatomy(self.config).inputs:
                layers = [n for n in sharing.layers if n in names and n.startswith(beginning)]
                if layers:
                    yield from self._quantize_sharing(blocks, half, layers, start)
            self._advance(self._exact, half, blocks.exact)
            if not self.steps or half is add_attention:  # trained, the block starts anew
                self._advance(self._quantized, half, blocks.quantized)
        if start:
            self._quantized = inputs
            trained = reconstruct(block, start, inputs, self._exact, self._rotary, self.steps)
            for name, rounded in trained.items():
                yield Piece(prefix + name, WHOLE, rounded, None)
                _install(block.get_submodule(name), rounded, self._arithmetic)
            self._advance(self._quantized, _whole, block)

    def _quantize_sharing(
        self, blocks: _Blocks, half: Part, names: list[str], start: dict[str, TrainedLayer]
    ) -> Iterator[Piece]:
        """Quantizes layers of half a block that share an input.

        Layers that are trained afterwards are not yielded, but put into `start`.
        """
        statistics = self._statistics(blocks, half, names[0])
        for together in self._rounded_at_once(blocks.prefix, names):
            parts = [self._float_weight(blocks, name) for name in together]
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            scheme = self.plan[blocks.prefix + together[0]]
            rounded = self._rounded(weight, statistics, scheme)
            rows = [len(part) for part in parts]
            codes, scales = (tensor.split(rows) for tensor in rounded)
            for name, part, *pair in zip(together, parts, codes, scales, strict=True):
                _install(blocks.quantized.get_submodule(name), Rounded(*pair), self._arithmetic)
                if self.steps:
                    start[name] = TrainedLayer(part, Rounded(*pair), scheme)
                else:
                    yield Piece(blocks.prefix + name, WHOLE, Rounded(*pair), part.cpu())

    def _statistics(self, blocks: _Blocks, half: Part, layer: str) -> Statistics:
        """Computes the statistics of a layer's inputs in both blocks."""
        statistics = self.method.statistics()
        for quantized, exact in zip(self._quantized, self._exact, strict=True):
            x = self._input(half, blocks.quantized, layer, quantized)
            statistics.add(quantize_activations(x), self._input(half, blocks.exact, layer, exact))
        add_up(statistics.sums)
        return statistics

    def _rounded(
        self, weight: torch.Tensor, statistics: Statistics, scheme: LayerScheme
    ) -> Rounded:
        """Quantizes a float32 weight [out, in]: each process rounds its share of the rows, and the
        sum over all processes has every row."""
        groups = weight.shape[1] // scheme.group_size
        codes = weight.new_zeros(weight.shape, dtype=torch.int8)
        scale = weight.new_zeros(len(weight), groups, dtype=scheme.scale_dtype)
        rows = rows_of_share(len(weight))
        codes[rows], scale[rows] = self.method.quantize(weight[rows], statistics, scheme)
        add_up((codes, scale))
        return Rounded(codes, scale)

    def _input(
        self, half: Part, block: torch.nn.Module, layer: str, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Returns a layer's input, without computing the rest of its half of the block."""
        if not len(hidden):
            return hidden.new_empty(0, block.get_submodule(layer).in_features)
        inputs: list[torch.Tensor] = []

        def stop(_: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
            inputs.append(arguments[0])
            raise _LayerReachedError

        with (
            block.get_submodule(layer).register_forward_pre_hook(stop),
            suppress(_LayerReachedError),
        ):
            self._run(half, block, hidden)
        return inputs[0]

    def _rounded_at_once(self, prefix: str, names: list[str]) -> list[list[str]]:
        """Groups layers that share an input: an accelerator rounds all of one scheme together."""
        if self._device.type == "cpu":
            return [[name] for name in names]
        groups: dict[LayerScheme | None, list[str]] = {}
        for name in names:
            groups.setdefault(self.plan[prefix + name], []).append(name)
        return list(groups.values())

    def _float_weight(self, blocks: _Blocks, name: str) -> torch.Tensor:
        """Returns a layer's float32 weight [out, in] on the device.

        It is read again unless the block computes in float32, and so has it already.
        """
        weight = blocks.exact.get_submodule(name).weight
        if weight.dtype == torch.float32:
            return weight.detach()
        read = filled(self.weights, f"{blocks.prefix}{name}.weight", weight.shape, torch.float32)
        return read.to(self._device)

    def _head(self) -> Iterator[Piece]:
        """Quantizes the head a few rows at a time: it may be larger than a block."""
        statistics = self.method.statistics()
        while self._exact:  # frees each batch once it is summed
            quantized, exact = (
                normed(self.config, self.weights, hidden.pop(0))
                for hidden in (self._quantized, self._exact)
            )
            statistics.add(quantize_activations(quantized), exact)
        add_up(statistics.sums)
        pieces = list(row_slices((self.config.vocab_size, self.config.hidden_size)))
        at_once = rows_at_once(self.config.hidden_size, self._device)
        step = max(1, at_once // (pieces[0].stop - pieces[0].start))
        for first in range(0, len(pieces), step):
            rows = slice(pieces[first].start, pieces[first : first + step][-1].stop)
            if self._known_to_first(HEAD, rows) is None:
                weight = self.weights(f"{HEAD}.weight", rows)
                rounded = self._rounded(weight.to(self._device), statistics, self.plan[HEAD])
                yield Piece(HEAD, rows, rounded.cpu(), weight)


def _whole(block: torch.nn.Module, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    return block(hidden, position_embeddings=rotary)


def _rounded_rows(weights: Weights, scheme: LayerScheme, dtype: torch.dtype) -> Weights:
    """Returns the embedding's weights as the shipped model has them, rounded to nearest."""
    return lambda name, rows: round_to_nearest(weights(name, rows), *scheme).dequantize(dtype)


def _install(module: torch.nn.Linear, rounded: Rounded, dtype: torch.dtype) -> None:
    weight = rounded.dequantize(dtype).to(module.weight.device)  # known codes are on the CPU
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.register_forward_pre_hook(lambda _, inputs: (quantize_activations(inputs[0]),))


class _LayerReachedError(Exception):
    """Ends a forward pass at the layer whose input is wanted."""
