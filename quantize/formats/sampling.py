"""How tokens are picked, for runtimes that read it from an export and have defaults of their own.

llama.cpp and Ollama would sample at temperature 0.8, and Ollama would penalize repetition by 1.1.
"""

from __future__ import annotations

from typing import Any


def sampling(generation: dict[str, Any]) -> dict[str, float]:
    """Returns the settings with which plain `generate` picks tokens, by Ollama's names.

    Temperature 0 takes the most likely token; `repeat_last_n` -1 penalizes all tokens before.

    generation: the contents of generation_config.json; what it leaves out has transformers' value.
    """

    def setting(name: str, default: float) -> float:
        return default if generation.get(name) is None else generation[name]

    settings: dict[str, float] = {"temperature": 0}
    if setting("do_sample", False):
        settings = {
            "temperature": setting("temperature", 1.0),
            "top_k": setting("top_k", 50),
            "top_p": setting("top_p", 1.0),
            "min_p": setting("min_p", 0.0),
        }
    penalty = setting("repetition_penalty", 1.0)
    return settings | {"repeat_penalty": penalty} | ({"repeat_last_n": -1} if penalty != 1 else {})
