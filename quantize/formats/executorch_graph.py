"""The quantized decoder as ExecuTorch exports it: its operators have kernels in XNNPACK, or are
ExecuTorch's own for attention and cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from finequant.finetune.architecture import EMBEDDING, HEAD, head_dim, rotary_embedding
from finequant.quantize.checkpoint.stored import QuantizedCheckpoint

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig


class Decoder(nn.Module):
    """The quantized decoder to export, in float32 with a static cache.

    transformers' own wrapper cannot be exported (torch 2.13: duplicate buffers), and would leave
    attention and cache updates to portable kernels.
    """

    def __init__(self, stored: QuantizedCheckpoint, length: int) -> None:
        super().__init__()
        self.embed = Embedding(stored)
        self.layers = nn.ModuleList(
            Block(stored, number, length) for number in range(stored.config.num_hidden_layers)
        )
        self.norm = _norm(stored, "model.norm")
        self.head = _linear(stored, HEAD)
        for name, table in zip(("cos", "sin"), rotations(stored.config, length), strict=True):
            self.register_buffer(name, table)

    def forward(self, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Computes logits [1, vocabulary] after the last of `tokens` [1, n], whose first is at
        position `start` [1]."""
        count, position = tokens.shape[1], start[0].item()
        torch._check(position >= 0)
        torch._check(position + count <= len(self.cos))
        cos, sin = (
            table.narrow(0, position, count)[None, :, None] for table in (self.cos, self.sin)
        )
        states = self.embed(tokens)
        for layer in self.layers:
            states = layer(states, cos, sin, position)
        return self.head(self.norm(states[:, -1]))


class Block(nn.Module):
    def __init__(self, stored: QuantizedCheckpoint, number: int, length: int) -> None:
        super().__init__()
        config, name = stored.config, f"model.layers.{number}"
        self.size, self.rotate = head_dim(config), Rotation(head_dim(config))
        self.norm_1 = _norm(stored, f"{name}.input_layernorm")
        self.norm_2 = _norm(stored, f"{name}.post_attention_layernorm")
        self.q, self.k, self.v, self.o = (
            _linear(stored, f"{name}.self_attn.{part}_proj") for part in "qkvo"
        )
        self.gate, self.up, self.down = (
            _linear(stored, f"{name}.mlp.{part}_proj") for part in ("gate", "up", "down")
        )
        shape = (1, length, config.num_key_value_heads, head_dim(config))
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(
        self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: int
    ) -> torch.Tensor:
        states = states + self.attend(self.norm_1(states), cos, sin, position)
        inputs = self.norm_2(states)
        return states + self.down(nn.functional.silu(self.gate(inputs)) * self.up(inputs))

    def attend(
        self, inputs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: int
    ) -> torch.Tensor:
        query, key, value = (
            linear(inputs).unflatten(-1, (-1, self.size)) for linear in (self.q, self.k, self.v)
        )
        torch.ops.llama.update_cache(self.rotate(key, cos, sin), self.keys, position)
        torch.ops.llama.update_cache(value, self.values, position)
        query = self.rotate(query, cos, sin)
        attended = torch.ops.llama.custom_sdpa(
            query, self.keys, self.values, position, None, 0.0, True
        )
        return self.o(attended.flatten(2))


class Norm(nn.Module):
    """RMSNorm that computes its mean as a matrix product, because XNNPACK has no mean over the last
    dimension: a block then has two delegates, not ten, and export takes minutes less."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("mean", torch.full((1, len(weight)), 1 / len(weight)))
        self.register_buffer("epsilon", torch.tensor([epsilon]))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        power = nn.functional.linear(states * states, self.mean) + self.epsilon
        return states * torch.rsqrt(power) * self.weight


class Rotation(nn.Module):
    """Applies rotary positions as transformers does, to pairs from the two halves of a head. The
    halves are exchanged by a matrix product, too, so that XNNPACK does it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        half = torch.eye(size // 2)
        zero = torch.zeros_like(half)
        self.register_buffer(
            "exchange", torch.cat([torch.cat([zero, -half], 1), torch.cat([half, zero], 1)])
        )

    def forward(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return heads * cos + nn.functional.linear(heads, self.exchange) * sin


class IntegerLinear(nn.Module):
    """A linear layer on codes, with inputs rounded to int8; XNNPACK holds scales in bfloat16."""

    def __init__(self, stored: QuantizedCheckpoint, name: str) -> None:
        super().__init__()
        codes, scale = stored.rounded[name]
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.to(torch.bfloat16).float())
        self.register_buffer("zero", torch.zeros_like(scale, dtype=torch.int8))
        bias = stored.floats.get(f"{name}.bias")
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.finequant.integer_linear(
            inputs, self.codes, self.scale, self.zero, self.bias
        )


torch.library.define(
    "finequant::integer_linear",
    "(Tensor inputs, Tensor codes, Tensor scale, Tensor zero, Tensor? bias=None) -> Tensor",
)


@torch.library.register_fake("finequant::integer_linear")
def _output_of(
    inputs: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns an empty output, for tracing; lowering replaces the operator by torchao's."""
    return inputs.new_empty(*inputs.shape[:-1], codes.shape[0])


class Embedding(nn.Module):
    """The embedding as it is stored: in the model's dtype, or int8 codes with their scales."""

    def __init__(self, stored: QuantizedCheckpoint) -> None:
        super().__init__()
        if EMBEDDING in stored.rounded:
            codes, scale = stored.rounded[EMBEDDING]
            self.register_buffer("scale", scale)
        else:
            codes, self.scale = stored.floats[f"{EMBEDDING}.weight"], None
        self.register_buffer("table", codes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.table.index_select(0, tokens[0]).float()
        if self.scale is not None:
            scale = self.scale.index_select(0, tokens[0]).float()
            rows = (rows.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
        return rows[None]


def rotations(config: DecoderConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes cosine and sine [length, head_dim] of every position."""
    cos, sin = rotary_embedding(config)(torch.zeros(1), torch.arange(length)[None])
    return cos[0], sin[0]


def _norm(stored: QuantizedCheckpoint, name: str) -> Norm:
    return Norm(stored.floats[f"{name}.weight"].float(), stored.config.rms_norm_eps)


def _linear(stored: QuantizedCheckpoint, name: str) -> nn.Module:
    """Makes a linear layer from the stored codes, or from weights that stayed in float."""
    if name in stored.rounded:
        return IntegerLinear(stored, name)
    weight, bias = _float(stored, name), stored.floats.get(f"{name}.bias")
    with torch.device("meta"):
        linear = nn.Linear(*reversed(weight.shape), bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    return linear


def _float(stored: QuantizedCheckpoint, name: str) -> torch.Tensor:
    tied = stored.floats.get(f"{EMBEDDING}.weight")  # then the head is not stored
    return stored.floats.get(f"{name}.weight", tied).float()
