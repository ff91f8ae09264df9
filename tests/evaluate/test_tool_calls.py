"""Function calls in answers: found in the text that templates render, compared as values."""

from __future__ import annotations

import json
import math

import pytest
from conftest import write_jsonl

from finequant.evaluate.check import check_rows
from finequant.evaluate.metrics.text_metrics import calls_in, paired_changes, score_answers
from finequant.finetune.data.splits import load_splits
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe

BLUE = '{"name": "lamp", "arguments": {"room": "blue", "level": 1}}'
RED = '{"name": "lamp", "arguments": {"room": "red"}}'
FORMS = [
    BLUE,
    '{"arguments": {"level": 1.0, "room": "blue"}, "name":"lamp"}',
    '{"name": "lamp", "parameters": {"room": "blue", "level": 1}}',
    f"<tool_call>\n{BLUE}\n</tool_call>",
    f"I will. <|python_tag|>{BLUE} {{done}}",
    f"[{BLUE}]",
    json.dumps([{"type": "function", "function": json.loads(BLUE)}]),
    json.dumps({"name": "lamp", "arguments": '{"room": "blue", "level": 1}'}),
]
OTHERS = [
    "The lamp is lit.",
    "",
    RED,
    BLUE.replace("1", "true"),
    BLUE.replace("1", '"1"'),
    BLUE.replace("lamp", "Lamp"),
    f"{BLUE} {BLUE}",
    BLUE[:-2],
    '{"name": "lamp"}',
    '{"name": "lamp", "arguments": [1]}',
    "{" * 2000,
]


@pytest.mark.parametrize("answer", FORMS)
def test_the_same_call_matches_in_any_form(answer):
    assert score_answers([answer], [BLUE], ["tool_call_match"])["tool_call_match"]["value"] == 1


@pytest.mark.parametrize("answer", OTHERS)
def test_another_answer_is_no_match(answer):
    assert score_answers([answer], [BLUE], ["tool_call_match"])["tool_call_match"]["value"] == 0


@pytest.mark.parametrize("arguments", ["[1]", "5", "null", '"{}"', "{"])
def test_arguments_in_a_string_have_to_be_an_object(arguments):
    assert calls_in(json.dumps({"name": "lamp", "arguments": "{}"})) == ["lamp {}"]
    assert calls_in(json.dumps({"name": "lamp", "arguments": arguments})) == []


def test_several_calls_are_scored_by_answer_and_by_call():
    references = [f"{BLUE}\n{RED}", BLUE, "no call", f"{BLUE} {BLUE}"]
    answers = [f"{RED}\n{BLUE}", f"{BLUE}{RED}", RED, BLUE]
    scores = score_answers(answers, references, ["tool_call_match", "tool_call_recall"])
    assert (scores["tool_call_match"]["value"], scores["tool_call_match"]["n"]) == (0.25, 4)
    assert (scores["tool_call_recall"]["value"], scores["tool_call_recall"]["n"]) == (0.8, 5)
    changes = paired_changes(answers, references, references, list(scores))
    assert changes["tool_call_match"]["value"] == 0.75
    # By row, 0 of 2, 0 of 1, and 1 of 2 calls are made only by the references: their deviations
    # from the mean change are -0.4, -0.2 and 0.6, of 3 rows and 5 calls.
    clustered = math.sqrt(3 / 2 * (0.4**2 + 0.2**2 + 0.6**2)) / 5
    expected = {"value": pytest.approx(0.2), "stderr": pytest.approx(clustered), "n": 5}
    assert changes["tool_call_recall"] == expected | {"groups": 3}


