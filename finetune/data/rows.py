"""Rows of any known format -> conversations or texts, checked."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from typing import Any

from finequant.finetune.data.columns import (
    PLACEHOLDER,
    STEP,
    columns_of,
    lines_of,
    text_of,
    value_of,
)
from finequant.finetune.data.files import BadRowError, parse_json
from finequant.finetune.data.messages import (
    Message,
    calls_of,
    check_characters,
    check_messages,
    read_messages,
    read_tools,
    repair_messages,
    strings_of,
    system_text,
    transcript,
    turns_in,
)
from finequant.finetune.data.row import Row
from finequant.recipes.errors import UserError, shown
from finequant.recipes.schema import Data, Source

FORMATS = (
    # format, the columns that identify it, further columns that it reads
    ("prompt_completion", {"prompt", "completion"}, {"history"}),
    ("alpaca", {"instruction", "output"}, {"input", "context", "history"}),
    ("alpaca", {"instruction", "response"}, {"input", "context", "history"}),
)
MISSING = re.compile(r"nan|null|none|n/?a", re.IGNORECASE)
"""What programs write for a missing value."""
EXCLUDED = "answers excluded from the loss (weight 0, train or loss false, or part of a prompt)"
SIDES = (("prompt", "user"), ("completion", "assistant"))
"""Fields of a row, and who speaks in them."""
SPEAKERS = ("user", "assistant")
CHAT_COLUMNS = ("messages", "conversations")
MAYBE_CHAT = ("contents", "conversation", "dialogue", "dialog", "chat", "turns")
"""Columns that hold a conversation or, in other datasets, text."""
ANSWERS = (
    *("answer", "response", "completion", "output", "reply", "solution", "target", "summary"),
    *("highlight", "assistant", "category", "label", "intent"),
)
"""Columns that are usually the answer to what another column holds."""
SYSTEMS = ("system", "system_prompt", "systemInstruction", "system_instruction")
"""Columns with a row's own system message."""
OTHER_SYSTEM = "system columns not read (the messages begin with another system message)"
BESIDE = {*SYSTEMS, "tools", "functions"}
"""Columns that are read in every layout but plain text."""
WANTED = ("label", "kto_tag")
"""KTO's columns: false marks an answer that people did not want."""
PAIR = {"chosen", "rejected"}
PREFERENCES = (
    "preference pairs (chosen, rejected) are not supported; write the chosen answer as the last "
    "message of its conversation, or map it: columns: {prompt: ..., completion: chosen} (with "
    "`finequant init`: --prompt COLUMN --completion chosen), or columns: {messages: chosen} if it "
    "is a list of messages (with init: --completion chosen)"
)
MEDIA = re.compile("<(image|audio|video)>")
"""Placeholders by which messages of LLaVA and LLaMA-Factory refer to a column with a file."""


@dataclass
class Findings:
    """Notes on the rows of a source."""

    counts: Counter[str] = field(default_factory=Counter)
    """What was done to rows -> the number of rows."""
    repaired: list[str] = field(default_factory=list)
    """Each row that was repaired, and how."""
    unread: dict[str, None] = field(default_factory=dict)
    """Columns, and keys of messages, that are not read, in the order of their appearance."""
    bad: list[str] = field(default_factory=list)
    """Rows that cannot be used, and why."""

    def add(self, others: Findings) -> None:
        """Adds the findings on further rows."""
        self.counts += others.counts
        self.repaired += others.repaired
        self.unread |= others.unread
        self.bad += others.bad


