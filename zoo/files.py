"""The files of a checkpoint folder: what they are called, how they are read and checked."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from zoo.errors import CheckpointError

CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"
WEIGHTS_FILE = "model.safetensors"

CHECKPOINT_FILES = (CARD_FILE, CONFIG_FILE, RECIPE_FILE, RESULTS_FILE, WEIGHTS_FILE)
"""All there is in a checkpoint folder; nothing else is ever downloaded or read."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""What writing fails with where there is no space or no permission."""

LEFT_OVER = 3600.0
"""Seconds after which a folder that is only half written belongs to nobody."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What one file of a checkpoint folder must be."""

    name: str
    """A plain file name; a checkpoint folder has no subfolders."""
    size: int
    """In bytes."""
    sha256: str
    """64 lower-case hex digits."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not a plain file name")
        if self.size < 0:
            raise ValueError(f"size of {self.name} is negative: {self.size}")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 of {self.name} is not 64 hex digits: {self.sha256!r}")

    @classmethod
    def of(cls, name: str, content: bytes) -> FileRecord:
        """Describe `content`."""
        return cls(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def read(self, folder: Path) -> bytes:
        """Read the file, once, and check it: what is returned is what was checked.

        Raises:
            CheckpointError: When the file cannot be read, or differs in size or sha256.
        """
        content = read_bytes(folder / self.name)
        found = FileRecord.of(self.name, content)
        if found != self:
            raise CheckpointError(
                f"{folder / self.name} is damaged or is another file: expected {self.size} bytes "
                f"with sha256 {self.sha256}, got {found.size} bytes with sha256 {found.sha256}."
            )
        return content


def read_bytes(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        CheckpointError: When it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error


def digest(path: Path, suffixes: Collection[str] = ()) -> str:
    """SHA-256 of a file, or of the names and contents of the files in a folder and those below it.

    Args:
        path: The file or the folder.
        suffixes: Of the files in a folder that count, see `files_below`.

    Raises:
        CheckpointError: When a file cannot be read.
    """
    found = hashlib.sha256()
    for file in files_below(path, suffixes) if path.is_dir() else [path]:
        content = read_bytes(file)
        found.update(f"{file.relative_to(path).as_posix()} {len(content)} ".encode() + content)
    return found.hexdigest()


def files_below(folder: Path, suffixes: Collection[str] = ()) -> list[Path]:
    """Files in a folder and those below it, in order.

    Links to folders are followed, but none that leads back to where it lies. A link to nothing is
    among the files, so that whoever reads them says so.

    Args:
        folder: The folder.
        suffixes: Of the files that count, in lower case; none for all. Hidden ones, and those in
            hidden folders, never do.
    """
    found: list[Path] = []
    pending: list[tuple[Path, tuple[Path, ...]]] = [(folder, ())]
    while pending:
        here, above = pending.pop()
        real = here.resolve()
        if real in above:
            continue
        try:
            inside = [path for path in here.iterdir() if not path.name.startswith(".")]
        except OSError:  # a folder of somebody else
            continue
        for path in inside:
            if path.is_dir():
                pending.append((path, (*above, real)))
            elif path.is_file() or (path.is_symlink() and not path.exists()):
                found.append(path)
    return sorted(path for path in found if not suffixes or path.suffix.lower() in suffixes)


def named(path: str | os.PathLike[str]) -> Path:
    """A path of which the last part is a name, and not nothing or `..`; a link keeps its own."""
    path = Path(path).expanduser()
    return path.resolve() if path.name in ("", "..") else path


def is_hidden(path: Path, below: Path) -> bool:
    """Whether a part of a path, from the folder `below` on, has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        content: The text, in UTF-8.
        where: Its path, for error messages.

    Raises:
        CheckpointError: When `content` is anything else.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is not a JSON object.")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Read and parse a JSON object.

    Raises:
        CheckpointError: When the file cannot be read or is anything else.
    """
    return parse_json(read_bytes(path), str(path))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read, all of it or nothing.

    Raises:
        CheckpointError: When it cannot be written.
    """
    write_bytes(path, format_json(values))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing.

    Raises:
        CheckpointError: When it cannot be written.
    """
    # A name of its own: several processes may write the same at once.
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"Cannot write {path}: {error.strerror}.") from error


def partial_path(path: Path) -> Path:
    """A hidden name beside a file or folder, of this call alone, that is renamed when whole."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def is_leftover(name: str, of: str) -> bool:
    """Whether a name is one that `partial_path` gives beside a file or folder called `of`."""
    return bool(re.fullmatch(rf"\.{re.escape(of)}\.[0-9a-f]{{32}}\.(part|old)", name))


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have left under names of `partial_path`.

    Only what was not touched for an hour: until then it may be of a process that is at work.
    """
    for path in folder.parent.iterdir():
        if is_leftover(path.name, folder.name) and time.time() - _touched(path) > LEFT_OVER:
            shutil.rmtree(path, ignore_errors=True)


def _touched(folder: Path) -> float:
    """When the folder or a file in it was last written or renamed."""
    try:
        states = [path.stat() for path in (folder, *folder.iterdir())]
    except OSError:  # somebody else is removing it
        return time.time()
    return max(max(state.st_mtime, state.st_ctime) for state in states)


def format_json(values: Mapping[str, Any]) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
