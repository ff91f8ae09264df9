"""Conversations in every form that people have: roles, targets, and repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finequant.finetune.data.files import BadRowError
from finequant.finetune.data.rows import RowReader
from finequant.finetune.data.splits import Splits, load_splits
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Data, Source


def load(folder: Path, rows: list[dict[str, Any]], validation: float = 0.0, **keys: Any) -> Splits:
    columns = keys.pop("columns", {})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"source": str(folder / "rows.jsonl"), "columns": columns}
    return load_splits(Data(train=[source], validation_fraction=validation, **keys), 0)


def said(splits: Splits, row: int = 0) -> list[str]:
    return [f"{turn['role']}: {turn['content']}" for turn in splits.train[row].messages]


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    """Makes a row of messages; "u text" is a turn of the user."""
    roles = {"u": "user", "a": "assistant", "s": "system", "d": "developer", "t": "tool"}
    return {"messages": [{"role": roles[t[0]], "content": t[2:]} for t in turns], **more}


GOOD = chat("u ask", "a say")


# Columns beside the turns


def test_system_and_history_of_alpaca_are_turns(tmp_path):
    row = {"instruction": "c", "output": "d", "system": "Be brief.", "history": [["a", "b"]]}
    splits = load(tmp_path, [row, {**row, "system": "", "history": []}], system="Default.")
    assert said(splits) == [
        "system: Be brief.",
        "user: a",
        "assistant: b",
        "user: c",
        "assistant: d",
    ]
    assert said(splits, 1) == ["system: Default.", "user: c", "assistant: d"]
    assert splits.train[0].targets == [2, 4]
    assert len(splits.notes) == 1


def test_a_system_column_beside_another_system_message_is_noted(tmp_path):
    rows = [chat("s Say.", "u a", "a b", system=system) for system in ("Say.", "Sing.", None)]
    splits = load(tmp_path, rows)
    assert {said(splits, row)[0] for row in range(3)} == {"system: Say."}
    (note,) = [note for note in splits.notes if "system" in note]
    assert note.endswith("(the messages begin with another system message): 1")


def test_a_system_message_inside_a_column_is_read(tmp_path):
    columns = {"prompt": "q", "completion": "a", "system": "meta.system"}
    rows = [{"q": f"q{n}", "a": "b", "meta": {"system": who}} for n, who in enumerate(("S", None))]
    splits = load(tmp_path, rows, columns=columns, system="Default.")
    assert said(splits) == ["system: S", "user: q0", "assistant: b"]
    assert said(splits, 1)[0] == "system: Default."


def test_a_misspelled_column_of_system_messages_is_named(tmp_path):
    columns = {"prompt": "q", "completion": "a", "system": "sytem"}
    with pytest.raises(UserError, match="rows.jsonl:1: no column sytem; .*did you mean system"):
        load(tmp_path, [{"q": "c", "a": "d", "system": "S"}], columns=columns)


CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "a"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ],
    ids=["question", "system", "several turns"],
)
def test_messages_as_prompt_and_completion_are_what_trl_makes_of_them(tmp_path, tokenizer, turns):
    from trl import maybe_apply_chat_template

    from finequant.finetune.data.tokens import IGNORED, encode

    row = {"prompt": turns, "completion": [{"role": "assistant", "content": "d"}]}
    splits = load(tmp_path, [row])
    texts = maybe_apply_chat_template(row, tokenizer)
    (read,) = splits.train
    encoded = encode(read, tokenizer, Data(train="rows.jsonl"))
    learned = [label for label in encoded.labels if label != IGNORED]
    assert tokenizer.decode(encoded.input_ids) == texts["prompt"] + texts["completion"]
    assert tokenizer.decode(learned) == texts["completion"].rstrip()  # up to the end token


def test_a_sequence_of_messages_in_datasets_is_a_conversation(tmp_path):
    """`datasets` stores it as a list of roles and a list of contents."""
    from datasets import Dataset, Features, Sequence, Value

    turn = {"role": Value("string"), "content": Value("string")}
    turns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    for name in ("messages", "dialog"):
        rows = Dataset.from_dict({name: [turns]}, features=Features({name: Sequence(turn)}))
        rows.to_parquet(tmp_path / "rows.parquet")
        data = Data(train=str(tmp_path / "rows.parquet"), validation_fraction=0)
        assert said(load_splits(data, 0)) == ["user: a", "assistant: b"]
    with pytest.raises(UserError, match="expected a list of role and content, found {'role'"):
        load(tmp_path, [{"messages": {"role": ["user"], "content": ["a", "b"]}}])


def test_a_completion_may_call_a_function_and_answer(tmp_path):
    said_after = [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "One."}]
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [CALLED, *said_after]}
    (read,) = load(tmp_path, [row]).train
    assert read.targets == [1, 3]


@pytest.mark.parametrize("answer", ["summary", "Category"])
def test_a_conversation_beside_an_answer_is_not_what_is_learned(tmp_path, answer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=f"cannot tell the format from the columns .*{answer}"):
        load(tmp_path, [{"dialogue": turns, answer: "c"}])
    mapped = load(tmp_path, [{"dialogue": turns, answer: "c"}], columns={"messages": "dialogue"})
    assert said(mapped) == ["user: a", "assistant: b"]


def test_json_that_has_roles_or_senders_is_no_conversation(tmp_path):
    people = json.dumps([{"role": "mayor", "content": "Ada"}])
    mail = [{"from": "user", "to": "Ada"}]
    rows = [{"prompt": "a", "completion": people}, {"prompt": "b", "completion": mail}]
    splits = load(tmp_path, rows)
    assert said(splits) == ["user: a", f"assistant: {people}"]
    assert said(splits, 1) == ["user: b", f"assistant: {json.dumps(mail)}"]


@pytest.mark.parametrize("history", [[["a"]], ["ab"], {"a": "b"}, [["a", None]]])
def test_an_invalid_history_is_refused(tmp_path, history):
    row = {"instruction": "c", "output": "d", "history": history}
    with pytest.raises(UserError, match="rows.jsonl:1: history: expected pairs of question and"):
        load(tmp_path, [row])


@pytest.mark.parametrize("answer", ["output", "response"])
def test_the_context_of_an_instruction_is_read(tmp_path, answer):
    row = {"instruction": "Who?", "context": "It is Ann's.", answer: "Ann", "category": "qa"}
    splits = load(tmp_path, [row])
    assert said(splits) == ["user: Who?\n\nIt is Ann's.", "assistant: Ann"]
    assert splits.notes[1:] == ["rows.jsonl: not read: category"]


def test_a_column_that_is_not_read_is_named_once(tmp_path):
    rows = [{"prompt": f"a{n}", "completion": "b", "context": "c", "id": n} for n in range(3)]
    turns = [{"role": "user", "content": "a", "mood": "x"}, {"role": "assistant", "content": "b"}]
    assert load(tmp_path, rows).notes[1:] == ["rows.jsonl: not read: context, id"]
    assert load(tmp_path, [{"messages": turns}] * 2).notes[1:] == [
        "rows.jsonl: not read: mood of messages"
    ]
    mapped = {"prompt": "{context} {prompt}", "completion": "completion"}
    assert len(load(tmp_path, rows, columns=mapped).notes) == 1


def test_a_column_that_the_recipe_reads_is_not_read_as_something_else(tmp_path):
    row = {"system": "Windows", "weight": 0, "label": False, "q": "ask"}
    columns = {"prompt": "{q} on {system}: {weight} kg", "completion": "label"}
    splits = load(tmp_path, [row], columns=columns)
    assert said(splits) == ["user: ask on Windows: 0 kg", "assistant: false"]


# Weights and labels


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}]
)
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_an_answer_can_be_left_out_of_the_loss(tmp_path, tokenizer, flag, form):
    from finequant.finetune.data.tokens import IGNORED, encode

    on = {key: type(value)(1) for key, value in flag.items()}
    turns = [
        ("user", "a", {}),
        ("assistant", "wrong", flag),
        ("user", "b", {}),
        ("assistant", "right", on),
    ]
    if form == "messages":
        row = {form: [{"role": role, "content": text, **more} for role, text, more in turns]}
    else:
        names = {"user": "human", "assistant": "gpt"}
        row = {form: [{"from": names[role], "value": text, **more} for role, text, more in turns]}
    splits = load(tmp_path, [row])
    (read,) = splits.train
    assert read.targets == [3]
    assert all(set(message) == {"role", "content"} for message in read.messages)
    assert splits.notes[1:] == [
        "rows.jsonl: answers excluded from the loss (weight 0, train or loss false, or part of a "
        "prompt): 1"
    ]
    for loss_on in ("assistant", "all"):
        data = Data(train="rows.jsonl", loss_on=loss_on)
        encoded = encode(read, tokenizer, data)
        target_text = tokenizer.decode([label for label in encoded.labels if label != IGNORED])
        assert "right<|im_end|>" in target_text
        assert "wrong" not in target_text
        assert ("user" in target_text) == (loss_on == "all")
        assert "wrong" in tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"weight": 0.5}, "weight of a message is 0.5, expected 0 or 1"),
        ({"train": "false"}, "train of a message is 'false', expected true or false"),
        ({"weight": 0}, "no answer to learn: all have weight 0, or train or loss false"),
    ],
)
def test_an_unsupported_weight_is_refused(tmp_path, flag, message):
    row = chat("u ask", "a say")
    row["messages"][1] |= flag
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{message}"):
        load(tmp_path, [row])


@pytest.mark.parametrize("column", ["weight", "label", "kto_tag"])
def test_a_row_can_be_left_out_by_its_own_column(tmp_path, column):
    values = [0, 1, 0] if column == "weight" else [False, True, False]
    rows = [{**chat(f"u ask {n}", "a say"), column: v} for n, v in enumerate(values)]
    splits = load(tmp_path, rows)
    assert [row.where for row in splits.train] == ["rows.jsonl:2"]
    assert splits.notes[1:] == [
        f"rows.jsonl: rows left out ({column} {'0' if column == 'weight' else 'false'}): 2"
    ]


@pytest.mark.parametrize(
    ("column", "cells", "reason"),
    [
        ("weight", ["0", "1", "0.0"], "weight 0"),
        ("weight", ["false", "TRUE", "0"], "weight 0"),
        ("label", ["False", "True", "false"], "label false"),
    ],
)
def test_a_row_of_a_csv_file_can_be_left_out(tmp_path, column, cells, reason):
    lines = [f"prompt,completion,{column}", *(f"a{n},b,{cell}" for n, cell in enumerate(cells))]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    splits = load_splits(Data(train=str(tmp_path / "rows.csv"), validation_fraction=0.0), 0)
    assert said(splits) == ["user: a1", "assistant: b"]
    assert splits.notes[1:] == [f"rows.csv: rows left out ({reason}): 2"]


def test_a_weight_or_label_of_another_kind_is_named(tmp_path):
    rows = [{"prompt": "Describe.", "completion": "a cat", "weight": 4.5, "label": 3}]
    splits = load(tmp_path, rows)
    assert len(splits.train) == 1
    assert splits.notes[1:] == ["rows.jsonl: not read: weight, label"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {**chat("u a"), "chosen": {"role": "assistant", "content": "b"}, "rejected": {}},
    ],
)
def test_preference_pairs_are_refused_by_name(tmp_path, row):
    with pytest.raises(UserError, match=r"preference pairs \(chosen, rejected\) are not supported"):
        load(tmp_path, [row])


@pytest.mark.parametrize(
    ("column", "text", "kind"),
    [
        ("image", "<image>\nWhat?", "image"),
        ("images", "<image> What?", "image"),
        ("videos", "What is in <video>?", "video"),
        ("audio", "<audio>", "audio"),
    ],
)
def test_a_message_about_a_file_is_refused(tmp_path, column, text, kind):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A cat."}]
    says = f"refers to column {column} by <{kind}>: only text is read"
    with pytest.raises(UserError, match=says):
        load(tmp_path, [{"conversations": turns, column: ["a"]}])
    with pytest.raises(UserError, match=says):
        load(tmp_path, [{"prompt": text, "completion": "A cat.", column: "a"}])
    for row in ({"conversations": turns}, {"conversations": turns, column: []}):
        load(tmp_path, [row, {**row, "conversations": [{"from": "human", "value": "b"}, turns[1]]}])


# Turns


@pytest.mark.parametrize(
    ("turns", "targets"),
    [
        (("a Welcome!", "u hi", "a hello"), [2]),
        (("s Be brief.", "a ok"), [1]),
        (("u one", "a two", "a three"), [1, 2]),
        (("u one", "a two", "s now be rude", "u three", "a four"), [1, 4]),
        (("a Welcome!", "a Ask!", "u hi", "a hello"), [1, 3]),
    ],
)
def test_turns_that_are_for_the_template_to_judge(tmp_path, tokenizer, turns, targets):
    from finequant.finetune.data.tokens import IGNORED, encode

    (row,) = load(tmp_path, [chat(*turns)]).train
    assert row.targets == targets
    encoded = encode(row, tokenizer, Data(train="rows.jsonl"))
    target_text = tokenizer.decode([label for label in encoded.labels if label != IGNORED])
    assert target_text == "".join(f"{turns[index][2:]}<|im_end|>" for index in targets)


def test_developer_is_another_name_of_system(tmp_path):
    splits = load(tmp_path, [chat("d Be brief.", "u a", "a b")], system="Default.")
    assert said(splits) == ["system: Be brief.", "user: a", "assistant: b"]


# name: (turns, what repair makes of them, what it says)
REPAIRED = {
    "ends with user": (
        ("u 1", "a 2", "u 3"),
        ["user: 1", "assistant: 2"],
        "user turn at the end cut",
    ),
    "two users": (("u 1", "u 2", "a 3"), ["user: 1\n\n2", "assistant: 3"], "user turns merged"),
    "two systems": (
        ("s 1", "d 2", "u 3", "a 4"),
        ["system: 1\n\n2", "user: 3", "assistant: 4"],
        "system turns merged",
    ),
    "empty system": (("s ", "u 1", "a 2"), ["user: 1", "assistant: 2"], "empty turn dropped"),
    "empty answer": (
        ("u 1", "a ", "u 2", "a 3"),
        ["user: 1\n\n2", "assistant: 3"],
        "empty turn dropped",
    ),
    "ends with a result": (
        ("u 1", "a 2", "u 3", "t 4"),
        ["user: 1", "assistant: 2"],
        "tool turn at the end cut",
    ),
}
BEYOND_REPAIR = {
    "no answer": chat("u 1", "u 2"),
    "nothing": chat(),
    "only empty answers": chat("u 1", "a \n"),
    "unknown role": {"messages": [{"role": "critic", "content": "1"}]},
    "null": {"messages": None},
}


@pytest.mark.parametrize("name", REPAIRED)
def test_repair_mends_turns_and_notes_how(tmp_path, name):
    turns, expected, what = REPAIRED[name]
    rows = [GOOD, chat(*turns)]
    with pytest.raises(UserError, match="rows.jsonl:2: .*data.bad_rows=repair .*=drop"):
        load(tmp_path, rows)
    dropped = load(tmp_path, rows, bad_rows="drop")
    assert [row.where for row in dropped.train] == ["rows.jsonl:1"]
    assert "rows.jsonl: bad rows dropped: 1\n  " in dropped.notes[1]
    repaired = load(tmp_path, rows, bad_rows="repair")
    assert said(repaired) == ["user: ask", "assistant: say"]
    assert said(repaired, 1) == expected
    assert f"rows.jsonl:2: {what}" in repaired.notes[1]


@pytest.mark.parametrize("name", BEYOND_REPAIR)
def test_rows_beyond_repair_are_dropped_and_named(tmp_path, name):
    splits = load(tmp_path, [GOOD, BEYOND_REPAIR[name]], bad_rows="repair")
    assert [row.where for row in splits.train] == ["rows.jsonl:1"]
    assert any("bad rows dropped: 1" in note and "rows.jsonl:2" in note for note in splits.notes)
    assert not any("repairs" in note for note in splits.notes)


def test_a_row_whose_answer_is_beyond_the_length_can_be_dropped(tmp_path, tokenizer, capsys):
    from finequant.finetune.data.dataset import to_dataset

    rows = load(tmp_path, [GOOD, chat(f"u {'long ' * 99}", "a say")]).train
    with pytest.raises(UserError, match="nothing is left to learn in 1 row:.*\n  rows.jsonl:2"):
        to_dataset(rows, tokenizer, Data(train="rows.jsonl", max_length=40))
    data = Data(train="rows.jsonl", max_length=40, bad_rows="drop")
    assert len(to_dataset(rows, tokenizer, data)) == 1
    assert "data.train: bad rows dropped: 1" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match="nothing is left to learn in 1 row:"):
        to_dataset(rows[1:], tokenizer, data)


def test_all_bad_rows_are_listed_at_once(tmp_path):
    rows = [GOOD, chat("u 1"), {"messages": 7}, GOOD, {"text": "a"}]
    with pytest.raises(UserError) as error:
        load(tmp_path, rows)
    first, *listed = str(error.value).splitlines()
    assert first.startswith("data: 3 rows cannot be used; correct them, or set data.bad_rows to")
    assert [line.split(": ")[0].strip() for line in listed] == [
        f"rows.jsonl:{n}" for n in (2, 3, 5)
    ]


def test_rows_with_the_same_mistake_are_one_line(tmp_path):
    rows = [{"question": "a", "answer": "b"}] * 3
    with pytest.raises(UserError) as error:
        load(tmp_path, rows, columns={"prompt": "qestion", "completion": "answer"})
    assert str(error.value) == (
        "rows.jsonl:1, rows.jsonl:2, rows.jsonl:3: no column qestion; "
        "the columns are question, answer; did you mean question?"
    )
    with pytest.raises(UserError, match=r"rows.jsonl:20 and 5 more: no column qestion"):
        load(tmp_path, rows[:1] * 25, columns={"prompt": "qestion", "completion": "answer"})


def test_a_row_without_the_column_of_tools_is_named(tmp_path):
    row = {"question": "a", "answer": "b", "more": []}
    columns = {"prompt": "question", "completion": "answer", "tools": "more"}
    with pytest.raises(UserError, match=r"^rows.jsonl:2: no column more"):
        load(tmp_path, [row, {"question": "a", "answer": "b"}], columns=columns)


def test_a_source_without_a_single_good_row_is_an_error(tmp_path):
    with pytest.raises(UserError, match="(?s)no rows are left to train on.*: bad rows dropped: 2"):
        load(tmp_path, [chat("u 1"), chat("u 2")], bad_rows="drop")


# One prompt, many answers


def jokes(count: int, prompts: int = 1) -> list[dict[str, str]]:
    return [{"prompt": f"Joke {n % prompts}!", "completion": f"joke {n}"} for n in range(count)]


@pytest.mark.parametrize("prompts", [1, 4])
def test_rows_of_few_prompts_are_split_by_row(tmp_path, prompts):
    splits = load(tmp_path, jokes(60, prompts), validation=0.1)
    assert [len(rows) for rows in splits[:2]] == [54, 6]
    assert f"train: few prompts ({prompts}): " in splits.notes[1]
    assert not {row.key for row in splits.train} & {row.key for row in splits.validation}


def test_rows_that_cut_a_text_at_different_words_are_not_the_same(tmp_path):
    """As rows to complete code: where the prompt ends and the answer begins counts."""
    texts = [("def f(x):", "return x + 1"), ("def  f(x): return", "x + 1"), ("def f(x):", "pass")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    splits = load(tmp_path, [*rows, rows[0]], same_rows="row", duplicates="drop")
    assert [row.messages[-1]["content"] for row in splits.train] == [text for _, text in texts]


def test_answers_to_one_prompt_stay_on_one_side(tmp_path):
    splits = load(tmp_path, jokes(60, 30), validation=0.1)
    assert [len(rows) for rows in splits[:2]] == [54, 6]
    assert len({row.prompt_key for row in splits.validation}) == 3
    by_row = load(tmp_path, jokes(60, 30), validation=0.1, same_rows="row")
    assert len(by_row.validation) == 6
    assert {r.prompt_key for r in by_row.train} & {r.prompt_key for r in by_row.validation}


def test_a_test_file_may_share_prompts_but_not_rows(tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in jokes(70)[60:]))
    assert len(load(tmp_path, jokes(60), test=str(held)).test) == 10
    with pytest.raises(UserError, match="60 training rows .*answers differ: data.same_rows=row"):
        load(tmp_path, jokes(60), test=str(held), same_rows="prompt")
    held.write_text(json.dumps(jokes(60)[7]) + "\n")
    with pytest.raises(
        UserError, match="1 training row also occurs.*\n  rows.jsonl:8 = held.jsonl"
    ):
        load(tmp_path, jokes(60), test=str(held))


def test_prompts_that_differ_in_case_are_different(tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "FIX: a word", "completion": "A WORD"}\n')
    rows = [{"prompt": f"Fix: {w}", "completion": w.upper()} for w in ("a word", "another")]
    assert len(load(tmp_path, rows, test=str(held)).train) == 2


GEMINI = [
    {"role": "user", "parts": [{"text": "Who?"}]},
    {"role": "model", "parts": [{"text": "I."}, {"text": "You."}]},
]
BEDROCK = [
    {"role": "user", "content": [{"text": "Who?"}]},
    {"role": "assistant", "content": [{"text": "I."}, {"text": "You."}]},
]


@pytest.mark.parametrize(
    "row",
    [
        {"contents": GEMINI, "systemInstruction": {"role": "user", "parts": [{"text": "Say."}]}},
        {"contents": GEMINI, "system_instruction": {"parts": ["Say."]}},
        {"messages": BEDROCK, "system": [{"text": "Say."}]},
        {"messages": BEDROCK, "system": [{"type": "text", "text": "Say."}]},
        {"conversations": ["Who?", "I.\nYou."], "system": "Say."},
    ],
)
def test_contents_in_parts_and_alternating_texts_are_conversations(row):
    read = RowReader(Source(source="r"), Data(train=[{"source": "r"}])).read("r:1", row)
    assert [(turn["role"], turn["content"]) for turn in read.messages] == [
        ("system", "Say."),
        ("user", "Who?"),
        ("assistant", "I.\nYou."),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"contents": [{"role": "user", "parts": [{"inlineData": {}}]}, GEMINI[1]]},
            "r:1: contents: a user message with a part 'inlineData': only text is read",
        ),
        (
            {"contents": [GEMINI[0], {"role": "model", "parts": [{"text": "I", "thought": True}]}]},
            "an assistant message with a part 'thought': only text is read",
        ),
        (
            {"messages": BEDROCK, "system": [{"type": "image", "source": {}}]},
            "r:1: system: a system message with a part 'image': only text is read",
        ),
        ({"conversations": ["Who?"]}, "the turns are user; expected an answer"),
    ],
)
def test_parts_that_are_not_text_are_refused(row, message):
    with pytest.raises(BadRowError) as error:
        RowReader(Source(source="r"), Data(train=[{"source": "r"}])).read("r:1", row)
    assert message in str(error.value)
