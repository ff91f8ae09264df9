"""Runs an MLX export in mlx-lm: FOLDER JOB"""

from pathlib import Path

import client
import mlx.core as mx
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step


class MlxLm:
    def __init__(self, folder: Path) -> None:
        self._model, self._tokenizer = load(str(folder))
        if not mx.metal.is_available():  # on a CPU, bfloat16 is slow and inaccurate
            self._model.set_dtype(mx.float32)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )

    def answer(self, prompt: list[int], limit: int):
        for token, _ in generate_step(mx.array(prompt), self._model, max_tokens=limit):
            yield int(token)

    def last_logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self._model(mx.array([ids]))[0, -1].astype(mx.float32))


client.run(MlxLm)
