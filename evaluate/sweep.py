"""Measure a model with every combination of quantization settings: -> sweep/

finequant sweep recipes/chat.yaml quantize.bits=8,4,3 quantize.method=rtn,gptq
finequant sweep recipes/chat.yaml --model base quantize.group_size=32,64
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from finequant.evaluate.measure import arithmetic, memo_of
from finequant.evaluate.sweep_points import Point, check_plans, read_points
from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.freshness import Memo, digest, versions
from finequant.recipes.interrupt import starting_over
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.stages import MEASURING_CODE
from finequant.recipes.terminal import say
from finequant.recipes.usage import Stopwatch

if TYPE_CHECKING:
    import torch

    from finequant.evaluate.inputs import Material
    from finequant.evaluate.metrics.divergence import Predictions
    from finequant.finetune.architecture import Decoder
    from finequant.quantize.scheme import Plan

FLOAT = "float"
"""Name of the unquantized model among the points."""


class Job(NamedTuple):
    """A measurement to make or to reuse; the float model's has no point."""

    point: Point | None
    memo: Memo

    @property
    def name(self) -> str:
        return self.point.name if self.point else FLOAT


def sweep(path: Path, overrides: Sequence[str], swept: str) -> None:
    """Measures each point as `evaluate` does, writes the run's sweep/, and prints a table.

    A sweep varies post-training quantization and ignores `quantize.training`.

    overrides: `key.sub=value`; keys of the quantize section also take `key.sub=value,value`.
    swept: "tuned", the run's base + adapter, or "base".

    Raises:
        UserError: for an invalid point, before anything is loaded; for whatever `evaluate` refuses;
            if the tuned model is swept and there is no adapter.
    """
    from finequant.evaluate.metrics.tasks import turn_into_fractions
    from finequant.evaluate.report.sweep_report import print_sweep, write_sweep

    points = read_points(path, overrides)
    quiet_libraries()
    check_plans(points)
    recipe = points[0].recipe
    run = RunDir.of(recipe)
    run.hold()
    if swept == "tuned":
        run.require("train", recipe)
    measured = _measure_all(_jobs(points, run, swept), recipe, run, swept)
    turn_into_fractions(measured.values())
    report = {
        "recipe": recipe.model_dump(mode="json", exclude={"output_dir", "quantize"}),
        "versions": versions(),
        "measuring_code": MEASURING_CODE,
        "swept": swept,
        "adapter": run.manifest()["train"]["outputs"]["adapter"] if swept == "tuned" else None,
        "models": {FLOAT: _float_entry(measured[FLOAT], recipe)}
        | {point.name: _entry(measured[point.name], point) for point in points},
    }
    write_sweep(report, run.root / "sweep")
    print_sweep(report)
    say(f"sweep: {run.root / 'sweep' / 'sweep.md'} and sweep.json written")


def _jobs(points: list[Point], run: RunDir, swept: str) -> list[Job]:
    """Lists the jobs: the float model, whose measurement `evaluate` shares, and each point."""
    computes = arithmetic(points[0].recipe)
    inputs = [run.inputs(point.recipe, f"sweep/{swept}") | computes for point in points]
    return [
        Job(None, memo_of(points[0].recipe, run, swept)),
        *(
            Job(point, Memo(run.root / "sweep" / f"{digest(made_from)}.json", made_from))
            for point, made_from in zip(points, inputs, strict=True)
        ),
    ]


def _measure_all(
    jobs: list[Job], recipe: Recipe, run: RunDir, swept: str
) -> dict[str, dict[str, Any]]:
    """Maps each job's name to its measurement; loads a model only if one is missing."""
    from finequant.evaluate.inputs import prepare
    from finequant.evaluate.measure import predicted
    from finequant.evaluate.metrics.tasks import load_tasks
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.finetune.data.turns import stop_at
    from finequant.finetune.model import load_config, load_tokenizer

    before = {job.name: job.memo.value() for job in jobs}
    measured = {name: measurement for name, measurement in before.items() if measurement}
    missing = [job for job in jobs if job.name not in measured]
    say(f"sweep: {len(measured)} of {len(jobs)} measured before")
    if not missing:
        return measured
    # No earlier stage has loaded them: what fails is refused before the first model is measured.
    load_tasks(recipe.evaluate, load_config(recipe.model).max_position_embeddings)
    splits = prepared_splits(recipe)
    material = prepare(recipe, splits, load_tokenizer(recipe.model))
    model = _float_model(recipe, run, swept, material.probes)
    stop_at(model, material.ends)
    reference: Predictions | None = None
    for job in missing:
        say(f"sweep: [{len(measured) + 1}/{len(jobs)}] {job.name}{_remaining(jobs, measured)}")
        watch = Stopwatch()
        with starting_over(f"the measurement of {job.name}"):
            if job.point:
                if reference is None:
                    reference = predicted(FLOAT, _as_shipped(model, recipe), recipe, material)
                measurement = measure_point(job.point, model, material, reference)
            else:
                measurement, reference = _measure_float(model, recipe, material, run, swept)
        measured[job.name] = measurement | {"seconds": watch.seconds}
        job.memo.keep(measured[job.name])
        gc.collect()
    return measured


def _remaining(jobs: list[Job], measured: dict[str, dict[str, Any]]) -> str:
    """Estimates the remaining time from points already measured, if possible of the same method."""
    points = {job.name: job.point.settings["method"] for job in jobs if job.point}
    seconds: dict[str, list[float]] = {}
    for name in points.keys() & measured.keys():
        seconds.setdefault(points[name], []).append(measured[name]["seconds"])
    if not seconds:
        return ""
    every = [value for values in seconds.values() for value in values]
    missing = [method for name, method in points.items() if name not in measured]
    total = sum(fmean(seconds.get(method, every)) for method in missing)
    return f", about {total / 60:.1f} min to go"


