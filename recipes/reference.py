"""Writes docs/keys.md, the list of all keys of a recipe, from the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finequant.recipes.schema import Recipe

HEAD = """# Every key

Written by `finequant schema --markdown` from `recipes/schema.py`. Set a key in the recipe, or
on the command line as `section.key=value`, which takes precedence. Paths start at the recipe's
folder. A list with one entry needs no brackets, except in `lora.target_modules` and
`evaluate.choices`.
"""


def markdown() -> str:
    """Returns the page: a table of keys for each section, and for the entries of its lists."""
    sections: dict[str, type[BaseModel]] = {"": Recipe}
    paths: dict[type[BaseModel], str] = {}
    lines = [HEAD]
    while sections:
        path, section = sections.popitem()
        lines.append(f"## {path or 'The recipe'}\n")
        if section in paths:
            lines.append(f"The same keys as in `{paths[section]}`.\n")
            continue
        paths[section] = path
        lines.append(f"{_summary(section)}\n")
        lines.append("| key | default | values | |\n| :--- | :--- | :--- | :--- |")
        nested = {}
        for name, field in section.model_fields.items():
            lines.append(_row(f"{path}.{name}".lstrip("."), field))
            nested |= {f"{path}.{name}".lstrip("."): inner for inner in _sections(field.annotation)}
        sections |= dict(reversed(nested.items()))
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _summary(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split())


def _row(path: str, field: FieldInfo) -> str:
    cells = [f"`{path}`", _default(field), _values(field.annotation), field.description or ""]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default() if field.default_factory is None else None
    if field.default_factory and not field.default_factory_takes_validated_data:
        value = field.default_factory()
    if isinstance(value, BaseModel) or (value is None and field.default_factory):
        return ""
    return f"`{json.dumps(value)}`"


def _values(annotation: Any) -> str:
    """Lists the values that a key takes, in the terms of JSON."""
    names = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping"}
    words = []
    for part in _parts(annotation):
        if get_origin(part) is Literal:
            words += [f"`{value}`" for value in get_args(part)]
        elif part in names:
            words.append(names[part])
    return ", ".join(dict.fromkeys(words))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [
        part
        for part in _parts(annotation)
        if isinstance(part, type) and issubclass(part, BaseModel)
    ]


def _parts(annotation: Any) -> Iterator[Any]:
    """Yields the alternatives of a type, and what its lists and annotations hold."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType, list):
        for argument in get_args(annotation):
            yield from _parts(argument)
    elif origin is dict:
        yield dict
        yield from _parts(get_args(annotation)[1])
    elif hasattr(annotation, "__metadata__"):
        yield from _parts(annotation.__origin__)
    elif hasattr(annotation, "__value__"):
        yield from _parts(annotation.__value__)
    else:
        yield annotation
