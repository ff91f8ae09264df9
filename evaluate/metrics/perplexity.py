"""Perplexity: sum of negative log-likelihood, divided once: per token, per word, per byte.

Windows, prefix token and counts are those of lm-eval's `loglikelihood_rolling` tasks, so numbers
compare with theirs: `HFLM(pretrained=..., max_length=N)` is a corpus with `max_length: N`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence

from finequant.evaluate.metrics.corpora import Document, count
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS_CHUNK = 256
"""Tokens whose logits are made at a time; enough to keep a GPU or matrix unit at work."""

LOGITS_IN_CACHE = 1 << 19
"""On a CPU, logits to take the logarithm of at a time: passes over them stay in a core's cache."""


class ScoredSequence(NamedTuple):
    """Token ids, and which of them are predicted from those before and counted."""

    ids: list[int]
    scored: list[bool]
    """As long as `ids`; the first is always False, nothing comes before it."""


def negative_log_likelihoods(
    model: PreTrainedModel, sequences: list[ScoredSequence], batch_size: int, description: str
) -> list[float]:
    """Nats of the scored tokens of each sequence, summed, in the order of `sequences`.

    `model` is a LlamaForCausalLM in evaluation mode (of a PeftModel, its `get_base_model()`).
    Memory: the hidden states of a batch, and LOGITS_CHUNK rows of the vocabulary.
    """
    totals = [0.0] * len(sequences)
    some = [index for index, sequence in enumerate(sequences) if any(sequence.scored)]
    # Longest first: what does not fit into memory fails at once.
    some.sort(key=lambda index: len(sequences[index].ids), reverse=True)
    batches = [some[start : start + batch_size] for start in range(0, len(some), batch_size)]
    for batch in progress(batches, description):
        for index, total in zip(batch, _nll(model, [sequences[i] for i in batch]), strict=True):
            totals[index] = total
    return totals


def progress(batches: list[Any], description: str) -> Iterable[Any]:
    """Shows a bar on a terminal."""
    console = Console(stderr=True)
    quiet = not console.is_terminal  # rich would leave an empty line in a log
    return track(batches, description, console=console, transient=True, disable=quiet)


@torch.inference_mode()
def _nll(model: PreTrainedModel, sequences: list[ScoredSequence]) -> list[float]:
    """One batch: sums over the scored tokens of each sequence."""
    hidden, targets, counts = predicting_states(model, sequences)
    losses = _losses(model.lm_head, hidden, targets)
    return [part.sum().item() for part in losses.split(counts)]


def predicting_states(
    model: PreTrainedModel, sequences: list[ScoredSequence]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """One batch: the last hidden states [n, hidden] from which the scored tokens are predicted,
    these tokens [n], and how many of them each sequence has.
    """

    def padded(rows: list[list[int]]) -> torch.Tensor:
        rows = [torch.tensor(row) for row in rows]
        return pad_sequence(rows, batch_first=True).to(model.device)  # [batch, length - 1]

    # The last token is only predicted. As input it could lie one beyond the model's positions.
    inputs = padded([sequence.ids[:-1] for sequence in sequences])
    targets = padded([sequence.ids[1:] for sequence in sequences])
    scored = padded([sequence.scored[1:] for sequence in sequences])
    # Without a mask: padding comes after what is scored, and attention is causal.
    states = model.model(input_ids=inputs, use_cache=False)
    return states.last_hidden_state[scored], targets[scored], scored.sum(dim=1).tolist()


def _losses(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats of each target [n], float64 on the CPU (some accelerators have no float64)."""
    losses = torch.empty(len(targets), device=hidden.device)
    for part, logs in log_probabilities(head, hidden):
        losses[part] = -logs.gather(1, targets[part, None])[:, 0]
    return losses.cpu().double()


def log_probabilities(
    head: torch.nn.Module, hidden: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """float32 log-probabilities [some, vocabulary] of hidden states [n, hidden]: which, and theirs.

    A few at a time: passes over the logits of all would take longer than the product itself.
    """
    start = 0
    for chunk in hidden.split(LOGITS_CHUNK):
        logits = head(chunk)
        at_once = max(1, LOGITS_IN_CACHE // logits.shape[1]) if logits.is_cpu else len(logits)
        for some in logits.split(at_once):
            yield slice(start, start + len(some)), log_softmax(some, dim=-1, dtype=torch.float32)
            start += len(some)


def measure(
    model: PreTrainedModel,
    sequences: list[ScoredSequence],
    documents: list[Document],
    batch_size: int,
    name: str,
) -> dict[str, float | int]:
    """Perplexity of `documents`, of which `sequences` are the tokens.

    Returns:
        {"token", "word", "byte": perplexity by that unit (inf where it overflows),
        "tokens": how many were scored}.

    Raises:
        UserError: nothing is scored.
    """
    losses = negative_log_likelihoods(model, sequences, batch_size, f"perplexity: {name}")
    return perplexities(math.fsum(losses), sequences, documents, name)


def perplexities(
    nll: float, sequences: list[ScoredSequence], documents: list[Document], name: str
) -> dict[str, float | int]:
    """What `measure` returns, from the summed negative log-likelihood of all sequences."""
    units = {
        "token": sum(sum(sequence.scored) for sequence in sequences),
        "word": sum(document.words for document in documents),
        "byte": sum(document.bytes for document in documents),
    }
    if not all(units.values()):
        raise UserError(f"perplexity of {name}: no token to score; expected some text")
    perplexity = {unit: _exp(nll / number) for unit, number in units.items()}
    return {**perplexity, "tokens": units["token"]}


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def corpus_windows(
    documents: list[Document],
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    max_positions: int,
) -> tuple[list[ScoredSequence], list[Document]]:
    """Every token of every document once, in windows of min(max_length, max_positions) inputs.

    With `corpus.windows` only the first ones; the documents come back as far as they are scored,
    the last one cut: its words and bytes are then those of the decoded tokens.

    Raises:
        UserError: the tokenizer has no token that a document could begin after.
    """
    limit = corpus.windows or sys.maxsize
    sequences: list[ScoredSequence] = []
    covered: list[Document] = []
    for document in documents:
        if len(sequences) == limit:
            break
        windows = _windows(document.text, tokenizer, min(corpus.max_length, max_positions))
        kept = windows[: limit - len(sequences)]
        sequences += kept
        whole = len(kept) == len(windows)
        covered.append(document if whole else scored_part(kept, tokenizer))
    return sequences, covered


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[ScoredSequence]:
    """What lm-eval's HFLM.loglikelihood_rolling makes of one text."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prefix = eos if bos is None else bos
    if prefix is None:
        raise UserError(
            "perplexity: the tokenizer has neither a BOS nor an EOS token, one of which must stand "
            "before the first token of a text; set one in its tokenizer_config.json"
        )
    # As HFLM does: a tokenizer that puts BOS in front has it scored once, after the prefix.
    special = not text.startswith(tokenizer.decode(prefix))
    ids = tokenizer.encode(text, add_special_tokens=special, verbose=False)
    pairs = map(make_disjoint_window, get_rolling_token_windows(ids, prefix, length, context_len=1))
    return [
        ScoredSequence(context + rest, [False] * len(context) + [True] * len(rest))
        for context, rest in pairs
    ]


def scored_part(sequences: list[ScoredSequence], tokenizer: PreTrainedTokenizerBase) -> Document:
    """The text of the scored tokens, which is shorter than the document that they were cut from."""
    pairs = (pair for sequence in sequences for pair in zip(*sequence, strict=True))
    ids = [token for token, scored in pairs if scored]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return count(text) if text else Document("", 0, 0)
