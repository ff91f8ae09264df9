"""The checkpoint that plain `from_pretrained` loads: torchao's layout, written piece by piece.

Every tensor has its offset in a file before the first is computed, so any thread can write pieces
in any order. A journal lists the pieces that are written, so a run that was killed can resume.
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Iterable
from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from xxhash import xxh3_64

from finequant.finetune.architecture import EMBEDDING, HEAD, architecture_name
from finequant.finetune.device import dtype_name
from finequant.quantize.checkpoint.reading import (
    WHOLE,
    Entry,
    TensorFile,
    Weights,
    bytes_of,
    header,
    row_slices,
    write_rows,
)
from finequant.quantize.merge.adapter import Base
from finequant.quantize.rounding import Rounded
from finequant.quantize.scheme import (
    LayerScheme,
    Plan,
    cast_weights,
    keeps_tied_head,
    quantization_config,
    unties_head,
)
from finequant.recipes.artifact import files_in
from finequant.recipes.errors import UserError
from finequant.recipes.freshness import JOURNAL

if TYPE_CHECKING:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    from finequant.finetune.architecture import Decoder, DecoderConfig

SHARD_BYTES = 4 * 10**9
"""Maximum size of a file, unless a single tensor is larger."""


class PieceRecord(NamedTuple):
    """A piece that is written: a checksum of its bytes, and the power of weights and errors."""

    checksum: int
    power: float
    noise: float


class File(NamedTuple):
    """A safetensors file to write: its first bytes, and the entries of its tensors."""

    name: str
    header: bytes
    entries: dict[str, Entry]

    @property
    def size(self) -> int:
        return max(sum(entry.bytes_of(WHOLE)) for entry in self.entries.values())


def layout(shapes: dict[str, tuple[int, ...]], plan: Plan, dtype: torch.dtype) -> list[File]:
    """Lays out the files of a checkpoint, byte for byte except for the tensors' content.

    shapes: shapes of the parameters to write, by name, in the model's order.
    dtype: the dtype of parameters that stay in float.
    """
    shards: list[dict] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        stored = _stored_as(name, shape, plan.get(name.removesuffix(".weight")), dtype)
        size = sum(math.prod(part) * kind.itemsize for kind, part in stored.values())
        if shards[-1] and size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = stored
        room -= size
    files, metadata = [], _metadata(list(shapes), plan, dtype)
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        tensors = {key: value for stored in shard.values() for key, value in stored.items()}
        files.append(File(f"model{suffix}.safetensors", *header(tensors, metadata)))
    return files


def _stored_as(
    name: str, shape: tuple[int, ...], scheme: LayerScheme | None, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Maps a parameter to its tensors in the file: itself, or codes, scales, and zero points."""
    if not scheme:
        return {name: (dtype, shape)}
    groups = (shape[0], shape[1] // scheme.group_size)
    stored = (torch.int8, shape), (scheme.scale_dtype, groups), (torch.int8, groups)
    return dict(zip(inner_names(name), stored, strict=True))


def _metadata(names: list[str], plan: Plan, dtype: torch.dtype) -> dict[str, str]:
    """Makes the metadata of every file: all names, as `from_pretrained` keeps only one file's."""
    if not any(plan.values()):
        return {"format": "pt"}
    described = {}
    for name in names:
        scheme = plan.get(name.removesuffix(".weight"))
        plain = json.dumps({"_type": "Tensor"})
        described[name] = torchao_metadata(name, scheme, dtype) if scheme else plain
    return {**described, "tensor_names": json.dumps(names), "format": "pt"}


class Checkpoint:
    """The weights in a folder: those in the plan rounded, the others in `dtype`.

    shapes: shapes of the parameters to write, by name, in the model's order.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple[int, ...]],
        plan: Plan,
        dtype: torch.dtype,
    ) -> None:
        self.folder, self.shapes, self.dtype = folder, shapes, dtype
        self._slices = {name: list(row_slices(shape)) for name, shape in shapes.items()}
        self.plan = {f"{name}.weight": scheme for name, scheme in plan.items() if scheme}
        self.entries: dict[str, tuple[int, Entry]] = {}
        self._files: dict[str, TensorFile] = {}
        self._descriptors: list[int] = []
        self.is_new = False
        for file in layout(shapes, plan, dtype):
            self._open(file)
        self._written = self._read_journal()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._journal = os.open(folder / JOURNAL, flags, 0o644)
        os.write(self._journal, b"\n")  # ends a line that a kill has cut off

    def _open(self, file: File) -> None:
        """Opens a file; a missing one is first created at its full size and filled with zeros, so
        that its zero points are already right.

        One of another plan is replaced: codes of any number of bits take as many bytes, but its
        header names the bits. A budget that is measured again, with other threads or on another
        device, may choose others.
        """
        path = self.folder / file.name
        if not _starts_with(path, file.header) or path.stat().st_size != file.size:
            (self.folder / JOURNAL).unlink(missing_ok=True)
            self.is_new = True
            with path.open("wb") as stream:
                stream.write(file.header)
                stream.truncate(file.size)
        descriptor, reader = os.open(path, os.O_WRONLY), TensorFile(path)
        self._descriptors.append(descriptor)
        for key, entry in file.entries.items():
            self.entries[key], self._files[key] = (descriptor, entry), reader

    def _read_journal(self) -> dict[tuple[str, int], PieceRecord]:
        """Reads which pieces are complete; skips empty lines and one that a kill cut off."""
        records = {}
        path = self.folder / JOURNAL
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                name, start, *rest = json.loads(line)
            except ValueError:
                continue
            records[name, start] = PieceRecord(*rest)
        return records

    def pieces(self, name: str, rows: slice = WHOLE) -> list[slice]:
        """Lists the slices of a parameter's rows that are written together."""
        slices = self._slices[name]
        if rows == WHOLE:
            return slices
        first, end = (
            bisect_left(slices, row, key=attrgetter("start")) for row in (rows.start, rows.stop)
        )
        return slices[first:end]

    def has(self, name: str, rows: slice) -> bool:
        """Says whether these rows are in their file, every byte as it was written."""
        return all(self._is_written(name, piece) for piece in self.pieces(name, rows))

    def has_all(self) -> bool:
        """Says whether every byte is in its file."""
        return all(self.has(name, WHOLE) for name in self.shapes)

    def _is_written(self, name: str, piece: slice) -> bool:
        written = self._written.get((name, piece.start))
        if written is None:
            return False
        stored = [self._files[key].read(key, piece) for key in self.stored(name)]
        return written.checksum == _checksum(stored)

    def write(
        self, name: str, rows: slice, weight: torch.Tensor, rounded: Rounded | None = None
    ) -> None:
        """Writes rows into their file.

        weight: their float32 weights, which are written unless `rounded` is given.
        """
        first = rows.start or 0
        for piece in self.pieces(name, rows):
            relative = slice(piece.start - first, piece.stop - first)
            part = rounded and Rounded(rounded.codes[relative], rounded.scale[relative])
            self._write_piece(name, piece, weight[relative], part)

    def _write_piece(
        self, name: str, piece: slice, weight: torch.Tensor, rounded: Rounded | None
    ) -> None:
        tensors = rounded or (weight.to(self.dtype),)
        if not tensors[-1].isfinite().all():
            raise UserError(self._not_finite(name, tensors[-1].dtype))
        for key, tensor in zip(self.stored(name), tensors, strict=True):
            descriptor, entry = self.entries[key]
            write_rows(descriptor, entry, piece, tensor)
        figures = _power_and_noise(weight, rounded) if rounded else (0.0, 0.0)
        written = PieceRecord(_checksum(tensors), *figures)
        # One call, so that lines of several threads do not mix.
        os.write(self._journal, json.dumps([name, piece.start, *written]).encode() + b"\n")
        self._written[name, piece.start] = written

    def _not_finite(self, name: str, dtype: torch.dtype) -> str:
        """Writes the message about a number that the dtype cannot represent."""
        subject = f"a scale of {name}" if name in self.plan else name
        key = "scale_dtype" if name in self.plan else "dtype"
        return (
            f"quantize.{key}: {subject} is not a finite number in {dtype_name(dtype)},"
            f" whose largest is {torch.finfo(dtype).max:.4g}: set quantize.{key}=bfloat16"
        )

    def known(self, layer: str, rows: slice) -> Rounded | None:
        """Returns the codes and scales of these rows of a layer, if all of them are written."""
        name = f"{layer}.weight"
        return self.rounded(name, rows) if self.has(name, rows) else None

    def stored(self, name: str) -> tuple[str, ...]:
        """Lists the tensors in the file that store a parameter."""
        return inner_names(name)[:2] if name in self.plan else (name,)

    def rounded(self, name: str, rows: slice) -> Rounded:
        """Reads codes and scales from the file."""
        return Rounded(*(self._files[key].read(key, rows) for key in self.stored(name)))

    def weights(self) -> Weights:
        """Returns a function that reads rows as the shipped model computes with them."""

        def weights(name: str, rows: slice) -> torch.Tensor:
            if name in self.plan:
                return self.rounded(name, rows).dequantize(self.dtype)
            if name not in self.shapes:  # a tied head
                name = f"{EMBEDDING}.weight"
            return self._files[name].read(name, rows)

        return weights

    def snr_db(self, name: str) -> float | None:
        """Computes the ratio of the weights' power to their errors', in decibels; None in float,
        and without any error, as when all weights are zero."""
        if name not in self.plan:
            return None
        records = [self._written[name, rows.start] for rows in self.pieces(name)]
        power = math.fsum(record.power for record in records)
        noise = math.fsum(record.noise for record in records)
        return round(10 * math.log10(power / noise), 2) if noise else None

    def write_index(self) -> None:
        """Writes the index, without which several files cannot be loaded."""
        names = {key: file.path.name for key, file in self._files.items()}
        if len(self._descriptors) > 1:
            total = sum(entry.bytes_of(WHOLE)[1] for _, entry in self.entries.values())
            weights = sum(math.prod(shape) for shape in self.shapes.values())
            metadata = {"total_parameters": weights, "total_size": total}
            index = {"metadata": metadata, "weight_map": names}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def finish(self) -> None:
        """Writes the index. The journal stays, for as long as an interruption may follow."""
        self.write_index()
        for descriptor in (*self._descriptors, self._journal):
            os.close(descriptor)


def _starts_with(path: Path, content: bytes) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as stream:
        return stream.read(len(content)) == content


def inner_names(name: str) -> tuple[str, str, str]:
    """Returns torchao's names for codes, scales and zero points of `LAYER.weight`."""
    layer, _, kind = name.rpartition(".")
    return tuple(f"{layer}._{kind}_{part}" for part in ("qdata", "scale", "zero_point"))


def _checksum(tensors: Iterable[torch.Tensor]) -> int:
    checksum = xxh3_64()
    for tensor in tensors:
        checksum.update(bytes_of(tensor))
    return checksum.intdigest()


def _power_and_noise(weight: torch.Tensor, rounded: Rounded) -> tuple[float, float]:
    """Sums the squares of the weights, and of their errors."""
    signal = weight.flatten()
    error = rounded.dequantize(torch.float32).flatten().sub_(signal)
    return torch.dot(signal, signal).item(), torch.dot(error, error).item()


def stored_shapes(
    shapes: dict[str, tuple[int, ...]], config: DecoderConfig, plan: Plan
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a checkpoint's parameters; a head that stays tied is not among them."""
    tied = keeps_tied_head(plan, config)
    return {
        name: shape for name, shape in shapes.items() if not (tied and name == f"{HEAD}.weight")
    }


def write_config(base: Base, plan: Plan, dtype: torch.dtype, folder: Path) -> None:
    """Writes config.json and generation_config.json, as `save_pretrained` does."""
    config = deepcopy(base.config)
    config.name_or_path = ""  # it may be a path of this machine
    config.dtype = dtype_name(dtype)
    config.architectures = [architecture_name(config)]
    if unties_head(plan):
        config.tie_word_embeddings = False
    if any(plan.values()):
        config.quantization_config = quantization_config(plan)
    config.save_pretrained(folder)
    # save_pretrained would refuse Llama 2's published settings: a temperature without do_sample.
    base.generation_config.to_json_file(folder / "generation_config.json")


def torchao_tensor(
    name: str, rounded: Rounded, scheme: LayerScheme, dtype: torch.dtype
) -> IntxUnpackedToInt8Tensor:
    """Wraps codes and scales of a layer in torchao's tensor, which computes in `dtype`."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    return IntxUnpackedToInt8Tensor(
        qdata=rounded.codes,
        scale=rounded.scale,
        zero_point=torch.zeros_like(rounded.scale, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{scheme.bits}"),
        block_size=(1, scheme.group_size),
        dtype=dtype,
        activation_quantization=None if name == EMBEDDING else "int8_asym_per_token",
    )


def torchao_metadata(name: str, scheme: LayerScheme, dtype: torch.dtype) -> str:
    """Returns torchao's metadata for a tensor in a file; it has no shapes, so one group will do."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    codes = torch.zeros(1, scheme.group_size, dtype=torch.int8)
    rounded = Rounded(codes, torch.ones(1, 1, dtype=scheme.scale_dtype))
    tensor = torchao_tensor(name.removesuffix(".weight"), rounded, scheme, dtype)
    return flatten_tensor_state_dict({name: tensor})[1][name]


def quantized_model(
    merged: Decoder, rounded: dict[str, Rounded], plan: Plan, dtype: torch.dtype
) -> Decoder:
    """Replaces a merged model's quantized weights by torchao's tensors, in place."""
    model = cast_weights(merged, dtype)
    for name, codes in rounded.items():
        weight = torchao_tensor(name, codes, plan[name], dtype)
        model.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    return model.eval()


def weight_bytes(folder: Path) -> int:
    """Counts the bytes of the safetensors files in a checkpoint."""
    return sum(file.stat().st_size for file in files_in(folder, "*.safetensors"))
