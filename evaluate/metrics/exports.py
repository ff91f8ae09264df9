"""Measures exports as the other models are measured, each format in its own runtime."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers import RepetitionPenaltyLogitsProcessor

from finequant.evaluate.check import SPEED_ANSWER, SPEED_PROMPT
from finequant.evaluate.metrics.divergence import predict
from finequant.evaluate.metrics.parity import Reference, compared
from finequant.evaluate.metrics.perplexity import ScoredSequence, perplexities
from finequant.quantize.formats.format import CONTEXT, Format, Runtime, to_install
from finequant.quantize.formats.formats import FORMATS
from finequant.recipes.errors import counted, process_error
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.stages import command_of
from finequant.recipes.terminal import say, tracked
from finequant.recipes.usage import peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finequant.evaluate.inputs import Material


def measure_export(
    name: str,
    recipe: Recipe,
    run: RunDir,
    material: Material,
    reference: Callable[[], Reference],
) -> dict[str, Any]:
    """Measures an export as `measure_model` does, and its speed, peak memory and parity.

    Only the size is measured if its runtime is missing or the recipe says so. lm-eval tasks need a
    transformers model, so they run for checkpoints only.

    reference: computes the predictions of quantized/; called only if the export runs.

    Returns:
        The measurement of `measure_model` and, as "parity", the result of `compared`.
    """
    from finequant.finetune.architecture import parameter_count, usable_positions
    from finequant.finetune.model import load_config

    entry, folder, config = FORMATS[name], run.exports / name, load_config(recipe.model)
    size = entry.size(folder)
    sizes = {
        "size_bytes": size,
        "bits_per_weight": 8 * size / parameter_count(config),
        "activations": entry.activations,
    }
    unwanted = None if recipe.evaluate.exports else "evaluate.exports is false"
    if missing := unwanted or entry.missing_runtime():
        if missing == to_install(entry.runtime_packages):  # no stage is out of date after that
            missing += f", then `{command_of('evaluate')}`"
        say(f"evaluate: {name}: only its size is measured: {missing}")
        return {"scores": sizes | {"perplexity": {}, "tasks": {}}, "answers": []}
    measure = _measure_checkpoint if entry.is_checkpoint else _measure_in_runtime
    scores, answers, logs = measure(entry, run, recipe, material, reference().corpora)
    parity = compared(entry, folder, recipe, material, reference(), logs)
    scores = sizes | scores | {"speed": speed(name, folder, usable_positions(config))}
    return {"scores": scores, "answers": answers, "parity": parity}


Measured = tuple[dict[str, Any], list[str], torch.Tensor]
"""Scores, answers to the held-out rows, and log-probabilities [scored tokens, vocabulary] on the
sequences that exports are compared on."""


def _measure_checkpoint(
    entry: Format,
    run: RunDir,
    recipe: Recipe,
    material: Material,
    compared_on: dict[str, list[ScoredSequence]],
) -> Measured:
    from transformers import AutoModelForCausalLM

    from finequant.evaluate.measure import measure_model
    from finequant.finetune.device import arithmetic_dtype
    from finequant.quantize.scheme import cast_weights

    folder = run.exports / entry.name
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model(torch.tensor([[0]]))  # the first forward of the whole model unpacks the weights
    model = cast_weights(model, arithmetic_dtype(model.dtype))  # as the other models
    measured, _ = measure_model(entry.name, model, recipe, material, entry.size(folder))
    work = f"{entry.name}: comparing with quantized"
    predictions = predict(model, compared_on, recipe.evaluate.batch_size, work)
    return measured["scores"], measured["answers"], predictions.logs


def _measure_in_runtime(
    entry: Format,
    run: RunDir,
    recipe: Recipe,
    material: Material,
    compared_on: dict[str, list[ScoredSequence]],
) -> Measured:
    runtime = entry.open_runtime(run.exports / entry.name, _context(recipe, material))
    perplexity = {
        corpus: perplexities(nll_sum(runtime, texts[0], f"{entry.name}: {corpus}"), *texts, corpus)
        for corpus, texts in material.corpora.items()
    }
    answers, tasks = _held_out(entry.name, runtime, recipe, run, material)
    logs = [
        log_softmax(logits, dim=-1)
        for sequence in chain(*compared_on.values())
        for logits, _ in scored_logits(runtime, sequence)
    ]
    stacked = torch.stack(logs) if logs else torch.empty(0, 0)  # only lm-eval's tasks are measured
    return {"perplexity": perplexity, "tasks": tasks}, answers, stacked


def _context(recipe: Recipe, material: Material) -> int:
    """Counts the tokens of the longest sequence that a runtime must hold."""
    scored = [len(item.ids) for sequences, _ in material.corpora.values() for item in sequences]
    asked = [len(prompt) + recipe.evaluate.max_new_tokens for prompt in material.prompts]
    return max([*scored, *asked], default=CONTEXT)


def _held_out(
    name: str, runtime: Runtime, recipe: Recipe, run: RunDir, material: Material
) -> tuple[list[str], dict[str, Any]]:
    """Answers the held-out rows as quantized/ does, by its generation_config.json; returns the
    answers, and their scores as tasks of the report."""
    from transformers import GenerationConfig

    from finequant.evaluate.inputs import HELD_OUT
    from finequant.evaluate.metrics.text_metrics import score_answers
    from finequant.finetune.data.turns import configured_ends, repetition_penalty

    if not material.prompts:
        return [], {}
    say(f"evaluate: {name}: answering {counted(len(material.prompts), 'held-out row')}")
    limit = recipe.evaluate.max_new_tokens
    generation = GenerationConfig.from_pretrained(run.quantized)
    ends, penalty = configured_ends(generation), repetition_penalty(generation)
    distinct = dict.fromkeys(map(tuple, material.prompts))
    texts = {
        prompt: greedy_answer(runtime, material.tokenizer, list(prompt), ends, limit, penalty)
        for prompt in tracked(distinct, f"evaluate: {name}: answers", len(distinct))
    }
    answers = [texts[tuple(prompt)] for prompt in material.prompts]
    scores = score_answers(answers, material.references, recipe.evaluate.metrics, material.groups)
    return answers, {HELD_OUT: scores}


def nll_sum(runtime: Runtime, sequences: list[ScoredSequence], description: str) -> float:
    """Sums the negative log-likelihoods, in nats, of the scored tokens of all sequences."""
    shown = tracked(sequences, f"evaluate: {description}", len(sequences))
    return math.fsum(nll(runtime, sequence) for sequence in shown)


def nll(runtime: Runtime, sequence: ScoredSequence) -> float:
    """Sums the negative log-likelihoods, in nats, of the scored tokens of one sequence."""
    return math.fsum(
        cross_entropy(logits.double(), torch.tensor(token)).item()
        for logits, token in scored_logits(runtime, sequence)
    )


def scored_logits(runtime: Runtime, sequence: ScoredSequence) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields the logits that predict each scored token, and its id.

    The tokens before the first scored one are read in one call, the rest one by one, as in
    decoding.
    """
    done = 0
    for position, scored in enumerate(sequence.scored):
        if scored:
            yield runtime.last_logits(sequence.ids[done:position], done), sequence.ids[position]
            done = position


