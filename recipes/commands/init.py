"""`finequant init`: writes a recipe for the user's rows, and tries it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finequant.recipes.commands.parameters import Overrides
from finequant.recipes.commands.preflight import check_tokens
from finequant.recipes.commands.recipe import read_splits
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from finequant.finetune.data.guess import Look
    from finequant.finetune.data.splits import Splits
    from finequant.quantize.size.terms import Lengths
    from finequant.recipes.schema import Recipe

NUMBER = re.compile(r"\d+(\.0)?")
"""A label that is a number; pandas writes 1 as 1.0 if other rows have none."""


def init(
    data: Annotated[
        Path | None,
        typer.Option(help="rows: a file, a folder, or ORG/NAME on the Hub; asked for if not given"),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="held-out rows; default: the data's test split, or a tenth")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Hub id, folder, or package:MODULE/FILE.gguf; default: the embedded model"
        ),
    ] = None,
    task: Annotated[
        Literal["classify", "chat", "tools", "summarize", "translate", "extract", "text"] | None,
        typer.Option(help="what the model should do; default: guessed from the rows"),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="column of the question; several are joined"),
    ] = None,
    completion: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="column of the answer; several are joined"),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="split to train on, if the rows have several")
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="configuration of a Hub dataset that has several")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="file to write; default: named after data")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a commented recipe for your rows, and show what the model will see."""
    from finequant.recipes.terminal import as_argument, doing, say

    _refuse_words(overrides or [])
    # Not asked for by the option, which would ask before a misspelled one is refused.
    data = data or Path(typer.prompt("File with your rows"))
    doing(f"init: reading {data}")
    from finequant.finetune.data.columns import joined
    from finequant.finetune.data.starter import default_target, write_recipe, write_schema
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    target = to or default_target(data)
    columns = {"prompt": prompt, "completion": completion}
    given = {field: joined(names) for field, names in columns.items() if names}
    look = write_recipe(data, test, base, task, target, given, split, subset)
    recipe = NewRecipe(target)
    _say_choices(look)
    try:
        with _undone_on_error(RunDir.of(load_recipe(target, overrides or [])).data):
            _try(recipe, overrides or [])
    except BaseException:
        recipe.remove()  # so that the same command works once the cause is mended
        raise
    write_schema(target.parent)
    file = as_argument(target)
    say(f"init: wrote {target}, a recipe that you can edit")
    say(f"init: next: `finequant plan {file}`, then `finequant run {file}`")


def _refuse_words(overrides: list[str]) -> None:
    """Refuses what is no override, such as the files that a shell makes of a pattern."""
    for word in overrides:
        if "=" not in word:
            raise UserError(
                f"{word}: expected key.sub=value, such as train.epochs=2; name rows by --data "
                "FILE, and put a pattern in quotes"
            )


def _say_choices(look: Look) -> None:
    """Prints which columns `init` chose and which it left out, and a doubt about the answers."""
    from finequant.finetune.data.columns import columns_of
    from finequant.recipes.terminal import say

    if look.columns:
        chosen = ", ".join(f"{field} is {name!r}" for field, name in look.columns.items())
        left = f"; not used: {columns_of(look.unread)}" if look.unread else ""
        say(f"init: {chosen}{left}")
    if look.task == "classify" and all(map(NUMBER.fullmatch, look.answers)):
        say("init: the answers are numbers: if they stand for names, put the names in a column")


