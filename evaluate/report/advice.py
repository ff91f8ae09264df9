"""Suggests changes to the recipe, if quantization cost more than its error bars."""

from __future__ import annotations

import math
from typing import Any

from finequant.evaluate.report.values import (
    Report,
    corpora_of,
    float_at,
    metrics_of,
    to_percent,
    value_at,
)

MAX_PERPLEXITY_INCREASE = 0.03
"""Relative increase from tuned to quantized; a larger one is worth a better method."""

TWICE, ONCE, POINT = "twice its error bars", "its error bars", "a point"
"""Bounds of a drop in a metric; a point, if its error is unknown."""


def judged_cost(report: Report) -> tuple[bool, str]:
    """Judges what quantization cost.

    It cost too much if, from tuned to quantized, a metric fell by more than two standard errors (or
    by a point, if its error is unknown), a perplexity rose by more than 3%, or a number was lost,
    as when the perplexity of quantized is infinite or NaN.

    Returns:
        Whether it cost too much, and a headline that says so.
    """
    tuned, quantized = (report["models"].get(name) or {} for name in ("tuned", "quantized"))
    bounds: set[str] = set()
    for task, metric in metrics_of({"tuned": tuned}):
        error = float_at(report, "changes", task, metric, "stderr")
        before, after = (float_at(m, "tasks", task, metric, "value") for m in (tuned, quantized))
        if _is_lost(before, after):
            return True, f"The quantized model has no figure for {task}, {metric}"
        drop, is_known = before - after, error == error
        if drop > 2 * error:
            return True, "Quantization cost more than its error bars"
        if not is_known and drop * to_percent(metric) > 1:
            return True, "Quantization cost more than a point"
        bounds.add((TWICE if drop > error else ONCE) if is_known else POINT)
    for corpus in corpora_of({"tuned": tuned}):
        before, after = (float_at(m, "perplexity", corpus, "token") for m in (tuned, quantized))
        if _is_lost(before, after):
            return True, f"The perplexity of the quantized model on {corpus} is not a number"
        if after > (1 + MAX_PERPLEXITY_INCREASE) * before:
            return True, "Quantization raised perplexity by more than 3%"
    return False, _within(bounds)


def _within(bounds: set[str]) -> str:
    """Writes the headline from the bounds that the drops of all metrics are within."""
    if not bounds:
        return "Quantization raised perplexity by no more than 3%"
    widest = [bound for bound in (TWICE, ONCE, POINT) if bound in bounds]
    where = f", or {POINT} where there are none" if {POINT} < bounds else ""
    return f"Quantization cost no more than {widest[0]}{where}"


def _is_lost(before: float, after: float) -> bool:
    return math.isfinite(before) and not math.isfinite(after)


def advice(report: Report) -> list[str]:
    """Lists changes to the recipe that may help, the cheapest first; [] if none is needed.

    The figures are those of docs/quantization.md: SmolLM2-135M on WikiText-2, at 4 bits.
    """
    quantize = value_at(report, "recipe", "quantize")
    too_much, _ = judged_cost(report)
    return _steps(quantize) if quantize and too_much else []


def _steps(quantize: dict[str, Any]) -> list[str]:
    calibration = quantize.get("calibration") or {}
    calibrated = quantize.get("method") == "gptq"
    # Rotation would untie a head that shares its table with the embedding.
    shares = quantize.get("head") == "float" or quantize.get("embedding", "float") != "float"
    steps = []
    if not calibrated:
        steps.append(
            "quantize.effort=balanced: calibrates the codes on your rows, and rotates the hidden "
            "states, which spreads outliers (SmolLM2-135M on WikiText-2: perplexity 42.7 -> 31.4; "
            "float: 29.4)"
        )
    elif not quantize.get("rotate") and not shares:
        steps.append("quantize.rotate=true: rotates the hidden states, which spreads outliers")
    if not (calibrated and calibration.get("steps") and calibration.get("scale_steps")):
        steps.append(
            "quantize.effort=best: also trains each block, and then all scales, to reproduce the "
            "float model (SmolLM2-135M on WikiText-2: perplexity 31.4 -> 30.1; float: 29.4)"
        )
    if not quantize.get("training") and not quantize.get("budget"):  # these two exclude each other
        steps.append(
            'quantize.training="{steps: 150, learns: scales, distillation: 0.9}": trains the '
            "scales on your answers and on the tuned model's predictions"
        )
    has_more_bits = quantize.get("layers") or (quantize.get("bits") or 0) >= 6
    if not has_more_bits and quantize.get("head", "quantize") == "quantize":
        steps.append(
            'quantize.layers="{lm_head: {bits: 8}}": keeps the head at 8 bits; '
            "`finequant sweep` shows what more bits for all layers would bring"
        )
    return steps
