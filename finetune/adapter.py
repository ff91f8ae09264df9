"""LoRA on a base: peft's configuration, and the adapter's files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from finequant.recipes.errors import UserError
from finequant.recipes.schema import Lora

if TYPE_CHECKING:
    from finequant.finetune.architecture import Decoder


def lora_config(lora: Lora, base: Decoder) -> LoraConfig:
    """Translates the recipe's section into peft's configuration.

    Raises:
        UserError: if a target module does not exist in the model, or is too small for the rank.
    """
    linear = {
        name: module
        for name, module in base.model.named_modules(prefix="model")
        if isinstance(module, torch.nn.Linear)
    }
    _check_targets(lora, linear)
    if lora.changes_base:
        _check_rank(lora, linear)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=True if lora.init_lora_weights == "default" else lora.init_lora_weights,
        task_type="CAUSAL_LM",
    )


def _check_targets(lora: Lora, linear: Iterable[str]) -> None:
    """Refuses the head, and names that no linear layer ends in."""
    if lora.target_modules == "all-linear":
        return
    if "lm_head" in lora.target_modules:
        raise UserError(
            "lora.target_modules: lm_head, the head, takes no LoRA here: the loss uses its "
            "stored weight, which a tied embedding shares: leave it out"
        )
    unknown = [
        target
        for target in lora.target_modules  # peft compares them with the end of a name
        if not any(f".{name}".endswith(f".{target}") for name in linear)
    ]
    if unknown:
        raise UserError(
            f"lora.target_modules: the model has no linear layer {', '.join(unknown)}; it has "
            + ", ".join(sorted({name.split(".")[-1] for name in linear}))
        )


def _check_rank(lora: Lora, linear: dict[str, torch.nn.Linear]) -> None:
    """Refuses a rank above that of a weight, whose factors PiSSA and OLoRA start from: peft would
    fail, or make smaller matrices than adapter_config.json says."""
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in linear.items()
        if lora.targets(name)
    }
    smallest = min(shapes, key=lambda name: min(shapes[name]))
    largest_rank = min(shapes[smallest])
    if lora.rank > largest_rank:
        raise UserError(
            f"lora.rank: {lora.rank} is too large for lora.init_lora_weights="
            f"{lora.init_lora_weights}, which starts from the factors of each weight: {smallest} "
            f"is {' x '.join(map(str, shapes[smallest]))}: use a rank of at most {largest_rank}, "
            "or lora.init_lora_weights=default"
        )


def save_initial_adapter(model: PeftModel, folder: Path) -> None:
    """Saves the starting point of PiSSA or OLoRA, which `save_adapter` subtracts."""
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    config.init_lora_weights = init


def save_adapter(
    model: PeftModel,
    folder: Path,
    initial: Path | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, an adapter of the unchanged base.

    `weights`: the model's state, gathered from the processes that share it (FSDP, ZeRO-3).
    `initial`: the starting point; the difference from it is written, with twice the rank, as peft
    does for PiSSA (https://arxiv.org/abs/2404.02948), but only for weights that are not gathered.
    """
    # peft keeps a set, which each process would write in a different order.
    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)
    if initial:
        weights = _minus_initial(weights or model.state_dict(), initial)
        config.init_lora_weights, config.r = True, 2 * config.r
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # keeps the scaling
    model.save_pretrained(folder, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def _minus_initial(weights: dict[str, torch.Tensor], initial: Path) -> dict[str, torch.Tensor]:
    """Returns the factors of B A - B0 A0 as one product: [B, -B0] [A; A0]."""
    difference = {}
    for name, first in load_file(initial / "adapter_model.safetensors").items():
        trained_name = name.removesuffix("weight") + "default.weight"
        trained = weights[trained_name].cpu()
        is_a = "lora_A" in name
        parts = [trained, first if is_a else -first]
        difference[trained_name] = torch.cat(parts, dim=0 if is_a else 1)
    return difference
