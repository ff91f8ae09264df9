"""The points of a sweep: every combination of the settings on its command line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from finequant.recipes.errors import UserError
from finequant.recipes.hub import pinned
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.stages import NOT_SWEPT

ALWAYS_SHOWN = ("quantize.method", "quantize.bits", "quantize.budget", "quantize.group_size")


class Point(NamedTuple):
    """One combination of quantization settings."""

    settings: dict[str, Any]
    """Method, bits (or their budget), group_size, then further swept keys as written."""
    recipe: Recipe

    @property
    def name(self) -> str:
        (_, method), (_, bits), (_, group_size), *further = self.settings.items()
        scheme = [method, f"{bits} bits", f"groups of {group_size}"]
        return ", ".join([*scheme, *(f"{key} {value}" for key, value in further)])


def read_points(path: Path, overrides: Sequence[str]) -> list[Point]:
    """Makes a point with a valid recipe for each combination of the overrides' values.

    Raises:
        UserError: for an invalid recipe, or a list for a key that cannot be swept.
    """
    choices = [_choices(override) for override in overrides]
    swept = dict.fromkeys(values[0].partition("=")[0] for values in choices if len(values) > 1)
    points = {}
    for combination in product(*choices):
        recipe = load_recipe(path, combination)
        recipe, _ = pinned(recipe, RunDir.of(recipe).commits_of("train"))
        scheme, values = recipe.quantize, dict(item.split("=", 1) for item in combination)
        bits = scheme.bits if scheme.budget is None else f"budget {scheme.budget}"
        settings = {"method": scheme.method, "bits": bits, "group_size": scheme.group_size}
        further = {
            key.removeprefix("quantize."): values[key] for key in swept if key not in ALWAYS_SHOWN
        }
        point = Point(settings | further, recipe)
        points.setdefault(point.name, point)
    return list(points.values())


def _choices(override: str) -> list[str]:
    """Splits `key=8,4` into `key=8` and `key=4`; keeps an override without a list as it is."""
    key, _, text = override.partition("=")
    values = split_values(text)
    if len(values) < 2:
        return [override]
    if not key.startswith("quantize."):
        raise UserError(
            f"command line: {override}: only keys of the quantize section can be swept; "
            f"put a text with a comma in quotes: '{key}=\"{text}\"'"
        )
    if any(f"{key}.".startswith(f"{same}.") for same in NOT_SWEPT):
        raise UserError(
            f"command line: {override}: cannot be swept, as it changes nothing that a sweep "
            "measures; choose one value"
        )
    if key == "quantize.dtype":
        raise UserError(
            f"command line: {override}: cannot be swept, as all points are compared with one float "
            "model; choose one dtype"
        )
    return [f"{key}={value}" for value in values]


def split_values(text: str) -> list[str]:
    """Splits `8,4,3` at its commas, but not inside brackets, braces, or quotes."""
    from ruamel.yaml import YAML, YAMLError

    try:
        nodes = YAML().compose(f"[{text}]").value
    except YAMLError:  # not YAML, so plain text
        return [text]
    return [text[node.start_mark.index - 1 : node.end_mark.index - 1] for node in nodes]


def check_plans(points: list[Point]) -> None:
    """Refuses, before anything is loaded, plans that do not fit the model."""
    from finequant.finetune.model import load_config
    from finequant.quantize.scheme import layer_plan

    for point in points:
        layer_plan(point.recipe.quantize, load_config(point.recipe.model))
