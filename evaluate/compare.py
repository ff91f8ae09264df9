"""Compare base, tuned, quantized, exports on the same tokens: -> report.json, report.md, plots/

python evaluate/compare.py recipes/quickstart.yaml
python evaluate/compare.py recipes/chat.yaml evaluate.limit=100
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.recipes.artifact import replace_text
from finequant.recipes.command_line import quiet_libraries, read_command_line, say
from finequant.recipes.errors import UserError, report_user_errors
from finequant.recipes.freshness import versions
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.stages import exports_of
from finequant.recipes.usage import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finequant.evaluate.metrics.corpora import Document
    from finequant.evaluate.metrics.perplexity import ScoredSequence
    from finequant.finetune.architecture import Decoder
    from finequant.finetune.data.rows import Row
    from finequant.finetune.data.splits import Splits

MODELS = ("base", "tuned", "quantized")
HELD_OUT = "held_out"
"""Name of the test rows among corpora and tasks."""


@dataclass(frozen=True)
class Material:
    """The inputs that every model is measured on, as token ids that all models share."""

    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    """Token ids that end an answer."""
    corpora: dict[str, tuple[list[ScoredSequence], list[Document]]]
    rows: list[Row]
    prompts: list[list[int]]
    references: list[str]
    choices: list[str]
    probes: list[list[int]]
    """Token ids on which a loaded model is checked: prompts, or training rows if there are none."""


def main(argv: Sequence[str] | None = None) -> None:
    with report_user_errors():
        recipe, run = read_command_line(__doc__, argv)
        quiet_libraries()
        if not compare(recipe, run):
            sys.exit(1)


def compare(recipe: Recipe, run: RunDir) -> bool:
    """Measures the three models and their exports, writes the report, and prints its table.

    Returns:
        Whether the gate passed; True if the recipe sets none.

    Raises:
        UserError: for unknown tasks, unreadable texts, or missing artifacts.
    """
    from finequant.evaluate.metrics.tasks import check_tasks
    from finequant.evaluate.report.page import write_page
    from finequant.evaluate.report.report import gate, print_table, write_report
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.finetune.device import arithmetic_dtype
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.quantize.scheme import shipped_dtype

    watch = Stopwatch()
    run.require_for("evaluate", recipe)
    inputs = run.inputs(recipe, "evaluate")
    if recipe.evaluate.tasks:
        check_tasks(recipe.evaluate)
    splits = prepared_splits(recipe)
    material = prepare(recipe, splits, load_tokenizer(recipe.model))
    measured = measure_all(recipe, run, material)
    measured |= measure_exports(recipe, run, material)
    models = {name: measurement["scores"] for name, measurement in measured.items()}
    for name, size in packed_sizes(recipe, run).items():
        models[name] |= size
    for name, parity in parities(measured).items():
        models[name] |= {"parity": parity}
    computes = arithmetic_dtype(shipped_dtype(recipe.quantize, load_config(recipe.model)))
    report = {
        "recipe": recipe.model_dump(mode="json", exclude={"output_dir"}),
        "versions": versions(),
        "models": models,
        "changes": _changes(recipe, material, measured),
        "divergence": measured["quantized"]["divergence"],
        "passages": measured["quantized"]["passages"],
        "right_by": right_by(recipe.evaluate.metrics),
        "arithmetic": str(computes).removeprefix("torch."),
        "layers": _read_json(run.quantized / "quantization.json").get("layers", []),
        "samples": _samples(recipe, material, measured),
        "training": _read_json(run.adapter / "training_log.json"),
        "gate": gate(models, recipe.evaluate.gate),
    }
    rows = predictions(recipe, material, measured)
    run.keep_edited("evaluate")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_text(run.predictions, "".join(lines))
    write_report(report, run.root)
    run.record(recipe, "evaluate", inputs, seconds=watch.seconds)
    write_page(run.root)
    print_table(report)
    say(f"evaluate: {run.page}, report.md and report.json written in {watch.seconds} s")
    return report["gate"]["passed"]


def prepare(recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Material:
    """Reads all texts, and tokenizes texts and held-out rows once for all models.

    Raises:
        UserError: for whatever `evaluate.check` refuses.
    """
    from finequant.evaluate.check import (
        check_chat_template,
        check_lengths,
        check_rows,
        check_texts,
    )
    from finequant.evaluate.metrics.corpora import read_corpus
    from finequant.evaluate.metrics.perplexity import corpus_windows
    from finequant.finetune.architecture import usable_positions
    from finequant.finetune.data.rendering import check_template
    from finequant.finetune.data.tokens import answer_text, encode, encode_prompt
    from finequant.finetune.data.turns import end_tokens
    from finequant.finetune.model import load_config

    rows = check_rows(recipe, splits)
    check_texts(recipe.evaluate)
    check_chat_template(recipe.evaluate, tokenizer)
    positions = usable_positions(load_config(recipe.model))
    corpora = {
        corpus.name: corpus_windows(read_corpus(corpus), tokenizer, corpus, positions)
        for corpus in recipe.evaluate.perplexity
    }
    check_template(rows, tokenizer, recipe.data)
    if rows:
        corpora[HELD_OUT] = _answers_as_corpus(rows, tokenizer, recipe)
    asked = [row for whole in rows for row in _asked_rows(whole)]
    references = [answer_text(row, tokenizer, recipe.data) for row in asked]
    _check_calls(asked, references)
    prompts = [encode_prompt(row, tokenizer, recipe.data) for row in asked]
    read = [(row.where, len(prompt)) for row, prompt in zip(asked, prompts, strict=True)]
    check_lengths(recipe, positions, read, longest_scored(corpora))
    return Material(
        tokenizer,
        end_tokens(recipe.model, recipe.data, tokenizer),
        corpora,
        asked,
        prompts,
        references,
        _choices(recipe, chain(splits.train, asked)),
        prompts[:2] or [encode(row, tokenizer, recipe.data).input_ids for row in splits.train[:2]],
    )


def measure_all(recipe: Recipe, run: RunDir, material: Material) -> dict[str, dict[str, Any]]:
    """Measures each model, one in memory at a time; reuses earlier measurements."""
    from finequant.evaluate.metrics.divergence import (
        divergence,
        log_probabilities,
        passages,
        reference_sequences,
    )

    measured, reference = {}, None
    sequences = reference_sequences(material.corpora, recipe.evaluate.divergence_tokens)
    memos = {name: run.memo(recipe, f"measurements/{name}") for name in MODELS}
    before = {name: memo.value() for name, memo in memos.items()}
    for name in MODELS:
        needs_reference = name == "tuned" and before["quantized"] is None
        if before[name] is not None and not needs_reference:
            say(f"evaluate: {name}: measured before, unchanged")
            measured[name] = before[name]
            continue
        model = load_model(name, recipe, run, material.probes[0], material.ends)
        if needs_reference:
            reference = log_probabilities(model, sequences, recipe.evaluate.batch_size)
        size = size_bytes(name, model, recipe, run)
        measured[name] = before[name] or measure_model(name, model, recipe, material, size)
        if name == "quantized":
            logs, _ = log_probabilities(model, sequences, recipe.evaluate.batch_size)
            tuned, rounding = reference
            measured[name]["divergence"] = divergence(tuned, logs, rounding)
            decode = material.tokenizer.decode
            measured[name]["passages"] = passages(tuned, logs, sequences, decode)
        memos[name].keep(measured[name])
        del model
        gc.collect()
    return measured


def measure_exports(recipe: Recipe, run: RunDir, material: Material) -> dict[str, dict[str, Any]]:
    """Measures each format that the recipe exports; the result maps report keys to measurements."""
    from finequant.evaluate.metrics.exports import measure_export
    from finequant.quantize.formats.formats import report_key

    measured = {}
    for name in exports_of(recipe):
        memo = run.memo(recipe, f"measurements/{name}")
        if measurement := memo.value():
            say(f"evaluate: {name}: measured before, unchanged")
        else:
            measurement = measure_export(name, recipe, run, material)
            memo.keep(measurement)
        measured[report_key(name)] = measurement
    return measured


def load_model(
    name: str, recipe: Recipe, run: RunDir, probe: list[int], ends: list[int]
) -> Decoder:
    """Loads one of the three models with its shipped weights, on the GPU if there is one.

    It computes in the shipped dtype, or in float32 if the processor only emulates bf16. The tuned
    model's logits are compared with peft's by the stage quantize, not again here.

    probe: token ids on which the dequantized model is compared with quantized/.
    ends: token ids that end an answer of base and tuned; quantized/ has its own record of them.
    """
    from transformers import AutoModelForCausalLM

    from finequant.evaluate.dequantized import dequantize_once
    from finequant.finetune.data.turns import stop_at
    from finequant.finetune.device import arithmetic_dtype, device
    from finequant.finetune.model import load_base, load_config
    from finequant.quantize.merge.model import merged_model
    from finequant.quantize.scheme import cast_weights, shipped_dtype

    say(f"evaluate: {name}: loading")
    dtype = shipped_dtype(recipe.quantize, load_config(recipe.model))
    if name == "base":
        model = load_base(recipe.model, dtype)
    elif name == "quantized":
        model = AutoModelForCausalLM.from_pretrained(run.quantized).eval()
        model = dequantize_once(model.to(device()), probe)
        return cast_weights(model, arithmetic_dtype(dtype))
    else:
        model = merged_model(recipe, run, dtype)
    stop_at(model, ends)
    # The weights are rounded to the shipped dtype, whatever dtype the model computes in.
    model = cast_weights(model, arithmetic_dtype(dtype))
    return model.to(device()).eval()


def measure_model(
    name: str, model: Decoder, recipe: Recipe, material: Material, size: int
) -> dict[str, Any]:
    """Measures a loaded model.

    size: bytes of the model's weights on disk.

    Returns:
        {"scores": size, perplexity, and tasks as in report.json, "answers": to the held-out rows}
    """
    from finequant.evaluate.metrics.perplexity import measure
    from finequant.evaluate.metrics.tasks import answer, lm_eval_tasks, multiple_choice
    from finequant.evaluate.metrics.text_metrics import METRICS, score_answers
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.model import load_config

    evaluate, tokenizer = recipe.evaluate, material.tokenizer
    scores: dict[str, Any] = {
        "size_bytes": size,
        "bits_per_weight": 8 * size / parameter_count(load_config(recipe.model)),
        "activations": "int8" if name == "quantized" else "float",
        "perplexity": {
            corpus: measure(model, *texts, evaluate.batch_size, f"{name}: perplexity, {corpus}")
            for corpus, texts in material.corpora.items()
        },
        "tasks": {},
    }
    answers: list[str] = []
    if material.prompts:
        say(f"evaluate: {name}: answering {len(material.prompts)} held-out rows")
        answers = answer(
            model,
            tokenizer,
            material.prompts,
            evaluate.max_new_tokens,
            evaluate.batch_size,
            f"{name}: answers",
        )
        generated = [metric for metric in evaluate.metrics if metric in METRICS]
        scores["tasks"][HELD_OUT] = score_answers(answers, material.references, generated)
        if "multiple_choice" in evaluate.metrics:
            scores["tasks"][HELD_OUT]["multiple_choice"] = multiple_choice(
                model,
                tokenizer,
                material.prompts,
                material.references,
                material.choices,
                evaluate.batch_size,
                f"{name}: multiple choice",
            )
    if evaluate.tasks:
        scores["tasks"] |= lm_eval_tasks(model, tokenizer, evaluate, recipe.seed)
    return {"scores": scores, "answers": answers}


def _answers_as_corpus(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> tuple[list[ScoredSequence], list[Document]]:
    """Makes a corpus of the held-out rows, whose target tokens are scored.

    Words and bytes are counted in the scored part of the answers.
    """
    from finequant.evaluate.metrics.corpora import count
    from finequant.evaluate.metrics.perplexity import ScoredSequence, scored_part
    from finequant.finetune.data.tokens import IGNORED, answer_text, encode

    sequences, documents = [], []
    for row in rows:
        item = encode(row, tokenizer, recipe.data)
        scored = [False, *(label != IGNORED for label in item.labels[1:])]
        sequences.append(ScoredSequence(item.input_ids, scored))
        if item.full_length > len(item.input_ids):
            documents.append(scored_part(sequences[-1:], tokenizer))
        else:
            answers = [answer_text(row, tokenizer, recipe.data, index) for index in row.targets]
            documents.append(count("\n".join(answers) or row.text))
    return sequences, documents


def longest_scored(corpora: dict[str, tuple[list[ScoredSequence], list[Document]]]) -> int:
    """Counts the input tokens of the longest sequence; its last token is only predicted."""
    lengths = [len(item.ids) - 1 for sequences, _ in corpora.values() for item in sequences]
    return max(lengths, default=0)


def _asked_rows(row: Row) -> list[Row]:
    """Returns the row for its last answer; if it has calls, one row for each of its answers."""
    if any(message.get("tool_calls") for message in row.messages):
        return [replace(row, messages=row.messages[: index + 1]) for index in row.targets]
    return [row] if row.messages else []


def _check_calls(rows: list[Row], references: list[str]) -> None:
    """Checks that calls can be parsed from the text that the chat template renders.

    Raises:
        UserError: for a template that writes calls in another form, so that none would match.
    """
    from finequant.evaluate.metrics.text_metrics import calls_in, canonical_call

    for row, reference in zip(rows, references, strict=True):
        calls = [call["function"] for call in row.messages[-1].get("tool_calls", ())]
        if calls and calls_in(reference) != [canonical_call(call) for call in calls]:
            raise UserError(
                f"{row.where}: the chat template writes calls as {reference[:80]!r}, which cannot "
                "be parsed; expected JSON objects with name and arguments or parameters"
            )


def _choices(recipe: Recipe, rows: Iterable[Row]) -> list[str]:
    if recipe.evaluate.choices == "completions":
        return sorted({row.messages[-1]["content"] for row in rows if row.messages})
    return list(recipe.evaluate.choices or [])


def size_bytes(name: str, model: Decoder, recipe: Recipe, run: RunDir) -> int:
    """Returns the bytes of the weights on disk, or what a float model would take there."""
    from finequant.finetune.model import load_config
    from finequant.quantize.checkpoint.writing import weight_bytes
    from finequant.quantize.scheme import shipped_dtype
    from finequant.recipes.base import locate_base

    folder, file = locate_base(recipe.model)
    if name == "quantized":
        return weight_bytes(run.quantized)
    if name == "base" and file:
        return (folder / file).stat().st_size
    shipped = shipped_dtype(recipe.quantize, load_config(recipe.model))
    return sum(weight.numel() for weight in model.parameters()) * shipped.itemsize


def parities(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Computes how many held-out rows each export answers as quantized does, to the letter.

    Returns:
        {NAME: {"same_answers": share of rows, "n": rows}}
    """
    reference = measured["quantized"]["answers"]
    return {
        name: {
            "same_answers": sum(map(str.__eq__, measurement["answers"], reference))
            / len(reference),
            "n": len(reference),
        }
        for name, measurement in measured.items()
        if name not in MODELS and reference and len(measurement["answers"]) == len(reference)
    }


