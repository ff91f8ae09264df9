"""Writes the model card: metadata, measurements, how to load the model, and what is unknown."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from finequant.evaluate.inputs import HELD_OUT
from finequant.evaluate.report.advice import advice
from finequant.evaluate.report.gate import verdict_lines
from finequant.evaluate.report.report import baseline_lines, divergence_lines, in_arithmetic
from finequant.evaluate.report.table import bullets, comparison_rows, markdown_table
from finequant.evaluate.report.values import corpora_of, metrics_of, value_at
from finequant.publish.license import License
from finequant.publish.loading import ADAPTER, QUANTIZED, base_on_hub, loading
from finequant.quantize.formats.snippet import fenced
from finequant.recipes.errors import counted
from finequant.recipes.load import as_yaml
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

REPEAT = "`finequant run recipe.yaml` repeats the run; local files that it names must be beside it."

LONG_ROWS = {
    "truncate": "; longer rows, if any, were cut",
    "drop": "; longer rows, if any, were left out",
    "split": "; longer texts, if any, were split, and longer conversations cut",
    "error": "",
}
"""What the values of data.long_rows did to rows beyond data.max_length."""


def card_text(
    recipe: Recipe,
    report: dict[str, Any],
    license: License,
    kind: str,
    files: list[str],
    datasets: list[str],
) -> str:
    """Writes the repository's README.md.

    recipe: the published one, without this machine's folders.
    report: report.json, with what `read_report` adds.
    kind: `quantized`, or `adapter` if only the adapter is published.
    files: names of the other files in the repository.
    datasets: sources of training rows that are on the Hub; the others are files of the author's.
    """
    name = (recipe.publish.repo_id or recipe.name).split("/")[-1]
    exports = sorted({file.split("/")[0] for file in files if "/" in file})
    sections = [
        f"---\n{metadata(recipe, report, license, kind, datasets)}\n---",
        f"# {name}",
        f"**{license.line}**" if license.line else "",
        recipe.publish.description or "",
        _introduction(recipe, report, kind, datasets),
        _overruled(report) if kind == QUANTIZED else "",
        f"## Measured\n\n{_measured(report, kind)}",
        f"## Load it\n\n{loading(recipe, report, kind, files)}",
        f"## Limits\n\n{bullets(_limits(recipe, report, kind, exports))}",
        f"## License\n\n{_license(license, recipe)}",
        f"## Recipe\n\n{REPEAT}\n\n{fenced('yaml', _yaml(recipe))}",
        f"## Made with\n\n{_versions(report)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def metadata(
    recipe: Recipe, report: dict[str, Any], license: License, kind: str, datasets: list[str]
) -> ModelCardData:
    """Makes the card's front matter, the Hub's metadata."""
    from huggingface_hub import ModelCardData

    base, family = base_on_hub(recipe), report["model_type"]
    return ModelCardData(
        base_model=base,
        base_model_relation=kind if base else None,
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        datasets=list(dict.fromkeys(datasets)) or None,
        language=recipe.publish.language or None,
        tags=["finequant", family, *_scheme(report, kind), *recipe.publish.tags],
        pipeline_tag="text-generation",
        model_name=(recipe.publish.repo_id or recipe.name).split("/")[-1],
        eval_results=_results(recipe, report, kind) or None,
        library_name="peft" if kind == ADAPTER else "transformers",
    )


def _scheme(report: dict[str, Any], kind: str) -> list[str]:
    """Names the scheme in torchao's way: int8 dynamic activations and 4-bit weights are 8da4w."""
    bits = report["quantization"]["bits"]  # None where layers differ
    return [f"8da{bits}w"] if kind == QUANTIZED and bits else []


def _results(recipe: Recipe, report: dict[str, Any], kind: str) -> list[EvalResult]:
    """Makes the Hub's model-index; accuracies are fractions of 1, as in report.json."""
    from huggingface_hub import EvalResult

    model = {"shipped": report["models"]["tuned" if kind == ADAPTER else QUANTIZED]}
    values = []
    for corpus in corpora_of(model):
        value = value_at(model["shipped"], "perplexity", corpus, "token")
        values.append((corpus, "perplexity", "perplexity per token", value))
    for task, metric in metrics_of(model):
        value = value_at(model["shipped"], "tasks", task, metric, "value")
        values.append((task, metric, metric, value))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=f"held-out rows of {recipe.name}" if task == HELD_OUT else task,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for task, metric, name, value in values
        if value is not None
    ]


