"""Fine-tune a LoRA adapter: recipe -> adapter/

python finetune/train.py recipes/quickstart.yaml
accelerate launch finetune/train.py recipes/chat.yaml train.learning_rate=1e-4
torchrun --nproc_per_node 2 finetune/train.py recipes/chat.yaml
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.recipes.artefact import content_hash, differences, remove, replace_text, seal
from finequant.recipes.command_line import quiet_libraries, read_command_line, say
from finequant.recipes.errors import UserError, told_to_the_user
from finequant.recipes.rundir import ROUNDED, RunDir, Stopwatch
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
    from trl import SFTConfig

    from finequant.finetune.data.splits import Splits
    from finequant.finetune.trainer import LoraTrainer
    from finequant.quantize.rounding import Rounded

LOG = "training_log.json"
ROUNDED_PHASE = "quantization_aware"
"""Folder in checkpoints/ of the phase that trains through rounded weights."""
STARTING_CODES = "start-{}.safetensors"


def main(argv: Sequence[str] | None = None) -> None:
    with told_to_the_user():
        recipe, run = read_command_line(__doc__, argv, first_stage=True)
        quiet_libraries()
        train(recipe, run)


def train(recipe: Recipe, run: RunDir) -> None:
    """Trains the adapter and writes `adapter/`; goes on from the last checkpoint if there is one.

    Raises:
        UserError: for data or a base that cannot be used.
    """
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.data.turns import generation_config, save_tokenizer
    from finequant.finetune.model import load_tokenizer, training_precision
    from finequant.finetune.processes import decided_by_first, is_first, require_shared
    from finequant.finetune.trainer import training_arguments

    watch = Stopwatch()
    _refuse_split_weights(recipe)
    inputs = run.inputs(recipe, "train") if is_first() else {}  # hashes the base
    splits = load_splits(recipe.data, recipe.seed)
    for note in splits.notes:
        say(f"data: {note}")
    dtype, reason = training_precision(recipe.train.precision)
    say(f"train: {str(dtype).removeprefix('torch.')}, {reason}")
    tokenizer = load_tokenizer(recipe.model)
    arguments = training_arguments(recipe, run.checkpoints, dtype, bool(splits.validation))
    require_shared(run.root)
    decided_by_first(lambda: _clear_stale_checkpoints(run, run.checkpoints, _of_plain(inputs)))
    phases = []
    if recipe.train.has_plain_phase:
        phases.append(fine_tune(recipe, arguments, tokenizer, splits, dtype))
    if recipe.train.quantization_aware:
        folder = run.checkpoints / ROUNDED_PHASE
        decided_by_first(lambda: _clear_stale_checkpoints(run, folder, inputs))
        phases.append(train_rounded(recipe, run, tokenizer, splits, dtype, *phases))
    if is_first():
        log = _joined_log(phases)
        with run.writing(run.adapter, recipe) as folder:
            for phase in reversed(phases):  # of two adapters, that of plain LoRA
                shutil.copytree(phase, folder, dirs_exist_ok=True)
            save_tokenizer(tokenizer, recipe.data, folder)
            # For those who load base and adapter: the base's own may not know where an answer ends.
            stops = generation_config(recipe.model, recipe.data, tokenizer)
            stops.to_json_file(folder / "generation_config.json")
            (folder / LOG).write_text(json.dumps(log, indent=1), encoding="utf-8")
        figures = _figures(log) | {"processes": arguments.world_size}
        run.record(recipe, "train", inputs, seconds=watch.seconds, **figures)
        say(f"train: {figures['steps']} steps, {run.adapter} written in {watch.seconds} s")


def fine_tune(
    recipe: Recipe,
    arguments: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    dtype: torch.dtype,
) -> Path:
    """Plain LoRA; the folder with its adapter and log, which an earlier call may have left."""
    from finequant.finetune.lora import fuse
    from finequant.finetune.model import (
        changes_the_base,
        load_base,
        save_adapter,
        save_initial_adapter,
    )
    from finequant.finetune.processes import decided_by_first
    from finequant.finetune.stopping import last_checkpoint, run_trainer
    from finequant.finetune.trainer import build_trainer, gathered_weights

    checkpoints = Path(arguments.output_dir)
    folder, initial = checkpoints / "plain", checkpoints / "initial"
    if decided_by_first(lambda: differences(folder) == []):
        say("train: plain LoRA was done before")
        return folder
    base = load_base(recipe.model, dtype)
    trainer = build_trainer(recipe, arguments, base, tokenizer, splits)
    if changes_the_base(recipe.lora) and trainer.is_world_process_zero():
        save_initial_adapter(trainer.model, initial)
    if arguments.use_cpu:
        fuse(trainer.model)
    run_trainer(trainer, last_checkpoint(arguments))
    weights = gathered_weights(trainer)
    with _written_by_one(trainer, folder) as partial:
        if partial:
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_adapter(model, partial, initial if initial.exists() else None, weights)
    return folder


def train_rounded(
    recipe: Recipe,
    run: RunDir,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    dtype: torch.dtype,
    plain: Path | None = None,
) -> Path:
    """Quantization-aware LoRA on the base, merged with the adapter in `plain` if there is one.

    Returns the folder with the codes that it ended with, its adapter and its log.
    """
    from finequant.finetune.model import save_adapter
    from finequant.finetune.processes import decided_by_first
    from finequant.finetune.stopping import last_checkpoint, run_trainer
    from finequant.finetune.trainer import build_trainer, training_arguments
    from finequant.quantize.rounding import save_rounded
    from finequant.quantize.scheme import layer_plan
    from finequant.quantize.training.fake_quantize import keep_float_layers, round_in_training

    phase = recipe.rounded_phase()
    checkpoints = run.checkpoints / ROUNDED_PHASE
    arguments = training_arguments(phase, checkpoints, dtype, bool(splits.validation))
    base = _float_base(recipe, plain)
    file = decided_by_first(lambda: _starting_codes_file(recipe, run, plain))
    start = _starting_codes(recipe, base, tokenizer, arguments, dtype, file)
    trainer = build_trainer(phase, arguments, base, tokenizer, splits)
    model = trainer.accelerator.unwrap_model(trainer.model)
    plan = layer_plan(recipe.quantize, model.config)
    learns = recipe.train.quantization_aware.learns
    layers = round_in_training(model, start, plan, dtype, learns)
    if plain:
        keep_float_layers(model)
    trainer.rounded_layers = tuple(layers.values())
    trainer.distillation = recipe.train.quantization_aware.distillation
    run_trainer(trainer, last_checkpoint(arguments))
    folder = checkpoints / "rounded"
    with _written_by_one(trainer, folder) as partial:
        if partial:
            save_adapter(model, partial, None)
            save_rounded(
                {name: layer.rounded() for name, layer in layers.items()}, partial / ROUNDED
            )
    return folder


def _refuse_split_weights(recipe: Recipe) -> None:
    """Before the first phase, which may take hours."""
    from finequant.finetune.processes import sharding

    if recipe.train.quantization_aware and sharding():
        raise UserError(
            "train.quantization_aware: not with FSDP or DeepSpeed, which split the weights that "
            "have to be rounded whole: use recipes/accelerate/several_gpus.yaml, "
            "or train.quantization_aware=false"
        )


def _float_base(recipe: Recipe, plain: Path | None) -> LlamaForCausalLM:
    """The base in float32, with the adapter of plain LoRA merged into it; turned, if wished."""
    import torch
    from peft import PeftModel

    from finequant.finetune.model import load_base
    from finequant.quantize.methods.rotation import rotate
    from finequant.quantize.scheme import layer_plan, untie_head, unties_head

    base = load_base(recipe.model, torch.float32)
    if plain:
        base = PeftModel.from_pretrained(base, plain).merge_and_unload()
    if unties_head(layer_plan(recipe.quantize, base.config)):
        untie_head(base)
    if recipe.quantize.rotate:
        rotate(base)
    return base


def _starting_codes(
    recipe: Recipe,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SFTConfig,
    dtype: torch.dtype,
    file: Path,
) -> dict[str, Rounded]:
    """What the recipe's method makes of the float weights; by the first process, for all."""
    from finequant.quantize.methods.method import round_model
    from finequant.quantize.rounding import load_rounded, save_rounded

    with arguments.main_process_first(local=False):
        if not file.exists():
            say(f"train: rounding the weights by {recipe.quantize.method}, to train from there")
            partial = file.with_suffix(".partial")
            save_rounded(round_model(base, recipe, tokenizer, dtype), partial)
            for earlier in file.parent.glob(STARTING_CODES.format("*")):
                remove(earlier)
            partial.replace(file)
    return load_rounded(file)


