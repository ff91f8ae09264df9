"""Chat templates for programs that do not trim: transformers leaves out a line break after a tag of
Jinja, and blanks before one, but onnxruntime-genai 0.18 writes them. To be removed once it trims
(trim_blocks and lstrip_blocks of https://jinja.palletsprojects.com/en/stable/api/)."""

from __future__ import annotations

import json
from pathlib import Path

LINE_BREAK = "{{ '\\n' }}"
TRIMMED = ("block_end", "comment_end", "raw_end")
"""Jinja's tokens that include the line break which is left out after them."""


def rewrite_templates(folder: Path) -> None:
    """Rewrites every chat template in a folder by `untrimmed`."""
    for file in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
        file.write_text(untrimmed(file.read_text(encoding="utf-8")), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    template = config.get("chat_template")
    if isinstance(template, str):
        config["chat_template"] = untrimmed(template)
    for named in template if isinstance(template, list) else []:
        named["template"] = untrimmed(named["template"])
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def untrimmed(template: str) -> str:
    """Returns a template that renders equally whether tags are trimmed or not, to what `template`
    renders to if they are."""
    from jinja2 import Environment

    written, before = "", ""
    for _, kind, text in Environment(trim_blocks=True, lstrip_blocks=True).lex(template):
        if kind == "data" and before in TRIMMED and text.startswith("\n"):
            text = LINE_BREAK + text[1:]  # it follows one that was left out, and is to stay
        elif kind in (*TRIMMED, "raw_begin", "variable_end"):
            text = text.rstrip()
        written, before = written + text, kind
    # Jinja leaves out a line break at the end, too.
    return written[:-1] + LINE_BREAK if written.endswith("\n") else written
