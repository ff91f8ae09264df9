"""Rows and tokens on disk: made once, shared, and equal to those made in memory."""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path

import pytest

from finequant.finetune.data import dataset, pool, prepared, splits
from finequant.finetune.data.dataset import to_dataset
from finequant.finetune.data.duplicates import near_duplicates, prompts_with_several_answers
from finequant.finetune.data.files import BadRowError
from finequant.finetune.data.prepared import prepared_splits
from finequant.finetune.data.row import Row
from finequant.finetune.data.splits import load_splits
from finequant.finetune.data.table import Rows
from finequant.finetune.data.tokens import encode, encode_rows
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Data


@pytest.fixture
def recipe(recipe_file):
    return load_recipe(recipe_file, [])


@pytest.fixture
def unread(monkeypatch):
    """Makes reading a source fail."""

    def stop():
        monkeypatch.setattr(prepared, "load_splits", None)

    return stop


def asked(*contents: str, where: str = "rows.jsonl:1") -> Row:
    turns = zip(("user", "assistant") * 9, contents, strict=False)
    return Row(where, tuple({"role": role, "content": text} for role, text in turns))


def tokens(rows, tokenizer, data: Data) -> list:
    return to_dataset(rows, tokenizer, data).to_list()


def test_rows_are_read_once_and_are_those_of_the_sources(recipe, unread):
    expected = load_splits(recipe.data, recipe.seed)
    assert prepared_splits(recipe) == expected
    unread()
    assert prepared_splits(recipe) == expected


def test_keys_that_affect_only_tokens_keep_the_rows(recipe_file, recipe, unread):
    prepared_splits(recipe)
    unread()
    prepared_splits(load_recipe(recipe_file, ["data.max_length=20", "data.loss_on=all"]))


@pytest.mark.parametrize("change", ["data.validation_fraction=0.5", "seed=8", "data.system=Go"])
def test_another_recipe_reads_again(recipe_file, recipe, unread, change):
    prepared_splits(recipe)
    unread()
    with pytest.raises(TypeError):
        prepared_splits(load_recipe(recipe_file, [change, "data.validation=[]"]))


def test_another_version_reads_again(recipe, unread, monkeypatch):
    prepared_splits(recipe)
    unread()
    monkeypatch.setattr(prepared, "version", lambda _: "9.0")
    with pytest.raises(TypeError):
        prepared_splits(recipe)


def test_other_code_of_the_same_version_reads_again(recipe, unread, monkeypatch):
    """A clone is updated more often than its version."""
    prepared_splits(recipe)
    unread()
    monkeypatch.setattr(prepared, "content_hash", lambda *_, **__: "other")
    with pytest.raises(TypeError):
        prepared_splits(recipe)


def test_rows_of_a_renamed_file_are_said_to_be_there(recipe_file, recipe):
    prepared_splits(recipe)
    (recipe_file.parent / "train.jsonl").rename(recipe_file.parent / "renamed.jsonl")
    again = prepared_splits(load_recipe(recipe_file, ["data.train=renamed.jsonl"]))
    assert again.train[0].where == "renamed.jsonl:1"
    assert again.notes[0].startswith("renamed.jsonl: ")


def test_changed_files_are_read_again(recipe_file, recipe):
    before = prepared_splits(recipe)
    file = recipe_file.parent / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert len(prepared_splits(recipe).train) == len(before.train) - 1


def test_a_file_that_is_renamed_to_another_kind_is_read_as_that_kind(recipe_file):
    """The same lines are one text in a .txt file, and a row each in a .csv file."""
    lines = "prompt,completion\n" + "".join(f"Is {n} even?,It is {n}.\n" for n in range(48))
    for kind in ("txt", "csv"):
        (recipe_file.parent / f"again.{kind}").write_text(lines, encoding="utf-8")
    named = [load_recipe(recipe_file, [f"data.train=again.{kind}"]) for kind in ("txt", "csv")]
    read = [prepared_splits(recipe).train for recipe in named]
    assert read == [load_splits(recipe.data, recipe.seed).train for recipe in named]
    assert [len(rows) for rows in read] == [1, 48]


