"""quantized/ -> GGUF for llama.cpp: the same codes in blocks of 32, scales in half precision.

4 bits go into Q4_0, 5 to 8 into Q8_0 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md),
the embedding into F16, norms into F32.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from finequant.finetune.architecture import (
    EMBEDDING,
    HEAD,
    architecture,
    head_dim,
    parameter_count,
    usable_positions,
)
from finequant.quantize.checkpoint.stored import QuantizedCheckpoint
from finequant.quantize.formats.contents import Contents, check_block
from finequant.quantize.formats.format import Format, to_install
from finequant.quantize.formats.gguf_layout import (
    BLOCK,
    ROPE_FACTORS,
    blocks,
    gguf_name,
    permuted,
    rope_factors,
    tensor_names,
)
from finequant.quantize.formats.gguf_reading import (
    LlamaCpp,
    file_in,
    last_logits,
    read_back,
    token_ids,
)
from finequant.quantize.formats.gguf_tokenizer import add_tokenizer, pre_tokenizer
from finequant.quantize.formats.naming import file_stem, metadata
from finequant.quantize.formats.ollama import modelfile
from finequant.quantize.formats.packing import check_half
from finequant.quantize.formats.sampling import sampling
from finequant.quantize.formats.snippet import fenced, is_chat
from finequant.quantize.logits import check_prompts
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Recipe
from finequant.recipes.usage import available_memory

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

    from finequant.finetune.architecture import DecoderConfig

RUNTIME = {"llama_cpp": "llama-cpp-python"}

READ_BYTES = 6.5
"""Bytes of memory per weight when transformers 5.23 reads a file back: it makes float32 weights,
and copies of them (6.0 were measured at 1.2 billion weights, without mapped files)."""

MAPPED_BYTES = 3.0
"""The same when llama.cpp, which maps the file, reads it back: assumed, not measured."""


def check_fits(contents: Contents) -> None:
    """Refuses what the format cannot hold.

    Raises:
        UserError: for group sizes that are not multiples of 32, for blocks that llama.cpp does not
            compute, for tokenizers that have no name in GGUF, and for rotary scalings that
            `write` does not know.
    """
    check_block("gguf", "llama.cpp", contents.config)
    if uneven := sorted(size for size in set(contents.group_sizes.values()) if size % BLOCK):
        raise UserError(
            f"gguf: groups of {', '.join(map(str, uneven))} weights do not fit into its blocks of "
            f"{BLOCK}: set quantize.group_size={BLOCK}, or a multiple"
        )
    pre_tokenizer(contents.tokenizer)
    if (kind := contents.config.rope_parameters["rope_type"]) not in ("default", "llama3"):
        raise UserError(
            f"gguf: this export does not write the rotary scaling {kind!r}, only llama3's: remove "
            "gguf from quantize.exports"
        )


def write(stored: QuantizedCheckpoint, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Writes the file; returns figures for the manifest.

    Raises:
        UserError: for a scale or a weight beyond half precision, or too little memory to read the
            file back.
    """
    from gguf import GGUFType, GGUFWriter
    from transformers import AutoTokenizer

    _check_memory(stored.config)
    check_half("gguf", stored.stored_as_half)
    kind = file_type(stored)
    path = folder / f"{file_stem(recipe, stored.config, kind)}.gguf"
    writer = GGUFWriter(path, architecture(stored.config).gguf)
    writer.add_type(GGUFType.MODEL)
    metadata(recipe, stored.config).set_gguf_meta_model(writer)
    _add_config(writer, stored.config, kind)
    picks = sampling(stored.generation)
    _add_sampling(writer, picks)
    tokenizer, ends = AutoTokenizer.from_pretrained(stored.folder), stored.end_tokens
    first = {ids[0] for ids in check_prompts(recipe, tokenizer)}
    adds_bos = add_tokenizer(writer, stored, rows_have_bos=tokenizer.bos_token_id in first)
    rounded = [*_rounded_tensors(stored)]
    tensors = [*rounded, *_float_tensors(stored)]
    for tensor in tensors:
        shape = tensor.byte_shape
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.uint8), math.prod(shape), tensor.kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:  # one in memory at a time
        writer.write_tensor_data(tensor.array())
    writer.close()
    shutil.copy2(stored.folder / "quantization.json", folder)
    text = modelfile(path.name, tokenizer, recipe.data.system, ends, picks, adds_bos)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    weights = sum(math.prod(tensor.shape) for tensor in rounded)
    size = sum(math.prod(tensor.byte_shape) for tensor in rounded)
    return {"bits_per_rounded_weight": 8 * size / weights}


def _add_sampling(writer: Any, settings: dict[str, float]) -> None:
    """Adds the settings with which llama.cpp picks tokens if the user gives no others."""
    add = {
        "temperature": writer.add_sampling_temp,
        "top_k": writer.add_sampling_top_k,
        "top_p": writer.add_sampling_top_p,
        "min_p": writer.add_sampling_min_p,
        "repeat_penalty": writer.add_sampling_penalty_repeat,
        "repeat_last_n": writer.add_sampling_penalty_last_n,
    }
    for name, value in settings.items():
        add[name](value)


