"""Looks up values in a report, a plain dict, parts of which may be missing."""

from __future__ import annotations

import math
from typing import Any

from finequant.evaluate.metrics.text_metrics import is_out_of_100

Report = dict[str, Any]


def corpora_of(models: dict[str, Any]) -> list[str]:
    """Lists the corpora of all models, each once, in order."""
    return list(dict.fromkeys(name for m in models.values() for name in m.get("perplexity") or {}))


def metrics_of(models: dict[str, Any]) -> list[tuple[str, str]]:
    """Lists the (task, metric) pairs of all models, each once, in order."""
    pairs = (
        (task, metric)
        for model in models.values()
        for task, metrics in (model.get("tasks") or {}).items()
        for metric in metrics
    )
    return list(dict.fromkeys(pairs))


def to_percent(metric: str) -> int:
    """Returns the factor that turns a metric into percent, or leaves one out of 100 as it is."""
    return 1 if is_out_of_100(metric) else 100


def value_at(node: Any, *keys: str) -> Any:
    """Returns `node[key][key]...`, or None if a key is missing."""
    for key in keys:
        node = (node or {}).get(key)
    return node


def float_at(node: Any, *keys: str) -> float:
    """Returns the number at `keys`; NaN if it is missing or infinite."""
    value = value_at(node, *keys)
    return float(value) if finite(value) else math.nan


def finite(value: float | None) -> bool:
    """Says whether a number is known, and neither infinite nor NaN."""
    return value is not None and math.isfinite(value)


def spreads(error: float | None) -> bool:
    """Says whether a standard error is known and not 0, which it is where all rows have the same
    value: they have no spread to estimate an error from, and `± 0.0` would call them exact."""
    return finite(error) and error > 1e-12  # equal values may differ from their mean by rounding


def finite_only(node: Any) -> Any:
    """Copies the tree with None for each number that JSON cannot represent."""
    if isinstance(node, dict):
        return {key: finite_only(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [finite_only(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
