"""Guesses which columns are the question and which the answer, by their names and values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import partial
from statistics import fmean
from typing import Any

from finequant.finetune.data.columns import columns_of, text_of, value_of
from finequant.finetune.data.files import BadRowError
from finequant.finetune.data.messages import calls_of, transcript, turns_in
from finequant.finetune.data.rows import ANSWERS, BESIDE, mapped_columns, mapped_paths
from finequant.recipes.errors import UserError, shown

QUESTIONS = (
    *("question", "query", "prompt", "text", "sentence", "dialogue", "document", "article"),
    *("input", "problem", "user", "context"),
)
CONTEXTS = ("context", "passage")
"""Columns that a question is about, and that come before it."""
CHOICES = ("choice", "option", "candidate", "ending", "alternative", "distractor")
"""Words in the name of a list whose first item need not be the right one."""
NUMBERS = (*ANSWERS, "gold", "correct", "index")
"""Words in the name of a column with the number or letter of the right choice."""
IDS = {"id", "idx", "index", "uuid", "rejected"}
"""Words in the name of a column that is neither question nor answer."""
DETAILS = {"topic", "type", "source", "author", "level", "original"}
"""Words in the name of a column that describes the row, and is left out with a note."""
CHOOSE = (
    "; --completion '{}[NUMBER]' takes the choice whose number, from 0, or letter is in column "
    "NUMBER; where no column has it, write the right choice into a column first"
)
SHORT = 40
"""Characters of a label on average, at most."""


def columns_of_pair(
    rows: Sequence[dict[str, str]], data: str, given: dict[str, str]
) -> dict[str, str]:
    """Returns the columns of prompt and completion: as given, by their names, or by their values.

    A column that never changes is no question. The first item of a list holds the answer only if
    its name says so: the first of several choices need not be the right one. Instructions and
    contexts come before the question that goes with them.

    Raises:
        UserError: listing the columns, if they do not say which is which.
    """
    texts = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in texts if not IDS & _words(name)]
    items = [name for name in texts if "[0]" in name]
    choices = [name for name in items if any(word in name.lower() for word in CHOICES)]
    answers = [name for name in names if name not in choices]
    answer = given.get("completion") or _named(answers, ANSWERS)
    varied = [n for n in names if n != answer and (len(rows) == 1 or _distinct(rows, n) > 1)]
    lead = _exactly(varied, ("instruction", "instructions")) or _exactly(varied, CONTEXTS)
    question = given.get("prompt") or _named(varied, QUESTIONS) or lead
    rest = [name for name in varied if name not in (question, lead, *items)]
    if question is None and answer is None:
        question, answer = _text_and_label(
            [{name: text for name, text in row.items() if name not in items} for row in rows]
        )
    elif answer is None and not named_like(answers, ANSWERS):
        answer = _only(n for n in rest if is_prose(t := _column(rows, n)) or is_label(t))
        is_title = question == "text" and answer and not is_label(_column(rows, answer))
        if is_title or (answer and _numbered(answer) == _numbered(question or "")):
            answer = None  # such as sentence2 beside sentence1, for which a number is the answer
    elif question is None:
        question = _only(name for name in rest if is_prose(_column(rows, name)))
    if question is None or answer is None:
        raise UserError(f"{data}: {_which_is_which(rows, texts, choices)}")
    for option, name in given.items():
        if name not in texts and "{" not in name:
            raise UserError(
                f"--{option}: {data} has no column {name!r} with text; expected one of "
                f"{columns_of(texts)}"
            )
    if "prompt" not in given and lead not in (None, question, answer):
        question = f"{{{lead}}}\n\n{{{question}}}"
    return {"prompt": question, "completion": answer}


def _which_is_which(rows: Sequence[dict[str, str]], texts: list[str], choices: list[str]) -> str:
    """Asks for the columns of question and answer, and lists those with text."""
    alike = [name for name in texts if len(rows) > 1 and _distinct(rows, name) == 1]
    same = f" ({columns_of(alike)}: the same in all rows)" if alike else ""
    choose = CHOOSE.format(choices[0].partition("[0]")[0]) if choices else ""
    return (
        "which column is the question and which the answer? The columns with text are "
        f"{columns_of(texts)}{same}: add --prompt COLUMN --completion COLUMN, each several times "
        f"to join columns; for texts without answers, --task text --completion COLUMN{choose}"
    )


def with_names(rows: Sequence[dict[str, str]], columns: dict[str, str]) -> dict[str, str]:
    """Returns the columns with the names of the labels as the answer, where it is their numbers
    and another column has exactly one name for each of them."""
    numbers = _column(rows, columns["completion"])
    if not all(number.isdecimal() for number in numbers):
        return columns
    others = {n: _column(rows, n) for n in filled(rows) if n not in columns.values()}
    for name, texts in others.items():
        pairs = set(zip(numbers, texts, strict=True))
        is_names = is_label(texts) and not any(map(str.isdecimal, texts))
        if is_names and len(pairs) == len(set(numbers)) == len(set(texts)):
            return columns | {"completion": name}
    return columns


def right_choice(rows: Sequence[dict[str, Any]]) -> str | None:
    """Finds a list of choices, and the column that says which is right: choices[gold]."""

    def reads(path: str) -> bool:
        with suppress(BadRowError):
            return all(isinstance(value_of(row, path, ""), str) for row in rows)
        return False

    first = filled(rows)
    numbers = [name for name in first if any(word in name.lower() for word in NUMBERS)]
    lists = [name for name, value in first.items() if isinstance(value, list)]
    paths = [f"{choices}[{number}]" for choices in lists for number in numbers]
    right = [path for path in paths if reads(path)]
    return right[0] if len(right) == 1 else None


def left_out(
    rows: Sequence[dict[str, Any]], flat: Sequence[dict[str, str]], columns: dict[str, str]
) -> list[str]:
    """Lists what may belong to the questions but is in neither prompt nor completion: texts and
    choices that differ from row to row, and further entries of lists.

    flat: the texts of the rows, by their paths.
    """
    asked = mapped_paths({"prompt": columns["prompt"]})
    answered = mapped_paths({"completion": columns["completion"]})
    top = partial(top_of, rows)
    whole = [path for path in answered if path in (_as_items(path), top(path))]  # no choices[gold]
    named = [name for name in columns.values() if name in rows[0]]  # such as {answer}
    read, left = {*named, *asked, *map(_as_items, asked), *whole}, []
    alike = set(map(top, whole)) - set(map(top, asked))
    for path in dict.fromkeys(path for row in flat for path in row):
        texts = _column(flat, path)
        is_choice = any(word in path.lower() for word in CHOICES)
        is_answer = top(path) in alike and not named_like([path.rpartition(".")[2]], QUESTIONS)
        if _is_in(read, path) or is_answer or top(path) in {*BESIDE, "history"}:
            continue
        if len(set(texts)) == 1 < len(rows):
            continue
        if (IDS | DETAILS) & _words(path) or is_label(texts):
            continue
        if is_choice or is_prose(texts):
            inside = top(path) in map(top, asked)
            left.append(path.partition("[")[0] if inside else top(path))
    return list(dict.fromkeys(left)) + _further(rows, asked)


def unread_columns(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """Lists the columns, fields of columns, and entries of lists that `columns` does not read."""
    mapped, paths = mapped_columns(columns), mapped_paths(columns)
    whole = {*map(_as_items, paths)}
    first, unread = filled(rows), []
    fields = [path for path, _ in _texts(first) if path not in first]
    for name in first:
        inside = [path for path in fields if top_of(rows, path) == name]
        if name in BESIDE:
            continue
        if name not in mapped:
            unread.append(name)
        elif name not in whole:
            unread += [path for path in inside if not _is_in(whole, path)]
    return unread + [f"{name}[1] and so on" for name in _further(rows, paths)]


def _further(rows: Sequence[dict[str, Any]], paths: list[str]) -> list[str]:
    """Names the lists of which these paths read only the first entry, although there are more."""
    lists = dict.fromkeys(path.partition("[0]")[0] for path in paths if "[0]" in path)
    return [name for name in lists if max(lengths_of(rows, name), default=0) > 1]


def filled(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns a row that has every column, each with the first value that is not empty."""
    first: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            first[name] = first.get(name) or value
    return first


