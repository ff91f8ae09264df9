"""Ids in training are those of plain transformers for the whole text, with every tokenizer."""

from __future__ import annotations

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers.pre_tokenizers import Metaspace, Split

from finequant.finetune.data.dataset import to_dataset
from finequant.finetune.data.row import Row
from finequant.finetune.data.tokens import IGNORED, encode, encode_prompt
from finequant.recipes.schema import Data

TEXTS = [f"{verb} the {what} {n}" for verb in ("open", "paint") for what in ("door", "lamp")
         for n in range(10)]  # fmt: skip
LLAMA_2_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DATA = Data(train="rows.jsonl")
TURNS = ("open the door 3", "done \U0001f600", "paint  it", "  the\nlamp")
CONVERSATION = Row(
    "rows.jsonl:1",
    tuple(
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, TURNS, strict=True)
    ),
)


def sentencepiece_like(kind: str):
    """Makes a BPE like Llama 2's and TinyLlama's: byte fallback, U+2581 for spaces, BOS in front.

    "joining" has tokens across spaces, so that one reaches from the prompt into the answer.
    """
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "metaspace":
        bpe.pre_tokenizer = Metaspace(prepend_scheme="always")
    else:
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    if kind == "prepending":
        bpe.pre_tokenizer = Split("\u2581", "merged_with_next")
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special + bytes_, show_progress=False
    )
    bpe.train_from_iterator([f"[INST] {text} [/INST] done {text}" for text in TEXTS], trainer)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = LLAMA_2_TEMPLATE
    return tokenizer


def byte_level(tokenizer, trim_offsets: bool):
    """Makes a tokenizer like GPT-2's or Llama 3's, whose offsets leave out a token's space."""
    changed = copy.deepcopy(tokenizer)
    bos = changed.bos_token
    changed.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, changed.bos_token_id)]
            ),
        ]
    )
    return changed


@pytest.fixture(params=["metaspace", "prepending", "joining", "byte-level", "trimming", "ChatML"])
def kind(request, tokenizer):
    if request.param == "ChatML":
        return tokenizer
    if request.param in ("byte-level", "trimming"):
        return byte_level(tokenizer, request.param == "trimming")
    return sentencepiece_like(request.param)


def target_ids(encoded) -> list[int]:
    return [label for label in encoded.labels if label != IGNORED]


def test_ids_are_those_of_the_rendered_text_tokenized_whole(kind):
    text = kind.apply_chat_template(list(CONVERSATION.messages), tokenize=False)
    encoded = encode(CONVERSATION, kind, DATA)
    assert encoded.input_ids == kind(text, add_special_tokens=False)["input_ids"]
    read = kind.decode(target_ids(encoded))
    for answer in TURNS[1::2]:
        assert answer in read
    for question in TURNS[::2]:
        assert question not in read
    assert target_ids(encoded).count(kind.eos_token_id) == 2


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_prompt_that_ends_in_a_space_keeps_it_whatever_the_offsets_say(tokenizer, trim_offsets):
    spaced = byte_level(tokenizer, trim_offsets)
    spaced.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    row = Row(
        "rows.jsonl:1", CONVERSATION.messages[:1] + ({"role": "assistant", "content": "red"},)
    )
    encoded, prompt = encode(row, spaced, DATA), encode_prompt(row, spaced, DATA)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert spaced.decode(target_ids(encoded)) == f"red{spaced.eos_token}"


def test_a_text_gets_one_bos_and_one_eos(kind):
    bos, eos = kind.bos_token, kind.eos_token
    expected = kind("open the door")["input_ids"]
    expected = [*expected, kind.eos_token_id]
    texts = ["open the door", f"open the door{eos}"]
    if expected[0] == kind.bos_token_id:  # it puts BOS in front; others keep the text's
        texts += [f"{bos}open the door", f"{bos}open the door{eos}"]
    for text in texts:
        assert encode(Row("rows.jsonl:1", text=text), kind, DATA).input_ids == expected, text


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tokenizer):
    both = copy.deepcopy(tokenizer)
    bos, eos = both.bos_token, both.eos_token
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, both.bos_token_id), (eos, both.eos_token_id)],
    )
    expected = both("open")["input_ids"]
    for text in ("open", f"{bos}open", f"open{eos}", f"{bos}open{eos}"):
        assert encode(Row("rows.jsonl:1", text=text), both, DATA).input_ids == expected


class WithoutOffsets:
    """A tokenizer that is written in Python."""

    is_fast = False

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options):
        assert "return_offsets_mapping" not in options
        return self._tokenizer(text, **options)


def test_without_offsets_answers_are_tokenized_apart_with_a_note(tokenizer, capsys):
    slow = WithoutOffsets(tokenizer)
    dataset = to_dataset([CONVERSATION], slow, DATA)
    assert "this tokenizer gives no offsets" in capsys.readouterr().err
    expected = encode(CONVERSATION, tokenizer, DATA)
    assert dataset["input_ids"] == [expected.input_ids]
    assert dataset["labels"] == [expected.labels]
