"""What ships equals what transformers and peft load in a process that cannot import finequant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import difference, make_adapter, make_llama, make_recipe, make_tokenizer
from outside import WITHOUT_FINEQUANT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finequant.evaluate.metrics.held_out import answer
from finequant.finetune.model import load_base, load_config
from finequant.quantize.checkpoint import reading
from finequant.quantize.checkpoint.blocks import float_logits
from finequant.quantize.checkpoint.reload import shipped_logits
from finequant.quantize.checkpoint.stored import read_checkpoint
from finequant.quantize.convert import check_base_range
from finequant.quantize.export import check_contents
from finequant.quantize.formats import compressed_tensors, gguf
from finequant.quantize.merge.adapter import Adapter, merged_weights, open_base
from finequant.quantize.merge.check import check_merge
from finequant.quantize.merge.overflow import check_range
from finequant.quantize.scheme import layer_plan, shipped_dtype
from finequant.quantize.write import write_float, write_quantized
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Model, Quantize

PROMPTS = [list(range(20, 60)), [5, 6, 7], [9]]
NEW_TOKENS = 12
ENDS = [2, *range(100, 300)]
"""So many end tokens that a random model soon generates one."""


def edited(change):
    """Makes an edit of a base from a change to its tensors, {name: tensor}, in place."""

    def edit(base: Path) -> None:
        tensors = load_file(base / "model.safetensors")
        change(tensors)
        save_file(tensors, base / "model.safetensors", {"format": "pt"})

    return edit


def own_head(tensors: dict) -> None:
    tensors["lm_head.weight"] = 0.02 * torch.randn_like(tensors["model.embed_tokens.weight"])


def copied_head(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def only_head(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def bare(tensors: dict) -> None:
    """Names the tensors as a LlamaModel does, which has no head."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def random_biases(tensors: dict) -> None:
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.normal_(std=0.3)


def zero_rows(tensors: dict) -> None:
    tensors["model.embed_tokens.weight"][20:25] = 0


def in_float16(tensors: dict) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(torch.float16)


def in_float64(tensors: dict) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.double()


def several_ends(base: Path) -> None:
    GenerationConfig(eos_token_id=ENDS, pad_token_id=0).save_pretrained(base)


BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
VARIANTS = {
    "tied": ({}, None),
    "untied": ({"tie_word_embeddings": False}, None),
    "own_head": ({}, edited(own_head)),
    "biases": (BIASES, edited(random_biases)),
    "several_ends": ({"tie_word_embeddings": False}, several_ends),
    "float16": ({}, edited(in_float16)),
    "float64": ({}, edited(in_float64)),
}
SIBLINGS = {
    "copied_head": ({}, edited(copied_head)),
    "only_head": ({}, edited(only_head)),
    "bare": ({}, edited(bare)),
    "zero_rows": ({"tie_word_embeddings": False}, edited(zero_rows)),
    "dynamic_rope": ({"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, None),
}

CHILD = (
    WITHOUT_FINEQUANT
    + """
import torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

root, prompts, count = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])

@torch.inference_mode()
def logits(model):
    rows = [model.eval()(torch.tensor([ids])).logits[0, -1].float() for ids in prompts]
    return torch.stack(rows)

for folder in sorted(root.iterdir()):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    found = {"tuned": logits(PeftModel.from_pretrained(base, folder / "adapter"))}
    for name in ("merged", "quantized", "exported"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder / name, output_loading_info=True
        )
        assert not any(info.values()), (folder, name, info)
        found[name] = logits(model)
        if name == "quantized":
            tokenizer = AutoTokenizer.from_pretrained(folder / name)
            said = []
            for ids in prompts:
                ids = torch.tensor([ids])
                new = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1]:]
                ends = model.generation_config.eos_token_id
                new = new[:-1] if new[-1] in torch.tensor(ends) else new  # not part of the answer
                said.append(tokenizer.decode(new, skip_special_tokens=True))
            (folder / "said.json").write_text(json.dumps(said))
    save_file(found, folder / "logits.safetensors")
"""
)


def variant(folder: Path, changes: dict, edit, **lora):
    """Makes a base and an adapter in a folder, and opens both."""
    torch.manual_seed(3)
    make_llama(folder / "base", **changes)
    if edit:
        edit(folder / "base")
    make_adapter(folder / "base", folder / "adapter", **lora)
    base = open_base(Model(base=str(folder / "base")))
    return base, Adapter(folder / "adapter", base, "base")


def build(folder: Path, changes: dict, edit) -> tuple[torch.Tensor, list[str]]:
    """Makes every artifact of a variant; returns logits of quantized, with and without rounded
    activations, and its answers."""
    base, adapter = variant(folder, changes, edit)
    assert check_merge(base, adapter, folder / "adapter", PROMPTS)[0] < 1e-5
    weights, quantize = (
        merged_weights(base, adapter),
        Quantize(effort="fast", bits=8, scale="max", scale_dtype="float32"),
    )
    for name in ("merged", "quantized", "exported"):
        (folder / name).mkdir()
    write_float(folder / "merged", base, weights, torch.float32)
    model = Model(base=str(folder / "base"))
    plan, dtype = layer_plan(quantize, base.config), shipped_dtype(quantize, load_config(model))
    checkpoint = write_quantized(folder / "quantized", base, weights, quantize, dtype)
    shipped = checkpoint.weights()
    blocks = base.config.num_hidden_layers
    logits = shipped_logits(base.config, plan, shipped, dtype, PROMPTS, blocks)
    exact = float_logits(base.config, shipped, PROMPTS)  # the export rounds no activations
    checkpoint.finish()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "quantized")
    compressed_tensors.write(read_checkpoint(folder / "quantized"), folder / "exported", None)
    quantized = AutoModelForCausalLM.from_pretrained(folder / "quantized").eval()
    return logits, exact, answer(quantized, tokenizer, PROMPTS, NEW_TOKENS, 1, "answers")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="module")
