"""trl's SFTTrainer, with a loss for CPUs and sealed checkpoints; it refuses non-finite steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import EarlyStoppingCallback, PrinterCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from finequant.finetune import attention
from finequant.finetune.adapter import lora_config
from finequant.finetune.architecture import trained_positions
from finequant.finetune.batches import ShuffledThenBlank, padded
from finequant.finetune.check import check_stopping
from finequant.finetune.data.dataset import dataset_for_training
from finequant.finetune.data.tokens import IGNORED, TARGETS_AT_ONCE, encode
from finequant.finetune.kernels import use_liger
from finequant.finetune.processes import decided_by_first, gathered, refuse
from finequant.finetune.stopping import last_checkpoint, record_launcher
from finequant.finetune.training_status import ShowsTraining
from finequant.recipes.artifact import differences, seal
from finequant.recipes.interrupt import RESUME_HINT, Interrupted
from finequant.recipes.schema import Data, Recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.architecture import Decoder
    from finequant.finetune.data.row import Row
    from finequant.finetune.data.splits import Splits


class LoraTrainer(SFTTrainer):
    """SFTTrainer whose loss on a CPU multiplies the head with target tokens only.

    trl's own loss makes float32 passes over the logits of every token, twice. On a GPU a fused
    kernel does that; on a CPU it takes half of a step, most of it for masked tokens. The loss is
    the same. To be removed once trl skips masked tokens on the CPU, too.
    """

    own_loss_everywhere = False
    """Whether this loss is also used on a GPU."""

    condenses = True
    """Whether a forward on a CPU leaves out the tokens that change no prediction."""

    step_loss = math.nan
    """The loss of the newest step, in this process; the log averages over train.logging_steps."""

    rows: list[Row]
    data: Data
    """The section that turned rows into tokens, needed to name the rows of a failed step."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # The micro-batches of this step, and the loss of each.
        self._read: list[tuple[dict[str, Any], torch.Tensor]] = []
        self._evaluated = [0.0, 0]  # summed loss and target tokens of this evaluation
        self._rows_to_learn = len(self.train_dataset)
        if self.args.world_size > 1:
            self.train_dataset = padded(self.train_dataset, self._rows_at_once)
            if self.eval_dataset is not None:  # repeated rows would count twice in its loss
                self.eval_dataset = padded(self.eval_dataset, self._rows_at_once)

    @property
    def _rows_at_once(self) -> int:
        """Returns the rows of one micro-batch over all processes, in training and evaluation."""
        return self.args.per_device_train_batch_size * self.args.world_size

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> ShuffledThenBlank:
        blanks = len(self.train_dataset) - self._rows_to_learn
        self._sampler = ShuffledThenBlank(self._rows_to_learn, blanks, self.args.seed)
        return self._sampler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        targets = inputs["labels"][:, 1:] != IGNORED
        if self.accelerator.device.type != "cpu" and not self.own_loss_everywhere:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = result[0] if return_outputs else result
        else:
            total = self.summed_loss(model, inputs, targets)
            if num_items_in_batch is None:
                loss = total / targets.sum().clamp(min=1)
            else:
                # The count is over all processes, whose gradients DDP will average.
                loss = total / num_items_in_batch * self.accelerator.num_processes
            result = (loss, {"loss": loss.detach()}) if return_outputs else loss
        if not model.training:
            tokens = int(targets.sum())
            if tokens:  # the mean over none is not a number
                self._evaluated[0] += loss.item() * tokens
            self._evaluated[1] += tokens
        return result

    def summed_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], targets: torch.Tensor
    ) -> torch.Tensor:
        """Sums the loss over the target tokens."""

        def loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self.logits(model, hidden), labels, reduction="sum")

        hidden = self.hidden_states(model, inputs, targets)
        return self.in_parts(loss, hidden, inputs["labels"][:, 1:][targets])

    def hidden_states(
        self, model: torch.nn.Module, inputs: dict[str, Any], targets: torch.Tensor
    ) -> torch.Tensor:
        """Computes the states [tokens, hidden] from which the head predicts the target tokens."""
        condenses = self.condenses and self.args.use_cpu
        if condenses:
            inputs, predicting = attention.condensed(inputs, targets)
        else:
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        # The forward cannot skip the head, but without positions the head multiplies nothing.
        none = torch.zeros(0, dtype=torch.long, device=targets.device)
        states: list[torch.Tensor] = []
        # From a hook, because accelerate casts all states that a bf16 forward returns to float32.
        norm = self.accelerator.unwrap_model(model).get_decoder().norm
        hook = norm.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        try:
            model(**inputs, use_cache=False, logits_to_keep=none)
        finally:
            hook.remove()
        return states[0][0, predicting] if condenses else states[0][:, :-1][targets]

    def logits(self, model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Computes float32 logits [tokens, vocabulary]."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        # FSDP keeps the head whole from the model's forward until the norm's backward. A call would
        # gather it again for each part of the tokens, and processes have different numbers of them.
        return (head.forward if self.accelerator.is_fsdp2 else head)(hidden).float()

    def in_parts(self, loss: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """Sums a loss over a few tokens at a time, because their logits take much memory.

        tensors: each [tokens, ...]; `loss` is called with a part of each. If there are several
            parts, the backward pass calls it again.
        """
        parts = list(zip(*(tensor.split(TARGETS_AT_ONCE) for tensor in tensors), strict=True))
        if len(parts) == 1:
            return loss(*parts[0])
        return sum(checkpoint(loss, *part, use_reentrant=False) for part in parts)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        inputs = kwargs.get("inputs", args[1] if len(args) > 1 else None)
        self._read.append((inputs, loss))
        return loss

    def _get_grad_norm(self, *args, **kwargs) -> torch.Tensor | float:
        """Refuses a step that is not finite, just before the optimizer uses its gradients."""
        norm = super()._get_grad_norm(*args, **kwargs)
        losses = torch.stack([loss for _, loss in self._read]).tolist()  # waits for the GPU once
        is_finite = norm is None or math.isfinite(norm)  # None: DeepSpeed before its first step
        is_finite = is_finite and all(map(math.isfinite, losses))
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([is_finite], device=self.accelerator.device)
            is_finite = bool(self.accelerator.gather(flag).all())
        if not is_finite:
            self._refuse_step(norm)
        self.step_loss = sum(losses)
        self._read.clear()
        return norm

    def _run_epoch(self, *args, **kwargs) -> None:
        """Trains nothing if training resumes from the checkpoint of its last step: transformers
        5.24 would train one more step, in the middle of an epoch or after patience has ended it.
        To be removed when its trainer looks at max_steps before the first step."""
        if self._is_finished():
            self.control.should_training_stop = True
            return
        # Where several processes resume within an epoch, accelerate 1.15 hides the sampler below
        # two batch samplers, and its order would be that of the first epoch. To be removed once
        # `set_epoch` of accelerate/data_loader.py finds it there.
        self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _is_finished(self) -> bool:
        callbacks = self.callback_handler.callbacks
        patience = [it for it in callbacks if isinstance(it, EarlyStoppingCallback)]
        return self.state.global_step >= self.state.max_steps or any(
            it.early_stopping_patience_counter >= it.early_stopping_patience for it in patience
        )

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """Reports the mean loss over tokens; transformers averages the means of the batches."""
        self._evaluated = [0.0, 0]
        output = super().evaluation_loop(*args, **kwargs)
        sums = torch.tensor(self._evaluated, device=self.accelerator.device)
        total, tokens = self.accelerator.reduce(sums).tolist()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = total / max(tokens, 1)
        return output

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluates without changing the random state, from which the data loader draws a number.

        A run that resumes from a checkpoint at the end of an epoch does not repeat the evaluation
        after it, so training must not depend on that number.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                return super().evaluate(*args, **kwargs)
        except Interrupted as stop:
            if self.args.load_best_model_at_end:  # it decides which is best, so it is repeated
                raise
            self.save_and_leave(stop.number)

    def save_and_leave(self, number: int) -> None:
        """Saves a checkpoint of the last step, and ends training because of the signal `number`."""
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if decided_by_first(lambda: differences(folder) != []):
            self._save_checkpoint(self.model_wrapped, trial=None)
        raise Interrupted(number, f"step {step} is saved; {RESUME_HINT}")

    def _refuse_step(self, norm: torch.Tensor | float | None) -> NoReturn:
        """Ends training before the failed step changes the adapter; earlier checkpoints stay."""
        step, rate = self.state.global_step + 1, self._get_learning_rate()
        failed = [(inputs, loss) for inputs, loss in self._read if not loss.isfinite()]
        losses = sum(gathered([loss.item() for _, loss in failed]), [])
        suspects = failed if losses else self._read  # any row may have caused the gradient
        names = sum(gathered(self._names_of_rows([inputs for inputs, _ in suspects])), [])
        what = f"the loss is {losses[0]:g}" if losses else f"the norm of the gradient is {norm:g}"
        kept = last_checkpoint(self.args, quiet=True)
        refuse(
            f"train: step {step}: {what}; its rows are "
            f"{', '.join(dict.fromkeys(names)) or 'not known'}. Lower "
            f"train.learning_rate (it is {rate:.2g} there), look at these rows, or try "
            f"train.precision=fp32; {f'{kept} is kept' if kept else 'no checkpoint was made yet'}"
        )

    def _names_of_rows(self, batches: list[dict[str, Any]]) -> list[str]:
        """Returns file and line of the rows of some micro-batches, found by their tokens."""
        known = {
            tuple(encode(row, self.processing_class, self.data).input_ids): row.where
            for row in self.rows
        }
        names = [known.get(tuple(ids)) for inputs in batches for ids in _rows_of(inputs)]
        return [name for name in names if name]

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Seals a checkpoint once every process has written its part, then removes old ones."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            record_launcher(folder / f"checkpoint-{self.state.global_step}")
            seal(folder / f"checkpoint-{self.state.global_step}")
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint)


def _rows_of(inputs: dict[str, Any]) -> Iterator[list[int]]:
    """Yields the token ids of each row of a batch, without padding."""
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    if positions is None:
        for row, mask in zip(ids, inputs["attention_mask"].bool(), strict=True):
            yield row[mask].tolist()
        return
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    for begin, end in pairwise([*starts, ids.shape[1]]):
        yield ids[0, begin:end].tolist()


def build_trainer(
    recipe: Recipe,
    arguments: SFTConfig,
    base: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    trainer_class: type[LoraTrainer] | None = None,
) -> LoraTrainer:
    """Builds the trainer of a fresh adapter on `base`, whose initial values depend on the seed.

    trainer_class: a subclass that, without an adapter, trains what requires a gradient in `base`.
    """
    check_stopping(recipe, splits)
    patience = recipe.train.early_stopping_patience
    positions = trained_positions(base.config)
    settings = {"tokenizer": tokenizer, "data": recipe.data, "positions": positions}
    dataset = partial(dataset_for_training, **settings)
    if not splits.validation:
        arguments.eval_strategy = IntervalStrategy.NO
        if recipe.train.eval_steps:
            say("train: train.eval_steps has no effect, as there are no validation rows")
    if arguments.use_cpu:
        base.set_attn_implementation(attention.NAME)
    elif not trainer_class:  # quantization-aware training computes as the shipped model does
        use_liger(base, recipe.train.kernels)
    trainer = (trainer_class or LoraTrainer)(
        model=base,
        args=arguments,
        train_dataset=dataset(splits.train),
        eval_dataset=dataset(splits.validation) if splits.validation else None,
        processing_class=tokenizer,
        peft_config=None if trainer_class else lora_config(recipe.lora, base),
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ShowsTraining("qat" if trainer_class else "train", trainer))
    trainer.rows, trainer.data = splits.train, recipe.data
    return trainer


def gathered_weights(trainer: LoraTrainer) -> dict[str, torch.Tensor] | None:
    """Returns the weights that FSDP or ZeRO-3 has split, else None; every process must call it."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)
