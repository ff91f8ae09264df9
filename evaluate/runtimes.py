"""Exported models in the runtimes they are made for: token ids in, logits out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, context: int = 2048) -> None:
        from llama_cpp import Llama

        self._model = Llama(str(file), n_ctx=context, logits_all=True, verbose=False)

    def logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """float32 [tokens, vocabulary] of `ids`, which come at position `start`."""
        self._model.n_tokens = start  # what comes later in the cache is dropped
        self._model.eval(ids)
        return torch.from_numpy(np.array(self._model.scores[start : start + len(ids)]))
