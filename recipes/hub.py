"""Pins what a run takes from the Hub: branches and tags become commits; and does without it."""

from __future__ import annotations

import json
import os
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import doing

COMMITS = "FINEQUANT_COMMITS"
"""The environment variable by which `finequant run` tells its stages what it resolved."""

COMMIT = re.compile(r"[0-9a-f]{40}")
CONNECT_SECONDS = 10
OFFLINE_IS_SET = "HF_HUB_OFFLINE is set"


def pinned(recipe: Recipe, recorded: dict[str, str] | None = None) -> tuple[Recipe, dict[str, str]]:
    """Replaces the recipe's Hub revisions by commits; also returns the commit of each revision.

    recorded: commits that an earlier stage of the run used; they are used again. A revision that
    cannot be resolved stays as it is: loading it then fails with a reason.
    """
    content = recipe.model_dump()
    known = {**(recorded or {}), **json.loads(os.environ.get(COMMITS, "{}"))}
    commits: dict[str, str] = {}
    for kind, repository, holder in _on_the_hub(content):
        revision = holder["revision"] or "main"
        if COMMIT.fullmatch(revision):
            continue
        key = f"{kind}/{repository}@{revision}"
        if commit := known.get(key) or _resolved(kind, repository, revision):
            holder["revision"] = commits[key] = commit
    return (Recipe.model_validate(content) if commits else recipe), commits


def _on_the_hub(content: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Lists the Hub sources of a recipe: kind, repository, and the section with its revision."""
    data, quantize, evaluate = content["data"], content["quantize"], content["evaluate"]
    sources = [source for split in ("train", "validation", "test") for source in data[split]]
    sources += [*quantize["calibration"]["data"], *evaluate["perplexity"]]
    holders = [("datasets", source["source"], source) for source in sources]
    if not content["model"]["base"].startswith("package:"):
        holders.append(("models", content["model"]["base"], content["model"]))
    return [(kind, name, holder) for kind, name, holder in holders if not Path(name).is_absolute()]


@cache
def _resolved(kind: str, repository: str, revision: str) -> str | None:
    """Returns the commit that the Hub has now; offline, the one in the cache."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when it is imported
    from huggingface_hub import snapshot_download

    doing(f"asking the Hub for {repository}")
    offline_reason()
    try:
        folder = snapshot_download(
            repository,
            repo_type=kind.removesuffix("s"),
            revision=revision,
            allow_patterns=["config.json"],  # offline, a snapshot needs at least one file
        )
    # The client raises its own errors, those of HTTP and of the file system.
    except Exception:
        return None
    return Path(folder).name if COMMIT.fullmatch(Path(folder).name) else None


@cache
def offline_reason() -> str:
    """Says why the Hub cannot be reached, in which case its libraries use only their cache from now
    on; returns an empty text if it can be reached.

    Without a connection, the libraries would ask six times for each file, which takes half a
    minute. With one, they repeat failed requests as before.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import build_hf_headers

    if constants.is_offline_mode():
        return OFFLINE_IS_SET
    reason = ""
    for pause in (0, 1):
        time.sleep(pause)
        try:
            get_session().head(
                constants.ENDPOINT, headers=build_hf_headers(), timeout=CONNECT_SECONDS
            )
        except HTTPError as error:
            if not type(error).__name__.startswith("Connect"):  # ConnectError, ConnectTimeout
                return ""
            reason = str(error) or type(error).__name__
        else:
            return ""
    constants.HF_HUB_OFFLINE = True  # `datasets` copies it when it is imported
    return reason
