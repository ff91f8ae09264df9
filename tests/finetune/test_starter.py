"""`finequant init` writes a first recipe for somebody's rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import torch
from conftest import make_rows, write_jsonl

from finequant.evaluate.check import check_rows
from finequant.finetune.data import starter
from finequant.finetune.data.columns import joined
from finequant.finetune.data.guess import look_at
from finequant.finetune.data.splits import load_splits
from finequant.finetune.data.starter import write_recipe
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Quantize

CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
}


def chat(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "no"}]


KINDS = {
    "labels under names that say nothing": (
        [{"Nr": f"{n}", "Nachricht": f"wo ist {n}?", "K": "ab"[n % 2]} for n in range(40)],
        ["exact_match", "multiple_choice"],
        ("wo ist 0?", "a"),
    ),
    "nested": (
        [
            {"id": n, "qa": {"question": f"what is {n}?", "answers": [f"{n} is " * 9]}}
            for n in range(40)
        ],
        ["f1", "rouge"],
        ("what is 0?", "0 is " * 9),
    ),
    # rows -> metrics, and the first row's question and answer
    "labels": (
        [{"text": f"where is {n}?", "category": ("lost", "found")[n % 2]} for n in range(40)],
        ["exact_match", "multiple_choice"],
        ("where is 0?", "lost"),
    ),
    "labels in columns of two letters": (
        [{"tx": f"where is {n}?", "lb": ("lost", "found")[n % 2]} for n in range(40)],
        ["exact_match", "multiple_choice"],
        ("where is 0?", "lost"),
    ),
    "numbers as labels": (
        [{"id": n, "text": f"where is {n}?", "label": n % 3} for n in range(40)],
        ["exact_match", "multiple_choice"],
        ("where is 0?", "0"),
    ),
    "truth as labels": (
        [{"text": f"where is {n}?", "label": n % 2 == 0} for n in range(40)],
        ["exact_match", "multiple_choice"],
        ("where is 0?", "true"),
    ),
    "intents with other names": (
        [
            {"Utterance text": f"go {n}", "Intent name": "go" if n % 3 else "stop"}
            for n in range(40)
        ],
        ["exact_match", "multiple_choice"],
        ("go 0", "stop"),
    ),
    "questions": (
        [{"id": n, "question": f"what is {n}?", "answer": f"{n} it is " * 9} for n in range(40)],
        ["f1", "rouge"],
        ("what is 0?", ("0 it is " * 9)),
    ),
    "short answers": (
        [{"context": f"the town {n} is", "continuation": f"town {n} a"} for n in range(40)],
        ["exact_match", "f1"],
        ("the town 0 is", "town 0 a"),
    ),
    "solutions": (
        [{"question": f"{n} + 1?", "answer": f"Add one.\n#### {n + 1}"} for n in range(40)],
        ["number_match"],
        ("0 + 1?", "Add one.\n#### 1"),
    ),
    "instructions and what they are about": (
        [
            {
                "instruction": f"Name {n}",
                "instances": [{"input": "" if n % 2 else f"about {n}", "output": f"{n} is " * 9}],
            }
            for n in range(40)
        ],
        ["f1", "rouge"],
        ("Name 0\n\nabout 0", "0 is " * 9),
    ),
    "endings and a label that is their number": (
        [
            {"ctx": f"he is {n}", "endings": ["no", "yes"], "label": str(n % 2), "activity": "go"}
            for n in range(40)
        ],
        ["exact_match", "multiple_choice"],
        ("he is 0", "no"),
    ),
    "answers in other words": (
        [
            {
                "question": f"who is {n}?",
                "answers": {"text": [f"it, {n}, is", f"{n}"], "at": [n, n]},
            }
            for n in range(40)
        ],
        ["exact_match", "f1"],
        ("who is 0?", "it, 0, is"),
    ),
    "passages and questions": (
        [
            {"passage": f"in {n} it was", "question": f"was {n}?", "answer": n % 2 == 0}
            for n in range(40)
        ],
        ["exact_match", "multiple_choice"],
        ("in 0 it was\n\nwas 0?", "true"),
    ),
    "names beside the numbers of labels": (
        [{"text": f"is {n}", "label": n % 2, "label_text": ("a", "b")[n % 2]} for n in range(40)],
        ["exact_match", "multiple_choice"],
        ("is 0", "a"),
    ),
    "summaries of conversations": (
        [{"chat": [*chat(n), *chat(n)], "summary": f"no to {n}"} for n in range(40)],
        ["rouge"],
        ("user: say 0\nassistant: no\nuser: say 0\nassistant: no", "no to 0"),
    ),
    "conversations and the answer to them": (
        [{"chat": chat(n)[:1], "reply": f"{n} is so " * 9} for n in range(40)],
        ["f1", "rouge"],
        ("say 0", "0 is so " * 9),
    ),
    "a conversation in a column of another name": (
        [{"n": n, "body": {"my_chat": chat(n)}} for n in range(40)],
        ["f1", "rouge"],
        ("say 0", "no"),
    ),
    "a conversation as the text of a cell": (
        [{"n": n, "my_chat": json.dumps(chat(n))} for n in range(40)],
        ["f1", "rouge"],
        ("say 0", "no"),
    ),
    "calls in a column": (
        [
            {
                "query": f"call {n}",
                "answers": json.dumps([{"name": "f", "arguments": {"n": n}}]),
                "tools": json.dumps([{"name": "f", "description": "", "parameters": {}}]),
            }
            for n in range(40)
        ],
        ["tool_call_match"],
        ("call 0", ""),
    ),
    "calls, and then an answer in words": (
        [
            {"messages": [{"role": "user", "content": f"call {n}"}, CALL, *chat(n)]}
            for n in range(40)
        ],
        ["tool_call_match", "f1"],
        ("call 0", ""),
    ),
    "calls in all turns": (
        [
            {"messages": [{"role": "user", "content": f"call {n}"}, CALL, *chat(n)[:1], CALL]}
            for n in range(40)
        ],
        ["tool_call_match"],
        ("call 0", ""),
    ),
    "calls that are text, and then an answer in words": (
        [
            {
                "conversations": [
                    {"from": "human", "value": f"call {n}"},
                    {"from": "gpt", "value": '<tool_call>\n{"name": "f", "arguments": {}}'},
                    {"from": "tool", "value": "1"},
                    {"from": "gpt", "value": "one"},
                ]
            }
            for n in range(40)
        ],
        ["tool_call_match", "f1"],
        ("call 0", '<tool_call>\n{"name": "f", "arguments": {}}'),
    ),
    "a form of calls in the system message, which are never made": (
        [
            {
                "messages": [
                    {"role": "system", "content": '<tool_call>{"name": ...}</tool_call>'},
                    *chat(n),
                ]
            }
            for n in range(40)
        ],
        ["f1", "rouge"],
        ("say 0", "no"),
    ),
    "calls in a column, or words": (
        [
            {
                "query": f"call {n}",
                "answers": json.dumps([{"name": "f", "arguments": {}}]) if n % 2 else "no",
                "tools": json.dumps([{"name": "f", "description": "", "parameters": {}}]),
            }
            for n in range(40)
        ],
        ["tool_call_match", "f1"],
        ("call 0", "no"),
    ),
    "turns without calls in a table, which has a key for them": (
        [{"messages": [{**turn, "tool_calls": None} for turn in chat(n)]} for n in range(40)],
        ["f1", "rouge"],
        ("say 0", "no"),
    ),
    "summaries": (
        [{"dialogue": f"A: {n}\nB: no", "summary": f"no to {n}"} for n in range(40)],
        ["rouge"],
        ("A: 0\nB: no", "no to 0"),
    ),
    "messages as input and output": (
        [
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": f"is {n}?"}]}
                ],
                "output": [{"role": "assistant", "content": f"it is {n}"}],
            }
            for n in range(40)
        ],
        ["f1", "rouge"],
        ("is 0?", "it is 0"),
    ),
    "objects": (
        [{"prompt": f"set {n}", "completion": json.dumps({"set": n})} for n in range(40)],
        ["json_match"],
        ("set 0", '{"set": 0}'),
    ),
    "calls": (
        [{"messages": [{"role": "user", "content": f"call {n}"}, CALL]} for n in range(40)],
        ["tool_call_match"],
        ("call 0", ""),
    ),
    "lists of messages": (
        [
            {
                "prompt": [{"role": "user", "content": f"say {n}"}],
                "completion": [{"role": "assistant", "content": f"{n}"}],
            }
            for n in range(40)
        ],
        ["f1", "rouge"],
        ("say 0", "0"),
    ),
    "a conversation in another column": (
        [
            {
                "id": n,
                "dialog": [{"from": "user", "value": f"say {n}"}, {"from": "bot", "value": "no"}],
            }
            for n in range(40)
        ],
        ["f1", "rouge"],
        ("say 0", "no"),
    ),
    "ShareGPT's calls, in a few rows": (
        [
            {
                "conversations": [
                    {"from": "human", "value": f"call {n}"},
                    {"from": "function_call", "value": json.dumps(CALL["tool_calls"][0])}
                    if n == 39
                    else {"from": "gpt", "value": "no"},
                ]
            }
            for n in range(40)
        ],
        ["tool_call_match", "f1"],
        ("call 0", "no"),
    ),
    "functions that are never called": (
        [
            {
                "messages": [
                    {"role": "user", "content": f"call {n}"},
                    {"role": "assistant", "content": "no"},
                ],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            }
            for n in range(40)
        ],
        ["f1", "rouge"],
        ("call 0", "no"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_columns_and_task_are_guessed(tmp_path, kind):
    rows, metrics, (question, answer) = KINDS[kind]
    file = tmp_path / "my rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    recipe = load_recipe(tmp_path / "mine.yaml", [])
    assert recipe.evaluate.metrics == metrics
    assert recipe.quantize.rotate
    splits = load_splits(recipe.data, recipe.seed)
    assert splits.test
    row = next(row for part in splits[:3] for row in part if row.where.endswith(":1"))
    asked = [message for message in row.messages if message["role"] != "system"]
    assert (asked[0]["content"], asked[1].get("content")) == (question, answer)


def words(n: int, name: str) -> str:
    """Returns a sentence that no other row or column has."""
    return f"the {name} of row {n} is here"


def unlike(*names: str) -> list[dict[str, Any]]:
    return [{name: words(n, name) for name in names} for n in range(40)]


def with_labels(rows: list[dict[str, Any]], name: str = "label") -> list[dict[str, Any]]:
    return [{**row, name: "ab"[n % 2]} for n, row in enumerate(rows)]


REFUSED: dict[str, tuple[list[dict[str, Any]], str, dict[str, str]]] = {
    # rows, the message, and columns that the message suggests, if any
    "two texts of a label": (
        with_labels(unlike("premise", "hypothesis")),
        "text are premise, hypothesis, label: add --prompt COLUMN",
        {"prompt": joined(["premise", "hypothesis"])},
    ),
    "two numbered texts of a label": (
        with_labels(unlike("sentence1", "sentence2")),
        "completion label leave out sentence2. .*add --prompt sentence1 --prompt sentence2",
        {"prompt": joined(["sentence1", "sentence2"])},
    ),
    "a reasoning": (
        unlike("question", "reasoning", "answer"),
        "leave out reasoning.*--completion reasoning --completion answer; if neither, --prompt",
        {"prompt": "question", "completion": joined(["reasoning", "answer"])},
    ),
    "a text beside prompt and completion": (
        unlike("background", "prompt", "completion"),
        "leave out background. .*add --prompt background --prompt prompt",
        {"prompt": joined(["background", "prompt"])},
    ),
    "choices by letter in columns": (
        with_labels(unlike("question", "A", "B"), "answer"),
        "completion answer leave out A, B",
        {"prompt": joined(["question", "A", "B"])},
    ),
    "choices in a list": (
        [
            {"options": [words(n, "a"), words(n, "b")], "answer": "AB"[n % 2], **row}
            for n, row in enumerate(unlike("question"))
        ],
        "leave out options. .*add --prompt question --prompt options:lines; if it should",
        {"prompt": joined(["question", "options:lines"])},
    ),
    "choices in an object": (
        [
            {
                "question": words(n, "q"),
                "choices": {"text": [f"{n}", "b"]},
                "answerKey": "ab"[n % 2],
            }
            for n in range(40)
        ],
        "completion answerKey leave out choices. .*--prompt question --prompt choices",
        {"prompt": joined(["question", "choices"])},
    ),
    "names with spaces": (
        unlike("the question", "Some Docs", "the answer"),
        "leave out Some Docs. .*--prompt 'the question' --prompt 'Some Docs'; if it should write",
        {"prompt": joined(["the question", "Some Docs"])},
    ),
    "documents in a list": (
        [{**row, "documents": [row["question"]]} for row in unlike("question", "answer")],
        "leave out documents",
        {"prompt": joined(["documents", "question"])},
    ),
    "several questions in a row": (
        [
            {"turns": [{"question": words(n, i), "answer": words(n, f"a{i}")} for i in "ab"]}
            for n in range(40)
        ],
        "leave out turns",
        {},
    ),
    "answers of several models": (
        [
            {**row, "completions": [{"response": words(n, "a")}, {"response": "bad"}]}
            for n, row in enumerate(unlike("instruction"))
        ],
        r"several completions: if the first .* --completion 'completions\[0\].response'; if not, w",
        {"completion": "completions[0].response"},
    ),
    "texts with a rating for each": (
        [
            {**row, "completions": [words(n, "a"), words(n, "b")], "labels": [False, True]}
            for n, row in enumerate(unlike("prompt"))
        ],
        r"several completions: if the first .*'completions\[0\]'; if all .*completions:lines; if n",
        {"completion": "{completions:lines}"},
    ),
    "answers with scores": (
        [
            {**row, "answers": [words(n, i) for i in "abc"[n % 3 :]], "ranks": [n] * (3 - n % 3)}
            for n, row in enumerate(unlike("question"))
        ],
        "several answers: if the first is always the answer",
        {"completion": "answers[0]"},
    ),
    "several labels in a few rows": (
        [
            {**row, "labels": ["a", "b"] if n == 9 else ["ab"[n % 2]]}
            for n, row in enumerate(unlike("text"))
        ],
        "several labels: .* if all belong to it, add --completion labels:lines; if not, write",
        {"completion": "{labels:lines}"},
    ),
    "a score of two numbered texts": (
        [{**row, "score": n / 7} for n, row in enumerate(unlike("sentence1", "sentence2"))],
        "which column is the question and which the answer",
        {"prompt": joined(["sentence1", "sentence2"]), "completion": "score"},
    ),
    "only keys, links and dates beside a question": (
        [
            {"question": words(n, "q"), "uri": f"https://example/{n}", "day": f"2024-01-{n}"}
            for n in range(40)
        ],
        "which column is the question and which the answer",
        {},
    ),
    "two answers": (
        unlike("question", "answer_a", "answer_b"),
        "which column is the question and which the answer",
        {"prompt": "question", "completion": "answer_b"},
    ),
    "a title": (unlike("title", "text"), "without answers, --task text", {}),
    "numbers beside a text": (
        [{"text": words(n, "text"), "stars": n % 5} for n in range(40)],
        "without answers, --task text",
        {"prompt": "text", "completion": "stars"},
    ),
    "conversations written out": (
        [{"text": f"### Human: {words(n, 'a')}### Assistant: ah"} for n in range(40)],
        "each text of text is a whole conversation: write it as a list of messages",
        {},
    ),
    "conversations written out in a column of another name": (
        [{"chosen": f"\n\nHuman: {words(n, 'a')}\n\nAssistant: ah"} for n in range(40)],
        "each text of chosen is a whole conversation.*--task text --completion chosen",
        {},
    ),
    "messages as rows": (
        [{"role": ["prompter", "assistant"][n % 2], "text": f"{n} a"} for n in range(40)],
        "each row is one message of a conversation",
        {},
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_columns_that_may_belong_to_a_question_are_asked_for(tmp_path, kind):
    """The model would learn answers to something that it never saw."""
    rows, message, columns = REFUSED[kind]
    file, target = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "mine.yaml"
    if message:
        with pytest.raises(UserError, match=message):
            write_recipe(file, None, None, None, target)
    if columns:
        look = write_recipe(file, None, None, None, target, columns)
        assert columns.items() <= look.columns.items()
        assert load_splits(load_recipe(target, ["data.bad_rows=drop"]).data, 0).train


@pytest.mark.parametrize("value", [date(2024, 1, 31), b"\xff", UUID(int=1)])
@pytest.mark.parametrize("given", [{}, {"completion": "due"}, {"prompt": "q", "completion": "due"}])
def test_a_column_of_parquet_that_is_not_text_is_named(value, given):
    rows = [{"q": words(n, "q"), "due": value, "done": None} for n in range(40)]
    with pytest.raises(UserError) as error:
        look_at(rows, "rows.parquet", None, given)
    assert f"not text: due ({value!r}): to use it, write it as text" in str(error.value)


def test_a_sorted_file_is_seen_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(starter, "ROWS", 80)
    half = range(100)
    late = {
        "classes": [
            {"text": words(n, "t"), "label": kind, "label_text": ["bad", "good"][kind]}
            for kind in (0, 1)
            for n in half
        ],
        "calls": [*({"messages": chat(n)} for n in half)]
        + [{"messages": [chat(n)[0], CALL]} for n in half],
        "lengths": [{"question": words(n, "q"), "answer": "word " * n} for n in range(1, 200)],
        "numbers": [{"question": words(n, "q"), "answer": f"{n}"} for n in half]
        + [{"question": words(n, "q"), "answer": f"many {words(n, 'a')}"} for n in half],
    }
    recipes = {}
    for kind, rows in late.items():
        file = write_jsonl(tmp_path / f"{kind}.jsonl", rows)
        write_recipe(file, None, None, None, tmp_path / f"{kind}.yaml")
        recipes[kind] = load_recipe(tmp_path / f"{kind}.yaml")
    assert recipes["classes"].data.train[0].columns["completion"] == "label_text"
    assert recipes["calls"].evaluate.metrics == ["tool_call_match", "f1"]
    assert recipes["lengths"].evaluate.max_new_tokens > 400
    assert recipes["numbers"].evaluate.metrics != ["number_match"]


def test_columns_that_the_first_row_lacks_are_named(tmp_path):
    rows: list[dict[str, Any]] = unlike("question", "answer")
    for n, row in enumerate(rows[1:]):
        row |= {"source": "ab"[n % 2], "note": {"kind": "ab"[n % 2]}}
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    look = write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    assert look.unread == ["source", "note"]
    for n, row in enumerate(rows[1:]):
        row["choices"] = [words(n, "b"), words(n, "c")]
    with pytest.raises(UserError, match="--prompt choices:lines"):
        write_recipe(write_jsonl(file, rows), None, None, None, tmp_path / "other.yaml")


def test_an_answer_that_the_first_row_lacks_is_found(tmp_path):
    rows = [
        {"key": f"k{n}", "question": words(n, "q"), "answers": {"text": ["a", "b"][: n % 2]}}
        for n in range(40)
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    look = write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    assert look.columns == {"prompt": "question", "completion": "answers.text[0]"}


@pytest.mark.parametrize("column", ["text", "content", "meta.text"])
def test_texts_can_be_asked_for(tmp_path, column):
    rows = [{"text": f"{n}", "content": f"c {n}", "meta": {"text": f"m {n}"}} for n in range(40)]
    file, target = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "mine.yaml"
    with pytest.raises(UserError, match="--task text: .* with text are text, content, meta.text"):
        write_recipe(file, None, None, "text", target, {"completion": "texts"})
    write_recipe(file, None, None, "text", target, {"completion": column})
    recipe = load_recipe(target)
    assert (recipe.evaluate.metrics, recipe.data.train[0].columns) == ([], {"text": column})
    assert load_splits(recipe.data, 0).train[0].text


def test_texts_with_keys_links_and_dates_are_texts(tmp_path):
    rows = [
        {
            "text": f"{n} a",
            "url": f"https://a/{n}",
            "day": "2019-04-25",
            "lang": "en",
            "meta": {"set": "a"},
        }
        for n in range(40)
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert write_recipe(file, None, None, None, tmp_path / "mine.yaml").task == "text"


@pytest.mark.parametrize(
    "lines",
    [
        "ham,see you there\nspam,win now\nham,where?\n",
        "What is it?,It is that.\nWho is it?,It is her.\n",
        "4,1467810369,a b c d e f g h i\n0,1467810372,b c d e f g h i j\n",
    ],
)
def test_a_table_without_a_line_of_names_is_refused(tmp_path, lines):
    file = tmp_path / "rows.csv"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.csv: the first line should name the columns, but"):
        write_recipe(file, None, None, None, tmp_path / "mine.yaml")


@pytest.mark.parametrize("first", ["Survey 2024,,", "Customer,,Reply", "Survey 2024,"])
def test_a_title_above_the_names_of_columns_is_refused(tmp_path, first):
    file, columns = tmp_path / "rows.csv", first.count(",") + 1
    rows = [["text", "label", "day"], *([f"it is {n}", "ab"[n % 2], "5"] for n in range(40))]
    lines = [first, *(",".join(row[:columns]) for row in rows)]
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="rows.csv: the first line, .* does not name all columns"):
        write_recipe(file, None, None, None, tmp_path / "mine.yaml")


def test_columns_without_a_name_may_hold_numbers_or_nothing(tmp_path):
    """As pandas writes an index, and spreadsheets write empty columns."""
    file = tmp_path / "rows.csv"
    rows = (f"{n},it is {n},{'ab'[n % 2]},{'x' * (n == 3)}\n" for n in range(40))
    file.write_text(",text,label,\n" + "".join(rows), encoding="utf-8")
    look = write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    assert look.columns == {"prompt": "text", "completion": "label"}


@pytest.mark.parametrize("outer", ["", "data"])
def test_several_questions_in_a_row_are_refused_with_their_list(tmp_path, outer):
    pairs = [{"question": f"is {n}?", "answer": f"it is {n}"} for n in range(9)]
    rows = {"items": pairs}
    file = write_jsonl(tmp_path / "rows.jsonl", [{outer: rows, "n": 1} if outer else rows])
    path = "data.items" if outer else "items"
    with pytest.raises(UserError, match=f"leave out {path} but for its first entry: write each"):
        write_recipe(file, None, None, None, tmp_path / "mine.yaml")


def test_an_object_of_questions_and_answers_is_refused_in_one_line(tmp_path):
    file = write_jsonl(tmp_path / "rows.json", [{f"is {n} so?": f"it is {n}" for n in range(30)}])
    with pytest.raises(UserError, match="one row with 30 columns: if these are questions") as error:
        write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    assert len(str(error.value)) < 400


def test_a_conversation_of_other_keys_is_told_from_columns(tmp_path):
    turns = [{"speaker": name, "text": f"I am {name}"} for name in "AB"]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"talk": turns}] * 9)
    with pytest.raises(UserError, match="if talk is a conversation, each of its entries needs a r"):
        write_recipe(file, None, None, None, tmp_path / "mine.yaml")


def test_the_keys_of_a_message_without_content_are_named(tmp_path):
    turns = [{"role": role, "text": "I am"} for role in ("user", "assistant")]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    with pytest.raises(UserError, match="content is not text: None; its keys are role, text"):
        load_splits(load_recipe(tmp_path / "mine.yaml").data, 0)


def test_columns_that_never_change_are_named(tmp_path):
    rows = [{"question": "what now?", "answer": "go on"}] * 20
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="question, answer: the same in all rows"):
        write_recipe(file, None, None, None, tmp_path / "mine.yaml")


def test_questions_as_names_of_columns_can_be_given(tmp_path):
    file, names = tmp_path / "rows.csv", ("What do you ask?", "What is the answer?")
    file.write_text(",".join(names) + "\n" + "".join(f"{n} a,b {n}\n" for n in range(20)))
    columns = dict(zip(("prompt", "completion"), names, strict=True))
    assert write_recipe(file, None, None, None, tmp_path / "m.yaml", columns).columns == columns


def test_the_chosen_conversation_of_a_pair_can_be_given(tmp_path):
    rows = [{"prompt": f"say {n}", "chosen": chat(n), "rejected": chat(n)} for n in range(20)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"completion": "chosen"}
    look = write_recipe(file, None, None, None, tmp_path / "mine.yaml", given)
    assert look.columns == {"messages": "chosen"}


def test_a_table_with_test_rows_gives_both_splits(tmp_path):
    for name in ("train", "test"):
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows(
                [("text", "label"), *((f"{name} {n}", f"l{n % 3}") for n in range(30))]
            )
    target = tmp_path / "recipes" / "labels.yaml"
    write_recipe(tmp_path / "train.csv", tmp_path / "test.csv", "org/base", "classify", target)
    recipe = load_recipe(target, [])
    assert recipe.model.base == "org/base"
    assert [len(part) for part in load_splits(recipe.data, 0)[::2]] == [28, 30]


@pytest.mark.parametrize(("kind", "effort"), [("cuda", "best"), ("cpu", "balanced")])
def test_a_gpu_makes_effort_best(tmp_path, monkeypatch, kind, effort):
    monkeypatch.setattr(starter, "device", lambda: torch.device(kind))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    write_recipe(tmp_path / "rows.jsonl", None, None, None, tmp_path / "mine.yaml")
    calibration = load_recipe(tmp_path / "mine.yaml").quantize.calibration
    assert calibration == Quantize(effort=effort).calibration


def test_columns_can_be_given_and_odd_names_make_a_valid_recipe(tmp_path):
    rows = [{"translation": {"en": f"house {n}", "de": f"Haus {n}"}} for n in range(20)]
    file = tmp_path / "2024-05-01 pairs: new.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "my base").mkdir()
    target = tmp_path / "2024-05-01.yaml"
    columns = {"prompt": "translation.en", "completion": "translation.de"}
    with pytest.raises(UserError, match=r"columns with text are translation.en, translation.de"):
        write_recipe(file, None, None, None, target)
    with pytest.raises(UserError, match=r"--prompt: .* no column 'en'.*one of translation.en"):
        write_recipe(file, None, None, None, target, columns | {"prompt": "en"})
    write_recipe(file, None, str(tmp_path / "my base"), None, target, columns)
    recipe = load_recipe(target, [])
    assert recipe.evaluate.metrics == ["chrf", "bleu"]
    assert (recipe.name, recipe.model.base) == ("2024-05-01", str(tmp_path / "my base"))
    assert load_splits(recipe.data, 0).train[0].messages[1]["content"] == "house 0"


@pytest.mark.parametrize("completion", ["score", "turns[1].value", "more.grade"])
def test_a_column_that_is_given_may_hold_anything_that_becomes_text(tmp_path, completion):
    rows = [
        {"q": f"{n}?", "score": n, "turns": [{"value": "a"}, {"value": "b"}], "more": {"grade": 1}}
        for n in range(20)
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    columns = {"prompt": "q", "completion": completion}
    look = write_recipe(file, None, None, None, tmp_path / "mine.yaml", columns)
    assert look.columns == columns
    assert len(look.unread) == 2
    assert load_splits(load_recipe(tmp_path / "mine.yaml").data, 0).train


def test_preference_pairs_are_refused_unless_an_answer_is_chosen(tmp_path):
    file, target = tmp_path / "rows.jsonl", tmp_path / "mine.yaml"
    rows = [{"prompt": f"{n}?", "chosen": f"{n}", "rejected": "no"} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match="preference pairs"):
        write_recipe(file, None, None, None, target)
    write_recipe(file, None, None, None, target, {"prompt": "prompt", "completion": "chosen"})
    assert load_splits(load_recipe(target).data, 0).train


def test_of_rows_that_are_all_broken_the_first_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{'a': 1}\n{'a': 2}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.jsonl:1: broken JSON at column 2"):
        write_recipe(file, None, None, None, tmp_path / "mine.yaml")


def test_a_recipe_that_cannot_be_written_is_a_message(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.jsonl/mine.yaml: cannot be written: .*--to FILE"):
        write_recipe(file, None, None, None, file / "mine.yaml")


def test_a_wrong_command_line_is_refused_before_anything_is_asked(capsys):
    from finequant.recipes.run import main

    with pytest.raises(SystemExit) as exit_:
        main(["init", "rows.jsonl"])
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert "rows.jsonl: expected key.sub=value, such as train.epochs=2; name rows by" in said.err
    assert "File with your rows" not in said.out + said.err


@pytest.mark.parametrize("rows", ["rows", "./rows", "no/such/rows", "org/rows.jsonl"])
def test_rows_that_are_neither_here_nor_on_the_hub_are_refused(tmp_path, rows):
    target = tmp_path / "mine.yaml"
    with pytest.raises(UserError, match=r"--data: .*rows.* does not exist; expected a file, .*ORG"):
        write_recipe(Path(rows), None, None, None, target)
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match="--subset main: only a dataset on the Hub has subsets"):
        write_recipe(file, None, None, None, target, subset="main")
    assert not target.exists()


@pytest.mark.parametrize("base", ["./models/llama", "~/llama", "/llama.gguf"])
def test_a_missing_base_is_refused_before_anything_is_written(tmp_path, base):
    file, target = tmp_path / "rows.jsonl", tmp_path / "mine.yaml"
    file.write_text('{"prompt": "1", "completion": "2"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=f"--base: {base} does not exist; expected a folder"):
        write_recipe(file, None, base, None, target)
    assert not target.exists()
    write_recipe(file, None, "package:mine/llama.gguf", None, target)


def test_ambiguous_columns_are_asked_for_and_nothing_is_overwritten(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": "1", "b": "2"}\n', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"which column is the question.*text are a, b: add --prompt"
    ):
        write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        write_recipe(file, None, None, None, tmp_path / "mine.yaml")


def test_a_recipe_that_was_made_in_the_meantime_is_not_overwritten(tmp_path, monkeypatch):
    """To look at the rows may take a minute."""
    rows, target, text_of = tmp_path / "rows.jsonl", tmp_path / "mine.yaml", starter.recipe_text
    rows.write_text('{"prompt": "1", "completion": "2"}\n' * 9, encoding="utf-8")

    def recipe_text(*arguments: object) -> str:
        target.write_text("mine", encoding="utf-8")
        return text_of(*arguments)

    monkeypatch.setattr(starter, "recipe_text", recipe_text)
    with pytest.raises(UserError, match=r"mine.yaml: exists already: edit it"):
        write_recipe(rows, None, None, None, target)
    assert target.read_text(encoding="utf-8") == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "mine.yaml"}


@pytest.mark.parametrize("name", ["choices", "answer_options"])
@pytest.mark.parametrize("gold", [1, "B", -1, 2])
def test_the_first_of_several_choices_is_not_taken_for_the_answer(tmp_path, name, gold):
    """A column numbers the right choice only if it does so in every row."""
    file = tmp_path / "rows.jsonl"
    rows = [{"query": f"what is {n}?", name: ["no", f"{n}"], "gold": 1} for n in range(40)]
    rows[20]["gold"] = gold
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if gold in (1, "B"):
        with pytest.raises(
            UserError, match=rf"add --prompt query --prompt {name}:lines; .* --prompt query$"
        ):
            write_recipe(file, None, None, None, tmp_path / "mine.yaml")
        asked = {"prompt": joined(["query", f"{name}:lines"])}
        look = write_recipe(file, None, None, None, tmp_path / "mine.yaml", asked)
        assert look.columns == asked | {"completion": f"{name}[gold]"}
        assert look.unread == []
    else:
        with pytest.raises(UserError, match=rf"which column is .*--completion '{name}\[NUMBER\]'"):
            write_recipe(file, None, None, None, tmp_path / "mine.yaml")


def test_what_the_columns_leave_out_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    more = [{"output": "a", "score": "1"}, {"output": "b", "score": "2"}]
    rows = [{"id": n, "question": f"{n}?", "more": more[: n + 1]} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    look = write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    assert look.columns["completion"] == "more[0].output"
    assert look.unread == ["id", "more[0].score", "more[1] and so on"]


@pytest.mark.parametrize(
    "names", [("dialogue", "summary", "topic"), ("query", "response", "original_question")]
)
def test_what_only_describes_a_row_is_left_out_with_a_note(tmp_path, names):
    """As in DialogSum and MetaMathQA."""
    file = tmp_path / "rows.jsonl"
    lines = (json.dumps(row) + "\n" for row in unlike(*names))
    file.write_text("".join(lines), encoding="utf-8")
    look = write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    assert look.columns == {"prompt": names[0], "completion": names[1]}
    assert look.unread == [names[2]]


def test_a_column_that_never_changes_is_neither_question_nor_answer(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"question-split": "dev", "lang": "en", "text": f"hi {n}", "reply": f"{n}"}
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    look = write_recipe(file, None, None, None, tmp_path / "mine.yaml")
    assert look.columns == {"prompt": "text", "completion": "reply"}


def test_held_out_rows_may_have_other_columns(tmp_path):
    rows, test = tmp_path / "rows.jsonl", tmp_path / "test.jsonl"
    rows.write_text(json.dumps({"dialogue": "A: yes", "summary": "yes"}) + "\n")
    test.write_text(json.dumps({"dialogue": "A: no", "summary1": "no", "summary2": "nay"}) + "\n")
    write_recipe(rows, test, None, None, tmp_path / "mine.yaml")
    recipe = load_recipe(tmp_path / "mine.yaml", [])
    assert recipe.data.test[0].columns == {"prompt": "dialogue", "completion": "summary1"}


def test_parallel_files_of_two_languages_make_a_recipe(tmp_path):
    for name, text in (("train.en", "a dog"), ("train.de", "ein Hund")):
        (tmp_path / name).write_text("".join(f"{text} {n}\n" for n in range(20)))
    with pytest.raises(UserError, match=r"line by line, name train\.\{de,en\}$"):
        write_recipe(tmp_path / "train.de", None, None, None, tmp_path / "mine.yaml")
    pair = tmp_path / "train.{de,en}"
    columns = {"prompt": "de", "completion": "en"}
    write_recipe(pair, pair, None, None, tmp_path / "mine.yaml", columns)
    recipe = load_recipe(tmp_path / "mine.yaml", [])
    assert recipe.data.test[0].columns == columns
    assert recipe.evaluate.metrics == ["chrf", "bleu"]


def test_one_text_is_one_row_of_which_nothing_can_be_held_out(tmp_path):
    book, held_out, target = tmp_path / "book.txt", tmp_path / "other.txt", tmp_path / "mine.yaml"
    book.write_text("One.\n\nTwo.", encoding="utf-8")
    held_out.write_text("Three.", encoding="utf-8")
    with pytest.raises(UserError, match=r"book.txt: this is one text.* --test FILE, or several"):
        write_recipe(book, None, None, None, target)
    with pytest.raises(UserError, match="--task classify: the rows of .*book.txt are texts"):
        write_recipe(book, held_out, None, "classify", target)
    write_recipe(book, held_out, None, None, target)
    recipe = load_recipe(target)
    splits = load_splits(recipe.data, 0)
    assert [len(part) for part in splits[:3]] == [1, 0, 1]
    check_rows(recipe, splits)
    assert recipe.evaluate.metrics == []
    assert recipe.data.long_rows == "split"


def test_a_pattern_of_texts_is_read_and_a_folder_of_them_names_it(tmp_path):
    texts, target = tmp_path / "texts", tmp_path / "mine.yaml"
    texts.mkdir()
    for name in "abc":
        (texts / f"{name}.txt").write_text(name, encoding="utf-8")
    with pytest.raises(UserError, match=r"for its texts, name the pattern '.*/texts/\*.txt'$"):
        write_recipe(texts, None, None, None, target)
    write_recipe(texts / "*.txt", None, None, None, target)
    recipe = load_recipe(target)
    assert [len(part) for part in load_splits(recipe.data, 0)[:3]] == [2, 0, 1]
    for file in texts.iterdir():
        file.rename(file.with_suffix(".md"))
    with pytest.raises(
        UserError, match=r"let their names end in .txt, and name '.*/texts/\*.txt'$"
    ):
        write_recipe(texts, None, None, None, tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("data", "recipe"),
    [
        ("rows/train.csv", "train.yaml"),
        ("rows/train.{en,de}.gz", "train.yaml"),
        ("rows/train-*.csv", "train.yaml"),
        ("rows/*.txt", "rows.yaml"),
        ("my rows", "my rows.yaml"),
    ],
)
def test_a_recipe_is_named_after_its_rows(data, recipe):
    assert str(starter.default_target(Path(data))) == recipe


def test_a_recipe_whose_rows_have_a_long_name_is_valid(tmp_path, tiny_base):
    rows, target = tmp_path / f"{'a' * 200}.jsonl", tmp_path / f"{'a' * 200}.yaml"
    write_jsonl(rows, make_rows(range(8)))
    write_recipe(rows, None, str(tiny_base), None, target)
    assert load_recipe(target, []).name == "a" * 100


def write_splits(folder: Path, kind: str, names: Sequence[str]) -> Path:
    """Writes thirty rows for each split, and returns what `--data` names."""
    rows = {
        name: [{"text": f"{name} {n}", "label": f"l{n % 3}"} for n in range(30)] for name in names
    }
    if kind == "saved":
        from datasets import Dataset, DatasetDict

        splits = {name: Dataset.from_list(listed) for name, listed in rows.items()}
        DatasetDict(splits).save_to_disk(str(folder))
        return folder
    folder.mkdir()
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        return folder / "rows.json"
    for name, listed in rows.items():
        write_jsonl(folder / f"{name}.jsonl", listed)
    return folder


@pytest.mark.parametrize("kind", ["files", "saved", "json"])
def test_the_splits_of_a_folder_are_used(tmp_path, kind):
    data = write_splits(tmp_path / "rows", kind, ["train", "validation", "test"])
    write_recipe(data, None, None, None, tmp_path / "mine.yaml")
    splits = load_splits(load_recipe(tmp_path / "mine.yaml").data, 0)
    assert [len(part) for part in splits[:3]] == [30, 30, 30]
    assert splits.test[0].messages[1]["content"] == "test 0"
    assert "(test): 30 rows, format" in "".join(splits.notes)


@pytest.mark.parametrize("kind", ["files", "saved"])
def test_a_folder_with_test_rows_only_is_trained_on_only_if_asked_for(tmp_path, kind):
    data, target = write_splits(tmp_path / "rows", kind, ["test"]), tmp_path / "mine.yaml"
    with pytest.raises(UserError, match="only (files of )?test.*--split of `finequant init`"):
        write_recipe(data, None, None, None, target)
    write_recipe(data, None, None, None, target, split="test")
    splits = load_splits(load_recipe(target).data, 0)
    assert [len(part) for part in splits[::2]] == [25, 3]


def test_the_test_rows_of_a_folder_with_several_splits_are_its_test_split(tmp_path):
    train = write_splits(tmp_path / "rows", "files", ["train"]) / "train.jsonl"
    test = write_splits(tmp_path / "more", "files", ["train", "test"])
    write_recipe(train, test, None, None, tmp_path / "mine.yaml")
    assert load_recipe(tmp_path / "mine.yaml").data.test[0].split == "test"


@pytest.mark.parametrize(
    ("column", "system"),
    [
        ("meta.topic_name", "Name the topic name of the text."),
        ("kinds[0].topic", None),
        ("label_text", "Name the label of the text."),
    ],
)
def test_the_system_message_names_the_label_by_a_word(tmp_path, column, system):
    rows = [
        {
            "text": f"{n}",
            "meta": {"topic_name": (topic := "ab"[n % 2])},
            "kinds": [{"topic": topic}],
            "label_text": topic,
        }
        for n in range(40)
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "text", "completion": column}
    write_recipe(file, None, None, None, tmp_path / "mine.yaml", columns)
    assert load_recipe(tmp_path / "mine.yaml").data.system == system
