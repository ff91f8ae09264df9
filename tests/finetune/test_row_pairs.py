"""Pairs of rows: a good one, which is read, and its twin with a single fault, which is named."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from finequant.finetune.data.columns import joined
from finequant.finetune.data.files import BadRowError
from finequant.finetune.data.row import Row
from finequant.finetune.data.rows import SYSTEMS, RowReader
from finequant.recipes.schema import Data, Source

TOOL = {"name": "look_up", "parameters": {"type": "object"}}


def chat(*turns: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Who?"}, *turns], **columns}


def answer(content: Any = "Ada", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def call(arguments: Any, name: Any = "look_up") -> dict[str, Any]:
    return answer(None, tool_calls=[{"function": {"name": name, "arguments": arguments}}])


NESTED = {"prompt": "q", "completion": "answers.text[1]"}
FILLED = {"prompt": "{q}: {n}", "completion": "a"}

PAIRS: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, Any], str]] = {
    "arguments as JSON text": (
        {},
        chat(call('{"name": "Ada"}')),
        chat(call('{"name": Ada}')),
        "arguments of the call look_up: broken JSON at column 10",
    ),
    "arguments as values": (
        {},
        chat(call({"name": "Ada", "born": None})),
        chat(call(["Ada"])),
        "arguments of the call look_up: expected an object",
    ),
    "no arguments": ({}, chat(call("")), chat(call("", name=None)), "a call without a name"),
    "tools as JSON text": (
        {},
        chat(answer(), tools='[{"name": "look_up"}]'),
        chat(answer(), tools='[{"title": "look_up"}]'),
        "tools: a function without a name",
    ),
    "tools, once bare": (
        {},
        chat(answer(), tools=TOOL),
        chat(answer(), tools="look_up"),
        "tools: broken JSON",
    ),
    "keys that a table fills with nothing": (
        {},
        chat(answer(tool_calls=None, name=None, weight=None)),
        chat(answer(None, tool_calls=None)),
        "an assistant message whose content is not text: None",
    ),
    "a result that is not text": (
        {},
        chat(call({}), {"role": "tool", "content": {"born": 1815}}, answer("1815")),
        chat(call({}), {"role": "user", "content": {"born": 1815}}, answer("1815")),
        "a user message whose content is not text",
    ),
    "a result of nothing": (
        {},
        chat(call({}), {"role": "tool", "content": ""}, answer("Nobody.")),
        chat(call({}), {"role": "tool", "content": "Ada"}, answer(" ")),
        "empty assistant message",
    ),
    "ShareGPT's call": (
        {},
        {
            "conversations": [
                {"from": "human", "value": "Who?"},
                {"from": "function_call", "value": '{"name": "look_up", "arguments": {}}'},
                {"from": "observation", "value": "Ada"},
                {"from": "gpt", "value": "Ada."},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "Who?"},
                {"from": "function_call", "value": "look_up()"},
            ]
        },
        "function_call: broken JSON",
    ),
    "content in parts": (
        {},
        chat(answer([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}])),
        chat(answer([{"type": "text", "text": "A"}, {"type": "image_url", "image_url": "x"}])),
        "an assistant message with a part 'image_url': only text is read",
    ),
    "a weight": (
        {},
        chat(answer("No", weight=0), {"role": "user", "content": "?"}, answer(weight=1)),
        chat(answer(weight=0.5)),
        "weight of a message is 0.5, expected 0 or 1",
    ),
    "a conversation as prompt": (
        {},
        {"prompt": [{"from": "Human", "value": "Who?"}], "completion": "Ada"},
        {"prompt": [{"role": "Judge", "content": "Who?"}], "completion": "Ada"},
        "prompt is a list of messages, expected text",
    ),
    "a conversation that the completion is about": (
        {"prompt": "{talk}", "completion": "gist"},
        {"talk": [{"role": "user", "content": "Who?"}, answer()], "gist": "Ada"},
        {"talk": [{"role": "user", "content": None}, answer()], "gist": "Ada"},
        "talk: a user message whose content is not text",
    ),
    "a conversation that the completion goes on with": (
        {"prompt": "talk", "completion": "gist"},
        {"talk": [{"role": "user", "content": "Who?"}], "gist": "Ada"},
        {"talk": [{"role": "user", "content": "Who?"}, answer()], "gist": "Ada"},
        "talk ends with an answer, and the completion is another",
    ),
    "calls as the completion": (
        {},
        {"prompt": "Who?", "completion": '[{"name": "f", "arguments": {}}]', "tools": [TOOL]},
        {"prompt": "Who?", "completion": '[{"name": "f", "arguments": 1}]', "tools": [TOOL]},
        "arguments of the call f: expected an object",
    ),
    "a letter as the number of a choice": (
        {"prompt": "q", "completion": "choices[gold]"},
        {"q": "Who?", "choices": ["Her", "Ada"], "gold": "B"},
        {"q": "Who?", "choices": ["Her", "Ada"], "gold": "C"},
        "no entry 2 in choices: a list of 2",
    ),
    "choices with letters": (
        {"prompt": "{q}\n\n{choices:letters}", "completion": "choices[gold]"},
        {"q": "Who?", "choices": ["Her", "Ada"], "gold": 1},
        {"q": "Who?", "choices": {"A": "Her"}, "gold": 1},
        "choices:letters is {'A': 'Her'}, expected a list of texts",
    ),
    "a list in a cell of JSON, in lines": (
        {"prompt": "{facts.known:lines}\n\n{q}", "completion": "a"},
        {"q": "Who?", "facts": '{"known": ["Born 1815", 1843]}', "a": "Ada"},
        {"q": "Who?", "facts": '{"known": [["Born", "1815"]]}', "a": "Ada"},
        "facts.known:lines is [['Born', '1815']], expected a list of texts",
    ),
    "more choices than letters": (
        {"prompt": "{choices:letters}", "completion": "a"},
        {"choices": ["b"] * 26, "a": "Ada"},
        {"choices": ["b"] * 27, "a": "Ada"},
        "choices:letters has 27 texts, expected at most 26",
    ),
    "earlier turns": (
        {},
        {"instruction": "And?", "output": "Ada", "history": [["Who?", "Her"]]},
        {"instruction": "And?", "output": "Ada", "history": [["Who?", "Her", "!"]]},
        "history: expected pairs of question and answer",
    ),
    "an empty input": (
        {},
        {"instruction": "Who?", "input": "", "output": "Ada"},
        {"instruction": None, "input": "", "output": "Ada"},
        "instruction is null",
    ),
    "an entry of a list": (
        NESTED,
        {"q": "Who?", "answers": {"text": ["Her", "Ada"]}},
        {"q": "Who?", "answers": {"text": ["Her"]}},
        "answers.text[1]: no entry 1 in answers.text: a list of 1",
    ),
    "a field in a cell of JSON": (
        NESTED,
        {"q": "Who?", "answers": '{"text": ["Her", "Ada"]}'},
        {"q": "Who?", "answers": '{"texts": []}'},
        "no text in answers: only texts",
    ),
    "values in a template": (
        FILLED,
        {"q": "Who", "n": [1, 2], "a": "Ada"},
        {"q": "Who", "n": date(1815, 12, 10), "a": "Ada"},
        "n is datetime.date(1815, 12, 10), expected text",
    ),
    "a missing value": (
        FILLED,
        {"q": "Who", "n": 0, "a": "Ada"},
        {"q": "Who", "n": float("nan"), "a": "Ada"},
        "n is nan, expected text",
    ),
    "names of roles": (
        {},
        {"messages": [{"role": "developer", "content": "Be brief."}, *chat(answer())["messages"]]},
        chat({"role": "narrator", "content": "She waits."}, answer()),
        "role 'narrator': expected system, user, assistant or tool",
    ),
    "who speaks last": (
        {},
        chat(answer()),
        chat(answer(), {"role": "user", "content": "Thanks"}),
        "the turns are user, assistant, user; expected the last to be assistant",
    ),
    "characters": (
        {},
        {"text": "naïve 🌊 \u200b"},
        {"text": "naïve \0"},
        "character 7 is U+0000",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_good_row_is_read_and_the_faulty_one_is_named(name):
    columns, right, wrong, message = PAIRS[name]
    reader = RowReader(Source(source="/rows.jsonl", columns=columns), Data(train="/rows.jsonl"))
    row = reader.read("rows.jsonl:1", right)
    assert row.text or row.targets
    assert type(row).from_json(row.to_json()) == row
    with pytest.raises(BadRowError) as error:
        reader.read("rows.jsonl:2", wrong)
    assert str(error.value).startswith("rows.jsonl:2: ")
    assert message in str(error.value)


def read(row: dict[str, Any], **columns: str) -> tuple[Row | None, RowReader]:
    reader = RowReader(Source(source="/rows.jsonl", columns=columns), Data(train="/rows.jsonl"))
    return reader.read("rows.jsonl:1", row), reader


def test_calls_are_calls_only_with_tools():
    """Any other JSON is learned as text, even if it looks like a call."""
    calls = '[{"name": "f", "arguments": {"a": 1}}]'
    for more, is_call in (({"tools": [TOOL]}, True), ({"tools": ""}, False), ({}, False)):
        row, _ = read({"prompt": "Who?", "completion": calls, **more})
        assert bool(row.messages[1].get("tool_calls")) == is_call
        assert (row.messages[1]["content"] == calls) != is_call
    row, _ = read({"prompt": "Who?", "completion": '["f"]', "tools": [TOOL]})
    assert row.messages[1]["content"] == '["f"]'


def test_columns_are_joined_into_a_template():
    for columns, expected in (
        (["q"], "q"),
        (["lines"], "lines"),
        (["Q: {q} {n}"], "Q: {q} {n}"),
        (["choices:lines"], "{choices:lines}"),
        (["q", "choices:letters"], "{q}\n\n{choices:letters}"),
    ):
        assert joined(columns) == expected


def test_a_conversation_in_a_template_is_its_transcript():
    talk = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada"}]
    for value in (talk, json.dumps(talk)):
        row, _ = read({"talk": value, "gist": "her"}, prompt="Sum up:\n{talk}", completion="gist")
        assert row.messages[0]["content"] == "Sum up:\nuser: Who?\nassistant: Ada"


def test_a_list_in_a_template_is_written_as_its_placeholder_says():
    row = {"q": "Who?", "facts": {"known": ["Born 1815", 1843]}, "choices": ["Her", "Ada"]}
    for template, text in (
        ("{choices:letters}", "A. Her\nB. Ada"),
        ("{q}\n\n{facts.known:lines}", "Who?\n\nBorn 1815\n1843"),
        ("{choices:lines} or {choices}", 'Her\nAda or ["Her", "Ada"]'),
    ):
        read_row, reader = read(row, prompt=template, completion="choices[1]")
        assert [turn["content"] for turn in read_row.messages] == [text, "Ada"]
        assert "choices" not in reader.findings.unread


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_rows_own_system_message_is_read_in_every_layout(column):
    pair = {"prompt": "Who?", "completion": "Ada"}
    for row in (pair, chat(answer()), {"q": "Who?", "a": "Ada"}):
        columns = {"prompt": "q", "completion": "a"} if "q" in row else {}
        read_row, reader = read({**row, column: "Be brief."}, **columns)
        assert read_row.messages[0] == {"role": "system", "content": "Be brief."}
        assert not reader.findings.unread
        assert read({**row, column: None}, **columns)[0].messages[0]["role"] == "user"
        read_row, _ = read({**dict.fromkeys(SYSTEMS), **row, column: "Be brief."}, **columns)
        assert read_row.messages[0]["content"] == "Be brief."
    row, _ = read({"a": "Who?", column: "Be brief."}, prompt="a", completion=column)
    assert [turn["role"] for turn in row.messages] == ["user", "assistant"]


def test_words_for_a_missing_value_are_counted():
    row = {"prompt": "Who?", "completion": "Nan"}
    for text, count in (("NaN", 1), ("n/a ", 1), ("None", 1), ("Nana", 0), ("no", 0)):
        _, reader = read({**row, "completion": text})
        assert reader.findings.counts.total() == count


def test_tools_that_the_system_message_holds_are_not_repeated():
    """Hermes' rows have them in both; a message that only mentions them is no definition."""
    turns = chat(answer())["messages"]
    for system, count in ((json.dumps([TOOL]), 0), ("Use look_up.", 1), ("", 1)):
        first = {"role": "system", "content": f"Functions: {system}"}
        tools = [{"type": "function", "function": TOOL}]
        row, _ = read({"messages": [first, *turns], "tools": tools})
        assert len(row.tools) == count
