"""Makes lm-eval's model class compute each shared context once: same answers, less time."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from finequant.evaluate.metrics.shared_context import Continuation, log_likelihoods
from finequant.recipes.errors import UserError, counted
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    import torch

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as texts (None for a window of a longer text), and as token ids."""


class SharedContextLM(HFLM):
    """HFLM for a decoder, with HFLM's own tokens, truncation, and cache.

    Log-likelihoods are summed in float32 or better. HFLM sums in the model's dtype: in bfloat16,
    near ties can come out differently.

    HFLM drops the beginning of what does not fit into the positions; this class says how often.
    """

    _cut_prompts = 0

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        asked = [self._truncated(*request) for request in requests]
        pairs = zip(asked, requests, strict=True)
        cut = sum(len(item.context) < len(context) for item, (_, context, _) in pairs)
        self._say_how_many_are_cut(cut, len(asked))
        likelihoods = log_likelihoods(
            self.model, asked, override_bs or self.batch_size, "log-likelihoods"
        )
        answers = [tuple(likelihood) for likelihood in likelihoods]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # a bar of tokenizing: seconds

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._cut_prompts = 0
        no_bar = disable_tqdm or not sys.stderr.isatty()  # it would fill a log file
        answers = super().generate_until(requests, disable_tqdm=no_bar)
        self._say_how_many_are_cut(self._cut_prompts, len(requests))
        return answers

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenizes prompts as HFLM does, and counts those that are cut."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self._cut_prompts += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = (part[:, -left_truncate_len:] for part in (ids, mask))
        return ids, mask

    def _say_how_many_are_cut(self, cut: int, prompts: int) -> None:
        if cut:
            say(
                f"evaluate: {cut} of {counted(prompts, 'prompt')} lost the beginning, to fit into "
                f"the base's {self.max_length} positions with the answer: lower num_fewshot"
            )

    def _truncated(self, texts: Any, context: list[int], ids: list[int]) -> Continuation:
        """Drops the first tokens of a context that does not fit, as HFLM does.

        Raises:
            UserError: for a continuation that is empty or does not fit by itself.
        """
        if not 1 <= len(ids) <= self.max_length:
            raise UserError(
                f"lm-eval task: a continuation has {len(ids)} tokens: {str(texts)[-200:]}\n"
                f"Expected 1 to {self.max_length}, the model's positions; correct the task's data."
            )
        # The last token is only predicted, so one more than the positions fits.
        excess = len(context) + len(ids) - (self.max_length + 1)
        return Continuation(context[max(0, excess) :], ids)
