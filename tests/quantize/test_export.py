"""quantize/export.py: every format holds the codes and scales of quantized/, read from its file."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import struct
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPE, refused
from safetensors.torch import load_file

from finequant.quantize.formats.formats import FORMATS
from finequant.quantize.rounding import Rounded
from finequant.recipes import rundir
from finequant.recipes.errors import UserError
from finequant.recipes.interrupt import Interrupted
from finequant.recipes.schema import Quantize

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 200, 100, 50]])


@pytest.fixture(scope="module")
def runs_before(tmp_path_factory) -> tuple[dict[tuple[str, ...], Path], Path]:
    """Quantized runs by their overrides, and where to keep them: tests start from copies."""
    return {}, tmp_path_factory.mktemp("quantized")


@pytest.fixture
def make(recipe_file, runs_before, train_once):
    """Trains two steps, quantizes with some overrides and exports; returns the run directory."""
    before, store = runs_before
    from finequant.quantize.convert import main as convert
    from finequant.quantize.export import main as export

    def run(*overrides: str, to: tuple[str, ...]) -> Path:
        arguments = [str(recipe_file), "train.max_steps=2", "train.learning_rate=1e-2", *overrides]
        folder = recipe_file.parent / "run"
        if overrides not in before:
            train_once(arguments)
            convert(arguments)
            before[overrides] = shutil.copytree(folder, store / str(len(before)))
        elif not folder.exists():
            shutil.copytree(before[overrides], folder)
        export([*arguments, *(word for name in to for word in ("--to", name))])
        return folder

    return run


def torchao_weights(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns codes and scales by layer, straight from the safetensors file."""
    tensors = load_file(folder / "quantized" / "model.safetensors")
    end = "._weight_qdata"
    return {
        key.removesuffix(end): (codes, tensors[key.replace("qdata", "scale")])
        for key, codes in tensors.items()
        if key.endswith(end)
    }


def unpacked(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpacks compressed-tensors' codes: eight per int32, lowest bits first, code + 8."""
    halves = [packed >> shift & 15 for shift in range(0, 32, 4)]
    return (torch.stack(halves, dim=-1).flatten(1)[:, :columns] - 8).to(torch.int8)


@pytest.mark.parametrize("tied_head", ["quantize", "float"])
def test_compressed_tensors_hold_the_codes_in_four_bits(make, tied_head):
    from transformers import AutoModelForCausalLM

    overrides = [f"quantize.head={tied_head}", "quantize.scale_dtype=bfloat16"]
    run = make(*overrides, to=("compressed-tensors",))
    folder = run / "exports" / "compressed-tensors"
    tensors = load_file(folder / "model.safetensors")
    expected = torchao_weights(run)
    assert len(expected) == 2 * 7 + (tied_head == "quantize")
    bits = weights = 0
    for name, (codes, scale) in expected.items():
        packed = tensors[f"{name}.weight_packed"]
        assert packed.dtype == torch.int32
        assert tensors[f"{name}.weight_shape"].tolist() == list(codes.shape)
        assert torch.equal(unpacked(packed, codes.shape[1]), codes)
        assert torch.equal(tensors[f"{name}.weight_scale"], scale)
        bits += 8 * (packed.nbytes + tensors[f"{name}.weight_scale"].nbytes)
        weights += codes.numel()
    assert bits / weights == 4.5
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(run / "quantized")
    with torch.no_grad():
        logits = model(PROMPT).logits  # the first forward unpacks the weights
        expected_logits = quantized(PROMPT).logits
    for name in expected:
        assert torch.equal(
            model.get_submodule(name).weight, quantized.get_submodule(name).weight.dequantize()
        )
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0.02)


def compressed_config(run: Path) -> dict:
    config = json.loads((run / "exports" / "compressed-tensors" / "config.json").read_text())
    return config["quantization_config"]


def test_compressed_tensors_is_the_scheme_that_vllm_takes(make):
    """4-bit groups with float activations, and the head by name, as vLLM's head is no Linear."""
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    run = make(to=("compressed-tensors",))
    described = compressed_config(run)
    config = QuantizationConfig.model_validate(described)
    assert config.model_dump(mode="json") == described
    assert (config.format, config.quantization_status.value) == ("pack-quantized", "compressed")
    (scheme,) = config.config_groups.values()
    assert scheme.targets == ["re:.*lm_head", "Linear"]
    assert scheme.input_activations is None
    weights = scheme.weights
    assert (weights.num_bits, weights.symmetric, weights.group_size) == (4, True, 32)
    assert (weights.type, weights.strategy) == ("int", "group")
    model = AutoModelForCausalLM.from_pretrained(run / "exports" / "compressed-tensors")
    layer = model.model.layers[0].mlp.up_proj
    activations = torch.randn(1, 2, 64)
    with torch.no_grad():
        model(PROMPT)  # unpacks the weights
        torch.testing.assert_close(layer(activations), activations @ layer.weight.T)


def test_layers_that_differ_are_named_and_a_float_head_is_left_out(make):
    run = make(
        "quantize.layers={'*.down_proj': {bits: 8}}",
        "quantize.head=float",
        to=("compressed-tensors",),
    )
    described = compressed_config(run)
    assert described["ignore"] == ["lm_head"]
    four, eight = sorted(
        described["config_groups"].values(), key=lambda group: group["weights"]["num_bits"]
    )
    assert [four["weights"]["num_bits"], eight["weights"]["num_bits"]] == [4, 8]
    assert eight["targets"] == [f"model.layers.{number}.mlp.down_proj" for number in (0, 1)]
    assert len(four["targets"]) == 12


def test_scales_of_a_bfloat16_model_are_rounded_as_readers_do(make):
    run = make("quantize.dtype=bfloat16", to=("compressed-tensors",))
    tensors = load_file(run / "exports" / "compressed-tensors" / "model.safetensors")
    for name, (_, scale) in torchao_weights(run).items():
        assert scale.dtype == torch.float32
        assert torch.equal(tensors[f"{name}.weight_scale"], scale.to(torch.bfloat16))
    entry = json.loads((run / "manifest.json").read_text())["compressed-tensors"]
    assert 0 < entry["scale_rounding"] <= 2**-8
    assert entry["bits_per_rounded_weight"] < 4.6


