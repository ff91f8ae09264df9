"""Runs an ONNX export in plain onnxruntime: FOLDER JOB"""

from pathlib import Path

import client
import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class OnnxRuntime(client.SteppedClient):
    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        (file,) = folder.glob("*.onnx")
        self._session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        self._cache = {
            item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
            for item in self._session.get_inputs()
            if item.name.startswith("past_key_values")
        }

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def step(self, ids: list[int], start: int) -> np.ndarray:
        mask = np.ones((1, start + len(ids)), np.int64)
        inputs = {"input_ids": np.array([ids], np.int64), "attention_mask": mask}
        past = {name: cache[:, :, :start] for name, cache in self._cache.items()}
        logits, *present = self._session.run(None, inputs | past)
        self._cache = dict(zip(self._cache, present, strict=True))
        return logits[0, -1]


client.run(OnnxRuntime)
