"""several.py FOLDER: runs scenarios of two and four processes, one after the other.

Each scenario calls the real entry; `FOLDER/NAME-RANK.txt` keeps its output, and `.code` its exit
code. This process imports the libraries, which takes longer than a training, and forks the
processes that torchrun would start.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers.models.llama import modeling_llama  # noqa: F401

from finequant.evaluate import compare
from finequant.evaluate.compare import main as evaluate
from finequant.evaluate.metrics import exports, shared_context, tasks  # noqa: F401
from finequant.evaluate.report import page  # noqa: F401
from finequant.finetune import arguments as train_arguments
from finequant.finetune import processes
from finequant.finetune import trainer as trainers
from finequant.finetune.train import main
from finequant.finetune.trainer import LoraTrainer
from finequant.quantize.convert import main as quantize
from finequant.quantize.methods import reconstruct
from finequant.quantize.methods.calibrate import Calibrator
from finequant.quantize.training import model as aware_model
from finequant.quantize.training import scales
from finequant.quantize.training import train as aware_stage
from finequant.quantize.training.train import main as train_codes
from finequant.recipes.interrupt import Interrupted

sys.path.append(str(Path(__file__).parents[1]))
from conftest import Reloads, stub_figures  # noqa: E402
from double_sums import sums_in_double  # noqa: E402
from scenarios import (  # noqa: E402
    AWARE,
    CALIBRATED,
    DATA_FREE,
    GPTQ,
    LORA,
    MEASURED,
    PACKED,
    SHARDED,
    STEPS,
    TRAINED,
)

FOLDER = Path(sys.argv[1])
FSDP = Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp.yaml"
ROWS = [f"data.train={FOLDER / 'uneven.jsonl'}", f"data.validation={FOLDER / 'five.jsonl'}"]


def rank() -> int:
    return int(os.environ["RANK"])


def launch(processes: int, work: Callable[..., None], *arguments: object) -> bool:
    """Does the work in forked processes, as under torchrun; says whether all of them finished."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="several",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(config, work)(*arguments)
    except ChildFailedError:
        return False
    return True


def train(name: str, *overrides: str, run: str | None = None, entry=main) -> int:
    """Trains in FOLDER/RUN, by default named like the scenario; returns the exit code."""
    code = 0
    with (
        (FOLDER / f"{name}-{rank()}.txt").open("w", buffering=1, encoding="utf-8") as said,
        redirect_stderr(said),
    ):
        try:
            entry([str(FOLDER / "recipe.yaml"), f"output_dir={FOLDER / (run or name)}", *overrides])
        except SystemExit as stop:
            code = stop.code
    (FOLDER / f"{name}-{rank()}.code").write_text(str(code), encoding="utf-8")
    AcceleratorState._reset_state(reset_partial_state=True)
    return code


@contextmanager
def at_step(step: int, process: int, do) -> Iterator[None]:
    """Replaces the loss of a step, in one process, by what `do` makes of it."""
    whole = LoraTrainer.compute_loss

    def compute_loss(self, *arguments, **options):
        loss = whole(self, *arguments, **options)
        chosen = process == rank() and self.model.training and self.state.global_step == step - 1
        return do(loss) if chosen else loss

    LoraTrainer.compute_loss = compute_loss
    yield
    LoraTrainer.compute_loss = whole


@contextmanager
def fsdp() -> Iterator[None]:
    """Sets up processes as `accelerate launch --config_file fsdp.yaml` does, but on the CPU.

    accelerate allows FSDP on GPUs only, so it is made to believe that there are some.
    """
    parser = launch_command_parser()
    arguments = ["--config_file", str(FSDP), "--main_process_port", "0", "train.py"]
    launched = prepare_multi_gpu_env(_validate_launch_command(parser.parse_args(arguments))[0])
    names = {name for name in launched if name.startswith("FSDP_")} | {"ACCELERATE_USE_FSDP"}
    before, build = dict(os.environ), train_arguments.training_arguments

    def training_arguments(*arguments):
        made = build(*arguments)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        return made

    refuse, train_arguments._refuse_launch = train_arguments._refuse_launch, lambda on_cpu: None
    train_arguments.training_arguments = training_arguments
    os.environ.update({name: launched[name] for name in names})
    yield
    train_arguments.training_arguments, train_arguments._refuse_launch = build, refuse
    for name in names - before.keys():
        del os.environ[name]


