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
    """Lists the local files and folders that the task files name as their data.

    As in `datasets`, relative paths start at the current folder, and a pattern may stand for files.
    Files that cannot be read name none: `evaluate.check` refuses them.
    """
    import yaml

    names: set[str] = set()
    for file in folder.rglob("*.yaml"):
        with suppress(yaml.YAMLError, ValueError, OSError):
            names.update(_data_of(read_task_file(file)))
    matches = (matching_files(Path(name).absolute()) for name in names)
    return sorted({path for paths in matches for path in paths if path.exists()})


def _data_of(task: Any) -> Iterator[str]:
    """Yields what may be paths in a task's dataset_path and dataset_kwargs."""
    if not isinstance(task, dict):
        return
    path, arguments = task.get("dataset_path"), task.get("dataset_kwargs")
    if isinstance(path, str) and "/" in path:  # of a folder, or of the Hub
        yield path
    elif isinstance(arguments, dict):  # of json, csv, parquet, ...
        yield from _strings([arguments.get("data_files"), arguments.get("data_dir")])


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, (dict, list)):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _strings(item)
