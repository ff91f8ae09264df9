"""The report of a run: report.json, report.md, plots/, and the table in the terminal.

A report is a plain dict, `{"recipe", "versions", "models", "changes", "divergence", "layers",
"samples", "training", "gate", "arithmetic"}`; all but `models` may be missing. `models` maps base,
tuned, quantized (and exports) to `{"size_bytes", "bits_per_weight", "perplexity": {CORPUS:
{"token", "word", "byte", "tokens"}}, "tasks": {TASK: {METRIC: {"value", "stderr", "n"}}}}`; exports
also have `"speed": {"prompt", "decoding": tokens per second, "peak_memory_bytes"}`. `changes`
holds `{TASK: {METRIC: {"value", "stderr", "n"}}}`, from tuned to quantized, paired row by row.
`arithmetic` is the dtype that the models computed in.
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

from finequant.recipes.rundir import replace_text
from finequant.recipes.schema import Gate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

Report = dict[str, Any]

OUT_OF_100 = ("bleu", "chrf")  # all other metrics are fractions of 1
MISSING = "–"
ROUNDING = 1e-9  # 1.05 / 1.0 - 1 is slightly more than 0.05
MAX_SAMPLE_CHARACTERS = 1000  # in report.md; report.json has the whole sample

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "os^vDPX"


def gate(models: dict[str, Any], limits: Gate) -> dict[str, Any]:
    """Compares the cost of quantization with the limits of the recipe.

    For perplexity (per token) the value is quantized / tuned - 1; for accuracy it is tuned -
    quantized, as a fraction of 1. A value that is missing, infinite, or NaN does not pass.

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
    return {"passed": all(check["passed"] for check in checks), "checks": checks}


def comparison_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Makes the header and rows of the comparison.

    There is a column for each model, and one for the cost of quantization.
    """
    models = report["models"]

    def row(label: str, shown: Callable, change: Callable, *keys: str) -> list[str]:
        tuned, quantized = (value_at(models, name, *keys) for name in ("tuned", "quantized"))
        return [
            label,
            *(shown(value_at(m, *keys)) for m in models.values()),
            change(tuned, quantized),
        ]

    rows = [
        row("size in MB (lower is better)", _megabytes, _ratio, "size_bytes"),
        row("bits per weight (lower is smaller)", shown_number, _ratio, "bits_per_weight"),
    ]
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
    for label, shown, key in SPEEDS:
        if any(value_at(model, "speed", key) for model in models.values()):
            rows.append(row(label, shown, _ratio, "speed", key))
    return ["", *models, "quantized vs tuned"], rows


def _megabytes(size: int | None) -> str:
    return MISSING if size is None else f"{size / 1e6:,.1f}"


def _rate(tokens: float | None) -> str:
    return MISSING if tokens is None else f"{tokens:,.0f}"


SPEEDS = (
    ("prompt, tokens/s (higher is better)", _rate, "prompt"),
    ("decoding, tokens/s (higher is better)", _rate, "decoding"),
    ("peak memory in MB (lower is better)", _megabytes, "peak_memory_bytes"),
)
"""Label, formatter, and key under `speed`, which only exports have."""


def print_table(report: Report) -> None:
    """Prints the comparison, the gate's verdict and the divergence to stdout."""
    console = print_rows(*comparison_rows(report))
    for line in [*divergence_lines(report), *verdict_lines(report)]:
        console.print(line, soft_wrap=True)


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
    drawings = {"comparison": _comparison, "layers": _layers, "loss": _loss}
    plots = {name for name, draw in drawings.items() if draw_plot(draw, report, folder, name)}
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
        "\n".join(f"- {line}" for line in [*divergence_lines(report), *verdict_lines(report)]),
        _worst_layers(report),
        image_link(plots, "layers", "Signal-to-noise ratio of each quantized layer"),
        _normalizers(report),
        _samples(report),
        f"## Training\n\n{image}" if (image := image_link(plots, "loss", "Loss by step")) else "",
        f"## Made with\n\n{versions}" if versions else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


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
        value, limit = (
            MISSING if check[key] is None else f"{100 * check[key]:.2f} {unit}"
            for key in ("value", "limit")
        )
        outcome = "passed" if check["passed"] else "FAILED"
        lines.append(f"Gate {outcome}: {check['name']}, {what} {value}, limit {limit}")
    return lines


def _worst_layers(report: Report) -> str:
    layers = [layer for layer in report.get("layers") or [] if _finite(layer.get("snr_db"))]
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


def draw_plot(draw: Callable, report: Report, folder: Path, name: str) -> bool:
    """Writes plots/NAME.png; if there is nothing to draw, removes an earlier one."""
    path = folder / "plots" / f"{name}.png"
    figure = draw(report)
    if figure is None:
        path.unlink(missing_ok=True)
        return False
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=150)
    partial.replace(path)
    return True


def new_figure(width: float) -> Figure:
    # Without pyplot there is no global state, and a Figure renders itself with Agg.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4), layout="constrained")


def _loss(report: Report) -> Figure | None:
    figure = new_figure(7)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss in nats per token")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        entries = [e for e in report.get("training") or [] if _finite(e.get(key))]
        if entries:
            color = COLORS[len(axes.lines)]
            steps, losses = [e["step"] for e in entries], [e[key] for e in entries]
            axes.plot(steps, losses, style, color=color, label=label, markersize=5)
    axes.grid(alpha=0.3)
    if not axes.lines:
        return None
    axes.legend()
    return figure


