"""Kernels that the recipe asks for, and the machine does not have."""

from __future__ import annotations

import pytest
import torch

from finequant.finetune.kernels import use_liger
from finequant.recipes.errors import UserError


@pytest.mark.parametrize(
    ("gpu", "reason"), [(False, "there is no CUDA GPU"), (True, "not installed: pip install")]
)
def test_missing_liger_is_refused_only_if_the_recipe_asks_for_it(monkeypatch, gpu, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"train.kernels: liger: {reason}"):
        use_liger(torch.nn.Module(), "liger")
    for kernels in ("auto", "plain"):
        use_liger(torch.nn.Module(), kernels)
