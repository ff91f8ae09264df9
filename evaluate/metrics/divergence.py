"""Measures how far the quantized model's next-token distributions are from the tuned model's."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import accumulate, chain, islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import log_softmax

from finequant.evaluate.metrics.batches import batches_by_length
from finequant.evaluate.metrics.corpora import Document
from finequant.evaluate.metrics.perplexity import (
    LOGITS_CHUNK,
    ScoredSequence,
    predicting_states,
    scored_lengths,
)
from finequant.evaluate.metrics.text_metrics import mean
from finequant.recipes.terminal import tracked_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASSAGES, AROUND = 5, 40
"""Passages that the report shows, and their tokens on each side of the worst token."""


class Predictions(NamedTuple):
    """A model's predictions of the scored tokens; all tensors are on the CPU."""

    logs: torch.Tensor
    """float32 log-probabilities [scored tokens, vocabulary], of logits in float32."""
    rounding: torch.Tensor
    """KL divergence [scored tokens] of `logs` from the same with logits in the shipped dtype:
    rounding logits to bfloat16 alone makes two nearly equal models differ."""
    losses: dict[str, list[float]]
    """Negative log-likelihoods in nats of each corpus's sequences, from logits in the shipped
    dtype."""
    counts: list[int]
    """Scored tokens of each sequence, whose errors are not independent."""


def in_random_order(sequences: list[ScoredSequence]) -> list[ScoredSequence]:
    """Shuffles sequences, the same way in each call: rows of a test file may be sorted by class."""
    return Random(0).sample(sequences, len(sequences))


def reference_sequences(
    corpora: dict[str, tuple[list[ScoredSequence], list[Document]]], tokens: int
) -> dict[str, list[ScoredSequence]]:
    """Takes sequences of each corpus, in turn and `in_random_order`, until at least `tokens` are
    scored."""
    shuffled = {name: in_random_order(these) for name, (these, _) in corpora.items()}
    chosen: dict[str, list[ScoredSequence]] = {name: [] for name in corpora}
    scored = 0
    for number in range(max(map(len, shuffled.values()), default=0)):
        if scored >= tokens:
            break
        for name, sequences in shuffled.items():
            for sequence in sequences[number : number + 1]:
                chosen[name].append(sequence)
                scored += sum(sequence.scored)
    return chosen


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    corpora: dict[str, list[ScoredSequence]],
    batch_size: int,
    description: str,
) -> Predictions:
    """Computes the log-probabilities of all tokens of the vocabulary at each scored token."""
    head, sequences = _in_float32(model.lm_head), list(chain(*corpora.values()))
    counts = [sum(sequence.scored) for sequence in sequences]
    ends = list(accumulate(counts))
    logs = torch.empty(sum(counts), model.config.vocab_size)
    rounding, losses = torch.zeros(2, len(logs), dtype=torch.float64)
    batches = batches_by_length(scored_lengths(sequences), batch_size)
    for batch in tracked_batches(batches, f"evaluate: {description}"):
        hidden, targets, _ = predicting_states(model, [sequences[index] for index in batch])
        positions = torch.cat([torch.arange(ends[i] - counts[i], ends[i]) for i in batch])
        chunks = (part.split(LOGITS_CHUNK) for part in (positions, hidden, targets))
        for position, states, target in zip(*chunks, strict=True):
            exact = shipped = log_softmax(head(states), dim=-1)
            if head is not model.lm_head:
                shipped = log_softmax(model.lm_head(states).float(), dim=-1)
                rounding[position] = kl(exact, shipped)
            logs[position] = exact.cpu()
            losses[position] = -shipped.gather(1, target[:, None])[:, 0].cpu().double()
    sums = (part.sum().item() for part in losses.split(counts))
    by_corpus = {name: list(islice(sums, len(part))) for name, part in corpora.items()}
    return Predictions(logs, rounding, by_corpus, counts)


def _in_float32(head: torch.nn.Module) -> torch.nn.Module:
    """Converts a head to float32, copying it if needed; if it quantizes its input, it still does so
    in the old dtype."""
    if all(weight.dtype == torch.float32 for weight in head.parameters()):
        return head
    head = deepcopy(head).float()
    # This hook runs after those that were copied.
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    return head


def divergence(exact: Predictions, quantized: torch.Tensor) -> dict[str, object]:
    """Computes the mean KL(exact || quantized) in nats, and how often their top tokens agree.

    The mean of `exact.rounding` is the floor below which a KL divergence is meaningless.

    exact: the predictions of the tuned model, or of another that is quantized.
    quantized: log-probabilities [tokens, vocabulary] on the same tokens.
    """
    groups = [group for group, count in enumerate(exact.counts) for _ in range(count)]
    same = (exact.logs.argmax(dim=-1) == quantized.argmax(dim=-1)).double()
    return {
        "kl": _mean(kl(exact.logs, quantized), groups),
        "floor": _mean(exact.rounding, groups),
        "top1_agreement": _mean(same, groups),
        "tokens": len(quantized),
    }


def passages(
    tuned: torch.Tensor,
    quantized: torch.Tensor,
    sequences: list[ScoredSequence],
    decode: Callable[[list[int]], str],
) -> list[list[dict[str, object]]]:
    """Cuts out the passages around the tokens whose prediction changed most, one per sequence.

    tuned, quantized: log-probabilities [scored tokens of the sequences, vocabulary].

    Returns:
        Passages of {"text", "kl"}, in nats; 0 for tokens that are not scored.
    """
    values, done, candidates = kl(tuned, quantized).tolist(), 0, []
    for sequence in sequences:
        scored = [index for index, is_scored in enumerate(sequence.scored) if is_scored]
        by_token = dict(zip(scored, values[done : done + len(scored)], strict=True))
        done += len(scored)
        if by_token:
            worst = max(by_token, key=by_token.get)
            candidates.append((by_token[worst], worst, sequence.ids, by_token))
    candidates.sort(key=lambda candidate: -candidate[0])
    return [
        [
            {"text": decode([ids[index]]), "kl": by_token.get(index, 0.0)}
            for index in range(max(0, worst - AROUND), min(len(ids), worst + AROUND))
        ]
        for _, worst, ids, by_token in candidates[:PASSAGES]
    ]


def kl(exact: torch.Tensor, approximate: torch.Tensor) -> torch.Tensor:
    """Computes the KL divergence [tokens], in nats, of log-probabilities [tokens, vocabulary]."""
    parts = zip(exact.split(LOGITS_CHUNK), approximate.split(LOGITS_CHUNK), strict=True)
    sums = [(left.exp() * (left - right)).sum(dim=-1).cpu().double() for left, right in parts]
    return torch.cat(sums)


def _mean(values: torch.Tensor, groups: list[int]) -> dict[str, float | None]:
    if not len(values):
        return {"value": None, "stderr": None}
    score = mean(values.tolist(), groups)
    return {"value": score["value"], "stderr": score["stderr"]}
