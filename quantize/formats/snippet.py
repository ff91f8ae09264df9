"""Parts that the formats' snippets on the model card share."""

from __future__ import annotations

from importlib.metadata import requires


def pip_install(*packages: str) -> str:
    """Writes the command, with the versions of the packages that finequant itself requires."""
    from packaging.requirements import Requirement

    known = {entry.name: entry.specifier for entry in map(Requirement, requires("finequant"))}
    return "pip install " + " ".join(f'"{name}{known[name]}"' for name in packages)


def is_chat(text: str) -> bool:
    """Says whether Python sets `messages`; a model without a chat template has a `prompt`."""
    return text.startswith("messages")


def transformers_code(repository: str, chat: str, model: str) -> str:
    """Writes Python that answers a chat with plain transformers.

    chat: Python that sets `messages` or, for a model that has no chat template, `prompt`.
    model: a Python expression that loads the model, with {} in place of the repository's name.
    """
    inputs = 'inputs = tokenizer(prompt, return_tensors="pt")'
    if is_chat(chat):
        inputs = """\
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repository}")
model = {model.format(repository)}
{chat}
{inputs}
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def fenced(language: str, text: str) -> str:
    """Makes a block of code in Markdown."""
    return f"```{language}\n{text}\n```"
