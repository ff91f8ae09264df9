"""Estimates the memory of evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from finequant.finetune.architecture import head_dim, parameter_count
from finequant.quantize.scheme import layer_plan, unties_head
from finequant.quantize.size.machine import Machine
from finequant.quantize.size.terms import (
    Lengths,
    Memory,
    arithmetic_bytes,
    block_sizes,
    components,
    peak_memory,
)
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig


def evaluation_memory(
    recipe: Recipe, config: DecoderConfig, machine: Machine, lengths: Lengths
) -> Memory:
    """Estimates the memory of evaluating the largest of the three models, or of comparing two.

    If no GPU can hold a whole model, all GPUs share one. If they cannot hold it together, the rest
    is read from disk at each use.
    """
    evaluate, dtype = recipe.evaluate, arithmetic_bytes(recipe, config, machine)
    tokens = evaluate.batch_size * lengths.scored
    kept = 2 * config.num_key_value_heads * head_dim(config) * config.num_hidden_layers * dtype
    rows = evaluate.batch_size * (lengths.prompt + evaluate.max_new_tokens)
    compared = min(evaluate.divergence_tokens, lengths.compared or evaluate.divergence_tokens)
    passing = {
        "activations": tokens * (4 * config.intermediate_size + 6 * config.hidden_size) * 4,
        # The keys and values of a step are in memory together with those of the step before.
        "key-value cache": 2 * rows * kept,
        # Log-probabilities of two models, and four arrays of 256 tokens to compute the divergence.
        "logits": (2 * compared + 4 * 256) * config.vocab_size * 4,
    }
    tables, block = evaluation_weights(recipe, config, machine)
    blocks, layer = config.num_hidden_layers, dtype * max(block_sizes(config))
    ways = {"weights": tables + blocks * block}
    if machine.gpus > 1:
        ways["weights, a share"] = tables + math.ceil(blocks / machine.gpus) * block
    ways["weights in use, the others are read each time"] = tables + 2 * layer
    for name, size in ways.items():
        memory = peak_memory("evaluate", machine, {name: size}, passing)
        if sum(memory.values()) <= machine.memory:
            break
    return memory


def evaluation_weights(recipe: Recipe, config: DecoderConfig, machine: Machine) -> tuple[int, int]:
    """Computes the bytes of embedding, head and last norm, and of a block, in evaluation.

    They are those of the quantized model: its head is its own.
    """
    dtype, parts = arithmetic_bytes(recipe, config, machine), components(config)
    tables = parts["embedding"] + parts["head"]
    if config.tie_word_embeddings and unties_head(layer_plan(recipe.quantize, config)):
        tables += parts["embedding"]
    rest = parameter_count(config) - parts["embedding"] - parts["head"]
    return dtype * tables, dtype * math.ceil(rest / config.num_hidden_layers)
