"""The token that ends an answer, in every kind of chat template, and refusals."""

from __future__ import annotations

import copy
import json

import pytest

from finequant.finetune.data.row import Row
from finequant.finetune.data.tokens import IGNORED, encode, encode_prompt
from finequant.finetune.data.turns import (
    answer_end,
    date_note,
    end_tokens,
    generation_config,
    save_tokenizer,
    unread_note,
    until_end,
)
from finequant.finetune.model import load_tokenizer
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Data, Model

ENDS = ("<|eot_id|>", "<|eom_id|>", "<end>")
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def ending(end: str) -> str:
    """Makes a template with `end` after each message."""
    return "{% for m in messages %}" + TURN + end + "{% endfor %}" + ASKS


TEMPLATES = {
    "a token and a line break": (ending("<|im_end|>\n"), "<|im_end|>"),
    "a line break and a token": (ending("\n<|im_end|>"), "<|im_end|>"),
    "EOS": (ending("{{ eos_token }}"), "<|endoftext|>"),
    "two tokens": (ending("<|eot_id|><|endoftext|>"), "<|eot_id|>"),
    "a token that is not special": (ending("<end>\n"), "<end>"),
    "EOS after the last answer": (
        ending("{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}"),
        "<|endoftext|>",
    ),
    "another token after the last answer": (
        ending("<|eot_id|>{% if loop.last and m.role == 'assistant' %}<|eom_id|>{% endif %}"),
        "<|eot_id|>",
    ),
    "nothing": (ending(""), None),
    "text": (ending("\n\n"), None),
    "what is no token": (ending("<|im_stop|>\n"), None),
}
# Like the distillations of R1: the prompt opens a thought, and earlier turns lose theirs.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:<think>\n{% endif %}"
)


@pytest.fixture
def ended(tokenizer):
    """Makes a tokenizer with EOS <|endoftext|>, more end tokens, and a template."""

    def make(template: str | dict | None):
        changed = copy.deepcopy(tokenizer)
        changed.eos_token = "<|endoftext|>"
        changed.add_special_tokens({"extra_special_tokens": list(ENDS[:2])})
        changed.add_tokens(list(ENDS[2:]))
        changed.chat_template = template
        return changed

    return make


def conversation(*contents: str) -> Row:
    roles = ["user", "assistant"] * (len(contents) // 2)
    turns = zip(roles, contents, strict=True)
    return Row("rows.jsonl:7", tuple({"role": role, "content": text} for role, text in turns))


def data(**changes) -> Data:
    return Data(train="rows.jsonl", **changes)


def targets(row: Row, tokenizer, **changes) -> str:
    labels = encode(row, tokenizer, data(**changes)).labels
    return tokenizer.decode([label for label in labels if label != IGNORED])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_is_the_first_token_that_the_template_adds(ended, name):
    template, expected = TEMPLATES[name]
    tokenizer = ended(template)
    end = answer_end(tokenizer, data())
    assert end.token == expected
    assert end.id == (None if expected is None else tokenizer.convert_tokens_to_ids(expected))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if TEMPLATES[name][1]])
def test_each_answer_is_a_target_up_to_its_end_and_no_further(ended, name):
    template, end = TEMPLATES[name]
    between = "\n" if "a line break and" in name else ""
    last = "EOS after the last" in name
    tokenizer = ended(template)
    answers = targets(conversation("end", "im", "open", "end"), tokenizer)
    assert answers == f"im{'' if last else between + end}end{between}{end}"


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if not TEMPLATES[name][1]])
def test_answers_that_end_in_no_token_are_refused_or_allowed(ended, name, loss_on):
    tokenizer = ended(TEMPLATES[name][0])
    with pytest.raises(UserError, match=r"answers end in no token.*data\.missing_end=allow") as e:
        encode(conversation("open", "ok"), tokenizer, data(loss_on=loss_on))
    assert ("'<|im_stop|>\\n'" in str(e.value)) == (name == "what is no token")
    allowed = data(loss_on=loss_on, missing_end="allow")
    encoded = encode(conversation("open", "ok"), tokenizer, allowed)
    target_ids = [label for label in encoded.labels if label != IGNORED]
    assert tokenizer.decode(target_ids).rstrip().endswith(("ok", "<|im_stop|>"))


