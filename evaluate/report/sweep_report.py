"""The report of a sweep: sweep.json, sweep.md, plots/, and the table in the terminal.

It is a report as in report.py, whose `models` are the float model and one model for each point. In
addition to their scores, these have `settings` and `packed_bits_per_weight`, and each point has its
`divergence` from the float model. `swept` is base or tuned, and `adapter` the hash of the adapter
of tuned.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from finequant.evaluate.report.plots import COLORS, MARKERS, draw_plot, new_figure
from finequant.evaluate.report.report import image_link, write_json
from finequant.evaluate.report.table import (
    MISSING,
    markdown_table,
    print_rows,
    shown_number,
    shown_score,
)
from finequant.evaluate.report.values import (
    Report,
    corpora_of,
    float_at,
    metrics_of,
    to_percent,
    value_at,
)
from finequant.recipes.artifact import replace_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Model = dict[str, Any]

MAX_PERPLEXITY_RATIO = 30
"""Perplexities of more than this many times the lowest are drawn at the top edge."""

NOTES = """\
Every point is quantized from the same float model and measured on the same inputs. Bits per weight
are those of the whole model, including scales and float embedding, divided by the float model's
number of weights: as torchao's file stores it (a byte per code), and with packed codes. ± is one
standard error; none is shown where all rows have the same value. The mean task accuracy is the mean
of the first metric of each task. Points in the plot are labeled with their bits per code; ↑ means
off the scale."""


def write_sweep(report: Report, folder: Path) -> None:
    """Writes plots/sweep.png, sweep.md, and finally sweep.json."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"sweep"} if draw_plot(draw_sweep, report, folder, "sweep") else set()
    replace_text(folder / "sweep.md", _markdown(report, plots))
    write_json(report, folder / "sweep.json")


def print_sweep(report: Report) -> None:
    """Prints a table with a row for each point to stdout."""
    print_rows(*sweep_rows(report))


def sweep_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Makes the header and the rows: the float model, then each point."""
    models = report["models"]
    keys = list(dict.fromkeys(key for m in models.values() for key in m["settings"]))
    header = [key.replace("_", " ") for key in keys]
    header += ["bits per weight on disk", "bits per weight, packed"]
    units = _units(report)
    header += [f"perplexity per {unit}, {corpus}" for corpus, unit in units.items()]
    header += ["KL from float, nats per token"] if units else []
    for task, metric in metrics_of(models):
        header.append(f"{task}, {metric} {'out of 100' if to_percent(metric) == 1 else 'in %'}")
    accuracy = ["mean task accuracy in %"] if metrics_of(models) else []
    return header + accuracy, [_row(model, keys, units, models) for model in models.values()]


def _units(report: Report) -> dict[str, str]:
    """Returns the unit of each corpus's perplexity: the word for WikiText, as in lm-eval."""
    corpora = report["recipe"]["evaluate"]["perplexity"]
    by_words = {corpus["name"] for corpus in corpora if corpus["documents"] == "wikitext"}
    return {
        corpus: "word" if corpus in by_words else "token" for corpus in corpora_of(report["models"])
    }


def _row(
    model: Model, keys: list[str], units: dict[str, str], models: dict[str, Model]
) -> list[str]:
    cells = [str(model["settings"].get(key, MISSING)) for key in keys]
    if not model["settings"]:
        cells[0] = f"float ({model['dtype']})"
    cells += [shown_number(model[key]) for key in ("bits_per_weight", "packed_bits_per_weight")]
    for corpus, unit in units.items():
        cells.append(shown_number(value_at(model, "perplexity", corpus, unit)))
    cells += [shown_score(value_at(model, "divergence", "kl"), 1, digits=4)] if units else []
    for task, metric in metrics_of(models):
        score = value_at(model, "tasks", task, metric)
        cells.append(shown_score(score, to_percent(metric)))
    if metrics_of(models):
        mean = mean_accuracy(model)
        cells.append(MISSING if math.isnan(mean) else f"{mean:.1f}")
    return cells


def mean_accuracy(model: Model) -> float:
    """Averages each task's first metric over the tasks, in percent; NaN if there is none."""
    first = {task: next(iter(metrics)) for task, metrics in model["tasks"].items() if metrics}
    values = [
        to_percent(metric) * float_at(model, "tasks", task, metric, "value")
        for task, metric in first.items()
    ]
    return fmean(values) if values else math.nan


