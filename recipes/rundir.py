"""The run directory, the only thing that stages share: paths, manifest, what is done or stale."""

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
from finequant.recipes.artefact import content_hash, differences, remove, replace_text, seal, verify
from finequant.recipes.base import locate_base
from finequant.recipes.errors import UserError
from finequant.recipes.load import path_fields, write_recipe
from finequant.recipes.schema import Recipe
from finequant.recipes.sources import matching_files

STAGES = ("train", "qat", "quantize", "evaluate")
"""Without the exports; `qat`, quantization-aware training, is there if the recipe asks for it."""
EXPORTS = ("compressed-tensors", "gguf", "executorch")
"""Formats that `finequant export` makes of quantized/; each is a stage of its own."""

# The recipe's sections that decide what a stage makes; files and upstream artefacts come on top.
SECTIONS = {
    "train": ("seed", "model", "data", "lora", "train"),
    "qat": ("seed", "model", "data", "lora", "train", "quantize"),
    "quantize": ("model", "quantize"),
    "compressed-tensors": (),
    "gguf": (),
    "executorch": ("quantize.cache_length",),
    "evaluate": ("seed", "model", "data", "quantize.dtype", "evaluate"),
}
UPSTREAM = {
    "train": (),
    "qat": ("adapter",),
    "quantize": ("adapter",),  # and trained_codes/, if the recipe has quantize.training
    **dict.fromkeys(EXPORTS, ("quantized",)),
    "evaluate": ("adapter", "quantized"),
}

# Of the section `quantize`, but they change nothing in quantized/.
ONLY_FOR_EXPORTS = ("quantize.exports", "quantize.cache_length")

# Of the section `train`, but the adapter depends on them no more than on the number of processes:
# by rounding (1e-7), and by the random numbers of dropout. After running out of memory, training
# resumes from the last checkpoint with a smaller micro-batch.
HOW_IT_IS_TRAINED = (
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.logging_steps",
    "train.report_to",
    "train.save_total_limit",
)

LINUX_STATUS = Path("/proc/self/status")

LIBRARIES = ("torch", "transformers", "peft", "trl", "torchao", "datasets", "accelerate", "lm_eval")


@dataclass(frozen=True)
class RunDir:
    """Paths of one run, and what its manifest says of the stages."""

    root: Path
    commits: dict[str, str] = field(default_factory=dict, compare=False)
    """Of the Hub's branches and tags that the recipe names, as `hub.pinned` gives them."""

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
        """What quantization-aware training starts from, named by all that decides it."""
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
        """What each finished stage recorded; empty before the first."""
        if not self.manifest_file.exists():
            return {}
        try:
            manifest = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            if all(entry.keys() >= {"inputs", "outputs"} for entry in manifest.values()):
                return manifest
        except (ValueError, AttributeError):  # no JSON, or not of objects
            pass
        raise UserError(
            f"{self.manifest_file}: damaged, not what a stage has written; "
            "delete it to redo every stage of this run"
        )

    def commits_of(self, stage: str) -> dict[str, str]:
        """The commits that a finished stage used."""
        return self.manifest().get(stage, {}).get("commits", {})

    def hold(self) -> None:
        """Keeps other processes out until the command ends.

        Raises:
            UserError: naming the process that is here already, or if nothing can be written here.
        """
        lock.hold(self.root)

    def inputs(self, recipe: Recipe, stage: str) -> dict[str, Any]:
        """Everything that decides the stage's result: recipe keys, and hashes of files.

        Raises:
            UserError: if the adapter that the stage is to use was trained here on another base.
        """
        inputs = self._inputs(recipe, stage)
        trained = self.manifest().get("train")
        if "adapter" not in UPSTREAM[stage] or trained is None:
            return inputs
        same = inputs["adapter/"] == f"sha256:{trained['outputs'].get('adapter')}"
        if same and trained["inputs"].get("model.base") != inputs["model.base"]:
            raise UserError(
                f"{self.adapter}: trained on another base than {recipe.model.base}: run "
                "`finequant train RECIPE` again, or set model.base to that of "
                f"{self.adapter / 'recipe.yaml'}"
            )
        return inputs

    def _inputs(self, recipe: Recipe, stage: str) -> dict[str, Any]:
        inputs = section_inputs(recipe, _sections(recipe, stage))
        if stage not in EXPORTS:  # what decides them lies in quantized/
            inputs["model.base"] = _base_identity(recipe)
        upstream = list(UPSTREAM[stage])
        if stage == "quantize" and recipe.quantize.training:
            upstream.append("trained_codes")
        if stage == "evaluate":
            upstream += [f"exports/{name}" for name in exports_of(recipe)]
        for artefact in upstream:
            inputs[f"{artefact}/"] = f"sha256:{content_hash(self.root / artefact)}"
        return inputs

    def outputs(self, stage: str) -> list[Path]:
        return {
            "train": [self.adapter],
            "qat": [self.trained_codes],
            "quantize": [self.quantized],
            **{name: [self.exports / name] for name in EXPORTS},
            "evaluate": [self.report, self.root / "report.md"],
        }[stage]

    def what_changed(self, recipe: Recipe, stage: str) -> list[str] | None:
        """Why the stage must run: None if never finished, else the changes, [] if up to date."""
        entry = self.manifest().get(stage)
        if entry is None or not all(path.exists() for path in self.outputs(stage)):
            return None
        old, new = entry["inputs"], self._inputs(recipe, stage)
        said = _flat(recipe.model_dump(mode="json"))
        return [
            _change(key, old.get(key, "absent"), new.get(key, "absent"), said.get(key))
            for key in sorted({*old, *new})
            if old.get(key, "absent") != new.get(key, "absent")
        ] + [
            f"{name}: changed since {stage} wrote it{_which(self.root / name)}"
            for name, digest in entry["outputs"].items()
            if content_hash(self.root / name) != digest
        ]

    def require(self, stage: str) -> None:
        """Refuses to build on a stage that has not been run here, or on what it did not write."""
        missing = [path for path in self.outputs(stage) if not path.exists()]
        if missing:
            raise UserError(
                f"{missing[0]} does not exist: run `finequant {_command(stage)}` first, "
                "or copy the folder here from the machine it was made on"
            )
        for folder in filter(Path.is_dir, self.outputs(stage)):
            verify(folder, again=f"finequant {_command(stage)}")

    @contextmanager
    def writing(
        self, target: Path, recipe: Recipe, inputs: dict[str, Any] | None = None
    ) -> Iterator[Path]:
        """A folder beside the target, which takes its place once the block has ended well.

        An earlier adapter is moved to `previous/`, and so is whatever a person has changed or put
        there; what can be made again is replaced.

        inputs: what decides the content; with it the folder that an interrupted call with the
            same inputs and versions left is handed over as it is.
        """
        partial = target.with_name(target.name + ".partial")
        record, made_from = partial / "inputs.json", {"inputs": inputs, "versions": versions()}
        if inputs is None or not _says(record, made_from):
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
        """Whether a folder is as a stage left it."""
        changed = None if target.is_symlink() else differences(target)
        if changed is not None:
            return not changed
        recorded = [entry["outputs"].get(self._key(target)) for entry in self.manifest().values()]
        return target.is_dir() and content_hash(target) in recorded

    def _key(self, path: Path) -> str:
        """An output's name in the manifest."""
        return path.relative_to(self.root).as_posix()

    def keep_edited(self, stage: str) -> None:
        """Moves those of the stage's files that were changed since it wrote them to previous/."""
        recorded = self.manifest().get(stage, {"outputs": {}})["outputs"]
        for path in filter(Path.is_file, self.outputs(stage)):
            if content_hash(path) != recorded.get(self._key(path), content_hash(path)):
                self.keep_as_previous(path)

    def keep_as_previous(self, target: Path) -> None:
        """Moves a file or folder to previous/, where nothing is replaced."""
        folder = self.root / "previous"
        folder.mkdir(exist_ok=True)
        number = 1
        while (kept := folder / f"{target.name}-{number}").exists():
            number += 1
        target.rename(kept)
        print(f"kept the earlier {target.name} as {kept}")

    def record(self, recipe: Recipe, stage: str, inputs: dict[str, Any], **figures: Any) -> None:
        """Writes the stage's manifest entry and the resolved recipe: the stage is done."""
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
    """The stages of this recipe, in their order."""
    trained = ["qat"] if recipe.quantize.training else []
    return ["train", *trained, "quantize", *exports_of(recipe), "evaluate"]


