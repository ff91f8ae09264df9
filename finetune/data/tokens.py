"""Conversations -> tokens and loss mask, by the model's own chat template."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from finequant.finetune.data.rows import Message, Row
from finequant.recipes.errors import UserError, listed
from finequant.recipes.schema import Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of tokens that are read but not learned, torch's ignore_index."""


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]
    """input_ids where the loss counts, IGNORED elsewhere."""
    full_length: int
    """Tokens before truncation."""


def encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, data: Data, whole: bool = False
) -> Encoded:
    """Tokens of a row, cut to data.max_length unless `whole`, and which of them are learned."""
    if not row.messages:
        ids = tokenizer(row.text)["input_ids"]
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        learned = [True] * len(ids)
    elif data.loss_on == "all":
        text = _render(row, row.messages, tokenizer, data)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        learned = [True] * len(ids)
    else:
        text, spans = _render_with_spans(row, tokenizer, data)
        ids, places = _tokenize(text, spans, tokenizer)
        learned = [
            any(start < last and first < end for start, end in spans) for first, last in places
        ]
    labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
    kept = len(ids) if whole else data.max_length
    return Encoded(ids[:kept], labels[:kept], len(ids))


def _split(item: Encoded, length: int) -> list[Encoded]:
    """Pieces of `length` tokens; a last piece of a single token has nothing to learn."""
    starts = range(0, max(1, len(item.input_ids) - 1), length)
    return [
        Encoded(part := item.input_ids[at : at + length], item.labels[at : at + length], len(part))
        for at in starts
    ]


def encode_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, data: Data) -> list[int]:
    """Tokens of a conversation up to where the model is to give its last answer."""
    text = _render(row, row.messages[:-1], tokenizer, data, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def to_dataset(rows: list[Row], tokenizer: PreTrainedTokenizerBase, data: Data) -> Dataset:
    """Columns `input_ids` and `labels`, as trl's SFTTrainer takes them ready made.

    Raises:
        UserError: naming the rows in which no token is left to learn, or that are too long
            where data.long_rows says error.
    """
    from datasets import Dataset

    encoded = [
        (row, piece)
        for row in rows
        for piece in (
            _split(encode(row, tokenizer, data, whole=True), data.max_length)
            if data.long_rows == "split" and not row.messages
            else [encode(row, tokenizer, data)]
        )
    ]
    long = [(row, item) for row, item in encoded if item.full_length > data.max_length]
    if long and data.long_rows == "error":
        names = [f"{row.where}: {item.full_length} tokens" for row, item in long]
        raise UserError(
            f"data: {len(long)} rows are longer than data.max_length={data.max_length}; raise it, "
            f"or set data.long_rows to truncate or drop\n  {listed(names, most=10)}"
        )
    if data.long_rows == "drop":
        encoded = [(row, item) for row, item in encoded if item.full_length <= data.max_length]
    if not encoded:
        raise UserError(
            f"data: all {len(rows)} rows are longer than data.max_length={data.max_length}, and "
            "data.long_rows=drop leaves none; raise data.max_length"
        )
    # Nothing predicts the first token of a row.
    empty = [row.where for row, item in encoded if set(item.labels[1:]) <= {IGNORED}]
    if empty:
        raise UserError(
            f"data: nothing is left to learn in {len(empty)} rows: within data.max_length="
            f"{data.max_length} tokens there is no answer; raise data.max_length, or set "
            f"data.long_rows=drop\n  {listed(empty, most=10)}"
        )
    return Dataset.from_dict(
        {
            "input_ids": [item.input_ids for _, item in encoded],
            "labels": [item.labels for _, item in encoded],
        }
    )


def _tokenize(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens and their character ranges; none reaches over the beginning of an answer.

    Where the template's prompt ends in a space, the tokenizer would join it with the first word
    of the answer; but a model that is asked finds the prompt's own tokens.
    """
    for cuts in ([0, len(text)], [0, *(start for start, _ in spans), len(text)]):
        ids, places = [], []
        for begin, end in pairwise(cuts):
            part = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
            ids += part["input_ids"]
            places += [(begin + first, begin + last) for first, last in part["offset_mapping"]]
        if not any(first < start < last for first, last in places for start, _ in spans):
            break
    return ids, places


def _render_with_spans(
    row: Row, tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character ranges that the assistant says.

    An answer begins where the template's generation prompt ends and includes the template's end
    of turn, which the model has to learn to say.
    """
    text = _render(row, row.messages, tokenizer, data)
    spans = []
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        before = _render(row, row.messages[:index], tokenizer, data, add_generation_prompt=True)
        after = _render(row, row.messages[: index + 1], tokenizer, data).rstrip()
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{row.where}: the chat template writes earlier turns differently once later ones "
                "follow, so the answers cannot be told apart: use data.loss_on=all, rows of one "
                "answer, or a model.chat_template that only appends"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _render(
    row: Row,
    messages: tuple[Message, ...],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    add_generation_prompt: bool = False,
) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "model.chat_template: this base has no chat template, and the data are conversations; "
            "give model.chat_template (Jinja text, or the path of a .jinja file)"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **data.template_arguments,
        )
    # A template is a program: besides jinja's errors it raises whatever Python's operators do.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{row.where}: the chat template refuses this row: {reason}; change the row, "
            "data.template_arguments or model.chat_template"
        ) from None
