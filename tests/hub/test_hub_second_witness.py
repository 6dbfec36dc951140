"""The download half against a Hub that is not ours: olah, serving a Git repository.

It needs an environment of its own, named by its command:

    python -m venv olah && olah/bin/pip install olah
    ZOO_OLAH=olah/bin/olah-cli pytest -m slow tests/hub/test_hub_second_witness.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import published
from zoo.files import WEIGHTS_FILE
from zoo.publishing import push
from zoo.sandbox import Sandbox

OLAH = os.environ.get("ZOO_OLAH")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OLAH is None, reason="needs ZOO_OLAH, the path of olah-cli"),
]


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=zoo", "-c", "user.email=zoo@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(sandbox: Sandbox, weight: Path, installation: Path, tmp_path: Path) -> Path:
    """What `push` publishes, as a Git repository with an annotated tag and a later commit."""
    push(weight, published.REPO)
    folder = tmp_path / "mirrors" / "models" / "sandbox" / "tiny"
    folder.mkdir(parents=True)
    for name, content in sandbox.repositories[published.REPO].contents().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / ".gitattributes").unlink()  # plain files: no git-lfs is needed here
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Publish")
    git(folder, "tag", "--annotate", "v1", "--message", "one")
    (folder / "later.txt").write_text("later")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Later")
    return folder


@pytest.fixture
def olah(repository: Path, tmp_path: Path) -> Iterator[str]:
    """Its address; it has no Hub behind it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    config = tmp_path / "olah.toml"
    config.write_text(
        f"""[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{tmp_path / "olah"}"
mirrors-path = ["{tmp_path / "mirrors"}"]
hf-scheme = "http"
hf-netloc = "127.0.0.1:9"
hf-lfs-netloc = "127.0.0.1:9"
mirror-scheme = "http"
mirror-netloc = "127.0.0.1:{port}"
mirror-lfs-netloc = "127.0.0.1:{port}"

[accessibility]
offline = true
"""
    )
    assert OLAH is not None
    log = (tmp_path / "olah.log").open("w")
    process = subprocess.Popen(
        [OLAH, "--config", str(config)], cwd=tmp_path, stdout=log, stderr=log
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{url}/api/models/sandbox/tiny/revision/v1", timeout=5)
                break
            except urllib.error.URLError:
                assert process.poll() is None, (tmp_path / "olah.log").read_text()
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        log.close()


_RESOLVE = """
import json, sys
from zoo import hub
folder, card = hub.resolve(sys.argv[1])
print(json.dumps([folder.name, str(folder), card.name]))
"""


def test_a_tag_a_branch_and_a_commit_come_from_there(
    olah: str, repository: Path, weight: Path, tmp_path: Path
) -> None:
    tagged, newest = (
        git(repository, "rev-parse", "v1^{commit}"),
        git(repository, "rev-parse", "main"),
    )
    environ = published.environment(olah, tmp_path / "home")
    for revision, commit in [("v1", tagged), ("main", newest), (tagged, tagged)]:
        printed = published.run(_RESOLVE, environ, f"sandbox/tiny@{revision}")
        name, folder, card = json.loads(printed.splitlines()[-1])
        assert (name, card) == (commit, published.NAME)
        assert (Path(folder) / WEIGHTS_FILE).read_bytes() == (weight / WEIGHTS_FILE).read_bytes()


def test_the_sandbox_answers_as_it_does(olah: str, sandbox: Sandbox, repository: Path) -> None:
    """Headers and fields that the client goes by, for the same files."""

    def head(url: str, path: str) -> dict[str, str]:
        request = urllib.request.Request(f"{url}/sandbox/tiny/resolve/v1/{path}", method="HEAD")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return {name.lower(): value for name, value in answer.headers.items()}

    for path in ("README.md", "config.json", WEIGHTS_FILE):
        ours, theirs = head(sandbox.url, path), head(olah, path)
        assert ours["content-length"] == theirs["content-length"]
        assert len(ours["x-repo-commit"]) == len(theirs["x-repo-commit"]) == 40
        if path == "config.json":  # a plain file on both: Git's name of the blob
            assert ours["etag"].strip('"') == git(repository, "rev-parse", f"v1:{path}")

    def fields(url: str) -> dict[str, object]:
        address = f"{url}/api/models/sandbox/tiny/revision/v1"
        with urllib.request.urlopen(address, timeout=20) as answer:
            found: dict[str, object] = json.load(answer)
        return found

    ours_info, theirs_info = fields(sandbox.url), fields(olah)
    for key in ("id", "sha", "private", "siblings", "lastModified"):
        assert type(ours_info[key]) is type(theirs_info[key]), key
