"""The layer plan: how each layer is rounded, whether that fits, and its form for torchao."""

from __future__ import annotations

import re
from collections import Counter
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

from finequant.finetune.architecture import BLOCK_LAYERS, EMBEDDING, HEAD, layer_shapes
from finequant.recipes.errors import UserError, listed
from finequant.recipes.schema import Layer, Quantize

if TYPE_CHECKING:
    import torch
    from torchao.core.config import AOBaseConfig
    from transformers import TorchAoConfig

    from finequant.finetune.architecture import Decoder, DecoderConfig

SMALLEST_GROUP, LARGEST_GROUP = 32, 256
SHARED_BITS = 8
"""Bits at which the head is rounded like the embedding, as calibration would gain nothing."""

CANDIDATES = range(2, 9)
"""Bits that a budget chooses from."""


class LayerScheme(NamedTuple):
    """How the weights of one layer are rounded: `round_to_nearest(weight, *scheme)`."""

    bits: int
    group_size: int
    rule: str
    """How the scale is chosen: `max` or `search`."""
    scale_dtype: torch.dtype


Plan = dict[str, LayerScheme | None]
"""The scheme of every linear layer, the head and the embedding, by name; None for float."""


def layer_plan(quantize: Quantize, config: DecoderConfig) -> Plan:
    """Makes the plan for every layer of this model, without loading a weight.

    Raises:
        UserError: for a pattern that matches no layer, a group size that leaves a remainder, a plan
            that rounds nothing, or a budget, transform or training that does not fit.
    """
    shapes = layer_shapes(config)
    linear = [name for name in shapes if name != EMBEDDING]
    _check_patterns(quantize, linear)
    plan = {name: _scheme(layer_settings(name, quantize), quantize) for name in linear}
    if not any(plan.values()):
        raise UserError("quantize.layers: every layer stays in float: nothing is left to quantize")
    bits = quantize.embedding
    plan[EMBEDDING] = _scheme("float" if bits == "float" else Layer(bits=bits), quantize)
    _check_group_sizes(quantize, plan, shapes)
    _check_budget(quantize, plan, config)
    _check_transforms(quantize, plan, config)
    _check_training(quantize, config)
    return plan


def layer_settings(name: str, quantize: Quantize) -> Layer | Literal["float"]:
    """Returns the settings of a layer: those of the last pattern that matches."""
    settings: Layer | Literal["float"] = Layer()
    if name == HEAD and quantize.head != "quantize":
        settings = "float" if quantize.head == "float" else Layer(bits=quantize.head)
    for pattern, layer in quantize.layers.items():
        if fnmatchcase(name, pattern):
            settings = layer
    return settings


def _scheme(layer: Layer | Literal["float"], quantize: Quantize) -> LayerScheme | None:
    import torch

    if layer == "float":
        return None
    return LayerScheme(
        layer.bits or quantize.bits,
        layer.group_size or quantize.group_size,
        quantize.scale,
        getattr(torch, quantize.scale_dtype),
    )


