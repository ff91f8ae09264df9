"""torchrun --nproc_per_node 2 several.py FOLDER: what two processes do, scenario after scenario.

One launch for all, as a start takes longer than a training. Each scenario is a call of the real
entry; `FOLDER/NAME-RANK.json` keeps its exit code and what it said.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from finequant.evaluate.compare import main as evaluate
from finequant.finetune import arguments as train_arguments
from finequant.finetune import processes
from finequant.finetune import trainer as trainers
from finequant.finetune.train import main
from finequant.finetune.trainer import LoraTrainer
from finequant.quantize.convert import main as quantize
from finequant.quantize.methods import reconstruct
from finequant.quantize.methods.calibrate import _Calibration
from finequant.quantize.training import model as aware_model
from finequant.quantize.training import scales
from finequant.quantize.training import train as aware_stage
from finequant.quantize.training.train import main as train_codes
from finequant.recipes.interrupt import Interrupted

sys.path.append(str(Path(__file__).parents[1]))
from double_sums import sums_in_double  # noqa: E402
from scenarios import AWARE, CALIBRATED, LORA, MEASURED, SHARDED, STEPS  # noqa: E402

FOLDER, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
FSDP = Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp.yaml"


def train(name: str, *overrides: str, run: str | None = None, entry=main) -> None:
    """Trains in FOLDER/RUN, which is called as the scenario if nothing is said."""
    said, code = io.StringIO(), 0
    with redirect_stderr(said):
        try:
            entry([str(FOLDER / "recipe.yaml"), f"output_dir={FOLDER / (run or name)}", *overrides])
        except SystemExit as stop:
            code = stop.code
    result = {"code": code, "said": said.getvalue()}
    (FOLDER / f"{name}-{RANK}.json").write_text(json.dumps(result), encoding="utf-8")
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def at_step(step: int, rank: int, do) -> Iterator[None]:
    """In one process, `do` gets the loss of that step; what it returns takes its place."""
    whole = LoraTrainer.compute_loss

    def compute_loss(self, *arguments, **options):
        loss = whole(self, *arguments, **options)
        chosen = rank == RANK and self.model.training and self.state.global_step == step - 1
        return do(loss) if chosen else loss

    LoraTrainer.compute_loss = compute_loss
    yield
    LoraTrainer.compute_loss = whole


@contextmanager
def fsdp() -> Iterator[None]:
    """As `accelerate launch --config_file fsdp.yaml` starts processes, but on the CPU.

    accelerate takes FSDP for GPUs only, so it is told that these are some.
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
def stopped_in_block(number: int | None) -> Iterator[None]:
    """Ends both processes when they come to the block; says which ones they quantize."""
    whole = _Calibration._quantize

    def _quantize(self, block, prefix, names):
        if prefix == f"model.layers.{number}.":
            raise Interrupted(signal.SIGTERM)
        print(f"quantizing {prefix}", file=sys.stderr)
        return whole(self, block, prefix, names)

    _Calibration._quantize = _quantize
    yield
    _Calibration._quantize = whole


@contextmanager
def few_tokens_a_step() -> Iterator[None]:
    """Two rows of 32 tokens in each step that trains a block or scales."""
    before = reconstruct.TOKENS, scales.SCALE_TOKENS
    reconstruct.TOKENS = scales.SCALE_TOKENS = 64
    yield
    reconstruct.TOKENS, scales.SCALE_TOKENS = before


@contextmanager
def few_tokens_at_once() -> Iterator[None]:
    """Logits of five tokens at a time: of two processes, some have more such parts than others."""
    before, trainers.TARGETS_AT_ONCE = trainers.TARGETS_AT_ONCE, 5
    yield
    trainers.TARGETS_AT_ONCE = before


@contextmanager
def weighed(name: str) -> Iterator[None]:
    """Writes to FOLDER/NAME-RANK-bytes.json what this process holds of the model's tensors."""
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
        (FOLDER / f"{name}-{RANK}-bytes.json").write_text(json.dumps(held), encoding="utf-8")
        return end(trainer)

    aware_model.fake_quantized_model = fake_quantized_model
    aware_stage._trained_codes = _trained_codes
    yield
    aware_model.fake_quantized_model, aware_stage._trained_codes = build, end


def stop(loss):
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def fail(loss):
    raise Interrupted(signal.SIGTERM)


ROWS = [f"data.train={FOLDER / 'uneven.jsonl'}", f"data.validation={FOLDER / 'five.jsonl'}"]
train("uneven", *ROWS)
UNFIT = ["quantize.method=gptq", "quantize.group_size=80"]
train("groups that do not fit", *ROWS, *UNFIT, run="uneven", entry=quantize)
with sums_in_double(), few_tokens_a_step():
    train("quantized", *ROWS, *CALIBRATED, run="uneven", entry=quantize)
train("packed", "data.packing=true", "data.max_length=64", "train.micro_batch_size=2")
with at_step(2, 1, lambda loss: loss * float("nan")):
    train("nan", "train.save_steps=1")
train("undisturbed", *STEPS)
with at_step(3, 1, stop):
    train("stopped", *STEPS)
with fsdp():
    train("whole weights opened by FSDP", *STEPS, run="stopped")
train("gone on", *STEPS, run="stopped")
with sums_in_double(), stopped_in_block(1):
    train("calibration stopped", *AWARE, run="undisturbed", entry=train_codes)
with sums_in_double(), stopped_in_block(None):
    train("codes", *AWARE, run="undisturbed", entry=train_codes)
for name, overrides in SHARDED.items():
    processes.decided_by_first(
        lambda name=name: shutil.copytree(
            FOLDER / "undisturbed", FOLDER / name, ignore=shutil.ignore_patterns("trained_*", "qat")
        )
    )
    with fsdp(), few_tokens_at_once(), weighed(name):
        if name == "scales learn, taught":
            with at_step(3, RANK, fail):
                train(f"{name}, ended", *overrides, run=name, entry=train_codes)
        train(name, *overrides, entry=train_codes)
processes.APPEARS_WITHIN = 0.2
train("shared", run="apart" if RANK else "shared")
with fsdp(), at_step(2, 0, stop):
    train("lora, stopped", *LORA, run="lora")
train("split weights opened by DDP", *LORA, run="lora")
with fsdp():
    train("lora", *LORA)
    train("dora", "lora.use_dora=true", "train.max_steps=2")
    train("pissa", "lora.init_lora_weights=pissa", "train.max_steps=2")
    train("olora", "lora.init_lora_weights=olora", "train.max_steps=2")

# Evaluation leaves the process group, and torch's store keeps the addresses of a group that is
# gone: one process could ask for the other's former address, so nothing may follow.
train("evaluated", *ROWS, *MEASURED, run="uneven", entry=evaluate)
