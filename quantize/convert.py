"""Merge the adapter into its base and quantize the result: adapter/ -> quantized/

python quantize/convert.py recipes/quickstart.yaml
python quantize/convert.py recipes/chat.yaml quantize.group_size=64
torchrun --nproc_per_node 2 quantize/convert.py recipes/chat.yaml
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finequant.quantize.prompts import check_prompts
from finequant.recipes.artifact import remove
from finequant.recipes.command_line import quiet_libraries, read_command_line
from finequant.recipes.errors import UserError, report_user_errors
from finequant.recipes.methods import METHODS
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Quantize, Recipe
from finequant.recipes.terminal import doing, say
from finequant.recipes.usage import Stopwatch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.checkpoint.reading import TensorFile, Weights
    from finequant.quantize.checkpoint.writing import Checkpoint
    from finequant.quantize.merge.adapter import Adapter, Base
    from finequant.quantize.scheme import Plan
    from finequant.recipes.freshness import Inputs


def main(argv: Sequence[str] | None = None) -> None:
    with report_user_errors():
        recipe, run = read_command_line(__doc__, argv)
        doing("quantize: loading torch and transformers")
        quiet_libraries()
        quantize(recipe, run)


class Tuned(NamedTuple):
    """The float model to quantize, whose weights are read when they are asked for."""

    tokenizer: PreTrainedTokenizerBase
    config: DecoderConfig
    """The base's, with the dtype of its files; that of `base` has the dtype it is opened in."""
    base: Base
    adapter: Adapter
    trained: TensorFile | None
    """Codes of quantization-aware training, if the recipe has it."""


class Checked(NamedTuple):
    """What is known before the first layer is quantized."""

    inputs: Inputs
    prompts: list[list[int]]
    logits: torch.Tensor
    """float32 [prompts, vocabulary], of base + adapter."""
    difference: float
    """How far those of the merged weights are from them, relative to the largest."""
    settings: Quantize
    """The recipe's, with layers in the place of a budget."""
    sequences: torch.Tensor | None
    """Token ids [rows, length] to calibrate on."""


def quantize(recipe: Recipe, run: RunDir) -> None:
    """Writes `quantized/`, which plain `from_pretrained` loads, and `merged/` if asked for.

    Weights are read, merged, rounded and written in pieces. Memory holds a decoder block.
    Interrupted, what is written is kept. Several processes share the calibration; all else is the
    first one's, and without calibration the others have nothing to do.

    Raises:
        UserError: for a layer plan that does not fit the model, an adapter of another base, or a
            checkpoint that does not give the same logits once reloaded.
    """
    from finequant.finetune.processes import (
        decided_by_first,
        entered_by_first,
        first_before_others,
        is_first,
        join_processes,
        require_shared,
    )
    from finequant.quantize.merge.adapter import merged_weights
    from finequant.quantize.methods.sequences import calibrates
    from finequant.quantize.methods.transforms import transformed
    from finequant.quantize.scheme import shipped_dtype

    watch = Stopwatch()
    if calibrates(recipe):
        join_processes()
        require_shared(run.root)
    elif not is_first():
        return
    tuned = first_before_others(lambda: open_tuned(recipe, run))
    checked = decided_by_first(lambda: check_tuned(recipe, run, tuned))
    base, config, settings = tuned.base, tuned.config, checked.settings
    dtype, sequences = shipped_dtype(settings, config), checked.sequences
    weights = transformed(merged_weights(base, tuned.adapter), config, settings)
    with entered_by_first(run.writing(run.quantized, recipe, checked.inputs)) as folder:
        checkpoint = write_quantized(
            folder, base, weights, settings, dtype, sequences, tuned.trained
        )
        figures = decided_by_first(lambda: check_and_describe(recipe, checkpoint, tuned, checked))
    if is_first():
        run.record(recipe, "quantize", checked.inputs, seconds=watch.seconds, **figures)
        say(f"quantize: {run.quantized} written in {watch.seconds} s")


