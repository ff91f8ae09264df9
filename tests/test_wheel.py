"""`pip install` without a clone brings every file, and recipes that run by their names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("recipes", "finetune", "quantize", "evaluate", "publish")
MAKES_DATA = "recipes/data/make_"


def files(root: Path) -> set[str]:
    """Lists all files of the folders, as if `root` were the tree of the project."""
    return {
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The content of the wheel, built from a copy of the tree without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    built = subprocess.run(
        [*command, "--no-index", "--wheel-dir", str(folder), str(tree)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_file_of_the_folders_is_in_the_wheel(installed):
    expected = {name for name in files(ROOT) if not name.startswith(MAKES_DATA)}
    expected.remove("recipes/as_module/__main__.py")
    assert files(installed / "finequant") == expected
    assert (installed / "finequant" / "__main__.py").exists()


def test_without_a_clone_the_quickstart_is_found_by_its_name(installed):
    code = """
import finequant.recipes.load as load
data = load.load_recipe("quickstart").data
print(load.__file__, *(rows.source for rows in (*data.train, *data.validation, *data.test)))
"""
    paths = run(installed, "-c", code).split()
    assert len(paths) == 4
    assert all(Path(path).is_relative_to(installed) for path in paths)


def test_it_can_be_started_as_a_module(installed):
    version = CONFIGURATION["project"]["version"]
    assert run(installed, "-m", "finequant", "--version") == f"finequant {version}\n"
