"""The recipe's section `train` -> trl's arguments."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from transformers import Trainer
from trl import SFTConfig

from finequant.finetune.device import trains_on_cpu
from finequant.finetune.processes import TIMEOUT, number_of_processes, sharding
from finequant.recipes.errors import UserError, one_line
from finequant.recipes.schema import Recipe, Train


def training_arguments(recipe: Recipe, folder: Path, dtype: torch.dtype) -> SFTConfig:
    """Translates the recipe's section into trl's arguments; checkpoints go to `folder`.

    Raises:
        UserError: for a tracker or optimizer that is not available, a batch that the processes
            cannot share equally, or a launch that does not suit the GPUs here.
    """
    train = recipe.train
    on_cpu, packing = trains_on_cpu(), recipe.data.packing
    _refuse_launch(on_cpu)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # the recipe's precision decides
    _refuse_absent_trackers(train)
    # transformers' "constant" ignores the warm-up.
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    try:
        arguments = SFTConfig(
            output_dir=str(folder),
            seed=recipe.seed,
            num_train_epochs=train.epochs,
            max_steps=train.max_steps or -1,
            per_device_train_batch_size=train.micro_batch_size,
            per_device_eval_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=_accumulation_steps(train),
            learning_rate=train.learning_rate,
            lr_scheduler_type=schedule,
            # A share of all steps: that is how transformers reads a number below one.
            warmup_steps=train.warmup,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            optim=train.optimizer,
            bf16=dtype == torch.bfloat16,
            use_cpu=on_cpu,
            ddp_timeout=TIMEOUT,
            ddp_find_unused_parameters=False,  # there are none, and a search warns in each process
            gradient_checkpointing=train.gradient_checkpointing,
            # Rows are already cut; without padding, trl only accepts None here.
            max_length=recipe.data.max_length if packing or not on_cpu else None,
            packing=packing,
            eval_packing=False,
            padding_free=on_cpu,
            eval_strategy=_when(train.eval_steps),
            eval_steps=train.eval_steps,
            save_strategy=_when(train.save_steps),
            save_steps=train.save_steps or 500,
            save_total_limit=train.save_total_limit,
            restore_callback_states_from_checkpoint=True,  # how much patience is left
            load_best_model_at_end=train.early_stopping_patience is not None,
            metric_for_best_model="eval_loss" if train.early_stopping_patience else None,
            logging_steps=train.logging_steps,
            logging_first_step=True,
            report_to=train.report_to or "none",
            run_name=recipe.name,
            disable_tqdm=True,
            # Without padding, there is no mask to count in, and the pad token may be a real token.
            include_num_input_tokens_seen="all" if on_cpu else "non_padding",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except ValueError as error:  # such as an optimizer that transformers does not know
        raise UserError(f"train: {one_line(error)}") from None
    _refuse_absent_optimizer(arguments)
    return arguments


def _when(steps: int | None) -> str:
    return "steps" if steps else "epoch"


def _refuse_absent_trackers(train: Train) -> None:
    if absent := [name for name in train.report_to if importlib.util.find_spec(name) is None]:
        names = " ".join(absent)
        raise UserError(
            f"train.report_to: not installed: {names}; pip install {names}, or set "
            "train.report_to=[]"
        )


def _refuse_absent_optimizer(arguments: SFTConfig) -> None:
    """Refuses an optimizer whose package is not installed, or which needs settings that no recipe
    has: the trainer would do so only after the base is loaded."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:
        name = getattr(arguments.optim, "value", arguments.optim)
        raise UserError(
            f"train.optimizer: {name}: {one_line(error)}; or use adamw_torch, the default"
        ) from None


def _accumulation_steps(train: Train) -> int:
    """Computes how many micro-batches of each process make up a batch.

    Raises:
        UserError: if the processes cannot share a batch equally.
    """
    processes = number_of_processes()
    at_once = train.micro_batch_size * processes
    if train.batch_size % at_once:
        raise UserError(
            f"train.batch_size: {train.batch_size} rows cannot be shared by {processes} "
            f"processes in micro-batches of {train.micro_batch_size}: "
            f"use a multiple of {at_once}, or a smaller train.micro_batch_size"
        )
    return train.batch_size // at_once


def _refuse_launch(on_cpu: bool) -> None:
    """Refuses a launch that transformers would ignore, or refuse only after loading the base."""
    if on_cpu and sharding():
        raise UserError(
            f"train: {sharding()} splits weights over GPUs, but training runs on the CPU here: "
            f"start it without {sharding()}, or with torchrun --nproc_per_node N"
        )
    if not on_cpu and number_of_processes() == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"train: {torch.cuda.device_count()} GPUs are visible to one process: use all of them "
            "with --launch recipes/accelerate/several_gpus.yaml (or accelerate launch "
            "--config_file), or one with CUDA_VISIBLE_DEVICES=0"
        )
