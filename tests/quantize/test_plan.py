"""The layer plan: the meaning of patterns, refusals, the effect of a budget, and what ships."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
import torch
from conftest import SHAPE, refused
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from finequant.finetune.architecture import EMBEDDING, HEAD
from finequant.finetune.model import load_base, load_config, load_tokenizer
from finequant.quantize.checkpoint.blocks import decoder_block, embed, norm_and_head, rotary_of
from finequant.quantize.checkpoint.reading import weights_of
from finequant.quantize.methods.apply import round_model
from finequant.quantize.methods.budget import allocate, sensitivity, within_budget
from finequant.quantize.rounding import round_to_nearest
from finequant.quantize.scheme import (
    LayerScheme,
    bits_per_weight,
    layer_plan,
    undecided,
    unties_head,
)
from finequant.quantize.size.plan import layer_size, show_plan
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Quantize

CONFIG = LlamaConfig(
    **SHAPE | {"intermediate_size": 192, "num_hidden_layers": 12},
    vocab_size=384,
    tie_word_embeddings=True,
)
CALIBRATION = "quantize.calibration={tokens: 512, length: 32}"

# Bits for each of eight kinds of layers.
EVERY_WIDTH = {
    f"*.{kind}": {"bits": bits}
    for bits, kind in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 1)
} | {"*.down_proj": {"bits": 7}, "lm_head": {"bits": 8}}
FLOAT_HEAD = {"lm_head": "float", "*.0.*": {"bits": 3}, "*.o_proj": "float"}


def plan_of(**keys):
    return layer_plan(Quantize.model_validate(keys), CONFIG)


@pytest.fixture
def tuned(recipe_file, train_once):
    """Trains two steps; returns a function that quantizes, and gives recipe and run folder."""
    from finequant.quantize.convert import main as convert

    def run(*overrides: str):
        short = ("train.max_steps=2", "train.learning_rate=1e-2", *overrides)
        arguments = [str(recipe_file), *short]
        if not (recipe_file.parent / "run" / "adapter").exists():
            train_once(arguments)
        convert(arguments)
        recipe = load_recipe(recipe_file, short)
        return recipe, RunDir.of(recipe)

    return run


def recorded(run: RunDir) -> dict:
    return json.loads((run.quantized / "quantization.json").read_text())


def test_without_patterns_every_layer_follows_the_section():
    plan = plan_of(bits=3, group_size=64)
    assert len(plan) == 12 * 7 + 2
    assert plan.pop(EMBEDDING) is None
    assert set(plan.values()) == {LayerScheme(3, 64, "search", torch.bfloat16)}


def test_the_last_pattern_that_matches_wins():
    layers = {
        "*": {"bits": 3},
        "model.layers.1.*": {"group_size": 64},
        "*.down_proj": "float",
        "model.layers.11.mlp.down_proj": {"bits": 8, "group_size": 96},
    }
    plan = plan_of(layers=layers)
    assert plan["model.layers.0.mlp.up_proj"][:2] == (3, 32)
    assert plan["model.layers.1.mlp.up_proj"][:2] == (
        4,
        64,
    )  # keys that it leaves out are the section's
    assert plan["model.layers.11.mlp.up_proj"][:2] == (3, 32)  # 1.* is not 11
    assert plan["model.layers.1.mlp.down_proj"] is None
    assert plan["model.layers.11.mlp.down_proj"][:2] == (8, 96)
    assert plan[HEAD][:2] == (3, 32)
    assert plan[EMBEDDING] is None
    backwards = plan_of(layers=dict(reversed(layers.items())))
    assert {scheme[:2] for scheme in backwards.values() if scheme} == {(3, 32)}


@pytest.mark.parametrize(
    ("keys", "head", "embedding", "unties"),
    [
        ({}, 4, None, True),
        ({"head": "float"}, None, None, False),
        ({"head": "float", "layers": {"lm_head": {"bits": 6}}}, 6, None, True),
        ({"layers": {"lm_head": "float"}}, None, None, False),
        ({"head": "float", "embedding": 8}, None, 8, True),
        ({"embedding": 4, "layers": {"*": {"bits": 2}}}, 2, 4, True),
    ],
)
def test_head_and_embedding_follow_their_keys(keys, head, embedding, unties):
    plan = plan_of(**keys)
    assert (plan[HEAD] and plan[HEAD].bits, plan[EMBEDDING] and plan[EMBEDDING].bits) == (
        head,
        embedding,
    )
    assert unties_head(plan) == unties


@pytest.mark.parametrize("tokens", ["0", "-5"])
def test_a_cache_of_no_tokens_is_refused(tokens):
    """0 was taken for data.max_length, and a negative cache made the model smaller."""
    from finequant.recipes.run import main

    message = refused(main, ["plan", "quickstart", "--context", tokens])
    assert "--context" in message


@pytest.mark.parametrize("options", [["--gpus", "2"], ["--sharded"]])
def test_options_of_gpus_without_a_gpu_are_refused(options):
    """They were not read."""
    from finequant.recipes.run import main

    assert f"{options[0]}: of which GPU? Add --gpu NAME" in refused(
        main, ["plan", "quickstart", *options]
    )


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"layers": {"*.downproj": "float"}},
            "quantize.layers: '*.downproj' matches no layer; the nearest are *.down_proj,",
        ),
        (
            {"layers": {"model.layers.12.mlp.up_proj": "float"}},
            "'model.layers.12.mlp.up_proj' matches no layer; the nearest are "
            "model.layers.2.mlp.up_proj",
        ),
        ({"layers": {"model.embed_tokens": "float"}}, "'model.embed_tokens' matches no layer"),
        ({"layers": {"*": "float"}}, "every layer stays in float"),
        (
            {"layers": {"*.up_proj": {"group_size": 48}}},
            "quantize.layers: group_size 48 does not divide the input features of mlp.up_proj (64)"
            "; group sizes that do: 32, 64",
        ),
        (
            {"group_size": 96, "layers": {"*_proj": {"group_size": 32}}, "embedding": 8},
            "quantize.group_size: 96 does not divide the input features of lm_head (64), "
            "embed_tokens (64)",
        ),
        (
            {"budget": 2.9, "scale_dtype": "float32"},
            "quantize.budget: 2.9 bits per weight are too few: the plan takes at least 3.000",
        ),
        ({"budget": 4, "layers": {"*": {"bits": 8}}}, "the plan takes at least 8.500"),
        ({"budget": 9, "layers": {"*": {"bits": 8}}}, "quantize.budget: nothing is left to choose"),
        ({"budget": 9, "layers": {"model.*": "float"}, "head": 8}, "nothing is left to choose"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(keys, says):
    with pytest.raises(UserError) as error:
        plan_of(**keys)
    assert says in str(error.value)


def test_layers_that_no_group_divides_may_stay_in_float():
    odd = LlamaConfig(**SHAPE | {"head_dim": 100}, vocab_size=384)
    with pytest.raises(UserError, match="o_proj .400.; group sizes that do: none") as error:
        layer_plan(Quantize(effort="fast"), odd)
    settings = """set quantize.group_size=32 "quantize.layers={'*.self_attn.o_proj': float}\""""
    assert str(error.value).endswith(settings)
    plan = layer_plan(Quantize(effort="fast", layers={"*.self_attn.o_proj": "float"}), odd)
    assert plan["model.layers.0.self_attn.o_proj"] is None
    with pytest.raises(UserError, match="none from 32 to 256$"):
        wide = {"hidden_size": 100, "intermediate_size": 100, "head_dim": 26}
        layer_plan(Quantize(effort="fast"), LlamaConfig(**SHAPE | wide, vocab_size=384))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("quantize.bits=0", "quantize.bits: expected greater than or equal to 1"),
        ("quantize.bits=9", "quantize.bits: expected less than or equal to 8"),
        ("quantize.embedding=6", "quantize.embedding: expected 'float', 8 or 4"),
        ("quantize.budget=0", "quantize.budget: expected greater than 0"),
        ("quantize.layers={lm_head: flot}", "quantize.layers.lm_head: expected 'float' (value"),
        ("quantize.layers={lm_head: 4}", "quantize.layers.lm_head: expected a mapping of keys"),
        ('quantize.layers={"*.up_proj": {bit: 3}}', "did you mean quantize.bits?"),
        ('quantize.layers={"*.up_proj": {bits: 9}}', "layers.*.up_proj.bits: expected less than"),
    ],
)
def test_a_plan_that_fits_no_model_is_refused_with_the_recipe(recipe_file, override, says):
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file, [override])
    assert says in str(error.value)


