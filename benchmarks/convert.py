"""Times merging and quantizing a synthetic Llama, beside transformers + peft + torchao.

python benchmarks/convert.py compare
python benchmarks/convert.py compare --shape 8b --no-theirs
python benchmarks/convert.py compare --shape 8b --no-theirs --method gptq --rounds 1 --blocks 3
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch
import typer

from finequant.recipes.errors import report_user_errors
from finequant.recipes.terminal import say
from finequant.recipes.usage import peak_memory

if TYPE_CHECKING:
    from finequant.quantize.merge.adapter import Base

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

LLAMA_3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
}
SHAPES = {
    "tiny": LLAMA_3
    | {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    },
    "1b": LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}
"""The shapes of Llama-3.2-1B and Llama-3-8B, and a tiny one to try this script with."""

Shape = Literal["1b", "8b", "tiny"]
RANK, GROUP_SIZE, TOKENS = 16, 32, 4096


class Measured(NamedTuple):
    """Seconds and peak resident memory of a process, and of its work alone, without imports."""

    seconds: float
    peak_bytes: int
    work_seconds: float
    work_bytes: int


@app.command()
def compare(
    shape: Annotated[Shape, typer.Option(help="whose shape the base has")] = "1b",
    method: Annotated[Literal["rtn", "gptq"], typer.Option(help="of finequant")] = "rtn",
    theirs: Annotated[bool, typer.Option(help="measure transformers + peft + torchao, too")] = True,
    checks: Annotated[bool, typer.Option(help="measure ours with its checks, too")] = False,
    tuned: Annotated[bool, typer.Option(help="measure the tuned model in memory, too")] = False,
    blocks: Annotated[int | None, typer.Option(help="decoder blocks; default: the shape's")] = None,
    cold: Annotated[bool, typer.Option(help="read the base from the disk each time")] = False,
    rounds: Annotated[int, typer.Option(help="runs of each, in turn; the table has medians")] = 3,
    folder: Annotated[Path | None, typer.Option(help="for the models; default: temporary")] = None,
) -> None:
    """Prints a table; each run is a separate process, in turn with the others."""
    optional = {"checks": checks, "tuned": tuned, "theirs": theirs}
    names = ["ours", "copy", *(name for name, chosen in optional.items() if chosen)]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        at = Path(scratch)
        say(f"making a checkpoint of the shape {shape}")
        _process(at, "make", shape, method, blocks)
        measured: dict[str, list[Measured]] = {name: [] for name in names}
        for number in range(rounds):
            for name in names:
                say(f"round {number + 1} of {rounds}: {name}")
                if cold:
                    forget(at / "base")
                measured[name].append(_process(at, name, shape, method))
                shutil.rmtree(at / "merged", ignore_errors=True)
                shutil.rmtree(at / "out", ignore_errors=True)
        size = sum(f.stat().st_size for f in (at / "base").glob("*.safetensors"))
    title = f"Llama {shape}{f', {blocks} of its blocks' if blocks else ''}"
    title += f", {size / 1e9:.2f} GB of bfloat16{' from the disk' if cold else ''}, {method}"
    _show(measured, size, title, rounds)


def forget(folder: Path) -> None:
    """Drops a folder's safetensors files from the system's page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _show(measured: dict[str, list[Measured]], size: int, title: str, rounds: int) -> None:
    """Prints the table in Markdown, and the same as JSON on one line."""
    median = {
        name: Measured(*map(statistics.median, zip(*runs, strict=True)))
        for name, runs in measured.items()
    }
    titles = {
        "ours": "finequant",
        "checks": "finequant, its checks of the result included",
        "tuned": "the tuned model in memory, as it is evaluated",
        "copy": "the same bytes read, cast and written",
        "theirs": "transformers + peft + torchao, round to nearest",
    }
    print(
        f"\n{title}, rank {RANK}; {torch.get_num_threads()} threads, median of {rounds}, in turn\n"
    )
    print("| | seconds | without imports | peak memory, GB | GB/s | times finequant |")
    print("| :--- | ---: | ---: | ---: | ---: | ---: |")
    for name, runs in median.items():
        print(
            f"| {titles[name]} | {runs.seconds:.1f} | {runs.work_seconds:.1f} "
            f"| {runs.peak_bytes / 1e9:.2f} | {size / 1e9 / runs.work_seconds:.2f} "
            f"| {runs.work_seconds / median['ours'].work_seconds:.2f} |"
        )
    rate = median["copy"].work_seconds / median["ours"].work_seconds
    print("\nGB/s, and times finequant: without imports.")
    print(f"finequant runs at {rate:.2f} of the rate of reading, casting and writing.\n")
    if "tuned" in median:
        times = median["tuned"].work_bytes / size
        print(f"The tuned model takes {times:.2f} times its weights, libraries not counted.\n")
    print(
        json.dumps(
            {"title": title, "bytes": size}
            | {name: runs._asdict() for name, runs in median.items()}
        )
    )


def _process(at: Path, name: str, shape: str, method: str, blocks: int | None = None) -> Measured:
    """Runs one of the commands below in a fresh process."""
    command = [sys.executable, __file__, "work", name, shape, method, str(at)]
    if blocks:
        command += ["--blocks", str(blocks)]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} failed")
    work, peak, above = done.stdout.split()[-3:]
    return Measured(time.monotonic() - started, int(peak), float(work), int(above))


