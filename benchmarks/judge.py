"""Makes the jobs that clients.py gives to programs, and compares the results with quantized/."""

from __future__ import annotations

import json
import operator
import random
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from finequant.evaluate.answers import right_by
from finequant.evaluate.inputs import prepare
from finequant.evaluate.measure import memo_of
from finequant.evaluate.metrics.held_out import answer
from finequant.evaluate.metrics.text_metrics import score_answers
from finequant.evaluate.models import load_model
from finequant.evaluate.report.table import MISSING, markdown_table
from finequant.finetune.architecture import parameter_count
from finequant.finetune.data.row import Row
from finequant.finetune.data.splits import load_splits
from finequant.finetune.data.tokens import encode_prompt
from finequant.finetune.model import load_config, load_tokenizer
from finequant.quantize.formats.formats import FORMATS
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe

TEXTS, CONVERSATIONS, PROBES = 500, 300, 50

AWKWARD = (
    "it's 12,345.67 €!",
    "  two  spaces ",
    "\ttab\n\nnew lines\r\n",
    "naïve café Ünïcödé",
    "日本語のテキスト",
    "мир и труд",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇩🇪 ok",
    "x_1 = f(a, b[0])  # 3**2",
    '{"a": [1, 2, {"b": null}]}',
    "https://example.com/?q=1&r=%20",
    "I'll we've don't CAN'T",
    "1234567890 12 345",
    "e\u0301 versus é",
    "\u00a0\u200b\u2003",
    "<|im_start|>user\nhi<|im_end|>",
)
"""Pieces of text on which two implementations of one tokenizer may disagree."""


class Result(NamedTuple):
    """One client's rows in the tables of the page."""

    name: str
    packages: str
    export: str
    note: str
    parity: list[str]
    cost: list[str]


