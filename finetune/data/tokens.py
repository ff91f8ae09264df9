"""Encodes conversations and texts as tokens and loss mask."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from finequant.finetune.data.rendering import Rendering, Span, render_rows
from finequant.finetune.data.row import Row
from finequant.finetune.data.turns import answer_end
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of tokens that the loss mask leaves out: torch's ignore_index."""
TARGETS_AT_ONCE = 1024
"""Target tokens whose logits are in memory at a time: with a vocabulary of 128,256, 0.5 GB."""


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]
    """input_ids where the loss counts, IGNORED elsewhere."""
    full_length: int
    """Tokens before truncation."""

    def cut(self, length: int) -> Encoded:
        return Encoded(self.input_ids[:length], self.labels[:length], self.full_length)


def encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, data: Data, whole: bool = False
) -> Encoded:
    """Returns the tokens of a row and which are targets, cut to data.max_length unless `whole`.

    Raises:
        UserError: if a row ends in no token and data.missing_end does not allow that, or if the
            chat template writes an answer without its generation prompt.
    """
    (encoded,) = encode_rows([row], tokenizer, data)
    return encoded if whole else encoded.cut(data.max_length)


def encode_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase, data: Data) -> list[Encoded]:
    """Encodes whole rows, as `encode` does one, in a few calls of template and tokenizer."""
    texts = [row for row in rows if not row.messages]
    conversations = [row for row in rows if row.messages]
    encoded = iter(_encode_texts(texts, tokenizer, data))
    answered = iter(_encode_conversations(conversations, tokenizer, data))
    return [next(answered if row.messages else encoded) for row in rows]


def _encode_conversations(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, data: Data
) -> list[Encoded]:
    only_answers = data.loss_on == "assistant"
    answers = [row.targets if only_answers else row.excluded for row in rows]
    # Even if all tokens are targets, `answer_span` checks the last answer.
    looked_at = [
        indices or ([] if only_answers else [len(row.messages) - 1])
        for row, indices in zip(rows, answers, strict=True)
    ]
    renderings = render_rows(rows, looked_at, tokenizer, data)
    spans = []
    for rendering, indices, looked in zip(renderings, answers, looked_at, strict=True):
        checked = [rendering.answer_span(index) for index in sorted(looked)]
        spans.append(checked if indices else [])
    texts = [rendering.text for rendering in renderings]
    tokenized = _tokenize_all(texts, spans, tokenizer)
    return [_labeled(ids, ranges, only_answers) for ids, ranges in tokenized]


def _labeled(ids: list[int], ranges: list[Span], only_answers: bool) -> Encoded:
    """Labels tokens: the targets are those in `ranges` or, unless `only_answers`, all others."""
    labels = [IGNORED] * len(ids) if only_answers else list(ids)
    for start, stop in ranges:
        labels[start:stop] = ids[start:stop] if only_answers else [IGNORED] * (stop - start)
    return Encoded(ids, labels, len(ids))


def _encode_texts(rows: list[Row], tokenizer: PreTrainedTokenizerBase, data: Data) -> list[Encoded]:
    if not rows:
        return []
    batch = tokenizer([row.text for row in rows], return_attention_mask=False)["input_ids"]
    ended = [_with_end(ids, row, tokenizer, data) for row, ids in zip(rows, batch, strict=True)]
    return [Encoded(ids, ids, len(ids)) for ids in ended]


def pieces_of(item: Encoded, row: Row, data: Data) -> list[Encoded]:
    """Cuts a row to data.max_length tokens or, with data.long_rows=split, a text into several such
    pieces; a last piece of a single token is left out, because it has nothing to predict."""
    length = data.max_length
    if data.long_rows != "split" or row.messages:
        return [item.cut(length)]
    starts = range(0, max(1, len(item.input_ids) - 1), length)
    return [
        Encoded(part := item.input_ids[at : at + length], item.labels[at : at + length], len(part))
        for at in starts
    ]


def encode_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, data: Data) -> list[int]:
    """Returns the tokens of a conversation up to where the model is to give its last answer."""
    text = prompt_text(row, tokenizer, data)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_text(row: Row, tokenizer: PreTrainedTokenizerBase, data: Data) -> str:
    """Returns the text of a conversation up to where the model is to give its last answer."""
    rendering = Rendering(row, tokenizer, data)
    return rendering.up_to(len(row.messages) - 1, add_generation_prompt=True)


