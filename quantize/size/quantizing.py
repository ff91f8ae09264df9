"""Estimates the memory of quantization and of quantization-aware training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from finequant.finetune.architecture import (
    EMBEDDING,
    HEAD,
    anatomy,
    layer_shapes,
    sequence_length,
)
from finequant.finetune.data.tokens import TARGETS_AT_ONCE
from finequant.finetune.device import IN_ONE_LAUNCH
from finequant.quantize.methods import budget
from finequant.quantize.methods.calibrate import TOKENS
from finequant.quantize.methods.method import ROWS
from finequant.quantize.methods.sequences import LOGITS_TOKENS, SCALE_TOKENS
from finequant.quantize.scheme import keeps_tied_head, layer_plan, shipped_dtype
from finequant.quantize.size.machine import Machine
from finequant.quantize.size.terms import (
    MB,
    Lengths,
    Memory,
    arithmetic_bytes,
    block_sizes,
    components,
    largest,
    peak_memory,
    trainable,
)
from finequant.quantize.size.training import (
    LOGITS,
    LOGITS_WITH_TEACHER,
    Step,
    saved_per_token,
    step_memory,
    step_tokens,
)
from finequant.recipes.methods import METHODS
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig

RELOADING = 300 * MB
"""Bytes of a second process with the same libraries, without what both map (0.29 GB measured)."""


def qat_memory(recipe: Recipe, config: DecoderConfig, machine: Machine, lengths: Lengths) -> Memory:
    """Estimates the larger phase of quantization-aware training: calibration or a training step."""
    training, shipped = recipe.quantize.training, shipped_dtype(recipe.quantize, config)
    learns_scales, teacher = training.learns == "scales", bool(training.distillation)
    size = shipped.itemsize
    stored = _stored(recipe, config, size, 1 if learns_scales else 2, teacher)
    formed = _formed(recipe, config, size)
    learned = _scales(recipe, config) if learns_scales else trainable(recipe.lora, config)
    weights = sum(stored.values())
    if machine.sharded:
        weights = weights // machine.gpus + _in_use(stored)
        learned //= machine.gpus
    checkpointed = recipe.train.gradient_checkpointing
    weights += _formed_at_once(formed) if checkpointed else sum(formed.values())
    tokens = step_tokens(recipe, lengths, machine)
    targets = min(tokens, TARGETS_AT_ONCE)
    logit_bytes = LOGITS_WITH_TEACHER if teacher else LOGITS
    logits = targets * config.vocab_size * logit_bytes
    step = step_memory("qat", recipe, config, machine, Step(size, tokens, weights, learned, logits))
    if not METHODS[recipe.quantize.method].is_calibrated:
        return step
    calibration = peak_memory("qat", machine, _calibration(recipe, config, machine), {})
    return largest(step, calibration)


def _stored(
    recipe: Recipe, config: DecoderConfig, size: int, start: int, teacher: bool
) -> dict[str, int]:
    """Computes the bytes of each layer of a fake-quantized model; norms and biases come last.

    size: bytes of a number in the model's arithmetic.
    start: bytes of a code, or of a latent weight where an adapter is trained.
    """
    plan, parts = layer_plan(recipe.quantize, config), components(config)
    stored = {}
    for name, shape in layer_shapes(config).items():
        if scheme := plan[name]:
            code = 1 if name in (HEAD, EMBEDDING) else start  # no adapter moves them
            scale = scheme.scale_dtype.itemsize / scheme.group_size
            stored[name] = int(math.prod(shape) * (code + scale + (size if teacher else 0)))
        elif name != HEAD or not keeps_tied_head(plan, config):
            stored[name] = math.prod(shape) * size
    return stored | {"": (parts["norms"] + parts["biases"]) * size}


def _formed(recipe: Recipe, config: DecoderConfig, size: int) -> dict[str, int]:
    """Computes the bytes of each weight that the forward pass forms and keeps for the backward."""
    plan = layer_plan(recipe.quantize, config)
    shapes = layer_shapes(config).items()
    return {name: math.prod(shape) * size for name, shape in shapes if plan[name]}


def _scales(recipe: Recipe, config: DecoderConfig) -> int:
    """Counts the scales of all layers, which training may change."""
    plan, shapes = layer_plan(recipe.quantize, config), layer_shapes(config)
    return sum(math.prod(shapes[name]) // plan[name].group_size for name in plan if plan[name])


def _in_use(layers: dict[str, int]) -> int:
    """Sums the bytes of embedding, head, and two blocks: one computes while the next arrives."""
    block = sum(size for name, size in layers.items() if ".layers.0." in name)
    return 2 * block + layers.get(EMBEDDING, 0) + layers.get(HEAD, 0)


def _formed_at_once(formed: dict[str, int]) -> int:
    """Returns the bytes of a block's weights or of the head's: the backward pass frees the head
    before the blocks begin."""
    block = sum(size for name, size in formed.items() if ".layers.0." in name)
    return max(block, formed.get(EMBEDDING, 0), formed.get(HEAD, 0))


def quantize_memory(
    recipe: Recipe, config: DecoderConfig, machine: Machine, lengths: Lengths
) -> Memory:
    """Estimates the largest phase of quantization: checking the merge, quantizing, or reloading.

    On GPUs, each with a process, this is the memory of the first one.
    """
    quantize, shapes = recipe.quantize, layer_shapes(config)
    dtype, on_gpu = shipped_dtype(quantize, config).itemsize, machine.kind == "gpu"
    block, head = sum(block_sizes(config)), math.prod(shapes[HEAD])
    fixed = {}
    if quantize.rotate and not on_gpu:  # its matrix, and two layers in float32
        down = config.hidden_size * config.intermediate_size
        fixed |= {"rotation": 4 * config.hidden_size**2 + 8 * down}
    phases = [{"block in float32": 4 * block, "head in float32": 4 * head}]
    if not on_gpu:
        phases = [
            {"block, read and in float32": 6 * block},
            {"head in float32": 4 * head},  # or the embedding, one at a time
            {"largest of the shipped layers": dtype * max(block, head), "pieces": 16 * 2**20},
            {"process that reloads": RELOADING, "its head in float32": 4 * head},
        ]
    if METHODS[quantize.method].is_calibrated and not quantize.training:
        phases.append(_calibration(recipe, config, machine))
    if quantize.budget:
        phases.append(_sensitivity(recipe, config, arithmetic_bytes(recipe, config, machine)))
    if quantize.method == "hqq":
        phases.append({"largest layer": 24 * max(map(math.prod, shapes.values()))})
    memory = peak_memory("quantize", machine, fixed | largest(*phases), {})
    if not quantize.calibration.scale_steps or quantize.training:
        return memory
    return largest(memory, _scale_training(recipe, config, machine))


def _scale_training(recipe: Recipe, config: DecoderConfig, machine: Machine) -> Memory:
    """Estimates the training of all scales together, with the float model as their teacher."""
    arithmetic = arithmetic_bytes(recipe, config, machine)
    stored = _stored(recipe, config, arithmetic, 1, teacher=True)
    weights = sum(stored.values()) + sum(_formed(recipe, config, arithmetic).values())
    length = sequence_length(recipe.quantize.calibration, config)
    tokens = max(SCALE_TOKENS // machine.gpus, length)
    # At most half of the steps: of them, the text comes again.
    taught = recipe.quantize.calibration.scale_steps // 2 * tokens
    return peak_memory(
        "quantize",
        machine,
        {
            "weights": weights,
            "trained parameters": (4 + 4 + 8) * _scales(recipe, config),
            "teacher's states": taught * config.hidden_size * arithmetic,
        },
        {
            "activations": int(
                tokens * saved_per_token(recipe, config, arithmetic) * config.num_hidden_layers
            ),
            "logits": int(LOGITS_TOKENS * config.vocab_size * LOGITS_WITH_TEACHER),
        },
    )


def _calibration(recipe: Recipe, config: DecoderConfig, machine: Machine) -> Memory:
    """Estimates the largest phase of calibrating a block: summing up the inputs of its widest
    layer, or solving or rounding layers. Several processes share the activations."""
    shapes, calibration = layer_shapes(config), recipe.quantize.calibration
    dtype, block = arithmetic_bytes(recipe, config, machine), sum(block_sizes(config))
    shared = [
        [shapes[f"model.layers.0.{name}"] for name in names] for names, _ in anatomy(config).inputs
    ]
    widths = [layers[0][1] for layers in shared]
    length = sequence_length(calibration, config)
    tokens = max(calibration.tokens // machine.gpus, length)
    forward = min(TOKENS, tokens)
    # Hessian and drift; outputs of two models, and three float32 copies of the input.
    summed = 8 * max(widths) ** 2 + forward * (2 * dtype * sum(widths) + 12 * max(widths))
    if machine.kind == "gpu":
        # 1.7 and 5.1 GB were measured for blocks of the 1B and 8B shapes (docs/speed.md).
        solved = 20 * max(widths) ** 2  # the drift, a Hessian, its factor, what cuSOLVER takes
        rounded = max(
            8 * columns**2
            + sum(rows for rows, _ in layers) * columns * 9
            # The correction, its factors, and the corrected weights.
            + 12 * min(sum(rows for rows, _ in layers) * columns, IN_ONE_LAUNCH)
            for columns, layers in zip(widths, shared, strict=True)
        )
    else:
        solved = 12 * max(widths) ** 2  # the drift, a Hessian, its factor
        rounded = 8 * max(widths) ** 2 + 4 * max(widths) * (config.hidden_size + 6 * ROWS)
    memory = {
        "block, in float and quantized": 2 * dtype * block,
        # Of both models and, for training, those before the block.
        "activations": (3 if calibration.steps else 2) * tokens * config.hidden_size * dtype,
        "Hessians": max(summed, solved, rounded),
    }
    if calibration.steps:  # latent weights, gradients, Adam's two moments; codes for the backward
        memory["training"] = (16 + 4 + dtype) * block
    return memory


def _sensitivity(recipe: Recipe, config: DecoderConfig, dtype: int) -> Memory:
    """Estimates how a budget measures the head, while the inputs of all blocks are kept for the
    backward pass."""
    calibration, head = recipe.quantize.calibration, math.prod(layer_shapes(config)[HEAD])
    length = sequence_length(calibration, config)
    tokens = max(length, min(calibration.tokens, budget.TOKENS))
    return {
        "inputs of blocks": (config.num_hidden_layers + 1) * tokens * config.hidden_size * dtype,
        "head and its errors": (dtype + 20) * head,
        "logits": tokens * config.vocab_size * (8 + 2 * dtype),
    }
