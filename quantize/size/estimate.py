"""Estimates a recipe's memory and disk from configurations, without reading a weight.

Memory is that of one process. What a term stands for, and where its factor was measured, is said
beside it; `finequant plan` shows the terms, `finequant run` stops at what cannot finish.
"""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from finequant.finetune import nf4
from finequant.finetune.architecture import (
    anatomy,
    bias_count,
    head_dim,
    layer_shapes,
    norm_count,
    parameter_count,
)
from finequant.finetune.data.tokens import TARGETS_AT_ONCE
from finequant.finetune.device import IN_ONE_LAUNCH
from finequant.finetune.gguf_base import is_dequantized
from finequant.quantize.methods import budget
from finequant.quantize.methods.calibrate import TOKENS
from finequant.quantize.methods.method import ROWS
from finequant.quantize.methods.sequences import LOGITS_TOKENS, SCALE_TOKENS
from finequant.quantize.scheme import EMBEDDING, HEAD, layer_plan, shipped_dtype, unties_head
from finequant.quantize.size.machine import Machine
from finequant.recipes.base import locate_base
from finequant.recipes.methods import METHODS
from finequant.recipes.schema import Lora, Model, Recipe

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig

Memory = dict[str, int]
"""Bytes at the peak of a stage, by what they are for."""


class Lengths(NamedTuple):
    """Tokens of what a recipe reads, which decide the memory of activations."""

    training: list[int]
    """Tokens of each training row."""
    scored: int
    """Tokens of the longest sequence whose likelihood is measured."""
    prompt: int
    """Tokens of the longest held-out prompt."""


MB = 10**6
PROCESS = {"train": 560 * MB, "qat": 600 * MB, "quantize": 600 * MB, "evaluate": 650 * MB}
"""Python with the libraries of a stage: torch, transformers, and trl, torchao or lm-eval."""

CUDA_CONTEXT = 500 * MB

ALLOCATED = {"cpu": 1.9, "gpu": 1.1}
"""Resident over live bytes of what comes and goes. glibc keeps what batches of one length leave,
and those of the next do not fit into it: 1.9 after the 250 steps of the assistant."""

# Bytes that a decoder block keeps for the backward pass of LoRA on all linear layers, per token:
# times hidden size, query width, intermediate size, rank. Exact, counted with saved_tensors_hooks.
SAVED = {"bfloat16": (18.4, 10.4, 8.2, 14), "float32": (16.0, 16.2, 16.0, 28)}

LIGER = 0.65
"""What Liger's kernels keep of it: 0.60 and 0.64 for the 8B and 1B shapes (docs/speed.md)."""

LOGITS = 18
"""Bytes for each logit that is in memory: bf16, float32, its log-softmax, and their gradients."""

TILE = (4096, 32768)
"""Tokens and words whose logits trl's loss on a GPU has at a time; their gradients replace them."""

TAUGHT_LOGITS = 32.5
"""The same, where a teacher's logits lie beside them."""

LEARNED = 0.5
"""Share of the tokens that are learned, where prompts are not."""


def components(config: DecoderConfig) -> dict[str, int]:
    """Weights by part of the model; they add up to `parameter_count`."""
    shapes = layer_shapes(config)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    return {
        "embedding": counts[EMBEDDING],
        "attention": sum(count for name, count in counts.items() if ".self_attn." in name),
        "mlp": sum(count for name, count in counts.items() if ".mlp." in name),
        "norms": norm_count(config),
        "biases": bias_count(config),
        "head": 0 if config.tie_word_embeddings else counts[HEAD],
    }


def trainable(lora: Lora, config: DecoderConfig) -> int:
    """Weights of the adapter."""
    total = 0
    for name, (rows, columns) in layer_shapes(config).items():
        aimed = lora.target_modules == "all-linear" or any(
            f".{name}".endswith(f".{target}") for target in lora.target_modules
        )
        if aimed and name not in (HEAD, EMBEDDING):
            total += lora.rank * (rows + columns) + (rows if lora.use_dora else 0)
    return total


def longest(recipe: Recipe) -> Lengths:
    """Returns the lengths that the recipe allows, if its rows have not been read."""
    limit = recipe.data.max_length
    windows = [corpus.max_length for corpus in recipe.evaluate.perplexity]
    return Lengths([limit] * recipe.train.micro_batch_size, max([*windows, limit]), limit)


