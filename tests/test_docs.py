"""The documentation says what the code says: its commands are run in recipes/test_run.py."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from finequant.recipes.reference import markdown

ROOT = Path(__file__).parent.parent
FOLDERS = ("recipes", "finetune", "quantize", "evaluate", "publish")


def test_every_key_is_described():
    written = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert written == markdown(), "run `finequant schema --markdown > docs/keys.md`"
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row.endswith("|  |")]


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


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_site_builds_without_a_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "keys" / "index.html").exists()
