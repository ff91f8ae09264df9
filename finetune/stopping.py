"""Stops training at a signal, after saving a checkpoint, and resumes from the last complete one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, sort_checkpoints

from finequant.finetune.processes import (
    LAUNCHERS,
    decided_by_first,
    number_of_processes,
    sharding,
)
from finequant.recipes.artifact import differences, remove
from finequant.recipes.errors import UserError
from finequant.recipes.interrupt import Interrupted, StopRequest, deferred_signals
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from trl import SFTConfig

    from finequant.finetune.trainer import LoraTrainer


LAUNCHER = "launcher.json"
"""In a checkpoint: how the weights were split, and over how many processes."""


class SavesWhenStopped(TrainerCallback):
    """Ends training at the next step, with a checkpoint of it, once a signal has come."""

    def __init__(self, trainer: LoraTrainer, request: StopRequest) -> None:
        self.trainer, self.request = trainer, request
        self._number = 0

    def on_train_begin(self, args, state, control, **_) -> None:
        """Evaluates what was saved when a signal came before the end of its evaluation."""
        step, when = state.global_step, args.eval_strategy
        if not step or when == IntervalStrategy.NO:
            return
        by_steps = when == IntervalStrategy.STEPS
        is_due = step % args.eval_steps == 0 if by_steps else float(state.epoch).is_integer()
        done = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
        if is_due and step not in done:
            self.trainer.evaluate()

    def on_step_end(self, args, state, control, **_) -> None:
        self._number = self._asked()
        if self._number and control.should_evaluate and args.load_best_model_at_end:
            raise Interrupted(self._number)  # goes on from the checkpoint before, evaluates again
        control.should_log |= self._number > 0  # the losses since the last entry, before all else

    def on_log(self, args, state, control, **_) -> None:
        if self._number:
            self.trainer.save_and_leave(self._number)

    def on_prediction_step(self, args, state, control, **_) -> None:
        if number := self._asked():
            raise Interrupted(number)

    def _asked(self) -> int:
        """Returns the signal that any process received: all have to save the same step."""
        number, accelerator = self.request.number or 0, self.trainer.accelerator
        if accelerator.num_processes == 1:
            return number
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def run_trainer(trainer: LoraTrainer, checkpoint: str | None) -> None:
    """Trains to the end.

    Raises:
        UserError: if a loss or a gradient is not finite, naming the step and its rows.
        Interrupted: after a signal, with the last step saved.
    """
    with deferred_signals() as request:
        trainer.add_callback(SavesWhenStopped(trainer, request))
        trainer.train(resume_from_checkpoint=checkpoint)


def last_checkpoint(arguments: SFTConfig, quiet: bool = False) -> str | None:
    """Returns the newest complete checkpoint of a training, and removes incomplete ones.

    Raises:
        UserError: if its weights are split in another way than by the launcher of this training.
    """
    folder = Path(arguments.output_dir)
    name = decided_by_first(lambda: _last_whole(folder, quiet))
    return str(folder / name) if name else None


def record_launcher(checkpoint: Path) -> None:
    """Writes how the weights are split, which decides who can resume from the checkpoint."""
    text = json.dumps({"sharding": sharding(), "processes": number_of_processes()})
    (checkpoint / LAUNCHER).write_text(text, encoding="utf-8")


def _last_whole(folder: Path, quiet: bool) -> str | None:
    for checkpoint in map(Path, reversed(sort_checkpoints(str(folder)))):
        changed = differences(checkpoint)
        if changed == []:
            if not quiet:
                _refuse_other_launcher(checkpoint)
                say(f"train: going on from {checkpoint}")
            return checkpoint.name
        what = changed[0] if changed else "saving it was interrupted"
        say(f"train: {checkpoint} is not whole ({what}): removed")
        remove(checkpoint)
    return None


def _refuse_other_launcher(checkpoint: Path) -> None:
    saved = json.loads((checkpoint / LAUNCHER).read_text(encoding="utf-8"))
    here = {"sharding": sharding(), "processes": number_of_processes()}
    same = saved["sharding"] == here["sharding"]
    # DeepSpeed resumes only with the same number of processes, among which it split the weights.
    if same and (saved == here or sharding() != "DeepSpeed"):
        return
    raise UserError(
        f"train: {checkpoint} was saved by {_in_words(**saved)}, and {_in_words(**here)} cannot "
        f"resume from it: train with {LAUNCHERS[saved['sharding']]} again, or delete "
        f"{checkpoint.parent} to start over"
    )


def _in_words(sharding: str | None, processes: int) -> str:
    """For example "2 processes with FSDP"."""
    several = f"{processes} process{'es' if processes > 1 else ''}"
    return f"{several} with {sharding}" if sharding else f"{several} without FSDP or DeepSpeed"
