"""The run directory, the only thing stages share: its paths, its manifest, and what is stale."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finequant.recipes import lock
from finequant.recipes.artifact import content_hash, differences, remove, replace_text, seal, verify
from finequant.recipes.base import locate_base
from finequant.recipes.errors import UserError
from finequant.recipes.load import path_fields, write_recipe
from finequant.recipes.methods import METHODS
from finequant.recipes.schema import Recipe
from finequant.recipes.sources import matching_files

STAGES = ("train", "qat", "quantize", "evaluate")
"""All stages but the exports; `qat`, quantization-aware training, only runs if the recipe asks.

Any other stage is an export, named after its format, that `finequant export` writes.
"""

# The recipe's sections that decide a stage's result, in addition to files and upstream artifacts.
# An export has none unless it is here: it depends on quantized/ only.
SECTIONS = {
    "train": ("seed", "model", "data", "lora", "train"),
    "qat": ("seed", "model", "data", "lora", "train", "quantize"),
    "quantize": ("model", "quantize"),
    "executorch": ("quantize.cache_length",),
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
    "evaluate": ("seed", "model", "data", "quantize.dtype", "evaluate"),
}
UPSTREAM = {
    "train": (),
    "qat": ("adapter",),
    "quantize": ("adapter",),  # and trained_codes/, if the recipe has quantize.training
    "evaluate": ("adapter", "quantized"),
}

# Keys of the section `quantize` that have no effect on quantized/.
ONLY_FOR_EXPORTS = ("quantize.exports", "quantize.cache_length")

# Keys of the section `train` that affect the adapter no more than the number of processes does: by
# rounding (1e-7) and by dropout's random numbers. So after running out of memory, training resumes
# from the last checkpoint with a smaller micro-batch.
NO_EFFECT_ON_ADAPTER = (
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.kernels",
    "train.logging_steps",
    "train.report_to",
    "train.save_total_limit",
)

LINUX_STATUS = Path("/proc/self/status")

LIBRARIES = ("torch", "transformers", "peft", "trl", "torchao", "datasets", "accelerate", "lm_eval")


@dataclass(frozen=True)
class RunDir:
    """The paths of one run, and what its manifest says about the stages."""

    root: Path
    commits: dict[str, str] = field(default_factory=dict, compare=False)
    """Commits of the Hub branches and tags that the recipe names, as `hub.pinned` returns them."""

    @classmethod
    def of(cls, recipe: Recipe) -> RunDir:
        return cls(Path(recipe.output_dir or Path("runs") / recipe.name))

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def trained_codes(self) -> Path:
        return self.root / "trained_codes"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def quantized(self) -> Path:
        return self.root / "quantized"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def starting_codes(self, inputs: dict[str, Any]) -> Path:
        """Returns the folder of the codes that quantization-aware training starts from.

        Its name depends on all inputs that decide those codes.
        """
        digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        return self.checkpoints / "qat" / f"start-{digest[:12]}"

    @property
    def measurements(self) -> Path:
        return self.root / "measurements"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    @property
    def exports(self) -> Path:
        return self.root / "exports"

    @property
    def publication(self) -> Path:
        return self.root / "publish"

    @property
    def manifest_file(self) -> Path:
        return self.root / "manifest.json"

    def manifest(self) -> dict[str, Any]:
        """Returns what each finished stage recorded; empty before the first one."""
        if not self.manifest_file.exists():
            return {}
        try:
            manifest = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            if all(entry.keys() >= {"inputs", "outputs"} for entry in manifest.values()):
                return manifest
        except (ValueError, AttributeError):  # no JSON, or not of objects
            pass
        raise UserError(
            f"{self.manifest_file}: damaged, not what a stage wrote; "
            "delete it to rerun every stage of this run"
        )

    def commits_of(self, stage: str) -> dict[str, str]:
        """The commits that a finished stage used."""
        return self.manifest().get(stage, {}).get("commits", {})

    def hold(self) -> None:
        """Locks the directory until the command ends.

        Raises:
            UserError: naming the process that holds the lock, or if the directory is not writable.
        """
        lock.hold(self.root)

    def inputs(self, recipe: Recipe, stage: str) -> dict[str, Any]:
        """Returns everything that decides the stage's result: recipe keys and hashes of files.

        Raises:
            UserError: if the adapter in this directory was trained on a different base.
        """
        inputs = self._inputs(recipe, stage)
        trained = self.manifest().get("train")
        if "adapter" not in _upstream(stage) or trained is None:
            return inputs
        same = inputs["adapter/"] == f"sha256:{trained['outputs'].get('adapter')}"
        if same and trained["inputs"].get("model.base") != inputs["model.base"]:
            raise UserError(
                f"{self.adapter}: trained on a different base than {recipe.model.base}: run "
                "`finequant train RECIPE` again, or set model.base to the one in "
                f"{self.adapter / 'recipe.yaml'}"
            )
        return inputs

    def _inputs(self, recipe: Recipe, stage: str) -> dict[str, Any]:
        inputs = section_inputs(recipe, _sections(recipe, stage))
        if stage in STAGES:  # exports depend on quantized/ only
            inputs["model.base"] = _base_identity(recipe)
        upstream = list(_upstream(stage))
        if stage == "quantize" and recipe.quantize.training:
            upstream.append("trained_codes")
        if stage == "evaluate":
            upstream += [f"exports/{name}" for name in exports_of(recipe)]
        for artifact in upstream:
            inputs[f"{artifact}/"] = f"sha256:{content_hash(self.root / artifact)}"
        return inputs

    def outputs(self, stage: str) -> list[Path]:
        return {
            "train": [self.adapter],
            "qat": [self.trained_codes],
            "quantize": [self.quantized],
            "evaluate": [self.report, self.root / "report.md"],
        }.get(stage, [self.exports / stage])

    def what_changed(self, recipe: Recipe, stage: str) -> list[str] | None:
        """Lists why the stage must run: None if it never finished, [] if it is up to date."""
        entry = self.manifest().get(stage)
        if entry is None or not all(path.exists() for path in self.outputs(stage)):
            return None
        old, new = entry["inputs"], self._inputs(recipe, stage)
        values = _flat(recipe.model_dump(mode="json"))
        return [
            _change(key, old.get(key, "absent"), new.get(key, "absent"), values.get(key))
            for key in sorted({*old, *new})
            if old.get(key, "absent") != new.get(key, "absent")
        ] + [
            f"{name}: changed since {stage} wrote it{_changed_files(self.root / name)}"
            for name, digest in entry["outputs"].items()
            if content_hash(self.root / name) != digest
        ]

    def require(self, stage: str) -> None:
        """Refuses to build on a stage that has not run, or on files that it did not write."""
        missing = [path for path in self.outputs(stage) if not path.exists()]
        if missing:
            raise UserError(
                f"{missing[0]} does not exist: run `finequant {_command(stage)}` first, "
                "or copy the folder here from the machine that made it"
            )
        for folder in filter(Path.is_dir, self.outputs(stage)):
            verify(folder, again=f"finequant {_command(stage)}")

    @contextmanager
    def writing(
        self, target: Path, recipe: Recipe, inputs: dict[str, Any] | None = None
    ) -> Iterator[Path]:
        """Yields a temporary folder that replaces the target when the block succeeds.

        An earlier adapter, and anything that the user changed or put there, moves to `previous/`;
        what can be recreated is replaced.

        inputs: what decides the content. If given, the folder of an interrupted call with the same
            inputs and versions is reused as it is.
        """
        partial = target.with_name(target.name + ".partial")
        record, made_from = partial / "inputs.json", {"inputs": inputs, "versions": versions()}
        if inputs is None or not _holds_json(record, made_from):
            remove(partial)
            partial.mkdir(parents=True)
        if inputs is not None:
            replace_text(record, json.dumps(made_from))
        yield partial
        record.unlink(missing_ok=True)
        write_recipe(recipe, partial / "recipe.yaml")
        seal(partial)
        self._put_in_place(partial, target)

    def _put_in_place(self, partial: Path, target: Path) -> None:
        replaced = target.with_name(target.name + ".replaced")
        remove(replaced)
        if target.exists() or target.is_symlink():
            again = not target.is_symlink() and content_hash(target) == content_hash(partial)
            if not again and (target == self.adapter or not self._is_ours(target)):
                self.keep_as_previous(target)
            else:
                target.rename(replaced)
        partial.rename(target)
        remove(replaced)

    def _is_ours(self, target: Path) -> bool:
        """Says whether a folder is still as a stage wrote it."""
        changed = None if target.is_symlink() else differences(target)
        if changed is not None:
            return not changed
        recorded = [entry["outputs"].get(self._key(target)) for entry in self.manifest().values()]
        return target.is_dir() and content_hash(target) in recorded

    def _key(self, path: Path) -> str:
        """Returns an output's name in the manifest."""
        return path.relative_to(self.root).as_posix()

    def keep_edited(self, stage: str) -> None:
        """Moves files that were edited since the stage wrote them to previous/."""
        recorded = self.manifest().get(stage, {"outputs": {}})["outputs"]
        for path in filter(Path.is_file, self.outputs(stage)):
            if content_hash(path) != recorded.get(self._key(path), content_hash(path)):
                self.keep_as_previous(path)

    def keep_as_previous(self, target: Path) -> None:
        """Moves a file or folder to previous/, where nothing is ever replaced."""
        folder = self.root / "previous"
        folder.mkdir(exist_ok=True)
        number = 1
        while (kept := folder / f"{target.name}-{number}").exists():
            number += 1
        target.rename(kept)
        print(f"kept the earlier {target.name} as {kept}")

    def record(self, recipe: Recipe, stage: str, inputs: dict[str, Any], **figures: Any) -> None:
        """Marks the stage as done: writes its manifest entry and the resolved recipe."""
        manifest = self.manifest()
        manifest[stage] = {
            "inputs": inputs,
            "outputs": {self._key(path): content_hash(path) for path in self.outputs(stage)},
            "seed": recipe.seed,
            "versions": versions(),
            "commits": self.commits,
            "peak_memory_bytes": peak_memory(),
            "peak_gpu_memory_bytes": peak_gpu_memory(),
            **figures,
        }
        write_recipe(recipe, self.root / "recipe.yaml")
        replace_text(self.manifest_file, json.dumps(manifest, indent=2))


