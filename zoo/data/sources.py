"""Where files of data sets come from: a folder, the cache, the package, the official address.

Every file has a known size and checksum, and is checked whichever way it comes. Archives are never
extracted here.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import http.client
import math
import os
import urllib.request
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from zoo.errors import DataError, UnknownNameError, nearest
from zoo.progress import track

__all__ = ["SOURCES", "Source", "cache_dir", "data_dirs", "locate", "locate_first"]

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One file of a data set.

    Attributes:
        path: path below the data folder.
        size: bytes; None: not known.
        digest: checksum in hexadecimal, by `algorithm`; None: the same content comes in several
            encodings, and its reader checks what it has decoded.
        url: official address; None: the file is taken where it is, and never downloaded.
        licence: licence of the data, or what is known of it.
        packed: the file may lie there packed by gzip, with the suffix `.gz`, and is downloaded so;
            size and digest are of what is unpacked, since one content can be packed in many ways.
        bundled: path inside the package, for the few sets that may ship with it.
    """

    path: str
    size: int | None
    digest: str | None
    url: str | None
    licence: str
    algorithm: Literal["sha256", "md5"] = "sha256"
    packed: bool = False
    bundled: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths below the data folder that are looked at, in order."""
        return (f"{self.path}.gz", self.path) if self.packed else (self.path,)


def _idx(
    folder: str, file: str, size: int, md5: str, url: str, licence: str, bundled: bool = False
) -> Source:
    """A file of MNIST's kind, in the layout of torchvision."""
    return Source(
        path=f"{folder}/raw/{file}",
        size=size,
        digest=md5,
        algorithm="md5",
        url=f"{url}/{file}.gz",
        licence=licence,
        packed=True,
        bundled=f"bundled/{folder}/{file}.gz" if bundled else None,
    )


_MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist", "CC BY-SA 3.0, as commonly stated")
_FASHION = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "MIT",
)
_CIFAR = "none stated by its authors"
_MOVIELENS = "GroupLens: research use, no redistribution"


def _omniglot(file: str, size: int, md5: str) -> Source:
    return Source(
        path=f"omniglot/{file}",
        size=size,
        digest=md5,
        algorithm="md5",
        url=f"https://raw.githubusercontent.com/brendenlake/omniglot/master/python/{file}",
        licence="MIT",
    )


def _minilm(file: str, size: int, sha256: str) -> Source:
    """A file of the encoder of texts, of one commit on the Hub."""
    repository = "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2"
    return Source(
        path=f"all-MiniLM-L6-v2/{file}",
        size=size,
        digest=sha256,
        url=f"{repository}/resolve/1110a243fdf4706b3f48f1d95db1a4f5529b4d41/{file}",
        licence="Apache-2.0",
    )