class Judge:
    """A run's rows, and the answers of quantized/ in transformers, with which clients' are
    compared."""

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        tokenizer = load_tokenizer(recipe.model)
        self.recipe, self.run, self.tokenizer = recipe, run, tokenizer
        splits = load_splits(recipe.data, recipe.seed)
        self.material = prepare(recipe, splits, tokenizer)
        asked = [row for row in splits.train if row.messages and not row.tools]
        self.rows = [*self.material.rows, *asked][:CONVERSATIONS]
        self.metric = right_by(recipe.evaluate.metrics) or "exact_match"
        self.texts = awkward_texts([row.messages[-2]["content"] for row in self.material.rows])
        self.probes = self._probes()
        self.answers, self.logits = self._quantized()

    def job(self, limit: int, probes: int) -> dict[str, Any]:
        """Makes a client's job: `limit` prompts to answer, and `probes` sequences for logits."""
        material = self.material
        return {
            "texts": self.texts,
            "messages": [list(row.messages[:-1]) for row in self.rows],
            "prompts": material.prompts[:limit],
            "probes": self.probes[:probes],
            "ends": material.ends,
            "vocabulary": self.logits.shape[1],
            "max_new_tokens": self.recipe.evaluate.max_new_tokens,
        }

    def _probes(self) -> list[list[int]]:
        """Returns prompts with half of their answers: the next token is least certain there."""
        pairs = list(zip(self.material.prompts, self.material.references, strict=True))[:PROBES]
        halves = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in pairs]
        return [
            prompt + half[: len(half) // 2] for (prompt, _), half in zip(pairs, halves, strict=True)
        ]

    @torch.inference_mode()
    def _quantized(self) -> tuple[list[str], torch.Tensor]:
        """Computes the answers of quantized/ in transformers, with int8 activations, and float32
        logits [probes, vocabulary]."""
        evaluate, material = self.recipe.evaluate, self.material
        model = load_model("quantized", self.recipe, self.run, self.probes[0], material.ends)
        logits = [
            model(torch.tensor([ids], device=model.device)).logits[0, -1].float().cpu()
            for ids in self.probes
        ]
        if measured := memo_of(self.recipe, self.run, "quantized").value():
            return measured["answers"], torch.stack(logits)
        limits = (evaluate.max_new_tokens, evaluate.batch_size, "answers of quantized")
        return answer(model, self.tokenizer, material.prompts, *limits), torch.stack(logits)

    def result(self, name: str, packages: tuple[str, ...], folder: Path, where: Path) -> Result:
        """Compares the results in a client's folder `where` with quantized/."""
        results = json.loads((where / "results.json").read_text(encoding="utf-8"))
        pinned = " ".join(
            text if {"=", "@"} & set(text) else f"{text}=={version(text)}" for text in packages
        )
        parity = [
            share(results.get("texts"), [self._ids(text) for text in self.texts]),
            share(results.get("prompts"), [self._prompt(row) for row in self.rows]),
            *self._answers(results.get("answers")),
            self._divergence(where / "logits"),
        ]
        return Result(
            name,
            pinned,
            folder.name,
            results.get("note", ""),
            parity,
            [*self._speed(results), *self._size(folder)],
        )

    def _prompt(self, row: Row) -> list[int]:
        return encode_prompt(row, self.tokenizer, self.recipe.data)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _answers(self, answers: list[list[int]] | None) -> list[str]:
        """Formats how many answers are equal, and the percentages of right answers."""
        if not answers:
            return [MISSING, MISSING]
        decode = self.tokenizer.decode
        texts = [decode(answer, skip_special_tokens=True).strip() for answer in answers]
        expected = self.answers[: len(texts)]
        references = self.material.references[: len(texts)]
        right, before = (
            100 * score_answers(given, references, [self.metric])[self.metric]["value"]
            for given in (texts, expected)
        )
        return [share(texts, expected), f"{right:.1f} ({before:.1f})"]

    def _divergence(self, file: Path) -> str:
        """Formats the mean KL divergence from quantized/, in nats per token."""
        if not file.exists():
            return MISSING
        theirs = torch.from_numpy(np.fromfile(file, "<f4")).view(-1, self.logits.shape[1])
        pair = (self.logits[: len(theirs)], theirs)
        ours, theirs = (logits.double().log_softmax(-1) for logits in pair)
        return f"{(ours.exp() * (ours - theirs)).sum(-1).mean().item():.1e}"

    def _speed(self, results: dict[str, Any]) -> list[str]:
        """Formats tokens per second of prompts and of decoding, and peak memory in MB."""
        answers = results.get("answers", ())
        tokens = {
            "prompt": sum(map(len, self.material.prompts[: len(answers)])),
            "decoding": sum(map(len, answers)),
        }
        speeds = [
            f"{count / results[f'{part}_seconds']:,.0f}"
            if results.get(f"{part}_seconds")
            else MISSING
            for part, count in tokens.items()
        ]
        memory = results.get("peak_memory_bytes")
        return [*speeds, f"{memory / 1e6:,.0f}" if memory else MISSING]

    def _size(self, folder: Path) -> list[str]:
        """Formats the MB of the model's files, and the bits per weight of the base."""
        if folder.name in FORMATS:
            size = FORMATS[folder.name].size(folder)
        else:
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        weights = parameter_count(load_config(self.recipe.model))
        return [f"{size / 1e6:,.1f}", f"{8 * size / weights:.2f}"]


def awkward_texts(contents: list[str]) -> list[str]:
    """Makes texts by joining awkward pieces and users' texts at random."""
    chosen = random.Random(0)
    pieces = [*AWKWARD, *contents[: len(AWKWARD)]]
    joined = ["".join(chosen.choices(pieces, k=chosen.randint(1, 4))) for _ in range(TEXTS)]
    return [*AWKWARD, *joined][:TEXTS]


def share(values: list | None, expected: list) -> str:
    """Formats how many values are as expected; MISSING if the program gives none."""
    if not values or values[0] is None:
        return MISSING
    return f"{sum(map(operator.eq, values, expected))} of {len(expected)}"


def page(recipe: str, results: list[Result], before: str) -> str:
    """Writes the page of results.

    before: the page as it was, whose notes are kept.
    """
    parity = ["program", "reads", "texts", "prompts", "answers", "right, %", "KL"]
    cost = ["program", "prompt, tokens/s", "decoding, tokens/s", "peak memory, MB", "size, MB"]
    cost += ["bits per weight of the base"]
    tables = [
        (parity, [[r.name, r.export, *r.parity] for r in results]),
        (cost, [[r.name, *r.cost] for r in results]),
        (["program", "packages", ""], [[r.name, f"`{r.packages}`", r.note] for r in results]),
    ]
    equal, costs, programs = (markdown_table(header, rows, align=":---") for header, rows in tables)
    notes = (NOTES.search(before) or [""])[0]
    return PAGE.format(recipe=recipe, equal=equal, costs=costs, notes=notes, programs=programs)


NOTES = re.compile("<!-- notes .*<!-- /notes -->", re.DOTALL)

PAGE = """# The programs that people use

Written by `make clients`: each export of `{recipe}` ran in a program that is not part of
finequant, and is compared with `quantized/` in transformers, whose figures are in parentheses.

{equal}

- **texts**: strings of many scripts, blanks and special tokens with equal token ids, by the
  program's own tokenizer.
- **prompts**: conversations of the run's rows with equal token ids, by the program's own chat
  template.
- **answers**: held-out rows answered as `quantized/` does, to the letter, greedy. **right**: by the
  recipe's metric.
- **KL**: divergence from `quantized/` after unfinished answers, in nats per token.

Programs differ in whether and how they round activations. The weights are the same in all of them:
`finequant export` checks that every code in every file is equal.

{costs}

Prompts are read one at a time; the first token of an answer counts as reading.

{notes}

{programs}
"""