@contextmanager
def at_block(number: int | None, do: Callable[[], None] | None = None) -> Iterator[None]:
    """Calls `do` when a process reaches the block; prints each block that is quantized."""
    whole = Calibrator._quantize

    def _quantize(self, block, prefix, names):
        if prefix == f"model.layers.{number}.":
            do()
        print(f"quantizing {prefix}", file=sys.stderr)
        return whole(self, block, prefix, names)

    Calibrator._quantize = _quantize
    yield
    Calibrator._quantize = whole


@contextmanager
def at_model(loaded: str, do: Callable[[], None]) -> Iterator[None]:
    """Calls `do` when evaluation loads the model."""
    whole = compare.load_model

    def load_model(name, *arguments):
        if name == loaded:
            do()
        return whole(name, *arguments)

    compare.load_model = load_model
    yield
    compare.load_model = whole


@contextmanager
def few_tokens_a_step() -> Iterator[None]:
    """Gives two rows of 32 tokens to each step that trains a block or scales."""
    before = reconstruct.TOKENS, scales.SCALE_TOKENS
    reconstruct.TOKENS = scales.SCALE_TOKENS = 64
    yield
    reconstruct.TOKENS, scales.SCALE_TOKENS = before


@contextmanager
def few_tokens_at_once() -> Iterator[None]:
    """Limits logits to five tokens at a time, so that processes differ in their number of parts."""
    before, trainers.TARGETS_AT_ONCE = trainers.TARGETS_AT_ONCE, 5
    yield
    trainers.TARGETS_AT_ONCE = before


@contextmanager
def weighed(name: str) -> Iterator[None]:
    """Writes to FOLDER/NAME-RANK-bytes.json how many bytes of the model this process holds."""
    build, end = aware_model.fake_quantized_model, aware_stage._trained_codes
    held = {}

    def fake_quantized_model(*arguments):
        model = build(*arguments)
        held["loaded"] = sum(p.nbytes for p in model.parameters() if not p.is_meta)
        return model

    def _trained_codes(trainer):
        tensors = list(trainer.model.parameters())
        held["whole"] = sum(tensor.nbytes for tensor in tensors)
        held["share"] = sum(tensor.to_local().nbytes for tensor in tensors)
        (FOLDER / f"{name}-{rank()}-bytes.json").write_text(json.dumps(held), encoding="utf-8")
        return end(trainer)

    aware_model.fake_quantized_model = fake_quantized_model
    aware_stage._trained_codes = _trained_codes
    yield
    aware_model.fake_quantized_model, aware_stage._trained_codes = build, end


def stop(loss):
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def fail(loss=None):
    raise Interrupted(signal.SIGTERM)


def kill(process: int) -> None:
    if rank() == process:
        os.kill(os.getpid(), signal.SIGKILL)


def trained() -> None:
    """Trains in two processes, and then quantization-aware from the results."""
    train("packed", *PACKED)
    with at_step(2, 1, lambda loss: loss * float("nan")):
        train("nan", "train.save_steps=1")
    train("undisturbed", *STEPS)
    with at_step(3, 1, stop):
        train("stopped", *STEPS)
    with fsdp():
        train("whole weights opened by FSDP", *STEPS, run="stopped")
    train("gone on", *STEPS, run="stopped")
    twice = [*STEPS, "train.epochs=2"]
    train("two epochs", *twice)
    with at_step(9, 0, stop):  # of two epochs with six steps each
        train("stopped in the second", *twice)
    train("gone on in the second", *twice, run="stopped in the second")
    with sums_in_double(), at_block(1, fail):
        train("calibration stopped", *AWARE, run="undisturbed", entry=train_codes)
    with sums_in_double(), at_block(None):
        train("codes", *AWARE, run="undisturbed", entry=train_codes)
    unfit = ["quantize.method=gptq", "quantize.group_size=80"]
    train("groups that do not fit", *unfit, run="undisturbed", entry=quantize)
    with sums_in_double(), few_tokens_a_step():
        train("quantized", *CALIBRATED, run="undisturbed", entry=quantize)


