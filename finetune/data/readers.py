"""Reads files, folders and Hub datasets as rows with locations, "file:line" or "dataset[index]"."""

from __future__ import annotations

import glob
import json
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finequant.finetune.data.arrow_values import restored
from finequant.finetune.data.card import refuse_other_split, with_names
from finequant.finetune.data.files import (
    BadRowError,
    Line,
    Read,
    Unparsed,
    line_that_breaks,
    open_text,
    parsed,
)
from finequant.finetune.data.json_files import NAME_SPLIT, SPLITS, lists_of, read_json_file
from finequant.finetune.data.table_files import read_arrow, read_csv
from finequant.recipes.errors import UserError, counted, one_line
from finequant.recipes.git_lfs import refuse_pointer
from finequant.recipes.hub import offline_reason
from finequant.recipes.schema import Source
from finequant.recipes.sources import (
    COMPRESSIONS,
    TABLES,
    is_saved,
    is_table,
    kind_of,
    matching_files,
    parallel_files,
)
from finequant.recipes.terminal import tracked

if TYPE_CHECKING:
    from datasets import Dataset

SIGNATURES = {
    b"\x1f\x8b": ("a gzip file", "rename it to {}.gz"),
    b"BZh": ("a bzip2 file", "rename it to {}.bz2"),
    b"\xfd7zXZ": ("an xz file", "rename it to {}.xz"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "rename it to {}.zst"),
    b"PK\x03\x04": ("an Excel file or a ZIP archive", "save the sheet as CSV UTF-8, or unpack it"),
    b"PAR1": ("a Parquet file", "let its name end in .parquet"),
}
"""First bytes of a file that is no text -> what it is, and what to do; {} is its name."""

REMEDIES = {
    ".xlsx": "from Excel: save the sheet as CSV UTF-8",
    ".xls": "from Excel: save the sheet as CSV UTF-8",
    ".zip": "unpack it first",
    ".tar": "unpack it first",
    ".tgz": "unpack it first",
    ".7z": "unpack it first",
    ".feather": "let its name end in .arrow",
    ".md": "let its name end in .txt, to be read as one text",
}
"""Suffix of a file that is not read -> what to do."""

SHARD = re.compile(r"(.*?)\d+-of-(\d+)(-[0-9a-f]{16})?(\..*)?")
"""The name of one of several files, as the Hub writes it; it used to end in a hash of the file."""

ROWS_AT_ONCE = 1000
Content = TypeVar("Content")
EXPECTED = (
    f"expected a file that ends in {', '.join(TABLES)} or .txt (or in one of them and "
    f"{', '.join(COMPRESSIONS)}), or a folder of such files"
)


def read_source(source: Source) -> Iterator[Read]:
    """Yields the rows of files, whose paths the recipe's loader made absolute, or of a Hub dataset.

    Raises:
        UserError: for a file or dataset that cannot be read or is empty.
    """
    return ((where, parsed(content)) for where, content in read_unparsed(source))


def read_unparsed(source: Source) -> Iterator[Unparsed]:
    """Yields what `read_source` does, but leaves lines of JSON Lines for `parsed` to parse."""
    path = Path(source.source)
    if not path.is_absolute():
        return _read_hub(source)
    if source.streaming:
        raise UserError(f"{path}: streaming is for datasets on the Hub: leave it out for a file")
    if path.is_dir():
        return _read_folder(path, source.split)
    if columns := parallel_files(path):
        return _read_parallel(columns)
    return chain.from_iterable(_read_file(file, source.split) for file in matching_files(path))


def read_rows(source: Source) -> list[tuple[str, dict[str, Any]]]:
    """Returns all rows as (where, row); a .txt file is one row with a text.

    Raises:
        UserError: naming the line that cannot be read.
    """
    rows = []
    for where, row in read_source(source):
        if isinstance(row, BadRowError):
            raise row
        rows.append((where, row))
    return rows


def _read_folder(folder: Path, split: str) -> Iterator[Unparsed]:
    """Yields the rows of what `save_to_disk` wrote, or of all files of rows, sorted by name; if the
    names contain splits (train-00000.parquet, test.jsonl), only of the files of `split`."""
    if is_saved(folder):
        yield from _read_saved(folder, split)
        return
    files, named = _tables(folder)
    if named:
        files = [file for file in files if _words(file) & SPLITS.get(split, {split})]
    if not files:
        what = (
            f"only files of {', '.join(named)}: {NAME_SPLIT}, or name a file" if named else EXPECTED
        )
        kinds = {kind_of(file)[0] for file in folder.iterdir()}
        folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
        folders.sort(key=lambda path: not _words(path) & SPLITS.get(split, {split}))
        inside = [path for path in folders if path.name[0] != "." and _tables(path)[0]]
        if not named and inside:  # as in a clone of a dataset on the Hub
            what = f"its folder {inside[0].name} has some: name {inside[0]}"
        elif not named and ".txt" in kinds:
            what = f"for its texts, name the pattern '{folder}/*.txt'"
        elif not named and ".md" in kinds:
            what = f"for its texts, let their names end in .txt, and name '{folder}/*.txt'"
        raise UserError(f"{folder}: this folder has no file of rows for {split}; {what}")
    _refuse_missing_shards(files)
    refuse_other_split(folder, files, split)
    for file in files:
        yield from _read_file(file, split)


