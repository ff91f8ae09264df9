"""Describes a decoder: most facts come from a model without weights, the rest from a table.

A new architecture needs an entry here and a base in BASES of tests/architectures.py.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from finequant.recipes.errors import UserError
from finequant.recipes.schema import Calibration, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    DecoderConfig = LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config
    Decoder = LlamaForCausalLM | MistralForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM

HEAD, EMBEDDING, NORM = "lm_head", "model.embed_tokens", "model.norm"

BLOCK_LAYERS = r"model\.layers\..*_proj"
"""Matches the names of all linear layers inside blocks, and no others."""


@dataclass(frozen=True)
class Architecture:
    """Facts that a model without weights does not show."""

    gguf: str
    """llama.cpp's name for it."""

    gguf_rotates_neighbors: bool = False
    """Whether llama.cpp's rotary positions pair neighboring rows of q and k heads, not halves."""

    rotary: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj")
    """Layers of a block whose rows, head by head, get rotary positions."""

    values: tuple[str, str] = ("self_attn.v_proj", "self_attn.o_proj")
    """The layer whose rows compute the heads' values, and the layer whose columns read them; only a
    weighted mean over tokens lies between the two."""


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", gguf_rotates_neighbors=True),
    "MistralForCausalLM": Architecture("llama", gguf_rotates_neighbors=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
}
"""Each block has two RMS norms, before attention and MLP, whose weights are factors."""


def architecture_name(config: DecoderConfig) -> str:
    """Returns the model class that a configuration is for, such as LlamaForCausalLM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    usual = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    return (config.architectures or [usual])[0]


def architecture(config: DecoderConfig) -> Architecture:
    """Returns the table's entry for a base that `check_architecture` accepts."""
    return ARCHITECTURES[architecture_name(config)]


def check_architecture(config: DecoderConfig, base: str) -> None:
    """Refuses a base whose architecture has no entry.

    Raises:
        UserError: naming the known architectures, and what a new one needs.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name, usual = architecture_name(config), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if name not in ARCHITECTURES or usual.get(config.model_type) != name:
        raise UserError(
            f"model.base: {base} is a {name} ({config.model_type}); finequant takes "
            f"{', '.join(ARCHITECTURES)}: any other needs an entry in finetune/architecture.py"
        )


def check_positions(recipe: Recipe, config: DecoderConfig) -> None:
    """Refuses rows longer than the sliding window, because blocks run with full attention, and
    sequences for calibration that are longer than this or the base's positions.

    Raises:
        UserError: naming both lengths.
    """
    window, quantize = getattr(config, "sliding_window", None), recipe.quantize
    positions, lengths = config.max_position_embeddings, {"data.max_length": recipe.data.max_length}
    if quantize.reads_calibration_text or quantize.budget:
        key, length = "quantize.calibration.length", sequence_length(quantize.calibration, config)
        lengths[key] = length
        if length > positions:
            raise UserError(
                f"{key}: {length} tokens are more than the {positions} positions of "
                f"{recipe.model.base}: set {key}={positions} or less"
            )
    for key, length in lengths.items():
        if window is not None and length > window:
            raise UserError(
                f"{key}: {length} tokens are more than the sliding window of {recipe.model.base}, "
                f"which only attends to the last {window}: set {key}={window} or less"
            )


def sequence_length(calibration: Calibration, config: DecoderConfig) -> int:
    """Returns the tokens of a sequence for calibration. The recipe's default is lowered to what the
    base attends to; any other length is returned as it is."""
    if calibration.length == type(calibration)().length:
        return min(calibration.length, usable_positions(config))
    return calibration.length


def trained_positions(config: DecoderConfig) -> int:
    """Returns the length of the longest row to train on: the base's positions, times the factor of
    linear or dynamic scaling, before which these configurations may state them."""
    rotary = config.rope_parameters
    factor = rotary.get("factor", 1) if rotary["rope_type"] in ("linear", "dynamic") else 1
    return int(config.max_position_embeddings * factor)


def usable_positions(config: DecoderConfig) -> int:
    """Returns how many tokens a model attends to: its positions, or a smaller sliding window."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def table_positions(config: DecoderConfig) -> int:
    """Returns how many positions one table of rotations serves: all usable ones, except that
    LongRoPE rotates texts beyond its original positions by other angles, from their start on."""
    positions, rotary = usable_positions(config), config.rope_parameters
    if rotary["rope_type"] == "longrope":
        return min(positions, rotary["original_max_position_embeddings"])
    return positions