def stages_of(recipe: Recipe) -> list[str]:
    """Lists the stages of this recipe, in order."""
    trained = ["qat"] if recipe.quantize.training else []
    return ["train", *trained, "quantize", *exports_of(recipe), "evaluate"]


def exports_of(recipe: Recipe) -> list[str]:
    """Lists the formats to export; torchao's is quantized/ itself."""
    return [name for name in recipe.quantize.exports if name != "torchao"]


def section_inputs(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, Any]:
    """Returns the keys of the given sections; local files are replaced by their hashes."""
    dumped = recipe.model_dump(mode="json")
    if layers := dumped["quantize"]["layers"]:  # as text, because the order of patterns matters
        dumped["quantize"]["layers"] = json.dumps(layers)
    content = _flat(dumped)
    inputs = {
        key: content[key]
        for key in content
        if _within(key, sections)
        and (key in sections or key not in (*ONLY_FOR_EXPORTS, *NO_EFFECT_ON_ADAPTER))
    }
    for key in (".".join(map(str, at)) for at in path_fields(dumped)):
        if key == "model.base":  # hashing it takes minutes: _base_identity does it once
            continue
        if key in inputs and Path(inputs[key]).is_absolute():
            files = matching_files(Path(inputs[key]))
            inputs[key] = " ".join(f"sha256:{content_hash(file)}" for file in files)
    return inputs


