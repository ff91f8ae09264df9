"""Finds the tokens that end an answer: the chat template decides, and training, evaluation, chat
and every artifact follow it.
"""

from __future__ import annotations

import copy
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finequant.recipes.schema import Data, Model

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

QUESTION, ANSWER = "question", "finequant answers"
DATE = {"date_string": "26 Jul 2024"}
"""The variable by which the templates of Llama 3 take a date, and the one that they write if the
program that renders them knows none."""

CONSTANTS = {"true", "false", "none", "True", "False", "None"}
NOT_VARIABLES = CONSTANTS | {"and", "or", "not", "in", "is", "if", "else"}
"""Words of Jinja that are no names of variables."""


class AnswerEnd(NamedTuple):
    """The text that a chat template writes after an answer."""

    written: str
    """All of it, such as `<|im_end|>` and a line break."""
    token: str | None
    """The token in it that ends an answer; None where it is plain text, or nothing."""
    id: int | None


def answer_end(tokenizer: PreTrainedTokenizerBase, data: Data) -> AnswerEnd:
    """Finds the first added token, or EOS, that the chat template writes after an answer.

    What follows that token is never generated: generation stops there.
    """
    arguments = json.dumps([data.system, data.template_arguments], default=str)
    template = json.dumps(tokenizer.chat_template)
    return _answer_end(tokenizer, template, tokenizer.eos_token, arguments)


@lru_cache(maxsize=16)
def _answer_end(
    tokenizer: PreTrainedTokenizerBase, template: str, eos: str | None, arguments: str
) -> AnswerEnd:
    """template, eos: the tokenizer's, as cache keys: they may change while the object stays."""
    system, variables = json.loads(arguments)
    text = _rendered(tokenizer, system, variables, turns=1)
    written = text.rpartition(ANSWER)[2] if ANSWER in text else ""
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    end = next((token for token in ids if token in added or token == tokenizer.eos_token_id), None)
    return AnswerEnd(written, None if end is None else tokenizer.decode([end]), end)


def template_notes(tokenizer: PreTrainedTokenizerBase, data: Data) -> list[str]:
    """Returns warnings about the chat template and the recipe's variables for it."""
    notes = date_note(tokenizer, data), unread_note(tokenizer, data)
    return [note for note in notes if note]


def date_note(tokenizer: PreTrainedTokenizerBase, data: Data) -> str | None:
    """Returns a warning if the chat template writes today's date; None if it does not."""
    if not _writes_today(tokenizer, data):
        return None
    arguments = ", ".join(f"{name}: {value}" for name, value in DATE.items())
    fixed = f"set data.template_arguments={{{arguments}}}"
    return (
        "the chat template writes today's date: tomorrow, the same rows become other tokens, and "
        "measurements of both days do not compare the same prompts; "
        + (fixed if takes_date(tokenizer, data) else "set model.chat_template to one without it")
    )


def unread_note(tokenizer: PreTrainedTokenizerBase, data: Data) -> str | None:
    """Returns a warning if the chat template lacks a variable that the recipe sets, perhaps because
    its name is misspelled; None if it has all of them."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    unread = [name for name in data.template_arguments if name not in words]
    if not unread:
        return None
    return f"data.template_arguments: the chat template has no variable {', '.join(unread)}"


def takes_date(tokenizer: PreTrainedTokenizerBase, data: Data) -> bool:
    """Says whether the chat template writes today's date unless DATE is among its variables."""
    dated = data.model_copy(update={"template_arguments": data.template_arguments | DATE})
    return _writes_today(tokenizer, data) and not _writes_today(tokenizer, dated)


def _writes_today(tokenizer: PreTrainedTokenizerBase, data: Data) -> bool:
    """Compares conversations that are rendered with two different clocks."""
    template = tokenizer.chat_template
    named = template if isinstance(template, dict) else {"default": template}
    # With tools, transformers renders the second if there is one; it renders no others by itself.
    return any(
        _with_clock(tokenizer, data, named[name], "Monday")
        != _with_clock(tokenizer, data, named[name], "Tuesday")
        for name in named.keys() & {"default", "tool_use"}
    )


def _with_clock(tokenizer: PreTrainedTokenizerBase, data: Data, template: str, day: str) -> str:
    clock = f"{{% macro strftime_now(format) %}}{day} {{{{ format }}}}{{% endmacro %}}{template}"
    return _rendered(tokenizer, data.system, data.template_arguments | {"chat_template": clock}, 1)


