"""A tiny random Llama with a tokenizer of its own, and a small dataset, made where tests run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    f"{verb} the {colour} {thing} at {hour} o'clock"
    for verb in ("open", "close", "paint", "move")
    for colour in ("red", "green", "blue", "grey")
    for thing in ("door", "lamp", "window", "box")
    for hour in range(1, 13)
]


def make_tokenizer():
    """A byte-level BPE of 384 tokens with ChatML markers and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_llama(folder: Path, **changes) -> Path:
    """Saves a random two-layer Llama (grouped-query attention, tied) and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shard_size = changes.pop("max_shard_size", "1GB")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(numbers: range) -> list[dict[str, str]]:
    """Requests and their one-line JSON answers."""
    rows = []
    for number in numbers:
        verb, _, colour, thing, _, hour, _ = SENTENCES[number].split()
        answer = {"do": verb, "what": f"{colour} {thing}", "hour": int(hour)}
        rows.append({"prompt": SENTENCES[number], "completion": json.dumps(answer)})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Folder of the tiny Llama. Shared: tests must not write into it."""
    return make_llama(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def recipe_file(tmp_path, tiny_base) -> Path:
    """A complete recipe over the tiny Llama: 48 training, 8 validation, 8 test rows."""
    write_jsonl(tmp_path / "train.jsonl", make_rows(range(0, 48)))
    write_jsonl(tmp_path / "validation.jsonl", make_rows(range(60, 68)))
    write_jsonl(tmp_path / "test.jsonl", make_rows(range(80, 88)))
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES[100:130]), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
name: tiny
seed: 7
output_dir: {tmp_path / "run"}
model:
  base: {tiny_base}
data:
  train: train.jsonl
  validation: validation.jsonl
  test: test.jsonl
  max_length: 128
lora:
  rank: 4
  alpha: 8
train:
  batch_size: 8
  micro_batch_size: 4
  learning_rate: 1e-3
  precision: fp32
quantize:
  group_size: 32
evaluate:
  perplexity:
    - {{name: text, source: text.txt, max_length: 64}}
  max_new_tokens: 8
""",
        encoding="utf-8",
    )
    return path
