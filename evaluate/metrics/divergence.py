"""How far the quantized model's next-token distribution is from the tuned model's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import log_softmax

from finequant.evaluate.metrics.corpora import Document
from finequant.evaluate.metrics.perplexity import ScoredSequence, predicting_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def reference_sequences(
    corpora: dict[str, tuple[list[ScoredSequence], list[Document]]], tokens: int
) -> list[ScoredSequence]:
    """Sequences of every corpus in turn until at least `tokens` of their tokens are scored."""
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
) -> torch.Tensor:
    """float32 log-probabilities [scored tokens, vocabulary] on the CPU."""
    rows = []
    with torch.inference_mode():
        for start in range(0, len(sequences), batch_size):
            hidden, _, _ = predicting_states(model, sequences[start : start + batch_size])
            rows.append(log_softmax(model.lm_head(hidden).float(), dim=-1).cpu())
    return torch.cat(rows) if rows else torch.empty(0, 1)


def divergence(tuned: torch.Tensor, quantized: torch.Tensor) -> dict[str, object]:
    """Mean KL(tuned || quantized) in nats, and how often both rank the same token first.

    Both [tokens, vocabulary] of log-probabilities on the same tokens.
    """
    kl = (tuned.exp() * (tuned - quantized)).sum(dim=-1).double()
    same = (tuned.argmax(dim=-1) == quantized.argmax(dim=-1)).double()
    return {"kl": _mean(kl), "top1_agreement": _mean(same), "tokens": len(kl)}


def _mean(values: torch.Tensor) -> dict[str, float | None]:
    n = len(values)
    if n < 2:
        return {"value": values.mean().item() if n else None, "stderr": None}
    return {"value": values.mean().item(), "stderr": (values.std() / n**0.5).item()}