def test_a_wrong_pattern_is_refused_before_weights_are_loaded(recipe_file, llama):
    from finequant.quantize.convert import main as convert

    base = llama("hollow")
    (base / "model.safetensors").unlink()
    error = refused(
        convert, [str(recipe_file), f"model.base={base}", "quantize.layers={lmhead: float}"]
    )
    assert "error: quantize.layers: 'lmhead' matches no layer; the nearest are lm_head" in error


@pytest.mark.parametrize("rule", ["max", "search"])
def test_one_bit_has_the_codes_minus_one_and_zero(rule):
    from torchao.quantization import IntxUnpackedToInt8Tensor

    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    rounded = round_to_nearest(weight, 1, 32, rule)
    assert set(rounded.codes.unique().tolist()) == {-1, 0}
    zero = torch.zeros_like(rounded.scale, dtype=torch.int8)
    theirs = IntxUnpackedToInt8Tensor(
        *rounded, zero, torch.int1, (1, 32), torch.float32, "int8_asym_per_token"
    )
    assert torch.equal(theirs.dequantize(), rounded.dequantize(torch.float32))
    error = (rounded.dequantize(torch.float32) - weight).square().mean()
    assert error < 0.9 * weight.square().mean()


def test_the_order_of_patterns_is_a_change(recipe_file):
    inputs = []
    for layers in ("{lm_head: float, '*': {bits: 3}}", "{'*': {bits: 3}, lm_head: float}"):
        recipe = load_recipe(recipe_file, [f"quantize.layers={layers}"])
        (recipe_file.parent / "run" / "adapter").mkdir(parents=True, exist_ok=True)
        inputs.append(RunDir.of(recipe).inputs(recipe, "quantize")["quantize.layers"])
    assert inputs[0] != inputs[1]