@app.command(hidden=True)
def work(name: str, shape: str, method: str, at: Path, blocks: int | None = None) -> None:
    """Does the work of one measured process; prints its seconds, and its peak memory, in all and
    above the libraries'."""
    # Imported here, so that the work does not include imports.
    import peft  # noqa: F401
    import torchao.prototype.safetensors.safetensors_support  # noqa: F401
    from transformers import LlamaForCausalLM, TorchAoConfig  # noqa: F401

    functions = {
        "make": lambda: make(at, shape, blocks),
        "ours": lambda: ours(at, method, False),
        "checks": lambda: ours(at, method, True),
        "tuned": lambda: tuned(at, method),
        "copy": lambda: copy(at, method),
        "theirs": lambda: theirs(at),
    }
    started, libraries = time.monotonic(), peak_memory()
    functions[name]()
    print(time.monotonic() - started, peak_memory(), peak_memory() - libraries)


def make(at: Path, shape: str, blocks: int | None) -> None:
    """Writes random weights, in pieces, and a random adapter."""
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from finequant.quantize.merge.adapter import PREFIX, Base
    from finequant.quantize.write import write_float

    config = LlamaConfig(**SHAPES[shape] | ({"num_hidden_layers": blocks} if blocks else {}))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def weights(name: str, rows: slice) -> torch.Tensor:
        first, last, _ = rows.indices(shapes[name][0])
        if len(shapes[name]) == 1:
            return torch.ones(last - first)
        return torch.empty(last - first, shapes[name][1]).uniform_(-0.04, 0.04)

    (at / "base").mkdir()
    write_float(
        at / "base", Base(config, GenerationConfig(), shapes, weights), weights, torch.bfloat16
    )
    tensors = {}
    for name, (out, into) in ((n, s) for n, s in shapes.items() if "_proj" in n):
        layer = f"{PREFIX}{name.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = torch.randn(RANK, into) / 50
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, RANK) / 50
    kinds = sorted({name.split(".")[-2] for name in shapes if "_proj" in name})
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=kinds, task_type="CAUSAL_LM")
    config.save_pretrained(at / "adapter")
    save_file(tensors, at / "adapter" / "adapter_model.safetensors")


def ours(at: Path, method: str, checked: bool) -> None:
    from finequant.quantize.checkpoint.reload import check_quantized
    from finequant.quantize.merge.adapter import Adapter, merged_weights
    from finequant.quantize.scheme import layer_plan
    from finequant.quantize.write import write_quantized

    base, quantize = _opened(at, method)
    adapter = Adapter(at / "adapter", base, "base")
    weights = merged_weights(base, adapter)
    ids = torch.randint(base.config.vocab_size, (TOKENS // 512, 512))
    prompts = [row[:32].tolist() for row in ids]
    if checked:
        from finequant.quantize.merge.check import check_merge

        check_merge(base, adapter, at / "adapter", prompts)
    out = at / "out"
    out.mkdir()
    checkpoint = write_quantized(out, base, weights, quantize, torch.bfloat16, ids)
    if checked:
        plan = layer_plan(quantize, base.config)
        check_quantized(checkpoint, base, plan, prompts)
    else:
        checkpoint.finish()


def _opened(at: Path, method: str) -> tuple[Base, object]:
    """Opens the base, and returns it with the settings.

    The head stays in float: TorchAoConfig does not quantize a tied one.
    """
    from finequant.quantize.merge.adapter import open_base
    from finequant.recipes.schema import Model, Quantize

    # As torchao does it: each group is scaled by its largest weight.
    quantize = Quantize(method=method, scale="max", group_size=GROUP_SIZE, head="float")
    return open_base(Model(base=str(at / "base"))), quantize


def tuned(at: Path, method: str) -> None:
    """Builds base + adapter in bfloat16, as evaluation does, and computes the logits of a prompt.

    Where the processor emulates bfloat16, evaluation computes in float32: twice the weights.
    """
    from finequant.quantize.merge.adapter import Adapter, merged_weights
    from finequant.quantize.merge.model import float_model

    base, _ = _opened(at, method)
    adapter = Adapter(at / "adapter", base, "base")
    model = float_model(base, merged_weights(base, adapter), torch.bfloat16)
    with torch.inference_mode():
        model(torch.arange(8)[None])


def copy(at: Path, method: str) -> None:
    """Reads the base and writes as many bytes as the checkpoint has, only casting the weights."""
    from finequant.quantize.checkpoint.reading import write_rows
    from finequant.quantize.checkpoint.streaming import each_piece
    from finequant.quantize.checkpoint.writing import Checkpoint, stored_shapes
    from finequant.quantize.scheme import layer_plan

    base, quantize = _opened(at, method)
    plan = layer_plan(quantize, base.config)
    out = at / "out"
    out.mkdir()
    shapes = stored_shapes(base.shapes, base.config, plan)
    checkpoint = Checkpoint(out, shapes, plan, torch.bfloat16)

    def convert(piece: tuple[str, slice]) -> None:
        name, rows = piece
        weight = base.weights(name, rows)
        for key in checkpoint.stored(name):
            descriptor, entry = checkpoint.entries[key]
            part = weight[:, : entry.shape[1]] if len(entry.shape) > 1 else weight
            write_rows(descriptor, entry, rows, part.to(entry.dtype))

    each_piece(convert, [(name, rows) for name in shapes for rows in checkpoint.pieces(name)])


def theirs(at: Path) -> None:
    """Goes the usual way: merge, save, load as quantized, save."""
    from peft import PeftModel
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup
    from transformers import AutoModelForCausalLM, TorchAoConfig

    base = AutoModelForCausalLM.from_pretrained(at / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, at / "adapter").merge_and_unload()
    merged.save_pretrained(at / "merged")
    del base, merged
    scheme = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP_SIZE)
    )
    quantized = AutoModelForCausalLM.from_pretrained(
        at / "merged", dtype=torch.bfloat16, quantization_config=TorchAoConfig(scheme)
    )
    quantized.save_pretrained(at / "out")


if __name__ == "__main__":
    with report_user_errors():
        app()
