"""Measures tokens per second of LoRA training, beside `trl sft` with default and best settings.

python benchmarks/training.py
python benchmarks/training.py --steps 60 --rounds 1

All contenders have the same base, tokens, adapter and rows per optimizer step; each runs as a
separate process, in turn. Padding does not count as tokens, nor loading and evaluation as time.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from finequant.finetune.train import LOG
from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.errors import report_user_errors
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from transformers import LlamaConfig

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "assistant.yaml"
KEPT = ("--gradient_checkpointing", "false")
BEST = {
    torch.bfloat16: ("bf16 weights, no checkpointing", ("--dtype", "bfloat16", *KEPT)),
    torch.float32: (
        "float32, no checkpointing",
        ("--dtype", "float32", "--bf16", "false", *KEPT),
    ),
}
"""The fastest options by the dtype that finequant chooses here. They change neither rows nor
steps; eager attention and padding_free are not among them."""


class Measured(NamedTuple):
    seconds: float
    loss: float
    """Loss on the validation rows after the last step."""


def main(steps: int = 20, rounds: int = 2, validation: int = 40) -> None:
    """Prints tokens per second, the share of the matrix products' peak, and the losses."""
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.finetune.data.tokens import encode
    from finequant.finetune.device import training_precision
    from finequant.finetune.model import load_config, load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        recipe = local_copy(Path(folder), validation)
        config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
        rows = prepared_splits(recipe).train
        encoded = [encode(row, tokenizer, recipe.data) for row in rows]
        mean = statistics.fmean(len(item.input_ids) for item in encoded)
        targets = statistics.fmean(sum(label >= 0 for label in item.labels) for item in encoded)
        dtype = training_precision("auto")[0]
        best, options = BEST[dtype]
        commands = {
            "trl sft, its defaults": trl_command(recipe, steps),
            f"trl sft, {best}": [*trl_command(recipe, steps), *options],
            "finequant": our_command(recipe, steps),
        }
        measured: dict[str, list[Measured]] = {name: [] for name in commands}
        for number in range(rounds):
            for name, command in commands.items():
                output = Path(folder) / f"{len(measured[name])}-{name.replace(' ', '-')}"
                measured[name].append(measure(command, output))
                say(f"round {number + 1} of {rounds}: {name}: {measured[name][-1]}")
    peak = matrix_product_rate(dtype)
    tokens = steps * recipe.train.batch_size * mean
    forward = block_weights(config) + head_weights(config) * targets / mean
    operations = 4 * tokens * forward
    seconds = {
        name: statistics.median(item.seconds for item in measured[name]) for name in commands
    }
    fastest = min(seconds.values())
    show(
        f"LoRA rank {recipe.lora.rank}, {steps} steps of {recipe.train.batch_size} rows, median of "
        f"{rounds} rounds in turn; matrix products alone: {peak / 1e12:.2f} TFLOP/s in {dtype}",
        (
            "training",
            "tokens per second",
            "times the fastest",
            "share of the peak",
            "validation loss",
        ),
        [
            (
                name,
                f"{tokens / took:.0f}",
                f"{took / fastest:.2f}",
                f"{operations / took / peak:.0%}",
                f"{measured[name][-1].loss:.4f}",
            )
            for name, took in seconds.items()
        ],
    )


def local_copy(folder: Path, validation: int) -> Recipe:
    """Writes the assistant's base as a folder and, for trl, the rows' tokens beside it: from the
    rows' text, trl would also train on the line break after an answer."""
    from finequant.finetune.data.dataset import to_dataset
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.finetune.model import load_base, load_tokenizer

    few = load_recipe(RECIPE).data.validation[0].source
    recipe = load_recipe(
        RECIPE,
        [f"data.validation={{source: {few}, limit: {validation}}}"],
    )
    base, tokenizer = load_base(recipe.model, torch.float32), load_tokenizer(recipe.model)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    splits = prepared_splits(recipe)
    for name, rows in (("train", splits.train), ("validation", splits.validation)):
        to_dataset(rows, tokenizer, recipe.data).to_json(folder / f"data/{name}.jsonl")
    model = recipe.model.model_copy(update={"base": str(folder / "base")})
    return recipe.model_copy(update={"model": model})


def trl_command(recipe: Recipe, steps: int) -> list[str]:
    train, lora = recipe.train, recipe.lora
    settings = {
        "model_name_or_path": recipe.model.base,
        "dataset_name": Path(recipe.model.base).parent / "data",
        "dataset_test_split": "validation",
        "lora_r": lora.rank,
        "lora_alpha": int(lora.alpha),
        "lora_dropout": lora.dropout,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": train.batch_size,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup,
        "max_steps": steps,
        "eval_strategy": "steps",
        "eval_steps": steps,
        "logging_steps": steps,
        "seed": recipe.seed,
        "save_strategy": "no",
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
    }
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return ["trl", "sft", "--use_peft", *options, "--output_dir"]


def our_command(recipe: Recipe, steps: int) -> list[str]:
    from finequant.recipes.load import write_recipe

    file = Path(recipe.model.base).parent / "recipe.yaml"
    write_recipe(recipe, file)
    keys = ("max_steps", "eval_steps", "logging_steps")
    settings = [f"train.{key}={steps}" for key in keys]
    return [sys.executable, "-m", "finequant.finetune.train", str(file), *settings, "output_dir="]


def measure(command: list[str], output: Path) -> Measured:
    """Measures the training loop by what transformers' Trainer logs at its end."""
    if command[-1] == "output_dir=":
        command = [*command[:-1], f"output_dir={output}"]
    else:
        at = command.index("--output_dir")
        command = [*command[: at + 1], str(output), *command[at + 1 :]]
        command[0] = str(Path(sys.executable).with_name("trl"))
    # `trl sft` goes through accelerate, whose default is one core.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{process.stderr[-2000:]}")

    ours = output / "adapter" / LOG
    log = ours.read_text() if ours.exists() else process.stdout

    def last(key: str) -> float:
        return float(re.findall(rf"['\"]{key}['\"]: '?([0-9.e+-]+)", log)[-1])

    return Measured(last("train_runtime") - last("eval_runtime"), last("eval_loss"))


def block_weights(config: LlamaConfig) -> int:
    """Counts the weights of the decoder blocks; each costs two operations forward, two back."""
    from finequant.finetune.architecture import EMBEDDING, HEAD, layer_shapes

    shapes = layer_shapes(config)
    return sum(a * b for name, (a, b) in shapes.items() if name not in (HEAD, EMBEDDING))


def head_weights(config: LlamaConfig) -> int:
    return config.vocab_size * config.hidden_size


def matrix_product_rate(dtype: torch.dtype, seconds: float = 3.0) -> float:
    """Measures the operations per second of matrix products of this model's shape, where training
    computes."""
    from finequant.finetune.device import device

    x = torch.randn(1024, 576, dtype=dtype, device=device())
    weight = torch.randn(1536, 576, dtype=dtype, device=device())
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        torch.nn.functional.linear(x, weight)
        if x.device.type != "cpu":
            torch.accelerator.synchronize()
        count += 1
    return count * 2 * x.numel() * weight.shape[0] / (time.monotonic() - started)


def show(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    with report_user_errors():
        quiet_libraries()
        typer.run(main)
