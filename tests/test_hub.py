"""Tests of zoo.hub, with a downloader that stands for the client and counts its requests."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from zoo import cards, hub
from zoo.cards import Card, HubLocation
from zoo.configs import to_json
from zoo.errors import CheckpointError, ConfigError, UnknownNameError
from zoo.files import CARD_FILE, CONFIG_FILE, RECIPE_FILE, RESULTS_FILE, WEIGHTS_FILE, FileRecord

COMMIT = "1" * 40
OTHER_COMMIT = "2" * 40
CONTENTS = {
    CONFIG_FILE: b"{}",
    RECIPE_FILE: b"zoo: {}",
    RESULTS_FILE: b"{ }",
    WEIGHTS_FILE: b"weights",
}


def make_card(files: dict[str, bytes], revision: str | None = COMMIT) -> Card:
    """A card of the weight "alpha.one", with the records of some files."""
    real = to_json(cards.find("cached-transformer-lm"))
    changes = {
        "architecture": "alpha",
        "weight": "one",
        "hub": to_json(HubLocation(repo_id="someone/alpha", revision=revision)),
        "files": [to_json(FileRecord.of(name, content)) for name, content in files.items()],
        "results": [],
        "controls": [],
    }
    return cards.build(Card, {**real, **changes}, "test")


class FakeHub:
    """Repositories of several commits, and `snapshot_download` with the client's cache layout."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.online = True
        self.downloads: list[str] = []
        self.resolutions: list[str] = []
        self.corrupt_next: dict[str, Callable[[bytes], bytes]] = {}

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str,
        allow_patterns: list[str],
        local_files_only: bool,
        force_download: bool,
        library_name: str,
    ) -> str:
        repository = self.cache / f"models--{repo_id.replace('/', '--')}"
        if repo_id != "someone/alpha":
            raise client_error(errors.RepositoryNotFoundError)
        commit = revision
        if commit not in self.commits:
            self.resolutions.append(revision)
            if local_files_only or not self.online:
                raise errors.LocalEntryNotFoundError("not in the cache")
            if revision not in self.branches:
                raise client_error(errors.RevisionNotFoundError)
            commit = self.branches[revision]
        snapshot = repository / "snapshots" / commit
        if local_files_only and not snapshot.exists():
            raise errors.LocalEntryNotFoundError("not in the cache")
        snapshot.mkdir(parents=True, exist_ok=True)
        (repository / "blobs").mkdir(exist_ok=True)
        for name, content in self.commits[commit].items():
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if (
                not wanted
                or local_files_only
                or ((snapshot / name).exists() and not force_download)
            ):
                continue
            if not self.online:
                raise errors.LocalEntryNotFoundError("not in the cache")
            self.downloads.append(name)
            blob = repository / "blobs" / f"{commit}-{name}"
            blob.write_bytes(self.corrupt_next.pop(name, lambda content: content)(content))
            if not (snapshot / name).is_symlink():
                (snapshot / name).symlink_to(blob)
        return str(snapshot)


def client_error(kind: type[Exception]) -> Exception:
    """An error of the client, without the HTTP answer that its constructor asks for."""
    error = kind.__new__(kind)
    error.args = ("404 Client Error\n\nRepository Not Found for url",)
    return error


