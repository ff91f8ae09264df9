"""Git LFS: a clone without it holds pointers, of three lines, instead of large files."""

from __future__ import annotations

from pathlib import Path

from finequant.recipes.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a pointer begins (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""


def refuse_pointer(path: Path, key: str = "") -> None:
    """Refuses a file that only says where Git LFS keeps the content.

    key: the key of the recipe, with a colon, that the message starts with.

    Raises:
        UserError: naming the file, and how to get its content.
    """
    if not path.is_file():  # a pipe can be read only once
        return
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise UserError(
            f"{key}{path}: a Git LFS pointer, not the file itself: run `git lfs pull` in "
            f"{path.parent}, or download the file"
        )
