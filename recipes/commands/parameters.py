"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="path of the recipe (YAML)")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="such as train.epochs=2"),
]
RecipeOrRun = Annotated[
    Path, typer.Argument(metavar="RECIPE_OR_RUN", help="a recipe, or a run directory")
]
