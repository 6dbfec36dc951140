"""A Hub on this machine: a server that speaks its protocol, to publish to without an account.

`zoo hub-sandbox` starts it; the tests publish to it and load from it with the unmodified client. It
lives in memory, listens on 127.0.0.1, and uses the standard library alone. Repositories of models,
commits, branches, tags, plain and large files (in one part or several), private and gated
repositories, and ranges are as on the Hub. It does not check the YAML of cards, and keeps no Git
objects. Faults are put into its answers by switch (`Fault`).
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

__all__ = ["FAULTS", "Fault", "FaultKind", "Repository", "Request", "Sandbox", "User"]

FaultKind = Literal[
    "cut", "drop", "etag", "flip", "hang", "lose", "missing", "truncate", "429", "503"
]
FAULTS: tuple[str, ...] = get_args(FaultKind)

_LARGE_SUFFIXES = (".safetensors", ".bin", ".pt2", ".onnx", ".png", ".npy")
_LARGE_SIZE = 10_000_000
"""What is longer is a large file, whatever its name."""
_HANG_SECONDS = 30.0


@dataclasses.dataclass
class Fault:
    """Something that goes wrong with requests that match."""

    kind: FaultKind
    """`cut`: half of the body, then the connection ends. `drop`: the connection ends before
    anything is done. `etag`: another ETag. `flip`: one bit of the body is wrong. `hang`: no answer.
    `lose`: everything is done, and the answer never arrives. `missing`: 404, no such entry.
    `truncate`: the body is a byte short, and announced so. `429` (with Retry-After) and `503`: that
    status."""
    path: str = "*"
    """Shell wildcards on the path of the request."""
    method: str = "GET"
    """Or `"*"` for all."""
    times: int = 1
    """How many requests are struck."""
    after: int = 0
    """How many matching requests pass unharmed before."""


class User(NamedTuple):
    """Whom a token belongs to."""

    name: str
    organizations: tuple[str, ...] = ()
    may_write: bool = True


class Request(NamedTuple):
    """One request that was answered, or struck by a fault (status 0: the connection ended)."""

    method: str
    path: str
    status: int


@dataclasses.dataclass(frozen=True)
class _Blob:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """As Git names it; of a large file Git keeps a pointer."""
        content = self.content
        if self.large:
            content = (
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def upload_oid(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclasses.dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: Commit | None
    message: str
    date: str
    blobs: Mapping[str, _Blob]


@dataclasses.dataclass
class Repository:
    """A repository of a model."""

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = dataclasses.field(default_factory=set)
    """Users who may read it although it is gated."""
    commits: dict[str, Commit] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    tags: dict[str, tuple[str, str | None]] = dataclasses.field(default_factory=dict)
    """Name -> commit and message."""

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a tag, or its 40 hex digits.

        Raises:
            KeyError: When there is none.
        """
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if revision in self.branches:
            return self.commits[self.branches[revision]]
        if revision in self.tags:
            return self.commits[self.tags[revision][0]]
        return self.commits[revision]

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits from the newest to the first."""
        found: list[Commit] = []
        commit: Commit | None = self.find(revision)
        while commit is not None:
            found.append(commit)
            commit = commit.parent
        return found

    def contents(self, revision: str = "main") -> dict[str, bytes]:
        """What its files hold, by path."""
        return {path: blob.content for path, blob in self.find(revision).blobs.items()}

    def add(
        self, changes: Mapping[str, bytes | _Blob | None], message: str, branch: str = "main"
    ) -> str:
        """Add a commit; None removes a file. Returns its 40 hex digits."""
        parent = self.commits.get(self.branches.get(branch, ""))
        blobs = dict(parent.blobs) if parent else {}
        for path, change in changes.items():
            if change is None:
                blobs.pop(path, None)
            else:
                blobs[path] = change if isinstance(change, _Blob) else _blob(path, change)
        identity = [self.id, len(self.commits), message, {p: b.oid for p, b in blobs.items()}]
        oid = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[oid] = Commit(oid, parent, message, date, blobs)
        self.branches[branch] = oid
        return oid


def _is_large(path: str, size: int) -> bool:
    return path.endswith(_LARGE_SUFFIXES) or size > _LARGE_SIZE


def _blob(path: str, content: bytes) -> _Blob:
    return _Blob(content, _is_large(path, len(content)))


class _Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


class _RefusedError(Exception):
    """An error answer, with the header by which the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def answer(self) -> _Answer:
        headers = {"X-Error-Message": self.message}
        if self.code:
            headers["X-Error-Code"] = self.code
        return _Answer(self.status, json.dumps({"error": self.message}).encode(), headers)


