"""Tests of zoo.hub against a real server: where a folder comes from, and what can go wrong."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from tests.hub import published
from tests.hub.conftest import point_client_at
from tests.hub.published import CONTENTS, card_of, with_card
from zoo import cards, hub
from zoo.cards import HubLocation
from zoo.errors import CheckpointError, ConfigError, UnknownNameError, ZooError
from zoo.files import CARD_FILE, CONFIG_FILE, RECIPE_FILE, WEIGHTS_FILE, FileRecord
from zoo.sandbox import Fault, Repository, Sandbox, User

REPO = "someone/alpha"
OTHER = {**CONTENTS, WEIGHTS_FILE: b"other weights"}


def flip(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def shelve(installation: Path, repo_id: str = REPO, revision: str | None = None) -> None:
    """Put the card of "alpha.one" into the installation."""
    location = HubLocation(repo_id=repo_id, revision=revision)
    text = cards.render(card_of(CONTENTS, hub=location))
    (installation / "model_cards" / "alpha.one.md").write_text(text)
    cards._read_cards.cache_clear()


@pytest.fixture
def alpha(sandbox: Sandbox, installation: Path) -> Repository:
    """A repository of two commits; the installation's card pins the first of them."""
    repository = sandbox.create(
        REPO, {**with_card(CONTENTS), "train.py": b"import os", "x/model.bin": b"\x80"}
    )
    first = repository.branches["main"]
    repository.tags["v1"] = (first, "one")
    repository.tags["v2"] = (repository.add(with_card(OTHER), "other weights"), "two")
    repository.branches["main"] = first
    shelve(installation, revision=first)
    return repository


def commits(repository: Repository) -> tuple[str, str]:
    return repository.tags["v1"][0], repository.tags["v2"][0]


def fetched(sandbox: Sandbox, name: str) -> int:
    """How often the content of a file was asked for."""
    return sum(r.method == "GET" and r.path.endswith(f"/{name}") for r in sandbox.requests)


# --- the order of places -------------------------------------------------------------------------


def test_a_bundled_weight_comes_first_and_without_a_request(
    sandbox: Sandbox, alpha: Repository, installation: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "zoo")
    (installation / "pretrained" / "alpha.one").mkdir()
    Path("alpha").mkdir()
    for name in ("alpha", "alpha.one"):
        folder, card = hub.resolve(name)
        assert folder == installation / "pretrained" / "alpha.one"
        assert card == cards.find("alpha.one")
    assert caplog.messages == ["alpha.one: bundled with this installation"] * 2
    assert sandbox.requests == []


def test_a_local_folder_comes_before_the_hub(
    sandbox: Sandbox, alpha: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "zoo")
    for name in (REPO, f"{REPO}@v1"):
        Path(name).mkdir(parents=True)
        assert hub.resolve(name) == (Path(name), None)
        assert hub.resolve(Path(name).absolute()) == (Path(name).absolute(), None)
    assert caplog.messages[0] == f"{REPO}: a local folder"
    assert sandbox.requests == []


def test_a_scheme_leaves_no_choice(sandbox: Sandbox, alpha: Repository) -> None:
    Path(REPO).mkdir(parents=True)
    for name, commit in [
        (f"hf://{REPO}", commits(alpha)[0]),
        (f"hf://{REPO}@v2", commits(alpha)[1]),
        (f"hf://{REPO}@{commits(alpha)[1]}", commits(alpha)[1]),
    ]:
        assert hub.resolve(name).folder.name == commit


def test_the_cache_comes_before_the_hub_and_the_log_says_so(
    sandbox: Sandbox, alpha: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "zoo")
    first = commits(alpha)[0]
    for _ in range(2):
        hub.resolve("alpha")
    assert caplog.messages == [
        f"{REPO}: from the Hub, commit {first}",
        f"{REPO}: in the cache, commit {first}",
    ]
    caplog.clear()
    hub.resolve(f"{REPO}@v1")
    assert caplog.messages == [
        f"{REPO}: revision v1 is commit {first}",
        f"{REPO}: in the cache, commit {first}",
    ]


