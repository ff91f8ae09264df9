"""The `finequant` command: all stages of one recipe, or one of them.

finequant run recipes/quickstart.yaml
finequant train recipes/chat.yaml train.epochs=2
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finequant.recipes.errors import UserError, refuse_all, report_user_errors

if TYPE_CHECKING:
    from finequant.finetune.data.splits import Splits
    from finequant.quantize.size.estimate import Lengths
    from finequant.recipes.rundir import RunDir
    from finequant.recipes.schema import Recipe

# Libraries are imported where they are used: `--help` answers in under a second.
app = typer.Typer(
    help="Fine-tune, then quantize, and prove what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MODULES = {
    "train": "finequant.finetune.train",
    "qat": "finequant.quantize.training.train",
    "quantize": "finequant.quantize.convert",
    "evaluate": "finequant.evaluate.compare",
}  # and each export: finequant.quantize.export

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="path of the recipe (YAML)")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="such as train.epochs=2"),
]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    launch: Annotated[
        Path | None,
        typer.Option(help="accelerate configuration for training, as in recipes/accelerate/"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="start even if memory or disk seem too small")
    ] = False,
) -> None:
    """Run all stages in turn, skipping those whose inputs have not changed."""
    from finequant.recipes.command_line import say
    from finequant.recipes.hub import COMMITS, pinned
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir
    from finequant.recipes.stages import stages_of

    loaded, commits = pinned(load_recipe(recipe, overrides or []))
    os.environ[COMMITS] = json.dumps(commits)  # for the stages
    directory, stages = RunDir.of(loaded), stages_of(loaded)
    started, ran = time.monotonic(), False
    for number, stage in enumerate(stages, start=1):
        changes = directory.what_changed(loaded, stage)
        if changes == []:
            say(f"[{number}/{len(stages)}] {stage}: up to date")
            continue
        remaining = stages[number - 1 :]
        if not ran:
            refuse_early(loaded, directory, remaining, launch, force)
        say(f"[{number}/{len(stages)}] {stage}{_remaining(directory, remaining)}")
        for change in changes or []:
            say(f"  because {change}")
        trains = stage in ("train", "qat")
        _start(stage, [str(recipe), *(overrides or [])], launch if trains else None)
        ran = True
    if ran:
        say(f"done in {time.monotonic() - started:.0f} s: {directory.root}")
        return
    passed = _show_report(directory)
    say(f"nothing to do: {directory.root} is up to date")
    if not passed:
        sys.exit(1)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Fine-tune: recipe -> adapter/ (the same as finetune/train.py)."""
    from finequant.finetune.train import main as stage

    stage([str(recipe), *(overrides or [])])


