"""A Hub on loopback that takes uploads: the requests of huggingface_hub when it publishes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from loopback import Handler, Server

LARGE = (".safetensors", ".gguf", ".pte", ".png")
WRITE_TOKEN = "hf_PlantedTokenThatMayWrite"
READ_TOKEN = "hf_PlantedTokenThatMayOnlyRead"
SIGNATURE = "hf_PlantedSignature"
"""Part of the URLs that large files are sent to: whoever has one may upload."""


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Blob:
    content: bytes
    large: bool

    def described(self, path: str) -> dict[str, object]:
        size, sha256 = len(self.content), hashlib.sha256(self.content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": len(pointer)}}
        stored = pointer.encode() if self.large else self.content
        entry = {"type": "file", "path": path, "size": size, "oid": git_hash(stored)}
        return entry | (lfs if self.large else {})


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, Blob]:
        return self.commits[self.head]

    def commit(self, files: dict[str, Blob]) -> str:
        content = json.dumps([len(self.commits), *(files[name].described(name) for name in files)])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        return sha


class Hub(Server):
    """Repositories in memory, and the users who may write to them."""

    repository, blob = Repository, Blob

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.requests: list[tuple[str, str]] = []
        self.received: list[str] = []
        """SHA-256 of each large file that arrived complete."""
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.instead: dict[str, tuple[int, dict, dict]] = {}
        """Answers instead of the usual ones, by the name of the route: status, body, headers."""
        self.stall_at: int | None = None
        """The number of the upload that stops halfway, until the client is gone."""
        self.drop = 0
        """How many uploads lose their connection."""
        self.damage: str | None = None
        """The name of a file that arrives altered."""
        self.uploads = 0
        self.stalled = threading.Event()


class _Handler(Handler):
    hub: Hub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/.*)?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/[^/]+", "preupload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(?P<oid>\w+)", "store"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/[^/]+", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths"),
        (
            "GET",
            r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
            "resolve",
        ),
    )
    NEED_WRITE = ("create", "preupload", "batch", "commit")

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path)):
                if name in self.hub.instead:
                    self._body()
                    return self.send(*self.hub.instead[name])
                if name == "store":
                    return self.store(match["oid"])
                body = self._body()
                if (refusal := self._refusal(name, match.groupdict())) is not None:
                    return self.send(*refusal)
                return getattr(self, name)(body, **match.groupdict())
        self._body()
        return self.send(404, {}, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def _refusal(self, name: str, found: dict[str, str]) -> tuple | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (WRITE_TOKEN, READ_TOKEN):
            message = "Invalid credentials in Authorization header"
            return 401, {"error": message}, {"X-Error-Message": message}
        if name == "whoami" and not token:
            return 401, {"error": "who?"}, {}
        if name in self.NEED_WRITE and token != WRITE_TOKEN:
            message = "you need a token that may write"
            return 403, {"error": message}, {"X-Error-Message": message}
        if "repo" in found:
            repository = self.hub.repositories.get(found["repo"])
            if repository is None or (repository.private and not token):
                return 401 if not token else 404, {}, {"X-Error-Code": "RepoNotFound"}
            revision = found.get("revision") or "main"
            if revision != "main" and revision not in repository.commits:
                return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        return None

    def whoami(self, body: bytes) -> None:
        role = "write" if WRITE_TOKEN in self.headers["Authorization"] else "read"
        user = {"name": "alice", "type": "user", "orgs": []}
        self.send(200, user | {"auth": {"accessToken": {"role": role, "displayName": "test"}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'alice'}/{asked['name']}"
        if name in self.hub.repositories:
            return self.send(409, {"error": "You already created this model repo"})
        if asked["organization"] not in (None, "alice"):
            return self.send(403, {"error": "no rights in this namespace"})
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        return self.send(200, {"url": f"{self.hub.url}/{name}"})

    def validate(self, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, repo: str, revision: str | None) -> None:
        repository, sha = self._at(repo, revision)
        names = [{"rfilename": name} for name in repository.commits[sha]]
        told = {"id": repo, "sha": sha, "siblings": names, "private": repository.private}
        self.send(200, told | {"tags": [], "downloads": 0, "gated": False, "disabled": False})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        repository, sha = self._at(repo, revision)
        files = repository.commits[sha]
        self.send(200, [files[name].described(name) for name in files])

    def preupload(self, body: bytes, repo: str) -> None:
        files = self.hub.repositories[repo].files
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            known = files[path].described(path) if path in files else {}
            oid = known["lfs"]["oid"] if "lfs" in known else known.get("oid")
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                href = f"{self.hub.url}/storage/{asked['oid']}?signature={SIGNATURE}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        self.hub.uploads += 1
        if self.hub.drop:
            self.hub.drop -= 1
            return self._hang_up()
        if self.hub.uploads == self.hub.stall_at:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.hub.stalled.set()
            self.rfile.read()  # until the client is gone
            return self._hang_up()
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.send(400, {"error": "another content than announced"})
        self.hub.large[oid] = content
        self.hub.received.append(oid)
        return self.send(200, {})

    def commit(self, body: bytes, repo: str) -> None:
        header, *changes = [json.loads(line) for line in body.splitlines()]
        repository = self.hub.repositories[repo]
        if header["value"].get("parentCommit", repository.head) != repository.head:
            return self.send(412, {"error": "A commit has happened since"})
        files = dict(repository.files)
        for change in changes:
            value, kind = change["value"], change["key"]
            if kind == "deletedFile":
                del files[value["path"]]
            elif kind == "lfsFile":
                files[value["path"]] = Blob(self.hub.large[value["oid"]], True)
            else:
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        if self.hub.damage:
            files[self.hub.damage] = Blob(b"other", files[self.hub.damage].large)
        sha = repository.commit(files)
        return self.send(
            200,
            {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"},
        )

    def paths(self, body: bytes, repo: str, revision: str) -> None:
        repository, sha = self._at(repo, revision)
        files = repository.commits[sha]
        asked = parse_qs(body.decode())["paths"]
        self.send(200, [files[name].described(name) for name in asked if name in files])

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        repository, sha = self._at(repo, revision)
        if path not in repository.commits[sha]:
            code = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            return self.send(404, {}, code)
        content = repository.commits[sha][path].content
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.send(200, content, {"X-Repo-Commit": sha, "ETag": etag})

    def _at(self, repo: str, revision: str | None) -> tuple[Repository, str]:
        repository = self.hub.repositories[repo]
        return repository, repository.head if revision in (None, "main") else revision

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub that takes uploads, in place of the read-only one."""
    own = Hub()
    yield own
    own.close()
