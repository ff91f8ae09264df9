"""recipes/errors.py: the machine's own limits, told without a traceback."""

from __future__ import annotations

import pytest
import torch

from finequant.recipes.errors import report_user_errors


def test_no_memory_left_says_what_to_make_smaller(capsys):
    with pytest.raises(SystemExit) as exit_, report_user_errors():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: use smaller batches (train.micro_batch_size")
    assert said.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), report_user_errors():
        1 / 0  # noqa: B018
