"""quantize/formats/ollama.py: chat templates in Go's language, derived from what Jinja renders."""

import json

import pytest

from finequant.quantize.formats.ollama import Turns, derived_turns, modelfile
from finequant.quantize.formats.sampling import sampling

LLAMA_3 = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' "
    "+ message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}"
)
ONLY_THE_LAST = "{{ '<|im_start|>user\n' + messages[-1]['content'] + '<|im_end|>\n' }}"


@pytest.fixture
def with_template(tokenizer):
    """Makes a copy of the tiny tokenizer with another chat template."""
    from copy import deepcopy

    def change(template):
        changed = deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return change


def test_chatml_is_derived(tokenizer):
    text = modelfile("m.gguf", tokenizer, "Reply in JSON.", [2], {}, adds_bos=False)
    assert (
        text
        == '''\
FROM ./m.gguf
TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system
{{ .Content }}<|im_end|>
{{ else if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""
SYSTEM """Reply in JSON."""
PARAMETER stop "<|im_end|>"
'''
    )


def test_a_default_system_message_comes_only_without_one(with_template, tokenizer):
    turns = derived_turns(with_template(DEFAULT_SYSTEM + tokenizer.chat_template))
    assert turns.unasked == "<|im_start|>system\nBe kind.<|im_end|>\n"
    begin = "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range"
    assert turns.go_template().startswith(begin)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_llama_3_begins_with_its_first_token_once(with_template, adds_bos):
    changed = with_template(LLAMA_3)
    text = modelfile("m.gguf", changed, None, [2], {}, adds_bos)
    assert text.count(changed.bos_token) == (0 if adds_bos else 2)  # with and without a system
    assert "<|start_header_id|>user<|end_header_id|>\n\n{{ .Content }}<|eot_id|>" in text
    assert text.rstrip().endswith('assistant<|end_header_id|>\n\n"""\nPARAMETER stop "<|im_end|>"')


@pytest.mark.parametrize("template", [ONLY_THE_LAST, "{{ raise_exception('no') }}"])
def test_a_template_that_cannot_be_derived_is_left_out_with_a_comment(with_template, template):
    text = modelfile("m.gguf", with_template(template), None, [2], {}, adds_bos=False)
    assert "\n# No TEMPLATE: " in text
    assert 'TEMPLATE "' not in text


def test_the_derived_template_renders_the_same_texts_as_jinja(tokenizer):
    turns = derived_turns(tokenizer)
    assert isinstance(turns, Turns)
    messages = [
        {"role": role, "content": f"about {role} {number}"}
        for number, role in enumerate(("system", "user", "assistant", "user"))
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert turns.render(messages) == expected


def as_ollama_reads(text: str) -> dict[str, str]:
    """Reads the commands with a value in three quotes, which end where a line ends in three."""
    commands, name, value = {}, "", ""
    for line in text.splitlines(keepends=True):
        if not name and line[0] != "#":
            name, _, line = line.partition(" ")
        value += line if name else ""
        quoted = value.strip()
        if not quoted.startswith('"""') or (len(quoted) > 5 and quoted.endswith('"""')):
            commands[name] = quoted[3:-3]
            name, value = "", ""
    return commands


@pytest.mark.parametrize("system", ['Say "no".', 'Say "no"', 'a """ b\n"""c', '"', "a\n\nb"])
def test_ollama_reads_the_quotes_of_a_system_message(tokenizer, system):
    assert (
        as_ollama_reads(modelfile("m.gguf", tokenizer, system, [2], {}, False))["SYSTEM"] == system
    )


@pytest.mark.parametrize("system", ['"""\na\n"""\nb', 'Quote by """ \r\nalways.'])
def test_a_system_message_that_ollama_would_cut_is_left_out_with_a_comment(tokenizer, system):
    text = modelfile("m.gguf", tokenizer, system, [2], {}, False)
    assert "# No SYSTEM: a line of the system message ends in three quotes" in text
    assert "SYSTEM" not in as_ollama_reads(text)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, ["temperature 0", "repeat_penalty 1"]),
        # As Llama 3.2 is published: `generate` samples by these.
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            ["temperature 0.6", "top_k 50", "top_p 0.9", "min_p 0", "repeat_penalty 1"],
        ),
        # Qwen2.5 is published with a penalty; `generate` applies it to the whole text.
        (
            {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.05},
            ["temperature 0", "repeat_penalty 1.05", "repeat_last_n -1"],
        ),
    ],
)
def test_ollama_picks_tokens_as_generate_does(tokenizer, generation, expected):
    """Its own defaults are temperature 0.8 and a penalty of 1.1 on repetition."""
    from transformers import GenerationConfig

    contents = json.loads(GenerationConfig(**generation).to_json_string())
    assert sampling(contents) == sampling(generation)
    text = modelfile("m.gguf", tokenizer, None, [2], sampling(contents), adds_bos=False)
    assert text.splitlines()[-len(expected) :] == [f"PARAMETER {line}" for line in expected]
