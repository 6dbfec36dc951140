"""Find a checkpoint folder: bundled with the package, local, in the cache, or on the Hub.

The order is that; the log of this module says where a folder came from. What comes from the Hub is
of one commit, is limited to the files of a checkpoint folder, and is checked by its card's sha256
before it is handed on; the client's own check lets a flipped bit through. Endpoint, cache folder,
token and offline mode are those of the client (`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`,
`HF_HUB_OFFLINE`).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from zoo.cards import REPO_ID, Card, find, parse, pretrained_folder
from zoo.errors import CheckpointError, ConfigError, UnknownNameError, ZooError
from zoo.files import CARD_FILE, CHECKPOINT_FILES, NO_ROOM, FileRecord, read_bytes

__all__ = ["Located", "answer", "refusal", "resolve"]

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SCHEME = "hf://"

_ATTEMPTS = 3
_LONGEST_WAIT = 30.0
"""Seconds; a Hub that asks for more is not waited for."""


class Located(NamedTuple):
    """A checkpoint folder on this machine."""

    folder: Path
    card: Card | None
    """Has what the files must be; None for a local folder, which nothing is known about."""


def resolve(
    name: str | os.PathLike[str], revision: str | None = None, local_files_only: bool = False
) -> Located:
    """Find the checkpoint folder of a name, and download it where it is not here yet.

    Args:
        name: A weight or an architecture of the zoo, a local folder, or a repository on the Hub
            (`owner/name`); the first and the last may end in `@revision`. A name of the zoo wins
            over a folder that is called the same, and a folder over a repository; `hf://` before
            a repository leaves no choice.
        revision: A commit, tag or branch on the Hub; by default the commit in the card, or `main`
            for a repository without a card in the zoo. It is resolved once, for all files.
        local_files_only: Never to use the network.

    Returns:
        The folder and its card.

    Raises:
        UnknownNameError: When the name is none of these; the text has the nearest names.
        CheckpointError: When the files cannot be had, or are damaged after a second download.
        ConfigError: When a revision of a local folder is asked for, or two revisions are given.
    """
    text = os.fspath(name)
    if not text:
        raise UnknownNameError(
            "The name is empty: give a weight, a checkpoint folder, or owner/name on the Hub."
        )
    if not text.startswith(_SCHEME):
        try:
            return _of_the_zoo(find(text), revision, local_files_only)
        except UnknownNameError as error:
            unknown = error
        if Path(text).exists():
            if revision is not None:
                raise ConfigError(f"{text} is a local folder, which has no revisions.") from None
            log.info("%s: a local folder", text)
            return Located(Path(text), None)
    base, at, given = text.removeprefix(_SCHEME).partition("@")
    if at:
        if not given or revision is not None:
            raise ConfigError(f"{text}: give one revision, either after the @ or apart from it.")
        revision = given
    if REPO_ID.fullmatch(base):
        return _from_hub(base, revision or "main", None, local_files_only)
    if text.startswith(_SCHEME):
        raise UnknownNameError(f"{text!r} is not of the form hf://owner/name or hf://...@revision.")
    if at:
        return _of_the_zoo(find(base), revision, local_files_only)
    raise unknown


def _of_the_zoo(card: Card, revision: str | None, local_files_only: bool) -> Located:
    if revision is None:
        if pretrained_folder(card.name).is_dir():
            log.info("%s: bundled with this installation", card.name)
            return Located(pretrained_folder(card.name), card)
        if card.hub.revision is None:
            raise CheckpointError(f"{card.name} is neither bundled nor published on the Hub yet.")
    known = card if revision in (None, card.hub.revision) else None
    wanted = revision or card.hub.revision or "main"
    return _from_hub(card.hub.repo_id, wanted, known, local_files_only)


def _from_hub(repo_id: str, revision: str, card: Card | None, local_files_only: bool) -> Located:
    from huggingface_hub import constants

    offline = local_files_only or constants.HF_HUB_OFFLINE
    with _explained(repo_id, revision):
        commit = revision
        if not _COMMIT.fullmatch(revision):
            # The card is what every checkpoint has; asking for it settles the commit of all files.
            commit = _fetch(repo_id, revision, CARD_FILE, offline=offline).parent.name
            log.info("%s: revision %s is commit %s", repo_id, revision, commit)
        # A commit never changes, so a whole copy of one needs no request to be sure of it.
        found = _cached(repo_id, commit, card, offline)
        if found is not None:
            log.info("%s: in the cache, commit %s", repo_id, commit)
            return found
        log.info("%s: from the Hub, commit %s", repo_id, commit)
        copy = _fetch(repo_id, commit, CARD_FILE)
        content = read_bytes(copy)
        try:
            return _complete(repo_id, copy.parent, card)
        except ZooError:
            if card is not None:
                raise
            # No record says what the card must be: its copy may be what is damaged.
            _remove(copy.parent, [CARD_FILE])
            if read_bytes(_fetch(repo_id, commit, CARD_FILE, force=True)) == content:
                raise
            return _complete(repo_id, copy.parent, None)


def _complete(repo_id: str, folder: Path, card: Card | None) -> Located:
    """Bring the files that a card names into the cache, beside it."""
    card = card or _card_in(repo_id, folder)
    for record in card.files:
        _fetch(repo_id, folder.name, record.name)
    if _damaged(folder, card.files):
        _repair(repo_id, folder, card.files)
    return Located(folder, card)


def _cached(repo_id: str, commit: str, card: Card | None, offline: bool) -> Located | None:
    """What the cache holds; None where the Hub has to be asked.

    Raises:
        Exception: When it may not be asked.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _fetch(repo_id, commit, CARD_FILE, offline=True).parent
        card = card or _card_in(repo_id, folder)
        for record in card.files:
            _fetch(repo_id, commit, record.name, offline=True)
    except (LocalEntryNotFoundError, ZooError):
        if offline:
            raise
        return None
    damaged = _damaged(folder, card.files)
    if damaged and offline:
        raise damaged.popitem()[1]
    return None if damaged else Located(folder, card)


