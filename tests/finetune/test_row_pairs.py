"""Pairs of rows: a good one, which is read, and its twin with a single fault, which is named."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from finequant.finetune.data.files import BadRowError
from finequant.finetune.data.rows import RowReader
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
        "answers.text[1]: no entry 1 in answers.text: 1 entries",
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