def _comparison(report: Report) -> Figure | None:
    models = report["models"]
    panels = {
        "perplexity per token\n(lower is better)": {
            corpus: [_bar(m, 1, "perplexity", corpus) for m in models.values()]
            for corpus in corpora_of(models)
        },
        "accuracy in %\n(higher is better)": {
            f"{task}\n{metric}": [
                _bar(m, to_percent(metric), "tasks", task, metric) for m in models.values()
            ]
            for task, metric in metrics_of(models)
        },
    }
    panels = {
        label: kept
        for label, groups in panels.items()
        if (kept := {name: bars for name, bars in groups.items() if any(map(_has_height, bars))})
    }
    if not panels:
        return None
    widths = [1 + 0.55 * len(groups) * len(models) for groups in panels.values()]
    figure = new_figure(max(5.0, sum(widths)))
    all_axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, (label, groups) in zip(all_axes, panels.items(), strict=True):
        axes.set_ylabel(label)
        _bars(axes, groups, list(models), may_be_log=label.startswith("perplexity"))
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _bar(model: dict[str, Any], scale: float, *keys: str) -> tuple[float, float]:
    """Returns the height (NaN: no bar) and the standard error (0: unknown) of one score."""
    score = value_at(model, *keys) or {}
    error = score.get("stderr")
    height = float_at(score, "token" if "token" in score else "value")
    return scale * height, scale * error if _finite(error) else 0.0


def _has_height(bar: tuple[float, float]) -> bool:
    return math.isfinite(bar[0])


def _bars(axes: Axes, groups: dict[str, list], models: list[str], may_be_log: bool) -> None:
    """Draws groups with a bar for each model; perplexities far apart get a logarithmic axis."""
    width = 0.8 / len(models)
    for index, name in enumerate(models):
        heights, errors = zip(*(bars[index] for bars in groups.values()), strict=True)
        offset = (index - (len(models) - 1) / 2) * width
        drawn = axes.bar(
            [group + offset for group in range(len(groups))],
            heights,
            width * 0.92,
            yerr=errors if any(errors) else None,
            color=COLORS[index % len(COLORS)],
            capsize=3,
            label=name,
        )
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.1)
    heights = [height for bars in groups.values() for height, _ in bars if math.isfinite(height)]
    if min(heights) >= 0:
        axes.set_ylim(bottom=0)
    if may_be_log and max(heights) > 10 * min(heights):
        axes.set(yscale="log", ylim=(1, 4 * max(heights)))


def _layers(report: Report) -> Figure | None:
    kinds: dict[str, list[tuple[int, float]]] = {}
    others: list[tuple[str, float]] = []
    for layer in report.get("layers") or []:
        match = re.search(r"\.layers\.(\d+)\..*?(\w+)$", layer["name"])
        if match and _finite(layer.get("snr_db")):
            kinds.setdefault(match[2], []).append((int(match[1]), layer["snr_db"]))
        elif _finite(layer.get("snr_db")):
            others.append((layer["name"], layer["snr_db"]))
    if not kinds and not others:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8)
    axes = figure.add_subplot(
        xlabel="layer (then the head)", ylabel="signal-to-noise ratio in dB (higher is better)"
    )
    for index, (kind, points) in enumerate(kinds.items()):
        style = {"color": COLORS[index % 7], "marker": MARKERS[index % 7], "markersize": 4}
        axes.plot(*zip(*sorted(points), strict=True), label=kind, linewidth=1, **style)
    after = 1 + max((depth for points in kinds.values() for depth, _ in points), default=-1)
    for x, (name, snr) in enumerate(others, after):
        axes.plot([x], [snr], "k*", markersize=10, label=name)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


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
    return 1 if metric in OUT_OF_100 else 100


def value_at(node: Any, *keys: str) -> Any:
    """Returns `node[key][key]...`, or None if a key is missing."""
    for key in keys:
        node = (node or {}).get(key)
    return node


def float_at(node: Any, *keys: str) -> float:
    """Returns the number at `keys`; NaN if it is missing or infinite."""
    value = value_at(node, *keys)
    return float(value) if _finite(value) else math.nan


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def finite_only(node: Any) -> Any:
    """Copies the tree with None for each number that JSON cannot represent."""
    if isinstance(node, dict):
        return {key: finite_only(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [finite_only(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def shown_number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return MISSING
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def shown_score(scale: float, digits: int = 1) -> Callable[[dict | None], str]:
    """Returns a function that formats {"value", "stderr"} as `71.2 ± 1.8`."""

    def shown(score: dict | None) -> str:
        value, error = value_at(score, "value"), value_at(score, "stderr")
        text = MISSING if value is None else f"{value * scale:.{digits}f}"
        return f"{text} ± {error * scale:.{digits}f}" if _finite(error) else text

    return shown


def _ratio(tuned: float | None, quantized: float | None) -> str:
    if not _finite(tuned) or not _finite(quantized) or not tuned:
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
        spread = f" ± {error * scale:.1f}" if _finite(error) else ""
        return f"{change:+z.1f}{spread} points"

    return shown
