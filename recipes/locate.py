"""Where a recipe is: a file, a run directory that holds one, or the name of one that is shipped."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from finequant.recipes.errors import UserError

SHIPPED = Path(__file__).parent
"""The folder of this file, also where finequant is installed."""

IN_RUN = "recipe.yaml"
"""The resolved recipe of a run directory."""


def shipped_recipes() -> list[str]:
    """Lists the names of the recipes that come with finequant."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def is_run(folder: Path) -> bool:
    """Says whether a folder is a run directory: artifacts in it have a recipe, but no manifest."""
    return (folder / IN_RUN).is_file() and (folder / "manifest.json").is_file()


def locate_recipe(name: Path) -> Path:
    """Returns the file of a recipe; a file of the user's comes before a shipped one of that name.

    Raises:
        UserError: for a folder that is no run directory, and for a name that nothing has.
    """
    if is_run(name):
        return name / IN_RUN
    is_plain = name.parent == Path() and not name.suffix
    if name.is_dir() and not is_plain:
        raise UserError(f"{name}: a folder, but not a run directory: expected {IN_RUN} in it")
    if name.is_file() or not is_plain:
        return name
    for file in (name.with_suffix(".yaml"), SHIPPED / f"{name}.yaml"):
        if file.is_file():
            return file
    near = get_close_matches(name.name, shipped_recipes(), n=1)
    raise UserError(
        f"{name}: cannot read the recipe: expected a file, a run directory, or one that comes with "
        f"finequant: {', '.join(shipped_recipes())}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def locate_launch(name: Path) -> Path:
    """Returns a configuration of accelerate: a file, or a shipped one by its name.

    Raises:
        UserError: for a name that nothing has.
    """
    folder = SHIPPED / "accelerate"
    for file in (name, folder / f"{name}.yaml"):
        if file.is_file():
            return file
    shipped = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise UserError(f"--launch: {name}: no such file; expected a file, or one of {shipped}")
