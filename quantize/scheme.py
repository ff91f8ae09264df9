"""What is quantized to what: bits, group size, head; which sizes divide; torchao's words for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finequant.recipes.errors import UserError
from finequant.recipes.schema import Quantize

if TYPE_CHECKING:
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

SMALLEST_GROUP, LARGEST_GROUP = 32, 256


def linear_shapes(config: LlamaConfig, head: str) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every layer to quantize, by its name in a decoder block."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (heads * size, hidden),
        "self_attn.k_proj": (groups * size, hidden),
        "self_attn.v_proj": (groups * size, hidden),
        "self_attn.o_proj": (hidden, heads * size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return shapes | ({"lm_head": (config.vocab_size, hidden)} if head == "quantize" else {})


def check_group_size(quantize: Quantize, config: LlamaConfig) -> None:
    """Refuses a group size that leaves a remainder in some layer, before any weight is loaded.

    Raises:
        UserError: naming the layers and the group sizes that would do.
    """
    shapes = linear_shapes(config, quantize.head)
    size = quantize.group_size
    uneven = [f"{name} ({width})" for name, (_, width) in shapes.items() if width % size]
    if not uneven:
        return
    fitting = [
        str(candidate)
        for candidate in range(SMALLEST_GROUP, LARGEST_GROUP + 1)
        if all(width % candidate == 0 for _, width in shapes.values())
    ]
    raise UserError(
        f"quantize.group_size: {size} does not divide the input features of {', '.join(uneven)}; "
        f"group sizes that do: {', '.join(fitting) or 'none from 32 to 256'}"
    )


def torchao_config(quantize: Quantize) -> Int8DynamicActivationIntxWeightConfig:
    """The recipe's scheme for one layer: intN groupwise weights, int8 dynamic activations."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{quantize.bits}"),
        weight_granularity=PerGroup(quantize.group_size),
        weight_scale_dtype=getattr(torch, quantize.scale_dtype),
    )


def quantization_config(quantize: Quantize) -> TorchAoConfig:
    """The scheme for a whole model, as `from_pretrained` takes it.

    An empty `modules_to_not_convert` is what makes transformers quantize the head as well.
    """
    from transformers import TorchAoConfig

    kept = [] if quantize.head == "quantize" else ["lm_head"]
    return TorchAoConfig(torchao_config(quantize), modules_to_not_convert=kept)


def untie_head(model: LlamaForCausalLM) -> None:
    """Gives a tied head weights of its own.

    By hand: torchao quantizes a tied embedding to a crash, and transformers' own key for this
    reloads a random head (seen with torchao 0.18, transformers 5.23).
    """
    import torch

    if model.config.tie_word_embeddings:
        head = model.model.embed_tokens.weight.detach().clone()
        model.lm_head.weight = torch.nn.Parameter(head)
        model.config.tie_word_embeddings = False


def shipped_dtype(quantize: Quantize, config: LlamaConfig) -> torch.dtype:
    """The dtype of embedding, norms and arithmetic of all three models that are compared."""
    import torch

    from finequant.finetune.model import stored_dtype

    return stored_dtype(config) if quantize.dtype == "auto" else getattr(torch, quantize.dtype)


def cast_weights(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model, its weights in `dtype`, in place.

    `model.to(dtype)` would also round the rotary frequencies, which `from_pretrained` does not.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def parameter_count(config: LlamaConfig) -> int:
    """Weights of the float model; a tied head counts once.

    Llama-2-13B: 13,015,864,320.
    """
    block = sum(rows * columns for rows, columns in linear_shapes(config, "float").values())
    table = config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return (
        config.num_hidden_layers * block + norms + table * (1 if config.tie_word_embeddings else 2)
    )
