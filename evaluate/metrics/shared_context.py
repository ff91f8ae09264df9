"""Log-likelihoods of continuations, each context computed once for all of its own.

A row of a batch is a context with its continuations end to end behind it. Each continuation sees
the context and itself, and its positions go on from the context's end, so that the model computes
what it would for context + continuation alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from finequant.evaluate.metrics.perplexity import log_probabilities, progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM = 512
"""Tokens of continuations behind one context, or as many as the context has. Beyond that a row's
attention, which is quadratic, costs more than the context computed again for a further row."""


class Continuation(NamedTuple):
    """Token ids, of which the first is predicted from the last of the context."""

    context: list[int]
    """At least one token."""
    ids: list[int]
    """At least one token."""


class Likelihood(NamedTuple):
    """What lm-eval's models answer to a loglikelihood request."""

    log: float
    """Nats, summed over the continuation."""
    greedy: bool
    """Whether each token is the likeliest one."""


class _Row(NamedTuple):
    context: list[int]
    continuations: list[list[int]]
    requests: list[int]
    """Where the continuations stand among those asked for."""

    @property
    def length(self) -> int:
        """Tokens that the model reads; a continuation's last one is only predicted."""
        return len(self.context) + sum(len(ids) - 1 for ids in self.continuations)

    @property
    def length_alone(self) -> int:
        """The same of the context with its longest continuation only."""
        return len(self.context) + max(len(ids) - 1 for ids in self.continuations)


def log_likelihoods(
    model: PreTrainedModel, asked: list[Continuation], batch_size: int, description: str
) -> list[Likelihood]:
    """One for each of `asked`, in their order.

    `model` is a LlamaForCausalLM in evaluation mode, with sdpa or eager attention.
    batch_size: of contexts with one continuation; no batch has more tokens than these would have.
    """
    found = {}
    for batch in progress(_batches(_rows(asked), batch_size), description):
        numbers = [number for row in batch for number in row.requests]
        found.update(zip(numbers, _score(model, batch), strict=True))
    return [found[number] for number in range(len(asked))]


def _rows(asked: list[Continuation]) -> list[_Row]:
    """Continuations of equal contexts together, as far as there is ROOM."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(asked):
        groups.setdefault(tuple(context), []).append(number)
    rows = []
    for context, numbers in groups.items():
        longest = len(context) + max(ROOM, len(context))
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
    """Rows of about the same length; at least one, even if it has too many tokens.

    The longest come first: what does not fit into memory fails at once.
    """
    batches: list[list[_Row]] = []
    room = 0
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        if not room:
            batches.append([])
            room = max(1, batch_size * row.length_alone // row.length)
        batches[-1].append(row)
        room -= 1
    return batches


@torch.inference_mode()
def _score(model: PreTrainedModel, rows: list[_Row]) -> list[Likelihood]:
    """Of the rows' continuations, row by row."""
    hidden = _predicting_states(model, rows)
    states, targets = (torch.tensor(ids, device=hidden.device) for ids in _predictions(rows))
    logs = torch.empty(len(targets), device=hidden.device)
    greedy = torch.empty_like(targets, dtype=torch.bool)
    for part, found in log_probabilities(model.lm_head, hidden):
        here = ((states >= part.start) & (states < part.stop)).nonzero()[:, 0]
        state, target = states[here] - part.start, targets[here]
        logs[here] = found[state, target]
        greedy[here] = found.argmax(dim=-1)[state] == target
    lengths = [len(ids) for row in rows for ids in row.continuations]
    pairs = zip(logs.cpu().double().split(lengths), greedy.cpu().split(lengths), strict=True)
    return [Likelihood(log.sum().item(), bool(best.all())) for log, best in pairs]


def _predictions(rows: list[_Row]) -> tuple[list[int], list[int]]:
    """For each token of each continuation: which of `_predicting_states` it follows; itself.

    The state of a context's last token predicts the first token of all its continuations.
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
    """Last hidden states [n, hidden] of each context's last token and of all tokens behind it."""
    ids, positions, owners, wanted = [], [], [], []
    for context, continuations, _ in rows:
        parts = [context, *(ids[:-1] for ids in continuations)]
        end = len(context)
        ids.append([token for part in parts for token in part])
        positions.append(
            [*range(end), *(end + place for part in parts[1:] for place in range(len(part)))]
        )
        owners.append([owner for owner, part in enumerate(parts) for _ in part])
        wanted.append([place >= end - 1 for place in range(len(ids[-1]))])

    def padded(values: list[list[int]], padding: int = 0) -> torch.Tensor:
        values = [torch.tensor(value) for value in values]
        return pad_sequence(values, batch_first=True, padding_value=padding).to(model.device)

    states = model.model(
        input_ids=padded(ids),
        attention_mask=_mask(padded(owners, -1), model.dtype),
        position_ids=padded(positions),
        use_cache=False,
    )
    return states.last_hidden_state[padded(wanted)]


def _mask(owners: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the attention scores, [rows, 1, length, length]; None where no row has a
    second continuation: causal attention, which needs no mask, then does the same.

    owners [rows, length]: 0 for tokens of the context, n for those of its nth continuation, -1 for
    padding, which sees the context and is seen by no other.
    """
    if owners.max() < 2:
        return None
    length = owners.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=owners.device).tril()
    own = owners[:, None, :] == owners[:, :, None]
    seen = earlier & (own | (owners[:, None, :] == 0))
    mask = torch.zeros(seen.shape, dtype=dtype, device=owners.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