def _introduction(recipe: Recipe, report: dict[str, Any], kind: str, datasets: list[str]) -> str:
    base = base_on_hub(recipe)
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{recipe.model.base}`"
    rows = dict.fromkeys(row.source for row in recipe.data.train)
    *most, last = [row if row in datasets else f"`{row}` (the author's rows)" for row in rows]
    data = f"{', '.join(most)} and {last}" if most else last
    held = ", with the base in 4 bits (nf4) during training" if recipe.model.load == "nf4" else ""
    lora = (
        f"{'DoRA' if recipe.lora.use_dora else 'LoRA'} of rank {recipe.lora.rank} on {data}{held}"
    )
    if kind == ADAPTER:
        return f"An adapter ({lora}) for {name}. It only works together with that base."
    quantization = report["quantization"]
    return (
        f"{name}, fine-tuned ({lora}), merged and quantized: {quantization['summary']}. Method: "
        f"{quantization['method']}. {quantization['bits_per_rounded_weight']} bits for each "
        "rounded weight, scales included; `quantization.json` says how each layer was quantized."
    )


def _overruled(report: dict[str, Any]) -> str:
    """Warns that the gate failed and that the model was published nevertheless."""
    if report["gate"]["passed"]:
        return ""
    failed = [check["name"] for check in report["gate"]["checks"] if not check["passed"]]
    return (
        "> **The gate of the recipe failed, and the publisher of this model overruled it:** "
        f"{', '.join(failed)}. The lines below say by how much."
    )


def _measured(report: dict[str, Any], kind: str) -> str:
    shown, inputs = report, "All models are measured on the same inputs"
    error = "± is one standard error; for a change, that of the row-by-row differences."
    if kind == ADAPTER:
        inputs, error = "Both models are measured on the same inputs", "± is one standard error."
        both = {name: report["models"][name] for name in ("base", "tuned")}
        shown = report | {"models": both, "changes": {}}
    header, rows = comparison_rows(shown)
    if kind == ADAPTER:  # the last column compares with quantized
        header, rows = header[:-1], [row[:-1] for row in rows]
    parts = [
        markdown_table(header, rows),
        f"{inputs}{in_arithmetic(shown)}. {error} `report.json` has every figure.",
        *baseline_lines(shown),
    ]
    if kind == QUANTIZED:
        parts.append(bullets([*divergence_lines(report), *verdict_lines(report)]))
        if untried := advice(report):
            parts.append(
                f"Changes to the recipe that may cost less accuracy:\n\n{bullets(untried)}"
            )
    return "\n\n".join(part for part in parts if part)


def _limits(recipe: Recipe, report: dict[str, Any], kind: str, exports: list[str]) -> list[str]:
    """Lists what a reader might assume but nobody measured."""
    models = report["models"]
    tasks = {task for task, _ in metrics_of(models)}
    data = recipe.data
    limits = [f"Trained on rows of at most {data.max_length} tokens{LONG_ROWS[data.long_rows]}."]
    if not tasks - {HELD_OUT}:
        limits.append("No public benchmark was run: what the model lost elsewhere is unknown.")
    corpora = corpora_of(models)
    if not corpora:
        limits.append("No perplexity was measured.")
    elif corpora == [HELD_OUT]:
        limits.append("Perplexity was measured on the held-out rows only, not on general text.")
    if HELD_OUT not in tasks:
        limits.append("No answers to held-out rows were scored.")
    scored = [
        value_at(model, "tasks", *pair, "n")
        for model in models.values()
        for pair in metrics_of(models)
    ]
    if smallest := min(filter(None, scored), default=0):
        few = f"Accuracies were measured on as few as {counted(smallest, 'row')}"
        limits.append(f"{few}: mind their standard errors." if smallest > 1 else f"{few}.")
    if kind == QUANTIZED:
        limits += _quantized_limits(report, exports)
        if HELD_OUT in tasks:
            limits += _ignored_penalty(report, exports)
    if base_on_hub(recipe) not in (None, recipe.model.base):
        limits.append(f"The adapter was trained on `{recipe.model.base}`.")
        if kind == ADAPTER:
            limits[-1] = (
                f"The adapter was trained and measured on `{recipe.model.base}`, not on "
                f"{base_on_hub(recipe)}, whose weights may differ."
            )
    return [*limits, "Safety, bias and truthfulness were not measured."]


def _quantized_limits(report: dict[str, Any], exports: list[str]) -> list[str]:
    from finequant.quantize.formats.formats import report_key  # which imports torch

    limits, models = [], report["models"]
    if not report["gate"]["checks"]:
        limits.append("The recipe sets no gate, and so no limit on what quantization may cost.")
    limits.append(
        f"The torchao file takes {models[QUANTIZED]['bits_per_weight']:.2f} bits for each weight "
        "of the base: it keeps each code of 8 bits or fewer in a byte."
    )
    for name in exports:
        measured = models.get(report_key(name))
        if measured is None:
            limits.append(
                f"The export {name} is not in the table: it holds the same codes, but was not "
                "measured."
            )
        elif "speed" not in measured:
            limits.append(f"The export {name} holds the same codes; only its size was measured.")
    return limits


def _ignored_penalty(report: dict[str, Any], exports: list[str]) -> list[str]:
    """Says in one line which programs answer differently, because they do not penalize repetition
    as all models were when they were measured; else []."""
    from finequant.quantize.formats.formats import FORMATS

    penalty = report["generation"].get("repetition_penalty") or 1
    ignoring = [entry.ignores_penalty for name, entry in FORMATS.items() if name in exports]
    ignoring = list(filter(None, ignoring))
    if penalty == 1 or not ignoring:
        return []
    programs = " and ".join(filter(None, [", ".join(ignoring[:-1]), ignoring[-1]]))
    return [
        "Answers to held-out rows were measured with the base's `repetition_penalty` of "
        f"{penalty} on the tokens of prompt and answer. Used as above, {programs} will apply none, "
        "and may give other answers."
    ]


def _license(license: License, recipe: Recipe) -> str:
    name, base = license.name or license.id, f"`{base_on_hub(recipe) or recipe.model.base}`"
    shown = f"[{name}]({license.link})" if license.link else name
    text = f"{shown}, the license of its base, {base}."
    if name == "other":
        theirs = f"[that of its base]({license.link})" if license.link else "that of its base"
        text = f"The license is {theirs}, {base}."
    if license.documents:
        text += f" See {', '.join(f'`{file}`' for file in license.documents)}."
    return text


def _versions(report: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"finequant {version('finequant')}; measured with {libraries}."


def _yaml(recipe: Recipe) -> str:
    """Writes the keys of a recipe that are not the defaults."""
    set_keys = recipe.model_dump(mode="json", exclude={"output_dir"}, exclude_defaults=True)
    return as_yaml(set_keys).strip()
