"""Finds the base's license, and does what it demands of those who redistribute the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from finequant.quantize.formats.naming import base_license, license_on_card
from finequant.recipes.base import is_here, locate_base
from finequant.recipes.errors import UserError
from finequant.recipes.hub import offline_reason
from finequant.recipes.schema import Model, Recipe
from finequant.recipes.terminal import say

DOCUMENTS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""Prefixes of the files that are published along with a model."""

# Section 1.b of the Llama 2 to 4 community licenses quotes what the NOTICE file must say.
NOTICE = re.compile(r"[\"“]([^\"“”]*?is licensed under[^\"“”]*?Rights\s+Reserved\.?)[\"”]")


class Demand(NamedTuple):
    """What section 1.b.i of a Llama license demands of a model that is made from a Llama."""

    line: str
    """The line that the model's page must show prominently; "" if none."""
    start: str
    """The beginning of the model's name; "" for any."""


DEMANDS = {
    "llama2": Demand("", ""),
    "llama3": Demand("Built with Meta Llama 3", "Llama-3"),
}
SINCE_LLAMA_3_1 = Demand("Built with Llama", "Llama")


class License(NamedTuple):
    """The terms under which the base, and so the model made from it, is distributed."""

    id: str
    """The license as the Hub names it: apache-2.0, llama3.2, other."""
    name: str | None
    link: str | None
    line: str
    """What the model's page must show prominently; "" if nothing."""
    documents: dict[str, bytes]
    """Files to publish along with the model: name -> content."""


def license_of(recipe: Recipe) -> License:
    """Reads the license that comes with the base, and checks that publishing complies with it.

    Raises:
        UserError: if it is unknown, the recipe names another one, a Llama's license files are
            missing, or the name of a model made from a Llama does not begin as it must.
    """
    publish, (folder, unread) = recipe.publish, _base_folder(recipe.model)
    metadata = license_on_card(folder) if folder else {}
    if not folder and not unread:
        metadata = base_license(recipe.model)
    license = _license_id(recipe, metadata.get("license"), unread)
    name, link = (
        getattr(publish, key) or metadata.get(key) for key in ("license_name", "license_link")
    )
    kind = name if license == "other" and name else license
    is_llama, line = kind.startswith("llama"), ""
    if _comes_from_meta(recipe, folder) and not is_llama:
        raise UserError(
            f"publish.license: {license}, but the base is by meta-llama: give the license that its "
            "page on the Hub states, such as llama3.2"
        )
    given = Path(publish.license_folder) if publish.license_folder else None
    documents = _documents(folder, given)
    if is_llama:
        line, start = DEMANDS.get(kind, SINCE_LLAMA_3_1)
        _check_name(publish.repo_id, start)
        documents = _with_notice(documents, kind, str(given or folder or recipe.model.base))
    return License(license, name, link, line, documents)


def _license_id(recipe: Recipe, stated: str | None, unread: str) -> str:
    """Returns the license, as the Hub names it, that the recipe gives or the base states.

    unread: why the base's card cannot be read; "" if it can.
    """
    stated = None if stated == "unknown" else stated
    license = recipe.publish.license or stated
    if license is None:
        why = unread or f"{recipe.model.base} does not state its license"
        raise UserError(
            f"publish.license: {why}: give the license of the base as the Hub names it "
            "(apache-2.0, llama3.2, ...); it is on the page the base came from"
        )
    if unread:
        say(
            f"publish: {unread}: publish.license, {license}, was not compared with the base's, and "
            "the base's license files, if it has any, are not added: publish.license_folder adds "
            "them"
        )
    if stated not in (None, license):
        raise UserError(
            f"publish.license: {license}, but {recipe.model.base} says {stated}: a derived "
            "model keeps the license of its base"
        )
    return license


def likely_start(base: str) -> str:
    """Guesses, from the name of the base, how the name of a model made from it must begin."""
    name = base.removeprefix("Meta-")
    if not name.startswith("Llama"):
        return ""
    generation = re.match(r"Llama-?(\d(\.\d)?)", name)
    return DEMANDS.get(f"llama{generation[1]}" if generation else "", SINCE_LLAMA_3_1).start


