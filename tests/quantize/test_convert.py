"""quantize/convert.py: what is saved is what was computed, and what from_pretrained loads."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file

from finequant.recipes.errors import UserError

TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def quantize(recipe_file, train_once):
    """Trains two steps, quantizes, and returns the folder `quantized/`."""
    from finequant.quantize.convert import main as convert

    def run(*overrides: str) -> Path:
        arguments = [str(recipe_file), "train.max_steps=2", "train.learning_rate=1e-2", *overrides]
        train_once(arguments)
        convert(arguments)
        return recipe_file.parent / "run" / "quantized"

    return run


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


FOUR = {"bits": 4, "group_size": 32, "scale_dtype": "float32", "dtype": "auto"}
EIGHT = {"bits": 8, "group_size": 64, "scale_dtype": "bfloat16", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("tied", "head", "scheme"),
    [
        (True, "quantize", FOUR),
        (True, "float", EIGHT),
        (False, "quantize", EIGHT),
        (False, "float", FOUR),
    ],
)
def test_codes_scales_and_floats_are_what_the_recipe_says(
    quantize, recipe_file, llama, tied, head, scheme
):
    base = llama("variant", tie_word_embeddings=tied, intermediate_size=192)
    folder = quantize(
        f"model.base={base}",
        f"quantize.head={head}",
        *(f"quantize.{key}={value}" for key, value in scheme.items()),
    )
    tensors = stored(folder)
    codes = {name for name in tensors if name.endswith("_weight_qdata")}
    assert len(codes) == 2 * 7 + (head == "quantize")
    largest = 2 ** (scheme["bits"] - 1)
    for name in codes:
        scale = tensors[name.replace("_qdata", "_scale")]
        assert tensors[name].dtype == torch.int8
        assert tensors[name].min().item() >= -largest
        assert tensors[name].max().item() < largest
        assert scale.dtype == TORCH_TYPES[scheme["scale_dtype"]]
        assert scale.shape[1] == tensors[name].shape[1] // scheme["group_size"]
    dtype = torch.float32 if scheme["dtype"] == "auto" else torch.bfloat16
    assert tensors["model.embed_tokens.weight"].dtype == dtype
    assert ("lm_head.weight" in tensors) == (head == "float" and not tied)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tied and head == "float")


def test_a_base_whose_files_are_bfloat16_ships_in_bfloat16(quantize, llama):
    base = llama("narrow")
    file = base / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    folder = quantize(f"model.base={base}")
    assert stored(folder)["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_dequantized_weights_are_the_merged_ones_within_half_a_step(quantize, recipe_file):
    from transformers import AutoModelForCausalLM

    folder = quantize("quantize.keep_merged=true")
    merged = AutoModelForCausalLM.from_pretrained(folder.parent / "merged")
    quantized = AutoModelForCausalLM.from_pretrained(folder)
    layers = json.loads((folder / "quantization.json").read_text())["layers"]
    assert len(layers) == 16
    assert layers.pop()["bits"] is None  # the embedding
    for layer in layers:
        exact = merged.get_submodule(layer["name"]).weight.detach()
        rounded = quantized.get_submodule(layer["name"]).weight.dequantize().detach()
        scale = exact.reshape(len(exact), -1, 32).abs().amax(-1) / 7.5
        step = scale.repeat_interleave(32, dim=1)
        # The largest positive weight of a group lies half a step beyond the largest code, 7.
        assert ((exact - rounded).abs() <= 0.501 * step).all()
        noise = (exact - rounded).square().sum()
        ratio = 10 * math.log10((exact.square().sum() / noise).item())
        assert layer["snr_db"] == pytest.approx(ratio, abs=0.02)
        assert ratio > 15
    assert merged.config.tie_word_embeddings


def test_the_merged_checkpoint_is_base_plus_adapter(quantize, recipe_file, tiny_base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = quantize("quantize.keep_merged=true").parent
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    expected = PeftModel.from_pretrained(base, run / "adapter")(prompt).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    torch.testing.assert_close(merged(prompt).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_folder_has_all_that_a_chat_needs(quantize, tokenizer):
    from transformers import AutoTokenizer

    folder = quantize()
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "recipe.yaml",
        "quantization.json",
    }
    assert not names & {"float", "reload"}
    messages = [{"role": "user", "content": "open the red door"}]
    inside = AutoTokenizer.from_pretrained(folder)
    assert inside.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert str(folder.parents[1]) not in (folder / "config.json").read_text()


def test_activations_are_quantized_to_int8_per_token(quantize):
    """One large activation coarsens its own token only."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantize())
    layer = model.model.layers[0].mlp.up_proj
    activations = torch.randn(2, 64)
    exact = activations @ layer.weight.dequantize().T
    plain = layer(activations)
    activations[0, 0] = 1000.0
    spiked = layer(activations)
    assert 0 < (plain - exact).abs().max() < 0.05 * exact.abs().max()
    torch.testing.assert_close(spiked[1], plain[1])
    spiked_exact = activations @ layer.weight.dequantize().T
    assert (spiked[0] - spiked_exact[0]).abs().max() > 5 * (plain[0] - exact[0]).abs().max()


