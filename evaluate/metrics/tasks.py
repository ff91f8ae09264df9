"""Accuracy on lm-eval tasks and on held-out rows.

A score is `{"value": float, "stderr": float | None, "n": int}`. Higher is always better; values
are fractions from 0 to 1, except bleu and chrf, which are sacrebleu's 0 to 100.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import cache
from numbers import Real
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence

from finequant.evaluate.metrics.shared_context import Continuation, log_likelihoods
from finequant.evaluate.report.report import OUT_OF_100
from finequant.finetune.data.turns import configured_ends, until_end
from finequant.recipes.errors import UserError, listed
from finequant.recipes.schema import Evaluate, Task

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Score = dict[str, float | int | None]

# Draws for the few metrics without a closed-form standard error. lm-eval's default is 100,000;
# its 0 would drop the closed-form ones as well.
BOOTSTRAP_DRAWS = 100


def check_tasks(evaluate: Evaluate) -> None:
    """Checks task names against lm-eval's index (seconds); loads neither data nor a model.

    Raises:
        UserError: an unknown or repeated task, or a task folder that is none.
    """
    if evaluate.task_folder and not Path(evaluate.task_folder).is_dir():
        raise UserError(
            f"evaluate.task_folder: there is no folder {evaluate.task_folder}\n"
            "Expected a folder with lm-eval task files (*.yaml)."
        )
    if not evaluate.tasks:
        return
    names = [task.task for task in evaluate.tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"evaluate.tasks: each task once; repeated: {', '.join(repeated)}")
    known = _task_manager(evaluate.task_folder).task_index
    if unknown := [name for name in names if name not in known]:
        problems = [_unknown(name, list(known)) for name in unknown]
        raise UserError(
            f"evaluate.tasks: {listed(problems)}\nTasks of your own go into evaluate.task_folder "
            f"as .yaml files that lm-eval can read (now: {evaluate.task_folder})."
        )


def lm_eval_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluate: Evaluate, seed: int
) -> dict[str, dict[str, Score]]:
    """Scores a loaded model on `evaluate.tasks`: {task: {metric: score}}.

    A group with a total of its own (mmlu) is one entry; other groups and tags are one for each
    of their tasks. Metrics where lower is better are left out.

    Raises:
        UserError: an unknown task, or one that cannot be loaded or run as the recipe says.
    """
    check_tasks(evaluate)
    if not evaluate.tasks:
        return {}
    from finequant.evaluate.metrics.lm_eval_model import SharedContextLM

    results = {}
    with _quiet_lm_eval():
        # All are loaded before the first one runs, so missing data shows at once.
        loaded = [_load(task, evaluate.task_folder) for task in evaluate.tasks]
        wrapped = SharedContextLM(
            pretrained=model, tokenizer=tokenizer, batch_size=evaluate.batch_size
        )
        for task, objects in zip(evaluate.tasks, loaded, strict=True):
            print(f"lm-eval task {task.task}", file=sys.stderr)
            results |= _run(wrapped, task, objects, evaluate.task_folder, seed)
    return results


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    description: str,
) -> list[str]:
    """Greedy answers to prompts of token ids: in their order, without special tokens, stripped.

    Stops at the end tokens of the generation configuration, as plain `generate` does.
    """
    # Longest first: memory runs out at once or never.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = [""] * len(prompts)
    for rows in track(batches, description, console=Console(stderr=True), transient=True):
        batch = [prompts[row] for row in rows]
        for row, text in zip(rows, _greedy(model, tokenizer, batch, max_new_tokens), strict=True):
            answers[row] = text
    return answers


def score_answers(
    answers: list[str], references: list[str], metrics: list[str]
) -> dict[str, Score]:
    """Scores answers with each of `metrics`, which are keys of METRICS: {metric: score}.

    Raises:
        UserError: json_match and a reference that is no JSON.
    """
    return {metric: METRICS[metric](answers, references) for metric in metrics}


def paired_changes(
    before: list[str], after: list[str], references: list[str], metrics: list[str]
) -> dict[str, Score]:
    """What a metric changes by from one model's answers to another's, row by row: {metric: score}.

    Its standard error is that of the mean of the differences: rows that both models answer alike
    add nothing to it. Metrics of a whole corpus are left out.
    """
    rows = list(zip(before, after, references, strict=True))
    return {
        metric: _mean(
            [
                METRICS[metric]([later], [reference])["value"]
                - METRICS[metric]([earlier], [reference])["value"]
                for earlier, later, reference in rows
            ]
        )
        for metric in metrics
        if metric not in OUT_OF_100
    }


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    references: list[str],
    choices: list[str],
    batch_size: int,
    description: str,
) -> Score:
    """How often the reference is the likeliest of `choices` as the continuation of its prompt.

    Log-likelihoods are summed over a choice's tokens; ties go to the first choice.

    Raises:
        UserError: a reference that is not among the choices, or a choice without tokens.
    """
    for number, reference in enumerate(references, 1):
        if reference not in choices:
            raise UserError(
                f"held-out row {number}: the answer {reference!r} is not among "
                f"evaluate.choices\nExpected one of: {', '.join(map(repr, choices[:20]))}"
            )
    endings = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
    if [] in endings:
        raise UserError("evaluate.choices: an empty choice has no likelihood; remove or name it")
    asked = [Continuation(prompt, ending) for prompt in prompts for ending in endings]
    logs = [found.log for found in log_likelihoods(model, asked, batch_size, description)]
    rows = [logs[start : start + len(choices)] for start in range(0, len(logs), len(choices))]
    picks = [choices[row.index(max(row))] for row in rows]
    return _mean([pick == reference for pick, reference in zip(picks, references, strict=True)])


def exact_match(answers: list[str], references: list[str]) -> Score:
    """Equal after stripping whitespace at both ends."""
    return _mean([a.strip() == r.strip() for a, r in zip(answers, references, strict=True)])


def json_match(answers: list[str], references: list[str]) -> Score:
    """Both are JSON and equal as values: key order, whitespace and 1 or 1.0 do not matter."""
    expected = [_canonical_json(reference) for reference in references]
    if None in expected:
        row = expected.index(None)
        raise UserError(
            f"held-out row {row + 1}: the reference is no JSON: {references[row][:80]!r}\n"
            "json_match needs JSON in every row; correct it or drop json_match from "
            "evaluate.metrics."
        )
    pairs = zip(answers, expected, strict=True)
    return _mean([_canonical_json(answer) == value for answer, value in pairs])


def f1(answers: list[str], references: list[str]) -> Score:
    """Token F1 of SQuAD's evaluation script (version 2: two empty texts agree)."""

    def score(answer: str, reference: str) -> float:
        ours, theirs = _squad_tokens(answer), _squad_tokens(reference)
        if not ours or not theirs:
            return ours == theirs
        return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))

    return _mean([score(a, r) for a, r in zip(answers, references, strict=True)])


