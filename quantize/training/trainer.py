"""The trainer of quantization-aware training: its loss, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy, kl_div
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from finequant.finetune.processes import whole
from finequant.finetune.trainer import LoraTrainer
from finequant.quantize.training.fake_quantize import disabled
from finequant.quantize.training.model import fake_quantized_layers

PARAMETERS = "parameters.safetensors"
"""The file of a training checkpoint that holds the trained parameters, without the base."""


class QuantizationAwareTrainer(LoraTrainer):
    """Trains a model of fake-quantized layers, on the answers and on the tuned model's logits."""

    own_loss_everywhere = True  # trl's loss reads the head's weight and bypasses its forward
    # Leaving out tokens would change the last bits of inputs, and so some of their int8 codes.
    condenses = False
    distillation = 0.0
    """Weight of the divergence from the tuned model in the loss."""

    def summed_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], targets: torch.Tensor
    ) -> torch.Tensor:
        if not (self.distillation and model.training):
            return super().summed_loss(model, inputs, targets)
        layers = fake_quantized_layers(self.accelerator.unwrap_model(model)).values()
        hidden = self.hidden_states(model, inputs, targets)
        with torch.no_grad(), disabled(layers):
            plain = self.accelerator.unwrap_model(model)
            teacher = self.hidden_states(plain, inputs, targets)

        def loss(hidden: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor):
            logits = self.logits(model, hidden)
            with torch.no_grad(), disabled(layers):
                exact = self.logits(model, teacher)
            total = (1 - self.distillation) * cross_entropy(logits, labels, reduction="sum")
            return total + self.distillation * divergence(exact, logits)

        return self.in_parts(loss, hidden, teacher, inputs["labels"][:, 1:][targets])

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """Evaluates, then shards the head again: FSDP leaves it whole if no backward pass follows,
        and saving or loading weights and optimizer state would then miss its parameters."""
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the trained parameters: all processes gather them, and the first writes them."""
        parameters = self.accelerator.unwrap_model(self.model).named_parameters()
        learned = {name: whole(p.detach()).cpu() for name, p in parameters if p.requires_grad}
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(learned, folder / PARAMETERS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves without the frozen codes, which transformers would add to each FSDP checkpoint."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, folder: str, model: torch.nn.Module | None = None) -> None:
        saved = load_file(Path(folder) / PARAMETERS)
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model or self.model, saved, options=options)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def divergence(exact: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Computes KL(exact || logits), summed over tokens, from logits [tokens, vocabulary]."""
    exact, logits = exact.log_softmax(-1), logits.log_softmax(-1)
    return kl_div(logits, exact, log_target=True, reduction="sum")
