"""Exported models in the runtimes they are made for: token ids in, logits out."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

CONTEXT = 2048
"""Tokens of llama.cpp's cache, where nobody asks for more; that of a .pte is in the file."""

NEEDS = {
    "gguf": ("llama_cpp", "llama-cpp-python"),
    "executorch": ("executorch", "'finequant[executorch]'"),
    "compressed-tensors": ("compressed_tensors", "'finequant[compressed-tensors]'"),
}


class Runtime(Protocol):
    """One sequence at a time, which the runtime's cache remembers."""

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """float32 [vocabulary] after the last of `ids`, the first of which is at `start`."""


def why_not(name: str) -> str | None:
    """What to install before `open_runtime` can open a format; None where it can."""
    package, wheel = NEEDS[name]
    return None if find_spec(package) else f"pip install {wheel}"


def open_runtime(name: str, folder: Path, context: int = CONTEXT) -> Runtime:
    """The export in `folder`, loaded.

    context: tokens that llama.cpp's cache has to hold.
    """
    if name == "gguf":
        return LlamaCpp(folder / "model.gguf", context)
    return ExecuTorch(folder / "model.pte") if name == "executorch" else Transformers(folder)


class ExecuTorch:
    """A .pte in ExecuTorch's runtime on the CPU."""

    def __init__(self, file: Path) -> None:
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  # its operators
        from executorch.runtime import Runtime as Engine

        self._program = Engine.get().load_program(str(file))
        self._forward = self._program.load_method("forward")

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        (logits,) = self._forward.execute([torch.tensor([ids]), torch.tensor([start])])
        return logits[0].clone()  # the runtime reuses its memory

    def metadata(self, name: str) -> list[int | bool]:
        """What the program answers to ExecuTorch's LLM runner, such as `get_eos_ids`."""
        return list(self._program.load_method(name).execute([]))


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, context: int = CONTEXT) -> None:
        from llama_cpp import Llama, llama_get_logits_ith

        threads = torch.get_num_threads()
        self._model = Llama(
            str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._logits = llama_get_logits_ith

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        self._model.n_tokens = start  # what comes later in its cache is dropped
        self._model.eval(ids)
        found = np.ctypeslib.as_array(self._logits(self._model.ctx, -1), (self._model.n_vocab(),))
        return torch.from_numpy(found.copy())  # llama.cpp reuses its memory


class Transformers:
    """A checkpoint that plain from_pretrained loads."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._cache = DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        if beyond := self._cache.get_seq_length() - start:
            self._cache.crop(-beyond)
        output = self._model(
            torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1].float()
