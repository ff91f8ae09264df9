"""Quantization-aware training: the model that is trained is the one that ships and reloads."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_recipe, refused
from safetensors.torch import load_file
from transformers import set_seed

from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir

COMMON = (
    "quantize.method=gptq",
    "quantize.scale=search",
    "quantize.calibration={tokens: 256, length: 32}",
    "train.learning_rate=1e-2",
    "train.max_steps=4",
    "train.save_steps=2",
    "lora.use_rslora=true",
)
ADAPTER = "quantize.training={steps: 4}"
SCALES = "quantize.training={steps: 4, learns: scales}"
TAUGHT = "quantize.training={steps: 4, distillation: 0.5}"


def train_plain(folder: Path, **changes) -> Path:
    """Trains an adapter, and returns the recipe file of its run."""
    from finequant.finetune.train import main as train

    recipe = make_recipe(folder, make_llama(folder / "base", **changes))
    train([str(recipe), *COMMON])
    return recipe


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    return train_plain(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def tuned_with_biases(tmp_path_factory) -> Path:
    return train_plain(tmp_path_factory.mktemp("biased"), attention_bias=True, mlp_bias=True)


class Stage:
    """Runs `qat`, as `train` does, and `quantize` on a copy of a run that has its adapter."""

    def __init__(self, recipe: Path, run: Path, train) -> None:
        self.recipe, self.run, self._train = recipe, run, train
        shutil.copytree(recipe.parent / "run", run)

    def arguments(self, *overrides: str) -> list[str]:
        return [*COMMON, f"output_dir={self.run}", *overrides]

    def train(self, *overrides: str):
        return self._train([str(self.recipe), *self.arguments(*overrides)])

    def quantize(self, *overrides: str) -> Path:
        from finequant.quantize.convert import main as stage

        stage([str(self.recipe), *self.arguments(*overrides)])
        return self.run / "quantized"

    def start(self, *overrides: str) -> dict:
        """Returns the codes and scales that training started from."""
        from finequant.quantize.checkpoint.stored import read_checkpoint

        folder = self.run / "checkpoints" / "qat" / "start"
        return read_checkpoint(folder).rounded


@pytest.fixture
def stage_of(tmp_path, monkeypatch, train_aware) -> Callable[[Path], Stage]:
    """Makes a stage that does not reload `quantized/` in a fresh process: these tests reload it."""
    from finequant.quantize.checkpoint import reload

    monkeypatch.setattr(reload, "check_reload", lambda *_: None)
    return lambda recipe: Stage(recipe, tmp_path / "run", train_aware)


@pytest.fixture
def stage(tuned, stage_of) -> Stage:
    return stage_of(tuned)


VARIANTS = [
    [ADAPTER, "quantize.dtype=float32"],
    [ADAPTER, "quantize.head=float"],
    [ADAPTER, "quantize.embedding=4"],
    [TAUGHT, "quantize.rotate=true"],
    [TAUGHT, "quantize.layers={'*.v_proj': float}"],
    [SCALES, "quantize.dtype=float32"],
    [SCALES, "quantize.scale_dtype=bfloat16"],
    [ADAPTER, "quantize.layers={'*.down_proj': {bits: 7}, 'model.layers.0.*': {bits: 2}}"],
    [ADAPTER, "train.optimizer=adamw_torch_fused"],
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_forward_converted_and_reloaded_are_equal(stage, variant, capsys):
    """The adapter was trained in float32, even where bfloat16 ships."""
    from finequant.finetune.device import arithmetic_dtype

    check_equal(stage, "quantize.dtype=bfloat16", *variant)
    slow = "float32" not in variant[-1] and arithmetic_dtype(torch.bfloat16) != torch.bfloat16
    assert ("several times slower than quantize.dtype=float32" in capsys.readouterr().err) == slow


@pytest.mark.parametrize("variant", [[TAUGHT, "quantize.rotate=true"], [SCALES]])
def test_biases_are_part_of_the_forward(tuned_with_biases, stage_of, variant):
    check_equal(stage_of(tuned_with_biases), *variant)


def check_equal(stage: Stage, *overrides: str) -> None:
    from transformers import AutoModelForCausalLM

    trainer = stage.train(*overrides)
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    trainer.model.set_attn_implementation("sdpa")  # that of from_pretrained, to the last bit
    with torch.no_grad(), trainer.compute_loss_context_manager():
        trained = trainer.model.eval()(prompt).logits
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(torch.isfinite, torch.tensor(losses)))
    folder = stage.quantize(*overrides)
    quantized = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(quantized(prompt).logits, trained)
    assert "then trained" in json.loads((folder / "quantization.json").read_text())["method"]


def test_training_starts_from_the_codes_of_quantize_and_changes_them(stage):
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.quantize.training.model import fake_quantized_layers

    trainer = stage.train(ADAPTER)
    start, layers = stage.start(), fake_quantized_layers(trainer.model)
    untrained = read_checkpoint(stage.quantize()).rounded
    ended = load_file(stage.run / "trained_codes" / "codes.safetensors")
    assert start.keys() == untrained.keys() == layers.keys()
    with torch.no_grad():
        for name, layer in layers.items():
            assert torch.equal(start[name].codes, untrained[name].codes)
            assert torch.equal(start[name].scale, untrained[name].scale)
            assert torch.equal(ended[f"{name}.scale"], start[name].scale)
            same = torch.equal(ended[f"{name}.codes"], start[name].codes)
            assert same == (name == "lm_head")
            if not same:
                layer.lora_B.zero_()
            assert torch.equal(layer.rounded().codes, start[name].codes)


def test_the_loss_is_the_divergence_of_what_ships_from_the_tuned_model(stage, monkeypatch):
    """Computes it from peft's model and the converted checkpoint, on the target tokens, however
    many tokens have their logits in memory at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finequant.finetune import trainer as trainers

    overrides = ["quantize.training={steps: 4, distillation: 1.0}", "quantize.bits=2"]
    trainer = stage.train(*overrides)
    batch = next(iter(trainer.get_train_dataloader()))
    gradients = []
    for tokens in (1024, 5):
        monkeypatch.setattr(trainers, "TARGETS_AT_ONCE", tokens)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        loss.backward()
        trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        gradients.append([weight.grad.clone() for weight in trained])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)
    quantized = AutoModelForCausalLM.from_pretrained(stage.quantize(*overrides))
    base = AutoModelForCausalLM.from_pretrained(stage.recipe.parent / "base")
    tuned = PeftModel.from_pretrained(base, stage.run / "adapter").eval()
    far, bounds = [], batch["cu_seq_lens_q"][1:-1].long()
    for row in batch["input_ids"][0].tensor_split(bounds):
        with torch.no_grad():
            exact, rounded = (
                model(row[None]).logits[0, :-1].log_softmax(-1) for model in (tuned, quantized)
            )
        far.append((exact.exp() * (exact - rounded)).sum(-1))
    targets = [row[1:] != -100 for row in batch["labels"][0].tensor_split(bounds)]
    far, targets = torch.cat(far), torch.cat(targets)
    assert 0 < targets.sum() < len(far)
    assert loss.item() == pytest.approx(far[targets].mean().item(), rel=1e-3)


