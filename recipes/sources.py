"""Names of data files: which suffixes are read, and which files match `shards/*.parquet`."""

from __future__ import annotations

import glob
from pathlib import Path

TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of files that hold rows; a .txt file is one text."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes that may follow those."""


def is_pattern(name: str | Path) -> bool:
    """Says whether the name is a pattern that may match several files."""
    return glob.has_magic(str(name))


def matching_files(path: Path) -> list[Path]:
    """Returns the file itself, or the files that a pattern matches, sorted by name."""
    if path.exists() or not is_pattern(path):
        return [path]
    pattern = path.relative_to(path.anchor)
    return sorted(match for match in Path(path.anchor).glob(str(pattern)) if match.is_file())