@app.command()
def qat(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Quantization-aware training: adapter/ -> trained_codes/ (quantize/training/train.py)."""
    from finequant.quantize.training.train import main as stage

    stage([str(recipe), *(overrides or [])])


@app.command()
def quantize(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Merge and quantize: adapter/ -> quantized/ (the same as quantize/convert.py)."""
    from finequant.quantize.convert import main as stage

    stage([str(recipe), *(overrides or [])])


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Compare base, tuned and quantized -> report (the same as evaluate/compare.py)."""
    from finequant.evaluate.compare import main as stage

    stage([str(recipe), *(overrides or [])])


@app.command()
def publish(
    recipe: RecipePath,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="upload without asking")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="write publish/ of the run directory and stop")
    ] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="publish the adapter, not the quantized model")
    ] = False,
    overrule_gate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="publish despite this failed check; the card says so"),
    ] = None,
    into_existing: Annotated[
        bool, typer.Option("--into-existing", help="allow a repository with files from elsewhere")
    ] = False,
) -> None:
    """Publish the result on the Hugging Face Hub, with a card that says what was measured."""
    from finequant.publish.publish import Options
    from finequant.publish.publish import publish as stage
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    loaded = load_recipe(recipe, overrides or [])
    overruled = tuple(overrule_gate or ())
    options = Options(yes, dry_run, adapter_only, overruled, into_existing)
    stage(loaded, RunDir.of(loaded), options)


@app.command()
def chat(
    where: Annotated[
        Path, typer.Argument(metavar="RECIPE_OR_RUN", help="a recipe, or a run directory")
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="base, tuned, quantized, or an export such as gguf or pte; "
            "default: quantized; with --prompt, every model of the run"
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="ask this once, and show the answers side by side")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens per answer, at most", min=1)] = 256,
) -> None:
    """Chat with a model of a run, or ask all of them the same question."""
    from finequant.evaluate.chat import chat as talk

    talk(where, overrides or [], model, prompt, max_new_tokens)


@app.command()
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
    """Write the same codes in other formats: quantized/ -> exports/ (quantize/export.py)."""
    from finequant.quantize.export import main as stage

    chosen = [word for name in to or [] for word in ("--to", name)]
    stage([str(recipe), *(overrides or []), *chosen])


@app.command()
def sweep(
    recipe: RecipePath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.SUB=VALUE[,VALUE]...]...",
            help="such as quantize.bits=8,4,3 quantize.method=rtn,gptq",
        ),
    ] = None,
    model: Annotated[
        Literal["tuned", "base"], typer.Option(help="what to quantize; base needs no training")
    ] = "tuned",
) -> None:
    """Measure every combination of quantization settings -> sweep/"""
    from finequant.evaluate.sweep import sweep as measure

    measure(recipe, overrides or [], model)


@app.command()
def validate(
    recipe: RecipePath,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="also check rows, texts, tokenizer, and tasks")
    ] = False,
) -> None:
    """Check a recipe without loading data or a model; with --deep, without loading weights."""
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    loaded = load_recipe(recipe, overrides or [])
    if deep:
        preflight(loaded, RunDir.of(loaded))
    print(f"{recipe}: a valid recipe, {loaded.name}")


@app.command()
def report(
    where: Annotated[
        Path, typer.Argument(metavar="RECIPE_OR_RUN", help="a recipe, or a run directory")
    ],
    show: Annotated[bool, typer.Option("--open", help="open the page in a browser")] = False,
) -> None:
    """Print the table of the last evaluation, and write its page again: report.html"""
    import webbrowser

    from finequant.evaluate.report.page import write_page
    from finequant.evaluate.report.report import print_table
    from finequant.recipes.command_line import say
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    run = RunDir(where) if where.is_dir() else RunDir.of(load_recipe(where, []))
    for file in (run.report, run.predictions):
        if not file.exists():
            raise UserError(f"{file}: missing: run `finequant evaluate RECIPE` first")
    write_page(run.root)
    print_table(json.loads(run.report.read_text(encoding="utf-8")))
    say(f"report: {run.page}")
    if show:
        webbrowser.open(run.page.resolve().as_uri())


@app.command()
def init(
    data: Annotated[
        Path, typer.Option(prompt="File with your rows", help="rows: JSON, CSV, Parquet, ...")
    ],
    test: Annotated[Path | None, typer.Option(help="held-out rows; default: a tenth")] = None,
    base: Annotated[str | None, typer.Option(help="Hub id or folder of a Llama")] = None,
    task: Annotated[
        Literal["classify", "chat", "tools", "summarize", "translate", "extract"] | None,
        typer.Option(help="what the model shall do; default: what the rows look like"),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="the recipe; default: named after data")] = None,
) -> None:
    """Look at your rows, write a commented recipe for them, and show what the model will see."""
    from finequant.finetune.data.preview import preview
    from finequant.finetune.data.starter import write_recipe
    from finequant.recipes.command_line import quiet_libraries, say
    from finequant.recipes.load import load_recipe

    target = to or Path(data.name.partition(".")[0]).with_suffix(".yaml")
    write_recipe(data, test, base, task, target)
    say(f"init: {target} written: a recipe to change as you like")
    loaded = load_recipe(target, [])
    quiet_libraries()
    preview(loaded, 3)
    say(f"init: next: `finequant plan {target}`, then `finequant run {target}`")


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print tables of all keys instead: docs/keys.md")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, which lets editors complete and check them."""
    from finequant.recipes import reference
    from finequant.recipes.schema import Recipe

    if markdown:
        print(reference.markdown(), end="")
    else:
        print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def data(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="how many rows to show", min=0)] = 3,
    html: Annotated[
        Path | None, typer.Option(help="also write fifty rows in color as this HTML file")
    ] = None,
) -> None:
    """Show rows as the model will see them, target tokens in color, and statistics."""
    from finequant.finetune.data.preview import preview
    from finequant.recipes.command_line import quiet_libraries
    from finequant.recipes.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    quiet_libraries()
    preview(loaded, rows, html)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="show one row per layer")] = False,
    gpu: Annotated[
        str | None, typer.Option(help="also for this GPU: a name such as H100, or 24GB")
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="memory of the target device, such as 6GB")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="tokens of the key-value cache; default: data.max_length")
    ] = None,
) -> None:
    """Show how each layer is quantized, and how much memory and disk everything takes.

    Reads configurations only; after quantization, it also shows signal-to-noise ratios.
    """
    from finequant.quantize.size.machine import bytes_of, named_gpu
    from finequant.quantize.size.plan import show_plan
    from finequant.quantize.size.resources import show_resources
    from finequant.recipes.command_line import quiet_libraries
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    loaded = load_recipe(recipe, overrides or [])
    machine = named_gpu(gpu) if gpu else None
    memory = bytes_of(device_memory) if device_memory else None
    quiet_libraries()
    show_plan(loaded, RunDir.of(loaded), every)
    show_resources(loaded, RunDir.of(loaded), machine, memory, context)


def main(argv: Sequence[str] | None = None) -> None:
    with report_user_errors():
        app(argv)


