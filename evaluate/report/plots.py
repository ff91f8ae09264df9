"""The plots of a report, for files and for the page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.evaluate.report.values import (
    Report,
    corpora_of,
    finite,
    float_at,
    metrics_of,
    to_percent,
    value_at,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "os^vDPX"


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


def svg(figure: Figure) -> str:
    """Renders a figure as an SVG element whose black lines and texts take the page's text color."""
    import io

    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    drawing = stream.getvalue()
    return drawing[drawing.index("<svg") :].replace("#000000", "currentColor")


def new_figure(width: float) -> Figure:
    # Without pyplot there is no global state, and a Figure renders itself with Agg.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4), layout="constrained")


def _loss(report: Report) -> Figure | None:
    figure = new_figure(7)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss in nats per token")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        entries = [e for e in report.get("training") or [] if finite(e.get(key))]
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
    every = report["models"].items()
    models = {name: m for name, m in every if m.get("perplexity") or m.get("tasks")}
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
    panels = {label: _with_heights(groups) for label, groups in panels.items()}
    panels = {label: groups for label, groups in panels.items() if groups}
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
    return scale * height, scale * error if finite(error) else 0.0


def _with_heights(groups: dict[str, list]) -> dict[str, list]:
    """Leaves out groups in which no bar has a height."""
    return {
        name: bars
        for name, bars in groups.items()
        if any(math.isfinite(height) for height, _ in bars)
    }


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
        if match and finite(layer.get("snr_db")):
            kinds.setdefault(match[2], []).append((int(match[1]), layer["snr_db"]))
        elif finite(layer.get("snr_db")):
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


DRAWINGS: dict[str, Callable[[Report], Figure | None]] = {
    "comparison": _comparison,
    "layers": _layers,
    "loss": _loss,
}
"""The functions that draw a run's plots; each returns None if there is nothing to draw."""

DESCRIPTIONS = {
    "comparison": "Perplexity and accuracy of the models",
    "layers": "Signal-to-noise ratio of each quantized layer",
    "loss": "Loss by step",
    "sweep": "Perplexity and mean task accuracy against bits per weight",
}
"""Texts for readers who cannot see the plots."""
