"""Defines a format. Each file here fills in a `Format`, which formats.py lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    import torch

    from finequant.quantize.checkpoint.stored import QuantizedCheckpoint
    from finequant.quantize.formats.contents import Contents
    from finequant.quantize.rounding import Rounded
    from finequant.recipes.schema import Recipe

CONTEXT = 2048
"""Tokens that a runtime's cache holds unless more are asked for."""


class Runtime(Protocol):
    """An exported model, loaded: one sequence at a time, which the runtime's cache remembers."""

    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """float32 [vocabulary] after the last of `ids`, the first of which is at `start`."""
        ...


def by_transformers(folder: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, special tokens among them, by the tokenizer in an export's folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Format:
    """All that the stages have to know of a format."""

    name: str
    """In `quantize.exports`, in the manifest, and of the folder in exports/."""

    report_key: str
    """Key of the format's column in report.json; `finequant chat --model` also takes it."""

    packages: Mapping[str, str]
    """To write it and read it back: module -> what pip installs."""

    check_fits: Callable[[Contents], None]
    """Raises a UserError for contents that the format cannot hold, before anything is trained."""

    write: Callable[[QuantizedCheckpoint, Path, Recipe], dict[str, Any]]
    """Writes an export into an empty folder, and returns figures for the manifest."""

    read_back: Callable[
        [Path, QuantizedCheckpoint], tuple[dict[str, Rounded], dict[str, torch.Tensor] | None]
    ]
    """Codes and scales by layer, and what stayed in float by parameter, as the format's own package
    reads them from the folder; None for floats that it cannot name."""

    last_logits: Callable[[Path, list[list[int]]], torch.Tensor]
    """[prompts, vocabulary] after the last token of each prompt, by a program that is not ours."""

    snippet: Callable[[str, str, list[str]], str]
    """Markdown for the model card that says how to load it: of the repository's name, Python that
    sets `messages`, and the export's files in the repository."""

    weights: str = "model*"
    """Pattern of the files in the folder that hold the model: what its size is of."""

    token_ids: Callable[[Path, list[str]], list[list[int]]] = by_transformers
    """Token ids of texts, special tokens among them, as the format's reader cuts them."""

    runtime: Callable[[Path, int], Runtime] | None = None
    """Opens the export in a folder, with a cache of so many tokens."""

    runtime_packages: Mapping[str, str] = field(default_factory=dict)
    """For `runtime`, as in `packages`."""

    activations: str = "int8"
    """What the linear layers' inputs are rounded to there, for the report: `int8` (a scale a token,
    as quantized/ does), `int8 in blocks of 32` or `float`."""

    is_checkpoint: bool = False
    """Whether plain `from_pretrained` loads it. Then it is evaluated as quantized/ is, with lm-eval
    tasks, and `finequant chat` leaves it to quantized/."""

    def size(self, folder: Path) -> int:
        """Counts the bytes of the model's files in the folder."""
        return sum(file.stat().st_size for file in folder.glob(self.weights))

    def missing_runtime(self) -> str | None:
        """Why `open_runtime` cannot open an export here; None where it can."""
        if self.runtime is None:
            return "no runtime is known here"
        return to_install(self.runtime_packages)

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
