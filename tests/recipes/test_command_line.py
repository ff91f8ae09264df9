"""What all stages do before they load a library."""

from __future__ import annotations

import logging

from finequant.recipes.command_line import quiet_libraries


def test_a_library_that_looks_for_optional_kernels_says_nothing():
    """With AVX512's bfloat16, bitsandbytes did so in every command that imports peft."""
    quiet_libraries()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.ERROR)
