"""Estimates the memory of a training step."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, NamedTuple

from finequant.finetune import nf4
from finequant.finetune.architecture import head_dim, parameter_count
from finequant.finetune.data.tokens import TARGETS_AT_ONCE
from finequant.quantize.size.machine import Machine
from finequant.quantize.size.terms import (
    Lengths,
    Memory,
    components,
    largest,
    peak_memory,
    trainable,
)
from finequant.recipes.base import locate_base
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig

SAVED = {2: (18.4, 10.4, 8.2, 14), 4: (16.0, 16.2, 16.0, 28)}
"""Bytes of a number in training -> bytes per token that a decoder block keeps for the backward
pass, with LoRA on all linear layers: factors of hidden size, query width, intermediate size and
rank, counted by saved_tensors_hooks."""

LIGER = 0.65
"""Share of SAVED with Liger's kernels: 0.60 and 0.64 for the 8B and 1B shapes (docs/speed.md)."""

LOGITS = 18
"""Bytes per logit: in bf16, in float32, its log-softmax, and their gradients."""

TILE = (4096, 32768)
"""Tokens and words whose logits trl's loss on a GPU holds at a time; gradients replace them."""

LOGITS_WITH_TEACHER = 32.5
"""Bytes per logit with those of a teacher."""

TARGET_SHARE = 0.5
"""Assumed share of target tokens if the loss leaves out prompts."""


def training_memory(
    recipe: Recipe, config: DecoderConfig, machine: Machine, lengths: Lengths
) -> Memory:
    """Estimates the memory of a training step, in each process, on the micro-batch with the most
    tokens."""
    size = machine.training_dtype(recipe.train.precision).itemsize
    tokens = step_tokens(recipe, lengths, machine)
    if machine.kind == "gpu":
        loss = 4 * tokens * config.hidden_size + 2 * math.prod(
            map(min, TILE, (tokens, config.vocab_size))
        )
    else:
        targets = tokens if recipe.data.loss_on == "all" else int(tokens * TARGET_SHARE)
        loss = min(targets, TARGETS_AT_ONCE) * config.vocab_size * LOGITS
    weights, parts = parameter_count(config) * size, components(config)
    if recipe.model.load == "nf4":
        weights -= int((parts["attention"] + parts["mlp"]) * (size - nf4.BITS / 8))
    learned = trainable(recipe.lora, config)
    if machine.sharded:  # gathered: embedding, head, the head again for the loss, and two blocks
        block = (parts["attention"] + parts["mlp"]) // config.num_hidden_layers
        gathered = 3 * parts["embedding"] + 2 * block
        weights = weights // machine.gpus + gathered * size
        learned //= machine.gpus
    step = step_memory("train", recipe, config, machine, Step(size, tokens, weights, learned, loss))
    if machine.kind == "gpu" or not recipe.model.is_gguf:
        return step
    return largest(step, _dequantizing(recipe, config, machine))


def _dequantizing(recipe: Recipe, config: DecoderConfig, machine: Machine) -> Memory:
    """Estimates the conversion of a mapped GGUF file to float32 safetensors by the first stage."""
    folder, file = locate_base(recipe.model)
    # While a tensor is dequantized, it is in memory twice.
    base = 4 * parameter_count(config) + 8 * components(config)["embedding"]
    fixed = {"base, dequantized": base, "GGUF file": (folder / file).stat().st_size}
    return peak_memory("train", machine, fixed, {})


def step_tokens(recipe: Recipe, lengths: Lengths, machine: Machine) -> int:
    """Counts the tokens of the largest micro-batch: padded on a GPU, end to end on a CPU."""
    count = recipe.train.micro_batch_size
    if recipe.data.packing:
        return count * recipe.data.max_length
    rows = sorted(lengths.training, reverse=True)[:count]
    return sum(rows) if machine.kind == "cpu" else count * max(rows)


class Step(NamedTuple):
    """What the memory of a training step depends on, in each process."""

    size: int
    """Bytes of a number in the model's arithmetic."""
    tokens: int
    """Tokens of the micro-batch."""
    weights: int
    """Bytes of the weights."""
    learned: int
    """The number of trained parameters."""
    logits: int
    """Bytes of the logits and their gradients."""


def step_memory(
    stage: str, recipe: Recipe, config: DecoderConfig, machine: Machine, step: Step
) -> Memory:
    """Estimates a training step of `train` or `qat`."""
    train, blocks = recipe.train, config.num_hidden_layers
    saved = saved_per_token(recipe, config, step.size)
    if stage == "train" and _takes_liger(recipe, machine):
        saved *= LIGER
    activations = step.tokens * saved * blocks
    if train.gradient_checkpointing:
        activations = step.tokens * (saved + blocks * config.hidden_size * step.size)
    return peak_memory(
        stage,
        machine,
        {
            "weights": step.weights,
            "adapter" if stage == "train" else "trained parameters": 4 * step.learned,
            "gradients": 4 * step.learned,
            "optimizer": optimizer_bytes(train.optimizer) * step.learned,
        },
        {"activations": int(activations), "logits": step.logits},
    )


def _takes_liger(recipe: Recipe, machine: Machine) -> bool:
    kernels = recipe.train.kernels
    is_there = importlib.util.find_spec("liger_kernel") is not None
    return machine.kind == "gpu" and (kernels == "liger" or (kernels == "auto" and is_there))


def saved_per_token(recipe: Recipe, config: DecoderConfig, size: int) -> float:
    """Estimates the bytes per token that a decoder block keeps for the backward pass.

    size: bytes of a number in the model's arithmetic.
    """
    hidden, query, inner, rank = SAVED[size]
    return (
        hidden * config.hidden_size
        + query * config.num_attention_heads * head_dim(config)
        + inner * config.intermediate_size
        + rank * recipe.lora.rank
    )


def optimizer_bytes(name: str) -> int:
    """Returns the bytes per trained weight: Adam's two moments in float32 or in eight bits."""
    return 2 if "8bit" in name else 0 if name == "sgd" else 8
