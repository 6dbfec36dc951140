"""Tests of zoo.sandbox: what the unmodified client asks of a Hub, and faults by switch."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

from tests.hub.published import ROOT
from tests.tiny import run as run_command
from zoo.sandbox import FAULTS, Fault, Sandbox, User

REPO = "sandbox/x"


def get(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A GET without the client."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_a_repository_from_its_making_to_its_end(sandbox: Sandbox) -> None:
    api = HfApi()
    assert api.create_repo(REPO, private=True).repo_id == REPO
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    head = api.model_info(REPO)
    assert (head.private, head.gated) == (True, False)
    large = os.urandom(3000)
    commit = api.create_commit(
        REPO,
        [
            CommitOperationAdd("a/b.json", b"{}"),
            CommitOperationAdd("c.txt", b"text"),
            CommitOperationAdd("m.safetensors", large),
        ],
        commit_message="add",
        parent_commit=head.sha,
    ).oid
    entries = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert entries["m.safetensors"].lfs.sha256 == hashlib.sha256(large).hexdigest()
    blob = subprocess.run(
        ["git", "hash-object", "--stdin"], input=b"text", capture_output=True, check=True
    )
    assert entries["c.txt"].blob_id == blob.stdout.decode().strip()
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [
        "a",
        ".gitattributes",
        "c.txt",
        "m.safetensors",
    ]
    assert [entry.path for entry in api.list_repo_tree(REPO, "a")] == ["a/b.json"]
    assert api.get_paths_info(REPO, ["c.txt", "none"])[0].size == 4
    api.create_branch(REPO, branch="dev", revision=head.sha)
    api.create_tag(REPO, tag="v1", tag_message="one", revision=commit)
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": commit,
        "dev": head.sha,
    }
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", commit)]
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        api.create_commit(
            REPO, [CommitOperationDelete("c.txt")], commit_message="x", parent_commit=head.sha
        )
    api.create_commit(REPO, [CommitOperationDelete("a/", is_folder=True)], commit_message="remove")
    assert "a/b.json" not in api.list_repo_files(REPO)
    assert "a/b.json" in api.list_repo_files(REPO, revision="v1")
    titles = [found.title for found in api.list_repo_commits(REPO)]
    assert titles == ["remove", "add", "initial commit"]
    api.delete_branch(REPO, branch="dev")
    api.delete_tag(REPO, tag="v1")
    assert api.whoami()["name"] == "sandbox"
    api.delete_repo(REPO)
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info(REPO)


def test_ranges(sandbox: Sandbox) -> None:
    content = bytes(range(100))
    sandbox.create(REPO, {"x.bin": content})
    url = f"{sandbox.url}/{REPO}/resolve/main/x.bin"
    for wanted, expected in [("10-19", content[10:20]), ("90-", content[90:]), ("0-", content)]:
        status, headers, body = get(url, Range=f"bytes={wanted}")
        assert (status, body) == (206, expected)
        assert headers["Content-Range"].endswith("/100")
    assert get(url, Range="bytes=100-")[0] == 416
    assert get(url)[1]["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize("revision", ["main", "v1", "commit"])
def test_a_file_names_its_commit_and_its_sha256(sandbox: Sandbox, revision: str) -> None:
    repository = sandbox.create(REPO, {"m.safetensors": b"large", "a.txt": b"small"})
    commit = repository.branches["main"]
    repository.tags["v1"] = (commit, None)
    base = f"{sandbox.url}/{REPO}/resolve/{commit if revision == 'commit' else revision}"
    status, headers, body = get(f"{base}/m.safetensors")
    assert (status, body) == (200, b"large")
    assert headers["X-Repo-Commit"] == commit
    assert headers["X-Linked-Etag"] == f'"{hashlib.sha256(b"large").hexdigest()}"'
    assert headers["X-Linked-Size"] == "5"
    assert "X-Linked-Etag" not in get(f"{base}/a.txt")[1]


@pytest.mark.parametrize(
    ("path", "token", "status", "code"),
    [
        ("/api/models/sandbox/none", "", 401, "RepoNotFound"),
        ("/api/models/sandbox/none", "sandbox", 404, "RepoNotFound"),
        ("/api/models/sandbox/x/revision/v9", "", 404, "RevisionNotFound"),
        ("/sandbox/x/resolve/main/none", "", 404, "EntryNotFound"),
        ("/api/models/sandbox/x/tree/main/none", "", 404, "EntryNotFound"),
        ("/sandbox/gated/resolve/main/a", "", 401, "GatedRepo"),
        ("/sandbox/gated/resolve/main/a", "stranger", 403, "GatedRepo"),
        ("/api/models/sandbox/private", "stranger", 404, "RepoNotFound"),
        ("/api/models/sandbox/private", "sandbox", 200, None),
        ("/api/whoami-v2", "", 401, None),
        ("/api/models/sandbox/x", "wrong", 401, None),
        ("/nothing/of/the/kind", "", 404, None),
    ],
)
def test_errors_have_the_code_that_the_client_goes_by(
    sandbox: Sandbox, path: str, token: str, status: int, code: str | None
) -> None:
    sandbox.users["stranger"] = User("stranger")
    for name in ("x", "gated", "private"):
        sandbox.create(f"sandbox/{name}", {"a": b"a"})
    sandbox.repositories["sandbox/gated"].gated = True
    sandbox.repositories["sandbox/private"].private = True
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    found = get(sandbox.url + path, **headers)
    assert (found[0], found[1].get("X-Error-Code")) == (status, code)


def test_search(sandbox: Sandbox) -> None:
    sandbox.create("sandbox/alpha", {"README.md": b"---\ntags:\n- zoo\n---\n"})
    sandbox.create("zoo-models/beta", {"README.md": b"---\nlicense: mit\n---\n"})
    sandbox.create("zoo-models/hidden").private = True
    api = HfApi()

    def found(**options: Any) -> list[str]:
        return sorted(model.id for model in api.list_models(**options))

    assert found() == ["sandbox/alpha", "zoo-models/beta"]
    assert found(author="zoo-models") == ["zoo-models/beta"]
    assert found(search="ALPHA") == found(filter="zoo") == ["sandbox/alpha"]


def test_an_upload_with_another_content_than_announced_is_refused(sandbox: Sandbox) -> None:
    sandbox.create(REPO)
    body = json.dumps({"objects": [{"oid": "0" * 64, "size": 3}]}).encode()
    request = urllib.request.Request(
        f"{sandbox.url}/{REPO}.git/info/lfs/objects/batch",
        data=body,
        headers={"Authorization": "Bearer sandbox", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        href = json.load(answer)["objects"][0]["actions"]["upload"]["href"]
    put = urllib.request.Request(href, data=b"abc", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(put)


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_strikes_once(
    sandbox: Sandbox, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.sandbox._HANG_SECONDS", 0.05)
    sandbox.create(REPO, {"x.bin": b"0123456789", "y": b"y"})
    url = f"{sandbox.url}/{REPO}/resolve/main/x.bin"
    sound = get(url)
    sandbox.faults.append(Fault(kind, path="*/x.bin", after=1))
    assert get(url)[2] == sound[2]
    assert get(url.replace("x.bin", "y"))[2] == b"y"
    try:
        status, headers, body = get(url)
    except (http.client.HTTPException, OSError):
        assert kind in ("cut", "drop", "hang", "lose")
    else:
        assert {
            "etag": lambda: body == sound[2] and headers["ETag"] != sound[1]["ETag"],
            "flip": lambda: sum(a != b for a, b in zip(body, sound[2], strict=True)) == 1,
            "truncate": lambda: body == sound[2][:-1] and headers["Content-Length"] == "9",
            "missing": lambda: (status, headers["X-Error-Code"]) == (404, "EntryNotFound"),
            "429": lambda: (status, headers["Retry-After"]) == (429, "0"),
            "503": lambda: status == 503,
        }[kind]()
    assert get(url)[2] == sound[2]


def test_the_command_starts_one_to_publish_to() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo.cli", "hub-sandbox", "--json", "--fault", "503:*/nothing"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # Whoever runs the tests in the background may have them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            text += process.stdout.readline()
        shown = json.loads(text)
        assert shown["HF_ENDPOINT"].startswith("http://127.0.0.1:")
        api = HfApi(endpoint=shown["HF_ENDPOINT"], token=shown["HF_TOKEN"])
        assert api.create_repo("sandbox/mine").repo_id == "sandbox/mine"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.communicate()


def test_bad_input_of_the_command(sandbox: Sandbox) -> None:
    port = sandbox.url.rpartition(":")[2]
    for words, message in [
        (["--fault", "flop"], "Unknown fault 'flop'. Did you mean 'flip'"),
        (["--port", port], f"Port {port} cannot be used"),
        (["--port", "99999999"], "Port 99999999 cannot be used"),
    ]:
        said = run_command("hub-sandbox", *words)
        assert said.status == 2
        assert message in said.err
