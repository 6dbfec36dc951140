"""Payloads and malformed files on every way in: refused, and what they would create is absent."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zoo
from tests.hub import published
from tests.payloads import PAYLOADS, payload_in_tensor_storage
from zoo import cards, checkpoints, hub
from zoo.cards import Card
from zoo.errors import ZooError
from zoo.files import CARD_FILE, CONFIG_FILE, RESULTS_FILE, WEIGHTS_FILE, FileRecord
from zoo.sandbox import Sandbox

REPO = "sandbox/evil"


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    return tmp_path / "witness"


@pytest.fixture
def folder(weight: Path, tmp_path: Path) -> Path:
    shutil.copytree(weight, tmp_path / "folder")
    return tmp_path / "folder"


def upload(sandbox: Sandbox, folder: Path, **more: bytes) -> None:
    """Put a folder on the Hub as an attacker does: with a card that vouches for its files."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    contents.pop(CARD_FILE, None)
    named = [name for name in contents if name in zoo.files.CHECKPOINT_FILES]
    card = published.card(files=tuple(FileRecord.of(name, contents[name]) for name in named))
    sandbox.create(REPO, {**contents, CARD_FILE: cards.render(card).encode(), **more})


@pytest.mark.parametrize("make", PAYLOADS)
@pytest.mark.parametrize("name", [WEIGHTS_FILE, "pytorch_model.bin", "last.ckpt"])
def test_a_pickle_on_the_hub(
    sandbox: Sandbox,
    folder: Path,
    witness: Path,
    make: Callable[[Path, Path], None],
    name: str,
) -> None:
    (folder / WEIGHTS_FILE).unlink()
    make(folder / name, witness)
    upload(sandbox, folder)
    with pytest.raises(ZooError, match=r"is a pickle|no size and sha256 to check|Cannot read"):
        zoo.load(REPO)
    assert not witness.exists()
    if name != WEIGHTS_FILE:
        assert all(name not in request.path for request in sandbox.requests)


def test_a_pickle_nested_in_the_storage_of_a_tensor_on_the_hub(
    sandbox: Sandbox, folder: Path, witness: Path
) -> None:
    payload_in_tensor_storage(folder / WEIGHTS_FILE, witness)
    upload(sandbox, folder)
    with pytest.raises(ZooError, match="does not fit cached-transformer-lm"):
        zoo.load(REPO)
    assert not witness.exists()


def test_code_beside_the_weights_is_neither_fetched_nor_run(
    sandbox: Sandbox, folder: Path, witness: Path
) -> None:
    code = f"open({str(witness)!r}, 'w')".encode()
    names = ["modeling.py", "zoo.py", "sitecustomize.py", "conftest.py", "handler.py"]
    for name in names:
        (folder / name).write_bytes(code)
    upload(sandbox, folder)
    module = zoo.load(REPO)
    assert module.load_report.loaded
    located = hub.resolve(REPO)
    assert {path.name for path in located.folder.iterdir()} == set(zoo.files.CHECKPOINT_FILES)
    assert not witness.exists()


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "class path": (
        lambda config: config["network"].update(class_path="os.system"),
        "unknown key 'class_path'",
    ),
    "component": (lambda config: config.update(_component_="os.system"), "unknown key"),
    "instantiator": (
        lambda config: config["network"].update(_instantiator="os.system"),
        "unknown key '_instantiator'",
    ),
    "auto map": (lambda config: config.update(auto_map={"AutoModel": "x.Y"}), "unknown key"),
    "architecture as a module": (
        lambda config: config.update(architecture="os:system"),
        "Unknown architecture 'os:system'",
    ),
    "another architecture's family": (lambda config: config.update(family="x"), "is of family"),
    "wrong-shape head": (
        lambda config: config["network"].update(vocab_size=7),
        "has shape .* instead of",
    ),
    "too deep": (
        lambda config: config["network"].update(depth=10**12),
        "asks for a far larger network than the weights are",
    ),
    "too wide": (
        lambda config: config["network"].update(dim=2**16),
        "asks for a far larger network than the weights are|no network can be built",
    ),
    "beyond integers": (
        lambda config: config["network"].update(vocab_size=10**30),
        "no network can be built of these arguments",
    ),
    "newer format": (lambda config: config.update(format_version=99), "format version 99"),
    "other preprocessing": (
        lambda config: config.update(preprocessing={"tokenizer": "exec", "start": 10}),
        "preprocessing: tokenizer: expected 'bytes', got 'exec'",
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_chooses_values_and_nothing_else(
    sandbox: Sandbox, folder: Path, what: str
) -> None:
    change, message = CONFIGS[what]
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    upload(sandbox, folder)
    for source in (REPO, folder):
        with pytest.raises(ZooError, match=message) as caught:
            zoo.load(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [{}]",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system",
    ],
)
def test_a_card_constructs_nothing(sandbox: Sandbox, folder: Path, witness: Path, tag: str) -> None:
    upload(sandbox, folder)
    text = sandbox.repositories[REPO].contents()[CARD_FILE].decode()
    evil = text.replace("library_name: zoo", f"library_name: {tag.format(witness)}")
    assert evil != text
    sandbox.repositories[REPO].add({CARD_FILE: evil.encode()}, "evil")
    with pytest.raises(ZooError, match="not valid YAML"):
        zoo.load(REPO)
    assert not witness.exists()


def test_a_renamed_key_is_no_partial_load(sandbox: Sandbox, folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content.replace(b'"head.weight"', b'"haed.weight"'))
    upload(sandbox, folder)
    with pytest.raises(ZooError, match=r"'head\.weight' is missing; tensor 'haed\.weight' is un"):
        zoo.load(REPO)


def test_every_file_of_a_registry_entry_has_a_hash(sandbox: Sandbox, folder: Path) -> None:
    """A card that says nothing of the weights cannot be loaded by."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for left_out in (CONFIG_FILE, WEIGHTS_FILE):
        records = tuple(
            FileRecord.of(name, content)
            for name, content in contents.items()
            if name not in (CARD_FILE, left_out)
        )
        card = published.card(files=records)
        sandbox.create(REPO, {**contents, CARD_FILE: cards.render(card).encode()})
        with pytest.raises(ZooError, match=f"no size and sha256 to check .*{left_out}"):
            zoo.load(REPO)


def test_registry_entries_are_pinned() -> None:
    """S3: what is published is pinned by 40 hex digits, and everything by sha256."""
    found = cards.load_cards()
    for card in found.values():
        assert isinstance(card, Card)
        names = {record.name for record in card.files}
        assert {CONFIG_FILE, WEIGHTS_FILE, RESULTS_FILE} <= names, card.name
        if not cards.pretrained_folder(card.name).is_dir():
            assert card.hub.revision is not None, card.name
            assert len(card.hub.revision) == 40
    assert len(found) >= 1


def test_a_header_longer_than_the_file_takes_no_memory(folder: Path) -> None:
    import resource

    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with contextlib.suppress(OSError):  # Linux: an earlier peak would hide this one
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ZooError, match="truncated or is no safetensors file"):
        checkpoints.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
