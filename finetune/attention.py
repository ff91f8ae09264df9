"""Attention on a CPU, without padding: rows lie end to end or have one length, products stay in
bf16, and a beginning that rows end to end share, such as a system message, is computed once.

For rows of a few hundred tokens, which fine-tuning has, the backward pass of torch's fused
attention takes 5 to 30 times longer than these plain products (torch 2.13, CPU). Remove this
file once it is as fast.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "rows"
"""What transformers calls attention within rows that lie end to end. There is no mask: each token
attends to its own row, up to itself."""

BATCH = "batch"
"""What transformers calls causal attention of rows of one length."""

MAX_PRODUCT_LENGTH = 1024
"""Maximum tokens of a row for which the plain products are faster."""

QUERIES_AT_ONCE = 128
"""Tokens of a row that are multiplied at once with the keys up to the last of them; no product of
theirs with later keys is needed."""


def condensed(inputs: dict[str, Any], targets: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """Leaves out the tokens of a micro-batch that affect no prediction of a target: those from a
    row's last target on, and, in all rows but the first, the beginning that all rows share.

    inputs: a micro-batch of trl's collator, rows end to end.
    targets: bool [1, tokens - 1], whether each token but the first is a target.

    Returns:
        The model's inputs, and the indices of those tokens in them whose states predict a target.
    """
    ids, bounds = inputs["input_ids"][0], inputs["cu_seq_lens_q"].tolist()
    rows = []  # ids up to the last that predicts a target, and the indices of all that do
    for start, end in pairwise(bounds):
        predicting = targets[0, start:end].nonzero().flatten()
        if len(predicting):
            rows.append((ids[start : start + int(predicting[-1]) + 1], predicting))
    rows = rows or [(ids[:1], ids[:0])]  # a process may have nothing to learn in a step
    shared = 0
    if len(rows) > 1:
        free = min(int(predicting[0]) for _, predicting in rows)
        beginnings = torch.stack([row[:free] for row, _ in rows])
        shared = int((beginnings == beginnings[0]).all(0).long().cumprod(0).sum())
    tokens, positions, states, starts = [], [], [], [0]
    for row, predicting in rows:
        skipped = shared if tokens else 0
        tokens.append(row[skipped:])
        positions.append(torch.arange(skipped, len(row)))
        states.append(predicting - skipped + starts[-1])
        starts.append(starts[-1] + len(tokens[-1]))
    inputs = {
        "input_ids": torch.cat(tokens)[None],
        "position_ids": torch.cat(positions)[None],
        "cu_seq_lens_q": torch.tensor(starts),
        "max_length_q": max(len(row) for row, _ in rows),
        "shared_beginning": shared,
    }
    return inputs, torch.cat(states)


def attend_within_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    shared_beginning: int = 0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Computes attention within each row, [1, tokens, heads, size].

    query [1, heads, tokens, size]; key and value [1, groups, tokens, size], each group shared by
    heads / groups heads.
    cu_seq_lens_q: where each row starts, and where the last one ends.
    max_length_q: tokens of the longest row, including the shared beginning.
    shared_beginning: number of tokens that all rows begin with; only the first row contains them.
    """
    skipped = torch.full_like(cu_seq_lens_q[:-1, None], shared_beginning)
    skipped[0] = 0
    starts = cu_seq_lens_q[:-1, None] - skipped
    steps = torch.arange(max_length_q, device=query.device)
    # Padding repeats a row's last token, and comes after it: no token sees it.
    positions = torch.minimum(starts + steps, cu_seq_lens_q[1:, None] - 1)  # [rows, longest]
    positions = torch.where(steps < skipped, steps, positions)
    is_own = (steps >= skipped) & (starts + steps < cu_seq_lens_q[1:, None])
    query, key, value = (
        tensor[0].index_select(1, positions.flatten()).unflatten(1, positions.shape)
        for tensor in (query, key, value)
    )
    attend = _products if max_length_q <= MAX_PRODUCT_LENGTH else _fused
    return attend(query, key, value, scaling)[is_own][None], None


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
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    ends = range(QUERIES_AT_ONCE, longest + QUERIES_AT_ONCE, QUERIES_AT_ONCE)
    parts = [
        _product(part, key[:, :end], value[:, :end], scaling)
        for part, end in zip(query.split(QUERIES_AT_ONCE, -2), ends, strict=True)
    ]
    return torch.cat(parts, -2).permute(1, 3, 0, 2, 4).flatten(2, 3)


def _product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Computes attention for consecutive tokens, which are the last ones that keys are given for.

    query [groups, rows, heads of a group, tokens, size]; key and value [groups * rows, keys, size].
    """
    keys, tokens = key.shape[1], query.shape[3]
    later = torch.full((tokens, keys), -torch.inf, dtype=query.dtype, device=query.device)
    bias = later.triu_(keys - tokens + 1).repeat(query.shape[2], 1).expand(len(key), -1, -1)
    queries = query.reshape(len(key), -1, query.shape[-1])
    scores = torch.baddbmm(bias, queries, key.transpose(1, 2), alpha=scaling)
    return (scores.softmax(-1) @ value).view(query.shape)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Computes the same as `_products` in less memory."""
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    mixed = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2)


def attend_in_batch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Computes causal attention of rows that are equally long, [rows, tokens, heads, size].

    query [rows, heads, tokens, size]; key and value [rows, groups, tokens, size].
    """
    attend = _products if query.shape[2] <= MAX_PRODUCT_LENGTH else _fused
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return attend(query, key, value, scaling), None


AttentionInterface.register(NAME, attend_within_rows)
AttentionInterface.register(BATCH, attend_in_batch)
