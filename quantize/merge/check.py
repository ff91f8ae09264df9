"""Checks logits(base + adapter) = logits(merged) on real prompts, with one block in memory.

Only transformers and peft read and join base and adapter for this, so that a weight which our code
reads wrongly, or not at all, shows as a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finequant.finetune.device import device
from finequant.quantize.checkpoint.blocks import float_logits, run_block
from finequant.quantize.merge.adapter import Adapter, Base, merged_weights
from finequant.recipes.errors import UserError, one_line

if TYPE_CHECKING:
    from peft import PeftModel

LARGEST_DIFFERENCE = 1e-3
"""Limit for the difference of merged logits, relative to the largest logit. float32 rounding stays
below 1e-4."""


@torch.no_grad()
def check_merge(
    base: Base, adapter: Adapter, folder: Path, prompts: list[list[int]]
) -> tuple[float, torch.Tensor]:
    """Measures the difference of merged logits from peft's base + adapter, relative to the largest.

    Returns:
        The difference, and the logits of base + adapter [prompts, vocabulary].

    Raises:
        UserError: if it is more than rounding, or peft does not take the adapter.
    """
    expected = tuned_logits(base, folder, prompts)
    merged = float_logits(base.config, merged_weights(base, adapter), prompts)
    difference = ((merged - expected).abs().max() / expected.abs().max()).item()
    if not difference < LARGEST_DIFFERENCE:
        raise UserError(
            f"{folder}: merged logits differ from base + adapter by {difference:.1e} of the "
            f"largest; expected below {LARGEST_DIFFERENCE:.0e}: train the adapter again"
        )
    return difference, expected


def tuned_logits(base: Base, folder: Path, prompts: list[list[int]]) -> torch.Tensor:
    """Computes float32 logits [prompts, vocabulary] after each prompt with transformers' and peft's
    model, on the device; returns them on the CPU."""
    tuned = _joined(base, folder)
    model, head = tuned.get_base_model().model, tuned.get_base_model().lm_head
    together = model.embed_tokens(torch.tensor([sum(prompts, [])]))
    hidden = together.float().split([len(prompt) for prompt in prompts], dim=1)
    positions = [torch.arange(states.shape[1])[None] for states in hidden]
    angles = [model.rotary_emb(*pair) for pair in zip(hidden, positions, strict=True)]
    hidden = [states.to(device()) for states in hidden]
    rotary = [(cos.to(device()), sin.to(device())) for cos, sin in angles]
    for number, layer in enumerate(model.layers):
        with _in_memory(tuned, layer, f".layers.{number}.", folder):
            hidden = run_block(layer, hidden, rotary)
    last = model.norm(torch.cat([states[:, -1].cpu() for states in hidden]))
    with _in_memory(tuned, head, ".lm_head.", folder):
        return head(last.to(device())).float().cpu()


def _joined(base: Base, folder: Path) -> PeftModel:
    """Joins base and adapter with peft, and leaves the base's weights on disk."""
    from peft import PeftModel

    model = base.plain()
    # With a device map, peft would spread base and adapter over devices again, and lose DoRA.
    vars(model).pop("hf_device_map", None)
    try:
        return PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True).eval()
    except (RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise UserError(f"{folder}: peft does not take this adapter: {reason}") from None


@contextmanager
def _in_memory(
    tuned: PeftModel, module: torch.nn.Module, name: str, folder: Path
) -> Iterator[None]:
    """Loads the module's weights, which accelerate has left on disk, and its part of the adapter,
    and keeps them on the device while the context is open.

    accelerate's own hooks do so for one linear layer at a time, but DoRA reads a weight outside the
    layer's forward pass; and peft keeps no adapter for weights that are not in memory.

    name: the part of tensor names in the adapter that identifies the module.
    """
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import has_offloaded_params
    from peft import load_peft_weights, set_peft_model_state_dict

    offloaded = [part for part in module.modules() if has_offloaded_params(part)]
    for part in offloaded:
        part._hf_hook.pre_forward(part)
    remove_hook_from_module(module, recurse=True)  # they would take inputs to the CPU
    if offloaded:
        adapter = load_peft_weights(str(folder), device="cpu")
        part = {key: tensor for key, tensor in adapter.items() if name in key}
        set_peft_model_state_dict(tuned, part, low_cpu_mem_usage=True)
    module.to(device())
    yield
    module.to("meta" if offloaded else "cpu")