def _card_in(repo_id: str, folder: Path) -> Card:
    path = folder / CARD_FILE
    card = parse(read_bytes(path).decode("utf-8", errors="replace"), where=str(path))
    if not card.files:
        raise CheckpointError(f"The card of {repo_id} has no sha256 of its files.")
    unknown = [record.name for record in card.files if record.name not in CHECKPOINT_FILES]
    if unknown:
        raise CheckpointError(
            f"The card of {repo_id} names {unknown[0]!r}, which is no file of ours."
        )
    return card


def _fetch(
    repo_id: str, revision: str, name: str, *, offline: bool = False, force: bool = False
) -> Path:
    """Bring one file into the cache; its folder is named after the commit.

    File by file, since listing a repository has no time limit in the client.
    """
    import huggingface_hub

    if offline:
        from huggingface_hub.errors import LocalEntryNotFoundError

        # Its download of local files alone may ask the Hub which program is asking.
        found = huggingface_hub.try_to_load_from_cache(repo_id, name, revision=revision)
        if not isinstance(found, str):
            raise LocalEntryNotFoundError(f"{name} of {repo_id} is not in the cache.")
        return Path(found)

    def ask() -> str:
        return huggingface_hub.hf_hub_download(
            repo_id, name, revision=revision, force_download=force, library_name="zoo"
        )

    return Path(_persistently(repo_id, ask))


def _persistently(repo_id: str, ask: Callable[[], str]) -> str:
    """Ask again after what may be a passing trouble, as not every version of the client does."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return ask()
        except Exception as error:
            wait = _wait_for(error)
            if wait is None:
                raise
            log.info("%s: trying again: %s", repo_id, _first_line(error))
            time.sleep(wait)
    return ask()


def _wait_for(error: Exception) -> float | None:
    """Seconds after which trying again may help; None where it does not."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = answer(error)
    if found is None:
        if isinstance(error, LocalEntryNotFoundError):
            return None  # The Hub was not reached at all.
        # The connection ended in mid-answer, which each of the client's three HTTP libraries calls
        # something else; or too few bytes came, which the client reports as an OSError of its own.
        short = isinstance(error, OSError) and error.errno is None
        return 0.0 if short or type(error).__name__ in _BROKEN_CONNECTIONS else None
    status, retry_after = found
    if status != 429 and status < 500:
        return None
    wait = float(retry_after) if retry_after and retry_after.isdigit() else 1.0
    return wait if wait <= _LONGEST_WAIT else None