def shipped(root):
    """Maps variants to logits and answers, finequant's and the other process's."""
    ours = {name: build(root / name, *how) for name, how in VARIANTS.items()}
    command = [sys.executable, "-P", "-c", CHILD, str(root), json.dumps(PROMPTS), str(NEW_TOKENS)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return {
        name: (
            *ours[name],
            load_file(root / name / "logits.safetensors"),
            json.loads((root / name / "said.json").read_text()),
        )
        for name in VARIANTS
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_plain_transformers_and_peft_compute_the_same(shipped, name):
    logits, exact, answers, theirs, said = shipped[name]
    assert difference(theirs["merged"], theirs["tuned"]) < 1e-5
    assert torch.equal(theirs["quantized"], logits)
    assert difference(theirs["exported"], exact) < 0.005
    assert difference(theirs["quantized"], theirs["tuned"]) < 0.05  # eight bits
    assert [text.strip() for text in said] == answers


def test_layers_are_read_in_a_fixed_order(shipped, root):
    """safetensors lists metadata in a random order, and exports are written in the order read."""
    layers = list(read_checkpoint(root / "tied" / "quantized").rounded)
    assert layers == sorted(layers)


def test_several_ends_end_generation(shipped):
    """Without its end tokens, a random model would use up its limit."""
    answers = {name: shipped[name][2] for name in ("untied", "several_ends")}
    assert sum(map(len, answers["several_ends"])) < sum(map(len, answers["untied"]))


def test_every_tensor_of_a_gguf_is_compared_including_biases(shipped, root, tmp_path):
    stored = read_checkpoint(root / "biases" / "quantized")
    assert sum(name.endswith("bias") for name in stored.floats) == 14
    (stored.folder / "quantization.json").write_text("{}")
    recipe = load_recipe(make_recipe(tmp_path, root / "biases" / "base"))
    gguf.write(stored, tmp_path, recipe)
    read = dict(gguf.read_back(tmp_path, stored))
    assert check_contents(gguf.FORMAT, stored, read.items()) < 2**-8
    assert difference(gguf.FORMAT.logits(tmp_path, PROMPTS), shipped["biases"][0]) < 0.02
    lost = "model.layers.1.self_attn.k_proj.bias"
    with pytest.raises(UserError, match=f"{lost} differs once read"):
        check_contents(gguf.FORMAT, stored, (read | {lost: read[lost] * 1.01}).items())
    for name in (lost, "lm_head"):
        without = [(key, part) for key, part in read.items() if key != name]
        with pytest.raises(UserError, match=f"lacks 1 tensor, such as {name}"):
            check_contents(gguf.FORMAT, stored, without)
    with pytest.raises(UserError, match="should not have 1 tensor, such as extra"):
        check_contents(gguf.FORMAT, stored, [*read.items(), ("extra", read[lost])])


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_are_merged_as_transformers_loads_them(tmp_path, name):
    base, adapter = variant(tmp_path, *SIBLINGS[name])
    assert check_merge(base, adapter, tmp_path / "adapter", PROMPTS)[0] < 1e-5


def test_a_head_that_is_read_wrongly_is_noticed(tmp_path):
    """The other side of the check does not read the head through the same function."""
    base, adapter = variant(tmp_path, *VARIANTS["own_head"])
    wrong = base._replace(
        weights=lambda name, rows: base.weights(name.replace("lm_head", "model.embed_tokens"), rows)
    )
    with pytest.raises(UserError, match="merged logits differ from base \\+ adapter"):
        check_merge(wrong, adapter, tmp_path / "adapter", PROMPTS)


def test_lora_of_an_untied_head_is_merged(tmp_path):
    lora = {"target_modules": ["q_proj", "lm_head"]}
    base, adapter = variant(tmp_path, *VARIANTS["untied"], **lora)
    assert "lm_head" in adapter.layers
    assert check_merge(base, adapter, tmp_path / "adapter", PROMPTS)[0] < 1e-5


def test_lora_of_a_tied_head_is_refused_for_its_true_reason(tmp_path):
    with pytest.raises(UserError, match="changes lm_head, which the base ties to its embedding"):
        variant(tmp_path, {}, None, target_modules=["q_proj", "lm_head"])


def test_an_adapter_of_a_base_that_peft_changed_is_refused(tmp_path):
    """peft's matrices come with a base from which the first ones are subtracted; merged into the
    unchanged base, they were another model, and the check, without weights, did not notice."""
    for start in ("pissa", "olora"):
        with pytest.raises(UserError, match=f"changed before training .init_lora_weights: {start}"):
            variant(tmp_path / start, {}, None, init_lora_weights=start)
    with pytest.raises(UserError, match="what follows some tokens only .alora_invocation_tokens"):
        variant(tmp_path / "alora", {}, None, alora_invocation_tokens=[5, 6])


def without_one_matrix(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})


def config_of(content: str):
    return lambda adapter: (adapter / "adapter_config.json").write_text(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one_matrix, "not an adapter of base: .* is in only one of the two"),
        (config_of("{"), "not an adapter of base: "),
        (config_of("[]"), "not an adapter of base: "),
        (config_of('{"r": 4}'), "not an adapter of base: .*lora_alpha"),
        (lambda adapter: (adapter / "adapter_config.json").unlink(), "not an adapter of base: "),
    ],
)
def test_what_is_not_a_whole_adapter_is_refused(tmp_path, change, message):
    base, _ = variant(tmp_path, {}, None)
    change(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        Adapter(tmp_path / "adapter", base, "base")


def last_row_of_head(tensors: dict) -> None:
    tensors["lm_head.weight"][-1] += 1


@pytest.mark.parametrize("change", [own_head, last_row_of_head])
def test_an_adapter_of_a_base_with_another_head_is_refused(tmp_path, monkeypatch, change):
    """With a LoRA of the head, peft saves the head, too."""
    monkeypatch.setattr(reading, "PIECE_WEIGHTS", 32 * 64)
    variant(tmp_path, *VARIANTS["untied"], target_modules=["q_proj", "lm_head"])
    edited(change)(tmp_path / "base")
    base = open_base(Model(base=str(tmp_path / "base")))
    with pytest.raises(UserError, match="its lm_head differs from that of base"):
        Adapter(tmp_path / "adapter", base, "base")


def test_an_adapter_that_peft_does_not_take_is_refused(tmp_path):
    base, adapter = variant(tmp_path, {}, None)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config_of(json.dumps(config | {"target_modules": ["nowhere"]}))(tmp_path / "adapter")
    with pytest.raises(UserError, match="peft does not take this adapter: "):
        check_merge(base, adapter, tmp_path / "adapter", PROMPTS)


def overflowing(tensors: dict) -> None:
    """Makes an MLP that exceeds float16's 65504 inside, but not at its end, stored in float16."""
    in_float16(tensors)
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 3000
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3000
    tensors["model.layers.1.mlp.down_proj.weight"] /= 60000


def overflowing_norm(tensors: dict) -> None:
    in_float16(tensors)
    tensors["model.norm.weight"] *= 60000


def overflowing_head(tensors: dict) -> None:
    in_float16(tensors)
    tensors["lm_head.weight"] = 50000 * tensors["lm_head.weight"].sign()


@pytest.mark.parametrize(
    ("edit", "layer"),
    [
        (overflowing, "inputs of model.layers.1.mlp.down_proj"),
        (overflowing_norm, "outputs of model.norm"),
        (overflowing_head, "outputs of lm_head"),
    ],
)
def test_a_base_that_overflows_float16_is_refused(tmp_path, edit, layer):
    """The message names the layer, and the dtype that helps; other dtypes are not checked."""
    make_llama(tmp_path / "base", tie_word_embeddings=False)
    edited(edit)(tmp_path / "base")
    file = make_recipe(tmp_path, tmp_path / "base")
    recipe = load_recipe(file)
    with pytest.raises(UserError, match=f"{layer} are not finite.*=bfloat16"):
        check_base_range(recipe)
    check_base_range(load_recipe(file, ["quantize.dtype=bfloat16"]))
    calm = Model(base=str(make_llama(tmp_path / "calm")))
    base = open_base(calm)
    check_range(base.config, base.weights, PROMPTS, torch.float16)


def test_tied_weights_and_dtype_are_those_of_the_files(tmp_path):
    """config.json may say otherwise."""

    def told(name: str, edit, **said) -> tuple[bool, torch.dtype]:
        make_llama(tmp_path / name)
        edit(tmp_path / name)
        path = tmp_path / name / "config.json"
        config = {**json.loads(path.read_text()), **said}
        path.write_text(json.dumps({key: value for key, value in config.items() if value != ""}))
        config = load_config(Model(base=str(tmp_path / name)))
        return config.tie_word_embeddings, config.dtype

    assert told("own", edited(own_head)) == (False, torch.float32)
    assert told("copy", edited(copied_head)) == (True, torch.float32)
    assert told("silent", edited(in_float16), dtype="") == (True, torch.float16)
    assert told("lie", edited(zero_rows), dtype="float16") == (True, torch.float32)
    loaded = load_base(Model(base=str(tmp_path / "own")), torch.float32)
    assert not loaded.config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(tmp_path / "own").eos_token_id == ENDS[0]
