"""Exported models in the runtimes they are made for: token ids in, logits out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


class ExecuTorch:
    """A .pte in ExecuTorch's runtime on the CPU, one sequence at a time."""

    def __init__(self, file: Path) -> None:
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  # its operators
        from executorch.runtime import Runtime

        self._program = Runtime.get().load_program(str(file))
        self._forward = self._program.load_method("forward")

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """float32 [vocabulary] after the last of `ids`, the first of which is at `start`."""
        (logits,) = self._forward.execute([torch.tensor([ids]), torch.tensor([start])])
        return logits[0].clone()  # the runtime reuses its memory


class LlamaCpp:
    """A GGUF file in llama.cpp, one sequence at a time."""

    def __init__(self, file: Path, context: int = 2048) -> None:
        from llama_cpp import Llama

        self._model = Llama(str(file), n_ctx=context, verbose=False)

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """float32 [vocabulary] after the last of `ids`, the first of which is at `start`."""
        self._model.n_tokens = start  # what comes later in its cache is dropped
        self._model.eval(ids)
        return torch.from_numpy(np.array(self._model.scores[start + len(ids) - 1]))
