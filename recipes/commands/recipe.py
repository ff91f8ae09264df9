"""The commands about a recipe before anything runs: check it, show its rows and what it will do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finequant.recipes.commands.parameters import Overrides, RecipePath
from finequant.recipes.commands.preflight import preflight
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from finequant.finetune.data.splits import Splits
    from finequant.recipes.schema import Recipe


def data(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="how many rows to show", min=0)] = 3,
    html: Annotated[
        Path | None, typer.Option(help="also write fifty rows in color as this HTML file")
    ] = None,
) -> None:
    """Show rows as the model will see them, with target tokens in color."""
    from finequant.finetune.data.page import check_page
    from finequant.recipes.load import load_recipe

    if html and not html.parent.is_dir():
        raise UserError(f"--html {html}: there is no folder {html.parent}: make it first")
    if html:
        check_page(html)
    loaded = load_recipe(recipe, overrides or [])
    splits = read_splits(loaded)
    from finequant.finetune.data.preview import preview  # only now: it imports libraries

    preview(loaded, splits, rows, html)


def read_splits(recipe: Recipe) -> Splits:
    """Reads the rows, and refuses bad ones before the libraries are loaded, which takes seconds.

    Rows of a branch on the Hub are those of its current commit: `prepared_splits` by itself would
    not notice that the branch has moved.
    """
    from finequant.recipes.command_line import quiet_libraries
    from finequant.recipes.hub import pinned
    from finequant.recipes.terminal import doing

    doing("data: reading the rows")
    from finequant.finetune.data.prepared import prepared_splits

    splits = prepared_splits(pinned(recipe)[0])
    doing("data: loading datasets and transformers")
    quiet_libraries()
    return splits


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="show one row per layer")] = False,
    gpu: Annotated[
        str | None, typer.Option(help="also plan for this GPU: a name such as H100, or 24GB")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="how many GPUs")] = 1,
    sharded: Annotated[
        bool, typer.Option(help="FSDP splits the base over the GPUs in training")
    ] = False,
    device_memory: Annotated[
        str | None, typer.Option(help="memory of the target device, such as 6GB")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of the key-value cache; default: data.max_length"),
    ] = None,
) -> None:
    """Show the bits of each layer, and the memory and disk that the stages take.

    Reads no weights and no rows; after quantization, it also shows signal-to-noise ratios.
    """
    from finequant.quantize.size.machine import bytes_of, named_gpu
    from finequant.recipes.command_line import quiet_libraries
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir
    from finequant.recipes.terminal import doing

    if not gpu and (gpus > 1 or sharded):
        raise UserError(f"{'--sharded' if sharded else '--gpus'}: of which GPU? Add --gpu NAME")
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
    """Check a recipe; with --deep, also its rows, texts, tokenizer and tasks."""
    from finequant.recipes.hub import pinned
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    loaded = load_recipe(recipe, overrides or [])
    if deep:
        preflight(pinned(loaded)[0], RunDir.of(loaded))
    print(f"{recipe} is a valid recipe: {loaded.name}")


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print docs/keys.md instead: tables of all keys")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from finequant.recipes import reference
    from finequant.recipes.schema import Recipe

    if markdown:
        print(reference.markdown(), end="")
    else:
        print(json.dumps(Recipe.model_json_schema(), indent=2))