def rouge(answers: list[str], references: list[str]) -> Score:
    """ROUGE-L F1 without stemming. rouge_score sees only a-z and 0-9: not for other scripts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(answers, references, strict=True)
    return _mean(
        [scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs]
    )


def bleu(answers: list[str], references: list[str]) -> Score:
    """sacrebleu's corpus BLEU, 0 to 100."""
    from sacrebleu import BLEU

    return _sacrebleu(BLEU(force=True), answers, references)


def chrf(answers: list[str], references: list[str]) -> Score:
    """sacrebleu's corpus chrF2, 0 to 100."""
    from sacrebleu import CHRF

    return _sacrebleu(CHRF(), answers, references)


METRICS: dict[str, Callable[[list[str], list[str]], Score]] = {
    metric.__name__: metric for metric in (exact_match, json_match, f1, rouge, bleu, chrf)
}


def _mean(values: list[float]) -> Score:
    """The mean, and the standard error of the mean: sample standard deviation / sqrt(n)."""
    n = len(values)
    return {"value": fmean(values), "stderr": stdev(values) / n**0.5 if n > 1 else None, "n": n}


def _sacrebleu(metric: Any, answers: list[str], references: list[str]) -> Score:
    """A corpus score; its standard error from sacrebleu's seeded bootstrap of 1,000 draws."""
    n = len(answers)
    score = metric.corpus_score(answers, [references], n_bootstrap=1000 if n > 1 else 1)
    # _ci is half the width of the 95% interval; 1.96 standard errors of a normal distribution.
    stderr = float(score._ci) / 1.96 if n > 1 else None
    return {"value": float(score.score), "stderr": stderr, "n": n}


