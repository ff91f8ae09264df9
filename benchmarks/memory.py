"""Compares the peak memory of each stage on this processor with its estimate, without a network.

python benchmarks/memory.py
python benchmarks/memory.py --only nf4,scales
python benchmarks/memory.py --shape tiny --tokens 32
python benchmarks/memory.py --tokens 32 --limit 1.15

Each case runs a stage's own command in a separate process, for two steps, on random weights and
rows of one length. The peak is the kernel's figure (VmHWM, on Linux only), which must agree with
the manifest. It includes pages of mapped files, which the kernel can reclaim. With --limit, a
control group kills a stage that needs more than so many times its estimate.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle, islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Annotated, NamedTuple, get_args

import typer
from convert import Shape, make

from finequant.recipes.commands.pipeline import export_options, module_of
from finequant.recipes.errors import UserError, report_user_errors
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Export, Recipe
from finequant.recipes.terminal import say
from finequant.recipes.usage import CGROUP, CGROUPS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finequant.finetune.architecture import DecoderConfig
    from finequant.quantize.size.terms import Memory

CHECKPOINTING = "train.gradient_checkpointing=true"
SCALES = "quantize.training={steps: 2, learns: scales}"
ADAPTER = "quantize.training={steps: 2, learns: adapter}"
TEACHER = "quantize.training.distillation=0.5"
CASES = {
    "train bf16": ("train", ["train.precision=bf16"]),
    "train nf4": ("train", ["train.precision=fp32", "model.load=nf4"]),
    "train fp32": ("train", ["train.precision=fp32"]),
    "qat scales": ("qat", [SCALES, CHECKPOINTING]),
    "qat scales teacher": ("qat", [SCALES, TEACHER, CHECKPOINTING]),
    "qat scales kept": ("qat", [SCALES]),
    "qat adapter": ("qat", [ADAPTER, CHECKPOINTING]),
    "qat adapter teacher": ("qat", [ADAPTER, TEACHER, CHECKPOINTING]),
    "qat adapter kept": ("qat", [ADAPTER]),
    "quantize gptq": ("quantize", ["quantize.method=gptq", "quantize.rotate=true"]),
    "quantize rtn": ("quantize", []),
    "evaluate": ("evaluate", []),
    **{f"export {name}": (name, []) for name in get_args(Export) if name != "torchao"},
}
"""Stage or format, and overrides, by name; `kept` means without gradient checkpointing."""

READS = {"qat": "train bf16", "quantize": "train bf16", "evaluate": "quantize rtn"} | dict.fromkeys(
    get_args(Export), "quantize rtn"
)
"""The case whose output a stage or an export reads."""

WORDS = ["".join(letters) for letters in product(ascii_lowercase, repeat=3)][:480]
PAD, END, USER, ASSISTANT = SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALIBRATION_TOKENS, ROWS = 4096, 32

POLL = 0.05
"""Seconds between two looks at a process."""


class Measured(NamedTuple):
    """Memory and time that a process took."""

    peak: int
    """Bytes according to the kernel."""
    reported: int
    """Bytes according to the manifest."""
    anonymous: int
    """Peak of the bytes that are not pages of mapped files, as sampled."""
    models: dict[str, int]
    """Peak bytes while each model was evaluated, as sampled."""
    seconds: float


def main(
    shape: Annotated[Shape, typer.Option(help="whose shape the base has")] = "1b",
    only: Annotated[str, typer.Option(help="cases whose names contain one of these")] = "",
    tokens: Annotated[int, typer.Option(help="of a row, and a step")] = 256,
    blocks: Annotated[int | None, typer.Option(help="fewer than the shape has")] = None,
    folder: Annotated[Path | None, typer.Option(help="for the models; default: temporary")] = None,
    limit: Annotated[
        float, typer.Option(help="kill a stage that needs more than this many estimates (root)")
    ] = math.inf,
) -> None:
    """Prints a table in Markdown."""
    chosen = [name for name in CASES if any(part in name for part in only.split(","))]
    if not chosen:
        raise UserError(f"--only {only}: expected parts of {', '.join(CASES)}")
    lines = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        at = Path(scratch)
        say(f"making a base of the shape {shape}")
        recipe = prepare(at, shape, blocks, tokens)
        for name in with_what_they_read(chosen):
            say(name)
            estimated = estimate(recipe, name, tokens)
            allowed = limit if name in chosen else math.inf
            measured = measure(at, recipe, name, allowed * sum(estimated.values()))
            those = compared(name, recipe, estimated, measured)
            lines += those if name in chosen else []
    of_blocks = f", {blocks} of its blocks" if blocks else ""
    within = f", in {limit} times its estimate" if limit < math.inf else ""
    print(f"\nLlama {shape}{of_blocks}, rows of {tokens} tokens, one a step{within}\n")
    print("| | GB | without mapped files | estimated | ratio | time | |")
    print("| :--- | ---: | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(lines))


def with_what_they_read(names: list[str]) -> list[str]:
    """Adds the cases whose output these read, and puts all in the order in which they must run."""
    needed = list(names)
    for name in needed:  # grows
        before = READS.get(CASES[name][0])
        needed += [before] if before and before not in needed else []
    return sorted(needed, key=list(CASES).index)


def prepare(at: Path, shape: str, blocks: int | None, tokens: int) -> Path:
    """Makes a base with a tokenizer, rows of one length, and a recipe for them."""
    make(at, shape, blocks)
    a_tokenizer().save_pretrained(at / "base")
    # Three tokens of a row come from the template; half of the others are target tokens.
    words = cycle(WORDS)
    question, answer = (
        " ".join(islice(words, count)) for count in (tokens // 2 - 3, tokens - tokens // 2 - 1)
    )
    rows = [{"prompt": f"{word} {question}", "completion": answer} for word in WORDS[:ROWS]]
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (at / "held_out.jsonl").write_text(json.dumps({"prompt": answer, "completion": WORDS[0]}))
    path = at / "recipe.json"
    content = {
        "name": "memory",
        "output_dir": str(at / "run"),
        "model": {"base": str(at / "base")},
        "data": {
            "train": "rows.jsonl",
            "test": "held_out.jsonl",
            "validation_fraction": 0,
            "max_length": tokens,
        },
        "train": {"batch_size": 1, "max_steps": 2},
        "quantize": {
            "effort": "fast",
            "scale": "max",
            "calibration": {"tokens": min(CALIBRATION_TOKENS, ROWS * tokens), "length": tokens},
        },
        "evaluate": {"batch_size": 1, "max_new_tokens": 4, "divergence_tokens": tokens},
    }
    path.write_text(json.dumps(content))
    return path


def a_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer with a token for each word; it cuts words as Llama 3's does, which GGUF can
    name."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from finequant.finetune.pre_tokenizers import pre_tokenizer

    tokens = [*SPECIAL, *WORDS, *(f"Ġ{word}" for word in WORDS)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer("llama-bpe")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=TEMPLATE,
    )


def estimate(path: Path, name: str, tokens: int) -> Memory:
    """Estimates the memory of a case as `finequant run` does, from the lengths of the rows."""
    from finequant.finetune.model import load_config
    from finequant.quantize.size.estimate import memory_of
    from finequant.quantize.size.machine import this_machine
    from finequant.quantize.size.terms import Lengths

    stage, overrides = CASES[name]
    recipe = load_recipe(path, overrides)
    config, lengths = load_config(recipe.model), Lengths([tokens] * ROWS, tokens, tokens // 2)
    return memory_of(stage, recipe, config, this_machine(), lengths)


def measure(at: Path, recipe: Path, name: str, limit: float) -> Measured:
    """Runs a case's command; its output goes to a file beside the recipe.

    limit: bytes for the process and its children, including cached pages of files.
    """
    stage, overrides = CASES[name]
    started = time.monotonic()
    log = at / f"{name}.log"
    command = [
        sys.executable,
        "-m",
        module_of(stage),
        str(recipe),
        *overrides,
        *export_options([stage]),
    ]
    with control_group(limit) as join, log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=join
        )
        try:
            peak, anonymous, models = sampled(process, log)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        sys.exit(f"{name} failed (exit code {process.returncode}):\n{log.read_text()}")
    manifest = json.loads((at / "run" / "manifest.json").read_text())
    seconds = time.monotonic() - started
    reported = manifest[stage]["peak_memory_bytes"]
    if not math.isclose(peak, reported, rel_tol=0.01):
        sys.exit(f"{name}: the kernel says {peak} bytes, and the manifest {reported}")
    return Measured(peak, reported, anonymous, models, seconds)


def sampled(process: subprocess.Popen, log: Path) -> tuple[int, int, dict[str, int]]:
    """Waits until a process has ended.

    Returns:
        Its peaks in bytes: resident, without mapped files, and for each model that it evaluates.
    """
    peak, anonymous, models = 0, 0, {}
    while process.poll() is None:
        with suppress(OSError, TypeError):  # it has just ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            now, peak = kilobytes("VmRSS", status), max(peak, kilobytes("VmHWM", status))
            anonymous = max(anonymous, kilobytes("RssAnon", status))
            if model := re.findall(r"evaluate: (\w+): loading", log.read_text()):
                models[model[-1]] = max(models.get(model[-1], 0), now)
        time.sleep(POLL)
    return peak, anonymous, models


@contextmanager
def control_group(limit: float) -> Iterator[Callable[[], None]]:
    """Makes a control group with this limit, and yields a function with which a process enters it.

    A process in it cannot swap, because the kernel would then swap instead of killing it. Empties
    the page cache first, because a group is not charged for pages that are already cached.
    """
    if limit == math.inf:
        yield lambda: None
        return
    root, limit_file, _ = CGROUPS["memory" if (CGROUP / "memory").is_dir() else ""]
    group = CGROUP / root / f"finequant-{os.getpid()}"
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
        group.mkdir(exist_ok=True)
        (group / limit_file).write_text(str(int(limit)))
        for name, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", int(limit))):
            if (group / name).exists():  # in version 2, in version 1; neither without swap
                (group / name).write_text(str(value))
    except OSError as error:
        raise UserError(f"--limit needs root and control groups: {error}") from None
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        for _ in range(100):  # the kernel takes a moment to see that it is empty
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(POLL)


def kilobytes(key: str, status: str) -> int:
    """Reads a size in bytes from the kernel's status of a process."""
    return 1024 * int(re.search(rf"^{key}:\s*(\d+)", status, re.M)[1])


