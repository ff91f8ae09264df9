"""A simulated device in a CPU's memory: torch refuses to mix its tensors with the CPU's.

`install()` registers it under PrivateUse1, which torch keeps for devices that it does not know; it
stays for the rest of the process. `torch.accelerator` reports it, so every stage computes on it.
Its tensors are torch's, with torch's autograd, views, storages, and checks of devices. Only its
kernels are Python's: the dispatcher falls back to a function that aliases each tensor as one of the
CPU (DLPack, no copy), calls the CPU's kernel, and aliases the results as the device's. Kernels of
views make no difference between devices, and are the CPU's.

An operation on both devices raises a RuntimeError: torch's, or `MixedDevicesError` from here. As on
CUDA, numbers of the CPU (tensors without dimensions) may take part in elementwise operations, and
random numbers need a generator of the device. It is stricter than CUDA, which copies indices
silently. `copies` counts the copies in each direction, numbers that were read included.

It cannot test code that asks for CUDA by name (graphs, fused kernels, flash attention, pinned
memory, bitsandbytes), several devices, streams, autocast, and how a GPU rounds.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

# accelerate, transformers and safetensors know devices by name; this is one of PrivateUse1.
NAME = "musa"
_VIEWS = (
    "alias",
    "as_strided",
    "_reshape_alias",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "unfold",
    "view",
)

copies: Counter[str] = Counter()
"""Numbers of copies `to the device`, and `to the CPU`, which wait for the device."""


class MixedDevicesError(RuntimeError):
    """An operation on tensors of both devices."""


def install() -> torch.device:
    """Makes the device this process's accelerator, and returns it."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    package = ModuleType(f"torch_{NAME}")  # libraries check whether it is installed
    package.__spec__ = ModuleSpec(package.__name__, None)
    sys.modules[package.__name__] = package
    torch.Generator = _Generator
    torch.nn.Module._apply = _moved
    _fallback.fallback(_on_cpu, "PrivateUse1")
    for name in _VIEWS:
        _aten.impl(name, partial(_as_on_cpu, _operator(name)), "PrivateUse1")
    for name, kernel in (
        ("empty.memory_format", _empty),
        ("_copy_from", _copy),
        ("_local_scalar_dense", _number),
        ("resize_", _resize),
    ):
        _aten.impl(name, kernel, "PrivateUse1")
    return torch.device(NAME, 0)


# Kernels vanish with the library object that registered them.
_fallback, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")


def _operator(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


class _Module(_DummyBackendModule):
    """The part of `torch.musa` that libraries use."""

    def set_device(self, device: torch.device | int) -> None:
        """Does nothing: there is only one device."""

    def empty_cache(self) -> None:
        """Does nothing: nothing is cached."""

    def get_rng_state(self, device: int = 0) -> torch.Tensor:
        """Returns the CPU's state, as the CPU's kernels draw the numbers."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: int = 0) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Generator(torch.Generator):
    """A generator of the CPU that may be requested for the device."""

    def __new__(cls, device: torch.device | str = "cpu"):
        generator = super().__new__(cls, device="cpu")
        if torch.device(device).type == NAME:
            _generators.add(generator._cdata)
        return generator


_generators: set[int] = set()
"""Addresses of the device's generators: kernels get other Python objects for the same ones."""


def _moved(module: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
    """Moves a module and leaves tied parameters tied, as between the CPU and CUDA; for other
    devices torch makes a new parameter of each."""
    owners = [(owner, owner._parameters.copy()) for owner in module.modules()]
    _apply(module, function, recurse)
    moved: dict[int, torch.nn.Parameter] = {}
    for owner, parameters in owners:
        for name, parameter in parameters.items():
            owner._parameters[name] = moved.setdefault(id(parameter), owner._parameters[name])
    return module


_apply = torch.nn.Module._apply


def _as_on_cpu(operator: torch._ops.OpOverload, *arguments: Any, **named: Any) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return operator.redispatch(keys, *arguments, **named)


def _alias(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    capsule = torch._C._to_dlpack(tensor)
    # A DLManagedTensor begins with the address of its data; the device follows.
    ctypes.c_int32.from_address(_address(capsule, b"dltensor") + 8).value = device_type
    return torch._C._from_dlpack(capsule)


_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _of_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return _alias(tensor, 1)  # kDLCPU


def _of_device(tensor: torch.Tensor) -> torch.Tensor:
    return _alias(tensor, 12)  # kDLExtDev, which torch reads as PrivateUse1


def _on_cpu(operator: torch._ops.OpOverload, *arguments: Any, **named: Any) -> Any:
    """Computes an operation of the device. The dispatcher calls it where there is no other kernel,
    as there is for operations that are composed of others."""
    aliases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def lowered(value: Any, is_written: bool = False) -> Any:
        if isinstance(value, (list, tuple)):
            return [lowered(item, is_written) for item in value]
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, torch._C.Generator) and value._cdata not in _generators:
            raise MixedDevicesError(f"{operator}: the generator of random numbers is the CPU's")
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type == NAME:
            # Operations let an empty output grow, which the memory of an alias cannot.
            grows = is_written and not value.numel()
            alias = torch.empty_like(value, device="cpu") if grows else _of_cpu(value)
            aliases[id(alias)] = alias, value
            return alias
        if value.dim() or is_written or torch.Tag.pointwise not in operator.tags:
            shape = [*value.shape]
            raise MixedDevicesError(
                f"{operator}: a tensor {shape} is on {value.device}, not on {NAME}"
            )
        return value

    def lifted(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(lifted, value))
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in aliases:
            return _of_device(value)
        alias, tensor = aliases[id(value)]
        return tensor if alias.shape == tensor.shape else tensor.set_(_of_device(alias))

    writes = _writes(operator)
    arguments = [lowered(value, n in writes) for n, value in enumerate(arguments)]
    named = {name: lowered(value, name in writes) for name, value in named.items()}
    return lifted(operator(*arguments, **named))


@cache
def _writes(operator: torch._ops.OpOverload) -> set[int | str]:
    """Positions and names of the arguments that the operation writes to."""
    arguments = enumerate(operator._schema.arguments)
    written = [(n, a.name) for n, a in arguments if a.alias_info and a.alias_info.is_write]
    return {key for keys in written for key in keys}


def _empty(size: list[int], *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    """Allocates a tensor; a separate kernel for speed, as most operations allocate their output."""
    return _of_device(torch.empty(size, dtype=dtype))


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copies on the device, or between it and the CPU."""
    if source.device != target.device:
        copies["to the CPU" if source.device.type == NAME else "to the device"] += 1
    plain_source, plain_target = (
        _of_cpu(tensor) if tensor.device.type == NAME else tensor for tensor in (source, target)
    )
    plain_target.copy_(plain_source)
    return target


def _number(tensor: torch.Tensor) -> float | int | bool:
    copies["to the CPU"] += 1
    return _of_cpu(tensor).item()


def _resize(tensor: torch.Tensor, size: list[int], *, memory_format: Any = None) -> torch.Tensor:
    return tensor.set_(_of_device(_of_cpu(tensor).clone().resize_(size)))
