"""The device that a stage computes on, and the dtype."""

from __future__ import annotations

import pytest
import torch

from finequant.finetune.device import (
    arithmetic_dtype,
    device,
    product,
    training_precision,
    trains_on_cpu,
    weights_at_once,
)
from finequant.recipes.errors import UserError


@pytest.fixture
def hardware(monkeypatch):
    """Simulates hardware(gpu=None or whether it has bf16, cpu=names of instructions)."""

    def pretend(gpu: bool | None, cpu: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: gpu)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(cpu, True))

    return pretend


@pytest.mark.parametrize(
    ("gpu", "cpu", "expected", "reason"),
    [
        (True, (), torch.bfloat16, "this GPU computes in bf16"),
        (False, ("amx_bf16",), torch.float32, "this GPU does not compute in bf16"),
        (None, ("avx512_f", "avx512_bf16"), torch.bfloat16, "this CPU computes in bf16"),
        (None, ("amx_bf16",), torch.bfloat16, "this CPU computes in bf16"),
        (None, ("neon", "bf16"), torch.bfloat16, "this CPU computes in bf16"),
        (None, ("avx512_f", "avx512_bw"), torch.float32, "this CPU does not compute in bf16"),
    ],
)
def test_precision_follows_the_hardware(hardware, gpu, cpu, expected, reason):
    hardware(gpu, cpu)
    assert training_precision("auto") == (expected, reason)
    assert training_precision("fp32") == (torch.float32, "as the recipe says")
    if gpu is not False:
        assert training_precision("bf16") == (torch.bfloat16, "as the recipe says")


def test_bf16_on_a_gpu_without_it_is_refused(hardware):
    hardware(gpu=False)
    with pytest.raises(UserError, match="this GPU has no bf16: use train.precision=fp32"):
        training_precision("bf16")


def test_an_unused_gpu_does_not_decide_the_precision(hardware, monkeypatch):
    """accelerate's `use_cpu: true`, as in recipes/accelerate/cpu.yaml."""
    hardware(gpu=True, cpu=("avx512_f",))
    assert not trains_on_cpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert trains_on_cpu()
    assert training_precision("auto") == (torch.float32, "this CPU does not compute in bf16")
    assert training_precision("bf16")[0] == torch.bfloat16  # emulated


def test_other_gpus_compute_in_bf16(hardware, monkeypatch):
    hardware(gpu=None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert training_precision("auto") == (torch.bfloat16, "this GPU (mps) computes in bf16")


def test_this_machines_precision_is_known():
    dtype, reason = training_precision("auto")
    assert dtype in (torch.bfloat16, torch.float32)
    assert reason.endswith(" in bf16")


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_every_stage_uses_the_same_accelerator(hardware, monkeypatch, kind):
    hardware(gpu=True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")  # also where each process sees only some of the GPUs
    assert device() == torch.device(kind, 1)
    assert weights_at_once(device()) > weights_at_once(torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device() == torch.device("cpu")


def test_models_compute_in_float32_where_bf16_is_emulated(hardware):
    hardware(gpu=None)
    assert arithmetic_dtype(torch.bfloat16) == torch.float32
    assert arithmetic_dtype(torch.float16) == torch.float16
    hardware(gpu=True)
    assert arithmetic_dtype(torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("cpu", [(), ("amx_bf16",)], ids=["emulated", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_equal_torchs(hardware, cpu, dtype):
    hardware(gpu=None, cpu=cpu)
    rows, weight = torch.randn(2, 5, 64, dtype=dtype), torch.randn(64, 32, dtype=dtype)
    torch.testing.assert_close(product(rows, weight), rows @ weight)
