"""Rows end to end: each as if it were alone, forward and backward."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finequant.finetune import attention


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in (5, 19, 8)]


@pytest.mark.parametrize("longest", [attention.MAX_PRODUCT_LENGTH, 4], ids=["products", "fused"])
def test_rows_are_as_if_each_were_alone(tiny_base, rows, longest, monkeypatch):
    monkeypatch.setattr(attention, "MAX_PRODUCT_LENGTH", longest)
    usual = AutoModelForCausalLM.from_pretrained(tiny_base)
    ours = copy.deepcopy(usual)
    ours.set_attn_implementation(attention.NAME)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": row} for row in rows])
    del batch["labels"]
    expected = torch.cat([usual(torch.tensor([row])).logits[0] for row in rows])
    actual = ours(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(actual, expected)
    for logits in (expected, actual):
        logits.square().sum().backward()
    for (name, one), other in zip(usual.named_parameters(), ours.parameters(), strict=True):
        near = {"rtol": 1e-4, "atol": 1e-4, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(other.grad, one.grad, **near)


def test_no_token_sees_another_row(tiny_base, rows):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.set_attn_implementation(attention.NAME)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    others = [rows[0], [token ^ 1 for token in rows[1]], rows[2]]
    one, other = (
        model(**collate([{"input_ids": row} for row in some]), use_cache=False).logits[0]
        for some in (rows, others)
    )
    assert torch.equal(one[24:], other[24:]) and torch.equal(one[:5], other[:5])
    assert not torch.equal(one[5:24], other[5:24])
