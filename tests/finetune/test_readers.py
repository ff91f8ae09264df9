"""Every file format gives the same rows; where a file cannot be read, the true cause is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest

from finequant.finetune.data.readers import BadRowError, read_rows, read_source
from finequant.finetune.data.splits import load_splits
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Data, Source
from finequant.recipes.stages import recipe_inputs

ROWS = [
    {"prompt": f"Où est {n}; là, ou\tici?", "completion": f'{{"n": {n}, "✓": 1}}'}
    for n in (1, 2, 3)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(separator: str = ",", encoding: str = "utf-8", end: str = "\n", first: str = "") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, lineterminator=end)
    writer.writerow(ROWS[0])
    writer.writerows(row.values() for row in ROWS)
    return (first + text.getvalue()).encode(encoding)


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


FILES: dict[str, bytes] = {
    "rows.jsonl": LINES.encode(),
    "rows.ndjson": LINES.encode(),
    "rows.json": json.dumps(ROWS).encode(),
    "lines called.json": LINES.encode(),
    "one line called.jsonl": json.dumps(ROWS).encode(),
    "a list called.jsonl": json.dumps(ROWS, indent=2).encode(),
    "mark.json": json.dumps(ROWS).encode("utf-8-sig"),
    "utf-16.json": json.dumps(ROWS, ensure_ascii=False).encode("utf-16"),
    "utf-16.jsonl": LINES.encode("utf-16"),
    "utf-32.jsonl": LINES.encode("utf-32"),
    "utf-32.csv": table(",", "utf-32"),
    "wrapped.json": json.dumps({"version": "1.0", "data": ROWS}).encode(),
    "wrapped and pretty.json": json.dumps({"rows": ROWS, "n": 3}, indent=1).encode(),
    "by id.json": json.dumps({f"id-{n}": row for n, row in enumerate(ROWS)}).encode(),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(),
    "pandas columns.json": json.dumps(
        {name: {f"{3 * n}": row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}
    ).encode(),
    "pandas split.json": json.dumps(
        {
            "columns": list(ROWS[0]),
            "index": list(range(len(ROWS))),
            "data": [list(row.values()) for row in ROWS],
        }
    ).encode(),
    "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}).encode(),
    "rows.csv": table(),
    "excel.csv": table(encoding="utf-8-sig", end="\r\n"),
    "semicolons.csv": table(";", "utf-8-sig", "\r\n"),
    "named.csv": table(";", first="sep=;\r\n", end="\r\n"),
    "unicode text.csv": table("\t", "utf-16", "\r\n"),
    "pipes.csv": table("|"),
    "rows.tsv": table("\t"),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.csv.gz": gzip.compress(table(";")),
    "rows.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "rows.tsv.xz": lzma.compress(table("\t")),
    "rows.jsonl.zst": zstd(LINES.encode()),
    "ROWS.JSONL.GZ": gzip.compress(LINES[: LINES.index("\n") + 1].encode())
    + gzip.compress(LINES[LINES.index("\n") + 1 :].encode()),
}


def source_of(path: Path, split: str = "train") -> Source:
    return Source(source=str(path), split=split)


def rows_of(path: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for _, row in read_source(source_of(path, split))]


# file: (content, the texts that it holds)
QUOTES = {
    "unquoted.tsv": ('"Hello he said\tpos\nfoo said "\tneg\n', ['"Hello he said', 'foo said "']),
    "unquoted within.tsv": ('"Hello"\tpos\n"a" b\tneg\n', ['"Hello"', '"a" b']),
    "unquoted with a bad line.tsv": (
        '"Hello he\tpos\nfoo "\tneg\n"so"\n' + 'so "he\tpos\n',
        ['"Hello he', 'foo "', None, 'so "he'],
    ),
    "quoted.tsv": ('"a\tb"\tpos\n"a ""b"" c\nd"\tneg\n', ["a\tb", 'a "b" c\nd']),
    "all quoted.tsv": ('"a\nb"\t"pos"\n"c"\t"neg"\n', ["a\nb", "c"]),
    "quoted.csv": ('"Hi Tom, thanks\nBob",pos\n"a, b",neg\n', ["Hi Tom, thanks\nBob", "a, b"]),
    "only a letter.csv": ('"Dear Sir,\nBob",pos\n', ["Dear Sir,\nBob"]),
    "inches.csv": ('5" pipe,pos\nHe said "hi",neg\n', ['5" pipe', 'He said "hi"']),
}


@pytest.mark.parametrize("name", QUOTES)
def test_quotes_are_around_cells_or_text_as_the_file_was_written(tmp_path, name):
    content, texts = QUOTES[name]
    first = "text,label\n".replace(",", "\t" if name.endswith(".tsv") else ",")
    (tmp_path / name).write_text(first + content)
    rows = rows_of(tmp_path / name)
    assert [isinstance(row, dict) and row["text"] or None for row in rows] == texts


def test_the_last_column_may_span_lines(tmp_path):
    (tmp_path / "rows.tsv").write_text('label\ttext\npos\t"a\nb"\nneg\t"a ""b"" c\nd"\n')
    assert [row["text"] for row in rows_of(tmp_path / "rows.tsv")] == ["a\nb", 'a "b" c\nd']


def test_quoted_names_of_columns_say_that_cells_are_quoted(tmp_path):
    """Each line of this cell, with the label or a tab, looks like a row with a stray quote."""
    (tmp_path / "rows.tsv").write_text('"label"\t"text"\n"pos"\t"a\nb\tc"\n')
    assert rows_of(tmp_path / "rows.tsv") == [{"label": "pos", "text": "a\nb\tc"}]


def test_a_quote_that_makes_one_row_of_two_is_reported(tmp_path, capsys):
    rows = 'text,label\nyes,pos\n"Hello he said,pos\nfoo said ",neg\nno,neg\n'
    (tmp_path / "rows.csv").write_text(rows)
    with pytest.raises(UserError, match="rows.csv:3: a cell begins with a quote that only line 4"):
        rows_of(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text(rows + '"yes, and no",neg\n')  # quotes are around cells
    assert len(rows_of(tmp_path / "rows.csv")) == 4
    assert "rows.csv:3: a quote makes one row of the lines up to 4" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert rows_of(tmp_path / name) == ROWS


def saved(folder: Path, splits: bool) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    other = DatasetDict({"test": dataset.select([0]), "train": dataset})
    (other if splits else dataset).save_to_disk(str(folder))


def sharded(folder: Path, names: tuple[str, str], form: str = "parquet") -> None:
    import pyarrow.parquet

    folder.mkdir()
    for name, rows in zip(names, (ROWS[:2], ROWS[2:]), strict=True):
        shard = pyarrow.Table.from_pylist(rows)
        if form == "parquet":
            pyarrow.parquet.write_table(shard, folder / name)
        else:
            opened = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
            with opened(str(folder / name), shard.schema) as file:
                file.write_table(shard)
    (folder / "README.md").write_text("not rows")


FOLDERS = {
    "save_to_disk": lambda folder: saved(folder, splits=False),
    "save_to_disk with splits": lambda folder: saved(folder, splits=True),
    "shards": lambda folder: sharded(
        folder, ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    ),
    "shards with hashes": lambda folder: sharded(
        folder,
        (
            "train-00000-of-00002-b35ef345f7e6bcd1.parquet",
            "train-00001-of-00002-0e2f64ac1e9d7a50.parquet",
        ),
    ),
    "arrow files": lambda folder: sharded(folder, ("a.arrow", "b.arrow"), "file"),
    "arrow streams": lambda folder: sharded(folder, ("a.arrow", "b.arrow"), "stream"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_kind_of_folder_gives_the_same_rows(tmp_path, kind):
    FOLDERS[kind](tmp_path / "my rows")
    assert rows_of(tmp_path / "my rows") == ROWS


@pytest.mark.parametrize("kind", ["folder", "splits", "parquet", "arrow"])
def test_class_labels_are_read_as_their_names(tmp_path, kind):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    labels = ClassLabel(names=["card lost", "card late"])
    tagged = {"tags": List(labels), "best": {"tag": labels}}
    features = Features(
        {"text": Value("string"), "count": Value("int64"), "label": labels} | tagged
    )
    rows = [
        {"text": "a", "count": 1, "label": 1, "tags": [0, 1], "best": {"tag": 0}},
        {"text": "b", "count": 0, "label": -1, "tags": [], "best": {"tag": None}},
        {"text": "c", "count": 1, "label": None, "tags": None, "best": None},
    ]
    dataset, path = Dataset.from_list(rows, features), tmp_path / f"rows.{kind}"
    if kind == "parquet":
        dataset.to_parquet(path)
    else:
        splits = kind == "splits"
        (DatasetDict({"train": dataset}) if splits else dataset).save_to_disk(str(path))
        path = next(path.glob("*.arrow")) if kind == "arrow" else path
    read = rows_of(path)
    assert [row["label"] for row in read] == ["card late", None, None]
    assert [row["tags"] for row in read] == [["card lost", "card late"], [], None]
    assert [(row["best"] or {}).get("tag") for row in read] == ["card lost", None, None]
    assert [(row["text"], row["count"]) for row in read] == [("a", 1), ("b", 0), ("c", 1)]


@pytest.mark.parametrize("kind", ["folder", "parquet", "plain parquet", "plain arrow"])
@pytest.mark.parametrize("bits", [16, 32])
def test_short_floats_get_no_more_digits_than_they_have(tmp_path, kind, bits):
    """The scores of STS-B are such: answers became 3.799999952316284."""
    import pyarrow.parquet
    from datasets import Dataset, Features, List, Value

    scores, path = [3.8, 0.1, None, 5.0], tmp_path / f"rows.{kind.split()[-1]}"
    inner = {"score": Value("float32"), "all": List(Value(f"float{bits}"))}
    features = Features({"score": Value(f"float{bits}"), "inner": inner})
    rows = [{"score": score, "inner": {"score": 0.1, "all": [0.1, 3.8]}} for score in scores]
    dataset = Dataset.from_list(rows, features)
    if kind == "folder":
        dataset.save_to_disk(str(path))
    elif kind == "parquet":
        dataset.to_parquet(path)
    else:
        table = dataset.data.table.replace_schema_metadata(None)
        if kind == "plain parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(str(path), table.schema) as file:
                file.write_table(table)
    read = rows_of(path)
    assert [row["score"] for row in read] == scores
    assert [row["inner"] for row in read] == [{"score": 0.1, "all": [0.1, 3.8]}] * 4


def test_a_folder_without_one_of_its_shards_is_refused(tmp_path):
    folder = tmp_path / "my rows"
    sharded(folder, ("train-00000-of-00003.parquet", "train-00002-of-00003.parquet"))
    pattern = folder / "train-*-of-00003.parquet"
    with pytest.raises(UserError, match=f"only 2 of the 3 files .* '{re.escape(str(pattern))}'"):
        rows_of(folder)
    assert rows_of(pattern) == ROWS


def test_a_clone_of_a_dataset_on_the_hub_names_its_folder_of_rows(tmp_path):
    sharded(tmp_path / "data", ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"))
    (tmp_path / "README.md").write_text("not rows")
    with pytest.raises(UserError, match=f"data has some: name {re.escape(str(tmp_path))}/data"):
        rows_of(tmp_path)


CONFIGS = {
    "another file is the test split": (
        "{split: train, path: main.jsonl}, {split: test, path: other.jsonl}",
        "train of default: main.jsonl\n  test of default: other.jsonl",
    ),
    "a pattern leaves one out": (
        "{split: train, path: ['*in.jsonl', https://example.com/x.jsonl]}",
        "train of default: main.jsonl",
    ),
    "all are the test split": ("{split: test, path: '*.jsonl'}", "of default: main.jsonl, other"),
    "several configurations": (
        "main.jsonl]}, {config_name: b, data_files: [other.jsonl",
        "train of default: main.jsonl\n  train of b: other.jsonl",
    ),
}
"""What the card of a dataset says of main.jsonl and other.jsonl, and what a message says of it."""


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_splits_that_only_the_card_of_a_dataset_tells_are_not_mixed(tmp_path, name, above):
    files, message = CONFIGS[name]
    folder = tmp_path / "data" if above else tmp_path
    folder.mkdir(exist_ok=True)
    for file in ("main.jsonl", "other.jsonl"):
        (folder / file).write_text(LINES)
    files = files.replace("*", "data/*").replace("main", "data/main") if above else files
    files = files.replace("other", "data/other") if above else files
    configs = f"configs: [{{config_name: default, data_files: [{files}]}}]"
    (tmp_path / "README.md").write_text(f"---\n{configs}\n---\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"name the files, such as .*jsonl\n.*{message}"):
        rows_of(folder)
    assert rows_of(folder / "main.jsonl") == ROWS


@pytest.mark.parametrize(
    "configs",
    [
        "[{config_name: default, data_files: '*.jsonl'}]",
        "[{config_name: a, data_files: [{split: train, path: [main.jsonl, other.jsonl]}]}]",
        "[{config_name: a, data_files: more/x.jsonl}]",
        "[{config_name: a, data_dir: .}]",
        "[{config_name: a, data_files: 1}]",
        "[{data_files: main.jsonl}]",
        "data_files: [",
    ],
)
def test_a_card_that_describes_the_same_split_or_none_changes_nothing(tmp_path, configs):
    for file in ("main.jsonl", "other.jsonl"):
        (tmp_path / file).write_text(LINES)
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n", encoding="utf-8")
    assert rows_of(tmp_path) == ROWS * 2


def test_the_names_of_files_in_a_folder_tell_their_split(tmp_path):
    (tmp_path / "train_1.jsonl").write_text(LINES)
    (tmp_path / "dev.jsonl").write_text('{"text": "held"}\n')
    (tmp_path / "._train_1.jsonl").write_bytes(b"\0\5\26\7")  # as macOS writes on a USB stick
    assert rows_of(tmp_path) == ROWS
    assert rows_of(tmp_path, "validation") == [{"text": "held"}]
    with pytest.raises(UserError, match="no file of rows for test; only files of train, valid"):
        rows_of(tmp_path, "test")


def test_files_whose_names_speak_of_no_split_beside_others_that_do_are_named(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "more.jsonl", "latest.jsonl", "notes.md"):
        (tmp_path / name).write_text(LINES)
    data = Data.model_validate({"train": {"source": str(tmp_path)}, "validation_fraction": 0})
    assert load_splits(data, 0).notes[1:] == [
        f"{tmp_path.name}: files that belong to no split, not read: latest.jsonl, more.jsonl"
    ]


@pytest.mark.parametrize("written", ["my shards/*.jsonl", "./my shards/part-?.jsonl", "my shards"])
def test_a_pattern_in_a_recipe_is_expanded(tmp_path, tiny_base, written):
    shards = tmp_path / "my shards"
    shards.mkdir()
    for number, row in enumerate(ROWS):
        (shards / f"part-{number}.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: a\nmodel: {{base: {tiny_base}}}\ndata:\n  train: '{written}'\n")
    data = load_recipe(recipe).data
    assert [where for where, _ in read_source(data.train[0])] == [
        f"part-{n}.jsonl:1" for n in range(3)
    ]


def parallel(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"pairs.{name}.gz").write_bytes(gzip.compress(text.encode()))
    return folder / "pairs.{en,de}.gz"


def test_lines_of_parallel_files_are_rows(tmp_path, tiny_base):
    parallel(tmp_path, en="one \u2028\ntwo\n\n", de="eins\r\nzwei\n\n")
    recipe = tmp_path / "recipe.yaml"
    source = "{source: 'pairs.{en,de}.gz', columns: {prompt: en, completion: de}}"
    recipe.write_text(f"name: a\nmodel: {{base: {tiny_base}}}\ndata: {{train: {source}}}\n")
    assert list(read_source(load_recipe(recipe).data.train[0])) == [
        ("pairs.en.gz:1", {"en": "one \u2028", "de": "eins"}),
        ("pairs.en.gz:2", {"en": "two", "de": "zwei"}),
        ("pairs.en.gz:3", {"en": "", "de": ""}),
    ]


def test_a_carriage_return_inside_a_line_does_not_shift_the_lines_of_parallel_files(tmp_path):
    rows = rows_of(parallel(tmp_path, en="A\rB\nC\n", de="a b\nc\r d\n"))
    assert rows == [{"en": "A\rB", "de": "a b"}, {"en": "C", "de": "c\r d"}]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"en": "a\nb\n", "de": "a\n"}, "pairs.de.gz: ends after 1 line, but another of en, de"),
        ({"en": "a\n", "de": "a\nb\n"}, "pairs.en.gz: ends after 1 line, but another of en, de"),
        ({"en": "a\n"}, "pairs.de.gz: cannot be read: No such file"),
        ({"en": "a\n", "de": ""}, "pairs.de.gz: no rows in this file"),
    ],
)
def test_parallel_files_that_do_not_match_are_refused(tmp_path, texts, message):
    with pytest.raises(UserError, match=message):
        rows_of(parallel(tmp_path, **texts))


def test_a_pattern_that_matches_nothing_is_refused(tmp_path, tiny_base):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: a\nmodel: {{base: {tiny_base}}}\ndata: {{train: ./no/*.parquet}}\n")
    with pytest.raises(UserError, match=r"data.train: no such file or folder: ./no/\*.parquet"):
        load_recipe(recipe)


def test_a_new_match_of_a_pattern_makes_training_stale(recipe_file):
    from finequant.recipes.stages import recipe_inputs

    (recipe_file.parent / "s").mkdir()
    shard = recipe_file.parent / "s" / "a.jsonl"
    shard.write_text(LINES)
    recipe = load_recipe(recipe_file, ["data.train=s/*.jsonl"])
    before = recipe_inputs(recipe, ("data",))
    assert before == recipe_inputs(recipe, ("data",))
    shard.with_name("b.jsonl").write_text(LINES)
    assert before != recipe_inputs(recipe, ("data",))


# file: (content, what the message says)
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
UNREADABLE = {
    "cut.jsonl.gz": (FILES["rows.jsonl.gz"][:-20], ["cut.jsonl.gz: cannot be read: ", "end"]),
    "plain.jsonl.gz": (LINES.encode(), ["plain.jsonl.gz: cannot be read: Not a gzipped file"]),
    "plain.csv.xz": (table(), ["plain.csv.xz: cannot be read: "]),
    "plain.csv.zst": (table(), ["plain.csv.zst: cannot be read: "]),
    "packed.jsonl": (
        FILES["rows.jsonl.gz"],
        ["packed.jsonl: a gzip file, whatever its name says: rename it to packed.jsonl.gz"],
    ),
    "sheet.csv": (
        b"PK\x03\x04\x14\x00\x06\x00\x08\x00\x00\x00!\xff",
        [
            "sheet.csv: an Excel file or a ZIP archive, ",
            "save the sheet as CSV UTF-8, or unpack it",
        ],
    ),
    "table.json": (
        b"PAR1\x15\x04\x15\x90\xff",
        ["table.json: a Parquet file, ", "let its name end in .parquet"],
    ),
    "cloned.jsonl": (LFS_POINTER, ["cloned.jsonl: a Git LFS pointer", "`git lfs pull`"]),
    "cloned.csv": (LFS_POINTER, ["cloned.csv: a Git LFS pointer", "`git lfs pull`"]),
    "cloned.parquet": (LFS_POINTER, ["cloned.parquet: a Git LFS pointer", "`git lfs pull`"]),
    "ansi.csv": (
        "prompt;completion\r\nOù?;là\r\n".encode("cp1252"),
        ["ansi.csv:2: not UTF-8 text: save the file as UTF-8 (in Excel: CSV UTF-8)"],
    ),
    "splits.json": (
        json.dumps({"easy": ROWS, "hard": ROWS}).encode(),
        ["several lists of rows: easy, hard; choose by `split`"],
    ),
    "no.arrow": (b"no arrow", ["no.arrow: cannot be read as a arrow file: "]),
    "rows.xlsx": (
        b"PK",
        ["rows.xlsx: expected a file that ends in", "save the sheet as CSV UTF-8"],
    ),
    "rows.zip": (b"PK", ["rows.zip: expected a file that ends in"]),
    "rows.jsonl.zip": (
        b"PK",
        ["rows.jsonl.zip: expected a file that ends in", "; unpack it first"],
    ),
    "rows.md": (b"a text", ["rows.md: expected a file that ends in", "; let its name end in .txt"]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_the_true_cause_of_an_unreadable_file_is_named(tmp_path, name):
    content, expected = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / name)
    for part in expected:
        assert part in str(error.value)


def test_a_broken_line_is_a_bad_row_and_the_others_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{LINES}{{'prompt': 1}}\n{LINES}")
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [row for row in rows if not isinstance(row, BadRowError)] == ROWS * 2
    with pytest.raises(UserError, match="rows.jsonl:4: broken JSON at column 2"):
        read_rows(source_of(tmp_path / "rows.jsonl"))


NESTED = {
    "id": 7,
    "answers": {"text": ["in 1999", "1999"], "start": [3, 9]},
    "turns": [{"ask": "When?"}],
    "dotted.name": "whole",
    "best": 1,
    "worst": "0",
}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("answers.text[0]", "in 1999"),
        ("{turns[0].ask} ({answers.start[1]})", "When? (9)"),
        ("dotted.name", "whole"),
        ("answers.text[best]", "1999"),
        ("{answers.text[worst]}, {answers.start[best]}", "in 1999, 9"),
        ("answers.text", '["in 1999", "1999"]'),
    ],
)
def test_fields_inside_a_column_are_read(tmp_path, path, text):
    cells = {
        name: json.dumps(v) if isinstance(v, (dict, list)) else v for name, v in NESTED.items()
    }
    for name, row in (("rows.jsonl", NESTED), ("cells.jsonl", cells)):
        (tmp_path / name).write_text(json.dumps(row))
        columns = {"prompt": "id", "completion": path}
        source = {"source": str(tmp_path / name), "columns": columns}
        (found,) = load_splits(Data(train=[source], validation_fraction=0.0), 0).train
        assert found.messages[1]["content"] == text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("answers.text[2]", r"1: answers.text\[2\]: no entry 2 in answers.text: a list of 2"),
        ("answers.text[id]", r"answers.text\[id\]: no entry 7 in answers.text: a list of 2"),
        ("answers.text[turns]", r"no entry .*When.* in answers.text: a list of 2"),
        ("answers.text[bset]", "no column bset; .*did you mean best"),
        ("answers.txt[0]", "answers.txt.*: no txt in answers: only text, start"),
        ("id.text", "rows.jsonl:1: id.text: no text in id: 7"),
        ("answer.text", "rows.jsonl:1: no column answer.text; the columns are id, answers"),
    ],
)
def test_a_missing_field_is_named(tmp_path, path, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(NESTED))
    columns = {"prompt": "id", "completion": path}
    source = {"source": str(tmp_path / "rows.jsonl"), "columns": columns}
    with pytest.raises(UserError, match=message):
        load_splits(Data(train=[source], validation_fraction=0.0), 0)


def test_a_header_that_is_repeated_is_a_bad_row(tmp_path):
    """As in tables that were joined by `cat`."""
    (tmp_path / "rows.csv").write_text("text,label\na,b\ntext,label\nc,d\n", encoding="utf-8")
    rows = [row for _, row in read_source(Source(source=str(tmp_path / "rows.csv")))]
    assert (rows[0], rows[2]) == ({"text": "a", "label": "b"}, {"text": "c", "label": "d"})
    assert str(rows[1]).endswith("rows.csv:3: repeats the header: remove this line")


def test_a_title_above_the_names_of_columns_is_named(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("From 2024 on\ntext,label\na,b\n", encoding="utf-8")
    with pytest.raises(
        UserError, match="rows.csv:2: 2 columns, .* 1: if the first line is a title"
    ):
        read_rows(source_of(file))


def test_spaces_after_the_separators_of_a_header_belong_to_no_cell(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('"text", "label"\n"a, b", "c"\nd,  e\n', encoding="utf-8")
    assert [row for _, row in read_rows(source_of(file))] == [
        {"text": "a, b", "label": "c"},
        {"text": "d", "label": "e"},
    ]
    file.write_text("text,label\na, b\n", encoding="utf-8")
    assert [row for _, row in read_rows(source_of(file))] == [{"text": "a", "label": " b"}]


def test_two_formats_of_a_file_are_not_two_languages(tmp_path):
    for name in ("rows.md", "rows.arrow"):
        (tmp_path / name).write_text("a", encoding="utf-8")
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / "rows.md")
    assert "languages" not in str(error.value)


def test_empty_columns_of_a_spreadsheet_are_named_as_pandas_does(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label,,\na,b,,c\n", encoding="utf-8")
    assert read_rows(source_of(file))[0][1] == {
        "text": "a",
        "label": "b",
        "Unnamed: 2": "",
        "Unnamed: 3": "c",
    }


def test_json_lines_under_the_name_of_a_text_are_refused(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.txt: this text is JSON: rename .* to rows.jsonl"):
        read_rows(source_of(file))
    for text in ("{a} is a text", "12\n13\n", "[1]"):
        file.write_text(text, encoding="utf-8")
        assert read_rows(source_of(file))[0][1] == {"text": text}


def test_lists_that_python_wrote_are_named(tmp_path, tiny_base):
    file = tmp_path / "rows.csv"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(f'messages\n"{turns}"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"role and content; write it with json.dumps, not with"):
        load_splits(Data(train=str(file)), 0)


CARD = """---
license: mit
dataset_info:
  features:
  - name: text
    dtype: string
  - name: topic
    dtype:
      class_label:
        names:
          '0': world
          '1': sports
  - name: all
    sequence:
      class_label:
        names:
          '0': a
          '1': b
