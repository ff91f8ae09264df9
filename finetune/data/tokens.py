"""Conversations -> tokens and loss mask, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain, pairwise
from os.path import commonprefix
from typing import TYPE_CHECKING, NamedTuple

from finequant.finetune.data.messages import Message
from finequant.finetune.data.rows import Row
from finequant.finetune.data.turns import answer_end
from finequant.recipes.command_line import say
from finequant.recipes.errors import UserError, listed
from finequant.recipes.schema import Data

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1000
IGNORED = -100
TARGETS_AT_ONCE = 1024
"""Target tokens whose logits are in memory at a time: with a vocabulary of 128,256, 0.5 GB."""
"""The label of tokens that the loss mask leaves out: torch's ignore_index."""


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]
    """input_ids where the loss counts, IGNORED elsewhere."""
    full_length: int
    """Tokens before truncation."""


def encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, data: Data, whole: bool = False
) -> Encoded:
    """Tokens of a row, cut to data.max_length unless `whole`, and which of them are targets.

    Raises:
        UserError: for a row that ends in no token, where data.missing_end does not allow it, and
            for a chat template that writes answers otherwise than it asks for them.
    """
    if not row.messages:
        ids = _text_with_end(row, tokenizer, data)
        is_target = [True] * len(ids)
    elif data.loss_on == "all" and not row.excluded:
        text = _render(row, row.messages, tokenizer, data)
        _answer_span(row, len(row.messages) - 1, text, tokenizer, data)  # refuses what is not one
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        is_target = [True] * len(ids)
    else:
        inside = data.loss_on == "assistant"
        answers = row.targets if inside else row.excluded
        text, spans = _render_with_spans(row, answers, tokenizer, data)
        ids, in_answers = _tokenize(text, spans, tokenizer)
        is_target = [part == inside for part in in_answers]
    labels = [token if learn else IGNORED for token, learn in zip(ids, is_target, strict=True)]
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


def answer_text(row: Row, tokenizer: PreTrainedTokenizerBase, data: Data, index: int = -1) -> str:
    """Returns an answer of the assistant as text, with calls as the chat template writes them."""
    index %= len(row.messages)
    if not row.messages[index].get("tool_calls"):
        return row.messages[index]["content"]
    text = _render(row, row.messages, tokenizer, data)
    start, stop = _answer_span(row, index, text, tokenizer, data)
    return text[start:stop].removesuffix(answer_end(tokenizer, data).token or "").strip()


def to_dataset(rows: list[Row], tokenizer: PreTrainedTokenizerBase, data: Data) -> Dataset:
    """Columns `input_ids` and `labels`, as trl's SFTTrainer takes them ready made.

    Rows become Arrow arrays batch by batch: 8 bytes a token, where Python lists take up to 80.

    Raises:
        UserError: naming the rows in which no token is left to learn, or that are too long
            where data.long_rows says error.
    """
    import pyarrow
    from datasets import Dataset

    check_template(rows, tokenizer, data)
    if not tokenizer.is_fast and data.loss_on == "assistant":
        say(
            "data: this tokenizer gives no offsets: prompts and answers are tokenized apart, so "
            "ids can differ from those of the whole text"
        )
    tables, long, empty = [], [], []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        kept = []
        for row in rows[start : start + ROWS_AT_ONCE]:
            for item in _pieces(row, tokenizer, data):
                if item.full_length > data.max_length:
                    long.append(f"{row.where}: {item.full_length} tokens")
                    if data.long_rows == "drop":
                        continue
                # Nothing predicts the first token of a row.
                if set(item.labels[1:]) <= {IGNORED}:
                    empty.append(row.where)
                else:
                    kept.append(item)
        columns = {
            "input_ids": [item.input_ids for item in kept],
            "labels": [item.labels for item in kept],
        }
        ids = pyarrow.list_(pyarrow.int32())
        arrays = {name: pyarrow.array(lists, ids) for name, lists in columns.items()}
        tables.append(pyarrow.table(arrays))
    if long and data.long_rows == "error":
        raise UserError(
            f"data: {len(long)} rows are longer than data.max_length={data.max_length}; raise it, "
            f"or set data.long_rows to truncate or drop\n  {listed(long, most=10)}"
        )
    table = pyarrow.concat_tables(tables)
    if empty and (data.bad_rows == "error" or not len(table)):
        drop = ", or set data.long_rows=drop" if len(table) else ""  # some would be left
        raise UserError(
            f"data: nothing is left to learn in {len(empty)} rows: within data.max_length="
            f"{data.max_length} tokens there is no answer; raise data.max_length{drop}"
            f"\n  {listed(empty, most=10)}"
        )
    if not len(table):
        raise UserError(
            f"data: all {len(rows)} rows are longer than data.max_length={data.max_length}, and "
            "data.long_rows=drop leaves none; raise data.max_length"
        )
    if empty:
        say(
            f"data: {len(empty)} bad rows dropped: within data.max_length={data.max_length} tokens "
            f"there is no answer\n  {listed(empty, most=10)}"
        )
    return Dataset(table)