def _base_folder(model: Model) -> tuple[Path | None, str]:
    """Returns the folder with the base's card and license, None for a package, which has neither;
    and why they cannot be read here, if they cannot: a run directory may come from elsewhere.

    Raises:
        UserError: if the Hub does not show the card of a Hub id.
    """
    if not is_here(model):
        return None, f"{model.base} is not on this machine"
    folder, file = locate_base(model)
    if folder:
        return (None if file else folder), ""
    folder, reason = _from_hub(model), offline_reason()
    if reason and not (folder and (folder / "README.md").exists()):
        where = f"not in the cache, and the Hub cannot be reached ({reason})"
        return folder, f"the card of {model.base} is {where}"
    return folder, ""


def _from_hub(model: Model) -> Path | None:
    """Downloads the base's card and license; offline, returns the cached folder, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from finequant.finetune.model import why_not_loaded

    offline_reason()
    wanted = ["README.md", "config.json", *(f"{name}*" for name in DOCUMENTS)]
    try:
        return Path(snapshot_download(model.base, revision=model.revision, allow_patterns=wanted))
    except Exception as error:  # no network and no cache, no access, no such revision
        if isinstance(error, LocalEntryNotFoundError) and offline_reason():
            return None
        raise UserError(
            f"model.base: the license of {model.base} cannot be read: {why_not_loaded(error)}"
        ) from None


def _comes_from_meta(recipe: Recipe, folder: Path | None) -> bool:
    names = [recipe.model.base, recipe.publish.base_model or ""]
    if folder and (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names.append(config.get("_name_or_path") or "")
    return any(name.startswith("meta-llama/") for name in names)


def _documents(base: Path | None, given: Path | None) -> dict[str, bytes]:
    """Reads the documents in the folder that the recipe gives, and those beside the base of which
    there is none.

    Raises:
        UserError: if the folder that the recipe gives has none.
    """
    documents: dict[str, bytes] = {}
    for folder in filter(None, (given, base)):
        present = tuple(_kind(name) for name in documents)
        documents |= {
            file.name: file.read_bytes()
            for file in (sorted(folder.iterdir()) if folder.is_dir() else [])
            if file.is_file() and _kind(file.name) and _kind(file.name) not in present
        }
        if folder == given and not documents:
            raise UserError(
                f"publish.license_folder: {given}: expected a folder with files whose names begin "
                "with LICENSE, NOTICE or USE_POLICY"
            )
    return documents


def _kind(name: str) -> str | None:
    """Returns which of DOCUMENTS a file is, with one spelling of LICENSE; None for other files."""
    kind = next((start for start in DOCUMENTS if name.upper().startswith(start)), None)
    return "LICENSE" if kind == "LICENCE" else kind


def _with_notice(documents: dict[str, bytes], license: str, holder: str) -> dict[str, bytes]:
    """Adds the NOTICE file that the license quotes, if the base has none."""
    present = {_kind(name): name for name in documents}
    text = documents.get(present.get("LICENSE") or "", b"")
    notice = NOTICE.search(text.decode("utf-8", "replace"))
    if "NOTICE" not in present and notice:
        present["NOTICE"] = "NOTICE"
        documents = documents | {"NOTICE": (" ".join(notice[1].split()) + "\n").encode()}
    missing = [
        names
        for start, names in (("LICENSE", "LICENSE.txt"), ("USE_POLICY", "USE_POLICY.md"))
        if start not in present
    ]
    if not missing and "NOTICE" not in present:
        missing = ["NOTICE"]
    if missing:
        raise UserError(
            f"publish: the license of the base ({license}) must be published along with it, but "
            f"{holder} lacks {' and '.join(missing)}: download "
            f"{'it' if len(missing) == 1 else 'them'} from the base's page on the Hub into a "
            "folder, and set publish.license_folder=FOLDER"
        )
    return documents


def _check_name(repo_id: str | None, start: str) -> None:
    name = (repo_id or "/").split("/")[1]
    if name and not re.sub("[-_.]", "", name).startswith(start.replace("-", "")):
        raise UserError(
            f"publish.repo_id: {repo_id}: the base's license demands that the name of every model "
            f"made from it begin with {start.replace('-', ' ')}, such as "
            f"{repo_id.split('/')[0]}/{start}-{name.removeprefix('Llama-')}"
        )