class _Call(NamedTuple):
    """A request as the handlers see it."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    user: User | None
    parts: Mapping[str, str]
    """Named parts of the path, unquoted."""

    @property
    def json(self) -> dict[str, Any]:
        values = json.loads(self.body or b"{}")
        if not isinstance(values, dict):
            raise _RefusedError(400, "expected a JSON object")
        return values


class Sandbox:
    """The server; usable as a context manager.

    Args:
        port: 0 takes a free one.
        users: Token -> user; by default the token "sandbox" of the user "sandbox", who may also
            write to the organization "zoo-models".
        part_size: Large files of more bytes are uploaded in parts of this size.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        users: Mapping[str, User] | None = None,
        part_size: int = 50_000_000,
    ) -> None:
        self.users = dict(users or {"sandbox": User("sandbox", ("zoo-models",))})
        self.part_size = part_size
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.before_commit: Callable[[Repository], None] | None = None
        """Called once, just before the next commit is checked: somebody else is faster."""
        self._large_files: dict[str, bytes] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._tickets: dict[str, tuple[str, int]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.sandbox = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` must be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> Sandbox:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop serving and close the port."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def create(self, repo_id: str, files: Mapping[str, bytes] | None = None) -> Repository:
        """Make a repository, as the Hub does with one commit, and with `files` in a second."""
        with self._lock:
            repository = self.repositories[repo_id] = Repository(repo_id)
            repository.add({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            if files:
                repository.add(files, "add files")
            return repository

    # --- answers ---------------------------------------------------------------------------------

    def _strike(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.method in ("*", method) and fnmatchcase(path, fault.path):
                    if fault.after > 0:
                        fault.after -= 1
                    elif fault.times > 0:
                        fault.times -= 1
                        return fault
        return None

    def _answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> _Answer:
        split = urllib.parse.urlsplit(path)
        try:
            with self._lock:
                for methods, pattern, handler in _ROUTES:
                    match = pattern.fullmatch(split.path)
                    if match and method in methods:
                        parts = {
                            name: urllib.parse.unquote(part or "")
                            for name, part in match.groupdict().items()
                        }
                        query = dict(urllib.parse.parse_qsl(split.query))
                        user = self._user(headers)
                        return handler(
                            self, _Call(method, split.path, query, headers, body, user, parts)
                        )
            raise _RefusedError(404, f"The sandbox has nothing at {method} {split.path}")
        except _RefusedError as refused:
            return refused.answer()
        except (ValueError, KeyError, TypeError) as error:
            return _RefusedError(400, f"not understood: {type(error).__name__} {error}").answer()

    def _user(self, headers: Mapping[str, str]) -> User | None:
        token = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.users:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def _writer(self, call: _Call, owner: str) -> User:
        if call.user is None:
            raise _RefusedError(401, "Log in to do this")
        if not call.user.may_write or owner not in (call.user.name, *call.user.organizations):
            raise _RefusedError(403, f"The token has no right to write to {owner}")
        return call.user

    def _readable(self, call: _Call) -> Repository:
        repository = self.repositories.get(call.parts["repo"])
        user = call.user
        hidden = repository is None or (
            repository.private
            and (user is None or repository.owner not in (user.name, *user.organizations))
        )
        if repository is None or hidden:
            # As on the Hub, a private repository looks like none.
            raise _RefusedError(
                401 if user is None else 404, "Repository not found", "RepoNotFound"
            )
        return repository

    def _writable(self, call: _Call) -> Repository:
        repository = self._readable(call)
        self._writer(call, repository.owner)
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> Commit:
        try:
            return repository.find(revision)
        except KeyError:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    # --- repositories ----------------------------------------------------------------------------

    def _whoami(self, call: _Call) -> _Answer:
        if call.user is None:
            raise _RefusedError(401, "Invalid username or password.")
        role = "write" if call.user.may_write else "read"
        return _json(
            {
                "type": "user",
                "name": call.user.name,
                "fullname": call.user.name,
                "orgs": [{"type": "org", "name": name} for name in call.user.organizations],
                "auth": {"type": "access_token", "accessToken": {"role": role}},
            }
        )

    def _create(self, call: _Call) -> _Answer:
        values = call.json
        if values.get("type", "model") != "model":
            raise _RefusedError(400, "The sandbox holds models only")
        owner = values.get("organization") or (call.user.name if call.user else "")
        self._writer(call, owner)
        repo_id = f"{owner}/{values['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repositories:
            return _json({**answer, "error": "You already created this model repo"}, 409)
        private = values.get("private") is True or values.get("visibility") == "private"
        self.create(repo_id).private = private
        return _json(answer)

    def _delete(self, call: _Call) -> _Answer:
        values = call.json
        owner = values.get("organization") or (call.user.name if call.user else "")
        self._writer(call, owner)
        if self.repositories.pop(f"{owner}/{values['name']}", None) is None:
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        return _json({})

    def _validate_card(self, call: _Call) -> _Answer:
        return _json({"errors": [], "warnings": []})

    def _search(self, call: _Call) -> _Answer:
        found = []
        for repository in self.repositories.values():
            card = repository.contents().get("README.md", b"").decode(errors="replace")
            front_matter = card.partition("\n---\n")[0]
            wanted = call.query.get("filter")
            if (
                not repository.private
                and call.query.get("search", "").lower() in repository.id.lower()
                and call.query.get("author", repository.owner) == repository.owner
                and (wanted is None or re.search(rf"[-:] {re.escape(wanted)}$", front_matter, re.M))
            ):
                found.append(_info(repository, repository.find("main")))
        return _json(found)

    def _model_info(self, call: _Call) -> _Answer:
        repository = self._readable(call)
        commit = self._commit_of(repository, call.parts.get("rev") or "main")
        return _json(_info(repository, commit))

    def _tree(self, call: _Call) -> _Answer:
        commit = self._commit_of(self._readable(call), call.parts["rev"])
        folder = call.parts["path"].strip("/")
        prefix = f"{folder}/" if folder else ""
        entries, folders = [], set()
        for path, blob in commit.blobs.items():
            if not path.startswith(prefix):
                continue
            inner = path.removeprefix(prefix)
            if "/" in inner:
                folders |= {prefix + str(p) for p in _parents(inner)}
            if "/" not in inner or call.query.get("recursive", "").lower() in ("true", "1"):
                entries.append(_entry(path, blob))
        if call.query.get("recursive", "").lower() not in ("true", "1"):
            folders = {path for path in folders if "/" not in path.removeprefix(prefix)}
        if folder and not entries and not folders:
            raise _RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        directories = [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders
        ]
        return _json([*directories, *entries])

    def _paths(self, call: _Call) -> _Answer:
        commit = self._commit_of(self._readable(call), call.parts["rev"])
        if call.headers.get("content-type", "").startswith("application/json"):
            paths = call.json["paths"]
        else:
            paths = urllib.parse.parse_qs(call.body.decode()).get("paths", [])
        return _json([_entry(path, commit.blobs[path]) for path in paths if path in commit.blobs])

    # --- revisions -------------------------------------------------------------------------------

    def _refs(self, call: _Call) -> _Answer:
        repository = self._readable(call)
        return _json(
            {
                "branches": [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
                    for name, oid in repository.branches.items()
                ],
                "tags": [
                    {"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid}
                    for name, (oid, _) in repository.tags.items()
                ],
                "converts": [],
                "pullRequests": [],
            }
        )

    def _commits(self, call: _Call) -> _Answer:
        repository = self._readable(call)
        commit = self._commit_of(repository, call.parts["rev"])
        return _json(
            [
                {
                    "id": found.oid,
                    "title": found.message,
                    "message": "",
                    "authors": [{"user": repository.owner}],
                    "date": found.date,
                }
                for found in repository.history(commit.oid)
            ]
        )

    def _branch(self, call: _Call) -> _Answer:
        repository, name = self._writable(call), call.parts["name"]
        if call.method == "DELETE":
            if repository.branches.pop(name, None) is None:
                raise _RefusedError(404, f"no branch {name}", "RevisionNotFound")
            return _json({})
        if name in repository.branches:
            raise _RefusedError(409, "Reference already exists")
        start = self._commit_of(repository, call.json.get("startingPoint") or "main")
        repository.branches[name] = start.oid
        return _json({})

    def _add_tag(self, call: _Call) -> _Answer:
        repository, values = self._writable(call), call.json
        if values["tag"] in repository.tags:
            raise _RefusedError(409, "Tag reference exists already")
        commit = self._commit_of(repository, call.parts["rev"])
        repository.tags[values["tag"]] = (commit.oid, values.get("message"))
        return _json({})

    def _delete_tag(self, call: _Call) -> _Answer:
        if self._writable(call).tags.pop(call.parts["rev"], None) is None:
            raise _RefusedError(404, "no such tag", "RevisionNotFound")
        return _json({})

    # --- uploads ---------------------------------------------------------------------------------

    def _preupload(self, call: _Call) -> _Answer:
        repository = self._writable(call)
        blobs = self._commit_of(repository, call.parts["rev"]).blobs
        return _json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if _is_large(file["path"], file["size"]) else "regular",
                        "shouldIgnore": False,
                        "oid": blobs[file["path"]].upload_oid if file["path"] in blobs else None,
                    }
                    for file in call.json["files"]
                ]
            }
        )

    def _batch(self, call: _Call) -> _Answer:
        self._writable(call)
        objects: list[dict[str, Any]] = []
        for wanted in call.json["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self._large_files:
                ticket = f"{next(self._numbers)}-{oid[:16]}"
                self._tickets[ticket] = (oid, size)
                target = f"{self.url}/sandbox-upload/{ticket}"
                upload: dict[str, Any] = {"href": target}
                if size > self.part_size:
                    count = -(-size // self.part_size)
                    parts = {str(n): f"{target}/{n}" for n in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(self.part_size), **parts}
                verify = {"href": f"{self.url}/{call.parts['repo']}.git/info/lfs/verify"}
                found["actions"] = {"upload": upload, "verify": verify}
            objects.append(found)
        return _json({"transfer": "multipart", "objects": objects})

    def _upload(self, call: _Call) -> _Answer:
        ticket, number = call.parts["ticket"], call.parts["number"]
        if ticket not in self._tickets:
            raise _RefusedError(403, "no such upload")
        if call.method == "PUT" and number:
            self._parts.setdefault(ticket, {})[int(number)] = call.body
            return _Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})
        content = call.body
        if call.method == "POST":
            parts = self._parts.pop(ticket, {})
            numbers = [part["partNumber"] for part in call.json["parts"]]
            if sorted(parts) != sorted(numbers):
                raise _RefusedError(400, f"got parts {sorted(parts)}, asked to join {numbers}")
            content = b"".join(parts[number] for number in sorted(parts))
        oid, size = self._tickets[ticket]
        if (hashlib.sha256(content).hexdigest(), len(content)) != (oid, size):
            raise _RefusedError(400, "the content does not have the announced sha256 and size")
        self._large_files[oid] = content
        return _json({})

    def _verify(self, call: _Call) -> _Answer:
        content = self._large_files.get(call.json["oid"])
        if content is None or len(content) != call.json["size"]:
            raise _RefusedError(404, "no such large file")
        return _json({})

    def _commit(self, call: _Call) -> _Answer:
        repository, branch = self._writable(call), call.parts["rev"]
        hook, self.before_commit = self.before_commit, None
        if hook is not None:
            hook(repository)
        head = self._commit_of(repository, branch)
        message, changes = "", dict[str, "bytes | _Blob | None"]()
        for line in call.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
                parent = value.get("parentCommit")
                if parent and not head.oid.startswith(parent):
                    raise _RefusedError(
                        412, "A commit has happened since. Please refresh and try again"
                    )
            elif key == "file":
                changes[value["path"]] = _Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self._large_files:
                    raise _RefusedError(400, f"the large file {value['path']} was not uploaded")
                changes[value["path"]] = _Blob(self._large_files[value["oid"]], True)
            elif key == "deletedFile":
                changes[value["path"]] = None
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                changes |= dict.fromkeys(path for path in head.blobs if path.startswith(prefix))
            else:
                raise _RefusedError(400, f"The sandbox does not know the operation {key}")
        oid = repository.add(changes, message, branch)
        url = f"{self.url}/{repository.id}/commit/{oid}"
        return _json({"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    # --- files -----------------------------------------------------------------------------------

    def _resolve(self, call: _Call) -> _Answer:
        repository, path = self._readable(call), call.parts["path"]
        commit = self._commit_of(repository, call.parts["rev"])
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if repository.gated:
            if call.user is None:
                raise _RefusedError(
                    401, f"Access to model {repository.id} is restricted", "GatedRepo"
                )
            if call.user.name not in repository.granted:
                raise _RefusedError(
                    403, f"{call.user.name} is not in the authorized list", "GatedRepo"
                )
        blob = commit.blobs.get(path)
        if blob is None:
            refused = _RefusedError(404, f"{path} does not exist on {commit.oid}", "EntryNotFound")
            answer = refused.answer()
            return answer._replace(headers={**answer.headers, **headers})
        headers["ETag"] = f'"{blob.upload_oid}"'
        if blob.large:
            headers["X-Linked-Etag"] = f'"{blob.sha256}"'
            headers["X-Linked-Size"] = str(len(blob.content))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
        if wanted is None:
            return _Answer(200, blob.content, headers)
        size = len(blob.content)
        start, end = int(wanted[1]), int(wanted[2] or size - 1)
        if start >= size or start > end:
            return _Answer(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
        body = blob.content[start : end + 1]
        headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{size}"
        return _Answer(206, body, headers)


def _parents(path: str) -> list[str]:
    names = path.split("/")[:-1]
    return ["/".join(names[: end + 1]) for end in range(len(names))]


def _entry(path: str, blob: _Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(blob.content),
        "oid": blob.oid,
    }
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry


def _info(repository: Repository, commit: Commit) -> dict[str, Any]:
    siblings = []
    for path, blob in commit.blobs.items():
        sibling = {"rfilename": path, "size": len(blob.content), "blobId": blob.oid}
        if blob.large:
            sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        siblings.append(sibling)
    return {
        "_id": repository.id,
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.owner,
        "sha": commit.oid,
        "siblings": siblings,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "lastModified": commit.date,
        "createdAt": repository.history(commit.oid)[-1].date,
    }


def _json(values: Any, status: int = 200) -> _Answer:
    return _Answer(status, json.dumps(values).encode(), {"Content-Type": "application/json"})


_REPO = "(?P<repo>[^/]+/[^/]+?)"
_API = f"/api/models/{_REPO}"
_ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], Callable[[Sandbox, _Call], _Answer]]] = [
    (methods, re.compile(pattern), handler)
    for methods, pattern, handler in [
        (("GET",), "/api/whoami-v2", Sandbox._whoami),
        (("POST",), "/api/repos/create", Sandbox._create),
        (("DELETE",), "/api/repos/delete", Sandbox._delete),
        (("POST",), "/api/validate-yaml", Sandbox._validate_card),
        (("GET",), "/api/models/?", Sandbox._search),
        (("GET",), _API, Sandbox._model_info),
        (("GET",), f"{_API}/revision/(?P<rev>[^/]+)", Sandbox._model_info),
        (("GET",), f"{_API}/tree/(?P<rev>[^/]+)(?P<path>/.*)?", Sandbox._tree),
        (("POST",), f"{_API}/paths-info/(?P<rev>[^/]+)", Sandbox._paths),
        (("GET",), f"{_API}/refs", Sandbox._refs),
        (("GET",), f"{_API}/commits/(?P<rev>[^/]+)", Sandbox._commits),
        (("POST", "DELETE"), f"{_API}/branch/(?P<name>[^/]+)", Sandbox._branch),
        (("POST",), f"{_API}/tag/(?P<rev>[^/]+)", Sandbox._add_tag),
        (("DELETE",), f"{_API}/tag/(?P<rev>[^/]+)", Sandbox._delete_tag),
        (("POST",), f"{_API}/preupload/(?P<rev>[^/]+)", Sandbox._preupload),
        (("POST",), f"{_API}/commit/(?P<rev>[^/]+)", Sandbox._commit),
        (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", Sandbox._batch),
        (("POST",), rf"/{_REPO}\.git/info/lfs/verify", Sandbox._verify),
        (("PUT", "POST"), "/sandbox-upload/(?P<ticket>[^/]+)(?:/(?P<number>.+))?", Sandbox._upload),
        (("GET", "HEAD"), f"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Sandbox._resolve),
    ]
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64
    sandbox: Sandbox

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in the middle are not this server's mistake."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Server

    def _serve(self) -> None:
        sandbox, method, path = self.server.sandbox, self.command, self.path
        body = self._read_body()
        fault = sandbox._strike(method, urllib.parse.urlsplit(path).path)
        kind = fault.kind if fault else None
        if kind in ("drop", "hang"):
            if kind == "hang":
                sandbox._stopped.wait(_HANG_SECONDS)
            sandbox.requests.append(Request(method, path, 0))
            self.close_connection = True
            return
        if kind == "503":
            answer = _RefusedError(503, "Service unavailable").answer()
        elif kind == "429":
            answer = _RefusedError(429, "Too many requests").answer()
            answer = answer._replace(headers={**answer.headers, "Retry-After": "0"})
        elif kind == "missing":
            answer = _RefusedError(404, "Entry not found", "EntryNotFound").answer()
        else:
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = sandbox._answer(method, path, headers, body)
        if kind == "lose":
            sandbox.requests.append(Request(method, path, 0))
            self.close_connection = True
            return
        sandbox.requests.append(Request(method, path, answer.status))
        self._send(answer, kind)

    def _send(self, answer: _Answer, kind: FaultKind | None) -> None:
        headers, body = dict(answer.headers), answer.body
        if kind == "etag":
            headers |= {name: '"0123456789abcdef"' for name in headers if name.endswith("tag")}
            headers |= {name: '"0123456789abcdef"' for name in headers if name.endswith("Tag")}
        if kind == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if kind == "truncate":
            body = body[:-1]
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if kind == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: `Sandbox.requests` has them."""


def serve(sandbox: Sandbox) -> None:
    """Serve until interrupted."""
    with sandbox:
        while True:
            time.sleep(3600)
