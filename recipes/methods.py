"""The table of quantization methods that a recipe may name; no torch in here.

A new one is a file that defines METHOD, as those of quantize/methods/ do, and an entry here.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What a recipe, and the record that ships, have to know of a method."""

    description: str
    module: str
    """Where METHOD is defined."""
    is_calibrated: bool = False
    """Whether it reads the calibration text."""


METHODS: dict[str, Entry] = {
    "rtn": Entry("round to nearest", "finequant.quantize.methods.rtn"),
    "hqq": Entry("half-quadratic (HQQ)", "finequant.quantize.methods.hqq"),
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
