"""Trains all scales together to reproduce the float model's predictions, without labels.

Calibration fits each layer, and then each block, to the float model, but not the joint effect of
their errors. Here the codes stay fixed, and the scale of every group, head included, is trained to
lower the divergence of the predictions on calibration text: the second phase of EfficientQAT
(https://arxiv.org/abs/2407.11062), with the float model as its teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from finequant.finetune import attention
from finequant.finetune.architecture import EMBEDDING, HEAD
from finequant.finetune.device import arithmetic_dtype, device
from finequant.finetune.processes import add_up_gradients, share
from finequant.quantize.checkpoint.reading import Weights, filled
from finequant.quantize.methods.sequences import LOGITS_TOKENS, SCALE_TOKENS
from finequant.quantize.rounding import Rounded, row_chunks
from finequant.quantize.scheme import Plan
from finequant.quantize.training.fake_quantize import (
    FakeQuantEmbedding,
    FakeQuantized,
    FakeQuantLinear,
    FakeQuantScales,
    disabled,
)
from finequant.quantize.training.model import assembled
from finequant.recipes.terminal import tracked

if TYPE_CHECKING:
    from finequant.finetune.architecture import Decoder, DecoderConfig

LEARNING_RATE = 1e-3
"""Relative to a scale; three times as much lowers perplexity further, but raises divergence."""

WARMUP = 10
"""Steps over which the learning rate rises."""


def train_scales(
    weights: Weights,
    config: DecoderConfig,
    sequences: torch.Tensor,
    rounded: dict[str, Rounded],
    plan: Plan,
    dtype: torch.dtype,
    steps: int,
) -> dict[str, Rounded]:
    """Returns the layers of `rounded` with the same codes and trained scales.

    A head that shares the embedding's table keeps its scales, so that it still does.

    Memory holds the whole model: codes, and float weights for the teacher. Several processes share
    the rows of each step.

    weights: the float model's.
    sequences: token ids [rows, length].
    dtype: the shipped model's; where the processor only emulates it, training computes in float32.
    """
    model = _model(weights, config, rounded, plan, arithmetic_dtype(dtype)).to(device())
    modules = {name: model.get_submodule(name) for name in rounded}
    learned = [
        module.scale_delta for module in modules.values() if isinstance(module, FakeQuantScales)
    ]
    if not learned:  # only a head that shares the embedding's table is quantized
        return rounded
    optimizer = torch.optim.Adam(learned, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - step / steps)
    )
    batches = sequences.split(max(1, SCALE_TOKENS // sequences.shape[1]))
    kept: dict[int, torch.Tensor] = {}  # the teacher's states, until the batch returns
    for step in tracked(range(steps), "quantize: scales, step", steps):
        at = step % len(batches)
        if len(mine := share(batches[at])):
            mine = mine.to(device())
            known = kept.pop(at, None)
            exact = _float_states(model, modules.values(), mine) if known is None else known
            if step + len(batches) < steps:
                kept[at] = exact
            _backward(model, modules.values(), mine, exact, batches[at].numel())
        add_up_gradients(learned)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: module.rounded() for name, module in modules.items()}


@torch.no_grad()
def _float_states(
    model: Decoder, layers: Iterable[FakeQuantized], ids: torch.Tensor
) -> torch.Tensor:
    """Computes the last hidden states [tokens, hidden] of the float model."""
    with disabled(layers):
        return model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)


@torch.enable_grad()
def _backward(
    model: Decoder,
    layers: Iterable[FakeQuantized],
    ids: torch.Tensor,
    teacher: torch.Tensor,
    tokens: int,
) -> None:
    """Accumulates gradients of the divergence, averaged over `tokens`, the count in all processes;
    the logits of only some tokens are in memory at a time.

    teacher: last hidden states of the float model [tokens, hidden].
    """
    hidden = model.model(ids, use_cache=False).last_hidden_state
    states = hidden.detach().flatten(0, 1).requires_grad_()
    parts = zip(states.split(LOGITS_TOKENS), teacher.split(LOGITS_TOKENS), strict=True)
    for part, exact in parts:
        logits = model.lm_head(part)
        with torch.no_grad(), disabled(layers):
            expected = model.lm_head(exact)
        logits.backward(_divergence_gradient(logits, expected, tokens))
    hidden.backward(states.grad.view_as(hidden))


@torch.no_grad()
def _divergence_gradient(logits: torch.Tensor, teacher: torch.Tensor, tokens: int) -> torch.Tensor:
    """Computes the gradient of KL(teacher || student) / `tokens` with respect to the student's
    `logits` [rows, vocabulary], in their dtype; `teacher` is the teacher's logits."""
    gradient = torch.empty_like(logits)
    for rows in row_chunks(logits):
        predicted, expected = (part[rows].float().softmax(-1) for part in (logits, teacher))
        gradient[rows] = predicted.sub_(expected).div_(tokens)
    return gradient


def _model(
    weights: Weights,
    config: DecoderConfig,
    rounded: dict[str, Rounded],
    plan: Plan,
    dtype: torch.dtype,
) -> Decoder:
    """Builds the model with fake-quantized layers, whose float weights make it its own teacher."""
    head, embedding = rounded.get(HEAD), rounded.get(EMBEDDING)
    shares_table = head and embedding and all(map(torch.equal, head, embedding))

    def make(name: str, bias: torch.Tensor | None) -> FakeQuantized:
        start, bits = rounded[name], plan[name].bits
        float_weight = filled(weights, f"{name}.weight", start.codes.shape, dtype)
        if name == EMBEDDING:
            return FakeQuantEmbedding(start, bits, dtype, float_weight)
        kind = FakeQuantLinear if name == HEAD and shares_table else FakeQuantScales
        return kind(start, bits, dtype, float_weight, bias=bias)

    model = assembled(config, weights, plan, dtype, make)
    if device().type == "cpu":
        model.set_attn_implementation(attention.BATCH)
    return model
