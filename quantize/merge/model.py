"""base + adapter -> one float model in memory, where it is run: evaluation, sweeps and chat."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from finequant.finetune.architecture import skeleton
from finequant.quantize.checkpoint.reading import Weights, read_into
from finequant.quantize.merge.adapter import Adapter, Base, merged_weights, open_base
from finequant.quantize.merge.check import check_merge
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from finequant.finetune.architecture import Decoder


def merged_model(
    recipe: Recipe, run: RunDir, dtype: torch.dtype, prompts: list[list[int]] | None = None
) -> Decoder:
    """Builds the tuned model, merged in float32 row by row, with weights in `dtype`.

    prompts: token ids on which the merged logits are compared with those of peft. The stage
        quantize does so, too; here it is for runs that may not have been quantized yet.

    Raises:
        UserError: if the adapter is not one of this base, or the logits differ.
    """
    base = open_base(recipe.model)
    adapter = Adapter(run.adapter, base, recipe.model.base)
    if prompts:
        check_merge(base, adapter, run.adapter, prompts)
    return float_model(base, merged_weights(base, adapter), dtype)


def float_model(base: Base, weights: Weights, dtype: torch.dtype) -> Decoder:
    """Builds the model like `from_pretrained`, without a tensor being in memory twice."""
    config = deepcopy(base.config)
    config.dtype = dtype
    model = skeleton(config).to(dtype)
    # Memory for all of them before the first is read: what reading takes and gives back would
    # leave gaps between them.
    model.to_empty(device="cpu").tie_weights()
    for name, parameter in model.named_parameters():
        read_into(parameter.detach(), weights, name)
    rotary = model.model.rotary_emb  # its frequencies are in no file
    model.model.rotary_emb = type(rotary)(config)
    model.generation_config = base.generation_config
    return model.requires_grad_(False).eval()
