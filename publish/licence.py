"""The base's licence, and what it asks of whoever passes the model on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from finequant.recipes.errors import UserError
from finequant.recipes.schema import Model, Recipe

DOCUMENTS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""How the names of files begin that go along with a model."""

# Section 1.b of the Llama 3 to 4 community licences quotes what the NOTICE file must say.
NOTICE = re.compile(r"[\"“]([^\"“”]*?is licensed under[^\"“”]*?Rights\s+Reserved\.?)[\"”]")


class Licence(NamedTuple):
    """Under what terms the base was given, and so the model made of it is."""

    id: str
    """As the Hub names it: apache-2.0, llama3.2, other."""
    name: str | None
    link: str | None
    is_llama: bool
    documents: dict[str, bytes]
    """File name -> content of what goes along."""


def licence_of(recipe: Recipe) -> Licence:
    """Reads the base's licence where the base is, and follows it.

    Raises:
        UserError: where it is not known, the recipe says another, a Llama's papers are missing,
            or its name does not begin with "Llama".
    """
    publish, folder = recipe.publish, _base_folder(recipe.model)
    said = _said_by_the_base(recipe.model, folder)
    own = said.get("license")
    licence = publish.license or own
    if licence is None:
        raise UserError(
            f"publish.license: {recipe.model.base} does not say its licence: give it as the Hub "
            "names it (apache-2.0, llama3.2, ...); it is on the page the base came from"
        )
    if own not in (None, licence):
        raise UserError(
            f"publish.license: {licence}, but {recipe.model.base} says {own}: what is made of a "
            "model keeps its licence"
        )
    name, link = (
        getattr(publish, key) or said.get(key) for key in ("license_name", "license_link")
    )
    is_llama = (name if licence == "other" and name else licence).startswith("llama")
    if _comes_from_meta(recipe, folder) and not is_llama:
        raise UserError(
            f"publish.license: {licence}, but the base is of meta-llama: give the licence that its "
            "page on the Hub says, such as llama3.2"
        )
    where = Path(publish.license_folder) if publish.license_folder else folder
    documents = _documents(where)
    if is_llama:
        _check_name(publish.repo_id)
        documents = _with_notice(documents, licence, where)
    return Licence(licence, name, link, is_llama, documents)


def _base_folder(model: Model) -> Path | None:
    """Where the base's card and licence lie; None for a package, which has neither.

    Raises:
        UserError: for a Hub id whose papers can be had neither from the Hub nor from the cache.
    """
    from finequant.recipes.base import locate_base

    folder, file = locate_base(model)
    if file:
        return None
    return folder or _from_hub(model)


def _from_hub(model: Model) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["README.md", "config.json", *(f"{name}*" for name in DOCUMENTS)]
    try:
        return Path(snapshot_download(model.base, revision=model.revision, allow_patterns=wanted))
    except Exception as error:  # no network and no cache, no access, no such revision
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.base: the licence of {model.base} cannot be read ({reason}): publish with a "
            "connection to the Hub and access to the base"
        ) from None


def _said_by_the_base(model: Model, folder: Path | None) -> dict[str, str | None]:
    """license, license_name and license_link of its card, or of its GGUF file."""
    from huggingface_hub import ModelCard

    if folder is None:
        return {"license": _said_by_gguf(model)}
    card = folder / "README.md"
    if not card.exists():
        return {}
    data = ModelCard.load(card, ignore_metadata_errors=True).data
    return {key: data.get(key) for key in ("license", "license_name", "license_link")}


def _said_by_gguf(model: Model) -> str | None:
    from gguf import GGUFReader

    from finequant.recipes.base import locate_base

    folder, file = locate_base(model)
    field = GGUFReader(folder / file).get_field("general.license")
    return field.contents() if field else None


def _comes_from_meta(recipe: Recipe, folder: Path | None) -> bool:
    names = [recipe.model.base, recipe.publish.base_model or ""]
    if folder and (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names.append(config.get("_name_or_path") or "")
    return any(name.startswith("meta-llama/") for name in names)


def _documents(folder: Path | None) -> dict[str, bytes]:
    if folder is None:
        return {}
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name.upper().startswith(DOCUMENTS)
    }


def _with_notice(
    documents: dict[str, bytes], licence: str, folder: Path | None
) -> dict[str, bytes]:
    """Adds the NOTICE file that the licence words, where the base has none."""
    found = {start: name for name in documents for start in DOCUMENTS if _begins(name, start)}
    text = documents.get(found.get("LICENSE") or found.get("LICENCE") or "", b"")
    notice = NOTICE.search(text.decode("utf-8", "replace"))
    if "NOTICE" not in found and notice:
        found["NOTICE"] = "NOTICE"
        documents = documents | {"NOTICE": (" ".join(notice[1].split()) + "\n").encode()}
    missing = [
        names
        for start, names in (("LICENSE", "LICENSE.txt"), ("USE_POLICY", "USE_POLICY.md"))
        if start not in found
    ]
    if not missing and "NOTICE" not in found:
        missing = ["NOTICE"]
    if missing:
        raise UserError(
            f"publish: the licence of the base ({licence}) must go along, and "
            f"{' and '.join(missing)} not in {folder or 'the package'}: download from the base's "
            "page on the Hub into a folder and name it with publish.license_folder=FOLDER"
        )
    return documents


def _begins(name: str, start: str) -> bool:
    return name.upper().startswith(start)


def _check_name(repo_id: str | None) -> None:
    name = (repo_id or "/").split("/")[1]
    if name and not name.startswith("Llama"):
        raise UserError(
            f"publish.repo_id: {repo_id}: the base's licence wants the name of every model made of "
            f"it to begin with Llama: such as {repo_id.split('/')[0]}/Llama-{name}"
        )