def answer_text(row: Row, tokenizer: PreTrainedTokenizerBase, data: Data, index: int = -1) -> str:
    """Returns an answer of the assistant as text, with calls as the chat template writes them."""
    index %= len(row.messages)
    if not row.messages[index].get("tool_calls"):
        return row.messages[index]["content"]
    rendering = Rendering(row, tokenizer, data)
    start, stop = rendering.answer_span(index)
    end = answer_end(tokenizer, data).token or ""
    return rendering.text[start:stop].removesuffix(end).strip()


def _tokenize_all(
    texts: list[str], spans: list[list[Span]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[Span]]]:
    """Returns the tokens of each whole text, and for each of its spans the range of its tokens."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [
            _tokenize_without_offsets(text, parts, tokenizer)
            for text, parts in zip(texts, spans, strict=True)
        ]
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    tokenized = []
    for text, parts, ids, encoding in zip(
        texts, spans, batch["input_ids"], batch.encodings, strict=True
    ):
        ranges = [_range(encoding, part, len(text), len(ids)) for part in parts]
        if None in ranges:
            ids, ranges = _tokenize(text, parts, tokenizer)
        tokenized.append((ids, ranges))
    return tokenized


def _range(encoding: Any, span: Span, characters: int, tokens: int) -> Span | None:
    """Returns the range of a span's tokens; None if a token crosses one of its ends, or the offsets
    skip characters there."""
    start, stop = (tokens if at == characters else _token_at(encoding, at) for at in span)
    return None if start is None or stop is None else (start, stop)


def _token_at(encoding: Any, character: int) -> int | None:
    """Finds the token that begins at a character; None unless the one before it ends there."""
    token = encoding.char_to_token(character)
    if token is None or encoding.token_to_chars(token)[0] != character:
        return None
    if token and encoding.token_to_chars(token - 1)[1] != character:
        return None
    return token


def _tokenize(
    text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Span]]:
    """Returns the tokens of a text, and for each span the range of tokens that overlap with it.

    If the template's prompt ends in a space, a byte-level tokenizer joins the space with the first
    word of the answer, but in generation the space is the prompt's last token. Such answers are
    tokenized separately, unless the pieces would decode to a different text, because the tokenizer
    marks the beginning of a text (as Llama 2's does with a space).
    """
    ids, offsets = _with_offsets(text, [0, len(text)], tokenizer)
    starts = [start for start, _ in spans]
    if any(first < start < last for first, last in offsets for start in starts):
        apart, offsets_apart = _with_offsets(text, [0, *starts, len(text)], tokenizer)
        if tokenizer.decode(apart) == tokenizer.decode(ids):
            ids, offsets = apart, offsets_apart
    ranges = []
    for start, end in spans:
        inside = [at for at, (first, last) in enumerate(offsets) if start < last and first < end]
        ranges.append((inside[0], inside[-1] + 1) if inside else (0, 0))
    return ids, ranges


def _with_offsets(
    text: str, cuts: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Span]]:
    """Returns the tokens of the pieces between `cuts`, and their offsets in the whole text.

    Some tokenizers leave a token's leading space out of its offsets; here the offsets include it.
    """
    ids, offsets = [], []
    for begin, end in pairwise(cuts):
        piece = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
        ids += piece["input_ids"]
        reached = begin
        for first, last in piece["offset_mapping"]:
            offsets.append((min(begin + first, reached), begin + last))
            reached = max(reached, begin + last)
    return ids, offsets


def _tokenize_without_offsets(
    text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Span]]:
    """Tokenizes the pieces between the ends of the spans separately, otherwise like `_tokenize`."""
    ids, ranges = [], []
    for begin, end in pairwise([0, *chain(*spans), len(text)]):
        piece = tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
        if (begin, end) in spans:
            ranges.append((len(ids), len(ids) + len(piece)))
        ids += piece
    return ids, ranges


def _with_end(
    ids: list[int], row: Row, tokenizer: PreTrainedTokenizerBase, data: Data
) -> list[int]:
    """Returns a text's tokens with EOS once, and with BOS once if the tokenizer adds it."""
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text itself begins with one
        ids = ids[1:]
    if end is not None and ids[-2:] == [end, end]:
        ids = ids[:-1]
    if end is None and data.missing_end == "error":
        raise UserError(
            f"{row.where}: the base's tokenizer has no EOS token to end a text with: name one as "
            "eos_token in its tokenizer_config.json, or set data.missing_end=allow"
        )
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
