"""Compare base, tuned, quantized and exports on the same tokens: -> report.json, report.md, plots/

python evaluate/compare.py recipes/quickstart.yaml
python evaluate/compare.py recipes/chat.yaml evaluate.limit=100
torchrun --nproc_per_node 2 evaluate/compare.py recipes/chat.yaml
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

from finequant.evaluate.answers import (
    changes,
    most_frequent,
    parities,
    predictions,
    right_by,
    samples,
)
from finequant.evaluate.inputs import Material, prepare
from finequant.evaluate.measure import arithmetic, measure_model, memo_of, predicted
from finequant.evaluate.models import MODELS, load_model, packed_sizes, size_bytes
from finequant.recipes.artifact import read_part, replace_text
from finequant.recipes.command_line import quiet_libraries, read_command_line
from finequant.recipes.errors import report_user_errors
from finequant.recipes.freshness import versions
from finequant.recipes.interrupt import starting_over
from finequant.recipes.load import read_section
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Lora, Quantize, Recipe, Train
from finequant.recipes.stages import MEASURING_CODE, command_of, exports_of
from finequant.recipes.terminal import doing, is_first, say
from finequant.recipes.usage import Stopwatch


def main(argv: Sequence[str] | None = None) -> None:
    with report_user_errors():
        recipe, run = read_command_line(__doc__, argv)
        run.require_there_for("evaluate", recipe)
        doing("evaluate: loading torch and transformers")
        quiet_libraries()
        if not compare(recipe, run):
            sys.exit(1)


def compare(recipe: Recipe, run: RunDir) -> bool:
    """Measures the three models and their exports, writes the report, and prints its table.

    Several processes share the batches; only the first writes the report.

    Returns:
        Whether the gate passed; True without a gate, and in all processes but the first.

    Raises:
        UserError: for unknown tasks, unreadable texts, or missing artifacts.
    """
    from finequant.evaluate.metrics.tasks import check_tasks, turn_into_fractions
    from finequant.evaluate.report.page import write_page
    from finequant.evaluate.report.report import print_table, write_report
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.finetune.model import load_tokenizer
    from finequant.finetune.processes import decided_by_first, join_processes, leave_processes

    watch = Stopwatch()
    join_processes()
    decided_by_first(lambda: run.require_for("evaluate", recipe))
    inputs, resumed = {}, False
    if is_first():  # hashes the base
        inputs = run.inputs(recipe, "evaluate")
        resumed = _was_begun(recipe, run)
    check_tasks(recipe.evaluate)
    splits = prepared_splits(recipe)
    material = prepare(recipe, splits, load_tokenizer(recipe.model))
    measured = measure_all(recipe, run, material)
    leave_processes()
    if not is_first():
        return True
    measured |= measure_exports(recipe, run, material)
    turn_into_fractions(measured.values())
    doing("evaluate: writing the report")
    rows = predictions(recipe, material, measured)
    report = report_of(recipe, run, material, measured, rows)
    run.keep_edited("evaluate")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_text(run.predictions, "".join(lines))
    write_report(report, run.root)
    run.record(recipe, "evaluate", inputs, seconds=watch.seconds, resumed=resumed)
    write_page(run.root)
    print_table(report)
    say(f"evaluate: {run.page}, report.md and report.json written in {watch.seconds} s")
    return report["gate"]["passed"]


def _was_begun(recipe: Recipe, run: RunDir) -> bool:
    """Says whether earlier calls measured all models or, since the last stage finished, some of
    them: the seconds of this call are then no estimate for the next."""
    file = run.manifest_file
    finished = file.stat().st_mtime_ns if file.exists() else 0
    memos = {name: memo_of(recipe, run, name) for name in MODELS}
    known = {name: memo.file for name, memo in memos.items() if memo.value() is not None}
    return "quantized" in known or any(
        memo.stat().st_mtime_ns > finished for memo in known.values()
    )


def measure_all(recipe: Recipe, run: RunDir, material: Material) -> dict[str, dict[str, Any]]:
    """Measures each model, one in memory at a time; reuses earlier measurements."""
    from finequant.evaluate.metrics.divergence import divergence, passages, reference_sequences
    from finequant.finetune.processes import decided_by_first

    measured, tuned = {}, None
    memos = {name: memo_of(recipe, run, name) for name in MODELS if is_first()}
    before = decided_by_first(lambda: {name: memo.value() for name, memo in memos.items()})
    for name in MODELS:
        needs_reference = name == "tuned" and before["quantized"] is None
        if before[name] is not None and not needs_reference:
            say(f"evaluate: {name}: measured before, unchanged")
            measured[name] = before[name]
            continue
        say(f"evaluate: {name}: loading")
        model = load_model(name, recipe, run, material.probes[0], material.ends, material.lengths())
        if before[name] is not None:
            measured[name], current = before[name], predicted(name, model, recipe, material)
        else:
            size = size_bytes(name, model, recipe, run)
            with starting_over(f"the measurement of {name}"):
                measured[name], current = measure_model(name, model, recipe, material, size)
        if name == "tuned":
            tuned = current
        elif name == "quantized" and is_first():
            logs, decode = current.logs, material.tokenizer.decode
            compared = reference_sequences(material.corpora, recipe.evaluate.divergence_tokens)
            sequences = list(chain(*compared.values()))
            measured[name]["divergence"] = divergence(tuned, logs)
            measured[name]["passages"] = passages(tuned.logs, logs, sequences, decode)
        if is_first():
            memos[name].keep(measured[name])
        del model
        gc.collect()
    return measured


def measure_exports(recipe: Recipe, run: RunDir, material: Material) -> dict[str, dict[str, Any]]:
    """Measures each format that the recipe exports; the result maps report keys to measurements."""
    from finequant.evaluate.metrics.exports import measure_export
    from finequant.evaluate.metrics.parity import quantized_reference
    from finequant.quantize.formats.formats import FORMATS, report_key

    measured, reference = {}, cache(partial(quantized_reference, recipe, run, material))
    for name in exports_of(recipe):
        memo = memo_of(recipe, run, name, runtime=FORMATS[name].runtime_versions())
        if measurement := memo.value():
            say(f"evaluate: {name}: measured before, unchanged")
        else:
            with starting_over(f"the measurement of {name}"):
                measurement = measure_export(name, recipe, run, material, reference)
            memo.keep(measurement)
        measured[report_key(name)] = measurement
    return measured


def report_of(
    recipe: Recipe,
    run: RunDir,
    material: Material,
    measured: dict[str, dict[str, Any]],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Collects the content of report.json.

    measured: the measurement of each model and export by its key in the report.
    rows: what `predictions` returns.
    """
    from finequant.evaluate.report.gate import gate

    record = read_part(run.quantized / "quantization.json", command_of("quantize"))
    models = {name: measurement["scores"] for name, measurement in measured.items()}
    for name, size in packed_sizes(recipe, run).items():
        models[name] |= size
    for name, parity in parities(measured).items():
        models[name] |= {"parity": parity}
    return {
        "recipe": _as_made(recipe, run).model_dump(mode="json", exclude={"output_dir"}),
        "versions": versions(),
        "measuring_code": MEASURING_CODE,
        "models": models,
        "changes": changes(recipe, material, measured),
        "divergence": measured["quantized"]["divergence"],
        "passages": measured["quantized"]["passages"],
        "right_by": right_by(recipe.evaluate.metrics),
        "most_frequent": most_frequent(material.references, recipe.evaluate.metrics),
        "cut_answers": material.cut,
        **arithmetic(recipe),
        "layers": record.get("layers", []),
        "samples": samples(rows, recipe.evaluate.samples),
        "training": read_part(run.adapter / "training_log.json", command_of("train")),
        "gate": gate(models, recipe.evaluate.gate),
    }


def _as_made(recipe: Recipe, run: RunDir) -> Recipe:
    """Returns the recipe with the settings that adapter and quantized/ were made with: `evaluate`
    alone may be given others, which describe nothing that it measures."""
    sections: dict[str, Any] = {}
    for folder, name, section in (
        (run.adapter, "lora", Lora),
        (run.adapter, "train", Train),
        (run.quantized, "quantize", Quantize),
    ):
        if (file := folder / "recipe.yaml").exists():  # not where another program made it
            sections[name] = read_section(file, name, section)
    if made := sections.get("quantize"):
        present = recipe.quantize  # what evaluation reads, and paths that are absolute
        texts = {"data": present.calibration.data}
        sections["quantize"] = made.model_copy(
            update={
                "calibration": made.calibration.model_copy(update=texts),
                **{key: getattr(present, key) for key in ("dtype", "exports", "cache_length")},
            }
        )
    return recipe.model_copy(update=sections)


if __name__ == "__main__":
    main()
