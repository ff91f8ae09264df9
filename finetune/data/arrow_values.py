"""Gives rows of Arrow tables the values that they had before: names of labels in place of numbers,
numbers without further digits, objects in place of JSON, and no keys that only other rows have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

Decode = Callable[[Any], Any]
FLOATS = {"float16": "float16", "float32": "float32", "halffloat": "float16", "float": "float32"}
"""Types of short floats, as `datasets` and pyarrow call them -> their names in numpy."""


def restored(
    rows: Iterable[dict[str, Any]], features: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Yields the rows with names in place of the numbers of ClassLabel columns; -1, which means no
    label, becomes None. A short float gets no more digits than it has: 3.8, not 3.799999952316284.
    Values of Json columns, which `datasets` stores as JSON text, are parsed. In other lists, such
    as those of messages and tools, keys without a value go.

    features: types of the columns, as `features_of` returns them; None if they are not known.
    """
    decoders = {name: _decoder(feature) for name, feature in (features or {}).items()}
    decoders = {name: decode for name, decode in decoders.items() if decode}
    for row in rows:
        row = {name: without_absent_keys(value) for name, value in row.items()}
        yield row | {name: decode(row.get(name)) for name, decode in decoders.items()}


def without_absent_keys(value: Any, is_listed: bool = False) -> Any:
    """Leaves out keys whose value is None in everything that a list holds.

    Arrow gives all structs of a list the keys of all, in every row: a call without arguments comes
    with those of every other function.
    """
    if isinstance(value, dict):
        return {
            key: without_absent_keys(part, is_listed)
            for key, part in value.items()
            if not (is_listed and part is None)
        }
    if isinstance(value, list):
        return [without_absent_keys(part, True) for part in value]
    return value


def features_of(schema: pyarrow.Schema) -> Mapping[str, Any] | None:
    """Returns the types that `datasets` has written into a file; if it did not write it, those of
    columns with short floats."""
    if b"huggingface" not in (schema.metadata or {}):
        return {field.name: _parts(field.type) for field in schema if "float" in str(field.type)}
    from datasets import Features

    return Features.from_arrow_schema(schema)


def _parts(kind: pyarrow.DataType) -> Any:
    """Writes structs as dicts of types, and lists as lists of one type, as `datasets` does."""
    from pyarrow import types

    if types.is_struct(kind):
        return {part.name: _parts(part.type) for part in kind.fields}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_parts(kind.value_type)]
    return kind


def _decoder(feature: Any) -> Decode | None:
    """Returns what restores a value of this type; None if there is nothing to restore."""
    if kind := FLOATS.get(getattr(feature, "dtype", str(feature))):
        return partial(_shortest, kind)
    from datasets import ClassLabel, Json

    if isinstance(feature, Json):
        return lambda value: json.loads(value) if isinstance(value, str) else value
    if isinstance(feature, ClassLabel):
        return lambda value: None if value is None or value < 0 else feature.int2str(value)
    if isinstance(feature, dict):
        inner = {name: _decoder(part) for name, part in feature.items()}
        inner = {name: decode for name, decode in inner.items() if decode}
        if inner:
            return lambda value: (
                value and value | {n: d(value[n]) for n, d in inner.items() if n in value}
            )
        return None
    items = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    decode = items is not None and _decoder(items)
    return (lambda value: value and [decode(item) for item in value]) if decode else None


def _shortest(kind: str, value: Any) -> Any:
    """Returns the number with the fewest digits that is this one in a float of `kind`; anything but
    a number, such as an array, as it is."""
    import numpy

    return float(str(numpy.dtype(kind).type(value))) if isinstance(value, float) else value
