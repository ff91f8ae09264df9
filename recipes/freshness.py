"""Records what a result was made from, and says whether it is still up to date.

The inputs of a result are the keys of the recipe and the hashes of the files that decide it; the
table in `stages.py` lists them. A finished result is up to date while its inputs are the same,
whatever the versions of the libraries. If several commands make a result (an interrupted folder,
checkpoints, measurements that are compared), the versions must be the same, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from finequant.recipes import artifact
from finequant.recipes.artifact import replace_text
from finequant.recipes.errors import UserError
from finequant.recipes.sources import is_saved, is_table

Inputs = dict[str, Any]
"""Recipe keys -> values, or hashes of what they name; artifacts, named with a slash -> hashes."""

MEASURING = "measuring_code"
"""The input that says by which code something was measured."""

RECORD = "inputs.json"
"""The file in a folder that says what the folder is made from."""

JOURNAL = "journal.jsonl"
"""The file in an unfinished folder that lists what is written."""

FOR_CONTINUING = (JOURNAL, RECORD)
"""The files without which an unfinished folder cannot be continued."""

LIBRARIES = ("torch", "transformers", "peft", "trl", "torchao", "datasets", "accelerate", "lm_eval")

LARGE = 1 << 20
"""Bytes from which the hash of a file is cached."""

SETTLED_SECONDS = 2.0
"""The coarsest resolution of a file system's time stamps: within it, a file can change and keep its
stamp. As in git's index, hashes of such new files are not cached: https://git-scm.com/docs/racy-git"""


@cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that affect the result."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in LIBRARIES}


def changes(old: Inputs, new: Inputs, recipe: dict[str, Any] | None = None) -> dict[str, str]:
    """Maps each input that differs to a sentence about it.

    recipe: values by key, to name the files of which the inputs have only hashes.
    """
    absent = "absent"
    return {
        key: _change(key, old.get(key, absent), new.get(key, absent), (recipe or {}).get(key))
        for key in sorted({*old, *new})
        if old.get(key, absent) != new.get(key, absent)
    }


def _change(key: str, old: Any, new: Any, value: Any) -> str:
    """Describes a changed input; a file or folder by its name, as its hash would say nothing."""
    if key == MEASURING:
        return f"finequant has changed how it measures ({MEASURING} {old} -> {new})"
    was_local, is_local = (str(entry).startswith("sha256:") for entry in (old, new))
    if was_local and is_local:
        return (
            f"{key}: the content of {value} changed" if value else f"the content of {key} changed"
        )
    if key.endswith("/"):  # an artifact
        return f"{key} is new" if is_local else f"{key} is no longer used"
    old = "a file or folder" if was_local else _as_in_recipe(old)
    new = f"{new[:19]} ({value})" if is_local and value else _as_in_recipe(new)
    return f"{key}: {old} -> {new}"


def _as_in_recipe(value: Any) -> str:
    """Writes a value as YAML does where Python has other words: null, true."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def digest(inputs: Inputs) -> str:
    """Returns a short name for what is made from these inputs and versions."""
    text = json.dumps(_origin(inputs), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Folders


def mark(folder: Path, inputs: Inputs) -> None:
    """Records what the folder is made from."""
    replace_text(folder / RECORD, json.dumps(_origin(inputs)))


def recorded(folder: Path) -> dict[str, Any] | None:
    """Returns the inputs and versions that the folder is marked with."""
    return _read(folder / RECORD)


def is_made_from(folder: Path, inputs: Inputs) -> bool:
    """Says whether the folder is marked with these inputs and the current versions."""
    return recorded(folder) == json.loads(json.dumps(_origin(inputs)))


def why_stale(folder: Path, inputs: Inputs) -> list[str]:
    """Lists the inputs and versions that differ from those that the folder is marked with."""
    old, new = recorded(folder), json.loads(json.dumps(_origin(inputs)))
    if not isinstance(old, dict) or old.keys() != new.keys():
        return ["it has no record of its inputs"]
    return [text for part in new for text in changes(old[part], new[part]).values()]


def made_once(folder: Path, inputs: Inputs, make: Callable[[Path], None]) -> Path:
    """Returns the folder, which `make` fills unless it was made from these inputs before.

    Of several processes, one makes it, and the others wait. A kill leaves no incomplete folder.
    """
    from filelock import FileLock

    def is_made() -> bool:
        return is_made_from(folder, inputs) and artifact.differences(folder, known_hash) == []

    if is_made():  # also where nothing can be written, not even a lock
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if is_made():
            return folder
        with artifact.sealed(folder) as unfinished:
            make(unfinished)
            mark(unfinished, inputs)
    return folder


# Values


class Memo(NamedTuple):
    """A JSON value in a file, used again as long as it would be computed from the same inputs."""

    file: Path
    inputs: Inputs

    def keep(self, value: Any) -> None:
        """Writes the value."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = _origin(self.inputs) | {"value": value}
        replace_text(self.file, json.dumps(content | {"sha256": _hash_of(content)}))

    def value(self) -> Any | None:
        """Returns an earlier command's value, if inputs and versions are the same.

        Raises:
            UserError: if the file is not as it was written.
        """
        if not self.file.exists():
            return None
        content = _read(self.file)
        if not isinstance(content, dict) or content.pop("sha256", None) != _hash_of(content):
            raise UserError(
                f"{self.file}: changed since it was written: truncated, damaged, or edited; delete "
                "it, and the same command measures again"
            )
        value = content.pop("value")
        return value if content == json.loads(json.dumps(_origin(self.inputs))) else None


