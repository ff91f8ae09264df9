"""Quantization-aware LoRA: what is trained is what is converted, saved and loaded again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

AWARE = (
    "train.quantization_aware=true",
    "quantize.method=gptq",
    "quantize.scale=search",
    "quantize.calibration={tokens: 256, length: 32}",
    "train.learning_rate=1e-2",
    "train.max_steps=6",
)


@pytest.fixture
def aware(recipe_file, monkeypatch):
    """Trains, and returns the run folder, the trainer as training left it, and the first codes."""
    from finequant.finetune import train as stage
    from finequant.finetune import trainer as trainers
    from finequant.quantize.training import fake_quantize as quantization_aware

    kept = {}
    build, begin = trainers.build_trainer, quantization_aware.round_in_training

    def build_trainer(*arguments):
        kept["trainer"] = build(*arguments)
        return kept["trainer"]

    def round_in_training(model, start, *others):
        kept["start"] = start
        return begin(model, start, *others)

    monkeypatch.setattr(trainers, "build_trainer", build_trainer)
    monkeypatch.setattr(quantization_aware, "round_in_training", round_in_training)

    def run(*overrides: str):
        stage.main([str(recipe_file), *AWARE, *overrides])
        return recipe_file.parent / "run", kept["trainer"], kept["start"]

    return run


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize(
    "variant",
    [
        ["lora.use_rslora=true"],
        ["quantize.head=float"],
        ["quantize.embedding=4"],
        ["train.quantization_aware.steps=3"],
        ["train.quantization_aware.steps=3", "quantize.rotate=true"],
        ["train.quantization_aware.steps=3", "quantize.layers={'*.v_proj': float}"],
        ["train.quantization_aware={steps: 3, learns: scales}"],
        ["train.quantization_aware={steps: 3, learns: scales}", "quantize.scale_dtype=bfloat16"],
        ["quantize.layers={'*.down_proj': {bits: 7}, 'model.layers.0.*': {bits: 2}}"],
    ],
)
def test_training_forward_converted_and_reloaded_are_equal(aware, recipe_file, precision, variant):
    from transformers import AutoModelForCausalLM

    from finequant.quantize.convert import main as convert

    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    overrides = (f"train.precision={precision}", f"quantize.dtype={dtype}", *variant)
    run, trainer, _ = aware(*overrides)
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    trainer.model.set_attn_implementation("sdpa")  # that of from_pretrained, to the last bit
    with torch.no_grad(), trainer.compute_loss_context_manager():
        trained = trainer.model.eval()(prompt).logits
    convert([str(recipe_file), *AWARE, *overrides])
    quantized = AutoModelForCausalLM.from_pretrained(run / "quantized")
    with torch.no_grad():
        assert torch.equal(quantized(prompt).logits.float(), trained.float())
    assert "then trained" in json.loads((run / "quantized/quantization.json").read_text())["method"]


def test_the_first_forward_is_the_calibrated_model_and_training_leaves_it(aware):
    run, trainer, start = aware()
    ended = load_file(run / "adapter" / "rounded.safetensors")
    moved = [
        (ended[f"{name}.codes"] != rounded.codes).float().mean().item()
        for name, rounded in start.items()
        if name != "lm_head"
    ]
    assert min(moved) > 0
    assert torch.equal(ended["lm_head.codes"], start["lm_head"].codes)
    for name, rounded in start.items():
        assert torch.equal(ended[f"{name}.scale"], rounded.scale)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    model = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
    for name, rounded in start.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.rounded().codes, rounded.codes)
        weight = layer.rounded_weight()
        assert torch.equal(weight, rounded.dequantize(weight.dtype))


def test_gradients_are_those_of_the_merged_weight():
    """Against autograd through a weight that is formed in full, where rounding changes nothing."""
    from finequant.quantize.rounding import quantize_activations
    from finequant.quantize.training.fake_quantize import _StraightThrough

    torch.manual_seed(0)
    x, a, b = torch.randn(3, 5, 8), torch.randn(2, 8), torch.randn(6, 2)
    weight = torch.randn(6, 8)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    rounded = quantize_activations(x.detach())
    through = x + (rounded - x).detach()
    exact = through @ (weight + 0.5 * (b @ a - (b @ a).detach())).T
    (exact * torch.arange(6.0)).sum().backward()
    expected = [tensor.grad.clone() for tensor in leaves]
    for tensor in leaves:
        tensor.grad = None
    ours = _StraightThrough.apply(x, a, b, weight, 0.5)
    assert torch.equal(ours, exact)
    (ours * torch.arange(6.0)).sum().backward()
    for tensor, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-4, atol=1e-4)


AFTER = ("train.quantization_aware={steps: 4, distillation: 0.5}", "train.save_steps=2")


def test_after_plain_lora_the_adapter_is_that_of_plain_lora(aware, recipe_file):
    from finequant.finetune.train import main as train

    run, *_ = aware(*AFTER)
    log = json.loads((run / "adapter" / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "train_loss" in entry] == [6, 10]
    tuned = load_file(run / "adapter" / "adapter_model.safetensors")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["train"]["steps"] == 10
    train([str(recipe_file), *AWARE, "train.quantization_aware=false"])
    assert not (run / "adapter" / "rounded.safetensors").exists()
    plain = load_file(run / "adapter" / "adapter_model.safetensors")
    assert plain.keys() == tuned.keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in tuned.items())


def test_the_loss_is_the_divergence_of_what_ships_from_the_tuned_model(aware, recipe_file):
    """By hand, from the merged adapter and the converted checkpoint, on the learned tokens."""
    from transformers import AutoModelForCausalLM

    from finequant.quantize.convert import main as convert
    from finequant.quantize.merge.adapter import merge
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    overrides = [
        *AWARE,
        "train.quantization_aware={steps: 4, distillation: 1.0}",
        "quantize.dtype=float32",
        "quantize.bits=2",
    ]
    run, trainer, _ = aware(*overrides)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.train(), dict(batch)).item()
    convert([str(recipe_file), *overrides])
    tuned, _ = merge(load_recipe(recipe_file, overrides), RunDir(run), [[5, 6]])
    quantized = AutoModelForCausalLM.from_pretrained(run / "quantized")
    far, bounds = [], batch["cu_seq_lens_q"][1:-1].long()
    for row in batch["input_ids"][0].tensor_split(bounds):
        with torch.no_grad():
            exact, rounded = (
                model(row[None]).logits[0, :-1].log_softmax(-1) for model in (tuned, quantized)
            )
        far.append((exact.exp() * (exact - rounded)).sum(-1))
    learned = [row[1:] != -100 for row in batch["labels"][0].tensor_split(bounds)]
    far, learned = torch.cat(far), torch.cat(learned)
    assert 0 < learned.sum() < len(far)
    assert loss == pytest.approx(far[learned].mean().item(), rel=1e-3)


def test_where_scales_learn_the_codes_stay(aware):
    run, trainer, start = aware(*AFTER, "train.quantization_aware.learns=scales")
    for name, layer in zip(start, trainer.rounded_layers, strict=True):
        before, after = start[name], layer.rounded()
        assert torch.equal(before.codes, after.codes)
        assert not torch.equal(before.scale, after.scale)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(start)


def test_the_gradient_of_the_scales_is_that_of_autograd(aware):
    """Of the same product, with the rounding of the activations passed by."""
    from torch.nn.functional import linear

    from finequant.quantize.rounding import quantize_activations

    _, trainer, _ = aware(*AFTER, "train.quantization_aware.learns=scales", "train.precision=fp32")
    layer = trainer.rounded_layers[0]
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    growth = layer.growth
    growth.grad = None
    layer(x).square().sum().backward()
    found, of_x = growth.grad.clone(), x.grad.clone()
    codes, scale = layer.rounded().codes.float(), layer._scale.float()
    growth.grad = x.grad = None
    weight = codes.unflatten(1, (scale.shape[1], -1)) * (scale * (1 + growth))[:, :, None]
    rounded = x + (quantize_activations(x.detach()) - x.detach())
    linear(rounded, weight.flatten(1)).square().sum().backward()
    torch.testing.assert_close(found, growth.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_x, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learns", ["adapter", "scales"])
@pytest.mark.parametrize("phase", ["plain", "rounded"])
def test_resumed_is_uninterrupted(aware, phase, learns):
    learns = f"train.quantization_aware.learns={learns}"
    whole, *_ = aware(*AFTER, learns)
    expected = {path.name: load_file(path) for path in (whole / "adapter").glob("*.safetensors")}
    assert len(expected) == 2
    checkpoints = whole / "checkpoints"
    shutil.rmtree(checkpoints / "quantization_aware" / "rounded")
    shutil.rmtree(checkpoints / "quantization_aware" / "checkpoint-4")
    if phase == "plain":  # as a kill in the first phase leaves it
        shutil.rmtree(checkpoints / "plain")
        shutil.rmtree(checkpoints / "quantization_aware")
        shutil.rmtree(checkpoints / "checkpoint-6")
    resumed, *_ = aware(*AFTER, learns)
    for path in (resumed / "adapter").glob("*.safetensors"):
        found = load_file(path)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected[path.name].items())


def test_what_did_not_change_is_not_done_again(aware, capsys):
    """Another second phase: neither plain LoRA nor, with the same scheme, the calibration."""
    run, *_ = aware(*AFTER, "train.quantization_aware.distillation=0.25")
    expected = {path.name: path.read_bytes() for path in (run / "adapter").glob("*.safetensors")}
    shutil.rmtree(run)
    aware(*AFTER, "quantize.bits=3")
    for overrides, calibrates in (
        ([], True),
        (["train.quantization_aware.distillation=0.25"], False),
    ):
        capsys.readouterr()
        aware(*AFTER, *overrides)
        said = capsys.readouterr().err
        assert "plain LoRA was done before" in said
        assert ("rounding the weights by gptq" in said) == calibrates
        assert "quantization_aware was made with other inputs: removed" in said
    assert len(expected) == 2
    for name, content in expected.items():
        assert (run / "adapter" / name).read_bytes() == content
    assert len(list((run / "checkpoints").glob("start-*"))) == 1


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("lora.dropout=0.1", "lora.dropout"),
        ("lora.use_dora=true", "lora.use_dora"),
        ("lora.init_lora_weights=pissa", "lora.init_lora_weights=pissa"),
        ("quantize.budget=5", "quantize.budget"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(recipe_file, capsys, override, reason):
    from finequant.finetune.train import main as train

    with pytest.raises(SystemExit) as exit_:
        train([str(recipe_file), *AWARE, override])
    assert exit_.value.code == 2
    assert f"train.quantization_aware cannot be combined with {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        "quantize.rotate=true",
        "train.quantization_aware={learns: scales}",
        "train.quantization_aware={distillation: 0.5}",
    ],
)
def test_what_needs_a_tuned_model_is_refused_from_the_start(recipe_file, capsys, override):
    from finequant.finetune.train import main as train

    with pytest.raises(SystemExit) as exit_:
        train([str(recipe_file), *AWARE, override])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert override.partition("=")[0] in said
    assert "give train.quantization_aware.steps, to come after" in " ".join(said.split())


@pytest.mark.parametrize("launcher", ["FSDP", "DEEPSPEED"])
def test_split_weights_are_refused_before_anything_is_trained(
    recipe_file, monkeypatch, capsys, launcher
):
    from finequant.finetune.train import main as train

    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    with pytest.raises(SystemExit) as exit_:
        train([str(recipe_file), *AWARE, *AFTER])
    assert exit_.value.code == 2
    assert "train.quantization_aware: not with FSDP or DeepSpeed" in capsys.readouterr().err
    assert [path.name for path in (recipe_file.parent / "run").iterdir()] == [".lock"]


def test_another_scheme_than_the_trained_one_is_refused(aware, recipe_file, capsys):
    from finequant.quantize.convert import main as convert

    aware()
    with pytest.raises(SystemExit) as exit_:
        convert([str(recipe_file), *AWARE, "quantize.bits=8"])
    assert exit_.value.code == 2
    assert "was trained for 4, not 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert([str(recipe_file), *AWARE, "quantize.layers={lm_head: float}"])
    assert "quantize.layers: the adapter in" in capsys.readouterr().err
