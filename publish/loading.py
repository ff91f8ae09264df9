"""Writes how to load the published model: a few lines of code for each format."""

from __future__ import annotations

import json
from typing import Any

from finequant.quantize.formats.snippet import fenced, pip_install, transformers_code
from finequant.recipes.schema import Recipe

ADAPTER = "adapter"
QUANTIZED = "quantized"
CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
TEMPLATE = "chat_template.jinja"
"""The file of a chat template, without which a model only continues a prompt."""


def loading(recipe: Recipe, report: dict[str, Any], kind: str, files: list[str]) -> str:
    """Writes a snippet for each format in the repository."""
    repository = recipe.publish.repo_id or "your-name/your-model"
    chat = _chat(recipe, report, files)
    if kind == ADAPTER:
        base = json.dumps(base_on_hub(recipe))
        # The base's own generation configuration may lack the token that ends an answer.
        model = (
            f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "{{0}}")\n'
            'model.generation_config = GenerationConfig.from_pretrained("{0}")'
        )
        code = "from peft import PeftModel\nfrom transformers import GenerationConfig\n"
        code += transformers_code(repository, chat, model)
        return f"`{pip_install('transformers', 'peft')}`\n\n{fenced('python', code)}"
    from finequant.quantize.formats.formats import FORMATS  # which imports torch

    plain = 'AutoModelForCausalLM.from_pretrained("{}")'
    parts = [
        f"### transformers, with torchao\n\n`{pip_install('torch', 'transformers', 'torchao')}`\n\n"
        + fenced("python", transformers_code(repository, chat, plain))
    ]
    for entry in FORMATS.values():
        if exported := [file for file in files if file.startswith(f"{entry.name}/")]:
            parts.append(entry.snippet(repository, chat, exported))
    return "\n\n".join(parts)


def _chat(recipe: Recipe, report: dict[str, Any], files: list[str]) -> str:
    """Writes a conversation to try, in Python: the recipe's system message, a held-out prompt; only
    a prompt if the model has no chat template."""
    if TEMPLATE not in files:
        return 'prompt = "Hello!"'
    samples = report.get("samples") or [{"prompt": "Hello!"}]
    messages = [{"role": "user", "content": samples[0]["prompt"]}]
    if recipe.data.system:
        messages.insert(0, {"role": "system", "content": recipe.data.system})
    lines = "".join(f"    {json.dumps(message, ensure_ascii=False)},\n" for message in messages)
    return f"messages = [\n{lines}]"


def base_on_hub(recipe: Recipe) -> str | None:
    """Returns the base's Hub id; None if it is local and the recipe gives none."""
    return recipe.publish.base_model or (recipe.model.base if on_hub(recipe.model.base) else None)


def on_hub(name: str) -> bool:
    """Says whether a name is org/name; local paths have lost their folder by now."""
    return name.count("/") == 1 and not name.startswith("package:")
