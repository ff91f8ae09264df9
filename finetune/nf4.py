"""Holds the base in four bits during training, as QLoRA does (https://arxiv.org/abs/2305.14314).

Only training does: the adapter is merged into the float files, like any other.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from finequant.finetune.architecture import layer_shapes
from finequant.finetune.device import trains_on_cpu
from finequant.finetune.model import load_base, load_config, stored_dtype
from finequant.finetune.processes import sharding
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from finequant.finetune.architecture import Decoder

BLOCK = 64
"""Weights that share a scale."""

PACKS = "support_avx512bf16_for_cpu"
"""The attribute of bitsandbytes' layers by which they pack their weights in an evaluation."""

BITS = 4.127
"""Bits per weight: a code, and a 64th of a scale, itself quantized in groups of 256 scales."""


def check_nf4(recipe: Recipe) -> None:
    """Checks that a base in four bits, if the recipe asks for one, can be trained on.

    Raises:
        UserError: if bitsandbytes is not installed, LoRA's initialization would change the base,
            the launcher splits the weights, or bitsandbytes cannot compute with them.
    """
    if recipe.model.load != "nf4":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.load: nf4 needs bitsandbytes: pip install 'finequant[nf4]', or set "
            "model.load=float"
        )
    if recipe.lora.changes_base:
        raise UserError(
            f"lora.init_lora_weights: {recipe.lora.init_lora_weights} moves a part of the base "
            "into the adapter, and a base in nf4 cannot be changed: use default or gaussian, or "
            "set model.load=float"
        )
    if sharding():
        raise UserError(
            f"model.load: {sharding()} splits the base over processes, but each process has to "
            "hold all of an nf4 base: use recipes/accelerate/several_gpus.yaml, or set "
            "model.load=float"
        )
    if trains_on_cpu():
        _check_blocks(recipe)


def _check_blocks(recipe: Recipe) -> None:
    """Refuses layers whose rows do not consist of whole blocks of weights that share a scale.

    With AVX-512, bitsandbytes (0.50) dequantizes them with the scales of other blocks:
    backends/cpu/ops.py takes it that each row begins a block. To be removed once it does not.
    """
    for name, (_, columns) in layer_shapes(load_config(recipe.model)).items():
        if columns % BLOCK:
            raise UserError(
                f"model.load: bitsandbytes needs inputs of a multiple of {BLOCK} for nf4 on a CPU, "
                f"and {name} has {columns}: train on a GPU, or set model.load=float"
            )


def load_trained_base(recipe: Recipe, dtype: torch.dtype) -> Decoder:
    """Loads the base as training holds it: all its weights in `dtype`, or its linear layers in nf4.

    Raises:
        UserError: as `load_base` and `check_nf4` do.
    """
    check_nf4(recipe)
    base = load_base(recipe.model, dtype, **_options(recipe, dtype))
    if recipe.model.load == "nf4" and dtype == stored_dtype(load_config(recipe.model)):
        for weight in base.parameters():  # a view of the file would keep all of it mapped
            if weight.device.type == "cpu" and weight.is_floating_point():
                weight.data = weight.data.clone()
    # On a CPU with avx512_bf16, bitsandbytes (0.50) packs weights anew in the first evaluation, in
    # Linear4bit.forward, and training after that gets no gradient through them. To be removed once
    # they are unpacked when training goes on.
    for module in base.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)
    return base


def _options(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    if recipe.model.load != "nf4":
        return {}
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": PartialState().device}}
