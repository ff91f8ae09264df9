"""Function calls: every form of them, rendered by templates of three published formats.

The templates are written after those that the models' cards publish; one comes with finequant.
Expected texts are written by hand, in pieces that are targets or not, and compared token by token.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from finequant.finetune.data.dataset import to_dataset
from finequant.finetune.data.rendering import check_template
from finequant.finetune.data.row import Row
from finequant.finetune.data.splits import load_splits
from finequant.finetune.data.tokens import IGNORED, encode, encode_prompt
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Data

LLAMA_3_2 = """\
{{- bos_token }}
{%- set opened = '<|start_header_id|>' %}{% set closed = '<|end_header_id|>\\n\\n' %}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- opened + 'system' + closed }}
{%- if tools %}{{ 'Environment: ipython\\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' + system }}
{{- '<|eot_id|>' }}
{%- if tools %}
  {%- set first = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
  {{- opened + 'user' + closed + 'Given the following functions, respond with a call.\\n\\n' }}
  {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
  {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.tool_calls %}
    {%- if message.tool_calls | length != 1 %}
      {{- raise_exception('This model only supports single tool-calls at once!') }}
    {%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- opened + 'assistant' + closed + '{"name": "' + call.name + '", "parameters": ' }}
    {{- call.arguments | tojson + '}<|eot_id|>' }}
  {%- elif message.role == 'tool' %}
    {{- opened + 'ipython' + closed + message.content | tojson + '<|eot_id|>' }}
  {%- else %}
    {{- opened + message.role + closed + message.content | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ opened + 'assistant' + closed }}{% endif %}"""

HERMES = """\
{%- if tools %}
  {{- '<|im_start|>system\\nYou may call functions: <tools> ' }}
  {%- for tool in tools %}{{ tool.function | tojson }}{{ '' if loop.last else '\\n' }}{% endfor %}
  {{- ' </tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' and message.tool_calls %}
    {{- '<|im_start|>assistant' }}
    {%- for call in message.tool_calls %}
      {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.previtem and loop.previtem.role != 'tool' %}{{ '<|im_start|>tool\\n' }}{% endif %}
    {{- '<tool_response>\\n' + message.content }}
    {{- '\\n</tool_response>' if loop.last else '\\n</tool_response>\\n' }}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN = """\
{%- set system = messages[0].content if messages[0].role == 'system' else 'You are Qwen.' %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
  {{- '\\n\\n# Tools\\n\\n<tools>' }}
  {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
  {{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
  {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls)
         or (message.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
  {%- elif message.role == 'assistant' %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content %}{{ '\\n' + message.content }}{% endif %}
    {%- for call in message.tool_calls %}
      {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}
      {{- '<|im_start|>user' }}
    {%- endif %}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

SHIPPED = (Path(__file__).parents[2] / "recipes/data/chatml_tools.jinja").read_text("utf-8")

LAMP = {"name": "lamp", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": LAMP}
CALL = {"name": "lamp", "arguments": {"room": "blue"}}


def call(*calls: dict[str, Any], content: str = "") -> dict[str, Any]:
    wrapped = [{"type": "function", "function": function} for function in calls]
    return {"role": "assistant", "content": content, "tool_calls": wrapped}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ONE = Row(
    "rows.jsonl:1",
    (
        turn("system", "Be brief."),
        turn("user", "light"),
        call(CALL),
        turn("tool", '{"ok": 1}'),
        turn("assistant", "lit"),
        turn("user", "thanks"),
        turn("assistant", "bye"),
    ),
    tools=(TOOL,),
)
TWO = Row(
    "rows.jsonl:2",
    (
        turn("user", "light both"),
        call(CALL, {"name": "lamp", "arguments": {"room": "red"}}),
        turn("tool", "ok"),
        turn("tool", "no"),
        turn("assistant", "one is lit"),
    ),
    tools=(TOOL,),
)
BLUE = '{"name": "lamp", "arguments": {"room": "blue"}}'
INDENTED = json.dumps(TOOL, indent=4)
# (template, row): the whole text, in pieces; those in a list are targets.
EXPECTED: dict[str, tuple[str, Row, list[str | list[str]]]] = {
    "Llama 3.2": (
        LLAMA_3_2,
        ONE,
        [
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, respond "
            f"with a call.\n\n{INDENTED}\n\nlight<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ['{"name": "lamp", "parameters": {"room": "blue"}}<|eot_id|>'],
            '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"ok\\": 1}"<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ["lit<|eot_id|>"],
            "<|start_header_id|>user<|end_header_id|>\n\nthanks<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ["bye<|eot_id|>"],
        ],
    ),
    "Hermes": (
        HERMES,
        ONE,
        [
            f"<|im_start|>system\nYou may call functions: <tools> {json.dumps(LAMP)} </tools>"
            "<|im_end|>\n"
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nlight<|im_end|>\n"
            "<|im_start|>assistant\n",
            [f"<tool_call>\n{BLUE}\n</tool_call><|im_end|>"],
            '\n<|im_start|>tool\n<tool_response>\n{"ok": 1}\n</tool_response>\n<|im_end|>\n'
            "<|im_start|>assistant\n",
            ["lit<|im_end|>"],
            "\n<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n",
            ["bye<|im_end|>"],
            "\n",
        ],
    ),
    "Qwen": (
        QWEN,
        ONE,
        [
            f"<|im_start|>system\nBe brief.\n\n# Tools\n\n<tools>\n{json.dumps(TOOL)}\n</tools>"
            "<|im_end|>\n<|im_start|>user\nlight<|im_end|>\n<|im_start|>assistant\n",
            [f"<tool_call>\n{BLUE}\n</tool_call><|im_end|>"],
            '\n<|im_start|>user\n<tool_response>\n{"ok": 1}\n</tool_response><|im_end|>\n'
            "<|im_start|>assistant\n",
            ["lit<|im_end|>"],
            "\n<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n",
            ["bye<|im_end|>"],
            "\n",
        ],
    ),
    "Hermes, two calls": (
        HERMES,
        TWO,
        [
            f"<|im_start|>system\nYou may call functions: <tools> {json.dumps(LAMP)} </tools>"
            "<|im_end|>\n"
            "<|im_start|>user\nlight both<|im_end|>\n<|im_start|>assistant\n",
            [
                f"<tool_call>\n{BLUE}\n</tool_call>\n<tool_call>\n"
                '{"name": "lamp", "arguments": {"room": "red"}}\n</tool_call><|im_end|>'
            ],
            "\n<|im_start|>tool\n<tool_response>\nok\n</tool_response>\n<tool_response>\nno\n"
            "</tool_response>\n<|im_end|>\n<|im_start|>assistant\n",
            ["one is lit<|im_end|>"],
            "\n",
        ],
    ),
    "shipped, two calls": (
        SHIPPED,
        TWO,
        [
            f"<|im_start|>system\nYou may call these functions:\n<tools>\n{json.dumps(LAMP)}\n"
            '</tools>\nWrite a call as <tool_call>{"name": ..., "arguments": ...}</tool_call>'
            "<|im_end|>\n<|im_start|>user\nlight both<|im_end|>\n<|im_start|>assistant\n",
            [
                f"<tool_call>{BLUE}</tool_call>\n<tool_call>"
                '{"name": "lamp", "arguments": {"room": "red"}}</tool_call><|im_end|>'
            ],
            "\n<|im_start|>tool\nok<|im_end|>\n<|im_start|>tool\nno<|im_end|>\n"
            "<|im_start|>assistant\n",
            ["one is lit<|im_end|>"],
            "\n",
        ],
    ),
    "Qwen, two calls": (
        QWEN,
        TWO,
        [
            f"<|im_start|>system\nYou are Qwen.\n\n# Tools\n\n<tools>\n{json.dumps(TOOL)}\n</tools>"
            "<|im_end|>\n<|im_start|>user\nlight both<|im_end|>\n<|im_start|>assistant\n",
            [
                f"<tool_call>\n{BLUE}\n</tool_call>\n<tool_call>\n"
                '{"name": "lamp", "arguments": {"room": "red"}}\n</tool_call><|im_end|>'
            ],
            "\n<|im_start|>user\n<tool_response>\nok\n</tool_response>\n<tool_response>\nno\n"
            "</tool_response><|im_end|>\n<|im_start|>assistant\n",
            ["one is lit<|im_end|>"],
            "\n",
        ],
    ),
}


@pytest.fixture(scope="module")
def speaking(tokenizer):
    """Makes the tiny tokenizer with Llama 3's special tokens, and a template."""
    names = ["start_header_id", "end_header_id", "eot_id"]

    def with_template(template: str):
        changed = copy.deepcopy(tokenizer)
        if template == LLAMA_3_2:
            changed.add_special_tokens(
                {
                    "bos_token": "<|begin_of_text|>",
                    "eos_token": "<|eot_id|>",
                    "extra_special_tokens": [f"<|{name}|>" for name in names],
                }
            )
        changed.chat_template = template
        return changed

    return with_template


def data(**changes: Any) -> Data:
    return Data(train="rows.jsonl", **{"max_length": 2048, **changes})


@pytest.mark.parametrize("name", EXPECTED)
def test_calls_and_answers_are_targets_and_results_and_definitions_are_not(speaking, name):
    template, row, pieces = EXPECTED[name]
    tokenizer = speaking(template)
    ids, labels = [], []
    for piece in pieces:
        text = piece if isinstance(piece, str) else piece[0]
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += [IGNORED] * len(part) if isinstance(piece, str) else part
    encoded = encode(row, tokenizer, data())
    assert tokenizer.decode(encoded.input_ids) == tokenizer.decode(ids)
    assert (encoded.input_ids, encoded.labels) == (ids, labels)
    # Hermes writes a line break after a result only once other turns follow.
    last = max(index for index, piece in enumerate(pieces) if not isinstance(piece, str))
    prompt = "".join(piece if isinstance(piece, str) else piece[0] for piece in pieces[:last])
    asked = "\n<|im_end|>\n<|im_start|>assistant\n"
    if template == HERMES and prompt.endswith(f"</tool_response>{asked}"):
        prompt = prompt.removesuffix(asked) + asked.removeprefix("\n")
    assert tokenizer.decode(encode_prompt(row, tokenizer, data())) == prompt


# Forms of the same conversation

TURNS = [turn("user", "light"), call(CALL), turn("tool", "ok"), turn("assistant", "lit")]
TEXT_CALL = {"name": "lamp", "arguments": '{"room": "blue"}'}
FORMS: dict[str, dict[str, Any]] = {
    "OpenAI": {
        "messages": [
            TURNS[0],
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": TEXT_CALL}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "ok"},
            TURNS[3],
        ],
        "tools": [TOOL],
    },
    "OpenAI before tool_calls": {
        "messages": [
            TURNS[0],
            {"role": "assistant", "content": None, "function_call": TEXT_CALL},
            {"role": "function", "name": "lamp", "content": "ok"},
            TURNS[3],
        ],
        "tools": [LAMP],
    },
    "OpenAI's functions": {"messages": TURNS, "functions": [LAMP]},
    "arguments as values, definitions as text": {"messages": TURNS, "tools": json.dumps([TOOL])},
    "flat calls": {
        "messages": [TURNS[0], {"role": "assistant", "tool_calls": [CALL]}, *TURNS[2:]],
        "tools": [TOOL],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "light"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "ok"},
            {"from": "gpt", "value": "lit"},
        ],
        "tools": json.dumps([LAMP]),
    },
    "parts": {
        "messages": [
            turn("user", [{"type": "text", "text": "light"}]),
            {"role": "assistant", "content": [], "tool_calls": [TOOL | {"function": CALL}]},
            turn("ipython", [{"type": "text", "text": "ok"}]),
            turn("assistant", [{"type": "text", "text": "lit"}]),
        ],
        "tools": [TOOL],
    },
    "calls and definitions as text": {
        "messages": [
            TURNS[0],
            {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
            {"role": "tool", "content": "ok", "tool_calls": ""},
            turn("assistant", "lit") | {"tool_calls": "[]"},
        ],
        "tools": json.dumps(LAMP),
    },
    "each call and definition as text": {
        "messages": [
            TURNS[0],
            {"role": "assistant", "tool_calls": [json.dumps({"function": CALL})]},
            *TURNS[2:],
        ],
        "tools": [json.dumps(TOOL)],
    },
    "a call of OpenAI before tool_calls as text": {
        "messages": [
            TURNS[0],
            {"role": "assistant", "content": None, "function_call": json.dumps(TEXT_CALL)},
            *TURNS[2:],
        ],
        "functions": [LAMP],
    },
    "a table": {  # which gives every turn all keys
        "messages": [
            {"role": None, "content": None, "tool_calls": None, "weight": None, **message}
            for message in TURNS
        ],
        "tools": [TOOL],
        "system": None,
    },
}


def load(folder: Path, *rows: dict[str, Any], **keys: Any):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = str(folder / "rows.jsonl")
    return load_splits(Data(train=source, validation_fraction=0.0, **keys), 0)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_call_is_the_same_conversation(tmp_path, form):
    splits = load(tmp_path, FORMS[form])
    (row,) = splits.train
    assert row.tools == (TOOL,)
    kept = [{k: v for k, v in m.items() if k not in ("tool_call_id", "name")} for m in row.messages]
    for message in kept:
        for made in message.get("tool_calls", []):
            made.pop("id", None)
    assert kept == TURNS
    assert len(splits.notes) == 1


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_table_adds_nothing_to_calls_and_definitions(tmp_path, kind):
    """Arrow gives each call the arguments of all functions, as None. trl removes them as well; a
    null in a JSON file is an argument."""
    from datasets import Dataset
    from trl.trainer.utils import remove_none_values

    def asks(name: str, **arguments: Any) -> dict[str, Any]:
        parameters = {key: {"type": "string", f"of {name}": key} for key in arguments}
        return {
            "messages": [turn("user", name), call({"name": name, "arguments": arguments})],
            "tools": [{"name": name, "parameters": {"properties": parameters}}],
        }

    rows = [asks("lamp", room="blue"), asks("add", a="1", b="2"), asks("stop")]
    table, path = Dataset.from_list(rows), tmp_path / f"rows.{kind}"
    assert table[0]["tools"][0]["parameters"]["properties"]["a"] is None
    assert [remove_none_values(row)["tools"] for row in table][:2] == [r["tools"] for r in rows][:2]
    table.to_parquet(path) if kind == "parquet" else table.save_to_disk(str(path))
    read = load_splits(Data(train=str(path), validation_fraction=0.0), 0).train
    expected = load(tmp_path, *rows).train
    assert [row.messages for row in read] == [row.messages for row in expected]
    assert [row.tools for row in read][:2] == [row.tools for row in expected][:2]
    (given,) = load(tmp_path, asks("lamp", room=None)).train
    assert given.messages[1]["tool_calls"][0]["function"]["arguments"] == {"room": None}


def test_several_calls_of_sharegpt_are_read(tmp_path):
    turns = [
        ("human", "a"),
        ("function_call", json.dumps([CALL, CALL])),
        ("observation", "b"),
        ("gpt", "c"),
    ]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    (read,) = load(tmp_path, row).train
    assert [len(message.get("tool_calls", ())) for message in read.messages] == [0, 2, 0, 0]


def test_a_last_call_needs_no_result(tmp_path):
    (row,) = load(tmp_path, {"messages": TURNS[:2], "tools": [TOOL]}).train
    assert row.targets == [1]


def test_an_empty_result_is_a_result(tmp_path):
    row = {"messages": [*TURNS[:2], turn("tool", ""), TURNS[3]]}
    assert load(tmp_path, row).train[0].messages[2]["content"] == ""


def test_rows_that_differ_in_calls_or_tools_differ(tmp_path):
    other = {**CALL, "arguments": {"room": 7}}
    rows = [
        {"messages": TURNS, "tools": [TOOL]},
        {"messages": [TURNS[0], call(other), *TURNS[2:]], "tools": [TOOL]},
        {"messages": TURNS},
    ]
    read = load(tmp_path, *rows).train
    assert len({row.key for row in read}) == len({row.prompt_key for row in read}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"name": 7}]}]},
            "a call without a name",
        ),
        (
            {"messages": [TURNS[0], call({"name": "lamp", "arguments": "{room: 1}"})]},
            "arguments of the call lamp: broken JSON at column 2",
        ),
        (
            {"messages": [TURNS[0], call({"name": "lamp", "arguments": [1]})]},
            r"arguments of the call lamp: expected an object, found \[1\]",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "tool_calls": "lamp()"}]},
            "calls: broken JSON at column 1: .*; expected a list of calls",
        ),
        ({"messages": TURNS, "tools": "lamp()"}, "tools: broken JSON at column 1"),
        ({"messages": TURNS, "tools": ["lamp"]}, "tools: broken JSON at column 1"),
        ({"messages": TURNS, "tools": [{"parameters": {}}]}, "tools: a function without a name"),
        (
            {"messages": [turn("user", [{"type": "image_url", "image_url": "x"}]), TURNS[3]]},
            "a user message with a part 'image_url': only text is read",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "lamp(blue)"},
                ]
            },
            "function_call: broken JSON",
        ),
    ],
)
def test_an_invalid_call_is_a_bad_row(tmp_path, change, message):
    good = {"messages" if "messages" in change else "conversations": TURNS}
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{message}"):
        load(tmp_path, good, change)
    assert len(load(tmp_path, good, change, bad_rows="drop").train) == 1