def _canonical_json(text: str) -> str | None:
    """The same string for equal JSON values; None for what is no JSON."""

    def number(digits: str) -> int | float:
        value = float(digits)
        return int(value) if value.is_integer() else value

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(text, parse_float=number, parse_constant=refuse)
        # As strings, because Python says True == 1 and JSON does not.
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _squad_tokens(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD's script normalises answers."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


@torch.inference_mode()
def _greedy(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """One batch of greedy answers, padded on the left."""
    ends = configured_ends(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    left = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], padding_value=pad, **left)
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], **left)
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,  # with these two: the model's own sampling defaults, meaningless here
        top_p=None,
        top_k=None,
        pad_token_id=pad,
    )
    new = [until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]
    # Cleaning up spaces would turn " ." into ".", which the reference may well contain.
    texts = tokenizer.batch_decode(
        new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.strip() for text in texts]


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Silences lm-eval's notes about its own task files; its progress bars stay on stderr."""
    # Its bootstrap would fork a process for each core out of one that may hold a GPU.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


@cache
def _task_manager(folder: str | None) -> TaskManager:
    """lm-eval's index of over ten thousand task files, and of `folder`: read once (7 s)."""
    from lm_eval.tasks import TaskManager

    with _quiet_lm_eval():
        return TaskManager(include_path=folder)


def _unknown(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3)
    return f"lm-eval has no task {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")


def _load(task: Task, folder: str | None) -> list[Any]:
    """The lm-eval group or tasks behind a name, with their data.

    Raises:
        UserError: data that cannot be had, or a task that the recipe cannot run as it says.
    """
    try:
        loaded = _task_manager(folder).load([task.task])
    except Exception as error:  # whatever datasets, a task's own code or a missing package raises
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"evaluate.tasks: cannot load lm-eval task {task.task!r}: {cause}\n"
            "Load its data once with a network connection, or correct the task's file."
        ) from error
    if problem := _refusal(task, list(loaded["tasks"].values())):
        raise UserError(f"evaluate.tasks: {task.task!r} {problem}")
    group = loaded["groups"].get(task.task)
    return [group] if group else list(loaded["tasks"].values())


def _refusal(task: Task, leaves: list[Any]) -> str | None:
    """Why a loaded task would fail, be run otherwise than asked for, or have nothing to report."""
    if any(getattr(leaf, "UNSAFE_CODE", False) for leaf in leaves):
        return "executes code that the model writes; run it with lm-eval itself, in a sandbox"
    if task.num_fewshot and any(leaf.get_config("num_fewshot") == 0 for leaf in leaves):
        return f"is defined as 0-shot: lm-eval ignores num_fewshot {task.num_fewshot}; remove it"
    if not any(
        better is not False for leaf in leaves for better in leaf.higher_is_better().values()
    ):
        return "only has metrics where lower is better; use evaluate.perplexity for texts"
    return None


def _run(
    wrapped: Any, task: Task, objects: list[Any], folder: str | None, seed: int
) -> dict[str, dict[str, Score]]:
    """One entry of `evaluate.tasks`: {task: {metric: score}}."""
    from lm_eval import simple_evaluate

    output = simple_evaluate(
        wrapped,
        tasks=objects,
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        bootstrap_iters=BOOTSTRAP_DRAWS,
        log_samples=False,
        task_manager=_task_manager(folder),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    names = [task.task] if task.task in output.get("groups", {}) else output["results"]
    better = output["higher_is_better"]
    scores = {name: _scores(output["results"][name], better.get(name, {})) for name in names}
    return {name: metrics for name, metrics in scores.items() if metrics}


def _scores(row: dict[str, Any], higher_is_better: dict[str, bool | None]) -> dict[str, Score]:
    """lm-eval's "acc,none" becomes "acc"; other filters "exact_match (strict-match)"."""
    scores = {}
    for key, value in row.items():
        metric, _, name = key.partition(",")
        numeric = name and isinstance(value, Real) and not metric.endswith("_stderr")
        if not numeric or higher_is_better.get(metric) is False:
            continue
        stderr = row.get(f"{metric}_stderr,{name}")  # "N/A" where there is none
        known = isinstance(stderr, Real) and math.isfinite(stderr)
        scores[metric if name == "none" else f"{metric} ({name})"] = {
            "value": float(value),
            "stderr": float(stderr) if known else None,
            "n": row["sample_len"],
        }
    return scores
