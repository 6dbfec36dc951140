"""Publish a checkpoint folder on the Hub: everything in one commit, then an annotated tag.

Nothing is sent before the folder is known to be complete and to load strictly. Only the files
listed here are sent, so whatever else lies in the folder (a training checkpoint, an optimizer's
state) stays. Interrupted anywhere, the last version stays as it was, and the same call again goes
on: large files that arrived are not sent again, the same content makes no second commit, and a
missing tag is added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from zoo import cards, files, hub
from zoo.cards import REPO_ID, Card, HubLocation, Measurements, parse
from zoo.errors import CheckpointError, ConfigError, UnknownNameError, ZooError
from zoo.progress import track

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

    from zoo.tasks.base import ZooModule

__all__ = ["EVAL_RESULTS_FILE", "LICENCE_FILE", "Publication", "push", "push_all"]

log = logging.getLogger(__name__)

LICENCE_FILE = "LICENSE"
EVAL_RESULTS_FILE = ".eval_results/zoo.yaml"
_OWN_LICENCE = "apache-2.0"
"""Of this project; its text comes with the installation."""
_CREATIVE_COMMONS = {
    "by": "Attribution",
    "by-nc": "Attribution-NonCommercial",
    "by-nc-nd": "Attribution-NonCommercial-NoDerivatives",
    "by-nc-sa": "Attribution-NonCommercial-ShareAlike",
    "by-nd": "Attribution-NoDerivatives",
    "by-sa": "Attribution-ShareAlike",
}
"""Creative Commons licences of version 4.0, as `cc-by-nc-4.0` is one, by what their address has."""
_OURS = ("figures/", ".eval_results/")
"""Folders in a repository in which what no longer belongs is removed."""
_IMAGE = re.compile(r"!\[[^\]]*\]\((?!\w+:)([^)\s]+)(?:\s+\"[^\"]*\")?\)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TAG = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_REMEDIES = {
    files.CONFIG_FILE: "write the folder by zoo.checkpoints.save or `zoo convert`",
    files.WEIGHTS_FILE: "write the folder by zoo.checkpoints.save or `zoo convert`",
    files.RECIPE_FILE: "convert the training checkpoint in its run folder, where its recipe is",
    files.RESULTS_FILE: "measure it: zoo evaluate {folder} --record --run RUN",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Publication:
    """What `push` did, or would do."""

    name: str
    """The full name of the weight."""
    repo_id: str
    commit: str | None = None
    """40 hex digits; None in a dry run and after an error."""
    tag: str | None = None
    sent: tuple[str, ...] = ()
    """Files that differ from what the repository had; in a dry run all of them."""
    removed: tuple[str, ...] = ()
    """Figures and results of the repository that no longer belong to it."""
    size: int = 0
    """Bytes of all files together."""
    error: str | None = None
    """Only in what `push_all` returns: why this one was not published."""


def push(
    source: str | os.PathLike[str] | ZooModule,
    repo_id: str | None = None,
    *,
    card: Card | str | None = None,
    recipe: str | None = None,
    results: Measurements | None = None,
    private: bool = False,
    dry_run: bool = False,
    tag: str | None = None,
    parent: str | None = None,
    message: str | None = None,
    token: str | None = None,
    record: bool = True,
) -> Publication:
    """Publish a weight: weights, config, card, results, recipe, licence and figures in one commit.

    Args:
        source: A bundled weight of the zoo, or a checkpoint folder with its card in `README.md`, of
            which what can be computed is computed anew; or a module in memory.
        repo_id: `owner/name`; None for a weight of the zoo: what its card says. It is made where it
            is missing.
        card: Of a module, or its Markdown.
        recipe: Of a module: the text of the recipe that trained it.
        results: Of a module: what was measured of it.
        private: To make the repository private; one that is public already is an error.
        dry_run: To check everything and send nothing, not even a question.
        tag: Name of the tag; None: `v1`, `v2` and so on, a new one for each new content. A tag
            never moves.
        parent: The commit to build on; None: the one in the card, else the newest. Where the
            repository has gone on from it, nothing is published.
        message: Of the commit.
        token: A token of the Hub; None: that of the client (`hf auth login`, `HF_TOKEN`).
        record: To write the commit into the card of this source checkout, where `repo_id` is the
            card's own.

    Returns:
        The commit and its tag.

    Raises:
        UnknownNameError: When there is no such weight or folder.
        ConfigError: When an argument or the card is not valid.
        CheckpointError: When something is missing, the repository has gone on, or the Hub refuses.
    """
    if tag is not None and (not _TAG.fullmatch(tag) or _COMMIT.fullmatch(tag) or tag == "main"):
        raise ConfigError(f"tag {tag!r} must be of letters, digits, '.', '_' and '-', as in 'v1'.")
    if parent is not None and not _COMMIT.fullmatch(parent):
        raise ConfigError(f"parent must be a commit of 40 hex digits, got {parent!r}.")
    described = {"card": card, "recipe": recipe, "results": results}
    if isinstance(source, (str, os.PathLike)):
        if given := [name for name, value in described.items() if value is not None]:
            raise ConfigError(f"{', '.join(given)} are for a module; {source} has its own.")
        published, contents, own = _prepared(source, repo_id)
    else:
        if missing := [name for name, value in described.items() if value is None]:
            raise ConfigError(f"A module needs {', '.join(missing)} to be published with.")
        from zoo import checkpoints

        parsed = parse(card, where="card") if isinstance(card, str) else card
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.save(source, folder, card=parsed, recipe=recipe, results=results)
            published, contents, own = _prepared(Path(folder), repo_id)
    publication = Publication(
        name=published.name,
        repo_id=published.hub.repo_id,
        sent=tuple(contents),
        size=sum(map(len, contents.values())),
    )
    if dry_run:
        return publication
    publication = _publish(
        publication,
        contents,
        private=private,
        tag=tag,
        parent=parent or (None if own is None else own.revision),
        message=message or f"Publish {published.name}",
        note=f"{published.name}: {_in_words(published)}",
        token=token,
    )
    if record and own is not None and publication.commit is not None:
        cards.record_revision(published.name, publication.commit)
    return publication


def push_all(
    *, private: bool = False, dry_run: bool = False, token: str | None = None
) -> list[Publication]:
    """Publish every weight of the zoo to the repository in its card.

    What is published already is left alone, so the same call goes on with an interrupted one. An
    error with one weight does not keep the others back.

    Args:
        private: As in `push`.
        dry_run: As in `push`.
        token: As in `push`.

    Returns:
        One publication for each card, in alphabetical order, with the errors.
    """
    done = []
    for card in track(list(cards.load_cards().values()), "publishing"):
        try:
            done.append(push(card.name, private=private, dry_run=dry_run, token=token))
        except ZooError as error:
            done.append(Publication(name=card.name, repo_id=card.hub.repo_id, error=str(error)))
    return done


# --- what is sent --------------------------------------------------------------------------------


def _prepared(
    source: str | os.PathLike[str], repo_id: str | None
) -> tuple[Card, dict[str, bytes], HubLocation | None]:
    """The card as published, the content of every file, and where the zoo's card says it is.

    The last is None unless that is where it goes.
    """
    typed, folder, pictures = _found(source)
    wanted = repo_id or typed.hub.repo_id
    if not REPO_ID.fullmatch(wanted):
        raise ConfigError(f"{wanted!r} is no repository; give it as owner/name.")
    for name, remedy in _REMEDIES.items():
        if not (folder / name).is_file():
            hint = remedy.format(folder=folder)
            raise CheckpointError(f"{folder} has no {name}, so nothing was sent; {hint}.")
    is_own = pictures == cards.shipped_folder("model_cards") and wanted == typed.hub.repo_id
    if is_own and cards.render(cards.computed(typed, folder)) != cards.render(typed):
        # The commit would be written into a card that tells of other files.
        raise CheckpointError(
            f"The card of {typed.name} is not that of its files, so nothing was sent; "
            f"zoo card {typed.name} --update"
        )
    with tempfile.TemporaryDirectory() as place:
        contents, card = _read(typed, _without_places(folder, Path(place)), wanted)
    contents[LICENCE_FILE] = _licence(card, folder)
    if card.datasets:
        contents[EVAL_RESULTS_FILE] = _eval_results(card)
    for name in map(posixpath.normpath, _IMAGE.findall(card.body)):
        contents[name] = _picture(pictures, name)
    return card, contents, typed.hub if is_own else None


def _read(typed: Card, folder: Path, repo_id: str) -> tuple[dict[str, bytes], Card]:
    """The files of a checkpoint folder, and the card that goes with them."""
    # The card cannot hold the commit that it is part of.
    card = dataclasses.replace(cards.computed(typed, folder), hub=HubLocation(repo_id=repo_id))
    _check_complete(card)
    from zoo import checkpoints  # and with it torch, which what is refused above does without

    checkpoints.load(folder, files=card.files)
    contents = {record.name: record.read(folder) for record in card.files}
    contents[files.CARD_FILE] = cards.render(card).encode()
    return contents, card


def _without_places(folder: Path, place: Path) -> Path:
    """A checkpoint folder whose recipe and results name no folder of this machine.

    That is the folder itself where they do not, and else a copy of it in `place`.
    """
    recipe = yaml.safe_load(files.read_bytes(folder / files.RECIPE_FILE))
    results = files.read_json(folder / files.RESULTS_FILE)
    weight = str(results.get("weight"))
    named = [_shortened(values, weight) for values in (recipe, results)]
    if named == [recipe, results]:
        return folder
    for path in folder.iterdir():
        if path.is_file() and path.name not in (files.RECIPE_FILE, files.RESULTS_FILE):
            shutil.copyfile(path, place / path.name)
    text = yaml.safe_dump(named[0], sort_keys=False)
    files.write_bytes(place / files.RECIPE_FILE, text.encode())
    files.write_json(place / files.RESULTS_FILE, named[1])
    return place


def _shortened(values: Any, weight: str) -> Any:
    """Plain values with the last part of absolute paths, in commands with the weight instead."""
    if isinstance(values, dict):
        return {key: _shortened(value, weight) for key, value in values.items()}
    if isinstance(values, list):
        return [_shortened(value, weight) for value in values]
    if not isinstance(values, str):
        return values
    if values.startswith("zoo "):
        words = values.split(" ")
        return " ".join(weight if Path(word).is_absolute() else word for word in words)
    return Path(values).name if Path(values).is_absolute() else values


def _found(source: str | os.PathLike[str]) -> tuple[Card, Path, Path]:
    """The card, its checkpoint folder, and the folder that its images are relative to."""
    text = os.fspath(source)
    try:
        card = cards.find(text)
    except UnknownNameError:
        folder = Path(text)
        if not folder.is_dir():
            raise
        if not (folder / files.CARD_FILE).is_file():
            raise CheckpointError(
                f"{folder} has no card, so nothing was sent; write one as {files.CARD_FILE}, after "
                f"the pattern of model_cards."
            ) from None
        text = files.read_bytes(folder / files.CARD_FILE).decode("utf-8", errors="replace")
        return parse(text, where=str(folder / files.CARD_FILE)), folder, folder
    folder = cards.pretrained_folder(card.name)
    if not folder.is_dir():
        raise CheckpointError(f"{card.name} is not bundled here; give its checkpoint folder.")
    return card, folder, cards.shipped_folder("model_cards")


def _check_complete(card: Card) -> None:
    for field in ("code_license", "weights_license", "data_license"):
        if not getattr(card, field).strip():
            raise CheckpointError(f"The card of {card.name} has no {field}; nothing was sent.")
    if not card.results:
        raise CheckpointError(
            f"{card.name} has no results, so nothing was sent; measure it: zoo evaluate FOLDER "
            f"--record"
        )
    if not _COMMIT.fullmatch(card.source_commit or ""):
        raise CheckpointError(
            f"The results of {card.name} do not say which source commit trained it, so nothing was "
            f"sent; record it: zoo evaluate FOLDER --record --commit COMMIT"
        )


def _licence(card: Card, folder: Path) -> bytes:
    """The text of the weights' licence: that in the folder, else the project's own, or a notice."""
    if (folder / LICENCE_FILE).is_file():
        return files.read_bytes(folder / LICENCE_FILE)
    common = re.fullmatch(r"cc-([a-z-]+)-4\.0", card.weights_license)
    if common and common[1] in _CREATIVE_COMMONS:
        # These licences are applied by reference, so their text need not come along.
        address = f"https://creativecommons.org/licenses/{common[1]}/4.0"
        return (
            f"The weights of {card.name} are licensed under the Creative Commons "
            f"{_CREATIVE_COMMONS[common[1]]} 4.0 International License.\n"
            f"To view a copy of this license, visit {address}/\n"
            f"Its legal code is at {address}/legalcode\n\n"
            f"SPDX-License-Identifier: {card.weights_license.upper()}\n"
        ).encode()
    if card.weights_license != _OWN_LICENCE:
        raise CheckpointError(
            f"{folder} has no text of the licence {card.weights_license!r}, so nothing was sent; "
            f"put it there as {LICENCE_FILE}."
        )
    checkout = Path(__file__).parent.parent / LICENCE_FILE
    if checkout.is_file():
        return files.read_bytes(checkout)
    for path in metadata.files("zoo") or ():
        if path.name == LICENCE_FILE:
            return path.read_binary()
    raise CheckpointError(f"This installation lacks its {LICENCE_FILE}; nothing was sent.")


def _picture(folder: Path, name: str) -> bytes:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise CheckpointError(f"The card shows {name}, which is outside of {folder}.")
    if not path.is_file():
        raise CheckpointError(
            f"The card shows {name}, which is not in {folder}, so nothing was sent; draw it: zoo "
            f"card NAME --figures RUN"
        )
    return files.read_bytes(path)


def _eval_results(card: Card) -> bytes:
    """The results in the Hub's second format, which lists them by data set."""
    entries: list[dict[str, Any]] = [
        {
            "dataset": {"id": card.datasets[0], "task_id": result.protocol},
            "value": result.value,
            "date": result.date,
            "notes": f"{result.metric} in {result.unit}; n = {result.n}; {result.confidence:.0%} "
            f"interval {result.interval[0]} to {result.interval[1]}; {result.command}",
        }
        for result in card.results
    ]
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=100).encode()


