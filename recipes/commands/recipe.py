"""The commands about a recipe before anything runs: write it, check it, show what it will do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finequant.recipes.commands.parameters import Overrides, RecipePath
from finequant.recipes.commands.preflight import check_tokens, preflight
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from finequant.finetune.data.splits import Splits
    from finequant.recipes.schema import Recipe


def init(
    data: Annotated[
        Path | None, typer.Option(help="rows: JSON, CSV, Parquet, ...; asked for if not given")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="held-out rows; default: a tenth")] = None,
    base: Annotated[
        str | None, typer.Option(help="Hub id, folder, or package:MODULE/FILE.gguf")
    ] = None,
    task: Annotated[
        Literal["classify", "chat", "tools", "summarize", "translate", "extract"] | None,
        typer.Option(help="what the model is to do; default: guessed from the rows"),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="column of the question")
    ] = None,
    completion: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="column of the answer")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="the recipe; default: named after data")] = None,
) -> None:
    """Write a commented recipe for your rows, and show what the model will see."""
    from finequant.recipes.load import load_recipe
    from finequant.recipes.terminal import doing, say

    # Not asked for by the option, which would ask before a misspelled one is refused.
    data = data or Path(typer.prompt("File with your rows"))
    doing(f"init: reading {data}")
    from finequant.finetune.data.columns import columns_of
    from finequant.finetune.data.starter import write_recipe

    target = to or Path(f"{data.resolve().name.partition('.')[0]}.yaml")
    columns = {"prompt": prompt, "completion": completion}
    given = {field: name for field, name in columns.items() if name}
    look = write_recipe(data, test, base, task, target, given)
    say(f"init: {target} written: a recipe to change as you like")
    if look.columns:
        chosen = ", ".join(f"{field} is column {name}" for field, name in look.columns.items())
        left = f"; not read: {columns_of(look.unread)}" if look.unread else ""
        say(f"init: {chosen}{left}")
    recipe = load_recipe(target, [])
    _fit_to_this_machine(recipe, _preview(recipe, 3), target)
    file = shlex.quote(str(target))
    say(f"init: next: `finequant plan {file}`, then `finequant run {file}`")


def _fit_to_this_machine(recipe: Recipe, splits: Splits, target: Path) -> None:
    """Adds settings to the recipe's file with which all stages fit here, if they do not yet."""
    from finequant.quantize.size.machine import this_machine
    from finequant.quantize.size.resources import settings_that_fit
    from finequant.recipes.load import add_to_file
    from finequant.recipes.stages import STAGES, stages_of
    from finequant.recipes.terminal import say

    machine, stages = this_machine(), [stage for stage in stages_of(recipe) if stage in STAGES]
    if not settings_that_fit(recipe, stages, machine):
        return
    # Rows can be shorter than the recipe allows.
    lengths = check_tokens(recipe, splits)
    if changes := settings_that_fit(recipe, stages, machine, lengths):
        memory = f"{machine.memory / 1e9:.1f} GB of {machine.name}"
        add_to_file(target, changes, f"to fit into the {memory}")
        settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
        say(f"init: to fit into the {memory}: {settings}")


def data(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="how many rows to show", min=0)] = 3,
    html: Annotated[
        Path | None, typer.Option(help="also write fifty rows in color as this HTML file")
    ] = None,
) -> None:
    """Show rows as the model will see them, with target tokens in color."""
    from finequant.recipes.load import load_recipe

    if html and not html.parent.is_dir():
        raise UserError(f"--html {html}: there is no folder {html.parent}: make it first")
    _preview(load_recipe(recipe, overrides or []), rows, html)


def _preview(recipe: Recipe, rows: int, html: Path | None = None) -> Splits:
    from finequant.recipes.command_line import quiet_libraries
    from finequant.recipes.terminal import doing

    doing("data: reading the rows")
    from finequant.finetune.data.prepared import prepared_splits

    # Refuses bad rows before the libraries are loaded, which takes seconds.
    splits = prepared_splits(recipe)
    doing("data: loading datasets and transformers")
    quiet_libraries()
    from finequant.finetune.data.preview import preview

    preview(recipe, splits, rows, html)
    return splits


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="show one row per layer")] = False,
    gpu: Annotated[
        str | None, typer.Option(help="also for this GPU: a name such as H100, or 24GB")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="how many of them")] = 1,
    sharded: Annotated[
        bool, typer.Option(help="in training, FSDP splits the base over them")
    ] = False,
    device_memory: Annotated[
        str | None, typer.Option(help="memory of the target device, such as 6GB")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="tokens of the key-value cache; default: data.max_length")
    ] = None,
) -> None:
    """Show what each layer becomes, and how much memory and disk everything takes.

    Reads configurations only; after quantization, it also shows signal-to-noise ratios.
    """
    from finequant.quantize.size.machine import bytes_of, named_gpu
    from finequant.recipes.command_line import quiet_libraries
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir
    from finequant.recipes.terminal import doing

    loaded = load_recipe(recipe, overrides or [])
    machine = named_gpu(gpu)._replace(gpus=gpus, sharded=sharded) if gpu else None
    memory = bytes_of(device_memory, "--device-memory") if device_memory else None
    doing("plan: loading torch and transformers")
    quiet_libraries()
    from finequant.quantize.size.plan import show_plan
    from finequant.quantize.size.resources import show_resources

    show_plan(loaded, RunDir.of(loaded), every)
    show_resources(loaded, RunDir.of(loaded), machine, memory, context)


def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="also check rows, texts, tokenizer, and tasks")
    ] = False,
) -> None:
    """Check a recipe; with --deep, also rows, texts, tokenizer and tasks."""
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    loaded = load_recipe(recipe, overrides or [])
    if deep:
        preflight(loaded, RunDir.of(loaded))
    print(f"{recipe}: a valid recipe, {loaded.name}")


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print tables of all keys instead: docs/keys.md")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from finequant.recipes import reference
    from finequant.recipes.schema import Recipe

    if markdown:
        print(reference.markdown(), end="")
    else:
        print(json.dumps(Recipe.model_json_schema(), indent=2))