def test_a_damaged_table_is_made_again(recipe):
    before = list(prepared_splits(recipe).train)
    (table,) = Path(recipe.output_dir).glob("data/rows-*/rows.arrow")
    table.write_bytes(table.read_bytes()[:200])
    assert prepared_splits(recipe).train == before


def test_rows_are_read_even_if_no_folder_can_be_made(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    elsewhere = recipe.model_copy(update={"output_dir": str(tmp_path / "file" / "run")})
    assert prepared_splits(elsewhere).train == load_splits(recipe.data, recipe.seed).train


def test_only_the_last_contents_are_kept(recipe_file):
    for seed in range(5):
        prepared_splits(load_recipe(recipe_file, [f"seed={seed}"]))
    folder = Path(load_recipe(recipe_file, []).output_dir) / "data"
    assert len(list(folder.glob("rows-*"))) == 3


def test_rows_in_use_are_kept_though_the_clock_was_set_back(recipe_file):
    folder = Path(load_recipe(recipe_file, []).output_dir) / "data"
    for seed in range(3):
        prepared_splits(load_recipe(recipe_file, [f"seed={seed}"]))
    for rows in folder.glob("rows-*"):
        os.utime(rows, (2**32, 2**32))
    assert len(prepared_splits(load_recipe(recipe_file, ["seed=3"])).train) == 48


def test_tokens_on_the_disk_are_those_in_memory(recipe, tokenizer, monkeypatch):
    train = prepared_splits(recipe).train
    expected = tokens(list(train), tokenizer, recipe.data)
    assert tokens(train, tokenizer, recipe.data) == expected
    monkeypatch.setattr(dataset, "Encoder", None)  # no longer needed
    assert tokens(train, tokenizer, recipe.data) == expected


def test_several_processes_read_the_same_rows_and_make_the_same_tokens(
    recipe, tokenizer, monkeypatch
):
    expected = load_splits(recipe.data, recipe.seed)
    labels = [encode(row, tokenizer, recipe.data).labels for row in expected.train]
    monkeypatch.setattr(pool, "cores", lambda: 2)
    monkeypatch.setattr(pool, "FEW_BATCHES", 1)
    for module in (splits, dataset):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 4)
    assert prepared_splits(recipe) == expected
    assert to_dataset(prepared_splits(recipe).train, tokenizer, recipe.data)["labels"] == labels


def test_batches_are_computed_in_order_by_several_processes(monkeypatch):
    monkeypatch.setattr(pool, "cores", lambda: 2)

    def squared(number: int) -> tuple[int, int]:
        return number**2, os.getpid()

    squares, ids = zip(*pool.computed(squared, range(40)), strict=True)
    assert squares == tuple(number**2 for number in range(40))
    assert set(ids[: pool.FEW_BATCHES]) == {os.getpid()}
    assert os.getpid() not in ids[pool.FEW_BATCHES :]


def test_an_error_in_another_process_is_raised(monkeypatch):
    monkeypatch.setattr(pool, "cores", lambda: 2)

    def refuse(number: int) -> None:
        if number == 15:
            raise UserError("rows.jsonl:15: no")

    with pytest.raises(UserError, match="rows.jsonl:15: no"):
        list(pool.computed(refuse, range(40)))


def test_a_batch_is_encoded_as_its_rows_alone(tokenizer):
    data = Data(train="rows.jsonl")
    rows = [
        asked("open", "ok"),
        Row("book.txt", text="a text"),
        asked("open", "ok", "close", " done \n"),
        asked("où est 東京?", "à l'est ✓ 🌊"),
    ]
    assert encode_rows(rows, tokenizer, data) == [
        encode(row, tokenizer, data, whole=True) for row in rows
    ]


