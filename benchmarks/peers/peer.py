"""The code that the peers' scripts share: the job, seconds and memory of the work, the answer."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


class Peer:
    """One quantization: `python SCRIPT job.json model` writes the folder `model`."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        self.settings: dict[str, Any] = self.job["settings"]
        self.folder = Path(sys.argv[2])
        self.sequences = torch.tensor(self.job["calibration"])  # token ids [rows, length]
        self.figures: dict[str, float] = {}

    def load(self) -> PreTrainedModel:
        """Loads the base and unties its head, so that the head can be quantized."""
        model = AutoModelForCausalLM.from_pretrained(self.job["base"], dtype=torch.float32).eval()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    def untied(self) -> Path:
        """Writes the base with an untied head, for tools that read a folder."""
        folder = self.folder.with_name("untied")
        self.load().save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.job["base"]).save_pretrained(folder)
        return folder

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Times the work of quantizing; memory is the peak of the whole process until its end."""
        started = time.monotonic()
        yield
        self.figures["seconds"] = time.monotonic() - started
        # Linux counts KiB, macOS bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        self.figures["peak_bytes"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def answer(self, linear: float, head: float, embedding: float = 16) -> None:
        """Prints the figures, and the bits per weight of each kind, scales included."""
        print(json.dumps({**self.figures, "linear": linear, "head": head, "embedding": embedding}))
