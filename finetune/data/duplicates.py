"""Finds held-out prompts that nearly repeat training rows, and prompts with several answers."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from finequant.finetune.data.row import Row
from finequant.finetune.data.table import Rows

MOST_ROWS = 200_000
"""More are not compared: that would take minutes."""
SIMILAR = 0.8
"""Jaccard similarity of the parts of two prompts, from which they count as nearly the same."""
WORDS_AT_ONCE = 3
PERMUTATIONS, BANDS = 128, 32
"""With these, MinHash finds 99.9 percent of the pairs at SIMILAR, and few below half of that."""


def repeated_rows(rows: Rows) -> int:
    """Counts rows whose prompt occurred before; a row with a weight of 2 occurs once."""
    once = np.unique(rows.indices, return_index=True)[1]
    return len(once) - len(np.unique(rows.hashes.prompts[once]))


def prompts_with_several_answers(rows: Rows) -> int:
    """Counts prompts that have different answers."""
    pairs = np.unique(np.stack(rows.hashes, axis=1), axis=0)
    return int((np.unique(pairs[:, 0], return_counts=True)[1] > 1).sum())


def near_duplicates(train: Rows, held_out: Rows) -> list[tuple[str, str]] | None:
    """Finds held-out rows whose prompt is nearly that of a training row, apart from case and
    punctuation.

    Returns:
        Pairs of locations, held-out row and training row; None if there are more than MOST_ROWS.
    """
    if len(train) + len(held_out) > MOST_ROWS:
        return None
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS, num_bands=BANDS)

    def sketch(parts: Iterable[str]) -> RMinHash:
        minhash = RMinHash(num_perm=PERMUTATIONS, seed=0)
        minhash.update(sorted(parts))
        return minhash

    for at, row in enumerate(train):
        index.insert(at, sketch(_parts(row)))
    pairs = []
    for row in held_out:
        parts = _parts(row)
        for at in sorted(index.query(sketch(parts))):
            similar = train[at]
            if _similarity(parts, _parts(similar)) >= SIMILAR:
                pairs.append((row.where, similar.where))
                break
    return pairs


def _parts(row: Row) -> frozenset[str]:
    """Returns all runs of three words in a prompt, without system messages, or in a text."""
    asked = [turn["content"] for turn in row.messages[:-1] if turn["role"] != "system"]
    words = re.findall(r"\w+", " ".join([*asked, row.text]).casefold())
    last = max(1, len(words) - WORDS_AT_ONCE + 1)
    return frozenset(" ".join(words[at : at + WORDS_AT_ONCE]) for at in range(last))


def _similarity(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)