def file_type(stored: QuantizedCheckpoint) -> str:
    """Returns the type of most weights of the linear layers: Q4_0 or Q8_0."""
    sizes = Counter[str]()
    for name, (codes, _) in stored.rounded.items():
        if name not in (HEAD, EMBEDDING):
            sizes["Q4_0" if stored.bits[name] <= 4 else "Q8_0"] += codes.numel()
    return max(sizes, key=sizes.__getitem__, default="Q8_0")


class _Tensor(NamedTuple):
    """A tensor of the file, which is computed when it is written."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    array: Callable[[], np.ndarray]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Returns the shape in which each row is counted in bytes."""
        from gguf.quants import quant_shape_to_byte_shape

        return quant_shape_to_byte_shape(self.shape, self.kind)


def _rounded_tensors(stored: QuantizedCheckpoint) -> Iterator[_Tensor]:
    from gguf import GGMLQuantizationType

    names = tensor_names(stored.config)
    for name, layer in stored.unshared.items():  # without output.weight, token_embd is the head
        kind = GGMLQuantizationType.Q4_0 if stored.bits[name] <= 4 else GGMLQuantizationType.Q8_0
        array = partial(_rounded_array, stored, name)
        yield _Tensor(gguf_name(names, f"{name}.weight"), kind, layer.codes.shape, array)


def _rounded_array(stored: QuantizedCheckpoint, name: str) -> np.ndarray:
    codes, scale = stored.rounded[name]
    repeated = scale.repeat_interleave(stored.group_size(name) // BLOCK, dim=1)
    codes, repeated = (permuted(part, name, stored.config) for part in (codes, repeated))
    return blocks(codes, repeated, stored.bits[name] <= 4)


def _float_tensors(stored: QuantizedCheckpoint) -> Iterator[_Tensor]:
    from gguf import GGMLQuantizationType

    names, config = tensor_names(stored.config), stored.config
    for name, tensor in stored.floats.items():
        kind = GGMLQuantizationType.F16 if tensor.dim() == 2 else GGMLQuantizationType.F32
        array = partial(_float_array, stored, name)
        yield _Tensor(gguf_name(names, name), kind, tensor.shape, array)
    if config.rope_parameters["rope_type"] == "llama3":
        factors = rope_factors(config)
        yield _Tensor(ROPE_FACTORS, GGMLQuantizationType.F32, factors.shape, lambda: factors)


def _float_array(stored: QuantizedCheckpoint, name: str) -> np.ndarray:
    tensor = stored.floats[name]
    dtype = np.float16 if tensor.dim() == 2 else np.float32
    return permuted(tensor, name, stored.config).float().numpy().astype(dtype)


def _add_config(writer: GGUFWriter, config: DecoderConfig, kind: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(usable_positions(config))  # llama.cpp knows no window here
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _check_memory(config: DecoderConfig) -> None:
    """Refuses to write a file that could not be read back here without running out of memory."""
    needed, room = READ_BYTES * parameter_count(config), available_memory()
    if needed > room and (missing := to_install(RUNTIME)):
        raise UserError(
            f"gguf: to read the file back and check it, transformers takes about "
            f"{needed / 1e9:.1f} GB of memory, and {room / 1e9:.1f} GB are available; llama.cpp "
            f"takes no more than the file's size: `{missing}`, and export again"
        )


def snippet(repository: str, chat: str, files: list[str]) -> str:
    """Writes how to load the export with llama.cpp."""
    file = next(name for name in files if name.endswith(".gguf"))
    ask = """\
answer = model.create_chat_completion(messages, max_tokens=64, temperature=0)
print(answer["choices"][0]["message"]["content"])"""
    if not is_chat(chat):
        ask = """\
answer = model(prompt, max_tokens=64, temperature=0)
print(answer["choices"][0]["text"])"""
    code = f"""\
from llama_cpp import Llama

model = Llama.from_pretrained(
    "{repository}",
    filename="{file}",
    n_ctx=4096,  # tokens of prompt and answer; 512 if not set
    verbose=False,
)
{chat}
{ask}"""
    ollama = fenced(
        "bash",
        f'hf download {repository} --include "gguf/*" --local-dir model\n'
        f"ollama create {repository.split('/')[-1].lower()} -f model/gguf/Modelfile",
    )
    return (
        '### llama.cpp\n\n`pip install "llama-cpp-python>=0.3"`\n\n'
        f"{fenced('python', code)}\n\n"
        f"With Ollama, from the `Modelfile` beside the file:\n\n{ollama}"
    )


FORMAT = Format(
    name="gguf",
    report_key="gguf",
    packages={"gguf": "gguf"},
    check_fits=check_fits,
    write=write,
    read_back=read_back,
    activations="int8 in blocks of 32",
    snippet=snippet,
    ignores_penalty="llama-cpp-python",
    bytes_per_weight=READ_BYTES if to_install(RUNTIME) else MAPPED_BYTES,
    weights="*.gguf",
    token_ids=token_ids,
    runtime=lambda folder, context: LlamaCpp(file_in(folder), context),
    runtime_packages=RUNTIME,
    last_logits=last_logits,
)
