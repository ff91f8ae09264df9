"""base + adapter -> merged weights, row by row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from finequant.finetune.architecture import EMBEDDING, HEAD
from finequant.finetune.base_files import weight_files
from finequant.finetune.model import load_base, load_on_disk
from finequant.quantize.checkpoint.reading import WHOLE, TensorFile, Weights, row_slices
from finequant.recipes.errors import UserError, one_line
from finequant.recipes.schema import Model

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from finequant.finetune.architecture import Decoder, DecoderConfig

PREFIX = "base_model.model."
"""Prefix of the names of parameters in peft's files."""

HEAD_COPY = f"{PREFIX}{HEAD}.base_layer.weight"

# Features that cannot be merged, by peft's key; no recipe makes an adapter with them.
REFUSED = {
    "bias": "trained biases",
    "modules_to_save": "layers trained as a whole",
    "fan_in_fan_out": "transposed layers",
    "trainable_token_indices": "trained rows of the embedding",
    "lora_bias": "biases beside its matrices",
    "alora_invocation_tokens": "matrices for what follows some tokens only",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights with which peft subtracts the first matrices from the base. Adapters
of finequant are converted when they are saved, and no longer have this value."""


class Base(NamedTuple):
    """A float model whose weights are read on demand."""

    config: DecoderConfig
    generation_config: GenerationConfig
    shapes: dict[str, tuple[int, ...]]
    """Shapes of all parameters, in the model's order; a tied head has an entry, too."""
    weights: Weights
    plain: Callable[[], Decoder] | None = None
    """Makes the model as `from_pretrained` does, its weights on disk wherever the format allows."""


def open_base(model: Model) -> Base:
    """Opens the base's safetensors files.

    Raises:
        UserError: as `load_base` does.
    """
    skeleton = load_base(model, torch.float32, device_map="meta")
    files = [TensorFile(path) for path in weight_files(model)]
    where = {name: file for file in files for name in file.entries}
    # transformers ties whichever of the two a file lacks to the other.
    tied = {HEAD: EMBEDDING, EMBEDDING: HEAD} if skeleton.config.tie_word_embeddings else {}

    def stored_name(name: str) -> str:
        """Returns the name in the files; those of a model without a head leave out `model.`."""
        layer = name.removesuffix(".weight")
        names = [name, f"{tied[layer]}.weight"] if layer in tied else [name]
        candidates = [*names, *(name.removeprefix("model.") for name in names)]
        return next(name for name in candidates if name in where)

    def weights(name: str, rows: slice) -> torch.Tensor:
        name = stored_name(name)
        return where[name].read(name, rows)

    has_embedding = any(
        name.endswith(f"{EMBEDDING.removeprefix('model.')}.weight") for name in where
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    return Base(
        skeleton.config,
        skeleton.generation_config,
        shapes,
        weights,
        lambda: load_on_disk(model, has_embedding),
    )


class Adapter:
    """A LoRA, rsLoRA or DoRA adapter, whose matrices are read on demand.

    Raises:
        UserError: if it was not made for this base, has values that are not finite, or has more
            than matrices for linear layers.
    """

    def __init__(self, folder: Path, base: Base, name: str) -> None:
        try:
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            self._file = TensorFile(folder / "adapter_model.safetensors")
            _scaling(config, None)  # raises for a file that does not describe a LoRA
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: not an adapter of {name}: {one_line(error)}") from None
        self.read = lru_cache(maxsize=8)(lambda key: self._file.read(key).float())
        _check_mergeable(config, folder)
        pattern = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B|magnitude_vector)(\.weight)?")
        matched = {key: pattern.fullmatch(key) for key in self._file.entries}
        # With a LoRA for the head, peft also saves the head that it was given.
        if matched.pop(HEAD_COPY, 0) is None and not self._has_same_head(base):
            raise UserError(
                f"{folder}: cannot be merged: its {HEAD} differs from that of {name}: "
                "train without one, or name the base that the adapter was trained on"
            )
        if unknown := [key for key, match in matched.items() if not match]:
            raise UserError(
                f"{folder}: cannot be merged: it has {unknown[0]}; expected matrices of LoRA, "
                "rsLoRA or DoRA for linear layers only"
            )
        self.layers = {match[1] for match in matched.values()}
        if HEAD in self.layers and base.config.tie_word_embeddings:
            raise UserError(
                f"{folder}: cannot be merged: it changes {HEAD}, which the base ties to its "
                "embedding, so that both would change: save the base with a separate head "
                "(tie_word_embeddings: false), or train without a LoRA for the head"
            )
        self._scaling = {layer: _scaling(config, layer) for layer in self.layers}
        for layer in sorted(self.layers):
            refused = f"{folder}: not an adapter of {name}"
            self._check(layer, base.shapes, _rank(config, layer), refused, folder)

    def _has_same_head(self, base: Base) -> bool:
        """Says whether the adapter's copy of the head equals the base's, in the copy's dtype."""
        name, copy = f"{HEAD}.weight", self._file.entries[HEAD_COPY]
        return copy.shape == base.shapes[name] and all(
            self._file.read(HEAD_COPY, rows).equal(base.weights(name, rows).to(copy.dtype))
            for rows in row_slices(base.shapes[name])
        )

    def _check(self, layer: str, shapes: dict, rank: int, refused: str, folder: Path) -> None:
        """Refuses matrices of a layer that do not fit its weight, or are not finite.

        rank: the one that adapter_config.json says.
        refused: the beginning of messages.
        """
        entries, prefix = self._file.entries, f"{PREFIX}{layer}.lora_"
        a, b = entries.get(f"{prefix}A.weight"), entries.get(f"{prefix}B.weight")
        shape = shapes.get(f"{layer}.weight")
        if shape is None or a is None or b is None:
            raise UserError(f"{refused}: {layer} is in only one of the two")
        if (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
            raise UserError(
                f"{refused}: {layer} is {' x '.join(map(str, shape))} in the base, and "
                f"{b.shape[0]} x {a.shape[1]} in the adapter"
            )
        if a.shape[0] != rank:
            raise UserError(
                f"{refused}: {layer} has rank {a.shape[0]}, and adapter_config.json says {rank}"
            )
        for key in entries:
            if key.startswith(prefix) and not self.read(key).isfinite().all():
                raise UserError(
                    f"{folder}: cannot be merged: {key} has values that are not finite: train "
                    "again with a smaller train.learning_rate"
                )

    def add(self, layer: str, rows: slice, weight: torch.Tensor) -> torch.Tensor:
        """Returns rows of the merged weight, from float32 rows of the base's, which it overwrites.

        The result equals that of peft's `merge_and_unload` in float32, bit for bit.
        """
        if layer not in self.layers:
            return weight
        prefix = f"{PREFIX}{layer}.lora_"
        delta = self.read(f"{prefix}B.weight")[rows] @ self.read(f"{prefix}A.weight")
        weight += delta.mul_(self._scaling[layer])
        magnitude = f"{prefix}magnitude_vector"
        if magnitude in self._file.entries:  # DoRA: https://arxiv.org/abs/2402.09353
            norm = torch.linalg.norm(weight, dim=1)
            weight *= (self.read(magnitude)[rows] / norm)[:, None]
        return weight


def _check_mergeable(config: dict, folder: Path) -> None:
    """Refuses an adapter of other features, or of a base that peft changed before training.

    config: the content of adapter_config.json.

    Raises:
        UserError: naming the feature.
    """
    for key, feature in REFUSED.items():
        if (value := config.get(key)) not in (None, False, "none", [], {}):
            raise UserError(
                f"{folder}: cannot be merged: it has {feature} ({key}: {value}); expected "
                "matrices of LoRA, rsLoRA or DoRA only: train without it"
            )
    if str(start := config.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{folder}: cannot be merged: its matrices belong to a base that peft changed "
            f"before training (init_lora_weights: {start}): save it with peft's "
            "save_pretrained and path_initial_model_for_weight_conversion, which makes an adapter "
            "of the unchanged base"
        )


def _scaling(config: dict, layer: str | None) -> float:
    """Computes s of W + s B A."""
    alpha = _chosen(config.get("alpha_pattern"), config["lora_alpha"], layer)
    rank = _rank(config, layer)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _rank(config: dict, layer: str | None) -> int:
    return _chosen(config.get("rank_pattern"), config["r"], layer)


def _chosen(patterns: dict[str, int] | None, default: int, layer: str | None) -> int:
    """Returns the value of the first pattern that matches the end of the layer's name, as in peft,
    or the default."""
    matching = (key for key in patterns or {} if re.match(rf"(.*\.)?({key})$", layer or ""))
    return (patterns or {}).get(next(matching, ""), default)


def merged_weights(base: Base, adapter: Adapter) -> Weights:
    """Returns a function that reads float32 rows of W + s B A."""

    def weights(name: str, rows: slice = WHOLE) -> torch.Tensor:
        # A copy even if the base is float32, because `add` changes it.
        weight = base.weights(name, rows).to(torch.float32, copy=True)
        return adapter.add(name.removesuffix(".weight"), rows, weight)

    return weights
