"""The documentation says what the code says: its commands are run in recipes/test_run.py."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finequant.recipes.reference import markdown

ROOT = Path(__file__).parent.parent
FOLDERS = ("recipes", "finetune", "quantize", "evaluate", "publish")


def test_every_key_is_described():
    written = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert written == markdown(), "run `finequant schema --markdown > docs/keys.md`"
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row.endswith("|  |")]


def test_a_default_that_is_made_anew_for_each_recipe_is_shown():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", markdown(), re.MULTILINE))
    assert rows["evaluate.metrics"] == '`["exact_match"]`'
    assert rows["evaluate.tasks"] == "`[]`"
    assert rows["train.micro_batch_size"] == rows["lora"] == ""  # depends on others; a section


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    sources = "".join(
        node.value
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    assert len(messages) > 5
    assert not [message for message in messages if message not in sources]


def test_the_group_sizes_of_the_troubleshooting_page_divide_every_layer():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"576 and 1,536 allow (.*?);", text)
    sizes = [size for size in range(32, 257) if 576 % size == 1536 % size == 0]
    assert list(map(int, re.findall(r"\d+", listed))) == sizes


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_site_builds_without_a_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "keys" / "index.html").exists()


@pytest.mark.parametrize("file", ["README.md", "docs/memory.md"])
def test_the_table_of_what_is_needed_is_computed(monkeypatch, file):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from needs import CELLS, TABLES

    # As on a processor that only emulates bfloat16, whichever this one is.
    monkeypatch.setattr("finequant.finetune.device._bf16", lambda: (False, "this CPU"))
    assert CELLS.search((ROOT / file).read_text(encoding="utf-8"))[0] == TABLES[file]()


def test_what_the_dockerfile_copies_and_starts_is_there():
    from finequant.recipes.load import load_recipe

    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    names = [name for line in copied for name in line]
    assert not [name for name in names if not (ROOT / name).exists()]
    assert {*FOLDERS, "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} == {*names}
    assert re.search(r'^ENTRYPOINT \["finequant"\]$', text, re.MULTILINE)
    command, recipe = re.search(r'^CMD \["(\w+)", "(\w+)"\]$', text, re.MULTILINE).groups()
    assert (command, load_recipe(recipe).name) == ("run", "quickstart")
