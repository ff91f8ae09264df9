"""Weights -> a checkpoint, in float or quantized by the recipe's method, in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finequant.finetune.architecture import EMBEDDING, HEAD
from finequant.finetune.processes import decided_by_first
from finequant.quantize.checkpoint.reading import WHOLE, TensorFile, Weights
from finequant.quantize.checkpoint.streaming import write_data_free
from finequant.quantize.checkpoint.writing import Checkpoint, stored_shapes, write_config
from finequant.quantize.methods.apply import quantize_layers
from finequant.quantize.rounding import CODES, Rounded, save_rounded
from finequant.quantize.scheme import layer_plan
from finequant.recipes.artifact import remove
from finequant.recipes.interrupt import starting_over
from finequant.recipes.schema import Quantize
from finequant.recipes.terminal import is_first, say

if TYPE_CHECKING:
    from finequant.quantize.merge.adapter import Base


def write_float(folder: Path, base: Base, weights: Weights, dtype: torch.dtype) -> None:
    """Writes a checkpoint of the float weights."""
    plan = dict.fromkeys((HEAD, EMBEDDING))
    shapes = stored_shapes(base.shapes, base.config, plan)
    checkpoint = Checkpoint(folder, shapes, plan, dtype)
    write_data_free(checkpoint, weights, shapes)
    write_config(base, plan, dtype, folder)
    checkpoint.finish()


def write_quantized(
    folder: Path,
    base: Base,
    weights: Weights,
    quantize: Quantize,
    dtype: torch.dtype,
    sequences: torch.Tensor | None = None,
    trained: TensorFile | None = None,
) -> Checkpoint | None:
    """Writes a checkpoint, quantized by the recipe's method or with codes from training.

    Several processes share the calibration. The first one writes; the others get None.

    sequences: token ids [rows, length] for a calibrated method, and for training scales.
    """
    plan, config = layer_plan(quantize, base.config), base.config
    shapes = stored_shapes(base.shapes, config, plan)
    checkpoint = Checkpoint(folder, shapes, plan, dtype) if is_first() else None
    start, file = folder / "start", None
    if checkpoint and checkpoint.is_new:
        remove(start)  # codes of another plan
    is_complete = decided_by_first(lambda: checkpoint.has_all())
    if quantize.calibration.scale_steps and not (trained or is_complete):
        file = codes_with_trained_scales(start, base, weights, quantize, dtype, sequences)

    def write_codes() -> None:
        codes = trained or TensorFile(file)

        def read_codes(layer: str, rows: slice, weight: torch.Tensor) -> Rounded:
            return Rounded(*(codes.read(f"{layer}.{part}", rows) for part in Rounded._fields))

        write_data_free(checkpoint, weights, shapes, read_codes)

    if trained or file:
        decided_by_first(write_codes)
    elif not is_complete:
        quantize_layers(checkpoint, weights, config, plan, quantize, dtype, sequences)
    decided_by_first(lambda: remove(start))
    decided_by_first(lambda: write_config(base, plan, dtype, folder))
    return checkpoint


def codes_with_trained_scales(
    folder: Path,
    base: Base,
    weights: Weights,
    quantize: Quantize,
    dtype: torch.dtype,
    sequences: torch.Tensor,
) -> Path:
    """Quantizes by the recipe's method, trains the scales, writes codes and scales to a file in
    `folder`, and returns its path.

    Codes written before an interruption are kept; the training of the scales starts over.
    """
    from finequant.quantize.training.scales import train_scales  # late, because it imports trl

    codes = folder / CODES
    if decided_by_first(codes.exists):
        return codes
    decided_by_first(lambda: folder.mkdir(exist_ok=True))
    plan, steps = layer_plan(quantize, base.config), quantize.calibration.scale_steps
    before = quantize.calibration.model_copy(update={"scale_steps": 0})
    before = quantize.model_copy(update={"calibration": before})
    start = write_quantized(folder, base, weights, before, dtype, sequences)

    def rounded(layer: str) -> Rounded:
        return decided_by_first(lambda: start.rounded(f"{layer}.weight", WHOLE))

    layers = {layer: rounded(layer) for layer in plan if plan[layer]}
    say(f"quantize: training the scales, {steps} steps")
    with starting_over("the training of the scales"):
        layers = train_scales(weights, base.config, sequences, layers, plan, dtype, steps)

    def save() -> None:
        partial = codes.with_name(f"{CODES}.partial")
        save_rounded(layers, partial)
        partial.replace(codes)

    decided_by_first(save)
    return codes
