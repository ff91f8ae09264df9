"""Parameters that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finequant.recipes.locate import is_run, shipped_recipes


def known_recipes(incomplete: str) -> list[str]:
    """Lists what a shell may complete to: recipes and runs here, and the shipped recipes."""
    files = [*Path().glob("*.yaml"), *Path().glob("recipes/*.yaml")]
    runs = filter(is_run, Path("runs").glob("*"))
    names = [*map(str, files), *map(str, runs), *shipped_recipes()]
    return [name for name in names if name.startswith(incomplete)]


RecipePath = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="a recipe (YAML), a run directory, or a shipped recipe's name such as quickstart",
        autocompletion=known_recipes,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="overrides of the recipe, such as train.epochs=2"),
]
