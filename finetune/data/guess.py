"""Guesses what rows are for: which column is the question and which the answer, and the task."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from finequant.finetune.data.columns import columns_of, text_of, value_of
from finequant.finetune.data.files import BadRowError
from finequant.finetune.data.messages import turns_in
from finequant.finetune.data.rows import (
    ANSWERS,
    PAIR,
    PREFERENCES,
    SIDES,
    layout_of,
    mapped_columns,
    mapped_paths,
)
from finequant.recipes.errors import UserError

Task = Literal["classify", "chat", "tools", "summarize", "translate", "extract"]

QUESTIONS = ("question", "query", "text", "sentence", "dialogue", "document", "article", "input")
CHOICES = ("choice", "option", "candidate", "ending", "alternative", "distractor")
"""Words in the name of a list whose first item need not be the right one."""
NUMBERS = (*ANSWERS, "gold", "correct", "index")
"""Words in the name of a column with the number of the right choice."""
CHOOSE = (
    "; --completion '{}[NUMBER]' takes the choice whose number, from 0, is in column NUMBER; where "
    "no column has it, write the right choice into a column first"
)
CALLS = ("tool_calls", "function_call", "<tool_call>")
"""What a conversation with function calls contains, in one layout or another."""
LANGUAGE = re.compile("[a-z]{2}([-_][A-Za-z]{2,4})?")
"""A column that holds the texts of a language, such as en or pt_BR."""
SHORT = 40
"""Characters of a label on average, at most."""


@dataclass(frozen=True)
class Look:
    """What was guessed from the rows."""

    task: Task | Literal["text"]
    columns: dict[str, str]
    """The source's `columns`; empty for rows of a known layout."""
    answers: list[str]
    """Empty for texts and for conversations."""
    unread: list[str] = field(default_factory=list)
    """Columns that `columns` does not use; empty for rows of a known layout."""


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
    known = None if columns else layout_of(first)
    if known == "messages" or (known and any(turns_in(first.get(side)) for side, _ in SIDES)):
        calls = any(mark in json.dumps(row, default=str) for row in rows for mark in CALLS)
        return Look(task or ("tools" if calls else "chat"), {}, [])
    if known not in (None, "text"):
        name = next(name for name in ("completion", "output", "response") if name in first)
        answers = [str(row.get(name)) for row in rows]
        return Look(task or _task_of(answers, name), {}, answers)
    if first.keys() >= PAIR and "completion" not in columns:
        raise UserError(f"{data}: {PREFERENCES}")
    if list(cells(first, ())) == ["text"] and not columns:
        if task:
            raise UserError(f"--task {task}: the rows of {data} are texts, without answers")
        return Look("text", {}, [])
    if chosen := _right_choice(rows):
        columns = {"completion": chosen, **columns}
    flat = [cells(row, columns.values()) for row in rows]
    chosen = columns_of_pair(flat, data, columns)
    answers = [str(row.get(chosen["completion"])) for row in flat]
    task = task or _task_of(answers, chosen["completion"], chosen["prompt"])
    return Look(task, chosen, answers, _unread(rows, chosen))


def columns_of_pair(
    rows: Sequence[dict[str, str]], data: str, given: dict[str, str]
) -> dict[str, str]:
    """Returns the columns of prompt and completion: as given, by their names, or by their values.

    A column that never changes is no question. The first item of a list holds the answer only if
    its name says so: the first of several choices need not be the right one. Instructions come
    before the question that goes with them.

    Raises:
        UserError: listing the columns, if they do not say which is which.
    """
    texts = list(rows[0])
    varied = [name for name in texts if len(rows) == 1 or _distinct(rows, name) > 1]
    items = [name for name in texts if "[0]" in name]
    choices = [name for name in items if any(word in name.lower() for word in CHOICES)]
    instruction = next((n for n in texts if n.lower() in ("instruction", "instructions")), None)
    question = given.get("prompt") or _named(varied, QUESTIONS) or instruction
    answer = given.get("completion") or _named([n for n in texts if n not in choices], ANSWERS)
    if question is None and answer is None:
        question, answer = _text_and_label(
            [{name: text for name, text in row.items() if name not in items} for row in rows]
        )
    if answer is None and question is not None:
        rest = [name for name in varied if name != question and name not in items]
        answer = min(rest, key=lambda name: _distinct(rows, name), default=None)
    if question is None and answer is not None:
        rest = [name for name in texts if name != answer]
        question = max(rest, key=lambda name: _distinct(rows, name), default=None)
    if question is None or answer is None:
        raise UserError(
            f"{data}: which column is the question and which the answer? The columns with text "
            f"are {columns_of(texts)}: add --prompt COLUMN --completion COLUMN"
            + (CHOOSE.format(choices[0].partition("[0]")[0]) if choices else "")
        )
    for option, name in given.items():
        if name not in texts and "{" not in name:
            raise UserError(
                f"--{option}: {data} has no column {name!r} with text; expected one of "
                f"{columns_of(texts)}"
            )
    if "prompt" not in given and instruction not in (None, question, answer):
        question = f"{{{instruction}}}\n\n{{{question}}}"
    return {"prompt": question, "completion": answer}


