"""Checks the gate of a recipe: whether quantization cost more than it may."""

from __future__ import annotations

import math
from typing import Any

from finequant.evaluate.models import MODELS
from finequant.evaluate.report.table import MISSING
from finequant.evaluate.report.values import (
    Report,
    corpora_of,
    finite,
    float_at,
    metrics_of,
    to_percent,
    value_at,
)
from finequant.recipes.schema import Gate

DIFFERING = "answers that differ, "
"""The prefix of the names of checks of exports."""

ROUNDING = 1e-9  # 1.05 / 1.0 - 1 is slightly more than 0.05


def gate(models: dict[str, Any], limits: Gate) -> dict[str, Any]:
    """Compares the cost of quantization with the limits of the recipe.

    For perplexity (per token) the value is quantized / tuned - 1; for accuracy it is tuned -
    quantized, as a fraction of 1; for an export it is the share of held-out rows to which it and
    quantized give different answers. A value that is missing, infinite, or NaN does not pass.

    Returns:
        {"passed": bool, "checks": [{"name", "limit", "value", "passed"}]}
    """
    both = {name: models[name] for name in ("tuned", "quantized")}
    checks = []
    if limits.max_perplexity_increase is not None:
        for corpus in corpora_of(both):
            tuned, quantized = (float_at(m, "perplexity", corpus, "token") for m in both.values())
            increase = quantized / tuned - 1
            checks.append(_check(f"perplexity {corpus}", limits.max_perplexity_increase, increase))
    if limits.max_accuracy_drop is not None:
        for task, metric in metrics_of(both):
            tuned, quantized = (float_at(m, "tasks", task, metric, "value") for m in both.values())
            drop = (tuned - quantized) * to_percent(metric) / 100
            checks.append(_check(f"accuracy {task} {metric}", limits.max_accuracy_drop, drop))
    if limits.min_same_answers is not None:
        for name in models:
            if name not in MODELS:
                differing = 1 - float_at(models, name, "parity", "same_answers")
                checks.append(_check(f"{DIFFERING}{name}", 1 - limits.min_same_answers, differing))
    return {"passed": all(check["passed"] for check in checks), "checks": checks}


def _check(name: str, limit: float, value: float) -> dict[str, Any]:
    passed = math.isfinite(value) and value <= limit + ROUNDING
    return {"name": name, "limit": limit, "value": value, "passed": passed}


def verdict_lines(report: Report) -> list[str]:
    """Describes each check of the gate in one line."""
    lines = []
    for check in value_at(report, "gate", "checks") or []:
        outcome = "passed" if check["passed"] else "FAILED"
        lines.append(f"Gate {outcome}: {check['name']}, {_cost(check)}")
    return lines


def _cost(check: dict[str, Any]) -> str:
    """Describes the value of a check and its limit, with digits that tell a failure apart."""
    perplexity = check["name"].startswith("perplexity ")
    cost, gain, unit = ("increase", "decrease", "%") if perplexity else ("drop", "gain", " points")
    if check["name"].startswith(DIFFERING):
        cost, unit = "share", "%"
    value, limit = check["value"], check["limit"]
    if not finite(value):
        return f"{cost} {MISSING}, limit {100 * limit:.2f}{unit}"
    for digits in range(2, 10):
        texts = [f"{100 * number:z.{digits}f}" for number in (value, limit)]
        if check["passed"] or texts[0] != texts[1]:
            break
    shown, limit = (f"{text}{unit}" for text in texts)
    if shown.startswith("-"):
        return f"no {cost} (a {gain} of {shown[1:]}), limit {limit}"
    return f"{cost} {shown}, limit {limit}"
