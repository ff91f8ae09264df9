"""Reads values of a row, by the name of a column or a path into it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from decimal import Decimal
from difflib import get_close_matches
from string import ascii_uppercase
from typing import Any

from finequant.finetune.data.files import BadRowError, parse_json
from finequant.recipes.errors import shown

STEP = re.compile(r"\.([^.\[\]]+)|\[([^.\[\]]+)\]")
"""A step of a path: the name of a field, or the number of an entry, which a column may hold."""
LETTER = re.compile("[A-Z]")
"""The number of an entry, as tests with several choices write it."""
MAX_NAMES = 30
"""Maximum number of columns that a message names."""
FORMS = ("lines", "letters")
"""Forms in which a template writes a list of texts."""
PLACEHOLDER = re.compile(rf"\{{([^{{}}]+?)(?::({'|'.join(FORMS)}))?\}}")
"""A column or path in a template, and its form."""
NESTED = re.compile(rf"([^.\[\]]+)((?:{STEP.pattern})+)")


def value_of(row: dict[str, Any], path: str, where: str) -> Any:
    """Returns a column, or a field inside it, such as `answers.text[0]`; in `choices[gold]`, the
    column `gold` says which entry, by its number from 0 or a letter from A.

    Raises:
        BadRowError: naming what is missing, and what the row has instead.
    """
    if path in row:
        return row[path]
    match = NESTED.fullmatch(path)
    if not match or match[1] not in row:
        near = get_close_matches(path, map(str, row), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadRowError(f"{where}: no column {path}; the columns are {columns_of(row)}{hint}")
    value, name = row[match[1]], match[1]
    if isinstance(value, str) and value[:1] in ("{", "["):  # a cell of a CSV file
        value = parse_json(value, f"{where}: {name}", "JSON")
    for key, index in STEP.findall(match[2]):
        if key:
            if not isinstance(value, dict) or key not in value:
                has = f"only {columns_of(value)}" if isinstance(value, dict) else shown(value)
                raise BadRowError(f"{where}: {path}: no {key} in {name}: {has}")
            value, name = value[key], f"{name}.{key}"
        else:
            number = index if index.isdecimal() else str(value_of(row, index, where))
            if LETTER.fullmatch(number):
                number = str(ord(number) - ord("A"))
            is_list = isinstance(value, list)
            if not is_list or not number.isdecimal() or int(number) >= len(value):
                has = f"a list of {len(value)}" if is_list else shown(value)
                raise BadRowError(f"{where}: {path}: no entry {number} in {name}: {has}")
            value, name = value[int(number)], f"{name}[{index}]"
    return value


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """Returns a value as text; anything but text is written as JSON.

    Raises:
        BadRowError: for a missing column or value, or one that JSON cannot write.
    """
    value = value_of(row, column, where)
    if value is None:
        raise BadRowError(f"{where}: {column} is null; the columns are {columns_of(row)}")
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal):  # a price, from Parquet
        return f"{value:f}"
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        raise BadRowError(
            f"{where}: {column} is a list of messages, expected text; put the whole "
            "conversation into one column `messages`"
        )
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # a date, bytes; NaN, which stands for a missing value
        raise BadRowError(
            f"{where}: {column} is {shown(value)}, expected text: convert it or remove the row"
        ) from None


def lines_of(row: dict[str, Any], path: str, form: str, where: str) -> str:
    """Returns the texts of a list, one a line; if `form` is letters, each after its letter: A. ...

    Raises:
        BadRowError: for a value that is no list of texts, or too long for the alphabet.
    """
    items = value_of(row, path, where)
    if isinstance(items, str):  # a cell of a CSV file
        items = parse_json(items, f"{where}: {path}", "a list of texts")
    if not isinstance(items, list) or not all(isinstance(x, (str, int, float)) for x in items):
        raise BadRowError(f"{where}: {path}:{form} is {shown(items)}, expected a list of texts")
    texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
    if form == "letters":
        if len(texts) > len(ascii_uppercase):
            raise BadRowError(
                f"{where}: {path}:letters has {len(texts)} texts, expected at most 26"
            )
        texts = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False)]
    return "\n".join(texts)


def joined(columns: list[str]) -> str:
    """Returns a column, or the template of several, with an empty line between them."""
    if len(columns) == 1 and not columns[0].endswith(tuple(f":{form}" for form in FORMS)):
        return columns[0]
    return "\n\n".join(f"{{{name}}}" for name in columns)


def columns_of(row: Iterable[Any]) -> str:
    """Lists the names of the columns, for a message; beyond MAX_NAMES, only says how many."""
    names = [str(name) or "''" for name in row]
    rest = len(names) - MAX_NAMES
    return (", ".join(names[:MAX_NAMES]) or "none") + (f" and {rest} more" if rest > 0 else "")
