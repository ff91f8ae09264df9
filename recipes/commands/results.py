"""The commands about the results of a run: its report, its models, and a sweep of settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finequant.recipes.commands.parameters import Overrides, RecipePath
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from finequant.recipes.rundir import RunDir


def report(
    where: RecipePath,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """Print the table of the last evaluation; with --open, show its page."""
    import webbrowser
    from contextlib import suppress

    from finequant.evaluate.report.report import print_table
    from finequant.recipes.artifact import read_part
    from finequant.recipes.command_line import open_run
    from finequant.recipes.locate import is_run
    from finequant.recipes.rundir import RunDir
    from finequant.recipes.stages import command_of, stages_of
    from finequant.recipes.terminal import say

    recipe, run = None, RunDir(where)
    of_run = is_run(where) and not overrides
    if not of_run:
        recipe, run = open_run(where, overrides or [])
    for file in (run.report, run.predictions):
        if not file.exists():
            raise UserError(
                f"{file} does not exist: run `finequant run RECIPE`, or only "
                f"`{command_of('evaluate')}`, first"
            )
    print_table(read_part(run.report, command_of("evaluate")))
    with suppress(*[UserError] if of_run else []):  # rows and base may be on another machine
        recipe = recipe or open_run(where, [])[0]
        for stage in stages_of(recipe):
            for change in run.what_changed(recipe, stage) or ():
                say(f"report: out of date: since {stage} ran, {change}")
    rewrite_page(run)
    if not run.page.is_file():
        return
    say(f"report: {run.page}")
    if show:
        webbrowser.open(run.page.resolve().as_uri())


def rewrite_page(run: RunDir) -> None:
    """Writes report.html from the files of the run, if the run directory is writable."""
    from finequant.evaluate.report.page import write_page
    from finequant.recipes.terminal import say

    try:
        write_page(run.root)
    except OSError as error:  # a run directory that only others may write
        say(f"report: {run.page}: cannot be written ({error.strerror})")


def chat(
    where: RecipePath,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="base, tuned, quantized, or an export by its name in the report, such as gguf or "
            "pte; default: quantized; with --prompt, every model of the run"
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="ask this once, and show the answers side by side")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens per answer, at most", min=1)] = 256,
) -> None:
    """Talk to a model of a run, or ask all of them the same question."""
    from finequant.evaluate.chat import chat as talk

    talk(where, overrides or [], model, prompt, max_new_tokens)


def sweep(
    recipe: RecipePath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY.SUB=VALUE[,VALUE]...",
            help="such as quantize.bits=8,4,3 quantize.method=rtn,gptq",
        ),
    ] = None,
    model: Annotated[
        Literal["tuned", "base"], typer.Option(help="what to quantize; base needs no training")
    ] = "tuned",
) -> None:
    """Measure other quantization settings -> sweep/"""
    from finequant.evaluate.sweep import sweep as measure

    measure(recipe, overrides or [], model)
