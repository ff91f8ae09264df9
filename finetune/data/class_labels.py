"""Replaces the numbers of Hugging Face's ClassLabel columns by the names that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

Decode = Callable[[Any], Any]


def with_label_names(
    rows: Iterable[dict[str, Any]], features: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Yields the rows with names in place of numbers; -1, which means no label, becomes None.

    features: types of the columns, as `datasets` describes them; None if they are not known.
    """
    decoders = {name: _decoder(feature) for name, feature in (features or {}).items()}
    decoders = {name: decode for name, decode in decoders.items() if decode}
    for row in rows:
        yield row | {name: decode(row.get(name)) for name, decode in decoders.items()}


def features_of(schema: pyarrow.Schema) -> Mapping[str, Any] | None:
    """Returns the types that `datasets` has written into a file; None if it did not write it."""
    if b"huggingface" not in (schema.metadata or {}):
        return None
    from datasets import Features

    return Features.from_arrow_schema(schema)


def _decoder(feature: Any) -> Decode | None:
    """Returns what puts names into a value of this type; None if the type has no labels."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return lambda value: None if value is None or value < 0 else feature.int2str(value)
    if isinstance(feature, dict):
        inner = {name: _decoder(part) for name, part in feature.items()}
        inner = {name: decode for name, decode in inner.items() if decode}
        if inner:
            return lambda value: value and value | {n: d(value.get(n)) for n, d in inner.items()}
        return None
    items = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    decode = items is not None and _decoder(items)
    return (lambda value: value and [decode(item) for item in value]) if decode else None
