"""Training that ends at a signal with a checkpoint, and goes on from the last whole one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from finequant.recipes.artefact import differences, remove
from finequant.recipes.command_line import say
from finequant.recipes.interrupt import Interrupted, Wish, put_off

if TYPE_CHECKING:
    from trl import SFTConfig

    from finequant.finetune.trainer import LoraTrainer


class SavesWhenStopped(TrainerCallback):
    """Ends training at the next step, with a checkpoint of it, once a signal has come."""

    def __init__(self, trainer: LoraTrainer, wish: Wish) -> None:
        self.trainer, self.wish = trainer, wish

    def on_step_end(self, args, state, control, **_) -> None:
        if (number := self._asked()) and control.should_evaluate and args.load_best_model_at_end:
            raise Interrupted(number)  # goes on from the checkpoint before, and evaluates again
        if number:
            self.trainer.save_and_leave(number)

    def on_prediction_step(self, args, state, control, **_) -> None:
        if number := self._asked():
            raise Interrupted(number)

    def _asked(self) -> int:
        """The signal that any process got: they all have to save the same step."""
        number = torch.tensor(self.wish.number or 0, device=self.trainer.accelerator.device)
        if self.trainer.accelerator.num_processes == 1:
            return int(number)
        return int(self.trainer.accelerator.gather(number.reshape(1)).max())


def run_trainer(trainer: LoraTrainer, checkpoint: str | None) -> None:
    """Trains to the end.

    Raises:
        UserError: if a loss or a gradient is not finite, naming the step and its rows.
        Interrupted: after a signal, with the last step saved.
    """
    with put_off() as wish:
        trainer.add_callback(SavesWhenStopped(trainer, wish))
        trainer.train(resume_from_checkpoint=checkpoint)


def last_checkpoint(arguments: SFTConfig, quiet: bool = False) -> str | None:
    """The newest whole checkpoint in the folder of the arguments; others are removed."""
    with arguments.main_process_first():
        for checkpoint in reversed(sort_checkpoints(arguments.output_dir)):
            changed = differences(Path(checkpoint))
            if changed == []:
                if not quiet:
                    say(f"train: going on from {checkpoint}")
                return checkpoint
            if arguments.process_index == 0:
                what = changed[0] if changed else "saving it was interrupted"
                say(f"train: {checkpoint} is not whole ({what}): removed")
                remove(Path(checkpoint))
    return None
