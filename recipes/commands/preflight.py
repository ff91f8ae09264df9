"""Finds, before the first stage starts, everything that would stop a later one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finequant.recipes.errors import UserError, refuse_all
from finequant.recipes.terminal import close, doing

if TYPE_CHECKING:
    from finequant.finetune.data.splits import Splits
    from finequant.quantize.size.terms import Lengths
    from finequant.recipes.rundir import RunDir
    from finequant.recipes.schema import Recipe


def refuse_early(
    recipe: Recipe,
    directory: RunDir,
    stages: list[str],
    launch: Path | None,
    force: bool,
    meanwhile: Callable[[], None],
) -> None:
    """Refuses, before the first stage, what one of them would refuse, or what cannot finish here.

    meanwhile: called after the quick checks, to start work that goes on during the others.

    Raises:
        UserError: for what a stage would refuse, and, unless forced, if memory or disk seems too
            small.
    """
    refuse_split_weights(recipe, launch)
    lengths = preflight(recipe, directory, meanwhile)
    if not force:
        from finequant.quantize.size.machine import this_machine
        from finequant.quantize.size.resources import refuse_what_cannot_finish

        machine = this_machine()._replace(sharded=_sharding(launch) is not None)
        refuse_what_cannot_finish(recipe, directory, stages, machine, lengths)


def preflight(
    recipe: Recipe, directory: RunDir, meanwhile: Callable[[], None] = lambda: None
) -> Lengths:
    """Refuses, before the first stage, whatever a later stage would refuse; cheap checks first.

    Returns:
        The lengths of the recipe's rows, which decide how much memory the stages take.

    Raises:
        UserError: listing all problems that can be found at the same cost.
    """
    doing("checks: rows, texts and license")
    splits = _check_files(recipe, directory)
    doing("checks: loading torch and transformers")
    meanwhile()
    lengths = check_tokens(recipe, splits)
    if recipe.evaluate.tasks:
        doing("checks: loading lm-eval and its tasks")
        from finequant.evaluate.metrics.tasks import load_tasks
        from finequant.finetune.model import load_config

        load_tasks(recipe.evaluate, load_config(recipe.model).max_position_embeddings)
    from finequant.quantize.convert import check_base_range  # only now: it imports torch

    check_base_range(recipe)
    close()
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


def check_tokens(recipe: Recipe, splits: Splits) -> Lengths:
    """Checks what needs the base's configuration and tokenizer: plan, exports, and all rows as
    tokens, those for calibration included."""
    from finequant.evaluate.check import check_runtimes
    from finequant.evaluate.inputs import prepare
    from finequant.finetune.architecture import check_positions
    from finequant.finetune.check import check_training
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.quantize.export import check_exports
    from finequant.quantize.methods.sequences import check_calibration
    from finequant.quantize.training.train import check_something_learns
    from finequant.recipes.command_line import quiet_libraries

    quiet_libraries()
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    *_, training, material = refuse_all(
        [
            partial(check_runtimes, recipe),
            partial(check_positions, recipe, config),
            partial(check_exports, recipe.quantize, config, tokenizer),
            partial(check_something_learns, recipe, config),
            partial(check_calibration, recipe, tokenizer),
            partial(check_training, recipe, config, splits, tokenizer),
            partial(prepare, recipe, splits, tokenizer),
        ]
    )
    return material.lengths(training)


def refuse_split_weights(recipe: Recipe, launch: Path | None) -> None:
    """Refuses, before `train`, a launch configuration with which the stage `qat` cannot start.

    Raises:
        UserError: for DeepSpeed, or FSDP 1.
    """
    how = _sharding(launch)
    if recipe.quantize.training and how not in (None, "FSDP 2"):
        raise UserError(
            f"--launch: {launch} uses {how}, which cannot shard the codes of quantize.training: "
            "use recipes/accelerate/fsdp.yaml (fsdp_version: 2) or several_gpus.yaml, or set "
            "quantize.training=null"
        )


def _sharding(launch: Path | None) -> str | None:
    """Names what a configuration of accelerate shards with: FSDP 1, FSDP 2 or DeepSpeed."""
    if not launch:
        return None
    from accelerate.commands.config.config_args import load_config_from_file  # imports torch

    config = load_config_from_file(str(launch))
    if config.distributed_type == "FSDP":
        return f"FSDP {config.fsdp_config.get('fsdp_version', 1)}"
    return "DeepSpeed" if config.distributed_type == "DEEPSPEED" else None
