"""Reads the names of classes from the README.md of a dataset's folder, where the Hub keeps them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.finetune.data.files import BadRowError, Read, Unparsed, parsed
from finequant.recipes.errors import shown
from finequant.recipes.schema import Source
from finequant.recipes.sources import card_of, matching_files, metadata_in

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