_BROKEN_CONNECTIONS = ("RemoteProtocolError", "ReadError", "ChunkedEncodingError", "ReadTimeout")


def answer(error: BaseException) -> tuple[int, str | None] | None:
    """Status and Retry-After of the Hub's answer behind an error of the client; None without."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if response is not None:
            return int(response.status_code), response.headers.get("Retry-After")
        seen = seen.__cause__
    return None


def _damaged(folder: Path, records: Iterable[FileRecord]) -> dict[str, CheckpointError]:
    """The files that are not what they must be, with the reasons."""
    damaged = {}
    for record in records:
        try:
            record.read(folder)
        except CheckpointError as error:
            damaged[record.name] = error
    return damaged


def _repair(repo_id: str, folder: Path, records: tuple[FileRecord, ...]) -> None:
    """Fetch what is damaged once more, from the same commit.

    Raises:
        CheckpointError: When it is damaged again.
    """
    from filelock import FileLock

    commit, repository = folder.name, folder.parents[1]
    # Where the client has its own locks; anywhere else it takes the cache for damaged.
    lock = repository.parent / ".locks" / repository.name / f"{commit}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        # Another process may have repaired it while this one waited.
        damaged = _damaged(folder, records)
        if not damaged:
            return
        _remove(folder, damaged)
        log.info("%s: fetching %s once more", repo_id, ", ".join(damaged))
        for name in damaged:
            _fetch(repo_id, commit, name, force=True)
        damaged = _damaged(folder, records)
        _remove(folder, damaged)
        for error in damaged.values():
            raise CheckpointError(
                f"{error} It came so from {repo_id} at commit {commit}, and was fetched twice."
            )


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        # The snapshot has a link to the copy; both must go.
        (folder / name).resolve().unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)


@contextmanager
def _explained(repo_id: str, revision: str) -> Iterator[None]:
    """Turn what the client raises into one line that says what to do."""
    try:
        yield
    except ZooError:
        raise
    except Exception as error:  # The client passes on whatever its HTTP library raises.
        raise CheckpointError(_explanation(error, repo_id, revision)) from error


def _explanation(error: Exception, repo_id: str, revision: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, then log in: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo_id!r} is neither a folder here nor a repository on the Hub; where it is "
            f"private, log in: hf auth login"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        url = str(error.response.url)
        if url.endswith(f"/{CARD_FILE}"):
            return f"{repo_id} at revision {revision!r} is no checkpoint of the zoo: no card."
        return f"{repo_id} at revision {revision!r} lacks the file {url.rpartition('/')[2]}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}."
    found = answer(error)
    if found is not None:
        return f"{repo_id}: {refusal(found[0])}"
    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)):
        return (
            f"{repo_id} at revision {revision!r} is not in the cache {constants.HF_HUB_CACHE}, "
            f"and the Hub was not reached; load it once with a connection."
        )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return (
            f"Cannot write to the cache {constants.HF_HUB_CACHE}: {error.strerror}. Make room or "
            f"set HF_HOME to another folder."
        )
    return f"Downloading {repo_id} at revision {revision!r} failed: {_first_line(error)}"


def refusal(status: int) -> str:
    """What an error status of the Hub means, and what to do."""
    if status == 401:
        return "the Hub does not accept the token; log in again: hf auth login"
    if status == 403:
        return "the token has no right to do this; make one that has, then: hf auth login"
    if status == 404:
        return "the Hub has no such file or repository."
    if status == 429:
        return "the Hub got too many requests from here; wait some minutes and try again."
    if status >= 500:
        return f"the Hub is in trouble (status {status}); try again later."
    return f"the Hub refused (status {status})."


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
