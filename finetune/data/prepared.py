"""Reads, checks and splits the rows of a run once, for all of its stages and processes.

`data/` in the run directory has a folder for each state of sources and settings, with the table of
rows and the indices of each split, and folders of their tokens. It may be deleted.
"""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from finequant.finetune.data.splits import Splits, load_splits
from finequant.finetune.data.table import TABLE, TOKEN_KEYS, Hashes, Rows, open_table
from finequant.recipes.artifact import content_hash, remove
from finequant.recipes.freshness import Inputs, digest, made_once
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.sources import matching_files
from finequant.recipes.stages import recipe_inputs
from finequant.recipes.terminal import say
from finequant.recipes.usage import Stopwatch

KEPT = {"rows": 3, "tokens": 9}
"""Folders of each kind to keep: for training, calibration, and settings that were tried."""
INDICES, NOTES = "splits.npz", "notes.json"
SPLITS = ("train", "validation", "test")
SECONDS = 5
"""Reading that takes longer than this gets a line."""
UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,  # below /proc
)


def prepared_splits(recipe: Recipe) -> Splits:
    """Returns the rows of a recipe's section `data`, which the first call reads from their sources.

    Where the run directory cannot be written, every call reads the sources.

    Raises:
        UserError: for whatever `load_splits` refuses.
    """
    inputs = _inputs(recipe)
    folder = RunDir.of(recipe).data / f"rows-{digest(inputs)}"
    try:
        made_once(folder, inputs, partial(_write, recipe))
        os.utime(folder)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return load_splits(recipe.data, recipe.seed)
    _remove_oldest(folder)
    return _opened(folder)


def _inputs(recipe: Recipe) -> Inputs:
    """Returns what decides the rows and, with another file's name, where they are said to be.

    Another version of finequant, or of a clone, may read the same sources otherwise.
    """
    without = tuple(f"data.{key}" for key in TOKEN_KEYS)
    code = content_hash(Path(__file__).parent, is_content=lambda name: name.suffix == ".py")
    data = recipe.data
    paths = [Path(source.source) for source in (*data.train, *data.validation, *data.test)]
    files = [file for path in paths if path.is_absolute() for file in matching_files(path)]
    return recipe_inputs(recipe, ("seed", "data"), without) | {
        "finequant": version("finequant"),
        "code": code,
        "files": [file.name for file in files],
    }


def _write(recipe: Recipe, folder: Path) -> None:
    watch = Stopwatch()
    try:
        splits = load_splits(recipe.data, recipe.seed, folder)
    except BaseException:
        remove(folder)
        raise
    indices = {name: getattr(splits, name).indices for name in SPLITS}
    np.savez(folder / INDICES, **indices, **splits.train.of_table._asdict())
    (folder / NOTES).write_text(json.dumps(splits.notes), encoding="utf-8")
    if watch.seconds > SECONDS:
        say(f"data: {sum(map(len, splits[:3])):,} rows read and split in {watch.seconds:.0f} s")


def _opened(folder: Path) -> Splits:
    notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    table, stored = open_table(folder / TABLE), np.load(folder / INDICES)
    hashes = Hashes(*(stored[name] for name in Hashes._fields))
    rows = [Rows(table, stored[name], folder, name, hashes) for name in SPLITS]
    return Splits(*rows, notes)


def _remove_oldest(used: Path) -> None:
    """Removes the folders that were not used for longest.

    used: the one that is used now; by a clock that was set back, it may seem the oldest.
    """
    for kind, most in KEPT.items():
        folders = used.parent.glob(f"{kind}-*")
        kept = sorted(folders, key=lambda path: (path == used, path.stat().st_mtime))
        for old in kept[:-most]:
            remove(old)