# Templates that leave out what they do not know

PLAIN = (
    "{% for message in messages %}{% if message.role in KNOWN %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("known", "row", "what"),
    [
        (
            "['user', 'assistant', 'tool']",
            Row("a:1", tuple(TURNS[:1] + TURNS[3:]), tools=(TOOL,)),
            r"the function definitions \(tools\)",
        ),
        ("['user', 'assistant', 'tool']", Row("a:1", tuple(TURNS)), "call 1 of an answer"),
        (
            "['user', 'assistant']",
            Row("a:1", (TURNS[0], TURNS[3], TURNS[2], TURNS[3])),
            "a tool message",
        ),
        (
            "['user', 'assistant']",
            Row("a:1", (turn("system", "Be brief."), TURNS[0], TURNS[3])),
            "a system message",
        ),
        (
            "['user', 'assistant']",
            Row("a:1", (TURNS[0], TURNS[3] | {"reasoning_content": "It is late."})),
            r"the thoughts of an answer \(reasoning_content\)",
        ),
    ],
)
def test_a_template_that_leaves_out_content_is_refused(speaking, known, row, what):
    tokenizer = speaking(PLAIN.replace("KNOWN", known))
    good = Row("a:0", (TURNS[0], TURNS[3]))
    it = "them" if row.tools or "thoughts" in what else "it"
    refusal = f"a:1: the chat template leaves out {what}.*: the model would never see {it}; .*"
    refusal += f"writes {it}.*, or remove {it} from the rows"
    with pytest.raises(UserError, match=refusal):
        to_dataset([good, row], tokenizer, data())
    check_template([good], tokenizer, data())


