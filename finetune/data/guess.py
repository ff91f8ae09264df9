"""Guesses what rows are for: texts, conversations, or questions and answers, and which task."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from finequant.finetune.data.columns import columns_of, value_of
from finequant.finetune.data.files import BadRowError
from finequant.finetune.data.guess_columns import (
    CHOICES,
    QUESTIONS,
    SHORT,
    cells,
    columns_of_pair,
    filled,
    is_label,
    is_prose,
    left_out,
    lengths_of,
    named_like,
    not_texts,
    right_choice,
    several_answers,
    top_of,
    unread_columns,
    with_names,
)
from finequant.finetune.data.messages import ROLES, calls_of, turns_in
from finequant.finetune.data.rows import (
    ANSWERS,
    PAIR,
    PREFERENCES,
    SIDES,
    chat_column,
    layout_of,
    mapped_paths,
    text_from,
)
from finequant.recipes.errors import UserError, shown

Task = Literal["classify", "chat", "tools", "summarize", "translate", "extract", "text"]

CALL = re.compile(r'<tool_call>\s*\{\s*"')
"""A call that is written out as JSON in the text of a turn."""
LANGUAGE = re.compile("[a-z]{2}([-_][A-Za-z]{2,4})?")
"""A column that holds the texts of a language, such as en or pt_BR."""
WRITTEN_OUT = re.compile(
    r"\b(human|user|instruction)\b\W{0,3}:.*\b(assistant|bot|ai|gpt|response)\b\W{0,3}:"
    r"|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|\[\|human\|\]",
    re.IGNORECASE | re.DOTALL,
)
"""The speakers, or the tokens of a chat template, in a text that is a whole conversation."""
MOST_WORDS = 8
"""Words in the name of a column."""
NAMELESS = re.compile(r"(Unnamed: \d+)?")
"""The name of a column that has none in its table."""
MOST_COLUMNS = 5
"""An only row with more columns of texts may be an object of questions and answers."""


@dataclass(frozen=True)
class Look:
    """What was guessed from the rows."""

    task: Task
    columns: dict[str, str]
    """The source's `columns`; empty for rows of a known layout."""
    answers: list[str]
    """Empty for texts and for conversations."""
    unread: list[str] = field(default_factory=list)
    """Columns that `columns` does not use; empty for rows of a known layout."""
    has_words: bool = False
    """Whether some answers call functions, and others do not."""


def look_at(
    rows: Sequence[dict[str, Any]], data: str, task: Task | None, columns: dict[str, str]
) -> Look:
    """Guesses the columns of question and answer, and the task.

    data: the name of the rows in messages.
    columns: the columns that are known.

    Raises:
        UserError: listing the columns, if they do not say which is which.
    """
    first = rows[0]
    if task == "text":
        return _texts(first, data, columns)
    known = None if columns else layout_of(first)
    if known == "messages" or (known and any(turns_in(first.get(side)) for side, _ in SIDES)):
        return _chats(rows, task, chat_column(first) or "completion", {})
    if known == "prompt_completion":
        flat, pair = [cells(row, ()) for row in rows], {side: side for side, _ in SIDES}
        _refuse_left_out(left_out(rows, flat, pair), rows, data, pair)
    if known not in (None, "text"):
        name = next(name for name in ("completion", "output", "response") if name in first)
        answers = [str(row.get(name)) for row in rows]
        task = task or _task_of(rows, answers, name)
        return Look(task, {}, answers, has_words=_has_words(answers))
    _refuse(rows, data, columns)
    if known == "text" and _are_texts(rows):
        _refuse_written_out(rows, ["text"], data)
        if task:
            raise UserError(f"--task {task}: the rows of {data} are texts, without answers")
        return Look("text", {}, [])
    if chat := _only_chat(first, columns):
        return _chats(rows, task, chat, {"messages": chat})
    return _pairs(rows, data, task, columns)