def refuse_early(
    recipe: Recipe, directory: RunDir, stages: list[str], launch: Path | None, force: bool
) -> None:
    """Refuses, before the first of the stages, what one of them would, or what cannot finish here.

    Raises:
        UserError: unless forced, also where memory or disk seem too small.
    """
    refuse_split_weights(recipe, launch)
    lengths = preflight(recipe, directory)
    if not force:
        from finequant.quantize.size.machine import this_machine
        from finequant.quantize.size.resources import refuse_what_cannot_finish
        from finequant.recipes.stages import STAGES

        large = [stage for stage in stages if stage in STAGES]
        refuse_what_cannot_finish(recipe, directory, large, this_machine(), lengths)


def preflight(recipe: Recipe, directory: RunDir) -> Lengths:
    """Refuses, before the first stage, whatever a later stage would refuse; cheap checks first.

    Returns:
        The lengths of the recipe's rows, which decide how much memory the stages take.

    Raises:
        UserError: listing all problems that can be found at the same cost.
    """
    from finequant.quantize.convert import check_base_range

    splits = _check_files(recipe, directory)
    lengths = _check_tokens(recipe, splits)
    _check_tasks(recipe)
    check_base_range(recipe)
    return lengths


def _check_files(recipe: Recipe, directory: RunDir) -> Splits:
    """Checks what takes seconds and no torch: paths, rows, texts, task files, and the license."""
    from finequant.evaluate.check import check_rows, check_texts
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.publish.publish import check as check_publishing
    from finequant.recipes import lock

    def rows() -> Splits:
        splits = prepared_splits(recipe)
        check_rows(recipe, splits)
        return splits

    splits, *_ = refuse_all(
        [
            rows,
            partial(lock.check_writable, directory.root),
            partial(check_texts, recipe.evaluate),
            partial(check_publishing, recipe),
        ]
    )
    return splits


def _check_tokens(recipe: Recipe, splits: Splits) -> Lengths:
    """Checks what needs the base's configuration and tokenizer: plan, exports, tokenized rows."""
    from finequant.evaluate.compare import longest_scored, prepare
    from finequant.finetune.architecture import check_window
    from finequant.finetune.check import check_training
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.quantize.export import check_exports
    from finequant.quantize.size.estimate import Lengths
    from finequant.recipes.command_line import quiet_libraries

    quiet_libraries()
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    _, _, training, material = refuse_all(
        [
            partial(check_window, recipe, config),
            partial(check_exports, recipe.quantize, config, tokenizer),
            partial(check_training, recipe, config, splits, tokenizer),
            partial(prepare, recipe, splits, tokenizer),
        ]
    )
    longest_prompt = max(map(len, material.prompts), default=0)
    return Lengths(training, longest_scored(material.corpora), longest_prompt)


def _check_tasks(recipe: Recipe) -> None:
    """Loads the recipe's tasks with their data, which needs lm-eval's index of 10,000 files."""
    from finequant.evaluate.metrics.tasks import load_tasks

    load_tasks(recipe.evaluate)


def refuse_split_weights(recipe: Recipe, launch: Path | None) -> None:
    """Refuses, before `train`, a launch configuration with which the stage `qat` cannot start.

    Raises:
        UserError: for FSDP or DeepSpeed.
    """
    if not (launch and recipe.quantize.training):
        return
    from accelerate.commands.config.config_args import load_config_from_file  # imports torch

    kind = load_config_from_file(str(launch)).distributed_type
    if kind in ("FSDP", "DEEPSPEED"):
        raise UserError(
            f"--launch: {launch} uses {kind}, which shards weights that quantize.training needs "
            "whole: use recipes/accelerate/several_gpus.yaml, or set quantize.training=null"
        )


def _start(stage: str, arguments: list[str], launch: Path | None) -> None:
    """Runs a stage in its own process, which returns its memory and contains its crashes."""
    from finequant.recipes.interrupt import RESUME_HINT, wait_and_forward_signals

    command = [sys.executable, "-m"]
    if launch:
        command += ["accelerate.commands.launch", "--config_file", str(launch), "--module"]
    if stage in MODULES:
        command += [MODULES[stage], *arguments]
    else:
        command += ["finequant.quantize.export", *arguments, "--to", stage]
    try:
        code = wait_and_forward_signals(subprocess.Popen(command))
    except FileNotFoundError as error:
        raise UserError(f"{stage}: cannot start {error.filename}") from None
    if code == -signal.SIGKILL:
        print(f"{stage} was killed, perhaps out of memory: {RESUME_HINT}", file=sys.stderr)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def _remaining(directory, stages: list[str]) -> str:
    """Estimates the remaining time from what the stages took last time in this run directory."""
    manifest = directory.manifest()
    known = [manifest[stage]["seconds"] for stage in stages if stage in manifest]
    if len(known) < len(stages):
        return ""
    return f" (about {sum(known) / 60:.0f} min to go, by the last run)"


def _show_report(directory) -> bool:
    """Prints the table of the last evaluation, and returns whether its gate passed."""
    from finequant.evaluate.report.report import print_table

    report = json.loads(directory.report.read_text(encoding="utf-8"))
    print_table(report)
    return report["gate"]["passed"]


if __name__ == "__main__":
    main()
