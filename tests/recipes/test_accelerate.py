"""Launch configurations: accelerate reads them, and they leave the recipe's settings to it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from transformers import LlamaConfig, TrainingArguments

from finequant.finetune.architecture import skeleton
from finequant.finetune.arguments import training_arguments
from finequant.finetune.device import trains_on_cpu
from finequant.finetune.processes import sharding
from finequant.recipes.command_line import use_cores
from finequant.recipes.load import load_recipe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "accelerate"
KINDS = {
    "cpu.yaml": DistributedType.NO,
    "one_gpu.yaml": DistributedType.NO,
    "several_gpus.yaml": DistributedType.MULTI_GPU,
    "fsdp.yaml": DistributedType.FSDP,
    "deepspeed_zero3.yaml": DistributedType.DEEPSPEED,
}
SECTIONS = ("fsdp_config", "deepspeed_config")


def launch(name: str) -> tuple[object, dict[str, str]]:
    """Returns what `accelerate launch` makes of the file: arguments, and processes' environment."""
    command = ["--config_file", str(FOLDER / name), "--main_process_port", "0", "train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    arguments.deepspeed_fields_from_accelerate_config = ""  # launch_command does this
    if arguments.use_deepspeed:
        return arguments, prepare_deepspeed_cmd_env(arguments)[1]
    if arguments.multi_gpu or arguments.use_fsdp:
        return arguments, prepare_multi_gpu_env(arguments)
    return arguments, prepare_simple_launcher_cmd_env(arguments)[1]


def test_every_launch_configuration_is_tested():
    assert {path.name for path in FOLDER.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_knows_every_key(name):
    config = load_config_from_file(str(FOLDER / name))  # refuses unknown keys, but not in sections
    assert type(config) is ClusterConfig
    assert config.distributed_type == KINDS[name]
    assert config.use_cpu == (name == "cpu.yaml")
    assert (config.num_processes > 1) == (config.distributed_type != DistributedType.NO)
    known = vars(launch_command_parser().parse_args(["train.py"]))
    for section in SECTIONS:
        assert set(getattr(config, section)) <= set(known)


@pytest.mark.parametrize("name", KINDS)
def test_precision_is_left_to_the_recipe(name, tmp_path, monkeypatch):
    _, environment = launch(name)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment["ACCELERATE_MIXED_PRECISION"])
    for bf16, expected in ((False, "no"), (True, "bf16")):
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=bf16)
        assert arguments.mixed_precision == expected


@pytest.mark.parametrize("asked", ["no", "fp16", "bf16"])
def test_the_recipe_decides_the_precision_whatever_a_configuration_asks_for(
    recipe_file, tmp_path, monkeypatch, asked
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    for dtype, expected in ((torch.float32, "no"), (torch.bfloat16, "bf16")):
        arguments = training_arguments(load_recipe(recipe_file), tmp_path, dtype)
        assert arguments.mixed_precision == expected


@pytest.mark.parametrize("name", KINDS)
def test_only_one_file_leaves_the_gpu_alone(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for variable, value in launch(name)[1].items():
        monkeypatch.setenv(variable, value)
    assert trains_on_cpu() == (name == "cpu.yaml")
    expected = {"fsdp.yaml": "FSDP", "deepspeed_zero3.yaml": "DeepSpeed"}
    assert sharding() == expected.get(name)


@pytest.mark.parametrize("name", KINDS)
def test_the_comment_is_the_command(name):
    when, command, *rest = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    assert when.startswith("# ")
    assert not rest[0].startswith("#")
    words = command.removeprefix("# ").split()
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert ROOT / words[3] == FOLDER / name
    assert (ROOT / words[4]).is_file()
    assert words[5].startswith("recipes/")


def test_fsdp_shards_the_blocks_of_a_base(monkeypatch):
    for variable, value in launch("fsdp.yaml")[1].items():
        monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    model = skeleton(LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1))
    plugin.set_auto_wrap_policy(model)
    (wrapped,) = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert wrapped is type(model.model.layers[0])
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.activation_checkpointing is False
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)  # so that one process can save it


def test_deepspeed_gathers_what_is_saved_and_leaves_the_batch_to_the_recipe():
    environment = launch("deepspeed_zero3.yaml")[1]
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment
    assert "ACCELERATE_GRADIENT_CLIPPING" not in environment


@pytest.mark.slow
def test_training_starts_through_accelerate_launch(recipe_file):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(FOLDER / "cpu.yaml"), str(ROOT / "finetune" / "train.py")]
    run = subprocess.run(
        [*command, str(recipe_file), "train.max_steps=1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    folder = recipe_file.parent / "run" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == 4
    assert (folder / "adapter_model.safetensors").stat().st_size > 0


THREADS = """
from finequant.recipes.command_line import use_cores
use_cores()
import torch
print(torch.get_num_threads())
"""


@pytest.mark.slow
def test_a_process_that_accelerate_launches_uses_all_cores(tmp_path):
    """accelerate launch gives it one, unless a configuration says that there is no GPU."""
    (tmp_path / "threads.py").write_text(THREADS)
    unset = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def threads(*launcher: str, **environment: str) -> int:
        command = [sys.executable, *launcher, str(tmp_path / "threads.py")]
        done = subprocess.run(
            command, env=unset | environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    launcher = ("-m", "accelerate.commands.launch")
    assert threads(*launcher) == threads()
    assert threads(*launcher, OMP_NUM_THREADS="1") == 1


def test_several_processes_share_the_cores(monkeypatch):
    environment = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 18)
    monkeypatch.setattr(psutil.Process, "environ", lambda self: {})
    use_cores()
    assert os.environ["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("gpus", "stage", "batch", "processes", "micro"),
    [
        (1, "train", 16, None, None),
        (2, "train", 16, 2, 8),
        (4, "train", 16, 4, 4),
        (4, "qat", 6, 3, 2),
        (4, "evaluate", 6, 4, None),
        (4, "quantize", 6, 4, None),
        (4, "train", 1, None, None),
    ],
)
def test_a_run_takes_all_gpus_that_can_share_a_step(
    recipe_file, monkeypatch, gpus, stage, batch, processes, micro
):
    from finequant.recipes.commands.pipeline import _launched

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("finequant.finetune.device.trains_on_cpu", lambda: False)
    most = {16: 8, 6: 6, 1: 1}[batch]
    recipe = load_recipe(
        recipe_file,
        [f"train.batch_size={batch}", f"train.micro_batch_size={most}", "quantize.method=gptq"],
    )
    launcher, overrides = _launched(stage, recipe, None)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    assert launcher == (torchrun if processes else [])
    assert overrides == ([f"train.micro_batch_size={micro}"] if micro else [])
    mine, _ = _launched(stage, recipe, FOLDER / "several_gpus.yaml")
    assert "accelerate.commands.launch" in mine


def test_quantization_is_launched_only_where_it_calibrates(recipe_file):
    from finequant.recipes.commands.pipeline import _launched

    trained = ["quantize.method=gptq", "quantize.training={steps: 1}"]
    for overrides in (["quantize.method=rtn"], ["quantize.method=hqq"], trained):
        recipe = load_recipe(recipe_file, overrides)
        assert _launched("quantize", recipe, FOLDER / "several_gpus.yaml") == ([], [])