def test_only_trained_parameters_have_a_gradient(stage):
    """Float layers and frozen parameters have none, also with a teacher."""
    trainer = stage.train(TAUGHT, "quantize.layers={'*.v_proj': float}")
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
    with_gradient = {n for n, weight in trainer.model.named_parameters() if weight.grad is not None}
    assert {name.rpartition(".")[2] for name in with_gradient} == {"lora_A", "lora_B"}
    assert not any("v_proj" in name or "lm_head" in name for name in with_gradient)
    in_optimizer = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert in_optimizer == len(with_gradient) == 2 * 2 * 6


def test_training_scales_leaves_the_codes(stage):
    from finequant.quantize.training.model import fake_quantized_layers

    trainer = stage.train(SCALES)
    start, layers = stage.start(), fake_quantized_layers(trainer.model)
    for name, layer in layers.items():
        before, after = start[name], layer.rounded()
        assert torch.equal(before.codes, after.codes)
        assert not torch.equal(before.scale, after.scale)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(start)


def test_training_scales_leaves_a_table_that_head_and_embedding_share(stage):
    from finequant.quantize.training.model import fake_quantized_layers

    trainer = stage.train(SCALES, "quantize.head=8", "quantize.embedding=8")
    layers = fake_quantized_layers(trainer.model)
    head, embedding = (layers[name].rounded() for name in ("lm_head", "model.embed_tokens"))
    assert all(map(torch.equal, head, embedding))


