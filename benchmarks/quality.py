"""Measures what four bits cost SmolLM2-135M: without and with training, per step, on a domain.

python benchmarks/quality.py calibration
python benchmarks/quality.py tables
python benchmarks/quality.py training
python benchmarks/quality.py step
python benchmarks/quality.py domain recipes/assistant.yaml
python benchmarks/quality.py domain benchmarks/banking77.yaml --seeds 0,1,2
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.errors import report_user_errors
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.stages import STAGES, stages_of
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
WIKITEXT = HERE / "wikitext2.yaml"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


ROTATED = ["quantize.rotate=true", "quantize.scale_dtype=bfloat16"]
BEST = ["quantize.effort=best", *ROTATED]
IN_TEN_MINUTES = [*BEST, "quantize.calibration.steps=0", "quantize.calibration.scale_steps=68"]
"""`best` in ten minutes on two cores with avx512_bf16: no block is trained, and fewer steps train
all scales."""
WITHOUT_LABELS = {
    "rtn, scale: max": ["quantize.method=rtn", "quantize.scale=max"],
    "rtn": ["quantize.method=rtn"],
    "hqq": ["quantize.method=hqq", "quantize.scale=max"],
    "gptq": [],
    "gptq, rotated": ["quantize.rotate=true"],
    "gptq, rotated, 32 steps a block": ["quantize.rotate=true", "quantize.calibration.steps=32"],
    "effort: best": BEST,
    "effort: best, head at 8 bits": [*BEST, "quantize.head=8"],
    "effort: best, in ten minutes": IN_TEN_MINUTES,
    "effort: best, in ten minutes, head at 8 bits": [*IN_TEN_MINUTES, "quantize.head=8"],
    "effort: best, 3 bits, head at 8": [*BEST, "quantize.bits=3", "quantize.head=8"],
    "effort: best, 3 bits, two 8-bit tables": [
        *BEST,
        "quantize.bits=3",
        "quantize.head=8",
        "quantize.embedding=8",
    ],
    "effort: best, 3 bits, one 8-bit table": [
        *BEST,
        "quantize.bits=3",
        "quantize.head=8",
        "quantize.embedding=8",
        "quantize.rotate=false",
    ],
}
"""Changes to the recipe, by row of the table."""


@app.command()
def calibration(group_size: int = 32, only: str = "", whole: bool = False) -> None:
    """Measures perplexity without training: float, and each method at four bits, head included.

    only: rows of the table, separated by semicolons; all if empty.
    whole: also perplexity per word of the whole wiki.test.raw, as in lm-eval's `wikitext`.
    """
    from finequant.finetune.device import arithmetic_dtype, device
    from finequant.finetune.model import load_base

    recipe, dtype = wikitext(f"quantize.group_size={group_size}"), arithmetic_dtype(torch.bfloat16)
    figures = {"float": (0.0, perplexities(load_base(recipe.model, dtype), recipe, whole))}
    for name in only.split(";") if only else WITHOUT_LABELS:
        chosen = wikitext(f"quantize.group_size={group_size}", *WITHOUT_LABELS[name])
        started = time.monotonic()
        model = quantized_base(chosen, dtype)
        seconds = time.monotonic() - started
        figures[name] = seconds, perplexities(model, chosen, whole)
        say(f"{name}: {figures[name][1]}")
        del model
        gc.collect()
    columns, rows = figures["float"][1], []
    for name, (seconds, values) in figures.items():
        cells = [f"{seconds:.0f}"]
        for column, exact in columns.items():
            cells += [f"{values[column]:.2f}", f"{values[column] / exact:.3f}"]
        rows.append((name, *cells))
    header = [part for column in columns for part in (column, f"{column}, times float")]
    show(
        f"WikiText-2, groups of {group_size}, no training, {dtype} arithmetic, {device().type}",
        ("method", "seconds", *header),
        rows,
    )


TABLES = {
    "float embedding, 4-bit head": ("rotate=true",),
    "one 8-bit table": ("embedding=8", "head=8", "rotate=false"),
    "one 8-bit table, groups of 64": ("embedding=8", "head=8", "rotate=false", "group_size=64"),
    "4-bit embedding, 4-bit head": ("embedding=4", "rotate=true"),
}
"""Ways to keep embedding and head, as keys of the section `quantize`."""


@app.command()
def tables(tokens: int = 8192, method: str = "gptq") -> None:
    """Measures perplexity and packed size of each way to keep embedding and head, 4-bit layers."""
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.device import arithmetic_dtype
    from finequant.finetune.model import load_base, load_config, load_tokenizer
    from finequant.quantize.checkpoint.writing import quantized_model
    from finequant.quantize.methods.apply import round_model
    from finequant.quantize.methods.transforms import transform_model
    from finequant.quantize.scheme import cast_weights, layer_plan, untie_head
    from finequant.quantize.size.plan import model_size

    tokenizer, rows = load_tokenizer(wikitext().model), []
    config, shipped = load_config(wikitext().model), torch.bfloat16
    dtype = arithmetic_dtype(shipped)
    common = (f"method={method}", "scale_dtype=bfloat16", f"calibration={{tokens: {tokens}}}")
    for name, keys in TABLES.items():
        recipe = wikitext(*(f"quantize.{key}" for key in (*common, *keys)))
        model = load_base(recipe.model, torch.float32)
        untie_head(model)
        transform_model(model, recipe.quantize)
        rounded = round_model(model, recipe, tokenizer, dtype)
        plan = layer_plan(recipe.quantize, config)
        size = model_size(plan, config, shipped, recipe.quantize).packed
        model = quantized_model(cast_weights(model, shipped), rounded, plan, dtype)
        value = perplexity(model, recipe)
        rows.append((name, f"{8 * size / parameter_count(config):.2f}", f"{value:.2f}"))
        say(" ".join(rows[-1]))
        del model, rounded
        gc.collect()
    show(
        f"WikiText-2, {method}, {tokens} tokens, 4 bits, no training",
        ("embedding and head", "bits per weight of the base, packed", "perplexity per token"),
        rows,
    )


AFTER_TRAINING = {
    "all steps, then gptq": [],
    "all steps, then effort: balanced": ROTATED,
    "all steps, then effort: best": BEST,
    "half, then scales learn from effort: best": [
        *BEST,
        "quantize.training={learns: scales, learning_rate: 1e-4, distillation: 0.9}",
    ],
    "half, then an adapter learns from effort: best": [
        *BEST,
        "quantize.training={learns: adapter, learning_rate: 2e-5, distillation: 0.5}",
    ],
}
"""Changes to the recipe after plain LoRA; rows with `quantize.training` spend half of the steps on
it."""


@app.command()
def training(steps: int = 120, learning_rate: float = 5e-4, only: str = "") -> None:
    """Measures perplexity of plain LoRA in float, and of what ships after as many steps in total.

    For plain LoRA, the best checkpoint counts.

    only: rows of the table, separated by semicolons; all if empty.
    """
    half = steps // 2
    common = f"train.learning_rate={learning_rate}"
    plain = wikitext(common, f"train.max_steps={steps}", "output_dir=runs/wikitext2-plain")
    run_stages(plain, "train")
    best = min(float_perplexities(plain))
    rows = [("plain LoRA, float, best checkpoint", best)]
    for name in only.split(";") if only else AFTER_TRAINING:
        keys = AFTER_TRAINING[name]
        aware = any(key.startswith("quantize.training=") for key in keys)
        recipe = wikitext(
            common,
            f"train.max_steps={half if aware else steps}",
            f"output_dir=runs/wikitext2-{'half' if aware else 'plain'}",
            *keys,
            *([f"quantize.training.steps={steps - half}"] if aware else []),
        )
        run_stages(recipe, "train", *(["qat"] if aware else []), "quantize")
        rows.append((name, shipped_perplexity(recipe)))
        say(f"{name}: {rows[-1][1]:.3f}")
    show(
        f"WikiText-2, rank {plain.lora.rank}, {steps} steps of 1,024 tokens, groups of 32",
        ("model", "perplexity per token", "times plain float"),
        [(name, f"{value:.2f}", f"{value / best:.3f}") for name, value in rows],
    )


@app.command()
def domain(recipe: Path, seeds: str = "0", metric: str = "exact_match") -> None:
    """Measures accuracy on a recipe's held-out rows, tuned and quantized, for each seed."""
    rows, drops = [], []
    for seed in map(int, seeds.split(",")):
        loaded = load_recipe(recipe, [f"seed={seed}"])
        loaded = loaded.model_copy(update={"output_dir": f"runs/{loaded.name}-{seed}"})
        run = RunDir.of(loaded)
        run_stages(loaded, *(name for name in stages_of(loaded) if name in STAGES))
        models = json.loads(run.report.read_text(encoding="utf-8"))["models"]
        scores = [models[name]["tasks"]["held_out"][metric] for name in ("tuned", "quantized")]
        drops.append(100 * (scores[0]["value"] - scores[1]["value"]))
        shown = [f"{100 * score['value']:.1f} ± {100 * score['stderr']:.1f}" for score in scores]
        bits = f"{models['quantized']['bits_per_weight']:.2f}"
        rows.append((str(seed), *shown, f"{drops[-1]:+.1f}", bits))
    spread = f"{statistics.fmean(drops):+.1f}"
    if len(drops) > 1:
        spread += f" ± {statistics.stdev(drops):.1f}"
    rows.append(("mean", "", "", spread, ""))
    show(
        f"{recipe.stem}, {metric} in %",
        ("seed", "tuned", "quantized", "points lost", "bits per weight on disk"),
        rows,
    )


