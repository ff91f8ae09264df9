"""Prints the memory and disk that a recipe takes, and refuses what cannot finish here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finequant.finetune.architecture import parameter_count
from finequant.finetune.model import load_config
from finequant.quantize.scheme import layer_plan, shipped_dtype
from finequant.quantize.size.estimate import cache_bytes, dequantized_bytes, disk_of, memory_of
from finequant.quantize.size.machine import (
    Machine,
    free_disk,
    on_one_disk,
    this_host,
    this_machine,
)
from finequant.quantize.size.plan import model_size
from finequant.quantize.size.terms import Lengths, Memory, components, trainable
from finequant.recipes.errors import UserError
from finequant.recipes.freshness import cache_folder
from finequant.recipes.load import SectionType
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Quantize, Recipe
from finequant.recipes.stages import STAGES, stages_of
from finequant.recipes.terminal import show

if TYPE_CHECKING:
    from finequant.finetune.architecture import DecoderConfig

BITS = (8, 4, 3)


def show_resources(
    recipe: Recipe, run: RunDir, gpu: Machine | None, device_memory: int | None, context: int | None
) -> None:
    """Prints parameters, memory of each stage, disk, sizes, and whether a device holds it.

    gpu: another machine to plan for, beside this one.
    device_memory: bytes of the device that the model is for.
    context: tokens of its key-value cache; default: `data.max_length`.
    """
    config = load_config(recipe.model)
    parts = ", ".join(f"{name} {count:,}" for name, count in components(config).items() if count)
    show(f"\nparameters: {parameter_count(config):,}: {parts}")
    adapter = trainable(recipe.lora, config)
    show(f"trainable: {adapter:,}, {100 * adapter / parameter_count(config):.2f}%")
    stages = stages_of(recipe)
    for machine in filter(None, (this_machine(), gpu)):
        each = f"each of {machine.gpus} x " if machine.gpus > 1 else ""
        show(
            f"\npeak memory on {each}{machine.name}, which has {_shown(machine.memory)}, for rows "
            f"of {recipe.data.max_length:,} tokens (data.max_length); shorter rows take less:"
        )
        _show_memory([stage for stage in stages if stage in STAGES], recipe, config, machine)
    if exports := [stage for stage in stages if stage not in STAGES]:
        host = this_host()
        show(f"\npeak memory of exports, on the CPU; this machine has {_shown(host.memory)}:")
        _show_memory(exports, recipe, config, host)
    for folder, size in _disk(recipe, run, config, stages).items():
        show(f"\ndisk: {_shown(size)} in {folder}; {_shown(free_disk(folder))} is free")
    _show_sizes(recipe, config, device_memory, context or recipe.data.max_length)


def _show_memory(
    stages: list[str], recipe: Recipe, config: DecoderConfig, machine: Machine
) -> None:
    for stage in stages:
        attempt = _Attempt(stage, recipe, config, machine, None)
        fits = "" if attempt.fits else f" does not fit: {attempt.hint()}:"
        parts = ", ".join(f"{name} {_shown(size)}" for name, size in attempt.memory.items())
        show(f"  {stage}: {_shown(sum(attempt.memory.values()))}:{fits} {parts}")


def _show_sizes(
    recipe: Recipe, config: DecoderConfig, device_memory: int | None, context: int
) -> None:
    """Prints the sizes with the recipe's bits, and then with the same bits for all layers."""
    cache = cache_bytes(config, context)
    show(f"\nquantized, packed, with {_shown(cache)} of key-value cache for {context:,} tokens:")
    chosen = recipe.quantize
    sizes = {} if chosen.budget else {"as the recipe says": chosen}
    plain = chosen.model_dump() | {"layers": {}, "budget": None}
    sizes |= {f"{bits} bits": Quantize.model_validate(plain | {"bits": bits}) for bits in BITS}
    for name, quantize in sizes.items():
        dtype = shipped_dtype(quantize, config)
        size = model_size(layer_plan(quantize, config), config, dtype, quantize).packed
        line = f"  {name}: {_shown(size)}, with the cache {_shown(size + cache)}"
        if device_memory:
            fits = "fits" if size + cache <= device_memory else "does not fit"
            line += f": {fits} into {_shown(device_memory)}"
        show(line)


def refuse_what_cannot_finish(
    recipe: Recipe,
    run: RunDir,
    stages: list[str],
    machine: Machine,
    lengths: Lengths | None = None,
) -> None:
    """Refuses, before the first of these stages starts, what this machine cannot finish.

    stages: those to come, exports included, which take place on the CPU.
    lengths: of the recipe's rows; default: the longest that the recipe allows.

    Raises:
        UserError: if one of them takes more memory than there is, or all of them more disk.
    """
    config, problems = load_config(recipe.model), []
    for stage in stages:
        attempt = _Attempt(stage, recipe, config, _where(stage, machine), lengths)
        if not attempt.fits:
            problems.append(_too_much(attempt))
    for folder, needed in _disk(recipe, run, config, stages).items():
        if needed > (free := free_disk(folder)):
            problems.append(f"disk: {folder} needs {_shown(needed)}; {_shown(free)} is free")
    if problems:
        raise UserError(
            "this run cannot finish here:\n  "
            + "\n  ".join(problems)
            + "\n`finequant plan` shows the estimate; --force starts anyway"
        )


