"""The sandbox as the Hub of the client in this process, and an installation with one weight."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub import published
from zoo import cards, hub
from zoo.sandbox import Sandbox


def point_client_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What `HF_ENDPOINT` does before the first import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A running Hub with nothing on it; the client has an empty cache and may write."""
    with Sandbox() as sandbox:
        point_client_at(monkeypatch, sandbox.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", "sandbox")
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        yield sandbox
        huggingface_hub.close_session()


@pytest.fixture
def closed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The network is closed: nobody listens where the Hub was."""
    sandbox.stop()
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source checkout with an empty shelf of cards and nothing bundled."""
    root = tmp_path / "installation"
    (root / "model_cards").mkdir(parents=True)
    (root / "pretrained").mkdir()
    monkeypatch.setattr(cards, "shipped_folder", lambda name: root / name)
    monkeypatch.setattr(cards, "pretrained_folder", lambda name: root / "pretrained" / name)
    monkeypatch.setattr(hub, "pretrained_folder", lambda name: root / "pretrained" / name)
    monkeypatch.chdir(tmp_path)
    cards._read_cards.cache_clear()
    return root


@pytest.fixture(scope="session")
def weight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint folder of a tiny language model, to be copied, not changed."""
    return published.write_weight(tmp_path_factory.mktemp("weight") / "tiny")


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """As for all tests, but most of these here do without torch."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.manual_seed(0)
