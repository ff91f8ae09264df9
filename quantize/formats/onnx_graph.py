"""A decoder as an ONNX graph over codes: MatMulNBits, GroupQueryAttention, its cache as inputs.

The operators are in https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
Inputs and outputs have the names that onnxruntime-genai and transformers.js look for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finequant.finetune.architecture import EMBEDDING, HEAD, head_dim, rotary_embedding
from finequant.quantize.checkpoint.stored import QuantizedCheckpoint
from finequant.quantize.formats.packing import pack_nibbles, packed_width, unpack_nibbles

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

    from finequant.finetune.architecture import DecoderConfig

MICROSOFT = "com.microsoft"
OPSET = 21
LARGEST_BLOCK = 256


def block_size(group_size: int) -> int:
    """Returns MatMulNBits' block for a group: the largest power of two that divides it."""
    return min(LARGEST_BLOCK, group_size & -group_size)


class Decoder:
    """Collects the nodes and constants of the graph."""

    def __init__(self, stored: QuantizedCheckpoint, length: int) -> None:
        """Prepares an empty graph.

        length: positions of the rotary tables.
        """
        self._stored, self._config = stored, stored.config
        self._nodes: dict[str, Any] = {}
        self._constants: dict[str, Any] = {}
        cos, sin = rotary_tables(stored.config, length)
        self._rotary = [self._constant("cos_cache", cos), self._constant("sin_cache", sin)]

    def model(self) -> ModelProto:
        """Builds the whole model: embedding, blocks, last norm, head."""
        from onnx import helper

        attention = self._attention_inputs()
        states = self._embed()
        for number in range(self._config.num_hidden_layers):
            states = self._block(number, states, attention)
        states = self._norm(states, "model.norm")
        self._linear(states, HEAD, "logits")
        inputs, outputs = self._interface()
        graph = helper.make_graph(
            list(self._nodes.values()), "llama", inputs, outputs, list(self._constants.values())
        )
        versions = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(
            graph, opset_imports=versions, ir_version=10, producer_name="finequant"
        )

    def _interface(self) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
        from onnx import TensorProto, helper

        config, integers, floats = self._config, TensorProto.INT64, TensorProto.FLOAT
        size = [config.num_key_value_heads, head_dim(config)]
        past, whole = (
            ["batch_size", size[0], "past_sequence_length", size[1]],
            ["batch_size", size[0], "total_sequence_length", size[1]],
        )
        names = [
            f"{n}.{part}" for n in range(config.num_hidden_layers) for part in ("key", "value")
        ]
        describe = helper.make_tensor_value_info
        inputs = [
            describe("input_ids", integers, ["batch_size", "sequence_length"]),
            describe("attention_mask", integers, ["batch_size", "total_sequence_length"]),
            *(describe(f"past_key_values.{name}", floats, past) for name in names),
        ]
        logits = describe("logits", floats, ["batch_size", "sequence_length", config.vocab_size])
        return inputs, [logits, *(describe(f"present.{name}", floats, whole) for name in names)]

    def _attention_inputs(self) -> list[str]:
        """Adds nodes that compute last positions and total length from the mask, for attention."""
        step = self._constant("step", np.array([1], np.int64))
        count = self._node("ReduceSum", ["attention_mask", step], "mask_sum", keepdims=0)
        last = self._node("Sub", [count, step], "last_position")
        shape = self._node("Shape", ["attention_mask"], "mask_shape")
        axis = self._constant("axis", np.array(1, np.int64))
        total = self._node("Gather", [shape, axis], "mask_length", axis=0)
        return [self._integer(last, "seqlens_k"), self._integer(total, "total_length")]

    def _integer(self, name: str, output: str) -> str:
        from onnx import TensorProto

        return self._node("Cast", [name], output, to=TensorProto.INT32)

    def _block(self, number: int, states: str, attention: list[str]) -> str:
        name, config = f"model.layers.{number}", self._config
        inputs = self._norm(states, f"{name}.input_layernorm")
        qkv = [self._linear(inputs, f"{name}.self_attn.{part}_proj") for part in "qkv"]
        cache = [f"{number}.key", f"{number}.value"]
        attended = self._node(
            "GroupQueryAttention",
            [*qkv, *(f"past_key_values.{part}" for part in cache), *attention, *self._rotary],
            f"{name}.attention",
            *(f"present.{part}" for part in cache),
            domain=MICROSOFT,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
        )
        added = self._linear(attended, f"{name}.self_attn.o_proj")
        states = self._node("Add", [states, added], f"{name}.attended")
        inputs = self._norm(states, f"{name}.post_attention_layernorm")
        gate, up = (self._linear(inputs, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
        sigmoid = self._node("Sigmoid", [gate], f"{name}.sigmoid")
        gate = self._node("Mul", [gate, sigmoid], f"{name}.silu")
        inner = self._node("Mul", [gate, up], f"{name}.inner")
        added = self._linear(inner, f"{name}.mlp.down_proj")
        return self._node("Add", [states, added], f"{name}.output")

    def _norm(self, states: str, name: str) -> str:
        weight = self._constant(f"{name}.weight", self._float(f"{name}.weight"))
        epsilon = self._config.rms_norm_eps
        # onnxruntime's own operator, in ONNX's domain; every version has it, in browsers, too.
        return self._node(
            "SimplifiedLayerNormalization", [states, weight], name, axis=-1, epsilon=epsilon
        )

    def _embed(self) -> str:
        """Gathers rows of the table: codes with their scales, or half precision."""
        if EMBEDDING not in self._stored.rounded:
            table = self._half(f"{EMBEDDING}.weight", self._float(f"{EMBEDDING}.weight"))
            rows = self._node("Gather", [table, "input_ids"], "embedding_rows")
            return self._as_float(rows, "embedding")
        name = HEAD if self._stored.shares_table else EMBEDDING
        codes, scales, block, bits = self._codes(name)
        shape = self._constant("table_shape", np.array([self._config.vocab_size, -1], np.int64))
        return self._node(
            "GatherBlockQuantized",
            [
                self._node("Reshape", [codes, shape], "table_codes"),
                "input_ids",
                self._node("Reshape", [scales, shape], "table_scales"),
            ],
            "embedding",
            domain=MICROSOFT,
            bits=bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )

    def _linear(self, inputs: str, name: str, output: str | None = None) -> str:
        bias = f"{name}.bias" if f"{name}.bias" in self._stored.floats else None
        result = f"{name}.product" if bias else output or name
        if name in self._stored.rounded:
            rows, columns = self._stored.rounded[name].codes.shape
            codes, scales, block, bits = self._codes(name)
            # Level 4: inputs are rounded to int8 in blocks, for integer products.
            self._node(
                "MatMulNBits",
                [inputs, codes, scales],
                result,
                domain=MICROSOFT,
                K=columns,
                N=rows,
                bits=bits,
                block_size=block,
                accuracy_level=4,
            )
        else:
            tied = f"{name}.weight" not in self._stored.floats
            parameter = f"{EMBEDDING if tied else name}.weight"
            weight = self._as_float(self._half(parameter, self._float(parameter)), f"{name}.float")
            weight = self._node("Transpose", [weight], f"{name}.transposed", perm=[1, 0])
            self._node("MatMul", [inputs, weight], result)
        if bias:
            self._node("Add", [result, self._constant(bias, self._float(bias))], output or name)
        return output or name

    def _codes(self, name: str) -> tuple[str, str, int, int]:
        """Adds codes and scales of a layer; returns their names, the block and the bits."""
        rounded, group = self._stored.rounded[name], self._stored.group_size(name)
        block, bits = block_size(group), packed_width(self._stored.bits[name])
        codes = packed(rounded.codes, block, bits)
        scale = rounded.scale.float().repeat_interleave(group // block, dim=1).numpy()
        scales = self._half(f"{name}.scales", scale.reshape(-1))
        return (
            self._constant(f"{name}.codes", codes),
            self._as_float(scales, f"{name}.float_scales"),
            block,
            bits,
        )

    def _float(self, name: str) -> np.ndarray:
        return self._stored.floats[name].float().numpy()

    def _half(self, name: str, values: np.ndarray) -> str:
        """Adds a constant in half precision: onnxruntime converts it once, when it loads."""
        return self._constant(name, values.astype(np.float16))

    def _as_float(self, name: str, output: str) -> str:
        from onnx import TensorProto

        return self._node("Cast", [name], output, to=TensorProto.FLOAT)

    def _constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def _node(
        self, kind: str, inputs: list[str], *outputs: str, domain: str = "", **attributes: Any
    ) -> str:
        from onnx import helper

        if outputs[0] not in self._nodes:  # a shared table is converted once
            node = helper.make_node(kind, inputs, list(outputs), outputs[0], domain=domain)
            node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
            self._nodes[outputs[0]] = node
        return outputs[0]


def packed(codes: torch.Tensor, block: int, bits: int) -> np.ndarray:
    """Packs codes into uint8 [out, blocks, bytes]: code + 8, the first of two in the low half, or
    code + 128."""
    if bits == 8:
        offset = (codes.to(torch.int16) + 128).to(torch.uint8)
        return offset.unflatten(1, (-1, block)).numpy()
    return pack_nibbles(codes).unflatten(1, (-1, block // 2)).numpy()


def unpacked(data: np.ndarray, bits: int) -> torch.Tensor:
    """Returns int8 codes [out, in] from the result of `packed`."""
    values = torch.from_numpy(data.copy()).flatten(1)
    if bits == 8:
        return (values.to(torch.int16) - 128).to(torch.int8)
    return unpack_nibbles(values)


def rotary_tables(config: DecoderConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes cosine and sine of every position, each float32 [length, head_dim / 2]."""
    tables = rotary_embedding(config)(torch.zeros(1), torch.arange(length)[None])
    cos, sin = (table[0, :, : head_dim(config) // 2].numpy() for table in tables)
    return cos, sin