def test_a_text_without_eos_is_refused_unless_allowed(ended):
    tokenizer = ended(None)
    tokenizer.eos_token = None
    row = Row("rows.jsonl:1", text="open the door")
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* no EOS token .*missing_end=allow"):
        encode(row, tokenizer, data())
    assert targets(row, tokenizer, missing_end="allow").endswith("door")


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_prompt_that_opens_a_thought_missing_from_the_row_is_refused(ended, loss_on):
    for answer in ("ok", "<think>\nwhy\n</think>\nok"):
        with pytest.raises(UserError) as error:
            encode(conversation("open", answer), ended(REASONING), data(loss_on=loss_on))
        message = str(error.value)
        assert message.startswith("rows.jsonl:7: the chat template asks for an answer with '<th")
        assert "would be asked with a prompt that it was not trained on" in message
        assert "earlier turns" not in message
        assert "loss_on" not in message
    # The message's way out: a template whose prompts begin answers as its turns do.
    plain = ended(REASONING.replace("<think>\\n", "").replace("<think>\n", ""))
    assert targets(conversation("open", "ok"), plain) == "ok<|im_end|>"


def test_a_thought_that_lacks_the_line_break_of_the_prompt_is_refused_with_the_remedy(ended):
    tokenizer = ended(REASONING.replace(".split('</think>')[-1]", ""))
    with pytest.raises(
        UserError, match=r"asks .*<think>\\n', but .* 'why</think>ok.*put '\\n' there"
    ):
        encode(conversation("open", "<think>why</think>ok"), tokenizer, data())
    answer = targets(conversation("open", "<think>\nwhy</think>ok"), tokenizer)
    assert answer == "why</think>ok<|im_end|>"


@pytest.mark.parametrize("opens", ["", "<think>\n"])
def test_a_thought_is_learned_as_the_template_writes_it(ended, opens):
    """Qwen3's writes tags on lines of their own; rows without line breaks were refused."""
    lines = ".replace('<think>', '<think>\\n').replace('</think>', '\\n</think>\\n\\n')"
    template = REASONING.replace(".split('</think>')[-1]", lines)
    tokenizer = ended(template.replace("assistant:<think>\n", f"assistant:{opens}"))
    answer = targets(conversation("open", "<think>why</think>ok"), tokenizer)
    assert f"<think>\n{answer}".endswith("<think>\nwhy\n</think>\n\nok<|im_end|>")
    assert answer.startswith("why" if opens else "<think>")


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_thought_that_the_template_drops_is_refused(ended, loss_on):
    cutting = ended(REASONING.replace("<think>\n", ""))
    row = conversation("open", "<think>\nwhy\n</think>\nok")
    with pytest.raises(UserError, match="rows.jsonl:7: .* leaves '<think>' out of the answer"):
        encode(row, cutting, data(loss_on=loss_on))


def test_white_space_is_kept_as_the_template_writes_it(ended):
    trimming = ended(ending("<|im_end|>").replace("m.content", "m.content | trim"))
    assert targets(conversation("open", " ok \n"), trimming) == "ok<|im_end|>"


def test_the_bases_own_ends_follow_that_of_the_template(ended, tmp_path):
    """Llama 3 is published this way: EOS in config.json, a list in generation_config.json."""
    tokenizer = ended(ending("<|eot_id|>"))
    eot, eom, _ = tokenizer.convert_tokens_to_ids(ENDS)
    tokenizer.save_pretrained(tmp_path)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    model = Model(base=str(tmp_path))
    assert end_tokens(model, data(), load_tokenizer(model)) == [eot, 0]
    stops = generation_config(model, data(), load_tokenizer(model))
    assert (stops.eos_token_id, stops._from_model_config) == ([eot, 0], False)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, eom, eot]}))
    assert end_tokens(model, data(), load_tokenizer(model)) == [eot, 0, eom]
    other = Model(base=str(tmp_path), chat_template=ending("<|im_end|>"))
    ends = end_tokens(other, data(), load_tokenizer(other))
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 0, eom, eot]
    assert until_end([5, 6, eom, 7, 0], ends) == [5, 6]
    assert until_end([5, 6], ends) == [5, 6]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0,')
    with pytest.raises(UserError, match=r"generation_config.json: cannot be read \(.*: copy it"):
        end_tokens(model, data(), load_tokenizer(model))


