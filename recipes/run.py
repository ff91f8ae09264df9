"""The `finequant` command: all stages of one recipe, or one of them.

finequant run quickstart
finequant train recipes/chat.yaml train.epochs=2
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from finequant.recipes.commands.init import init
from finequant.recipes.commands.pipeline import run
from finequant.recipes.commands.recipe import data, plan, schema, validate
from finequant.recipes.commands.results import chat, report, sweep
from finequant.recipes.commands.single import evaluate, export, publish, qat, quantize, train
from finequant.recipes.errors import UserError, report_user_errors
from finequant.recipes.interrupt import Interrupted

# Commands import libraries where they use them, so that `--help` answers in under a second.
app = typer.Typer(
    help="Fine-tune, then quantize, and prove what it cost.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
PANELS = {
    "All stages": (run,),
    "Before a run: the recipe and its rows": (init, validate, data, plan, schema),
    "A single stage": (train, qat, quantize, export, evaluate),
    "After a run: its results": (report, chat, sweep, publish),
}
SHARED = (train, qat, quantize, evaluate)
"""Commands in which the processes of a launcher share the work."""
NOTHING_TO_CONTINUE = (init, validate, data, plan, schema, report, chat)


def _without_hint(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a signal end a command without the advice to run it again to continue."""

    @wraps(command)
    def stops(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except Interrupted as stop:
            raise Interrupted(stop.number, "") from None

    return stops


def _alone(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command do nothing in all of a launcher's processes but the first."""

    @wraps(command)
    def goes_on(*arguments: Any, **options: Any) -> None:
        from finequant.recipes.command_line import go_on_alone

        go_on_alone(command.__name__)
        command(*arguments, **options)

    return goes_on


for panel, commands in PANELS.items():
    for command in commands:
        ends = _without_hint(command) if command in NOTHING_TO_CONTINUE else command
        app.command(rich_help_panel=panel)(ends if command in SHARED else _alone(ends))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"finequant {version('finequant')}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version"),
    ] = False,
) -> None:
    """Takes the options that precede a command."""


def main(argv: Sequence[str] | None = None) -> None:
    with report_user_errors():
        try:
            sys.exit(app(argv, prog_name="finequant", standalone_mode=False))
        except TyperException as error:
            if error.format_message():  # empty after the help, which `finequant` alone prints
                raise UserError(_next_step(error)) from None
            sys.exit(error.exit_code)
        except typer.Abort:  # the end of the input, where a question was asked
            sys.exit("\nAborted.")


def _next_step(error: TyperException) -> str:
    """Returns the message of a wrong command line, with what to do next."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    if key := re.match(r"--?(\w+(\.\w+)+)", getattr(error, "option_name", "")):
        return f"{message}: a key of the recipe has no dashes: write {key[1]}=VALUE"
    command = context.command_path if context else "finequant"
    return f"{message}{' ' if message.endswith('?') else '; '}`{command} --help` shows its usage"


if __name__ == "__main__":
    main()
