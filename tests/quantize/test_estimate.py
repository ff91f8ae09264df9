"""Exact counts, predicted memory, and refusals before a stage starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import SHAPE, refused
from transformers import LlamaConfig

from finequant.finetune.adapter import lora_config
from finequant.finetune.architecture import parameter_count
from finequant.finetune.model import load_base
from finequant.quantize.checkpoint.writing import layout, stored_shapes
from finequant.quantize.scheme import layer_plan
from finequant.quantize.size import machine as machines
from finequant.quantize.size.estimate import cache_bytes, disk_of, memory_of
from finequant.quantize.size.machine import Machine, bytes_of, named_gpu
from finequant.quantize.size.resources import refuse_what_cannot_finish, settings_that_fit
from finequant.quantize.size.terms import Lengths, components, trainable
from finequant.recipes import usage
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.run import main
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Lora

LLAMA_2_13B = LlamaConfig(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    dtype="float16",
)
LLAMA_3_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    dtype="bfloat16",
)
SMALL = Machine("a small machine", 10**9, "cpu")


@pytest.fixture
def plan(recipe_file, tmp_path, capsys):
    """Runs `finequant plan` on a configuration without weights, and returns the printed text."""

    def show(config: LlamaConfig, *arguments: str) -> str:
        folder = tmp_path / "big"
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        with pytest.raises(SystemExit) as exit_:
            main(["plan", str(recipe_file), f"model.base={folder}", *arguments])
        assert not exit_.value.code
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            LLAMA_2_13B,
            "13,015,864,320: embedding 163,840,000, attention 4,194,304,000, mlp 8,493,465,600, "
            "norms 414,720, head 163,840,000",
        ),
        (
            LLAMA_3_70B,
            "70,553,706,496: embedding 1,050,673,152, attention 12,079,595,520, "
            "mlp 56,371,445,760, norms 1,318,912, head 1,050,673,152",
        ),
    ],
    ids=["13b", "70b"],
)
def test_parameters_are_exact_from_the_configuration_alone(plan, config, parts):
    out = plan(config, "--gpu", "h100", "--device-memory", "6GB", "--context", "2048")
    assert f"parameters: {parts}\n" in out
    assert "peak memory on H100, which has 80.00 GB, for rows of" in out
    assert "does not fit into 6.00 GB" in out
    assert all(f"  {bits} bits: " in out for bits in (8, 4, 3))


@pytest.mark.parametrize("tied", [True, False])
def test_components_add_up_to_the_models(tied):
    from transformers import LlamaForCausalLM

    config = LlamaConfig(**SHAPE, vocab_size=384, head_dim=32, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(components(config).values()) == model.num_parameters() == parameter_count(config)


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=4),
        Lora(rank=3, target_modules=["q_proj", "mlp.up_proj"]),
        Lora(rank=4, use_dora=True, target_modules=["1.self_attn.k_proj", "down_proj"]),
    ],
)
def test_trainable_weights_are_pefts(recipe_file, lora):
    from peft import get_peft_model

    base = load_base(load_recipe(recipe_file).model, torch.float32)
    expected = trainable(lora, base.config)
    model = get_peft_model(base, lora_config(lora, base))
    assert model.get_nb_trainable_parameters()[0] == expected


def test_activations_are_what_autograd_keeps(recipe_file):
    """Counts the bytes that one more block keeps for the backward pass."""
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    recipe = load_recipe(recipe_file, ["lora.rank=8"])
    rows, length = 2, 64

    def kept(blocks: int) -> tuple[int, LlamaConfig]:
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        base = LlamaForCausalLM(config)
        model = get_peft_model(base, lora_config(recipe.lora, base)).train()
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        found = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        ids = torch.randint(3, 100, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum()
        return sum(size for size, _ in found.values()), config

    (one, _), (two, config) = kept(1), kept(2)
    changes = {"micro_batch_size": rows, "precision": "fp32"}
    train = recipe.train.model_copy(update=changes)
    data = recipe.data.model_copy(update={"max_length": length})
    recipe = recipe.model_copy(update={"train": train, "data": data})
    predicted = memory_of("train", recipe, config, Machine("this machine", 10**10, "cpu"))
    assert predicted["activations"] / 2 == pytest.approx(two - one, rel=0.05)


def test_a_base_in_nf4_fits_where_one_in_bf16_does_not(plan):
    """The base has 13B weights in 4.1 bits, embedding and head in bf16."""
    for load, fits in (("float", False), ("nf4", True)):
        small = ["train.micro_batch_size=1", "data.max_length=256"]
        out = plan(LLAMA_2_13B, "--gpu", "4090", f"model.load={load}", *small)
        train = out.split("peak memory on RTX 4090")[1].splitlines()[1]
        assert train.startswith("  train: ")
        assert ("does not fit" not in train) is fits


def test_scales_of_a_model_that_does_not_fit_are_left_out(plan):
    out = plan(LLAMA_2_13B, "--gpu", "4090", "quantize.effort=best")
    quantize = out.split("peak memory on RTX 4090")[1].splitlines()[2]
    assert "does not fit: it fits with quantize.calibration.scale_steps=0:" in quantize


def test_a_model_too_large_for_one_gpu_is_split_over_several(plan):
    """70B in bf16 take 141 GB: each GPU holds an eighth, two blocks, embedding and head."""
    step = ["train.micro_batch_size=1", "train.gradient_checkpointing=true", "train.precision=bf16"]
    for how, fits in ((["--gpus", "8"], False), (["--gpus", "8", "--sharded"], True)):
        out = plan(LLAMA_3_70B, "--gpu", "H100", *how, *step)
        train, _, evaluate = out.split("peak memory on each of 8 x H100")[1].splitlines()[1:4]
        assert ("does not fit" not in train) is fits
        assert ("it fits with --launch fsdp" in train) is not fits
        assert "weights, a share" in evaluate
    out = plan(LLAMA_3_70B, "--gpu", "H100", *step)
    assert "model.load=nf4" in out.split("peak memory on H100")[1].splitlines()[1]


def test_sharding_divides_the_memory_of_codes(recipe_file, monkeypatch):
    """Eight GPUs share 2 bytes per weight of 70B, and gather two blocks, embedding and head."""
    from finequant.quantize.size import resources

    overrides = ["quantize.training={steps: 2}", "train.gradient_checkpointing=true"]
    recipe = load_recipe(recipe_file, [*overrides, "quantize.dtype=bfloat16"])
    one, eight = named_gpu("H100"), named_gpu("H100")._replace(gpus=8, sharded=True)
    block = components(LLAMA_3_70B)["mlp"] + components(LLAMA_3_70B)["attention"]
    table, block = components(LLAMA_3_70B)["embedding"], block // 80
    formed = 2 * max(block, table)  # in bfloat16, for the backward
    whole, share = (memory_of("qat", recipe, LLAMA_3_70B, on) for on in (one, eight))
    stored = whole["weights"] - formed
    gathered = 2 * (2 * block + 2 * table)
    assert share["weights"] == pytest.approx(stored / 8 + gathered + formed, rel=0.03)
    assert share["optimizer"] == whole["optimizer"] // 8
    assert whole["activations"] == share["activations"]
    monkeypatch.setattr(resources, "load_config", lambda _: LLAMA_3_70B)
    with pytest.raises(UserError, match="H100 has 80.00 GB: it fits with --launch fsdp"):
        refuse_what_cannot_finish(recipe, RunDir.of(recipe), ["qat"], eight._replace(sharded=False))


def test_all_stages_of_8b_can_be_made_to_fit_a_card_of_24_gb(recipe_file, monkeypatch):
    """With effort: best, whose trained scales need the whole model twice."""
    from finequant.quantize.size import resources

    step = ["train.batch_size=16", "data.max_length=1024", "quantize.effort=best"]
    recipe, card = load_recipe(recipe_file, step), named_gpu("4090")
    monkeypatch.setattr(resources, "load_config", lambda _: shape_of("8B"))
    stages = ["train", "quantize", "evaluate"]
    changes = resources.settings_that_fit(recipe, stages, card)
    assert changes["train.gradient_checkpointing"] is True
    assert changes["quantize.calibration.scale_steps"] == 0
    overrides = [f"{key}={str(value).lower()}" for key, value in changes.items()]
    smaller = load_recipe(recipe_file, step + overrides)
    for stage in stages:
        assert sum(memory_of(stage, smaller, shape_of("8B"), card).values()) <= card.memory
    assert resources.settings_that_fit(smaller, stages, card) == {}


def test_a_base_that_several_gpus_can_share_is_not_put_into_nf4(recipe_file, monkeypatch):
    from finequant.quantize.size import resources

    step = ["train.micro_batch_size=1", "train.gradient_checkpointing=true", "train.precision=bf16"]
    recipe = load_recipe(recipe_file, step)
    monkeypatch.setattr(resources, "load_config", lambda _: LLAMA_3_70B)
    one, eight = named_gpu("H100"), named_gpu("H100")._replace(gpus=8)
    assert resources.settings_that_fit(recipe, ["train"], one)["model.load"] == "nf4"
    assert resources.settings_that_fit(recipe, ["train"], eight) == {}


def test_cheaper_settings_predict_less_memory(recipe_file):
    recipe = load_recipe(recipe_file, ["data.max_length=4096", "train.micro_batch_size=8"])
    cpu = Machine("this machine", 10**12, "cpu")

    def total(stage: str, *overrides: str, machine: Machine = cpu) -> int:
        changed = load_recipe(
            recipe_file, ["data.max_length=4096", "train.micro_batch_size=8", *overrides]
        )
        return sum(memory_of(stage, changed, LLAMA_2_13B, machine).values())

    whole = total("train")
    assert whole == sum(memory_of("train", recipe, LLAMA_2_13B, cpu).values())
    assert total("train", "train.gradient_checkpointing=true") < 0.8 * whole
    assert total("train", "train.micro_batch_size=1") < 0.5 * whole
    assert total("train", "lora.rank=64") > whole
    aware = [[f"quantize.training={{steps: 2, distillation: {x}}}"] for x in (0, 1)]
    aware = [[*overrides, "quantize.dtype=bfloat16"] for overrides in aware]
    assert total("qat", *aware[0]) < total("qat", *aware[1])
    checkpointed = [*aware[0], "train.gradient_checkpointing=true"]
    assert total("qat", *checkpointed) < total("qat", *aware[0]) - 2 * 12e9  # formed weights
    assert total("quantize", *aware[0], "quantize.method=gptq") == total("quantize")
    assert total("quantize") < total("quantize", "quantize.budget=4.5")
    assert total("quantize") < total("quantize", "quantize.method=gptq")
    assert total("evaluate", "evaluate.batch_size=1") < total("evaluate")


def test_predicted_disk_is_what_the_files_take(recipe_file):
    from finequant.quantize.merge.adapter import open_base

    recipe = load_recipe(recipe_file, ["quantize.embedding=8"])
    base = open_base(recipe.model)
    plan = layer_plan(recipe.quantize, base.config)
    files = layout(stored_shapes(base.shapes, base.config, plan), plan, torch.float32)
    exact = sum(file.size for file in files)
    assert disk_of("quantize", recipe, base.config) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        (["quantize.method=gptq"], 1),
        (["quantize.budget=4.5"], 1),
        (["quantize.method=gptq", "quantize.calibration.scale_steps=2"], 16),
    ],
    ids=["gptq", "budget", "scales"],
)
def test_calibration_of_a_base_with_few_positions_reads_short_sequences(
    recipe_file, overrides, gpus
):
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": 64}, vocab_size=384)
    machine = Machine("a GPU", 10**9, "gpu", gpus)
    few = [*overrides, "quantize.calibration.tokens=64"]
    unset, set_to_64, set_to_256 = (
        memory_of("quantize", load_recipe(recipe_file, [*few, *length]), config, machine)
        for length in (
            [],
            ["quantize.calibration.length=64"],
            ["quantize.calibration.length=256"],
        )
    )
    assert unset == set_to_64
    assert unset != set_to_256


def test_the_cache_of_keys_and_values_is_counted():
    assert cache_bytes(LLAMA_3_70B, 1) == 2 * 80 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("1.5 GiB", 1610612736), ("512mb", 512 * 10**6)],
)
def test_sizes_are_parsed(text, size):
    assert bytes_of(text, "--gpu") == size


@pytest.mark.parametrize("text", ["", "six", "6", "6XB", "GB", "-1GB", "0GB", "0"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(UserError, match="--device-memory: .*: expected a number with"):
        bytes_of(text, "--device-memory")


def test_gpus_are_known_by_name_and_by_memory():
    for text in ("rtx 4090", "RTX-4090", "4090"):
        assert named_gpu(text) == Machine("RTX 4090", 24 * 10**9, "gpu")
    assert named_gpu("A100-40GB").memory == 40 * 10**9
    assert named_gpu("24GB") == Machine("24GB", 24 * 10**9, "gpu")
    assert named_gpu("T4").training_dtype("auto") == torch.float32
    assert named_gpu("H100").training_dtype("auto") == torch.bfloat16
    with pytest.raises(UserError, match="--gpu: 'H1000': expected one of T4, V100"):
        named_gpu("H1000")


def test_a_run_that_cannot_finish_is_refused_with_figures(recipe_file):
    recipe = load_recipe(recipe_file, ["train.micro_batch_size=8", "data.max_length=100000"])
    with pytest.raises(UserError) as error:
        refuse_what_cannot_finish(recipe, RunDir.of(recipe), ["train", "quantize"], SMALL)
    message = str(error.value)
    assert "train: " in message
    assert "for activations" in message
    assert "a small machine has 1.00 GB" in message
    assert "no setting makes it fit" in message
    assert "quantize:" not in message
    refuse_what_cannot_finish(recipe, RunDir.of(recipe), ["quantize"], SMALL)


def test_memory_depends_on_the_rows_lengths_not_on_the_recipes_limit(recipe_file):
    allowed = ["train.micro_batch_size=8", "data.max_length=100000"]
    recipe, run = load_recipe(recipe_file, allowed), RunDir.of(load_recipe(recipe_file))
    lengths = Lengths([54] * 40 + [200], scored=128, prompt=64)
    refuse_what_cannot_finish(recipe, run, ["train", "quantize", "evaluate"], SMALL, lengths)
    cpu, gpu = SMALL, SMALL._replace(kind="gpu")
    config = load_base(recipe.model, torch.float32, device_map="meta").config

    def activations(machine: Machine) -> int:
        return memory_of("train", recipe, config, machine, lengths)["activations"]

    # Rows lie end to end on a CPU; on a GPU all are padded to the longest.
    assert activations(gpu) / activations(cpu) == pytest.approx(8 * 200 / (200 + 7 * 54))
    packed = load_recipe(recipe_file, [*allowed, "data.packing=true"])
    whole = memory_of("train", packed, config, cpu)
    assert memory_of("train", packed, config, cpu, lengths) == whole


def test_no_more_tokens_are_compared_than_there_are(recipe_file):
    """divergence_tokens=1000000, to compare on all, was refused: 749 GB for 2,000 tokens."""
    from finequant.evaluate.inputs import prepare
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.model import load_tokenizer

    recipe = load_recipe(recipe_file, ["evaluate.divergence_tokens=100000000"])
    run, stages = RunDir.of(recipe), ["evaluate"]
    with pytest.raises(UserError, match="for logits.*a smaller evaluate.divergence_tokens, or"):
        refuse_what_cannot_finish(recipe, run, stages, SMALL)
    splits = load_splits(recipe.data, recipe.seed)
    lengths = prepare(recipe, splits, load_tokenizer(recipe.model)).lengths()
    refuse_what_cannot_finish(recipe, run, stages, SMALL, lengths)


@pytest.mark.parametrize(
    ("stage", "megabytes", "hint"),
    [
        ("train", 700, "it fits with train.micro_batch_size=4"),
        ("train", 650, "it fits with train.micro_batch_size=2"),
        ("evaluate", 820, "it fits with evaluate.batch_size=8"),
    ],
)
def test_the_refusal_names_a_setting_that_fits(recipe_file, stage, megabytes, hint):
    recipe = load_recipe(recipe_file, ["train.micro_batch_size=8"])
    run, machine = RunDir.of(recipe), Machine("a machine", megabytes * 10**6, "cpu")
    lengths = Lengths([1000] * 48, scored=2000, prompt=1000)
    with pytest.raises(UserError, match=hint):
        refuse_what_cannot_finish(recipe, run, [stage], machine, lengths)
    smaller = load_recipe(recipe_file, [hint.split()[-1]])
    refuse_what_cannot_finish(smaller, run, [stage], machine, lengths)


def test_exports_take_memory_of_the_host(plan, recipe_file, monkeypatch):
    """Before, an export of a large model was killed after the training, without a word."""
    from finequant.quantize.size import machine

    shown = plan(LLAMA_3_70B, "quantize.exports=[gguf, mlx]", "--gpu", "H100")
    of_gpu, exports = shown.split("peak memory of exports, on the CPU; this machine has ")
    assert "gguf:" not in of_gpu.split("peak memory on H100")[1]
    lines = exports.splitlines()[1:3]
    assert [line.split(":")[0].strip() for line in lines] == ["gguf", "mlx"]
    assert all("does not fit: remove it from quantize.exports, and" in line for line in lines)

    recipe, gpu = load_recipe(recipe_file), Machine("a GPU", 80 * 10**9, "gpu")
    run, stages = RunDir.of(recipe), ["quantize", "gguf", "onnx"]
    refuse_what_cannot_finish(recipe, run, stages, gpu)
    monkeypatch.setattr(machine, "total_memory", lambda: 5 * 10**8)
    with pytest.raises(
        UserError, match=r"cannot finish here:\n  gguf: .* this machine has 0.50 GB"
    ):
        refuse_what_cannot_finish(recipe, run, stages, gpu)
    recipe = load_recipe(recipe_file, ["quantize.exports=[torchao, gguf]"])
    assert settings_that_fit(recipe, ["quantize", "gguf"], gpu) == {"quantize.exports": ["torchao"]}


def test_too_little_disk_is_refused(recipe_file, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    recipe = load_recipe(recipe_file)
    with pytest.raises(UserError, match="disk: .* needs .*; 0.0 MB is free"):
        refuse_what_cannot_finish(recipe, RunDir.of(recipe), ["quantize"], SMALL)


def test_disk_includes_the_exports(plan, recipe_file, monkeypatch):
    exports = "quantize.exports=[gguf, mlx]"
    shown = [plan(LLAMA_3_70B, *more) for more in ([], [exports])]
    plain, whole = (float(re.search(r"disk: ([0-9.]+) GB", text)[1]) for text in shown)
    # 70.6 billion weights: 4.5 bits each in GGUF, 5 in MLX, 16 in the embedding
    assert 82 < whole - plain < 92

    recipe, stages = load_recipe(recipe_file), ["train", "quantize", "evaluate"]
    config = load_base(recipe.model, torch.float32).config
    needed = sum(disk_of(stage, recipe, config) for stage in stages)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    refuse_what_cannot_finish(recipe, RunDir.of(recipe), stages, SMALL)
    assert "this run cannot finish here" in refused(main, ["run", str(recipe_file), exports])


def test_disk_includes_the_cache_of_a_gguf_base_until_it_exists(recipe_file, monkeypatch, capsys):
    from finequant.finetune.model import load_config
    from finequant.quantize.size import estimate, resources
    from finequant.recipes.schema import Model

    recipe = load_recipe(recipe_file)
    config, model = load_config(recipe.model), Model(base="package:some_wheel/model.gguf")
    for there, size in ((False, 4 * parameter_count(config)), (True, 0)):
        monkeypatch.setattr(estimate, "is_dequantized", lambda _, there=there: there)
        assert estimate.dequantized_bytes(model, config) == size
    assert estimate.dequantized_bytes(recipe.model, config) == 0

    run, cache = RunDir.of(recipe), resources.cache_folder()
    monkeypatch.setattr(resources, "dequantized_bytes", lambda *_: 10**7)
    without = disk_of("train", recipe, config)
    for one_disk, needed in ((True, {run.root: without + 10**7}), (False, {cache: 10**7})):
        monkeypatch.setattr(resources, "on_one_disk", lambda *_, one_disk=one_disk: one_disk)
        assert resources._disk(recipe, run, config, ["train"]) == {run.root: without} | needed


@pytest.mark.parametrize(
    ("groups", "folder"),
    [
        ("0::/\n", ""),
        ("0::/../../slice\n", ""),
        ("4:cpu:/job\n0::/slurm/job 7\n", "slurm"),
        ("4:cpu,memory:/docker/1f\n0::/\n", "memory"),
        ("4:memory:/slurm/job\n", "memory/slurm/job"),
    ],
)
def test_memory_is_that_of_the_container_or_job(monkeypatch, tmp_path, groups, folder):
    monkeypatch.setattr(usage, "CGROUP", tmp_path)
    monkeypatch.setattr(usage, "OWN_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "groups").write_text(groups)
    _, limit, usage_ = usage.CGROUPS["memory" if folder.startswith("memory") else ""]
    file, used = tmp_path / folder / limit, tmp_path / folder / usage_
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("123456789\n")
    assert machines.this_machine().memory == 123456789
    used.write_text("100000000\n")
    assert usage.available_memory() == 23456789
    statistics = used.with_name("memory.stat")
    statistics.write_text("active_file 5\ninactive_file 1000000\n")
    assert usage.available_memory() == 24456789  # the kernel can reclaim cached pages
    statistics.write_text("inactive_file 1000000\ntotal_inactive_file 2000000\n")
    assert usage.available_memory() == 25456789  # with those of the groups inside
    used.write_text("200000000\n")
    assert usage.available_memory() == 0
    for unlimited in ("max\n", "9223372036854771712\n"):
        file.write_text(unlimited)
        assert machines.this_machine().memory > 200000000
        assert usage.available_memory() > 0


def test_a_checkpoint_is_reloaded_as_far_as_the_container_has_room(monkeypatch, tmp_path):
    from finequant.quantize.checkpoint.reload import PROCESS_BYTES, blocks_that_fit

    (tmp_path / "model.safetensors").write_bytes(bytes(10**6))
    checkpoint = SimpleNamespace(shapes={"": (10,)}, dtype=torch.float32, folder=tmp_path)
    config = SimpleNamespace(num_hidden_layers=8)
    monkeypatch.setattr(usage, "CGROUP", tmp_path)
    monkeypatch.setattr(usage, "OWN_CGROUPS", tmp_path / "none")
    for room, blocks in ((2 * 10**6, 8), (5 * 10**5, 3), (10**4, 1)):
        (tmp_path / "memory.max").write_text(str(PROCESS_BYTES + room))
        (tmp_path / "memory.current").write_text("0")
        assert blocks_that_fit(checkpoint, config) == blocks


@pytest.mark.parametrize(
    ("returned", "last", "code", "reason"),
    [
        (-9, "no such layer", 1, "it was killed, perhaps out of memory"),
        (-6, "no such layer", 1, r"it was aborted by a library \(SIGABRT\)"),
        (1, "No space left on device (os error 28)", 1, "no space left on the disk: free some"),
        (1, "no such layer", 2, "no such layer"),
    ],
)
def test_a_reload_that_fails_says_why(monkeypatch, tmp_path, returned, last, code, reason):
    """Only what the user can change in the recipe or the files is bad input, with exit code 2."""
    from finequant.quantize.checkpoint import reload

    ended = subprocess.CompletedProcess([], returned, stderr=f"a warning\n{last}\n")
    monkeypatch.setattr(reload, "subprocess", SimpleNamespace(run=lambda *_, **__: ended))
    with pytest.raises(UserError) as caught:
        reload.check_reload(torch.zeros(1, 1), tmp_path, [[1]], 1)
    assert re.search(f"from_pretrained fails in a fresh process: {reason}", str(caught.value))
    assert caught.value.code == code


def test_run_stops_before_the_first_stage_unless_forced(recipe_file, tmp_path):
    """A recipe that needs petabytes ends with exit code 2 and figures, and writes no artifact."""
    huge = ["data.max_length=100000000", "data.packing=true", "train.batch_size=64"]
    said = refused(main, ["run", str(recipe_file), *huge])
    assert "error: this run cannot finish here" in said
    assert "--force starts anyway" in said
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"data", ".lock"}
    said = refused(main, ["run", str(recipe_file), *huge, "--force", "data.train=nowhere.jsonl"])
    assert "cannot finish" not in said
    assert "nowhere.jsonl" in said


def shape_of(size: str) -> LlamaConfig:
    """Returns the shape of Llama-3.2-1B or Llama-3.1-8B."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "tie_word_embeddings")
    shape = {"1B": (2048, 8192, 16, True), "8B": (4096, 14336, 32, False)}[size]
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    return LlamaConfig(
        **dict(zip(keys, shape, strict=True)),
        **heads,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


@pytest.mark.parametrize(
    ("override", "measured"),
    [
        ("train.gradient_checkpointing=true", {"1B": 4.7e9, "8B": 21.6e9}),
        ("train.kernels=plain", {"1B": 18.6e9, "8B": 74.8e9}),
        ("train.kernels=liger", {"1B": 13.1e9, "8B": 53.9e9}),
    ],
)
def test_predicted_training_memory_is_what_a_gpu_measured(recipe_file, override, measured):
    """Measured on an H200, without CUDA's context: docs/speed.md. The first two are plain trl."""
    step = ["train.micro_batch_size=2", "data.max_length=4096", "lora.rank=16"]
    recipe = load_recipe(
        recipe_file, ["train.kernels=plain", "train.precision=bf16", *step, override]
    )
    for size, memory in measured.items():
        predicted = memory_of("train", recipe, shape_of(size), named_gpu("H200"))
        total = sum(predicted.values()) - predicted["process"] - predicted["allocator"]
        assert total == pytest.approx(memory, rel=0.1)


def test_predicted_gptq_memory_is_what_a_gpu_measured(recipe_file):
    """Measured on an H200, without CUDA's context: docs/speed.md, 16,384 tokens."""
    overrides = ["quantize.method=gptq", "quantize.calibration={tokens: 16384}"]
    recipe = load_recipe(recipe_file, [*overrides, "quantize.dtype=bfloat16"])
    for size, measured in (("1B", 1.7e9), ("8B", 5.1e9)):
        config = shape_of(size)
        memory = memory_of("quantize", recipe, config, named_gpu("H200"))
        assert sum(memory.values()) - memory["process"] == pytest.approx(measured, rel=0.1)
        shared = memory_of("quantize", recipe, config, named_gpu("H200")._replace(gpus=4))
        assert shared["activations"] == memory["activations"] // 4


def test_the_teachers_states_are_those_of_half_the_steps(recipe_file):
    """States are kept only while their text will come again: at worst, each text comes twice."""
    steps = "quantize={effort: best, calibration: {scale_steps: 100}}"
    config = shape_of("8B")
    memory = memory_of("quantize", load_recipe(recipe_file, [steps]), config, named_gpu("H200"))
    assert memory["teacher's states"] == 50 * 1024 * config.hidden_size * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "calibration", "blocks"),
    [
        ("rtn", "{tokens: 1024, length: 64}", 2),
        ("gptq", "{tokens: 1024, length: 64}", 2),
        ("gptq", "{tokens: 1024, length: 64, scale_steps: 2}", 6),
    ],
)
def test_predicted_memory_is_what_a_merge_takes(
    recipe_file, llama, train_once, method, calibration, blocks
):
    """The model is large compared with the process, and the process that reloads counts."""
    from finequant.finetune.model import load_config
    from finequant.quantize.size.machine import this_machine

    width = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16}
    base = llama("wide", num_hidden_layers=blocks, **width)
    overrides = [
        f"model.base={base}",
        "train.max_steps=1",
        f"quantize.method={method}",
        f"quantize.calibration={calibration}",
    ]
    train_once([str(recipe_file), *overrides])
    command = [sys.executable, "-m", "finequant.quantize.convert", str(recipe_file), *overrides]
    together = peak_of_family(command)
    recipe = load_recipe(recipe_file, overrides)
    manifest = json.loads((recipe_file.parent / "run" / "manifest.json").read_text())
    predicted = memory_of("quantize", recipe, load_config(recipe.model), this_machine())
    measured = max(together, manifest["quantize"]["peak_memory_bytes"])
    assert sum(predicted.values()) == pytest.approx(measured, rel=0.15)


def peak_of_family(command: list[str]) -> int:
    """Runs a command and returns the most bytes that it and its children took together, at the
    moments looked at; what several of them map is counted once."""
    process, peak = psutil.Popen(command), 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_full_info().pss for member in family))
        time.sleep(0.05)
    assert process.returncode == 0
    return peak