def test_a_published_weight_comes_from_its_pinned_commit(
    sandbox: Sandbox, alpha: Repository
) -> None:
    alpha.branches["main"] = commits(alpha)[1]
    folder, card = hub.resolve("alpha")
    assert folder.name == commits(alpha)[0]
    assert card == cards.find("alpha.one")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == with_card(CONTENTS)
    assert all("main" not in request.path for request in sandbox.requests)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda commit: ("alpha", "v2"),
        lambda commit: ("alpha@v2", None),
        lambda commit: (f"{REPO}@v2", None),
        lambda commit: (REPO, "v2"),
        lambda commit: (REPO, commit),
        lambda commit: (f"alpha.one@{commit}", None),
    ],
)
def test_another_revision_is_checked_by_its_own_card(
    sandbox: Sandbox, alpha: Repository, spelling: Callable[[str], tuple[str, str | None]]
) -> None:
    name, revision = spelling(commits(alpha)[1])
    folder, card = hub.resolve(name, revision)
    assert folder.name == commits(alpha)[1]
    assert card is not None
    assert (folder / WEIGHTS_FILE).read_bytes() == OTHER[WEIGHTS_FILE]
    assert sum("/v2/" in request.path for request in sandbox.requests) <= 2  # HEAD and GET


def test_a_repository_that_the_zoo_does_not_know(sandbox: Sandbox, installation: Path) -> None:
    repository = sandbox.create("sandbox/other", with_card(CONTENTS))
    folder, card = hub.resolve("sandbox/other")
    assert folder.name == repository.branches["main"]
    assert card is not None
    assert card.name == "alpha.one"


# --- requests ------------------------------------------------------------------------------------


def test_a_cold_load_asks_for_each_file_once(sandbox: Sandbox, alpha: Repository) -> None:
    hub.resolve("alpha")
    files = sorted(with_card(CONTENTS))
    for name in files:
        assert fetched(sandbox, name) == 1
    assert fetched(sandbox, "train.py") == fetched(sandbox, "model.bin") == 0
    # HEAD and GET for each file.
    assert len(sandbox.requests) == 2 * len(files)


def test_a_warm_pinned_load_asks_for_nothing_and_a_warm_tag_once(
    sandbox: Sandbox, alpha: Repository
) -> None:
    hub.resolve("alpha")
    hub.resolve("alpha@v2")
    sandbox.requests.clear()
    for name in ("alpha", f"alpha@{commits(alpha)[0]}", f"{REPO}@{commits(alpha)[1]}"):
        hub.resolve(name)
    assert sandbox.requests == []
    hub.resolve("alpha@v2")
    assert [request.method for request in sandbox.requests] == ["HEAD"]


# --- offline -------------------------------------------------------------------------------------


@pytest.fixture(params=["argument", "flag", "refused", "hanging"])
def offline(
    request: pytest.FixtureRequest, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], dict[str, Any]]:
    """Cuts the Hub off when called; returns the options that resolve then needs."""

    def cut_off() -> dict[str, Any]:
        sandbox.requests.clear()
        if request.param == "argument":
            return {"local_files_only": True}
        if request.param == "flag":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            # The client has set itself up for being offline when it was imported.
            huggingface_hub.close_session()
        elif request.param == "refused":
            huggingface_hub.close_session()
            point_client_at(monkeypatch, "http://127.0.0.1:9")
        else:
            sandbox.faults.append(Fault("hang", method="*", times=100))
            monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
            monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.2)
        return {}

    return cut_off


@pytest.mark.parametrize("name", ["alpha", "alpha@v1", "alpha@v2", REPO])
def test_once_cached_everything_works_offline(
    sandbox: Sandbox, alpha: Repository, offline: Callable[[], dict[str, Any]], name: str
) -> None:
    expected = hub.resolve(name)
    options = offline()
    assert hub.resolve(name, **options) == expected
    if name == "alpha":
        assert sandbox.requests == []


@pytest.mark.parametrize("name", ["alpha", "alpha@v2"])
def test_offline_and_not_in_the_cache(
    sandbox: Sandbox, alpha: Repository, offline: Callable[[], dict[str, Any]], name: str
) -> None:
    options = offline()
    with pytest.raises(CheckpointError, match=r"is not in the cache .* load it once with a conn"):
        hub.resolve(name, **options)


