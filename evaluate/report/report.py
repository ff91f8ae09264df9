"""The report of a run: report.json, report.md, plots/, and the table in the terminal.

A report is a plain dict. All of its keys but `models` may be missing:

    recipe, versions   the resolved recipe, with the settings that adapter and quantized/ were made
                       with; versions of Python and of the libraries
    measuring_code     the version of the code that measured the models
    arithmetic         the dtype that the models computed in
    models             {NAME: MODEL} for base, tuned, quantized, and each export
    changes            {TASK: {METRIC: SCORE}} from tuned to quantized, paired row by row
    divergence         {"kl", "floor", "top1_agreement", "tokens"} of quantized from tuned
    passages           texts around the tokens whose prediction changed most: [[{"text", "kl"}]]
    right_by           the metric that calls an answer right or wrong
    most_frequent      {"share", "n"}: what always giving the most frequent answer would score
    cut_answers        {"longer", "n", "longest", "limit"}: reference answers that are longer than
                       what is generated
    layers             bits, group size and signal-to-noise ratio of each layer
    samples            rows with the answers of every model: [{"prompt", "reference", "answers"}]
    training           the log of training
    gate               {"passed", "checks"}

A MODEL:

    size_bytes, bits_per_weight                of its files
    packed_bytes, packed_bits_per_weight       of the weights in the dtype they are measured in,
                                               and each code at its own bits
    activations                                how the inputs of linear layers are rounded
    perplexity                                 {CORPUS: {"token", "word", "byte", "tokens"}}
    tasks                                      {TASK: {METRIC: SCORE}}
    speed (exports)                            {"prompt", "decoding": tokens per second,
                                               "peak_memory_bytes"}
    parity (exports, compared with quantized)  {"same_answers", "n", "same_prompts", "kl"}

A SCORE is {"value", "stderr", "n"}, with "groups" if fewer than n rows are independent.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from finequant.evaluate.inputs import HELD_OUT, cut_line
from finequant.evaluate.metrics.text_metrics import is_out_of_100
from finequant.evaluate.models import MODELS
from finequant.evaluate.report.advice import advice
from finequant.evaluate.report.gate import verdict_lines
from finequant.evaluate.report.plots import DESCRIPTIONS, DRAWINGS, draw_plot
from finequant.evaluate.report.table import (
    MISSING,
    bullets,
    comparison_rows,
    markdown_table,
    print_rows,
    shown_number,
    shown_score,
)
from finequant.evaluate.report.values import (
    Report,
    corpora_of,
    finite,
    finite_only,
    float_at,
    metrics_of,
    spreads,
    to_percent,
    value_at,
)
from finequant.recipes.artifact import replace_text
from finequant.recipes.errors import counted

MIN_SHARE = 0.2  # below it, no model is mistaken for a good one that always gives the same answer
MAX_SAMPLE_CHARACTERS = 1000  # in report.md; report.json has the whole sample


def print_table(report: Report) -> None:
    """Prints the comparison, the divergence, the gate's verdict and what may help to stdout."""
    console = print_rows(*comparison_rows(report))
    lines = [*tuning_lines(report), *baseline_lines(report)]
    lines += [*divergence_lines(report), *verdict_lines(report)]
    if changes := advice(report):
        lines += ["What may help:", *(f"- {line}" for line in changes)]
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)


