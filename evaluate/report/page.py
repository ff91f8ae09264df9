"""Writes report.html: the whole report as one page that opens from disk and needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from functools import cache
from math import comb, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.evaluate.metrics.text_metrics import is_right
from finequant.evaluate.models import MODELS
from finequant.evaluate.report.advice import advice, judged_cost
from finequant.evaluate.report.gate import verdict_lines
from finequant.evaluate.report.plots import DESCRIPTIONS, DRAWINGS, svg
from finequant.evaluate.report.report import (
    baseline_lines,
    divergence_lines,
    exports_apart,
    tuning_lines,
)
from finequant.evaluate.report.table import comparison_rows
from finequant.evaluate.report.values import Report, float_at, metrics_of, value_at
from finequant.finetune.architecture import HEAD
from finequant.recipes.artifact import read_part, replace_text
from finequant.recipes.load import as_yaml
from finequant.recipes.rundir import RunDir
from finequant.recipes.stages import command_of

if TYPE_CHECKING:
    from markupsafe import Markup

HERE = Path(__file__).parent
MAX_LABELS = 200
"""Maximum number of distinct references that count as labels; with more, they are texts."""

SCALE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def write_page(
    folder: Path, file: Path | None = None, recipe: dict[str, Any] | None = None
) -> None:
    """Writes report.html of a run directory, from the files that its stages wrote.

    file: another file to write.
    recipe: one to show in place of the report's, which names folders of this machine.

    Raises:
        UserError: for a file that is damaged.
    """
    run, again = RunDir(folder), command_of("evaluate")
    report = read_part(run.report, again)
    report["stages"] = run.manifest()
    if (folder / "sweep" / "sweep.json").exists():
        sweep = read_part(folder / "sweep" / "sweep.json", "finequant sweep RECIPE")
        adapter = value_at(report, "stages", "train", "outputs", "adapter")
        same_adapter = sweep.get("swept") == "base" or sweep.get("adapter") == adapter
        same_code = sweep.get("measuring_code", 0) >= report.get("measuring_code", 0)
        same_base_and_data = all(
            value_at(sweep, "recipe", section) == value_at(report, "recipe", section)
            for section in ("model", "data")
        )
        is_current = same_adapter and same_base_and_data and same_code
        report["sweep" if is_current else "earlier_sweep"] = sweep
    report["recipe"] = recipe or report.get("recipe")
    rows = read_part(run.predictions, again, _lines)
    replace_text(file or run.page, page(report, rows))


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]


def page(report: Report, rows: list[dict[str, Any]]) -> str:
    """Renders the page; texts from the data are escaped, so that they cannot run.

    report: as in report.json, with the manifest as "stages", and sweep.json as "sweep" or, if it
        was measured on an earlier adapter, another base or other data, or by earlier code, as
        "earlier_sweep".
    rows: held-out rows as in predictions.jsonl: {"prompt", "reference", "answers": {model: text},
        "right": {model: bool}}.
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    environment.filters["with_code"] = _with_code
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps({"models": list(report["models"]), "rows": rows}, ensure_ascii=False)
    header, table = comparison_rows(report)
    figures = {name: draw(report) for name, draw in DRAWINGS.items()}
    if report.get("sweep"):
        from finequant.evaluate.report.sweep_report import draw_sweep

        figures["sweep"] = draw_sweep(report["sweep"])
    return environment.get_template("page.html").render(
        name=value_at(report, "recipe", "name") or "run",
        made_of=_made_of(report),
        verdict=_verdict(report),
        advice=advice(report),
        header=header,
        rows=table,
        figures={
            name: Markup('<figure role="img" aria-label="{}">{}</figure>').format(
                DESCRIPTIONS[name], Markup(svg(figure))
            )
            for name, figure in figures.items()
            if figure
        },
        earlier_sweep="earlier_sweep" in report,
        answers=bool(rows),
        metric=report.get("right_by"),
        flips=flips(rows),
        labels=_labels(rows, report.get("right_by")),
        passages=_passages(report),
        sizes=_sizes(report),
        stages=_stages(report),
        versions=", ".join(f"{key} {value}" for key, value in report.get("versions", {}).items()),
        recipe=as_yaml(report.get("recipe") or {}),
        # An unescaped "<" could end the script element.
        data=Markup(data.replace("<", "\\u003c")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _with_code(line: str) -> Markup:
    """Turns what is between backquotes into code, as Markdown does."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(line))))


def _made_of(report: Report) -> str:
    recipe = report.get("recipe") or {}
    source = f"{value_at(recipe, 'model', 'base')}, seed {recipe.get('seed')}"
    arithmetic = report.get("arithmetic")
    if not arithmetic:
        return source
    return f"{source}, measured in {arithmetic} arithmetic{exports_apart(report)}"


def _verdict(report: Report) -> dict[str, Any]:
    """Says what quantization cost: a state, a headline, and lines with the figures."""
    figures = _figures(report)
    if figures is None:
        headline, state = "Nothing was measured on texts or held-out rows", "warn"
    elif value_at(report, "gate", "passed") is False:
        headline = "The gate failed: a figure is beyond the recipe's limit, or was not measured"
        state = "bad"
    else:
        too_much, headline = judged_cost(report)
        state = "warn" if too_much else "good"
    lines = [figures] if figures else []
    lines += [*tuning_lines(report), *baseline_lines(report)]
    lines += [*verdict_lines(report), *divergence_lines(report)]
    if not value_at(report, "gate", "checks"):
        lines.append("The recipe sets no gate, and so no limit on what quantization may cost.")
    return {"state": state, "headline": headline, "lines": lines}


def _figures(report: Report) -> str | None:
    """Compares the models by the first accuracy or, without one, the first perplexity."""
    header, rows = comparison_rows(report)
    labels = [f"{task}, {metric} " for task, metric in metrics_of(report["models"])]
    chosen = next((row for row in rows if labels and row[0].startswith(labels[0])), None)
    chosen = chosen or next((row for row in rows if row[0].startswith("perplexity")), None)
    if chosen is None:
        return None
    values = dict(zip(header, chosen, strict=True))
    models = [f"{name} {values[name]}" for name in MODELS if name in values]
    return f"{chosen[0].partition(' (')[0]}: {', '.join(models)} ({chosen[-1]})."


def flips(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Counts rows by whether tuned and quantized are right, with McNemar's exact p-value
    (https://en.wikipedia.org/wiki/McNemar%27s_test)."""
    pairs = Counter(
        (row["right"].get("tuned"), row["right"].get("quantized")) for row in rows if row["right"]
    )
    if not pairs:
        return None
    lost, gained = pairs[True, False], pairs[False, True]
    changed = lost + gained
    tail = sum(comb(changed, k) for k in range(min(lost, gained) + 1)) / 2**changed
    p_value = min(1.0, 2 * tail)
    return {
        "both": pairs[True, True],
        "neither": pairs[False, False],
        "lost": lost,
        "gained": gained,
        "p": f"{p_value:.2g}",
    }


def _labels(rows: list[dict[str, Any]], metric: str | None) -> dict[str, Any] | None:
    """Counts right answers of each label, if the references are labels: few, and repeated.

    None if no metric calls answers right or wrong, as `multiple_choice` by itself does not.
    """
    counts = Counter(row["reference"] for row in rows if row["right"])
    if not 1 < len(counts) <= min(MAX_LABELS, len(rows) // 2):
        return None

    def right(label: str, model: str) -> int:
        return sum(row["right"].get(model) is True for row in rows if row["reference"] == label)

    table = [
        {
            "label": label,
            "rows": count,
            "tuned": right(label, "tuned"),
            "quantized": right(label, "quantized"),
        }
        for label, count in counts.most_common()
    ]

    @cache
    def is_label(answer: str) -> bool:
        return any(is_right(metric, answer, label) for label in counts)

    unknown = {
        model: sum(not is_label(row["answers"].get(model, "")) for row in rows)
        for model in ("tuned", "quantized")
    }
    return {
        "rows": sorted(table, key=lambda row: row["quantized"] - row["tuned"]),
        "unknown": unknown,
    }


def _passages(report: Report) -> list[list[dict[str, Any]]]:
    passages = report.get("passages") or []
    largest = max((token["kl"] for passage in passages for token in passage), default=0) or 1
    return [
        [
            {"text": token["text"], "share": token["kl"] / largest, "kl": f"{token['kl']:.4f}"}
            for token in passage
        ]
        for passage in passages
    ]


def _sizes(report: Report) -> list[dict[str, Any]]:
    """Splits the packed quantized model into codes, scales, and what stays in float."""
    layers = [layer for layer in report.get("layers") or [] if layer.get("group_size")]
    size = float_at(report, "models", "quantized", "packed_bytes")
    if not layers or size != size:
        return []
    scale_bytes = SCALE_BYTES[value_at(report, "recipe", "quantize", "scale_dtype") or "float32"]
    parts = _packed_parts(layers, scale_bytes)
    if sum(parts.values()) > size:  # the head shares the embedding's table, which is packed once
        parts = _packed_parts([layer for layer in layers if layer["name"] != HEAD], scale_bytes)
    floats = [layer["name"].rpartition(".")[2] for layer in report["layers"] if layer not in layers]
    in_float = f"{', '.join(dict.fromkeys([*floats, 'norms']))}, in float"
    parts[in_float] = max(0, size - sum(parts.values()))
    largest = max(parts.values())
    total = {"label": "total, packed", "megabytes": f"{sum(parts.values()) / 1e6:,.1f}"}
    return [
        {
            "label": label,
            "megabytes": f"{part / 1e6:,.1f}",
            "percent": round(100 * part / largest, 1),
        }
        for label, part in sorted(parts.items(), key=lambda item: -item[1])
    ] + [total | {"percent": 0}]


def _packed_parts(layers: list[dict[str, Any]], scale_bytes: int) -> dict[str, float]:
    """Returns the bytes of all scales, and of the codes of each kind of layer."""
    weights = [prod(layer["shape"]) for layer in layers]
    groups = [n // layer["group_size"] for n, layer in zip(weights, layers, strict=True)]
    parts: dict[str, float] = {"scales": sum(groups) * scale_bytes}
    for layer, n in zip(layers, weights, strict=True):
        kind = layer["name"].rpartition(".")[2]
        label = f"codes of {kind}, {layer['bits']} bits"
        parts[label] = parts.get(label, 0) + n * layer["bits"] / 8
    return parts


def _stages(report: Report) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "seconds": f"{stage['seconds']:,.0f}",
            "memory": f"{stage['peak_memory_bytes'] / 1e9:.2f}",
            "gpu_memory": f"{gpu / 1e9:.2f}" if (gpu := stage.get("peak_gpu_memory_bytes")) else "",
        }
        for name, stage in (report.get("stages") or {}).items()
        if {"seconds", "peak_memory_bytes"} <= stage.keys()
    ]
