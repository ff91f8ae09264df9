"""Compares an export with quantized/: token ids of prompts, and next-token distributions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finequant.evaluate.metrics.divergence import Predictions, kl, predict, reference_sequences
from finequant.finetune.data.tokens import prompt_text
from finequant.quantize.formats.format import Format
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    import torch

    from finequant.evaluate.inputs import Material
    from finequant.evaluate.metrics.perplexity import ScoredSequence

TOKENS = 256
"""Minimum number of scored tokens on which exports are compared with quantized/."""


class Reference(NamedTuple):
    """The predictions of quantized/ on some sequences, with which exports are compared."""

    corpora: dict[str, list[ScoredSequence]]
    predictions: Predictions


def quantized_reference(recipe: Recipe, run: RunDir, material: Material) -> Reference:
    """Loads quantized/ and computes the predictions with which exports are compared."""
    from finequant.evaluate.models import load_model

    corpora = reference_sequences(material.corpora, TOKENS)
    model = load_model(
        "quantized", recipe, run, material.probes[0], material.ends, material.lengths()
    )
    work = "quantized: predicting what exports are compared with"
    return Reference(corpora, predict(model, corpora, recipe.evaluate.batch_size, work))


def compared(
    entry: Format,
    folder: Path,
    recipe: Recipe,
    material: Material,
    reference: Reference,
    logs: torch.Tensor,
) -> dict[str, float]:
    """Compares an export with quantized/.

    logs: the export's log-probabilities [scored tokens, vocabulary] on the reference's sequences.

    Returns:
        {"kl": mean divergence from quantized/, in nats per token, "same_prompts": share of the
        held-out prompts that the export's tokenizer encodes as the same ids}; without a key for
        which there are no texts or prompts
    """
    parity = {"kl": kl(reference.predictions.logs, logs).mean().item()} if len(logs) else {}
    if not material.prompts:
        return parity
    texts = [prompt_text(row, material.tokenizer, recipe.data) for row in material.rows]
    equal = map(list.__eq__, entry.token_ids(folder, texts), material.prompts)
    return parity | {"same_prompts": sum(equal) / len(texts)}
