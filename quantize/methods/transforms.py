"""The table of transforms, and how they are applied to a model on disk or in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finequant.quantize.checkpoint.reading import Weights, filled
from finequant.quantize.methods import rotation
from finequant.quantize.methods.transform import Transform
from finequant.quantize.scheme import untie_head
from finequant.recipes.schema import Quantize

if TYPE_CHECKING:
    from finequant.finetune.architecture import Decoder, DecoderConfig

TRANSFORMS: dict[str, Transform] = {"rotate": rotation.TRANSFORM}
"""All transforms, in the order in which they are applied; the key is that of the section `quantize`
which switches the transform on. A new one is a file beside this one, an entry here, and its key in
recipes/schema.py."""


def chosen(quantize: Quantize) -> list[Transform]:
    """Lists the transforms that the recipe asks for."""
    return [transform for key, transform in TRANSFORMS.items() if getattr(quantize, key)]


def transformed(weights: Weights, config: DecoderConfig, quantize: Quantize) -> Weights:
    """Returns the rows to quantize: those of the float model, after the recipe's transforms."""
    for transform in chosen(quantize):
        weights = transform.weights(weights, config)
    return weights


def transform_model(model: Decoder, quantize: Quantize) -> None:
    """Transforms a whole float model, in place; a tied head is untied."""
    for transform in chosen(quantize):
        untie_head(model)
        parameters = dict(model.named_parameters())
        rows = transform.weights(
            lambda name, rows, parameters=parameters: parameters[name].detach()[rows], model.config
        )
        # Layers come before norms, because the norms' weights may be folded into them.
        for name, tensor in sorted(parameters.items(), key=lambda item: "norm" in item[0]):
            tensor.data = filled(rows, name, tensor.shape, tensor.dtype)