@pytest.mark.parametrize(
    ("tied", "dtype", "embedding", "layers"),
    [
        pytest.param(
            *(True, "bfloat16", 8, EVERY_WIDTH), marks=[pytest.mark.slow, pytest.mark.fresh_process]
        ),
        (False, "float32", 4, EVERY_WIDTH),
        (True, "float32", 4, FLOAT_HEAD),
        (False, "bfloat16", 8, FLOAT_HEAD),
        (True, "bfloat16", "float", EVERY_WIDTH),
    ],
)
def test_a_mixed_model_is_reloaded_exactly(tuned, llama, tied, dtype, embedding, layers):
    """`convert` fails unless its logits equal those of `from_pretrained`."""
    from finequant.evaluate.dequantized import dequantize_once

    base = llama("variant", tie_word_embeddings=tied)
    _, run = tuned(
        f"model.base={base}",
        f"quantize.embedding={embedding}",
        f"quantize.layers={json.dumps(layers)}",
        f"quantize.dtype={dtype}",
        "quantize.method=gptq",
        CALIBRATION,
    )
    model = AutoModelForCausalLM.from_pretrained(run.quantized)
    said = Quantize.model_validate({"layers": layers, "embedding": embedding})
    plan = layer_plan(said, model.config)
    entries = {layer["name"]: layer for layer in recorded(run)["layers"]}
    assert entries.keys() == plan.keys()
    for name, scheme in plan.items():
        weight = model.get_submodule(name).weight
        assert entries[name]["bits"] == (scheme and scheme.bits)
        assert (entries[name]["snr_db"] is None) == (scheme is None)
        if scheme is None:
            assert weight.dtype == getattr(torch, dtype)
            continue
        assert weight.target_dtype == getattr(torch, f"int{scheme.bits}")
        assert (weight.activation_quantization is None) == (name == EMBEDDING)
    float_base = AutoModelForCausalLM.from_pretrained(base)
    if plan[HEAD] is None:  # training does not touch it
        expected = float_base.lm_head.weight.to(getattr(torch, dtype))
        assert torch.equal(model.lm_head.weight, expected)
    dequantize_once(model, [5, 6, 7])  # fails if the logits differ