@app.command()
def step(tokens: int = 4096, rounds: int = 5) -> None:
    """Times a training step, plain and quantization-aware in turn."""
    from peft import get_peft_model

    from finequant.finetune.adapter import lora_config
    from finequant.finetune.lora import fuse
    from finequant.finetune.model import load_base, load_config, load_tokenizer
    from finequant.quantize.checkpoint.reading import WHOLE
    from finequant.quantize.merge.adapter import open_base
    from finequant.quantize.methods.rtn import rtn
    from finequant.quantize.methods.sequences import calibration_sequences
    from finequant.quantize.scheme import layer_plan, shipped_dtype
    from finequant.quantize.training.model import fake_quantized_model

    recipe = wikitext("quantize.method=rtn")
    base = open_base(recipe.model)
    plan = layer_plan(recipe.quantize, base.config)
    dtype = shipped_dtype(recipe.quantize, load_config(recipe.model))
    ids = calibration_sequences(recipe, load_tokenizer(recipe.model), tokens)
    plain = load_base(recipe.model, dtype)
    plain = get_peft_model(plain, lora_config(recipe.lora, plain))
    fuse(plain)  # as plain training on a CPU does
    models = {"plain": plain}
    start = {
        name: rtn(base.weights(f"{name}.weight", WHOLE).float(), scheme)
        for name, scheme in plan.items()
        if scheme
    }
    for name, settings in {
        "quantization-aware": "{steps: 1}",
        "quantization-aware, with a teacher": "{steps: 1, distillation: 1.0}",
        "quantization-aware, scales": "{steps: 1, learns: scales}",
    }.items():
        changed = wikitext("quantize.method=rtn", f"quantize.training={settings}")
        models[name] = fake_quantized_model(changed, base.weights, start, plan, dtype)
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for name, model in models.items()
    }
    seconds = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            started = time.monotonic()
            with torch.autocast("cpu", dtype, enabled=name == "plain" and dtype == torch.bfloat16):
                loss = step_loss(model, ids, name.endswith("teacher"))
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number:  # the first round allocates memory
                seconds[name].append(time.monotonic() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    show(
        f"A training step of {tokens} tokens, median of {rounds}, in turn",
        ("training", "seconds", "times plain"),
        [(name, f"{s:.2f}", f"{s / medians['plain']:.2f}") for name, s in medians.items()],
    )


def step_loss(model: LlamaForCausalLM, ids: torch.Tensor, has_teacher: bool) -> torch.Tensor:
    """Computes the mean loss of predicting the ids [rows, tokens], or what a teacher predicts."""
    from finequant.quantize.training.fake_quantize import disabled
    from finequant.quantize.training.model import fake_quantized_layers
    from finequant.quantize.training.trainer import divergence

    logits = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
    if not has_teacher:
        return cross_entropy(logits, ids[:, 1:].flatten())
    with torch.no_grad(), disabled(fake_quantized_layers(model).values()):
        exact = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
    return divergence(exact, logits) / ids.numel()


def run_stages(recipe: Recipe, *stages: str) -> None:
    """Runs the stages whose inputs have changed."""
    from finequant.evaluate.compare import compare
    from finequant.finetune.train import train
    from finequant.quantize.convert import quantize
    from finequant.quantize.training.train import train as train_codes

    functions = {"train": train, "qat": train_codes, "quantize": quantize, "evaluate": compare}
    run = RunDir.of(recipe)
    for stage in stages:
        if run.what_changed(recipe, stage) != []:
            functions[stage](recipe, run)
            gc.collect()


def wikitext(*overrides: str) -> Recipe:
    return load_recipe(WIKITEXT, overrides)


def quantized_base(recipe: Recipe, dtype: torch.dtype) -> LlamaForCausalLM:
    """Quantizes the base of a recipe, without training, and moves it to the device.

    dtype: that of the arithmetic.
    """
    from finequant.finetune.device import device
    from finequant.finetune.model import load_base, load_config, load_tokenizer
    from finequant.quantize.checkpoint.writing import quantized_model
    from finequant.quantize.methods.apply import round_model
    from finequant.quantize.methods.transforms import transform_model
    from finequant.quantize.scheme import layer_plan, untie_head

    model = load_base(recipe.model, torch.float32)
    untie_head(model)
    transform_model(model, recipe.quantize)
    rounded = round_model(model, recipe, load_tokenizer(recipe.model), dtype)
    plan = layer_plan(recipe.quantize, load_config(recipe.model))
    return quantized_model(model, rounded, plan, dtype).to(device()).eval()


def perplexity(model: LlamaForCausalLM, recipe: Recipe) -> float:
    """Measures perplexity per token on the recipe's windows."""
    return next(iter(perplexities(model, recipe).values()))


def perplexities(model: LlamaForCausalLM, recipe: Recipe, whole: bool = False) -> dict[str, float]:
    """Measures perplexity per token on the recipe's windows, and per word of wiki.test.raw."""
    from finequant.evaluate.dequantized import dequantize_once
    from finequant.evaluate.metrics.corpora import read_corpus
    from finequant.evaluate.metrics.perplexity import corpus_windows, measure
    from finequant.finetune.device import device
    from finequant.finetune.model import load_tokenizer

    (corpus,) = recipe.evaluate.perplexity
    measured = {"per token": (corpus, "token")}
    if whole:
        raw = str(Path(corpus.source).with_name("wiki.test.raw"))
        changes = {"source": raw, "documents": "wikitext", "max_length": 2048, "windows": None}
        measured["per word, whole test"] = (corpus.model_copy(update=changes), "word")
    model = dequantize_once(model.to(device()).eval(), [0])
    tokenizer, values = load_tokenizer(recipe.model), {}
    for column, (corpus, unit) in measured.items():
        texts = corpus_windows(read_corpus(corpus), tokenizer, corpus, 8192)
        values[column] = measure(model, *texts, 4, corpus.name)[unit]
    return values


def float_perplexities(recipe: Recipe) -> list[float]:
    """Measures the perplexity of base + adapter at each checkpoint of a run."""
    from peft import PeftModel

    from finequant.finetune.model import load_base

    perplexities = []
    for checkpoint in sorted(RunDir.of(recipe).checkpoints.glob("checkpoint-*")):
        base = load_base(recipe.model, torch.bfloat16)
        merged = PeftModel.from_pretrained(base, checkpoint).merge_and_unload()
        perplexities.append(perplexity(merged, recipe))
        say(f"{checkpoint.name}: {perplexities[-1]:.3f}")
    return perplexities


def shipped_perplexity(recipe: Recipe) -> float:
    from transformers import AutoModelForCausalLM

    folder = RunDir.of(recipe).quantized
    return perplexity(AutoModelForCausalLM.from_pretrained(folder), recipe)


def show(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints the table, and the same as JSON on one line."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(
        json.dumps({"title": title, "rows": [dict(zip(header, row, strict=True)) for row in rows]})
    )


if __name__ == "__main__":
    with report_user_errors():
        quiet_libraries()
        app()