TURNS = [
    {"role": "user", "content": "light"},
    {"role": "assistant", "tool_calls": [{"name": "lamp", "arguments": {"room": "blue"}}]},
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "lit"},
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepared(recipe_file, call: str, conversations=(TURNS,)):
    from finequant.evaluate.inputs import prepare
    from finequant.finetune.model import load_tokenizer

    rows = [{"prompt": "open", "completion": "done"}, {"prompt": "shut", "completion": "done"}]
    test = "".join(json.dumps({"messages": turns}) + "\n" for turns in conversations)
    (recipe_file.parent / "test.jsonl").write_text(test)
    (recipe_file.parent / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (recipe_file.parent / "t.jinja").write_text(TEMPLATE.replace("CALL", call))
    recipe = load_recipe(recipe_file, ["model.chat_template=t.jinja"])
    return prepare(recipe, load_splits(recipe.data, recipe.seed), load_tokenizer(recipe.model))


def test_each_answer_of_a_row_with_calls_is_generated(recipe_file):
    material = prepared(recipe_file, "<call>{{ call.function | tojson }}</call>")
    decoded = [material.tokenizer.decode(prompt) for prompt in material.prompts]
    assert decoded[0] == "<|im_start|>user\nlight<|im_end|>\n<|im_start|>assistant\n"
    assert decoded[1].endswith("<|im_start|>tool\nok<|im_end|>\n<|im_start|>assistant\n")
    call = '{"name": "lamp", "arguments": {"room": "blue"}}'
    assert material.references == [f"<call>{call}</call>", "lit"]
    assert calls_in(material.references[0]) == calls_in(call)


def test_calls_that_are_text_are_generated_as_well(recipe_file):
    call = '<tool_call>\n{"name": "lamp", "arguments": {"room": "blue"}}\n</tool_call>'
    turns = [TURNS[0], {"role": "assistant", "content": call}, *TURNS[2:]]
    quoted = [TURNS[0] | {"content": f"What is {call}?"}, TURNS[3], TURNS[0], TURNS[3]]
    material = prepared(recipe_file, "", [turns, quoted])
    assert material.references == [call, "lit", "lit"]


def test_answers_of_a_conversation_or_to_the_same_prompt_share_a_group(recipe_file):
    prompt = [{"role": "user", "content": "dim"}]
    rows = [TURNS, *([*prompt, TURNS[3] | {"content": text}] for text in ("a", "b")), TURNS[:2]]
    rows.append([TURNS[0] | {"content": "dark"}, TURNS[3]])
    template = "<call>{{ call.function | tojson }}</call>"
    material = prepared(recipe_file, template, rows)
    assert material.groups == [0, 0, 1, 1, 0, 2]


def test_rows_of_files_with_the_same_name_are_told_apart(recipe_file):
    from finequant.evaluate.inputs import prepare
    from finequant.finetune.model import load_tokenizer

    for language, answer in (("de", "aus"), ("en", "on")):
        folder = recipe_file.parent / language
        folder.mkdir()
        write_jsonl(folder / "test.jsonl", [{"prompt": f"{language} lamp", "completion": answer}])
    sources = "data.test=[de/test.jsonl, en/test.jsonl]"
    recipe = load_recipe(recipe_file, [sources])
    splits = load_splits(recipe.data, recipe.seed)
    assert prepare(recipe, splits, load_tokenizer(recipe.model)).groups == [0, 1]

    choices = ["evaluate.metrics=[multiple_choice]", "evaluate.choices=[on, off]"]
    with pytest.raises(UserError, match="in 1 held-out row, the answer is none of .*\n.* 'aus'"):
        check_rows(load_recipe(recipe_file, [sources, *choices]), splits)


@pytest.mark.parametrize("metric", ["tool_call_match", "tool_call_recall"])
@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("last", [TURNS, [TURNS[0], TURNS[3] | {"content": f"<call>{BLUE}"}]])
def test_metrics_of_calls_need_a_call_among_the_answers(recipe_file, metric, limit, last):
    context = [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]  # its call is not trained on
    rows = [{"messages": context}, {"messages": last}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (recipe_file.parent / "test.jsonl").write_text(lines)
    (recipe_file.parent / "train.jsonl").write_text(lines.replace("light", "dark"))
    settings = [f"evaluate.metrics=[{metric}]", f"evaluate.limit={limit}"]
    recipe = load_recipe(recipe_file, [*settings, "seed=1"])  # which chooses the first of two rows
    splits = load_splits(recipe.data, recipe.seed)
    if limit == 2:
        assert len(check_rows(recipe, splits)) == 2
        return
    with pytest.raises(UserError, match=f"{metric}: no answer .* raise evaluate.limit=1"):
        check_rows(recipe, splits)


def test_calls_that_the_metric_could_not_find_are_refused(recipe_file):
    with pytest.raises(
        UserError, match=r"test.jsonl:1: the chat template writes calls as 'lamp\(\)'"
    ):
        prepared(recipe_file, "{{ call.function.name }}()")