def test_a_tag_never_seen_is_no_reason_to_take_another_commit(
    sandbox: Sandbox, alpha: Repository
) -> None:
    hub.resolve("alpha@v2")
    with pytest.raises(CheckpointError, match="is not in the cache"):
        hub.resolve("alpha@v1", local_files_only=True)


def test_a_copy_that_is_not_whole_is_not_in_the_cache(sandbox: Sandbox, alpha: Repository) -> None:
    folder, _ = hub.resolve("alpha")
    (folder / RECIPE_FILE).unlink()
    with pytest.raises(CheckpointError, match="is not in the cache"):
        hub.resolve("alpha", local_files_only=True)
    assert hub.resolve("alpha").folder == folder
    assert (folder / RECIPE_FILE).exists()


# --- damage --------------------------------------------------------------------------------------

LOCAL_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped bit": flip,
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("name", sorted(CONTENTS))
@pytest.mark.parametrize("damage", LOCAL_DAMAGES)
def test_a_damaged_cache_is_repaired(
    sandbox: Sandbox, alpha: Repository, name: str, damage: str
) -> None:
    folder, _ = hub.resolve("alpha")
    blob = (folder / name).resolve()
    blob.write_bytes(LOCAL_DAMAGES[damage](CONTENTS[name]))
    sandbox.requests.clear()
    assert hub.resolve("alpha").folder == folder
    assert (folder / name).read_bytes() == CONTENTS[name]
    assert {other: fetched(sandbox, other) for other in CONTENTS} == {
        **dict.fromkeys(CONTENTS, 0),
        name: 1,
    }
    # The client still takes the cache for its own.
    found = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    assert [repo.repo_id for repo in found.repos] == [REPO]
    assert found.warnings == []


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"---", b"-=-"), (b"sha256: ", b"sha256; "), (b"size: 7", b"size: 8")],
)
def test_a_damaged_copy_of_a_card_is_repaired(
    sandbox: Sandbox, alpha: Repository, before: bytes, after: bytes
) -> None:
    """Of a repository of others, whose card no record of ours describes."""
    name = f"{REPO}@{commits(alpha)[1]}"
    expected = hub.resolve(name)
    blob = (expected.folder / CARD_FILE).resolve()
    sound = blob.read_bytes()
    blob.write_bytes(sound.replace(before, after, 1))
    assert blob.read_bytes() != sound
    sandbox.requests.clear()
    assert hub.resolve(name) == expected
    assert (expected.folder / CARD_FILE).read_bytes() == sound
    assert fetched(sandbox, CARD_FILE) == 1


def test_swapped_files_in_the_cache_are_repaired(sandbox: Sandbox, alpha: Repository) -> None:
    folder, _ = hub.resolve("alpha")
    one, two = (folder / name for name in (CONFIG_FILE, WEIGHTS_FILE))
    one_target, two_target = one.resolve(), two.resolve()
    one_target.write_bytes(CONTENTS[WEIGHTS_FILE])
    two_target.write_bytes(CONTENTS[CONFIG_FILE])
    hub.resolve("alpha")
    assert {name: (folder / name).read_bytes() for name in CONTENTS} == CONTENTS


def test_a_damaged_cache_offline_is_an_error_and_stays(sandbox: Sandbox, alpha: Repository) -> None:
    folder, _ = hub.resolve("alpha")
    (folder / WEIGHTS_FILE).resolve().write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="is damaged or is another file"):
        hub.resolve("alpha", local_files_only=True)
    assert (folder / WEIGHTS_FILE).read_bytes() == b"damaged"


@pytest.mark.parametrize("kind", ["flip", "truncate", "cut", "drop", "lose", "503", "429"])
def test_a_fault_that_passes_is_got_over(sandbox: Sandbox, alpha: Repository, kind: Any) -> None:
    sandbox.faults.append(Fault(kind, path=f"*/{WEIGHTS_FILE}"))
    folder, _ = hub.resolve("alpha")
    assert (folder / WEIGHTS_FILE).read_bytes() == CONTENTS[WEIGHTS_FILE]
    assert 2 <= fetched(sandbox, WEIGHTS_FILE) <= 3


