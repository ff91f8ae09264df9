"""quantized/ -> ONNX for onnxruntime, onnxruntime-genai and transformers.js: the same codes in
MatMulNBits, scales in half precision, activations in int8 blocks, and a cache that callers keep.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finequant.finetune.architecture import EMBEDDING, HEAD, head_dim, table_positions
from finequant.quantize.checkpoint.stored import QuantizedCheckpoint, copy_beside, write_config
from finequant.quantize.formats.contents import Contents, check_block, check_norms
from finequant.quantize.formats.format import Format
from finequant.quantize.formats.onnx_graph import Decoder, block_size, unpacked
from finequant.quantize.formats.packing import check_half, packed_width
from finequant.quantize.formats.sampling import sampling
from finequant.quantize.formats.snippet import fenced, is_chat
from finequant.quantize.formats.untrimmed_template import rewrite_templates
from finequant.quantize.rounding import Rounded
from finequant.recipes.artifact import files_in
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Recipe

SMALLEST_BLOCK = 16
HEAD_MULTIPLE = 16
"""onnxruntime rotates heads whose size is a multiple of this (GroupQueryAttention of 1.32)."""

SINGLE_FILE = 1_900_000_000
"""Bytes of weights up to which they are inside the model file: a protocol buffer holds 2 GB."""


def check_fits(contents: Contents) -> None:
    """Refuses what MatMulNBits cannot hold.

    Raises:
        UserError: for group sizes or heads that are not multiples of 16, or blocks that the graph
            does not compute.
    """
    check_norms("onnx", contents.config)
    check_block("onnx", "the graph of this export", contents.config)
    if (size := head_dim(contents.config)) % HEAD_MULTIPLE:
        raise UserError(
            f"onnx: heads of {size} numbers; onnxruntime's attention takes multiples of "
            f"{HEAD_MULTIPLE}: remove onnx from quantize.exports"
        )
    sizes = set(contents.group_sizes.values())
    if uneven := sorted(size for size in sizes if block_size(size) < SMALLEST_BLOCK):
        raise UserError(
            f"onnx: groups of {', '.join(map(str, uneven))} weights; its blocks are powers of two "
            f"from {SMALLEST_BLOCK}: set quantize.group_size=32, or a multiple"
        )


def write(stored: QuantizedCheckpoint, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Writes model, configurations and tokenizer; returns figures for the manifest.

    Raises:
        UserError: for a number beyond half precision.
    """
    import onnx

    check_half("onnx", stored.stored_as_half)
    length = min(recipe.quantize.cache_length, table_positions(stored.config))
    model = Decoder(stored, length).model()
    # transformers.js derives the file's suffix from its option dtype, q4 or q8.
    in_blocks = (bits for name, bits in stored.bits.items() if name not in (HEAD, EMBEDDING))
    most = max(in_blocks, default=stored.bits.get(HEAD, 8))
    file = folder / ("model_q4.onnx" if most <= 4 else "model_quantized.onnx")
    sizes = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer}
    outside = sum(sizes.values()) > SINGLE_FILE
    # Tensors outside the file are taken out of `model`, too.
    onnx.save(model, file, save_as_external_data=outside, location=f"{file.name}_data")
    if outside:  # onnx makes it for its owner only
        shutil.copymode(file, file.with_name(f"{file.name}_data"))
    copy_beside(stored, folder)
    rewrite_templates(folder)
    # Without this key, transformers.js does not download the second file.
    second = {"transformers.js_config": {"use_external_data_format": True}} if outside else {}
    write_config(stored, folder, second)
    text = json.dumps(genai_config(stored, file.name, length), indent=2) + "\n"
    (folder / "genai_config.json").write_text(text, encoding="utf-8")
    codes = {name: size for name, size in sizes.items() if name.endswith((".codes", ".scales"))}
    weights = sum(stored.rounded[name.rpartition(".")[0]].codes.numel() for name in codes) / 2
    return {"bits_per_rounded_weight": 8 * sum(codes.values()) / weights, "cache_length": length}


