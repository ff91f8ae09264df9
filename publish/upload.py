"""Uploads publish/ to the Hugging Face Hub, and verifies that every file arrived unchanged."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finequant.publish.loading import ADAPTER, ADAPTER_CONFIG, CARD, QUANTIZED
from finequant.recipes.artifact import SUMS, file_hash
from finequant.recipes.errors import OutsideError, UserError, counted, listed, one_line
from finequant.recipes.hub import OFFLINE_IS_SET, offline_reason
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

MADE_BY_THE_HUB = ".gitattributes"
RESUME_HINT = "run the same command again; files that are complete on the Hub are not sent again"


class Remote(NamedTuple):
    """The state of the repository before the upload."""

    url: str
    user: str
    commit: str | None
    """None if the repository does not exist yet."""
    files: list[str]
    published: dict[str, str]
    """Files that this recipe published before, with their SHA-256."""

    def left_over(self, files: dict[str, Path]) -> list[str]:
        """Lists files of the last publication that this one does not have."""
        return [name for name in self.published if name in self.files and name not in files]

    def in_words(self, files: dict[str, Path]) -> list[str]:
        if self.commit is None:
            return [f"as {self.user}: the repository will be created"]
        if not self.files:
            return [f"as {self.user}: the repository exists and is empty"]
        count = counted(len(self.files), "file")
        lines = [f"as {self.user}: the repository exists and has {count}"]
        replaced = [name for name in self.files if name in files]
        if replaced:
            lines.append(f"replaced where different: {', '.join(replaced)}")
        if left := self.left_over(files):
            lines.append(
                f"removed, not in this publication: {', '.join(left)}; earlier commits of the "
                "repository keep what is removed"
            )
        return lines


def look(recipe: Recipe, kind: str, files: dict[str, Path], into_existing: bool) -> Remote:
    """Looks up the user and the current content of the repository.

    Raises:
        UserError: without a token that can write, or for a repository that this recipe did not
            make, that was edited since, or whose visibility is not the recipe's.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # retries are logged with their signed URL
    if not sys.stderr.isatty():
        disable_progress_bars()
    api, publish = HfApi(), recipe.publish
    url = _without_secrets(f"{api.endpoint}/{publish.repo_id}")
    with report_hub_errors(recipe):
        who = api.whoami()
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(_may_not_write(recipe))
        # A commit would fail with it, after large files were sent.
        ModelCard.load(files[CARD]).validate()
        try:
            info = api.model_info(publish.repo_id)
        except RepositoryNotFoundError:
            return Remote(url, who["name"], None, [], {})
        there = [file.rfilename for file in info.siblings or []]
        there = [name for name in there if name != MADE_BY_THE_HUB]
        published = _published(api, recipe, info, there, kind)
        edited = _edited(api, recipe, info, published, files)
        if not into_existing:
            _check_is_ours(publish.repo_id, there, published, edited)
        if kind == QUANTIZED and ADAPTER_CONFIG in there:
            raise UserError(
                f"publish.repo_id: {publish.repo_id} has {ADAPTER_CONFIG}, so that transformers "
                "would load an adapter instead of the quantized model: name another, or delete "
                "that file there"
            )
    if bool(info.private) != publish.private:
        actual, wanted = ("private", "public") if info.private else ("public", "private")
        raise UserError(
            f"publish.private: the recipe says {wanted}, but {publish.repo_id} is {actual}: change "
            f"it in the repository's settings, or set publish.private={str(info.private).lower()}"
        )
    return Remote(url, who["name"], info.sha, there, published)


def _check_is_ours(
    repo_id: str, there: list[str], published: dict[str, str], edited: list[str]
) -> None:
    """Refuses a repository whose files this recipe did not publish, or that were edited since."""
    if there and not published:
        raise UserError(
            f"publish.repo_id: {repo_id} exists, with {counted(len(there), 'file')} that this "
            f"recipe did not publish ({', '.join(there[:3])}{', ...' if there[3:] else ''}): name "
            "another, or add --into-existing to replace those of the same names and keep the others"
        )
    if edited:
        raise UserError(
            f"publish.repo_id: {repo_id} was edited on the Hub since this recipe published it: "
            f"{', '.join(edited)}: move the edits into the recipe, such as into "
            "publish.description, or add --into-existing to replace them"
        )


def send(recipe: Recipe, files: dict[str, Path], remote: Remote) -> str:
    """Uploads in one commit, so that nobody sees a part of it; large files first, one by one.

    `HfApi.upload_folder` would be shorter, but since huggingface_hub 2.4 it commits a large folder
    in several parts: https://huggingface.co/docs/huggingface_hub/guides/upload

    After an interruption, a second call sends only what the Hub does not have.

    Returns:
        The commit that contains the files.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo_id = HfApi(), recipe.publish.repo_id
    with report_hub_errors(recipe):
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
    """Compares every file with the hash that the Hub computed.

    Raises:
        OutsideError: naming files that are missing or different on the Hub.
    """
    from huggingface_hub import HfApi

    with report_hub_errors(recipe):
        infos = HfApi().get_paths_info(recipe.publish.repo_id, list(files), revision=commit)
    remote = {info.path: info for info in infos}
    wrong = [
        f"{name}: {'differs' if name in remote else 'is missing'}"
        for name, path in files.items()
        if name not in remote or not _same(path, remote[name])
    ]
    if wrong:
        raise OutsideError(
            f"publish: the Hub differs from what is here in {counted(len(wrong), 'file')}\n"
            f"  {listed(wrong)}\nrun the same command again with --into-existing; do not use what "
            "is on the Hub"
        )


def _same(path: Path, remote: RepoFile) -> bool:
    """Compares a large file by its SHA-256, and a small one by git's hash."""
    if remote.lfs:
        return file_hash(path) == remote.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id


