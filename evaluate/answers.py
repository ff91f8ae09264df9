"""Compares the models' answers to the held-out rows, row by row."""

from __future__ import annotations

from collections import Counter
from typing import Any

from finequant.evaluate.inputs import HELD_OUT, Material
from finequant.evaluate.models import MODELS
from finequant.recipes.schema import Recipe


def parities(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Collects how each export compares with quantized, and counts the rows they answer alike.

    Returns:
        {NAME: {"same_answers": share of identical answers, "n": rows, "same_prompts", "kl"}}
    """
    reference = measured["quantized"]["answers"]
    results = {}
    for name in measured.keys() - MODELS:
        answers, parity = measured[name]["answers"], dict(measured[name].get("parity", {}))
        if reference and len(answers) == len(reference):
            same = sum(map(str.__eq__, answers, reference))
            parity |= {"same_answers": same / len(reference), "n": len(reference)}
        if parity:
            results[name] = parity
    return results


def changes(
    recipe: Recipe, material: Material, measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Computes the changes in metrics from tuned to quantized, paired by row or document."""
    from finequant.evaluate.metrics.text_metrics import mean_change, paired_changes

    tuned, quantized = (measured[name] for name in ("tuned", "quantized"))
    changed: dict[str, Any] = {}
    if material.rows:
        answers = (tuned["answers"], quantized["answers"], material.references)
        changed[HELD_OUT] = paired_changes(*answers, recipe.evaluate.metrics, material.groups)
    for task, metrics in tuned["by_item"].items():
        groups = material.groups if task == HELD_OUT else None
        for metric in (key for key in metrics if key in quantized["by_item"][task]):
            values = (metrics[metric], quantized["by_item"][task][metric])
            changed.setdefault(task, {})[metric] = mean_change(*values, groups)
    return changed


def right_by(metrics: list[str]) -> str | None:
    """Returns the first metric that calls an answer either right or wrong; None without one."""
    decides = ("json_match", "tool_call_match", "number_match", "exact_match")
    return next((metric for metric in metrics if metric in decides), None)


def most_frequent(references: list[str], metrics: list[str]) -> dict[str, float | int] | None:
    """Returns what a model would score that always gives the most frequent answer.

    The answer itself, which quotes the rows, is not returned.

    Returns:
        {"share": of the rows, "n": rows}; None unless some answers repeat and exact_match or
        multiple_choice, which such a model can satisfy, is measured.
    """
    from finequant.evaluate.metrics.text_metrics import after_thoughts

    if not {"exact_match", "multiple_choice"} & set(metrics) or not references:
        return None
    counts = Counter(after_thoughts(reference).strip() for reference in references)
    if len(counts) > len(references) // 2:
        return None
    return {"share": max(counts.values()) / len(references), "n": len(references)}


def predictions(
    recipe: Recipe, material: Material, measured: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Collects every model's answers to the held-out rows, and which of them are right."""
    from finequant.evaluate.metrics.text_metrics import is_right

    metric = right_by(recipe.evaluate.metrics)
    answering = {name: model["answers"] for name, model in measured.items() if model["answers"]}
    rows = []
    for index, (row, reference) in enumerate(zip(material.rows, material.references, strict=True)):
        answers = {name: texts[index] for name, texts in answering.items()}
        right = {
            name: is_right(metric, answer, reference) for name, answer in answers.items() if metric
        }
        prompt = row.messages[-2]["content"]
        rows.append({"prompt": prompt, "reference": reference, "answers": answers, "right": right})
    return rows


def samples(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Samples `count` of the rows that `predictions` returns, or all, at even intervals."""
    count = min(count, len(rows))
    chosen = (rows[number * len(rows) // count] for number in range(count))
    return [{key: row[key] for key in ("prompt", "reference", "answers")} for row in chosen]