def greedy_answer(
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    ends: list[int],
    limit: int,
    penalty: float = 1.0,
) -> str:
    """Generates as `greedy_tokens` does; returns stripped text without special tokens."""
    answer = list(greedy_tokens(runtime, prompt, ends, limit, penalty))
    text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


def greedy_tokens(
    runtime: Runtime, prompt: list[int], ends: list[int], limit: int, penalty: float = 1.0
) -> Iterator[int]:
    """Yields at most `limit` tokens after the prompt, and stops before any of `ends`.

    penalty: as `turns.repetition_penalty` returns it; `generate` applies it to the tokens of prompt
        and answer.
    """
    penalize = RepetitionPenaltyLogitsProcessor(float(penalty))
    ids, logits = list(prompt), runtime.last_logits(prompt)
    for position in range(len(prompt), len(prompt) + limit):
        if penalty != 1:
            logits = penalize(torch.tensor([ids]), logits[None].float())[0]
        token = int(logits.argmax())
        if token in ends:
            return
        yield token
        ids.append(token)
        logits = runtime.last_logits([token], position)


def speed(name: str, folder: Path, positions: int) -> dict[str, float | int]:
    """Times an export in a separate process.

    positions: those of the base, which the prompt and the answer for timing have to fit into.

    Returns:
        {"prompt", "decoding": tokens per second, "peak_memory_bytes"}

    Raises:
        UserError: if that process fails.
    """
    arguments = [name, str(folder), str(positions)]
    command = [sys.executable, "-m", "finequant.evaluate.metrics.exports", *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise process_error(f"evaluate: {name}: cannot be timed", process)
    return json.loads(process.stdout.splitlines()[-1])


def _time(name: str, folder: Path, positions: int) -> dict[str, float | int]:
    runtime = FORMATS[name].open_runtime(folder)
    answer = min(SPEED_ANSWER, positions // 4)
    ids = [3 + index % 50 for index in range(min(SPEED_PROMPT, positions - answer))]
    runtime.last_logits(ids)  # the first call also loads
    started = time.perf_counter()
    runtime.last_logits(ids)
    read = time.perf_counter()
    for position in range(answer):
        runtime.last_logits([5], len(ids) + position)
    done = time.perf_counter()
    return {
        "prompt": len(ids) / (read - started),
        "decoding": answer / (done - read),
        "peak_memory_bytes": peak_memory(),
    }


if __name__ == "__main__":
    print(json.dumps(_time(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
