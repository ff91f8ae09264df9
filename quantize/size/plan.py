"""Shows, for `finequant plan`, the bits, the size and the signal-to-noise ratio of each layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from finequant.finetune.architecture import (
    EMBEDDING,
    HEAD,
    bias_count,
    layer_shapes,
    norm_count,
    parameter_count,
)
from finequant.finetune.model import load_config
from finequant.quantize.scheme import (
    LayerScheme,
    Plan,
    keeps_tied_head,
    layer_plan,
    packed_bits,
    shares_table,
    shipped_dtype,
)
from finequant.recipes.errors import UserError
from finequant.recipes.freshness import changes
from finequant.recipes.load import read_section
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Quantize, Recipe
from finequant.recipes.stages import PLAN_KEYS, recipe_inputs
from finequant.recipes.terminal import close, show

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig


class Size(NamedTuple):
    """Number of weights, and their bytes: packed without gaps, and in torchao's files."""

    weights: int
    packed: int
    disk: int


def layer_size(shape: tuple[int, int], scheme: LayerScheme | None, dtype: torch.dtype) -> Size:
    """Computes the size of a layer. On disk, each code and each zero point takes a byte.

    dtype: dtype of layers that stay in float.
    """
    weights = shape[0] * shape[1]
    if scheme is None:
        return Size(weights, weights * dtype.itemsize, weights * dtype.itemsize)
    groups = weights // scheme.group_size
    disk = weights + groups * (scheme.scale_dtype.itemsize + 1)
    return Size(weights, math.ceil(packed_bits(shape, scheme) / 8), disk)


def model_size(
    plan: Plan, config: DecoderConfig, dtype: torch.dtype, quantize: Quantize | None = None
) -> Size:
    """Computes the size of the whole model with norms and biases; a tied head counts once.

    quantize: if given, a table that head and embedding share is packed only once.
    """
    shapes, vectors = layer_shapes(config), norm_count(config) + bias_count(config)
    sizes = [Size(vectors, vectors * dtype.itemsize, vectors * dtype.itemsize)]
    sizes += [layer_size(shapes[name], plan[name], dtype) for name in _own_weights(plan, config)]
    size = Size(*map(sum, zip(*sizes, strict=True)))
    if quantize and shares_table(quantize, plan, config):
        return size._replace(
            packed=size.packed - layer_size(shapes[HEAD], plan[HEAD], dtype).packed
        )
    return size


def _own_weights(plan: Plan, config: DecoderConfig) -> list[str]:
    """Lists all layers except a head that shares the embedding's weights."""
    tied = keeps_tied_head(plan, config)
    return [name for name in plan if not (tied and name == HEAD)]


def show_plan(recipe: Recipe, run: RunDir, every: bool = False) -> None:
    """Prints the plan with sizes, and with signal-to-noise ratios if `quantized/` has this plan.

    every: a row for each layer; else layers of several blocks that are alike share one.

    Raises:
        UserError: for a plan that does not fit the model.
    """
    config = load_config(recipe.model)
    plan, ratios = layer_plan(recipe.quantize, config), {}
    if record := _record(recipe, run):
        chosen = recipe.quantize.model_dump() | {"layers": record["plan"], "budget": None}
        plan = layer_plan(Quantize.model_validate(chosen), config)
        ratios = {layer["name"]: layer["snr_db"] for layer in record["layers"]}
    elif recipe.quantize.budget:
        show(
            f"quantize.budget: {recipe.quantize.budget} bits per weight: the plan is chosen by "
            "measured sensitivity in the stage quantize; after that stage, it is shown here"
        )
        return
    dtype, shapes = shipped_dtype(recipe.quantize, config), layer_shapes(config)
    whole = model_size(plan, config, dtype, recipe.quantize)
    plan = {name: plan[name] for name in _own_weights(plan, config)}
    sizes = {name: layer_size(shapes[name], scheme, dtype) for name, scheme in plan.items()}
    _print(_table(plan, shapes, sizes, ratios, every))
    for line in _totals(plan, sizes, whole, config):
        show(line)
    if ratios:
        show(f"signal-to-noise ratios: of the weights in {run.quantized}, {record['method']}")


