"""The quickstart dataset: reproducible, and nothing in a test row was shown in training."""

import json
import runpy
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def rows():
    def read(split):
        text = (DATA / "quickstart" / f"{split}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return {split: read(split) for split in SPLITS}


def test_committed_files_are_a_fresh_generation(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_quickstart.py", str(tmp_path)])
    monkeypatch.syspath_prepend(str(DATA))
    runpy.run_path(str(DATA / "make_quickstart.py"), run_name="__main__")
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (DATA / "quickstart" / name).read_bytes(), name


def test_enough_rows_are_held_out_and_no_request_occurs_twice(rows):
    assert len(rows["test"]) >= 100
    prompts = [row["prompt"].lower().rstrip("?.") for split in SPLITS for row in rows[split]]
    assert len(set(prompts)) == len(prompts)


def test_every_answer_is_json_of_values_in_the_request(rows):
    for row in (row for split in SPLITS for row in rows[split]):
        for value in json.loads(row["completion"]).values():
            assert str(value) in row["prompt"]


def test_test_values_are_never_shown(rows):
    def values(split):
        answers = [json.loads(row["completion"]) for row in rows[split]]
        return {(key, value) for answer in answers for key, value in answer.items()}

    held_out, shown = values("test"), values("train") | values("validation")
    assert held_out.isdisjoint(shown)
    assert {key for key, _ in held_out} == {key for key, _ in shown}


def test_test_phrasings_are_never_shown(rows):
    """A phrasing is a request with each value replaced by the name of its slot."""

    def phrasings(split):
        found = set()
        for row in rows[split]:
            text = row["prompt"]
            for key, value in json.loads(row["completion"]).items():
                text = text.replace(str(value), "{" + key + "}")
            found.add(text.lower().rstrip("?."))
        return found

    assert phrasings("test").isdisjoint(phrasings("train") | phrasings("validation"))
