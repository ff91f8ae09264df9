"""The report of a run: report.json, report.md, plots/, and the table in the terminal.

A report is a plain dict, `{"recipe", "versions", "models", "changes", "divergence", "layers",
"samples", "training", "gate", "arithmetic"}`; all but `models` may be missing. `models` maps base,
tuned, quantized (and exports) to `{"size_bytes", "bits_per_weight", "activations", "perplexity":
{CORPUS: {"token", "word", "byte", "tokens"}}, "tasks": {TASK: {METRIC: {"value", "stderr",
"n"}}}}`. The sizes are of files; `packed_bytes` and `packed_bits_per_weight` are of the weights in
the dtype they are measured in, codes in their own bits. Exports also have `"speed": {"prompt",
"decoding": tokens per second, "peak_memory_bytes"}` and, compared with quantized, `"parity":
{"same_answers", "n", "same_prompts", "kl"}`. `changes` holds `{TASK: {METRIC: {"value", "stderr",
"n"}}}`, from tuned to quantized, paired row by row. `arithmetic` is the dtype that the models
computed in.
"""

from __future__ import annotations

import html
import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.evaluate.report.advice import advice
from finequant.evaluate.report.plots import DRAWINGS, draw_plot
from finequant.evaluate.report.values import (
    Report,
    corpora_of,
    finite,
    finite_only,
    float_at,
    metrics_of,
    to_percent,
    value_at,
)
from finequant.recipes.artifact import replace_text
from finequant.recipes.schema import Gate

if TYPE_CHECKING:
    from rich.console import Console

DIFFERING = "answers that differ, "
"""What the names of the gate's checks of exports begin with."""

MISSING = "–"
ROUNDING = 1e-9  # 1.05 / 1.0 - 1 is slightly more than 0.05
MAX_SAMPLE_CHARACTERS = 1000  # in report.md; report.json has the whole sample


def gate(models: dict[str, Any], limits: Gate) -> dict[str, Any]:
    """Compares the cost of quantization with the limits of the recipe.

    For perplexity (per token) the value is quantized / tuned - 1; for accuracy it is tuned -
    quantized, as a fraction of 1. A value that is missing, infinite, or NaN does not pass.

    For exports it is the share of held-out rows that they answer otherwise than quantized.

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
            if name not in ("base", "tuned", "quantized"):
                differing = 1 - float_at(models, name, "parity", "same_answers")
                checks.append(_check(f"{DIFFERING}{name}", 1 - limits.min_same_answers, differing))
    return {"passed": all(check["passed"] for check in checks), "checks": checks}


def comparison_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Makes the header and rows of the comparison.

    There is a column for each model, and one for the cost of quantization.
    """

    def row(label: str, shown: Callable, change: Callable, *keys: str) -> list[str]:
        tuned, quantized = (value_at(models, name, *keys) for name in ("tuned", "quantized"))
        return [
            label,
            *(shown(value_at(m, *keys)) for m in models.values()),
            change(tuned, quantized),
        ]

    models = {name: _with_sizes(model) for name, model in report["models"].items()}
    rows = [
        row("size in MB, packed (lower is better)", _megabytes, _ratio, "size"),
        row("bits per weight, packed (lower is smaller)", shown_number, _ratio, "bits"),
    ]
    if any("file" in model for model in models.values()):
        rows.append(row(FILE_LABEL, _megabytes, lambda *_: MISSING, "file"))
    if any("activations" in model for model in models.values()):
        rows.append(row("inputs of linear layers", _text, lambda *_: MISSING, "activations"))
    for corpus in corpora_of(models):
        label = f"perplexity per token, {corpus} (lower is better)"
        rows.append(row(label, shown_number, _ratio, "perplexity", corpus, "token"))
    for task, metric in metrics_of(models):
        scale = to_percent(metric)
        n = next(
            filter(None, (value_at(m, "tasks", task, metric, "n") for m in models.values())), None
        )
        label = f"{task}, {metric} {'out of 100' if scale == 1 else 'in %'} (higher is better"
        label += f", n={n})" if n else ")"
        error = value_at(report, "changes", task, metric, "stderr")
        rows.append(row(label, shown_score(scale), _points(scale, error), "tasks", task, metric))
    if any("parity" in model for model in models.values()):
        label = "same answers as quantized in % (higher is better)"
        rows.append(row(label, _percent, lambda *_: MISSING, "parity", "same_answers"))
    for label, shown, key in PARITIES:
        if any(value_at(model, "parity", key) is not None for model in models.values()):
            rows.append(row(label, shown, lambda *_: MISSING, "parity", key))
    for label, shown, key in SPEEDS:
        if any(value_at(model, "speed", key) for model in models.values()):
            rows.append(row(label, shown, _ratio, "speed", key))
    return ["", *models, "quantized vs tuned"], rows


FILE_LABEL = "file in MB (torchao's keeps each code in a byte)"


