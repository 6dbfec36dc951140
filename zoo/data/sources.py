"""Where files of data sets come from: a folder, the cache, the package, the official address.

Every file has a known size and checksum, and is checked whichever way it comes. Archives are never
extracted here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.client
import os
import urllib.request
from importlib import resources
from pathlib import Path
from typing import Literal

from zoo.errors import DataError, UnknownNameError, nearest
from zoo.progress import track

__all__ = ["SOURCES", "Source", "data_dirs", "locate"]

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One file of a data set.

    Attributes:
        path: path below the data folder.
        size: bytes.
        digest: checksum in hexadecimal, by `algorithm`.
        url: official address.
        licence: licence of the data, or what is known of it.
        bundled: path inside the package, for the few sets that may ship with it.
    """

    path: str
    size: int
    digest: str
    url: str
    licence: str
    algorithm: Literal["sha256", "md5"] = "sha256"
    bundled: str | None = None


SOURCES: dict[str, Source] = {
    "tiny-shakespeare": Source(
        path="tiny-shakespeare/input.txt",
        size=1_115_394,
        digest="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        licence="public domain",
        bundled="bundled/tiny-shakespeare.txt",
    ),
}
"""All files that data modules ask for, by name."""


def data_dirs(data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Folders that are searched, in order: `data_dir`, `$ZOO_DATA_DIR`, `~/.cache/zoo/data`."""
    given = [data_dir, os.environ.get("ZOO_DATA_DIR")]
    folders = [Path(folder).expanduser() for folder in given if folder]
    return [*folders, cache_dir()]


def cache_dir() -> Path:
    """Folder that downloads are kept in: `$ZOO_CACHE_DIR/data`, else `~/.cache/zoo/data`."""
    return Path(os.environ.get("ZOO_CACHE_DIR", "~/.cache/zoo")).expanduser() / "data"


def locate(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Path of a checked file of a data set, downloaded if there is no other way.

    Args:
        name: key of `SOURCES`.
        data_dir: folder to look in first.

    Raises:
        UnknownNameError: no such file is known.
        DataError: the file is damaged, or is nowhere and could not be downloaded.
    """
    if name not in SOURCES:
        raise UnknownNameError(f"No data set {name!r}.{nearest(name, SOURCES)}")
    source = SOURCES[name]
    for folder in data_dirs(data_dir):
        path = folder / source.path
        if path.is_file():
            _check(path, source)
            return path
    if source.bundled is not None:
        path = Path(str(resources.files("zoo.data") / source.bundled))
        if path.is_file():
            _check(path, source)
            return path
    return _download(name, source, cache_dir() / source.path)


def _check(path: Path, source: Source) -> None:
    size = path.stat().st_size
    if size != source.size:
        raise DataError(
            f"{path} has {size} bytes, expected {source.size}; remove it to get it again from "
            f"{source.url}"
        )
    digest = hashlib.new(source.algorithm, path.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != source.digest:
        raise DataError(
            f"{path} has {source.algorithm} {digest}, expected {source.digest}; remove it to get "
            f"it again from {source.url}"
        )


def _download(name: str, source: Source, target: Path) -> Path:
    """Fetch to a temporary name under a lock, check, and rename."""
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            if target.is_file():  # another process was first
                _check(target, source)
                return target
            partial = target.with_name(target.name + ".part")
            try:
                _fetch(name, source, partial)
                _check(partial, source)
                partial.replace(target)
            finally:
                # Under the lock: outside of it the file may be another process's.
                partial.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        looked = ", ".join(str(folder / source.path) for folder in data_dirs())
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"Data set {name!r} ({source.size / 1e6:.1f} MB, {source.licence}) was not found at "
            f"{looked}, and could not be downloaded ({reason}). Get it with: "
            f"curl --create-dirs -o {target} {source.url}"
        ) from error
    return target


def _fetch(name: str, source: Source, path: Path) -> None:
    request = urllib.request.Request(source.url, headers={"User-Agent": "zoo"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer, path.open("wb") as file:
        chunks = iter(functools.partial(answer.read, _CHUNK), b"")
        for chunk in track(chunks, name, -(-source.size // _CHUNK)):
            file.write(chunk)