def test_a_template_may_leave_out_the_thoughts_of_earlier_answers(speaking):
    thinks = "{% if loop.last %}{{ message.reasoning_content }} {% endif %}{{ message.content }}"
    template = PLAIN.replace("KNOWN", "['user', 'assistant']")
    assert "{{ message.content }}" in template
    tokenizer = speaking(template.replace("{{ message.content }}", thinks))
    thought = TURNS[3] | {"reasoning_content": "It is late."}
    row = Row("a:1", (TURNS[0], thought, TURNS[0], thought), excluded=frozenset({1}))
    (encoded,) = to_dataset([row], tokenizer, data())
    answer = [label for label in encoded["labels"] if label != IGNORED]
    assert tokenizer.decode(answer).startswith(f"It is late. {TURNS[3]['content']}")


def test_a_template_that_writes_only_the_first_call_is_refused(speaking):
    first = HERMES.replace("in message.tool_calls %}", "in message.tool_calls[:1] %}")
    check_template([ONE], speaking(first), data())
    said = "rows.jsonl:2: the chat template leaves out call 2 .*: the model would never see it; "
    said += ".*writes it .model.chat_template=chatml_tools.jinja does.*, or remove it from"
    with pytest.raises(UserError, match=said):
        check_template([ONE, TWO], speaking(first), data())
    for template in (HERMES, QWEN):
        check_template([ONE, TWO], speaking(template), data())


def test_a_templates_refusal_is_quoted(speaking):
    with pytest.raises(UserError, match="rows.jsonl:2: .*only supports single tool-calls at once"):
        encode(TWO, speaking(LLAMA_3_2), data())