def write_report(report: Report, folder: Path) -> None:
    """Writes plots/, report.md, and finally report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {name for name, draw in DRAWINGS.items() if draw_plot(draw, report, folder, name)}
    replace_text(folder / "report.md", _markdown(report, plots))
    write_json(report, folder / "report.json")


def write_json(report: Report, file: Path) -> None:
    """Writes a report; infinite or NaN becomes null, which JSON has."""
    content = json.dumps(finite_only(report), indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(file, content + "\n")


def _markdown(report: Report, plots: set[str]) -> str:
    recipe = report.get("recipe") or {}
    name, base = recipe.get("name") or "run", value_at(recipe, "model", "base")
    seed, quantize = recipe.get("seed"), recipe.get("quantize") or {}
    versions = ", ".join(f"{key} {value}" for key, value in (report.get("versions") or {}).items())
    changes = [*divergence_lines(report), *verdict_lines(report)]
    sections = [
        f"# {name}: fine-tuned, quantized, compared",
        f"Base model {_code(str(base))}, seed {seed}; linear layers are quantized "
        f"{_widths(quantize)}. `finequant run recipe.yaml` repeats the run.",
        "## Base, tuned and quantized",
        markdown_table(*comparison_rows(report)),
        f"All models are measured on the same inputs{in_arithmetic(report)}. "
        "± is one standard error; for a change, that of the row-by-row differences.",
        "\n\n".join([*tuning_lines(report), *baseline_lines(report)]),
        image_link(plots, "comparison"),
        f"## What quantization changed\n\n{bullets(changes)}" if changes else "",
        f"## What may help\n\n{bullets(advice(report))}" if advice(report) else "",
        _worst_layers(report),
        image_link(plots, "layers"),
        _normalizers(report),
        _samples(report),
        f"## Training\n\n{image}" if (image := image_link(plots, "loss")) else "",
        f"## Made with\n\n{versions}" if versions else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def in_arithmetic(report: Report) -> str:
    """Says in which arithmetic the models were measured, after a comma; nothing if unknown."""
    dtype = report.get("arithmetic")
    return f", in {dtype} arithmetic{exports_apart(report)}" if dtype else ""


def exports_apart(report: Report) -> str:
    """Says that a program which runs an export computes in its own way, if one was measured."""
    if not any("speed" in model for model in report["models"].values()):
        return ""
    return " (exports: as the programs that run them compute)"


def _widths(quantize: dict[str, Any]) -> str:
    if quantize.get("layers") or quantize.get("budget"):
        return "according to the layer plan in quantized/quantization.json"
    bits, head = quantize.get("bits"), quantize.get("head")
    text = f"to {counted(bits, 'bit')} in groups of {quantize.get('group_size')}"
    if head == "float":
        return f"{text}, except for the head, which stays in float"
    return f"{text}, and the head to {head} bits" if head not in (None, "quantize", bits) else text


def baseline_lines(report: Report) -> list[str]:
    """Says what always giving the most frequent answer would score, if that is a fifth or more, how
    many answers no model could give, because they are longer than what is generated, and why a
    score has no ±."""
    frequent, lines = report.get("most_frequent") or {}, []
    if frequent.get("share", 0) >= MIN_SHARE:
        lines.append(
            "A model that always gives the most frequent reference answer is right in "
            f"{shown_number(100 * frequent['share'], 1)}% of the {frequent['n']} held-out rows."
        )
    if cut := report.get("cut_answers"):
        line = cut_line(cut)
        lines.append(f"{line[0].upper()}{line[1:]}.")
    return [*lines, *_equal_rows_lines(report)]


def _equal_rows_lines(report: Report) -> list[str]:
    """Says how far an accuracy may be from the true one if all rows have the same value: with n
    rows, the exact 95% limit is 1 - 0.05^(1/n), about 3 / n (the rule of three)."""
    models = report["models"]
    scores = [
        value_at(node, task, metric)
        for node in (report.get("changes"), *(model.get("tasks") for model in models.values()))
        for task, metric in metrics_of(models)
        if not is_out_of_100(metric)
    ]
    alike = [score for score in scores if _is_without_spread(score)]
    rows = min((score.get("groups", score.get("n", 0)) for score in alike), default=0)
    if rows < 2:
        return []
    limit = shown_number(100 * (1 - 0.05 ** (1 / rows)), 1)
    return [
        "Where all rows have the same value, no ± is shown, because they have no spread: the true "
        f"value may still be {limit} points away (95% limit for {rows} independent rows)."
    ]


def _is_without_spread(score: dict[str, Any] | None) -> bool:
    error = value_at(score, "stderr")
    return finite(error) and not spreads(error)


def tuning_lines(report: Report) -> list[str]:
    """Says in one line if fine-tuning raised no accuracy on the held-out rows or, where these were
    not asked, on any task; else [], as when base and tuned have every point."""
    pairs = metrics_of(report["models"])
    asked = [pair for pair in pairs if pair[0] == HELD_OUT] or pairs
    base, tuned = (report["models"].get(name) for name in ("base", "tuned"))
    values = [
        [to_percent(pair[1]) * float_at(model, "tasks", *pair, "value") for model in (base, tuned)]
        for pair in asked
    ]
    is_better = not all(after <= before for before, after in values)
    if not values or is_better or all(after == 100 for _, after in values):
        return []
    was, is_now = (float_at(m, "perplexity", HELD_OUT, "token") for m in (base, tuned))
    on_rows = "on the held-out rows"
    which, there = (f" {on_rows}", "there") if asked != pairs else ("", on_rows)
    though = f", though its perplexity {there} is lower" if is_now < was else ""
    return [
        f"Tuned is no better than base by any accuracy metric{which}{though}: train longer, or "
        "look at the training rows and their target tokens with `finequant data`."
    ]


def divergence_lines(report: Report) -> list[str]:
    """Says in one line how far quantized is from tuned; [] if this was not measured.

    Logits that were computed in float32 have no floor, also where bfloat16 ships.
    """
    divergence = report.get("divergence")
    if not divergence or divergence.get("tokens") == 0:  # lm-eval's tasks alone
        return []
    agreement = shown_score(divergence.get("top1_agreement"), 100)
    kl, rounding = shown_score(divergence.get("kl"), 1, digits=4), ""
    if value_at(floor := divergence.get("floor"), "value"):
        least = shown_score(floor, 1, digits=4)
        rounding = f" (rounding logits to the shipped dtype alone gives {least})"
    return [
        f"Quantized vs. tuned, over {divergence.get('tokens')} tokens: KL divergence "
        f"{kl} nats per token{rounding}; "
        f"the most likely token is the same at {agreement}% of positions"
    ]


def _worst_layers(report: Report) -> str:
    layers = [layer for layer in report.get("layers") or [] if finite(layer.get("snr_db"))]
    worst = sorted(layers, key=lambda layer: layer["snr_db"])[:5]
    rows = [
        [_code(x["name"]), str(x["bits"]), str(x["group_size"]), shown_number(x["snr_db"], 1)]
        for x in worst
    ]
    header = ["layers that lost most", "bits", "group size", "signal-to-noise ratio in dB"]
    return markdown_table(header, rows) if rows else ""


def _normalizers(report: Report) -> str:
    rows = []
    for corpus in corpora_of(report["models"]):
        for name, model in report["models"].items():
            score = value_at(model, "perplexity", corpus)
            if not score:  # such as an export that was only sized
                continue
            values = [shown_number(score.get(key), digits=4) for key in ("token", "word", "byte")]
            rows.append([f"{corpus}, {name}", *values, shown_number(score.get("tokens"), digits=0)])
    if not rows:
        return ""
    header = ["perplexity", "per token", "per word", "per byte", "scored tokens"]
    return (
        "## Perplexity per token, word, and byte\n\n"
        "exp(L / N): L is the summed negative log-likelihood, always of the same tokens; N is "
        "the number of tokens, words, or UTF-8 bytes. Compare only numbers with the same N."
        f"\n\n{markdown_table(header, rows)}"
    )


def _samples(report: Report) -> str:
    samples = report.get("samples") or []
    answered = {name for sample in samples for name in sample["answers"]}
    names = [name for name in report["models"] if name in answered or name in MODELS]
    rows = [
        [_code(sample["prompt"]), _code(sample["reference"])]
        + [_code(value_at(sample, "answers", name)) for name in names]
        for sample in samples
    ]
    table = markdown_table(["prompt", "reference", *names], rows, align=":---")
    return f"## Sample answers\n\n{table}" if rows else ""


def _code(text: str | None) -> str:
    """Formats text as code in one table cell, where nothing acts as Markdown or HTML."""
    if not text:
        return MISSING if text is None else "*(empty)*"
    cut = text[:MAX_SAMPLE_CHARACTERS] + ("…" if len(text) > MAX_SAMPLE_CHARACTERS else "")
    safe = re.sub(
        r"[\\`*_\[\]|~$]", lambda match: f"&#{ord(match[0])};", html.escape(cut, quote=False)
    )
    return f"<code>{'<br>'.join(safe.splitlines())}</code>"


def image_link(plots: set[str], name: str) -> str:
    return f"![{DESCRIPTIONS[name]}](plots/{name}.png)" if name in plots else ""