def packed_sizes(recipe: Recipe, run: RunDir) -> dict[str, dict[str, float]]:
    """Computes what base, tuned and quantized take in the dtype they are measured in.

    Their files may differ: a base may be quantized already, and torchao keeps a code in a byte.

    Returns:
        {NAME: {"packed_bytes", "packed_bits_per_weight"}}
    """
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.model import load_config
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.quantize.scheme import shipped_dtype

    config = load_config(recipe.model)
    weights = parameter_count(config)
    floats = weights * shipped_dtype(recipe.quantize, config).itemsize
    quantized = read_checkpoint(run.quantized).packed_bytes
    sizes = {"base": floats, "tuned": floats, "quantized": quantized}
    return {
        name: {"packed_bytes": size, "packed_bits_per_weight": 8 * size / weights}
        for name, size in sizes.items()
    }


def _changes(
    recipe: Recipe, material: Material, measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Computes the changes in metrics from tuned to quantized, paired row by row."""
    from finequant.evaluate.metrics.text_metrics import METRICS, paired_changes

    if not material.rows:
        return {}
    generated = [metric for metric in recipe.evaluate.metrics if metric in METRICS]
    answers = (measured[name]["answers"] for name in ("tuned", "quantized"))
    return {HELD_OUT: paired_changes(*answers, material.references, generated)}


def right_by(metrics: list[str]) -> str | None:
    """Returns the first of the metrics by which an answer is right or wrong, if there is one."""
    decides = ("json_match", "tool_call_match", "exact_match")
    return next((metric for metric in metrics if metric in decides), None)


def predictions(
    recipe: Recipe, material: Material, measured: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Collects every model's answers to the held-out rows, and which of them are right."""
    from finequant.evaluate.metrics.text_metrics import METRICS

    metric = right_by(recipe.evaluate.metrics)
    answering = {name: model["answers"] for name, model in measured.items() if model["answers"]}
    rows = []
    for index, (row, reference) in enumerate(zip(material.rows, material.references, strict=True)):
        answers = {name: texts[index] for name, texts in answering.items()}
        right = {
            name: METRICS[metric]([answer], [reference])["value"] == 1
            for name, answer in answers.items()
            if metric
        }
        prompt = row.messages[-2]["content"]
        rows.append({"prompt": prompt, "reference": reference, "answers": answers, "right": right})
    return rows


def _samples(
    recipe: Recipe, material: Material, measured: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Collects the models' answers to rows spread evenly over the held-out ones."""
    total = len(material.rows)
    count = min(recipe.evaluate.samples, total)
    return [
        {
            "prompt": material.rows[index].messages[-2]["content"],
            "reference": material.references[index],
            "answers": {
                name: measurement["answers"][index]
                for name, measurement in measured.items()
                if measurement["answers"]
            },
        }
        for index in (number * total // count for number in range(count))
    ]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): rerun the previous stage") from None


if __name__ == "__main__":
    main()
