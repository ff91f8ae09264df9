"""A decoder with one decoder block in memory at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from finequant.finetune.architecture import (
    EMBEDDING,
    HEAD,
    NORM,
    anatomy,
    causal_without_mask,
    rotary_embedding,
)
from finequant.finetune.device import device
from finequant.quantize.checkpoint.reading import WHOLE, Weights, filled, row_slices

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig

Rotary = tuple[torch.Tensor, torch.Tensor]


def empty_block(config: DecoderConfig, number: int) -> torch.nn.Module:
    """Makes a block without memory for its weights, causal when it is called without a mask."""
    kind = type(anatomy(config).block)
    with torch.device("meta"):
        return kind(causal_without_mask(config), number).eval().requires_grad_(False)


def fill(block: torch.nn.Module, read: Callable[[str, torch.Size], torch.Tensor]) -> None:
    """Gives every parameter of an empty block its values; `read` gets names and shapes."""
    tensors = {name: read(name, tensor.shape) for name, tensor in block.named_parameters()}
    block.load_state_dict(tensors, assign=True)
    block.requires_grad_(False)


def decoder_block(
    config: DecoderConfig, number: int, weights: Weights, dtype: torch.dtype
) -> torch.nn.Module:
    """Makes a block with its weights in `dtype`."""
    block, prefix = empty_block(config, number), f"model.layers.{number}."
    fill(block, lambda name, shape: filled(weights, prefix + name, shape, dtype))
    return block


def add_attention(block: torch.nn.Module, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Computes the first half of a block: hidden states [rows, length, hidden] plus attention."""
    normed_states = block.input_layernorm(hidden)
    attended, _ = block.self_attn(
        hidden_states=normed_states, attention_mask=None, position_embeddings=rotary
    )
    return hidden + attended


def add_mlp(block: torch.nn.Module, hidden: torch.Tensor, _: Rotary) -> torch.Tensor:
    """Computes the second half of a block: the first half's output plus that of the MLP."""
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


HALVES = {"self_attn.": add_attention, "mlp.": add_mlp}
"""The two halves of a block, in order, by how the names of their layers begin."""


def embed(weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Returns rows of the embedding [*ids.shape, hidden]; reads only those, or the first one if
    there are no ids."""
    known, rows = ids.unique(return_inverse=True)
    name = f"{EMBEDDING}.weight"
    table = torch.cat(
        [weights(name, slice(number, number + 1)) for number in known.tolist() or [0]]
    )
    return table[rows]


def rotary_of(config: DecoderConfig, hidden: torch.Tensor) -> Rotary:
    """Computes cosines and sines for hidden states [rows, length, hidden], on their device."""
    rotary = rotary_embedding(config)
    cos, sin = rotary(torch.empty(0, dtype=hidden.dtype), torch.arange(hidden.shape[1])[None])
    return cos.to(hidden.device), sin.to(hidden.device)


def run_block(
    block: torch.nn.Module, hidden: Iterable[torch.Tensor], rotary: Iterable[Rotary]
) -> list[torch.Tensor]:
    """Computes a block's outputs for hidden states [rows, length, hidden] of several lengths."""
    pairs = zip(hidden, rotary, strict=True)
    return [block(states, position_embeddings=angles) for states, angles in pairs]


def normed(config: DecoderConfig, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """Applies the norm that comes before the head."""
    norm = deepcopy(anatomy(config).model.model.norm)
    fill(norm, lambda name, _: weights(f"{NORM}.{name}", WHOLE).to(hidden))
    return norm(hidden)


def norm_and_head(config: DecoderConfig, weights: Weights, dtype: torch.dtype) -> torch.nn.Module:
    """Makes a module that maps hidden states [rows, length, hidden] to logits, its weights in
    `dtype`."""
    model = deepcopy(anatomy(config).model)
    block = torch.nn.Sequential(OrderedDict(norm=model.model.norm, lm_head=model.lm_head))
    names = {"norm.weight": f"{NORM}.weight", "lm_head.weight": f"{HEAD}.weight"}
    fill(block, lambda name, shape: filled(weights, names[name], shape, dtype))
    return block


def head_logits(config: DecoderConfig, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
    """Computes logits [rows, vocabulary] of normed states [rows, hidden], part by part."""
    name, shape = f"{HEAD}.weight", (config.vocab_size, config.hidden_size)
    parts = [linear(hidden, weights(name, rows).to(hidden)) for rows in row_slices(shape)]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def float_logits(config: DecoderConfig, weights: Weights, prompts: list[list[int]]) -> torch.Tensor:
    """Computes logits [prompts, vocabulary] after each prompt in float32, a block at a time on the
    device; returns them on the CPU."""
    hidden = [embed(weights, torch.tensor([prompt])).float().to(device()) for prompt in prompts]
    rotary = [rotary_of(config, states) for states in hidden]
    for number in range(config.num_hidden_layers):
        block = decoder_block(config, number, weights, torch.float32).to(device())
        hidden = run_block(block, hidden, rotary)
    last = normed(config, weights, torch.cat([states[:, -1] for states in hidden]))
    return head_logits(config, weights, last).cpu()