def not_texts(rows: Sequence[dict[str, Any]]) -> str:
    """Lists the columns with values that JSON does not have, such as dates and bytes, with an
    example of each; empty if there are none."""
    usual = (str, int, float, Decimal, list, dict)
    values = {name: value for name, value in filled(rows).items() if value is not None}
    others = {name: value for name, value in values.items() if not isinstance(value, usual)}
    return ", ".join(f"{name} ({shown(value)})" for name, value in others.items())


def several_answers(rows: Sequence[dict[str, Any]], answer: str) -> str | None:
    """Finds a list of several answers, of which this is the first: objects, such as the completions
    of several models, in every row, or texts, unless they are other words for an answer, as in
    SQuAD. With as many numbers beside them, they are rated."""
    name, is_entry, inside = answer.partition("[0]")
    lengths = lengths_of(rows, name)
    if inside.startswith("."):
        return name if min(lengths, default=0) > 1 else None
    if not is_entry or max(lengths) < 2:
        return None
    ratings = [column for column in filled(rows) if column != name and _are_numbers(rows, column)]
    is_rated = any(lengths_of(rows, column) == lengths for column in ratings)
    return name if is_rated or not named_like([name], ["answer"]) else None


def _are_numbers(rows: Sequence[dict[str, Any]], name: str) -> bool:
    """Says whether a column holds lists of numbers or truth values, and nothing else."""
    return all(
        isinstance(values := row.get(name), list)
        and all(isinstance(value, (int, float)) for value in values)
        for row in rows
    )