def _right_choice(rows: Sequence[dict[str, Any]]) -> str | None:
    """Finds a list of choices and the column with the number of the right one: choices[gold]."""

    def reads(path: str) -> bool:
        with suppress(BadRowError):
            return all(isinstance(value_of(row, path, ""), str) for row in rows)
        return False

    first = rows[0]
    numbers = [name for name in first if any(word in name.lower() for word in NUMBERS)]
    lists = [name for name, value in first.items() if isinstance(value, list)]
    paths = [f"{choices}[{number}]" for choices in lists for number in numbers]
    right = [path for path in paths if reads(path)]
    return right[0] if len(right) == 1 else None


def _unread(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """Lists the columns, fields of columns, and entries of lists that `columns` does not read."""
    mapped, paths = mapped_columns(columns), mapped_paths(columns)
    whole = {re.sub(r"\[.*?\]", "[0]", path) for path in paths}  # as `_texts` writes them
    fields = [path for path, _ in _texts(rows[0]) if path not in rows[0]]
    unread = []
    for name in rows[0]:
        inside = [path for path in fields if re.split(r"[.\[]", path)[0] == name]
        if name not in mapped:
            unread.append(name)
        elif name not in whole:
            unread += [path for path in inside if path not in whole]
    lists = dict.fromkeys(path.partition("[0]")[0] for path in paths if "[0]" in path)
    return unread + [f"{name}[1] and so on" for name in lists if _has_more(rows, name)]


def _has_more(rows: Sequence[dict[str, Any]], path: str) -> bool:
    """Says whether a list has more than one entry in any row."""
    lengths = []
    for row in rows:
        with suppress(BadRowError):
            value = value_of(row, path, "")
            lengths.append(len(value) if isinstance(value, list) else 0)
    return max(lengths, default=0) > 1


def cells(row: dict[str, Any], given: Iterable[str]) -> dict[str, str]:
    """Returns the texts of a row, and also, as text, the columns that are given and numbers whose
    column is named like an answer, such as label."""
    flat = dict(_texts(row))
    labels = [name for name, value in row.items() if isinstance(value, (int, float))]
    for name in (*(label for label in labels if label.lower() in ANSWERS), *given):
        with suppress(BadRowError):
            flat.setdefault(name, text_of(row, name, ""))
    return flat


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields the texts of a row, nested ones too, by the paths that `columns` takes."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and value and path:
        yield from _texts(value[0], f"{path}[0]")


def _named(columns: list[str], words: Sequence[str]) -> str | None:
    """Finds a column whose name is, or else contains, one of these words; earlier words win."""
    lower = {name.lower(): name for name in columns}
    for word in words:
        if word in lower:
            return lower[word]
    return next((lower[name] for word in words for name in lower if word in name), None)


def _text_and_label(rows: Sequence[dict[str, str]]) -> tuple[str, str] | tuple[None, None]:
    """Finds the column with the longest texts, and the only other one with few different values."""
    length = {name: fmean(len(row.get(name, "")) for row in rows) for name in rows[0]}
    question = max(length, key=length.__getitem__, default="")
    labels = [name for name in length if 1 < _distinct(rows, name) <= len(rows) // 4]
    return (question, labels[0]) if len(labels) == 1 and labels != [question] else (None, None)


def _distinct(rows: Sequence[dict[str, str]], name: str) -> int:
    return len({str(row.get(name)) for row in rows})


def _task_of(answers: list[str], name: str, prompt: str = "") -> Task:
    """Guesses the task from the answers and the columns of answer and question."""
    if all(answer.lstrip().startswith(("{", "[")) for answer in answers):
        return "extract"
    if "summar" in name.lower():
        return "summarize"
    few = len(set(answers)) <= max(2, len(answers) // 4)
    if few and fmean(map(len, answers)) <= SHORT:
        return "classify"
    columns = (column.rpartition(".")[2] for column in (prompt, name))
    return "translate" if all(map(LANGUAGE.fullmatch, columns)) else "chat"
