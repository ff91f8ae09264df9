"""Describes what was done to the model, for quantization.json, the record that ships with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finequant.finetune.architecture import EMBEDDING, HEAD
from finequant.quantize.methods.transforms import chosen
from finequant.quantize.scheme import Plan, as_layers, bits_per_weight, shares_table, unties_head
from finequant.recipes.methods import METHODS

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.checkpoint.writing import Checkpoint
    from finequant.quantize.merge.adapter import Base
    from finequant.recipes.schema import Quantize


def describe(
    quantize: Quantize, plan: Plan, config: DecoderConfig, trained: bool
) -> dict[str, Any]:
    """Makes the record, except for its table of layers; `trained` says whether `qat` ran."""
    linear = [scheme for name, scheme in plan.items() if scheme and name != EMBEDDING]
    bits = sorted({scheme.bits for scheme in linear})
    sizes = sorted({scheme.group_size for scheme in linear})
    head = f"int{plan[HEAD].bits}" if plan[HEAD] else "float"
    if shares_table(quantize, plan, config):
        head += ", the codes of the embedding"
    elif config.tie_word_embeddings:
        head += f", {'untied from' if unties_head(plan) else 'tied to'} the embedding"
    embedding = f"int{plan[EMBEDDING].bits}, weight-only" if plan[EMBEDDING] else "float"
    method = "".join(f"{transform.description}, then " for transform in chosen(quantize))
    method += METHODS[quantize.method].description
    method += ", then its scales trained" if quantize.calibration.scale_steps else ""
    method += ", then trained" if trained else ""
    return {
        "summary": f"{', '.join(f'int{number}' for number in bits)} symmetric weights in groups of "
        f"{', '.join(map(str, sizes))}, int8 asymmetric activations per token; head: {head}; "
        f"embedding: {embedding}",
        "bits": bits[0] if len(bits) == 1 else None,
        "group_size": sizes[0] if len(sizes) == 1 else None,
        "scale_dtype": quantize.scale_dtype,
        "head": head,
        "embedding": embedding,
        "bits_per_rounded_weight": round(bits_per_weight(plan, config), 4),
        "method": method,
        "plan": as_layers(plan),
    }


def layer_table(checkpoint: Checkpoint, base: Base, plan: Plan) -> list[dict[str, Any]]:
    """Lists bits, group size and signal-to-noise ratio in dB of each layer; None in float.

    The ratio is also None if rounding changed nothing: JSON has no infinity.
    """
    return [
        {
            "name": name,
            "shape": list(base.shapes[f"{name}.weight"]),
            "bits": scheme and scheme.bits,
            "group_size": scheme and scheme.group_size,
            "snr_db": checkpoint.snr_db(f"{name}.weight"),
        }
        for name, scheme in plan.items()
    ]
