"""Write quantized/ in other formats, the same codes in each: quantized/ -> exports/FORMAT/

python quantize/export.py recipes/quickstart.yaml --to gguf
python quantize/export.py recipes/quickstart.yaml --to compressed-tensors --to executorch
Without --to: the formats of quantize.exports.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from finequant.quantize.formats.contents import Contents, planned
from finequant.quantize.formats.format import CONTEXT, NOT_KEPT, Format, to_install
from finequant.quantize.logits import check_prompts, last_logits, relative_difference
from finequant.recipes.artifact import remove, replace_text
from finequant.recipes.command_line import go_on_alone, quiet_libraries, read_command_line
from finequant.recipes.errors import UserError, counted, refuse_all, report_user_errors
from finequant.recipes.freshness import JOURNAL, RECORD
from finequant.recipes.interrupt import starting_over
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Export, Quantize, Recipe
from finequant.recipes.terminal import doing, say
from finequant.recipes.usage import Stopwatch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.checkpoint.stored import QuantizedCheckpoint
    from finequant.quantize.rounding import Rounded

LARGEST_DIFFERENCE = 0.05
"""Limit for the RMS difference of the logits, relative to those of the same weights. It allows for
scales in half precision or bfloat16, and for arithmetic in bfloat16."""

OWN_ROUNDING = {"int8": 1.5, "int8 in blocks": 0.75, "int8 in blocks of 32": 0.75, "float": 0.5}
"""Limits by what a runtime does with activations, as multiples of the change that the int8
activations of quantized/ make: 1.5 if it rounds them to int8 in its own way (1.2 was seen from
float activations), 0.75 if it rounds blocks, which is finer (0.4 to 0.5 was seen), and 0.5 if it
does not round."""

FLOAT_ROUNDING = 2.0**-11
"""Relative rounding error of half precision."""

SCALE_ROUNDING = 2.0**-8
"""Limit for the relative rounding of a scale; half precision and bfloat16 stay below."""


class Reference(NamedTuple):
    """float32 logits [prompts, vocabulary] of quantized/ after each prompt."""

    int8: torch.Tensor
    """With int8 activations, as transformers and torchao compute them."""
    float: torch.Tensor
    """With float activations."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--to", action="append", metavar="FORMAT", default=[])
    chosen, rest = parser.parse_known_args(argv)
    with report_user_errors():
        for name in set(chosen.to) - set(get_args(Export)):
            raise UserError(f"--to {name}: expected one of {', '.join(get_args(Export))}")
        go_on_alone("export")
        recipe, run = read_command_line(__doc__, rest)
        run.require_there("quantize")
        doing("export: loading torch and transformers")
        quiet_libraries()
        export(recipe, run, chosen.to or recipe.quantize.exports)


def export(recipe: Recipe, run: RunDir, formats: list[str]) -> None:
    """Writes and checks each format, after it has refused those that cannot be made.

    Raises:
        UserError: for a format that cannot hold these codes, a package that is not installed, or
            a file that, read back, has other codes or other logits.
    """
    from transformers import AutoTokenizer

    from finequant.finetune.architecture import table_positions
    from finequant.quantize.checkpoint.stored import read_checkpoint

    run.require("quantize", recipe)
    if not formats:
        raise UserError(
            f"no format to export to: give --to FORMAT or set quantize.exports; expected one of "
            f"{', '.join(get_args(Export))}"
        )
    if "torchao" in formats:
        say(f"export: torchao: {run.quantized} is already in this format")
    stored = read_checkpoint(run.quantized)
    entries = fitting_formats(formats, stored.contents)
    if not entries:
        return
    doing(f"export: computing logits of {run.quantized}, to compare exports with")
    # Longer prompts would not fit into the caches and tables of some formats.
    limit = min(CONTEXT, recipe.quantize.cache_length, table_positions(stored.config))
    tokenizer = AutoTokenizer.from_pretrained(run.quantized)
    prompts = [ids[:limit] for ids in check_prompts(recipe, tokenizer)]
    reference = _reference(stored, prompts)
    for entry in entries:
        export_one(recipe, run, entry, stored, prompts, reference)


