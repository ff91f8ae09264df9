"""Attention for training on a CPU: rows lie end to end without padding, products stay in bf16.

torch's fused attention takes 5 to 30 times longer backward than these plain products for the rows
of a few hundred tokens that fine-tuning has (torch 2.13, CPU). To be removed once it does not.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "rows"
"""The name in transformers. There is no mask: each token attends to its own row, up to itself."""

MAX_PRODUCT_LENGTH = 1024
"""Maximum tokens of a row for which the plain products are faster."""


def attend_within_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Computes attention within each row, [1, tokens, heads, size].

    query [1, heads, tokens, size]; key and value [1, groups, tokens, size], each group shared by
    heads / groups heads.
    cu_seq_lens_q: where each row starts, and the end of the last, as trl's collator gives them.
    """
    lengths = cu_seq_lens_q.diff()
    steps = torch.arange(max_length_q, device=query.device)
    real = steps < lengths[:, None]  # [rows, longest]
    # Padding repeats a row's own tokens, and comes after them: no token sees it.
    positions = (cu_seq_lens_q[:-1, None] + steps.clamp(max=lengths[:, None] - 1)).flatten()
    query, key, value = (
        tensor[0].index_select(1, positions).unflatten(1, real.shape)
        for tensor in (query, key, value)
    )
    attend = _products if max_length_q <= MAX_PRODUCT_LENGTH else _fused
    return attend(query, key, value, scaling)[real][None], None


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Computes attention [rows, longest, heads, size] with plain matrix products.

    The tensors are [heads or groups, rows, longest, size].
    """
    heads, rows, longest, size = query.shape
    groups = key.shape[0]
    # The heads of a group lie end to end, so that its keys and values need no copies.
    query = query.view(groups, heads // groups, rows, longest, size).transpose(1, 2)
    query = query.reshape(groups * rows, -1, size)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    later = torch.full((longest, longest), -torch.inf, dtype=query.dtype, device=query.device)
    bias = later.triu_(1).repeat(heads // groups, 1).expand(len(query), -1, -1)
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scaling)
    mixed = scores.softmax(-1) @ value
    mixed = mixed.view(groups, rows, heads // groups, longest, size)
    return mixed.permute(1, 3, 0, 2, 4).flatten(2, 3)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Computes the same as `_products` in less memory."""
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    mixed = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2)


AttentionInterface.register(NAME, attend_within_rows)