def gguf_file(run: Path) -> Path:
    (file,) = (run / "exports" / "gguf").glob("*.gguf")
    return file


def gguf_tensors(run: Path) -> dict[str, tuple[str, np.ndarray]]:
    from gguf import GGUFReader

    tensors = GGUFReader(gguf_file(run)).tensors
    return {tensor.name: (tensor.tensor_type.name, tensor.data) for tensor in tensors}


def halves_to_neighbors(rows: int, heads: int) -> list[int]:
    """Returns llama.cpp's order of the rows of q_proj or k_proj: x1 y1 x2 y2 for x1 x2 y1 y2."""
    size = rows // heads
    order = [half * size // 2 + index for index in range(size // 2) for half in range(2)]
    return [head * size + place for head in range(heads) for place in order]


@pytest.mark.parametrize("group_size", [32, 64])
def test_gguf_holds_the_codes_and_half_precision_scales(make, llama, group_size):
    base = llama("divisible", intermediate_size=192)
    run = make(f"model.base={base}", f"quantize.group_size={group_size}", to=("gguf",))
    tensors = gguf_tensors(run)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    expected = torchao_weights(run)
    layers = {f"model.layers.1.{ours}": f"blk.1.{theirs}.weight" for ours, theirs in names.items()}
    for ours, theirs in {**layers, "lm_head": "output.weight"}.items():
        codes, scale = (part.numpy() for part in expected[ours])
        kind, data = tensors[theirs]
        assert kind == "Q4_0"
        blocks = data.reshape(len(data), -1, 18)  # 2 bytes of scale, 16 of codes
        low, high = blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4
        found = np.concatenate([low, high], axis=-1).reshape(len(data), -1).astype(np.int8) - 8
        order = np.arange(len(codes))
        if count := heads.get(ours.removeprefix("model.layers.1.")):
            order = halves_to_neighbors(len(codes), count)
        assert np.array_equal(found, codes[order])
        halves = blocks[:, :, :2].copy().view(np.float16)[:, :, 0]
        repeated = scale.astype(np.float16)[order].repeat(group_size // 32, axis=1)
        assert np.array_equal(halves, repeated)
    entry = json.loads((run / "manifest.json").read_text())["gguf"]
    assert entry["bits_per_rounded_weight"] == 4.5
    assert entry["scale_rounding"] <= 2**-11


@pytest.mark.parametrize("tied_head", ["quantize", "float"])
def test_gguf_loads_with_its_tokenizer(make, tokenizer, tied_head):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = make(f"quantize.head={tied_head}", to=("gguf",))
    folder = run / "exports" / "gguf"
    assert ("output.weight" in gguf_tensors(run)) == (tied_head == "quantize")
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file(run).name, dtype=torch.float32
    )
    quantized = AutoModelForCausalLM.from_pretrained(run / "quantized")
    torch.testing.assert_close(model(PROMPT).logits, quantized(PROMPT).logits, rtol=0, atol=0.05)
    inside = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file(run).name)
    text = "<|im_start|>open the red door at 11 o'clock<|im_end|>\n"
    assert inside(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert inside.chat_template == tokenizer.chat_template
    assert inside.bos_token == tokenizer.bos_token
    assert inside.eos_token == tokenizer.eos_token


@pytest.mark.parametrize("in_template", [False, True])
def test_llama_cpp_puts_a_bos_before_chats_only_if_training_did(
    make, llama, tokenizer, in_template
):
    """Llama's tokenizers put one before every text, but a ChatML template has none."""
    from gguf import GGUFReader
    from tokenizers.processors import TemplateProcessing

    changed, bos = copy.deepcopy(tokenizer), tokenizer.bos_token
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    if in_template:
        changed.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    base = llama("adding")
    changed.save_pretrained(base)
    run = make(f"model.base={base}", to=("gguf",))
    field = GGUFReader(gguf_file(run)).fields["tokenizer.ggml.add_bos_token"]
    assert field.contents() is in_template


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {"temp": 0, "penalty_repeat": 1}),
        ({"repetition_penalty": 1.5}, {"temp": 0, "penalty_repeat": 1.5, "penalty_last_n": -1}),
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 20},
            {"temp": 0.5, "top_k": 20, "top_p": 1, "min_p": 0, "penalty_repeat": 1},
        ),
    ],
)
def test_runtimes_pick_tokens_by_the_generation_configuration(make, llama, generation, expected):
    from gguf import GGUFReader

    base = llama("picking")
    (base / "generation_config.json").write_text(json.dumps(generation))
    run = make(f"model.base={base}", to=("gguf", "onnx"))
    prefix = "general.sampling."
    picked = {
        name.removeprefix(prefix): field.contents()
        for name, field in GGUFReader(gguf_file(run)).fields.items()
        if name.startswith(prefix)
    }
    assert picked == expected
    described = json.loads((run / "exports" / "onnx" / "genai_config.json").read_text())
    assert described["search"]["repetition_penalty"] == expected["penalty_repeat"]


