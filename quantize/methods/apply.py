"""Applies the recipe's method to a model: data-free layers first, then calibrated ones.

The codes go to a `Target`: a checkpoint that is written while they are computed, or memory.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

import torch

from finequant.finetune.device import device
from finequant.finetune.processes import decided_by_first
from finequant.quantize.checkpoint.reading import WHOLE, Weights, weights_of
from finequant.quantize.checkpoint.streaming import Target, write_data_free, write_pieces
from finequant.quantize.methods import rtn
from finequant.quantize.methods.calibrate import Calibrator, none_known
from finequant.quantize.methods.method import Calibrated, DataFree, load_method
from finequant.quantize.methods.sequences import sequences_for_method, sequences_of
from finequant.quantize.rounding import Rounded
from finequant.quantize.scheme import Plan, is_calibrated, layer_plan
from finequant.recipes.schema import Quantize, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.architecture import Decoder, DecoderConfig


def quantize_layers(
    target: Target | None,
    weights: Weights,
    config: DecoderConfig,
    plan: Plan,
    quantize: Quantize,
    dtype: torch.dtype,
    sequences: torch.Tensor | None,
) -> None:
    """Quantizes the layers of the plan, and writes all parameters of the target.

    target: None in all processes but the first; those only share the calibration.
    weights: the float model's, by name.
    dtype: the dtype of the shipped model's arithmetic.
    sequences: token ids [rows, length] for a calibrated method.
    """
    method = load_method(quantize.method)
    data_free = method if isinstance(method, DataFree) else rtn.METHOD
    later = set()
    if isinstance(method, Calibrated):
        layers = (name for name in plan if plan[name] and is_calibrated(name, plan[name]))
        later = {f"{name}.weight" for name in layers}
    where, accelerator = device(), Lock()

    def rounding(layer: str, rows: slice, weight: torch.Tensor) -> Rounded:
        if where.type == "cpu":
            return data_free.quantize(weight, plan[layer])
        with accelerator:  # else its memory would hold a layer for each thread
            return data_free.quantize(weight.to(where), plan[layer]).cpu()

    def write_others() -> None:
        names = [name for name in target.shapes if name not in later]
        write_data_free(target, weights, names, rounding, whole=not data_free.by_rows)

    decided_by_first(write_others)
    if isinstance(method, Calibrated) and later:
        calibration = quantize.calibration
        text, steps = sequences_for_method(sequences, calibration), calibration.steps
        known = target.known if target else none_known
        calibrator = Calibrator(method, weights, config, text, plan, dtype, known, steps)
        write_pieces(target, weights, calibrator.pieces())


def round_model(
    model: Decoder,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> dict[str, Rounded]:
    """Returns codes and scales of every layer that the plan rounds, by name, in the plan's order.

    model: the float model, with its head untied if the plan needs that; it is not changed.
    dtype: the dtype of the shipped model's arithmetic, in which activations are computed.

    Raises:
        UserError: if there is nothing to calibrate on.
    """
    from finequant.quantize.training.scales import train_scales  # late, because it imports trl

    quantize, config = recipe.quantize, model.config
    plan, sequences = layer_plan(quantize, config), sequences_of(recipe, tokenizer)
    codes, weights = Codes(plan, model), weights_of(model)
    quantize_layers(codes, weights, config, plan, quantize, dtype, sequences)
    steps = quantize.calibration.scale_steps
    if not steps:
        return codes.layers()
    return train_scales(weights, config, sequences, codes.layers(), plan, dtype, steps)


class Codes:
    """A target in memory: codes and scales of the layers that are quantized, and nothing else."""

    def __init__(self, plan: Plan, model: Decoder) -> None:
        self.plan = {f"{name}.weight": scheme for name, scheme in plan.items() if scheme}
        self.shapes = {name: tuple(model.get_parameter(name).shape) for name in self.plan}
        self._parts: dict[str, dict[int, Rounded]] = {name: {} for name in self.plan}

    def pieces(self, name: str) -> list[slice]:
        return [WHOLE]

    def has(self, name: str, rows: slice) -> bool:
        return False

    def known(self, layer: str, rows: slice) -> Rounded | None:
        return None

    def write(
        self, name: str, rows: slice, weight: torch.Tensor, rounded: Rounded | None = None
    ) -> None:
        self._parts[name][rows.start or 0] = rounded

    def layers(self) -> dict[str, Rounded]:
        """Returns codes and scales by layer, in the plan's order."""
        layers = {}
        for name, parts in self._parts.items():
            ordered = [parts[start] for start in sorted(parts)]
            codes = torch.cat([part.codes for part in ordered])
            scale = torch.cat([part.scale for part in ordered])
            layers[name.removesuffix(".weight")] = Rounded(codes, scale)
        return layers
