"""Artifacts record their content: damage is named, edits are kept, pickles and links refused."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path

import pytest

from finequant.quantize.checkpoint.writing import weight_bytes
from finequant.quantize.formats import gguf
from finequant.recipes.artifact import SUMS, content_hash, differences, seal, verify
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.sources import matching_files


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sealed folder."""
    folder = tmp_path / "adapter"
    (folder / "inside").mkdir(parents=True)
    (folder / "weights").write_bytes(b"numbers" * 100)
    (folder / "inside" / "config").write_text("{}", encoding="utf-8")
    (folder / "training_log.json").write_text("[]", encoding="utf-8")
    seal(folder)
    return folder


def truncate(folder: Path) -> None:
    os.truncate(folder / "weights", 10)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "weights").read_bytes())
    content[333] ^= 1
    (folder / "weights").write_bytes(content)


def link(folder: Path) -> None:
    """Replaces a file by a link to the same bytes, which may change unnoticed."""
    (folder / "weights").rename(folder.parent / "elsewhere")
    (folder / "weights").symlink_to(folder.parent / "elsewhere")


DAMAGE = {
    "truncated": (truncate, ["weights: altered"]),
    "one bit": (flip_a_bit, ["weights: altered"]),
    "a link": (link, ["weights: altered"]),
    "missing": (lambda folder: (folder / "inside/config").unlink(), ["inside/config: missing"]),
    "added": (lambda folder: (folder / "own").touch(), ["own: added"]),
    "renamed": (
        lambda folder: (folder / "weights").rename(folder / "w"),
        ["w: added", "weights: missing"],
    ),
    "damaged sums": (
        lambda folder: (folder / SUMS).write_bytes(b"\xff\xfe"),
        ["inside/config: added", "weights: added", ": missing"],
    ),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_file_by_file(folder, damage, expected):
    verify(folder, again="finequant train RECIPE")
    damage(folder)
    assert set(differences(folder)) >= set(expected[:1])
    with pytest.raises(UserError) as caught:
        verify(folder, again="finequant train RECIPE")
    message = str(caught.value)
    for part in (str(folder), expected[0], "`finequant train RECIPE` recreates it", "previous/"):
        assert part in message


def test_sha256sum_accepts_a_sealed_folder(folder):
    checked = subprocess.run(
        ["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, text=True, check=True
    )
    assert checked.stdout == "inside/config: OK\nweights: OK\n"


def test_times_and_losses_are_not_hashed(folder):
    (folder / "training_log.json").write_text("[1]", encoding="utf-8")
    verify(folder, again="")


CLUTTER = [".DS_Store", "._weights", "inside/._config", "Thumbs.db", "desktop.ini", ".nfs00042"]


@pytest.mark.parametrize("name", CLUTTER)
def test_what_a_file_browser_leaves_changes_no_folder(folder, name):
    """Opening a run in Finder once trained it anew, and removed its checkpoints."""
    before = content_hash(folder)
    (folder / name).write_bytes(b"\0\5\x16\7")
    assert differences(folder) == []
    verify(folder, again="")
    assert content_hash(folder) == before
    seal(folder)
    (folder / name).unlink()
    assert differences(folder) == []


def test_what_a_file_browser_leaves_is_no_file_of_a_checkpoint(folder):
    for name in ("model.safetensors", "._model.safetensors", "more.gguf", "._more.gguf"):
        (folder / name).write_bytes(b"12345")
    assert weight_bytes(folder) == 5
    assert gguf.file_in(folder) == folder / "more.gguf"
    assert matching_files(folder / "*.gguf") == [folder / "more.gguf"]


def test_a_folder_that_was_never_sealed_is_taken_as_it_is(folder):
    (folder / SUMS).unlink()
    truncate(folder)
    assert differences(folder) is None
    verify(folder, again="")


@pytest.mark.parametrize("name", ["adapter_model.bin", "inside/state.pt", "model.pkl", "x.ckpt"])
def test_pickled_files_are_refused_by_name_sealed_or_not(folder, name):
    (folder / name).write_bytes(pickle.dumps([1]))
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            verify(folder, again="finequant train RECIPE")
        assert f"{folder / name}: pickled files are not read" in str(caught.value)
        assert "expected safetensors" in str(caught.value)
        seal(folder)


# In a run directory


@pytest.fixture
def written(recipe_file) -> tuple:
    """A recipe and its run directory, with artifacts of one file."""
    recipe = load_recipe(recipe_file)
    run = RunDir.of(recipe)
    for target in (run.adapter, run.quantized):
        write(recipe, run, target, "first")
    return recipe, run


def write(recipe, run: RunDir, target: Path, content: str) -> None:
    with run.writing(target, recipe) as partial:
        (partial / "weights").write_text(content, encoding="utf-8")


def test_an_edited_artifact_is_not_built_on(written):
    recipe, run = written
    run.require("quantize", recipe)
    (run.quantized / "weights").write_text("mine", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"(?s)quantized: changed since it was written.*weights: altered"
    ):
        run.require("quantize", recipe)


@pytest.mark.parametrize("artifact", ["adapter", "quantized"])
def test_an_edited_artifact_is_kept_when_it_is_recreated(written, artifact):
    recipe, run = written
    target = run.root / artifact
    (target / "weights").write_text("mine", encoding="utf-8")
    write(recipe, run, target, "second")
    assert (target / "weights").read_text(encoding="utf-8") == "second"
    kept = run.root / "previous" / f"{artifact}-1" / "weights"
    assert kept.read_text(encoding="utf-8") == "mine"


def test_a_folder_that_no_stage_made_is_kept(written):
    recipe, run = written
    run.merged.mkdir()
    (run.merged / "thesis.txt").write_text("mine", encoding="utf-8")
    write(recipe, run, run.merged, "weights")
    assert (run.root / "previous" / "merged-1" / "thesis.txt").read_text("utf-8") == "mine"


def test_writing_the_same_again_leaves_nothing_behind(written):
    recipe, run = written
    for target in (run.adapter, run.quantized):
        write(recipe, run, target, "first")
    assert sorted(path.name for path in run.root.iterdir()) == ["adapter", "quantized"]


@pytest.mark.parametrize("place", ["quantized", "quantized.partial", "quantized.replaced"])
def test_nothing_is_written_or_removed_through_a_link(written, tmp_path, place):
    recipe, run = written
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine", encoding="utf-8")
    link = run.root / place
    if link.exists():
        link.rename(run.root / "moved")
    link.symlink_to(outside)
    write(recipe, run, run.quantized, "second")
    assert [path.name for path in outside.iterdir()] == ["mine.txt"]
    assert (run.quantized / "weights").read_text(encoding="utf-8") == "second"
    assert not run.quantized.is_symlink()


def test_an_edited_report_is_kept(written):
    recipe, run = written
    for path in run.outputs("evaluate"):
        path.write_text("measured", encoding="utf-8")
    run.record(recipe, "evaluate", run.inputs(recipe, "evaluate"), seconds=1.0)
    run.keep_edited("evaluate")
    assert not (run.root / "previous").exists()
    run.report.write_text("embellished", encoding="utf-8")
    run.keep_edited("evaluate")
    kept = run.root / "previous" / "report.json-1"
    assert kept.read_text(encoding="utf-8") == "embellished"
    assert not run.report.exists()


def test_an_adapter_of_another_base_is_not_used(written, llama):
    recipe, run = written
    run.record(recipe, "train", run.inputs(recipe, "train"), seconds=1.0)
    for stage in ("quantize", "evaluate"):
        run.require_for(stage, recipe)
    other = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"base": str(llama("other", rope_theta=5e4))})
        }
    )
    for stage in ("quantize", "evaluate"):
        with pytest.raises(UserError, match="adapter: not made from .*: model.base: .*/other"):
            run.require_for(stage, other)
    write(recipe, run, run.adapter, "brought from elsewhere")
    run.require_for("quantize", other)
