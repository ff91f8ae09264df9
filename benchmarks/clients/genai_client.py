"""Runs an ONNX export in onnxruntime-genai: FOLDER JOB"""

import json
from pathlib import Path

import client
import numpy as np
import onnxruntime_genai as og


class Genai:
    def __init__(self, folder: Path) -> None:
        self._model = og.Model(str(folder))
        self._tokenizer = og.Tokenizer(self._model)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode(self._tokenizer.apply_chat_template(json.dumps(messages)))

    def answer(self, prompt: list[int], limit: int):
        generator = self._read(prompt, limit)
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def last_logits(self, ids: list[int]) -> np.ndarray:
        logits = self._read(ids, 1).get_logits()
        return logits.reshape(-1, logits.shape[-1])[-1]

    def _read(self, ids: list[int], limit: int) -> og.Generator:
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(ids) + limit, do_sample=False)
        generator = og.Generator(self._model, parameters)
        generator.append_tokens(np.array([ids], np.int32))
        return generator


client.run(Genai)
