"""The folder publish/ on its way to the Hugging Face Hub, and the same there as here."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finequant.recipes.errors import OutsideError, UserError, listed
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

MADE_BY_THE_HUB = ".gitattributes"
AGAIN = "the same command goes on from here; files that are complete on the Hub are not sent again"


class Remote(NamedTuple):
    """The repository as it is before the upload."""

    url: str
    user: str
    commit: str | None
    """None: there is no such repository yet."""
    files: list[str]
    published: list[str]
    """Those that this recipe put there before."""

    def left_over(self, files: dict[str, Path]) -> list[str]:
        """Files of the last publication that this one does not have."""
        return [name for name in self.published if name in self.files and name not in files]

    def in_words(self, files: dict[str, Path]) -> list[str]:
        if self.commit is None:
            return [f"as {self.user}: the repository will be created"]
        if not self.files:
            return [f"as {self.user}: the repository exists and is empty"]
        lines = [f"as {self.user}: the repository exists, {len(self.files)} files in it"]
        replaced = [name for name in self.files if name in files]
        if replaced:
            lines.append(f"replaced where they differ: {', '.join(replaced)}")
        if left := self.left_over(files):
            lines.append(f"removed, as this publication does not have them: {', '.join(left)}")
        return lines


def look(recipe: Recipe, kind: str, into_existing: bool) -> Remote:
    """Who we are for the Hub, and what is in the repository now.

    Raises:
        UserError: without a token that can write, or for a repository that this recipe did not
            make or that is not as visible as the recipe says.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # a retry is told with the signed address it went to
    if not sys.stderr.isatty():
        disable_progress_bars()
    api, publish = HfApi(), recipe.publish
    url = f"{api.endpoint}/{publish.repo_id}"
    with told_by_the_hub(recipe):
        who = api.whoami()
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(_may_not_write(recipe))
        try:
            info = api.model_info(publish.repo_id)
        except RepositoryNotFoundError:
            return Remote(url, who["name"], None, [], [])
        files = [file.rfilename for file in info.siblings or []]
        files = [name for name in files if name != MADE_BY_THE_HUB]
        published = _published(api, recipe, info, files, kind)
        if files and not published and not into_existing:
            raise UserError(
                f"publish.repo_id: {publish.repo_id} exists, with {len(files)} files that this "
                f"recipe did not publish ({', '.join(files[:3])}{', ...' if files[3:] else ''}): "
                "name another, or add --into-existing to replace them"
            )
    if bool(info.private) != publish.private:
        there, said = ("private", "public") if info.private else ("public", "private")
        raise UserError(
            f"publish.private: the recipe says {said}, but {publish.repo_id} is {there}: change it "
            f"in the repository's settings, or set publish.private={str(info.private).lower()}"
        )
    return Remote(url, who["name"], info.sha, files, published)


def send(recipe: Recipe, files: dict[str, Path], remote: Remote) -> str:
    """Uploads in one commit, so that nobody sees half of it; large files first, one by one.

    `HfApi.upload_folder` would be shorter, but since huggingface_hub 2.4 it commits a large folder
    in several parts: https://huggingface.co/docs/huggingface_hub/guides/upload

    Interrupted, a second call sends only what the Hub does not have.

    Returns:
        The commit that holds the files.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from finequant.recipes.command_line import say

    api, repo_id = HfApi(), recipe.publish.repo_id
    with told_by_the_hub(recipe):
        if remote.commit is None:
            api.create_repo(repo_id, private=recipe.publish.private)
        additions = [CommitOperationAdd(name, path) for name, path in files.items()]
        for addition in additions:
            api.preupload_lfs_files(repo_id, [addition])
            say(f"publish: {addition.path_in_repo}")
        removed = [CommitOperationDelete(name) for name in remote.left_over(files)]
        commit = api.create_commit(
            repo_id,
            [*additions, *removed],
            commit_message=f"{recipe.name}, by finequant",
            parent_commit=remote.commit,
        )
    return commit.oid


def verify(recipe: Recipe, files: dict[str, Path], commit: str) -> None:
    """Compares every file with the hash that the Hub computed of what arrived.

    Raises:
        OutsideError: naming files that are missing there, or are not the same.
    """
    from huggingface_hub import HfApi

    with told_by_the_hub(recipe):
        found = HfApi().get_paths_info(recipe.publish.repo_id, list(files), revision=commit)
    there = {file.path: file for file in found}
    wrong = [
        f"{name}: {'differs' if name in there else 'is missing'}"
        for name, path in files.items()
        if name not in there or not _same(path, there[name])
    ]
    if wrong:
        raise OutsideError(
            f"publish: on the Hub, {len(wrong)} files are not as they are here\n"
            f"  {listed(wrong)}\nrun the same command again; do not use what is there"
        )


def _same(path: Path, there: RepoFile) -> bool:
    """A large file is known by its SHA-256, a small one by git's own hash."""
    if there.lfs:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id


