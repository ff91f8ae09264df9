"""The tokenizer in a GGUF file: tokens, merges, end tokens, and the rule that splits words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finequant.finetune.pre_tokenizers import gguf_name
from finequant.quantize.checkpoint.stored import QuantizedCheckpoint
from finequant.recipes.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter


def add_tokenizer(writer: GGUFWriter, stored: QuantizedCheckpoint, rows_have_bos: bool) -> bool:
    """Adds tokens, merges, special tokens and the chat template.

    rows_have_bos: whether the rows that the model was trained on begin with the
        beginning-of-sequence token.

    Returns:
        Whether llama.cpp will put the beginning-of-sequence token in front of every text.
    """
    from gguf import SpecialVocab, TokenType

    described = stored.tokenizer
    size = stored.config.vocab_size
    tokens = [f"[PAD{index}]" for index in range(size)]  # rows of the embedding without a token
    types = [TokenType.UNUSED] * size
    for token, index in described["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for added in described["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(described))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(stored.folder, load_merges=True, n_vocab=size)
    # Without the key, or with that of Llama's tokenizers, llama.cpp would put one before every
    # chat, even if the chat template, and so training, has none.
    adds_bos = rows_have_bos and special.add_special_token.get("bos", False)
    special.add_special_token["bos"] = adds_bos
    special.special_token_ids |= _end_of_turn(stored, special.special_token_ids.get("eos"))
    special.add_to_gguf(writer, quiet=True)
    return adds_bos


def _end_of_turn(stored: QuantizedCheckpoint, eos: int | None) -> dict[str, int]:
    """Returns the end tokens, under the three keys that make llama.cpp stop.

    There is no key for a fourth; llama.cpp recognizes the usual ones, such as <|eom_id|>, by their
    text.

    eos: the tokenizer's, which is the end of an answer unless that would change its tokens.
    """
    ends = stored.end_tokens
    if not ends:
        return {}
    ids = {"eos": ends[0] if eos is None else eos, "eot": ends[0]}
    remaining = [end for end in ends if end not in ids.values()]
    return ids | ({"eom": remaining[0]} if remaining else {})


def pre_tokenizer(described: dict[str, Any]) -> str:
    """Returns llama.cpp's name for the way in which the tokenizer splits text into words.

    described: the content of tokenizer.json.

    Raises:
        UserError: for a tokenizer that is not a byte-level BPE, or splits in a way without a name
            here.
    """
    name = gguf_name(described)
    if name is None:
        cutter = described["pre_tokenizer"] or {}
        kinds = [step.get("type") for step in cutter.get("pretokenizers", [cutter])]
        raise UserError(
            f"gguf: the tokenizer splits words by {_names(kinds)}, for which llama.cpp's name is "
            "not known here; expected a byte-level BPE as in GPT-2, SmolLM, Llama 3 or Qwen 2: "
            "remove gguf from quantize.exports"
        )
    return name


def _names(kinds: list[str | None]) -> str:
    return ", ".join(filter(None, kinds)) or "no rule (as Llama 2's does)"
