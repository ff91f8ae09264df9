"""The order of rows is accelerate's, and the rows that fill up last batches have no target."""

from __future__ import annotations

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset

from finequant.finetune.batches import ShuffledThenBlank, padded


def test_one_process_reads_rows_in_the_order_of_accelerate():
    theirs = SeedableRandomSampler(range(45), data_seed=7)
    ours = ShuffledThenBlank(45, 0, seed=7)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)


def test_blank_rows_come_last_in_every_epoch():
    sampler = ShuffledThenBlank(45, 3, seed=7)
    assert len(sampler) == len(list(sampler)) == 48
    assert list(sampler)[45:] == [45, 46, 47]


def test_blank_rows_have_no_target_and_the_columns_of_the_others():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "seq_lengths": [2, 1]}] * 5
    for columns in (["input_ids", "labels"], ["input_ids", "labels", "seq_lengths"]):
        dataset = Dataset.from_list(rows).select_columns(columns)
        assert padded(dataset, 5) is dataset
        result = padded(dataset, 4)
        assert result.features == dataset.features
        assert len(result) == 8
        assert result[:5] == dataset[:]
        for row in result.select(range(5, 8)):
            assert set(row["labels"]) == {-100}
            assert len(row["labels"]) == len(row["input_ids"]) == sum(row.get("seq_lengths", [2]))
