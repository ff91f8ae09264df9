"""Fine-tune a LoRA adapter: recipe -> adapter/

python finetune/train.py recipes/quickstart.yaml
accelerate launch finetune/train.py recipes/chat.yaml train.learning_rate=1e-4
torchrun --nproc_per_node 2 finetune/train.py recipes/chat.yaml
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.recipes.command_line import quiet_libraries, read_command_line, say
from finequant.recipes.errors import UserError, told_to_the_user
from finequant.recipes.rundir import ROUNDED, RunDir, Stopwatch, replace_text
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

    from finequant.finetune.trainer import LoraTrainer
    from finequant.quantize.rounding import Rounded


def main(argv: Sequence[str] | None = None) -> None:
    with told_to_the_user():
        recipe, run = read_command_line(__doc__, argv)
        quiet_libraries()
        train(recipe, run)


def train(recipe: Recipe, run: RunDir) -> None:
    """Trains the adapter and writes `adapter/`; goes on from the last checkpoint if there is one.

    Raises:
        UserError: for data or a base that cannot be used.
    """
    from transformers import set_seed

    from finequant.finetune.data import load_splits
    from finequant.finetune.model import (
        load_base,
        load_tokenizer,
        lora_config,
        save_adapter,
        training_precision,
    )
    from finequant.quantize.rounding import save_rounded

    watch = Stopwatch()
    inputs = run.inputs(recipe, "train")
    splits = load_splits(recipe.data, recipe.seed)
    for note in splits.notes:
        say(f"data: {note}")
    dtype, reason = training_precision(recipe.train.precision)
    say(f"train: {str(dtype).removeprefix('torch.')}, {reason}")
    set_seed(recipe.seed)
    tokenizer = load_tokenizer(recipe.model)
    base = load_base(recipe.model, dtype)
    arguments = _arguments(recipe, run, base, bool(splits.validation))
    checkpoint = _last_checkpoint(run, inputs, arguments)
    start = _rounded_base(recipe, run, arguments, base, tokenizer)
    trainer = _trainer(recipe, arguments, base, tokenizer, lora_config(recipe.lora, base), splits)
    layers = _round_in_training(recipe, trainer, start)
    initial = _initial_adapter(recipe, run, trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    weights = _gathered_weights(trainer)
    if trainer.is_world_process_zero():
        with run.writing(run.adapter, recipe) as folder:
            model = trainer.accelerator.unwrap_model(trainer.model)
            save_adapter(model, folder, initial, weights)
            if layers:
                rounded = {name: layer.rounded() for name, layer in layers.items()}
                save_rounded(rounded, folder / ROUNDED)
            tokenizer.save_pretrained(folder)
            log = json.dumps(trainer.state.log_history, indent=1)
            (folder / "training_log.json").write_text(log, encoding="utf-8")
        tokens = trainer.state.num_input_tokens_seen
        run.record(
            recipe,
            "train",
            inputs,
            seconds=watch.seconds,
            tokens_per_second=round(tokens / max(_training_seconds(trainer), 1e-9), 1),
            processes=trainer.args.world_size,
            steps=trainer.state.global_step,
        )
        say(f"train: {trainer.state.global_step} steps, {run.adapter} written in {watch.seconds} s")


def _trainer(
    recipe: Recipe,
    arguments: SFTConfig,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    lora: LoraConfig,
    splits,
) -> LoraTrainer:
    from transformers import EarlyStoppingCallback

    from finequant.finetune.tokens import to_dataset
    from finequant.finetune.trainer import LoraTrainer

    patience = recipe.train.early_stopping_patience
    return LoraTrainer(
        model=base,
        args=arguments,
        train_dataset=to_dataset(splits.train, tokenizer, recipe.data),
        eval_dataset=(
            to_dataset(splits.validation, tokenizer, recipe.data) if splits.validation else None
        ),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )


def _arguments(recipe: Recipe, run: RunDir, base: LlamaForCausalLM, evaluates: bool) -> SFTConfig:
    import torch
    from trl import SFTConfig

    train = recipe.train
    absent = [name for name in train.report_to if importlib.util.find_spec(name) is None]
    if absent:
        names = " ".join(absent)
        raise UserError(f"train.report_to: not installed: {names}; pip install {names}")
    per_step = train.micro_batch_size * _processes()
    if train.batch_size % per_step:
        raise UserError(
            f"train.batch_size: {train.batch_size} rows cannot be shared by {_processes()} "
            f"processes in micro-batches of {train.micro_batch_size}: "
            f"use a multiple of {per_step}, or a smaller train.micro_batch_size"
        )
    # transformers' "constant" ignores the warm-up.
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    try:
        return SFTConfig(
            output_dir=str(run.checkpoints),
            seed=recipe.seed,
            num_train_epochs=train.epochs,
            max_steps=train.max_steps or -1,
            per_device_train_batch_size=train.micro_batch_size,
            per_device_eval_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=train.batch_size // per_step,
            learning_rate=train.learning_rate,
            lr_scheduler_type=schedule,
            # A share of all steps; transformers reads a number below one so.
            warmup_steps=train.warmup,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            optim=train.optimizer,
            bf16=base.dtype == torch.bfloat16,
            use_cpu=not torch.accelerator.is_available(),
            gradient_checkpointing=train.gradient_checkpointing,
            max_length=recipe.data.max_length,
            packing=recipe.data.packing,
            eval_packing=False,
            eval_strategy=_when(train.eval_steps) if evaluates else "no",
            eval_steps=train.eval_steps,
            save_strategy=_when(train.save_steps),
            save_steps=train.save_steps or 500,
            save_total_limit=train.save_total_limit,
            load_best_model_at_end=train.early_stopping_patience is not None,
            metric_for_best_model="eval_loss" if train.early_stopping_patience else None,
            logging_steps=train.logging_steps,
            logging_first_step=True,
            report_to=train.report_to or "none",
            run_name=recipe.name,
            disable_tqdm=not sys.stderr.isatty(),
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except ValueError as error:  # such as an optimizer that transformers does not know
        raise UserError(f"train: {' '.join(str(error).split())[:300]}") from None


def _when(steps: int | None) -> str:
    return "steps" if steps else "epoch"


def _processes() -> int:
    """As torchrun and accelerate say it; accelerate's own state is not yet set up for the CPU."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _initial_adapter(recipe: Recipe, run: RunDir, trainer: SFTTrainer) -> Path | None:
    from finequant.finetune.model import changes_the_base, save_initial_adapter

    if not changes_the_base(recipe.lora):
        return None
    folder = run.checkpoints / "initial"
    if trainer.is_world_process_zero():
        save_initial_adapter(trainer.model, folder)
    return folder


