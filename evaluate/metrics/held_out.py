"""Answers the held-out rows, in the model's words or by choosing the most likely answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from finequant.evaluate.metrics.batches import batches_by_length, in_batches
from finequant.evaluate.metrics.shared_context import Continuation, log_likelihoods
from finequant.evaluate.models import GREEDY
from finequant.finetune.data.turns import configured_ends, until_end
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    description: str,
) -> list[str]:
    """Answers prompts of token ids greedily; returns stripped texts without special tokens.

    Stops at the end tokens of the generation configuration, as plain `generate` does. Equal prompts
    are answered once.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    batches = batches_by_length(dict(enumerate(map(len, distinct))), batch_size)

    def compute(batch: list[int]) -> list[str]:
        asked = [list(distinct[index]) for index in batch]
        return _greedy(model, tokenizer, asked, max_new_tokens)

    texts = dict(zip(chain(*batches), in_batches(batches, compute, description), strict=True))
    answers = {prompt: texts[index] for index, prompt in enumerate(distinct)}
    return [answers[tuple(prompt)] for prompt in prompts]


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    references: list[str],
    choices: list[str],
    batch_size: int,
    description: str,
    ends: Sequence[int] = (),
) -> list[float]:
    """Says of each prompt whether its reference is the most likely of `choices` (1.0 or 0.0).

    Log-likelihoods are summed over a choice's tokens; ties go to the first choice. If a choice
    begins another, as 1 begins 10, the token that ends an answer is scored after each choice, too:
    without it, 10 could never be more likely than 1.

    ends: token ids that end an answer, the usual one first.

    Raises:
        UserError: for a reference that is not among the choices.
    """
    for number, reference in enumerate(references, 1):
        if reference not in choices:
            raise UserError(
                f"held-out row {number}: the answer {reference!r} is not among "
                f"evaluate.choices\nExpected one of: {', '.join(map(repr, choices[:20]))}"
            )
    # In this order, a choice that begins others comes right before one of them.
    in_order = pairwise(sorted(set(choices)))
    end = list(ends[:1]) if any(after.startswith(before) for before, after in in_order) else []
    asked = [
        Continuation(prompt, item.ids + end)
        for prompt in prompts
        for item in continuations(tokenizer, prompt, choices)
    ]
    likelihoods = log_likelihoods(model, asked, batch_size, description)
    logs = [likelihood.log for likelihood in likelihoods]
    rows = [logs[start : start + len(choices)] for start in range(0, len(logs), len(choices))]
    picks = [choices[row.index(max(row))] for row in rows]
    return [float(pick == reference) for pick, reference in zip(picks, references, strict=True)]


def continuations(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], choices: list[str]
) -> list[Continuation]:
    """Tokenizes each choice together with its prompt, as lm-eval and the training data do.

    Alone, a choice can get other tokens: Llama 2's tokenizer, for example, puts a space in front of
    it. Where the choice would change the prompt's own tokens, as after a final space, it is
    tokenized alone nevertheless.
    """
    text = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
    apart = tokenizer(choices, add_special_tokens=False)["input_ids"]
    whole = tokenizer([text + choice for choice in choices], add_special_tokens=False)["input_ids"]
    count = len(prompt)
    return [
        Continuation(prompt, ids[count:] if ids[:count] == prompt and ids[count:] else ending)
        for ids, ending in zip(whole, apart, strict=True)
    ]


@torch.inference_mode()
def _greedy(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Answers one batch of prompts greedily, padded on the left."""
    ends = configured_ends(model.generation_config)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    left = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], padding_value=pad, **left)
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], **left)
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **GREEDY,
    )
    new = [until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]
    # Cleaning up spaces would turn " ." into "."; the reference may contain " .".
    texts = tokenizer.batch_decode(
        new, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.strip() for text in texts]