def _check_patterns(quantize: Quantize, names: list[str]) -> None:
    kinds = sorted({f"*.{name.rpartition('.')[2]}" for name in names if name != HEAD})
    problems = [
        f"quantize.layers: {pattern!r} matches no layer; the nearest are "
        f"{', '.join(get_close_matches(pattern, [*kinds, *names], cutoff=0))}"
        for pattern in quantize.layers
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if problems:
        raise UserError(listed(problems))


def _check_group_sizes(quantize: Quantize, plan: Plan, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuses a group size that leaves a remainder, naming the sizes that would do."""
    widths: dict[int, dict[str, int]] = {}
    for name, scheme in plan.items():
        if scheme:
            kind = re.sub(r"^model\.(layers\.\d+\.)?", "", name)
            widths.setdefault(scheme.group_size, {})[kind] = shapes[name][1]
    for size, layers in widths.items():
        uneven = [f"{kind} ({width})" for kind, width in layers.items() if width % size]
        fitting = [
            str(candidate)
            for candidate in range(SMALLEST_GROUP, LARGEST_GROUP + 1)
            if all(width % candidate == 0 for width in layers.values())
        ]
        if uneven:
            key = "group_size:" if size == quantize.group_size else "layers: group_size"
            raise UserError(
                f"quantize.{key} {size} does not divide the input features of "
                f"{', '.join(uneven)}; group sizes that do: "
                f"{', '.join(fitting) or f'none from 32 to 256{_in_float(layers)}'}"
            )


def _in_float(layers: dict[str, int]) -> str:
    """Suggests keeping in float those layers that the smallest group does not divide; nothing if it
    divides none.

    layers: the widths of kinds of layers, such as `mlp.up_proj`.
    """
    tables = {HEAD: "quantize.head=float", "embed_tokens": "quantize.embedding=float"}
    uneven = [kind for kind, width in layers.items() if width % SMALLEST_GROUP]
    if len(uneven) == len(layers):
        return ""
    keys = [tables[kind] for kind in uneven if kind in tables]
    if patterns := [f"'*.{kind}': float" for kind in uneven if kind not in tables]:
        keys.insert(0, f'"quantize.layers={{{", ".join(patterns)}}}"')
    return f": set quantize.group_size={SMALLEST_GROUP} {' '.join(keys)}"


def undecided(quantize: Quantize, plan: Plan) -> list[str]:
    """Lists the layers whose bits a budget chooses: quantized, with no pattern for their bits."""
    return [
        name
        for name, scheme in plan.items()
        if scheme and name != EMBEDDING and layer_settings(name, quantize).bits is None
    ]


def _check_budget(quantize: Quantize, plan: Plan, config: DecoderConfig) -> None:
    if quantize.budget is None:
        return
    free = undecided(quantize, plan)
    fewest = {name: plan[name]._replace(bits=CANDIDATES[0]) for name in free}
    least = bits_per_weight(plan | fewest, config)
    if quantize.budget < least:
        raise UserError(
            f"quantize.budget: {quantize.budget} bits per weight are too few: the plan takes at "
            f"least {least:.3f}, scales included; use larger groups or quantize.scale_dtype="
            "bfloat16, or set fewer bits in quantize.layers"
        )
    if not free:
        raise UserError(
            "quantize.budget: nothing is left to choose: quantize.layers and quantize.head set the "
            "bits of every layer; remove one of the two, or the budget"
        )


def _check_transforms(quantize: Quantize, plan: Plan, config: DecoderConfig) -> None:
    from finequant.quantize.methods.transforms import chosen

    for transform in chosen(quantize):
        transform.check(plan, config)


def _check_training(quantize: Quantize, config: DecoderConfig) -> None:
    import torch

    if quantize.training and shipped_dtype(quantize, config) == torch.float16:
        raise UserError(
            "quantize.training: it computes in the dtype that ships, here float16, in which "
            "gradients vanish: set quantize.dtype=bfloat16 or float32"
        )


def torchao_config(scheme: LayerScheme, weight_only: bool = False) -> AOBaseConfig:
    """Returns torchao's configuration of a layer: intN groupwise weights and, unless `weight_only`,
    int8 dynamic activations."""
    import torch
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    bits, groups = getattr(torch, f"int{scheme.bits}"), PerGroup(scheme.group_size)
    if weight_only:
        return IntxWeightOnlyConfig(
            weight_dtype=bits, granularity=groups, scale_dtype=scheme.scale_dtype
        )
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=bits, weight_granularity=groups, weight_scale_dtype=scheme.scale_dtype
    )


def quantization_config(plan: Plan) -> TorchAoConfig:
    """Translates the plan for `from_pretrained`: one scheme with exceptions, or schemes by name.

    With one scheme, transformers leaves the head in float unless `modules_to_not_convert` is given,
    even if empty; with names, it takes head and embedding only if told to include them.
    """
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    (common, _), *others = Counter(filter(None, plan.values())).most_common()
    if not others and not plan[EMBEDDING]:
        kept = [name for name, scheme in plan.items() if not scheme and name != EMBEDDING]
        return TorchAoConfig(torchao_config(common), modules_to_not_convert=kept)
    names = {
        name: scheme and torchao_config(scheme, weight_only=name == EMBEDDING)
        for name, scheme in plan.items()
        if scheme != common or name in (HEAD, EMBEDDING)
    }
    rest = {f"re:{BLOCK_LAYERS}": torchao_config(common)}  # names take precedence over patterns
    return TorchAoConfig(FqnToConfig(names | rest), include_input_output_embeddings=True)


def as_layers(plan: Plan) -> dict[str, dict[str, int] | str]:
    """Writes the plan of linear layers and head in the form of `quantize.layers`, by name."""
    return {
        name: {"bits": scheme.bits, "group_size": scheme.group_size} if scheme else "float"
        for name, scheme in plan.items()
        if name != EMBEDDING
    }


def packed_bits(shape: tuple[int, int], scheme: LayerScheme) -> float:
    """Counts the bits of a layer's codes and scales, tightly packed."""
    rows, columns = shape
    return rows * columns * (scheme.bits + 8 * scheme.scale_dtype.itemsize / scheme.group_size)


def bits_per_weight(plan: Plan, config: DecoderConfig) -> float:
    """Averages bits per weight over the quantized linear layers, scales included."""
    shapes = layer_shapes(config)
    rounded = {name: plan[name] for name in plan if plan[name] and name != EMBEDDING}
    bits = sum(packed_bits(shapes[name], scheme) for name, scheme in rounded.items())
    return bits / sum(rows * columns for rows, columns in map(shapes.get, rounded))


def unties_head(plan: Plan) -> bool:
    """Says whether head and embedding can no longer share their weights."""
    return plan[HEAD] is not None or plan[EMBEDDING] is not None


def keeps_tied_head(plan: Plan, config: DecoderConfig) -> bool:
    """Says whether the base ties its head to the embedding, and the plan leaves it so."""
    return config.tie_word_embeddings and not unties_head(plan)


def shares_table(quantize: Quantize, plan: Plan, config: DecoderConfig) -> bool:
    """Says whether a tied head keeps the embedding's codes, which a format may then hold once.

    Rotation folds the last norm's weights into the head, and a head of fewer bits is calibrated.
    """
    head, embedding = plan[HEAD], plan[EMBEDDING]
    tied = config.tie_word_embeddings and not quantize.rotate
    return bool(tied and head and head == embedding and head.bits == SHARED_BITS)


def is_calibrated(name: str, scheme: LayerScheme) -> bool:
    """Says whether a calibrated method looks at the layer's inputs; else it rounds to nearest."""
    return name != EMBEDDING and not (name == HEAD and scheme.bits == SHARED_BITS)


def untie_head(model: Decoder) -> None:
    """Gives a tied head weights of its own: rotation changes them apart from the embedding's, and
    a rounded head also quantizes its inputs, which a rounded embedding does not."""
    import torch

    if model.config.tie_word_embeddings:
        head = model.model.embed_tokens.weight.detach().clone()
        model.lm_head.weight = torch.nn.Parameter(head)
        model.config.tie_word_embeddings = False


def shipped_dtype(quantize: Quantize, config: DecoderConfig) -> torch.dtype:
    """Returns the dtype of embedding, norms and arithmetic in base, tuned and quantized models.

    Of a base in float64, it is float32: torchao's tensors have no wider dtype.
    """
    import torch

    from finequant.finetune.model import stored_dtype

    if quantize.dtype != "auto":
        return getattr(torch, quantize.dtype)
    dtype = stored_dtype(config)
    return torch.float32 if dtype == torch.float64 else dtype


def cast_weights(model: Decoder, dtype: torch.dtype) -> Decoder:
    """Converts the model's weights to `dtype`, in place.

    `model.to(dtype)` would also round the rotary frequencies, which `from_pretrained` does not.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model
