"""Terms that the estimates of all stages share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from finequant.finetune.architecture import EMBEDDING, HEAD, bias_count, layer_shapes, norm_count
from finequant.quantize.scheme import shipped_dtype
from finequant.quantize.size.machine import Machine
from finequant.recipes.schema import Lora, Recipe

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig

Memory = dict[str, int]
"""Bytes at the peak of a stage, by purpose."""


class Lengths(NamedTuple):
    """Numbers of tokens that decide how much memory activations take."""

    training: list[int]
    """Tokens of each training row."""
    scored: int
    """Tokens of the longest sequence whose likelihood is measured."""
    prompt: int
    """Tokens of the longest held-out prompt."""
    compared: int | None = None
    """Scored tokens of all texts and rows, where these were read: no model is compared on more."""


MB = 10**6
PROCESS = {
    "train": 600 * MB,
    "qat": 600 * MB,
    "quantize": 600 * MB,
    "evaluate": 650 * MB,
    "export": 600 * MB,
}
"""Bytes of Python with a stage's libraries: torch, transformers, and trl, torchao, lm-eval or those
of a format."""

CUDA_CONTEXT = 500 * MB

ALLOCATED = {"cpu": 1.9, "gpu": 1.1}
"""Ratio of resident to live bytes for short-lived tensors. glibc keeps the memory that a batch
frees, and a batch of another length does not fit into it: 1.9 after 250 steps of assistant.yaml."""


def longest(recipe: Recipe) -> Lengths:
    """Returns the lengths that the recipe allows, if its rows have not been read."""
    limit = recipe.data.max_length
    windows = [corpus.max_length for corpus in recipe.evaluate.perplexity]
    return Lengths([limit] * recipe.train.micro_batch_size, max([*windows, limit]), limit)


def components(config: DecoderConfig) -> dict[str, int]:
    """Counts the weights by part of the model; the sum is `parameter_count`."""
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
    """Counts the weights of the adapter."""
    return sum(
        lora.rank * (rows + columns) + (rows if lora.use_dora else 0)
        for name, (rows, columns) in layer_shapes(config).items()
        if name not in (HEAD, EMBEDDING) and lora.targets(name)
    )


def block_sizes(config: DecoderConfig) -> list[int]:
    """Lists the numbers of weights of a block's layers."""
    shapes = layer_shapes(config)
    return [math.prod(shape) for name, shape in shapes.items() if ".layers.0." in name]


def arithmetic_bytes(recipe: Recipe, config: DecoderConfig, machine: Machine) -> int:
    """Returns the bytes of a number in the shipped model's arithmetic, which is float32 where
    bfloat16 is emulated."""
    shipped = shipped_dtype(recipe.quantize, config)
    emulated = shipped == torch.bfloat16 and machine.training_dtype("auto") == torch.float32
    return 4 if emulated else shipped.itemsize


def largest(*phases: Memory) -> Memory:
    """Returns the phase that takes the most memory."""
    return max(phases, key=lambda phase: sum(phase.values()))


def peak_memory(stage: str, machine: Machine, lasting: Memory, passing: Memory) -> Memory:
    """Adds the process itself, and memory that the allocator holds without using it."""
    process = CUDA_CONTEXT if machine.kind == "gpu" else PROCESS[stage]
    kept = int(sum(passing.values()) * (ALLOCATED[machine.kind] - 1))
    memory = {"process": process, **lasting, **passing, "allocator": kept}
    return {name: size for name, size in memory.items() if size}
