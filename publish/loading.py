"""How to load what is published: a few lines of code for each format."""

from __future__ import annotations

import json
from typing import Any

from finequant.recipes.schema import Recipe

ADAPTER = "adapter"
QUANTIZED = "quantized"


def loading(recipe: Recipe, report: dict[str, Any], kind: str, files: list[str]) -> str:
    """A snippet for each format that is in the repository."""
    repository = recipe.publish.repo_id or "your-name/your-model"
    chat = _chat(recipe, report)
    if kind == ADAPTER:
        base = json.dumps(base_on_hub(recipe))
        # The base's own generation configuration need not name the token that ends an answer.
        model = (
            f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "{{0}}")\n'
            'model.generation_config = GenerationConfig.from_pretrained("{0}")'
        )
        code = "from peft import PeftModel\nfrom transformers import GenerationConfig\n"
        code += _transformers(repository, chat, model)
        return f"`pip install transformers peft`\n\n{fenced('python', code)}"
    plain = 'AutoModelForCausalLM.from_pretrained("{}")'
    parts = [
        "### transformers, with torchao\n\n`pip install transformers torchao`\n\n"
        + fenced("python", _transformers(repository, chat, plain))
    ]
    names = {name: [f for f in files if f.startswith(f"{name}/")] for name in EXPORTS}
    parts += [EXPORTS[name](repository, chat, found) for name, found in names.items() if found]
    return "\n\n".join(parts)


def _chat(recipe: Recipe, report: dict[str, Any]) -> str:
    """A conversation to try, as Python: the system message of the training rows and a prompt."""
    samples = report.get("samples") or [{"prompt": "Hello!"}]
    messages = [{"role": "user", "content": samples[0]["prompt"]}]
    if recipe.data.system:
        messages.insert(0, {"role": "system", "content": recipe.data.system})
    lines = "".join(f"    {json.dumps(message, ensure_ascii=False)},\n" for message in messages)
    return f"messages = [\n{lines}]"


def _transformers(repository: str, chat: str, model: str) -> str:
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = {model.format(repository)}
{chat}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _compressed_tensors(repository: str, chat: str, files: list[str]) -> str:
    model = 'AutoModelForCausalLM.from_pretrained("{}", subfolder="compressed-tensors")'
    return (
        "### compressed-tensors, 4 bits on disk\n\n`pip install transformers compressed-tensors`"
        f"\n\n{fenced('python', _transformers(repository, chat, model))}\n\n"
        "The layout is the one that vLLM documents as INT8 W4A8:\n\n"
        + fenced(
            "bash",
            f'hf download {repository} --include "compressed-tensors/*" --local-dir model\n'
            "vllm serve model/compressed-tensors",
        )
    )


def _gguf(repository: str, chat: str, files: list[str]) -> str:
    file = next(name for name in files if name.endswith(".gguf"))
    code = f"""\
from llama_cpp import Llama

model = Llama.from_pretrained("{repository}", filename="{file}", verbose=False)
{chat}
answer = model.create_chat_completion(messages, max_tokens=64, temperature=0)
print(answer["choices"][0]["message"]["content"])"""
    return f"### llama.cpp\n\n`pip install llama-cpp-python`\n\n{fenced('python', code)}"


def _executorch(repository: str, chat: str, files: list[str]) -> str:
    listed = ", ".join(f"`{file}`" for file in files)
    return (
        "### ExecuTorch\n\n"
        + fenced("bash", f'hf download {repository} --include "executorch/*" --local-dir model')
        + f"\n\n{listed}: for ExecuTorch's LLM runner and its demo apps for Android and iOS."
    )


EXPORTS = {"compressed-tensors": _compressed_tensors, "gguf": _gguf, "executorch": _executorch}


def base_on_hub(recipe: Recipe) -> str | None:
    """The Hub's name of the base; None where it is local and the recipe names none."""
    return recipe.publish.base_model or (recipe.model.base if on_hub(recipe.model.base) else None)


def on_hub(name: str) -> bool:
    """Whether a name is org/name; local paths are names without a folder by now."""
    return name.count("/") == 1 and not name.startswith("package:")


def fenced(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"
