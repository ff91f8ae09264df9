"""Rows from every kind of file, their splits, and the messages on broken files."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finequant.finetune.data.readers import read_rows
from finequant.finetune.data.row import Row
from finequant.finetune.data.splits import Splits, load_splits
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Data, Source

ASK, SAY = 'Where is "Île, 7"?\nSay.', "In the\nsea, ✓"
TURNS = [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}]
SHAREGPT = [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]
FORMS = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": SHAREGPT},
    "another column": {"dialogue": SHAREGPT},
    "prompt_completion": {"prompt": ASK, "completion": SAY},
    "lists of messages": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "a list and a text": {"prompt": SHAREGPT[:1], "completion": SAY},
    "alpaca": {"instruction": ASK, "input": "", "output": SAY},
    "text": {"text": ASK + SAY},
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            for row in rows:
                cells = row.values()
                writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def numbered(start: int, stop: int, word: str = "ask") -> list[dict[str, str]]:
    return [{"prompt": f"{word} {n}", "completion": f"say {n}"} for n in range(start, stop)]


def load(
    train: Path | dict | list, seed: int = 0, validation_fraction: float = 0.0, **settings: Any
) -> Splits:
    """Loads the splits of the recipe section; paths stand for sources."""
    settings = {"train": train, "validation_fraction": validation_fraction, **settings}
    for name in ("train", "validation", "test"):
        if isinstance(settings.get(name), Path):
            settings[name] = str(settings[name])
    return load_splits(Data(**settings), seed)


def source(path: Path, **settings: Any) -> dict[str, Any]:
    return {"source": str(path), **settings}


def wheres(rows: list[Row]) -> list[str]:
    return [row.where for row in rows]


# Formats


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_format_of_every_file_gives_the_same_rows(tmp_path, form, suffix):
    rows, _, _, notes = load(write(tmp_path / f"rows{suffix}", [FORMS[form]] * 2))
    content = {"text": ASK + SAY} if form == "text" else {"messages": tuple(TURNS)}
    # The cells of a CSV file contain line breaks, JSON text does not.
    lines = {"a list and a text": ":4", "alpaca": ":5", "prompt_completion": ":5", "text": ":5"}
    second = lines.get(form, ":3")
    places = {".jsonl": (":1", ":2"), ".csv": (":2", second)}.get(suffix, ("[0]", "[1]"))
    assert rows == [Row(f"rows{suffix}{place}", **content) for place in places]
    name = {
        "sharegpt": "messages",
        "another column": "messages",
        "lists of messages": "prompt_completion",
        "a list and a text": "prompt_completion",
    }.get(form, form)
    assert notes == [f"rows{suffix}: 2 rows, format {name}"]


def test_suffixes_are_case_insensitive(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(0, 1)).rename(tmp_path / "rows.JSONL")
    assert len(load(path).train) == 1


def test_the_input_of_alpaca_follows_its_instruction(tmp_path):
    asked = {"instruction": "Add.", "output": "3"}
    path = write(
        tmp_path / "rows.jsonl",
        [{**asked, "input": "1 2"}, {**asked, "input": " "}, {**asked, "input": None}, asked],
    )
    prompts = [row.messages[0]["content"] for row in load(path).train]
    assert prompts == ["Add.\n\n1 2", "Add.", "Add.", "Add."]


def test_several_turns_of_sharegpt_are_read(tmp_path):
    turns = [("system", "Be brief."), ("human", "a"), ("gpt", "b"), ("user", "c"), ("gpt", "d")]
    row = {"conversations": [{"from": speaker, "value": said} for speaker, said in turns]}
    messages = load(write(tmp_path / "rows.jsonl", [row])).train[0].messages
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    assert [message["content"] for message in messages] == ["Be brief.", "a", "b", "c", "d"]


@pytest.mark.parametrize(
    "row",
    [
        {"chat": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]},
        {"q": "ask", "a": "say", "messages": "ignored, since the recipe maps others"},
    ],
)
def test_mapped_columns_are_read(tmp_path, row):
    columns = {"messages": "chat"} if "chat" in row else {"prompt": "q", "completion": "a"}
    path = write(tmp_path / "rows.jsonl", [row])
    (found,) = load(source(path, columns=columns)).train
    assert [message["content"] for message in found.messages] == ["ask", "say"]


def test_mapped_templates_are_filled(tmp_path):
    row = {"topic": "sea", "question": "How {deep}?", "answer": 11, "who": "a diver"}
    columns = {
        "prompt": "{topic}\nQuestion: {question}",
        "completion": "answer",
        "system": "You are {who}.",
    }
    path = write(tmp_path / "rows.json", [row])
    (found,) = load(source(path, columns=columns), system="not this one").train
    assert [message["content"] for message in found.messages] == [
        "You are a diver.",
        "sea\nQuestion: How {deep}?",
        "11",
    ]
    (text,) = load(source(path, columns={"text": "{topic}: {answer}"})).train
    assert (text.text, text.messages) == ("sea: 11", ())


def test_a_format_can_be_named(tmp_path):
    row = {"text": "all of it", **numbered(0, 1)[0]}
    path = write(tmp_path / "rows.jsonl", [row])
    assert load(path).train[0].messages
    assert load(source(path, format="text")).train == [Row("rows.jsonl:1", text="all of it")]


def test_the_system_message_is_for_rows_that_have_none(tmp_path):
    own = [{"role": "system", "content": "mine"}, *TURNS]
    path = write(tmp_path / "rows.jsonl", [{"messages": TURNS}, {"messages": own}])
    contents = [row.messages[0] for row in load(path, system="theirs").train]
    assert [message["content"] for message in contents] == ["theirs", "mine"]
    assert {message["role"] for message in contents} == {"system"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(42, "42"), (-1.5, "-1.5"), (True, "true"), ({"do": "öffnen"}, '{"do": "öffnen"}')],
)
def test_answers_that_json_can_write_become_text(tmp_path, value, text):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "ask", "completion": value}])
    assert load(path).train[0].messages[1]["content"] == text


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", numbered(0, 2))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.messages[0]["content"] for row in load(path).train] == ["ask 0", "ask 1"]


def test_blank_lines_do_not_shift_line_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n  \n{"text": "two"}\n')
    (tmp_path / "b.csv").write_text('\ntext\n\n"o\nne"\n\ntwo\n')
    train = load([source(tmp_path / "a.jsonl"), source(tmp_path / "b.csv")]).train
    assert wheres(train) == ["a.jsonl:2", "a.jsonl:5", "b.csv:4", "b.csv:7"]
    assert [row.text for row in train] == ["one", "two", "o\nne", "two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_row_of_a_million_characters_is_read(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", [{"prompt": "ask", "completion": "long " * 200_000}])
    assert len(load(path).train[0].messages[1]["content"]) == 1_000_000


# Weights, limits, splits


@pytest.mark.parametrize(("weight", "most", "least"), [(0.5, 1, 0), (1, 1, 1), (2, 2, 2)])
def test_weights_repeat_or_thin_out(tmp_path, weight, most, least):
    path = write(tmp_path / "rows.jsonl", numbered(0, 20))
    times = Counter(wheres(load(source(path, weight=weight)).train))
    assert sum(times.values()) == 20 * weight
    assert max(times.values()) == most
    assert min(times[f"rows.jsonl:{line}"] for line in range(1, 21)) == least


def test_a_weight_of_more_than_one_repeats_and_samples(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(0, 20))
    splits = load(source(path, weight=2.5))
    assert sorted(Counter(wheres(splits.train)).values()) == [2] * 10 + [3] * 10
    assert splits.notes == ["rows.jsonl: 20 rows, format prompt_completion, weight 2.5"]


@pytest.mark.parametrize("settings", [{"limit": 10}, {"weight": 0.5}, {"weight": 2.5}])
def test_picked_rows_depend_only_on_the_seed(tmp_path, settings):
    path = write(tmp_path / "rows.jsonl", numbered(0, 40))
    picks = [load(source(path, **settings), seed=seed).train for seed in (1, 1, 2)]
    assert picks[0] == picks[1]
    assert len(picks[0]) == len(picks[2])
    assert Counter(wheres(picks[0])) != Counter(wheres(picks[2]))


def test_every_source_has_its_own_limit_weight_and_format(tmp_path):
    first = write(tmp_path / "first.jsonl", numbered(0, 30))
    second = write(tmp_path / "second.csv", [{"text": f"line {n}"} for n in range(10)])
    splits = load([source(first, limit=4, weight=2), source(second, weight=0.5)])
    assert Counter(row.where.split(":")[0] for row in splits.train) == {
        "first.jsonl": 8,
        "second.csv": 5,
    }
    assert len(set(wheres(splits.train))) == 9
    assert splits.notes == [
        "first.jsonl: 4 rows, format prompt_completion, weight 2",
        "second.csv: 10 rows, format text, weight 0.5",
    ]


def test_splits_are_disjoint_and_depend_only_on_the_seed(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(0, 100))
    first, again, other = (
        load(path, validation_fraction=0.1, test_fraction=0.2, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert set(wheres(first.test)) != set(wheres(other.test))
    assert set(wheres(first.validation)) != set(wheres(other.validation))
    # A fifth of the ninety rows that validation leaves.
    assert [len(rows) for rows in first[:3]] == [72, 10, 18]
    assert len({row.where for rows in first[:3] for row in rows}) == 100


def test_repeated_rows_stay_in_one_split(tmp_path):
    rows = numbered(0, 20) + [{"prompt": f"  ask   {n}\n", "completion": "x"} for n in range(20)]
    splits = load(write(tmp_path / "rows.jsonl", rows), validation_fraction=0.3)
    assert [len(rows) for rows in splits[:2]] == [28, 12]
    assert not {row.prompt_key for row in splits.train} & {
        row.prompt_key for row in splits.validation
    }


def test_weights_apply_to_training_not_to_rows_that_are_split_off(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(0, 20))
    splits = load(source(path, weight=3), validation_fraction=0.1, duplicates="drop")
    assert set(Counter(wheres(splits.train)).values()) == {3}
    assert [len(rows) for rows in splits[:2]] == [54, 2]


def test_a_given_split_is_not_split_off(tmp_path):
    train = write(tmp_path / "train.jsonl", numbered(0, 20))
    held = write(tmp_path / "held.jsonl", numbered(20, 25))
    splits = load(train, validation=held, validation_fraction=0.5)
    assert [len(rows) for rows in splits[:3]] == [20, 5, 0]
    assert set(wheres(splits.validation)) == {f"held.jsonl:{line}" for line in range(1, 6)}


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_shared_rows_are_an_error_that_names_both_locations(tmp_path, held_out):
    train = write(tmp_path / "train.jsonl", numbered(0, 20))
    rows = numbered(50, 55) + [{"prompt": "ask\n 7", "completion": "another answer"}]
    held = write(tmp_path / "held.csv", rows)
    with pytest.raises(UserError) as error:
        load(source(train, weight=2), **{held_out: held})
    assert "1 training row also occurs in validation or test" in str(error.value)
    assert "data.overlap=drop; answers differ: data.same_rows=row compares" in str(error.value)
    assert str(error.value).endswith("\n  train.jsonl:8 = held.csv:7")


def test_bad_rows_of_a_file_for_training_and_test_are_named_once(tmp_path):
    file = write(tmp_path / "rows.jsonl", numbered(0, 2))
    with pytest.raises(UserError) as error:
        load(file, test=file)
    assert str(error.value) == (
        "data: 2 training rows also occur in validation or test; name other rows there, or none, "
        "and let data.test_fraction split some off\n  rows.jsonl:1 = rows.jsonl:1\n"
        "  rows.jsonl:2 = rows.jsonl:2"
    )
    write(file, [*numbered(0, 2), {"prompt": "ask", "completion": ""}])
    with pytest.raises(UserError, match="^rows.jsonl:3: empty assistant message"):
        load(file, test=file)


def test_shared_rows_can_be_left_out_of_training(tmp_path):
    train = write(tmp_path / "train.jsonl", numbered(0, 20))
    held = write(tmp_path / "held.jsonl", numbered(15, 30))
    splits = load(train, test=held, overlap="drop")
    assert [len(rows) for rows in splits[:3]] == [15, 0, 15]
    assert splits.notes[-1] == "train: 5 rows dropped, in validation or test too"


def test_validation_and_test_share_no_rows(tmp_path):
    train = write(tmp_path / "train.jsonl", numbered(0, 20))
    validation = write(tmp_path / "validation.jsonl", numbered(20, 30))
    test = write(tmp_path / "test.jsonl", numbered(29, 40))
    with pytest.raises(UserError) as error:
        load(train, validation=validation, test=test)
    assert str(error.value) == (
        "data: 1 validation row also occurs in test; remove it, or leave it out of validation "
        "with data.overlap=drop\n  validation.jsonl:10 = test.jsonl:1"
    )
    splits = load(train, validation=validation, test=test, overlap="drop")
    assert [len(rows) for rows in splits[:3]] == [20, 9, 11]
    assert "validation: 1 row dropped, in test too" in splits.notes
    with pytest.raises(UserError, match="name other rows there, or none"):
        load(train, validation=test, test=test)
    splits = load(train, validation=test, test=test, overlap="drop", validation_fraction=0.1)
    assert [len(rows) for rows in splits[:3]] == [18, 2, 11]


def test_rows_that_are_split_off_do_not_occur_in_the_given_test(tmp_path):
    train = write(tmp_path / "train.jsonl", numbered(0, 20))
    held = write(tmp_path / "held.jsonl", numbered(15, 30))
    splits = load(train, test=held, overlap="drop", validation_fraction=0.5)
    assert [len(rows) for rows in splits[:3]] == [7, 8, 15]
    prompts = {row.messages[0]["content"] for row in splits.test}
    assert not prompts & {row.messages[0]["content"] for row in splits.validation}
    for seed in range(5):  # whichever rows are split off
        with pytest.raises(UserError, match="5 training rows also occur in validation or test"):
            load(train, seed, test=held, validation_fraction=0.5)


def test_repeated_rows_can_be_dropped(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered(0, 4) + numbered(2, 8) + numbered(0, 1, "ask "))
    assert len(load(path).train) == 11
    splits = load(path, duplicates="drop")
    lines = [1, 2, 3, 4, 7, 8, 9, 10]
    assert wheres(splits.train) == [f"rows.jsonl:{line}" for line in lines]
    assert splits.notes[-1] == "train: 3 repeated rows dropped"


# Broken files

GOOD = '{"prompt": "ask", "completion": "say"}\n'


def chat(*turns: tuple[str, Any]) -> str:
    """Returns the lines of a good row, and of one with these turns."""
    good = json.dumps({"messages": TURNS})
    return f"{good}\n" + json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})


# name: (file, content, what the message says)
BROKEN: dict[str, tuple[str, str | bytes | None, list[str]]] = {
    "broken JSON": (
        "rows.jsonl",
        GOOD * 2 + '{"prompt": "ask", "completion: "say"}\n' + GOOD,
        ["rows.jsonl:3: broken JSON at column 33", "one whole object on each line"],
    ),
    "commas between lines": (
        "rows.jsonl",
        f"{GOOD.rstrip()},\n{GOOD.rstrip()} ,\n{GOOD}",
        ["rows.jsonl:1, ", "rows.jsonl:2: a comma follows the JSON: remove it"],
    ),
    "cut off": ("rows.jsonl", GOOD + GOOD[:20] + "\n", ["rows.jsonl:2: broken JSON at column"]),
    "broken JSON list": (
        "rows.json",
        '[\n{"prompt": "ask", "completion": "say"}\n{"prompt"',
        ["rows.json:3: broken JSON at column 1", "a list of objects"],
    ),
    "list of strings": (
        "rows.json",
        '[{"text": "good"}, "bad"]',
        ["rows.json[1]: expected a JSON object, found 'bad'"],
    ),
    "object, not list": (
        "rows.json",
        '{"train": []}',
        ["cannot tell the format from the columns train"],
    ),
    "scalar": ("rows.json", "7", ["rows.json: expected a JSON list of objects, found 7"]),
    "list in JSON lines": (
        "rows.jsonl",
        GOOD + f"[{GOOD.strip()}]\n",
        ["rows.jsonl:2: expected a JSON object on each line, found [{'prompt': "],
    ),
    "number of 5000 digits": ("rows.jsonl", GOOD + "7" * 5000, ["rows.jsonl:2: this JSON cannot"]),
    "nested too deeply": ("rows.json", "[" * 10**6, ["rows.json: this JSON cannot be read"]),
    "latin-1": (
        "rows.jsonl",
        GOOD.encode() * 2000 + '{"text": "Île"}\n'.encode("latin-1"),
        ["rows.jsonl:2001: not UTF-8 text", "save the file as UTF-8"],
    ),
    "latin-1 CSV": (
        "rows.csv",
        "text\ngood\nÎle\n".encode("latin-1"),
        ["rows.csv:3: not UTF-8 text", "save the file as UTF-8"],
    ),
    "UTF-16 without its mark": (
        "rows.csv",
        "text\ngood\n".encode("utf-16-le"),
        ["rows.csv: UTF-16 without a byte order mark: save the file as UTF-8"],
    ),
    "UTF-16 cut off": (
        "rows.csv",
        "text\ngood\n".encode("utf-16")[:-1],
        ["rows.csv:2: not UTF-16", "save the file as UTF-8"],
    ),
    "empty": ("rows.jsonl", "", ["rows.jsonl: no rows in this file"]),
    "empty JSON": ("rows.json", "", ["rows.json: no rows in this file"]),
    "empty list": ("rows.json", "[]", ["rows.json: no rows in this file"]),
    "empty CSV": ("rows.csv", "", ["rows.csv: no rows in this file"]),
    "blank lines": ("rows.jsonl", "\n \n\t\n", ["rows.jsonl: no rows in this file"]),
    "header only": ("rows.csv", "prompt,completion\n", ["rows.csv: no rows in this file"]),
    "missing column": (
        "rows.jsonl",
        GOOD + '{"prompt": "ask", "completions": "say"}',
        ["rows.jsonl:2: no column completion; the columns are prompt, completions"],
    ),
    "missing messages": (
        "rows.jsonl",
        chat(("user", "a"), ("assistant", "b")) + "\n" + GOOD,
        ["rows.jsonl:3: no column messages; the columns are prompt, completion"],
    ),
    "null": (
        "rows.jsonl",
        GOOD + '{"prompt": "ask", "completion": null}',
        ["rows.jsonl:2: completion is null"],
    ),
    "NaN": (
        "rows.jsonl",
        GOOD + '{"prompt": "ask", "completion": NaN}',
        ["rows.jsonl:2: completion is nan, expected text", "remove the row"],
    ),
    "messages as instruction": (
        "rows.jsonl",
        json.dumps({"instruction": TURNS[:1], "output": "b"}),
        ["rows.jsonl:1: instruction is a list of messages", "one column `messages`"],
    ),
    "unknown role": (
        "rows.jsonl",
        chat(("user", "a"), ("critic", "b")),
        ["rows.jsonl:2: messages: role 'critic': expected system, user, assistant or tool"],
    ),
    "unknown speaker": (
        "rows.jsonl",
        '{"conversations": [{"from": "narrator", "value": "a"}]}',
        ["rows.jsonl:1: conversations: role 'narrator': expected system, user, assistant or"],
    ),
    "two user turns": (
        "rows.jsonl",
        chat(("user", "a"), ("user", "b"), ("assistant", "c")),
        ["rows.jsonl:2: the turns are user, user, assistant; expected no two user turns in a row"],
    ),
    "ends with user": (
        "rows.jsonl",
        chat(("user", "a"), ("assistant", "b"), ("user", "c")),
        ["rows.jsonl:2: the turns are user, assistant, user; expected the last to be assistant"],
    ),
    "no answer": (
        "rows.jsonl",
        chat(("system", "a"), ("user", "b")),
        ["rows.jsonl:2: the turns are system, user; expected an answer (assistant)"],
    ),
    "a greeting alone": ("rows.jsonl", chat(("assistant", "a")), ["rows.jsonl:2: the turns are a"]),
    "two system messages": (
        "rows.jsonl",
        chat(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")),
        ["rows.jsonl:2: the turns are system, system, user", "no two system turns in a row"],
    ),
    "no turns": ("rows.jsonl", chat(), ["rows.jsonl:2: no turns; expected an answer"]),
    "empty assistant turn": (
        "rows.jsonl",
        chat(("user", "a"), ("assistant", " \n")),
        ["rows.jsonl:2: empty assistant message: remove the row or fill it in", "=repair"],
    ),
    "content is a list": (
        "rows.jsonl",
        chat(("user", ["a"]), ("assistant", "b")),
        ["rows.jsonl:2: messages: a user message whose content is not text: ['a']"],
    ),
    "turn is no object": (
        "rows.jsonl",
        '{"messages": ["ask", "say"]}',
        ["rows.jsonl:1: messages: expected a list of role and content, found ['ask', 'say']"],
    ),
    "messages of a CSV": (
        "rows.csv",
        "messages\n[{'role': 'user'}]\n",
        ["rows.csv:2: messages: broken JSON at column 3"],
    ),
    "empty text": ("rows.jsonl", '{"text": "a"}\n{"text": "\\n"}', ["rows.jsonl:2: empty text"]),
    "stray quote": (
        "rows.csv",
        'prompt,completion\nask,say\nask,"sa"y\nask,say\n',
        ["rows.csv:3: broken CSV", "a stray quote? Double it"],
    ),
    "open quote": (
        "rows.csv",
        'prompt,completion\nask,say\nask,"say\nask,say\n',
        ["rows.csv:3: broken CSV", "a stray quote? Double it"],
    ),
    "too many columns": (
        "rows.csv",
        "prompt,completion\nask,say\nask,say, too\n",
        ["rows.csv:3: 3 columns, where the header has 2", "quote cells that contain a comma"],
    ),
    "too few columns": (
        "rows.csv",
        'prompt,completion\n"ask\nme",say\nask\n',
        ["rows.csv:4: 1 column, where the header has 2: add the missing cells"],
    ),
    "repeated column": (
        "rows.csv",
        "prompt,completion,prompt\nask,say,again\n",
        ["rows.csv:1: two columns are called 'prompt': rename one of them"],
    ),
    "no parquet": (
        "rows.parquet",
        b"PAR1 it says, and is none",
        ["rows.parquet: cannot be read as a parquet file"],
    ),
    "empty parquet": ("rows.parquet", b"", ["rows.parquet: cannot be read as a parquet file"]),
    "unknown suffix": (
        "rows.xlsx",
        b"PK",
        ["rows.xlsx: expected a file that ends in .jsonl", "Excel: save the sheet as CSV UTF-8"],
    ),
    "empty folder": ("rows", None, ["rows: this folder has no file of rows for train"]),
    "unknown columns": (
        "rows.jsonl",
        '{"frage": "ask", "antwort": "say"}',
        [
            "rows.jsonl: cannot tell the format from the columns frage, antwort",
            "columns: {prompt: QUESTION_COLUMN, completion: ANSWER_COLUMN}",
        ],
    ),
    "no columns": ("rows.jsonl", "{}", ["cannot tell the format from the columns none"]),
    "NUL bytes": ("rows.jsonl", GOOD.encode() + b"\0" * 30, ["rows.jsonl:2: broken JSON"]),
    "NUL in a cell": ("rows.csv", b"text\ngood\nb\0d\n", ["rows.csv:3: character 2 is U+0000"]),
    "lone surrogate": (
        "rows.jsonl",
        GOOD + '{"prompt": "ask", "completion": "s\\ud800"}',
        ["rows.jsonl:2: character 2 is U+D800, which is not text", "plain UTF-8"],
    ),
    "lone surrogate in a function": (
        "rows.jsonl",
        '{"prompt": "ask", "completion": "say", "tools": [{"name": "f", "is": "s\\ud800"}]}',
        ["rows.jsonl:1: character 2 is U+D800, which is not text", "plain UTF-8"],
    ),
    "lone surrogate in raw text": (
        "rows.jsonl",
        '{"text": "a\\udfff"}',
        ["rows.jsonl:1: character 2 is U+DFFF"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_messages_on_broken_files_say_what_where_and_how_to_go_on(tmp_path, name):
    file, content, expected = BROKEN[name]
    path = make_broken(tmp_path / file, content)
    with pytest.raises(UserError) as error:
        load(path, system="Be brief.")
    for part in expected:
        assert part in str(error.value)
    assert len(str(error.value)) < 500


def make_broken(path: Path, content: str | bytes | None) -> Path:
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="rows.jsonl: cannot be read: No such file"):
        read_rows(Source(source=str(tmp_path / "rows.jsonl")))


def test_a_text_file_is_one_row(tmp_path):
    (tmp_path / "book.txt").write_text("\n = Title = \n\n Words.\n", encoding="utf-8")
    (row,) = read_rows(Source(source=str(tmp_path / "book.txt")))
    assert row == ("book.txt", {"text": "\n = Title = \n\n Words.\n"})


def test_parquet_values_that_are_not_text_are_refused(tmp_path):
    import datetime

    for value in (datetime.date(2026, 1, 2), b"bytes", float("nan")):
        path = write(tmp_path / "rows.parquet", [{"prompt": "ask", "completion": value}])
        with pytest.raises(UserError, match=r"rows.parquet\[0\]: completion is .*expected text"):
            load(path)


@pytest.mark.parametrize("number", ["1.50", "-0.0000001", "100000000000000000000"])
def test_decimals_keep_their_digits(tmp_path, number):
    from decimal import Decimal

    path = write(tmp_path / "rows.parquet", [{"prompt": "ask", "completion": Decimal(number)}])
    (row,) = load(path, validation_fraction=0).train
    assert row.messages[1]["content"] == number


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "q", "completion": "x"}, "rows.jsonl:1: no column x; the columns are q, a"),
        ({"prompt": "{q} {x}", "completion": "a"}, "rows.jsonl:1: no column x; the columns are"),
        ({"prompt": "Ask: {}", "completion": "a"}, "columns: 'Ask: {}' names no column"),
        ({"messages": "x"}, "rows.jsonl:1: no column x; the columns are q, a"),
        ({"text": "x"}, "rows.jsonl:1: no column x; the columns are q, a"),
    ],
)
def test_a_mapped_column_that_does_not_exist_is_named(tmp_path, columns, message):
    path = write(tmp_path / "rows.jsonl", [{"q": "ask", "a": "say"}])
    with pytest.raises(UserError) as error:
        load(source(path, columns=columns))
    assert message in str(error.value)


def test_a_dataset_that_cannot_be_loaded_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        load("finequant/no-such-dataset")
    assert "cannot load the dataset finequant/no-such-dataset, split train: " in str(error.value)
    assert "check its id, name, split and revision" in str(error.value)


def test_a_dataset_of_the_hub_is_read(monkeypatch):
    import datasets

    def load_dataset(path, name, *, split, revision, streaming):
        assert (path, name, split, revision) == ("org/name", "small", "train[:9]", "abc")
        assert not streaming
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    asked = {"source": "org/name", "name": "small", "split": "train[:9]", "revision": "abc"}
    rows = [{"messages": TURNS}] * 2
    assert load(asked).train == [Row(f"org/name[{n}]", messages=tuple(TURNS)) for n in (0, 1)]
    rows = []
    with pytest.raises(UserError, match=r"no rows in the dataset org/name, split train\[:9\]"):
        load(asked)


def test_a_stream_that_is_cut_is_said_to_be_its_first_rows(monkeypatch):
    import datasets

    def load_dataset(*_: object, **keys: object):
        return datasets.Dataset.from_list([{"messages": TURNS}] * 5).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for limit, said in ((3, "3 rows (the first ones)"), (9, "5 rows")):
        notes = load({"source": "org/name", "streaming": True, "limit": limit}).notes
        assert notes[0] == f"name: {said}, format messages"


def test_one_row_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="no rows are left to train on; .*validation_fraction"):
        load(write(tmp_path / "rows.jsonl", numbered(0, 1)), validation_fraction=0.05)


def test_one_text_cannot_be_split(tmp_path):
    (tmp_path / "book.txt").write_text("A text.\n\nAnother paragraph.", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(str(tmp_path / "book.txt"), validation_fraction=0.05)
    assert "no rows are left to train on (a .txt file is one row); add rows" in str(error.value)
    assert "book.txt: 1 row, format text\n  validation: 1 row split off" in str(error.value)


@pytest.mark.parametrize("name", ["broken JSON", "too many columns", "lone surrogate"])
def test_the_command_prints_one_message(recipe_file, here, name):
    file, content, (what, *_) = BROKEN[name]
    make_broken(recipe_file.parent / file, content)
    done = here("data", str(recipe_file), f"data.train={file}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert what in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