def _last_checkpoint(run: RunDir, inputs: dict, arguments: SFTConfig) -> str | None:
    """The newest checkpoint of a run with the same inputs; those of other inputs are removed."""
    from transformers.trainer_utils import get_last_checkpoint

    record = run.checkpoints / "inputs.json"
    with arguments.main_process_first():
        same = record.exists() and json.loads(record.read_text(encoding="utf-8")) == inputs
        if arguments.process_index == 0 and not same:
            for stale in run.checkpoints.glob("checkpoint-*"):
                say(f"train: {stale} was made with other inputs: removed")
                shutil.rmtree(stale)
            (run.checkpoints / ROUNDED).unlink(missing_ok=True)
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            replace_text(record, json.dumps(inputs))
    checkpoint = get_last_checkpoint(str(run.checkpoints))
    if checkpoint:
        say(f"train: going on from {checkpoint}")
    return checkpoint


def _rounded_base(
    recipe: Recipe,
    run: RunDir,
    arguments: SFTConfig,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Rounded] | None:
    """What quantization-aware training starts from, made by the first process; None without it."""
    from finequant.quantize.methods import round_model
    from finequant.quantize.rounding import load_rounded, save_rounded
    from finequant.quantize.scheme import layer_plan, untie_head, unties_head

    if not recipe.train.quantization_aware:
        return None
    if unties_head(layer_plan(recipe.quantize, base.config)):
        untie_head(base)
    file = run.checkpoints / ROUNDED
    with arguments.main_process_first():
        if not file.exists():
            say(f"train: rounding the base by {recipe.quantize.method}, to train from there")
            partial = file.with_suffix(".partial")
            save_rounded(round_model(base, recipe, tokenizer, base.dtype), partial)
            partial.replace(file)
    return load_rounded(file)


def _round_in_training(
    recipe: Recipe, trainer: LoraTrainer, start: dict[str, Rounded] | None
) -> dict[str, Any]:
    """The layers that will compute with rounded weights."""
    from finequant.finetune.quantization_aware import RoundFrom, round_in_training
    from finequant.quantize.scheme import layer_plan

    if start is None:
        return {}
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "train.quantization_aware: not with FSDP or DeepSpeed, which split the weights that "
            "have to be rounded whole: use recipes/accelerate/several_gpus.yaml"
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    plan = layer_plan(recipe.quantize, model.config)
    layers = round_in_training(model, start, plan, model.dtype)
    trainer.calls_the_head = True
    trainer.add_callback(RoundFrom(layers, recipe.train.quantization_aware_after))
    return layers


def _gathered_weights(trainer: SFTTrainer) -> dict[str, torch.Tensor] | None:
    """Under FSDP and ZeRO-3 every process holds a part; gathering needs all of them."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def _training_seconds(trainer: SFTTrainer) -> float:
    """Of this process; every entry of the log has the seconds so far."""
    times = [
        entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry
    ]
    return times[-1] if times else 0.0


if __name__ == "__main__":
    main()
