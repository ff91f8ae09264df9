"""Measures the speed of evaluation, beside lm-eval, bare forward passes, and float models.

python benchmarks/evaluation.py tasks
python benchmarks/evaluation.py tasks --limit 100 --dtype bfloat16
python benchmarks/evaluation.py perplexity
python benchmarks/evaluation.py decoding
python benchmarks/evaluation.py exports runs/assistant
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import typer
from quality import WIKITEXT, show

from finequant.finetune.device import device
from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.errors import UserError, report_user_errors
from finequant.recipes.load import load_recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaForCausalLM

    from finequant.quantize.formats.format import Runtime

ARC_EASY = Path(__file__).parents[2] / "shared/data/tasks/arc_easy.jsonl"
TASK = """\
task: arc_easy_file
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def tasks(
    data: Path = ARC_EASY,
    limit: int | None = None,
    rounds: int = 1,
    batch_size: int = 16,
    dtype: str = "float32",
) -> None:
    """Times multiple choice by lm-eval's HFLM and by ours, in turn, and compares their predictions.

    `data` is a .jsonl file with query, choices and gold.
    """
    from lm_eval.models.huggingface import HFLM

    from finequant.evaluate.metrics.lm_eval_model import SharedContextLM
    from finequant.finetune.model import load_tokenizer

    model, tokenizer = embedded(dtype), load_tokenizer(load_recipe(WIKITEXT).model)
    settings = {"tokenizer": tokenizer, "batch_size": batch_size}
    contenders = {
        "lm-eval's HFLM": HFLM(model, **settings),
        "finequant": SharedContextLM(model, **settings),
    }
    predictions: dict[str, list[Item]] = {}
    task = load_task(data)
    calls = {
        name: lambda name=name, lm=lm: predictions.update({name: evaluate_task(lm, task, limit)})
        for name, lm in contenders.items()
    }
    seconds = in_turn(calls, rounds)
    theirs, ours = (predictions[name] for name in contenders)
    slowest = seconds["lm-eval's HFLM"]
    show(
        f"{data.stem}, {len(ours)} items, {dtype}, {hardware()}, batch size {batch_size}, median "
        f"of {rounds} in turn; log-likelihoods differ by at most {difference(theirs, ours):.1e}",
        ("model class", "seconds", "times as fast", "other choices: acc", "acc_norm"),
        [
            (
                name,
                f"{taken:.1f}",
                f"{slowest / taken:.2f}",
                str(differing(theirs, predictions[name])),
                str(differing(theirs, predictions[name], by_length=True)),
            )
            for name, taken in seconds.items()
        ],
    )


@app.command()
def perplexity(
    windows: int = 16, rounds: int = 5, batch_size: int = 4, dtype: str = "bfloat16"
) -> None:
    """Times WikiText-2's perplexity, and bare forward passes over the same windows."""
    from finequant.evaluate.metrics.corpora import read_corpus
    from finequant.evaluate.metrics.perplexity import corpus_windows, negative_log_likelihoods
    from finequant.finetune.model import load_tokenizer

    recipe = load_recipe(WIKITEXT)
    model, tokenizer = embedded(dtype), load_tokenizer(recipe.model)
    corpus = recipe.evaluate.perplexity[0].model_copy(update={"windows": windows})
    sequences, _ = corpus_windows(read_corpus(corpus), tokenizer, corpus, 8192)
    full = [sequence for sequence in sequences if len(sequence.ids) == len(sequences[0].ids)]
    ids = torch.tensor([sequence.ids[:-1] for sequence in full]).to(model.device)

    @torch.inference_mode()
    def bare() -> None:
        for batch in ids.split(batch_size):
            finished(model(batch, use_cache=False).logits)

    def ours() -> None:
        negative_log_likelihoods(model, full, batch_size, "perplexity")

    seconds = in_turn({"a bare forward": bare, "perplexity": ours}, rounds)
    show_speeds(
        f"{len(full)} windows of {ids.shape[1]} tokens, {dtype}, {hardware()}, batches of "
        f"{batch_size}, median of {rounds} in turn",
        seconds,
        ids.numel(),
    )


