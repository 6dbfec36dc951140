"""Publishing as a newcomer does it: the weight that ships, the sandbox, and the command alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants

import zoo
from tests.hub.published import ROOT
from tests.tiny import run as run_command
from zoo import cards
from zoo.errors import UnknownNameError
from zoo.files import CARD_FILE, CHECKPOINT_FILES
from zoo.sandbox import Sandbox

WEIGHT = "cached-transformer-lm.tiny-shakespeare"
REPO = "sandbox/shakespeare"
PROMPT: dict[str, Any] = {"max_new_tokens": 20, "seed": 1}

_GENERATE = f"""
import sys, zoo
print(zoo.load(sys.argv[1]).generate("ROMEO:", **{PROMPT}))
"""

Command = Callable[..., subprocess.CompletedProcess[str]]


class Started(NamedTuple):
    """`zoo hub-sandbox` in a process of its own."""

    process: subprocess.Popen[str]
    exports: dict[str, str]
    """What it prints for other terminals."""


@pytest.fixture
def started() -> Iterator[Started]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo.cli", "hub-sandbox"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().removeprefix("export ").strip() for _ in range(3)]
    yield Started(process, dict(line.split("=", 1) for line in lines))
    process.kill()
    process.communicate()


@pytest.fixture
def python(started: Started, tmp_path: Path) -> Command:
    """Runs Python in a terminal with those lines, with a cache of its own."""

    def run(*words: str, home: str = "home", **changes: str) -> subprocess.CompletedProcess[str]:
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path / home),
            **started.exports,
            **changes,
        }
        command = [sys.executable, *words]
        return subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)

    return run


class Listener:
    """Takes a port, answers nothing, and counts who comes."""

    def __init__(self, port: int) -> None:
        self.visits = 0
        self._socket = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            try:
                self._socket.accept()[0].close()
            except OSError:  # closed
                return
            self.visits += 1

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def test_the_shipped_weight_by_the_command(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As below, in this process."""
    card = cards.shipped_folder("model_cards") / f"{WEIGHT}.md"
    before = card.read_bytes()
    said = run_command("push", WEIGHT, REPO, "--dry-run")
    assert (said.status, sandbox.requests) == (0, [])
    assert "would send" in said.out
    (first,), (second,) = (run_command("push", WEIGHT, REPO, "--json").json for _ in range(2))
    repository = sandbox.repositories[REPO]
    assert len(repository.history()) == 2  # that of its making, and one
    assert repository.tags["v1"][0] == first["commit"] == second["commit"]
    assert second["sent"] == []
    assert card.read_bytes() == before, "the commit of another repository is not the card's"
    pulled = run_command("pull", f"{REPO}@v1")
    assert Path(pulled.out.strip()).name == first["commit"], pulled.err

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh"))
    expected = zoo.load(WEIGHT).generate("ROMEO:", **PROMPT)
    assert zoo.load(f"{REPO}@v1").generate("ROMEO:", **PROMPT) == expected
    sandbox.requests.clear()
    pinned = zoo.load(f"{REPO}@{first['commit']}")
    assert pinned.generate("ROMEO:", **PROMPT) == expected
    zoo.load(f"{REPO}@v1", local_files_only=True)
    assert sandbox.requests == []


@pytest.mark.slow  # several processes that import torch
def test_from_the_sandbox_to_a_load_without_it(
    started: Started, python: Command, tmp_path: Path
) -> None:
    card = cards.shipped_folder("model_cards") / f"{WEIGHT}.md"
    before = card.read_bytes()

    def command(*words: str, **changes: str) -> str:
        done = python("-m", "zoo.cli", *words, **changes)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pushed() -> dict[str, object]:
        (found,) = json.loads(command("push", WEIGHT, REPO, "--json"))
        return dict(found)

    assert "would send" in command("push", WEIGHT, REPO, "--dry-run")
    nothing = python("-m", "zoo.cli", "pull", REPO)
    assert nothing.returncode == 2
    assert "neither a folder here nor a repository on the Hub" in nothing.stderr

    first, second = pushed(), pushed()
    assert first["tag"] == second["tag"] == "v1"
    assert first["commit"] == second["commit"]
    assert second["sent"] == []
    assert card.read_bytes() == before, "the commit of another repository is not the card's"

    folder = Path(command("pull", f"{REPO}@v1").strip())
    assert folder.is_relative_to(tmp_path / "home")
    assert folder.name == first["commit"]
    for name in set(CHECKPOINT_FILES) - {CARD_FILE}:
        bundled = cards.pretrained_folder(WEIGHT) / name
        assert (folder / name).read_bytes() == bundled.read_bytes(), name

    expected = zoo.load(WEIGHT).generate("ROMEO:", **PROMPT)
    loaded = python("-c", _GENERATE, f"{REPO}@v1", home="fresh")
    assert loaded.stdout.strip() == expected.strip(), loaded.stderr

    started.process.terminate()
    started.process.wait(30)
    listener = Listener(int(started.exports["HF_ENDPOINT"].rpartition(":")[2]))
    try:
        offline = python("-c", _GENERATE, f"{REPO}@{first['commit']}", home="fresh")
        assert offline.stdout.strip() == expected.strip(), offline.stderr
        assert listener.visits == 0, "loaded by its commit"
        command("pull", f"{REPO}@v1", home="fresh", HF_HUB_OFFLINE="1")
        assert listener.visits == 0
        # The count can tell: a tag that may have moved is asked for.
        python("-m", "zoo.cli", "pull", f"{REPO}@v1", home="fresh")
        assert listener.visits > 0
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "The name is empty: give a weight, a checkpoint folder, or owner/name on the Hub."),
        ("{}", "{} is no checkpoint folder: it needs config.json and model.safetensors."),
        ("{}/file", "{}/file is no checkpoint folder: it needs config.json and model.safetensors."),
    ],
)
def test_what_is_no_weight_is_not_pulled(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = run_command("pull", name.format(tmp_path))
    assert (said.status, said.out) == (2, "")
    assert said.err.splitlines()[-1] == f"zoo: {message.format(tmp_path)}"
    folder = cards.pretrained_folder(WEIGHT)
    assert run_command("pull", folder).out == f"{folder}\n"
    with pytest.raises(UnknownNameError, match="The name is empty"):
        zoo.load("")
