"""Recipes and data files damaged at random give a result or one message, and no file is touched.

FINEQUANT_EXAMPLES=1000 tries that many of each, as `make torture` does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finequant.recipes.errors import report_user_errors
from finequant.recipes.run import main
from finequant.recipes.schema import Data

EXAMPLES = int(os.environ.get("FINEQUANT_EXAMPLES", "50"))
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

# (position as a share of the whole, number of bytes removed, bytes inserted)
BYTES = st.one_of(
    st.binary(max_size=6),
    st.text("az09 \t\n:-#&*!|>'\"%@`{}[],.?~<\\\0\x85é😀\ud800", max_size=6).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    ),
    st.sampled_from([b"\xef\xbb\xbf", b"null", b"NaN", b"1e999", b"../../", b"!!python/object:x "]),
)
DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), BYTES), min_size=1, max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def damaged(content: bytes, damage: list[tuple[float, int, bytes]]) -> bytes:
    for share, gone, new in damage:
        at = int(share * len(content))
        content = content[:at] + new + content[at + gone :]
    return content


class Touched:
    """Files that this process opens for writing, makes, moves or removes while it listens."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.paths is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+")
            if writes or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.paths.append(str(path))
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"):
            self.paths += [str(path) for path in arguments[:2] if isinstance(path, str | bytes)]
        elif event in ("shutil.rmtree", "os.truncate", "subprocess.Popen", "os.system"):
            self.paths.append(f"{event} {arguments[0]}")

    @contextmanager
    def listening(self) -> Iterator[list[str]]:
        self.paths = found = []
        try:
            yield found
        finally:
            self.paths = None


TOUCHED = Touched()


def answer(command) -> int:
    """Runs a command that must touch no file, and returns its exit code."""
    with TOUCHED.listening() as touched:
        try:
            with report_user_errors():
                command()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    assert touched == []
    return code


def test_touched_files_are_noticed(tmp_path):
    with TOUCHED.listening() as touched:
        (tmp_path / "made").write_text("x", encoding="utf-8")
        (tmp_path / "made").unlink()
    assert touched == [str(tmp_path / "made")] * 2 or len(touched) == 2


@pytest.mark.slow
@many
@given(recipe=st.sampled_from(RECIPES), damage=DAMAGE)
def test_damaged_recipes_give_a_result_or_one_message(recipe, damage, capsys):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(damaged(recipe.read_bytes(), damage))
        code = answer(lambda: main(["validate", str(path)]))
    said = capsys.readouterr()
    assert code in (0, 2)
    assert said.err.startswith("error: ") == (code == 2)


@pytest.mark.slow
@many
@given(
    key=st.sampled_from(["name", "seed", "data.train", "lora.rank", "quantize.layers", "x.y"]),
    value=VALUES,
)
def test_strange_overrides_give_a_result_or_one_message(key, value, capsys):
    text = json.dumps(value)
    code = answer(lambda: main(["validate", str(RECIPES[0]), f"{key}={text}"]))
    assert code in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


ROWS = [
    {"prompt": 'ask, "me"', "completion": "say\nit"},
    {"prompt": "é 😀", "completion": "{}"},
    {"prompt": "three", "completion": "3"},
]
CHATS = [
    {"messages": [{"role": role, "content": f"{number}"} for role in ("user", "assistant")]}
    for number in range(3)
]


def whole(suffix: str, rows: list[dict]) -> bytes:
    """Returns a good file with these rows."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif suffix == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        elif suffix == ".txt":
            path.write_text(str(rows), encoding="utf-8")
        else:
            dataset = Dataset.from_list(rows)
            (dataset.to_csv if suffix == ".csv" else dataset.to_parquet)(str(path))
        return path.read_bytes()


WHOLE = {
    (suffix, form): whole(suffix, rows)
    for suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt")
    for form, rows in (("rows", ROWS), ("chats", CHATS))
}


@many
@given(which=st.sampled_from(sorted(WHOLE)), damage=DAMAGE)
def test_damaged_data_files_give_rows_or_one_message(which, damage, tokenizer, capsys):
    suffix, _ = which
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(damaged(WHOLE[which], damage))
        assert read(path, tokenizer) in (0, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(said) < 3000


@many
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["prompt", "completion", "messages", "text", "instruction", "output"]),
            VALUES,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_strange_rows_give_a_result_or_one_message(rows, tokenizer, capsys):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert read(path, tokenizer) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def read(path: Path, tokenizer) -> int:
    """Reads, splits and tokenizes as training does."""
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.data.tokens import encode

    data = Data(train=str(path), validation_fraction=0.3, max_length=32)

    def command() -> None:
        for row in load_splits(data, 0).train:
            encode(row, tokenizer, data)

    return answer(command)


REFUSED = ((".csv", "chats"), (".txt", "chats"), (".txt", "rows"))


@pytest.mark.parametrize("which", sorted(WHOLE.keys() - REFUSED))
def test_whole_files_are_read(which, tmp_path, tokenizer):
    """Otherwise the tests above might see nothing but refusals."""
    path = tmp_path / f"rows{which[0]}"
    path.write_bytes(WHOLE[which])
    assert read(path, tokenizer) == 0