def test_the_plan_of_a_budget_can_be_copied_and_is_shown(tuned, capsys):
    overrides = ("quantize.budget=4.6", "quantize.layers={'*.v_proj': {bits: 8}}", CALIBRATION)
    recipe, run = tuned(*overrides)
    record = recorded(run)
    assert record["bits_per_rounded_weight"] <= 4.6
    assert record["plan"]["model.layers.0.self_attn.v_proj"] == {"bits": 8, "group_size": 32}
    weights = (run.quantized / "model.safetensors").read_bytes()
    capsys.readouterr()
    show_plan(recipe, run)
    shown = capsys.readouterr().out
    assert "signal to noise in dB" in shown
    packed = re.search(r"rounded layers: .* ([0-9.]+) and 9.250 bits for each of", shown)[1]
    assert float(packed) == pytest.approx(record["bits_per_rounded_weight"], abs=1e-3)
    show_plan(load_recipe(run.quantized / "recipe.yaml", ["quantize.budget=5"]), run)
    assert "chosen by measured sensitivity in the stage quantize" in capsys.readouterr().out
    _, again = tuned(f"quantize.layers={json.dumps(record['plan'])}")
    assert (again.quantized / "model.safetensors").read_bytes() == weights


def test_the_plan_is_shown_joined_and_layer_by_layer(recipe_file, capsys):
    layers = "quantize.layers={'*.0.*.up_proj': {bits: 3, group_size: 64}, '*.o_proj': float}"
    recipe = load_recipe(recipe_file, [layers, "quantize.embedding=8"])
    show_plan(recipe, RunDir.of(recipe))
    joined = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in joined}
    # Two layers of 32 x 64 weights: 4 bits, and a float32 scale per 32 weights; on disk, a byte.
    assert cells["model.layers.0-1.self_attn.k_proj"] == ["32 x 64", "4", "32", "2,560", "4,736"]
    assert cells["model.layers.0.mlp.up_proj"] == ["160 x 64", "3", "64", "4,480", "11,040"]
    assert cells["model.layers.0-1.self_attn.o_proj"][1:3] == ["float", ""]
    assert cells["model.embed_tokens"][1] == "8"
    show_plan(recipe, RunDir.of(recipe), every=True)
    out = capsys.readouterr().out
    names = [line.split("│")[1].strip() for line in out.splitlines() if "│" in line]
    assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert names[-2:] == [HEAD, EMBEDDING]
    assert len(names) == 2 * 7 + 2


def test_in_a_terminal_names_are_broken_and_figures_are_not(monkeypatch, capsys):
    from finequant.quantize.size import plan

    monkeypatch.setattr(plan, "Console", partial(Console, force_terminal=True, width=80))
    table = Table("layer", "shape", "bits", "group size", "bytes packed", "on disk", "noise in dB")
    figures = ("28672 x 8192", "4", "32", "1,234,567,890", "2,345,678,901", "18.7 to 19.2")
    table.add_row("model.layers.0-79.self_attn.q_proj", *figures)
    plan._print(table)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= 80
    assert all(figure in out for figure in figures)


def test_sizes_on_disk_are_those_of_the_tensors(tuned):
    from safetensors.torch import load_file

    _, run = tuned("quantize.embedding=4", "quantize.scale_dtype=bfloat16")
    stored = load_file(run.quantized / "model.safetensors")
    size = layer_size((160, 64), LayerScheme(4, 32, "max", torch.bfloat16), torch.float32)
    parts = [t for name, t in stored.items() if name.startswith("model.layers.0.mlp.up_proj.")]
    assert len(parts) == 3
    assert size.disk == sum(tensor.nbytes for tensor in parts)
    assert size.packed == 160 * 64 * 4 // 8 + 2 * 160 * 64 // 32


def test_bits_go_where_they_help_most():
    loss_increases = {
        "steep": {2: 8.0, 3: 2.0, 4: 0.5},
        "flat": {2: 0.2, 3: 0.1, 4: 0.0},
        "big": {2: 9.0, 3: 6.0, 4: 0.5},  # the second step is the better one: both at once
    }
    weights = {"steep": 10, "flat": 10, "big": 40}
    assert allocate(loss_increases, weights, 120) == {"steep": 2, "flat": 2, "big": 2}
    assert allocate(loss_increases, weights, 130) == {"steep": 3, "flat": 2, "big": 2}
    assert allocate(loss_increases, weights, 220) == {"steep": 4, "flat": 2, "big": 4}
    assert allocate(loss_increases, weights, 1000) == {"steep": 4, "flat": 4, "big": 4}


