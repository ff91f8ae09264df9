"""Turns a report into rows of text, and rows into tables for the terminal and for Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from finequant.evaluate.report.values import (
    Report,
    corpora_of,
    finite,
    float_at,
    metrics_of,
    spreads,
    to_percent,
    value_at,
)
from finequant.recipes.terminal import close

if TYPE_CHECKING:
    from rich.console import Console

MISSING = "–"
FILE_LABEL = "file in MB (torchao's format takes a byte per code)"


class Line(NamedTuple):
    """A row of the comparison: which value of each model it shows, and how."""

    label: str
    shown: Callable[[Any], str]
    """Formats the value of a model."""
    change: Callable[[Any, Any], str]
    """Formats the change from tuned to quantized."""
    keys: tuple[str, ...]
    """Where the value is in a model."""


def comparison_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Makes the header and rows of the comparison.

    There is a column for each model, and one for the cost of quantization.
    """
    models = {name: _with_sizes(model) for name, model in report["models"].items()}
    lines = [*_size_lines(models), *_score_lines(models, report), *_export_lines(models)]
    rows = []
    for label, shown, change, keys in lines:
        tuned, quantized = (value_at(models, name, *keys) for name in ("tuned", "quantized"))
        values = (value_at(model, *keys) for model in models.values())
        rows.append([label, *map(shown, values), change(tuned, quantized)])
    return ["", *models, "quantized vs tuned"], rows


def _size_lines(models: dict[str, dict[str, Any]]) -> Iterator[Line]:
    yield Line("size in MB, packed (lower is better)", _megabytes, _ratio, ("size",))
    yield Line("bits per weight, packed (lower is smaller)", shown_number, _ratio, ("bits",))
    if any("file" in model for model in models.values()):
        label = FILE_LABEL if "file" in models.get("quantized", {}) else "file in MB"
        yield Line(label, _megabytes, _no_change, ("file",))
    if any("activations" in model for model in models.values()):
        yield Line("inputs of linear layers", _text, _no_change, ("activations",))


def _score_lines(models: dict[str, dict[str, Any]], report: Report) -> Iterator[Line]:
    for corpus in corpora_of(models):
        label = f"perplexity per token, {corpus} (lower is better)"
        yield Line(label, shown_number, _ratio, ("perplexity", corpus, "token"))
    for task, metric in metrics_of(models):
        scale = to_percent(metric)
        counts = (value_at(m, "tasks", task, metric, "n") for m in models.values())
        n = next(filter(None, counts), None)
        label = f"{task}, {metric} {'out of 100' if scale == 1 else 'in %'} (higher is better"
        label += f", n={n})" if n else ")"
        error = value_at(report, "changes", task, metric, "stderr")
        shown = partial(shown_score, scale=scale)
        yield Line(label, shown, _points(scale, error), ("tasks", task, metric))


def _export_lines(models: dict[str, dict[str, Any]]) -> Iterator[Line]:
    if any("parity" in model for model in models.values()):
        label = "same answers as quantized in % (higher is better)"
        yield Line(label, _percent, _no_change, ("parity", "same_answers"))
    for label, shown, key in PARITIES:
        if any(value_at(model, "parity", key) is not None for model in models.values()):
            yield Line(label, shown, _no_change, ("parity", key))
    for label, shown, key in SPEEDS:
        if any(value_at(model, "speed", key) for model in models.values()):
            yield Line(label, shown, _ratio, ("speed", key))


def _with_sizes(model: dict[str, Any]) -> dict[str, Any]:
    """Adds size and bits of the packed weights, and the size of the file where it differs."""
    file, bits = model.get("size_bytes"), model.get("bits_per_weight")
    size = model.get("packed_bytes", file)
    shown = model | {"size": size, "bits": model.get("packed_bits_per_weight", bits)}
    # Up to 1% is the header of the file.
    differs = file and size and abs(file / size - 1) > 0.01
    return shown | ({"file": file} if differs else {})


def _no_change(tuned: object, quantized: object) -> str:
    return MISSING


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
    ("KL from quantized, nats per token (lower is better)", _nats, "kl"),
)
"""Label, formatter, and key under `parity`, of an export that ran."""

SPEEDS = (
    ("prompt, tokens/s (higher is better)", _rate, "prompt"),
    ("decoding, tokens/s (higher is better)", _rate, "decoding"),
    ("peak memory in MB, with Python (lower is better)", _megabytes, "peak_memory_bytes"),
)
"""Label, formatter, and key under `speed`, which only exports have."""


def print_rows(header: list[str], rows: list[list[str]]) -> Console:
    """Prints a table to stdout; in a terminal that is too narrow for it, each row as a list.

    Returns:
        The console, made wide enough for the table where it is not a terminal.
    """
    from rich.console import Console
    from rich.table import Table

    close()
    console = Console(markup=False, highlight=False, emoji=False)
    table = Table()
    table.add_column(header[0], min_width=16)
    for name, *cells in list(zip(header, *rows, strict=True))[1:]:
        width = max(map(len, [*cells, *name.split()]))
        table.add_column(textwrap.fill(name, width), justify="right", min_width=width)
    for row in rows:
        table.add_row(*row)
    needed = console.measure(table, options=console.options.update(width=1000)).minimum
    if console.is_terminal and needed > console.width:
        console.print("\n".join(_as_list(header, row, console.width) for row in rows))
        return console
    console.width = max(console.width, needed)
    console.print(table)
    return console


def _as_list(header: list[str], row: list[str], width: int) -> str:
    """Formats a row as its label and, below it, each cell after its heading; lines break only
    between cells."""
    cells = zip(header[1:], row[1:], strict=True)
    shown = [
        f"{name} {cell}".replace(" ", "\N{NO-BREAK SPACE}")
        for name, cell in cells
        if cell != MISSING
    ]
    wrapped = textwrap.fill(
        ", ".join(shown), width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
    return f"{header[0]} {row[0]}\n{wrapped}".strip().replace("\N{NO-BREAK SPACE}", " ")


def markdown_table(header: list[str], rows: list[list[str]], align: str = "---:") -> str:
    rule = [":---", *[align] * (len(header) - 1)]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"
        for row in (header, rule, *rows)
    )


def bullets(lines: list[str]) -> str:
    """Makes a list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def shown_number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return MISSING
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def shown_score(score: dict | None, scale: float, digits: int = 1) -> str:
    """Formats {"value", "stderr"}, times `scale`, as `71.2 ± 1.8`."""
    value, error = value_at(score, "value"), value_at(score, "stderr")
    digits = _digits_of(error, scale, digits)
    text = MISSING if value is None else f"{value * scale:.{digits}f}"
    return f"{text} ± {error * scale:.{digits}f}" if spreads(error) else text


def _digits_of(error: float | None, scale: float, digits: int) -> int:
    """Returns the digits after the point, more than `digits` if the error would be 0 with these: a
    value `± 0.0` seems exact."""
    while spreads(error) and not float(f"{error * scale:.{digits}f}"):
        digits += 1
    return digits


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
        digits = _digits_of(error, scale, 1)
        spread = f" ± {error * scale:.{digits}f}" if spreads(error) else ""
        return f"{change:+z.{digits}f}{spread} points"

    return shown