def _refuse_missing_shards(files: list[Path]) -> None:
    """Refuses a folder from which files are missing: their names, such as
    train-00000-of-00002.parquet, say how many there are.

    Raises:
        UserError: with the number of files that are there.
    """
    names = [SHARD.fullmatch(file.name) for file in files]
    shards = Counter((n[1], n[2], "*" if n[3] else "", n[4] or "") for n in names if n)
    for (before, total, hashed, after), count in shards.items():
        if count < int(total):
            pattern = files[0].with_name(f"{before}*-of-{total}{hashed}{after}")
            raise UserError(
                f"{files[0].parent}: only {count} of the {int(total)} files {pattern.name} are in "
                f"this folder: add the others, or, to read only these, name the pattern '{pattern}'"
            )


def _tables(folder: Path) -> tuple[list[Path], list[str]]:
    """Lists the files of rows in a folder, and the splits that occur in their names."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and is_table(file)]
    named = [name for name, words in SPLITS.items() if any(_words(file) & words for file in files)]
    return files, named


def files_of_no_split(source: Source) -> list[str]:
    """Lists the files of a folder that `read_source` reads for no split: their names contain none,
    although those of other files do."""
    folder = Path(source.source)
    if not folder.is_absolute() or not folder.is_dir() or is_saved(folder):
        return []
    files, named = _tables(folder)
    known = {source.split}.union(*SPLITS.values())
    return [file.name for file in files if named and not _words(file) & known]


def splits_of(source: Source) -> dict[str, str]:
    """Maps train, validation and test to their names in a folder, file or Hub dataset that has
    several splits; empty if it has none, or names that are none of the usual."""
    path = Path(source.source)
    kind = kind_of(path)[0]
    if not path.is_absolute():
        names = _splits_on_hub(source)
    elif path.is_file():
        names = lists_of(path, kind) if kind in (".json", ".jsonl", ".ndjson") else []
    elif not path.is_dir():
        names = []
    elif (saved := path / "dataset_dict.json").exists():
        names = json.loads(saved.read_text(encoding="utf-8"))["splits"]
    else:
        names = [] if is_saved(path) else _tables(path)[1]
    return {split: name for split, words in SPLITS.items() for name in names if name in words}


def _words(file: Path) -> set[str]:
    return set(re.split("[^a-z]+", file.name.lower()))


def _read_saved(folder: Path, split: str) -> Iterator[Unparsed]:
    from datasets import load_from_disk

    part = folder
    if (saved := folder / "dataset_dict.json").exists():
        names, part = json.loads(saved.read_text(encoding="utf-8"))["splits"], folder / split
        if split not in names:
            raise UserError(
                f"{folder}: no split {split} in this folder, only {', '.join(names)}: {NAME_SPLIT}"
            )
    index = -1
    try:
        dataset = load_from_disk(str(part))
        for index, row in enumerate(restored(_stored(folder.name, dataset), dataset.features)):
            yield f"{folder.name}[{index}]", row
    # `datasets` raises its own errors and those of the file readers.
    except Exception as error:
        reason = one_line(error)
        raise UserError(f"{part}: `datasets` cannot load this folder: {reason}") from None
    if index < 0:
        raise UserError(f"{part}: no rows in this folder")


def _stored(name: str, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yields rows as they are stored: pictures and sounds, which are not read, are not decoded."""
    batches = dataset.with_format("arrow").iter(ROWS_AT_ONCE)
    rows = (row for batch in batches for row in batch.to_pylist(maps_as_pydicts="strict"))
    return tracked(rows, f"data: rows of {name}", len(dataset))


