"""Estimates a recipe's memory and disk from configurations, without reading a weight.

Memory is that of one process. What a term stands for, and where its factor was measured, is said
beside it; `finequant plan` shows the terms, `finequant run` stops at what cannot finish.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finequant.finetune.architecture import head_dim, parameter_count
from finequant.finetune.gguf_base import is_dequantized
from finequant.quantize.formats.packing import packed_width
from finequant.quantize.scheme import Plan, layer_plan, shipped_dtype
from finequant.quantize.size.evaluating import evaluation_memory
from finequant.quantize.size.machine import Machine
from finequant.quantize.size.plan import model_size
from finequant.quantize.size.quantizing import qat_memory, quantize_memory
from finequant.quantize.size.terms import MB, PROCESS, Lengths, Memory, longest, trainable
from finequant.quantize.size.training import optimizer_bytes, training_memory
from finequant.recipes.schema import Model, Recipe
from finequant.recipes.stages import STAGES

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig


def memory_of(
    stage: str,
    recipe: Recipe,
    config: DecoderConfig,
    machine: Machine,
    lengths: Lengths | None = None,
) -> Memory:
    """Estimates the peak memory of a stage or an export.

    lengths: of the rows that it reads; default: the longest that the recipe allows.
    """
    if stage not in STAGES:
        return export_memory(stage, config)
    stages = {
        "train": training_memory,
        "qat": qat_memory,
        "quantize": quantize_memory,
        "evaluate": evaluation_memory,
    }
    return stages[stage](recipe, config, machine, lengths or longest(recipe))


def export_memory(name: str, config: DecoderConfig) -> Memory:
    """Estimates the memory of an export, without pages of mapped files."""
    from finequant.quantize.formats.formats import FORMATS

    model = FORMATS[name].bytes_per_weight * parameter_count(config)
    return {"process": PROCESS["export"], "quantized/ and the export": int(model)}


def disk_of(stage: str, recipe: Recipe, config: DecoderConfig) -> int:
    """Computes the bytes that a stage, or an export, needs in the run directory, temporary files
    included."""
    adapter, dtype = trainable(recipe.lora, config), shipped_dtype(recipe.quantize, config)
    each = adapter * (4 + optimizer_bytes(recipe.train.optimizer))
    checkpoints = each * (recipe.train.save_total_limit + 1)
    if stage == "train":
        return 4 * adapter + checkpoints
    plan = layer_plan(recipe.quantize, config)
    size = model_size(plan, config, dtype).disk
    if stage == "qat":  # its starting codes and the trained ones
        return 2 * size + checkpoints
    if stage == "quantize":
        merged = parameter_count(config) * dtype.itemsize if recipe.quantize.keep_merged else 0
        return size + merged
    if stage not in STAGES:
        return model_size(_exported(plan), config, dtype).packed
    return 50 * MB


def _exported(plan: Plan) -> Plan:
    """Returns a plan as large as the largest export: codes of 4 or 8 bits, and four bytes for each
    32 weights, like MLX's scale and bias, or the scales of two of ONNX's smallest blocks."""
    wide = {"group_size": 32, "scale_dtype": torch.float32}
    return {
        name: scheme and scheme._replace(bits=packed_width(scheme.bits), **wide)
        for name, scheme in plan.items()
    }


def dequantized_bytes(model: Model, config: DecoderConfig) -> int:
    """Computes the bytes that a GGUF base will need in the user's cache; 0 if it is there."""
    if not model.is_gguf or is_dequantized(model):
        return 0
    return 4 * parameter_count(config)


def cache_bytes(config: DecoderConfig, tokens: int) -> int:
    """Computes the bytes of the key-value cache of one sequence, in half precision."""
    width = config.num_key_value_heads * head_dim(config)
    return 2 * config.num_hidden_layers * width * tokens * torch.float16.itemsize
