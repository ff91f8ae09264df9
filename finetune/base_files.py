"""Reads facts from a base's safetensors files, which config.json may contradict.

transformers loads what is in the files: a separate head stays separate although config.json says
`tie_word_embeddings`. And weights have the dtype of the files, whatever config.json says.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finequant.finetune.gguf_base import dequantized
from finequant.recipes.base import locate_base
from finequant.recipes.schema import Model

if TYPE_CHECKING:
    import torch

    from finequant.finetune.architecture import DecoderConfig

TABLES = ("lm_head.weight", "embed_tokens.weight")
"""The ends of the names of head and embedding."""

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ROWS = 4096
"""Rows of a tensor that are read at a time."""


def weight_files(model: Model) -> list[Path]:
    """Lists the safetensors files of a base, in its folder or a cache; [] if there are none."""
    whole = _cached(model, "model.safetensors")
    if whole:
        return [whole]
    files = [_cached(model, name) for name in _indexed(model)]
    return files if all(files) else []


def missing_files(model: Model) -> list[str]:
    """Lists the safetensors files that a local base lacks, although its index names them; of a base
    without index, model.safetensors. A base on the Hub lacks none: they are downloaded later."""
    if not Path(model.base).is_absolute() or _cached(model, "model.safetensors"):
        return []
    if not _cached(model, INDEX):
        return ["model.safetensors"]
    try:
        return [name for name in _indexed(model) if not _cached(model, name)]
    except (ValueError, KeyError, AttributeError):  # damaged: `load_base` reports it
        return []


def _indexed(model: Model) -> list[str]:
    """Lists the safetensors files that a base's index names; [] without an index."""
    index = _cached(model, INDEX)
    if not index:
        return []
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted(set(weight_map.values()))


def _cached(model: Model, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    folder, file = locate_base(model)
    if file:
        folder = dequantized(model)
    if folder:
        return folder / name if (folder / name).exists() else None
    path = try_to_load_from_cache(model.base, name, revision=model.revision or "main")
    return Path(path) if isinstance(path, str) else None


def stored_weights(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the float tensors of a base's files by name, in their dtype, some rows at a time.

    Each tensor is mapped separately: what was read of a mapping stays resident until it is closed.
    """
    for stamp in _stamps(weight_files(model)):
        for name in list(_tensors((stamp,))):
            tensor = _tensors((stamp,))[name]
            if tensor.get_dtype() in DTYPES:
                for start in range(0, tensor.get_shape()[0], ROWS):
                    yield name, tensor[start : start + ROWS]


def as_stored(config: DecoderConfig, model: Model) -> DecoderConfig:
    """Changes `dtype` and `tie_word_embeddings` of the configuration, in place, to the files' own.

    Files that are damaged or not there yet change nothing: `load_base` reports them.
    """
    from safetensors import SafetensorError

    try:
        stamps = _stamps(weight_files(model))
        config.dtype = _dtype(stamps) or config.dtype
        config.tie_word_embeddings = config.tie_word_embeddings and not _has_own_head(stamps)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError):
        pass
    return config


Stamps = tuple[tuple[Path, int, int], ...]
"""Files with their modification times, in nanoseconds, and sizes, which show changes."""


def _stamps(files: list[Path]) -> Stamps:
    return tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@functools.cache
def _dtype(files: Stamps) -> torch.dtype | None:
    """Returns the dtype of most weights; None without files."""
    import torch

    weights: Counter[str] = Counter()
    for tensor in _tensors(files).values():
        weights[tensor.get_dtype()] += math.prod(tensor.get_shape())
    floats = [kind for kind, _ in weights.most_common() if kind in DTYPES]
    return getattr(torch, DTYPES[floats[0]]) if floats else None


@functools.cache
def _has_own_head(files: Stamps) -> bool:
    """Says whether the head differs from the embedding, in which case transformers unties it."""
    tensors = _tensors(files)
    tables = [tensors[name] for name in tensors if name.endswith(TABLES)]
    if len(tables) < 2:
        return False
    first, second = tables
    if first.get_shape() != second.get_shape():
        return True
    return any(
        not first[start : start + ROWS].float().equal(second[start : start + ROWS].float())
        for start in range(0, first.get_shape()[0], ROWS)
    )


def _tensors(files: Stamps) -> dict:
    """Returns safetensors' slices by name; their data are not read yet."""
    from safetensors import safe_open

    opened = (safe_open(path, "pt") for path, *_ in files)
    return {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
