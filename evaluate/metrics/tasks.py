"""Measures accuracy on lm-eval tasks.

A score is `{"value": float, "stderr": float | None, "n": int}`. Higher is always better; values
are lm-eval's until `turn_into_fractions` has seen those of all models that are compared.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import cache
from itertools import chain
from numbers import Real
from statistics import fmean
from typing import TYPE_CHECKING, Any

from finequant.evaluate.check import check_task_files
from finequant.evaluate.inputs import HELD_OUT
from finequant.evaluate.metrics.text_metrics import Score, is_out_of_100
from finequant.recipes.errors import UserError, counted, listed, refuse_all
from finequant.recipes.schema import Evaluate, Task
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Bootstrap draws for the few metrics without a closed-form standard error. lm-eval's default is
# 100,000; 0 would drop the closed-form ones as well.
BOOTSTRAP_DRAWS = 100


def check_tasks(evaluate: Evaluate) -> None:
    """Checks task names against lm-eval's index (seconds); loads neither data nor a model.

    Raises:
        UserError: for an unknown or repeated task, a broken task file, or a missing task folder.
    """
    check_task_files(evaluate)
    if not evaluate.tasks:
        return
    names = [task.task for task in evaluate.tasks]
    known = _task_manager(evaluate.task_folder).task_index
    if unknown := [name for name in names if name not in known]:
        problems = [_unknown(name, list(known)) for name in unknown]
        folder = f" (now: {evaluate.task_folder})" if evaluate.task_folder else ""
        raise UserError(
            f"evaluate.tasks: {listed(problems)}\nYour own tasks go into evaluate.task_folder"
            f"{folder} as .yaml files that lm-eval can read."
        )


ByItem = dict[str, dict[str, list[float]]]
"""{task: {metric: a value for each document or held-out row}}, for metrics that are their means."""


def lm_eval_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluate: Evaluate, seed: int
) -> tuple[dict[str, dict[str, Score]], ByItem]:
    """Scores a loaded model on `evaluate.tasks`: {task: {metric: score}}, and values by document.

    A group with an aggregate score (mmlu) is one entry; other groups and tags become one entry for
    each of their tasks. Metrics where lower is better are left out.

    Raises:
        UserError: for an unknown task, or one that cannot be loaded or run as the recipe says.
    """
    from finequant.evaluate.metrics.lm_eval_model import SharedContextLM

    scores: dict[str, dict[str, Score]] = {}
    by_item: ByItem = {}
    loaded = load_tasks(evaluate, model.config.max_position_embeddings)
    with _quiet_lm_eval():
        wrapped = SharedContextLM(
            pretrained=model, tokenizer=tokenizer, batch_size=evaluate.batch_size
        )
        for task, objects in zip(evaluate.tasks, loaded, strict=True):
            say(f"evaluate: lm-eval task {task.task}")
            output = _run(wrapped, task, objects, evaluate.task_folder, seed)
            if output is None:  # for all processes of a machine but the first
                continue
            for name in _names(task, output):
                better = output["higher_is_better"].get(name, {})
                if metrics := _scores(output["results"][name], better):
                    for metric, score in metrics.items():
                        values = _values(name, metric, output)
                        score["n"] = sum(value is not None for value in values)
                    by_item[name] = _by_document(name, metrics, output)
                    scores[name] = metrics
    return scores, by_item


def load_tasks(evaluate: Evaluate, positions: int) -> list[list[Any]]:
    """Loads the lm-eval group or tasks of each entry, with their data, before the first one runs.

    positions: those of the base, which an answer has to fit into.

    Raises:
        UserError: for unknown tasks, for all that cannot be loaded or run as the recipe says, and
            for a task that two entries report.
    """
    check_tasks(evaluate)
    loaded: list[list[Any]] = []
    with _quiet_lm_eval():
        refuse_all(
            lambda task=task: loaded.append(_load(task, evaluate.task_folder, positions))
            for task in evaluate.tasks
        )
    _refuse_repeated(evaluate.tasks, loaded)
    return loaded


def _refuse_repeated(tasks: list[Task], loaded: list[list[Any]]) -> None:
    """Refuses scores that would replace others in the report.

    Raises:
        UserError: for a task that two entries report, as a tag and one of its tasks do, or one that
            has the name of the held-out rows.
    """
    entries: dict[str, str] = {}
    for task, objects in zip(tasks, loaded, strict=True):
        for name in _reported(task, objects):
            if name == HELD_OUT:
                raise UserError(
                    f"evaluate.tasks: {name!r} is the name of the held-out rows in the report: "
                    "rename this task"
                )
            if name in entries:
                raise UserError(
                    f"evaluate.tasks: {entries[name]!r} and {task.task!r} both report {name!r}, "
                    "which has one place in the report: remove one of them"
                )
            entries[name] = task.task


def _reported(task: Task, objects: list[Any]) -> list[str]:
    """Lists the names under which the scores of an entry are reported."""
    if getattr(objects[0], "has_aggregation", False):
        return [task.task]
    leaves = [it.get_all_tasks() if hasattr(it, "get_all_tasks") else [it] for it in objects]
    return [leaf.task_name for leaf in chain(*leaves)]


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Silences lm-eval's notes about its own task files; its progress bars stay on stderr."""
    # Its bootstrap would fork one process per core from a process that may hold a GPU.
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
    """Reads lm-eval's index of over ten thousand task files, and of `folder`, once (7 s)."""
    from lm_eval.tasks import TaskManager

    with _quiet_lm_eval():
        return TaskManager(include_path=folder)


