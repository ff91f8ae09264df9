"""Computes perplexity: negative log-likelihoods are summed, then divided once by tokens, words, or
bytes.

Windows, prefix token, and counts follow lm-eval's `loglikelihood_rolling` tasks, so that numbers
are comparable: `HFLM(pretrained=..., max_length=N)` matches a corpus with `max_length: N`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence

from finequant.evaluate.metrics.batches import batches_by_length, in_batches
from finequant.evaluate.metrics.corpora import Document, count
from finequant.finetune import attention
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS_CHUNK = 256
"""Tokens whose logits are computed at a time; enough to keep a GPU or matrix unit busy."""

SHORT = 128
"""On a CPU, sequences of at most this many tokens lie end to end; attention over longer ones takes
more memory that way."""

LOGITS_IN_CACHE = 1 << 19
"""Logits per log-softmax call on a CPU: few enough to stay in a core's cache."""


class ScoredSequence(NamedTuple):
    """Token ids, and which of them are scored: predicted from the ones before."""

    ids: list[int]
    scored: list[bool]
    """As long as `ids`; the first is always False, as nothing comes before it."""


def negative_log_likelihoods(
    model: PreTrainedModel, sequences: list[ScoredSequence], batch_size: int, description: str
) -> list[float]:
    """Sums the nats of the scored tokens of each sequence, in the order of `sequences`.

    Several processes share the batches.

    `model` is a decoder in evaluation mode (for a PeftModel, its `get_base_model()`).
    Memory: the hidden states of a batch, and LOGITS_CHUNK rows of logits.
    """
    batches = batches_by_length(scored_lengths(sequences), batch_size)

    def compute(batch: list[int]) -> list[float]:
        return _nll(model, [sequences[index] for index in batch])

    totals = dict(zip(chain(*batches), in_batches(batches, compute, description), strict=True))
    return [totals.get(index, 0.0) for index in range(len(sequences))]


def scored_lengths(sequences: list[ScoredSequence]) -> dict[int, int]:
    """Returns the lengths of the sequences that have scored tokens, by index."""
    return {index: len(item.ids) for index, item in enumerate(sequences) if any(item.scored)}


@torch.inference_mode()
def _nll(model: PreTrainedModel, sequences: list[ScoredSequence]) -> list[float]:
    """Sums the nats of the scored tokens of each sequence of one batch."""
    hidden, targets, counts = predicting_states(model, sequences)
    losses = _losses(model.lm_head, hidden, targets)
    return [part.sum().item() for part in losses.split(counts)]


