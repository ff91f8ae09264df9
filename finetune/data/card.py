"""Reads, from the README.md of a dataset's folder, the names of classes, and which files belong to
which split and configuration: the Hub keeps both there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.finetune.data.files import BadRowError, Read, Unparsed, parsed
from finequant.finetune.data.json_files import SPLITS
from finequant.recipes.artifact import files_in
from finequant.recipes.errors import UserError, counted, listed, shown
from finequant.recipes.schema import Source
from finequant.recipes.sources import card_of, is_table, matching_files, metadata_in

if TYPE_CHECKING:
    from datasets import ClassLabel


def with_names(rows: Iterable[Unparsed], path: Path) -> Iterator[Unparsed]:
    """Yields the rows of a file with the names of classes in place of their numbers."""
    classes = classes_of(path)
    return _named(rows, classes) if classes else iter(rows)


def classes_of(path: Path) -> dict[str, ClassLabel]:
    """Maps each column of a file or folder for which its README.md names classes, the same in all
    configurations of the dataset, to these."""
    card = card_of(path)
    return _classes_in(metadata_in(card)) if card else {}


def names_from(source: Source) -> str:
    """Says from where the names of a source's classes are; empty if its rows have them, too."""
    path = Path(source.source)
    files = matching_files(path) if path.is_absolute() else []
    for file in files:
        if classes := classes_of(file):
            return f"names of the classes of {', '.join(classes)}: from {card_of(file)}"
    return ""


def refuse_other_split(folder: Path, files: list[Path], split: str) -> None:
    """Refuses to read these files of a folder as one split, if its README.md, or that of the folder
    above, says otherwise: their names, from which splits are guessed, then mislead.

    Raises:
        UserError: with the files of each split and configuration.
    """
    described = {
        (config, name): [file for file in members if file.parent == folder and is_table(file)]
        for card in (folder / "README.md", folder.parent / "README.md")
        for (config, name), members in _files_in(card).items()
    }
    described = {key: members for key, members in described.items() if members}
    words = SPLITS.get(split, {split})
    if not described or files in [described[key] for key in described if key[1] in words]:
        return
    lines = [
        f"{name} of {config}: {', '.join(file.name for file in members)}"
        for (config, name), members in described.items()
    ]
    example = next(iter(described.values()))[0]
    raise UserError(
        f"{folder}: {counted(len(files), 'file')} would be read for {split}, but the README.md of "
        f"this dataset says otherwise: name the files, such as {example}\n  {listed(lines)}"
    )


def _files_in(card: Path) -> dict[tuple[str, str], list[Path]]:
    """Maps configurations and splits to their files, as `configs` of a README.md lists them."""
    metadata = metadata_in(card)
    if "data_files:" not in metadata:
        return {}
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    described: dict[tuple[str, str], list[Path]] = {}
    # These are the errors of YAML, of `datasets`, and of patterns that are URLs.
    with suppress(Exception):
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard(metadata).data)
        for config, values in configs.items():
            for split, patterns in sanitize_patterns(values.get("data_files") or []).items():
                files = {file for pattern in patterns for file in files_in(card.parent, pattern)}
                described[config, split] = sorted(files)
    return described


@cache
def _classes_in(metadata: str) -> dict[str, ClassLabel]:
    from datasets import ClassLabel
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCard

    try:
        infos = DatasetInfosDict.from_dataset_card_data(DatasetCard(metadata).data)
    # These are the errors of YAML and of `datasets`: this README.md describes no columns.
    except Exception:
        return {}
    features = [info.features or {} for info in infos.values()]
    classes: dict[str, Any] = {}
    for name in dict.fromkeys(name for columns in features for name in columns):
        kinds = [columns[name] for columns in features if name in columns]
        kinds = [getattr(kind, "feature", kind) for kind in kinds]  # of a list
        if isinstance(kinds[0], ClassLabel) and all(kind == kinds[0] for kind in kinds):
            classes[name] = kinds[0]
    return classes


def _named(rows: Iterable[Unparsed], classes: dict[str, ClassLabel]) -> Iterator[Read]:
    for where, unparsed in rows:
        row = parsed(unparsed)
        if not isinstance(row, BadRowError):
            try:
                row = row | {n: _name(row[n], kind) for n, kind in classes.items() if n in row}
            except BadRowError as error:
                row = BadRowError(f"{where}: {error}")
        yield where, row


def _name(value: Any, classes: ClassLabel) -> Any:
    """Returns the name of a class; None for -1, which means none, and a name as it is.

    Raises:
        BadRowError: for a number that has no name.
    """
    if isinstance(value, list):
        return [_name(item, classes) for item in value]
    is_number = isinstance(value, int) or re.fullmatch(r"-?\d+(\.0)?", str(value))
    if not is_number or value in classes.names or isinstance(value, bool):
        return value
    number = int(float(value))
    if number >= classes.num_classes:
        raise BadRowError(
            f"class {shown(value)}: the README.md of this dataset names classes 0 to "
            f"{classes.num_classes - 1}"
        )
    return None if number < 0 else classes.names[number]