def _unknown(name: str, known: list[str]) -> str:
    if "," in name:  # as for lm-eval's --tasks
        return f"lm-eval has no task {name!r}; write a list in brackets: [{name}]"
    near = get_close_matches(name, known, n=3)
    return f"lm-eval has no task {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")


def _load(task: Task, folder: str | None, positions: int) -> list[Any]:
    """Loads the lm-eval group or tasks of a name, with their data.

    Raises:
        UserError: if the data cannot be loaded, or the task cannot run as the recipe says.
    """
    try:
        loaded = _task_manager(folder).load([task.task])
    except Exception as error:  # whatever datasets, a task's own code, or a missing package raises
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"evaluate.tasks: cannot load lm-eval task {task.task!r}: {cause}\n"
            "Load its data once with a network connection, or correct the task's file."
        ) from error
    leaves = list(loaded["tasks"].values())
    if problem := _refusal(task, leaves, positions):
        raise UserError(f"evaluate.tasks: {task.task!r} {problem}")
    for leaf in leaves:
        if _shots(task, leaf) and _may_show_the_answer(leaf):
            _say_that_the_answer_may_be_shown(leaf.task_name)
    group = loaded["groups"].get(task.task)
    return [group] if group else leaves


def _refusal(task: Task, leaves: list[Any], positions: int) -> str | None:
    """Says why a loaded task would fail, ignore the recipe, or have nothing to report."""
    if any(getattr(leaf, "UNSAFE_CODE", False) for leaf in leaves):
        return "executes code that the model writes; run it with lm-eval itself, in a sandbox"
    if task.num_fewshot and any(leaf.get_config("num_fewshot") == 0 for leaf in leaves):
        return f"is defined as 0-shot: lm-eval ignores num_fewshot {task.num_fewshot}; remove it"
    for leaf in leaves:
        shots = _shots(task, leaf)
        if shots and shots > (rows := _examples(leaf)):
            available = counted(rows, "row")
            return (
                f"has {available} for examples, but num_fewshot is {shots}: set num_fewshot={rows}"
            )
    if (longest := max(map(_generated, leaves), default=0)) >= positions:
        return (
            f"generates up to {longest} tokens, but the base has {positions} positions, prompt "
            "included: remove it, or set max_gen_toks in a task file of your own"
        )
    if not any(
        better is not False for leaf in leaves for better in leaf.higher_is_better().values()
    ):
        return "only has metrics where lower is better; for texts, use evaluate.perplexity"
    return None


def _examples(leaf: Any) -> int:
    """Counts the rows that a prompt's examples can be: none is the row that is asked."""
    rows = len(list(leaf.fewshot_docs() or ()))
    return rows - 1 if _leaves_out_the_asked_row(leaf) else rows


def _shots(task: Task, leaf: Any) -> int:
    """Returns how many examples a prompt has."""
    default = leaf.get_config("num_fewshot")
    return (default if task.num_fewshot is None else task.num_fewshot) or 0


def _leaves_out_the_asked_row(leaf: Any) -> bool:
    """Says whether lm-eval compares examples with the row that is asked, and takes another for an
    equal one."""
    split = getattr(getattr(leaf, "fewshot_cfg", None), "split", None)
    return split == leaf.get_config("test_split")


def _may_show_the_answer(leaf: Any) -> bool:
    """Says whether an example can be the row that is asked, with its answer: lm-eval takes examples
    from the rows that are asked where a task names no other split."""
    fewshot = getattr(leaf, "fewshot_cfg", None)
    if getattr(fewshot, "samples", None) or _leaves_out_the_asked_row(leaf):
        return False
    train, validation, test = (
        leaf.get_config(f"{part}_split") for part in ("training", "validation", "test")
    )
    examples = getattr(fewshot, "split", None) or train or validation or test
    return examples == (test or validation)


@cache  # said once, not again for each model
def _say_that_the_answer_may_be_shown(name: str) -> None:
    say(
        f"evaluate: lm-eval task {name}: its examples are taken from the rows that it asks, so a "
        "prompt may show its own answer: set num_fewshot=0, or name another fewshot_split in a "
        "task file of your own"
    )


