"""What a run does once: it hashes its base, dequantizes it, and leaves nothing for a second run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from finequant.recipes import artifact, freshness

SHORT = [
    "train.max_steps=1",
    "evaluate.max_new_tokens=2",
    "evaluate.divergence_tokens=32",
    "quantize.method=gptq",
    "quantize.calibration={tokens: 128, length: 32}",
]


def write_gguf(path: Path, folder: Path) -> None:
    """Writes the weights and the tokenizer of a tiny Llama; transformers reads them as another, but
    valid, one: it unpermutes the rows of q and k, which were never permuted."""
    from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(described["vocab"], key=described["vocab"].get))
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (config.vocab_size - 3))
    writer.add_token_merges([" ".join(merge) for merge in described["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        writer.add_tensor(names.get_name(name, (".weight",)), parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf(tmp_path, tiny_base, monkeypatch) -> str:
    """A GGUF base in a package of this test, whose caches are empty."""
    package = tmp_path / "packages" / "tiny_gguf"
    package.mkdir(parents=True)
    write_gguf(package / "model.gguf", tiny_base)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return "package:tiny_gguf/model.gguf"


def test_a_dequantized_base_is_what_transformers_reads(gguf, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from finequant.finetune.model import load_base, load_tokenizer
    from finequant.quantize.merge.adapter import open_base
    from finequant.recipes.schema import Model

    folder = tmp_path / "packages" / "tiny_gguf"
    options = {"gguf_file": "model.gguf", "quantization_config": GgufConfig(dequantize=True)}
    for dtype in (torch.float32, torch.bfloat16):
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        base = load_base(Model(base=gguf), dtype)
        for name, weight in expected.state_dict().items():
            assert torch.equal(base.state_dict()[name], weight)
    read = open_base(Model(base=gguf)).weights("model.layers.1.mlp.up_proj.weight", slice(3, 5))
    assert torch.equal(read.bfloat16(), expected.model.layers[1].mlp.up_proj.weight[3:5])
    text = "<|im_start|>open the red door at 11 o'clock<|im_end|>"
    ids = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")(text).input_ids
    assert load_tokenizer(Model(base=gguf))(text).input_ids == ids


def test_a_tokenizer_of_earlier_code_is_read_again(gguf, monkeypatch):
    """A wrong pre-tokenizer would stay in the user's cache after it was corrected."""
    from finequant.finetune import gguf_base
    from finequant.recipes.schema import Model

    with monkeypatch.context() as earlier:
        earlier.setattr(gguf_base, "content_hash", lambda _: "earlier", raising=False)
        folder = gguf_base.described(Model(base=gguf))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    artifact.seal(folder)
    assert gguf_base.described(Model(base=gguf)) == folder
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") != "{}"


def test_a_gguf_file_without_all_tensors_is_refused_each_time(
    gguf, tiny_base, tmp_path, monkeypatch
):
    import torch

    from finequant.finetune.model import load_base
    from finequant.recipes.errors import UserError
    from finequant.recipes.schema import Model

    monkeypatch.setattr("gguf.GGUFWriter.add_tensor", skipping("blk.1.ffn_up"))
    write_gguf(tmp_path / "packages" / "tiny_gguf" / "model.gguf", tiny_base)
    for _ in range(2):
        with pytest.raises(UserError, match=r"missing, such as model.layers.1.mlp.up_proj"):
            load_base(Model(base=gguf), torch.float32)


def skipping(skipped: str):
    from gguf import GGUFWriter

    add = GGUFWriter.add_tensor
    return lambda self, name, tensor: None if name.startswith(skipped) else add(self, name, tensor)


NOTHING_TO_DO = """
import sys
from finequant.recipes.run import main
try:
    main(["run", *sys.argv[1:]])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "datasets", "lm_eval", "matplotlib", "peft"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_run_reads_its_rows_and_its_base_once(
    gguf, recipe_file, tmp_path, here, stages_here, monkeypatch
):
    """Runs the stages in this process; they share nothing but the caches."""
    from finequant.finetune import gguf_base
    from finequant.finetune.data import dataset, splits

    times, file_hash, dequantize = Counter(), artifact.file_hash, gguf_base._dequantize
    read_unparsed, encode_rows = splits.read_unparsed, dataset.encode_rows
    read, tokenized = Counter(), Counter()

    def counting_hash(path: Path) -> str:
        times[path.name] += 1
        return file_hash(path)

    def counting_dequantize(*arguments) -> None:
        times["dequantized"] += 1
        dequantize(*arguments)

    def counting_source(source):
        read[Path(source.source).name] += 1
        return read_unparsed(source)

    def counting_rows(rows, *arguments):
        tokenized.update(row.where for row in rows)
        return encode_rows(rows, *arguments)

    monkeypatch.setattr(artifact, "file_hash", counting_hash)
    monkeypatch.setattr(gguf_base, "_dequantize", counting_dequantize)
    monkeypatch.setattr(splits, "read_unparsed", counting_source)
    monkeypatch.setattr(dataset, "encode_rows", counting_rows)
    monkeypatch.setattr(freshness, "LARGE", 100_000)
    monkeypatch.setattr(freshness, "SETTLED_SECONDS", -3600.0)
    arguments = [str(recipe_file), f"model.base={gguf}", *SHORT]
    done = here("run", *arguments)
    assert done.returncode == 0, done.stderr
    assert stages_here == ["train", "quantize", "evaluate"]
    assert (times["model.gguf"], times["dequantized"]) == (1, 1)
    assert read == {"train.jsonl": 1, "validation.jsonl": 1, "test.jsonl": 1}
    rows = {"train.jsonl": 48, "validation.jsonl": 8}
    assert tokenized == {
        f"{name}:{line}": 1 for name, number in rows.items() for line in range(1, number + 1)
    }

    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))
    again = subprocess.run(
        [sys.executable, "-c", NOTHING_TO_DO, *arguments], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
