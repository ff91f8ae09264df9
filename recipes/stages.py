"""The table of stages: what each reads from recipe and run directory, and what it writes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finequant.recipes.artifact import FileHash
from finequant.recipes.base import base_hash, is_here
from finequant.recipes.freshness import Inputs, input_hash, rows_hash
from finequant.recipes.load import path_fields
from finequant.recipes.schema import Recipe
from finequant.recipes.sources import TABLES, card_of, kind_of, matching_files, metadata_in
from finequant.recipes.task_files import local_data

MEASURING_CODE = 11
"""The version of the code that measures. Raise it with every change after which the same weights
and rows may get another figure, as when a bug in a metric is fixed, or after which a measurement
has other parts: then no earlier one is used again, and reports made from them are out of date."""


@dataclass(frozen=True)
class Stage:
    """A row of the table. Names of artifacts are paths in the run directory."""

    keys: tuple[str, ...] = ()
    """Sections and keys of the recipe that decide the result, with the content of what they name:
    the base, data, texts, task files."""
    without: tuple[str, ...] = ()
    """Keys in those sections that do not decide it."""
    reads: tuple[str, ...] = ()
    """Artifacts of earlier stages."""
    writes: tuple[str, ...] = ()
    bound_to: tuple[str, ...] = ()
    """Keys that bind the result: with another value of one of them, it is refused."""
    calibrates: bool = False
    """Whether the stage also reads the training rows if the method calibrates."""
    measures: bool = False
    """Whether MEASURING_CODE decides the result, too."""


# They affect the adapter only through rounding (1e-7) and dropout's random numbers, as the number
# of processes does. So after running out of memory, training resumes with a smaller micro-batch.
NO_EFFECT_ON_ADAPTER = (
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.kernels",
    "train.logging_steps",
    "train.report_to",
    "train.save_total_limit",
)
ONLY_FOR_EXPORTS = ("quantize.exports", "quantize.cache_length")
ONLY_SHOWN = ("evaluate.gate", "evaluate.samples", "evaluate.batch_size")

MISSING = "missing"
"""Stands for the hash of what is not here."""

PLAN_KEYS = (
    "quantize.bits",
    "quantize.group_size",
    "quantize.layers",
    "quantize.budget",
    "quantize.head",
    "quantize.embedding",
    "quantize.scale_dtype",
    "quantize.rotate",
)
"""Keys that decide what is quantized, and how."""

TRAINED = ("seed", "model", "data", "lora", "train")
EVALUATED = ("seed", "model", "data", "quantize.dtype", "evaluate")
NOT_MEASURED = (*ONLY_SHOWN, "evaluate.exports", "model.load")
SWEPT = (*EVALUATED, "quantize")
NOT_SWEPT = (*NOT_MEASURED, *ONLY_FOR_EXPORTS, "quantize.training", "quantize.keep_merged")

STAGES = {
    "train": Stage(
        keys=TRAINED,
        without=NO_EFFECT_ON_ADAPTER,
        writes=("adapter",),
        bound_to=("model.base",),
    ),
    "qat": Stage(
        keys=(*TRAINED, "quantize"),
        without=(*NO_EFFECT_ON_ADAPTER, *ONLY_FOR_EXPORTS),
        reads=("adapter",),
        writes=("trained_codes",),
        bound_to=("model.base", "quantize.dtype", *PLAN_KEYS),
    ),
    "quantize": Stage(
        keys=("model", "quantize"),
        without=(*ONLY_FOR_EXPORTS, "model.load"),
        reads=("adapter", "trained_codes"),
        writes=("quantized",),
        bound_to=("model.base",),
        calibrates=True,
    ),
    "evaluate": Stage(
        keys=EVALUATED,
        reads=("adapter", "quantized", "exports"),
        writes=("report.json", "report.md", "predictions.jsonl"),  # report.html repeats them
        measures=True,
    ),
}
"""All stages but the exports; `qat`, quantization-aware training, only runs if the recipe asks.