def open_tuned(recipe: Recipe, run: RunDir) -> Tuned:
    """Opens base and adapter, and makes safetensors of a GGUF base.

    Raises:
        UserError: for a layer plan that does not fit the base, or an adapter that cannot be used.
    """
    from finequant.finetune.architecture import check_window
    from finequant.finetune.data.turns import as_configured, end_tokens
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.quantize.merge.adapter import Adapter, open_base
    from finequant.quantize.scheme import layer_plan

    config = load_config(recipe.model)
    check_window(recipe, config)
    layer_plan(recipe.quantize, config)  # refuses what does not fit before anything is loaded
    run.require_for("quantize", recipe)
    trained, tokenizer = trained_codes(recipe, run), load_tokenizer(recipe.model)
    base = open_base(recipe.model)
    ends = as_configured(end_tokens(recipe.model, recipe.data, tokenizer))
    base.config.eos_token_id = base.generation_config.eos_token_id = ends
    return Tuned(tokenizer, config, base, Adapter(run.adapter, base, recipe.model.base), trained)


def check_tuned(recipe: Recipe, run: RunDir, tuned: Tuned) -> Checked:
    """Checks the merged model, keeps it if asked for, and decides how and on what to quantize.

    Raises:
        UserError: for a merged model that is not base + adapter, numbers that the shipped dtype
            does not hold, or nothing to calibrate on.
    """
    from finequant.finetune.data.turns import save_tokenizer
    from finequant.quantize.merge.adapter import merged_weights
    from finequant.quantize.merge.check import check_merge
    from finequant.quantize.merge.overflow import check_range
    from finequant.quantize.methods.budget import within_budget
    from finequant.quantize.methods.sequences import sequences_of
    from finequant.quantize.methods.transforms import transformed
    from finequant.quantize.scheme import layer_plan, shipped_dtype

    tokenizer, config, base, adapter, trained = tuned
    inputs = run.inputs(recipe, "quantize")
    prompts, dtype = check_prompts(recipe, tokenizer), shipped_dtype(recipe.quantize, config)
    say("quantize: merging")
    difference, logits = check_merge(base, adapter, run.adapter, prompts)
    say(f"quantize: merged = base + adapter within {difference:.1e} of the largest logit")
    weights = merged_weights(base, adapter)
    check_range(config, weights, prompts, dtype)
    if recipe.quantize.keep_merged:
        with run.writing(run.merged, recipe, inputs) as folder:
            write_float(folder, base, weights, dtype)
            save_tokenizer(tokenizer, recipe.data, folder)
    weights = transformed(weights, config, recipe.quantize)
    settings = within_budget(recipe, weights, config, tokenizer, dtype).quantize
    sequences = None if trained else sequences_of(recipe, tokenizer)
    record = describe(settings, layer_plan(settings, config), config, bool(trained))
    say(f"quantize: {record['summary']}; {record['method']}")
    return Checked(inputs, prompts, logits, difference, settings, sequences)


def check_and_describe(
    recipe: Recipe, checkpoint: Checkpoint, tuned: Tuned, checked: Checked
) -> dict[str, float]:
    """Completes the folder of a checkpoint, and returns what the manifest says of it.

    Raises:
        UserError: if it does not give the same logits once reloaded.
    """
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.data.turns import save_tokenizer
    from finequant.quantize.checkpoint.writing import weight_bytes
    from finequant.quantize.scheme import layer_plan

    folder, base, config = checkpoint.folder, tuned.base, tuned.config
    plan = layer_plan(checked.settings, config)
    record = describe(checked.settings, plan, config, bool(tuned.trained))
    record["layers"] = layer_table(checkpoint, base, plan)
    save_tokenizer(tuned.tokenizer, recipe.data, folder)
    text = json.dumps(record, indent=1)
    (folder / "quantization.json").write_text(text, encoding="utf-8")
    doing("quantize: reloading the checkpoint in a fresh process, to compare logits")
    blocks, shipped = check_quantized(checkpoint, base, plan, checked.prompts)
    size = weight_bytes(folder)
    bits = 8 * size / parameter_count(config)
    say(f"quantize: {size / 1e6:.1f} MB on disk, {bits:.2f} bits for each weight of the base")
    return {
        "merge_difference": checked.difference,
        "size_bytes": size,
        "bits_per_weight": bits,
        "blocks_checked": blocks,
        **logit_error(checked.logits, shipped if blocks == config.num_hidden_layers else None),
    }


def check_base_range(recipe: Recipe) -> None:
    """Runs the base in float16, where that is shipped, before anything is trained on it.

    Raises:
        UserError: naming the first layer that float16 is too narrow for.
    """
    import torch

    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.quantize.merge.adapter import open_base
    from finequant.quantize.merge.overflow import check_range
    from finequant.quantize.scheme import shipped_dtype

    dtype = shipped_dtype(recipe.quantize, load_config(recipe.model))
    if dtype == torch.float16:
        base = open_base(recipe.model)
        prompts = check_prompts(recipe, load_tokenizer(recipe.model))
        check_range(base.config, base.weights, prompts, dtype)


