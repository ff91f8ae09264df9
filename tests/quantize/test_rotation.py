"""The rotated model computes the same, and has fewer outliers."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finequant.quantize.checkpoint.reading import row_slices
from finequant.quantize.methods.rotation import hadamard_orders, orthogonal, rotated
from finequant.quantize.methods.transforms import transform_model
from finequant.quantize.scheme import layer_plan
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Quantize

DIGESTS = {45: "17236ee19202c797", 64: "b18c85b4a7694b62", 576: "2d325eecec74efdb"}
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def with_outliers(folder):
    """Saves a Llama whose norms are not all ones, whose biases are large, if it has any, and whose
    hidden states have a few large channels."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += torch.rand(weight.shape, generator=generator)
            elif name.endswith("bias"):
                weight += torch.randn(weight.shape, generator=generator)
        model.model.embed_tokens.weight[:, 3] *= 30
    return model


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 8, 24, 26, 45, 49, 80, 96, 128, 576])
def test_the_rotation_is_orthogonal(size):
    matrix = orthogonal(size).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size).double(), atol=1e-6)
    assert torch.equal(orthogonal(size), orthogonal(size))


# Hidden sizes of Llamas, and of heads.
@pytest.mark.parametrize("size", [2, 12, 28, 36, 64, 80, 96, 128, 576, 896, 960, 1536])
def test_all_entries_have_one_magnitude_and_rows_are_exactly_orthogonal(size):
    """The matrix is its signs over the square root of the size; products of signs are integers."""
    matrix = orthogonal(size)
    assert (matrix.abs() == torch.tensor(size**-0.5, dtype=torch.float32)).all()
    signs = matrix.sign().double()
    assert torch.equal(signs @ signs.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [2048, 2560, 3072, 3200, 4096, 5120, 6656, 8192, 16384])
def test_larger_hidden_sizes_are_products_of_known_orders(size):
    orders = hadamard_orders(size)
    assert math.prod(orders) == size
    assert max(orders) <= 256  # small matrices, which are made quickly


def test_the_rotations_bits_do_not_depend_on_the_machine(monkeypatch):
    """Compares with recorded bits; no library of linear algebra is involved."""
    monkeypatch.setattr(torch.linalg, "qr", None)
    digests = {
        size: hashlib.sha256(orthogonal(size).numpy().tobytes()).hexdigest()[:16]
        for size in (45, 64, 576)
    }
    assert digests == DIGESTS


BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, BIASES]
)
def test_the_rotated_model_computes_the_same(llama, config):
    model = with_outliers(llama("base", **config))
    with torch.no_grad():
        before = model(PROMPT, output_hidden_states=True)
        transform_model(model, Quantize(rotate=True))
        after = model(PROMPT, output_hidden_states=True)
    assert torch.allclose(after.logits, before.logits, atol=1e-4 * before.logits.abs().max())
    for x, y in zip(before.hidden_states[:-1], after.hidden_states[:-1], strict=True):
        assert torch.allclose(x.norm(dim=-1), y.norm(dim=-1), rtol=1e-4)
        assert y.abs().max() < 0.7 * x.abs().max() or "mlp_bias" in config
    norms = [w for name, w in model.named_parameters() if "norm" in name]
    assert all((weight == 1).all() for weight in norms)


def test_rows_are_the_same_bits_however_they_are_read(llama):
    model = with_outliers(llama("base", **BIASES))
    parameters = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    weights = rotated(lambda name, rows: parameters[name][rows], model.config)
    for name, tensor in parameters.items():
        whole = weights(name, slice(None))
        parts = [weights(name, rows) for rows in row_slices(tensor.shape)]
        assert torch.equal(torch.cat(parts), whole), name
        single = slice(len(tensor) // 2, len(tensor) // 2 + 1)
        if name == "model.embed_tokens.weight":
            assert torch.equal(weights(name, single), whole[single])


def test_a_tied_head_in_float_is_refused():
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    with pytest.raises(UserError, match="quantize.head=quantize"):
        config = LlamaConfig(**shape, tie_word_embeddings=True)
        layer_plan(Quantize(rotate=True, head="float"), config)


@pytest.mark.parametrize("how", ["quantize.bits=8", "quantize.budget=9"])
def test_what_ships_is_the_rotated_merged_model(recipe_file, tiny_base, train_once, how):
    from peft import PeftModel

    from finequant.quantize.convert import main as convert

    arguments = [str(recipe_file), "train.max_steps=2", "train.learning_rate=1e-2"]
    train_once(arguments)
    convert([*arguments, "quantize.rotate=true", how])
    run = recipe_file.parent / "run"
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    tuned = PeftModel.from_pretrained(base, run / "adapter").merge_and_unload()
    shipped = AutoModelForCausalLM.from_pretrained(run / "quantized")
    with torch.no_grad():
        expected, found = tuned(PROMPT).logits, shipped(PROMPT).logits
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert (shipped.model.norm.weight == 1).all()
    embedding = shipped.model.embed_tokens.weight
    assert (embedding - tuned.model.embed_tokens.weight).norm() > embedding.norm()
    record = json.loads((run / "quantized" / "quantization.json").read_text())
    assert record["method"].startswith("rotated, then")
