"""Measures one loaded model: perplexity, answers to the held-out rows, and tasks.

Whoever changes a figure here, or in what this calls, raises `recipes.stages.MEASURING_CODE`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finequant.evaluate.inputs import HELD_OUT, Material
from finequant.recipes.errors import counted
from finequant.recipes.freshness import Inputs, Memo
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import is_first, say

if TYPE_CHECKING:
    from finequant.evaluate.metrics.divergence import Predictions
    from finequant.finetune.architecture import Decoder


def memo_of(recipe: Recipe, run: RunDir, name: str, **further: Any) -> Memo:
    """Returns the file of a model's or an export's measurement.

    further: what it depends on, besides the table of stages and `arithmetic`.
    """
    memo = run.memo(recipe, f"measurements/{name}")
    return memo._replace(inputs=memo.inputs | arithmetic(recipe) | further)


def arithmetic(recipe: Recipe) -> Inputs:
    """Returns the dtype that this machine computes in, as an input of measurements: those that are
    compared must have the same, even if the run directory comes from another machine."""
    from finequant.finetune.device import arithmetic_dtype, dtype_name
    from finequant.finetune.model import load_config
    from finequant.quantize.scheme import shipped_dtype

    dtype = arithmetic_dtype(shipped_dtype(recipe.quantize, load_config(recipe.model)))
    return {"arithmetic": dtype_name(dtype)}


def measure_model(
    name: str, model: Decoder, recipe: Recipe, material: Material, size: int
) -> tuple[dict[str, Any], Predictions]:
    """Measures a loaded model.

    size: bytes of the model's weights on disk.

    Returns:
        {"scores": size, perplexity, and tasks as in report.json, "answers": to the held-out rows,
        "by_item": values of scores that are means and cannot be computed from the answers}, and the
        result of `predicted`.
    """
    from finequant.evaluate.metrics.divergence import in_random_order
    from finequant.evaluate.metrics.perplexity import measure
    from finequant.evaluate.metrics.tasks import lm_eval_tasks
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.model import load_config

    evaluate, answers, tasks, by_item = recipe.evaluate, [], {}, {}
    predictions = predicted(name, model, recipe, material)
    perplexity = {
        corpus: measure(
            model,
            in_random_order(sequences),  # `predicted` has the losses of the first ones
            documents,
            evaluate.batch_size,
            f"{name}: perplexity, {corpus}",
            predictions.losses[corpus],
        )
        for corpus, (sequences, documents) in material.corpora.items()
    }
    if material.prompts:
        answers, tasks[HELD_OUT], by_item[HELD_OUT] = _held_out(name, model, recipe, material)
    if evaluate.tasks:
        scores, values = lm_eval_tasks(model, material.tokenizer, evaluate, recipe.seed)
        tasks |= scores
        by_item |= values
    scores = {
        "size_bytes": size,
        "bits_per_weight": 8 * size / parameter_count(load_config(recipe.model)),
        "activations": "int8" if name == "quantized" else "float",
        "perplexity": perplexity,
        "tasks": tasks,
    }
    return {"scores": scores, "answers": answers, "by_item": by_item}, predictions


def _held_out(
    name: str, model: Decoder, recipe: Recipe, material: Material
) -> tuple[list[str], dict[str, Any], dict[str, list[float]]]:
    """Answers the held-out rows; returns the answers, their scores by metric, and by metric the
    values of rows that are not computed from the answers."""
    from finequant.evaluate.metrics.held_out import answer, multiple_choice
    from finequant.evaluate.metrics.text_metrics import mean, score_answers

    evaluate, asked = recipe.evaluate, (model, material.tokenizer, material.prompts)
    say(f"evaluate: {name}: answering {counted(len(material.prompts), 'held-out row')}")
    answers = answer(*asked, evaluate.max_new_tokens, evaluate.batch_size, f"{name}: answers")
    scores = score_answers(answers, material.references, evaluate.metrics, material.groups)
    by_row = {}
    if "multiple_choice" in evaluate.metrics:
        by_row["multiple_choice"] = multiple_choice(
            *asked,
            material.references,
            material.choices,
            evaluate.batch_size,
            f"{name}: multiple choice",
            material.ends,
        )
        scores["multiple_choice"] = mean(by_row["multiple_choice"], material.groups)
    return answers, scores, by_row


def predicted(name: str, model: Decoder, recipe: Recipe, material: Material) -> Predictions:
    """Predicts the tokens on which the quantized model is compared with the tuned one.

    Of several processes, the first computes them and sends the others the losses only.
    """
    from torch import empty

    from finequant.evaluate.metrics.divergence import Predictions, predict, reference_sequences
    from finequant.finetune.processes import decided_by_first

    corpora = reference_sequences(material.corpora, recipe.evaluate.divergence_tokens)
    predictions = Predictions(empty(0), empty(0), {}, [])
    if is_first():
        work = f"{name}: perplexity and divergence"
        predictions = predict(model, corpora, recipe.evaluate.batch_size, work)
    losses = decided_by_first(lambda: predictions.losses)
    return predictions._replace(losses=losses)