@pytest.mark.parametrize("kind", ["drop", "503", "429", "etag"])
@pytest.mark.parametrize("name", ["alpha", "alpha@v1"])
def test_a_fault_that_passes_when_asking_about_a_file(
    sandbox: Sandbox, alpha: Repository, kind: Any, name: str
) -> None:
    sandbox.faults.append(Fault(kind, method="HEAD"))
    folder, _ = hub.resolve(name)
    assert {name: (folder / name).read_bytes() for name in CONTENTS} == CONTENTS


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flip", "and was fetched twice"),
        ("truncate", "failed: Consistency check failed"),
        ("cut", f"Downloading {REPO} at revision .* failed"),
        ("drop", f"Downloading {REPO} at revision .* failed"),
        ("503", r"the Hub is in trouble \(status 503\); try again later"),
        ("429", "the Hub got too many requests from here; wait some minutes"),
        ("missing", f"lacks the file {WEIGHTS_FILE}"),
    ],
)
def test_a_fault_that_stays_is_one_line_and_leaves_nothing_damaged(
    sandbox: Sandbox, alpha: Repository, kind: Any, message: str
) -> None:
    sandbox.faults.append(Fault(kind, path=f"*/{WEIGHTS_FILE}", times=1000))
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.resolve("alpha")
    assert "\n" not in str(caught.value)
    assert not list(Path(constants.HF_HUB_CACHE).rglob(WEIGHTS_FILE))
    sandbox.faults.clear()
    assert hub.resolve("alpha").folder.name == commits(alpha)[0]


def test_what_stays_damaged_is_described(sandbox: Sandbox, alpha: Repository) -> None:
    sandbox.faults.append(Fault("flip", path=f"*/{WEIGHTS_FILE}", times=2))
    with pytest.raises(CheckpointError) as caught:
        hub.resolve("alpha")
    damaged = CONTENTS[WEIGHTS_FILE][:-1] + bytes([CONTENTS[WEIGHTS_FILE][-1] ^ 1])
    expected = FileRecord.of("x", CONTENTS[WEIGHTS_FILE])
    got = FileRecord.of("x", damaged)
    for part in [
        WEIGHTS_FILE,
        f"expected {expected.size} bytes with sha256 {expected.sha256}",
        f"got {got.size} bytes with sha256 {got.sha256}",
        f"from {REPO} at commit {commits(alpha)[0]}, and was fetched twice",
    ]:
        assert part in str(caught.value)
    assert fetched(sandbox, WEIGHTS_FILE) == 2


def test_another_file_of_the_same_size_behind_the_pinned_commit(
    sandbox: Sandbox, alpha: Repository, installation: Path
) -> None:
    """The Hub itself hands out something else: the card of the installation decides."""
    swapped = {**CONTENTS, WEIGHTS_FILE: b"wEights"}
    commit = alpha.add(with_card(swapped), "swapped")
    shelve(installation, revision=commit)
    with pytest.raises(CheckpointError, match="is damaged or is another file"):
        hub.resolve("alpha")


def test_a_tag_that_moves_is_followed_and_the_pinned_commit_is_not(
    sandbox: Sandbox, alpha: Repository
) -> None:
    first, second = commits(alpha)
    assert hub.resolve("alpha@v1").folder.name == first
    alpha.tags["v1"] = (second, "moved")
    assert hub.resolve("alpha@v1").folder.name == second
    assert hub.resolve("alpha").folder.name == first


