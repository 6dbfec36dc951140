"""Find a checkpoint folder: bundled with the package, local, in the cache, or on the Hub.

What comes from the Hub is of one commit, is limited to the files of a checkpoint folder, and is
checked by its card's sha256 before it is handed on; the client's own check lets a flipped bit
through. Endpoint, cache folder and offline mode are those of the client (`HF_ENDPOINT`, `HF_HOME`,
`HF_HUB_OFFLINE`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from zoo.cards import Card, find, parse, pretrained_folder
from zoo.errors import CheckpointError, ConfigError, UnknownNameError, ZooError
from zoo.files import CARD_FILE, CHECKPOINT_FILES, NO_ROOM, FileRecord, read_bytes

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


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
            (`owner/name`). A name of the zoo wins over a folder that is called the same.
        revision: A commit, tag or branch on the Hub; by default the commit in the card, or `main`
            for a repository without a card in the zoo. It is resolved once, for all files.
        local_files_only: Never to use the network.

    Returns:
        The folder and its card.

    Raises:
        UnknownNameError: When the name is none of these; the text has the nearest names.
        CheckpointError: When the files cannot be had, or are damaged after a second download.
        ConfigError: When a revision of a local folder is asked for.
    """
    text = os.fspath(name)
    try:
        card = find(text)
    except UnknownNameError as error:
        if Path(text).exists():
            if revision is not None:
                raise ConfigError(f"{text} is a local folder, which has no revisions.") from None
            return Located(Path(text), None)
        if not _REPO_ID.fullmatch(text):
            raise error
        return _from_hub(text, revision or "main", None, local_files_only)
    if revision is None:
        if pretrained_folder(card.name).is_dir():
            return Located(pretrained_folder(card.name), card)
        if card.hub.revision is None:
            raise CheckpointError(f"{card.name} is neither bundled nor published on the Hub yet.")
    known = card if revision in (None, card.hub.revision) else None
    wanted = revision or card.hub.revision or "main"
    return _from_hub(card.hub.repo_id, wanted, known, local_files_only)


def _from_hub(repo_id: str, revision: str, card: Card | None, local_files_only: bool) -> Located:
    with _explained(repo_id, revision):
        folder = _download(repo_id, revision, CHECKPOINT_FILES, local_files_only)
        if card is None:
            path = folder / CARD_FILE
            card = parse(read_bytes(path).decode("utf-8", errors="replace"), where=str(path))
        if not card.files:
            raise CheckpointError(f"The card of {repo_id} has no sha256 of its files.")
        damaged = _damaged(folder, card.files)
        if damaged and local_files_only:
            raise damaged.popitem()[1]
        if damaged:
            _repair(repo_id, folder, card.files)
        return Located(folder, card)


def _download(
    repo_id: str, revision: str, names: Iterable[str], local_files_only: bool, force: bool = False
) -> Path:
    """Bring files of one commit into the cache; the folder is named after the commit."""
    import huggingface_hub

    folder = huggingface_hub.snapshot_download(
        repo_id,
        revision=revision,
        allow_patterns=list(names),
        local_files_only=local_files_only,
        force_download=force,
        library_name="zoo",
    )
    return Path(folder)


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

    commit = folder.name
    with FileLock(folder.parent / f"{commit}.lock"):
        # Another process may have repaired it while this one waited.
        damaged = _damaged(folder, records)
        if not damaged:
            return
        for name in damaged:
            # The snapshot has a link to the copy; both must go.
            (folder / name).resolve().unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
        _download(repo_id, commit, damaged, local_files_only=False, force=True)
        for error in _damaged(folder, records).values():
            raise CheckpointError(
                f"{error} It came so from {repo_id} at commit {commit}, and was fetched twice."
            )


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
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}."
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
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"Downloading {repo_id} at revision {revision!r} failed: {reason}"
