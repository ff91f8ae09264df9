"""Locates a recipe: a file, a run directory that contains one, or the name of a shipped recipe."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from finequant.recipes.errors import UserError

SHIPPED = Path(__file__).parent
"""The folder of the shipped recipes: this file's folder, even where finequant is installed."""

CHATML_TOOLS = SHIPPED / "data" / "chatml_tools.jinja"
"""A chat template for bases that know ChatML, but no functions; a recipe gives its name only."""

RUN_RECIPE = "recipe.yaml"
"""The resolved recipe of a run directory."""


def shipped_recipes() -> list[str]:
    """Lists the names of the recipes that come with finequant."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def is_run(folder: Path) -> bool:
    """Says whether a folder is a run directory: artifacts in it have a recipe, but no manifest."""
    return (folder / RUN_RECIPE).is_file() and (folder / "manifest.json").is_file()


def locate_recipe(name: Path) -> Path:
    """Returns the file of a recipe; a user's file comes before a shipped recipe of the same name.

    Raises:
        UserError: for a folder that is not a run directory, or an unknown name.
    """
    if is_run(name):
        return name / RUN_RECIPE
    is_plain = name.parent == Path() and not name.suffix and name.name not in ("", "..")
    if is_plain and not name.is_file():
        for file in (name.with_suffix(".yaml"), SHIPPED / f"{name}.yaml"):
            if file.is_file():
                return file
    if name.is_dir():
        raise UserError(f"{name}: a folder, but not a run directory: expected {RUN_RECIPE} in it")
    if name.is_file() or not is_plain:
        return name
    near = get_close_matches(name.name, shipped_recipes(), n=1)
    raise UserError(
        f"{name}: cannot read the recipe: expected a file, a run directory, or one that comes with "
        f"finequant: {', '.join(shipped_recipes())}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def locate_launch(name: Path) -> Path:
    """Returns a configuration file of accelerate: a user's, or a shipped one by its name.

    Raises:
        UserError: for an unknown name.
    """
    folder = SHIPPED / "accelerate"
    for file in (name, folder / f"{name}.yaml"):
        if file.is_file():
            return file
    shipped = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise UserError(f"--launch: {name}: no such file; expected a file, or one of {shipped}")