class Stopwatch:
    """Counts the seconds since it was created."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 1)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that affect the result."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in LIBRARIES}


def peak_memory() -> int:
    """Returns the peak resident memory of this process in bytes, without GPU memory."""
    if LINUX_STATUS.exists():  # on Linux, getrusage starts with the peak of the parent process
        return 1024 * int(re.search(r"^VmHWM:\s*(\d+)", LINUX_STATUS.read_text(), re.M)[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory() -> int:
    """Returns the peak bytes that torch allocated on this process's GPU; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _holds_json(path: Path, expected: Any) -> bool:
    """Says whether the file exists and holds this JSON value."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(expected))
    except (OSError, ValueError):
        return False


def _command(stage: str) -> str:
    return f"{stage} RECIPE" if stage in STAGES else f"export RECIPE --to {stage}"


def _base_identity(recipe: Recipe) -> str:
    folder, file = locate_base(recipe.model)
    if folder is None:
        return f"{recipe.model.base}@{recipe.model.revision or 'main'}"
    base = folder / file if file else folder
    files = filter(Path.is_file, sorted([base, *base.rglob("*")]))
    stats = [(path, path.stat()) for path in files]
    state = tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
    return f"sha256:{_hash_of_base(base, state)}"


@functools.cache
def _hash_of_base(base: Path, state: tuple) -> str:
    """Hashes a base once per process and state of its files; a large base takes minutes."""
    return content_hash(base)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
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
        for key, value in _flat(item, f"{prefix}{dot}{name}").items()
    }


def _change(key: str, old: Any, new: Any, value: Any) -> str:
    """Describes a changed input; a file or folder by its name, as its hash would say nothing."""
    if str(old).startswith("sha256:") and str(new).startswith("sha256:"):
        return (
            f"{key}: the content of {value} changed" if value else f"the content of {key} changed"
        )
    return f"{key}: {old} -> {new}"


def _sections(recipe: Recipe, stage: str) -> tuple[str, ...]:
    calibrated = METHODS[recipe.quantize.method].is_calibrated
    if stage == "quantize" and (calibrated or recipe.quantize.budget):
        return (*SECTIONS[stage], "seed", "data")
    return SECTIONS.get(stage, ())


def _upstream(stage: str) -> tuple[str, ...]:
    return UPSTREAM.get(stage, ("quantized",))


def _changed_files(path: Path) -> str:
    """Lists up to three changed files of a folder, in parentheses."""
    changed = differences(path) if path.is_dir() else None
    return f" ({'; '.join(changed[:3])})" if changed else ""


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)
