"""Artifacts: folders with a SHA256SUMS file, written last and checked before each use."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finequant.recipes.errors import UserError, listed

SUMS = "SHA256SUMS"
"""Also readable by `sha256sum -c`."""

# Files in an artifact that do not count as its content: times and losses differ between otherwise
# identical runs.
NOT_CONTENT = ("training_log.json",)

CLUTTER = re.compile(r"\.DS_Store|\._.*|\.nfs.*|Thumbs\.db|desktop\.ini", re.IGNORECASE)
"""Names of files that a system leaves in folders that were looked at or copied: they are in no
artifact, and `._model.safetensors` holds no model."""

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


FileHash = Callable[[Path], str]


def file_hash(path: Path) -> str:
    """Reads a file and returns its SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Lists the files of a folder that match a pattern, sorted by name, without CLUTTER."""
    return [
        path
        for path in sorted(folder.glob(pattern))
        if path.is_file() and not CLUTTER.fullmatch(path.name)
    ]


def content_hash(
    path: Path,
    file_hash: FileHash = file_hash,
    is_content: Callable[[Path], bool] = lambda name: True,
) -> str:
    """Returns the SHA-256 of a file, or of a folder's relative names and contents.

    is_content: whether a file of the folder counts, by its relative name.
    """
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in files_in(path, "**/*"):
        name = file.relative_to(path)
        if file.name not in NOT_CONTENT and is_content(name):
            digest.update(f"{name}\0{file_hash(file)}\0".encode())
    return digest.hexdigest()


def seal(
    folder: Path, file_hash: FileHash = file_hash, without: Collection[str] = frozenset()
) -> None:
    """Writes SHA256SUMS for everything in the folder, which marks it as complete.

    without: names of files in it that are deleted next.
    """
    sums = _sums(folder, file_hash).items()
    text = "".join(f"{digest}  {name}\n" for name, digest in sums if name not in without)
    replace_text(folder / SUMS, text)


@contextmanager
def sealed(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder`, sealed, when the block succeeds."""
    partial = folder.with_name(f"{folder.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    yield partial
    seal(partial)
    remove(folder)
    partial.rename(folder)


def differences(folder: Path, file_hash: FileHash = file_hash) -> list[str] | None:
    """Lists what changed since the folder was sealed, file by file; None if it never was."""
    if not (folder / SUMS).exists():
        return None
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    before = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    current = _sums(folder, file_hash)
    changed = [name for name in {*before, *current} if before.get(name) != current.get(name)]
    return [
        f"{name}: {'missing' if name not in current else 'altered' if name in before else 'added'}"
        for name in sorted(changed)
    ]


def verify(folder: Path, again: str) -> None:
    """Refuses a folder that is damaged, was edited by hand, or contains pickled files.

    again: the command that recreates it.

    Raises:
        UserError: naming the files.
    """
    pickled = [path for path in files_in(folder, "**/*") if path.suffix in PICKLED]
    if pickled:
        raise UserError(
            f"{pickled[0]}: pickled files are not read because they can run code; expected "
            f"safetensors only: remove it, or recreate the folder with `{again}`"
        )
    if changed := differences(folder):
        raise UserError(
            f"{folder}: changed since it was written: truncated, damaged, or edited\n  "
            f"{listed(changed, most=10)}\n`finequant run RECIPE` or `{again}` recreates it and "
            f"keeps this one in previous/; to use it as it is, delete {folder / SUMS}"
        )


def read_part(file: Path, again: str, parse: Callable[[str], Any] = json.loads) -> Any:
    """Reads and parses a file that a command wrote.

    again: the command that writes it anew.

    Raises:
        UserError: for a file that is missing or damaged.
    """
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}): run `{again}` again") from None


def remove(path: Path) -> None:
    """Deletes a file, or a folder with everything in it; for a link, only the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a temporary file and renames it, so that a kill leaves the old or the new content."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_new(path: Path, text: str) -> None:
    """Writes a file that does not exist yet, whole or not at all.

    Raises:
        FileExistsError: if there is one, even if another process made it a moment ago.
    """
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except BaseException:
            path.unlink()
            raise


def _sums(folder: Path, file_hash: FileHash) -> dict[str, str]:
    """Maps relative names to hashes; for a link to "link", as its target may change unnoticed."""
    return {
        path.relative_to(folder).as_posix(): "link" if path.is_symlink() else file_hash(path)
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file())
        and path.name not in NOT_CONTENT
        and not CLUTTER.fullmatch(path.name)
        and path != folder / SUMS
    }