@pytest.mark.parametrize(("size", "fitting"), [(96, "32"), (128, "32")])
def test_a_group_size_that_leaves_a_remainder_is_refused(quantize, recipe_file, size, fitting):
    message = refused(quantize, f"quantize.group_size={size}")
    assert f"quantize.group_size: {size} does not divide" in message
    assert "self_attn.q_proj (64)" in message
    assert f"group sizes that do: {fitting}" in message


def test_any_divisor_is_a_valid_group_size(quantize, llama):
    base = llama("wide", hidden_size=192, intermediate_size=384, num_attention_heads=6)
    folder = quantize(f"model.base={base}", "quantize.group_size=48")
    scale = stored(folder)["model.layers.0.mlp.down_proj._weight_scale"]
    assert scale.shape == (192, 8)


def test_an_adapter_of_another_base_is_refused(quantize, recipe_file, llama):
    from finequant.quantize.convert import main as convert

    folder = quantize()
    other = llama("other", hidden_size=96, intermediate_size=192)
    # By the manifest; then, like an adapter that came without one, by its shapes.
    for words in ("not made from the present inputs: model.base", f"not an adapter of {other}"):
        assert words in refused(convert, [str(recipe_file), f"model.base={other}"])
        (folder.parent / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda adapter: rank(adapter, 8), "not an adapter of"),
        (
            lambda adapter: (adapter / "adapter_model.bin").write_bytes(b"x"),
            "pickled files are not",
        ),
        (lambda adapter: os.truncate(adapter / "adapter_model.safetensors", 99), "damaged"),
    ],
    ids=["wrong rank", "pickled", "truncated"],
)
def test_an_adapter_brought_from_elsewhere_is_checked(quantize, recipe_file, change, words):
    """The adapter has neither SHA256SUMS nor an entry in the manifest."""
    from finequant.quantize.convert import main as convert

    run = quantize().parent
    (run / "manifest.json").unlink()
    (run / "adapter" / "SHA256SUMS").unlink()
    change(run / "adapter")
    assert words in refused(convert, [str(recipe_file)])


def rank(adapter: Path, value: int) -> None:
    """Writes a rank that is not that of the matrices."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"r": value})
    (adapter / "adapter_config.json").write_text(text, encoding="utf-8")


def test_an_adapter_with_nan_is_refused_and_nothing_is_lost(quantize, recipe_file):
    from finequant.quantize.convert import main as convert

    folder = quantize()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    file = folder.parent / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    for words in ("changed since it was written", "cannot be merged"):
        assert words in refused(convert, [str(recipe_file)])
        (file.parent / "SHA256SUMS").unlink(missing_ok=True)  # to use it as it is
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_a_checkpoint_that_was_altered_fails_the_reload(quantize, reloads):
    from transformers import AutoModelForCausalLM

    from finequant.quantize.checkpoint.reload import check_reload

    folder = quantize()
    prompts = [[5, 6, 7]]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = model(torch.tensor(prompts)).logits[:, -1].clone()
    reloads.fresh = True
    check_reload(expected, folder, prompts, 2)
    reloads.fresh = False
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    described = json.loads(content[8 : 8 + header])
    start, _ = described["lm_head._weight_scale"]["data_offsets"]
    # An exponent bit of a scale of row 5; row 0, the padding token, has codes of zero only.
    content[8 + header + start + 4 * 2 * 5 + 3] ^= 0x01
    file.unlink()  # the model in memory may be mapped to it
    file.write_bytes(content)
    with pytest.raises(UserError, match="reloaded logits differ.* constraints.txt"):
        check_reload(expected, folder, prompts, 2)


def test_without_an_adapter_it_says_what_to_run(recipe_file):
    from finequant.quantize.convert import main as convert

    assert "only `finequant train RECIPE`, first" in refused(convert, [str(recipe_file)])


def test_without_calibration_a_second_process_has_nothing_to_do(recipe_file, monkeypatch):
    from finequant.quantize.convert import main

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    main([str(recipe_file), "quantize.method=hqq"])  # before it looks for an adapter
    assert not (recipe_file.parent / "run").exists()
