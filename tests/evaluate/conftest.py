"""A tiny Llama whose answers depend on what it reads."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def model(tiny_base):
    """The tiny Llama with larger weights: as it is, attention hardly changes its predictions."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    for name, weight in model.named_parameters():
        weight.data *= 6 if "proj" in name else 1
    return model
