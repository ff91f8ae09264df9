"""finetune/train.py: the same recipe gives the same adapter, however it is run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file


def train(recipe: Path, *overrides: str) -> Path:
    """Trains in this process, and returns the adapter's folder."""
    from finequant.finetune.train import main

    main([str(recipe), *overrides])
    folder = [text.partition("=")[2] for text in overrides if text.startswith("output_dir=")]
    return Path(folder[-1] if folder else recipe.parent / "run") / "adapter"


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(((one[k] - other[k]).norm() / one[k].norm()).item() for k in one)


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(recipe_file, tmp_path):
    first = train(recipe_file, f"output_dir={tmp_path / 'a'}")
    second = train(recipe_file, f"output_dir={tmp_path / 'b'}")
    other = train(recipe_file, f"output_dir={tmp_path / 'c'}", "seed=8")
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / name).read_bytes() != (other / name).read_bytes()
    assert (first / "recipe.yaml").read_bytes() == (second / "recipe.yaml").read_bytes()


def test_training_lowers_the_loss_and_logs_it(recipe_file):
    adapter = train(recipe_file, "train.epochs=6", "train.learning_rate=1e-2")
    log = json.loads((adapter / "training_log.json").read_text())
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2
    assert {path.name for path in adapter.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "recipe.yaml",
        "tokenizer.json",
    }
    manifest = json.loads((adapter.parent / "manifest.json").read_text())["train"]
    assert 0 < manifest["tokens_per_second"] * log[-1]["train_runtime"] < 30_000
    assert not [path for path in adapter.rglob("*") if path.suffix in {".bin", ".pt", ".pth"}]


def test_the_evaluation_loss_is_the_mean_over_tokens(recipe_file, monkeypatch):
    """It equals peft and transformers, row by row, whatever the batches, and however many
    tokens have their logits in memory at a time."""
    from conftest import write_jsonl
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finequant.finetune import trainer as trainers
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.data.tokens import encode
    from finequant.finetune.model import load_tokenizer
    from finequant.recipes.load import load_recipe

    rows = [{"prompt": f"say {n}", "completion": "again " * n} for n in (1, 40, 2, 3, 30)]
    write_jsonl(recipe_file.parent / "validation.jsonl", rows)
    monkeypatch.setattr(trainers, "TARGETS_AT_ONCE", 7)
    overrides = ["train.micro_batch_size=2", "train.learning_rate=1e-2"]
    adapter = train(recipe_file, *overrides)
    log = json.loads((adapter / "training_log.json").read_text())
    (found,) = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    recipe = load_recipe(recipe_file, overrides)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.base)
    model, losses = PeftModel.from_pretrained(base, adapter).eval(), []
    for row in load_splits(recipe.data, recipe.seed).validation:
        encoded = encode(row, load_tokenizer(recipe.model), recipe.data)
        ids, labels = torch.tensor([encoded.input_ids]), torch.tensor(encoded.labels)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
        losses.append(each[labels[1:] != -100])
    batches = [torch.cat(losses[first : first + 2]).mean() for first in (0, 2, 4)]
    assert found == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert found != pytest.approx(torch.stack(batches).mean().item(), rel=2e-4)


def test_a_killed_run_resumes_to_the_same_adapter(recipe_file, capsys):
    steps = ["train.max_steps=6", "train.save_steps=2", "train.save_total_limit=9"]
    adapter = train(recipe_file, *steps)
    undisturbed = (adapter / "adapter_model.safetensors").read_bytes()
    # What a kill after step 3 leaves behind.
    shutil.rmtree(adapter)
    for name in ("checkpoint-4", "checkpoint-6", "plain"):
        shutil.rmtree(adapter.parent / "checkpoints" / name)
    (adapter.parent / "manifest.json").unlink()
    capsys.readouterr()
    train(recipe_file, *steps)
    assert "continuing from" in capsys.readouterr().err
    assert (adapter / "adapter_model.safetensors").read_bytes() == undisturbed


def test_another_micro_batch_resumes_from_the_last_checkpoint(recipe_file, tmp_path, capsys):
    """This is the advice to a user who runs out of memory."""
    steps = ["train.max_steps=6", "train.save_steps=2", "train.save_total_limit=9"]
    adapter = train(recipe_file, *steps)
    undisturbed = weights(adapter)
    shutil.rmtree(adapter)
    for name in ("checkpoint-4", "checkpoint-6", "plain"):
        shutil.rmtree(adapter.parent / "checkpoints" / name)
    (adapter.parent / "manifest.json").unlink()
    capsys.readouterr()
    smaller = ["train.micro_batch_size=1", "train.gradient_checkpointing=true"]
    train(recipe_file, *steps, *smaller, "train.logging_steps=1")
    assert "continuing from" in capsys.readouterr().err
    assert relative_difference(undisturbed, weights(adapter)) < 1e-6