def compared(name: str, path: Path, estimated: Memory, measured: Measured) -> list[str]:
    """Makes a case's rows of the table: one for its stage, and one for each evaluated model."""
    from finequant.finetune.model import load_config

    stage, overrides = CASES[name]
    recipe = load_recipe(path, overrides)
    config = load_config(recipe.model)
    say(f"{name}: {measured}; estimated: {estimated}")
    total, remark = sum(estimated.values()), ""
    if stage == "qat":
        remark = f"{bytes_of_rounded(recipe, config, estimated, measured.peak):.2f} bytes a weight"
    lines = [
        f"{name} | {measured.peak / 1e9:.2f} | {measured.anonymous / 1e9:.2f} | "
        f"{total / 1e9:.2f} | {measured.peak / total:.2f} | {measured.seconds:.0f} s | {remark}"
    ]
    for model, peak in measured.models.items():
        above = (peak - estimated["process"]) / float_bytes(recipe, config)
        remark = "" if model == "quantized" else f"{above:.2f} times its weights"
        lines.append(f"{name} {model} | {peak / 1e9:.2f} | | | | | {remark}")
    return [f"| {line} |" for line in lines]


def bytes_of_rounded(
    recipe: Recipe, config: DecoderConfig, estimated: Memory, measured: int
) -> float:
    """Computes the bytes per quantized weight, including its share of trained parameters: the peak
    without the process, activations, logits, and weights that stay in float."""
    from finequant.finetune.architecture import EMBEDDING, layer_shapes
    from finequant.quantize.scheme import layer_plan, shipped_dtype

    plan, shapes = layer_plan(recipe.quantize, config), layer_shapes(config)
    rounded = sum(math.prod(shapes[name]) for name in plan if plan[name])
    others = ("process", "activations", "logits", "allocator")
    rest = sum(estimated.get(name, 0) for name in others)
    if not plan[EMBEDDING]:
        rest += math.prod(shapes[EMBEDDING]) * shipped_dtype(recipe.quantize, config).itemsize
    return (measured - rest) / rounded


def float_bytes(recipe: Recipe, config: DecoderConfig) -> int:
    """Computes the bytes of the tuned model in evaluation."""
    from finequant.finetune.architecture import parameter_count
    from finequant.quantize.size.machine import this_machine
    from finequant.quantize.size.terms import arithmetic_bytes

    return parameter_count(config) * arithmetic_bytes(recipe, config, this_machine())


if __name__ == "__main__":
    with report_user_errors():
        typer.run(main)