def test_gguf_metadata_describe_the_model(make):
    """It has the keys of llama.cpp's own converter, and the file type of its content."""
    from gguf import GGUFReader

    about = {
        "publish.base_model": "meta-llama/Llama-3.2-1B-Instruct",
        "publish.license": "llama3.2",
        "publish.language": "[en, de]",
        "publish.tags": "[support]",
    }
    overrides = [f"{key}={value}" for key, value in about.items()]
    run = make("name=support", "quantize.bits=8", *overrides, to=("gguf",))
    assert gguf_file(run).name == "Llama-3.2-1B-Instruct-support-Q8_0.gguf"
    fields = GGUFReader(gguf_file(run)).fields
    expected = {
        "type": "model",
        "name": "Llama 3.2 1B Instruct Support",
        "basename": "Llama-3.2",
        "finetune": "Instruct-support",
        "size_label": "1B",
        "license": "llama3.2",
        "languages": ["en", "de"],
        "tags": ["text-generation", "support"],
        "base_model.count": 1,
        "base_model.0.name": "Llama 3.2 1B Instruct",
        "base_model.0.organization": "Meta Llama",
        "base_model.0.repo_url": "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct",
        "file_type": 7,
    }
    assert {key: fields[f"general.{key}"].contents() for key in expected} == expected


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (b"---\nlicense: [mit\n---\n", None),
        (b"---\nlicense: mit\n---\n\xff", None),
        (b"---\n- license: mit\n---\n", None),
        (b"---\nlicense:\n- mit\n---\n", "mit"),
        (b"---\nlicense:\n- mit\n- llama3.2\n---\n", None),
        (b"---\nlicense: mit\n---\n", "mit"),
    ],
)
def test_a_damaged_card_of_the_base_does_not_end_an_export(tmp_path, card, license, capsys):
    from finequant.quantize.formats.naming import license_on_card

    (tmp_path / "README.md").write_bytes(card)
    assert license_on_card(tmp_path).get("license") == license
    told = "README.md: neither its metadata nor its license can be read" in capsys.readouterr().err
    assert told == (license is None and b"llama" not in card)