def flip(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub that holds "alpha.one", and an installation that knows of it but has not bundled it."""
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    card = make_card(CONTENTS)
    readme = {CARD_FILE: cards.render(card).encode()}
    other = {**CONTENTS, WEIGHTS_FILE: b"other weights"}
    fake.commits[COMMIT] = {**CONTENTS, **readme, "train.py": b"import os", "x/model.bin": b""}
    fake.commits[OTHER_COMMIT] = {**other, CARD_FILE: cards.render(make_card(other)).encode()}
    fake.branches = {"main": COMMIT, "v2": OTHER_COMMIT}
    shelf = tmp_path / "model_cards"
    shelf.mkdir()
    (shelf / "alpha.one.md").write_text(cards.render(card))
    monkeypatch.setattr(cards, "shipped_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(hub, "pretrained_folder", lambda name: tmp_path / "pretrained" / name)
    monkeypatch.chdir(tmp_path)
    return fake


def rewrite_card(tmp_path: Path, card: Card) -> None:
    (tmp_path / "model_cards" / "alpha.one.md").write_text(cards.render(card))


# --- the order of places -------------------------------------------------------------------------


def test_a_bundled_weight_comes_first_and_without_a_request(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "pretrained" / "alpha.one").mkdir(parents=True)
    (tmp_path / "alpha").mkdir()
    for name in ("alpha", "alpha.one"):
        folder, card = hub.resolve(name)
        assert folder == tmp_path / "pretrained" / "alpha.one"
        assert card == cards.find("alpha.one")
    assert (fake.downloads, fake.resolutions) == ([], [])


def test_a_local_folder_comes_without_a_card(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "someone" / "alpha").mkdir(parents=True)
    for name in ("someone/alpha", tmp_path / "someone" / "alpha"):
        assert hub.resolve(name) == (Path(name), None)
    assert (fake.downloads, fake.resolutions) == ([], [])


def test_a_local_folder_has_no_revisions(fake: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a local folder, which has no revisions"):
        hub.resolve(tmp_path, revision="main")


def test_a_published_weight_comes_from_its_pinned_commit(fake: FakeHub) -> None:
    folder, card = hub.resolve("alpha")
    assert folder.name == COMMIT
    assert card == cards.find("alpha.one")
    assert fake.resolutions == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()}.items() >= CONTENTS.items()


def test_nothing_but_the_files_of_a_checkpoint_is_downloaded(fake: FakeHub) -> None:
    hub.resolve("alpha")
    assert sorted(fake.downloads) == sorted([CARD_FILE, *CONTENTS])


def test_once_cached_it_works_with_the_network_closed(fake: FakeHub) -> None:
    hub.resolve("alpha")
    fake.downloads.clear()
    fake.online = False
    for local_files_only in (False, True):
        assert hub.resolve("alpha", local_files_only=local_files_only).folder.name == COMMIT
    assert (fake.downloads, fake.resolutions) == ([], [])


@pytest.mark.parametrize("revision", ["v2", OTHER_COMMIT])
def test_another_revision_is_checked_by_its_own_card(fake: FakeHub, revision: str) -> None:
    folder, card = hub.resolve("alpha", revision=revision)
    assert folder.name == OTHER_COMMIT
    assert card is not None
    assert card.files != cards.find("alpha").files
    assert fake.resolutions.count("v2") == (revision == "v2")


def test_a_repository_that_the_zoo_does_not_know(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "model_cards" / "alpha.one.md").unlink()
    folder, card = hub.resolve("someone/alpha")
    assert folder.name == COMMIT
    assert card is not None
    assert card.name == "alpha.one"
    assert fake.resolutions == ["main"]


def test_a_branch_that_moves_during_a_repair_does_not_mix_commits(fake: FakeHub) -> None:
    def flip_and_move(content: bytes) -> bytes:
        fake.branches["main"] = OTHER_COMMIT
        return flip(content)

    fake.corrupt_next = {WEIGHTS_FILE: flip_and_move}
    folder, _ = hub.resolve("someone/alpha")
    assert folder.name == COMMIT
    assert (folder / WEIGHTS_FILE).read_bytes() == CONTENTS[WEIGHTS_FILE]
    assert fake.resolutions == ["main"]


# --- damage --------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped bit": flip,
    "truncated": lambda content: content[:-1],
    "wrong size": lambda content: content + b"\0",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("name", sorted(CONTENTS))
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_download_is_fetched_once_more(fake: FakeHub, name: str, damage: str) -> None:
    fake.corrupt_next = {name: DAMAGES[damage]}
    folder, _ = hub.resolve("alpha")
    assert (folder / name).read_bytes() == CONTENTS[name]
    assert fake.downloads.count(name) == 2
    assert len(fake.downloads) == len(CONTENTS) + 2


def test_a_damaged_cache_is_repaired(fake: FakeHub) -> None:
    folder, _ = hub.resolve("alpha")
    blob = (folder / WEIGHTS_FILE).resolve()
    blob.write_bytes(flip(CONTENTS[WEIGHTS_FILE]))
    fake.downloads.clear()
    hub.resolve("alpha")
    assert blob.read_bytes() == CONTENTS[WEIGHTS_FILE]
    assert fake.downloads == [WEIGHTS_FILE]


def test_a_damaged_cache_offline_is_an_error_and_stays(fake: FakeHub) -> None:
    folder, _ = hub.resolve("alpha")
    (folder / WEIGHTS_FILE).resolve().write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="is damaged or is another file"):
        hub.resolve("alpha", local_files_only=True)
    assert (folder / WEIGHTS_FILE).read_bytes() == b"damaged"


def test_a_source_that_stays_damaged_is_an_error(fake: FakeHub) -> None:
    fake.commits[COMMIT][WEIGHTS_FILE] = b"other"
    with pytest.raises(CheckpointError) as caught:
        hub.resolve("alpha")
    expected, got = (FileRecord.of("x", text) for text in (CONTENTS[WEIGHTS_FILE], b"other"))
    for part in [
        WEIGHTS_FILE,
        f"expected {expected.size} bytes with sha256 {expected.sha256}",
        f"got {got.size} bytes with sha256 {got.sha256}",
        f"from someone/alpha at commit {COMMIT}, and was fetched twice",
    ]:
        assert part in str(caught.value)
    assert fake.downloads.count(WEIGHTS_FILE) == 2


def test_a_file_that_the_repository_lacks(fake: FakeHub) -> None:
    del fake.commits[COMMIT][RECIPE_FILE]
    with pytest.raises(CheckpointError, match=rf"Cannot read .*{RECIPE_FILE}"):
        hub.resolve("alpha")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"# just text", "a card begins with YAML front matter"),
        (b"\xff\xfe", "a card begins with YAML front matter"),
        (cards.render(make_card({})).encode(), "has no sha256 of its files"),
        (None, f"Cannot read .*{CARD_FILE}"),
    ],
)
def test_a_repository_without_a_sound_card(fake: FakeHub, card: bytes | None, message: str) -> None:
    fake.commits[OTHER_COMMIT].pop(CARD_FILE)
    if card is not None:
        fake.commits[OTHER_COMMIT][CARD_FILE] = card
    with pytest.raises((CheckpointError, ConfigError), match=message):
        hub.resolve("someone/alpha", revision="v2")


def test_a_card_cannot_point_out_of_the_folder(fake: FakeHub) -> None:
    text = cards.render(make_card(CONTENTS)).replace("name: config.json", "name: ../config.json")
    fake.commits[OTHER_COMMIT][CARD_FILE] = text.encode()
    with pytest.raises(ConfigError, match=r"'\.\./config\.json' is not a plain file name"):
        hub.resolve("someone/alpha", revision="v2")


# --- errors --------------------------------------------------------------------------------------


def test_an_unknown_name(fake: FakeHub) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown model 'alpah'. Did you mean 'alpha'"):
        hub.resolve("alpah")
    assert fake.resolutions == []


def test_an_unknown_repository(fake: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="neither a folder here nor a repository on the Hub"):
        hub.resolve("someone/else")


def test_an_unknown_revision(fake: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="someone/alpha has no revision 'v9'"):
        hub.resolve("alpha", revision="v9")


def test_a_weight_that_is_nowhere_yet(fake: FakeHub, tmp_path: Path) -> None:
    rewrite_card(tmp_path, make_card(CONTENTS, revision=None))
    cards._read_cards.cache_clear()
    with pytest.raises(CheckpointError, match=r"alpha\.one is neither bundled nor published"):
        hub.resolve("alpha")


@pytest.mark.parametrize("offline", ["flag", "network"])
def test_offline_and_not_in_the_cache(fake: FakeHub, offline: str) -> None:
    fake.online = offline != "network"
    with pytest.raises(CheckpointError, match=r"is not in the cache .* the Hub was not reached"):
        hub.resolve("alpha", local_files_only=offline == "flag")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "Cannot write to the cache .*: No space",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "the cache .*: Permission denied"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "the Hub was not reached"),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), "Downloading someone/alpha .* timed out"),
        (RuntimeError("several\nlines"), "Downloading someone/alpha .* failed: several lines"),
        (client_error(errors.GatedRepoError), "someone/alpha is gated: ask for access"),
    ],
)
def test_what_the_client_raises_becomes_one_line(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.resolve("alpha")
    assert "\n" not in str(caught.value)


def test_no_room_for_the_repair(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = hub.resolve("alpha")
    (folder / WEIGHTS_FILE).resolve().write_bytes(b"damaged")

    def fail(*arguments: Any, **options: Any) -> str:
        if options["force_download"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"Cannot write to the cache .*: No space left"):
        hub.resolve("alpha")


_PROCESS = """
import json, shutil, sys, time
from pathlib import Path
import huggingface_hub
from zoo import cards, hub
card, source, snapshot, log = sys.argv[1:]
def snapshot_download(repo_id, *, allow_patterns, force_download, **options):
    for name in allow_patterns:
        target = Path(snapshot, name)
        if Path(source, name).exists() and (force_download or not target.exists()):
            with open(log, "a") as file:
                file.write(name + "\\n")
            time.sleep(0.2)
            shutil.copy(Path(source, name), target)
    return snapshot
huggingface_hub.snapshot_download = snapshot_download
cards.shipped_folder = lambda name: Path(card).parent
hub.pretrained_folder = lambda name: Path("/nonexistent")
print("ready", flush=True)
sys.stdin.readline()
folder, found = hub.resolve("alpha")
print(json.dumps({name.name: name.read_text() for name in sorted(folder.iterdir())
                  if name.suffix != ".md"}))
"""


def test_two_processes_repair_a_damaged_cache_at_once(fake: FakeHub, tmp_path: Path) -> None:
    """Both end with sound files, and only the first of them downloads."""
    source, snapshot = tmp_path / "source", tmp_path / "snapshots" / COMMIT
    for folder in (source, snapshot):
        folder.mkdir(parents=True)
        for name, content in CONTENTS.items():
            (folder / name).write_bytes(content)
    (snapshot / WEIGHTS_FILE).write_bytes(b"damaged")
    card, log = tmp_path / "model_cards" / "alpha.one.md", tmp_path / "log"
    command = [sys.executable, "-c", _PROCESS, str(card), str(source), str(snapshot), str(log)]
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for output, _ in outputs:
        assert json.loads(output) == {name: text.decode() for name, text in CONTENTS.items()}
    assert log.read_text().splitlines() == [WEIGHTS_FILE]
