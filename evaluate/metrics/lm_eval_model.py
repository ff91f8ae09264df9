"""Makes lm-eval's model class compute each shared context once: same answers, less time."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from finequant.evaluate.metrics.shared_context import Continuation, log_likelihoods
from finequant.recipes.errors import UserError

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as texts (None for a window of a longer text), and as token ids."""


class SharedContextLM(HFLM):
    """HFLM for a decoder, with HFLM's own tokens, truncation, and cache.

    Log-likelihoods are summed in float32 or better. HFLM sums in the model's dtype: in bfloat16,
    near ties can come out differently.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        asked = [self._truncated(*request) for request in requests]
        likelihoods = log_likelihoods(
            self.model, asked, override_bs or self.batch_size, "log-likelihoods"
        )
        answers = [tuple(likelihood) for likelihood in likelihoods]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

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