def test_gguf_names_the_pre_tokenizer(tokenizer):
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split, Whitespace

    from finequant.quantize.formats.gguf_tokenizer import pre_tokenizer

    # As in the tokenizer.json of the models that gave the names.
    llama_3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    gpt_2 = ByteLevel(add_prefix_space=False)
    words = Sequence(
        [
            Split(Regex(llama_3), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    cases = [
        ("gpt-2", gpt_2, False),
        ("smollm", Sequence([Digits(individual_digits=True), gpt_2]), False),
        ("llama-bpe", words, True),
        ("smaug-bpe", words, False),
    ]

    def name_of(cut, ignore_merges: bool = False) -> str:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        described["pre_tokenizer"] = json.loads(cut.__getstate__())
        described["model"]["ignore_merges"] = ignore_merges
        return pre_tokenizer(described)

    for name, cut, ignore_merges in cases:
        assert name_of(cut, ignore_merges) == name
    for cut in (
        Whitespace(),
        ByteLevel(add_prefix_space=True),
        Sequence([Digits(individual_digits=False), gpt_2]),
    ):
        with pytest.raises(UserError, match="splits words by (Whitespace|ByteLevel|Digits)"):
            name_of(cut)


def test_exports_hold_eight_bits_and_a_quantized_embedding(make):
    run = make(
        "quantize.layers={'*.down_proj': {bits: 8}}",
        "quantize.embedding=8",
        "quantize.scale_dtype=bfloat16",
        to=("gguf", "compressed-tensors"),
    )
    tensors = gguf_tensors(run)
    for name in ("blk.0.ffn_down.weight", "token_embd.weight"):
        assert tensors[name][0] == "Q8_0"
    codes, _ = torchao_weights(run)["model.embed_tokens"]
    data = tensors["token_embd.weight"][1]
    found = data.reshape(len(data), -1, 34)[:, :, 2:].view(np.int8).reshape(len(data), -1)
    assert np.array_equal(found, codes.numpy())


def test_embedding_and_head_are_one_table_where_the_format_can(make, recipe_file):
    from finequant.evaluate.models import packed_sizes
    from finequant.finetune.model import load_config
    from finequant.quantize.scheme import layer_plan, shipped_dtype
    from finequant.quantize.size.plan import model_size
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    calibrated = ["quantize.method=gptq", "quantize.calibration={tokens: 128, length: 64}"]
    shared = [*calibrated, "quantize.head=8", "quantize.embedding=8"]
    run = make(*shared, to=("gguf", "compressed-tensors"))
    weights = torchao_weights(run)
    for ours, theirs in zip(weights["lm_head"], weights["model.embed_tokens"], strict=True):
        assert torch.equal(ours, theirs)
    tensors = gguf_tensors(run)
    assert tensors["token_embd.weight"][0] == "Q8_0"
    assert "output.weight" not in tensors
    packed = load_file(run / "exports" / "compressed-tensors" / "model.safetensors")
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= set(packed)
    recipe = load_recipe(recipe_file, shared)
    config = load_config(recipe.model)
    plan, dtype = layer_plan(recipe.quantize, config), shipped_dtype(recipe.quantize, config)
    size = model_size(plan, config, dtype, recipe.quantize)
    assert packed_sizes(recipe, RunDir(run))["quantized"]["packed_bytes"] == size.packed
    assert size.packed < model_size(plan, config, dtype).packed


@pytest.mark.parametrize(
    ("overrides", "to", "message"),
    [
        (["quantize.group_size=40"], "gguf", "quantize.group_size=32, or a multiple"),
        (["quantize.bits=5"], "compressed-tensors", "layers of 5 bits; expected 4 or 8"),
        (
            ["quantize.layers={'*.k_proj': {bits: 8}}"],
            "compressed-tensors",
            "q_proj, k_proj, v_proj of model.layers.0.self_attn differ in bits or group size",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(make, llama, overrides, to, message):
    base = llama("base_40", hidden_size=160, intermediate_size=160, num_attention_heads=4)
    assert message in refused(make, f"model.base={base}", *overrides, to=(to,))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 3 * index for index in range(8)],
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
POSITIONS_MATTER = {"initializer_range": 0.15}


@pytest.mark.parametrize(
    ("kind", "changes", "formats", "message"),
    [
        ("Llama", {"hidden_act": "gelu"}, list(FORMATS), "MLP is 'gelu' .hidden_act., and .* only"),
        (
            "Qwen3",
            {"attention_bias": True},
            ["compressed-tensors", "gguf", "mlx"],
            "the attention of this base has biases .attention_bias., which .* a Qwen3ForCausalLM",
        ),
        ("Llama", {"head_dim": 24}, ["onnx"], "heads of 24 numbers; .* takes multiples of 16"),
        ("Llama", {"rope_parameters": LONG}, ["mlx"], "scaling 'longrope' differently"),
        (
            "Llama",
            {"rope_parameters": YARN | {"attention_factor": 1.5}},
            ["mlx"],
            "scaling 'yarn' with attention_factor differently",
        ),
    ],
)
def test_a_base_that_readers_do_not_compute_is_refused_before_training(
    tokenizer, kind, changes, formats, message
):
    """Its file would be written, and then refused because of its logits."""
    import transformers

    from finequant.quantize.export import check_exports

    def check(name: str, **settings) -> None:
        config = getattr(transformers, f"{kind}Config")(**SHAPE, vocab_size=384, **settings)
        check_exports(Quantize(effort="fast", exports=[name]), config, tokenizer)

    for name in formats:
        check(name)
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            check(name, **changes)


def test_a_rotary_table_ends_where_longrope_changes_all_angles(make, llama):
    base = llama("long", rope_parameters=LONG, **POSITIONS_MATTER)
    run = make(f"model.base={base}", to=("onnx",))
    assert json.loads((run / "manifest.json").read_text())["onnx"]["cache_length"] == 128


def test_transformers_reads_llama_3s_rotary_scaling_from_a_gguf(make, llama):
    base = llama("llama_3", rope_parameters=LLAMA_3, **POSITIONS_MATTER)
    run = make(f"model.base={base}", to=("gguf",))
    assert json.loads((run / "manifest.json").read_text())["gguf"]["logit_difference"] < 0.01


def test_rows_longer_than_a_rotary_table_do_not_stop_an_export(make):
    run = make("quantize.cache_length=16", to=("onnx",))
    assert json.loads((run / "manifest.json").read_text())["onnx"]["cache_length"] == 16


def test_an_export_is_up_to_date_until_the_codes_change(make, recipe_file):
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    run = make(to=("gguf",))
    recipe = load_recipe(recipe_file, ["quantize.exports=[gguf]"])
    directory = RunDir(run)
    assert directory.what_changed(recipe, "gguf") == []
    assert directory.what_changed(recipe, "compressed-tensors") is None
    file = run / "quantized" / "quantization.json"
    file.write_text(file.read_text() + "\n", encoding="utf-8")
    assert directory.what_changed(recipe, "gguf") == ["the content of quantized/ changed"]
    gguf_file(run).write_bytes(b"")
    changed = directory.what_changed(recipe, "gguf")
    assert (
        "exports/gguf: changed since gguf wrote it (base-127K-tiny-Q4_0.gguf: altered)" in changed
    )


def stopped(*_: object, **__: object) -> None:
    raise Interrupted(signal.SIGTERM)


@pytest.mark.parametrize("name", ["seal", "record"])
def test_a_signal_while_an_export_is_hashed_or_recorded_loses_nothing(make, monkeypatch, name):
    """To hash a large export takes minutes."""
    run = make(to=("gguf",))
    expected = {path.name: path.read_bytes() for path in (run / "exports/gguf").iterdir()}
    shutil.rmtree(run)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(rundir if name == "seal" else rundir.RunDir, name, stopped)
        make(to=("gguf",))
    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFWriter", stopped)
        make(to=("gguf",))
    assert json.loads((run / "manifest.json").read_text())["gguf"]["resumed"]
    assert {path.name: path.read_bytes() for path in (run / "exports/gguf").iterdir()} == expected
    assert [path.name for path in (run / "exports").iterdir()] == ["gguf"]


def test_an_export_is_written_anew_unless_all_its_checks_passed(make, monkeypatch, capsys):
    run = make(to=("gguf",))
    expected = {path.name: path.read_bytes() for path in (run / "exports/gguf").iterdir()}
    shutil.rmtree(run / "exports")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr("finequant.quantize.export.check_logits", stopped)
        make(to=("gguf",))
    assert "to continue from here; the export to gguf starts over\n" in capsys.readouterr().err
    (file,) = (run / "exports" / "gguf.partial").glob("*.gguf")
    file.write_bytes(b"half")
    make(to=("gguf",))
    assert not json.loads((run / "manifest.json").read_text())["gguf"]["resumed"]
    assert {path.name: path.read_bytes() for path in (run / "exports/gguf").iterdir()} == expected


def test_exports_are_stages_between_quantize_and_evaluate(recipe_file):
    from finequant.recipes.load import load_recipe
    from finequant.recipes.stages import stages_of

    recipe = load_recipe(recipe_file, ["quantize.exports=[gguf, torchao, executorch]"])
    assert stages_of(recipe) == ["train", "quantize", "gguf", "executorch", "evaluate"]


def test_naming_formats_does_not_quantize_again(make, recipe_file):
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    run = RunDir(make("quantize.exports=[torchao]", to=()))
    overrides = ["train.max_steps=2", "train.learning_rate=1e-2"]
    recipe = load_recipe(recipe_file, [*overrides, "quantize.exports=[gguf]"])
    assert run.what_changed(recipe, "quantize") == []
    assert "exports/gguf/" in run.inputs(recipe, "evaluate")


def altered(file: Path, name: str, byte: int) -> None:
    """Flips the lowest bit of one byte of a tensor."""
    content = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    start, _ = json.loads(content[8 : 8 + header])[name]["data_offsets"]
    content[8 + header + start + byte] ^= 1
    file.write_bytes(content)


def test_scales_that_half_precision_cannot_hold_are_refused():
    """Its smallest numbers are 6e-8 apart, which matters unless the layer has larger scales."""
    from finequant.quantize.export import check_codes

    def check(*scales: float, code: int = 1) -> float:
        scale = torch.tensor([scales])
        exact = Rounded(torch.full((1, 32 * len(scales)), code, dtype=torch.int8), scale)
        return check_codes("gguf", "up_proj", exact._replace(scale=scale.half()), exact)

    assert check(0.5, 2.0**-24) == 0
    assert 0 < check(0.1, 1e-8) < 2**-11
    assert check(1e-8, 1e-8, code=0) == 0
    for lost in (2e-7, 2e-8):
        with pytest.raises(UserError, match="scales of up_proj, of at most 2e-0., differ by"):
            check(lost, lost)


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf", "onnx", "mlx"])
def test_what_is_read_back_is_freed_layer_by_layer(make, monkeypatch, name):
    """All layers in memory would take a byte for each weight."""
    entry, codes, alive = FORMATS[name], [], []

    def read_back(folder: Path, stored):
        for layer, part in entry.read_back(folder, stored):
            if isinstance(part, Rounded):
                alive.append(sum(other() is not None for other in codes))
                codes.append(weakref.ref(part.codes))
            yield layer, part

    monkeypatch.setitem(FORMATS, name, replace(entry, read_back=read_back))
    make(to=(name,))
    assert len(alive) == 15
    assert max(alive) <= 1  # the layer before


def test_a_float_table_is_compared_some_rows_at_a_time(monkeypatch):
    """In float32 as a whole, several times, the embedding made the peak of an export's memory."""
    from finequant.quantize import export

    table, sizes, compare = torch.ones(4096, 512), [], export._within_rounding

    def record(tensor: torch.Tensor, exact: torch.Tensor) -> bool:
        sizes.append(tensor.numel())
        return compare(tensor, exact)

    monkeypatch.setattr(export, "_within_rounding", record)
    export.check_float("gguf", "model.embed_tokens.weight", table, table)
    assert (sum(sizes), max(sizes)) == (table.numel(), table.numel() // 4)
    changed = table.clone()
    changed[-1, -1] = 1.01
    with pytest.raises(UserError, match="embed_tokens.weight differs once read back"):
        export.check_float("gguf", "model.embed_tokens.weight", changed, table)


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_a_number_beyond_half_precision_is_refused_with_its_layer(
    make, recipe_file, tmp_path, name
):
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.recipes.load import load_recipe

    stored, recipe = read_checkpoint(make(to=("torchao",)) / "quantized"), load_recipe(recipe_file)
    layer, table = "model.layers.1.mlp.up_proj", "model.embed_tokens.weight"
    large = stored.rounded[layer]._replace(scale=stored.rounded[layer].scale * 1e8)
    broken = stored._replace(rounded=stored.rounded | {layer: large})
    with pytest.raises(UserError, match=rf"{name}: {layer}: a number of .* is beyond half"):
        FORMATS[name].write(broken, tmp_path, recipe)
    broken = stored._replace(floats=stored.floats | {table: stored.floats[table] * 1e8})
    with pytest.raises(UserError, match=rf"{table}: .* remove {name} from quantize.exports"):
        FORMATS[name].write(broken, tmp_path, recipe)


def test_an_altered_export_is_refused(make, tmp_path):
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.quantize.export import check_contents

    entry = FORMATS["compressed-tensors"]
    run = make(to=("compressed-tensors",))
    stored = read_checkpoint(run / "quantized")
    folder = tmp_path / "copy"
    shutil.copytree(run / "exports" / "compressed-tensors", folder)
    assert check_contents(entry, stored, entry.read_back(folder, stored)) == 0
    altered(folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight_packed", 77)
    with pytest.raises(UserError, match=r"codes of model\.layers\.0\.mlp\.up_proj differ"):
        check_contents(entry, stored, entry.read_back(folder, stored))
    codes, scale = stored.rounded["lm_head"]
    broken = Rounded(codes, torch.full_like(scale, torch.nan))
    with pytest.raises(UserError, match=r"scales of lm_head, .* differ by nan%"):
        check_contents(entry, stored, [("lm_head", broken)])


@pytest.fixture
def outliers(llama) -> Path:
    """A base whose head reads one channel that is far larger than the others, so that int8
    activations with one scale per token lose the rest."""
    from transformers import LlamaForCausalLM

    base = llama("outliers", intermediate_size=192)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[3] = 3000.0
        model.lm_head.weight[:, 3] /= 3000.0
    model.save_pretrained(base)
    return base


def test_an_export_is_not_blamed_for_the_error_of_int8_activations(make, outliers, capsys):
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.quantize.export import _reference
    from finequant.quantize.logits import relative_difference

    run = make(f"model.base={outliers}", "quantize.method=rtn", to=("gguf", "compressed-tensors"))
    entries = json.loads((run / "manifest.json").read_text())
    assert entries["gguf"]["logit_difference"] < 0.01
    stored = read_checkpoint(run / "quantized")
    reference = _reference(stored, [PROMPT[0].tolist()])
    assert relative_difference(reference.int8, reference.float) > 0.3
    assert entries["compressed-tensors"]["logit_difference"] < 0.05
    assert "(root mean square, with float activations)" in capsys.readouterr().err


def test_logits_are_compared_under_the_activations_of_the_format():
    from finequant.quantize.export import Reference, check_logits
    from finequant.quantize.formats.formats import FORMATS

    torch.manual_seed(0)
    exact = torch.randn(8, 384)
    coarse, other = (exact + 0.7 * torch.randn(8, 384) for _ in range(2))
    reference, gguf = Reference(coarse, exact), FORMATS["gguf"]
    int8 = FORMATS["executorch"]
    assert check_logits(gguf, exact, reference) == 0
    assert check_logits(int8, coarse, reference) == 0
    assert 0.6 < check_logits(int8, other, reference) < 1  # rounded by itself
    unrelated = exact.flip(0)
    for entry, logits in ((gguf, coarse), (gguf, unrelated), (int8, unrelated)):
        with pytest.raises(UserError, match=r"differ from those of quantized/ by \d+\.\d%, expec"):
            check_logits(entry, logits, reference)
    change = 0.05 * torch.randn(8, 384)  # the runtime's is as large, in other directions
    assert check_logits(int8, exact - 1.2 * change, Reference(exact + change, exact)) < 0.07
    with pytest.raises(UserError, match="expected at most"):
        check_logits(int8, exact - 2 * change, Reference(exact + change, exact))
    calm = Reference(exact + 0.01 * torch.randn(8, 384), exact)
    with pytest.raises(UserError, match="expected at most 5%"):
        check_logits(int8, exact + 0.1 * torch.randn(8, 384), calm)


def test_a_missing_package_is_one_line_with_what_to_install(make, monkeypatch):
    from finequant.quantize.formats.formats import FORMATS

    lacking = replace(FORMATS["gguf"], packages={"no_such_module": "no-such-wheel"})
    monkeypatch.setitem(FORMATS, "gguf", lacking)
    assert "gguf: needs a package: pip install no-such-wheel" in refused(make, to=("gguf",))


def test_a_recipe_may_name_exactly_the_formats_of_the_table():
    from typing import get_args

    from finequant.evaluate.models import MODELS
    from finequant.quantize.formats.formats import FORMATS
    from finequant.recipes.schema import Export

    assert ["torchao", *FORMATS] == list(get_args(Export))
    columns = [*MODELS, *(entry.report_key for entry in FORMATS.values())]
    assert len(set(columns)) == len(columns)


def test_a_format_is_one_file_and_one_entry(make, recipe_file, monkeypatch, capsys):
    """Exports to tests/toy_format.py; checks report, card and refusals."""
    import toy_format

    from finequant.evaluate.metrics.exports import measure_export
    from finequant.publish.loading import QUANTIZED, loading
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.quantize.export import export, fitting_formats
    from finequant.quantize.formats.formats import FORMATS
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    monkeypatch.setitem(FORMATS, "toy", toy_format.FORMAT)
    run = RunDir(make("quantize.exports=[torchao]", to=()))
    recipe = load_recipe(recipe_file, ["train.max_steps=2", "train.learning_rate=1e-2"])
    export(recipe, run, ["toy"])
    tensors = load_file(run.exports / "toy" / "model.safetensors")
    for name, (codes, scale) in torchao_weights(run.root).items():
        assert torch.equal(tensors[f"{name}.codes"], codes)
        assert torch.equal(tensors[f"{name}.scale"], scale)
    assert run.manifest()["toy"]["coded_layers"] == 15
    assert run.what_changed(recipe, "toy") == []
    assert "toy: all 15 layers have the same codes and the same scales" in capsys.readouterr().err
    scores = measure_export("toy", recipe, run, None, None)["scores"]  # without a runtime
    assert scores["size_bytes"] == (run.exports / "toy" / "model.safetensors").stat().st_size
    assert "only its size is measured: no runtime is known here" in capsys.readouterr().err
    card = loading(recipe, {}, QUANTIZED, ["model.safetensors", "toy/model.safetensors"])
    assert card.endswith("### toy\n\n`hf download your-name/your-model toy/model.safetensors`")

    def altered_codes(folder, stored):
        tensors = dict(toy_format.read_back(folder, stored))
        codes, scale = tensors["lm_head"]
        return (tensors | {"lm_head": Rounded(codes ^ 1, scale)}).items()

    monkeypatch.setitem(FORMATS, "toy", replace(toy_format.FORMAT, read_back=altered_codes))
    with pytest.raises(UserError, match="toy: codes of lm_head differ.* constraints.txt"):
        export(recipe, run, ["toy"])
    wide = read_checkpoint(run.quantized).contents._replace(bits={"lm_head": 8})
    with pytest.raises(UserError, match="toy: layers of 8 bits; expected at most 4"):
        fitting_formats(["toy"], wide)


def test_of_several_processes_only_the_first_exports(recipe_file, monkeypatch):
    from finequant.quantize.export import main

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main([str(recipe_file), "--to", "gguf"])  # before it looks for quantized/
    assert not end.value.code
    assert not (recipe_file.parent / "run").exists()


def test_without_a_format_the_known_ones_are_named(make):
    assert "torchao, compressed-tensors, gguf, executorch, onnx, mlx" in refused(make, to=())


@pytest.mark.slow
def test_executorch_delegates_every_linear_and_holds_the_codes(executorch_run):
    from executorch.exir._serialize._program import deserialize_pte_binary
    from transformers import AutoModelForCausalLM

    from finequant.quantize.formats.executorch import ExecuTorch

    run = executorch_run / "run"
    file = run / "exports" / "executorch" / "qwen3-base-127K-tiny-8da4w.pte"  # ChatML's family
    assert json.loads((run / "manifest.json").read_text())["executorch"]["delegated_linears"] == 15
    constants = set(deserialize_pte_binary(file.read_bytes()).named_data.buffers)
    for codes, scale in torchao_weights(run).values():
        offset = (codes.to(torch.int16) + 8).to(torch.uint8)
        packed = offset[:, 0::2] | offset[:, 1::2] << 4
        assert packed.numpy().tobytes() in constants
        assert scale.to(torch.bfloat16).view(torch.uint8).numpy().tobytes() in constants
    runtime = ExecuTorch(file)
    with torch.no_grad():
        quantized = AutoModelForCausalLM.from_pretrained(run / "quantized")(PROMPT).logits[0]
    ids = PROMPT[0].tolist()
    for _ in range(2):  # a new sequence forgets the one before
        logits = [runtime.last_logits(ids[:3])]  # a prompt, then token by token, then several
        logits += [runtime.last_logits([ids[3]], 3), runtime.last_logits(ids[4:], 4)]
        for found, expected in zip(logits, quantized[[2, 3, 7]], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert (file.parent / "chat_template.jinja").exists()
    for name, value in {
        "get_max_seq_len": 320,
        "get_max_context_len": 320,
        "get_vocab_size": quantized.shape[1],
        "get_bos_id": 0,
        "get_eos_ids": 2,
        "use_kv_cache": True,
    }.items():
        assert runtime.metadata(name) == [value]


@pytest.mark.slow
def test_executorchs_own_runner_generates_the_models_answer(executorch_run, tokenizer):
    """This is the runner that Android and iOS use, with the tokenizer beside the program."""
    from finequant.evaluate.metrics.exports import greedy_answer
    from finequant.quantize.formats.executorch import ExecuTorch, file_in

    folder = executorch_run / "run" / "exports" / "executorch"
    prompt, ends = tokenizer("open the red")["input_ids"], [tokenizer.eos_token_id]
    runtime = ExecuTorch(file_in(folder))
    expected = greedy_answer(runtime, tokenizer, prompt, ends, 12)
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    runner = TextLLMRunner(str(file_in(folder)), str(folder / "tokenizer.json"))
    pieces: list[str] = []
    wish = GenerationConfig(max_new_tokens=12, temperature=0.0, echo=False)
    runner.generate("open the red", wish, token_callback=pieces.append)
    said = "".join(pieces).removesuffix("<|im_end|>").strip()
    assert said
    assert expected.startswith(said) or said.startswith(expected)


def test_executorch_refuses_what_xnnpack_has_no_kernel_for(make):
    assert "linear layers of 8 bits; XNNPACK's kernels for groups take 4" in refused(
        make, "quantize.bits=8", to=("executorch",)
    )
    wide_head = refused(make, "quantize.head=8", to=("executorch",))
    assert "set quantize.bits=4, and no more in quantize.head and quantize.layers" in wide_head


SHARED = ("quantize.head=8", "quantize.embedding=8", "quantize.scale_dtype=bfloat16")


def weight_in_onnxruntime(product, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Computes the float32 weight [out, in] of a MatMulNBits: its product with the identity."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    settings = {item.name: helper.get_attribute_value(item) for item in product.attribute}
    settings |= {"accuracy_level": 0}  # inputs stay in float
    node = helper.make_node(
        "MatMulNBits", ["x", "c", "s"], ["y"], domain="com.microsoft", **settings
    )
    name = product.input[1].removesuffix(".codes")
    scales = tensors[f"{name}.scales"].astype(np.float32)
    constants = [numpy_helper.from_array(tensors[product.input[1]], "c")]
    constants.append(numpy_helper.from_array(scales, "s"))
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, None) for end in "xy"]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], constants)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": np.eye(settings["K"], dtype=np.float32)})[0].T


def test_a_plan_that_rounds_only_the_head_is_exported(make):
    """Each format names its bits or its file after the layers of blocks; here there are none."""
    formats = ("compressed-tensors", "gguf", "mlx", "onnx")
    run = make("quantize.layers={'*_proj': float}", to=formats)
    assert set(torchao_weights(run)) == {"lm_head"}
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert max(manifest[name]["logit_difference"] for name in formats) < 1e-2


@pytest.mark.parametrize(
    ("overrides", "file"),
    [
        (("quantize.scale_dtype=bfloat16",), "model_q4.onnx"),
        (("quantize.head=float", "quantize.group_size=64"), "model_q4.onnx"),
        (("quantize.layers={'*.down_proj': {bits: 8}}", *SHARED), "model_quantized.onnx"),
    ],
)
def test_onnx_holds_the_codes_and_runs(make, llama, overrides, file):
    """Reads codes straight from the file; runs a prompt in one call and token by token."""
    import onnx
    from transformers import AutoModelForCausalLM

    from finequant.quantize.formats.onnx import OnnxRuntime

    base = llama("with_biases", attention_bias=True, intermediate_size=192)
    run = make(f"model.base={base}", *overrides, to=("onnx",))
    folder = run / "exports" / "onnx"
    graph = onnx.load(folder / file).graph
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    products = {node.input[1]: node for node in graph.node if node.op_type == "MatMulNBits"}
    weights = torchao_weights(run)
    assert {f"{name}.codes" for name in weights if name != "model.embed_tokens"} == set(products)
    for name, (codes, scale) in weights.items():
        table = "lm_head" if name == "model.embed_tokens" else name  # the same
        data = tensors[f"{table}.codes"].reshape(len(codes), -1)
        if data.shape[1] < codes.shape[1]:
            data = np.stack([data & 15, data >> 4], axis=-1).reshape(len(codes), -1) + 120
        assert np.array_equal((data.astype(np.int16) - 128).astype(np.int8), codes.numpy())
        assert np.allclose(tensors[f"{table}.scales"], scale.flatten().float().numpy(), 1e-3, 1e-7)
        weight = weight_in_onnxruntime(products[f"{table}.codes"], tensors)
        expected = codes * scale.half().float().repeat_interleave(
            codes.shape[1] // scale.shape[1], 1
        )
        assert np.allclose(weight, expected, 1e-6, 0)
    runtime = OnnxRuntime(folder)
    with torch.no_grad():
        quantized = AutoModelForCausalLM.from_pretrained(run / "quantized")(PROMPT).logits[0]
    ids = PROMPT[0].tolist()
    for _ in range(2):  # a new sequence forgets the one before
        logits = [runtime.last_logits(ids[:3])]
        logits += [runtime.last_logits([ids[3]], 3), runtime.last_logits(ids[4:], 4)]
        for result, expected in zip(logits, quantized[[2, 3, 7]], strict=True):
            torch.testing.assert_close(result, expected, rtol=0, atol=0.03)
    described = json.loads((folder / "genai_config.json").read_text())["model"]
    assert described["decoder"]["filename"] == file
    assert described["eos_token_id"] == [2]
    names = {item.name for item in graph.input}
    assert described["decoder"]["inputs"]["past_key_names"] % 1 in names
    # transformers.js fills in these dimensions by name, and reads the template from this file.
    assert graph.input[2].type.tensor_type.shape.dim[0].dim_param == "batch_size"
    assert "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())


def test_onnx_weights_beyond_a_protocol_buffer_are_in_a_second_file(make, monkeypatch):
    from finequant.quantize.formats import onnx

    one = json.loads((make(to=("onnx",)) / "manifest.json").read_text())["onnx"]
    monkeypatch.setattr(onnx, "SINGLE_FILE", 1000)
    run = make(to=("onnx",))
    folder, two = run / "exports" / "onnx", json.loads((run / "manifest.json").read_text())["onnx"]
    weights = (folder / "model_q4.onnx_data").stat()
    assert weights.st_size > 10_000
    assert weights.st_mode == (folder / "model_q4.onnx").stat().st_mode
    for key in ("bits_per_rounded_weight", "logit_difference"):
        assert two[key] == pytest.approx(one[key])
    assert two["size_bytes"] == pytest.approx(one["size_bytes"], rel=0.5)
    told = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert told == {"use_external_data_format": True}
    files = [f"onnx/{file.name}" for file in folder.iterdir()]
    assert ", use_external_data_format: true };" in onnx.snippet("a/b", "messages = []", files)


LINES = """
{% for message in messages %}

  {% if message['role'] != 'nobody' %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}

{{ '<|im_start|>assistant' }}
{% endif %}
"""


def test_onnx_templates_render_equally_without_trimming(make, llama):
    """onnxruntime-genai does not trim tags; transformers and transformers.js do."""
    from jinja2 import Environment
    from transformers import AutoTokenizer

    base = llama("lines")
    (base / "chat_template.jinja").write_text(LINES, encoding="utf-8")
    run = make(f"model.base={base}", "data.template_arguments={mood: calm}", to=("onnx",))
    shipped, exported = (
        AutoTokenizer.from_pretrained(run / name) for name in ("quantized", "exports/onnx")
    )
    config = json.loads((run / "exports" / "onnx" / "tokenizer_config.json").read_text("utf-8"))
    messages = [{"role": role, "content": f" {role} \n"} for role in ("user", "assistant", "user")]
    for asks in (False, True):
        render = {"conversation": messages, "tokenize": False, "add_generation_prompt": asks}
        text = shipped.apply_chat_template(**render)
        assert exported.apply_chat_template(**render) == text
        for template in (exported.chat_template, config["chat_template"]):
            plain = Environment(keep_trailing_newline=True).from_string(template)
            assert plain.render(messages=messages, add_generation_prompt=asks) == text


@pytest.mark.parametrize(
    "template",
    ["", "\n", "a\n\n", "{% raw %}\n{% if %}\n{% endraw %}\n\n", "{# a #}\n\n{{ x -}}\n\n"],
)
def test_an_untrimmed_template_renders_as_the_trimmed_one(template):
    from jinja2 import Environment

    from finequant.quantize.formats.untrimmed_template import untrimmed

    trimming = {"trim_blocks": True, "lstrip_blocks": True}
    expected = Environment(**trimming).from_string(template).render(x="x")
    for options in (trimming, {}, {"keep_trailing_newline": True}):
        environment = Environment(**options)
        assert environment.from_string(untrimmed(template)).render(x="x") == expected


def test_onnx_refuses_groups_that_no_block_divides(make, llama):
    base = llama("base_40", hidden_size=160, intermediate_size=160, num_attention_heads=10)
    error = refused(make, f"model.base={base}", "quantize.group_size=40", to=("onnx",))
    assert "onnx: groups of 40 weights" in error or "onnx: needs a package" in error


def test_mlx_is_compared_in_float32_without_a_gpu(make):
    """mlx's CPU kernels sum in bfloat16, which moves a deep model's logits by 13%."""
    run = make("quantize.dtype=bfloat16", "quantize.scale_dtype=bfloat16", to=("mlx",))
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["mlx"]["logit_difference"] < 1e-5


PARTS = ("weight", "scales", "biases")


@pytest.mark.parametrize("overrides", [("quantize.head=float", "quantize.group_size=64"), SHARED])
def test_mlx_holds_the_codes_and_runs(make, llama, overrides):
    """Reads codes straight from the file; rotary positions have the names that mlx-lm reads."""
    import mlx.core as mx
    from transformers import AutoModelForCausalLM

    from finequant.quantize.formats.mlx import MlxLm

    rotary = {"rope_type": "default", "rope_theta": 500.0}
    base = llama("other_theta", rope_parameters=rotary, intermediate_size=192)
    run = make(f"model.base={base}", *overrides, to=("mlx",))
    folder = run / "exports" / "mlx"
    tensors = load_file(folder / "model.safetensors")
    weights = torchao_weights(run)
    shared = "model.embed_tokens" in weights
    for name, (codes, scale) in weights.items():
        table = "model.embed_tokens" if name == "lm_head" else name
        words = tensors[f"{table}.weight"].view(torch.int32)
        bits = 32 * words.shape[1] // codes.shape[1]
        shifts = range(0, 32, bits)
        parts = torch.stack([words >> shift & 2**bits - 1 for shift in shifts], dim=-1).flatten(1)
        assert torch.equal((parts - 2 ** (bits - 1)).to(torch.int8), codes)
        assert torch.equal(tensors[f"{table}.scales"], scale.float())
        assert torch.equal(tensors[f"{table}.biases"], scale.float() * -(2 ** (bits - 1)))
        parts = (mx.array(tensors[f"{table}.{part}"].numpy()) for part in PARTS)
        group = codes.shape[1] // scale.shape[1]
        weight = torch.from_numpy(np.array(mx.dequantize(*parts, group, bits)))
        expected = codes * scale.float().repeat_interleave(group, 1)
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-7)
    assert not [key for key in tensors if key.startswith("lm_head")]
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["quantization"] == {"group_size": 32 if shared else 64, "bits": 4}
    assert config["rope_theta"] == 500.0
    runtime = MlxLm(folder)
    with torch.no_grad():
        quantized = AutoModelForCausalLM.from_pretrained(run / "quantized")(PROMPT).logits[0]
    ids = PROMPT[0].tolist()
    for _ in range(2):  # a new sequence forgets the one before
        logits = [runtime.last_logits(ids[:3]), runtime.last_logits(ids[3:], 3)]
        for result, expected in zip(logits, quantized[[2, 7]], strict=True):
            torch.testing.assert_close(result, expected, rtol=0, atol=0.03)


def test_a_gguf_that_could_not_be_read_back_in_memory_is_refused_before_it_is_written(
    make, recipe_file, tmp_path, monkeypatch
):
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.quantize.formats import gguf
    from finequant.recipes.load import load_recipe

    stored, recipe = read_checkpoint(make(to=("torchao",)) / "quantized"), load_recipe(recipe_file)
    monkeypatch.setattr(gguf, "RUNTIME", {"no_such_module": "llama-cpp-python"})
    monkeypatch.setattr(gguf, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="about .* GB of memory, .* `pip install llama-cpp-python`"):
        gguf.write(stored, tmp_path, recipe)
    assert not [*tmp_path.glob("*.gguf")]
    monkeypatch.setattr(gguf, "RUNTIME", {"torch": "torch"})  # a runtime that is installed
    gguf.write(stored, tmp_path, recipe)
    assert gguf.file_in(tmp_path).stat().st_size