def _step_tokens(recipe: Recipe, lengths: Lengths, machine: Machine) -> int:
    """Counts the tokens of the largest micro-batch: padded on a GPU, end to end on a CPU."""
    count = recipe.train.micro_batch_size
    if recipe.data.packing:
        return count * recipe.data.max_length
    rows = sorted(lengths.training, reverse=True)[:count]
    return sum(rows) if machine.kind == "cpu" else count * max(rows)


def training_memory(
    recipe: Recipe, config: DecoderConfig, machine: Machine, lengths: Lengths
) -> Memory:
    """Estimates the memory of a training step on the micro-batch with the most tokens, in each of
    several processes."""
    dtype = machine.training_dtype(recipe.train.precision)
    tokens = _step_tokens(recipe, lengths, machine)
    if machine.kind == "gpu":
        loss = 4 * tokens * config.hidden_size + 2 * math.prod(
            map(min, TILE, (tokens, config.vocab_size))
        )
    else:
        targets = tokens if recipe.data.loss_on == "all" else int(tokens * LEARNED)
        loss = min(targets, TARGETS_AT_ONCE) * config.vocab_size * LOGITS
    weights, parts = parameter_count(config) * _size(dtype), components(config)
    if recipe.model.load == "nf4":
        weights -= int((parts["attention"] + parts["mlp"]) * (_size(dtype) - nf4.BITS / 8))
    learned = trainable(recipe.lora, config)
    if machine.sharded:  # gathered: embedding, head, for the loss once more, and two blocks
        block = (parts["attention"] + parts["mlp"]) // config.num_hidden_layers
        gathered = 3 * parts["embedding"] + 2 * block
        weights = weights // machine.gpus + gathered * _size(dtype)
        learned //= machine.gpus
    step = _step_memory("train", recipe, config, machine, dtype, tokens, weights, learned, loss)
    if machine.kind == "gpu" or not recipe.model.base.endswith(".gguf"):
        return step
    return max(step, _dequantizing(recipe, config, machine), key=lambda m: sum(m.values()))


def _dequantizing(recipe: Recipe, config: DecoderConfig, machine: Machine) -> Memory:
    """Estimates what the first stage takes to make float32 safetensors of a mapped GGUF file."""
    folder, file = locate_base(recipe.model)
    # A tensor that is being dequantized is there twice.
    base = 4 * parameter_count(config) + 8 * components(config)["embedding"]
    fixed = {"base, dequantized": base, "GGUF file": (folder / file).stat().st_size}
    return _memory("train", machine, fixed, {})


def aware_memory(
    recipe: Recipe, config: DecoderConfig, machine: Machine, lengths: Lengths
) -> Memory:
    """Estimates quantization-aware training's larger phase: calibration, or a training step."""
    training, shipped = recipe.quantize.training, shipped_dtype(recipe.quantize, config)
    learns_scales, teacher = training.learns == "scales", bool(training.distillation)
    size = shipped.itemsize
    weights, scales = _fake_quantized(recipe, config, size, 1 if learns_scales else 2, teacher)
    learned = scales if learns_scales else trainable(recipe.lora, config)
    tokens = _step_tokens(recipe, lengths, machine)
    targets = min(tokens, TARGETS_AT_ONCE)
    logits = targets * config.vocab_size * (TAUGHT_LOGITS if training.distillation else LOGITS)
    dtype = str(shipped).removeprefix("torch.")
    step = _step_memory("qat", recipe, config, machine, dtype, tokens, weights, learned, logits)
    if not METHODS[recipe.quantize.method].is_calibrated:
        return step
    calibration = _memory("qat", machine, _calibration(recipe, config, machine), {})
    return max(step, calibration, key=lambda m: sum(m.values()))