def _with_sizes(model: dict[str, Any]) -> dict[str, Any]:
    """Adds size and bits of the packed weights, and the size of a file that is not packed."""
    file, bits = model.get("size_bytes"), model.get("bits_per_weight")
    size = model.get("packed_bytes", file)
    shown = model | {"size": size, "bits": model.get("packed_bits_per_weight", bits)}
    # Headers of files are no difference.
    differs = file and size and abs(file / size - 1) > 0.01
    return shown | ({"file": file} if differs else {})


def _megabytes(size: int | None) -> str:
    return MISSING if size is None else f"{size / 1e6:,.1f}"


def _text(value: str | None) -> str:
    return value or MISSING


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}"


def _nats(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2g}"


def _rate(tokens: float | None) -> str:
    return MISSING if tokens is None else f"{tokens:,.0f}"


PARITIES = (
    ("same prompt ids in % (higher is better)", _percent, "same_prompts"),
    ("KL from quantized, nats a token (lower is better)", _nats, "kl"),
)
"""Label, formatter, and key under `parity`, of an export that ran."""

SPEEDS = (
    ("prompt, tokens/s (higher is better)", _rate, "prompt"),
    ("decoding, tokens/s (higher is better)", _rate, "decoding"),
    ("peak memory in MB (lower is better)", _megabytes, "peak_memory_bytes"),
)
"""Label, formatter, and key under `speed`, which only exports have."""


def print_table(report: Report) -> None:
    """Prints the comparison, the divergence, the gate's verdict and what would help to stdout."""
    console = print_rows(*comparison_rows(report))
    lines = [*divergence_lines(report), *verdict_lines(report)]
    if changes := advice(report):
        lines += ["What would help:", *(f"- {line}" for line in changes)]
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)