def _in_words(card: Card) -> str:
    result = card.primary
    return f"{result.metric} {result.value:.6g} {result.unit}, n = {result.n}"


# --- the Hub -------------------------------------------------------------------------------------


def _publish(
    publication: Publication,
    contents: Mapping[str, bytes],
    *,
    private: bool,
    tag: str | None,
    parent: str | None,
    message: str,
    note: str,
    token: str | None,
) -> Publication:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from zoo import __version__

    repo_id = publication.repo_id
    api = HfApi(token=token, library_name="zoo", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        before = api.model_info(repo_id, files_metadata=True)
        if private and not before.private:
            raise CheckpointError(
                f"{repo_id} is public already, so nothing was sent; make it private on its page, "
                f"or leave out --private."
            )
        head = str(before.sha)
        changed = _differing(before, contents)
        removed = _removable(before, contents)
        tags = _tags(api, repo_id)
        if changed or removed:
            if tag in tags:
                raise CheckpointError(f"{repo_id} has a tag {tag!r}, and tags never move.")
            if parent is not None and parent != head:
                raise _gone_on(repo_id, parent, head)
            # `upload_folder` may make several commits in newer versions of the client.
            additions = [CommitOperationAdd(name, contents[name]) for name in changed]
            deletions = [CommitOperationDelete(name) for name in removed]
            head = api.create_commit(
                repo_id, [*additions, *deletions], commit_message=message, parent_commit=head
            ).oid
            after = api.model_info(repo_id, revision=head, files_metadata=True)
            if wrong := _differing(after, contents):
                raise CheckpointError(
                    f"{', '.join(wrong)} arrived damaged at {repo_id}; its commit {head} got no "
                    f"tag. Delete it there and push again."
                )
            log.info("%s: commit %s", repo_id, head)
        tag = _tagged(api, repo_id, head, tag, tags, note)
    except ZooError:
        raise
    except Exception as error:  # The client passes on whatever its HTTP library raises.
        raise CheckpointError(_explanation(error, repo_id)) from error
    return dataclasses.replace(
        publication, commit=head, tag=tag, sent=tuple(changed), removed=tuple(removed)
    )


def _differing(info: ModelInfo, contents: Mapping[str, bytes]) -> list[str]:
    """Files that the repository lacks, or has with another content."""
    known = {
        sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        for sibling in info.siblings or ()
    }
    return [name for name, content in contents.items() if known.get(name) not in _oids(content)]


def _oids(content: bytes) -> tuple[str, str]:
    """What the Hub calls a content: as a large file, and as a file in Git."""
    as_git = hashlib.sha1(b"blob %d\0" % len(content) + content)
    return hashlib.sha256(content).hexdigest(), as_git.hexdigest()


def _removable(info: ModelInfo, contents: Mapping[str, bytes]) -> list[str]:
    names = [sibling.rfilename for sibling in info.siblings or ()]
    return [name for name in names if name.startswith(_OURS) and name not in contents]


def _tags(api: HfApi, repo_id: str) -> list[str]:
    return [ref.name for ref in api.list_repo_refs(repo_id).tags]


def _tagged(
    api: HfApi, repo_id: str, commit: str, tag: str | None, tags: Iterable[str], note: str
) -> str:
    """Give the commit the tag, or the next number; one that it has already is enough."""
    numbers = sorted(int(name[1:]) for name in tags if re.fullmatch(r"v\d+", name))
    candidate = tag or f"v{numbers[-1] if numbers else 0}"
    if candidate in tags:
        # Asked for by name, since of an annotated tag a list may show the tag's own object.
        if api.model_info(repo_id, revision=candidate).sha == commit:
            return candidate
        if tag is not None:
            raise CheckpointError(f"{repo_id} has a tag {tag!r}, and tags never move.")
    new = tag or f"v{numbers[-1] + 1 if numbers else 1}"
    api.create_tag(repo_id, tag=new, tag_message=note, revision=commit)
    return new


def _gone_on(repo_id: str, parent: str, head: str | None = None) -> CheckpointError:
    advice = f" --parent {head}" if head else ""
    return CheckpointError(
        f"{repo_id} has gone on from {parent}, so nothing was published; look at what changed "
        f"there, then push again{advice}."
    )


def _explanation(error: Exception, repo_id: str) -> str:
    from huggingface_hub import errors

    found = hub.answer(error)
    if found is not None and found[0] == 412:
        return str(_gone_on(repo_id, "the commit that was its newest"))
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo_id} was not found, or may not be written to with this token; log in with one "
            f"that may: hf auth login"
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"Publishing {repo_id} needs a token of the Hub; log in: hf auth login"
    if found is not None:
        return f"Publishing {repo_id}: {hub.refusal(found[0])}"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"Publishing {repo_id} failed, and the same call goes on with it: {reason}"