def export_one(
    recipe: Recipe,
    run: RunDir,
    entry: Format,
    stored: QuantizedCheckpoint,
    prompts: list[list[int]],
    reference: Reference,
) -> None:
    """Writes one format, reads it back, compares codes and logits, and records the figures."""
    watch, name = Stopwatch(), entry.name
    inputs = run.inputs(recipe, name)
    with run.writing(run.exports / name, recipe, inputs) as folder:
        with starting_over(f"the export to {name}"):
            before = _written_before(folder)
            if before is None:
                say(f"export: {name}: writing")
            figures = entry.write(stored, folder, recipe) if before is None else before
            doing(f"export: {name}: reading its codes back")
            scales = check_contents(entry, stored, entry.read_back(folder, stored))
            doing(f"export: {name}: computing logits from the file")
            difference = check_logits(entry, entry.logits(folder, prompts), reference)
            replace_text(folder / JOURNAL, json.dumps(figures))
        size = entry.size(folder)
    scales_note = "the same scales" if scales == 0 else f"scales rounded by at most {scales:.2%}"
    say(f"export: {name}: all {len(stored.rounded)} layers have the same codes and {scales_note}")
    say(
        f"export: {name}: logits differ from quantized/ by {difference:.1%} (root mean square"
        f"{', the nearer of int8 and float' if entry.activations == 'int8' else ', with float'} "
        "activations)"
    )
    for key, value in figures.items():
        say(f"export: {name}: {key.replace('_', ' ')} {value:.4g}")
    run.record(
        recipe,
        name,
        inputs,
        seconds=watch.seconds,
        size_bytes=size,
        scale_rounding=scales,
        logit_difference=difference,
        resumed=before is not None,
        **figures,
    )
    say(f"export: {run.exports / name} written in {watch.seconds} s, {size / 1e6:.1f} MB")


def _written_before(folder: Path) -> dict[str, Any] | None:
    """Returns the figures of an export that an interrupted call wrote and checked, but did not put
    in place; if there is none, empties the folder. It is checked again before it counts as such."""
    if (folder / JOURNAL).exists():
        figures = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        (folder / JOURNAL).unlink()
        return figures
    for path in folder.iterdir():
        if path.name != RECORD:
            remove(path)
    return None


def check_contents(
    entry: Format,
    stored: QuantizedCheckpoint,
    exported: Iterable[tuple[str, Rounded | torch.Tensor]],
) -> float:
    """Compares codes, scales and float tensors of an export, one at a time.

    Returns:
        The largest relative rounding of a scale.

    Raises:
        UserError: if one is missing, unexpected, or different.
    """
    from finequant.finetune.architecture import EMBEDDING

    worst, names = 0.0, set()
    for name, part in exported:
        names.add(name)
        if name in stored.floats:
            check_float(entry.name, name, part, stored.floats[name])
        elif name in stored.rounded:
            worst = max(worst, check_codes(entry.name, name, part, stored.rounded[name]))
    named = stored.rounded.keys() | stored.floats.keys()
    check_names(
        entry.name, named if entry.names_floats else stored.rounded.keys() - {EMBEDDING}, names
    )
    return worst


def check_codes(name: str, layer: str, exported: Rounded, expected: Rounded) -> float:
    """Compares codes and scales of a layer; returns the largest relative rounding of a scale.

    Scales below 1/256 of their layer's largest count as that much: half precision's subnormal
    numbers, below 6e-5, are 6e-8 apart, which such scales may lose.

    Raises:
        UserError: if a code differs, or a scale differs by more than SCALE_ROUNDING.
    """
    import torch

    codes, scale = exported
    if not torch.equal(codes, expected.codes):
        raise UserError(f"{name}: codes of {layer} differ once read back: {NOT_KEPT}")
    matters = codes.unflatten(1, (scale.shape[1], -1)).any(-1)  # others multiply zeros
    exact, read = (part.float() * matters for part in (expected.scale, scale))
    largest = exact.abs().max()
    size = exact.abs().clamp_min(largest / 256).clamp_min(torch.finfo().tiny)
    rounding = ((read - exact).abs() / size).max().item()
    if not rounding <= SCALE_ROUNDING:  # nor is it NaN
        raise UserError(
            f"{name}: scales of {layer}, of at most {largest:.2g}, differ by {rounding:.1%}: "
            f"{NOT_KEPT}"
        )
    return rounding