@pytest.mark.parametrize("training", [TAUGHT, SCALES])
def test_each_layers_latent_weights_are_freed_before_the_next_is_rounded(
    tuned, tmp_path, monkeypatch, training
):
    """All of them beside all codes would be the stage's peak of memory."""
    from finequant.quantize.training.fake_quantize import FakeQuantized
    from finequant.quantize.training.train import main

    latent, rounded = [], FakeQuantized.rounded

    def round_layer(layer):
        assert all(weights() is None for weights in latent)
        latent.append(weakref.ref(layer.latent))
        return rounded(layer)

    monkeypatch.setattr(FakeQuantized, "rounded", round_layer)
    Stage(tuned, tmp_path / "run", main).train(training)
    assert len(latent) == 15
    assert latent[-1]() is None


@pytest.mark.parametrize("training", [TAUGHT, SCALES])
def test_a_resumed_training_equals_an_uninterrupted_one(stage, training):
    stage.train(training)
    codes = stage.run / "trained_codes" / "codes.safetensors"
    expected = codes.read_bytes()
    shutil.rmtree(stage.run / "trained_codes")
    shutil.rmtree(stage.run / "checkpoints" / "qat" / "steps" / "checkpoint-4")
    trainer = stage.train(training)
    assert trainer.state.global_step == 4
    assert codes.read_bytes() == expected


def test_the_largest_seed_of_a_recipe_trains(stage):
    from finequant.quantize.training.train import _arguments

    recipe = load_recipe(stage.recipe, stage.arguments(ADAPTER, f"seed={2**32 - 1}"))
    set_seed(_arguments(recipe, RunDir.of(recipe)).seed)


def test_other_processes_wait_a_day_for_the_first(stage):
    """The first hashes a base and writes the starting codes, which takes hours for a large one."""
    from finequant.quantize.training.train import _arguments

    recipe = load_recipe(stage.recipe, stage.arguments(TAUGHT))
    waits = _arguments(recipe, RunDir.of(recipe)).ddp_timeout_delta
    assert waits.total_seconds() >= 24 * 3600


def test_starting_codes_are_made_again_only_for_another_scheme(stage, capsys):
    said = "quantizing by gptq, where training starts"
    stage.train(ADAPTER)
    first = (stage.run / "trained_codes" / "codes.safetensors").read_bytes()
    assert said in capsys.readouterr().err
    stage.train("quantize.training={steps: 2}")
    err = capsys.readouterr().err
    assert said not in err and "which was made with other inputs" in err
    stage.train(ADAPTER, "quantize.bits=3")
    assert said in capsys.readouterr().err
    stage.train(ADAPTER)
    assert said in capsys.readouterr().err
    assert (stage.run / "trained_codes" / "codes.safetensors").read_bytes() == first


def test_the_stages_know_what_each_depends_on(stage):
    def changed(name: str, *overrides: str) -> list[str] | None:
        recipe = load_recipe(stage.recipe, stage.arguments(*overrides))
        return RunDir.of(recipe).what_changed(recipe, name)

    stage.train(ADAPTER)
    assert changed("train", "quantize.training={steps: 9}", "quantize.bits=3") == []
    assert changed("qat", ADAPTER) == []
    assert changed("qat", "quantize.training={steps: 9}") == ["quantize.training.steps: 4 -> 9"]
    assert changed("qat", ADAPTER, "quantize.bits=3") == ["quantize.bits: 4 -> 3"]
    assert json.loads((stage.run / "manifest.json").read_text())["qat"]["steps"] == 4


