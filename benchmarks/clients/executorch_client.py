"""Runs a .pte in ExecuTorch's runtime, with the tokenizer of its runner: FOLDER JOB"""

from pathlib import Path

import client
import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  # registers operators
import numpy as np
import torch
from executorch.runtime import Runtime
from pytorch_tokenizers import CppHFTokenizer


class ExecuTorch(client.SteppedClient):
    def __init__(self, folder: Path) -> None:
        self._tokenizer = CppHFTokenizer()
        self._tokenizer.load(str(folder / "tokenizer.json"))
        (file,) = folder.glob("*.pte")
        self._program = Runtime.get().load_program(str(file))
        self._forward = self._program.load_method("forward")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, 0, 0)

    def step(self, ids: list[int], start: int) -> np.ndarray:
        (logits,) = self._forward.execute([torch.tensor([ids]), torch.tensor([start])])
        return logits[0].numpy().copy()


client.run(ExecuTorch)