def predicting_states(
    model: PreTrainedModel, sequences: list[ScoredSequence]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Runs one batch through the model without its head.

    Returns:
        The last hidden states [n, hidden] from which the scored tokens are predicted, these tokens
        [n], and the number of them in each sequence.
    """
    longest = max(len(sequence.ids) for sequence in sequences)
    if model.device.type == "cpu" and model.dtype == torch.float32 and longest <= SHORT:
        return _states_end_to_end(model, sequences)
    # The last token is only predicted; as an input, it could exceed the model's positions by one.
    inputs = padded([sequence.ids[:-1] for sequence in sequences], model.device)
    targets = padded([sequence.ids[1:] for sequence in sequences], model.device)
    scored = padded([sequence.scored[1:] for sequence in sequences], model.device)
    # No mask is needed: padding comes after the scored tokens, and attention is causal.
    states = model.model(input_ids=inputs, use_cache=False)
    return states.last_hidden_state[scored], targets[scored], scored.sum(dim=1).tolist()


def padded(rows: Sequence[list[int]], device: torch.device, padding: int = 0) -> torch.Tensor:
    """Makes a tensor [rows, longest] of rows of different lengths, padded at their ends."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=padding).to(device)


def _states_end_to_end(
    model: PreTrainedModel, sequences: list[ScoredSequence]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Does what `predicting_states` does, without padding, and computes a beginning that all
    sequences share, such as a system message, once: in short rows, that is half of the tokens."""
    ids = torch.tensor([token for sequence in sequences for token in sequence.ids])
    scored = torch.tensor([token for sequence in sequences for token in sequence.scored])
    bounds = torch.tensor([0, *accumulate(len(sequence.ids) for sequence in sequences)])
    inputs, predicting = attention.condensed(
        {"input_ids": ids[None], "cu_seq_lens_q": bounds}, scored[None, 1:]
    )
    usual = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    try:
        states = model.model(**inputs, use_cache=False).last_hidden_state[0, predicting]
    finally:
        model.set_attn_implementation(usual)
    return states, ids[scored], [sum(sequence.scored) for sequence in sequences]


def _losses(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Computes the nats of each target [n], float64 on the CPU (some accelerators lack float64)."""
    losses = torch.empty(len(targets), device=hidden.device)
    for part, logs in log_probabilities(head, hidden):
        losses[part] = -logs.gather(1, targets[part, None])[:, 0]
    return losses.cpu().double()


def log_probabilities(
    head: torch.nn.Module, hidden: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields slices of the hidden states [n, hidden] with their float32 log-probabilities.

    Each yield has a few rows [rows, vocabulary]: passes over all logits at once would take longer
    than the matrix product itself.
    """
    start = 0
    for chunk in hidden.split(LOGITS_CHUNK):
        logits = head(chunk)
        at_once = max(1, LOGITS_IN_CACHE // logits.shape[1]) if logits.is_cpu else len(logits)
        for part in logits.split(at_once):
            yield slice(start, start + len(part)), log_softmax(part, dim=-1, dtype=torch.float32)
            start += len(part)


def measure(
    model: PreTrainedModel,
    sequences: list[ScoredSequence],
    documents: list[Document],
    batch_size: int,
    name: str,
    measured: Sequence[float] = (),
) -> dict[str, float | int]:
    """Measures the perplexity of `documents`, whose tokens are in `sequences`.

    measured: the negative log-likelihoods of the first sequences, if they are known already.

    Returns:
        {"token", "word", "byte": perplexity per that unit (inf if it overflows),
        "tokens": the number of scored tokens}.

    Raises:
        UserError: if nothing is scored.
    """
    rest = negative_log_likelihoods(model, sequences[len(measured) :], batch_size, name)
    return perplexities(math.fsum([*measured, *rest]), sequences, documents, name)


def perplexities(
    nll: float, sequences: list[ScoredSequence], documents: list[Document], name: str
) -> dict[str, float | int]:
    """Returns what `measure` does, given the summed negative log-likelihood of all sequences."""
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
    """Cuts documents into windows of min(max_length, max_positions) inputs; scores each token once.

    With `corpus.windows`, only the first windows are kept, and with them the documents that they
    cover; if the last document is cut, its words and bytes are counted in the decoded tokens.

    Raises:
        UserError: if the tokenizer has neither a BOS nor an EOS token to start a document with.
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
    """Cuts one text into windows exactly as lm-eval's HFLM.loglikelihood_rolling does."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prefix = eos if bos is None else bos
    if prefix is None:
        raise UserError(
            "perplexity: the tokenizer has neither a BOS nor an EOS token, and a text has to begin "
            "with one of them; set one in its tokenizer_config.json"
        )
    # Like HFLM: if the tokenizer adds a BOS token, that token is scored once, after the prefix.
    special = not text.startswith(tokenizer.decode(prefix))
    ids = tokenizer.encode(text, add_special_tokens=special, verbose=False)
    pairs = map(make_disjoint_window, get_rolling_token_windows(ids, prefix, length, context_len=1))
    return [
        ScoredSequence(context + rest, [False] * len(context) + [True] * len(rest))
        for context, rest in pairs
    ]


def scored_part(sequences: list[ScoredSequence], tokenizer: PreTrainedTokenizerBase) -> Document:
    """Decodes the scored tokens of a truncated document, to count words and bytes in them."""
    pairs = (pair for sequence in sequences for pair in zip(*sequence, strict=True))
    ids = [token for token, scored in pairs if scored]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return count(text) if text else Document("", 0, 0)