def _fake_quantized(
    recipe: Recipe, config: DecoderConfig, size: int, start: int, teacher: bool
) -> tuple[int, int]:
    """Computes the bytes of a model with fake-quantized layers, and the number of its scales.

    size: bytes of a number in its arithmetic.
    start: bytes of a code, or of a latent weight.
    """
    shapes, plan = layer_shapes(config), layer_plan(recipe.quantize, config)
    quantized = sum(math.prod(shapes[name]) for name in plan if plan[name])
    scales = sum(math.prod(shapes[name]) // plan[name].group_size for name in plan if plan[name])
    in_float = parameter_count(config) - quantized
    if unties_head(plan) and config.tie_word_embeddings:
        in_float += math.prod(shapes[HEAD])
    # The weight that is formed and kept for the backward, what it is formed from, the teacher's.
    each = size + start + (size if teacher else 0)
    return size * in_float + each * quantized + 4 * scales, scales


def _step_memory(
    stage: str,
    recipe: Recipe,
    config: DecoderConfig,
    machine: Machine,
    dtype: str,
    tokens: int,
    weights: int,
    learned: int,
    logits: int,
) -> Memory:
    train, blocks = recipe.train, config.num_hidden_layers
    saved = _saved_per_token(recipe, config, dtype)
    if stage == "train" and _takes_liger(recipe, machine):
        saved *= LIGER
    activations = tokens * saved * blocks
    if train.gradient_checkpointing:
        activations = tokens * (saved + blocks * config.hidden_size * _size(dtype))
    return _memory(
        stage,
        machine,
        {
            "weights": weights,
            "adapter" if stage == "train" else "what learns": 4 * learned,
            "gradients": 4 * learned,
            "optimizer": _optimizer_bytes(train.optimizer) * learned,
        },
        {"activations": int(activations), "logits": logits},
    )


def _takes_liger(recipe: Recipe, machine: Machine) -> bool:
    kernels = recipe.train.kernels
    is_there = importlib.util.find_spec("liger_kernel") is not None
    return machine.kind == "gpu" and (kernels == "liger" or (kernels == "auto" and is_there))


def _saved_per_token(recipe: Recipe, config: DecoderConfig, dtype: str) -> float:
    hidden, query, inner, rank = SAVED[dtype]
    return (
        hidden * config.hidden_size
        + query * config.num_attention_heads * head_dim(config)
        + inner * config.intermediate_size
        + rank * recipe.lora.rank
    )


def _optimizer_bytes(name: str) -> int:
    """For each trained weight: Adam's two moments in float32, or in eight bits."""
    return 2 if "8bit" in name else 0 if name == "sgd" else 8


def quantize_memory(
    recipe: Recipe, config: DecoderConfig, machine: Machine, lengths: Lengths
) -> Memory:
    """Estimates quantization's largest phase: checking the merge, quantizing, or the last check.

    On a GPU: what the first of its processes, one on each GPU, has there.
    """
    quantize, shapes = recipe.quantize, layer_shapes(config)
    dtype, on_gpu = shipped_dtype(quantize, config).itemsize, machine.kind == "gpu"
    block, head = sum(_block_sizes(config)), math.prod(shapes[HEAD])
    fixed = {}
    if quantize.rotate and not on_gpu:  # the matrix; two layers in float32
        down = config.hidden_size * config.intermediate_size
        fixed |= {"rotation": 4 * config.hidden_size**2 + 8 * down}
    phases = [{"block in float32": 4 * block, "head in float32": 4 * head}]
    if not on_gpu:
        phases = [
            {"block, read and in float32": 6 * block, "head in float32": 4 * head},
            {"block": dtype * block, "head": dtype * head, "pieces": 16 * 2**20},
        ]
    if METHODS[quantize.method].is_calibrated and not quantize.training:
        phases.append(_calibration(recipe, config, machine))
    if quantize.budget:
        phases.append(_sensitivity(recipe, config, dtype))
    if quantize.method == "hqq":
        phases.append({"largest layer": 24 * max(map(math.prod, shapes.values()))})
    largest = max(phases, key=lambda phase: sum(phase.values()))
    memory = _memory("quantize", machine, {**fixed, **largest}, {})
    if not quantize.calibration.scale_steps or quantize.training:
        return memory
    return max(memory, _scale_training(recipe, config, machine), key=lambda m: sum(m.values()))


def _scale_training(recipe: Recipe, config: DecoderConfig, machine: Machine) -> Memory:
    """While all scales are trained together, with the float model as their teacher."""
    arithmetic = _evaluated_in(recipe, config, machine)
    weights, scales = _fake_quantized(recipe, config, arithmetic, 1, teacher=True)
    dtype = {2: "bfloat16", 4: "float32"}[arithmetic]
    tokens = max(SCALE_TOKENS // machine.gpus, recipe.quantize.calibration.length)
    return _memory(
        "quantize",
        machine,
        {"weights": weights, "what learns": (4 + 4 + 8) * scales},
        {
            "activations": int(
                tokens * _saved_per_token(recipe, config, dtype) * config.num_hidden_layers
            ),
            "logits": int(LOGITS_TOKENS * config.vocab_size * TAUGHT_LOGITS),
        },
    )


def _arithmetic(shipped: torch.dtype, machine: Machine) -> int:
    """Returns the bytes of a number in arithmetic: float32 where bfloat16 is emulated."""
    emulated = shipped == torch.bfloat16 and machine.training_dtype("auto") == "float32"
    return 4 if emulated else shipped.itemsize


def _calibration(recipe: Recipe, config: DecoderConfig, machine: Machine) -> Memory:
    """While the inputs of a block's widest layer are summed up, or layers are solved or rounded; of
    the processes of several GPUs, each holds only its share of the activations."""
    shapes, calibration = layer_shapes(config), recipe.quantize.calibration
    dtype, block = _evaluated_in(recipe, config, machine), sum(_block_sizes(config))
    shared = [
        [shapes[f"model.layers.0.{name}"] for name in names] for names, _ in anatomy(config).inputs
    ]
    widths = [layers[0][1] for layers in shared]
    tokens = max(calibration.tokens // machine.gpus, calibration.length)
    forward = min(TOKENS, tokens)
    # Its Hessian and drift; two models, with three float32 copies of its input.
    summed = 8 * max(widths) ** 2 + forward * (2 * dtype * sum(widths) + 12 * max(widths))
    if machine.kind == "gpu":
        # 1.7 and 5.1 GB were measured for blocks of the 1B and 8B shapes (docs/speed.md).
        solved = 20 * max(widths) ** 2  # the drift, a Hessian, its factor, what cuSOLVER takes
        rounded = max(
            8 * columns**2
            + sum(rows for rows, _ in layers) * columns * 9
            # The correction, what it is made of, and the corrected weights.
            + 12 * min(sum(rows for rows, _ in layers) * columns, IN_ONE_LAUNCH)
            for columns, layers in zip(widths, shared, strict=True)
        )
    else:
        solved = 12 * max(widths) ** 2  # the drift, a Hessian, its factor
        rounded = 8 * max(widths) ** 2 + 4 * max(widths) * (config.hidden_size + 6 * ROWS)
    memory = {
        "block, in float and quantized": 2 * dtype * block,
        "activations": 2 * tokens * config.hidden_size * dtype,
        "Hessians": max(summed, solved, rounded),
    }
    if calibration.steps:  # latent weights, gradients, Adam's two moments; codes for the backward
        memory["training"] = (16 + 4 + dtype) * block
    return memory


def _sensitivity(recipe: Recipe, config: DecoderConfig, dtype: int) -> Memory:
    """While a budget measures the head, with the inputs of every block kept for the way back."""
    calibration, head = recipe.quantize.calibration, math.prod(layer_shapes(config)[HEAD])
    tokens = max(calibration.length, min(calibration.tokens, budget.TOKENS))
    return {
        "inputs of blocks": (config.num_hidden_layers + 1) * tokens * config.hidden_size * dtype,
        "head and its errors": (dtype + 20) * head,
        "logits": tokens * config.vocab_size * (8 + 2 * dtype),
    }


def evaluation_memory(
    recipe: Recipe, config: DecoderConfig, machine: Machine, lengths: Lengths
) -> Memory:
    """Estimates evaluation: of the largest of the three models, or the comparison of two.

    Where no GPU holds a whole model, all GPUs share one; where they cannot either, what has no room
    is read at each use.
    """
    evaluate, dtype = recipe.evaluate, _evaluated_in(recipe, config, machine)
    tokens = evaluate.batch_size * lengths.scored
    kept = 2 * config.num_key_value_heads * head_dim(config) * config.num_hidden_layers * dtype
    rows = evaluate.batch_size * (lengths.prompt + evaluate.max_new_tokens)
    passing = {
        "activations": tokens * (4 * config.intermediate_size + 6 * config.hidden_size) * 4,
        # A step's keys and values lie beside those of the step before.
        "key-value cache": 2 * rows * kept,
        # Two models' log-probabilities, and what their divergence is computed with.
        "logits": 5 * evaluate.divergence_tokens * config.vocab_size * 4,
    }
    tables, block = evaluation_weights(recipe, config, machine)
    blocks, layer = config.num_hidden_layers, dtype * max(_block_sizes(config))
    ways = {"weights": tables + blocks * block}
    if machine.gpus > 1:
        ways["weights, a share"] = tables + math.ceil(blocks / machine.gpus) * block
    ways["weights in use, the others are read each time"] = tables + 2 * layer
    for name, size in ways.items():
        memory = _memory("evaluate", machine, {name: size}, passing)
        if sum(memory.values()) <= machine.memory:
            break
    return memory


def evaluation_weights(recipe: Recipe, config: DecoderConfig, machine: Machine) -> tuple[int, int]:
    """Computes the bytes of embedding, head and last norm, and of a block, as they are evaluated.

    They are those of the quantized model: its head is its own.
    """
    dtype, parts = _evaluated_in(recipe, config, machine), components(config)
    tables = parts["embedding"] + parts["head"]
    if config.tie_word_embeddings and unties_head(layer_plan(recipe.quantize, config)):
        tables += parts["embedding"]
    rest = parameter_count(config) - parts["embedding"] - parts["head"]
    return dtype * tables, dtype * math.ceil(rest / config.num_hidden_layers)


def _evaluated_in(recipe: Recipe, config: DecoderConfig, machine: Machine) -> int:
    return _arithmetic(shipped_dtype(recipe.quantize, config), machine)


def _block_sizes(config: DecoderConfig) -> list[int]:
    """Lists the numbers of weights of a block's layers."""
    shapes = layer_shapes(config)
    return [math.prod(shape) for name, shape in shapes.items() if ".layers.0." in name]


def _memory(stage: str, machine: Machine, lasting: Memory, passing: Memory) -> Memory:
    """Adds the process itself, and what the allocator holds beyond the bytes in use."""
    process = CUDA_CONTEXT if machine.kind == "gpu" else PROCESS[stage]
    kept = int(sum(passing.values()) * (ALLOCATED[machine.kind] - 1))
    memory = {"process": process, **lasting, **passing, "allocator": kept}
    return {name: size for name, size in memory.items() if size}


def memory_of(
    stage: str,
    recipe: Recipe,
    config: DecoderConfig,
    machine: Machine,
    lengths: Lengths | None = None,
) -> Memory:
    """Estimates a stage's peak memory.

    lengths: of the rows that it reads; default: the longest that the recipe allows.
    """
    stages = {
        "train": training_memory,
        "qat": aware_memory,
        "quantize": quantize_memory,
        "evaluate": evaluation_memory,
    }
    return stages[stage](recipe, config, machine, lengths or longest(recipe))


def disk_of(stage: str, recipe: Recipe, config: DecoderConfig) -> int:
    """Bytes that a stage leaves in the run directory, or has there for a while."""
    from finequant.quantize.size.plan import model_size

    adapter, dtype = trainable(recipe.lora, config), shipped_dtype(recipe.quantize, config)
    each = adapter * (4 + _optimizer_bytes(recipe.train.optimizer))
    checkpoints = each * (recipe.train.save_total_limit + 1)
    if stage == "train":
        return 4 * adapter + checkpoints
    size = model_size(layer_plan(recipe.quantize, config), config, dtype).disk
    if stage == "qat":  # the codes that it starts from, and those that it ends with
        return 2 * size + checkpoints
    if stage == "quantize":
        merged = parameter_count(config) * dtype.itemsize if recipe.quantize.keep_merged else 0
        return size + merged
    return 50 * MB


def dequantized_bytes(model: Model, config: DecoderConfig) -> int:
    """Bytes that a GGUF base will take in the user's cache, as float32; 0 if it is there."""
    if not model.base.endswith(".gguf") or is_dequantized(model):
        return 0
    return 4 * parameter_count(config)


def cache_bytes(config: DecoderConfig, tokens: int, dtype_bytes: int = 2) -> int:
    """Keys and values of one sequence, in 16 bits."""
    width = config.num_key_value_heads * head_dim(config)
    return 2 * config.num_hidden_layers * width * tokens * dtype_bytes


def _size(dtype: str) -> int:
    return {"bfloat16": 2, "float32": 4}[dtype]
