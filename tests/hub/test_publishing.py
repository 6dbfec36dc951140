"""Tests of zoo.publishing against a real server: what arrives, and what if it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import zoo
from tests.hub import published
from tests.hub.published import FIGURE, NAME, REPO
from tests.tiny import run as run_command
from zoo import cards, checkpoints, hub, publishing
from zoo.errors import CheckpointError, ConfigError, ZooError
from zoo.files import CARD_FILE, CONFIG_FILE, RECIPE_FILE, RESULTS_FILE, WEIGHTS_FILE, FileRecord
from zoo.publishing import EVAL_RESULTS_FILE, LICENCE_FILE, push
from zoo.sandbox import Fault, Repository, Sandbox, User

FILES = {
    CARD_FILE,
    CONFIG_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    WEIGHTS_FILE,
    LICENCE_FILE,
    EVAL_RESULTS_FILE,
    FIGURE,
}


@pytest.fixture
def folder(weight: Path, tmp_path: Path, installation: Path) -> Path:
    """A copy of the tiny weight, to be published."""
    shutil.copytree(weight, tmp_path / "folder")
    return tmp_path / "folder"


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def change_weights(folder: Path) -> None:
    """Other weights, of the same shapes."""
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-4:] = b"\0\0\0\0"
    (folder / WEIGHTS_FILE).write_bytes(bytes(content))


def state(repository: Repository) -> tuple[dict[str, bytes], dict[str, Any], int]:
    return repository.contents(), dict(repository.tags), len(repository.history())


# --- what arrives --------------------------------------------------------------------------------


def test_everything_arrives_in_one_commit_with_a_tag(sandbox: Sandbox, folder: Path) -> None:
    done = push(folder, REPO)
    repository = sandbox.repositories[REPO]
    initial, published_commit = reversed(repository.history())
    assert published_commit.parent is initial
    assert (done.commit, done.tag) == (published_commit.oid, "v1")
    commit, message = repository.tags["v1"]
    assert commit == done.commit
    assert message is not None  # that is what makes a tag an annotated one
    assert "nats_per_character 2.34568 nats/character, n = 1000" in message
    contents = repository.contents()
    assert set(done.sent) == FILES == contents.keys() - {".gitattributes"}
    for name in (CONFIG_FILE, RECIPE_FILE, RESULTS_FILE, WEIGHTS_FILE, FIGURE):
        assert contents[name] == (folder / name).read_bytes()
    assert b"Apache License" in contents[LICENCE_FILE]
    assert done.size == sum(map(len, contents.values())) - len(contents[".gitattributes"])


def test_what_was_published_loads_to_the_same_outputs(sandbox: Sandbox, folder: Path) -> None:
    import torch

    done = push(folder, REPO)
    loaded = zoo.load(f"{REPO}@v1")
    tokens = torch.randint(256, (2, 20))
    expected, _ = published.module().network(tokens)
    assert torch.equal(loaded.network(tokens)[0], expected)
    assert loaded.load_report.dropped == loaded.load_report.initialised == ()
    located = hub.resolve(f"hf://{REPO}@{done.commit}")
    assert located.card is not None
    assert located.card.results == published.measurements().results


def test_the_card_that_arrives_is_complete(sandbox: Sandbox, folder: Path, tmp_path: Path) -> None:
    push(folder, REPO)
    contents = sandbox.repositories[REPO].contents()
    text = contents[CARD_FILE].decode()
    card = cards.parse(text)
    assert cards.render(card) == text
    assert card.hub == cards.HubLocation(repo_id=REPO)
    assert card.files == tuple(
        FileRecord.of(name, contents[name])
        for name in (CONFIG_FILE, RECIPE_FILE, RESULTS_FILE, WEIGHTS_FILE)
    )
    (tmp_path / "README.md").write_text(text)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name) == ("apache-2.0", "zoo")
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["karpathy/tiny_shakespeare"]
    assert "cached-transformers" in data.tags
    assert data.eval_results is not None
    assert [(r.metric_type, r.metric_value, r.dataset_split) for r in data.eval_results] == [
        (result.metric, result.value, result.split) for result in card.results
    ]


def test_pictures_are_found_however_the_card_writes_them(sandbox: Sandbox, folder: Path) -> None:
    other = "figures/cached-transformer-lm.tiny/other.png"
    (folder / other).write_bytes(b"\x89PNG other")
    edit(folder / CARD_FILE, f"({FIGURE})", f'(./{FIGURE})\n![o]({other} "with a title")')
    first = push(folder, REPO)
    repository = sandbox.repositories[REPO]
    for name in (FIGURE, other):
        assert repository.contents()[name] == (folder / name).read_bytes()
    again = push(folder, REPO)
    assert (again.commit, again.sent, again.removed) == (first.commit, (), ())


def test_no_folder_of_this_machine_is_published(sandbox: Sandbox, folder: Path) -> None:
    """A recipe knows where its data lie, and results what was measured; both may be private."""
    private = "/home/alice/letters"
    recipe = yaml.safe_load((folder / RECIPE_FILE).read_text())
    recipe["data"] = {"path": f"{private}/to bob.txt", "streams": 2}
    recipe["zoo"]["finetune"] = {"base_model": f"{private}/base", "freeze": ["embedding"]}
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe))
    edit(folder / RESULTS_FILE, f"zoo evaluate {NAME}", f"zoo evaluate {private}/run/checkpoint")
    edit(folder / RESULTS_FILE, '"tiny-shakespeare"', f'"{private}/to bob.txt"')
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    push(folder, REPO)
    contents = sandbox.repositories[REPO].contents()
    assert all(b"alice" not in content for content in contents.values())
    sent = yaml.safe_load(contents[RECIPE_FILE])
    assert sent["data"] == {"path": "to bob.txt", "streams": 2}
    assert sent["zoo"]["finetune"] == {"base_model": "base", "freeze": ["embedding"]}
    results = json.loads(contents[RESULTS_FILE])["results"]
    assert {r["command"] for r in results} == {f"zoo evaluate {NAME}"}
    assert {r["dataset"] for r in results} == {"to bob.txt"}
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert zoo.load(f"{REPO}@v1").load_report.loaded


def test_the_results_arrive_in_the_hubs_second_format(sandbox: Sandbox, folder: Path) -> None:
    eval_results = pytest.importorskip("huggingface_hub._eval_results")
    push(folder, REPO)
    written = yaml.safe_load(sandbox.repositories[REPO].contents()[EVAL_RESULTS_FILE])
    expected = [
        eval_results.EvalResultEntry(
            dataset_id="karpathy/tiny_shakespeare",
            task_id=result.protocol,
            value=result.value,
            date=result.date,
            notes=entry["notes"],
        )
        for result, entry in zip(published.measurements().results, written, strict=True)
    ]
    assert written == eval_results.eval_result_entries_to_yaml(expected)
    assert "n = 1000" in written[0]["notes"]


def test_what_else_lies_in_the_folder_stays(sandbox: Sandbox, folder: Path) -> None:
    for name in ("last.ckpt", "optimizer.pt", ".env", "events.out", "notes.txt"):
        (folder / name).write_bytes(b"secret")
    push(folder, REPO)
    assert sandbox.repositories[REPO].contents().keys() - {".gitattributes"} == FILES


def test_optimizer_state_in_the_weights_file_is_an_error(sandbox: Sandbox, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["optimizer.exp_avg"] = tensors["norm.weight"].clone()
    save_file(tensors, folder / WEIGHTS_FILE, {"parameters": "1"})
    with pytest.raises(CheckpointError, match=r"'optimizer\.exp_avg' is unexpected"):
        push(folder, REPO)
    assert sandbox.requests == []


def test_large_files_go_in_parts(
    sandbox: Sandbox, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.part_size = 10_000
    push(folder, REPO)
    size = (folder / WEIGHTS_FILE).stat().st_size
    assert size > 2 * sandbox.part_size
    parts = [r for r in sandbox.requests if r.method == "PUT" and r.path.count("/") == 3]
    assert len(parts) == -(-size // sandbox.part_size)
    assert hub.resolve(REPO).folder.is_dir()


# --- again ---------------------------------------------------------------------------------------


def test_the_same_content_twice_makes_no_commit(sandbox: Sandbox, folder: Path) -> None:
    first = push(folder, REPO)
    before = state(sandbox.repositories[REPO])
    second = push(folder, REPO)
    assert state(sandbox.repositories[REPO]) == before
    assert (second.commit, second.tag, second.sent) == (first.commit, "v1", ())


def test_other_weights_get_another_tag_and_the_first_stays(sandbox: Sandbox, folder: Path) -> None:
    first = push(folder, REPO)
    old = sandbox.repositories[REPO].contents("v1")
    change_weights(folder)
    second = push(folder, REPO)
    assert second.tag == "v2"
    assert set(second.sent) == {WEIGHTS_FILE, CARD_FILE}
    assert sandbox.repositories[REPO].contents("v1") == old
    assert sandbox.repositories[REPO].tags["v1"][0] == first.commit


def test_a_figure_that_no_longer_belongs_is_removed(sandbox: Sandbox, folder: Path) -> None:
    push(folder, REPO)
    sandbox.repositories[REPO].add({"notes.md": b"by hand"}, "a note of somebody")
    edit(folder / CARD_FILE, f"![loss]({FIGURE})\n", "")
    done = push(folder, REPO)
    assert done.removed == (FIGURE,)
    contents = sandbox.repositories[REPO].contents()
    assert FIGURE not in contents
    assert contents["notes.md"] == b"by hand"


def test_a_tag_of_ones_own_never_moves(sandbox: Sandbox, folder: Path) -> None:
    first = push(folder, REPO, tag="release-1")
    assert push(folder, REPO, tag="release-1").commit == first.commit
    before = state(sandbox.repositories[REPO])
    change_weights(folder)
    with pytest.raises(CheckpointError, match="has a tag 'release-1', and tags never move"):
        push(folder, REPO, tag="release-1")
    assert state(sandbox.repositories[REPO]) == before


# --- the card of the installation ----------------------------------------------------------------


def test_a_published_weight_gets_its_revision(
    sandbox: Sandbox, weight: Path, installation: Path
) -> None:
    path = published.bundle(weight, installation)
    done = push(NAME)
    assert done.repo_id == REPO
    assert cards.find(NAME).hub.revision == done.commit
    written = path.read_text()
    assert written == (installation / "pretrained" / NAME / CARD_FILE).read_text()
    # That the card now knows where it is makes no new content.
    assert push(NAME).commit == done.commit
    assert path.read_text() == written
    shutil.rmtree(installation / "pretrained" / NAME)
    located = hub.resolve("cached-transformer-lm")
    assert located.folder.name == done.commit


def test_new_weights_are_no_longer_what_was_published(
    sandbox: Sandbox, weight: Path, installation: Path
) -> None:
    published.bundle(weight, installation)
    push(NAME)
    change_weights(installation / "pretrained" / NAME)
    assert cards.update(NAME).hub.revision is None


def test_a_card_of_other_files_is_not_published(
    sandbox: Sandbox, weight: Path, installation: Path
) -> None:
    """The commit would be pinned together with sums of files that are not in it."""
    path = published.bundle(weight, installation)
    results = installation / "pretrained" / NAME / RESULTS_FILE
    edit(results, "2.345678", "2.345679")
    with pytest.raises(CheckpointError, match=f"is not that of its files.*zoo card {NAME} --upd"):
        push(NAME)
    assert REPO not in sandbox.repositories
    cards.update(NAME)
    done = push(NAME)
    sent = sandbox.repositories[REPO].contents()[RESULTS_FILE]
    assert FileRecord.of(RESULTS_FILE, sent) in cards.parse(path.read_text()).files
    assert cards.find(NAME).hub.revision == done.commit


def test_a_copy_elsewhere_leaves_the_card_alone(
    sandbox: Sandbox, weight: Path, installation: Path
) -> None:
    path = published.bundle(weight, installation)
    before = path.read_text()
    push(NAME, "sandbox/copy")
    push(NAME, record=False)
    assert path.read_text() == before
    assert b"repo_id: sandbox/copy" in sandbox.repositories["sandbox/copy"].contents()[CARD_FILE]


# --- somebody else -------------------------------------------------------------------------------


def test_a_stale_parent_aborts(sandbox: Sandbox, folder: Path) -> None:
    push(folder, REPO)
    repository = sandbox.repositories[REPO]
    change_weights(folder)
    sandbox.before_commit = lambda found: found.add({"x": b"faster"}, "somebody else")
    with pytest.raises(CheckpointError, match=r"has gone on from .* nothing was published"):
        push(folder, REPO)
    assert repository.find("main").message == "somebody else"
    assert repository.tags.keys() == {"v1"}


def test_a_repository_that_has_gone_on_from_the_cards_commit(
    sandbox: Sandbox, weight: Path, installation: Path
) -> None:
    path = published.bundle(weight, installation)
    first = push(NAME)
    repository = sandbox.repositories[REPO]
    theirs = repository.add({CARD_FILE: b"edited on its page"}, "somebody else")
    edit(path, "# cached-transformer-lm.tiny", "# A better title")
    before = state(repository)
    with pytest.raises(CheckpointError, match=f"has gone on from {first.commit}.*{theirs}"):
        push(NAME)
    assert state(repository) == before
    done = push(NAME, parent=theirs)
    assert repository.find("main").parent == repository.commits[theirs]
    assert cards.find(NAME).hub.revision == done.commit


def test_private(sandbox: Sandbox, folder: Path) -> None:
    push(folder, REPO, private=True)
    assert sandbox.repositories[REPO].private
    push(folder, "sandbox/public")
    before = state(sandbox.repositories["sandbox/public"])
    change_weights(folder)
    with pytest.raises(CheckpointError, match="is public already, so nothing was sent"):
        push(folder, "sandbox/public", private=True)
    assert state(sandbox.repositories["sandbox/public"]) == before


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("reader", "the token has no right to do this"),
        ("stranger", "the token has no right to do this"),
        ("hf_wrong", "does not accept the token; log in again"),
        ("", "does not accept the token|needs a token|was not found"),
    ],
)
def test_rights(
    sandbox: Sandbox, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str, message: str
) -> None:
    sandbox.users |= {
        "reader": User("sandbox", may_write=False),
        "stranger": User("stranger"),
    }
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(CheckpointError, match=message) as caught:
        push(folder, REPO)
    assert "\n" not in str(caught.value)
    assert "hf auth login" in str(caught.value)
    assert sandbox.repositories == {}


# --- interruptions -------------------------------------------------------------------------------


REQUESTS = 12
"""Of a second push: create, info, refs, card check, preupload, batch, put, verify, commit, info,
the newest tag, tag."""


@pytest.mark.parametrize("kind", ["drop", "lose"])
@pytest.mark.parametrize("after", range(REQUESTS))
def test_an_interruption_leaves_the_last_version_loadable(
    sandbox: Sandbox, folder: Path, kind: Any, after: int
) -> None:
    push(folder, REPO)
    repository = sandbox.repositories[REPO]
    old = repository.contents("v1")
    change_weights(folder)
    sandbox.requests.clear()
    sandbox.faults.append(Fault(kind, method="*", after=after, times=100))
    with pytest.raises(CheckpointError) as caught:
        push(folder, REPO)
    assert "\n" not in str(caught.value)
    sandbox.faults.clear()
    assert repository.contents("v1") == old
    assert set(repository.tags) <= {"v1", "v2"}
    # Whatever main is now, it is a whole version.
    card = cards.parse(repository.contents()[CARD_FILE].decode())
    for record in card.files:
        assert FileRecord.of(record.name, repository.contents()[record.name]) == record
    done = push(folder, REPO)
    assert done.tag == "v2"
    assert len(repository.history()) == 3
    assert repository.contents("v2")[WEIGHTS_FILE] == (folder / WEIGHTS_FILE).read_bytes()


def test_a_push_makes_the_requests_that_were_interrupted(sandbox: Sandbox, folder: Path) -> None:
    push(folder, REPO)
    change_weights(folder)
    sandbox.requests.clear()
    push(folder, REPO)
    assert len(sandbox.requests) == REQUESTS


def test_what_arrives_damaged_gets_no_tag(
    sandbox: Sandbox, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Repository.add

    def damage(self: Repository, changes: Any, *arguments: Any) -> str:
        return add(self, {**changes, CONFIG_FILE: b"{}"}, *arguments)

    monkeypatch.setattr(Repository, "add", damage)
    with pytest.raises(CheckpointError, match=r"config\.json arrived damaged .* got no tag"):
        push(folder, REPO)
    assert sandbox.repositories[REPO].tags == {}


# --- nothing is sent before it is known to be complete -------------------------------------------

INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    **{
        f"no {name}": (
            lambda folder, name=name: (folder / name).unlink(),
            f"has no {name}, so nothing was sent",
        )
        for name in (CONFIG_FILE, RECIPE_FILE, RESULTS_FILE, WEIGHTS_FILE)
    },
    "no card": (lambda folder: (folder / CARD_FILE).unlink(), "has no card, so nothing was sent"),
    "no results": (
        lambda folder: (folder / RESULTS_FILE).write_text(
            json.dumps({"weight": NAME, "results": []})
        ),
        "has no results, so nothing was sent; measure it",
    ),
    "no source commit": (
        lambda folder: edit(folder / RESULTS_FILE, '"source_commit"', '"other"'),
        "do not say which source commit trained it",
    ),
    "no weights licence": (
        lambda folder: edit(
            folder / CARD_FILE, "weights_license: apache-2.0", "weights_license: ''"
        ),
        "has no weights_license; nothing was sent",
    ),
    "no code licence": (
        lambda folder: edit(folder / CARD_FILE, "  code_license: apache-2.0\n", ""),
        "missing key 'code_license'",
    ),
    "no data licence": (
        lambda folder: edit(folder / CARD_FILE, "data_license: public domain", "data_license: ' '"),
        "has no data_license; nothing was sent",
    ),
    "no text of the licence": (
        lambda folder: edit(
            folder / CARD_FILE, "weights_license: apache-2.0", "weights_license: mit"
        ),
        "has no text of the licence 'mit', so nothing was sent",
    ),
    "no text of a licence that looks like one of Creative Commons": (
        lambda folder: edit(
            folder / CARD_FILE, "weights_license: apache-2.0", "weights_license: cc-by-xx-4.0"
        ),
        "has no text of the licence 'cc-by-xx-4.0', so nothing was sent",
    ),
    "no figure": (
        lambda folder: (folder / FIGURE).unlink(),
        f"shows {FIGURE}, which is not in .* so nothing was sent",
    ),
    "a figure from elsewhere": (
        lambda folder: edit(folder / CARD_FILE, FIGURE, "../secret.png"),
        "shows ../secret.png, which is outside",
    ),
    "results of another weight": (
        lambda folder: edit(folder / RESULTS_FILE, NAME, "cached-transformer-lm.other"),
        "with the results of 'cached-transformer-lm.other'",
    ),
    "damaged weights": (
        lambda folder: (folder / WEIGHTS_FILE).write_bytes(
            (folder / WEIGHTS_FILE).read_bytes()[:-1]
        ),
        "is truncated or is no safetensors file",
    ),
    "no markers": (
        lambda folder: edit(folder / CARD_FILE, "<!-- zoo:files -->", ""),
        "expected <!-- zoo:files -->",
    ),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_what_is_incomplete_is_not_sent(sandbox: Sandbox, folder: Path, what: str) -> None:
    damage, message = INCOMPLETE[what]
    damage(folder)
    for dry_run in (True, False):
        with pytest.raises(ZooError, match=message) as caught:
            push(folder, REPO, dry_run=dry_run)
        assert "\n" not in str(caught.value)
    assert sandbox.requests == []


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("folder", {"repo_id": "no-owner"}, "'no-owner' is no repository; give it as owner/name"),
        ("folder", {"repo_id": "a/b/c"}, "'a/b/c' is no repository"),
        ("folder", {"tag": "main"}, "tag 'main' must be of letters"),
        ("folder", {"tag": "a b"}, "tag 'a b' must be of letters"),
        ("folder", {"tag": "1" * 40}, "must be of letters"),
        ("folder", {"parent": "main"}, "parent must be a commit of 40 hex digits, got 'main'"),
        ("folder", {"recipe": "x"}, "recipe are for a module; folder has its own"),
        ("nowhere", {}, "Unknown model 'nowhere'"),
    ],
)
def test_arguments(
    sandbox: Sandbox, folder: Path, source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZooError, match=message):
        push(source, **options)
    assert sandbox.requests == []


def test_every_weight_that_is_shipped_can_be_published(sandbox: Sandbox) -> None:
    """Each with its card, figures and licence, before anybody says `zoo push --all`."""
    found = publishing.push_all(dry_run=True)
    assert [done.name for done in found] == list(cards.load_cards())
    assert {done.name: done.error for done in found if done.error} == {}
    assert all(FILES - {FIGURE, EVAL_RESULTS_FILE} <= set(done.sent) for done in found)
    assert sandbox.requests == []


@pytest.mark.parametrize(
    ("name", "title", "address"),
    [
        ("cc-by-4.0", "Attribution 4.0", "by/4.0"),
        ("cc-by-nc-4.0", "Attribution-NonCommercial 4.0", "by-nc/4.0"),
        ("cc-by-nc-sa-4.0", "Attribution-NonCommercial-ShareAlike 4.0", "by-nc-sa/4.0"),
    ],
)
def test_creative_commons_are_applied_by_reference(
    sandbox: Sandbox, folder: Path, name: str, title: str, address: str
) -> None:
    edit(folder / CARD_FILE, "weights_license: apache-2.0", f"weights_license: {name}")
    push(folder, REPO)
    text = sandbox.repositories[REPO].contents()[LICENCE_FILE].decode()
    assert f"{NAME} are licensed under the Creative Commons {title} International" in text
    assert f"visit https://creativecommons.org/licenses/{address}/\n" in text
    assert f"at https://creativecommons.org/licenses/{address}/legalcode\n" in text
    assert text.endswith(f"SPDX-License-Identifier: {name.upper()}\n")
    (folder / LICENCE_FILE).write_text("the whole of it")
    push(folder, REPO)
    assert sandbox.repositories[REPO].contents()[LICENCE_FILE] == b"the whole of it"


def test_a_dry_run_says_all_and_sends_nothing(sandbox: Sandbox, folder: Path) -> None:
    done = push(folder, REPO, dry_run=True)
    assert set(done.sent) == FILES
    assert done.commit is done.tag is None
    assert sandbox.requests == []
    assert push(folder, REPO).size == done.size


# --- the command ---------------------------------------------------------------------------------


def test_the_command(sandbox: Sandbox, folder: Path) -> None:
    said = run_command("push", folder, REPO, "--dry-run")
    assert said.status == 0
    assert "would send" in said.out
    assert sandbox.requests == []
    said = run_command("push", folder, REPO, "--private", "--json")
    assert said.json[0]["commit"] == sandbox.repositories[REPO].branches["main"]
    said = run_command("push", folder, REPO)
    assert said.out.splitlines()[1].endswith("v1   was there already")
    said = run_command("pull", f"{REPO}@v1")
    assert said.status == 0
    assert Path(said.out.strip()).is_dir()
    assert "from the Hub" in said.err
    for words, message in [
        (["push"], "Say what to publish"),
        (["push", folder, REPO, "--all"], "Say what to publish"),
        (["push", "--all", "--tag", "x"], "are for one weight"),
        (["push", folder, REPO, "--tag", "main"], "must be of letters"),
        (["pull", "nothing"], "Unknown model"),
    ]:
        said = run_command(*words)
        assert said.status == 2
        assert message in said.err
        assert said.err.count("\n") == 1


def test_all_is_resumable_and_sums_up(sandbox: Sandbox, weight: Path, installation: Path) -> None:
    published.bundle(weight, installation)
    other = cards.render(published.card(weight="other", default=False))
    (installation / "model_cards" / "cached-transformer-lm.other.md").write_text(other)
    cards._read_cards.cache_clear()
    said = run_command("push", "--all", "--json")
    assert said.status == 1  # one of them could not be published
    by_name = {entry["name"]: entry for entry in said.json}
    assert by_name[NAME]["tag"] == "v1"
    assert "is not bundled here" in by_name["cached-transformer-lm.other"]["error"]
    before = state(sandbox.repositories[REPO])
    (installation / "model_cards" / "cached-transformer-lm.other.md").unlink()
    cards._read_cards.cache_clear()
    said = run_command("push", "--all")
    assert said.status == 0
    assert "was there already" in said.out
    assert state(sandbox.repositories[REPO]) == before


# --- a module in memory --------------------------------------------------------------------------


def test_a_module_is_published_and_loaded_in_the_hubs_idiom(
    sandbox: Sandbox, installation: Path
) -> None:
    import torch

    from zoo.tasks.base import ZooModule
    from zoo.tasks.language_modeling import LanguageModel

    module = published.module(seed=3)
    card = published.card(body=published.BODY.replace(f"![loss]({FIGURE})", ""))
    described = {"recipe": published.RECIPE, "results": published.measurements()}
    address = module.push_to_hub(REPO, card=card, private=True, **described)
    repository = sandbox.repositories[REPO]
    assert address == f"{sandbox.url}/{REPO}/commit/{repository.branches['main']}"
    assert repository.private
    # The card may come as Markdown, and the same content makes no commit.
    assert module.push_to_hub(REPO, card=cards.render(card), **described) == address
    loaded = LanguageModel.from_pretrained(REPO, revision="v1")
    assert not loaded.training
    tokens = torch.randint(256, (1, 9))
    assert torch.equal(loaded.network(tokens)[0], module.network(tokens)[0])
    assert isinstance(ZooModule.from_pretrained(REPO), LanguageModel)

    class Other(LanguageModel):
        pass

    with pytest.raises(ConfigError, match="holds a LanguageModel, not a Other"):
        Other.from_pretrained(REPO)
    with pytest.raises(ConfigError, match="A module needs card, recipe, results"):
        push(module, REPO)


def test_from_pretrained_is_strict(sandbox: Sandbox, folder: Path) -> None:
    """A renamed layer, which the Hub's own mixin loads without a word, at random."""
    from safetensors.torch import load_file, save_file

    from zoo.tasks.language_modeling import LanguageModel

    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["renamed.weight"] = tensors.pop("head.weight")
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"'head\.weight' is missing.*'renamed\.weight'"):
        LanguageModel.from_pretrained(str(folder))


