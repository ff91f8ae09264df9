"""The code that the clients in Python share; clients.py copies it beside each of them."""

from __future__ import annotations

import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np


class Client(Protocol):
    """An export in somebody else's program."""

    def encode(self, text: str) -> list[int]:
        """Returns token ids; special tokens in the text get their own ids."""
        ...

    def prompt(self, messages: list[dict[str, str]]) -> list[int] | None:
        """Returns token ids by the program's own chat template; None if it has none."""
        ...

    def answer(self, prompt: list[int], limit: int) -> Iterator[int]:
        """Yields greedy tokens after the prompt; the time of the first includes the prompt."""
        ...

    def last_logits(self, ids: list[int]) -> np.ndarray:
        """Returns float32 logits [vocabulary] after the last of `ids`."""
        ...


class WithoutFinequant(MetaPathFinder):
    """Hides finequant where a client runs in the project's environment."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "finequant":
            raise ImportError("finequant is hidden")


def run(open_client: Callable[[Path], Client]) -> None:
    """Does the job named on the command line, and prints the results as JSON."""
    sys.meta_path.insert(0, WithoutFinequant())
    folder, job = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    client = open_client(folder)
    results: dict[str, Any] = {
        "texts": [client.encode(text) for text in job["texts"]],
        "prompts": [client.prompt(messages) for messages in job["messages"]],
    }
    next(client.answer(job["prompts"][0], 2))  # the first call also loads
    answers = [timed_answer(client, prompt, job) for prompt in job["prompts"]]
    results["answers"] = [tokens for tokens, _, _ in answers]
    results["prompt_seconds"] = sum(seconds for _, seconds, _ in answers)
    results["decoding_seconds"] = sum(seconds for _, _, seconds in answers)
    results["peak_memory_bytes"] = peak_memory()
    logits = np.stack([client.last_logits(ids) for ids in job["probes"]])
    logits.astype("<f4").tofile("logits")
    print(json.dumps(results))


def timed_answer(
    client: Client, prompt: list[int], job: dict[str, Any]
) -> tuple[list[int], float, float]:
    """Returns the answer without its end token, and the seconds until its first token and after."""
    started, first, tokens = perf_counter(), 0.0, []
    for token in client.answer(prompt, job["max_new_tokens"]):
        first = first or perf_counter()
        if token in job["ends"]:
            break
        tokens.append(token)
        if len(tokens) == job["max_new_tokens"]:
            break
    return tokens, first - started, perf_counter() - first


def peak_memory() -> int | None:
    """Returns the peak memory of this program in bytes; None without /proc.

    After a fork, rusage's figure includes the parent's peak.
    """
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else None


class SteppedClient(ABC):
    """A program that computes logits and leaves sampling to its user."""

    @abstractmethod
    def step(self, ids: list[int], start: int) -> np.ndarray:
        """Returns float32 logits [vocabulary] after `ids`, the first of which is at `start`."""

    def prompt(self, messages: list[dict[str, str]]) -> list[int] | None:
        return None  # it has no chat template

    def answer(self, prompt: list[int], limit: int) -> Iterator[int]:
        logits, position = self.step(prompt, 0), len(prompt)
        while True:
            token = int(logits.argmax())
            yield token
            logits, position = self.step([token], position), position + 1

    def last_logits(self, ids: list[int]) -> np.ndarray:
        return self.step(ids, 0)
