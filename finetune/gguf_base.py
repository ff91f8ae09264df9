"""Converts a GGUF base, once, into two folders that everything reads like any other base.

transformers takes a minute to read the tokens of such a file, and holds the whole model in float32
to dequantize it. So one folder keeps configuration and tokenizer, the other the dequantized float32
weights. Both are in the user's cache: `finequant/gguf` among the assets of the Hugging Face Hub's
client (HF_HOME, XDG_CACHE_HOME). It may be deleted whenever no run is active.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from finequant.recipes.artifact import content_hash
from finequant.recipes.base import base_hash, locate_base
from finequant.recipes.errors import UserError
from finequant.recipes.freshness import Inputs, cache_folder, made_once
from finequant.recipes.schema import Model
from finequant.recipes.terminal import say

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def described(model: Model) -> Path:
    """Returns the folder with the file's config.json and tokenizer, made on the first call.

    Raises:
        UserError: if the file cannot be read, or its pre-tokenizer is not known.
    """
    code = content_hash(Path(__file__).with_name("pre_tokenizers.py"))
    return _kept(model, "description", _describe, {"pre_tokenizers": code})


def dequantized(model: Model) -> Path:
    """Returns the folder with the file's float32 weights as safetensors, made on the first call.

    Raises:
        UserError: if the file cannot be read.
    """
    return _kept(model, "weights", _dequantize, {})


def is_dequantized(model: Model) -> bool:
    """Says whether the folder with the file's weights exists."""
    return _folder(model, "weights").exists()


@contextmanager
def parsed_once() -> Iterator[None]:
    """Makes transformers parse a GGUF file, and build the table of its tensors' names, only once in
    the block. By itself it builds that table for every module of a model, which takes longer than
    reading and dequantizing 135M weights (`get_gguf_hf_weights_map`, since
    https://github.com/huggingface/transformers/pull/34385). The loader that does not, of
    https://github.com/huggingface/transformers/pull/47779, knows none of the architectures that
    finequant supports (transformers 5.24): remove this function once its `GGUF_ARCHS` has them.
    """
    import gguf

    read, named = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(read), cache(named)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = read, named


def _kept(model: Model, part: str, make: Callable[[Model, Path], None], code: Inputs) -> Path:
    """Returns the folder of a part, made on the first call.

    code: what the folder depends on besides the file.

    Raises:
        UserError: if it cannot be written.
    """
    inputs, folder = {"model.base": base_hash(model)} | code, _folder(model, part)
    try:
        return made_once(folder, inputs, lambda partial: make(model, partial))
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"{folder.parent}: cannot be written ({error.strerror}): a base in a GGUF file is "
            "converted once, and kept there: make it writable, or set HF_HOME to another folder"
        ) from None


def _folder(model: Model, part: str) -> Path:
    _, file = locate_base(model)
    identity = base_hash(model).removeprefix("sha256:")[:16]
    return cache_folder() / "gguf" / f"{Path(file).stem}-{identity}" / part


def _describe(model: Model, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    from finequant.finetune.model import from_pretrained
    from finequant.finetune.pre_tokenizers import restore

    package, file = locate_base(model)
    say(f"base: reading {file}")
    with parsed_once():
        config = from_pretrained(AutoConfig, model, package, gguf_file=file)
        tokenizer = from_pretrained(AutoTokenizer, model, package, gguf_file=file)
    restore(tokenizer, package / file)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dequantize(model: Model, folder: Path) -> None:
    import torch
    from transformers import GgufConfig

    from finequant.finetune.model import load_config, load_weights

    package, file = locate_base(model)
    say(f"base: dequantizing {file} to {folder.parent}")
    with parsed_once():
        base = load_weights(
            model,
            package,
            gguf_file=file,
            config=load_config(model),
            dtype=torch.float32,
            # Left packed, GGUF weights can be neither trained on nor saved.
            quantization_config=GgufConfig(dequantize=True),
        )
    base.save_pretrained(folder)