@pytest.mark.parametrize(
    "row",
    [
        Row("a:1", text="half a pair \ud800"),
        Row("a:1", text="text"),
        Row("a:1", asked("é\n", "ok").messages, tools=({"type": "function"},)),
        Row("a:1", asked("a", "b", "c", "d").messages, excluded=frozenset({1})),
    ],
    ids=["surrogate", "text", "tools", "excluded"],
)
def test_a_row_is_the_same_after_it_was_stored(row):
    assert Row.from_json(row.to_json()) == row
    assert Rows.of([row, row])[1:] == [row]


def test_a_row_that_json_cannot_hold_is_a_bad_row():
    call = {"function": {"name": "book", "arguments": {"on": date(2026, 1, 2)}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(BadRowError, match="rows.parquet\\[4\\]: date datetime.date.*as text"):
        Row("rows.parquet[4]", (message,)).to_json()


PAIRS = {
    "case and punctuation": ("Open the red door, please!", "open the red door please", True),
    "one word of many": ("a b c d e f g h i j k l m n", "a b c d e f g h i j k l m x", True),
    "one word of few": ("open the red door", "open the blue door", False),
    "another order": ("dog bites man in town", "man bites dog in town", False),
    "one short word": ("yes", "Yes.", True),
    "two short words": ("yes", "no", False),
}


@pytest.mark.parametrize("name", PAIRS)
def test_near_duplicates_are_named(name):
    one, other, alike = PAIRS[name]
    train = Rows.of([asked("something else", "ok"), asked(one, "ok", where="train:2")])
    test = Rows.of([asked(other, "ok", where="test:1")])
    assert near_duplicates(train, test) == ([("test:1", "train:2")] if alike else [])


@pytest.mark.parametrize(
    ("answers", "count"), [(["a", "b"], 1), (["a", " a "], 0), (["a", "a", "b", "c"], 1)]
)
def test_prompts_with_several_answers_are_counted(answers, count):
    rows = Rows.of([*(asked("ask", answer) for answer in answers), asked("other", "a")])
    assert prompts_with_several_answers(rows) == count


def test_the_page_holds_text_only(recipe_file, capsys):
    from finequant.finetune.data.preview import preview

    row = {"prompt": "<script>alert(1)</script>", "completion": "a & b"}
    (recipe_file.parent / "train.jsonl").write_text(json.dumps(row) + "\n")
    page = recipe_file.parent / "rows.html"
    recipe = load_recipe(recipe_file, [])
    preview(recipe, prepared_splits(recipe), 0, page)
    text = page.read_text()
    assert "&lt;script&gt;alert(1)" in text
    assert "<b>a &amp; b&lt;|im_end|&gt;</b>" in text
    assert "<script" not in text
    assert "http" not in text


@pytest.mark.parametrize("content", [b"", None, b"<p>mine</p>", b"mine", b"\xff"])
def test_only_an_unedited_page_is_replaced(recipe_file, here, content):
    page = recipe_file.parent / "rows.html"
    command = ("data", str(recipe_file), "--rows", "0", "--html", str(page))
    assert not here(*command).returncode
    written = page.read_bytes()
    if content is not None:
        page.write_bytes(content)
    done = here(*command)
    if content:
        assert (done.returncode, page.read_bytes()) == (2, content)
        assert "rows.html: exists already, and was edited, or is no page of `finequant" in (
            " ".join(done.stderr.split())
        )
    else:
        assert (done.returncode, page.read_bytes()) == (0, written)


@pytest.mark.parametrize("edit", [lambda page: page + b"A note.", lambda page: b"A" + page])
def test_an_edited_page_is_kept(recipe_file, here, edit):
    page = recipe_file.parent / "rows.html"
    command = ("data", str(recipe_file), "--rows", "0", "--html", str(page))
    assert not here(*command).returncode
    edited = edit(page.read_bytes())
    page.write_bytes(edited)
    assert (here(*command).returncode, page.read_bytes()) == (2, edited)


def test_a_folder_is_no_page(recipe_file, here):
    done = here("data", str(recipe_file), "--html", str(recipe_file.parent))
    assert done.returncode == 2
    assert "this is a folder: name a file in it" in " ".join(done.stderr.split())
