"""Computes log-likelihoods of continuations, running each shared context only once.

A row of a batch is a context followed by its continuations, end to end:

    tokens     context...   first continuation   second continuation
    positions  0 ... n - 1  n, n + 1, ...        n, n + 1, ...

A continuation attends to the context and to itself, and its positions continue from the end of the
context, so the model computes the same as for context + continuation by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from finequant.evaluate.metrics.batches import in_batches
from finequant.evaluate.metrics.perplexity import log_probabilities, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_CONTINUATION_TOKENS = 512
"""Maximum tokens of the continuations in one row (or the context's length, if that is larger). In
longer rows, quadratic attention would cost more than computing the context again in another row."""


class Continuation(NamedTuple):
    """A context and the token ids to score after it."""

    context: list[int]
    """At least one token."""
    ids: list[int]
    """At least one token."""


class Likelihood(NamedTuple):
    """The answer to an lm-eval loglikelihood request."""

    log: float
    """Nats, summed over the continuation."""
    greedy: bool
    """Whether every token is the most likely one."""


class _Row(NamedTuple):
    context: list[int]
    continuations: list[list[int]]
    requests: list[int]
    """The indices of the continuations among those requested."""

    @property
    def length(self) -> int:
        """Counts the input tokens; a continuation's last token is only predicted."""
        return len(self.context) + sum(len(ids) - 1 for ids in self.continuations)

    @property
    def single_length(self) -> int:
        """Counts the input tokens of the context with only its longest continuation."""
        return len(self.context) + max(len(ids) - 1 for ids in self.continuations)


def log_likelihoods(
    model: PreTrainedModel, asked: list[Continuation], batch_size: int, description: str
) -> list[Likelihood]:
    """Scores the requested continuations, and returns their likelihoods in the same order.

    `model` is a decoder in evaluation mode, with sdpa or eager attention.
    batch_size: contexts in a batch if each had a single continuation; with more continuations, a
        batch has fewer contexts.
    """
    batches = _batches(_rows(asked), batch_size)
    scores = in_batches(batches, lambda batch: _score(model, batch), description)
    indices = [index for batch in batches for row in batch for index in row.requests]
    likelihoods = dict(zip(indices, scores, strict=True))
    return [likelihoods[index] for index in range(len(asked))]


def _rows(asked: list[Continuation]) -> list[_Row]:
    """Groups continuations of equal contexts into rows, up to MAX_CONTINUATION_TOKENS."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(asked):
        groups.setdefault(tuple(context), []).append(number)
    rows = []
    for context, numbers in groups.items():
        longest = len(context) + max(MAX_CONTINUATION_TOKENS, len(context))
        row = _Row(list(context), [], [])
        for number in numbers:
            ids = asked[number].ids
            if row.requests and row.length + len(ids) - 1 > longest:
                rows.append(row)
                row = _Row(list(context), [], [])
            row.continuations.append(ids)
            row.requests.append(number)
        rows.append(row)
    return rows


def _batches(rows: list[_Row], batch_size: int) -> list[list[_Row]]:
    """Batches rows of similar length; a batch has at least one row, however long it is.

    The longest come first: if a batch does not fit into memory, it fails right away.
    """
    batches: list[list[_Row]] = []
    free = 0
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        if not free:
            batches.append([])
            free = max(1, batch_size * row.single_length // row.length)
        batches[-1].append(row)
        free -= 1
    return batches


@torch.inference_mode()
def _score(model: PreTrainedModel, rows: list[_Row]) -> list[Likelihood]:
    """Computes the likelihoods of all continuations of the rows, row by row."""
    hidden = _predicting_states(model, rows)
    states, targets = (torch.tensor(ids, device=hidden.device) for ids in _predictions(rows))
    logs = torch.empty(len(targets), device=hidden.device)
    greedy = torch.empty_like(targets, dtype=torch.bool)
    for part, predicted in log_probabilities(model.lm_head, hidden):
        selected = ((states >= part.start) & (states < part.stop)).nonzero()[:, 0]
        state, target = states[selected] - part.start, targets[selected]
        logs[selected] = predicted[state, target]
        greedy[selected] = predicted.argmax(dim=-1)[state] == target
    lengths = [len(ids) for row in rows for ids in row.continuations]
    pairs = zip(logs.cpu().double().split(lengths), greedy.cpu().split(lengths), strict=True)
    return [Likelihood(log.sum().item(), bool(best.all())) for log, best in pairs]


def _predictions(rows: list[_Row]) -> tuple[list[int], list[int]]:
    """Pairs each token of each continuation with the index of the state that predicts it.

    The states are those of `_predicting_states`. The state of a context's last token predicts the
    first token of all its continuations.

    Returns:
        The indices of the states, and the tokens.
    """
    states, targets, first = [], [], 0
    for row in rows:
        after = first + 1
        for ids in row.continuations:
            states += [first, *range(after, after + len(ids) - 1)]
            targets += ids
            after += len(ids) - 1
        first = after
    return states, targets


def _predicting_states(model: PreTrainedModel, rows: list[_Row]) -> torch.Tensor:
    """Computes the last hidden states [n, hidden] of each context's last token and of all tokens
    after it."""
    ids, positions, owners, predicting = [], [], [], []
    for context, continuations, _ in rows:
        parts = [context, *(continuation[:-1] for continuation in continuations)]
        end = len(context)
        ids.append([token for part in parts for token in part])
        positions.append(
            [*range(end), *(end + offset for part in parts[1:] for offset in range(len(part)))]
        )
        owners.append([owner for owner, part in enumerate(parts) for _ in part])
        predicting.append([offset >= end - 1 for offset in range(len(ids[-1]))])

    states = model.model(
        input_ids=padded(ids, model.device),
        attention_mask=_mask(padded(owners, model.device, padding=-1), model.dtype),
        position_ids=padded(positions, model.device),
        use_cache=False,
    )
    return states.last_hidden_state[padded(predicting, model.device)]


def _mask(owners: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Makes the mask [rows, 1, length, length] that is added to the attention scores.

    None if no row has a second continuation: plain causal attention then does the same.

    owners [rows, length]: 0 for tokens of the context, n for those of its nth continuation, -1 for
    padding, which attends to the context and is not attended to.
    """
    if owners.max() < 2:
        return None
    length = owners.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=owners.device).tril()
    same = owners[:, None, :] == owners[:, :, None]
    visible = earlier & (same | (owners[:, None, :] == 0))
    mask = torch.zeros(visible.shape, dtype=dtype, device=owners.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