Any other stage is an export, named after its format, that `finequant export` writes.
"""

STARTING_CODES = "starting_codes"
"""The codes that `qat` starts from: `quantize` would write them if there were no `qat`."""

# Results that are kept for later commands, but are not stages.
PARTS = {
    STARTING_CODES: Stage(
        keys=("model", "quantize"),
        without=(*ONLY_FOR_EXPORTS, "quantize.training", "model.load"),
        reads=("adapter",),
        writes=("checkpoints/qat/start",),
        calibrates=True,
    ),
    "measurements/base": Stage(EVALUATED, NOT_MEASURED, measures=True),
    "measurements/tuned": Stage(EVALUATED, NOT_MEASURED, ("adapter",), measures=True),
    "measurements/quantized": Stage(
        EVALUATED, NOT_MEASURED, ("adapter", "quantized"), measures=True
    ),
    "sweep/base": Stage(SWEPT, NOT_SWEPT, measures=True),
    "sweep/tuned": Stage(SWEPT, NOT_SWEPT, ("adapter",), measures=True),
}

EXPORT_KEYS = {
    "executorch": ("name", "quantize.cache_length", "publish.base_model"),
    "onnx": ("quantize.cache_length",),
    "gguf": (
        "name",
        "data.system",
        "publish.base_model",
        "publish.license",
        "publish.license_name",
        "publish.license_link",
        "publish.language",
        "publish.tags",
        "publish.description",
    ),
}
"""Keys of the recipe that decide an export, besides quantized/."""


def row_of(name: str) -> Stage:
    """Returns the row of a stage; it makes the rows of exports and of their measurements."""
    if row := (STAGES | PARTS).get(name):
        return row
    kind, _, export = name.rpartition("/")
    if kind:
        return Stage(EVALUATED, ONLY_SHOWN, (f"exports/{export}",), measures=True)
    return Stage(EXPORT_KEYS.get(name, ()), (), ("quantized",), (f"exports/{name}",))


def stage_of(name: str, recipe: Recipe) -> Stage:
    """Returns the row of a stage, with the artifacts and keys that this recipe adds to it."""
    stage = row_of(name)
    optional = {
        "trained_codes": ["trained_codes"] if recipe.quantize.training else [],
        "exports": [f"exports/{name}" for name in exports_of(recipe)],
    }
    reads = [name for entry in stage.reads for name in optional.get(entry, [entry])]
    quantize = recipe.quantize
    calibrated = stage.calibrates and (quantize.reads_calibration_text or quantize.budget)
    rows = ("seed", "data") if calibrated else ()
    return replace(stage, reads=tuple(reads), keys=(*stage.keys, *rows))


def stages_of(recipe: Recipe) -> list[str]:
    """Lists the stages of this recipe, in order."""
    trained = ["qat"] if recipe.quantize.training else []
    return ["train", *trained, "quantize", *exports_of(recipe), "evaluate"]


def exports_of(recipe: Recipe) -> list[str]:
    """Lists the formats to export; torchao's is quantized/ itself."""
    return [name for name in recipe.quantize.exports if name != "torchao"]


def writer_of(artifact: str) -> str:
    """Returns the stage that writes an artifact."""
    writers = {path: name for name, stage in STAGES.items() for path in stage.writes}
    return writers.get(artifact) or Path(artifact).name


def command_of(stage: str) -> str:
    """Returns the command line of a stage, as messages name it."""
    arguments = f"{stage} RECIPE" if stage in STAGES else f"export RECIPE --to {stage}"
    return f"finequant {arguments}"


def recipe_inputs(recipe: Recipe, keys: tuple[str, ...], without: tuple[str, ...] = ()) -> Inputs:
    """Returns the values of sections and keys; for a local file or folder, its hash."""
    dumped = recipe.model_dump(mode="json")
    if layers := dumped["quantize"]["layers"]:  # as text, because the order of patterns matters
        dumped["quantize"]["layers"] = json.dumps(layers)
    content = flat(dumped)
    inputs = {
        key: content[key] for key in content if _within(key, keys) and not _within(key, without)
    }
    for key in (".".join(map(str, at)) for at in path_fields(dumped)):
        if key in inputs and key != "model.base" and Path(inputs[key]).is_absolute():
            files = [file for file in matching_files(Path(inputs[key])) if file.exists()]
            folder_hash = rows_hash
            if key == "evaluate.task_folder":
                files, folder_hash = [*files, *local_data(Path(inputs[key]))], input_hash
            inputs[key] = " ".join(_content_and_kind(f, folder_hash) for f in files) or MISSING
    if "model.base" in inputs:
        inputs["model.base"] = base_hash(recipe.model) if is_here(recipe.model) else MISSING
    return inputs


def _content_and_kind(path: Path, folder_hash: FileHash) -> str:
    """Returns the hash of a file or folder, and of the names of its classes, and the suffix of a
    file that is not a table: the same lines are one text in a .txt file, rows in a .csv file."""
    card = card_of(path)
    names = f" {hashlib.sha256(metadata_in(card).encode()).hexdigest()}" if card else ""
    if path.is_dir():
        return f"sha256:{folder_hash(path)}{names}"
    kind = kind_of(path)[0]
    return f"sha256:{input_hash(path)}{'' if kind in TABLES else kind}{names}"


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens to dotted keys: {"lora": {"rank": 8}} -> {"lora.rank": 8}."""
    if isinstance(node, dict) and node:
        pairs = node.items()
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        pairs = enumerate(node)
    else:
        return {prefix: node}
    dot = "." if prefix else ""
    return {
        key: value
        for name, item in pairs
        for key, value in flat(item, f"{prefix}{dot}{name}").items()
    }


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