def _origin(inputs: Inputs) -> dict[str, Any]:
    return {"inputs": inputs, "versions": versions()}


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(file: Path) -> Any | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# Hashes


def known_hash(file: Path) -> str:
    """Returns the SHA-256 of a file; a large one is read again only if its stamp has changed.

    The stamp contains the change time of the file's inode, which no program can set, so a file that
    was edited in place and got its old modification time back is read again.
    """
    stamp = _stamp(file)
    if stamp["size"] < LARGE:
        return artifact.file_hash(file)
    entry = cache_folder() / "hashes" / f"{stamp['device']}-{stamp['inode']}.json"
    known = _read(entry)
    if isinstance(known, dict) and known.get("stamp") == stamp:
        return known["sha256"]
    before = _now(entry.parent)
    value = artifact.file_hash(file)
    changed = max(stamp["modified"], stamp["changed"])
    if _stamp(file) == stamp and changed < before - SETTLED_SECONDS * 10**9:
        with suppress(OSError):  # a full disk, or a home that is not writable
            replace_text(entry, json.dumps({"stamp": stamp, "sha256": value}))
    return value


content_hash = partial(artifact.content_hash, file_hash=known_hash)
"""Returns the SHA-256 of a file or folder, without reading again what is large and unchanged."""

NOT_READ = re.compile(
    r"\..*|__pycache__|(licen[cs]e|notice|copying|readme|use_policy)(\.(txt|rst))?|.*\.(md|pdf)",
    re.IGNORECASE,
)
"""Names of files and folders that no stage reads in a base or a folder of rows or tasks: hidden
ones, such as .DS_Store and .git, caches, licenses and documents."""


def input_hash(path: Path) -> str:
    """Returns the SHA-256 of a user's file, or of what stages may read of a user's folder."""

    def is_read(name: Path) -> bool:
        return not any(map(NOT_READ.fullmatch, name.parts))

    return content_hash(path, is_content=is_read)


def rows_hash(folder: Path) -> str:
    """Returns the SHA-256 of what is read of a folder of rows, which may also hold the recipe and
    its runs."""
    if is_saved(folder):
        return input_hash(folder)
    return content_hash(folder, is_content=lambda name: len(name.parts) == 1 and is_table(name))


def _stamp(file: Path) -> dict[str, int]:
    stat = file.stat()
    return {
        "device": stat.st_dev,
        "inode": stat.st_ino,
        "size": stat.st_size,
        "modified": stat.st_mtime_ns,
        "changed": stat.st_ctime_ns,
    }


def _now(folder: Path) -> int:
    """Returns the time in ns by this machine's clock or the file system's, whichever is behind."""
    now = time.time_ns()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        now = min(now, folder.stat().st_mtime_ns)
    return now


def cache_folder() -> Path:
    """Returns the user's cache folder, inside that of the Hugging Face Hub's client, which follows
    HF_HOME and XDG_CACHE_HOME. It may be deleted at any time.

    Raises:
        UserError: if it would be in the home of a user who has none.
    """
    from huggingface_hub.constants import HF_ASSETS_CACHE

    try:
        return Path(HF_ASSETS_CACHE).expanduser() / "finequant"
    except RuntimeError:  # as in a container that runs as any user
        raise UserError(
            "this user has no home directory, where hashes and dequantized bases are kept: set "
            "HF_HOME=FOLDER in the environment"
        ) from None