def split() -> None:
    """Trains in two processes with FSDP."""
    for name, overrides in SHARDED.items():
        with fsdp(), few_tokens_at_once(), weighed(name):
            if name == "scales learn, taught":
                with at_step(3, rank(), fail):
                    train(f"{name}, ended", *overrides, run=name, entry=train_codes)
            train(name, *overrides, entry=train_codes)
    processes.APPEARS_WITHIN = 0.2
    train("shared", run="apart" if rank() else "shared")
    with fsdp(), at_step(2, 0, stop):
        train("lora, stopped", *LORA, run="lora")
    train("split weights opened by DDP", *LORA, run="lora")
    with fsdp():
        train("lora", *LORA)
        train("dora", "lora.use_dora=true", "train.max_steps=2")
        train("pissa", "lora.init_lora_weights=pissa", "train.max_steps=2")
        train("olora", "lora.init_lora_weights=olora", "train.max_steps=2")


def stage(name: str, number: int) -> None:
    """Runs a stage in `NAME by NUMBER`."""
    entry, overrides, _ = STAGES[name]
    with sums_in_double(), at_block(None):
        train(f"{name} by {number}", *overrides, entry=entry)


def killed_in(name: str, number: int, process: int) -> None:
    """Runs a stage in which one process is killed. The others must exit, as they would in reality:
    any that stayed would keep the processes waiting that need its answer."""
    entry, overrides, killing = STAGES[name]
    run = f"{name} by {number}"
    with sums_in_double(), killing(process):
        os._exit(train(f"{run}, killed", *overrides, run=run, entry=entry))


def without_end(number: int) -> None:
    """Runs the scenarios in which no process is killed."""
    for name in DATA_FREE:
        train(f"{name} by {number}", f"quantize.method={name}", entry=quantize)
    name, few = "scales learn", "train.micro_batch_size=2"
    train(f"{name} by {number}", *SHARDED[name], few, entry=train_codes)
    if number > 2:
        with fsdp():
            for name in ("adapter learns", "scales learn"):
                train(f"{name}, split by {number}", *SHARDED[name], few, entry=train_codes)


def at_third_step(killed: int):
    return at_step(3, killed, lambda loss: kill(killed))


STAGES = {
    "uneven": (main, [*ROWS, *TRAINED], at_third_step),
    "adapter learns": (
        train_codes,
        [*SHARDED["adapter learns"], "train.micro_batch_size=2"],
        at_third_step,
    ),
    "gptq": (quantize, GPTQ, lambda killed: at_block(1, lambda: kill(killed))),
    "evaluated": (
        evaluate,
        [*GPTQ, *MEASURED],
        lambda killed: at_model("quantized", lambda: kill(killed)),
    ),
}
"""Entry, overrides, and the context in which a process is killed."""


def copy(run: str, *targets: str) -> None:
    """Copies a run without its trained codes and its quantized model."""
    for target in targets:
        made = shutil.ignore_patterns("trained_*", "qat", "quantized")
        shutil.copytree(FOLDER / run, FOLDER / target, ignore=made)


subprocess.run = Reloads()
stub_figures(setattr)
gc.collect()
gc.freeze()  # for the reason in conftest.freeze_libraries
assert launch(2, trained)
copy("undisturbed", *SHARDED)
assert launch(2, split)
for number in (2, 4):
    names = [name for name in STAGES if name not in ("uneven", "evaluated")]
    names += [*DATA_FREE, "scales learn"]
    copy("undisturbed", *(f"{name} by {number}" for name in names))
    if number > 2:
        names = ["adapter learns", "scales learn"]
        copy("undisturbed", *(f"{name}, split by {number}" for name in names))
    for killed, name in enumerate(STAGES):
        if name == "evaluated":
            shutil.copytree(FOLDER / "gptq by 2", FOLDER / f"{name} by {number}")
        assert not launch(number, killed_in, name, number, killed % number)
        assert launch(number, stage, name, number)
    assert launch(number, without_end, number)