def test_a_branch_that_moves_during_a_repair_does_not_mix_commits(
    sandbox: Sandbox, alpha: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.faults.append(Fault("flip", path=f"*/{WEIGHTS_FILE}"))
    repair = hub._repair

    def move_and_repair(*arguments: Any) -> None:
        alpha.branches["main"] = commits(alpha)[1]
        repair(*arguments)

    monkeypatch.setattr(hub, "_repair", move_and_repair)
    folder, _ = hub.resolve(REPO)
    assert folder.name == commits(alpha)[0]
    assert (folder / WEIGHTS_FILE).read_bytes() == CONTENTS[WEIGHTS_FILE]


# --- what a repository can hold ------------------------------------------------------------------


def test_a_file_that_the_repository_lacks(sandbox: Sandbox, installation: Path) -> None:
    contents = with_card(CONTENTS)
    del contents[RECIPE_FILE]
    sandbox.create("sandbox/other", contents)
    with pytest.raises(CheckpointError, match=rf"lacks the file {RECIPE_FILE}"):
        hub.resolve("sandbox/other")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"# just text", "a card begins with YAML front matter"),
        (b"\xff\xfe", "a card begins with YAML front matter"),
        (cards.render(card_of({})).encode(), "has no sha256 of its files"),
        (None, "is no checkpoint of the zoo: no card"),
    ],
)
def test_a_repository_without_a_sound_card(
    sandbox: Sandbox, installation: Path, card: bytes | None, message: str
) -> None:
    sandbox.create("sandbox/other", CONTENTS if card is None else {**CONTENTS, CARD_FILE: card})
    with pytest.raises((CheckpointError, ConfigError), match=message):
        hub.resolve("sandbox/other")


def test_a_card_cannot_point_out_of_the_folder(sandbox: Sandbox, installation: Path) -> None:
    contents = with_card(CONTENTS)
    contents[CARD_FILE] = contents[CARD_FILE].replace(b"name: config.json", b"name: ../config.json")
    sandbox.create("sandbox/other", contents)
    with pytest.raises(ConfigError, match=r"'\.\./config\.json' is not a plain file name"):
        hub.resolve("sandbox/other")


@pytest.mark.parametrize("name", ["../README.md", "a/../../config.json", "/etc/config.json"])
def test_a_file_name_cannot_point_out_of_the_cache(
    sandbox: Sandbox, installation: Path, name: str, tmp_path: Path
) -> None:
    sandbox.create("sandbox/other", {**with_card(CONTENTS), name: b"evil"})
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    try:
        folder = hub.resolve("sandbox/other").folder
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert {path.name for path in folder.iterdir()} == {*CONTENTS, CARD_FILE}
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert all(path.read_bytes() != b"evil" for path in tmp_path.rglob("*") if path.is_file())


# --- rights --------------------------------------------------------------------------------------


def test_a_deleted_repository(sandbox: Sandbox, alpha: Repository) -> None:
    hub.resolve("alpha")
    del sandbox.repositories[REPO]
    assert hub.resolve("alpha").folder.name == commits(alpha)[0]  # from the cache
    with pytest.raises(CheckpointError, match="neither a folder here nor a repository on the Hub"):
        hub.resolve("alpha@v2")


