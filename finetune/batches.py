"""Makes a step read the same rows on one process and on several.

accelerate gives each process equally many rows by repeating some from the beginning of the epoch,
which would then be learned twice. Here blank rows, without a target token, fill the last batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler

from finequant.finetune.data.tokens import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset


def padded(dataset: Dataset, multiple: int) -> Dataset:
    """Appends blank rows, which have no target token, until `multiple` divides their number."""
    from datasets import Dataset, concatenate_datasets

    missing = -len(dataset) % multiple
    if not missing:
        return dataset
    token = dataset[0]["input_ids"][0]
    values = {"input_ids": [token] * 2, "labels": [IGNORED] * 2, "seq_lengths": [2]}
    blank = {name: values[name] for name in dataset.column_names}
    blanks = Dataset.from_list([blank] * missing, features=dataset.features)
    return concatenate_datasets([dataset, blanks])


class ShuffledThenBlank(Sampler[int]):
    """Draws each row once, in an order that seed and epoch decide, and then the blank rows.

    The order is that of accelerate's SeedableRandomSampler.
    """

    def __init__(self, rows: int, blanks: int, seed: int) -> None:
        self.rows, self.blanks, self.seed, self.epoch = rows, blanks, seed, 0

    def __len__(self) -> int:
        return self.rows + self.blanks

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from range(self.rows, self.rows + self.blanks)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
