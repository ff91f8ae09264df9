"""Names of data files: which suffixes are read, and which files match `shards/*.parquet`, or belong
together line by line, as in `train.{en,de}.gz`."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from finequant.recipes.artifact import files_in

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of files that hold rows; a .txt file is one text."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes that may follow one of those."""
SCHEMA = "recipe.schema.json"
"""The schema of recipes, which `init` writes beside them: that may be in a folder of rows."""
PARALLEL = re.compile(r"\{(\w+(?:,\w+)+)\}")
"""Braces in the name of text files that each hold a column, with a row in each line."""


def kind_of(file: Path) -> tuple[str, str]:
    """Returns the suffix of the format, and that of the compression, if any."""
    last = file.suffix.lower()
    return (file.with_suffix("").suffix.lower(), last) if last in COMPRESSIONS else (last, "")


def is_table(file: Path) -> bool:
    """Says whether a file in a folder holds rows, by its name; hidden ones are not read, such as
    ._rows.csv."""
    return kind_of(file)[0] in TABLES and not file.name.startswith(".") and file.name != SCHEMA


def is_saved(folder: Path) -> bool:
    """Says whether a folder is the output of `save_to_disk`."""
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def is_pattern(name: str | Path) -> bool:
    """Says whether the name is a pattern that may match several files."""
    return glob.has_magic(str(name)) or bool(PARALLEL.search(str(name)))


def parallel_files(path: Path) -> dict[str, Path]:
    """Maps each column, named in the braces of a path, to its file; empty without braces."""
    match = PARALLEL.search(path.name)
    if not match or path.exists():
        return {}
    before, after = path.name[: match.start()], path.name[match.end() :]
    return {name: path.with_name(before + name + after) for name in match[1].split(",")}


def matching_files(path: Path) -> list[Path]:
    """Returns the file itself, or the files that a pattern matches, sorted by name."""
    if parallel := parallel_files(path):
        return [file for file in parallel.values() if file.exists()]
    if path.exists() or not is_pattern(path):
        return [path]
    pattern = path.relative_to(path.anchor)
    return files_in(Path(path.anchor), str(pattern))


def card_of(path: Path) -> Path | None:
    """Returns the README.md that names the classes of a file or folder of rows: beside them or, as
    in a clone from the Hub, one folder above; None if there is none."""
    folder = path if path.is_dir() else path.parent
    cards = (folder / "README.md", folder.parent / "README.md")
    return next((card for card in cards if "class_label" in metadata_in(card)), None)


def metadata_in(card: Path) -> str:
    """Returns the YAML at the beginning of a README.md of the Hub; empty if there is none."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    before, mark, _ = text.partition("\n---\n")
    return before + mark if text.startswith("---\n") else ""
