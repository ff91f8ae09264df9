"""Quantizes one base with other people's tools, and measures each result with plain transformers.

python benchmarks/peers.py
python benchmarks/peers.py --only nncf-gptq --only torchao --folder /big/disk

Base, calibration text and test windows are those of benchmarks/wikitext2.yaml. Each tool gets a
separate environment in the folder, with pinned packages from PyPI; finequant runs in this one. The
tool's script quantizes the base and writes a folder that `from_pretrained` loads in that
environment, without finequant. With --only, the earlier results of the others are kept.
-> table.md in the folder
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from environments import FAILURES, answer, reason, virtual_environment

from finequant.evaluate.report.table import MISSING, markdown_table
from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.load import load_recipe
from finequant.recipes.terminal import say

HERE = Path(__file__).parent
SCRIPTS = HERE / "peers"
RECIPE = HERE / "wikitext2.yaml"
TOKENS, GROUP_SIZE = 8192, 32
TORCH = "torch==2.13.0"


class Tool(NamedTuple):
    """A package that quantizes."""

    script: str
    """File in benchmarks/peers/."""
    packages: tuple[str, ...] = ()
    """If empty, the script runs in this environment."""
    without_dependencies: tuple[str, ...] = ()
    """Packages whose own dependencies are not installed."""


class Row(NamedTuple):
    """A way to quantize with a tool."""

    tool: str
    method: str
    activations: str
    settings: dict[str, Any]


TRANSFORMERS = (TORCH, "transformers==5.23.0", "accelerate==1.15.0")
TOOLS = {
    "finequant": Tool("finequant_peer.py"),
    "llm-compressor": Tool(
        "llmcompressor_peer.py",
        # It supports transformers up to 5.17.
        (TORCH, "transformers==5.17.0", "accelerate==1.15.0", "datasets==5.2.0", "loguru==0.7.3")
        + ("pillow==13.0.0", "py-cpuinfo==9.0.0"),
        # It requires nvidia-ml-py, but does not import it.
        ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "auto-round==0.15.1"),
    ),
    "nncf": Tool("nncf_peer.py", (*TRANSFORMERS, "nncf==3.4.0", "openvino==2026.4.1")),
    "autoround": Tool("autoround_peer.py", (*TRANSFORMERS, "auto-round==0.16.1")),
    "gptqmodel": Tool(
        "gptqmodel_peer.py",
        (*TRANSFORMERS, "datasets==5.2.0", "torchao==0.18.0", "threadpoolctl==3.8.0")
        + ("device-smi==0.5.7", "protobuf==7.36.2", "pillow==13.0.0", "requests==2.34.2")
        + ("pypcre==0.6.4", "ninja==1.13.2", "setuptools==84.2.1"),
        # It requires torch 2.14.1, and compiles kernels that quantizing does not use.
        ("tokenicer==0.0.14", "logbar==0.4.15", "defuser==0.0.28", "gptqmodel==7.7.0"),
    ),
    "torchao": Tool("torchao_peer.py", (*TRANSFORMERS, "torchao==0.18.0")),
}

ROWS = {
    "finequant-rtn": Row(
        "finequant", "round to nearest", "int8", {"keys": ["method=rtn", "rotate=false"]}
    ),
    "finequant-balanced": Row("finequant", "effort: balanced", "int8", {"keys": ["rotate=true"]}),
    "finequant-steps": Row(
        "finequant",
        "the same, 32 steps a block",
        "int8",
        {"keys": ["rotate=true", "calibration.steps=32"]},
    ),
    "llm-compressor-w4a16": Row(
        "llm-compressor", "GPTQ, W4A16", "float", {"observer": "memoryless_minmax"}
    ),
    "llm-compressor-mse": Row(
        "llm-compressor", "the same, scales searched", "float", {"observer": "memoryless_mse"}
    ),
    "llm-compressor-w4a8": Row(
        "llm-compressor", "GPTQ, W4A8", "int8", {"observer": "memoryless_minmax"}
    ),
    "nncf-awq": Row(
        "nncf",
        "AWQ, scale estimation",
        "float",
        {"options": {"awq": True, "scale_estimation": True}},
    ),
    "nncf-gptq": Row(
        "nncf",
        "GPTQ, scale estimation",
        "float",
        {"options": {"gptq": True, "scale_estimation": True}},
    ),
    "autoround": Row(
        "autoround", "32 iterations a block", "float", {"iterations": 32, "batch_size": 2}
    ),
    "gptqmodel": Row(
        "gptqmodel",
        "GPTQ",
        "float",
        # It gives the head 8 bits unless a rule for the head says otherwise.
        {"options": {"dynamic": {"lm_head": {"bits": 4}}}},
    ),
    "torchao": Row("torchao", "round to nearest", "int8", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"), help="10 GB of space")
    parser.add_argument("--only", action="append", choices=ROWS, help="one row, repeatable")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = arguments.folder.absolute()
    job = prepare(folder)
    for name, row in ROWS.items():
        if name in (arguments.only or ROWS):
            say(f"peers: {name}")
            quantize_and_measure(row, folder, folder / name, job)
    table = page(folder)
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table)


def prepare(folder: Path) -> dict[str, Any]:
    """Writes the base in bfloat16 unless it exists, and collects the input of all scripts."""
    import torch

    from finequant.evaluate.metrics.corpora import read_corpus
    from finequant.evaluate.metrics.perplexity import corpus_windows
    from finequant.finetune.model import load_base, load_tokenizer
    from finequant.quantize.methods.sequences import calibration_sequences

    recipe, base = load_recipe(RECIPE), folder / "base"
    tokenizer, corpus = load_tokenizer(recipe.model), recipe.evaluate.perplexity[0]
    if not base.exists():
        load_base(recipe.model, torch.bfloat16).save_pretrained(base)
        tokenizer.save_pretrained(base)
    windows, documents = corpus_windows(read_corpus(corpus), tokenizer, corpus, corpus.max_length)
    return {
        "base": str(base),
        "recipe": str(RECIPE),
        "calibration": calibration_sequences(recipe, tokenizer, TOKENS).tolist(),
        "group_size": GROUP_SIZE,
        "windows": [window.ids for window in windows],
        "words": sum(document.words for document in documents),
    }


def quantize_and_measure(row: Row, folder: Path, where: Path, job: dict[str, Any]) -> None:
    """Runs a tool's script and measures its folder -> results.json; on failure, a note says why."""
    tool, model = TOOLS[row.tool], where / "model"
    where.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(model, ignore_errors=True)
    settings = row.settings | {"activations": row.activations}
    (where / "job.json").write_text(json.dumps(job | {"settings": settings}), encoding="utf-8")
    try:
        python = interpreter(tool, folder / "environments" / row.tool)
        results = {}
        for script in (tool.script, "measure.py"):
            results |= answer([python, str(SCRIPTS / script), "job.json", str(model)], where)
        for written in (model, where / "untied"):
            shutil.rmtree(written, ignore_errors=True)
    except FAILURES as error:
        results = {"note": f"failed: {reason(error, where)}"}
        say(f"peers: {where.name}: {results['note']}")
    (where / "results.json").write_text(json.dumps(results), encoding="utf-8")