def _read_hub(source: Source) -> Iterator[Unparsed]:
    offline_reason()  # before `datasets` is imported
    from datasets import load_dataset

    name, index = source.source, -1
    with _errors_of_hub(f"{name}, split {source.split}"):
        dataset = load_dataset(
            name,
            source.name,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
        if source.streaming:
            rows = islice(dataset.decode(False) if dataset.features else dataset, source.limit)
        else:
            rows = _stored(name, dataset)
        for index, row in enumerate(restored(rows, dataset.features)):
            yield f"{name}[{index}]", row
    if index < 0:
        raise UserError(f"data: no rows in the dataset {name}, split {source.split}")


def _splits_on_hub(source: Source) -> list[str]:
    offline_reason()
    from datasets import get_dataset_split_names

    with _errors_of_hub(source.source):
        return get_dataset_split_names(source.source, source.name, revision=source.revision)


@contextmanager
def _errors_of_hub(what: str) -> Iterator[None]:
    """Makes what `datasets` raises for a Hub dataset, in the block, an error for the user."""
    try:
        yield
    # These are its own errors, those of the Hub client, of HTTP and of the file readers.
    except Exception as error:
        reason = one_line(error)
        offline = offline_reason()
        network = f"the network ({offline})" if offline else "the network"
        advice = (
            f"check its id, name, split and revision, {network}, and `hf auth login` if it is gated"
        )
        if "Config" in reason:  # "Config name is missing", "BuilderConfig ... not found"
            advice = (
                "choose by `name` of the source, `config` of a perplexity corpus, or --subset of "
                "`finequant init`"
            )
        raise UserError(f"data: cannot load the dataset {what}: {reason}; {advice}") from None


def _read_file(path: Path, split: str) -> Iterator[Unparsed]:
    kind = kind_of(path)[0]
    if kind not in (*TABLES, ".txt"):
        raise UserError(f"{path}: {EXPECTED}{_hint(path, kind)}")
    yield from with_names(_checked(path, _rows_of(path, kind, split)), path)


def _hint(path: Path, kind: str) -> str:
    """Says what else a file of an unknown kind may be."""
    if kind in REMEDIES:
        return f"; {REMEDIES[kind]}"
    before, _, after = path.name.rpartition(kind) if kind else (path.name, "", "")
    alike = [file.name for file in sorted(path.parent.glob(f"{glob.escape(before)}.*{after}"))]
    names = [name.removeprefix(f"{before}.").removesuffix(after) for name in alike]
    if kind[1:] not in names or len(names) != 2 or {f".{name}" for name in names} & {*TABLES}:
        return ""
    return f"; for two languages, line by line, name {before}.{{{','.join(names)}}}{after}"


def _checked(path: Path, content: Iterable[Content]) -> Iterator[Content]:
    """Yields what a file holds.

    Raises:
        UserError: naming the file, if it cannot be read or is empty.
    """
    empty = True
    try:
        refuse_pointer(path)
        for item in content:
            empty = False
            yield item
    except UnicodeDecodeError as error:
        _refuse_misnamed(path)
        where = f"{path}:{line_that_breaks(path, error.encoding)}"
        raise UserError(
            f"{where}: not {error.encoding.upper()} text: save the file as UTF-8 "
            "(in Excel: CSV UTF-8)"
        ) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if empty:
        raise UserError(f"{path}: no rows in this file")


def _refuse_misnamed(path: Path) -> None:
    """Refuses a file that its first bytes show to be of another kind than its name says.

    Raises:
        UserError: saying what it is, and what to do.
    """
    if kind_of(path)[1]:
        return
    with path.open("rb") as file:
        start = file.read(8)
    for signature, (kind, advice) in SIGNATURES.items():
        if start.startswith(signature):
            raise UserError(f"{path}: {kind}, whatever its name says: {advice.format(path.name)}")


def _rows_of(path: Path, kind: str, split: str) -> Iterator[Unparsed]:
    if kind in (".parquet", ".arrow"):
        yield from read_arrow(path, kind)
    elif kind in (".csv", ".tsv"):
        yield from read_csv(path, kind)
    elif kind == ".txt":
        yield from _read_text(path)
    else:
        yield from read_json_file(path, kind, split)


def _read_text(path: Path) -> Iterator[Unparsed]:
    with open_text(path) as file:
        text = file.read()
    lines = text.strip().splitlines()
    if lines and isinstance(parsed(Line(lines[0], str(path))), dict):
        raise UserError(f"{path}: this text is JSON: rename the file to {path.stem}.jsonl")
    if lines:
        yield path.name, {"text": text}


def _read_parallel(columns: dict[str, Path]) -> Iterator[Unparsed]:
    """Reads each row from the same line of several files, as in translation corpora."""
    files = list(columns.values())
    lines_of_files = [_checked(file, _lines(file)) for file in files]
    for number, lines in enumerate(zip_longest(*lines_of_files), start=1):
        if None in lines:
            raise UserError(
                f"{files[lines.index(None)]}: ends after {counted(number - 1, 'line')}, but "
                f"another of {', '.join(columns)} does not: the files must match line by line"
            )
        yield f"{files[0].name}:{number}", dict(zip(columns, lines, strict=True))


def _lines(file: Path) -> Iterator[str]:
    # A carriage return inside a line is white space, or each line after it would get another's.
    with open_text(file, newline="\n") as opened:
        for line in opened:
            yield line.rstrip("\r\n")
