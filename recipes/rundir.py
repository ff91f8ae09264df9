"""The run directory, the only thing stages share: its paths, its manifest, and what is stale."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finequant.recipes import lock
from finequant.recipes.artifact import SUMS, differences, remove, replace_text, seal, verify
from finequant.recipes.errors import UserError
from finequant.recipes.freshness import (
    FOR_CONTINUING,
    MEASURING,
    RECORD,
    Inputs,
    Memo,
    changes,
    content_hash,
    is_made_from,
    known_hash,
    mark,
    recorded,
    versions,
    why_stale,
)
from finequant.recipes.load import write_recipe
from finequant.recipes.schema import Recipe
from finequant.recipes.stages import (
    MEASURING_CODE,
    MISSING,
    command_of,
    flat,
    recipe_inputs,
    row_of,
    stage_of,
    writer_of,
)
from finequant.recipes.terminal import say
from finequant.recipes.usage import peak_gpu_memory, peak_memory


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
    def data(self) -> Path:
        """Returns the folder of rows and tokens, which the first stage that needs them writes."""
        return self.root / "data"

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

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    @property
    def page(self) -> Path:
        return self.root / "report.html"

    @property
    def predictions(self) -> Path:
        """Returns the file of the held-out rows with every model's answers."""
        return self.root / "predictions.jsonl"

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
        """Returns the commits that a finished stage used."""
        return self.manifest().get(stage, {}).get("commits", {})

    def hold(self) -> None:
        """Locks the directory until the command ends.

        Raises:
            UserError: naming the process that holds the lock, or if the directory is not writable.
        """
        lock.hold(self.root)

    def inputs(self, recipe: Recipe, stage: str) -> Inputs:
        """Returns everything that decides the stage's result: recipe keys and hashes of files."""
        row = stage_of(stage, recipe)
        artifacts = {f"{name}/": f"sha256:{_made(self.root / name)}" for name in row.reads}
        code = {MEASURING: MEASURING_CODE} if row.measures else {}
        return recipe_inputs(recipe, row.keys, row.without) | artifacts | code

    def memo(self, recipe: Recipe, name: str) -> Memo:
        """Returns the file of a value in the table of stages, such as measurements/base."""
        return Memo(self.root / f"{name}.json", self.inputs(recipe, name))

    def outputs(self, stage: str) -> list[Path]:
        return [self.root / name for name in row_of(stage).writes]

    def what_changed(self, recipe: Recipe, stage: str) -> list[str] | None:
        """Lists why the stage must run: None if it never finished, [] if it is up to date."""
        entry = self.manifest().get(stage)
        if entry is None or not self.has(stage):
            return None
        changed = self._changes(entry, recipe, stage)
        return [*changed.values(), *self._edited(stage, entry)]

    def _changes(self, entry: dict[str, Any], recipe: Recipe, stage: str) -> dict[str, str]:
        """Maps each input that differs from a manifest entry's to a sentence about it.

        A key of the recipe that is newer than the entry only counts if the recipe sets it, and what
        a missing file contained is not known.
        """
        inputs, values = self.inputs(recipe, stage), _values(recipe)
        unknown = {key: entry["inputs"].get(key) for key in inputs if inputs[key] == MISSING}
        changed = changes(entry["inputs"], inputs | unknown, values)
        known = entry["inputs"].keys() | _values(recipe, exclude_defaults=True).keys()
        return {key: why for key, why in changed.items() if key in known or key not in values}

    def has(self, stage: str) -> bool:
        """Says whether all outputs of the stage exist, whoever made them."""
        return all(path.exists() for path in self.outputs(stage))

    def _edited(self, stage: str, entry: dict[str, Any]) -> list[str]:
        return [
            f"{name}: changed since {stage} wrote it{_changed_files(self.root / name)}"
            for name, digest in entry["outputs"].items()
            if content_hash(self.root / name) != digest
        ]

    def require_for(self, stage: str, recipe: Recipe) -> None:
        """Refuses to start a stage on artifacts that `require` refuses."""
        for artifact in stage_of(stage, recipe).reads:
            self.require(writer_of(artifact), recipe)

    def require(self, stage: str, recipe: Recipe, any_base: bool = False) -> None:
        """Refuses a stage's outputs if they are missing, damaged, or not made from what is here.

        Changes of other keys of the recipe are only reported: by hand, stages may run with any.

        any_base: whether the base may have changed since.

        Raises:
            UserError: naming what changed, and the command that makes the outputs again.
        """
        self.require_intact(stage)
        outputs, entry = self.outputs(stage), self.manifest().get(stage)
        if entry is None or self._edited(stage, entry):  # brought from elsewhere
            return
        changed = self._changes(entry, recipe, stage)
        if any_base:
            changed.pop("model.base", None)
        unusable = {key: text for key, text in changed.items() if self._decides(key, stage)}
        if unusable:
            is_of_recipe = not any(key.endswith("/") for key in unusable)  # all of the changes
            values = f", or use the values in {outputs[0] / 'recipe.yaml'}" if is_of_recipe else ""
            raise UserError(
                f"{outputs[0]}: not made from the present inputs: {'; '.join(unusable.values())}: "
                f"run `{command_of(stage)}` again{values}"
            )
        if changed:
            say(f"{outputs[0]}: made with other settings: {'; '.join(changed.values())}")

    def require_intact(self, stage: str) -> None:
        """Reads the stage's outputs, and refuses them if they are missing or were changed."""
        self.require_there(stage)
        for path in self.outputs(stage):
            if path.is_dir():
                verify(path, again=command_of(stage))

    def require_there_for(self, stage: str, recipe: Recipe) -> None:
        """Refuses to start a stage if an artifact that it needs does not exist; reads none."""
        for artifact in stage_of(stage, recipe).reads:
            self.require_there(writer_of(artifact))

    def require_there(self, stage: str) -> None:
        """Refuses a stage whose outputs do not exist yet; reads none."""
        for path in self.outputs(stage):
            if not path.exists():
                raise UserError(
                    f"{path} does not exist: run `finequant run RECIPE`, or only "
                    f"`{command_of(stage)}`, first, or copy it here from the machine that made it"
                )

    def _decides(self, key: str, stage: str) -> bool:
        """Says whether a change of this input, such as the base, makes the stage's result unusable.

        An artifact may be absent: for exports alone, the adapter is not needed.
        """
        if key.endswith("/"):
            return (self.root / key).exists()
        return key in row_of(stage).bound_to

    @contextmanager
    def writing(self, target: Path, recipe: Recipe, inputs: Inputs | None = None) -> Iterator[Path]:
        """Yields a temporary folder that replaces the target when the block succeeds.

        An earlier adapter, and anything that the user changed or put there, moves to `previous/`;
        what can be recreated is replaced.

        inputs: what decides the content. If given, the folder of an interrupted call with the same
            inputs and versions is reused as it is, even if that call was killed between the last
            lines here and `record`.
        """
        partial = target.with_name(target.name + ".partial")
        if inputs is not None:
            self._take_back(target, partial, inputs)
        if inputs is None or not is_made_from(partial, inputs):
            remove(partial)
            partial.mkdir(parents=True)
        if inputs is not None:
            mark(partial, inputs)
        yield partial
        write_recipe(recipe, partial / "recipe.yaml")
        # What is read here may take minutes to hash, in which a signal must not lose the folder.
        seal(partial, known_hash, without=FOR_CONTINUING)
        is_kept = self._is_kept(target, partial)
        if inputs is not None:
            _move(reversed(FOR_CONTINUING), partial, _unrecorded(target))
        self._put_in_place(partial, target, is_kept)

    def _take_back(self, target: Path, partial: Path, inputs: Inputs) -> None:
        """Makes a folder that was complete, but not recorded before a kill, an unfinished one."""
        unrecorded = _unrecorded(target)
        if is_made_from(unrecorded, inputs):
            is_intact = not target.is_symlink() and differences(target, known_hash) == []
            if is_intact and not partial.exists() and not self._is_recorded(target):
                target.rename(partial)
            if partial.exists():
                _move(FOR_CONTINUING, unrecorded, partial)
        remove(unrecorded)

    def continuing(self, folder: Path, stage: str, inputs: Inputs) -> None:
        """Prepares a folder for checkpoints; those of the same inputs and versions stay.

        The checkpoints of a finished training are removed, any others are kept in `previous/`.
        """
        if is_made_from(folder, inputs):
            return
        why = "; ".join(why_stale(folder, inputs))
        finished = self.manifest().get(stage)
        if finished and recorded(folder) == {key: finished[key] for key in ("inputs", "versions")}:
            say(f"{stage}: removed {folder}, which was made with other inputs: {why}")
            removed = folder.with_name(folder.name + ".removed")
            remove(removed)
            folder.rename(removed)
            remove(removed)
        elif folder.exists() and any(path.name != f"{RECORD}.partial" for path in folder.iterdir()):
            say(f"{stage}: cannot continue from {folder}: {why}")
            self.keep_as_previous(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark(folder, inputs)

    def _is_kept(self, target: Path, partial: Path) -> bool:
        """Says whether an earlier artifact moves to previous/ when `partial` replaces it."""
        if target.is_symlink():
            return True

        def is_content(name: Path) -> bool:
            return str(name) not in FOR_CONTINUING

        if not target.exists() or content_hash(target) == content_hash(
            partial, is_content=is_content
        ):
            return False
        return target == self.adapter or not self._is_ours(target)

    def _put_in_place(self, partial: Path, target: Path, is_kept: bool) -> None:
        replaced = target.with_name(target.name + ".replaced")
        remove(replaced)
        if is_kept:
            self.keep_as_previous(target)
        elif target.exists():
            target.rename(replaced)
        partial.rename(target)
        remove(replaced)

    def _is_ours(self, target: Path) -> bool:
        """Says whether a folder is still as a stage wrote it."""
        changed = None if target.is_symlink() else differences(target)
        return self._is_recorded(target) if changed is None else not changed

    def _is_recorded(self, target: Path) -> bool:
        """Says whether a folder is as the manifest says of it."""
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
        say(f"kept the earlier {target.name} as {kept}")

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
        for path in (*self.outputs(stage), self.merged):  # which `quantize` writes before the other
            remove(_unrecorded(path))


def _made(path: Path) -> str:
    """Returns the SHA-256 of an artifact without its record of the recipe: rows that were moved, or
    a key that did not decide it, change only that."""
    return content_hash(path, is_content=lambda name: str(name) not in ("recipe.yaml", SUMS))


def _unrecorded(target: Path) -> Path:
    """Returns the folder that holds, until a complete target is recorded, what continuing takes.

    Its RECORD is the first to come and the last to leave, so that a kill in between loses nothing.
    """
    return target.with_name(target.name + ".unrecorded")


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).exists():
            (source / name).replace(target / name)


def _values(recipe: Recipe, exclude_defaults: bool = False) -> dict[str, Any]:
    return flat(recipe.model_dump(mode="json", exclude_defaults=exclude_defaults))


def _changed_files(path: Path) -> str:
    """Lists up to three changed files of a folder, in parentheses."""
    changed = differences(path) if path.is_dir() else None
    return f" ({'; '.join(changed[:3])})" if changed else ""
