"""Stops training at a signal, after saving a checkpoint, and resumes from the last complete one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, sort_checkpoints

from finequant.finetune.processes import LAUNCHERS, decided_by_first, number_of_processes, sharding
from finequant.recipes.artifact import differences, remove
from finequant.recipes.errors import UserError
from finequant.recipes.interrupt import Interrupted, StopRequest, deferred_signals
from finequant.recipes.terminal import say
from finequant.recipes.usage import return_freed_memory

if TYPE_CHECKING:
    from trl import SFTConfig

    from finequant.finetune.trainer import LoraTrainer

LAUNCHER = "launcher.json"
"""The file in a checkpoint that says how the weights were split, and over how many processes."""


class SavesWhenStopped(TrainerCallback):
    """After a signal, saves a checkpoint of the step that is running, and ends training."""

    def __init__(self, trainer: LoraTrainer, request: StopRequest) -> None:
        self.trainer, self.request = trainer, request
        self._number = 0
        self.tokens_before = 0

    def on_train_begin(self, args, state, control, **_) -> None:
        """Evaluates the checkpoint that training resumes from if its evaluation was cut off, and
        finds the best one, whose path the checkpoint has, in this folder: it may have moved."""
        self.tokens_before = state.num_input_tokens_seen
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.exists():
            state.best_model_checkpoint = str(best)
        step, when = state.global_step, args.eval_strategy
        if not step or when == IntervalStrategy.NO:
            return
        by_steps = when == IntervalStrategy.STEPS
        is_due = step % args.eval_steps == 0 if by_steps else float(state.epoch).is_integer()
        done = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
        if (is_due or step >= state.max_steps) and step not in done:
            self.trainer.evaluate()

    def on_step_end(self, args, state, control, **_) -> None:
        self._number = self._signal()
        by_epoch = args.eval_strategy == IntervalStrategy.EPOCH
        ends_epoch = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        is_evaluated = control.should_evaluate or (by_epoch and ends_epoch)
        if self._number and is_evaluated and args.load_best_model_at_end:
            # A checkpoint saved now would not be compared with the best one. The command resumes
            # from an earlier one, and evaluates this step.
            raise Interrupted(self._number)
        control.should_log |= self._number > 0  # logs the losses since the last entry, then saves

    def on_log(self, args, state, control, **_) -> None:
        if self._number:
            self.trainer.save_and_leave(self._number)

    def on_prediction_step(self, args, state, control, **_) -> None:
        if number := self._signal():
            raise Interrupted(number)

    def _signal(self) -> int:
        """Returns the signal that any process received, or 0: all have to save the same step."""
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
        callback = SavesWhenStopped(trainer, request)
        trainer.add_callback(callback)
        return_freed_memory()  # loading and calibration leave some
        trainer.train(resume_from_checkpoint=checkpoint)
        # The last entry has the seconds of this call, and the tokens of all.
        trainer.state.log_history[-1]["tokens_before"] = callback.tokens_before


def last_checkpoint(arguments: SFTConfig, quiet: bool = False) -> str | None:
    """Returns the newest complete checkpoint of a training, and removes newer, incomplete ones.

    quiet: return it without a message, whichever launcher wrote it.

    Raises:
        UserError: if the launcher of this training splits the weights differently.
    """
    folder = Path(arguments.output_dir)
    name = decided_by_first(lambda: _newest_complete(folder, quiet))
    return str(folder / name) if name else None


def record_launcher(checkpoint: Path) -> None:
    """Records how the weights are split, which decides who can resume from the checkpoint."""
    text = json.dumps({"sharding": sharding(), "processes": number_of_processes()})
    (checkpoint / LAUNCHER).write_text(text, encoding="utf-8")


def _newest_complete(folder: Path, quiet: bool) -> str | None:
    for checkpoint in map(Path, reversed(sort_checkpoints(str(folder)))):
        changed = differences(checkpoint)
        if changed == []:
            if not quiet:
                _refuse_other_launcher(checkpoint)
                say(f"train: continuing from {checkpoint}")
            return checkpoint.name
        reason = changed[0] if changed else "saving it was interrupted"
        say(f"train: removed {checkpoint}, which is incomplete ({reason})")
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
    """Describes a launch, such as "2 processes with FSDP"."""
    several = f"{processes} process{'es' if processes > 1 else ''}"
    return f"{several} with {sharding}" if sharding else f"{several} without FSDP or DeepSpeed"