def _float_model(recipe: Recipe, run: RunDir, swept: str, probes: list[list[int]]) -> Decoder:
    """Loads the model to quantize, merged once for all points.

    It is in float32, as in the stage quantize: bfloat16 weights would round to other codes.
    """
    import torch

    from finequant.finetune.model import load_base
    from finequant.quantize.merge.model import merged_model

    say(f"sweep: loading the {swept} model")
    if swept == "base":
        return load_base(recipe.model, torch.float32)
    if recipe.quantize.training:
        say("sweep: quantize.training is ignored; base + adapter is rounded")
    return merged_model(recipe, run, torch.float32, probes)


def _as_shipped(model: Decoder, recipe: Recipe) -> Decoder:
    """Copies the model with its weights in the dtype in which it is compared with the points."""
    from finequant.finetune.device import arithmetic_dtype, device
    from finequant.finetune.model import load_config
    from finequant.quantize.scheme import cast_weights, shipped_dtype

    dtype = shipped_dtype(recipe.quantize, load_config(recipe.model))
    model = cast_weights(cast_weights(_copy_sharing_weights(model), dtype), arithmetic_dtype(dtype))
    return model.to(device()).eval()


def _measure_float(
    model: Decoder, recipe: Recipe, material: Material, run: RunDir, swept: str
) -> tuple[dict[str, Any], Predictions]:
    from finequant.evaluate.measure import measure_model
    from finequant.evaluate.models import size_bytes

    model = _as_shipped(model, recipe)
    size = size_bytes(swept, model, recipe, run)
    return measure_model(swept, model, recipe, material, size)


def measure_point(
    point: Point, model: Decoder, material: Material, reference: Predictions
) -> dict[str, Any]:
    """Measures the model quantized as the point says, and returns what `measure_model` does, with
    the divergence from the float model.

    model: float32 weights; not modified.
    reference: the float model's predictions.
    """
    from finequant.evaluate.dequantized import dequantize_once
    from finequant.evaluate.measure import measure_model
    from finequant.evaluate.metrics.divergence import divergence
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.device import arithmetic_dtype
    from finequant.finetune.model import load_config
    from finequant.quantize.checkpoint.reading import weights_of
    from finequant.quantize.checkpoint.writing import quantized_model
    from finequant.quantize.methods.apply import round_model
    from finequant.quantize.methods.budget import within_budget
    from finequant.quantize.methods.transforms import transform_model
    from finequant.quantize.scheme import (
        cast_weights,
        layer_plan,
        shipped_dtype,
        untie_head,
        unties_head,
    )
    from finequant.quantize.size.plan import model_size

    config = load_config(point.recipe.model)
    dtype = shipped_dtype(point.recipe.quantize, config)
    model = _copy_sharing_weights(model)
    transform_model(model, point.recipe.quantize)
    recipe = within_budget(point.recipe, weights_of(model), config, material.tokenizer, dtype)
    plan = layer_plan(recipe.quantize, config)
    if unties_head(plan):
        untie_head(model)
    size = _bytes_on_disk(model, plan, dtype)
    rounded = round_model(model, recipe, material.tokenizer, dtype)
    model = quantized_model(model, rounded, plan, dtype)
    # Counts each code at its own bits; torchao's files spend eight on each.
    packed = model_size(plan, config, dtype, recipe.quantize).packed
    model = dequantize_once(model, material.probes[0])
    model = cast_weights(model, arithmetic_dtype(dtype))
    measurement, predictions = measure_model(point.name, model, recipe, material, size)
    measurement["scores"]["divergence"] = divergence(reference, predictions.logs)
    measurement["scores"]["activations"] = "int8"
    measurement["scores"]["packed_bytes"] = packed
    measurement["scores"]["packed_bits_per_weight"] = 8 * packed / parameter_count(config)
    return measurement


def _copy_sharing_weights(model: Decoder) -> Decoder:
    """Copies a model so that its weights can be replaced; until then, they share memory."""
    import torch

    weights = {
        id(weight): torch.nn.Parameter(weight.data, requires_grad=False)
        for weight in model.parameters()
    }
    return deepcopy(model, weights)


def _bytes_on_disk(model: Decoder, plan: Plan, dtype: torch.dtype) -> int:
    """Computes the size that `quantize` would report for its checkpoint, without writing it."""
    from finequant.quantize.checkpoint.writing import layout, stored_shapes

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = layout(stored_shapes(shapes, model.config, plan), plan, dtype)
    return sum(file.size for file in files)


def _float_entry(measurement: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Makes the float model's entry; its size counts floats, even for a packed GGUF base."""
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.device import dtype_name
    from finequant.finetune.model import load_config
    from finequant.quantize.scheme import shipped_dtype

    config = load_config(recipe.model)
    dtype = shipped_dtype(recipe.quantize, config)
    bits = 8.0 * dtype.itemsize
    return measurement["scores"] | {
        "settings": {},
        "dtype": dtype_name(dtype),
        "size_bytes": parameter_count(config) * dtype.itemsize,
        "bits_per_weight": bits,
        "packed_bytes": parameter_count(config) * dtype.itemsize,
        "packed_bits_per_weight": bits,
    }


def _entry(measurement: dict[str, Any], point: Point) -> dict[str, Any]:
    quantize = point.recipe.quantize.model_dump(mode="json")
    return {"settings": point.settings, "quantize": quantize, **measurement["scores"]}