def write_float(folder: Path, base: Base, weights: Weights, dtype: torch.dtype) -> None:
    """Writes a checkpoint of the float weights."""
    from finequant.quantize.checkpoint.streaming import write_data_free
    from finequant.quantize.checkpoint.writing import Checkpoint, stored_shapes, write_config
    from finequant.quantize.scheme import EMBEDDING, HEAD

    plan = dict.fromkeys((HEAD, EMBEDDING))
    shapes = stored_shapes(base.shapes, base.config, plan)
    checkpoint = Checkpoint(folder, shapes, plan, dtype)
    write_data_free(checkpoint, weights, shapes)
    write_config(base, plan, dtype, folder)
    checkpoint.finish()


def write_quantized(
    folder: Path,
    base: Base,
    weights: Weights,
    quantize: Quantize,
    dtype: torch.dtype,
    sequences: torch.Tensor | None = None,
    trained: TensorFile | None = None,
) -> Checkpoint | None:
    """Writes a checkpoint, quantized by the recipe's method or with codes from training.

    Several processes share the calibration. The first one writes; the others get None.

    sequences: token ids [rows, length] for a calibrated method, and for training scales.
    """
    from finequant.finetune.processes import decided_by_first, is_first
    from finequant.quantize.checkpoint.reading import TensorFile
    from finequant.quantize.checkpoint.streaming import write_data_free
    from finequant.quantize.checkpoint.writing import Checkpoint, stored_shapes, write_config
    from finequant.quantize.methods.apply import quantize_layers
    from finequant.quantize.rounding import Rounded
    from finequant.quantize.scheme import layer_plan

    plan, config = layer_plan(quantize, base.config), base.config
    shapes = stored_shapes(base.shapes, config, plan)
    checkpoint = Checkpoint(folder, shapes, plan, dtype) if is_first() else None
    start, file = folder / "start", None
    if quantize.calibration.scale_steps and not trained:
        file = codes_with_trained_scales(start, base, weights, quantize, dtype, sequences)

    def write_codes() -> None:
        codes = trained or TensorFile(file)

        def read_codes(layer: str, rows: slice, weight: torch.Tensor) -> Rounded:
            return Rounded(*(codes.read(f"{layer}.{part}", rows) for part in Rounded._fields))

        write_data_free(checkpoint, weights, shapes, read_codes)
        remove(start)

    if trained or file:
        decided_by_first(write_codes)
    else:
        quantize_layers(checkpoint, weights, config, plan, quantize, dtype, sequences)
    decided_by_first(lambda: write_config(base, plan, dtype, folder))
    return checkpoint


def codes_with_trained_scales(
    folder: Path,
    base: Base,
    weights: Weights,
    quantize: Quantize,
    dtype: torch.dtype,
    sequences: torch.Tensor,
) -> Path:
    """Writes the codes of the recipe's method, with scales that are then trained, to a file in
    `folder`, and returns its path.

    Interrupted, codes that are written are kept; the training of the scales starts anew.
    """
    from finequant.finetune.processes import decided_by_first
    from finequant.quantize.checkpoint.reading import WHOLE
    from finequant.quantize.rounding import CODES, Rounded, save_rounded
    from finequant.quantize.scheme import layer_plan
    from finequant.quantize.training.scales import train_scales

    codes = folder / CODES
    if decided_by_first(codes.exists):
        return codes
    decided_by_first(lambda: folder.mkdir(exist_ok=True))
    plan, steps = layer_plan(quantize, base.config), quantize.calibration.scale_steps
    before = quantize.calibration.model_copy(update={"scale_steps": 0})
    before = quantize.model_copy(update={"calibration": before})
    start = write_quantized(folder, base, weights, before, dtype, sequences)

    def rounded(layer: str) -> Rounded:
        return decided_by_first(lambda: start.rounded(f"{layer}.weight", WHOLE))

    layers = {layer: rounded(layer) for layer in plan if plan[layer]}
    say(f"quantize: training the scales, {steps} steps")
    layers = train_scales(weights, base.config, sequences, layers, plan, dtype, steps)

    def save() -> None:
        partial = codes.with_name(f"{CODES}.partial")
        save_rounded(layers, partial)
        partial.replace(codes)

    decided_by_first(save)
    return codes