def groupwise_tables(report: Report) -> list[str]:
    """Makes a table for each corpus: the float model and four bits at each group size, by method.

    The layout is that of the table in ExecuTorch's Llama documentation. Returns [] if there are
    fewer than two group sizes at four bits.
    """
    floating, *points = report["models"].values()
    four = [point for point in points if point["settings"]["bits"] == 4]
    sizes = sorted({point["settings"]["group_size"] for point in four})
    if len(sizes) < 2:
        return []
    tables = []
    for corpus, unit in _units(report).items():
        by_method: dict[str, dict[int, str]] = {}
        for point in four:
            shown = shown_number(value_at(point, "perplexity", corpus, unit))
            by_method.setdefault(_method(point), {})[point["settings"]["group_size"]] = shown
        baseline = shown_number(value_at(floating, "perplexity", corpus, unit))
        rows = [
            [f"{_model_name(report)}, {method}", baseline]
            + [cells.get(size, MISSING) for size in sizes]
            for method, cells in by_method.items()
        ]
        header = [f"perplexity per {unit}, {corpus}", f"baseline ({floating['dtype']})"]
        header += [f"groupwise 4-bit ({size})" for size in sizes]
        tables.append(markdown_table(header, rows))
    return tables


def _markdown(report: Report, plots: set[str]) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    four_bits = "\n\n".join(groupwise_tables(report))
    sections = [
        f"# {report['recipe']['name']}: the {report['swept']} model with different quantizations",
        f"Base model {_base_name(report)}, seed {report['recipe']['seed']}.",
        markdown_table(*sweep_rows(report)),
        NOTES,
        image_link(plots, "sweep"),
        f"## Four bits\n\n{four_bits}" if four_bits else "",
        f"## Made with\n\n{versions}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _base_name(report: Report) -> str:
    """Returns the base's name without its folder, which may be specific to this machine."""
    return Path(report["recipe"]["model"]["base"]).name


def _model_name(report: Report) -> str:
    return _base_name(report) if report["swept"] == "base" else report["recipe"]["name"]


def _method(model: Model) -> str:
    """Names the settings that the points of a line or row share, apart from the group size."""
    method, _, _, *further = model["settings"].items()
    return ", ".join([method[1], *(f"{key} {value}" for key, value in further)])


def draw_sweep(report: Report) -> Figure | None:
    models = report["models"]
    panels = {
        f"perplexity per {unit}, {corpus}\n(lower is better)": [
            float_at(model, "perplexity", corpus, unit) for model in models.values()
        ]
        for corpus, unit in _units(report).items()
    }
    accuracies = [mean_accuracy(model) for model in models.values()]
    panels["mean task accuracy in %\n(higher is better)"] = accuracies
    panels = {label: values for label, values in panels.items() if any(map(math.isfinite, values))}
    if not panels:
        return None
    figure = new_figure(1 + 5 * len(panels))
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, values) in zip(all_axes, panels.items(), strict=True):
        axes.set(
            ylabel=label, xlabel="bits per weight, packed: scales and float embedding included"
        )
        _panel(axes, list(models.values()), values, is_perplexity=label.startswith("perplexity"))
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panel(axes: Axes, models: list[Model], values: list[float], is_perplexity: bool) -> None:
    """Plots one score of every model; the float model's is a dashed line."""
    ceiling = None
    if is_perplexity:
        ceiling = MAX_PERPLEXITY_RATIO * min(filter(math.isfinite, values))
        _plain_log_scale(axes)
    for index, (name, points) in enumerate(_lines(models[1:], values[1:], ceiling).items()):
        style = {"color": COLORS[index % 7], "marker": MARKERS[index % 7], "markersize": 5}
        bits, heights, _ = zip(*sorted(points), strict=True)
        axes.plot(bits, heights, label=name, **style)
        for x, height, label in points:
            axes.annotate(label, (x, height), (4, 4), textcoords="offset points", fontsize=8)
    if math.isfinite(values[0]):
        style = {"linestyle": "--", "color": "black"}
        axes.axhline(values[0], label=f"float ({models[0]['dtype']})", **style)
    axes.grid(alpha=0.3)


def _lines(
    models: list[Model], values: list[float], ceiling: float | None
) -> dict[str, list[tuple[float, float, str]]]:
    """Groups the points, as (bits per weight, height, label), by method and group size."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for model, value in zip(models, values, strict=True):
        beyond = ceiling is not None and not value < ceiling  # NaN is beyond, too
        height, label = ceiling if beyond else value, str(model["settings"]["bits"])
        point = model["packed_bits_per_weight"], height, label + ("↑" if beyond else "")
        name = f"{_method(model)}, groups of {model['settings']['group_size']}"
        lines.setdefault(name, []).append(point)
    return lines


def _plain_log_scale(axes: Axes) -> None:
    """Sets a log scale that also labels 20, 30, 50: there is no power of ten between 20 and 90."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(3, 0.4)))
