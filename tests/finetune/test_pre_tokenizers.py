"""Tokenizers of GGUF files give the ids of the tokenizers that the files were made from."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from finequant.finetune.model import load_tokenizer
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Model

SENTENCES = [
    "It's 12,345 o'clock\n\n3  1 [\n  1,\n  2\n]",
    "a\t\t7 x =  42 <|im_start|>user\n  99<|im_end|>\n",
    "DON'T répète 東京 ２３  ½ \U0001f600\r\n\r\n 1984!!! ??\n",
    "def f(x):\n\n    return x+10  # 10\n",
    "unseen",
]
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
GPT_2 = ByteLevel(add_prefix_space=False)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(*patterns: str) -> list[Split]:
    return [Split(Regex(pattern), "isolated") for pattern in patterns]


# As in the tokenizer.json of the models that gave llama.cpp these names.
PRE_TOKENIZERS = {
    "gpt-2": GPT_2,
    "smollm": Sequence([Digits(individual_digits=True), GPT_2]),
    "starcoder": Sequence([Digits(individual_digits=True), GPT_2]),
    "llama-bpe": Sequence([*split(rf"{CONTRACTIONS}|\p{{N}}{{1,3}}|{REST}"), BYTES]),
    "qwen2": Sequence([*split(rf"{CONTRACTIONS}|\p{{N}}|{REST}"), BYTES]),
    "deepseek-coder": Sequence(
        [
            *split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"),
            Digits(individual_digits=True),
            BYTES,
        ]
    ),
}


def trained(name: str) -> Tokenizer:
    """Trains a byte-level BPE; Llama 3's has a token that no merge leads to, and BOS in front."""
    bpe = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    # Trained without a pre-tokenizer, so that some merges cross its boundaries.
    bpe.pre_tokenizer = BYTES
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES[:4] * 3, trainer)
    described = json.loads(bpe.to_str())
    described["model"]["vocab"]["unseen"] = len(described["model"]["vocab"])
    bpe = Tokenizer.from_str(json.dumps(described))
    bpe.pre_tokenizer = PRE_TOKENIZERS[name]
    if name == "llama-bpe":
        bpe.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return bpe


def write_gguf(path, bpe: Tokenizer, pre: str | None) -> None:
    from gguf import GGUFWriter, TokenType

    described = json.loads(bpe.to_str())
    vocabulary = described["model"]["vocab"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types(
        [TokenType.CONTROL if index < 3 else TokenType.NORMAL for index in range(len(vocabulary))]
    )
    writer.add_token_merges([" ".join(merge) for merge in described["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture
def from_gguf(tmp_path, monkeypatch):
    """Loads the tokenizer of a GGUF file with this tokenizer.ggml.pre, from a package."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))

    def load(bpe: Tokenizer, pre: str | None):
        package = tmp_path / "weights_of_a_test"
        package.mkdir(exist_ok=True)
        write_gguf(package / "model.gguf", bpe, pre)
        return load_tokenizer(Model(base="package:weights_of_a_test/model.gguf"))

    return load


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ids_are_those_of_the_tokenizer_that_the_file_was_made_from(from_gguf, tmp_path, name):
    from transformers import AutoTokenizer

    original = trained(name)
    loaded = from_gguf(original, name)
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in SENTENCES:
        for tokenizer in (loaded, again):
            assert tokenizer(text)["input_ids"] == original.encode(text).ids, text
        assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text


def test_an_unknown_pre_tokenizer_is_refused_by_name(from_gguf):
    original = trained("gpt-2")
    with pytest.raises(UserError, match="model.base: .*model.gguf.*'jabberwocky'.*safetensors"):
        from_gguf(original, "jabberwocky")


@pytest.mark.parametrize("pre", ["default", None])
def test_a_file_without_a_pre_tokenizer_is_split_as_llama_cpp_does(from_gguf, pre):
    loaded = from_gguf(trained("gpt-2"), pre)
    words = loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x12345.5 = (a)\n\n3")
    assert [word for word, _ in words] == [
        *("x", "123", "45", ".", "5", "Ġ", "=", "Ġ", "(", "a", ")", "Ċ", "Ċ", "3")
    ]