def exports_of(recipe: Recipe) -> list[str]:
    """The formats to make of quantized/, which is torchao's already."""
    return [name for name in recipe.quantize.exports if name != "torchao"]


def section_inputs(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, Any]:
    """The keys of some sections; where a file is named, the hash of what is in it."""
    dumped = recipe.model_dump(mode="json")
    if layers := dumped["quantize"]["layers"]:  # as text: the order of patterns counts
        dumped["quantize"]["layers"] = json.dumps(layers)
    content = _flat(dumped)
    inputs = {
        key: content[key]
        for key in content
        if _within(key, sections)
        and (key in sections or key not in (*ONLY_FOR_EXPORTS, *HOW_IT_IS_TRAINED))
    }
    for key in (".".join(map(str, at)) for at in path_fields(dumped)):
        if key == "model.base":  # which takes minutes, and is left to _base_identity
            continue
        if key in inputs and Path(inputs[key]).is_absolute():
            files = matching_files(Path(inputs[key]))
            inputs[key] = " ".join(f"sha256:{content_hash(file)}" for file in files)
    return inputs


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._start, 1)


def versions() -> dict[str, str]:
    """Installed versions of the libraries that decide the result, and of Python."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in LIBRARIES}


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; what it took of a GPU's is not in it."""
    if LINUX_STATUS.exists():  # getrusage's begins there with the peak of the parent process
        return 1024 * int(re.search(r"^VmHWM:\s*(\d+)", LINUX_STATUS.read_text(), re.M)[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory() -> int:
    """Peak bytes that torch allocated on the GPU of this process; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _says(path: Path, expected: Any) -> bool:
    """Whether a JSON file is there with this content."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(expected))
    except (OSError, ValueError):
        return False


def _command(stage: str) -> str:
    return f"export RECIPE --to {stage}" if stage in EXPORTS else f"{stage} RECIPE"


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
    """Once in a process for each state of its files: a large base takes minutes."""
    return content_hash(base)


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys: {"lora": {"rank": 8}} -> {"lora.rank": 8}."""
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


def _change(key: str, old: Any, new: Any, said: Any) -> str:
    """A changed input in words; for files and folders, whose hashes say nothing, their names."""
    if str(old).startswith("sha256:") and str(new).startswith("sha256:"):
        return f"{key}: {said} has other content" if said else f"{key} has other content"
    return f"{key}: {old} -> {new}"


def _sections(recipe: Recipe, stage: str) -> tuple[str, ...]:
    if stage == "quantize" and (recipe.quantize.method == "gptq" or recipe.quantize.budget):
        return (*SECTIONS[stage], "seed", "data")
    return SECTIONS[stage]


def _which(path: Path) -> str:
    """The changed files of a folder, in brackets."""
    changed = differences(path) if path.is_dir() else None
    return f" ({'; '.join(changed[:3])})" if changed else ""


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)
