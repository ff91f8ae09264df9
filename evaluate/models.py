"""Loads the models of a run as they ship, and computes their sizes on disk."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    import torch

    from finequant.finetune.architecture import Decoder, DecoderConfig
    from finequant.quantize.size.placement import DeviceMap
    from finequant.quantize.size.terms import Lengths

MODELS = ("base", "tuned", "quantized")
"""The models of every run; further ones in a report are exports."""

GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}
"""Arguments of `generate` that override whatever the base's generation_config.json says."""


def load_model(
    name: str,
    recipe: Recipe,
    run: RunDir,
    probe: list[int],
    ends: list[int],
    lengths: Lengths | None = None,
    config: DecoderConfig | None = None,
) -> Decoder:
    """Loads one of the three models with its shipped weights, on the GPU if there is one.

    It computes in the shipped dtype, or in float32 if the processor only emulates bf16. The stage
    quantize has compared the tuned model's logits with peft's already. Parts that do not fit into
    memory are read from their files at each use.

    probe: token ids on which the dequantized model is compared with quantized/.
    ends: token ids that end an answer of base and tuned; quantized/ has its own record of them.
    lengths: of the sequences it will read, as activations take memory, too; default: the longest
        that the recipe allows.
    config: default: the base's; with its own, quantized/ is loaded without a base.
    """
    from transformers import AutoModelForCausalLM

    from finequant.evaluate.dequantized import dequantize_once
    from finequant.finetune.data.turns import stop_at
    from finequant.finetune.device import arithmetic_dtype, device
    from finequant.finetune.model import load_base, load_config
    from finequant.quantize.merge.model import merged_model
    from finequant.quantize.scheme import cast_weights, shipped_dtype
    from finequant.quantize.size.placement import device_map_of

    config = config or load_config(recipe.model)
    dtype = shipped_dtype(recipe.quantize, config)
    if device_map := device_map_of(recipe, config, lengths):
        return _spread(name, recipe, run, ends, dtype, device_map)
    if name == "base":
        model = load_base(recipe.model, dtype)
    elif name == "quantized":
        model = AutoModelForCausalLM.from_pretrained(run.quantized).eval()
        model = dequantize_once(model, probe)
        return cast_weights(model, arithmetic_dtype(dtype))
    else:
        model = merged_model(recipe, run, dtype)
    stop_at(model, ends)
    # The weights are rounded to the shipped dtype, whatever dtype the model computes in.
    model = cast_weights(model, arithmetic_dtype(dtype))
    return model.to(device()).eval()


def _spread(
    name: str,
    recipe: Recipe,
    run: RunDir,
    ends: list[int],
    dtype: torch.dtype,
    device_map: DeviceMap,
) -> Decoder:
    """Builds a model that is too large for one device, from its files.

    dtype: the shipped dtype, to which weights are rounded.
    """
    from finequant.finetune.data.turns import stop_at
    from finequant.finetune.device import arithmetic_dtype
    from finequant.quantize.merge.adapter import Adapter, merged_weights, open_base
    from finequant.quantize.merge.model import spread_model

    for where, count in Counter(device_map.values()).items():
        say(f"evaluate: {name}: {count} of {len(device_map)} parts on {where}")
    if name == "quantized":
        return _spread_quantized(run, dtype, device_map)
    base = open_base(recipe.model)
    weights = base.weights
    if name == "tuned":
        weights = merged_weights(base, Adapter(run.adapter, base, recipe.model.base))
    model = spread_model(base, weights, dtype, arithmetic_dtype(dtype), device_map)
    stop_at(model, ends)
    return model


def _spread_quantized(run: RunDir, dtype: torch.dtype, device_map: DeviceMap) -> Decoder:
    """Builds the model of quantized/: its weights are codes times scales, which the stage quantize
    has compared with torchao's, and its layers round their inputs."""
    from transformers import GenerationConfig

    from finequant.evaluate.dequantized import quantize_inputs
    from finequant.finetune.architecture import EMBEDDING
    from finequant.finetune.device import arithmetic_dtype
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.quantize.merge.adapter import Base
    from finequant.quantize.merge.model import spread_model

    stored = read_checkpoint(run.quantized)
    generation = GenerationConfig.from_pretrained(run.quantized)
    base = Base(stored.config, generation, {}, stored.float_weight)
    model = spread_model(base, base.weights, dtype, arithmetic_dtype(dtype), device_map)
    layers = [layer for layer in stored.rounded if layer != EMBEDDING]
    quantize_inputs(model.get_submodule(layer) for layer in layers)
    return model


def size_bytes(name: str, model: Decoder, recipe: Recipe, run: RunDir) -> int:
    """Returns the bytes that the weights take on disk or, for a float model, would take there."""
    from finequant.finetune.model import load_config
    from finequant.quantize.checkpoint.writing import weight_bytes
    from finequant.quantize.scheme import shipped_dtype
    from finequant.recipes.base import locate_base

    folder, file = locate_base(recipe.model)
    if name == "quantized":
        return weight_bytes(run.quantized)
    if name == "base" and file:
        return (folder / file).stat().st_size
    shipped = shipped_dtype(recipe.quantize, load_config(recipe.model))
    return sum(weight.numel() for weight in model.parameters()) * shipped.itemsize


def packed_sizes(recipe: Recipe, run: RunDir) -> dict[str, dict[str, float]]:
    """Computes the sizes of base, tuned and quantized in the dtypes they are measured in.

    Their files may differ: a base may be quantized already, and torchao stores a code in a byte.

    Returns:
        {NAME: {"packed_bytes", "packed_bits_per_weight"}}
    """
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.model import load_config
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.quantize.scheme import shipped_dtype

    config = load_config(recipe.model)
    weights = parameter_count(config)
    floats = weights * shipped_dtype(recipe.quantize, config).itemsize
    quantized = read_checkpoint(run.quantized).packed_bytes
    sizes = {"base": floats, "tuned": floats, "quantized": quantized}
    return {
        name: {"packed_bytes": size, "packed_bits_per_weight": 8 * size / weights}
        for name, size in sizes.items()
    }
