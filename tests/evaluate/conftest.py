"""A tiny Llama whose answers depend on what it reads."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def model(tiny_base):
    """With larger weights: as the tiny Llama is, attention hardly changes what it says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    for name, weight in model.named_parameters():
        weight.data *= 6 if "proj" in name else 1
    return model