@pytest.fixture
def uneven(recipe_file):
    """Makes a model whose second block matters most, its recipe, tokenizer and calibration."""

    def make(*overrides: str):
        recipe = load_recipe(recipe_file, ["quantize.scale=search", CALIBRATION, *overrides])
        model = load_base(recipe.model, torch.float32)
        with torch.no_grad():
            model.model.embed_tokens.weight *= 30
            for weight in model.model.layers[1].parameters():
                weight *= 6
        return recipe, model, load_tokenizer(recipe.model)

    return make


def divergence(model, rounded, sequences) -> float:
    """Computes the KL divergence, in nats, when rounded weights replace the model's."""
    names = {f"{name}.weight": layer.dequantize(torch.float32) for name, layer in rounded.items()}
    with torch.no_grad():
        exact = model(sequences).logits.log_softmax(-1)
        found = torch.func.functional_call(model, names, (sequences,)).logits.log_softmax(-1)
    return (exact.exp() * (exact - found)).sum(-1).mean().item()


def test_the_expected_loss_increase_is_the_divergence(uneven):
    recipe, model, tokenizer = uneven()
    sequences = torch.randint(3, 300, (64, 32), generator=torch.Generator().manual_seed(0))
    plan = layer_plan(recipe.quantize, model.config)
    names = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    schemes = {name: plan[name] for name in names}
    weights, config = weights_of(model), model.config
    loss_increases = sensitivity(weights, config, sequences, schemes, torch.float32, 0)
    for name in names:
        weight = model.get_submodule(name).weight
        for bits in (3, 4, 5):
            rounded = round_to_nearest(weight, *schemes[name]._replace(bits=bits))
            assert (
                0.4
                < loss_increases[name][bits] / divergence(model, {name: rounded}, sequences)
                < 2.5
            )


def test_sensitivity_is_that_of_causal_attention_whatever_the_configuration_says_of_it(uneven):
    recipe, model, _ = uneven()
    sequences = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    plan = layer_plan(recipe.quantize, model.config)
    schemes = {name: plan[name] for name in undecided(recipe.quantize, plan)}
    source = weights_of(model)

    def found(config):
        return sensitivity(source, config, sequences, schemes, torch.float32, 0)

    eager = load_config(recipe.model)
    eager._attn_implementation = "eager"
    assert found(model.config) == found(load_config(recipe.model)) == found(eager)


@pytest.mark.parametrize("implementation", [None, "eager", "sdpa"])
def test_running_block_by_block_equals_the_model(uneven, implementation):
    recipe, model, _ = uneven()
    sequences = torch.randint(3, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    config, weights = load_config(recipe.model), weights_of(model)
    config._attn_implementation = implementation
    with torch.no_grad():
        hidden = embed(weights, sequences)
        rotary = rotary_of(config, hidden)
        for number in range(config.num_hidden_layers):
            hidden = decoder_block(config, number, weights, torch.float32)(
                hidden, position_embeddings=rotary
            )
        logits = norm_and_head(config, weights, torch.float32)(hidden)
        torch.testing.assert_close(logits, model(sequences).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "bits"), [("rtn", 3), ("gptq", 3)])
def test_a_budget_is_kept_and_beats_one_width_for_all(uneven, method, bits):
    recipe, model, tokenizer = uneven(
        f"quantize.method={method}", f"quantize.bits={bits}", f"quantize.budget={bits + 1}"
    )
    sequences = torch.randint(3, 300, (16, 32), generator=torch.Generator().manual_seed(1))
    source = weights_of(model), model.config
    planned = within_budget(recipe, *source, tokenizer, torch.float32)
    assert planned == within_budget(recipe, *source, tokenizer, torch.float32)
    plan = layer_plan(planned.quantize, model.config)
    assert bits + 0.9 < bits_per_weight(plan, model.config) <= bits + 1
    uniform = recipe.model_copy(
        update={"quantize": recipe.quantize.model_copy(update={"budget": None})}
    )
    assert bits_per_weight(layer_plan(uniform.quantize, model.config), model.config) == bits + 1
    found = {
        name: divergence(model, round_model(model, some, tokenizer, torch.float32), sequences)
        for name, some in (("planned", planned), ("uniform", uniform))
    }
    assert found["planned"] < 0.8 * found["uniform"]