---
# Topics
"""


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("above", [False, True])
def test_names_of_classes_come_from_the_card_of_a_dataset(tmp_path, name, above):
    import pyarrow
    import pyarrow.parquet

    columns = {"text": ["a", "b", "0"], "topic": [1, 0, -1], "all": [[1, 0], [], [1]]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    file = tmp_path / "data" / name
    file.parent.mkdir()
    if name == "rows.parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    elif name == "rows.csv":
        file.write_text("text,topic\na,1\nb,0\n0,-1\n", encoding="utf-8")
    else:
        lines = list(map(json.dumps, rows))
        file.write_text("\n".join(lines) if name == "rows.jsonl" else f"[{','.join(lines)}]")
    card = (tmp_path if above else file.parent) / "README.md"
    card.write_text(CARD, encoding="utf-8")
    for path in (file, file.parent):
        read = rows_of(path)
        assert [row["topic"] for row in read] == ["sports", "world", None]
        assert [row["text"] for row in read] == ["a", "b", "0"]
        if name != "rows.csv":
            assert [row["all"] for row in read] == [["b", "a"], [], ["b"]]
    columns = {"prompt": "text", "completion": "topic"}
    source = {"source": str(file), "columns": columns}
    data = Data(train=[source], bad_rows="drop", validation_fraction=0)
    assert f"{name}: names of the classes of topic, all: from {card}" in load_splits(data, 0).notes


def test_a_class_without_a_name_is_a_bad_row(tmp_path):
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    (tmp_path / "rows.csv").write_text("text,topic\na,2\nb,sports\n", encoding="utf-8")
    bad, good = rows_of(tmp_path / "rows.csv")
    assert "rows.csv:2: class '2': the README.md of this dataset names classes 0 to 1" in str(bad)
    assert good == {"text": "b", "topic": "sports"}


@pytest.mark.parametrize(
    "card",
    [
        "# Topics\nThe class_label is a number.\n",
        "---\ndataset_info: [class_label\n---\n",
        "---\ndataset_info: {features: [{name: topic, dtype: {class_label: 3}}]}\n---\n",
        CARD.replace("topic", "other").replace("all", "others"),
        "---\ndataset_info:\n"
        + "".join(
            f"- config_name: {name}\n  features:\n  - name: topic\n"
            f"    dtype: {{class_label: {{names: {{'0': {name}, '1': b}}}}}}\n"
            for name in "ac"
        )
        + "---\n",
    ],
)
def test_a_card_that_names_no_classes_of_these_rows_changes_nothing(tmp_path, card):
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "topic": 1}', encoding="utf-8")
    assert rows_of(tmp_path / "rows.jsonl") == [{"text": "a", "topic": 1}]


def test_other_names_of_classes_make_other_rows(tmp_path, recipe_file):
    recipe = load_recipe(recipe_file, ["data.train=train.jsonl"])
    card = recipe_file.parent / "README.md"
    inputs = []
    for text in (None, CARD, CARD + "More words.\n", CARD.replace("sports", "games")):
        if text:
            card.write_text(text, encoding="utf-8")
        inputs.append(recipe_inputs(recipe, ("data",)))
    assert inputs[1] == inputs[2]
    assert len({json.dumps(each) for each in inputs}) == 3


def test_maps_are_read_as_objects(tmp_path):
    """The arguments of calls are such maps; they came as lists of pairs."""
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.map_(pyarrow.string(), pyarrow.string())
    calls = pyarrow.list_(pyarrow.struct({"name": pyarrow.string(), "arguments": texts}))
    called = [{"name": "open", "arguments": [("what", "door"), ("at", "3")]}]
    file = tmp_path / "rows.parquet"
    answers = pyarrow.array([[("a", "1"), ("b", "2")], []], texts)
    columns = {"answer": answers, "calls": pyarrow.array([called, None], calls)}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    assert rows_of(file) == [
        {
            "answer": {"a": "1", "b": "2"},
            "calls": [{"name": "open", "arguments": {"what": "door", "at": "3"}}],
        },
        {"answer": {}, "calls": None},
    ]
    twice = pyarrow.array([[("a", "1"), ("a", "2")]], texts)
    pyarrow.parquet.write_table(pyarrow.table({"answer": twice}), file)
    with pytest.raises(UserError, match=r"rows.parquet: cannot be read as a parquet file: .*'a'"):
        rows_of(file)


def test_values_of_json_columns_are_read_as_what_they_are(tmp_path):
    """`datasets` stores them as JSON text: answers came with quotes around them."""
    from datasets import Dataset, Features, Json, Value, load_from_disk

    turn = {"role": Value("string"), "content": Value("string"), "tool_calls": Json()}
    columns = {"a": Json(), "turns": [Json()], "messages": [turn]}
    called = [{"name": "f", "arguments": {"at": None}}]
    rows = [
        {
            "a": answer,
            "turns": [{"role": "user"}, {"role": "tool", "content": [1]}],
            "messages": [{"role": "assistant", "content": "", "tool_calls": called}],
        }
        for answer in ("yes", 3, None, ["x"], {"b": None})
    ]
    dataset = Dataset.from_list(rows, features=Features(columns))
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    assert list(load_from_disk(tmp_path / "saved")) == rows
    assert rows_of(tmp_path / "rows.parquet") == rows_of(tmp_path / "saved") == rows


@pytest.mark.parametrize("kind", ["Image", "Audio"])
def test_texts_beside_media_are_read_without_decoding_these(tmp_path, kind):
    import datasets
    import pyarrow

    features = datasets.Features({"text": datasets.Value("string"), "m": getattr(datasets, kind)()})
    media = {"bytes": b"no picture and no sound", "path": None}
    table = pyarrow.Table.from_pylist([{"text": "a", "m": media}], features.arrow_schema)
    dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
    dataset.save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == [{"text": "a", "m": media}]


@pytest.mark.parametrize(
    ("feature", "reason"),
    [
        ({"_type": "Hologram"}, "Feature type 'Hologram' not found"),
        ({"_type": "ClassLabel", "names": ["a"]}, "Invalid integer class label 2"),
    ],
)
@pytest.mark.parametrize("is_saved", [False, True])
def test_columns_that_datasets_cannot_read_are_refused(tmp_path, feature, reason, is_saved):
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Dataset, Features

    file = tmp_path / "rows.parquet"
    if is_saved:
        file = tmp_path / "saved"
        features = Features({"a": ClassLabel(names=["a", "b", "c"])})
        Dataset.from_dict({"a": [2]}, features=features).save_to_disk(file)
        described = json.loads((file / "dataset_info.json").read_text())
        described["features"]["a"] = feature
        (file / "dataset_info.json").write_text(json.dumps(described))
    else:
        table = pyarrow.table({"a": [2]})
        described = json.dumps({"info": {"features": {"a": feature}}})
        table = table.replace_schema_metadata({"huggingface": described})
        pyarrow.parquet.write_table(table, file)
    with pytest.raises(UserError, match=f"{file.name}: .*cannot .*: {reason}"):
        rows_of(file)


def test_a_folder_names_the_one_inside_that_holds_the_split(tmp_path):
    for name in ("test", "train", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(LINES)
    for split in ("train", "test"):
        with pytest.raises(UserError, match=f"its folder {split} has some: name .*/{split}$"):
            rows_of(tmp_path, split)


def test_a_folder_of_rows_may_hold_the_recipe_and_its_runs(tmp_path, recipe_file):
    from finequant.recipes.sources import SCHEMA

    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(LINES, encoding="utf-8")
    recipe = load_recipe(recipe_file, [f"data.train={folder}"])
    before = recipe_inputs(recipe, ("data",))
    (folder / "runs" / "r").mkdir(parents=True)
    for name in ("recipe.yaml", SCHEMA, "notes.txt", "runs/r/predictions.jsonl", "._rows.csv"):
        (folder / name).write_text("{}", encoding="utf-8")
    assert rows_of(folder) == ROWS
    assert recipe_inputs(recipe, ("data",)) == before
    (folder / "more.jsonl").write_text(LINES, encoding="utf-8")
    assert rows_of(folder) == ROWS * 2
    assert recipe_inputs(recipe, ("data",)) != before


def test_every_part_of_a_saved_dataset_counts(tmp_path, recipe_file):
    from datasets import Dataset, DatasetDict

    inputs = []
    for rows in (ROWS, ROWS[:2]):
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
        recipe = load_recipe(recipe_file, [f"data.train={tmp_path / 'saved'}"])
        inputs.append(recipe_inputs(recipe, ("data",)))
    assert inputs[0] != inputs[1]
