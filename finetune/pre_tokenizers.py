"""Pre-tokenizers, which cut a text into words before a byte-level BPE merges, by llama.cpp's names.

A GGUF file holds tokens and merges, but only the name of the pre-tokenizer, `tokenizer.ggml.pre`.
What each name means: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

# Names that llama.cpp treats alike; exports get the first.
GPT_2 = ("gpt-2", "phi-2", "mpt", "olmo", "mellum", "gigachat", "trillion", "granite-docling")
DIGITS_APART = (
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
)
LLAMA_3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
SPLITS_OF_TRANSFORMERS = (*LLAMA_3, "smaug-bpe", "dbrx", "tekken", "qwen2", "megrez", "gpt-4o")
KNOWN = (*GPT_2, *DIGITS_APART, *SPLITS_OF_TRANSFORMERS, "deepseek-coder", "default")

WHOLE_WORDS = (*LLAMA_3, "tekken")
"""With these, a word that is a token is taken whole, whatever the merges say, and a text begins
with BOS unless the file says otherwise."""

DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")

GPT_2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT_2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")
"""llama.cpp's default for a file that names none."""


def restore(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Makes a tokenizer that transformers read from a GGUF file cut words as the file says.

    transformers 5.24 knows the names of Llama 3, Qwen and a few more; for all others it silently
    cuts as GPT-2 does. To be removed once its GGUF_PRE_TOKENIZER_SPLITS has them, and it sets
    `ignore_merges`: integrations/gguf/gguf_tokenizer_mapping.py.

    Raises:
        UserError: for a name that is not known here.
    """
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(file))
    if metadata.get("tokenizer.ggml.model") != "gpt2":  # only byte-level BPE has pre-tokenizers
        return
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in KNOWN:
        raise UserError(
            f"model.base: {file}: finequant does not know its pre-tokenizer {name!r} "
            f"(tokenizer.ggml.pre), so texts could get wrong tokens; expected one of "
            f"{', '.join(KNOWN)}. Use the base's safetensors instead: they come with a "
            "tokenizer.json"
        )
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizer(name)
    backend.model.ignore_merges = name in WHOLE_WORDS
    if "tokenizer.ggml.add_bos_token" not in metadata and name in WHOLE_WORDS:
        tokenizer.add_bos_token = True


def pre_tokenizer(name: str) -> PreTokenizer:
    """Makes the pre-tokenizer of one of the KNOWN names."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if name in GPT_2:
        return ByteLevel(add_prefix_space=False)
    if name in DIGITS_APART:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in SPLITS_OF_TRANSFORMERS:
        patterns, digits = (GGUF_PRE_TOKENIZER_SPLITS[name],), []
    elif name == "deepseek-coder":
        patterns, digits = DEEPSEEK_CODER, [Digits(individual_digits=True)]
    else:
        patterns, digits = DEFAULT, []
    splits = [Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return Sequence([*splits, *digits, ByteLevel(add_prefix_space=False, use_regex=False)])


def gguf_name(described: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name for the pre-tokenizer of a tokenizer.json; None if it has none.

    llama.cpp does not normalize the text that a byte-level BPE reads. NFC is accepted all the same:
    nearly all text is in that form already.
    """
    normalizer, model = described["normalizer"], described["model"]
    if normalizer not in (None, {"type": "NFC"}) or model["type"] != "BPE":
        return None
    steps = _steps(described["pre_tokenizer"])
    whole_words = model.get("ignore_merges", False)
    for name in KNOWN:
        known = json.loads(pre_tokenizer(name).__getstate__())
        if _steps(known) == steps and (name in WHOLE_WORDS) == whole_words:
            return name
    return None


def _steps(described: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Lists the pre-tokenizers in order, without those that only change offsets."""
    if described is None:
        return []
    steps = described.get("pretokenizers", [described])
    return [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]
