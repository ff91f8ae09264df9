"""Rows of any known format -> conversations or texts, checked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from finequant.finetune.data.readers import parse_json, shown
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Source

Message = dict[str, str]
CHAT_COLUMNS = ("messages", "conversations")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
UNREADABLE = re.compile(r"[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One training or evaluation row: a conversation, or raw text."""

    where: str
    """File and line, or dataset and index: what an error names."""
    messages: tuple[Message, ...] = ()
    text: str = ""
    weight: float = 1.0
    """How often it is seen in an epoch."""

    @property
    def key(self) -> str:
        """What a model is shown, case and white space aside: equal keys are the same row."""
        shown = [message["content"] for message in self.messages[:-1]] or [self.text]
        return " ".join("\n".join(shown).casefold().split())


def detect_format(source: Source, row: dict[str, Any]) -> str:
    if source.columns:
        mapped = set(source.columns)
        return next((form for form in ("messages", "text") if form in mapped), "prompt_completion")
    if source.format != "auto":
        return source.format
    for form, columns in (
        ("messages", {"messages"}),
        ("messages", {"conversations"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("alpaca", {"instruction", "output"}),
        ("text", {"text"}),
    ):
        if columns <= row.keys():
            return form
    raise UserError(
        f"{source.source}: cannot tell the format from the columns {_columns(row)}; "
        "expected messages, prompt and completion, instruction and output, or text. "
        "Map your own: columns: {prompt: QUESTION_COLUMN, completion: ANSWER_COLUMN}"
    )


def to_row(where: str, row: dict[str, Any], form: str, source: Source, system: str | None) -> Row:
    def field(name: str, default: str | None = None) -> str:
        template = source.columns.get(name, name)
        if "{" not in template:
            return _cell(row, template, where, default)
        text, found = PLACEHOLDER.subn(lambda match: _cell(row, match[1], where), template)
        if not found:
            raise UserError(
                f"{where}: columns.{name}: {template!r} names no column; write {{COLUMN}} "
                f"with one of {_columns(row)}"
            )
        return text

    if form == "text":
        text = field("text")
        if not text.strip():
            raise UserError(f"{where}: empty text: remove the row or fill it in")
        _check_characters(text, where)
        return Row(where, text=text, weight=source.weight)
    if form == "messages":
        messages = _chat(row, source.columns.get("messages"), where)
    elif form == "alpaca":
        extra = field("input", default="")
        prompt = field("instruction") + (f"\n\n{extra}" if extra.strip() else "")
        messages = [_message("user", prompt), _message("assistant", field("output"))]
    else:
        messages = [
            _message("user", field("prompt")),
            _message("assistant", field("completion")),
        ]
    if "system" in source.columns:
        system = field("system")
    _check_conversation(messages, where)
    if system and messages[0]["role"] != "system":
        _check_characters(system, where)
        messages.insert(0, _message("system", system))
    return Row(where, messages=tuple(messages), weight=source.weight)


def _cell(row: dict[str, Any], column: str, where: str, default: str | None = None) -> str:
    value = row.get(column)
    if value is None:
        value = default
    if value is None:
        what = f"{column} is null" if column in row else f"no column {column}"
        raise UserError(f"{where}: {what}; the columns are {_columns(row)}")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        raise UserError(
            f"{where}: {column} is a list of messages, expected text; put the whole "
            "conversation into one column `messages`"
        )
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # a date, bytes; NaN, which stands for a missing value
        raise UserError(
            f"{where}: {column} is {shown(value)}, expected text: convert it or remove the row"
        ) from None


def _columns(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _chat(row: dict[str, Any], column: str | None, where: str) -> list[Message]:
    column = column or next((name for name in CHAT_COLUMNS if name in row), CHAT_COLUMNS[0])
    if column not in row:
        raise UserError(f"{where}: no column {column}; the columns are {_columns(row)}")
    turns = row[column]
    if isinstance(turns, str):  # a cell of a CSV file
        turns = parse_json(turns, f"{where}: {column}", "a list of role and content")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(
            f"{where}: {column}: expected a list of role and content, found {shown(turns)}"
        )
    messages = []
    for turn in turns:
        speaker = turn.get("from")
        role = turn.get("role", SHAREGPT_ROLES.get(str(speaker), speaker))
        content = turn.get("content", turn.get("value"))
        if not isinstance(content, str):
            raise UserError(
                f"{where}: {column}: a turn whose content is no text: {shown(turn)}; "
                "write the content as a string, or remove the row"
            )
        messages.append(_message(str(role), content))
    return messages


def _check_conversation(messages: list[Message], where: str) -> None:
    roles = [message["role"] for message in messages]
    strange = sorted(set(roles) - {"system", "user", "assistant"})
    if strange:
        raise UserError(f"{where}: role {strange[0]!r}: expected system, user or assistant")
    turns = roles[1:] if roles and roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        raise UserError(
            f"{where}: the turns are {', '.join(roles) or 'none'}; expected an optional system "
            "message, then user and assistant in turn, ending with assistant"
        )
    empty = [message["role"] for message in messages if not message["content"].strip()]
    if empty:
        raise UserError(f"{where}: empty {empty[0]} message: remove the row or fill it in")
    for message in messages:
        _check_characters(message["content"], where)


def _check_characters(text: str, where: str) -> None:
    """Refuses what JSON can write but no tokenizer reads, and the traces of a damaged file."""
    wrong = UNREADABLE.search(text)
    if wrong:
        raise UserError(
            f"{where}: character {wrong.start() + 1} is U+{ord(wrong[0]):04X}, which is no text "
            "(half a surrogate pair, or NUL): write the file as plain UTF-8, or remove the row"
        )
