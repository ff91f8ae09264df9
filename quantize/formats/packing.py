"""Packs integer codes as most formats store them: offset binary, so that the lowest code is 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from finequant.recipes.errors import UserError


def packed_width(bits: int) -> int:
    """Returns the width, 4 or 8 bits, in which formats with only these two store a code."""
    return 4 if bits <= 4 else 8


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Packs 4-bit codes [out, in] into uint8 [out, in / 2], the first of two in the low half."""
    offset = (codes + 8).to(torch.uint8)
    return offset[:, ::2] | offset[:, 1::2] << 4


def unpack_nibbles(data: torch.Tensor) -> torch.Tensor:
    """Returns int8 codes [out, in] from the result of `pack_nibbles`."""
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(1).to(torch.int8) - 8


def check_half(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuses numbers that are too large for half precision, in which a format stores them.

    tensors: by the layers or parameters that they belong to.

    Raises:
        UserError: naming the first layer or parameter with such a number.
    """
    most = torch.finfo(torch.float16).max
    for owner, tensor in tensors.items():
        if (largest := tensor.abs().max().item()) > most:
            raise UserError(
                f"{name}: {owner}: a number of {largest:.3g} is beyond half precision "
                f"({most:.0f}), in which {name} stores it: remove {name} from quantize.exports, or "
                "train again with a smaller train.learning_rate if the base has no such weights"
            )
