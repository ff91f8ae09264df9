"""`SCRIPT RECIPE [key.sub=value ...]`: the command line that every stage shares."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finequant.recipes.hub import pinned
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import is_first, say

if TYPE_CHECKING:
    from finequant.recipes.rundir import RunDir

OF_SEVERAL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""The launcher's environment variables by which libraries see that there are other processes."""

SPLITTING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""The launcher's environment variable -> what splits the weights."""


def read_command_line(
    doc: str, argv: Sequence[str] | None, first_stage: bool = False
) -> tuple[Recipe, RunDir]:
    """Parses a stage's command line into its recipe and its run directory, which it locks.

    Before torch is imported, a launched process gets its share of the cores.
    Hub revisions become commits: the current ones in the first stage, and the same ones later.

    Raises:
        UserError: for an invalid recipe or override, or a directory that another process uses or
            that cannot be written.
    """
    from finequant.recipes.rundir import RunDir

    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="path of the recipe (YAML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="overrides, such as train.epochs=2"
    )
    arguments = parser.parse_args(argv)
    use_cores()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run = RunDir.of(recipe)
    run.hold()
    recipe, commits = pinned(recipe, None if first_stage else run.commits_of("train"))
    return recipe, replace(run, commits=commits)


def open_run(
    where: Path, overrides: Sequence[str], missing_ok: bool = False
) -> tuple[Recipe, RunDir]:
    """Returns the recipe and the run directory, given either of them.

    missing_ok: whether files that the recipe names may be missing.

    Hub revisions become the commits that the stages used, the first one that did: with branches in
    their place, all stages would seem to be out of date.
    """
    from finequant.recipes.rundir import RunDir
    from finequant.recipes.stages import stages_of

    recipe = load_recipe(where, overrides, missing_ok)
    run, commits = RunDir.of(recipe), {}
    for stage in reversed(stages_of(recipe)):
        commits |= run.commits_of(stage)
    return pinned(recipe, commits)[0], run


def go_on_alone(command: str) -> None:
    """Ends all of a launcher's processes but the first, which goes on as if it were the only one.

    For commands whose work cannot be shared: each process would write the same files, or upload or
    measure the same. It has an effect on libraries only before they are imported.
    """
    if not is_first():
        sys.exit()
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        say(f"{command}: only the first of {processes} processes works; the others have ended")
    for variable in (*OF_SEVERAL, *SPLITTING):
        os.environ.pop(variable, None)
    use_cores()


def use_cores() -> None:
    """Divides the cores among launched processes, unless the user has set OMP_NUM_THREADS.

    Otherwise accelerate, on a machine without a GPU, and torchrun, for several processes, set it to
    1, and all other cores are idle. It has an effect only before torch is imported.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if not launched or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    import psutil

    with suppress(psutil.Error):
        if "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ():
            return  # the launcher inherited it from the user
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes == 1:
        del os.environ["OMP_NUM_THREADS"]
        return
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // processes))


def quiet_libraries() -> None:
    """Silences what libraries print for their developers, so that users see what concerns them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # peft looks for a config.json beside a GGUF base, to see whether the vocabulary has grown.
    warnings.filterwarnings("ignore", message="Could not find a config file")
    # bitsandbytes, which peft imports if it is installed, looks for a kernel on the Hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # torchao warns of CUDA kernels that a CPU build of torch cannot load.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # trl advises against padding-free batches of one row; on a CPU every batch is padding-free.
    logging.getLogger("trl.trainer.sft_trainer").addFilter(
        lambda record: "padding-free training" not in record.getMessage()
    )
    # check_merge and evaluation let accelerate leave on disk what does not fit in memory.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)

    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
