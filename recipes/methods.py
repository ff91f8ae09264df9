"""The table of quantization methods that a recipe may name; it does not import torch.

A new method needs a file that defines METHOD, like those in quantize/methods/, and an entry here.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What recipes, and the record of a quantization, need to know about a method."""

    description: str
    module: str
    """Where METHOD is defined."""
    is_calibrated: bool = False
    """Whether it reads the calibration text."""


METHODS: dict[str, Entry] = {
    "rtn": Entry("rounded to nearest", "finequant.quantize.methods.rtn"),
    "hqq": Entry("rounded by half-quadratic quantization (HQQ)", "finequant.quantize.methods.hqq"),
    "gptq": Entry("calibrated (GPTQ)", "finequant.quantize.methods.gptq", is_calibrated=True),
}


def known_method(name: str) -> str:
    """Returns the name.

    Raises:
        ValueError: for a method that has no entry.
    """
    if name not in METHODS:
        *first, last = (repr(method) for method in METHODS)
        raise ValueError(f"expected {', '.join(first)} or {last}")
    return name