@dataclass
class RowReader:
    """Turns entries of a source into rows; notes what it left out, repaired and did not read."""

    source: Source
    data: Data
    form: str = ""
    """Detected from the first row if it is not given."""
    findings: Findings = field(default_factory=Findings)
    _seen_columns: set[tuple] = field(default_factory=set)

    def read(self, where: str, row: dict[str, Any]) -> Row | None:
        """Returns the row, or None if its own weight or label leaves it out.

        Raises:
            UserError: if the format cannot be told from the source's first row.
            BadRowError: if the row cannot be used.
        """
        if not self.form:
            self.form = detect_format(self.source, row)
        if not self.source.columns:
            self._note_unread(row)
        if reason := self._left_out(row):
            self.findings.counts[f"rows left out ({reason})"] += 1
            return None
        if self.form == "text":
            return self._text(where, row)
        messages, done = self._messages(where, row), []
        if self.data.bad_rows == "repair":
            repaired, done = repair_messages(messages)
            messages = repaired or messages  # if nothing is left, the error names its own turns
        if "rejected" in row and messages and messages[-1]["role"] != "assistant":
            raise UserError(f"{where}: {PREFERENCES}")
        check_messages(messages, where)
        _check_media(messages, row, where)
        self.findings.repaired += [f"{where}: {what}" for what in done]
        self._add_system(messages, row, where)
        excluded = {index for index, turn in enumerate(messages) if not turn.pop("learned", True)}
        if MISSING.fullmatch(messages[-1]["content"].strip()):
            self.findings.counts["answers that may be missing values (NaN, null, None, NA)"] += 1
        if excluded:
            self.findings.counts[EXCLUDED] += len(excluded)
        if messages[0]["role"] == "assistant":
            self.findings.counts[
                "opening turns of the assistant excluded from the loss (no prompt precedes them)"
            ] += 1
        tools = read_tools(self._tools(row, where), where)
        for text in strings_of(tools):
            check_characters(text, where)
        if tools and _defines(messages[0], tools):
            self.findings.counts["tools not given again: the system message defines them"] += 1
            tools = ()
        return Row(where, tuple(messages), tools=tools, excluded=frozenset(excluded))

    def _text(self, where: str, row: dict[str, Any]) -> Row:
        text = self._text_of("text", row, where)
        if not text.strip():
            raise BadRowError(f"{where}: empty text: remove the row or fill it in")
        check_characters(text, where)
        return Row(where, text=text)

    def _messages(self, where: str, row: dict[str, Any]) -> list[Message]:
        if self.form == "messages":
            return self._chat(where, row)
        if self.form == "alpaca":
            asked, answered = self._alpaca(where, row)
        else:
            asked, answered = (self._turns(*side, where, row) for side in SIDES)
            if asked[-1]["role"] == "assistant":
                column = self.source.columns.get("prompt", "prompt")
                raise BadRowError(
                    f"{where}: {column} ends with an answer, and the completion is another: for "
                    f"what is about a conversation, map its text: prompt: '{{{column}}}'"
                )
        for message in asked:
            if message["role"] == "assistant":
                message["learned"] = False
        return [*self._history(row, where), *asked, *answered]

    def _alpaca(self, where: str, row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
        prompt = self._text_of("instruction", row, where)
        extra = self._text_of("input" if "input" in row else "context", row, where, "")
        if extra.strip():
            prompt += f"\n\n{extra}"
        answer = self._text_of("output" if "output" in row else "response", row, where)
        return [_message("user", prompt)], [_message("assistant", answer)]

    def _turns(self, field: str, role: str, where: str, row: dict[str, Any]) -> list[Message]:
        """Returns the message of a prompt or completion, or its messages if it is a list of them,
        which trl calls conversational."""
        column = self.source.columns.get(field, field)
        if "{" not in column and (turns := turns_in(value_of(row, column, where))):
            return self._read(turns, column, where)
        text = self._text_of(field, row, where)
        if role == "assistant" and self._tools(row, where) and (calls := calls_of(text)):
            return self._read([{"role": role, "content": None, "tool_calls": calls}], column, where)
        return [_message(role, text)]

    def _chat(self, where: str, row: dict[str, Any]) -> list[Message]:
        column = self.source.columns.get("messages") or chat_column(row) or CHAT_COLUMNS[0]
        turns = value_of(row, column, where)
        if isinstance(turns, str):  # a cell of a CSV file
            turns = parse_json(turns, f"{where}: {column}", "a list of role and content")
        if column == "conversations" and isinstance(turns, list) and _are_texts(turns):
            turns = [_message(role, text) for role, text in zip(cycle(SPEAKERS), turns)]  # LIMA's
        return self._read(turns, column, where)

    def _read(self, turns: Any, column: str, where: str) -> list[Message]:
        messages, unread = read_messages(turns, f"{where}: {column}")
        self.findings.unread |= dict.fromkeys(f"{key} of messages" for key in sorted(unread))
        return messages

    def _system(self, row: dict[str, Any], where: str) -> str:
        mapped = "system" in self.source.columns
        name = next((name for name in SYSTEMS if row.get(name) and not mapped), "system")
        value = row.get(name)
        if not mapped and name not in self._mapped and isinstance(value, (list, dict)):
            return system_text(value, f"{where}: {name}")
        return self._text_of(name, row, where, "")

    def _add_system(self, messages: list[Message], row: dict[str, Any], where: str) -> None:
        """Begins the messages with the row's or the recipe's system message, if they have none."""
        of_row = self._system(row, where)
        system = of_row or self.data.system
        if system and messages[0]["role"] != "system":
            check_characters(system, where)
            messages.insert(0, _message("system", system))
        elif of_row.strip() not in ("", messages[0]["content"].strip()):
            self.findings.counts[OTHER_SYSTEM] += 1

    def _history(self, row: dict[str, Any], where: str) -> list[Message]:
        """Returns earlier turns, which LLaMA-Factory writes as pairs of question and answer."""
        pairs = self._cell("history", row, where) or []
        if isinstance(pairs, str):
            pairs = parse_json(pairs, f"{where}: history", "a list of pairs") if pairs else []
        if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
            raise BadRowError(
                f"{where}: history: expected pairs of question and answer, found {shown(pairs)}"
            )
        turns = [zip(SPEAKERS, pair, strict=True) for pair in pairs]
        return [_message(role, content) for pair in turns for role, content in pair]

    def _tools(self, row: dict[str, Any], where: str) -> Any:
        """Returns the function definitions; OpenAI's name before `tools` was `functions`."""
        return self._cell("tools", row, where) or self._cell("functions", row, where)

    def _cell(self, name: str, row: dict[str, Any], where: str) -> Any:
        """Returns the value of a field: from the column that the recipe maps to it, or from the
        column of that name, unless it is mapped to another field."""
        if (column := self.source.columns.get(name)) is not None:
            return value_of(row, column, where)
        return None if name in self._mapped else row.get(name)

    def _text_of(
        self, name: str, row: dict[str, Any], where: str, default: str | None = None
    ) -> str:
        """Returns a field as text, by the recipe's `columns`: a column or a template of columns."""
        template = self.source.columns.get(name)
        if template is None:
            is_absent = name in self._mapped or row.get(name) is None
            if default is not None and is_absent:
                return default
            return text_of(row, name, where)
        if "{" in template:
            return text_from(row, template, where)
        if default is not None and value_of(row, template, where) is None:
            return default
        return text_of(row, template, where)

    def _note_unread(self, row: dict[str, Any]) -> None:
        columns = (*row, *self._flags_of(row))
        if columns not in self._seen_columns:
            self._seen_columns.add(columns)
            known = self._known_columns(row)
            self.findings.unread |= {name: None for name in row if name not in known}

    @cached_property
    def _mapped(self) -> set[str]:
        return mapped_columns(self.source.columns)

    def _known_columns(self, row: dict[str, Any]) -> set[str]:
        known = set(self._flags_of(row))
        if self.form == "text":
            return known | {"text"}
        known |= BESIDE
        if self.form == "messages":
            return known | {chat_column(row) or CHAT_COLUMNS[0]}
        for form, needed, more in FORMATS:
            if form == self.form and needed <= row.keys():
                return known | needed | (more - ({"context"} if "input" in row else set()))
        return known

    def _left_out(self, row: dict[str, Any]) -> str:
        """Says why the row's own columns leave it out; empty if they do not."""
        flags = self._flags_of(row)
        out = (name for name, wanted in flags.items() if not wanted and name not in self._mapped)
        name = next(out, "")
        return name and f"{name} {'0' if name == 'weight' else 'false'}"

    def _flags_of(self, row: dict[str, Any]) -> dict[str, bool]:
        """Maps the row's own `weight` and labels to whether they keep the row; without those that
        are neither 0 or 1, nor false or true. CSV files have them as text."""
        values = {name: _parsed(row.get(name)) for name in ("weight", *WANTED)}
        return {
            name: bool(value)
            for name, value in values.items()
            if value in (0, 1) and (name == "weight" or isinstance(value, bool))
        }


def mapped_columns(columns: dict[str, str]) -> set[str]:
    """Returns the columns that the recipe's `columns` read."""
    paths = mapped_paths(columns)
    numbers = {index for path in paths for _, index in STEP.findall(path)}
    return {*columns.values(), *paths, *numbers, *(re.split(r"[.\[]", path)[0] for path in paths)}


def mapped_paths(columns: dict[str, str]) -> list[str]:
    """Returns the columns and paths that the recipe's `columns` name, also in templates."""
    return [
        path
        for template in columns.values()
        for path, _ in (PLACEHOLDER.findall(template) if "{" in template else [(template, "")])
    ]


def text_from(row: dict[str, Any], template: str, where: str) -> str:
    """Returns a column as text, or a template filled with columns: conversations as transcripts,
    and lists as JSON, unless their placeholder says otherwise.

    Raises:
        BadRowError: for a value that cannot be text.
        UserError: for a template that names no column.
    """
    if "{" not in template or template in row:
        return text_of(row, template, where)
    matches = PLACEHOLDER.finditer(template)
    texts = {match[0]: _text_at(row, match[1], match[2], where) for match in matches}
    if not texts:
        raise UserError(
            f"{where}: columns: {template!r} names no column; write {{COLUMN}} with one of "
            f"{columns_of(row)}"
        )
    text = PLACEHOLDER.sub(lambda match: texts[match[0]], template)
    return text if all(texts.values()) else text.strip()  # no blank lines beside an empty text


def _text_at(row: dict[str, Any], path: str, form: str | None, where: str) -> str:
    if form:
        return lines_of(row, path, form, where)
    turns = turns_in(value_of(row, path, where))
    return transcript(turns, f"{where}: {path}") if turns else text_of(row, path, where)


def layout_of(row: dict[str, Any]) -> str | None:
    """Returns the format of a row; None if its columns do not tell."""
    if chat_column(row):
        return "messages"
    for form, columns, _ in FORMATS:
        if columns <= row.keys():
            return form
    return "text" if "text" in row else None


def chat_column(row: dict[str, Any]) -> str | None:
    """Returns the column with the conversation to learn; None if there is none.

    A conversation beside an answer, such as its summary, is what the answer is about.
    """
    if named := next((name for name in CHAT_COLUMNS if name in row), None):
        return named
    if any(str(name).lower() in ANSWERS for name in row):
        return None
    return next((name for name in MAYBE_CHAT if turns_in(row.get(name))), None)


def detect_format(source: Source, row: dict[str, Any]) -> str:
    """Determines the format of a source, from the recipe or its first row.

    Raises:
        UserError: for columns of no known format.
    """
    if source.columns:
        mapped = set(source.columns)
        return next((form for form in ("messages", "text") if form in mapped), "prompt_completion")
    if source.format != "auto":
        return source.format
    if form := layout_of(row):
        return form
    if row.keys() >= PAIR:
        raise UserError(f"{source.source}: {PREFERENCES}")
    raise UserError(
        f"{source.source}: cannot tell the format from the columns {columns_of(row)}; "
        "expected messages, prompt and completion, instruction and output, or text. "
        "Map your own: columns: {prompt: QUESTION_COLUMN, completion: ANSWER_COLUMN}"
    )


def _check_media(messages: list[Message], row: dict[str, Any], where: str) -> None:
    """Refuses messages about a picture, sound or video: the model would learn to invent one.

    Raises:
        BadRowError: naming the column that a message refers to.
    """
    for message in messages:
        for kind in MEDIA.findall(message["content"]):
            if column := next((name for name in (kind, f"{kind}s") if row.get(name)), None):
                raise BadRowError(
                    f"{where}: a message refers to column {column} by <{kind}>: only text is read"
                )


def _parsed(value: Any) -> Any:
    """Returns the number or truth value that a text stands for; anything else as it is."""
    if isinstance(value, str) and len(value) < 6:
        with suppress(ValueError):
            return json.loads(value.lower())
    return value


def _defines(message: Message, tools: tuple[dict[str, Any], ...]) -> bool:
    """Says whether a system message holds every text of the functions' definitions."""
    texts = strings_of([tool["function"] for tool in tools])
    return message["role"] == "system" and all(text in message["content"] for text in texts)


def _are_texts(items: list[Any]) -> bool:
    return all(isinstance(item, str) for item in items)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and _are_texts(pair)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
