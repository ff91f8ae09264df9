"""quantized/ -> MLX's affine layout for mlx-lm: code + 8 (or + 128) in 32-bit words, and for each
group a scale and a bias of -8 (or -128) times the scale, so that a weight is code x scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finequant.finetune.architecture import EMBEDDING, HEAD, usable_positions
from finequant.quantize.checkpoint.stored import QuantizedCheckpoint, copy_beside, write_config
from finequant.quantize.formats.contents import Contents, check_block
from finequant.quantize.formats.format import Format
from finequant.quantize.formats.packing import packed_width
from finequant.quantize.formats.snippet import fenced, is_chat, pip_install
from finequant.quantize.rounding import Rounded
from finequant.recipes.artifact import files_in
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Recipe

GROUP_SIZES = (128, 64, 32)
"""Group sizes of MLX's kernels; for other multiples of 32, scales are repeated."""

IGNORED = {"attention_factor": None, "truncate": True}
"""Keys of YaRN that mlx-lm does not read, with the values that it assumes."""

PACKAGES = {"mlx": "'finequant[mlx]'", "mlx_lm": "'finequant[mlx]'"}


def check_fits(contents: Contents) -> None:
    """Refuses what the format cannot hold.

    Raises:
        UserError: for group sizes that are not multiples of 32, and for blocks or rotary scalings
            that mlx-lm does not compute.
    """
    check_block("mlx", "mlx-lm", contents.config)
    _check_rotary(contents.config.rope_parameters)
    if uneven := sorted(size for size in set(contents.group_sizes.values()) if size % 32):
        raise UserError(
            f"mlx: groups of {', '.join(map(str, uneven))} weights; expected multiples of 32: "
            "set quantize.group_size=32"
        )


def _check_rotary(rotary: dict[str, Any]) -> None:
    """Refuses rotary scalings that mlx-lm computes differently from transformers: it takes the long
    factors of LongRoPE for short texts, too, and ignores two keys of YaRN."""
    kind, which = rotary["rope_type"], ""
    if kind == "yarn":
        ignored = [key for key, usual in IGNORED.items() if rotary.get(key, usual) != usual]
        which = f" with {' and '.join(ignored)}" if ignored else ""
    if kind == "longrope" or which:
        raise UserError(
            f"mlx: mlx-lm computes the rotary scaling {kind!r}{which} differently from "
            "transformers: remove mlx from quantize.exports"
        )


