"""The commands that run a single stage of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from finequant.recipes.commands.parameters import Overrides, RecipePath


def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Fine-tune: rows -> adapter/"""
    from finequant.finetune.train import main as stage

    stage([str(recipe), *(overrides or [])])


def qat(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train through the quantized weights: adapter/ -> trained_codes/"""
    from finequant.quantize.training.train import main as stage

    stage([str(recipe), *(overrides or [])])


def quantize(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Merge and quantize: adapter/ -> quantized/"""
    from finequant.quantize.convert import main as stage

    stage([str(recipe), *(overrides or [])])


def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Measure base, tuned and quantized -> report.html"""
    from finequant.evaluate.compare import main as stage

    stage([str(recipe), *(overrides or [])])


def export(
    recipe: RecipePath,
    overrides: Overrides = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            help="a format, as in quantize.exports; may be repeated; "
            "default: the recipe's quantize.exports",
        ),
    ] = None,
) -> None:
    """Write the same codes in other formats: quantized/ -> exports/"""
    from finequant.quantize.export import main as stage

    chosen = [word for name in to or [] for word in ("--to", name)]
    stage([str(recipe), *(overrides or []), *chosen])


def publish(
    recipe: RecipePath,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="upload without asking")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write the files to publish/, and do not upload")
    ] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="publish the adapter, not the quantized model")
    ] = False,
    overrule_gate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="publish despite this failed check; the card says so"),
    ] = None,
    into_existing: Annotated[
        bool,
        typer.Option(
            "--into-existing", help="allow a repository that has other files, or was edited"
        ),
    ] = False,
) -> None:
    """Upload to the Hugging Face Hub, with a card that says what was measured."""
    from finequant.publish.publish import Options
    from finequant.publish.publish import publish as stage
    from finequant.recipes.command_line import open_run

    overruled = tuple(overrule_gate or ())
    options = Options(yes, dry_run, adapter_only, overruled, into_existing)
    stage(*open_run(recipe, overrides or [], missing_ok=True), options)
