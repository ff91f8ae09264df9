"""What four bits cost SmolLM2-135M: without training, with it, per training step, on a domain.

python benchmarks/quality.py calibration
python benchmarks/quality.py training
python benchmarks/quality.py step
python benchmarks/quality.py domain recipes/quickstart.yaml
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

from finequant.recipes.command_line import quiet_libraries, say
from finequant.recipes.errors import told_to_the_user
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HERE = Path(__file__).parent
WIKITEXT = HERE / "wikitext2.yaml"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def calibration(group_size: int = 32, tokens: int = 8192, whole: bool = False) -> None:
    """Perplexity without labels: float, and each method at four bits, head included."""
    from finequant.finetune.model import load_base, load_tokenizer
    from finequant.quantize.checkpoint.writing import quantized_model
    from finequant.quantize.methods.method import round_model
    from finequant.quantize.methods.rotation import rotate
    from finequant.quantize.scheme import layer_plan, untie_head

    recipe = wikitext(f"quantize.group_size={group_size}")
    tokenizer = load_tokenizer(recipe.model)
    rows = [("float", 0.0, perplexity(load_base(recipe.model, torch.bfloat16), recipe, whole))]
    for method, scale, steps, rotates in (
        ("rtn", "max", 0, False),
        ("rtn", "search", 0, False),
        ("hqq", "max", 0, False),
        ("gptq", "search", 0, False),
        ("gptq", "search", 0, True),
        ("gptq", "search", 32, True),
    ):
        chosen = wikitext(
            "train.quantization_aware=false",
            f"quantize.group_size={group_size}",
            f"quantize.method={method}",
            f"quantize.scale={scale}",
            f"quantize.rotate={str(rotates).lower()}",
            f"quantize.calibration={{tokens: {tokens}, steps: {steps}}}",
        )
        model = load_base(chosen.model, torch.float32)
        untie_head(model)
        if rotates:
            rotate(model)
        started = time.monotonic()
        rounded = round_model(model, chosen, tokenizer, torch.bfloat16)
        seconds = time.monotonic() - started
        plan = layer_plan(chosen.quantize, model.config)
        model = quantized_model(model, rounded, plan, torch.bfloat16)
        name = f"{method}, scale: {scale}" + (", rotated" if rotates else "")
        name += f", {steps} steps a block" if steps else ""
        rows.append((name, seconds, perplexity(model, chosen, whole)))
        say(f"{name}: {rows[-1][2]:.2f}")
        del model, rounded
        gc.collect()
    show(
        f"WikiText-2, 4 bits in groups of {group_size}, no training",
        ("method", "seconds", "perplexity per token", "times float"),
        [
            (name, f"{seconds:.0f}", f"{value:.2f}", f"{value / rows[0][2]:.3f}")
            for name, seconds, value in rows
        ],
    )


@app.command()
def training(steps: int = 120, learning_rate: float = 5e-4) -> None:
    """Perplexity of plain LoRA in float, of its rounding, and of quantization-aware training.

    `steps` are the budget of each run: those of plain LoRA, and those of quantization-aware LoRA
    from the start. `learning_rate` is that of plain LoRA; its best checkpoint counts.
    """
    aware = wikitext(f"train.max_steps={steps}", "output_dir=runs/wikitext2-aware")
    plain = wikitext(
        f"train.max_steps={steps}",
        f"train.learning_rate={learning_rate}",
        "train.quantization_aware=false",
        "output_dir=runs/wikitext2-plain",
    )
    for recipe in (plain, aware):
        run_stages(recipe, "train", "quantize")
    float_best = min(float_perplexities(plain))
    rows = [
        ("plain LoRA, float, best checkpoint", float_best),
        ("plain LoRA, then gptq", shipped_perplexity(plain)),
        ("quantization-aware LoRA, as shipped", shipped_perplexity(aware)),
    ]
    show(
        f"WikiText-2, rank {plain.lora.rank}, {steps} steps of 1,024 tokens, groups of 32",
        ("model", "perplexity per token", "times plain float"),
        [(name, f"{value:.2f}", f"{value / float_best:.3f}") for name, value in rows],
    )


@app.command()
def domain(recipe: Path, seeds: str = "0", metric: str = "exact_match") -> None:
    """Accuracy on held-out rows of a recipe, tuned and quantized, for each seed."""
    rows, drops = [], []
    for seed in map(int, seeds.split(",")):
        loaded = load_recipe(recipe, [f"seed={seed}"])
        loaded = loaded.model_copy(update={"output_dir": f"runs/{loaded.name}-{seed}"})
        run = RunDir.of(loaded)
        run_stages(loaded, "train", "quantize", "evaluate")
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
    """Seconds of a training step, plain and quantization-aware in turn."""
    from peft import get_peft_model

    from finequant.finetune.lora import fuse
    from finequant.finetune.model import load_base, load_tokenizer, lora_config, training_precision
    from finequant.finetune.trainer import divergence
    from finequant.quantize.methods.method import calibration_sequences, round_model
    from finequant.quantize.scheme import layer_plan, untie_head
    from finequant.quantize.training.fake_quantize import not_rounded, round_in_training

    recipe = wikitext("quantize.method=rtn")
    tokenizer = load_tokenizer(recipe.model)
    dtype, reason = training_precision("auto")
    say(f"{dtype}: {reason}")
    ids = calibration_sequences(recipe, tokenizer)[: tokens // 512]
    models = {}
    for name in (
        "plain",
        "quantization-aware",
        "quantization-aware, with a teacher",
        "quantization-aware, scales",
    ):
        base = load_base(recipe.model, dtype)
        untie_head(base)
        start = round_model(base, recipe, tokenizer, dtype) if name != "plain" else {}
        model = get_peft_model(base, lora_config(recipe.lora, base))
        plan = layer_plan(recipe.quantize, base.config)
        learns = "scales" if name.endswith("scales") else "adapter"
        layers = round_in_training(model, start, plan, dtype, learns)
        if not start:
            fuse(model)  # as plain training on a CPU does
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        models[name] = model, layers.values(), torch.optim.AdamW(weights, lr=1e-4)
    seconds = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, (model, layers, optimizer) in models.items():
            started = time.monotonic()
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                logits = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
                if name.endswith("teacher"):
                    with torch.no_grad(), model.disable_adapter(), not_rounded(layers):
                        exact = model(input_ids=ids).logits[:, :-1].float().flatten(0, 1)
                    loss = divergence(exact, logits) / ids.numel()
                else:
                    loss = cross_entropy(logits, ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number:  # the first one allocates
                seconds[name].append(time.monotonic() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    show(
        f"A training step of {tokens} tokens, median of {rounds}, in turn",
        ("training", "seconds", "times plain"),
        [(name, f"{s:.2f}", f"{s / medians['plain']:.2f}") for name, s in medians.items()],
    )


def run_stages(recipe: Recipe, *stages: str) -> None:
    """Those whose inputs have changed."""
    from finequant.evaluate.compare import compare
    from finequant.finetune.train import train
    from finequant.quantize.convert import quantize

    run, functions = RunDir.of(recipe), {"train": train, "quantize": quantize, "evaluate": compare}
    for stage in stages:
        if run.what_changed(recipe, stage) != []:
            functions[stage](recipe, run)
            gc.collect()


def wikitext(*overrides: str) -> Recipe:
    return load_recipe(WIKITEXT, overrides)


def perplexity(model: LlamaForCausalLM, recipe: Recipe, whole: bool = False) -> float:
    """Per token, on the recipe's windows; `whole`: on all of wiki.test.raw, as lm-eval has it."""
    from finequant.evaluate.dequantized import dequantize_once
    from finequant.evaluate.metrics.corpora import read_corpus
    from finequant.evaluate.metrics.perplexity import corpus_windows, measure
    from finequant.finetune.model import load_tokenizer

    corpus = recipe.evaluate.perplexity[0]
    if whole:
        raw = str(Path(corpus.source).with_name("wiki.test.raw"))
        changes = {"source": raw, "documents": "wikitext", "max_length": 2048, "windows": None}
        corpus = corpus.model_copy(update=changes)
    tokenizer = load_tokenizer(recipe.model)
    texts = corpus_windows(read_corpus(corpus), tokenizer, corpus, 8192)
    return measure(dequantize_once(model.eval(), [0]), *texts, 4, corpus.name)["token"]


def float_perplexities(recipe: Recipe) -> list[float]:
    """Of base + adapter at each checkpoint of a run."""
    from peft import PeftModel

    from finequant.finetune.model import load_base

    found = []
    for checkpoint in sorted(RunDir.of(recipe).checkpoints.glob("checkpoint-*")):
        base = load_base(recipe.model, torch.bfloat16)
        merged = PeftModel.from_pretrained(base, checkpoint).merge_and_unload()
        found.append(perplexity(merged, recipe))
        say(f"{checkpoint.name}: {found[-1]:.3f}")
    return found


def shipped_perplexity(recipe: Recipe) -> float:
    from transformers import AutoModelForCausalLM

    folder = RunDir.of(recipe).quantized
    return perplexity(AutoModelForCausalLM.from_pretrained(folder), recipe)


def show(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """The table, and the same as JSON on one line."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(
        json.dumps({"title": title, "rows": [dict(zip(header, row, strict=True)) for row in rows]})
    )


if __name__ == "__main__":
    with told_to_the_user():
        quiet_libraries()
        app()
