"""Fine-tune a LoRA adapter: recipe -> adapter/

python finetune/train.py recipes/quickstart.yaml
accelerate launch finetune/train.py recipes/chat.yaml train.learning_rate=1e-4
torchrun --nproc_per_node 2 finetune/train.py recipes/chat.yaml
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.recipes.artifact import differences, sealed
from finequant.recipes.command_line import quiet_libraries, read_command_line
from finequant.recipes.errors import counted, report_user_errors
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import doing, is_first, say
from finequant.recipes.usage import Stopwatch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from finequant.finetune.data.splits import Splits

LOG = "training_log.json"


def main(argv: Sequence[str] | None = None) -> None:
    with report_user_errors():
        recipe, run = read_command_line(__doc__, argv, first_stage=True)
        doing("train: loading torch, transformers and trl")
        quiet_libraries()
        train(recipe, run)


def train(recipe: Recipe, run: RunDir) -> None:
    """Trains the adapter and writes `adapter/`; resumes from the last checkpoint if there is one.

    Raises:
        UserError: for data or a base that cannot be used.
    """
    from finequant.finetune.architecture import check_positions
    from finequant.finetune.arguments import training_arguments
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.finetune.data.turns import generation_config, save_tokenizer, template_notes
    from finequant.finetune.device import dtype_name, training_precision
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.finetune.processes import decided_by_first, require_shared

    watch = Stopwatch()
    inputs = run.inputs(recipe, "train") if is_first() else {}  # hashes the base
    check_positions(recipe, load_config(recipe.model))
    dtype, reason = training_precision(recipe.train.precision)
    base_in = ", the base in nf4" if recipe.model.load == "nf4" else ""
    say(f"train: {dtype_name(dtype)}, {reason}{base_in}")
    tokenizer = load_tokenizer(recipe.model)
    arguments = training_arguments(recipe, run.checkpoints, dtype)
    require_shared(run.root)
    splits = prepared_splits(recipe)
    warnings = template_notes(tokenizer, recipe.data) if splits.train[0].messages else []
    for note in [*splits.notes, *warnings]:
        say(f"data: {note}")
    decided_by_first(lambda: run.continuing(run.checkpoints, "train", inputs))
    trained, resumed = fine_tune(recipe, arguments, tokenizer, splits, dtype)
    if is_first():
        log = json.loads((trained / LOG).read_text(encoding="utf-8"))
        with run.writing(run.adapter, recipe) as folder:
            shutil.copytree(trained, folder, dirs_exist_ok=True)
            save_tokenizer(tokenizer, recipe.data, folder)
            # For users of base and adapter: the base's own may not know where an answer ends.
            stops = generation_config(recipe.model, recipe.data, tokenizer)
            stops.to_json_file(folder / "generation_config.json")
        figures = training_figures(log) | {"processes": arguments.world_size, "resumed": resumed}
        run.record(recipe, "train", inputs, seconds=watch.seconds, **figures)
        steps = counted(figures["steps"], "step")
        say(f"train: {steps}, {run.adapter} written in {watch.seconds} s")


def fine_tune(
    recipe: Recipe,
    arguments: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    dtype: torch.dtype,
) -> tuple[Path, bool]:
    """Trains plain LoRA, unless an earlier call has.

    Returns:
        The folder of its adapter and log, and whether an earlier call has trained a part or all.
    """
    from finequant.finetune.adapter import save_adapter, save_initial_adapter
    from finequant.finetune.lora import fuse
    from finequant.finetune.nf4 import load_trained_base
    from finequant.finetune.processes import decided_by_first, entered_by_first, sharding
    from finequant.finetune.stopping import last_checkpoint, run_trainer
    from finequant.finetune.trainer import build_trainer, gathered_weights

    checkpoints = Path(arguments.output_dir)
    folder, initial = checkpoints / "plain", checkpoints / "initial"
    if decided_by_first(lambda: differences(folder) == []):
        say("train: plain LoRA is already trained")
        return folder, True
    doing("train: loading the base")
    base = load_trained_base(recipe, dtype)
    trainer = build_trainer(recipe, arguments, base, tokenizer, splits)
    if recipe.lora.changes_base and is_first():
        save_initial_adapter(trainer.model, initial)
    if not sharding():
        fuse(trainer.model)
    checkpoint = last_checkpoint(arguments)
    run_trainer(trainer, checkpoint)
    weights = gathered_weights(trainer)
    with entered_by_first(sealed(folder)) as partial:
        if is_first():
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_adapter(model, partial, initial if initial.exists() else None, weights)
            log = json.dumps(trainer.state.log_history, indent=1)
            (partial / LOG).write_text(log, encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return folder, checkpoint is not None


def training_figures(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the number of steps, and the tokens per second since training last resumed."""
    last = [entry for entry in log if "train_runtime" in entry][-1]
    seconds = max(float(last["train_runtime"]), 1e-9)
    tokens = last["num_input_tokens_seen"] - last.get("tokens_before", 0)
    return {"steps": last["step"], "tokens_per_second": round(tokens / seconds, 1)}


if __name__ == "__main__":
    main()