def _texts(row: dict[str, Any], data: str, columns: dict[str, str]) -> Look:
    column = columns.get("completion", "text")
    texts = cells(row, ())
    if "prompt" in columns or column not in texts:
        raise UserError(
            "--task text: name the column of the texts by --completion COLUMN, without --prompt; "
            f"the columns of {data} with text are {columns_of(texts)}"
        )
    return Look("text", {"text": column}, [])


def _chats(
    rows: Sequence[dict[str, Any]], task: Task | None, path: str, columns: dict[str, str]
) -> Look:
    """path: the column of the conversations, or of their last turns."""
    calls = [_calls(turn) for row in rows for turn in _asked_turns(row, path)]
    unread = unread_columns(rows, columns) if columns else []
    task = task or ("tools" if any(calls) else "chat")
    return Look(task, columns, [], unread, has_words=any(calls) and not all(calls))


def _asked_turns(row: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """Returns the turns of a conversation that models will be asked for: the last or, in one with
    calls, all of the assistant's."""
    answers = list(filter(_is_answer, _turns(row, path)))
    return answers if any(map(_calls, answers)) else answers[-1:]


def _turns(row: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """Returns the turns of a conversation; none for any other value, or if there is none."""
    with suppress(BadRowError):
        return turns_in(value_of(row, path, "")) or []
    return []


def _is_answer(turn: dict[str, Any]) -> bool:
    return ROLES[str(turn.get("role", turn.get("from"))).lower()] == "assistant"


def _calls(turn: dict[str, Any]) -> bool:
    """Says whether a turn calls functions, in one layout or another."""
    if turn.get("tool_calls") or turn.get("function_call") or turn.get("from") == "function_call":
        return True
    return any(CALL.search(text) for text in turn.values() if isinstance(text, str))


def _pairs(
    rows: Sequence[dict[str, Any]], data: str, task: Task | None, given: dict[str, str]
) -> Look:
    number = right_choice(rows)
    columns = {"completion": number, **given} if number else given
    flat = [cells(row, columns.values()) for row in rows]
    try:
        chosen = columns_of_pair(flat, data, columns)
    except UserError as error:
        _refuse_written_out(rows, list(flat[0]), data)
        if turns := _lists_of_objects(rows):
            raise UserError(
                f"{error}; if {turns[0]} is a conversation, each of its entries needs a role, user "
                "or assistant, and a content"
            ) from None
        if others := not_texts(rows):
            raise UserError(
                f"{error}; not text: {others}: to use it, write it as text first"
            ) from None
        raise
    if "completion" not in columns:
        chosen = with_names(flat, chosen)
    answer = chosen["completion"]
    if not given:
        _refuse_nested(rows, data, chosen)
    if "prompt" not in given:
        _refuse_left_out(left_out(rows, flat, chosen), rows, data, chosen)
    if _turns(rows[0], answer):  # a list of messages, as the API of OpenAI writes
        return _chats(rows, task, answer, chosen)
    if "completion" not in given and (several := several_answers(rows, answer)):
        parts = f"; if all belong to it, add {_options('completion', [f'{several}:lines'])}"
        raise UserError(
            f"{data}: a row has several {several}: if the first is always the answer, add "
            f"--completion {shlex.quote(answer)}{parts if answer.endswith('[0]') else ''}; if not, "
            "write the best one into a column first"
        )
    if _ends_in_answer(rows[0], chosen["prompt"]):
        chosen["prompt"] = f"{{{chosen['prompt']}}}"  # as text: what follows is no further turn
    answers = [_answer(row, chosen["completion"]) for row in rows]
    task = task or _task_of(rows, answers, chosen["completion"], chosen["prompt"])
    return Look(task, chosen, answers, unread_columns(rows, chosen), _has_words(answers))


def _refuse_left_out(
    left: list[str], rows: Sequence[dict[str, Any]], data: str, columns: dict[str, str]
) -> None:
    """Refuses columns that leave out what may belong to the question or the answer.

    Raises:
        UserError: saying how to put it into either, or to leave it out.
    """
    if not left:
        return
    asked, answer = mapped_paths({"prompt": columns["prompt"]}), columns["completion"]
    order = list(dict.fromkeys(name for row in rows for name in row))
    every = sorted([*asked, *left], key=lambda path: order.index(top_of(rows, path)))
    every.sort(key=lambda path: any(word in path.lower() for word in CHOICES))  # those come last
    first = filled(rows)
    every = [f"{path}:lines" if _is_list_of_texts(first.get(path)) else path for path in every]
    fewest, most = (_options("prompt", names) for names in (asked, every))
    raise UserError(
        f"{data}: prompt {columns_of(asked)} and completion {answer} leave out "
        f"{columns_of(left)}. If the model should read it, add {most}; if it should write it, "
        f"{_options('completion', [left[0], answer])}; if neither, {fewest}"
    )


def _refuse_nested(rows: Sequence[dict[str, Any]], data: str, columns: dict[str, str]) -> None:
    """Refuses rows whose question and answer are in the first of several entries of a list.

    Raises:
        UserError: naming the list.
    """
    asked, answered = (mapped_paths({side: columns[side]})[-1] for side, _ in SIDES)
    for end in re.finditer(r"\[0\]", asked):
        path = asked[: end.start()]
        if answered.startswith(asked[: end.end()]) and max(lengths_of(rows, path), default=0) > 1:
            raise UserError(
                f"{data}: prompt {asked} and completion {answered} leave out {path} but for its "
                "first entry: write each of its entries as a row of its own"
            )


def _lists_of_objects(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names the columns that hold lists of several objects, such as turns."""
    return [
        name
        for name, value in rows[0].items()
        if isinstance(value, list) and len(value) > 1 and all(isinstance(x, dict) for x in value)
    ]


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _options(name: str, columns: list[str]) -> str:
    """Returns options as a shell takes them."""
    return " ".join(f"--{name} {shlex.quote(column)}" for column in columns)


def _answer(row: dict[str, Any], template: str) -> str:
    with suppress(BadRowError):
        return text_from(row, template, "")
    return ""


def _has_words(answers: list[str]) -> bool:
    """Says whether some answers are calls, and others are not."""
    calls = [bool(calls_of(answer)) for answer in answers]
    return any(calls) and not all(calls)


def _ends_in_answer(row: dict[str, Any], path: str) -> bool:
    """Says whether this is a conversation that ends with the assistant's turn."""
    return any(map(_is_answer, _turns(row, path)[-1:]))


def _refuse(rows: Sequence[dict[str, Any]], data: str, columns: dict[str, str]) -> None:
    """Refuses rows whose columns say that they are no pairs, unless it is known how to read them.

    Raises:
        UserError: saying what to write instead.
    """
    first = rows[0]
    if first.keys() >= PAIR and "completion" not in columns:
        raise UserError(f"{data}: {PREFERENCES}")
    if columns:
        return
    speaker = str(first.get("role", first.get("from"))).lower()
    if speaker in {*ROLES, "prompter"}:
        raise UserError(
            f"{data}: each row is one message of a conversation: write all messages of a "
            'conversation into one row: {"messages": [{"role": "user", "content": ...}, ...]}'
        )
    names = [str(name) for name in first if name]
    _refuse_nameless(rows, data)
    if (
        len(rows) == 1
        and len(names) > MOST_COLUMNS
        and not named_like(names, (*ANSWERS, *QUESTIONS))
    ):
        raise UserError(
            f"{data}: one row with {len(names)} columns: if these are questions and their values "
            'are the answers, write each pair as a row: {"prompt": ..., "completion": ...}; '
            "otherwise add --prompt COLUMN --completion COLUMN"
        )
    as_values = [name for name in names if any(row.get(name) == name for row in rows)]
    if as_values or (names and all(map(_is_no_name, names)) and not all(map(_is_number, names))):
        raise UserError(
            f"{data}: the first line should name the columns, but seems to be a row: "
            f"{columns_of(as_values or names)}; write a line such as text,label above it, or, if "
            "these are names, add --prompt COLUMN --completion COLUMN"
        )


def _refuse_nameless(rows: Sequence[dict[str, Any]], data: str) -> None:
    """Refuses words in columns without a name: the first line of a table may be a title, or merged
    cells above the names.

    Raises:
        UserError: with the first line.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = {name: [str(row.get(name) or "") for row in rows] for name in columns}
    if any(NAMELESS.fullmatch(name) and is_prose(texts[name]) for name in columns):
        first = ["" if NAMELESS.fullmatch(name) else name for name in columns]
        raise UserError(
            f"{data}: the first line, {shown(first)}, does not name all columns with texts: if it "
            "is a title, or has merged cells, remove it, so that the line of names comes first; "
            "otherwise add --prompt COLUMN --completion COLUMN"
        )


def _is_no_name(name: str) -> bool:
    name = name.strip()
    return len(name.split()) > MOST_WORDS or _is_number(name) or name.endswith((".", "!", "?"))


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[-+]?\d+([.,]\d+)*", text.strip()))


def _are_texts(rows: Sequence[dict[str, Any]]) -> bool:
    """Says whether no column beside `text` can be a question or an answer."""
    others = dict.fromkeys(name for row in rows for name in row if name != "text")
    values = {name: [row.get(name) for row in rows] for name in others}
    return not named_like(list(others), (*ANSWERS, "question", "query")) and not any(
        any(isinstance(value, list) and value for value in column)
        or (
            not any(isinstance(value, dict) for value in column)
            and len(set(texts := list(map(str, column)))) > 1
            and (is_label(texts) or is_prose(texts))
        )
        for column in values.values()
    )


def _refuse_written_out(rows: Sequence[dict[str, Any]], names: list[str], data: str) -> None:
    """Refuses texts that hold whole conversations: the model would learn the questions, too.

    Raises:
        UserError: naming the column.
    """
    for name in names:
        texts = [text for row in rows if isinstance(text := row.get(name), str)]
        if texts and fmean(bool(WRITTEN_OUT.search(text)) for text in texts) > 0.5:
            raise UserError(
                f"{data}: each text of {name} is a whole conversation: write it as a list of "
                'messages, {"messages": [{"role": "user", "content": ...}, {"role": "assistant", '
                f'"content": ...}}]}}; to learn the questions, too, --task text --completion {name}'
            )


def _only_chat(row: dict[str, Any], columns: dict[str, str]) -> str | None:
    """Finds the conversation to learn: the one that is given as completion, or the only one.

    A conversation beside an answer, such as its summary, is what the answer is about.
    """
    chats = [path for path in cells(row, ()) if turns_in(value_of(row, path, ""))]
    if columns:
        given = columns.get("completion")
        return given if set(columns) == {"completion"} and given in chats else None
    return chats[0] if len(chats) == 1 and not named_like(list(row), ANSWERS) else None


def _task_of(
    rows: Sequence[dict[str, Any]], answers: list[str], name: str, prompt: str = ""
) -> Task:
    """Guesses the task from the answers and the columns of answer and question."""
    if {"tools", "functions"} & filled(rows).keys() and any(map(calls_of, answers)):
        return "tools"
    if all(answer.lstrip().startswith(("{", "[")) for answer in answers):
        return "extract"
    if "summar" in name.lower():
        return "summarize"
    few = len(set(answers)) <= max(2, len(answers) // 4)
    if few and fmean(map(len, answers)) <= SHORT:
        return "classify"
    columns = (column.rpartition(".")[2] for column in (prompt, name))
    return "translate" if all(map(LANGUAGE.fullmatch, columns)) else "chat"
