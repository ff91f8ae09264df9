"""Reads a GGUF file: codes and scales by the gguf package, logits and tokens in llama.cpp or, where
that is not installed, in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from finequant.finetune.architecture import EMBEDDING, HEAD
from finequant.quantize.checkpoint.stored import QuantizedCheckpoint
from finequant.quantize.formats.gguf_layout import (
    BLOCK,
    ROPE_FACTORS,
    gguf_name,
    restored,
    tensor_names,
)
from finequant.quantize.rounding import Rounded
from finequant.recipes.artifact import files_in

if TYPE_CHECKING:
    from gguf import GGUFReader

    from finequant.finetune.architecture import DecoderConfig


def file_in(folder: Path) -> Path:
    """Returns the export's file, which is named after the model."""
    (file,) = files_in(folder, "*.gguf")
    return file


def read_back(
    folder: Path, stored: QuantizedCheckpoint
) -> Iterator[tuple[str, Rounded | torch.Tensor]]:
    """Yields codes and scales of the file, in the rows and groups of `stored`, and other tensors.

    The gguf package decodes the values, so its reading of the layout counts, not ours.
    """
    from gguf.quants import dequantize

    names = tensor_names(stored.config)
    ours = [f"{name}.weight" for name in stored.rounded] + list(stored.floats)
    theirs = {gguf_name(names, name): name for name in ours}
    tensors = _reader(file_in(folder)).tensors
    has_head = gguf_name(names, f"{HEAD}.weight") in {tensor.name for tensor in tensors}
    for tensor in tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        name = theirs.get(tensor.name, tensor.name)
        layer = name.removesuffix(".weight")
        if tensor.tensor_type.name in ("F16", "F32"):
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            yield name, restored(values, name, stored.config)
            continue
        width = BLOCK // 2 if tensor.tensor_type.name == "Q4_0" else BLOCK
        raw = tensor.data.reshape(len(tensor.data), -1, 2 + width)
        scale = torch.from_numpy(raw[:, :, :2].copy().view(np.float16)[:, :, 0])
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        divisor = torch.where(scale == 0, 1, scale).float().repeat_interleave(BLOCK, dim=1)
        codes = (values / divisor).round().to(torch.int8)
        codes, scale = (restored(part, name, stored.config) for part in (codes, scale))
        step = stored.group_size(layer) // BLOCK if layer in stored.rounded else 1
        rounded = Rounded(codes, scale[:, ::step])
        yield layer, rounded
        if layer == EMBEDDING and HEAD in stored.rounded and not has_head:
            yield HEAD, rounded


def _reader(file: Path) -> GGUFReader:
    return _read_once(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # the reader takes seconds, because it looks at every token
def _read_once(file: Path, written: int) -> GGUFReader:
    from gguf import GGUFReader

    return GGUFReader(file)


def last_logits(folder: Path, prompts: list[list[int]]) -> torch.Tensor:
    """Computes logits [prompts, vocabulary] in transformers."""
    from transformers import AutoModelForCausalLM

    from finequant.finetune.gguf_base import parsed_once
    from finequant.quantize.logits import last_logits

    file = file_in(folder)
    with parsed_once():
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, config=_config_of(file), dtype=torch.float32
        )
    return last_logits(model.eval(), prompts)


def _config_of(file: Path) -> DecoderConfig:
    """Reads transformers' configuration from the file.

    GGUF has no key for biases, nor for Llama 3's rotary scaling: llama.cpp looks for the tensors,
    but transformers at its config. And transformers 5.24 does not read the head size of a Qwen3:
    it need not be set here once `qwen3` in integrations/ggml.py has `attention.key_length`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    reader = _reader(file)
    layers = {tensor.name: tensor for tensor in reader.tensors}
    kind = reader.fields["general.architecture"].contents()
    config.head_dim = reader.fields[f"{kind}.attention.key_length"].contents()
    config.attention_bias = "blk.0.attn_q.bias" in layers
    config.mlp_bias = "blk.0.ffn_up.bias" in layers
    if ROPE_FACTORS in layers:  # LongRoPE divides frequencies by any factors
        factors = layers[ROPE_FACTORS].data.tolist()
        config.rope_parameters |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": config.max_position_embeddings,
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
        }
    return config


def token_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """Tokenizes texts in llama.cpp if installed, or with the tokenizer that transformers reads from
    the file."""
    file = file_in(folder)
    if find_spec("llama_cpp"):
        from llama_cpp import Llama

        vocabulary = Llama(str(file), vocab_only=True, verbose=False)
        return [vocabulary.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, context: int) -> None:
        from llama_cpp import Llama, llama_get_logits_ith

        threads = torch.get_num_threads()
        self._model = Llama(
            str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._logits = llama_get_logits_ith

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        self._model.n_tokens = start  # drops later tokens from its cache
        self._model.eval(ids)
        logits = np.ctypeslib.as_array(self._logits(self._model.ctx, -1), (self._model.n_vocab(),))
        return torch.from_numpy(logits.copy())  # llama.cpp reuses its memory