def check_float(name: str, parameter: str, exported: torch.Tensor, exact: torch.Tensor) -> None:
    """Compares embedding, a norm, a bias or a float layer, to within the rounding of float16.

    Only some rows are in float32 at a time: the embedding may be larger than all codes.

    Raises:
        UserError: if they differ.
    """
    from finequant.quantize.checkpoint.reading import row_slices

    if exported.shape != exact.shape or not all(
        _within_rounding(exported[rows].float(), exact[rows].float())
        for rows in row_slices(tuple(exact.shape))
    ):
        raise UserError(f"{name}: {parameter} differs once read back: {NOT_KEPT}")


def _within_rounding(tensor: torch.Tensor, exact: torch.Tensor) -> bool:
    beyond = (tensor - exact).abs() - exact.abs() * FLOAT_ROUNDING - 2.0**-24
    return bool((beyond <= 0).all())


def check_names(name: str, expected: Iterable[str], actual: Iterable[str]) -> None:
    """Raises a UserError unless a file has all tensors, and no others."""
    lost, added = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    for names, verb in ((lost, "lacks"), (added, "should not have")):
        if names:
            raise UserError(
                f"{name}: the file {verb} {counted(len(names), 'tensor')}, such as {names[0]}: "
                f"{NOT_KEPT}"
            )


def check_logits(entry: Format, logits: torch.Tensor, reference: Reference) -> float:
    """Compares an export's logits with those of quantized/, with activations like its runtime's.

    The distance from the float model does not matter: an export has to equal quantized/. If the
    runtime rounds activations to int8, the smaller of two distances counts: from int8 activations,
    if it rounds all numbers in the same direction as torchao, or else from float ones, as the
    roundings of a deep model soon differ, and two unrelated changes add up.

    Returns:
        The root mean square of the difference, relative to that of the logits.

    Raises:
        UserError: if it is larger than rounding explains.
    """
    expected = reference if entry.activations == "int8" else [reference.float]
    difference = min(relative_difference(logits, each) for each in expected)
    noise = relative_difference(reference.int8, reference.float)
    limit = max(LARGEST_DIFFERENCE, OWN_ROUNDING[entry.activations] * noise)
    if not difference <= limit:
        raise UserError(
            f"{entry.name}: logits differ from those of quantized/ by {difference:.1%}, expected "
            f"at most {limit:.0%}: {NOT_KEPT}"
        )
    return difference


def check_exports(
    quantize: Quantize, config: DecoderConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Checks before training that each format can hold the layer plan.

    Raises:
        UserError: for a plan that does not fit the base, or formats that cannot hold it.
    """
    fitting_formats(quantize.exports, planned(quantize, config, tokenizer))


def fitting_formats(names: Sequence[str], contents: Contents) -> list[Format]:
    """Returns the entry of each format; torchao is quantized/ itself and has none.

    Raises:
        UserError: with a line for each format that cannot hold the contents, or whose package is
            not installed.
    """
    from finequant.quantize.formats.formats import FORMATS  # it imports torch

    entries = [FORMATS[name] for name in dict.fromkeys(names) if name != "torchao"]
    refuse_all(partial(_check_format, entry, contents) for entry in entries)
    return entries


def _check_format(entry: Format, contents: Contents) -> None:
    if missing := to_install(entry.packages):
        raise UserError(f"{entry.name}: needs a package: {missing}")
    entry.check_fits(contents)


def _reference(stored: QuantizedCheckpoint, prompts: list[list[int]]) -> Reference:
    from transformers import AutoModelForCausalLM

    from finequant.quantize.checkpoint.blocks import float_logits

    model = AutoModelForCausalLM.from_pretrained(stored.folder).eval()
    return Reference(
        last_logits(model, prompts), float_logits(stored.config, stored.float_weight, prompts)
    )


if __name__ == "__main__":
    main()