def _published(
    api: HfApi, recipe: Recipe, info: ModelInfo, files: list[str], kind: str
) -> dict[str, str]:
    """Maps to their SHA-256 the files that the recipe of this name published there before;
    {} if that was of another kind."""
    from ruamel.yaml import YAML

    if not {"recipe.yaml", SUMS} <= {*files}:
        return {}
    theirs, hashes = (
        Path(api.hf_hub_download(recipe.publish.repo_id, name, revision=info.sha))
        for name in ("recipe.yaml", SUMS)
    )
    try:
        content = YAML(typ="safe").load(theirs)
    except Exception:  # not only YAMLError: whatever a file of others makes the parser raise
        return {}
    lines = hashes.read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}
    same = isinstance(content, dict) and content.get("name") == recipe.name
    return sums if same and (ADAPTER_CONFIG in sums) == (kind == ADAPTER) else {}


def _edited(
    api: HfApi,
    recipe: Recipe,
    info: ModelInfo,
    published: dict[str, str],
    files: dict[str, Path],
) -> list[str]:
    """Lists what was edited on the Hub since it was published, and would be replaced or removed."""
    repository, names = recipe.publish.repo_id, {file.rfilename for file in info.siblings or []}
    if not names & published.keys():
        return []
    infos = api.get_paths_info(repository, [*names & published.keys()], revision=info.sha)

    def hash_there(file: RepoFile) -> str:
        if file.lfs:
            return file.lfs.sha256
        return file_hash(Path(api.hf_hub_download(repository, file.path, revision=info.sha)))

    replaced = [f for f in infos if f.path not in files or not _same(files[f.path], f)]
    return sorted(f.path for f in replaced if hash_there(f) != published[f.path])


def _may_not_write(recipe: Recipe, reason: str = "") -> str:
    return (
        f"publish: this token may not write to {recipe.publish.repo_id}{reason}: create one with "
        "the write role in your account settings on the Hub, then run `hf auth login` or set "
        "HF_TOKEN"
    )


@contextmanager
def report_hub_errors(recipe: Recipe) -> Iterator[None]:
    """Turns huggingface_hub's exceptions into our messages, which never contain the token.

    Raises:
        UserError: for a token that is missing, wrong, or read-only; for whatever the Hub refuses.
        OutsideError: if the Hub cannot be reached or fails.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as raised:
        if translated := _translate(raised, recipe):
            raise translated from None
        raise


def _translate(raised: Exception, recipe: Recipe) -> UserError | None:
    # HTTPError: from whichever HTTP library this version of huggingface_hub uses.
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    # A worker thread wraps its exception in a RuntimeError; so does hf_xet, without a cause. The
    # check of a card wraps it in a ValueError.
    error = raised
    if type(raised) is RuntimeError:
        error = raised.__cause__ or raised
    elif type(raised) is ValueError:
        error = raised.__cause__ or raised.__context__ or raised
    if isinstance(error, LocalTokenNotFoundError):
        return UserError(
            "publish: no token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token "
            "that may write"
        )
    if isinstance(error, OfflineModeIsEnabled):
        reason = offline_reason()  # which turns offline mode on where there is no connection
        if reason in ("", OFFLINE_IS_SET):
            return UserError(f"publish: {OFFLINE_IS_SET}: unset it to publish")
        return OutsideError(f"publish: the Hub cannot be reached ({reason}): {RESUME_HINT}")
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, recipe)
    if isinstance(error, (HTTPError, ConnectionError)):
        kind = type(error).__name__
        return OutsideError(f"publish: the Hub cannot be reached ({kind}): {RESUME_HINT}")
    if type(error) is RuntimeError:
        return OutsideError(f"publish: the upload failed ({_shown(error)}): {RESUME_HINT}")
    if isinstance(error, (ValueError, KeyError)):  # huggingface_hub cannot use the answer
        what = f"without {error}" if isinstance(error, KeyError) else _shown(error)
        return OutsideError(f"publish: the Hub gave an unexpected answer ({what}): {RESUME_HINT}")
    return None


def _refusal(error: Exception, recipe: Recipe) -> UserError:
    """Explains an HTTP status."""
    status = error.response.status_code
    if status == 401:
        return UserError(
            "publish: the Hub does not accept this token: run `hf auth login` with a valid one; "
            "HF_TOKEN, if it is set, takes precedence"
        )
    message = _shown(error.server_message or error)
    if status == 403 and "authorization" in error.response.request.headers:  # or storage is full
        return UserError(_may_not_write(recipe, f" ({message})"))
    if status == 409 and error.response.request.url.path.endswith("/repos/create"):
        return OutsideError(
            f"publish: {recipe.publish.repo_id} was created in the meantime, or this token may not "
            "see it: run the same command again, or use a token that may read and write it"
        )
    if status in (409, 412):
        return OutsideError(
            f"publish: {recipe.publish.repo_id} was changed in the meantime: {RESUME_HINT}"
        )
    if status == 429:
        return OutsideError(
            "publish: too many requests to the Hub, status 429: wait a few minutes, then "
            f"{RESUME_HINT}"
        )
    if status >= 500:
        return OutsideError(f"publish: the Hub failed, status {status} ({message}): {RESUME_HINT}")
    return UserError(f"publish: the Hub refused, status {status}: {message}")


def _shown(message: object) -> str:
    """Shortens a foreign message to one line, and removes the token and other secrets."""
    from huggingface_hub import get_token

    return one_line(_without_secrets(str(message).replace(get_token() or "\0", "***")))


def _without_secrets(text: str) -> str:
    """Removes what URLs may hold besides host and path: a password, the signature of an upload."""
    text = re.sub(r"(?<=://)[^/\s@]+@", "", text)
    return re.sub(r"(://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)
