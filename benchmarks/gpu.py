"""Measures speed and memory of each stage on a GPU, with random weights in Llama 3's shapes.

python benchmarks/gpu.py
python benchmarks/gpu.py --shape 1b --only training,gptq
python benchmarks/gpu.py --shape tiny --steps 2

It needs no network. Plain trl is measured after finequant's training. MFU counts the operations for
each weight and token, relative to the rate of a matrix product of size 8,192 that is measured
first: four in training, those of LoRA (two forward, two backward), and two in evaluation.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from convert import SHAPES
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from finequant.finetune.device import arithmetic_dtype, device
from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.errors import UserError, report_user_errors
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import say

LENGTH, ROWS, NEW_TOKENS, PROMPT = 4096, 2, 64, 512
"""Tokens and rows of a training step; tokens of an answer, and of the prompt before it."""

WARM_UP = 2
"""Steps that are not counted."""


class Row(NamedTuple):
    """A line of the table."""

    label: str
    figure: str
    mfu: str
    peak_bytes: int


def main(
    shape: Annotated[str, typer.Option(help="1b, 8b, tiny; default: 1b and 8b")] = "1b,8b",
    only: Annotated[str, typer.Option(help="training,aware,gptq,evaluation,decoding")] = "",
    steps: Annotated[int, typer.Option(help="training steps that are counted")] = 6,
) -> None:
    """Prints a table for each shape, as Markdown."""
    measures = {
        "training": training,
        "aware": aware,
        "gptq": gptq,
        "evaluation": evaluation,
        "decoding": decoding,
    }
    names, parts = shape.split(","), only.split(",") if only else list(measures)
    for option, given, known in (("--shape", names, SHAPES), ("--only", parts, measures)):
        if not {*given} <= {*known}:
            raise UserError(f"{option} {','.join(given)}: expected some of {','.join(known)}")
    rate = matrix_product_rate()
    for name in names:
        config = LlamaConfig(**SHAPES[name], use_cache=True)
        rows: list[Row] = []
        for part in parts:
            say(f"{name}: {part}")
            try:
                for row in measures[part](config, rate, steps):
                    say(f"{name}: {' | '.join(map(str, row))}")
                    rows.append(row)
            except torch.OutOfMemoryError as error:
                say(f"{name}: {part}: {error}")
        show(name, rate, rows)


def show(shape: str, rate: float, rows: list[Row]) -> None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else device().type
    print(
        f"\nLlama {shape}, {name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; "
        f"matrix products alone: {rate / 1e12:.0f} TFLOP/s in bf16\n"
    )
    print("| | | MFU | peak memory, GB |\n| :--- | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {row.label} | {row.figure} | {row.mfu} | {row.peak_bytes / 1e9:.1f} |")


def training(config: LlamaConfig, rate: float, steps: int) -> Iterator[Row]:
    """Measures LoRA of rank 16 on rows of LENGTH tokens, bf16, no checkpointing, beside trl."""
    from trl import SFTConfig, SFTTrainer

    from finequant.finetune.adapter import lora_config
    from finequant.finetune.kernels import use_liger
    from finequant.finetune.lora import fuse
    from finequant.finetune.trainer import LoraTrainer

    recipe = a_recipe()

    def ours(folder: str) -> LoraTrainer:
        model = a_model(config)
        use_liger(model, recipe.train.kernels)
        trainer = LoraTrainer(
            model=model,
            args=our_arguments(recipe, folder, steps),
            train_dataset=some_rows(config, steps),
            processing_class=a_tokenizer(),
            peft_config=lora_config(recipe.lora, model),
        )
        fuse(trainer.model)
        return trainer

    def theirs(folder: str, **changes: Any) -> SFTTrainer:
        model = a_model(config)
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_length=LENGTH,
            max_steps=steps + WARM_UP,
            bf16=arithmetic_dtype(torch.bfloat16) == torch.bfloat16,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device().type == "cpu",
            **changes,
        )
        return SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=some_rows(config, steps),
            processing_class=a_tokenizer(),
            peft_config=lora_config(recipe.lora, model),
        )

    yield step_row("LoRA training", ours, config, rate)
    yield step_row("trl, its defaults", theirs, config, rate)
    plain = lambda folder: theirs(folder, gradient_checkpointing=False)  # noqa: E731
    yield step_row("trl, no checkpointing", plain, config, rate)


def aware(config: LlamaConfig, rate: float, steps: int) -> Iterator[Row]:
    """Measures quantization-aware training that starts from codes rounded to nearest."""
    from finequant.quantize.training.trainer import QuantizationAwareTrainer

    labels = {"adapter": "an adapter is trained", "scales": "scales are trained"}
    for learns, label in labels.items():

        def trainer(folder: str, learns: str = learns) -> QuantizationAwareTrainer:
            return QuantizationAwareTrainer(
                model=fake_quantized(config, learns),
                args=our_arguments(a_recipe(), folder, steps, autocast=False),
                train_dataset=some_rows(config, steps),
                processing_class=a_tokenizer(),
            )

        yield step_row(f"quantization-aware, {label}", trainer, config, rate)


def fake_quantized(config: LlamaConfig, learns: str) -> LlamaForCausalLM:
    """Makes a model in which all linear layers of the blocks are fake-quantized."""
    from finequant.quantize.rounding import latent_weights, round_to_nearest
    from finequant.quantize.training.fake_quantize import FakeQuantLora, FakeQuantScales

    model = a_model(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    lora = {"rank": 16, "scaling": 2.0, "generator": generator}
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.float()
            start = round_to_nearest(weight, 4, 32, "max")
            layer = (
                FakeQuantLora(
                    start,
                    4,
                    model.dtype,
                    latent=latent_weights(weight, start, torch.float16),
                    **lora,
                )
                if learns == "adapter"
                else FakeQuantScales(start, 4, model.dtype)
            )
            model.model.set_submodule(name, layer)
    return model


def gptq(config: LlamaConfig, rate: float, steps: int) -> Iterator[Row]:
    """Times a block with the recipe's default calibration; weights are read from memory."""
    from finequant.quantize.methods.calibrate import Calibrator
    from finequant.quantize.methods.method import load_method
    from finequant.quantize.scheme import layer_plan
    from finequant.recipes.schema import Calibration, Quantize

    two = LlamaConfig(**config.to_dict() | {"num_hidden_layers": 2})
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(two).state_dict().items()}
    kept = {shape: torch.randn(shape, dtype=torch.bfloat16) / 50 for shape in shapes.values()}

    def weights(name: str, rows: slice) -> torch.Tensor:
        return kept[shapes[name]][rows]

    tokens, length = Calibration().tokens, Calibration().length
    sequences = torch.randint(config.vocab_size, (tokens // length, length))
    for rule in ("max", "search"):
        plan = layer_plan(Quantize(method="gptq", group_size=32, scale=rule, head="float"), two)
        reset()
        times = [time.monotonic()]
        method = load_method("gptq")
        calibrator = Calibrator(method, weights, two, sequences, plan, torch.bfloat16)
        for piece in calibrator.pieces():
            if piece.layer.endswith("down_proj"):
                times.append(time.monotonic())
        figure = f"{times[2] - times[1]:.2f} s a block"
        yield Row(f"gptq, scale: {rule}, {tokens} tokens", figure, "", peak())


@torch.inference_mode()
def evaluation(config: LlamaConfig, rate: float, steps: int) -> Iterator[Row]:
    """Times the perplexity of windows of 2,048 tokens, eight at a time, beside bare forward passes,
    one window at a time, whose logits are only summed."""
    from finequant.evaluate.metrics.perplexity import ScoredSequence, negative_log_likelihoods

    model, length, rows = a_model(config).eval(), min(2048, LENGTH), 8
    ids = torch.randint(config.vocab_size, (4 * rows, length + 1))
    sequences = [ScoredSequence(row, [False] + [True] * length) for row in ids.tolist()]
    calls = {
        "perplexity": lambda: negative_log_likelihoods(model, sequences, rows, ""),
        "forward passes alone": lambda: [
            model(part[:, :-1].to(model.device), use_cache=False).logits.sum().item()
            for part in ids.split(1)
        ],
    }
    for name, call in calls.items():
        seconds = timed(call)
        operations = 2 * ids.shape[0] * length * product_weights(config)
        mfu = f"{operations / seconds / rate:.0%}"
        yield Row(name, f"{ids.shape[0] * length / seconds:,.0f} tokens/s", mfu, peak())


@torch.inference_mode()
def decoding(config: LlamaConfig, rate: float, steps: int) -> Iterator[Row]:
    """Times greedy answers to prompts of up to PROMPT tokens, as evaluation generates them."""
    from finequant.evaluate.metrics.held_out import answer

    model, tokenizer = a_model(config).eval(), a_tokenizer()
    model.generation_config.eos_token_id = None
    for rows in (1, 32):
        lengths = torch.linspace(PROMPT / 2, PROMPT, rows).int().tolist()
        prompts = [torch.randint(500, (length,)).tolist() for length in lengths]
        seconds = timed(lambda p=prompts: answer(model, tokenizer, p, NEW_TOKENS, len(p), ""))
        figure = f"{rows * NEW_TOKENS / seconds:,.0f} tokens/s"
        yield Row(f"decoding, {rows} at a time", figure, "", peak())


def a_recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "gpu",
            "model": {"base": "none"},
            "data": {"train": [{"source": "none.jsonl"}], "max_length": LENGTH},
            "train": {"batch_size": ROWS, "micro_batch_size": ROWS, "save_steps": 10**6},
        }
    )