def _record(recipe: Recipe, run: RunDir) -> dict[str, Any] | None:
    """Reads quantization.json if `quantized/` was made with the same keys for its plan."""
    file = run.quantized / "quantization.json"
    if not file.exists():
        return None
    quantize = read_section(run.quantized / "recipe.yaml", "quantize", Quantize)
    made_from = recipe.model_copy(update={"quantize": quantize})
    if changes(recipe_inputs(made_from, PLAN_KEYS), recipe_inputs(recipe, PLAN_KEYS)):
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}): run the stage quantize again") from None


def _table(
    plan: Plan,
    shapes: dict[str, tuple[int, int]],
    sizes: dict[str, Size],
    ratios: dict[str, float | None],
    every: bool,
) -> Table:
    table = Table("layer", "shape", "bits", "group size", "bytes packed", "on disk")
    if ratios:
        table.add_column("signal to noise in dB")
    for title, names in _rows(plan, every):
        scheme, size = plan[names[0]], sizes[names[0]]
        snr = [ratios[name] for name in names if ratios.get(name) is not None]
        table.add_row(
            title,
            " x ".join(map(str, shapes[names[0]])),
            *((str(scheme.bits), str(scheme.group_size)) if scheme else ("float", "")),
            *(f"{len(names) * part:,}" for part in (size.packed, size.disk)),
            *([_span(snr)] if ratios else []),
        )
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def _rows(plan: Plan, every: bool) -> list[tuple[str, list[str]]]:
    """Returns the titles of the rows, each with the names of the layers that it stands for."""
    kinds: dict[str, dict[LayerScheme | None, list[str]]] = {}
    for name, scheme in plan.items():
        kind = name if every else re.sub(r"^model\.layers\.\d+\.", "", name)
        kinds.setdefault(kind, {}).setdefault(scheme, []).append(name)
    return [
        (names[0] if len(names) == 1 else f"model.layers.{_blocks(names)}.{kind}", names)
        for kind, schemes in kinds.items()
        for names in schemes.values()
    ]


def _blocks(names: list[str]) -> str:
    """Lists the numbers of the layers' blocks as ranges, such as 0-3,7."""
    ranges: list[list[int]] = []
    for number in (int(name.split(".")[2]) for name in names):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _span(ratios: list[float]) -> str:
    ends = [f"{end:.1f}" for end in (min(ratios), max(ratios))] if ratios else [""]
    return " to ".join(dict.fromkeys(ends))


def _totals(
    plan: Plan, sizes: dict[str, Size], whole: Size, config: DecoderConfig
) -> Iterator[str]:
    """Yields the totals of the quantized layers, which a budget counts, and of the whole model."""
    rounded = [sizes[name] for name in plan if plan[name] and name != EMBEDDING]
    linear = Size(*map(sum, zip(*rounded, strict=True)))
    for what, size, weights in (
        ("rounded layers", linear, linear.weights),
        ("whole model", whole, parameter_count(config)),
    ):
        yield (
            f"{what}: {size.packed:,} bytes packed, {size.disk:,} on disk; "
            f"{8 * size.packed / weights:.3f} and {8 * size.disk / weights:.3f} "
            f"bits for each of {weights:,} weights"
        )


def _print(table: Table) -> None:
    """Prints in full width where there is no terminal; in one, breaks names, never figures."""
    console = Console()
    close()
    if console.is_terminal:
        table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.width = max(map(len, [*str(column.header).split(), *map(str, column.cells)]))
    else:
        needed = console.measure(table, options=console.options.update(width=1000)).maximum
        console.width = max(console.width, needed)
    console.print(table)
