"""Checks compute on the device that they are given: here `meta`, which computes nothing, and
refuses tensors of the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import make_adapter

from finequant.quantize.checkpoint import blocks
from finequant.quantize.merge import adapter, check
from finequant.recipes.schema import Model

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture
def meta(monkeypatch):
    """Makes `meta` the device; what `.cpu()` moves to the CPU, the results, becomes zeros there."""
    for module in (blocks, check):
        monkeypatch.setattr(module, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape))


@pytest.fixture
def base(tiny_base) -> adapter.Base:
    return adapter.open_base(Model(base=str(tiny_base)))


def test_the_merged_model_computes_on_the_given_device(base, meta):
    logits = blocks.float_logits(base.config, base.weights, PROMPTS)
    assert logits.shape == (2, base.config.vocab_size)


def test_pefts_base_and_adapter_compute_on_the_given_device(base, tiny_base, meta, tmp_path):
    make_adapter(tiny_base, tmp_path)
    logits = check.tuned_logits(base, tmp_path, PROMPTS)
    assert logits.shape == (2, base.config.vocab_size)