@pytest.mark.parametrize("token", ["", "other"])
def test_a_private_repository_looks_like_none(
    sandbox: Sandbox, alpha: Repository, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.users["other"] = User("other")
    monkeypatch.setenv("HF_TOKEN", token)
    alpha.private = True
    for name in ("alpha", "alpha@v2"):
        with pytest.raises(CheckpointError, match="where it is private, log in: hf auth login"):
            hub.resolve(name)
    sandbox.users["owner"] = User("someone")
    monkeypatch.setenv("HF_TOKEN", "owner")
    assert hub.resolve("alpha").folder.name == commits(alpha)[0]


@pytest.mark.parametrize("token", ["", "sandbox"])
def test_a_gated_repository(
    sandbox: Sandbox, alpha: Repository, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    alpha.gated = True
    for name in ("alpha", "alpha@v2"):
        with pytest.raises(CheckpointError, match="is gated: ask for access on its page, then log"):
            hub.resolve(name)
    alpha.granted.add("sandbox")
    monkeypatch.setenv("HF_TOKEN", "sandbox")
    assert hub.resolve("alpha").folder.name == commits(alpha)[0]


def test_a_token_that_the_hub_does_not_know(
    sandbox: Sandbox, alpha: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for name in ("alpha", "alpha@v2"):
        with pytest.raises(CheckpointError, match="does not accept the token; log in again"):
            hub.resolve(name)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("alpah", None, r"Unknown model 'alpah'. Did you mean 'alpha'"),
        ("alpah@v1", None, r"Unknown model 'alpah'. Did you mean 'alpha'"),
        ("hf://alpha", None, r"'hf://alpha' is not of the form hf://owner/name"),
        ("hf://a/b/c", None, "is not of the form hf://owner/name"),
        ("hf://../x", None, "is not of the form hf://owner/name"),
        ("alpha@v1", "v2", "give one revision"),
        (f"{REPO}@", None, "give one revision"),
        ("model_cards", "main", "is a local folder, which has no revisions"),
        ("someone/else", None, "neither a folder here nor a repository on the Hub"),
        ("alpha@v9", None, "someone/alpha has no revision 'v9'"),
        (f"alpha@{'9' * 40}", None, "someone/alpha has no revision '9999"),
    ],
)
def test_a_name_that_leads_nowhere(
    sandbox: Sandbox, alpha: Repository, name: str, revision: str | None, message: str
) -> None:
    Path("model_cards").mkdir(exist_ok=True)
    with pytest.raises(ZooError, match=message) as caught:
        hub.resolve(name, revision)
    assert "\n" not in str(caught.value)


def test_a_weight_that_is_nowhere_yet(sandbox: Sandbox, installation: Path) -> None:
    shelve(installation, revision=None)
    with pytest.raises(CheckpointError, match=r"alpha\.one is neither bundled nor published"):
        hub.resolve("alpha")
    with pytest.raises(UnknownNameError):
        hub.resolve("beta")
    assert sandbox.requests == []


def client_error(kind: type[Exception]) -> Exception:
    """An error of the client, without the HTTP answer that its constructor asks for."""
    error = kind.__new__(kind)
    error.args = ("several\nlines",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Cannot write to the cache .*No space"),
        (PermissionError(errno.EACCES, "Permission denied"), "the cache .*: Permission denied"),
        (RuntimeError("several\nlines"), "Downloading someone/alpha .* failed: several lines"),
        (client_error(errors.GatedRepoError), "someone/alpha is gated: ask for access"),
    ],
)
def test_what_cannot_be_caused_here_becomes_one_line_too(
    sandbox: Sandbox,
    alpha: Repository,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    def fail(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.resolve("alpha")
    assert "\n" not in str(caught.value)


# --- several processes ---------------------------------------------------------------------------

_PROCESS = """
import json, sys
from pathlib import Path
from zoo import hub
print("ready", flush=True)
sys.stdin.readline()
folder, card = hub.resolve(sys.argv[1])
print(json.dumps({path.name: path.read_text() for path in folder.iterdir()}))
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_several_processes_load_at_once(
    sandbox: Sandbox, installation: Path, tmp_path: Path, damaged: bool
) -> None:
    """All succeed, and one of them has downloaded, or repaired."""
    contents = {**CONTENTS, CONFIG_FILE: b"{}" + b" " * 200_000}
    files = with_card(contents)
    commit = sandbox.create(REPO, files).branches["main"]
    environ = published.environment(sandbox.url, tmp_path / "home")
    if damaged:
        published.run(_PROCESS, environ, f"{REPO}@{commit}")
        for path in (tmp_path / "home").rglob(CONFIG_FILE):
            path.resolve().write_bytes(b"damaged")
        sandbox.requests.clear()
    processes = [published.start(_PROCESS, environ, f"{REPO}@{commit}") for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n") for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    for output, _ in outputs:
        assert json.loads(output) == {name: text.decode() for name, text in files.items()}
    assert fetched(sandbox, CONFIG_FILE) == 1
    assert fetched(sandbox, WEIGHTS_FILE) == (0 if damaged else 1)


def test_a_mirror_by_the_environment(sandbox: Sandbox, alpha: Repository, tmp_path: Path) -> None:
    """In a process of its own, the client reads the endpoint as it does for everyone."""
    code = "from zoo import hub; print(hub.resolve('someone/alpha@v2').folder.name)"
    environ = published.environment(sandbox.url, tmp_path / "home")
    assert published.run(code, environ) == commits(alpha)[1]
    sandbox.requests.clear()
    offline = published.environment(sandbox.url, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert published.run(code, offline) == commits(alpha)[1]
    assert sandbox.requests == []
