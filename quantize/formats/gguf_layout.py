"""How a GGUF file holds a decoder: names of tensors, order of rows, blocks of codes and scales."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import torch

from finequant.finetune.architecture import architecture, head_dim

if TYPE_CHECKING:
    from gguf import TensorNameMap

    from finequant.finetune.architecture import DecoderConfig

ROPE_FACTORS = "rope_freqs.weight"
BLOCK = 32
"""Weights that share a scale in Q4_0 and Q8_0."""


def blocks(codes: torch.Tensor, scale: torch.Tensor, four_bits: bool) -> np.ndarray:
    """Makes uint8 [out, bytes] of Q4_0 or Q8_0: for each block a half-precision scale, then codes.

    Q4_0 stores code + 8; byte i holds code i in its low and code i + 16 in its high half.
    """
    half = scale.float().numpy().astype("<f2")[:, :, None].view(np.uint8)
    values = codes.numpy().reshape(len(codes), -1, BLOCK)
    if four_bits:
        offset = (values + 8).astype(np.uint8)
        values = offset[:, :, : BLOCK // 2] | offset[:, :, BLOCK // 2 :] << 4
    return np.concatenate([half, values.view(np.uint8)], axis=-1).reshape(len(codes), -1)


def permuted(tensor: torch.Tensor, name: str, config: DecoderConfig) -> torch.Tensor:
    """Orders the rows of q_proj and k_proj as llama.cpp rotates them: in a Llama, it pairs
    neighbors in a head instead of its halves."""
    heads = _heads(name, config)
    if not heads:
        return tensor.contiguous()
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def restored(tensor: torch.Tensor, name: str, config: DecoderConfig) -> torch.Tensor:
    heads = _heads(name, config)
    if not heads:
        return tensor
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _heads(name: str, config: DecoderConfig) -> int | None:
    match = re.search(r"\.([qk])_proj\b", name)
    if not architecture(config).gguf_rotates_neighbors:
        return None
    counts = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    return counts[match[1]] if match else None


def rope_factors(config: DecoderConfig) -> np.ndarray:
    """Computes the float32 divisors [head_dim / 2] of Llama 3's rotary frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = torch.arange(0, head_dim(config), 2).float() / head_dim(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** size
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain / scaled).numpy()


def tensor_names(config: DecoderConfig) -> TensorNameMap:
    """Maps transformers' names of tensors to those of llama.cpp."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(k for k, name in MODEL_ARCH_NAMES.items() if name == architecture(config).gguf)
    return get_tensor_name_map(kind, config.num_hidden_layers)


def gguf_name(names: TensorNameMap, name: str) -> str:
    return names.get_name(name, try_suffixes=(".weight", ".bias"))
