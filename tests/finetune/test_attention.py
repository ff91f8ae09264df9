"""Rows that lie end to end are computed as if each were alone, forward and backward."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finequant.finetune import attention

COLLATE = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), generator=generator).tolist() for length in (5, 19, 8)]


@pytest.fixture(
    params=[{}, {"QUERIES_AT_ONCE": 4}, {"MAX_PRODUCT_LENGTH": 4}],
    ids=["products", "products in parts", "fused"],
)
def models(request, tiny_base, monkeypatch):
    """The tiny Llama twice: with transformers' attention, and with ours."""
    for name, value in request.param.items():
        monkeypatch.setattr(attention, name, value)
    usual = AutoModelForCausalLM.from_pretrained(tiny_base)
    ours = copy.deepcopy(usual)
    ours.set_attn_implementation(attention.NAME)
    return usual, ours


def check_same(models, expected: torch.Tensor, actual: torch.Tensor) -> None:
    """Compares the two models' logits, and their gradients of all weights."""
    torch.testing.assert_close(actual, expected)
    for logits in (expected, actual):
        logits.square().sum().backward()
    usual, ours = (model.parameters() for model in models)
    for theirs, mine in zip(usual, ours, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_rows_are_as_if_each_were_alone(models, rows):
    usual, ours = models
    batch = COLLATE([{"input_ids": row} for row in rows])
    del batch["labels"]
    expected = torch.cat([usual(torch.tensor([row])).logits[0] for row in rows])
    check_same(models, expected, ours(**batch, use_cache=False).logits[0])


def test_rows_of_one_length_are_as_if_each_were_alone(models):
    usual, ours = models
    ours.set_attn_implementation(attention.BATCH)
    ids = torch.randint(256, (3, 11), generator=torch.Generator().manual_seed(0))
    check_same(models, usual(ids).logits, ours(ids, use_cache=False).logits)


def test_tokens_that_change_no_prediction_are_left_out(models, rows):
    """Three of the rows begin alike; another, from another process's share, has no target."""
    usual, ours = models
    rows = [[7, 8, 9, 7, row[0] + at, *row] for at, row in enumerate(rows)]
    rows.insert(1, [3, 3, 3])
    labels = [[-100] * 6 + row[6:-1] + [-100] for row in rows]
    labels[1] = [-100] * 3
    pairs = zip(rows, labels, strict=True)
    batch = COLLATE([{"input_ids": row, "labels": targets} for row, targets in pairs])
    inputs, predicting = attention.condensed(batch, batch["labels"][:, 1:] != -100)
    assert inputs["shared_beginning"] == 4
    assert inputs["input_ids"].numel() == sum(len(row) - 2 for row in rows) - 2 * 4 - 1
    each = (usual(torch.tensor([row])).logits[0, 5:-2] for row in rows if len(row) > 3)
    check_same(models, torch.cat([*each]), ours(**inputs, use_cache=False).logits[0, predicting])


@pytest.mark.parametrize("labels", [[-100] * 5, [-100, 1, 2, 3, -100]])
def test_a_single_row_shares_no_beginning(labels):
    batch = COLLATE([{"input_ids": [5, 1, 2, 3, 9], "labels": labels}])
    inputs, predicting = attention.condensed(batch, batch["labels"][:, 1:] != -100)
    assert inputs["shared_beginning"] == 0
    learns = set(labels) != {-100}
    assert inputs["input_ids"].tolist() == [[5, 1, 2] if learns else [5]]
    assert predicting.tolist() == ([0, 1, 2] if learns else [])


def test_no_token_sees_another_row(tiny_base, rows):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.set_attn_implementation(attention.NAME)
    others = [rows[0], [token ^ 1 for token in rows[1]], rows[2]]
    one, other = (
        model(**COLLATE([{"input_ids": row} for row in some]), use_cache=False).logits[0]
        for some in (rows, others)
    )
    assert torch.equal(one[24:], other[24:]) and torch.equal(one[:5], other[:5])
    assert not torch.equal(one[5:24], other[5:24])
