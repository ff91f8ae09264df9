"""trl's SFTTrainer, with a loss that costs a CPU no more than it must."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from finequant.finetune.tokens import IGNORED


class LoraTrainer(SFTTrainer):
    """SFTTrainer whose loss on a CPU multiplies the head with learned tokens only.

    trl's own loss makes float32 passes over the logits of every token, twice. On a GPU a fused
    kernel does that; on a CPU it takes half of a step, with most of it for tokens that are masked.
    The value is the same. To be removed once trl skips masked tokens on the CPU too.

    Quantization-aware training needs it everywhere: trl's takes the head's weight by itself, and
    not what the head's forward makes of it.
    """

    calls_the_head = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if self.accelerator.device.type != "cpu" and not self.calls_the_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        others = {key: value for key, value in inputs.items() if key != "labels"}
        # The forward cannot leave the head out; with an index it multiplies one position only.
        first = torch.tensor([0], device=labels.device)
        outputs = model(**others, use_cache=False, output_hidden_states=True, logits_to_keep=first)
        learned = labels != IGNORED
        hidden = outputs.hidden_states[-1][:, :-1][learned]
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        # accelerate turns what a bf16 forward returns into float32.
        logits = head(hidden.to(head.weight.dtype)).float()
        total = cross_entropy(logits, labels[learned], reduction="sum")
        if num_items_in_batch is None:
            loss = total / learned.sum().clamp(min=1)
        else:
            # The count is over all processes, whose gradients DDP will average.
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, {"loss": loss.detach()}) if return_outputs else loss