def lengths_of(rows: Sequence[dict[str, Any]], path: str) -> list[int]:
    """Returns the number of entries of a list, or 0 for anything else, in each row that has it."""
    lengths = []
    for row in rows:
        with suppress(BadRowError):
            value = value_of(row, path, "")
            lengths.append(len(value) if isinstance(value, list) else 0)
    return lengths


def cells(row: dict[str, Any], given: Iterable[str]) -> dict[str, str]:
    """Returns the texts of a row, and also, as text, the columns that are given and numbers whose
    column is named like an answer, such as label."""
    flat = dict(_texts(row))
    labels = [name for name, value in row.items() if isinstance(value, (int, float, Decimal))]
    for name in (*(label for label in labels if label.lower() in ANSWERS), *given):
        with suppress(BadRowError):
            flat.setdefault(name, text_of(row, name, ""))
    return flat


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields the texts of a row, also nested ones, conversations and calls, by the paths that
    `columns` takes."""
    if path and (turns := turns_in(value)):
        with suppress(BadRowError):
            yield path, transcript(turns, path)
    elif path and calls_of(value):
        yield path, value if isinstance(value, str) else json.dumps(value, default=str)
    elif isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and value and path:
        yield from _texts(value[0], f"{path}[0]")


def _as_items(path: str) -> str:
    """Returns a path as `_texts` writes it, with 0 as the number of each entry."""
    return re.sub(r"\[.*?\]", "[0]", path)


def _is_in(paths: Iterable[str], path: str) -> bool:
    """Says whether a path is one of these, or leads further into one."""
    return any(path == whole or path.startswith((f"{whole}.", f"{whole}[")) for whole in paths)


def top_of(rows: Sequence[dict[str, Any]], path: str) -> str:
    """Returns the column that a path begins with; its name may itself have dots and brackets."""
    return path if any(path in row for row in rows) else re.split(r"[.\[]", path)[0]


def _words(name: str) -> set[str]:
    """Returns the words in the name of a column, in lower case and without a plural's s."""
    words = re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower())
    return {word.removesuffix("s") for word in words}


def named_like(columns: Iterable[str], words: Sequence[str]) -> list[str]:
    """Lists the columns whose names contain a word: the first of these that any name contains."""
    names = [name for name in columns if not IDS & _words(name)]
    return next((like for word in words if (like := [n for n in names if word in _words(n)])), [])


def _named(columns: list[str], words: Sequence[str]) -> str | None:
    """Finds the column whose name is one of these words, or else the only one that contains one.

    Earlier words win. Columns that differ in a final number, such as summary1 and summary2, count
    as one.
    """
    like = named_like(columns, words)
    is_one = len(set(map(_numbered, like))) == 1
    return _exactly(columns, words) or (like[0] if is_one else None)


def _numbered(name: str) -> str:
    """Returns the name of a column without a number at its end."""
    return re.sub(r"\d+$", "", name)


def _exactly(columns: list[str], words: Sequence[str]) -> str | None:
    lower = {name.lower().strip(): name for name in columns}
    return next((lower[word] for word in words if word in lower), None)


def _only(names: Iterable[str]) -> str | None:
    """Returns a name if there is no other."""
    listed = list(names)
    return listed[0] if len(listed) == 1 else None


def _text_and_label(rows: Sequence[dict[str, str]]) -> tuple[str, str] | tuple[None, None]:
    """Finds the column with the longest texts, and the only other one with few different values."""
    length = {name: fmean(map(len, _column(rows, name))) for name in filled(rows)}
    question = max(length, key=length.__getitem__, default="")
    labels = [name for name in length if is_label(_column(rows, name))]
    return (question, labels[0]) if len(labels) == 1 and labels != [question] else (None, None)


def is_label(texts: Sequence[str]) -> bool:
    """Says whether these are short, and few of them different or empty."""
    return (
        2 * texts.count("") < len(texts)
        and 1 < len(set(texts)) <= len(texts) // 4
        and fmean(map(len, texts)) <= SHORT
    )


def is_prose(texts: Sequence[str]) -> bool:
    """Says whether most of these are words of a language, unlike keys, links, dates and numbers."""
    return fmean(map(_has_words, texts)) > 0.5


def _has_words(text: str) -> bool:
    is_key = text.isascii() and len(text.split()) < 2 and not text.strip().isalpha()
    return not is_key and any(map(str.isalpha, text))


def _column(rows: Sequence[dict[str, str]], name: str) -> list[str]:
    return [row.get(name, "") for row in rows]


def _distinct(rows: Sequence[dict[str, str]], name: str) -> int:
    return len(set(_column(rows, name)))