def write(stored: QuantizedCheckpoint, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Writes weights, configuration and tokenizer; returns figures for the manifest.

    A table that head and embedding share is written once, and the head is tied again.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from huggingface_hub import save_torch_state_dict

    tensors: dict[str, torch.Tensor] = {}
    layers = stored.unshared
    for name, (codes, scale) in layers.items():
        bits, group = packed_width(stored.bits[name]), stored.group_size(name)
        # mlx-lm computes in the dtype of the embedding's scales.
        scales = scale.to(stored.dtype).repeat_interleave(group // _block(group), dim=1)
        # For 4 and 8 bits, mlx packs codes as compressed-tensors does: the lowest bits come first.
        tensors[f"{name}.weight"] = pack_to_int32(codes, bits).view(torch.uint32)
        tensors[f"{name}.scales"] = scales
        tensors[f"{name}.biases"] = scales * -(2 ** (bits - 1))
    save_torch_state_dict(tensors | stored.floats, folder, metadata={"format": "mlx"})
    copy_beside(stored, folder)
    write_config(stored, folder, _mlx_keys(stored))
    weights = sum(rounded.codes.numel() for rounded in layers.values())
    return {"bits_per_rounded_weight": 8 * sum(t.nbytes for t in tensors.values()) / weights}


def _mlx_keys(stored: QuantizedCheckpoint) -> dict[str, Any]:
    """Returns keys of config.json: quantization, rotary positions by the names mlx-lm reads, and
    their number."""
    layer = min(stored.rounded, key=(HEAD, EMBEDDING).__contains__)  # one of a block, if any is
    common = {
        "group_size": _block(stored.group_size(layer)),
        "bits": packed_width(stored.bits[layer]),
    }
    rotary = dict(stored.config.rope_parameters)
    keys = {"rope_theta": rotary.pop("rope_theta"), "quantization": common}
    if rotary["rope_type"] != "default":
        keys["rope_scaling"] = rotary
    tied = HEAD not in stored.rounded and f"{HEAD}.weight" not in stored.floats
    # mlx-lm attends to all tokens in these architectures, whatever the window.
    keys["max_position_embeddings"] = usable_positions(stored.config)
    return keys | {"tie_word_embeddings": tied or stored.shares_table}


def _block(group_size: int) -> int:
    """Returns the largest group size of MLX's kernels that divides this one."""
    return next(size for size in GROUP_SIZES if group_size % size == 0)


def read_back(
    folder: Path, stored: QuantizedCheckpoint
) -> Iterator[tuple[str, Rounded | torch.Tensor]]:
    """Yields codes, from MLX's dequantized weights over their scales, and float tensors.

    MLX reads an array when it is used.
    """
    import mlx.core as mx

    arrays: dict[str, Any] = {}
    for file in files_in(folder, "*.safetensors"):
        arrays |= mx.load(str(file))
    layers = [key.removesuffix(".scales") for key in arrays if key.endswith(".scales")]
    for name in layers:
        scales, biases = (
            arrays.pop(f"{name}.{part}").astype(mx.float32) for part in ("scales", "biases")
        )
        group, bits = _block(stored.group_size(name)), packed_width(stored.bits[name])
        words = arrays.pop(f"{name}.weight")
        values = _torch(mx.dequantize(words, scales, biases, group, bits))
        scale = _torch(scales)
        divisor = torch.where(scale == 0, 1, scale).repeat_interleave(group, dim=1)
        codes = (values / divisor).round().to(torch.int8)
        rounded = Rounded(codes, scale[:, :: stored.group_size(name) // group])
        yield name, rounded
        if name == EMBEDDING and HEAD in stored.rounded and HEAD not in layers:
            yield HEAD, rounded
    for name in [*arrays]:
        yield name, _torch(arrays.pop(name).astype(mx.float32))


def _torch(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


class MlxLm:
    """A model in mlx-lm, with a cache of one sequence.

    Without a Mac's GPU, it computes in float32: in bfloat16, MLX's kernels for a CPU also sum in
    bfloat16, which is 8 times as slow and moved the logits of SmolLM2-135M by 4 to 13%.
    """

    def __init__(self, folder: Path) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self._model, _ = load_model(folder)
        if not mx.metal.is_available():
            self._model.set_dtype(mx.float32)
        self._cache = make_prompt_cache(self._model)

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        import mlx.core as mx
        from mlx_lm.models.cache import trim_prompt_cache

        trim_prompt_cache(self._cache, self._cache[0].offset - start)
        logits = self._model(mx.array([ids]), cache=self._cache)[0, -1]
        return _torch(logits.astype(mx.float32))


def snippet(repository: str, chat: str, files: list[str]) -> str:
    """Writes how to load the export with mlx-lm."""
    ids = "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)\n"
    code = f"""\
from huggingface_hub import snapshot_download
from mlx_lm import generate, load

folder = snapshot_download("{repository}", allow_patterns="mlx/*")
model, tokenizer = load(f"{{folder}}/mlx")
{chat}
{ids if is_chat(chat) else ""}print(generate(model, tokenizer, prompt, max_tokens=64))"""
    return (
        f"### MLX\n\n`{pip_install('mlx-lm')}`, on a Mac; activations stay in float there.\n\n"
        + fenced("python", code)
    )


FORMAT = Format(
    name="mlx",
    report_key="mlx",
    packages=PACKAGES,
    check_fits=check_fits,
    write=write,
    read_back=read_back,
    snippet=snippet,
    ignores_penalty="mlx-lm",
    bytes_per_weight=4.5,
    weights="*.safetensors",
    runtime=lambda folder, context: MlxLm(folder),
    runtime_packages=PACKAGES,
    activations="float",
)