def _pieces(row: Row, tokenizer: PreTrainedTokenizerBase, data: Data) -> list[Encoded]:
    if data.long_rows == "split" and not row.messages:
        return _split(encode(row, tokenizer, data, whole=True), data.max_length)
    return [encode(row, tokenizer, data)]


def check_template(rows: list[Row], tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Checks that the chat template writes all that rows have: a template may skip what it does
    not know. Each thing is looked for in the first row that has it.

    Raises:
        UserError: naming the row and what the template leaves out.
    """
    checked = set()
    for row in rows:
        for what, without in _lesser_rows(row):
            if what in checked:
                continue
            checked.add(what)
            text = _render(row, row.messages, tokenizer, data)
            try:
                left_out = text == _render(without, without.messages, tokenizer, data)
            except UserError:  # such as two turns of the user in a row, without what was between
                continue
            if left_out:
                raise UserError(
                    f"{row.where}: the chat template leaves out {what}: the model would never see "
                    "it; give a model.chat_template that writes it, or remove it from the rows"
                )


def _lesser_rows(row: Row) -> Iterator[tuple[str, Row]]:
    """Yields what a row has besides the user's and assistant's words, and the row without it."""
    if row.tools:
        yield "the function definitions (tools)", replace(row, tools=())
    for index, message in enumerate(row.messages):
        before, after = row.messages[:index], row.messages[index + 1 :]
        if calls := message.get("tool_calls"):
            fewer = {**message, "tool_calls": calls[:-1]}
            if len(calls) == 1:
                del fewer["tool_calls"]
            what = f"call {len(calls)} of an answer (tool_calls)"
            yield what, replace(row, messages=(*before, fewer, *after))
        if message["role"] in ("system", "tool"):
            late = " after other turns" if message["role"] == "system" and index else ""
            yield f"a {message['role']} message{late}", replace(row, messages=(*before, *after))


def _tokenize(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Tokens of the whole text, and which of them have a part in one of the spans.

    There is an exception: where the template's prompt ends in a space, a byte-level tokenizer joins
    it with the first word of the answer, but a model that is asked finds the prompt's own tokens.
    Such answers are tokenized apart, unless the tokenizer marks the beginning of a text (as Llama
    2's does with a space), so that the pieces would not be those of this text.
    """
    if not tokenizer.is_fast:
        return _tokenize_without_offsets(text, spans, tokenizer)
    ids, offsets = _with_offsets(text, [0, len(text)], tokenizer)
    starts = [start for start, _ in spans]
    if any(first < start < last for first, last in offsets for start in starts):
        apart, offsets_apart = _with_offsets(text, [0, *starts, len(text)], tokenizer)
        if tokenizer.decode(apart) == tokenizer.decode(ids):
            ids, offsets = apart, offsets_apart
    return ids, [
        any(start < last and first < end for start, end in spans) for first, last in offsets
    ]


def _with_offsets(
    text: str, cuts: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the pieces of a text, and their ranges of its characters.

    Some tokenizers leave a token's leading space out of its offsets; here it is the token's.
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
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Tokenizes the pieces between the ends of the spans separately, otherwise like `_tokenize`."""
    ids, is_target = [], []
    for begin, end in pairwise([0, *chain(*spans), len(text)]):
        piece = tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
        ids += piece
        is_target += [(begin, end) in spans] * len(piece)
    return ids, is_target


def _text_with_end(row: Row, tokenizer: PreTrainedTokenizerBase, data: Data) -> list[int]:
    """Tokens of a text: EOS once, and BOS once where the tokenizer puts one in front."""
    ids = tokenizer(row.text)["input_ids"]
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text brings its own
        ids = ids[1:]
    if end is not None and ids[-2:] == [end, end]:
        ids = ids[:-1]
    if end is None and data.missing_end == "error":
        raise UserError(
            f"{row.where}: the base's tokenizer has no EOS token to end a text with: name one as "
            "eos_token in its tokenizer_config.json, or set data.missing_end=allow"
        )
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _render_with_spans(
    row: Row, answers: Collection[int], tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[str, list[tuple[int, int]]]:
    """Renders the conversation, and returns the character spans of some of its answers."""
    text = _render(row, row.messages, tokenizer, data)
    return text, [_answer_span(row, index, text, tokenizer, data) for index in sorted(answers)]


def _answer_span(
    row: Row, index: int, text: str, tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[int, int]:
    """Finds the span of an answer in the whole conversation, with the token that ends it.

    It begins where the template's generation prompt ends: there the model will be asked.
    """
    prompt = _render(row, row.messages[:index], tokenizer, data, add_generation_prompt=True)
    truncated = text
    if index < len(row.messages) - 1:
        truncated = _render(row, row.messages[: index + 1], tokenizer, data)
    start = _end_of_prompt(truncated, prompt)
    if start is None:
        same = len(commonprefix([prompt, truncated]))
        raise UserError(
            f"{row.where}: the chat template asks for an answer with {prompt[same:][:40]!r}, but "
            f"writes this one without it ({truncated[same:][:40]!r}), so the model would be asked "
            "with a prompt that it was not trained on: give a model.chat_template whose generation "
            "prompt is what it writes before an answer: one that opens no thought, or keeps them"
        )
    last_word = _end_of_content(row, index, truncated, start)
    end = answer_end(tokenizer, data)
    if end.token is None and data.missing_end == "error":
        raise UserError(_no_end(end.written))
    at = truncated.rfind(end.token, last_word) if end.token else -1
    stop = len(truncated.rstrip()) if at < 0 else at + len(end.token)
    if not text.startswith(truncated[:stop]) and not row.messages[index].get("tool_calls"):
        # Some templates end the last answer of a conversation only.
        stop = last_word
    if not text.startswith(truncated[:stop]):
        raise UserError(
            f"{row.where}: the chat template writes earlier turns differently once later ones "
            "follow, so the answers cannot be told apart: use rows of one answer, a "
            "model.chat_template that only appends, or data.loss_on=all, which learns the prompts "
            "too"
        )
    return start, stop


def _end_of_prompt(text: str, prompt: str) -> int | None:
    """Finds where the prompt ends in a text that begins with it; None for any other text.

    White space may differ inside it: Hermes' template writes a line break after the result of a
    call only once other turns follow.
    """
    if text.startswith(prompt):
        return len(prompt)
    written = list("".join(prompt.split()))
    letters = [at for at, letter in enumerate(text) if not letter.isspace()][: len(written)]
    if [text[at] for at in letters] != written:
        return None
    after, tail = letters[-1] + 1, prompt[len(prompt.rstrip()) :]
    return after + len(tail) if text.startswith(tail, after) else None


def _end_of_content(row: Row, index: int, text: str, start: int) -> int:
    """Finds where an answer's last word ends; templates may change the white space between words.

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
            tools=list(row.tools) or None,
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
