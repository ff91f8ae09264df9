"""How many operators a GPU would be asked to start, counted on a CPU."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from finequant.quantize.rounding import (
    Rounded,
    latent_weights,
    round_to_nearest,
    row_chunks,
)
from finequant.quantize.training.fake_quantize import FakeQuantLora, FakeQuantScales

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launches(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("launches")


@pytest.mark.parametrize("rule", ["max", "search"])
def test_gptq_starts_a_handful_of_operators_a_column_for_all_rows(launches, rule):
    """gate_proj and up_proj of an 8B model share their inputs: 28,672 rows, once in 14 pieces. The
    number of operators does not depend on the number of rows."""
    counted = launches.gptq_operators(rule)
    assert counted < 0.1 * launches.BEFORE[rule] * launches.PIECES
    assert counted < 8.5


@pytest.mark.parametrize("learns", ["adapter learns", "scales learn"])
def test_a_quantization_aware_step_of_8b_starts_a_tenth_of_what_it_did(launches, learns):
    """Counts the whole step: forward, backward, and optimizer."""
    assert launches.step_operators(learns) < 0.1 * launches.STEP_BEFORE[learns]


@pytest.mark.parametrize("learns", [FakeQuantLora, FakeQuantScales])
def test_a_fake_quantized_layers_weight_is_computed_in_one_piece(launches, learns):
    weight = torch.randn(4096, 1024)  # eight pieces on a CPU
    start = round_to_nearest(weight, 4, 32, "max")
    latent = latent_weights(weight, start, torch.float16)
    settings = {"latent": latent, "rank": 4, "scaling": 1.0, "generator": torch.Generator()}
    layer = learns(start, 4, torch.float32, **(settings if learns is FakeQuantLora else {}))
    with launches.accelerator(), launches.Launches() as counted:
        assert len(list(row_chunks(weight))) == 1
        layer.weight()
    assert counted.count < 20


def test_the_pieces_of_a_cpu_change_no_code():
    weight = torch.randn(4200, 64)
    whole = round_to_nearest(weight, 4, 32, "search")
    parts = [round_to_nearest(part, 4, 32, "search") for part in weight.split(1000)]
    joined = Rounded(*map(torch.cat, zip(*parts, strict=True)))
    assert torch.equal(whole.codes, joined.codes)
    assert torch.equal(whole.scale, joined.scale)
