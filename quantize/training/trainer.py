"""The trainer of quantization-aware training: its loss, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div

from finequant.finetune.trainer import LoraTrainer
from finequant.quantize.training.fake_quantize import disabled
from finequant.quantize.training.model import fake_quantized_layers

PARAMETERS = "parameters.safetensors"
"""In a checkpoint: what learns, and nothing of the base."""


class QuantizationAwareTrainer(LoraTrainer):
    """Trains a model of fake-quantized layers, on the answers and on the tuned model's logits."""

    own_loss_everywhere = True  # trl takes the head's weight, not its forward
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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        learned = {name: weight.detach().cpu() for name, weight in self._learned().items()}
        save_file(learned, folder / PARAMETERS)

    def _load_from_checkpoint(self, folder: str, model: torch.nn.Module | None = None) -> None:
        saved = load_file(Path(folder) / PARAMETERS)
        with torch.no_grad():
            for name, parameter in self._learned().items():
                parameter.copy_(saved[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _learned(self) -> dict[str, torch.nn.Parameter]:
        parameters = self.accelerator.unwrap_model(self.model).named_parameters()
        return {name: parameter for name, parameter in parameters if parameter.requires_grad}


def divergence(exact: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL of the second from the first, summed over tokens; of logits [tokens, vocabulary]."""
    exact, logits = exact.log_softmax(-1), logits.log_softmax(-1)
    return kl_div(logits, exact, log_target=True, reduction="sum")
