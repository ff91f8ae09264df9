"""Runs a checkpoint, torchao's or compressed-tensors', in plain transformers: FOLDER JOB"""

from pathlib import Path

import client
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


class Transformers(client.SteppedClient):
    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._cache = DynamicCache(config=self._model.config)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )

    @torch.inference_mode()
    def step(self, ids: list[int], start: int) -> np.ndarray:
        if start == 0:
            self._cache = DynamicCache(config=self._model.config)
        # By position: transformers 5.24 renamed the argument, and 5.40 drops the earlier name.
        output = self._model(
            torch.tensor([ids]), None, None, self._cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1].float().numpy()


client.run(Transformers)
