"""Decides where the weights of a model are in evaluation: on one device, on several, or on disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from finequant.finetune.architecture import EMBEDDING, HEAD, NORM
from finequant.finetune.device import device
from finequant.finetune.processes import number_of_processes
from finequant.quantize.size.evaluating import evaluation_memory, evaluation_weights
from finequant.quantize.size.machine import Machine, this_machine
from finequant.quantize.size.terms import Lengths, longest
from finequant.recipes.schema import Recipe
from finequant.recipes.usage import available_memory

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig

DISK = "disk"

DeviceMap = dict[str, str]
"""Devices by module, as accelerate takes them: `cuda:0`, `cpu`, DISK."""


def fits_one_device(
    recipe: Recipe, config: DecoderConfig, machine: Machine, lengths: Lengths | None = None
) -> bool:
    """Says whether one of the machine's devices holds a whole model while it is evaluated."""
    memory = evaluation_memory(recipe, config, machine._replace(gpus=1), lengths or longest(recipe))
    return "weights" in memory and sum(memory.values()) <= machine.memory


def device_map_of(
    recipe: Recipe, config: DecoderConfig, lengths: Lengths | None
) -> DeviceMap | None:
    """Distributes a model over this process's devices; returns None if the first one holds all."""
    machine = this_machine()
    if number_of_processes() > 1:
        machine = machine._replace(gpus=1)
    if fits_one_device(recipe, config, machine, lengths):
        return None
    whole = evaluation_memory(
        recipe, config, machine._replace(memory=1 << 60), lengths or longest(recipe)
    )
    tables, block = evaluation_weights(recipe, config, machine)
    room = machine.memory - (sum(whole.values()) - whole["weights"])
    return filled_in_turn(config.num_hidden_layers, tables, block, _rooms(machine, room))


def filled_in_turn(blocks: int, tables: int, block: int, rooms: dict[str, int]) -> DeviceMap:
    """Fills one device after another with decoder blocks, and leaves the rest on disk.

    Embedding, last norm and head, where a forward pass begins and ends, stay on the first device.

    tables: bytes of embedding and head.
    block: bytes of a block.
    rooms: bytes that weights may take, by device.
    """
    main = next(iter(rooms))
    parts = (EMBEDDING, NORM, "model.rotary_emb", HEAD)
    device_map, left = dict.fromkeys(parts, main), rooms | {main: rooms[main] - tables}
    for number in range(blocks):
        where = next((name for name, room in left.items() if room >= block), DISK)
        left[where] = left.get(where, 0) - block
        device_map[f"model.layers.{number}"] = where
    return device_map


def _rooms(machine: Machine, room: int) -> dict[str, int]:
    """Returns the bytes for weights by device. With a GPU, weights may take half of the free host
    memory; the other half caches the files of those that are read from disk each time."""
    main = device()
    if machine.kind == "cpu":
        return {str(main): room}
    names = [str(main)] if machine.gpus == 1 else [f"{main.type}:{n}" for n in range(machine.gpus)]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return dict.fromkeys(names, room) | {"cpu": available_memory() // (2 * here)}