class NewRecipe:
    """The file that `init` writes; if an error follows, it is removed, unless it was edited."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._text = self._read()
        """What `init` has written; None once somebody else has edited it."""

    def _read(self) -> str:
        return self.file.read_text(encoding="utf-8")

    def add(self, values: dict[str, Any], comment: str) -> None:
        """Sets keys; keeps everything else."""
        from finequant.recipes.load import add_to_file

        edited = self._read() != self._text
        add_to_file(self.file, values, comment)
        self._text = None if edited else self._read()

    def remove(self) -> None:
        from finequant.recipes.terminal import say

        with suppress(FileNotFoundError):
            if self._read() == self._text:
                self.file.unlink()
            else:
                say(f"init: kept {self.file}, which was edited in the meantime")


@contextmanager
def _undone_on_error(folder: Path) -> Iterator[None]:
    """Removes what was made in a folder, with the new folders above it, if an error follows."""

    def contents() -> set[Path]:
        paths = (folder, *folder.parents, *folder.rglob("*"))
        return {path for path in paths if path.exists()}

    before = contents()
    try:
        yield
    except BaseException:
        for path in sorted(contents() - before, reverse=True):
            with suppress(OSError):  # a folder that holds something else stays
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def _try(target: NewRecipe, overrides: list[str]) -> None:
    """Shows what the model will see with a new recipe, and completes its file where a stage would
    otherwise refuse it.

    Raises:
        UserError: for whatever a stage would refuse all the same.
    """
    from finequant.evaluate.check import check_rows
    from finequant.recipes.load import load_recipe, values_of

    given = values_of(overrides)
    if given:
        target.add(given, "given to init")
    if "data.max_length" not in given:
        _write_max_length(target)
    splits = read_splits(load_recipe(target.file))
    from finequant.finetune.data.preview import preview  # only now: it imports libraries

    _write_tools(target, splits)
    _write_date(target, splits)
    recipe = load_recipe(target.file)
    preview(recipe, splits, 3)
    if "evaluate.metrics" not in given:
        _write_metrics(target, splits)
    check_rows(load_recipe(target.file), splits)
    if "quantize.exports" not in given:
        _write_exports(target)
    if "evaluate.max_new_tokens" not in given:
        _write_answer_length(target, splits)
    recipe = load_recipe(target.file)
    _fit_to_this_machine(recipe, check_tokens(recipe, splits), target)


def _write_max_length(target: NewRecipe) -> None:
    """Lowers data.max_length in a recipe's file to the base's positions, if it has fewer."""
    from finequant.finetune.architecture import trained_positions
    from finequant.finetune.model import load_config
    from finequant.recipes.load import load_recipe

    recipe = load_recipe(target.file)
    positions = trained_positions(load_config(recipe.model))
    if positions < recipe.data.max_length:
        target.add({"data.max_length": positions}, "the positions of the base")


def _write_tools(target: NewRecipe, splits: Splits) -> None:
    """Names the chat template that comes with finequant in a recipe's file, if the base's own
    leaves out tools and that one fits the base."""
    from finequant.finetune.data.rendering import check_template
    from finequant.finetune.data.turns import answer_end
    from finequant.finetune.model import load_tokenizer
    from finequant.recipes.load import load_recipe
    from finequant.recipes.locate import CHATML_TOOLS
    from finequant.recipes.terminal import say

    recipe = load_recipe(target.file)
    if recipe.model.chat_template or not any(row.tools for row in splits.train):
        return
    tokenizer = load_tokenizer(recipe.model)

    def fits() -> bool:
        try:
            check_template(splits.train, tokenizer, recipe.data)
        except UserError:
            return False
        return answer_end(tokenizer, recipe.data).token is not None

    if fits():
        return
    tokenizer.chat_template = CHATML_TOOLS.read_text(encoding="utf-8")
    if fits():
        target.add({"model.chat_template": CHATML_TOOLS.name}, "comes with finequant")
        say(
            "init: the base's own chat template leaves out tools: "
            f"model.chat_template: {CHATML_TOOLS.name}, which comes with finequant"
        )


def _write_date(target: NewRecipe, splits: Splits) -> None:
    """Sets a date in a recipe's file, if the chat template would write today's."""
    from finequant.finetune.data.turns import DATE, takes_date
    from finequant.finetune.model import load_tokenizer
    from finequant.recipes.load import load_recipe

    recipe = load_recipe(target.file)
    if splits.train[0].messages and takes_date(load_tokenizer(recipe.model), recipe.data):
        values = {f"data.template_arguments.{name}": value for name, value in DATE.items()}
        target.add(values, "otherwise the chat template writes today's date")


def _write_metrics(target: NewRecipe, splits: Splits) -> None:
    """Puts chrf in place of bleu and rouge in a recipe's file if they do not read the answers, and
    leaves tool_call_match out if none of the held-out answers is a call."""
    from finequant.evaluate.check import check_rows
    from finequant.recipes.load import load_recipe
    from finequant.recipes.terminal import say

    recipe = load_recipe(target.file)

    def fit(metrics: list[Any]) -> bool:
        evaluate = recipe.evaluate.model_copy(update={"metrics": metrics})
        with suppress(UserError):
            check_rows(recipe.model_copy(update={"evaluate": evaluate}), splits)
            return True
        return False

    asked = recipe.evaluate.metrics
    any_letters = [*dict.fromkeys("chrf" if x in ("bleu", "rouge") else x for x in asked)]
    words = [name for name in asked if name != "tool_call_match"]
    if fit(asked):
        return
    if any_letters != asked and fit(any_letters):
        left = ", ".join(name for name in asked if name not in any_letters)
        target.add({"evaluate.metrics": any_letters}, "for any language")
        say(f"init: evaluate.metrics: chrf, because {left} cannot compare such answers")
    elif words != asked and fit(words):
        target.add({"evaluate.metrics": words}, "few rows call functions")
        say(
            f"init: evaluate.metrics: {', '.join(words)}, because no held-out answer is a call: "
            "for tool_call_match, name rows with calls by --test"
        )


def _write_exports(target: NewRecipe) -> None:
    """Leaves GGUF out of a recipe's file if it cannot hold the base, such as one with Llama 2's
    tokenizer."""
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.quantize.export import check_exports
    from finequant.recipes.load import load_recipe
    from finequant.recipes.terminal import say

    recipe = load_recipe(target.file)
    described = load_config(recipe.model), load_tokenizer(recipe.model)
    check_exports(recipe.quantize.model_copy(update={"exports": []}), *described)
    try:
        check_exports(recipe.quantize, *described)
    except UserError as error:
        target.add({"quantize.exports": []}, "GGUF cannot hold this base")
        reason = str(error).removesuffix(": remove gguf from quantize.exports")
        say(f"init: quantize.exports: [], because GGUF cannot hold this base: {reason}")


def _write_answer_length(target: NewRecipe, splits: Splits) -> None:
    """Raises evaluate.max_new_tokens in a recipe's file, which `init` guesses from characters, if
    the base's tokenizer takes more tokens for one in a hundred held-out answers, and the base has
    positions for them after the longest prompt."""
    from statistics import quantiles

    from finequant.evaluate.check import asked_rows, check_rows
    from finequant.finetune.architecture import usable_positions
    from finequant.finetune.data.starter import MOST_TOKENS
    from finequant.finetune.data.tokens import answer_text, encode_prompt
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.recipes.load import load_recipe

    recipe = load_recipe(target.file)
    tokenizer, positions = load_tokenizer(recipe.model), usable_positions(load_config(recipe.model))
    asked = [row for whole in check_rows(recipe, splits) for row in asked_rows(whole)]
    answers = [answer_text(row, tokenizer, recipe.data) for row in asked]
    if not answers:
        return
    lengths = list(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))
    most = int(quantiles([*lengths, max(lengths)], n=100, method="inclusive")[-1])
    room = positions - max(len(encode_prompt(row, tokenizer, recipe.data)) for row in asked)
    if recipe.evaluate.max_new_tokens < (needed := min(MOST_TOKENS, most, room)):
        target.add({"evaluate.max_new_tokens": needed}, "what held-out answers take")


def _fit_to_this_machine(recipe: Recipe, lengths: Lengths, target: NewRecipe) -> None:
    """Adds settings to the recipe's file with which all stages fit here, if they do not yet, and
    leaves out exports that do not fit into the memory of the CPU."""
    from finequant.quantize.size.machine import this_host, this_machine
    from finequant.quantize.size.resources import settings_that_fit
    from finequant.recipes.stages import STAGES, exports_of, stages_of
    from finequant.recipes.terminal import say

    stages = [stage for stage in stages_of(recipe) if stage in STAGES]
    for machine, those in ((this_machine(), stages), (this_host(), exports_of(recipe))):
        # Rows can be shorter than the recipe allows.
        if changes := settings_that_fit(recipe, those, machine, lengths):
            memory = f"{machine.memory / 1e9:.1f} GB of {machine.name}"
            target.add(changes, f"to fit into the {memory}")
            settings = ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
            say(f"init: to fit into the {memory}: {settings}")