def _generated(leaf: Any) -> int:
    """Returns how many tokens an answer of a task may have; 0 if nothing is generated."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if leaf.OUTPUT_TYPE != "generate_until":
        return 0
    return normalize_gen_kwargs(leaf.get_config("generation_kwargs") or {})["max_gen_toks"]


def _run(
    wrapped: Any, task: Task, objects: list[Any], folder: str | None, seed: int
) -> dict[str, Any] | None:
    """Runs one entry of `evaluate.tasks`, and returns lm-eval's results and samples; of several
    processes, which share the work, only to the first of each machine."""
    from lm_eval import evaluator

    # lm-eval asks git for a commit, and git prints "fatal" outside of a repository; it asks pip,
    # lscpu and others about the machine, which takes seconds for each task. To be removed once
    # simple_evaluate can leave them out.
    evaluator.get_git_commit_hash = lambda: None
    evaluator.add_env_info = lambda results: None
    return evaluator.simple_evaluate(
        wrapped,
        tasks=objects,
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        apply_chat_template=task.apply_chat_template,
        bootstrap_iters=BOOTSTRAP_DRAWS,
        log_samples=True,
        task_manager=_task_manager(folder),
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )


def _names(task: Task, output: dict[str, Any]) -> list[str]:
    """Lists the results to report: a group's own, or those of each task."""
    return [task.task] if task.task in output.get("groups", {}) else list(output["results"])


def _by_document(
    name: str, scores: dict[str, Score], output: dict[str, Any]
) -> dict[str, list[float]]:
    """Returns the values of documents, for each score of a task or group that is their mean."""
    by_document = {}
    for metric, score in scores.items():
        values = _values(name, metric, output)
        numeric = [float(value) for value in values if isinstance(value, Real)]
        if values and len(numeric) == len(values) and math.isclose(fmean(numeric), score["value"]):
            by_document[metric] = numeric
    return by_document


def turn_into_fractions(measured: Collection[dict[str, Any]]) -> None:
    """Divides by 100 what a task counts out of 100, as truthfulqa_gen and squadv2 do.

    lm-eval does not say which metrics these are, but a value beyond 1 does. It may be that of one
    model only, so all that are compared are looked at together. sacrebleu's stay as they are.

    measured: the measurements of these models, as `measure_model` returns them.
    """
    tasks = [measurement["scores"]["tasks"] for measurement in measured]
    pairs = ((task, metric) for of in tasks for task, metrics in of.items() for metric in metrics)
    for task, metric in dict.fromkeys(pairs):
        scores = [of[task] for of in tasks if task in of]
        items = [(m.get("by_item") or {}).get(task) or {} for m in measured]
        values = [score[metric]["value"] or 0 for score in scores if metric in score]
        values += chain(*(item.get(metric, ()) for item in items))
        # Of squadv2, best_exact is the only name that no other task has.
        out_of_100 = any("best_exact" in score for score in scores) or max(map(abs, values)) > 1
        if out_of_100 and not is_out_of_100(metric):
            for score in (score[metric] for score in scores if metric in score):
                score |= {key: score[key] and score[key] / 100 for key in ("value", "stderr")}
            for item in (item for item in items if metric in item):
                item[metric] = [value / 100 for value in item[metric]]


def _values(name: str, metric: str, output: dict[str, Any]) -> list[Any]:
    """Lists a metric's value for each document; None where it has none: in a group, not every task
    may have the metric, and a task may score some of its documents only."""
    plain, _, filtered_by = metric.removesuffix(")").partition(" (")
    return [
        sample.get(plain)
        for leaf in _leaves(name, output["group_subtasks"])
        for sample in sorted(output["samples"].get(leaf, []), key=lambda s: s["doc_id"])
        if sample["filter"] == (filtered_by or "none")
    ]


def _leaves(name: str, children: dict[str, list[str]]) -> list[str]:
    """Lists the tasks of a group, whose children can be groups, too; of a task, only itself."""
    tasks = [task for child in children.get(name, ()) for task in _leaves(child, children)]
    return list(dict.fromkeys(tasks)) or [name]


def _scores(row: dict[str, Any], higher_is_better: dict[str, bool | None]) -> dict[str, Score]:
    """Converts lm-eval's scores: "acc,none" becomes "acc", "acc,filter" becomes "acc (filter)"."""
    scores = {}
    for key, value in row.items():
        metric, _, name = key.partition(",")
        numeric = name and isinstance(value, Real) and not metric.endswith("_stderr")
        if not numeric or higher_is_better.get(metric) is False:
            continue
        stderr = row.get(f"{metric}_stderr,{name}")  # "N/A" if there is none
        known = isinstance(stderr, Real) and math.isfinite(stderr)
        scores[metric if name == "none" else f"{metric} ({name})"] = {
            "value": float(value),
            "stderr": float(stderr) if known else None,
            "n": row["sample_len"],
        }
    return scores