def test_the_end_is_the_saved_tokenizers_eos(ended, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = ended(ending("<|im_end|>\n"))
    save_tokenizer(tokenizer, data(), tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.eos_token, saved.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token == "<|endoftext|>"  # texts end in it
    row = conversation("open", "ok", "close", "done")
    assert encode_prompt(row, saved, data()) == encode_prompt(row, tokenizer, data())


@pytest.mark.parametrize("named", [False, True])
def test_the_saved_template_has_the_recipes_arguments_as_defaults(ended, tmp_path, named):
    """Other programs render prompts without them: a Llama 3.2 would be told another date."""
    from transformers import AutoTokenizer

    shown = "{% if date_string is not defined %}{% set date_string = 'today' %}{% endif %}"
    shown += "\n{{ date_string }} {{ thinks is false }} {{ parts | tojson }} {{ other is none }}\n"
    arguments = {
        "date_string": '26 "Jul" 2024\n%} é \\ 😀',
        "thinks": False,
        "parts": [1, None, {"a": [True, 0.5], "%}": "x"}],
        "other": None,
        "not-a-name": 1,
        "none": None,
        "not": True,
    }
    tokenizer = ended(
        {"default": shown + ending("<|im_end|>")} if named else shown + ending("<|im_end|>")
    )
    before = copy.deepcopy(tokenizer.chat_template)
    save_tokenizer(tokenizer, data(template_arguments=arguments), tmp_path)
    assert tokenizer.chat_template == before
    saved = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "open"}]
    expected = tokenizer.apply_chat_template(turns, tokenize=False, **arguments)
    assert arguments["date_string"] in expected
    assert saved.apply_chat_template(turns, tokenize=False) == expected
    other = saved.apply_chat_template(turns, tokenize=False, date_string="now")
    assert other == expected.replace(arguments["date_string"], "now")


@pytest.mark.parametrize("kind", ["template", "texts"])
def test_eos_stays_where_ids_depend_on_it(ended, tmp_path, kind):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    end = "<|im_end|>{{ eos_token }}" if kind == "template" else "<|im_end|>"
    tokenizer = ended(ending(end))
    if kind == "texts":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        )
    save_tokenizer(tokenizer, data(), tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    row = conversation("open", "ok")
    assert encode_prompt(row, saved, data()) == encode_prompt(row, tokenizer, data())
    assert saved("open")["input_ids"] == tokenizer("open")["input_ids"]
    assert (saved.eos_token == "<|endoftext|>") == (kind == "template")


def test_a_template_that_refuses_a_plain_conversation_gives_no_traceback(ended, tmp_path):
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = ended(needs + ending("<|im_end|>"))
    assert answer_end(tokenizer, data()).token is None
    assert answer_end(tokenizer, data(system="Be brief.")).token == "<|im_end|>"
    save_tokenizer(tokenizer, data(system="Be brief."), tmp_path)
    save_tokenizer(tokenizer, data(), tmp_path)


TODAY = "{{ strftime_now('%d %b %Y') }}"
LLAMA_3_2 = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
LLAMA_3_2 += "{% endif %}{{ date_string }}\n"
DATES = {
    "none": ("", {}, None),
    "today": (TODAY, {}, "set model.chat_template to one without it"),
    "today, or a date that is given": (LLAMA_3_2, {}, "date_string: 26 Jul 2024}"),
    "a date that is given": (LLAMA_3_2, {"date_string": "1 May 2025"}, None),
    "today without a system message": (
        "{% if messages[0].role != 'system' %}" + TODAY + "{% endif %}",
        {},
        "set model.chat_template to one without it",
    ),
}


@pytest.mark.parametrize("case", DATES)
def test_a_template_that_writes_the_date_of_today_is_noticed(ended, case):
    begin, arguments, advice = DATES[case]
    tokenizer = ended(begin + ending("<|im_end|>"))
    note = date_note(tokenizer, Data(train=["rows"], template_arguments=arguments))
    assert note is None if advice is None else note.endswith(advice)


def test_a_variable_that_the_template_does_not_have_is_noticed(ended):
    tokenizer = ended("{% if mood%}{{\nmood }}{% endif %}" + ending("<|im_end|>"))
    arguments = {"mood": "calm", "moo": 1, "messages": 2}
    settings = Data(train=["rows"], template_arguments=arguments)
    assert unread_note(tokenizer, settings).endswith("the chat template has no variable moo")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ moo }}"}
    assert unread_note(tokenizer, settings) is None


@pytest.mark.parametrize(
    ("name", "noticed"), [("default", True), ("tool_use", True), ("rag", False)]
)
def test_the_date_of_a_template_with_a_name_is_noticed(ended, name, noticed):
    """`rag` is rendered only where a program asks for it, which finequant does not."""
    tokenizer = ended(ending("<|im_end|>"))
    tokenizer.chat_template = {name: TODAY + tokenizer.chat_template}
    assert (date_note(tokenizer, Data(train=["rows"])) is not None) == noticed
