"""Measures how far the quantized model's next-token distributions are from the tuned model's."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import log_softmax

from finequant.evaluate.metrics.corpora import Document
from finequant.evaluate.metrics.perplexity import ScoredSequence, predicting_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASSAGES, AROUND = 5, 40
"""Passages that the report shows, and their tokens on each side of the worst one."""


def reference_sequences(
    corpora: dict[str, tuple[list[ScoredSequence], list[Document]]], tokens: int
) -> list[ScoredSequence]:
    """Takes sequences from the corpora in turn until at least `tokens` tokens are scored."""
    chosen: list[ScoredSequence] = []
    queues = [list(sequences) for sequences, _ in corpora.values()]
    scored = 0
    while scored < tokens and any(queues):
        for queue in filter(None, queues):
            chosen.append(queue.pop(0))
            scored += sum(chosen[-1].scored)
    return chosen


def log_probabilities(
    model: PreTrainedModel, sequences: list[ScoredSequence], batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes float32 log-probabilities [scored tokens, vocabulary] with a float32 head.

    The second result is their KL divergence [scored tokens] from the log-probabilities of the head
    in its own dtype: rounding logits to bfloat16 alone makes two nearly equal models differ. Both
    results are on the CPU.
    """
    head = _in_float32(model.lm_head)
    rows, rounding = [], []
    with torch.inference_mode():
        for start in range(0, len(sequences), batch_size):
            hidden, _, _ = predicting_states(model, sequences[start : start + batch_size])
            exact = log_softmax(head(hidden), dim=-1)
            shipped = log_softmax(model.lm_head(hidden).float(), dim=-1)
            rows.append(exact.cpu())
            rounding.append(_kl(exact, shipped))
    if not rows:
        return torch.empty(0, 1), torch.empty(0)
    return torch.cat(rows), torch.cat(rounding)


def _in_float32(head: torch.nn.Module) -> torch.nn.Module:
    """Copies the head in float32; if it quantizes its input, it still does so in the old dtype."""
    head = deepcopy(head).float()
    # This hook runs after those that were copied.
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    return head


def divergence(
    tuned: torch.Tensor, quantized: torch.Tensor, rounding: torch.Tensor
) -> dict[str, object]:
    """Computes the mean KL(tuned || quantized) in nats, and how often their top tokens agree.

    tuned, quantized: log-probabilities [tokens, vocabulary] on the same tokens. rounding: the
    KL divergence [tokens] of the tuned model from itself with logits in the shipped dtype; its
    mean is the floor below which a KL divergence is meaningless.
    """
    same = (tuned.argmax(dim=-1) == quantized.argmax(dim=-1)).double()
    return {
        "kl": _mean(_kl(tuned, quantized)),
        "floor": _mean(rounding),
        "top1_agreement": _mean(same),
        "tokens": len(tuned),
    }


def passages(
    tuned: torch.Tensor,
    quantized: torch.Tensor,
    sequences: list[ScoredSequence],
    decode: Callable[[list[int]], str],
) -> list[list[dict[str, object]]]:
    """Cuts out the surroundings of the tokens whose prediction changed most, one per sequence.

    tuned, quantized: log-probabilities [scored tokens of the sequences, vocabulary].

    Returns:
        Passages of {"text", "kl"}, in nats; 0 for tokens that are not scored.
    """
    values, done, candidates = _kl(tuned, quantized).tolist(), 0, []
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


def _kl(exact: torch.Tensor, approximate: torch.Tensor) -> torch.Tensor:
    """Computes the KL divergence [tokens], in nats, of log-probabilities [tokens, vocabulary]."""
    return (exact.exp() * (exact - approximate)).sum(dim=-1).cpu().double()


def _mean(values: torch.Tensor) -> dict[str, float | None]:
    n = len(values)
    if n < 2:
        return {"value": values.mean().item() if n else None, "stderr": None}
    return {"value": values.mean().item(), "stderr": (values.std() / n**0.5).item()}
