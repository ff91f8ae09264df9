"""Reads a user's own lm-eval task files, to find the local data that they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from finequant.recipes.sources import matching_files


def read_task_file(file: Path) -> Any:
    """Reads the YAML of a task file; `!function` and other tags become None.

    Raises:
        yaml.YAMLError, ValueError: if it is not YAML.
        OSError: if it cannot be read.
    """
    import yaml  # lm-eval's own YAML library, so that the error is the same

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    return yaml.load(file.read_bytes(), Loader)


def local_data(folder: Path) -> list[Path]:
    """Lists the local files and folders that the task files name as their data, and the files
    outside of `folder` that they include.

    As in `datasets`, relative paths start at the current folder, and a pattern may stand for files.
    Files that cannot be read name none: `evaluate.check` refuses them.
    """
    read: dict[Path, Any] = {}
    for file in folder.rglob("*.yaml"):
        _read_with_included(file.resolve(), read)
    names = {name for content in read.values() for name in _data_of(content)}
    matches = (matching_files(Path(name).absolute()) for name in names)
    outside = [file for file in read if not file.is_relative_to(folder.resolve())]
    return sorted({path for paths in [outside, *matches] for path in paths if path.exists()})


def _read_with_included(file: Path, read: dict[Path, Any]) -> None:
    """Adds to `read` the content of a file and of all that it includes, whatever their suffixes."""
    import yaml

    if file in read:
        return
    with suppress(yaml.YAMLError, ValueError, OSError):
        read[file] = read_task_file(file)
        for name in _strings(read[file].get("include") if isinstance(read[file], dict) else None):
            _read_with_included((file.parent / name).resolve(), read)


def _data_of(node: Any) -> Iterator[str]:
    """Yields what may be paths in the dataset_path and dataset_kwargs of a task, or of the tasks
    that a group defines."""
    if isinstance(node, dict):
        path, arguments = node.get("dataset_path"), node.get("dataset_kwargs")
        if path and isinstance(path, str):
            yield path  # of a folder, or json, csv, parquet, ..., or on the Hub
        if isinstance(arguments, dict):
            yield from _strings([arguments.get("data_files"), arguments.get("data_dir")])
    if isinstance(node, (dict, list)):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _data_of(item)


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, (dict, list)):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _strings(item)