def skeleton(config: DecoderConfig, blocks: int | None = None) -> Decoder:
    """Makes the model without memory for its weights.

    blocks: keep only this many decoder blocks, the first ones.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = causal_without_mask(config)
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def causal_without_mask(config: DecoderConfig) -> DecoderConfig:
    """Returns a copy of the configuration with which a block is causal even without a mask.

    AutoConfig leaves the attention implementation open. A block by itself then runs "eager", which
    without a mask lets each token see later ones.
    """
    config = deepcopy(config)
    config._attn_implementation = "sdpa"
    return config


class SharedInput(NamedTuple):
    """Linear layers of a block that get the same tensor."""

    layers: tuple[str, ...]
    norm: str | None
    """The norm that computes this tensor; None if another part of the block does."""


class Anatomy(NamedTuple):
    """The structure of a decoder, read from a model with a single block and no weights."""

    model: Decoder
    inputs: tuple[SharedInput, ...]
    """All inputs of linear layers, in the order in which a block computes them."""

    @property
    def block(self) -> torch.nn.Module:
        return self.model.model.layers[0]


_ANATOMIES: dict[str, Anatomy] = {}


def anatomy(config: DecoderConfig) -> Anatomy:
    """Returns the structure of a model with this configuration, which is built only once."""
    key = config.to_json_string(use_diff=False)
    if key not in _ANATOMIES:
        model = skeleton(config, 1)
        _ANATOMIES[key] = Anatomy(model, tuple(_shared_inputs(model)))
    return _ANATOMIES[key]


def rotary_embedding(config: DecoderConfig) -> torch.nn.Module:
    """Makes the module that computes cosines and sines of positions, which no file contains."""
    return type(anatomy(config).model.model.rotary_emb)(config)


def _shared_inputs(model: Decoder) -> list[SharedInput]:
    """Runs a block without weights, and groups its linear layers by the tensor that they read."""
    import torch

    block, received, returned = model.model.layers[0], {}, []

    def keep(name: str, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear):
            received[name] = inputs[0]
        elif getattr(module, "weight", None) is not None:
            returned.append((name, output))

    hooks = [
        module.register_forward_hook(lambda *seen, name=name: keep(name, *seen))
        for name, module in block.named_modules()
    ]
    hidden = torch.empty(1, 2, model.config.hidden_size, device="meta", dtype=model.dtype)
    # Not from the model's rotary embedding: dynamic frequencies depend on values of the positions.
    rotary = torch.empty(1, 2, head_dim(model.config), device="meta", dtype=model.dtype)
    block(hidden, position_embeddings=(rotary, rotary))
    for hook in hooks:
        hook.remove()
    groups: list[tuple[torch.Tensor, list[str]]] = []
    for name, tensor in received.items():
        same = [names for first, names in groups if first is tensor]
        if same:
            same[0].append(name)
        else:
            groups.append((tensor, [name]))
    return [
        SharedInput(tuple(names), next((n for n, output in returned if output is tensor), None))
        for tensor, names in groups
    ]


def block_layers(config: DecoderConfig) -> list[str]:
    """Lists the linear layers of a block; layers that share an input stand together."""
    return [name for shared in anatomy(config).inputs for name in shared.layers]


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Returns (out_features, in_features) by name for the layers of all blocks, head, embedding."""
    import torch

    decoder = anatomy(config)
    block = {
        name: tuple(module.weight.shape)
        for name, module in decoder.block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    shapes = {
        f"model.layers.{number}.{name}": shape
        for number in range(config.num_hidden_layers)
        for name, shape in block.items()
    }
    table = tuple(decoder.model.get_submodule(EMBEDDING).weight.shape)
    return shapes | {HEAD: table, EMBEDDING: table}


def head_dim(config: DecoderConfig) -> int:
    """Returns the number of rows of a head in q, k and v."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def parameter_count(config: DecoderConfig) -> int:
    """Counts the weights of the float model; a tied head counts once.

    Llama-2-13B has 13,015,864,320.
    """
    shapes = layer_shapes(config)
    if config.tie_word_embeddings:
        del shapes[HEAD]
    weights = sum(rows * columns for rows, columns in shapes.values())
    return weights + norm_count(config) + bias_count(config)


def bias_count(config: DecoderConfig) -> int:
    """Counts the biases of linear layers, which always stay in float."""
    parameters = anatomy(config).block.named_parameters()
    biases = sum(bias.numel() for name, bias in parameters if name.endswith(".bias"))
    return config.num_hidden_layers * biases


def norm_count(config: DecoderConfig) -> int:
    """Counts the weights of norms, which always stay in float."""
    decoder = anatomy(config)
    parameters = decoder.block.named_parameters()
    norms = sum(weight.numel() for name, weight in parameters if "norm" in name.split(".")[-2])
    return config.num_hidden_layers * norms + decoder.model.get_parameter(f"{NORM}.weight").numel()


def norm_names(config: DecoderConfig) -> list[str]:
    """Lists the norms of a block whose output no linear layer reads directly, such as q_norm."""
    decoder = anatomy(config)
    read = {shared.norm for shared in decoder.inputs}
    names = [name.removesuffix(".weight") for name, _ in decoder.block.named_parameters()]
    return [name for name in names if "norm" in name.split(".")[-1] and name not in read]