def test_the_status_line_shows_the_loss_of_the_newest_step(recipe_file, monkeypatch):
    """This holds where the log has only the first, as in nine steps with train.logging_steps=10."""
    from finequant.recipes.terminal import Progress

    shown = []

    def show(_self, _done, figures="", further=0.0):
        shown.append(figures)

    monkeypatch.setattr(Progress, "show", show)
    adapter = train(recipe_file, "train.max_steps=4", "train.learning_rate=1e-2")
    losses = [re.match(r", loss (\d\.\d{3}), ", figures) for figures in shown]
    first, *others = [float(match[1]) for match in losses if match]
    log = json.loads((adapter / "training_log.json").read_text(encoding="utf-8"))
    logged = [entry["loss"] for entry in log if "loss" in entry]
    assert first == pytest.approx(logged[0], abs=1e-3)
    assert others == sorted(set(others), reverse=True)
    assert len(others) == 3


def test_evaluations_without_validation_rows_are_named(recipe_file, capsys):
    none = ["data.validation=[]", "data.validation_fraction=0.0"]
    train(recipe_file, "train.max_steps=1", "train.eval_steps=1", *none)
    assert "train.eval_steps has no effect, as there are no validation" in capsys.readouterr().err


def test_checkpoints_of_another_recipe_are_not_resumed(recipe_file, capsys):
    train(recipe_file, "train.max_steps=2", "train.save_steps=1")
    adapter = train(recipe_file, "train.max_steps=2", "train.save_steps=1", "lora.rank=8")
    said = capsys.readouterr()
    assert "made with other inputs" in said.err
    assert "continuing from" not in said.err
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 8
    kept = adapter.parent / "previous" / "adapter-1" / "adapter_config.json"
    assert json.loads(kept.read_text())["r"] == 4