def interpreter(tool: Tool, where: Path) -> str:
    """Makes a tool's environment unless it exists, and returns its Python."""
    if not tool.packages:
        return sys.executable
    where.mkdir(parents=True, exist_ok=True)
    bare = ["install", "--no-deps", "--no-build-isolation", *tool.without_dependencies]
    steps = [["install", *tool.packages], *([bare] if tool.without_dependencies else [])]
    return virtual_environment(where, *steps)


HEADER = [
    "tool",
    "method",
    "activations",
    "perplexity per token",
    "times float",
    "per word",
    "KL",
    "top-1 agreement in %",
    "bits per weight",
    "seconds",
    "GB",
]


def page(folder: Path) -> str:
    """Makes the table of all rows that have been measured."""
    counts, rows = weights_of(folder / "base"), []
    for name, row in ROWS.items():
        path = folder / name / "results.json"
        if path.exists():
            figures = json.loads(path.read_text(encoding="utf-8"))
            rows.append([row.tool, row.method, row.activations, *cells(figures, counts)])
    return markdown_table(HEADER, rows)


def cells(figures: dict[str, Any], counts: dict[str, int]) -> list[str]:
    """Formats the figures of a model; after a failure, there is only its note."""
    if "note" in figures:
        return [figures["note"], *[MISSING] * 7]
    # Floats and scales count 16 bits, as tools write a model of bfloat16.
    bits = sum(figures.get(kind, 16) * count for kind, count in counts.items())
    weights = sum(count for kind, count in counts.items() if kind != "head")
    return [
        f"{figures['token']:.2f}",
        f"{figures['token'] / figures['float_token']:.3f}",
        f"{figures['word']:.2f}",
        f"{figures['kl']:.3f}",
        f"{100 * figures['agreement']:.1f}",
        f"{bits / weights:.2f}",
        f"{figures['seconds']:.0f}",
        f"{figures['peak_bytes'] / 1e9:.1f}",
    ]


def weights_of(base: Path) -> dict[str, int]:
    """Counts the weights of a base by kind; `head` are the weights that untying adds."""
    from safetensors.torch import load_file

    counts = {"linear": 0, "embedding": 0, "norm": 0}
    for name, weight in load_file(base / "model.safetensors").items():
        kind = "norm" if "norm" in name else "embedding" if "embed" in name else "linear"
        counts[kind] += weight.numel()
    return counts | {"head": counts["embedding"]}


if __name__ == "__main__":
    main()
