"""What a recipe needs, by the size of its base: a table of README.md, computed from shapes alone.

python benchmarks/needs.py           prints it
python benchmarks/needs.py --write   writes it into README.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.size.machine import Machine
    from finequant.recipes.schema import Recipe

README = Path(__file__).parents[1] / "README.md"
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
}
COLUMNS = {
    "train, GPU": ("train", "gpu", "float"),
    "train, GPU, base in nf4": ("train", "gpu", "nf4"),
    "train, CPU": ("train", "cpu", "float"),
    "quantize, CPU": ("quantize", "cpu", "float"),
    "evaluate, GPU": ("evaluate", "gpu", "float"),
    "evaluate, CPU": ("evaluate", "cpu", "float"),
}
TOKENS = 1024


def main(write: bool = False) -> None:
    """Prints the table, or writes it between its marks."""
    text = table()
    if write:
        content = README.read_text(encoding="utf-8")
        README.write_text(CELLS.sub(lambda _: text, content), encoding="utf-8")
    else:
        print(text, end="")


def table() -> str:
    """Returns the table as Markdown: peak memory of stages, disk, and the packed size, in GB."""
    header = ["GB", *COLUMNS, "disk", "quantized, packed"]
    rows = [header, [":---", *("---:" for _ in header[1:])]]
    rows += [[name, *_row(config_of(name))] for name in SHAPES]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


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
    from finequant.recipes.schema import Recipe

    precision = "bf16" if kind == "gpu" else "fp32"
    train = {"micro_batch_size": 1, "gradient_checkpointing": True, "precision": precision}
    return Recipe.model_validate(
        {
            "name": "needs",
            "model": {"base": "shape", "load": load},
            "data": {"train": "rows.jsonl", "max_length": TOKENS},
            "train": train,
            "evaluate": {"batch_size": 1},
        }
    )


def machine_of(kind: str) -> Machine:
    """Returns a machine whose processor computes in float32, or whose GPU does in bfloat16."""
    from finequant.quantize.size.machine import Machine, named_gpu

    return named_gpu("H100") if kind == "gpu" else Machine("a CPU", 10**15, "cpu")


if __name__ == "__main__":
    typer.run(main)