def end_tokens(model: Model, data: Data, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids at which generation stops, the end of an answer first.

    The others come from the base's generation_config.json, config.json and tokenizer. A Llama 3
    that ends answers in <|eot_id|> also stops at <|end_of_text|> and <|eom_id|>.
    """
    from finequant.finetune.model import load_config, load_generation_config

    ends = [answer_end(tokenizer, data).id]
    for configured in (load_generation_config(model), load_config(model), tokenizer):
        ends += _as_list(configured.eos_token_id)
    return [end for end in dict.fromkeys(ends) if end is not None and end >= 0]


def generation_config(
    model: Model, data: Data, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Returns the base's generation configuration, extended by every end token."""
    from finequant.finetune.model import load_generation_config

    config = load_generation_config(model)
    config.eos_token_id = as_configured(end_tokens(model, data, tokenizer))
    config._from_model_config = False  # else `generate` may take config.json's again
    return config


def stop_at(model: PreTrainedModel, ends: list[int]) -> None:
    """Makes `generate` stop at these tokens."""
    model.generation_config.eos_token_id = ends or None


def configured_ends(generation: GenerationConfig) -> list[int]:
    """Returns the ids at which `generate` stops."""
    return _as_list(generation.eos_token_id)


def repetition_penalty(generation: GenerationConfig) -> float:
    """Returns the number by which `generate` divides the logits of tokens that occurred."""
    return float(generation.repetition_penalty or 1.0)  # the file may say null, or 1


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list) else [ids]


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Returns the generated ids before the first end token."""
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


def as_generated(answer: str, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> str:
    """Returns an answer up to the first end token in its text, where generation stops; one that
    begins with an end token is returned as it is."""
    added, before = tokenizer.added_tokens_decoder, answer
    for end in filter(added.__contains__, ends):
        before = before.partition(added[end].content)[0]
    return before if before.strip() else answer


def as_configured(ends: list[int]) -> int | list[int] | None:
    """Returns end tokens as configurations write them: a single one without a list."""
    return ends[0] if len(ends) == 1 else ends or None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, data: Data, folder: Path) -> None:
    """Saves the tokenizer of a model that was trained on `data`.

    The token that ends an answer becomes the EOS, for programs that only stop at the tokenizer's
    EOS, unless texts or conversations would then be tokenized differently. The chat template gets
    `data.template_arguments` as defaults, because other programs render prompts without them.
    """
    end = answer_end(tokenizer, data)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = _with_defaults(tokenizer.chat_template, data.template_arguments)
    saved = copy.deepcopy(tokenizer)
    if end.token and end.id != tokenizer.eos_token_id:
        saved.eos_token = end.token
        if _samples(saved, data) != _samples(tokenizer, data):
            saved = tokenizer
    saved.save_pretrained(folder)
    _help_other_readers(folder / "tokenizer_config.json")


def _with_defaults(template: Any, arguments: dict[str, Any]) -> Any:
    """Puts assignments in front of a chat template, or of each of several in a mapping by name."""
    if isinstance(template, dict):
        return {name: _with_defaults(text, arguments) for name, text in template.items()}
    if not template:
        return template
    defaults = "".join(
        f"{{% if {key} is not defined %}}{{% set {key} = {_literal(value)} %}}{{% endif %}}"
        for key, value in arguments.items()
        if key.isidentifier() and key not in NOT_VARIABLES  # a template can name no other
    )
    # Templates are rendered with trim_blocks: the line break after a tag is not written.
    return f"{defaults}\n{template}" if defaults else template


def _literal(value: Any) -> str:
    """Writes a value of a recipe as Jinja does: JSON, but for the name of nothing."""
    if isinstance(value, dict):
        entries = (f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items())
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list):
        return f"[{', '.join(_literal(item) for item in value)}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _help_other_readers(file: Path) -> None:
    """Adds what transformers 4 and transformers.js look for: a known class, and the template."""
    config, template = json.loads(file.read_text("utf-8")), file.with_name("chat_template.jinja")
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name since transformers 5
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template.exists():
        files = sorted(file.with_name("additional_chat_templates").glob("*.jinja"))
        named = [{"name": path.stem, "template": path.read_text("utf-8")} for path in files]
        default = template.read_text("utf-8")
        named.insert(0, {"name": "default", "template": default})
        config["chat_template"] = named if files else default
    for key in ("is_local", "local_files_only"):  # they describe this machine
        config.pop(key, None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _samples(tokenizer: PreTrainedTokenizerBase, data: Data) -> list[list[int]]:
    """Returns the ids of a text and of conversations, by which tokenizers are compared."""
    texts = [_rendered(tokenizer, data.system, data.template_arguments, turns) for turns in (1, 2)]
    return [tokenizer(text)["input_ids"] for text in (QUESTION, *texts)]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, system: str | None, arguments: dict[str, Any], turns: int
) -> str:
    """Renders a conversation; empty if the chat template refuses it."""
    messages = [{"role": "system", "content": system}] if system else []
    for _ in range(turns):
        messages += [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    # A template is a program. If it also refuses rows, the error comes when they are rendered.
    except Exception:
        return ""
