"""base + adapter -> one float model, for stages that run it: evaluation, sweeps and chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from finequant.finetune.architecture import rotary_embedding, skeleton
from finequant.quantize.checkpoint.reading import Weights, filled, read_into
from finequant.quantize.merge.adapter import Adapter, Base, merged_weights, open_base
from finequant.quantize.merge.check import check_merge
from finequant.quantize.size.placement import DISK, DeviceMap
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
        UserError: if the adapter was not made for this base, or the logits differ.
    """
    base = open_base(recipe.model)
    adapter = Adapter(run.adapter, base, recipe.model.base)
    if prompts:
        check_merge(base, adapter, run.adapter, prompts)
    return float_model(base, merged_weights(base, adapter), dtype)


def float_model(base: Base, weights: Weights, dtype: torch.dtype) -> Decoder:
    """Builds the model like `from_pretrained`, without a tensor being in memory twice."""
    model = _skeleton(base, dtype)
    # All weights are allocated before the first is read; else the buffers that reading allocates
    # and frees would leave gaps between them.
    model.to_empty(device="cpu").tie_weights()
    for name, parameter in model.named_parameters():
        read_into(parameter.detach(), weights, name)
    _complete(model, base)
    return model.requires_grad_(False).eval()


def _skeleton(base: Base, dtype: torch.dtype) -> Decoder:
    """Makes the base's model in `dtype`, without memory for its weights."""
    config = deepcopy(base.config)
    config.dtype = dtype
    return skeleton(config).to(dtype)


def _complete(model: Decoder, base: Base) -> None:
    """Adds what is in no file of weights: the rotary frequencies, and how to generate."""
    model.model.rotary_emb = rotary_embedding(model.config)
    model.generation_config = base.generation_config


class Offloaded(Mapping[str, torch.Tensor]):
    """Parameters by name: some are in memory, the others are read on demand."""

    def __init__(self, names: list[str], read: Callable[[str], torch.Tensor]) -> None:
        self.kept: dict[str, torch.Tensor] = {}
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.kept[name] if name in self.kept else self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def spread_model(
    base: Base, weights: Weights, dtype: torch.dtype, arithmetic: torch.dtype, device_map: DeviceMap
) -> Decoder:
    """Builds a model that is larger than the memory of a device, but runs like any other.

    accelerate's hooks copy each layer of a block that is on no accelerator to the first one when it
    runs, and drop the copy afterwards.

    dtype: the dtype to which the weights are rounded.
    arithmetic: the dtype in which they are kept.
    """
    from accelerate import dispatch_model
    from accelerate.utils import set_module_tensor_to_device

    model = _skeleton(base, arithmetic)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    offloaded = Offloaded(
        list(shapes), lambda name: filled(weights, name, shapes[name], dtype).to(arithmetic)
    )
    main = next(iter(device_map.values()))
    for name in shapes:
        where = next(device_map[module] for module in device_map if name.startswith(f"{module}."))
        if where == "cpu" != main:
            offloaded.kept[name] = offloaded[name]
        elif where != DISK:
            set_module_tensor_to_device(model, name, where, offloaded[name])
    model.tie_weights()
    _complete(model, base)
    dispatch_model(model, device_map, main, offloaded, offload_index={})
    return model
