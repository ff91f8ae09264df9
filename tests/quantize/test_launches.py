"""How many operators a GPU would be asked to start, counted on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finequant.finetune import device
from finequant.quantize.methods import gptq, method
from finequant.quantize.rounding import Rounded, round_to_nearest, row_chunks
from finequant.quantize.scheme import LayerScheme
from finequant.quantize.training.fake_quantize import FakeQuantLora, FakeQuantScales


class Launches(TorchDispatchMode):
    """Counts the operators that are no views: on a GPU, each starts a kernel or more."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += not func.is_view and "empty" not in func.name()
        return result


@pytest.fixture
def accelerator(monkeypatch):
    """Lets a CPU take the pieces of an accelerator."""
    for name in ("IN_CACHE", "IN_ONE_LAUNCH"):
        monkeypatch.setattr(device, name, device.IN_ONE_LAUNCH)
    monkeypatch.setattr(method, "ROWS", 1 << 20)


@pytest.mark.parametrize(("rule", "before"), [("max", 9.3), ("search", 17.1)])
def test_gptq_starts_a_handful_of_operators_a_column_for_all_rows(accelerator, rule, before):
    """gate_proj and up_proj of an 8B model share their inputs: 28,672 rows, fourteen pieces then;
    the number of operators does not depend on that of the rows."""
    columns, x = 256, torch.randn(512, 256)
    statistics = gptq.Statistics()
    statistics.add(x, x)
    statistics.solve()
    with Launches() as launches:
        gptq.gptq(torch.randn(3000, columns), statistics, LayerScheme(4, 32, rule, torch.float32))
    assert launches.count / columns < 0.1 * before * 14
    assert launches.count / columns < 8.5


@pytest.mark.parametrize("learns", [FakeQuantLora, FakeQuantScales])
def test_a_fake_quantized_layer_is_formed_at_once(accelerator, learns):
    weight = torch.randn(4096, 1024)  # eight pieces on a CPU
    assert len(list(row_chunks(weight))) == 1
    start = round_to_nearest(weight, 4, 32, "max")
    settings = {"exact": weight, "rank": 4, "scaling": 1.0, "generator": torch.Generator()}
    layer = learns(start, 4, torch.float32, **(settings if learns is FakeQuantLora else {}))
    with Launches() as launches:
        layer.weight()
    assert launches.count < 20


def test_pieces_of_a_cpu_change_no_code():
    weight = torch.randn(4200, 64)
    whole = round_to_nearest(weight, 4, 32, "search")
    parts = [round_to_nearest(part, 4, 32, "search") for part in weight.split(1000)]
    joined = Rounded(*map(torch.cat, zip(*parts, strict=True)))
    assert torch.equal(whole.codes, joined.codes)
    assert torch.equal(whole.scale, joined.scale)
