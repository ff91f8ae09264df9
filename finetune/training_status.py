"""Shows how training goes: one line with step, loss, speed and the time that is left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from finequant.recipes.terminal import Progress, say

if TYPE_CHECKING:
    from finequant.finetune.trainer import LoraTrainer


class ShowsTraining(TrainerCallback):
    """Replaces transformers' callbacks, which print each entry of the log as it is."""

    def __init__(self, stage: str, trainer: LoraTrainer) -> None:
        """stage: the first word of each line."""
        self.stage, self.trainer = stage, trainer
        self._progress: Progress | None = None

    def on_train_begin(self, args, state, control, **_) -> None:
        self._progress = Progress(f"{self.stage}: step", state.max_steps, state.global_step)
        self._evaluated = 0
        self._started, self._tokens = time.monotonic(), state.num_input_tokens_seen

    def on_log(self, args, state, control, logs, **_) -> None:
        if "eval_loss" in logs:
            self._evaluated = 0
            say(f"{self.stage}: step {state.global_step}: validation loss {logs['eval_loss']:.4f}")

    def on_step_end(self, args, state, control, **_) -> None:
        tokens = state.num_input_tokens_seen - self._tokens
        speed = tokens / max(time.monotonic() - self._started, 1e-9)
        loss = f", loss {self.trainer.step_loss:.3f}"
        self._progress.show(state.global_step, f"{loss}, {speed:,.0f} tokens/s")

    def on_prediction_step(self, args, state, control, eval_dataloader, **_) -> None:
        if self._progress is None:  # an evaluation outside of training
            return
        self._evaluated += 1
        if self._evaluated == 1:
            self._first_batch = time.monotonic()
        seconds = (time.monotonic() - self._first_batch) / max(1, self._evaluated - 1)
        left = len(eval_dataloader) - self._evaluated
        batches = f", validating {self._evaluated}/{len(eval_dataloader)}"
        self._progress.show(state.global_step, batches, further=seconds * left)

    def on_train_end(self, args, state, control, **_) -> None:
        self._progress.close()