def genai_config(stored: QuantizedCheckpoint, file: str, length: int) -> dict[str, Any]:
    """Makes genai_config.json, by which onnxruntime-genai runs the model."""
    config = stored.config
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": file,
        "head_size": head_dim(config),
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    ends = stored.end_tokens
    first = {} if config.bos_token_id is None else {"bos_token_id": config.bos_token_id}
    padding = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
    return {
        "model": {
            "type": "llama",
            "context_length": length,
            "vocab_size": config.vocab_size,
            **first,
            "eos_token_id": ends,
            "pad_token_id": padding,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": sampling(stored.generation)["repeat_penalty"],
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def read_back(
    folder: Path, stored: QuantizedCheckpoint
) -> Iterator[tuple[str, Rounded | torch.Tensor]]:
    """Yields codes and scales, found through the nodes that use them, and float tensors."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file_in(folder)).graph
    tensors = {item.name: item for item in graph.initializer}
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            bits = next(item.i for item in node.attribute if item.name == "bits")
            layer = node.input[1].removesuffix(".codes")
            data, scale = (
                numpy_helper.to_array(tensors[name])
                for name in (node.input[1], casts[node.input[2]])
            )
            yield layer, _grouped(data, scale, bits, stored, layer)
    if EMBEDDING in stored.rounded:
        name = HEAD if f"{EMBEDDING}.codes" not in tensors else EMBEDDING
        data, scale = (
            numpy_helper.to_array(tensors[f"{name}.{part}"]) for part in ("codes", "scales")
        )
        bits = packed_width(stored.bits[EMBEDDING])
        yield EMBEDDING, _grouped(data, scale, bits, stored, EMBEDDING)
    for name in stored.floats:
        if name in tensors:
            yield name, torch.from_numpy(numpy_helper.to_array(tensors[name]).copy())


def _grouped(
    data: np.ndarray, scale: np.ndarray, bits: int, stored: QuantizedCheckpoint, layer: str
) -> Rounded:
    """Unpacks codes, and keeps one of the equal scales of each group's blocks."""
    step = stored.group_size(layer) // block_size(stored.group_size(layer))
    scales = torch.from_numpy(scale.copy()).view(len(data), -1)[:, ::step]
    return Rounded(unpacked(data, bits), scales)


def file_in(folder: Path) -> Path:
    """Returns the export's model, whose name says its type."""
    (file,) = files_in(folder, "*.onnx")
    return file


class OnnxRuntime:
    """An ONNX model in onnxruntime on the CPU, with a cache of one sequence."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            file_in(folder), options, providers=["CPUExecutionProvider"]
        )
        self._cache = {
            item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
            for item in self._session.get_inputs()
            if item.name.startswith("past_key_values")
        }

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        past = {name: cache[:, :, :start] for name, cache in self._cache.items()}
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, start + len(ids)), np.int64),
        }
        logits, *present = self._session.run(None, inputs | past)
        self._cache = dict(zip(self._cache, present, strict=True))
        return torch.from_numpy(logits[0, -1])


def snippet(repository: str, chat: str, files: list[str]) -> str:
    """Writes how to load the export in a browser or in Node, and with onnxruntime-genai."""
    file = next(name for name in files if name.endswith(".onnx"))
    dtype = "q4" if file.endswith("_q4.onnx") else "q8"
    outside = ", use_external_data_format: true" if f"{file}_data" in files else ""
    name, text, special = "messages", ".at(-1).content", ""
    if not is_chat(chat):  # by default, transformers.js leaves out the token in front of a text
        name, text, special = "prompt", "", ", add_special_tokens: true"
    script = f"""\
import {{ pipeline }} from "@huggingface/transformers";

const options = {{ dtype: "{dtype}"{outside} }};
const generator = await pipeline("text-generation", "{repository}", options);
const {chat};
const output = await generator({name}, {{ max_new_tokens: 64, do_sample: false{special} }});
console.log(output[0].generated_text{text});"""
    return (
        "### ONNX\n\nIn a browser or in Node, with transformers.js: `npm install "
        f"@huggingface/transformers@4`\n\n{fenced('javascript', script)}\n\n"
        "`onnx/genai_config.json` is for onnxruntime-genai: "
        f'`hf download {repository} --include "onnx/*" --local-dir model`'
    )


FORMAT = Format(
    name="onnx",
    report_key="onnx",
    packages={"onnx": "'finequant[onnx]'", "onnxruntime": "'finequant[onnx]'"},
    check_fits=check_fits,
    write=write,
    read_back=read_back,
    snippet=snippet,
    bytes_per_weight=4.5,
    weights="*.onnx*",
    runtime=lambda folder, context: OnnxRuntime(folder),
    runtime_packages={"onnxruntime": "'finequant[onnx]'"},
    activations="int8 in blocks",
)