def check_quantized(
    checkpoint: Checkpoint, base: Base, plan: Plan, prompts: list[list[int]]
) -> tuple[int, torch.Tensor]:
    """Checks that every byte is in its file, and that `from_pretrained` loads the same model.

    Returns:
        How many blocks were run, the first ones, and the logits [prompts, vocabulary] after them.

    Raises:
        UserError: if not.
    """
    from finequant.quantize.checkpoint.reload import blocks_that_fit, check_reload, shipped_logits

    for name in checkpoint.shapes:
        if not checkpoint.has(name, slice(None)):
            raise UserError(f"{checkpoint.folder}: {name} is not what was written: a disk error?")
    every, config = base.config.num_hidden_layers, base.config
    blocks = blocks_that_fit(checkpoint, config)
    expected = shipped_logits(config, plan, checkpoint.weights(), checkpoint.dtype, prompts, blocks)
    checkpoint.finish()
    check_reload(expected, checkpoint.folder, prompts, blocks)
    what = (
        "the logits are"
        if blocks == every
        else (f"the logits of the first {blocks} of {every} blocks, for which there is memory, are")
    )
    say(f"quantize: reloaded in a fresh process, {what} the same, bit for bit")
    return blocks, expected


def logit_error(tuned: torch.Tensor, shipped: torch.Tensor | None) -> dict[str, float]:
    """Measures what quantization changes: RMS of the logits' difference, relative to peft's.

    shipped: None where only some blocks were run.
    """
    if shipped is None:
        return {}
    error = ((shipped - tuned).norm() / tuned.norm()).item()
    say(f"quantize: the logits differ from those of base + adapter by {error:.1%} of their size")
    return {"logit_error": error}


def trained_codes(recipe: Recipe, run: RunDir) -> TensorFile | None:
    """Opens the codes of quantization-aware training; None if the recipe has none."""
    from finequant.quantize.checkpoint.reading import TensorFile
    from finequant.quantize.rounding import CODES

    return TensorFile(run.trained_codes / CODES) if recipe.quantize.training else None


def describe(
    quantize: Quantize, plan: Plan, config: DecoderConfig, trained: bool
) -> dict[str, Any]:
    """Describes what was done to the model, for the record that ships with it."""
    from finequant.quantize.methods.transforms import chosen
    from finequant.quantize.scheme import (
        EMBEDDING,
        HEAD,
        as_layers,
        bits_per_weight,
        shares_table,
        unties_head,
    )

    linear = [scheme for name, scheme in plan.items() if scheme and name != EMBEDDING]
    bits = sorted({scheme.bits for scheme in linear})
    sizes = sorted({scheme.group_size for scheme in linear})
    head = f"int{plan[HEAD].bits}" if plan[HEAD] else "float"
    if shares_table(quantize, plan, config):
        head += ", the codes of the embedding"
    elif config.tie_word_embeddings:
        head += f", {'untied from' if unties_head(plan) else 'tied to'} the embedding"
    embedding = f"int{plan[EMBEDDING].bits}, weight-only" if plan[EMBEDDING] else "float"
    method = "".join(f"{transform.description}, then " for transform in chosen(quantize))
    method += METHODS[quantize.method].description
    method += ", then its scales trained" if quantize.calibration.scale_steps else ""
    method += ", then trained" if trained else ""
    return {
        "summary": f"{', '.join(f'int{number}' for number in bits)} symmetric weights in groups of "
        f"{', '.join(map(str, sizes))}, int8 asymmetric activations per token; head: {head}; "
        f"embedding: {embedding}",
        "bits": bits[0] if len(bits) == 1 else None,
        "group_size": sizes[0] if len(sizes) == 1 else None,
        "scale_dtype": quantize.scale_dtype,
        "head": head,
        "embedding": embedding,
        "bits_per_rounded_weight": round(bits_per_weight(plan, config), 4),
        "method": method,
        "plan": as_layers(plan),
    }


def layer_table(checkpoint: Checkpoint, base: Base, plan: Plan) -> list[dict[str, Any]]:
    """Bits, group size and signal-to-noise ratio in dB of each layer's weights; None in float."""
    return [
        {
            "name": name,
            "shape": list(base.shapes[f"{name}.weight"]),
            "bits": scheme and scheme.bits,
            "group_size": scheme and scheme.group_size,
            "snr_db": checkpoint.snr_db(f"{name}.weight"),
        }
        for name, scheme in plan.items()
    ]


if __name__ == "__main__":
    main()