def our_arguments(recipe: Recipe, folder: str, steps: int, autocast: bool = True) -> Any:
    from finequant.finetune.arguments import training_arguments

    train = recipe.train.model_copy(update={"max_steps": steps + WARM_UP})
    dtype = arithmetic_dtype(torch.bfloat16) if autocast else torch.float32
    recipe = recipe.model_copy(update={"train": train})
    arguments = training_arguments(recipe, Path(folder), dtype)
    arguments.save_strategy = arguments.eval_strategy = "no"
    return arguments


def a_model(config: LlamaConfig) -> LlamaForCausalLM:
    """Makes a model with random weights on the device, in the dtype of its matrix products."""
    torch.manual_seed(0)
    config.dtype = dtype = arithmetic_dtype(torch.bfloat16)
    torch.set_default_dtype(dtype)
    with torch.device(device()):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def a_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"t{number}": number for number in range(1000)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")),
        pad_token="t1",
        eos_token="t2",
    )


def some_rows(config: LlamaConfig, steps: int) -> Dataset:
    ids = torch.randint(config.vocab_size, (ROWS * (steps + WARM_UP), LENGTH)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def step_row(label: str, make: Callable[[str], Any], config: LlamaConfig, rate: float) -> Row:
    """Trains some steps; the median of their times counts."""
    reset()
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder)
        trainer.add_callback(clock)
        trainer.train()
    speed = ROWS * LENGTH / statistics.median(clock.seconds[WARM_UP:])
    mfu = f"{4 * product_weights(config) * speed / rate:.0%}"
    return Row(label, f"{speed:,.0f} tokens/s", mfu, peak())


class _Clock(TrainerCallback):
    """Records the seconds of each step, until the device is done with it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = done()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(done() - self._started)


def product_weights(config: LlamaConfig) -> int:
    """Counts the weights that each token is multiplied with: all but the embedding."""
    from finequant.finetune.architecture import EMBEDDING, layer_shapes

    return sum(a * b for name, (a, b) in layer_shapes(config).items() if name != EMBEDDING)


def matrix_product_rate(size: int = 8192) -> float:
    """Measures the operations per second of a bf16 product, the mean of ten."""
    size = size if device().type != "cpu" else 512
    a, b = torch.randn(2, size, size, device=device()).to(arithmetic_dtype(torch.bfloat16))
    return 10 * 2 * size**3 / timed(lambda: [a @ b for _ in range(10)])


def timed(call: Callable[[], Any]) -> float:
    """Calls twice, and returns the seconds of the second call."""
    call()
    reset()
    started = done()
    call()
    return done() - started


def done() -> float:
    """Waits until the device has nothing left to do, and returns the time."""
    if device().type != "cpu":
        torch.accelerator.synchronize()
    return time.monotonic()


def reset() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    with report_user_errors():
        quiet_libraries()
        typer.run(main)