def _published(
    api: HfApi, recipe: Recipe, info: ModelInfo, files: list[str], kind: str
) -> list[str]:
    """What the recipe of this name published there before, if it was the same kind of thing."""
    from ruamel.yaml import YAML, YAMLError

    from finequant.publish.publish import SUMS

    if not {"recipe.yaml", SUMS} <= {*files}:
        return []
    theirs, sums = (
        Path(api.hf_hub_download(recipe.publish.repo_id, name, revision=info.sha))
        for name in ("recipe.yaml", SUMS)
    )
    try:
        content = YAML(typ="safe").load(theirs)
    except YAMLError:
        return []
    lines = sums.read_text(encoding="utf-8").splitlines()
    names = [name for line in lines if (name := line.partition("  ")[2])]
    same = isinstance(content, dict) and content.get("name") == recipe.name
    return names if same and ("adapter_config.json" in names) == (kind == "adapter") else []


def _may_not_write(recipe: Recipe) -> str:
    return (
        f"publish: this token may not write to {recipe.publish.repo_id}: make one with the role "
        "write in the settings of your account on the Hub, then `hf auth login` or HF_TOKEN"
    )


@contextmanager
def told_by_the_hub(recipe: Recipe) -> Iterator[None]:
    """Turns what huggingface_hub raises into a message of ours, which never holds the token.

    Raises:
        UserError: for a token that is missing, wrong, or may not write; for what the Hub refuses.
        OutsideError: where the Hub cannot be reached or fails.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as raised:
        if said := _in_our_words(raised, recipe):
            raise said from None
        raise


def _in_our_words(raised: Exception, recipe: Recipe) -> UserError | None:
    # HTTPError: of whichever HTTP library this version of huggingface_hub stands on.
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    # A worker thread wraps what it met in a RuntimeError; so does hf_xet, without a cause.
    error = raised.__cause__ or raised if type(raised) is RuntimeError else raised
    if isinstance(error, LocalTokenNotFoundError):
        return UserError(
            "publish: no token for the Hub: `hf auth login`, or HF_TOKEN=..., with one that may "
            "write"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return UserError("publish: HF_HUB_OFFLINE is set: unset it to publish")
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, recipe)
    if isinstance(error, (HTTPError, ConnectionError)):
        kind = type(error).__name__
        return OutsideError(f"publish: the Hub cannot be reached ({kind}): {AGAIN}")
    if type(error) is RuntimeError:
        return OutsideError(f"publish: the upload failed ({_shown(error)}): {AGAIN}")
    return None


def _refusal(error: Exception, recipe: Recipe) -> UserError:
    """What an HTTP status means here."""
    status = error.response.status_code
    if status == 401:
        return UserError(
            "publish: the Hub does not accept this token: `hf auth login` with a valid one; "
            "HF_TOKEN, where it is set, comes first"
        )
    if status == 403:
        return UserError(_may_not_write(recipe))
    if status in (409, 412):
        return OutsideError(f"publish: {recipe.publish.repo_id} was changed meanwhile: {AGAIN}")
    said = _shown(error.server_message or error)
    if status >= 500 or status == 429:
        return OutsideError(f"publish: the Hub fails, status {status} ({said}): {AGAIN}")
    return UserError(f"publish: the Hub refuses, status {status}: {said}")


def _shown(message: object) -> str:
    """Somebody else's message in one line, without the token even if they put it there."""
    from huggingface_hub import get_token

    return " ".join(str(message).replace(get_token() or "\0", "***").split())[:200]