@app.command()
def decoding(new_tokens: int = 48, rounds: int = 3, dtype: str = "bfloat16") -> None:
    """Times greedy decoding: float, quantized and dequantized once, quantized as it is loaded.

    Weights have four bits in groups of 32, head included.
    """
    from finequant.evaluate.dequantized import dequantize_once
    from finequant.finetune.model import load_tokenizer

    tokenizer = load_tokenizer(load_recipe(WIKITEXT).model)
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    models = {
        "float": embedded(dtype),
        "quantized, dequantized once": dequantize_once(quantized(dtype), prompt[0].tolist()),
        "quantized, as it is loaded": quantized(dtype),
    }

    @torch.inference_mode()  # as evaluate does
    def generate(model: LlamaForCausalLM) -> None:
        finished(
            model.generate(
                prompt.to(model.device),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        )

    calls = {name: lambda model=model: generate(model) for name, model in models.items()}
    show_speeds(
        f"Greedy decoding of {new_tokens} tokens, {dtype}, {hardware()}, median of {rounds} in "
        "turn",
        in_turn(calls, rounds),
        new_tokens,
    )


@app.command()
def exports(run: Path, new_tokens: int = 64, rounds: int = 3) -> None:
    """Times greedy decoding by a run's exports in their runtimes, and by float32 transformers.

    Each reads a prompt of 32 tokens first; this is not timed.
    """
    from finequant.quantize.formats.compressed_tensors import Transformers
    from finequant.quantize.formats.formats import FORMATS

    with tempfile.TemporaryDirectory() as folder:
        embedded("float32").save_pretrained(folder)
        runtimes = {"transformers, float32": Transformers(Path(folder))}
        for name, entry in FORMATS.items():
            made = (run / "exports" / name).exists()
            if (missing := entry.missing_runtime()) or not made:
                say(f"{name}: {missing if made else f'not in {run}/exports'}")
                continue
            runtimes[name] = entry.open_runtime(run / "exports" / name)
    prompt = list(range(100, 132))
    for runtime in runtimes.values():
        runtime.last_logits(prompt)

    def decode(runtime: Runtime) -> None:
        for step in range(new_tokens):
            runtime.last_logits([100 + step], len(prompt) + step)

    calls = {name: lambda runtime=runtime: decode(runtime) for name, runtime in runtimes.items()}
    title = f"Decoding of {new_tokens} tokens, {hardware()}, median of {rounds} in turn"
    show_speeds(title, in_turn(calls, rounds), new_tokens)


def embedded(dtype: str) -> LlamaForCausalLM:
    from finequant.finetune.model import load_base

    return load_base(load_recipe(WIKITEXT).model, getattr(torch, dtype)).to(device()).eval()


def quantized(dtype: str) -> LlamaForCausalLM:
    """Returns the embedded model, rounded to nearest, in torchao's tensors."""
    from finequant.finetune.model import load_base, load_tokenizer
    from finequant.quantize.checkpoint.writing import quantized_model
    from finequant.quantize.methods.apply import round_model
    from finequant.quantize.scheme import layer_plan, untie_head

    recipe, kind = load_recipe(WIKITEXT, ["quantize.method=rtn"]), getattr(torch, dtype)
    model = load_base(recipe.model, torch.float32)
    untie_head(model)
    rounded = round_model(model, recipe, load_tokenizer(recipe.model), kind)
    plan = layer_plan(recipe.quantize, model.config)
    return quantized_model(model, rounded, plan, kind).to(device()).eval()


def load_task(data: Path) -> dict[str, Any]:
    """Writes a task file as for evaluate.task_folder, and loads it for `simple_evaluate`."""
    from lm_eval.tasks import TaskManager

    if not data.is_file():
        raise UserError(f"--data: there is no file {data}: name one with query, choices and gold")
    with tempfile.TemporaryDirectory() as folder:
        text = TASK.format(data=data.resolve(), cache=folder)
        (Path(folder) / "arc_easy_file.yaml").write_text(text, encoding="utf-8")
        manager = TaskManager(include_path=folder, include_defaults=False)
        loaded = manager.load(["arc_easy_file"])["tasks"]
    return {"tasks": list(loaded.values()), "task_manager": manager}


class Item(NamedTuple):
    choices: list[str]
    logs: list[float]
    """Log-likelihoods of the choices."""

    def pick(self, by_length: bool) -> int:
        """Returns the index of the choice for acc or, `by_length`, for acc_norm: per character."""
        lengths = [len(choice) if by_length else 1 for choice in self.choices]
        scores = [log / length for log, length in zip(self.logs, lengths, strict=True)]
        return scores.index(max(scores))


def evaluate_task(lm: HFLM, task: dict[str, Any], limit: int | None) -> list[Item]:
    """Runs a task, and returns its items in the order of the file."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(lm, **task, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(results["samples"]["arc_easy_file"], key=lambda sample: sample["doc_id"])
    return [
        Item(sample["doc"]["choices"], [log for ((log, _),) in sample["resps"]])
        for sample in samples
    ]


def differing(theirs: list[Item], ours: list[Item], by_length: bool = False) -> int:
    """Counts the items for which another choice is picked."""
    pairs = zip(theirs, ours, strict=True)
    return sum(a.pick(by_length) != b.pick(by_length) for a, b in pairs)


def difference(theirs: list[Item], ours: list[Item]) -> float:
    """Returns the largest difference between two log-likelihoods of the same choice."""
    pairs = [zip(a.logs, b.logs, strict=True) for a, b in zip(theirs, ours, strict=True)]
    return max(abs(first - second) for pair in pairs for first, second in pair)


def in_turn(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Runs the calls in turn, and returns the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            started = time.monotonic()
            call()
            seconds[name].append(time.monotonic() - started)
            say(f"round {number + 1} of {rounds}: {name}: {seconds[name][-1]:.2f} s")
    return {name: statistics.median(values) for name, values in seconds.items()}


def finished(result: torch.Tensor) -> None:
    """Waits for the GPU."""
    if result.is_cuda:
        torch.cuda.synchronize()


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def show_speeds(title: str, seconds: dict[str, float], tokens: int) -> None:
    """Shows tokens per second, in all and relative to the first row's."""
    first = next(iter(seconds.values()))
    show(
        title,
        ("", "tokens per second", "of the first"),
        [(name, f"{tokens / s:.1f}", f"{first / s:.2f}") for name, s in seconds.items()],
    )


if __name__ == "__main__":
    with report_user_errors():
        quiet_libraries()
        app()
