"""Reads quantized/ without torchao: codes, scales, and the tensors that stayed in float.

Every export is made from this, so all formats ship the same integers.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from finequant.finetune.architecture import EMBEDDING, HEAD
from finequant.quantize.checkpoint.reading import TensorFile
from finequant.quantize.formats.contents import Contents
from finequant.quantize.rounding import Rounded
from finequant.recipes.artifact import files_in
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
NOT_TENSORS = ("format", "tensor_names")
"""Keys of the metadata that do not describe a tensor."""

NOT_COPIED = (*WEIGHT_FILES, "config.json", "recipe.yaml")


class QuantizedCheckpoint(NamedTuple):
    """A quantized checkpoint; tensors are mapped from its files, not read."""

    folder: Path
    config: DecoderConfig
    rounded: dict[str, Rounded]
    """Codes and scales, by layer, such as `lm_head`."""
    bits: dict[str, int]
    """Bits of the codes, by layer."""
    floats: dict[str, torch.Tensor]
    """Unquantized tensors, by parameter, such as `model.norm.weight`."""

    @property
    def generation(self) -> dict[str, Any]:
        """Reads generation_config.json."""
        return json.loads((self.folder / "generation_config.json").read_text(encoding="utf-8"))

    @property
    def end_tokens(self) -> list[int]:
        """Reads the tokens at which generation stops, the end of an answer first."""
        ends = self.generation.get("eos_token_id")
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of embedding, norms, and arithmetic."""
        return self.floats["model.norm.weight"].dtype

    @property
    def tokenizer(self) -> dict[str, Any]:
        """Reads tokenizer.json."""
        return json.loads((self.folder / "tokenizer.json").read_text(encoding="utf-8"))

    @property
    def contents(self) -> Contents:
        """Returns the contents that a format has to hold."""
        sizes = {name: self.group_size(name) for name in self.rounded}
        return Contents(self.config, self.bits, sizes, self.tokenizer)

    @property
    def shares_table(self) -> bool:
        """Says whether head and embedding have the same codes and scales."""
        if HEAD not in self.rounded or EMBEDDING not in self.rounded:
            return False
        pairs = zip(self.rounded[HEAD], self.rounded[EMBEDDING], strict=True)
        return all(torch.equal(ours, theirs) for ours, theirs in pairs)

    @property
    def unshared(self) -> dict[str, Rounded]:
        """Returns codes and scales by layer, without a head that shares the embedding's table."""
        skipped = HEAD if self.shares_table else None
        return {name: rounded for name, rounded in self.rounded.items() if name != skipped}

    @property
    def stored_as_half(self) -> dict[str, torch.Tensor]:
        """Returns what GGUF and ONNX store in half precision: scales by layer, and matrices that
        stayed in float by parameter."""
        scales = {name: rounded.scale for name, rounded in self.rounded.items()}
        return scales | {name: part for name, part in self.floats.items() if part.dim() == 2}

    @property
    def packed_bytes(self) -> int:
        """Counts the bytes of the model with tightly packed codes, as in most exports.

        A table that head and embedding share counts once.
        """
        codes = sum(
            math.ceil(rounded.codes.numel() * self.bits[name] / 8) + rounded.scale.nbytes
            for name, rounded in self.unshared.items()
        )
        return codes + sum(tensor.nbytes for tensor in self.floats.values())

    def float_weight(self, name: str, rows: slice) -> torch.Tensor:
        """Returns rows of a parameter as in a float model: codes times scales, in float32."""
        if name == f"{HEAD}.weight" and name not in self.floats and HEAD not in self.rounded:
            name = f"{EMBEDDING}.weight"  # a tied head is not stored
        if rounded := self.rounded.get(name.removesuffix(".weight")):
            return Rounded(*(part[rows] for part in rounded)).dequantize(torch.float32)
        return self.floats[name][rows]

    def group_size(self, name: str) -> int:
        """Returns how many weights of a layer share a scale."""
        codes, scale = self.rounded[name]
        return codes.shape[1] // scale.shape[1]


def read_checkpoint(folder: Path) -> QuantizedCheckpoint:
    """Reads `quantized/`, in one file or several.

    Raises:
        UserError: if a file is damaged, or a layer has zero points, which no format here supports.
    """
    from transformers import AutoConfig

    checkpoint = QuantizedCheckpoint(folder, AutoConfig.from_pretrained(folder), {}, {}, {})
    for file in files_in(folder, "*.safetensors"):
        try:
            with safe_open(file, "pt") as stream:
                _add_tensors(stream, checkpoint)
        except (SafetensorError, json.JSONDecodeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{file}: damaged, or not what quantize writes ({error}): quantize again"
            ) from None
    return checkpoint


def _add_tensors(stream: safe_open, checkpoint: QuantizedCheckpoint) -> None:
    """Adds the tensors of a file, which torchao's own metadata describes."""
    # Sorted because safetensors lists metadata in a different order each time, and exports of the
    # same codes have to be the same file.
    for name, text in sorted(stream.metadata().items()):
        if name in NOT_TENSORS:
            continue
        description, layer = json.loads(text), name.removesuffix(".weight")
        if description["_type"] != "Tensor":
            codes, scale, zero_point = (
                stream.get_tensor(f"{layer}._weight_{part}")
                for part in ("qdata", "scale", "zero_point")
            )
            if zero_point.any():
                raise UserError(
                    f"{layer}: has zero points; expected symmetric codes: quantize again"
                )
            checkpoint.rounded[layer] = Rounded(codes, scale)
            integers = description["_data"]["target_dtype"]["_data"]
            checkpoint.bits[layer] = int(integers.removeprefix("int"))
        elif name in stream.keys():  # a tied head is described, but not stored  # noqa: SIM118
            checkpoint.floats[name] = stream.get_tensor(name)


class StoredLayers:
    """Reads codes and scales of a layer of `quantized/` when they are asked for.

    Nothing is mapped: the pages of a mapped file stay resident as long as any of its tensors.
    """

    def __init__(self, folder: Path) -> None:
        files = [TensorFile(path) for path in files_in(folder, "*.safetensors")]
        self._files = {name: file for file in files for name in file.entries}

    def __getitem__(self, layer: str) -> Rounded:
        names = (f"{layer}._weight_{part}" for part in ("qdata", "scale"))
        return Rounded(*(self._files[name].read(name) for name in names))


def write_config(stored: QuantizedCheckpoint, folder: Path, changes: dict[str, Any]) -> None:
    """Writes config.json with some changes, and without its description of torchao's tensors."""
    config = json.loads((stored.folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    text = json.dumps(config | changes, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def copy_beside(stored: QuantizedCheckpoint, folder: Path) -> None:
    """Copies tokenizer, chat templates and records, but no weights, configuration or recipe."""
    ignored = shutil.ignore_patterns(*NOT_COPIED)
    shutil.copytree(stored.folder, folder, ignore=ignored, dirs_exist_ok=True)
