"""The oldest supported, the last 1.x and the newest client of the Hub do the same things.

Each is installed into a folder of its own, in `$ZOO_HUB_CLIENTS` if that is set, so that the
environment of the tests stays as it is:

    for client in oldest/==1.0.0 last-1/'<2' newest/; do
      pip install --target "$ZOO_HUB_CLIENTS/${client%%/*}" "huggingface-hub${client#*/}"
    done
    ZOO_HUB_CLIENTS=... pytest -m slow tests/hub/test_hub_clients.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import published
from tests.hub.published import ROOT
from zoo.sandbox import Sandbox

CLIENTS = {"oldest": "==1.0.0", "last-1": "<2", "newest": ""}

pytestmark = pytest.mark.slow

_SCRIPT = """
import json, logging, os, sys
from pathlib import Path
import huggingface_hub
import zoo
from zoo import hub
from zoo.errors import ZooError
from zoo.files import CONFIG_FILE, WEIGHTS_FILE

folder = Path(sys.argv[1])
did = {"version": huggingface_hub.__version__, "where": huggingface_hub.__file__}
first = zoo.push(folder, "sandbox/tiny")
again = zoo.push(folder, "sandbox/tiny")
did["first"] = [first.commit, first.tag, sorted(first.sent)]
did["again"] = [again.commit, again.tag, sorted(again.sent)]
config = json.loads((folder / CONFIG_FILE).read_text())
content = bytearray((folder / WEIGHTS_FILE).read_bytes())
content[-4:] = bytes(4)
(folder / WEIGHTS_FILE).write_bytes(bytes(content))
second = zoo.push(folder, "sandbox/tiny")
did["second"] = [second.commit, second.tag]
loaded = zoo.load("sandbox/tiny@v1")
did["loaded"] = len(loaded.load_report.loaded)
located = hub.resolve("sandbox/tiny@v2")
did["v2"] = located.folder.name
(located.folder / WEIGHTS_FILE).resolve().write_bytes(b"damaged")
hub.resolve(f"sandbox/tiny@{second.commit}")
did["repaired"] = (located.folder / WEIGHTS_FILE).read_bytes() == bytes(content)
for name in ("sandbox/tiny@v9", "sandbox/gated", "sandbox/none"):
    try:
        hub.resolve(name)
    except ZooError as error:
        did[name] = str(error)
print(json.dumps(did))
"""

_OFFLINE = """
import json
from zoo import hub
print(json.dumps([hub.resolve(f"sandbox/tiny@{tag}").folder.name for tag in ("v1", "v2")]))
"""


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder for each version of the client."""
    given = os.environ.get("ZOO_HUB_CLIENTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("clients")
    for name, version in CLIENTS.items():
        if not (folder / name / "huggingface_hub").is_dir():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target"]
            subprocess.run([*command, folder / name, f"huggingface-hub{version}"], check=True)
    return folder


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("part_size", [50_000_000, 20_000])
def test_a_client(weight: Path, tmp_path: Path, clients: Path, client: str, part_size: int) -> None:
    folder = published.write_weight(tmp_path / "folder")
    search = f"{clients / client}{os.pathsep}{ROOT}"
    with Sandbox(part_size=part_size) as sandbox:
        sandbox.create("sandbox/gated", {"README.md": b"---\n---\n"}).gated = True
        environ = published.environment(sandbox.url, tmp_path / "home", PYTHONPATH=search)
        did = json.loads(published.run(_SCRIPT, environ, str(folder)).splitlines()[-1])
        repository = sandbox.repositories["sandbox/tiny"]
        sandbox.requests.clear()
        flag = {**environ, "HF_HUB_OFFLINE": "1"}
        offline = json.loads(published.run(_OFFLINE, flag).splitlines()[-1])
        assert sandbox.requests == []
    assert json.loads(published.run(_OFFLINE, environ).splitlines()[-1]) == offline
    assert Path(did["where"]).is_relative_to(clients / client)
    version = CLIENTS[client].removeprefix("==")
    assert did["version"].startswith(version if client == "oldest" else "")
    assert (did["version"][0] == "1") == (client != "newest")
    v1, v2 = (repository.tags[tag][0] for tag in ("v1", "v2"))
    assert did["first"][:2] == [v1, "v1"]
    assert did["again"] == [v1, "v1", []]
    assert did["second"] == [v2, "v2"]
    assert did["v2"] == v2
    assert offline == [v1, v2]
    assert did["loaded"] > 0
    assert did["repaired"]
    assert len(repository.history()) == 3
    assert "has no revision 'v9'" in did["sandbox/tiny@v9"]
    assert "is gated: ask for access" in did["sandbox/gated"]
    assert "neither a folder here nor a repository" in did["sandbox/none"]