def _disk(recipe: Recipe, run: RunDir, config: DecoderConfig, stages: list[str]) -> dict[Path, int]:
    """Maps the run directory, and the user's cache if it is on another disk, to needed bytes."""
    needed = {run.root: sum(disk_of(stage, recipe, config) for stage in stages)}
    if base := dequantized_bytes(recipe.model, config):
        cache = cache_folder()
        folder = run.root if on_one_disk(run.root, cache) else cache
        needed[folder] = needed.get(folder, 0) + base
    return needed


def settings_that_fit(
    recipe: Recipe, stages: list[str], machine: Machine, lengths: Lengths | None = None
) -> dict[str, Any]:
    """Returns the cheapest overrides with which as many of these stages as possible fit; exports
    that do not are left out."""
    config, changes = load_config(recipe.model), {}
    for stage in stages:
        attempt = _Attempt(stage, recipe, config, _where(stage, machine), lengths)
        smaller = attempt.changes_that_fit() or {}
        if stage not in STAGES and not attempt.fits:
            others = [name for name in recipe.quantize.exports if name != stage]
            smaller = {"quantize.exports": others}
        recipe, changes = _with(recipe, smaller), changes | smaller
    return changes


def _where(stage: str, machine: Machine) -> Machine:
    """Returns the machine that a stage runs on; exports take place on the CPU."""
    return machine if stage in STAGES or machine.kind == "cpu" else this_host()


class _Attempt(NamedTuple):
    """A stage of a recipe on a machine."""

    stage: str
    recipe: Recipe
    config: DecoderConfig
    machine: Machine
    lengths: Lengths | None

    @property
    def memory(self) -> Memory:
        return memory_of(*self)

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.machine.memory

    @property
    def fits_sharded(self) -> bool:
        """Says whether the stage fits if a launcher shards the float base over the GPUs."""
        shards = self.machine.gpus > 1 and self.recipe.model.load == "float"
        return shards and self._replace(machine=self.machine._replace(sharded=True)).fits

    def changes_that_fit(self) -> dict[str, Any] | None:
        """Returns the cheapest overrides with which the stage fits; None if there are none, or if a
        launcher that shards the float base is better."""
        for changes in ({}, *_smaller(self.stage, self.recipe)):
            # An adapter trained on a base in nf4 is a different one.
            if "model.load" in changes and self.fits_sharded:
                return None
            if self._replace(recipe=_with(self.recipe, changes)).fits:
                return changes
        return None

    def hint(self) -> str:
        """Suggests the cheapest overrides, or a launcher, with which the stage would fit."""
        changes = self.changes_that_fit()
        if self.stage not in STAGES:
            return "remove it from quantize.exports, and export on a machine with more memory"
        if changes is not None:
            settings = (f"{key}={str(value).lower()}" for key, value in changes.items())
            return f"it fits with {' '.join(settings)}"
        if self.fits_sharded:
            return "it fits with --launch fsdp"
        shorter = {
            "train": ", or a smaller data.max_length",
            "qat": ", or a smaller data.max_length",
            "evaluate": ", a smaller evaluate.divergence_tokens, or a smaller max_length of "
            "evaluate.perplexity",
        }.get(self.stage, "")
        return f"no setting makes it fit: use a machine with more memory{shorter}"


def _smaller(stage: str, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yields overrides of a stage that need less and less memory."""
    if stage not in STAGES:
        return
    if stage == "quantize":
        trained = recipe.quantize.calibration.scale_steps
        whole = {"quantize.calibration.scale_steps": 0} if trained else {}
        yield from (whole, whole | {"quantize.method": "rtn"})
        return
    if stage == "evaluate":
        rows = _divisors(recipe.evaluate.batch_size)
        yield from ({"evaluate.batch_size": number} for number in rows)
        return
    rows = "train.micro_batch_size"
    whole, checkpointing = recipe.train.micro_batch_size, {"train.gradient_checkpointing": True}
    yield from ({rows: number} for number in _divisors(whole))
    yield from ({rows: number} | checkpointing for number in [whole, *_divisors(whole)])
    if stage == "train" and recipe.model.load == "float":
        yield from ({rows: number} | checkpointing | {"model.load": "nf4"} for number in (whole, 1))


def _with(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Returns the recipe with other values of keys such as `lora.rank`."""
    for key, value in changes.items():
        recipe = _changed(recipe, key, value)
    return recipe


def _changed(section: SectionType, key: str, value: Any) -> SectionType:
    """Returns a recipe, or a section of it, with another value of a key such as `lora.rank`."""
    name, _, inner = key.partition(".")
    value = _changed(getattr(section, name), inner, value) if inner else value
    return section.model_copy(update={name: value})


def _divisors(number: int) -> list[int]:
    """Lists the divisors below the number, the largest first."""
    return [part for part in range(number - 1, 0, -1) if number % part == 0]


def _too_much(attempt: _Attempt) -> str:
    memory, machine = attempt.memory, attempt.machine
    most = sorted(memory, key=memory.get, reverse=True)[:2]
    largest = " and ".join(f"{_shown(memory[name])} for {name}" for name in most)
    return (
        f"{attempt.stage}: {_shown(sum(memory.values()))} of memory, including {largest}; "
        f"{machine.name} has {_shown(machine.memory)}: {attempt.hint()}"
    )


def _shown(size: int) -> str:
    """Formats a number of bytes in GB or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
