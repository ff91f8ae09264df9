"""Measures one loaded model: perplexity, answers to the held-out rows, and tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finequant.evaluate.inputs import HELD_OUT, Material
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from finequant.evaluate.metrics.divergence import Predictions
    from finequant.finetune.architecture import Decoder


def measure_model(
    name: str, model: Decoder, recipe: Recipe, material: Material, size: int
) -> tuple[dict[str, Any], Predictions]:
    """Measures a loaded model.

    size: bytes of the model's weights on disk.

    Returns:
        {"scores": size, perplexity, and tasks as in report.json, "answers": to the held-out rows},
        and the result of `predicted`.
    """
    from finequant.evaluate.metrics.perplexity import measure
    from finequant.evaluate.metrics.tasks import answer, lm_eval_tasks, multiple_choice
    from finequant.evaluate.metrics.text_metrics import METRICS, score_answers
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.model import load_config

    evaluate, tokenizer = recipe.evaluate, material.tokenizer
    predictions = predicted(name, model, recipe, material)
    scores: dict[str, Any] = {
        "size_bytes": size,
        "bits_per_weight": 8 * size / parameter_count(load_config(recipe.model)),
        "activations": "int8" if name == "quantized" else "float",
        "perplexity": {
            corpus: measure(
                model,
                *texts,
                evaluate.batch_size,
                f"{name}: perplexity, {corpus}",
                predictions.losses[corpus],
            )
            for corpus, texts in material.corpora.items()
        },
        "tasks": {},
    }
    answers: list[str] = []
    if material.prompts:
        say(f"evaluate: {name}: answering {len(material.prompts)} held-out rows")
        answers = answer(
            model,
            tokenizer,
            material.prompts,
            evaluate.max_new_tokens,
            evaluate.batch_size,
            f"{name}: answers",
        )
        generated = [metric for metric in evaluate.metrics if metric in METRICS]
        scores["tasks"][HELD_OUT] = score_answers(answers, material.references, generated)
        if "multiple_choice" in evaluate.metrics:
            scores["tasks"][HELD_OUT]["multiple_choice"] = multiple_choice(
                model,
                tokenizer,
                material.prompts,
                material.references,
                material.choices,
                evaluate.batch_size,
                f"{name}: multiple choice",
            )
    if evaluate.tasks:
        scores["tasks"] |= lm_eval_tasks(model, tokenizer, evaluate, recipe.seed)
    return {"scores": scores, "answers": answers}, predictions


def predicted(name: str, model: Decoder, recipe: Recipe, material: Material) -> Predictions:
    """Predicts the tokens on which the quantized model is compared with the tuned one.

    Of several processes, the first computes them and sends the others the losses only.
    """
    from torch import empty

    from finequant.evaluate.metrics.divergence import Predictions, predict, reference_sequences
    from finequant.finetune.processes import decided_by_first, is_first

    corpora = reference_sequences(material.corpora, recipe.evaluate.divergence_tokens)
    predictions = Predictions(empty(0), empty(0), {})
    if is_first():
        work = f"{name}: perplexity and divergence"
        predictions = predict(model, corpora, recipe.evaluate.batch_size, work)
    losses = decided_by_first(lambda: predictions.losses)
    return predictions._replace(losses=losses)