def print_rows(header: list[str], rows: list[list[str]]) -> Console:
    """Prints a table to stdout, on a console wide enough for its numbers."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    table = Table()
    table.add_column(header[0], min_width=16)
    for name, *cells in list(zip(header, *rows, strict=True))[1:]:
        width = max(map(len, [*cells, *name.split()]))
        table.add_column(textwrap.fill(name, width), justify="right", min_width=width)
    for row in rows:
        table.add_row(*row)
    # With many columns, the table is wider than the terminal rather than truncated.
    needed = console.measure(table, options=console.options.update(width=1000)).minimum
    console.width = max(console.width, needed)
    console.print(table)
    return console


def write_report(report: Report, folder: Path) -> None:
    """Writes plots/, report.md, and finally report.json (infinite or NaN: null)."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {name for name, draw in DRAWINGS.items() if draw_plot(draw, report, folder, name)}
    replace_text(folder / "report.md", _markdown(report, plots))
    content = json.dumps(finite_only(report), indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(folder / "report.json", content + "\n")


def _markdown(report: Report, plots: set[str]) -> str:
    recipe = report.get("recipe") or {}
    name, base = recipe.get("name") or "run", value_at(recipe, "model", "base")
    seed, quantize = recipe.get("seed"), recipe.get("quantize") or {}
    versions = ", ".join(f"{key} {value}" for key, value in (report.get("versions") or {}).items())
    sections = [
        f"# {name}: fine-tuned, quantized, compared",
        f"Base model {_code(str(base))}, seed {seed}, linear layers quantized "
        f"{_widths(quantize)}. "
        "To repeat it: `finequant run recipe.yaml`",
        "## Base, tuned and quantized",
        markdown_table(*comparison_rows(report)),
        f"All models are measured on the same inputs{_arithmetic(report)}. "
        "± is one standard error; for a change, that of the row-by-row differences.",
        image_link(plots, "comparison", "Perplexity and accuracy of the models"),
        "## What quantization changed",
        _bullets([*divergence_lines(report), *verdict_lines(report)]),
        f"## What would help\n\n{_bullets(advice(report))}" if advice(report) else "",
        _worst_layers(report),
        image_link(plots, "layers", "Signal-to-noise ratio of each quantized layer"),
        _normalizers(report),
        _samples(report),
        f"## Training\n\n{image}" if (image := image_link(plots, "loss", "Loss by step")) else "",
        f"## Made with\n\n{versions}" if versions else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _arithmetic(report: Report) -> str:
    dtype = report.get("arithmetic")
    return f", in {dtype} arithmetic" if dtype else ""


def _widths(quantize: dict[str, Any]) -> str:
    if quantize.get("layers") or quantize.get("budget"):
        return "by the layer plan in quantized/quantization.json"
    return f"to {quantize.get('bits')} bits in groups of {quantize.get('group_size')}"


def divergence_lines(report: Report) -> list[str]:
    """Says how far quantized is from tuned in a sentence; [] if it was not measured."""
    divergence = report.get("divergence")
    if not divergence or divergence.get("tokens") == 0:  # lm-eval's tasks alone
        return []
    agreement = shown_score(100)(divergence.get("top1_agreement"))
    shown = shown_score(1, digits=4)
    floor = divergence.get("floor")
    rounding = f" (from logits in the shipped dtype alone: {shown(floor)})" if floor else ""
    return [
        f"Quantized vs. tuned, over {divergence.get('tokens')} tokens: KL divergence "
        f"{shown(divergence.get('kl'))} nats per token{rounding}; "
        f"the most likely token is the same in {agreement} % of positions"
    ]


def _check(name: str, limit: float, value: float) -> dict[str, Any]:
    passed = math.isfinite(value) and value <= limit + ROUNDING
    return {"name": name, "limit": limit, "value": value, "passed": passed}


def verdict_lines(report: Report) -> list[str]:
    """Describes each check of the gate in one line."""
    checks = value_at(report, "gate", "checks") or []
    lines = []
    for check in checks:
        perplexity = check["name"].startswith("perplexity ")
        what, unit = ("increase", "%") if perplexity else ("drop", "points")
        if check["name"].startswith(DIFFERING):
            what, unit = "share", "%"
        value, limit = (
            MISSING if check[key] is None else f"{100 * check[key]:.2f} {unit}"
            for key in ("value", "limit")
        )
        outcome = "passed" if check["passed"] else "FAILED"
        lines.append(f"Gate {outcome}: {check['name']}, {what} {value}, limit {limit}")
    return lines


def _worst_layers(report: Report) -> str:
    layers = [layer for layer in report.get("layers") or [] if finite(layer.get("snr_db"))]
    worst = sorted(layers, key=lambda layer: layer["snr_db"])[:5]
    rows = [
        [_code(x["name"]), str(x["bits"]), str(x["group_size"]), shown_number(x["snr_db"], 1)]
        for x in worst
    ]
    header = ["layers that lost most", "bits", "group size", "signal-to-noise ratio in dB"]
    return markdown_table(header, rows) if rows else ""


def _normalizers(report: Report) -> str:
    rows = []
    for corpus in corpora_of(report["models"]):
        for name, model in report["models"].items():
            score = value_at(model, "perplexity", corpus) or {}
            values = [shown_number(score.get(key), digits=4) for key in ("token", "word", "byte")]
            rows.append([f"{corpus}, {name}", *values, shown_number(score.get("tokens"), digits=0)])
    if not rows:
        return ""
    header = ["perplexity", "per token", "per word", "per byte", "scored tokens"]
    return (
        "## Perplexity per token, word, and byte\n\n"
        "exp(L / N): L is the summed negative log-likelihood, always of the same tokens; N is "
        "the number of tokens, words, or UTF-8 bytes. Compare only numbers with the same N."
        f"\n\n{markdown_table(header, rows)}"
    )


def _samples(report: Report) -> str:
    samples = report.get("samples") or []
    names = list(report["models"])
    rows = [
        [_code(sample["prompt"]), _code(sample["reference"])]
        + [_code(value_at(sample, "answers", name)) for name in names]
        for sample in samples
    ]
    table = markdown_table(["prompt", "reference", *names], rows, align=":---")
    return f"## Sample answers\n\n{table}" if rows else ""


def _code(text: str | None) -> str:
    """Formats text as code in one table cell, where nothing acts as Markdown or HTML."""
    if not text:
        return MISSING if text is None else "*(empty)*"
    cut = text[:MAX_SAMPLE_CHARACTERS] + ("…" if len(text) > MAX_SAMPLE_CHARACTERS else "")
    safe = re.sub(
        r"[\\`*_\[\]|~$]", lambda match: f"&#{ord(match[0])};", html.escape(cut, quote=False)
    )
    return f"<code>{'<br>'.join(safe.splitlines())}</code>"


def markdown_table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    rule = [":---", *[align] * (len(header) - 1)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"
        for row in (header, rule, *rows)
    )


def image_link(plots: set[str], name: str, description: str) -> str:
    return f"![{description}](plots/{name}.png)" if name in plots else ""


def shown_number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return MISSING
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def shown_score(scale: float, digits: int = 1) -> Callable[[dict | None], str]:
    """Returns a function that formats {"value", "stderr"} as `71.2 ± 1.8`."""

    def shown(score: dict | None) -> str:
        value, error = value_at(score, "value"), value_at(score, "stderr")
        text = MISSING if value is None else f"{value * scale:.{digits}f}"
        return f"{text} ± {error * scale:.{digits}f}" if finite(error) else text

    return shown


def _ratio(tuned: float | None, quantized: float | None) -> str:
    if not finite(tuned) or not finite(quantized) or not tuned:
        return MISSING
    ratio = quantized / tuned
    return f"{ratio - 1:+z.1%}" if ratio < 100 else f"×{ratio:.3g}"


def _points(scale: float, error: float | None) -> Callable[[dict | None, dict | None], str]:
    """Returns a function that formats the change between two scores in points.

    error: the standard error of the change, if it is known.
    """

    def shown(tuned: dict | None, quantized: dict | None) -> str:
        change = (float_at(quantized, "value") - float_at(tuned, "value")) * scale
        if not math.isfinite(change):
            return MISSING
        spread = f" ± {error * scale:.1f}" if finite(error) else ""
        return f"{change:+z.1f}{spread} points"

    return shown