def _starting_codes_file(recipe: Recipe, run: RunDir, plain: Path | None) -> Path:
    """Named by all that decides the codes: they are not made again for other training."""
    inputs = run.inputs(recipe, "train").items()
    made_from = {key: value for key, value in inputs if not key.startswith("train.")}
    made_from["plain"] = plain and content_hash(plain)
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    return run.checkpoints / STARTING_CODES.format(digest[:12])


def _of_plain(inputs: dict) -> dict:
    """Those that plain LoRA depends on; when others change it is not repeated."""
    later = ("train.quantization_aware", "quantize.")
    return {key: value for key, value in inputs.items() if not key.startswith(later)}


def _clear_stale_checkpoints(run: RunDir, folder: Path, inputs: dict) -> None:
    """Removes those of a finished training with other inputs; all else of that name is kept."""
    record = folder / "inputs.json"
    made_from = record.read_text(encoding="utf-8") if record.exists() else None
    if made_from == json.dumps(inputs):
        return
    finished = run.manifest().get("train", {}).get("inputs", {})
    if made_from in (json.dumps(finished), json.dumps(_of_plain(finished))):
        say(f"train: {folder} was made with other inputs: removed")
        removed = folder.with_name(folder.name + ".removed")
        remove(removed)
        folder.rename(removed)
        remove(removed)
    elif folder.exists() and any(folder.iterdir()):
        run.keep_as_previous(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(record, json.dumps(inputs))


@contextmanager
def _written_by_one(trainer: LoraTrainer, folder: Path) -> Iterator[Path | None]:
    """For the first process a folder that takes its name, with the log, once the block has ended;
    the others wait for it."""
    first = trainer.is_world_process_zero()
    partial = folder.with_name(folder.name + ".partial")
    if first:
        remove(partial)
        partial.mkdir(parents=True)
    yield partial if first else None
    if first:
        log = json.dumps(trainer.state.log_history)
        (partial / LOG).write_text(log, encoding="utf-8")
        seal(partial)
        remove(folder)
        partial.rename(folder)
    trainer.accelerator.wait_for_everyone()


def _joined_log(phases: list[Path]) -> list[dict[str, Any]]:
    """The phases' logs, one after the other; steps count on."""
    joined: list[dict[str, Any]] = []
    for phase in phases:
        done = joined[-1]["step"] if joined else 0
        log = json.loads((phase / LOG).read_text(encoding="utf-8"))
        joined += [entry | {"step": entry["step"] + done, "phase": phase.name} for entry in log]
    return joined


def _figures(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps, and tokens per second; a phase's entries have its tokens and seconds so far."""
    last = {entry["phase"]: entry for entry in log if "train_runtime" in entry}.values()
    tokens = sum(entry["num_input_tokens_seen"] for entry in last)
    seconds = sum(float(entry["train_runtime"]) for entry in last)
    return {
        "steps": log[-1]["step"] if log else 0,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }


if __name__ == "__main__":
    main()
