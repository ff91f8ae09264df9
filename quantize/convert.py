"""Merge the adapter into its base and quantize the result: adapter/ -> quantized/

python quantize/convert.py recipes/quickstart.yaml
python quantize/convert.py recipes/chat.yaml quantize.group_size=64
torchrun --nproc_per_node 2 quantize/convert.py recipes/chat.yaml
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from finequant.quantize.logits import check_prompts, relative_difference
from finequant.recipes.command_line import quiet_libraries, read_command_line
from finequant.recipes.errors import report_user_errors
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Quantize, Recipe
from finequant.recipes.terminal import doing, is_first, say
from finequant.recipes.usage import Stopwatch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.checkpoint.reading import TensorFile
    from finequant.quantize.checkpoint.writing import Checkpoint
    from finequant.quantize.merge.adapter import Adapter, Base
    from finequant.recipes.freshness import Inputs


def main(argv: Sequence[str] | None = None) -> None:
    with report_user_errors():
        recipe, run = read_command_line(__doc__, argv)
        doing("quantize: loading torch and transformers")
        quiet_libraries()
        quantize(recipe, run)


class Tuned(NamedTuple):
    """The float model to quantize, whose weights are read on demand."""

    tokenizer: PreTrainedTokenizerBase
    config: DecoderConfig
    """The base's configuration, with the dtype of its files; `base.config` has the dtype in which
    it is opened."""
    base: Base
    adapter: Adapter
    trained: TensorFile | None
    """Codes of quantization-aware training, if the recipe has it."""


class Checked(NamedTuple):
    """Everything that is determined before the first layer is quantized."""

    inputs: Inputs
    prompts: list[list[int]]
    logits: torch.Tensor
    """float32 logits [prompts, vocabulary] of base + adapter."""
    difference: float
    """Maximum distance of the merged weights' logits from these, relative to the largest logit."""
    settings: Quantize
    """The recipe's settings, with layers in place of a budget."""
    sequences: torch.Tensor | None
    """Token ids [rows, length] to calibrate on."""


def quantize(recipe: Recipe, run: RunDir) -> None:
    """Writes `quantized/`, which plain `from_pretrained` loads, and `merged/` if asked for.

    Weights are read, merged, rounded and written in pieces, with one decoder block in memory. What
    was written before an interruption is kept. Several processes share the calibration; the first
    one does everything else, and without calibration the others return at once.

    Raises:
        UserError: for a layer plan that does not fit the model, an adapter of another base, or a
            checkpoint that does not give the same logits once reloaded.
    """
    from finequant.finetune.processes import (
        decided_by_first,
        entered_by_first,
        first_before_others,
        join_processes,
        require_shared,
    )
    from finequant.quantize.merge.adapter import merged_weights
    from finequant.quantize.methods.sequences import calibrates
    from finequant.quantize.methods.transforms import transformed
    from finequant.quantize.scheme import shipped_dtype
    from finequant.quantize.write import write_quantized

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
    """Opens base and adapter, and converts a GGUF base to safetensors.

    Raises:
        UserError: for a layer plan that does not fit the base, or an adapter that cannot be used.
    """
    from finequant.finetune.architecture import check_positions
    from finequant.finetune.data.turns import as_configured, end_tokens
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.quantize.merge.adapter import Adapter, open_base
    from finequant.quantize.scheme import layer_plan

    config = load_config(recipe.model)
    check_positions(recipe, config)
    layer_plan(recipe.quantize, config)  # refuses what does not fit before anything is loaded
    run.require_for("quantize", recipe)
    trained, tokenizer = trained_codes(recipe, run), load_tokenizer(recipe.model)
    base = open_base(recipe.model)
    ends = as_configured(end_tokens(recipe.model, recipe.data, tokenizer))
    base.config.eos_token_id = base.generation_config.eos_token_id = ends
    return Tuned(tokenizer, config, base, Adapter(run.adapter, base, recipe.model.base), trained)


def check_tuned(recipe: Recipe, run: RunDir, tuned: Tuned) -> Checked:
    """Checks the merged model, saves it if asked to, and decides how and on what to quantize.

    Raises:
        UserError: for a merged model that is not base + adapter, numbers too large for the shipped
            dtype, or a lack of text to calibrate on.
    """
    from finequant.finetune.data.turns import save_tokenizer
    from finequant.quantize.describe import describe
    from finequant.quantize.merge.adapter import merged_weights
    from finequant.quantize.merge.check import check_merge
    from finequant.quantize.merge.overflow import check_range
    from finequant.quantize.methods.budget import within_budget
    from finequant.quantize.methods.sequences import sequences_of
    from finequant.quantize.methods.transforms import transformed
    from finequant.quantize.scheme import layer_plan, shipped_dtype
    from finequant.quantize.write import write_float

    tokenizer, config, base, adapter, trained = tuned
    inputs = run.inputs(recipe, "quantize")
    prompts, dtype = check_prompts(recipe, tokenizer), shipped_dtype(recipe.quantize, config)
    say("quantize: merging")
    difference, logits = check_merge(base, adapter, run.adapter, prompts)
    say(f"quantize: merging changes no logit by more than {difference:.1e} of the largest")
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
    """Completes the folder of a checkpoint; returns figures for the manifest.

    Raises:
        UserError: if it does not give the same logits once reloaded.
    """
    from finequant.finetune.architecture import parameter_count
    from finequant.finetune.data.turns import save_tokenizer
    from finequant.quantize.checkpoint.reload import check_quantized
    from finequant.quantize.checkpoint.writing import weight_bytes
    from finequant.quantize.describe import describe, layer_table
    from finequant.quantize.scheme import layer_plan

    doing("quantize: measuring the rounding error of each layer")
    folder, base, config = checkpoint.folder, tuned.base, tuned.config
    plan = layer_plan(checked.settings, config)
    record = describe(checked.settings, plan, config, bool(tuned.trained))
    record["layers"] = layer_table(checkpoint, base, plan)
    save_tokenizer(tuned.tokenizer, recipe.data, folder)
    text = json.dumps(record, indent=1, allow_nan=False)
    (folder / "quantization.json").write_text(text, encoding="utf-8")
    doing("quantize: reloading the checkpoint in a fresh process, to compare logits")
    blocks, shipped = check_quantized(checkpoint, base, plan, checked.prompts)
    size = weight_bytes(folder)
    bits = 8 * size / parameter_count(config)
    say(f"quantize: {size / 1e6:.1f} MB on disk, {bits:.2f} bits for each weight of the base")
    figures = {
        "merge_difference": checked.difference,
        "size_bytes": size,
        "bits_per_weight": bits,
        "blocks_checked": blocks,
        "resumed": not checkpoint.is_new,
    }
    if blocks == config.num_hidden_layers:  # with fewer, these are not the model's logits
        error = relative_difference(shipped, checked.logits)
        say(f"quantize: rounding changes the logits by {error:.1%} (root mean square)")
        figures["logit_error"] = error
    return figures


def check_base_range(recipe: Recipe) -> None:
    """Runs the base in float16, if that is what ships, before anything is trained on it.

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


def trained_codes(recipe: Recipe, run: RunDir) -> TensorFile | None:
    """Opens the codes of quantization-aware training; None if the recipe has none."""
    from finequant.quantize.checkpoint.reading import TensorFile
    from finequant.quantize.rounding import CODES

    return TensorFile(run.trained_codes / CODES) if recipe.quantize.training else None


if __name__ == "__main__":
    main()
