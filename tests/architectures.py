"""Tiny random bases of the other architectures, each with its own tokenizer conventions."""

from __future__ import annotations

from pathlib import Path

from conftest import CHAT_TEMPLATE, SHAPE, make_tokenizer

INST_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def chatml():
    """Makes a tokenizer like Qwen's: ChatML, nothing in front of a text, Qwen 2's splitting."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tokenizer = make_tokenizer()
    tokenizer.bos_token, tokenizer.chat_template = None, CHAT_TEMPLATE
    bytes_ = ByteLevel(add_prefix_space=False, use_regex=False)
    words = Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([words, bytes_])
    return tokenizer


def inst():
    """Makes a tokenizer like Mistral's: <s> in front, [INST] around a question, </s> at the end."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = INST_TEMPLATE
    return tokenizer


def qwen3(folder: Path) -> Path:
    """Saves a Qwen3: norms of q and k for each head, whose size is not hidden size / heads."""
    return _save("Qwen3", folder, chatml(), head_dim=32, tie_word_embeddings=True)


def qwen2(folder: Path) -> Path:
    """Saves a Qwen2: biases of q, k and v."""
    return _save("Qwen2", folder, chatml(), tie_word_embeddings=True)


def mistral(folder: Path) -> Path:
    """Saves a Mistral: a sliding window as long as the longest row that is allowed."""
    return _save("Mistral", folder, inst(), tie_word_embeddings=False, sliding_window=128)


BASES = {"Qwen3ForCausalLM": qwen3, "MistralForCausalLM": mistral, "Qwen2ForCausalLM": qwen2}


def _save(kind: str, folder: Path, tokenizer, **changes) -> Path:
    import torch
    import transformers

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    size = {"vocab_size": 384 + 32}
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **size, **ids, **changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += torch.rand_like(weight)
            elif name.endswith("bias"):
                weight.normal_(std=0.3)
            else:
                weight *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
