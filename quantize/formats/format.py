"""Defines the interface of a format: each has a file here that sets FORMAT, and an entry in
formats.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finequant.recipes.artifact import files_in
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    import torch

    from finequant.quantize.checkpoint.stored import QuantizedCheckpoint
    from finequant.quantize.formats.contents import Contents
    from finequant.quantize.rounding import Rounded
    from finequant.recipes.schema import Recipe

CONTEXT = 2048
"""Tokens that a runtime's cache holds unless more are asked for."""

NOT_KEPT = "the file is not kept: install the versions in constraints.txt, and export again"
"""Ends the message about a file whose content differs from quantized/."""


class Runtime(Protocol):
    """An exported model in memory, with a cache of one sequence."""

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """Returns float32 logits [vocabulary] after the last of `ids`, whose first is at position
        `start`."""
        ...


def by_transformers(folder: Path, texts: list[str]) -> list[list[int]]:
    """Tokenizes texts, in which special tokens count as such, with the export's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Format:
    """Everything that the stages have to know about a format."""

    name: str
    """Its name in `quantize.exports`, in the manifest, and in exports/."""

    report_key: str
    """Key of the format's column in report.json; `finequant chat --model` also takes it."""

    packages: Mapping[str, str]
    """Packages that write it and read it back: module -> what pip installs."""

    check_fits: Callable[[Contents], None]
    """Raises a UserError for contents that the format cannot hold, before anything is trained."""

    write: Callable[[QuantizedCheckpoint, Path, Recipe], dict[str, Any]]
    """Writes an export into an empty folder, and returns figures for the manifest."""

    read_back: Callable[[Path, QuantizedCheckpoint], Iterable[tuple[str, Rounded | torch.Tensor]]]
    """Yields codes and scales by layer, and float tensors by parameter, as the format's own package
    reads them from the folder. As few as possible are in memory at a time."""

    snippet: Callable[[str, str, list[str]], str]
    """Writes Markdown for the model card on how to load it, given the repository's name, Python
    that sets `messages`, and the export's files in the repository."""

    bytes_per_weight: float
    """Memory that an export takes: bytes for each weight of the base, apart from the process itself
    and pages of mapped files (`benchmarks/memory.py --only export`)."""

    weights: str = "model*"
    """Pattern of the files in the folder that hold the model and make up its size."""

    names_floats: bool = True
    """Whether the file names embedding and float tensors; if not, `read_back` skips them."""

    token_ids: Callable[[Path, list[str]], list[list[int]]] = by_transformers
    """Tokenizes texts, in which special tokens count as such, like the format's reader."""

    runtime: Callable[[Path, int], Runtime] | None = None
    """Opens the export in a folder, with a cache of so many tokens."""

    runtime_packages: Mapping[str, str] = field(default_factory=dict)
    """Packages that `runtime` needs, in the form of `packages`."""

    last_logits: Callable[[Path, list[list[int]]], torch.Tensor] | None = None
    """Computes what `logits` does where the runtime is not installed."""

    activations: str = "int8"
    """How the runtime rounds the linear layers' inputs, for the report: `int8` (one scale per
    token, as in quantized/), `int8 in blocks`, `int8 in blocks of 32` or `float`."""

    ignores_penalty: str = ""
    """The program of `snippet`, if it does not read `repetition_penalty` of
    generation_config.json, with which all models are measured."""

    is_checkpoint: bool = False
    """Whether plain `from_pretrained` loads it. If so, it is evaluated like quantized/, lm-eval
    tasks included, and `finequant chat` offers quantized/ instead."""

    def size(self, folder: Path) -> int:
        """Counts the bytes of the model's files in the folder."""
        return sum(file.stat().st_size for file in files_in(folder, self.weights))

    def missing_runtime(self) -> str | None:
        """Says why `open_runtime` cannot open an export here; None if it can."""
        if self.runtime is None:
            return "no runtime is known here"
        return to_install(self.runtime_packages)

    def runtime_versions(self) -> dict[str, str | None]:
        """Returns the version of each package that `runtime` needs, None for a missing one."""
        known = packages_distributions()
        return {
            module: version(known[module][0]) if module in known else None
            for module in self.runtime_packages
        }

    def logits(self, folder: Path, prompts: list[list[int]]) -> torch.Tensor:
        """Computes logits [prompts, vocabulary] after the last token of each prompt, with code that
        is not ours."""
        import torch

        if self.last_logits and self.missing_runtime():
            return self.last_logits(folder, prompts)
        runtime = self.open_runtime(folder)
        return torch.stack([runtime.last_logits(prompt) for prompt in prompts])

    def open_runtime(self, folder: Path, context: int = CONTEXT) -> Runtime:
        """Loads the export in `folder`.

        context: tokens that the cache has to hold, where the file does not set that itself.

        Raises:
            UserError: if no runtime is known.
        """
        if self.runtime is None:
            raise UserError(f"{self.name}: {self.missing_runtime()}")
        return self.runtime(folder, context)


def to_install(packages: Mapping[str, str]) -> str | None:
    """Returns the command that installs missing packages; None if none is missing.

    packages: module -> what pip installs.
    """
    missing = [wheel for module, wheel in packages.items() if not find_spec(module)]
    return f"pip install {' '.join(missing)}" if missing else None
