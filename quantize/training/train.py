"""Train through the quantized weights that will ship: adapter/ -> trained_codes/

python quantize/training/train.py recipes/chat.yaml
accelerate launch quantize/training/train.py recipes/chat.yaml quantize.training.steps=100
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finequant.recipes.command_line import quiet_libraries, read_command_line
from finequant.recipes.errors import UserError, counted, report_user_errors
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.stages import STARTING_CODES
from finequant.recipes.terminal import doing, is_first, say
from finequant.recipes.usage import Stopwatch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.checkpoint.reading import Weights
    from finequant.quantize.merge.adapter import Base
    from finequant.quantize.rounding import Rounded
    from finequant.quantize.training.trainer import QuantizationAwareTrainer


def main(argv: Sequence[str] | None = None) -> None:
    with report_user_errors():
        recipe, run = read_command_line(__doc__, argv)
        doing("qat: loading torch, transformers and trl")
        quiet_libraries()
        train(recipe, run)


def train(recipe: Recipe, run: RunDir) -> None:
    """Trains codes or scales of the tuned model and writes `trained_codes/`.

    Training starts from the codes that `quantize.method` gives the tuned model, or resumes from its
    last checkpoint. It computes as the shipped model does, whatever precision the adapter was
    trained in: weights in the shipped dtype, and no autocast.

    Raises:
        UserError: for a recipe without `quantize.training`, or an adapter that cannot be used.
    """
    from finequant.finetune.architecture import check_positions
    from finequant.finetune.data.prepared import prepared_splits
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.finetune.processes import decided_by_first, require_shared
    from finequant.finetune.stopping import last_checkpoint, run_trainer
    from finequant.finetune.trainer import build_trainer
    from finequant.quantize.checkpoint.stored import StoredLayers
    from finequant.quantize.merge.adapter import Adapter, merged_weights, open_base
    from finequant.quantize.methods.transforms import transformed
    from finequant.quantize.scheme import layer_plan, shipped_dtype
    from finequant.quantize.training.model import fake_quantized_model
    from finequant.quantize.training.trainer import QuantizationAwareTrainer

    watch = Stopwatch()
    _check_supported(recipe)
    config = load_config(recipe.model)
    check_positions(recipe, config)
    plan = layer_plan(recipe.quantize, config)
    check_something_learns(recipe, config)
    inputs = {}
    if is_first():  # hashes the files that the stage reads
        run.require_for("qat", recipe)
        inputs = run.inputs(recipe, "qat")
    base = open_base(recipe.model)
    weights = merged_weights(base, Adapter(run.adapter, base, recipe.model.base))
    weights = transformed(weights, config, recipe.quantize)
    dtype = shipped_dtype(recipe.quantize, config)
    _say_if_emulated(dtype)
    arguments = _arguments(recipe, run)
    require_shared(run.root)
    tokenizer, splits = load_tokenizer(recipe.model), prepared_splits(recipe)
    start = starting_codes(recipe, run, base, weights, tokenizer, dtype)
    checkpoints = Path(arguments.output_dir)
    decided_by_first(lambda: run.continuing(checkpoints, "qat", inputs))
    model = fake_quantized_model(recipe, weights, StoredLayers(start), plan, dtype)
    trainer = build_trainer(recipe, arguments, model, tokenizer, splits, QuantizationAwareTrainer)
    trainer.distillation = recipe.quantize.training.distillation
    checkpoint = last_checkpoint(arguments)
    run_trainer(trainer, checkpoint)
    rounded = _trained_codes(trainer)
    if is_first():
        figures = _write(recipe, run, trainer, rounded) | {"resumed": checkpoint is not None}
        run.record(recipe, "qat", inputs, seconds=watch.seconds, **figures)
        done = counted(figures["steps"], "step")
        say(f"qat: {done}, {run.trained_codes} written in {watch.seconds} s")
    trainer.accelerator.wait_for_everyone()


def _check_supported(recipe: Recipe) -> None:
    from finequant.finetune.processes import is_fsdp2, sharding

    if recipe.quantize.training is None:
        raise UserError("quantize.training: absent from the recipe: set quantize.training.steps")
    if sharding() and not is_fsdp2():
        raise UserError(
            "quantize.training: does not work with DeepSpeed or FSDP 1, which cannot shard codes: "
            "use recipes/accelerate/fsdp.yaml (fsdp_version: 2) or several_gpus.yaml for "
            "`finequant qat`, or quantize.training=null"
        )


def check_something_learns(recipe: Recipe, config: DecoderConfig) -> None:
    """Refuses quantization-aware training of no layer.

    Raises:
        UserError: if no quantized layer gets an adapter, or none has scales of its own.
    """
    from finequant.quantize.scheme import layer_plan
    from finequant.quantize.training.model import trained_layers

    training = recipe.quantize.training
    if training is None or trained_layers(recipe, layer_plan(recipe.quantize, config), config):
        return
    if training.learns == "scales":
        raise UserError(
            "quantize.training: the only quantized layer is the head, which shares the scales of "
            "the embedding, so nothing would be trained: set quantize.training=null"
        )
    raise UserError(
        "quantize.training: no layer that is quantized is among lora.target_modules "
        f"({recipe.lora.target_modules}), so nothing would be trained: name other layers, or "
        "set quantize.training.learns=scales"
    )


def _say_if_emulated(dtype: torch.dtype) -> None:
    from finequant.finetune.device import arithmetic_dtype

    if arithmetic_dtype(dtype) != dtype:
        say(
            "qat: steps compute in bfloat16, as the shipped model does, which this processor only "
            "emulates: several times slower than quantize.dtype=float32"
        )


def starting_codes(
    recipe: Recipe,
    run: RunDir,
    base: Base,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> Path:
    """Returns the folder of what `quantize` would ship without this stage; writes it if stale.

    It is written like `quantized/`: all processes share the calibration, and after an interruption
    the same command resumes it. Runs with other training settings reuse it.
    """
    from finequant.finetune.processes import decided_by_first, entered_by_first
    from finequant.quantize.methods.sequences import sequences_of
    from finequant.quantize.write import write_quantized

    (folder,) = run.outputs(STARTING_CODES)
    if decided_by_first(lambda: run.what_changed(recipe, STARTING_CODES)) == []:
        return folder
    quantize = recipe.quantize
    say(f"qat: quantizing by {quantize.method}, where training starts")
    sequences, inputs = decided_by_first(
        lambda: (sequences_of(recipe, tokenizer), run.inputs(recipe, STARTING_CODES))
    )
    decided_by_first(lambda: folder.parent.mkdir(parents=True, exist_ok=True))
    with entered_by_first(run.writing(folder, recipe, inputs)) as partial:
        checkpoint = write_quantized(partial, base, weights, quantize, dtype, sequences)
        decided_by_first(lambda: checkpoint.finish())  # it is None in the others
    decided_by_first(lambda: run.record(recipe, STARTING_CODES, inputs))
    return folder


def _arguments(recipe: Recipe, run: RunDir) -> SFTConfig:
    import torch

    from finequant.finetune.arguments import training_arguments

    training = recipe.quantize.training
    train = recipe.train.model_copy(
        update={
            "max_steps": training.steps,
            "learning_rate": training.learning_rate or recipe.train.learning_rate,
        }
    )
    # Not the seed of plain LoRA training, so that rows come in a different order.
    changed = recipe.model_copy(update={"train": train, "seed": (recipe.seed + 1) % 2**32})
    folder = run.checkpoints / "qat" / "steps"
    return training_arguments(changed, folder, torch.float32)


def _trained_codes(trainer: QuantizationAwareTrainer) -> dict[str, Rounded]:
    """Rounds each layer in all processes, each of which may hold a part of it, and drops what it
    was rounded from; only the first process keeps the codes."""
    from finequant.quantize.training.model import fake_quantized_layers

    rounded, model = {}, trainer.accelerator.unwrap_model(trainer.model)
    for name, layer in fake_quantized_layers(model).items():
        codes = layer.rounded()
        layer.latent = None  # all latent weights beside all codes would be the stage's peak
        if is_first():
            rounded[name] = codes
    return rounded


def _write(
    recipe: Recipe, run: RunDir, trainer: QuantizationAwareTrainer, rounded: dict[str, Rounded]
) -> dict:
    """Writes trained_codes/; returns figures for the manifest."""
    from finequant.finetune.train import LOG, training_figures
    from finequant.quantize.rounding import CODES, save_rounded

    log = trainer.state.log_history
    with run.writing(run.trained_codes, recipe) as folder:
        save_rounded(rounded, folder / CODES)
        (folder / LOG).write_text(json.dumps(log, indent=1), encoding="utf-8")
    return training_figures(log) | {"processes": trainer.args.world_size}


if __name__ == "__main__":
    main()