SOURCES: dict[str, Source] = {
    "tiny-shakespeare": Source(
        path="tiny-shakespeare/input.txt",
        size=1_115_394,
        digest="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        licence="public domain",
        bundled="bundled/tiny-shakespeare.txt",
    ),
    "mnist-train-images": _idx(
        "MNIST", "train-images-idx3-ubyte", 47_040_016, "6bbc9ace898e44ae57da46a324031adb", *_MNIST
    ),
    "mnist-train-labels": _idx(
        "MNIST", "train-labels-idx1-ubyte", 60_008, "a25bea736e30d166cdddb491f175f624", *_MNIST
    ),
    "mnist-test-images": _idx(
        "MNIST", "t10k-images-idx3-ubyte", 7_840_016, "2646ac647ad5339dbf082846283269ea", *_MNIST
    ),
    "mnist-test-labels": _idx(
        "MNIST", "t10k-labels-idx1-ubyte", 10_008, "27ae3e4e09519cfbb04c329615203637", *_MNIST
    ),
    "fashion-mnist-train-images": _idx(
        "FashionMNIST",
        "train-images-idx3-ubyte",
        47_040_016,
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        *_FASHION,
    ),
    "fashion-mnist-train-labels": _idx(
        "FashionMNIST",
        "train-labels-idx1-ubyte",
        60_008,
        "9018921c3c673c538a1fc5bad174d6f9",
        *_FASHION,
    ),
    "fashion-mnist-test-images": _idx(
        "FashionMNIST",
        "t10k-images-idx3-ubyte",
        7_840_016,
        "8181f5470baa50b63fa0f6fddb340f0a",
        *_FASHION,
        bundled=True,
    ),
    "fashion-mnist-test-labels": _idx(
        "FashionMNIST",
        "t10k-labels-idx1-ubyte",
        10_008,
        "15d484375f8d13e6eb1aabb0c3f46965",
        *_FASHION,
        bundled=True,
    ),
    "omniglot-small-1": _omniglot(
        "images_background_small1.zip", 1_319_022, "e704a628b5459e08445c13499850abc4"
    ),
    "omniglot-small-2": _omniglot(
        "images_background_small2.zip", 1_580_917, "b75a71a51d3b13f821f212756fe481fd"
    ),
    "minilm-weights": _minilm(
        "model.safetensors",
        90_868_376,
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "minilm-vocabulary": _minilm(
        "vocab.txt",
        231_508,
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
    "cifar100-train-parquet": Source(
        path="cifar100/train-00000-of-00001.parquet",
        size=None,
        digest=None,
        url=None,
        licence=_CIFAR,
    ),
    "cifar100-test-parquet": Source(
        path="cifar100/test-00000-of-00001.parquet",
        size=None,
        digest=None,
        url=None,
        licence=_CIFAR,
    ),
    "cifar100-train-pickle": Source(
        path="cifar-100-python/train",
        size=None,
        digest="16019d7e3df5f24257cddd939b257f8d",
        algorithm="md5",
        url=None,
        licence=_CIFAR,
    ),
    "cifar100-test-pickle": Source(
        path="cifar-100-python/test",
        size=None,
        digest="f0ef6b0ae62326f3e7ffdfab6717acfc",
        algorithm="md5",
        url=None,
        licence=_CIFAR,
    ),
    "cifar100-archive": Source(
        path="cifar-100-python.tar.gz",
        size=169_001_437,
        digest="eb9058c3a382ffc7106e4002c42a8d85",
        algorithm="md5",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        licence=_CIFAR,
    ),
    "movielens-100k-ratings": Source(
        path="ml-100k/u.data",
        size=1_979_173,
        digest="06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
        url=None,
        licence=_MOVIELENS,
    ),
    "movielens-100k-archive": Source(
        path="ml-100k.zip",
        size=4_924_029,
        digest="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        licence=_MOVIELENS,
    ),
    "movielens-1m-archive": Source(
        path="ml-1m.zip",
        size=5_917_549,
        digest="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        licence=_MOVIELENS,
    ),
    "movielens-latest-small-archive": Source(
        path="ml-latest-small.zip",
        size=978_202,
        digest="696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
        url="https://files.grouplens.org/datasets/movielens/ml-latest-small.zip",
        licence=_MOVIELENS,
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
    return locate_first([name], data_dir)[1]


def locate_first(
    names: Sequence[str], data_dir: str | os.PathLike[str] | None = None
) -> tuple[str, Path]:
    """Name and path of the first of several files that is here; the last is downloaded otherwise.

    Args:
        names: keys of `SOURCES`: files that hold the same data in different layouts.
        data_dir: folder to look in first.

    Raises:
        UnknownNameError: no such file is known.
        DataError: a file is damaged, or none is here and the last could not be downloaded.
    """
    for name in names:
        if name not in SOURCES:
            raise UnknownNameError(f"No data set {name!r}.{nearest(name, SOURCES)}")
    for name in names:
        found = _find(SOURCES[name], data_dir)
        if found is not None:
            _check(found, SOURCES[name])
            return name, found
    name = names[-1]
    looked = [
        folder / path for folder in data_dirs(data_dir) for n in names for path in SOURCES[n].paths
    ]
    return name, _download(name, SOURCES[name], looked)


def _find(source: Source, data_dir: str | os.PathLike[str] | None) -> Path | None:
    candidates = [folder / path for folder in data_dirs(data_dir) for path in source.paths]
    if source.bundled is not None:
        candidates.append(Path(str(resources.files("zoo.data") / source.bundled)))
    return next((path for path in candidates if path.is_file()), None)


def _check(path: Path, source: Source) -> None:
    """Compare size and checksum, of what is unpacked where the file is packed."""
    again = f"; remove it to get it again from {source.url}" if source.url else ""
    unpack = source.packed and ".gz" in path.suffixes
    digest, size = hashlib.new(source.algorithm, usedforsecurity=False), 0
    if source.size is not None and not unpack and path.stat().st_size != source.size:
        raise DataError(f"{path} has {path.stat().st_size} bytes, expected {source.size}{again}")
    try:
        with gzip.open(path) if unpack else path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if source.size is not None and size > source.size:
                    break  # a few packed bytes can be many
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be unpacked ({error}){again}") from error
    if source.size is not None and size != source.size:
        found = f"more than {source.size}" if size > source.size else str(size)
        raise DataError(f"{path} has {found} unpacked bytes, expected {source.size}{again}")
    if source.digest is not None and digest.hexdigest() != source.digest:
        raise DataError(
            f"{path} has {source.algorithm} {digest.hexdigest()}, expected {source.digest}{again}"
        )


def _download(name: str, source: Source, looked: Sequence[Path]) -> Path:
    """Fetch to a temporary name under a lock, check, and rename."""
    from filelock import FileLock

    target = cache_dir() / source.paths[0]
    if source.url is None:
        raise DataError(f"Data set {name!r} was not found at {', '.join(map(str, looked))}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            if target.is_file():  # another process was first
                _check(target, source)
                return target
            partial = target.with_name(target.name + ".part")
            try:
                _fetch(name, source.url, partial)
                _check(partial, source)
                partial.replace(target)
            finally:
                # Under the lock: outside of it the file may be another process's.
                partial.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        size = "" if source.size is None else f"{source.size / 1e6:.1f} MB, "
        raise DataError(
            f"Data set {name!r} ({size}{source.licence}) was not found at "
            f"{', '.join(map(str, looked))}, and could not be downloaded ({reason}). Get it with: "
            f"curl --create-dirs -o {target} {source.url}"
        ) from error
    return target


def _fetch(name: str, url: str, path: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "zoo"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer, path.open("wb") as file:
        chunks = iter(functools.partial(answer.read, _CHUNK), b"")
        total = None if answer.length is None else math.ceil(answer.length / _CHUNK)
        for chunk in track(chunks, name, total):
            file.write(chunk)
