"""The `finequant` command: all stages of one recipe, or one of them.

finequant run recipes/quickstart.yaml
finequant train recipes/chat.yaml train.epochs=2
"""

from __future__ import annotations

from collections.abc import Sequence

import typer

from finequant.recipes.commands.pipeline import run
from finequant.recipes.commands.recipe import data, init, plan, schema, validate
from finequant.recipes.commands.results import chat, report, sweep
from finequant.recipes.commands.single import evaluate, export, publish, qat, quantize, train
from finequant.recipes.errors import report_user_errors

# Commands import libraries where they use them: `--help` answers in under a second.
app = typer.Typer(
    help="Fine-tune, then quantize, and prove what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    *(run, train, qat, quantize, evaluate, publish, chat, export, sweep),
    *(validate, report, init, schema, data, plan),
)
for command in COMMANDS:
    app.command()(command)


def main(argv: Sequence[str] | None = None) -> None:
    with report_user_errors():
        app(argv)


if __name__ == "__main__":
    main()