def test_checkpoints_of_an_unfinished_training_are_kept(recipe_file, capsys):
    adapter = train(recipe_file, "train.max_steps=2", "train.save_steps=1")
    (adapter.parent / "manifest.json").unlink()
    train(recipe_file, "train.max_steps=2", "train.save_steps=1", "lora.rank=8")
    kept = adapter.parent / "previous" / "checkpoints-1"
    assert f"kept the earlier checkpoints as {kept}" in capsys.readouterr().err
    assert (kept / "checkpoint-2" / "optimizer.pt").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.use_rslora=true"],
        ["lora.use_dora=true"],
        ["lora.init_lora_weights=gaussian"],
        ["lora.init_lora_weights=orthogonal"],
        ["lora.init_lora_weights=olora"],
        ["lora.init_lora_weights=pissa"],
        ["lora.init_lora_weights=pissa_niter_4"],
        ["lora.target_modules=[q_proj, v_proj]", "lora.dropout=0.1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_kind_of_adapter_fits_the_unchanged_base(recipe_file, tiny_base, overrides):
    """The trained model, base + saved adapter, and the merged model give the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finequant.quantize.merge.model import merged_model
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    fast = ["train.learning_rate=1e-2", *overrides]
    adapter = train(recipe_file, *fast)
    recipe = load_recipe(recipe_file, fast)
    prompt = torch.tensor([[5, 6, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    untouched = base(prompt).logits
    tuned = PeftModel.from_pretrained(base, adapter)(prompt).logits
    merged = merged_model(recipe, RunDir(adapter.parent), torch.float32)
    difference = (merged(prompt).logits - tuned).abs().max() / tuned.abs().max()
    assert not torch.allclose(tuned, untouched, atol=1e-3)
    assert difference < 1e-5
    log = json.loads((adapter / "training_log.json").read_text())
    expected = [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    assert evaluation_loss(merged, recipe) == pytest.approx(expected, rel=1e-3)


def evaluation_loss(model: torch.nn.Module, recipe) -> float:
    """Computes the mean loss of the validation target tokens, without the trainer."""
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.data.tokens import encode
    from finequant.finetune.model import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)
    total = count = 0
    for row in load_splits(recipe.data, recipe.seed).validation:
        encoded = encode(row, tokenizer, recipe.data)
        logits = model(torch.tensor([encoded.input_ids])).logits[0, :-1]
        labels = torch.tensor(encoded.labels)[1:]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


@pytest.mark.slow
def test_accumulation_and_checkpointing_do_not_change_the_result(recipe_file, tmp_path):
    whole = train(recipe_file, "train.micro_batch_size=8", f"output_dir={tmp_path / 'a'}")
    parts = train(recipe_file, "train.micro_batch_size=2", f"output_dir={tmp_path / 'b'}")
    saved = train(
        recipe_file,
        "train.micro_batch_size=8",
        "train.gradient_checkpointing=true",
        f"output_dir={tmp_path / 'c'}",
    )
    assert relative_difference(weights(whole), weights(parts)) < 1e-3
    assert relative_difference(weights(whole), weights(saved)) < 1e-3


@pytest.mark.slow
def test_early_stopping_keeps_the_best_checkpoint(recipe_file):
    adapter = train(
        recipe_file,
        "train.learning_rate=10.0",  # diverges
        "train.schedule=constant",
        "train.epochs=8",
        "train.eval_steps=3",
        "train.save_steps=3",
        "train.early_stopping_patience=1",
    )
    log = json.loads((adapter / "training_log.json").read_text())
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) < 16
    from finequant.quantize.merge.model import merged_model
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    recipe = load_recipe(recipe_file)
    merged = merged_model(recipe, RunDir(adapter.parent), torch.float32)
    assert evaluation_loss(merged, recipe) == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.slow
def test_schedules_are_followed_and_tensorboard_is_written(recipe_file, tmp_path, monkeypatch):
    rates = {}
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    for schedule in ("cosine", "linear", "constant"):
        adapter = train(
            recipe_file,
            f"train.schedule={schedule}",
            "train.warmup=0.5",
            "train.logging_steps=1",
            "train.report_to=[tensorboard]",
            f"output_dir={tmp_path / schedule}",
        )
        log = json.loads((adapter / "training_log.json").read_text())
        rates[schedule] = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    for values in rates.values():
        assert len(values) == 6
        assert values[0] == 0
    assert rates["linear"][-1] < 1e-3
    assert rates["cosine"] != rates["linear"]
    assert rates["constant"][-1] == pytest.approx(1e-3)
    assert list((tmp_path / "tb").rglob("events.out.tfevents.*"))


def test_bf16_is_used_and_reported_where_the_hardware_has_it(recipe_file, capsys):
    train(recipe_file, "train.precision=auto", "train.max_steps=1")
    said = capsys.readouterr().err
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not torch.accelerator.is_available():
        assert ("train: bfloat16, this CPU computes in bf16" in said) == native
    adapter = train(recipe_file, "train.precision=bf16", "train.max_steps=1")
    assert {tensor.dtype for tensor in weights(adapter).values()} == {torch.float32}


def test_a_batch_that_processes_cannot_share_is_refused(recipe_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "train.batch_size: 8 rows cannot be shared by 3 processes" in refused(train, recipe_file)


def test_an_unsupported_launch_is_refused(recipe_file, monkeypatch):
    """The refusal precedes loading the base; libraries would ignore the first, or refuse late."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    split = "error: train: FSDP splits weights over GPUs, but training runs on the CPU here: "
    assert split in refused(train, recipe_file)
    monkeypatch.undo()
    monkeypatch.setattr("finequant.finetune.arguments.trains_on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    said = refused(train, recipe_file)
    assert "error: train: 2 GPUs are visible to one process: " in said
    assert "--launch recipes/accelerate/several_gpus.yaml" in said
    assert "CUDA_VISIBLE_DEVICES=0" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.report_to=[wandb]", "train.report_to: not installed: wandb; pip install wandb"),
        ("train.optimizer=adamz", "adamz"),
        ("lora.target_modules=[q_prj]", "the model has no linear layer q_prj"),
    ],
)
def test_the_libraries_refusals_are_one_message(recipe_file, override, message):
    assert message in refused(train, recipe_file, override)


@pytest.mark.parametrize("name", ["galore_adamw", "grokadamw"])
def test_an_absent_optimizer_is_refused_before_the_base_is_loaded(recipe_file, monkeypatch, name):
    monkeypatch.setattr("finequant.finetune.nf4.load_trained_base", None)
    message = refused(train, recipe_file, f"train.optimizer={name}")
    assert f"error: train.optimizer: {name}: " in message
    assert "install" in message


@pytest.mark.parametrize("start", ["olora", "pissa", "pissa_niter_4"])
def test_a_rank_that_a_weight_does_not_have_is_refused(recipe_file, start):
    """peft fails, or makes matrices of another rank than it says, which cannot be merged."""
    overrides = [f"lora.init_lora_weights={start}", "lora.target_modules=[q_proj, k_proj]"]
    assert (
        f"error: lora.rank: 33 is too large for lora.init_lora_weights={start}, which starts from "
        "the factors of each weight: model.layers.0.self_attn.k_proj is 32 x 64: use a rank of at "
        "most 32, or lora.init_lora_weights=default"
    ) in refused(train, recipe_file, "lora.rank=33", *overrides)
    train(recipe_file, "lora.rank=32", "train.max_steps=1", *overrides)