def test_codes_of_another_scheme_or_adapter_are_not_shipped(stage):
    from finequant.quantize.convert import main as convert

    stage.train(ADAPTER)
    arguments = [str(stage.recipe), *stage.arguments(ADAPTER)]
    said = refused(convert, [*arguments, "quantize.bits=8"])
    assert "trained_codes: not made from the present inputs: quantize.bits: 4 -> 8" in said
    said = refused(convert, [*arguments, "quantize.layers={lm_head: float}"])
    assert "quantize.layers:" in said and "run `finequant qat RECIPE` again" in said
    (stage.run / "adapter" / "SHA256SUMS").unlink()
    (stage.run / "adapter" / "chat_template.jinja").write_text("another", encoding="utf-8")
    assert "the content of adapter/ changed" in refused(convert, arguments)


@pytest.mark.parametrize("launcher", ["FSDP", "DEEPSPEED"])
def test_weights_that_are_not_split_by_rows_are_refused_first(stage, monkeypatch, launcher):
    from finequant.quantize.training.train import main

    monkeypatch.setenv(f"ACCELERATE_USE_{launcher}", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    said = refused(main, [str(stage.recipe), *stage.arguments(ADAPTER)])
    assert "quantize.training: does not work with DeepSpeed or FSDP 1" in said


ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.mark.parametrize("how", ["FSDP 1", "DeepSpeed"])
def test_a_run_whose_training_could_not_start_does_not_train_the_adapter(
    recipe_file, monkeypatch, how
):
    from finequant.recipes.commands import pipeline
    from finequant.recipes.run import main

    monkeypatch.setattr(pipeline, "_start", lambda *_: pytest.fail("a stage was started"))
    file = ACCELERATE / "deepspeed_zero3.yaml"
    if how == "FSDP 1":
        text = (ACCELERATE / "fsdp.yaml").read_text(encoding="utf-8")
        file = recipe_file.with_name("fsdp1.yaml")
        file.write_text(text.replace("fsdp_version: 2", "fsdp_version: 1"), encoding="utf-8")
    arguments = ["run", str(recipe_file), ADAPTER, "--force", "--launch", str(file)]
    assert f"--launch: {file} uses {how}" in refused(main, arguments)


def test_fsdp_of_the_second_version_is_not_refused(recipe_file):
    from finequant.recipes.commands.preflight import refuse_split_weights

    refuse_split_weights(load_recipe(recipe_file, [ADAPTER]), ACCELERATE / "fsdp.yaml")


def test_a_base_in_float16_is_refused_with_the_dtypes_that_train():
    from transformers import LlamaConfig

    from finequant.quantize.scheme import layer_plan
    from finequant.recipes.errors import UserError
    from finequant.recipes.schema import Quantize

    config = LlamaConfig(hidden_size=64, intermediate_size=128, dtype="float16")
    training = {"training": {"steps": 1}}
    with pytest.raises(UserError, match="set quantize.dtype=bfloat16 or float32"):
        layer_plan(Quantize(**training), config)
    layer_plan(Quantize(dtype="bfloat16", **training), config)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.quantization_aware=true", "quantization_aware is now quantize.training"),
        ("train.quantization_aware={steps: 3}", "quantization_aware is now quantize.training"),
        ("quantize.training={learns: scales}", "quantize.training.steps"),
        ("quantize.budget=5", "quantize.training cannot be combined with quantize.budget"),
        ("quantize.training=null", "quantize.training: absent from the recipe"),
    ],
)
def test_invalid_training_recipes_are_refused_by_name(recipe_file, override, reason):
    from finequant.quantize.training.train import main

    assert reason in refused(main, [str(recipe_file), ADAPTER, override])


def test_quantize_needs_the_trained_codes(stage):
    from finequant.quantize.convert import main as convert

    said = refused(convert, [str(stage.recipe), *stage.arguments(ADAPTER)])
    assert (
        "trained_codes does not exist: run `finequant run RECIPE`, or only `finequant qat RECIPE`"
        in said
    )