# --- from end to end -----------------------------------------------------------------------------

_LOAD = """
import sys, torch, zoo
tokens = torch.arange(40).reshape(2, 20)
for path in sys.argv[1:]:
    print("ready", flush=True)
    sys.stdin.readline()
    torch.save(zoo.load("sandbox/tiny@v1").network(tokens)[0].detach(), path)
"""


def test_a_new_process_loads_what_was_published_and_again_without_the_server(
    sandbox: Sandbox, folder: Path, tmp_path: Path
) -> None:
    import torch

    push(folder, REPO)
    expected, _ = published.module().network(torch.arange(40).reshape(2, 20))
    environ = published.environment(sandbox.url, tmp_path / "home")
    paths = [tmp_path / "online.pt", tmp_path / "offline.pt"]
    process = published.start(_LOAD, environ, *map(str, paths))
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ready\n"
    sandbox.stop()
    _, errors = process.communicate("go\n")
    assert process.returncode == 0, errors
    online, offline = (torch.load(path, weights_only=True) for path in paths)
    assert torch.equal(online, offline)
    # The same weights, in processes that may order their sums otherwise.
    torch.testing.assert_close(online, expected, rtol=0, atol=1e-6)


def test_the_public_face_has_it() -> None:
    assert zoo.push is publishing.push
    assert checkpoints.FORMAT_VERSION == 1
