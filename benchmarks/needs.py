"""Computes what a recipe needs, by the size of its base: two tables, from shapes alone.

python benchmarks/needs.py           prints them
python benchmarks/needs.py --write   writes them into README.md and docs/memory.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from ruamel.yaml import YAML

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.size.machine import Machine
    from finequant.recipes.schema import Recipe

ROOT = Path(__file__).parents[1]
CELLS = re.compile(r"(?<=<!-- needs: `python benchmarks/needs.py` -->\n).*?(?=<!-- /)", re.S)

KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings"),
)
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152, True),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256, False),
    "Llama-3.1-405B": (16384, 53248, 126, 128, 8, 128256, False),
}
SMALL, LARGE = list(SHAPES)[:4], list(SHAPES)[3:]
COLUMNS = {
    "train, GPU": ("train", "gpu", "float"),
    "train, GPU, base in nf4": ("train", "gpu", "nf4"),
    "train, CPU": ("train", "cpu", "float"),
    "quantize, CPU": ("quantize", "cpu", "float"),
    "evaluate, GPU": ("evaluate", "gpu", "float"),
    "evaluate, CPU": ("evaluate", "cpu", "float"),
}
TOKENS = 1024

GPUS = {"24 GB": ("24GB", 1), "80 GB": ("80GB", 1), "8 x 80 GB": ("80GB", 8)}
STEP = ["train.micro_batch_size=2", "data.max_length=2048", "train.gradient_checkpointing=true"]
WORK = {
    "LoRA": ("train", []),
    "LoRA, no checkpointing": ("train", ["train.gradient_checkpointing=false"]),
    "LoRA, base in nf4": ("train", ["model.load=nf4"]),
    "quantization-aware, adapter": ("qat", ["quantize.training={steps: 1}"]),
    "gptq": ("quantize", ["quantize.method=gptq", "quantize.effort=fast"]),
    "gptq, all scales trained": ("quantize", ["quantize.method=gptq", "quantize.effort=best"]),
    "evaluation": ("evaluate", []),
}
"""Stages and overrides of the larger models' table."""

READ = "weights in use, the others are read each time"


def main(write: bool = False) -> None:
    """Prints the tables, or writes each between its marks in its file."""
    from finequant.finetune import device

    # As on a processor that only emulates bfloat16, whichever this one is.
    device._bf16 = lambda: (False, "this CPU")
    for name, make in TABLES.items():
        text = make()
        if write:
            content = (ROOT / name).read_text(encoding="utf-8")
            content = CELLS.sub(lambda _, text=text: text, content)
            (ROOT / name).write_text(content, encoding="utf-8")
        else:
            print(text)


def table() -> str:
    """Returns the table as Markdown: peak memory of stages, disk, and the packed size, in GB."""
    return _markdown(
        ["GB", *COLUMNS, "disk", "quantized, packed"],
        [[name, *_row(config_of(name))] for name in SMALL],
    )


def larger_table() -> str:
    """Returns what each of some GPUs needs for larger models, in GB, as Markdown."""
    return _markdown(
        ["GB on each GPU", *GPUS],
        [
            [f"{name.removeprefix('Llama-3.1-')} {work}", *(_cell(name, work, gpu) for gpu in GPUS)]
            for name in LARGE
            for work in WORK
        ],
    )


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    rows = [header, [":---", *("---:" for _ in header[1:])], *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(name: str, work: str, gpus: str) -> str:
    """Formats the memory, in GB, of the first way that fits; in parentheses if none does."""
    from finequant.quantize.size.estimate import memory_of
    from finequant.quantize.size.machine import named_gpu

    stage, overrides = WORK[work]
    recipe, config, (memory, count) = recipe_with(overrides), config_of(name), GPUS[gpus]
    machine = named_gpu(memory)._replace(gpus=count)
    ways = {"": machine}
    if count > 1 and stage in ("train", "qat") and recipe.model.load == "float":
        ways["FSDP "] = machine._replace(sharded=True)
    for how, where in ways.items():
        needed = memory_of(stage, recipe, config, where)
        total = f"{sum(needed.values()) / 1e9:.0f}"
        if sum(needed.values()) <= where.memory:
            shared = "shared " if "weights, a share" in needed else ""
            return f"{how}{shared}{'read ' if READ in needed else ''}{total}"
    return f"({total})"


def config_of(name: str) -> DecoderConfig:
    """Returns a configuration of that shape, in bfloat16."""
    from transformers import LlamaConfig

    shape = dict(zip(KEYS, SHAPES[name], strict=True))
    return LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")


def _row(config: DecoderConfig) -> list[str]:
    from finequant.quantize.scheme import layer_plan, shipped_dtype
    from finequant.quantize.size.estimate import disk_of, memory_of
    from finequant.quantize.size.plan import model_size

    cells = []
    for stage, kind, load in COLUMNS.values():
        memory = memory_of(stage, recipe_of(kind, load), config, machine_of(kind))
        cells.append(sum(memory.values()))
    recipe = recipe_of("gpu", "float")
    cells.append(sum(disk_of(stage, recipe, config) for stage in ("train", "quantize", "evaluate")))
    dtype, plan = shipped_dtype(recipe.quantize, config), layer_plan(recipe.quantize, config)
    cells.append(model_size(plan, config, dtype, recipe.quantize).packed)
    return [f"{cell / 1e9:.1f}" for cell in cells]


def recipe_of(kind: str, load: str) -> Recipe:
    """Returns a recipe with defaults, but one row of TOKENS at a time, and checkpointing."""
    precision = "bf16" if kind == "gpu" else "fp32"
    return recipe_with(
        [
            "train.micro_batch_size=1",
            f"data.max_length={TOKENS}",
            f"train.precision={precision}",
            f"model.load={load}",
        ]
    )


def recipe_with(overrides: list[str]) -> Recipe:
    """Returns a recipe with defaults, but one row at a time in evaluation, no Liger kernels, and
    what STEP and `overrides` say."""
    from finequant.recipes.schema import Recipe

    content: dict = {"name": "needs", "model": {"base": "shape"}, "evaluate": {"batch_size": 1}}
    train = {"precision": "bf16", "kernels": "plain"}
    content |= {"data": {"train": "rows.jsonl"}, "train": train, "quantize": {}}
    for override in [*STEP, *overrides]:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        content[section][name] = YAML(typ="safe").load(value)
    return Recipe.model_validate(content)


def machine_of(kind: str) -> Machine:
    """Returns a machine whose processor computes in float32, or whose GPU does in bfloat16."""
    from finequant.quantize.size.machine import Machine, named_gpu

    return named_gpu("H100") if kind == "gpu" else Machine("a CPU", 10**15, "cpu")


TABLES = {"README.md": table, "docs/memory.md": larger_table}
"""Each file's table."""

if __name__ == "__main__":
    typer.run(main)
