"""Inputs of results: hashes are looked up, folders and values are made once."""

from __future__ import annotations

import errno
import json
import os
import platform
import threading
from collections import Counter
from pathlib import Path

import filelock
import pytest

from finequant.recipes import artifact, freshness
from finequant.recipes.artifact import seal, verify
from finequant.recipes.errors import UserError
from finequant.recipes.freshness import Memo, is_made_from, known_hash, made_once, mark


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache, empty and for this test alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return freshness.cache_folder()


@pytest.fixture
def read(monkeypatch) -> Counter[str]:
    """How often each file was read to hash it; all count as large, and as written long ago."""
    counted, file_hash = Counter(), artifact.file_hash

    def count(path: Path) -> str:
        counted[path.name] += 1
        return file_hash(path)

    monkeypatch.setattr(artifact, "file_hash", count)
    monkeypatch.setattr(freshness, "LARGE", 0)
    monkeypatch.setattr(freshness, "SETTLED_SECONDS", -3600.0)
    return counted


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    return path


def test_a_large_file_is_read_once_also_when_its_folder_is_renamed(tmp_path, read):
    partial = tmp_path / "quantized.partial"
    partial.mkdir()
    (partial / "weights").write_bytes(b"first")
    value = known_hash(partial / "weights")
    assert known_hash(partial / "weights") == value == artifact.content_hash(partial / "weights")
    moved = partial.rename(tmp_path / "quantized") / "weights"
    assert known_hash(moved) == value
    assert read == {"weights": 1}
    os.utime(moved)
    assert known_hash(moved) == value
    assert read == {"weights": 2}


def test_an_edit_in_place_with_the_old_time_is_noticed(file, read):
    before, stat = known_hash(file), file.stat()
    with file.open("r+b") as opened:
        opened.write(b"other")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert known_hash(file) != before


def test_a_file_so_new_that_it_may_change_under_the_same_stamp_is_read_again(
    file, read, monkeypatch, cache
):
    monkeypatch.setattr(freshness, "SETTLED_SECONDS", 3600.0)
    assert known_hash(file) == known_hash(file)
    assert read["weights"] == 2
    assert not list((cache / "hashes").glob("*.json"))


def test_a_small_file_is_always_read(file, read, monkeypatch):
    monkeypatch.setattr(freshness, "LARGE", 1 << 20)
    known_hash(file)
    known_hash(file)
    assert read["weights"] == 2


def test_a_damaged_or_read_only_cache_costs_only_time(file, read, cache):
    value = known_hash(file)
    (entry,) = (cache / "hashes").glob("*.json")
    for content in ("", "[]", '{"stamp": {}}'):
        entry.write_text(content, encoding="utf-8")
        assert known_hash(file) == value
    entry.unlink()
    (cache / "hashes").rmdir()
    (cache / "hashes").write_text("a file where a folder should be", encoding="utf-8")
    assert known_hash(file) == value


def test_a_user_without_a_home_is_told_to_set_one(monkeypatch):
    """Such as any number that a container runs as, or a service that starts with no environment."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", "~nobody-at-all/.cache")
    with pytest.raises(UserError, match="no home directory.*set HF_HOME=FOLDER"):
        freshness.cache_folder()


def test_verify_reads_the_bytes(tmp_path, file, read, cache):
    folder = tmp_path / "adapter"
    folder.mkdir()
    file.rename(folder / "weights")
    seal(folder)
    known_hash(folder / "weights")
    (entry,) = (cache / "hashes").glob("*.json")
    (folder / "weights").write_bytes(b"other")
    believed = {"stamp": freshness._stamp(folder / "weights"), "sha256": "the old one"}
    entry.write_text(json.dumps(believed), encoding="utf-8")
    assert known_hash(folder / "weights") == "the old one"  # as if the disk had rotted
    with pytest.raises(UserError, match="weights: altered"):
        verify(folder, again="finequant train RECIPE")


def test_the_version_of_python_is_that_of_this_interpreter():
    assert freshness.versions()["python"] == platform.python_version()


def test_a_folder_is_made_once_for_its_inputs_and_versions(tmp_path, monkeypatch):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "rows").write_text(f"made {len(made)} times", encoding="utf-8")

    def rows(**inputs: int) -> str:
        folder = made_once(tmp_path / "data" / "tokens", inputs, make)
        return (folder / "rows").read_text(encoding="utf-8")

    assert rows(seed=1) == rows(seed=1) == "made 1 times"
    assert rows(seed=2) == "made 2 times"
    monkeypatch.setattr(freshness, "versions", lambda: {"torch": "another"})
    assert rows(seed=2) == rows(seed=2) == "made 3 times"
    (tmp_path / "data" / "tokens" / "rows").write_text("damaged", encoding="utf-8")
    assert rows(seed=2) == "made 4 times"


def test_a_folder_that_is_made_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    folder = made_once(tmp_path / "cache" / "weights", {"seed": 1}, lambda folder: None)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    assert made_once(folder, {"seed": 1}, refused) == folder
    with pytest.raises(OSError, match="Read-only"):
        made_once(folder, {"seed": 2}, refused)


def test_a_failure_leaves_no_partial_folder(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "rows").touch()
        raise UserError("no")

    with pytest.raises(UserError):
        made_once(tmp_path / "rows", {}, fail)
    assert not (tmp_path / "rows").exists()
    assert list(made_once(tmp_path / "rows", {}, lambda folder: None).glob("rows")) == []


def test_only_one_of_several_makes_a_folder(tmp_path):
    started, made = threading.Barrier(4), []

    def need() -> None:
        started.wait()
        made_once(tmp_path / "rows", {}, made.append)

    threads = [threading.Thread(target=need) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_marked_folders_and_values_depend_on_inputs_and_versions(tmp_path, monkeypatch):
    memo = Memo(tmp_path / "measurements" / "base.json", {"seed": 1, "layers": (1, 2)})
    assert memo.value() is None
    memo.keep({"perplexity": 2.5})
    mark(tmp_path, memo.inputs)
    assert memo.value() == {"perplexity": 2.5}
    assert is_made_from(tmp_path, memo.inputs)
    assert memo._replace(inputs={"seed": 2}).value() is None
    assert not is_made_from(tmp_path, {"seed": 2})
    monkeypatch.setattr(freshness, "versions", lambda: {"torch": "another"})
    assert memo.value() is None
    assert not is_made_from(tmp_path, memo.inputs)
