"""Conversations -> tokens and loss mask, by the model's own chat template."""

from __future__ import annotations

from itertools import pairwise
from os.path import commonprefix
from typing import TYPE_CHECKING, NamedTuple

from finequant.finetune.data.rows import Message, Row
from finequant.finetune.data.turns import answer_end
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
    """Tokens of a row, cut to data.max_length unless `whole`, and which of them are learned.

    Raises:
        UserError: for a row that ends in no token, where data.missing_end does not allow it, and
            for a chat template that writes answers otherwise than it asks for them.
    """
    if not row.messages:
        ids = _text_with_end(row, tokenizer, data)
        learned = [True] * len(ids)
    elif data.loss_on == "all":
        text = _render(row, row.messages, tokenizer, data)
        _answer_span(row, len(row.messages) - 1, text, tokenizer, data)  # refuses what is not one
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


def _text_with_end(row: Row, tokenizer: PreTrainedTokenizerBase, data: Data) -> list[int]:
    ids = tokenizer(row.text)["input_ids"]
    end = tokenizer.eos_token_id
    if end is None and data.missing_end == "error":
        raise UserError(
            f"{row.where}: the base's tokenizer has no EOS token to end a text with: name one as "
            "eos_token in its tokenizer_config.json, or set data.missing_end=allow"
        )
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _render_with_spans(
    row: Row, tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character ranges that the assistant says."""
    text = _render(row, row.messages, tokenizer, data)
    return text, [
        _answer_span(row, index, text, tokenizer, data)
        for index, message in enumerate(row.messages)
        if message["role"] == "assistant"
    ]


def _answer_span(
    row: Row, index: int, text: str, tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[int, int]:
    """The characters of an answer in the whole conversation, with the token that ends it.

    It begins where the template's generation prompt ends: there the model will be asked.
    """
    prompt = _render(row, row.messages[:index], tokenizer, data, add_generation_prompt=True)
    alone = text
    if index < len(row.messages) - 1:
        alone = _render(row, row.messages[: index + 1], tokenizer, data)
    if not alone.startswith(prompt):
        same = len(commonprefix([prompt, alone]))
        raise UserError(
            f"{row.where}: the chat template asks for an answer with {prompt[same:][:40]!r}, but "
            f"writes this one without it ({alone[same:][:40]!r}), so the model would learn another "
            "prompt than it will be asked with: give a model.chat_template whose generation prompt "
            "is what it writes before answers: without an opened thought, or keeping theirs"
        )
    last_word = _end_of_content(row, index, alone, len(prompt))
    end = answer_end(tokenizer, data)
    if end.token is None and data.missing_end == "error":
        raise UserError(_no_end(end.written))
    at = alone.rfind(end.token, last_word) if end.token else -1
    stop = len(alone.rstrip()) if at < 0 else at + len(end.token)
    if not text.startswith(alone[:stop]):
        # Some templates end the last answer of a conversation only.
        stop = last_word
    if not text.startswith(alone[:stop]):
        raise UserError(
            f"{row.where}: the chat template writes earlier turns differently once later ones "
            "follow, so the answers cannot be told apart: use rows of one answer, a "
            "model.chat_template that only appends, or data.loss_on=all, which learns the prompts "
            "too"
        )
    return len(prompt), stop


def _end_of_content(row: Row, index: int, text: str, start: int) -> int:
    """Where the last word of an answer ends; templates may change the white space between words.

    Raises:
        UserError: for an answer that is not in the text.
    """
    for word in row.messages[index]["content"].split():
        at = text.find(word, start)
        if at < 0:
            raise UserError(
                f"{row.where}: the chat template leaves {word[:40]!r} out of the answer, as "
                "those of reasoning models do with thoughts: give a model.chat_template that keeps "
                "it, or take it out of the row"
            )
        start = at + len(word)
    return start


def _no_end(written: str) -> str:
    what = f"{written!r}, of which nothing is" if written.strip() else "nothing that is"
    return (
        f"model.chat_template: answers end in no token: after an answer it writes {what} an added "
        "token of the tokenizer, so the model would not learn to stop: give a model.chat_template "
        "that writes {{ eos_token }} there, or set data.missing_end=allow"
    )


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
