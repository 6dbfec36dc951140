"""Tests of image data: readers against other readers, augmentation against all it may do."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from tests.tiny_images import CLASSES, SIZE, make_images, write_folder
from zoo.data import augmentation, image_sets, images, pictures, sources
from zoo.data.augmentation import AugmentConfig, augment_batch
from zoo.data.image_sets import IMAGE_SETS
from zoo.data.images import ImageDataModule
from zoo.data.pictures import (
    ImagePreprocessing,
    ImageSplit,
    read_idx,
    read_image,
    read_image_folder,
    read_parquet_images,
)
from zoo.data.sources import SOURCES, Source
from zoo.errors import DataError, UnknownNameError


def bytes_of(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def pixels_of(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


# --- IDX ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 28, 28)])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_against_torchvision(tmp_path: Path, shape: tuple[int, ...], packed: bool) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    content = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    content += values.tobytes()
    (tmp_path / "plain").write_bytes(content)
    path = tmp_path / ("packed.gz" if packed else "plain")
    if packed:
        path.write_bytes(gzip.compress(content))
    found = read_idx(path)
    assert torch.equal(found, read_sn3_pascalvincent_tensor(str(tmp_path / "plain")))
    assert np.array_equal(found.numpy(), values)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"", "is no IDX file of unsigned bytes"),
        ("a", b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "is no IDX file of unsigned bytes"),
        ("a", b"\x00\x00\x08\x03\x00\x00", "ends within its header"),
        ("a", b"\x00\x00\x08\x01\x00\x00\x00\x05abc", "has 3 values, but its header says 5"),
        ("a", b"\x00\x00\x08\x01\x00\x00\x00\x00", "holds no values"),
        ("a.gz", b"not packed", "Cannot read .*a.gz: Not a gzipped file"),
        ("a.gz", gzip.compress(b"abc" * 99, mtime=0)[:-20], "Cannot read .*a.gz"),
    ],
)
def test_what_is_no_idx_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_idx_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No file at"):
        read_idx(tmp_path / "nowhere")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files_are_known_by_what_they_unpack_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    contents = {
        "test-images": b"\x00\x00\x08\x03" + struct.pack(">3I", 2, 28, 28) + bytes(2 * 784),
        "test-labels": b"\x00\x00\x08\x01" + struct.pack(">I", 2) + b"\x03\x09",
    }
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    for name, content in contents.items():
        real = SOURCES[f"mnist-{name}"]
        made = Source(
            path=real.path,
            size=len(content),
            digest=hashlib.md5(content, usedforsecurity=False).hexdigest(),
            algorithm="md5",
            url=None,
            licence=real.licence,
            packed=True,
        )
        monkeypatch.setitem(sources.SOURCES, f"mnist-{name}", made)
        path = tmp_path / f"{real.path}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two levels of compression give two files of the same content.
        path.write_bytes(gzip.compress(content, len(name) % 9 + 1) if suffix else content)
    data = ImageDataModule("mnist", data_dir=str(tmp_path))
    data.setup("test")
    assert data.test_images.shape == (2, 1, 28, 28)
    assert data.test_labels.tolist() == [3, 9]
    path.write_bytes(gzip.compress(content[:-1] + b"\x01") if suffix else content[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"has md5 .*, expected"):
        ImageDataModule("mnist", data_dir=str(tmp_path)).setup("test")


def test_more_than_expected_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    source = Source(path="bomb", size=100, digest="0", url=None, licence="", packed=True)
    with pytest.raises(DataError, match="has more than 100 unpacked bytes, expected 100"):
        sources._check(path, source)


def test_the_bundled_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ZOO_DATA_DIR", raising=False)
    data = ImageDataModule("fashion-mnist")
    data.setup("test")
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.test_labels.bincount().tolist() == [1_000] * 10
    assert data.preprocessing.classes[int(data.test_labels[0])] == "Ankle boot"


# --- parquet and pickles --------------------------------------------------------------------------


def write_parquet(path: Path, pictures: list[bytes], labels: list[int], **columns: Any) -> Path:
    table = {"img": [{"bytes": p, "path": None} for p in pictures], "fine_label": labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({**table, **columns}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_parquet_of_pictures(tmp_path: Path, kind: str) -> None:
    pixels = pixels_of(5, (6, 9))
    path = write_parquet(
        tmp_path / "a.parquet", [bytes_of(p, kind) for p in pixels], [4, 0, 1, 1, 9]
    )
    split = read_parquet_images(path)
    assert split.images.dtype == torch.uint8
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), pixels)
    assert split.labels.tolist() == [4, 0, 1, 1, 9]


def test_parquet_that_cannot_be_read(tmp_path: Path) -> None:
    good = bytes_of(pixels_of(1)[0])
    other = bytes_of(pixels_of(1, (8, 8))[0])
    cases: list[tuple[list[bytes], str]] = [
        ([good, b"x" * 50], "Cannot read the picture .*, row 1: it is no picture"),
        ([good[:200]], "Cannot read the picture .*, row 0: it is damaged"),
        ([good, other], "has pictures of 2 sizes"),
        ([], "has no pictures"),
    ]
    for drawn, message in cases:
        path = write_parquet(tmp_path / "a.parquet", drawn, [0] * len(drawn))
        with pytest.raises(DataError, match=message):
            read_parquet_images(path)
    with pytest.raises(DataError, match=r"no column 'fine_labels'\. Did you mean 'fine_label'\?"):
        read_parquet_images(path, label_column="fine_labels")
    path.write_bytes(b"PAR1")
    for wrong in (path, tmp_path / "nowhere.parquet"):
        with pytest.raises(DataError, match="Cannot read") as caught:
            read_parquet_images(wrong)
        assert "\n" not in str(caught.value)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def cifar_pickle(pixels: np.ndarray, labels: list[int], **more: Any) -> bytes:
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    content = {b"data": rows, b"fine_labels": labels, b"filenames": [b"a"] * len(labels), **more}
    return pickle.dumps(content, protocol=3)


def python_2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The same as Python 2 wrote it, opcode by opcode: strings where there are bytes today."""
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01K"
        + bytes([len(rows)])
        + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89T"
        + struct.pack("<i", rows.size)
        + rows.tobytes()
        + b"tb"
    )
    names = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x0bfine_labels" + names + b"u."


@pytest.mark.parametrize("write", [cifar_pickle, python_2_pickle])
def test_a_file_of_the_official_archive(write: Callable[..., bytes]) -> None:
    pixels = pixels_of(3)
    content = write(pixels, [7, 0, 99])
    split = pictures.read_cifar_pickle(io.BytesIO(content), "train")
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), pixels)
    assert split.labels.tolist() == [7, 0, 99]


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    pixels = pixels_of(1)
    hidden = np.empty(1, dtype=object)
    hidden[0] = Payload(target)
    for content in (
        pickle.dumps(Payload(target), protocol=2),
        cifar_pickle(pixels, [0], batch_label=Payload(target)),
        cifar_pickle(pixels, [0], batch_label=hidden),
        pickle.dumps(np.load, protocol=2),
    ):
        with pytest.raises(DataError, match="train is no file of CIFAR-100: it asks for"):
            pictures.read_cifar_pickle(io.BytesIO(content), "train")
    assert not target.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02", pickle.dumps({}), pickle.dumps(3), pickle.dumps({b"data": [1]})]
)
def test_what_is_no_file_of_cifar(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^train is no file of CIFAR-100"):
        pictures.read_cifar_pickle(io.BytesIO(content), "train")


# --- CIFAR-100 in three layouts -------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int]]:
    """A small set in the place of CIFAR-100's test set; what is expected of it."""
    pixels, labels = pixels_of(7), [3, 99, 0, 1, 4, 2, 50]
    keys = [
        hashlib.sha256(image.tobytes() + bytes([label])).hexdigest()
        for image, label in zip(pixels, labels, strict=True)
    ]
    digest = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()
    monkeypatch.setitem(image_sets._CIFAR100_DIGESTS, "test", digest)
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ZOO_DATA_DIR", raising=False)
    order = np.argsort(keys)
    return pixels[order], [labels[i] for i in order]


def lay_out(folder: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the set of `cifar` in one of the layouts, shuffled in a way of its own."""
    order = np.random.default_rng(len(layout)).permutation(7)
    pixels, labels = pixels_of(7)[order], [[3, 99, 0, 1, 4, 2, 50][i] for i in order]
    if layout == "parquet":
        pictures = [bytes_of(p, "WEBP") for p in pixels]
        write_parquet(folder / "cifar100" / "test-00000-of-00001.parquet", pictures, labels)
        return
    content = cifar_pickle(pixels, labels)
    if layout == "archive":
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            member = tarfile.TarInfo("cifar-100-python/test")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        content = file.getvalue()
    name = "cifar100-archive" if layout == "archive" else "cifar100-test-pickle"
    real = SOURCES[name]
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    made = Source(
        path=real.path, size=len(content), digest=digest, algorithm="md5", url=None, licence=""
    )
    monkeypatch.setitem(sources.SOURCES, name, made)
    path = folder / real.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("layout", ["parquet", "pickle", "archive"])
def test_cifar_is_the_same_from_any_layout(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cifar: tuple[np.ndarray, list[int]],
    layout: str,
) -> None:
    lay_out(tmp_path / "data", layout, monkeypatch)
    data = ImageDataModule("cifar100", data_dir=str(tmp_path / "data"))
    data.setup("test")
    assert np.array_equal(data.test_images.permute(0, 2, 3, 1).numpy(), cifar[0])
    assert data.test_labels.tolist() == cifar[1]
    coarse = ImageDataModule("cifar100-coarse", data_dir=str(tmp_path / "data"))
    coarse.setup("test")
    assert coarse.test_labels.tolist() == [image_sets.CIFAR100_COARSE[n] for n in cifar[1]]


def test_cifar_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cifar: tuple[np.ndarray, list[int]]
) -> None:
    lay_out(tmp_path / "data", "parquet", monkeypatch)
    ImageDataModule("cifar100", data_dir=str(tmp_path / "data")).setup("test")
    (cached,) = (tmp_path / "cache").rglob("*.safetensors")
    monkeypatch.setattr(image_sets, "_decode_cifar100", None)
    data = ImageDataModule("cifar100")
    data.setup("test")
    assert data.test_labels.tolist() == cifar[1]
    assert [path.name for path in cached.parent.iterdir() if path.suffix == ".part"] == []


def test_a_damaged_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cifar: tuple[np.ndarray, list[int]]
) -> None:
    lay_out(tmp_path / "data", "parquet", monkeypatch)
    for content in (None, b"", b"x" * 100):
        if content is not None:
            (cached,) = (tmp_path / "cache").rglob("*.safetensors")
            cached.write_bytes(content)
        data = ImageDataModule("cifar100", data_dir=str(tmp_path / "data"))
        data.setup("test")
        assert data.test_labels.tolist() == cifar[1]


def test_other_images_than_those_of_cifar(
    tmp_path: Path, cifar: tuple[np.ndarray, list[int]]
) -> None:
    pictures = [bytes_of(p) for p in pixels_of(7, seed=1)]
    write_parquet(tmp_path / "cifar100" / "test-00000-of-00001.parquet", pictures, [0] * 7)
    with pytest.raises(DataError, match=r"The images of CIFAR-100 \(test\) have the digest"):
        ImageDataModule("cifar100", data_dir=str(tmp_path)).setup("test")


def test_a_set_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ZOO_DATA_DIR", raising=False)
    address = "http://127.0.0.1:9/cifar.tar.gz"
    made = Source(path="c.tar.gz", size=1, digest="0", url=address, licence="none stated")
    monkeypatch.setitem(sources.SOURCES, "cifar100-archive", made)
    with pytest.raises(DataError) as caught:
        ImageDataModule("cifar100", data_dir=str(tmp_path)).setup("test")
    text = str(caught.value)
    for part in (
        "parquet",
        "cifar-100-python/test",
        "none stated",
        f"curl --create-dirs -o {tmp_path}",
    ):
        assert part in text
    assert "\n" not in text


def test_names_of_sets() -> None:
    with pytest.raises(UnknownNameError, match=r"No image set 'cifar10'\. Did you mean 'cifar100'"):
        ImageDataModule("cifar10")
    assert {name: len(p.classes) for name, p in IMAGE_SETS.items()} == {
        "mnist": 10,
        "fashion-mnist": 10,
        "cifar100": 100,
        "cifar100-coarse": 20,
    }
    counts = np.bincount(image_sets.CIFAR100_COARSE)
    assert counts.tolist() == [5] * 20
    fine, coarse = (IMAGE_SETS[n].classes for n in ("cifar100", "cifar100-coarse"))
    assert list(fine) == sorted(fine)
    assert list(coarse) == sorted(coarse)
    group = {f: coarse[image_sets.CIFAR100_COARSE[i]] for i, f in enumerate(fine)}
    assert (group["shark"], group["oak_tree"], group["tank"]) == ("fish", "trees", "vehicles_2")


has_data = pytest.mark.skipif(
    not (Path(os.environ.get("ZOO_DATA_DIR", "nowhere")) / "cifar100").is_dir(),
    reason="needs the data sets in ZOO_DATA_DIR",
)


@has_data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar100"])
def test_real_sets_have_the_statistics_they_are_normalised_with(name: str) -> None:
    data = ImageDataModule(name)  # reading it compares the digest
    data.setup()
    values = data.train_images.double() / 255
    assert values.mean((0, 2, 3)).tolist() == pytest.approx(data.preprocessing.mean, abs=1e-7)
    std = values.std((0, 2, 3), correction=0)
    assert std.tolist() == pytest.approx(data.preprocessing.std, abs=1e-7)
    classes = len(data.preprocessing.classes)
    per_class = 500 if name == "cifar100" else 6_000
    assert len(data.train_labels) == per_class * classes
    if name != "mnist":  # whose classes are not of equal size
        assert data.train_labels.bincount().tolist() == [per_class] * classes
    assert len(data.test_labels) == 10_000


# --- pictures and folders -------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_read_image(tmp_path: Path, channels: int) -> None:
    pixels = pixels_of(1, (5, 7))[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", channels)
    picture = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    assert found.shape == (channels, 5, 7)
    assert np.array_equal(found.numpy().transpose(1, 2, 0).squeeze(), np.asarray(picture).squeeze())


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    whole = bytes_of(pixels_of(1)[0])
    for name, content, message in (
        ("a.png", b"hello", "it is no picture"),
        ("b.png", whole[: len(whole) // 2], "it is damaged"),
        ("c.png", b"", "it is no picture"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"Cannot read the picture .*{name}: {message}"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"No picture at .*nowhere\.png"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"Cannot read the picture .*: Is a directory"):
        read_image(tmp_path)


def values_of_16_bits() -> np.ndarray:
    return np.array([[0, 128, 129, 257], [1000, 32768, 65406, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_pictures_of_16_bits_are_scaled(tmp_path: Path, name: str, channels: int) -> None:
    values = values_of_16_bits()
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 4 2 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    expected = np.rint(values / 65535 * 255)
    found = read_image(tmp_path / name, channels).numpy()
    assert found.shape == (channels, 2, 4)
    assert all(np.array_equal(plane, expected) for plane in found)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pictures_of_32_bits_are_refused(tmp_path: Path, kind: type[np.generic]) -> None:
    picture = Image.fromarray(np.full((4, 4), 3, dtype=kind))
    for name in ("x/a.tif", "y/a.tif"):
        (tmp_path / name).parent.mkdir()
        picture.save(tmp_path / name)
    with pytest.raises(DataError, match=r"x.a\.tif has 32-bit values; save it with 8 bits\.$"):
        read_image(tmp_path / "x" / "a.tif")
    with pytest.raises(DataError, match=r"2 of 2 .* Some have 32-bit values; save them with 8"):
        read_image_folder(tmp_path, (4, 4))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_the_right_way_up(tmp_path: Path, orientation: int) -> None:
    pixels = pixels_of(1, (5, 7))[0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    # The standard's list of what the 0th row and the 0th column are.
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    assert np.array_equal(read_image(tmp_path / "a.png").numpy().transpose(1, 2, 0), upright)


def test_a_damaged_note_on_orientation_leaves_the_picture(tmp_path: Path) -> None:
    pixels = pixels_of(1, (5, 7))[0]
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0no such thing")
    assert np.array_equal(read_image(tmp_path / "a.png").numpy().transpose(1, 2, 0), pixels)


def test_a_folder_of_classes(tmp_path: Path) -> None:
    pixels, labels = make_images(9)
    split, classes = read_image_folder(write_folder(tmp_path, 9), SIZE)
    assert classes == CLASSES
    order = np.argsort(labels, kind="stable")
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), pixels[order])
    assert split.labels.tolist() == labels[order].tolist()


def test_hidden_files_and_folders_are_no_pictures(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", 9)
    expected = read_image_folder(folder, SIZE)[0]
    (folder / "left" / "._000.png").write_bytes(b"a note of macOS")
    (folder / "left" / "more").mkdir()
    for place in (folder, folder / "left", folder / "left" / "more"):
        (place / ".ipynb_checkpoints" / "deep").mkdir(parents=True)
        shutil.copy(folder / "dark" / "000.png", place / ".ipynb_checkpoints" / "deep" / "a.png")
    found = read_image_folder(folder, SIZE)[0]
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".jfif", "JPEG"), (".tga", "TGA"), (".TIFF", "TIFF"), (".jp2", "JPEG2000")],
)
def test_less_common_names_of_pictures(tmp_path: Path, suffix: str, kind: str) -> None:
    folder = write_folder(tmp_path / "a", 6)
    Image.open(folder / "left" / "001.png").save(folder / "left" / f"b{suffix}", kind)
    split, _ = read_image_folder(folder, SIZE)
    assert len(split.labels) == 7


def test_every_suffix_is_one_that_pillow_opens() -> None:
    Image.init()
    opened = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    assert pictures.IMAGE_SUFFIXES - {".avif"} <= opened  # which some builds lack


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_what_is_transparent_is_seen_on_white(tmp_path: Path, mode: str, channels: int) -> None:
    """The left half is opaque, the right one is black that nobody sees."""
    dark = 60
    if mode in ("RGBA", "LA"):
        picture = Image.new(mode, (4, 2), (dark,) * (len(mode) - 1) + (255,))
        picture.paste((0,) * len(mode), (2, 0, 4, 2))
        picture.save(tmp_path / "a.png")
    elif mode == "PA":
        picture = Image.new("P", (4, 2), 1)
        picture.putpalette([0, 0, 0, dark, dark, dark])
        picture.paste(0, (2, 0, 4, 2))
        alpha = Image.new("L", (4, 2), 255)
        alpha.paste(0, (2, 0, 4, 2))
        picture = picture.convert("PA")
        picture.putalpha(alpha)
    else:
        picture = Image.new(mode, (4, 2), 1 if mode == "P" else (dark,) * len(mode))
        if mode == "P":
            picture.putpalette([0, 0, 0, dark, dark, dark])
        picture.paste(0 if mode != "RGB" else (0, 0, 0), (2, 0, 4, 2))
        picture.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    if mode == "PA":
        found = pictures.picture_pixels(picture, "here", channels)
    else:
        found = read_image(tmp_path / "a.png", channels).permute(1, 2, 0).numpy()
    expected = np.full((2, 4, channels), 255)
    expected[:, :2] = dark
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_by_lightness_are_converted(channels: int) -> None:
    white = Image.new("LAB", (3, 2), (255, 128, 128))
    assert pictures.picture_pixels(white, "here", channels).min() >= 254


def test_half_transparent_colours_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (200, 100, 0, 51)).save(tmp_path / "a.png")  # a fifth
    assert read_image(tmp_path / "a.png").flatten().tolist() == [244, 224, 204]


def test_pictures_of_a_folder_are_resized(tmp_path: Path) -> None:
    write_folder(tmp_path, 6)
    split, _ = read_image_folder(tmp_path, (4, 5), channels=1)
    assert split.images.shape == (6, 1, 4, 5)
    grey = Image.open(sorted(tmp_path.rglob("*.png"))[0]).convert("L")
    # Pillow's filter is another antialiased triangle, in integers.
    reference = np.asarray(grey.resize((5, 4), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(split.images[0, 0].numpy().astype(int) - reference).max() <= 1


def make_empty(folder: Path) -> None:
    pass


def make_one_class(folder: Path) -> None:
    write_folder(folder, 1)


def make_class_without_pictures(folder: Path) -> None:
    write_folder(folder, 9)
    (folder / "nothing").mkdir()


def make_unreadable(folder: Path) -> None:
    write_folder(folder, 30)
    for path in sorted((folder / "left").iterdir())[:7]:
        path.write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_empty, "has no folders; it needs one folder of pictures for each of two or more"),
        (make_one_class, "has one folder, 'dark'; it needs"),
        (make_class_without_pictures, "The class folder .*nothing has no pictures"),
        (make_unreadable, r"7 of 30 pictures cannot be read: .*001\.png, .* and 2 more\.$"),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        ImageDataModule(path=str(tmp_path), size=SIZE).setup()
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        ImageDataModule(path=str(tmp_path / "nowhere")).setup()


def test_a_folder_with_train_and_test(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 12)
    write_folder(tmp_path / "test", 6, seed=1)
    data = ImageDataModule(path=str(tmp_path), size=SIZE)
    data.setup()
    assert (len(data.train_labels), len(data.test_labels)) == (12, 6)
    (tmp_path / "test" / "left").rename(tmp_path / "test" / "links")
    with pytest.raises(
        DataError, match=r"Only one of train and test in .* the classes: left, links"
    ):
        ImageDataModule(path=str(tmp_path), size=SIZE).setup()


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_of_validation_is_the_test_part(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "train", 12)
    write_folder(tmp_path / name, 6, seed=1)
    data = ImageDataModule(path=str(tmp_path), size=SIZE)
    assert (len(data.train_labels), len(data.test_labels)) == (12, 6)
    assert data.preprocessing.classes == CLASSES
    write_folder(tmp_path / "test", 9, seed=2)
    assert len(ImageDataModule(path=str(tmp_path), size=SIZE).test_labels) == 9


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "Val")])
def test_capitals_make_no_difference_to_parts(tmp_path: Path, train: str, test: str) -> None:
    write_folder(tmp_path / train, 12)
    write_folder(tmp_path / test, 6, seed=1)
    data = ImageDataModule(path=str(tmp_path), size=SIZE)
    assert (len(data.train_labels), len(data.test_labels)) == (12, 6)
    assert data.preprocessing.classes == CLASSES


@pytest.mark.parametrize(("name", "other"), [("train", "test"), ("test", "train")])
def test_a_part_without_the_other_is_refused(tmp_path: Path, name: str, other: str) -> None:
    write_folder(tmp_path / name, 12)
    for extra in ("unlabelled", "more"):
        with pytest.raises(DataError, match=f"has '{name}' but no '{other}'; add") as caught:
            ImageDataModule(path=str(tmp_path), size=SIZE).setup()
        assert "\n" not in str(caught.value)
        (tmp_path / extra).mkdir()


@pytest.mark.parametrize("names", [("airplane", "car", "train"), ("exam", "test"), ("rest", "val")])
def test_a_class_may_be_called_train(tmp_path: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        for index, image in enumerate(pixels_of(3, SIZE, number)):
            Image.fromarray(image).save(tmp_path / name / f"{index}.png")
    assert ImageDataModule(path=str(tmp_path), size=SIZE).preprocessing.classes == names


def test_parts_without_classes_are_no_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val")):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels_of(1, SIZE, number)[0]).save(tmp_path / name / "a.png")
    with pytest.raises(DataError, match="train has no folders; it needs one folder of pictures"):
        ImageDataModule(path=str(tmp_path), size=SIZE).setup()


# --- what is held out -----------------------------------------------------------------------------


def data_of(split: ImageSplit, **options: Any) -> ImageDataModule:
    """A data module over images in memory, the test set being the same."""
    data = ImageDataModule("cifar100", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "read_known", lambda name, part, data_dir: split)
        data.setup()
    return data


def numbered(count: int, classes: int = 5) -> ImageSplit:
    """Images that all differ: the k-th has k in its pixels, and label k modulo `classes`."""
    number = torch.arange(count)
    pixels = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    pixels[:, 0] = (number % 251).to(torch.uint8)[:, None, None]
    pixels[:, 1] = (number // 251).to(torch.uint8)[:, None, None]
    return ImageSplit(pixels, number % classes)


def numbers(pixels: Tensor) -> list[int]:
    found = pixels[:, 0, 0, 0].long() + 251 * pixels[:, 1, 0, 0].long()
    return found.tolist()


@given(count=st.integers(20, 600), classes=st.integers(2, 5), share=st.floats(0.05, 0.7))
def test_holdout_is_a_part_of_the_training_set(count: int, classes: int, share: float) -> None:
    held = max(1, round(share * count))
    split = numbered(count, classes)
    data = data_of(split, holdout=held)
    kept, apart = numbers(data.train_images), numbers(data.holdout_images)
    assert len(apart) == len(data.holdout_labels) == held
    assert sorted(kept + apart) == list(range(count))
    assert data.holdout_labels.tolist() == [n % classes for n in apart]
    shares = data.holdout_labels.bincount(minlength=classes) / split.labels.bincount()
    assert (shares - held / count).abs().max() <= 1 / (count // classes)
    assert numbers(data_of(split, holdout=held, seed=9).holdout_images) == apart
    assert len(data.validation_labels) == held
    assert sum(len(batch.targets) for batch in data.val_dataloader()) == held
    assert sum(len(batch.targets) for batch in data.test_dataloader()) == count


def test_holdout_that_leaves_nothing() -> None:
    with pytest.raises(DataError, match="has 20 training images; 20 cannot be held out"):
        data_of(numbered(20), holdout=20)
    with pytest.raises(DataError, match=r"with 18 held out, class 'apple' has none left"):
        data_of(numbered(20), holdout=18)


@pytest.mark.parametrize(
    ("counts", "held"),
    [((30, 2), (5, 1)), ((2, 30), (1, 5)), ((100, 3, 1), (20, 1, 0)), ((1, 3), (0, 2))],
)
def test_each_class_of_a_folder_is_measured(
    tmp_path: Path, counts: tuple[int, ...], held: tuple[int, ...]
) -> None:
    """Of each class that has two pictures; of one alone none, since it is to be learned."""
    for name, count in zip("abc", counts, strict=False):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (2, 2)).save(tmp_path / name / f"{index}.png")
    data = ImageDataModule(path=str(tmp_path), size=(2, 2))
    assert data.test_labels.bincount(minlength=len(counts)).tolist() == list(held)
    kept = [count - apart for count, apart in zip(counts, held, strict=True)]
    assert data.train_labels.bincount(minlength=len(counts)).tolist() == kept


def test_a_class_that_would_be_lost_is_named(tmp_path: Path) -> None:
    for name, count in (("ants", 30), ("bees", 2)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (2, 2)).save(tmp_path / name / f"{index}.png")
    with pytest.raises(DataError, match=r"with 29 held out, class 'bees' has none left\.$"):
        ImageDataModule(path=str(tmp_path), size=(2, 2), test_fraction=0.9).setup()


# --- batches --------------------------------------------------------------------------------------

PLAIN = ImagePreprocessing(
    size=(32, 32),
    channels=3,
    mean=(0.0,) * 3,
    std=(1 / 255,) * 3,
    classes=("a", "b", "c", "d", "e"),
)
"""Normalises bytes to themselves."""


def test_an_epoch_visits_each_image_once() -> None:
    data = data_of(numbered(100), batch_size=10)
    data.preprocessing = PLAIN
    loader = data.train_dataloader()
    seen = [numbers(batch.images.round()) for batch in loader]
    assert [len(batch) for batch in seen] == [10] * 10
    assert sorted(itertools.chain(*seen)) == list(range(100))
    assert seen == [numbers(batch.images.round()) for batch in loader], "the epoch is the same"
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert seen != [numbers(batch.images.round()) for batch in loader]
    assert seen != [
        numbers(b.images.round())
        for b in data_of(numbered(100), batch_size=10, seed=1).train_dataloader()
    ]


def test_the_incomplete_last_batch_is_dropped_and_a_small_set_is_one_batch() -> None:
    assert [len(b.targets) for b in data_of(numbered(25), batch_size=10).train_dataloader()] == [
        10,
        10,
    ]
    assert [len(b.targets) for b in data_of(numbered(25), batch_size=99).train_dataloader()] == [25]


@given(total=st.integers(1, 40), world_size=st.integers(1, 5), batch=st.integers(1, 7))
def test_processes_evaluate_each_image_once_in_as_many_batches(
    total: int, world_size: int, batch: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_EVALUATION_BATCH", batch)
        parts = [
            images._EvaluationBatches(numbered(total), PLAIN, rank, world_size)
            for rank in range(world_size)
        ]
    assert len({len(part) for part in parts}) == 1
    seen = [n for part in parts for i in range(len(part)) for n in numbers(part[i].images.round())]
    assert sorted(seen) == list(range(total))
    assert max(len(part[i].targets) for part in parts for i in range(len(part))) <= batch


def augmented(
    split: ImageSplit, config: AugmentConfig, part: slice = slice(None), seed: int = 0
) -> augmentation.ImageBatch:
    rows = torch.arange(len(split.labels))
    return augment_batch(*split, rows, config, PLAIN, np.random.default_rng(seed), part)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_see_together_what_one_would(world_size: int) -> None:
    config = AugmentConfig(crop_padding=3, flip=True, cutout=5, mixup=0.4)
    split = ImageSplit(
        torch.from_numpy(pixels_of(12).transpose(0, 3, 1, 2).copy()), torch.arange(12) % 5
    )
    whole = augmented(split, config)
    for rank in range(world_size):
        part = augmented(split, config, slice(rank, None, world_size))
        assert torch.equal(part.images, whole.images[rank::world_size])
        assert torch.equal(part.targets, whole.targets[rank::world_size])


def random_split(count: int, size: tuple[int, int] = (32, 32)) -> ImageSplit:
    pixels = torch.from_numpy(pixels_of(count, size).transpose(0, 3, 1, 2).copy())
    return ImageSplit(pixels, torch.arange(count) % 5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("padding", "size"), [(0, (6, 9)), (2, (6, 9)), (1, (8, 5))])
def test_crops_and_flips_are_those_there_are(
    flip: bool, padding: int, size: tuple[int, int]
) -> None:
    split = random_split(400, size)
    batch = augmented(split, AugmentConfig(crop_padding=padding, flip=flip))
    assert torch.equal(batch.targets, split.labels)
    counts: dict[tuple[int, int, bool], int] = {}
    for source, found in zip(split.images.numpy(), batch.images.round().numpy(), strict=True):
        padded = np.pad(source, ((0, 0), (padding,) * 2, (padding,) * 2))
        fits = [
            (top, left, turned)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for turned in (False, True)
            if np.array_equal(
                padded[:, top : top + size[0], left : left + size[1]][:, :, :: -1 if turned else 1],
                found,
            )
        ]
        assert len(fits) == 1
        counts[fits[0]] = counts.get(fits[0], 0) + 1
    kinds = (2 * padding + 1) ** 2 * (2 if flip else 1)
    assert len(counts) == kinds
    expected = 400 / kinds
    # Six standard deviations of a binomial count.
    assert max(abs(n - expected) for n in counts.values()) <= 6 * expected**0.5


def test_cutout_is_a_square_of_the_mean() -> None:
    split = ImageSplit(torch.full((500, 3, 9, 12), 200, dtype=torch.uint8), torch.arange(500) % 5)
    batch = augmented(split, AugmentConfig(cutout=4))
    centres = set()
    for image in batch.images:
        hole = image[0] == 0
        assert torch.equal(hole, image[1] == 0)
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert int(hole.sum()) == len(rows) * len(columns) > 0
        assert (rows.diff() == 1).all()
        assert (columns.diff() == 1).all()
        assert 2 <= len(rows) <= 4
        assert 2 <= len(columns) <= 4
        assert (image[~hole.expand_as(image)] > 199).all()
        if len(rows) == len(columns) == 4:
            centres.add((int(rows[0]), int(columns[0])))
    assert centres == set(itertools.product(range(6), range(9)))


@pytest.mark.parametrize("size", [(6, 6), (5, 9)])
def test_an_image_is_turned_about_its_centre(size: tuple[int, int]) -> None:
    """Four right angles on a square; half a turn on any shape."""
    split = random_split(3, size)
    turns = {180.0: 2} if size[0] != size[1] else {90.0: 1, -90.0: 3, 180.0: 2}
    for degrees, quarters in turns.items():
        drawn = np.zeros((4, 3))
        drawn[0] = degrees / 180
        maps = augmentation._affine_maps(drawn, AugmentConfig(rotation=180.0), size[0] / size[1])
        grid = torch.nn.functional.affine_grid(maps, list(split.images.shape), align_corners=False)
        found = torch.nn.functional.grid_sample(split.images.float(), grid, align_corners=False)
        expected = torch.rot90(split.images.float(), quarters, (2, 3))
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_scale_and_shear_move_pixels_as_far_as_they_say() -> None:
    """Where a point of the new image comes from, by hand, in pixels from the centre."""
    height, width = 6, 10
    config = AugmentConfig(rotation=30.0, scale=0.5, shear=0.4)
    drawn = np.array([[0.5], [-1.0], [0.5], [1.0]])  # 15 degrees, 0.5 high, 1.25 wide, 0.4
    cosine, sine = np.cos(np.deg2rad(15.0)), np.sin(np.deg2rad(15.0))
    turn, shear = np.array([[cosine, -sine], [sine, cosine]]), np.array([[1.0, 0.4], [0.0, 1.0]])
    pixels = np.diag([1.25, 0.5]) @ turn @ shear
    (found,) = augmentation._affine_maps(drawn, config, height / width)
    unit = np.diag([width / 2, height / 2])  # from places -1 to 1 to pixels
    np.testing.assert_allclose(unit @ found[:, :2].numpy() @ np.linalg.inv(unit), pixels, rtol=1e-5)
    assert not found[:, 2].any()


def test_affine_maps_differ_from_image_to_image_and_are_shared_by_processes() -> None:
    split = random_split(12, (8, 8))
    config = AugmentConfig(rotation=20.0, scale=0.1, shear=0.1)
    whole = augmented(split, config)
    for rank in range(2):
        part = augmented(split, config, slice(rank, None, 2))
        assert torch.equal(part.images, whole.images[rank::2])
    same = ImageSplit(split.images[:1].expand(12, -1, -1, -1).contiguous(), split.labels)
    found = augmented(same, config).images
    assert len({tuple(image.flatten().tolist()) for image in found}) == 12
    assert float(found.min()) >= -1e-3
    assert float(found.max()) <= 255 + 1e-3


def test_mixup_mixes_images_and_labels_by_one_share() -> None:
    split = random_split(40)
    batch = augmented(split, AugmentConfig(mixup=1.0))
    assert batch.targets.shape == (40, 5)
    assert torch.allclose(batch.targets.sum(1), torch.ones(40))
    plain = split.images.double()
    partners = []
    for index in range(40):
        # The share and the partner are found from the pixels alone.
        fits = []
        for other in range(40):
            direction = plain[other] - plain[index]
            offset = batch.images[index].double() - plain[index]
            size = float(direction.square().sum())
            weight = float((offset * direction).sum()) / size if size else 0.0
            if float((offset - weight * direction).abs().max()) < 1e-3:
                fits.append((other, weight))
        other, weight = next((f for f in fits if f[0] != index), (index, 0.0))
        partners.append(other)
        expected = torch.zeros(5, dtype=torch.double)
        expected[split.labels[index]] += 1 - weight
        expected[split.labels[other]] += weight
        assert torch.allclose(batch.targets[index].double(), expected, atol=1e-4)
    assert sorted(partners) == list(range(40))


def test_nothing_is_augmented_by_default_and_the_set_is_left_alone() -> None:
    split = random_split(30)
    before = split.images.clone()
    assert torch.equal(augmented(split, AugmentConfig()).images.round().byte(), before)
    augmented(split, AugmentConfig(crop_padding=2, flip=True, cutout=3, mixup=0.2))
    augmented(split, AugmentConfig(flip=True))
    assert torch.equal(split.images, before)


def test_normalisation() -> None:
    preprocessing = IMAGE_SETS["cifar100"]
    split = random_split(3)
    mean, std = (np.array(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    expected = (split.images.numpy() / 255 - mean) / std
    found = preprocessing.normalise(split.images)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() < 1e-5
    assert torch.allclose(preprocessing.normalise(split.images / 255), found, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 3)}, "size must be a height and a width in pixels"),
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
        ({"test_fraction": 1.0}, r"test_fraction must be in \(0, 1\)"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"holdout": -1}, "holdout must not be negative"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**options)


@pytest.mark.parametrize("field", ["crop_padding", "cutout", "mixup", "rotation", "scale", "shear"])
def test_augmentation_out_of_range(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must not be negative, got -1"):
        AugmentConfig(**{field: -1})


def test_images_are_not_scaled_to_nothing() -> None:
    with pytest.raises(ValueError, match="scale must be below 1, got 1"):
        AugmentConfig(scale=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (0, 32)}, "size must be at least 1 x 1"),
        ({"mean": (0.5,)}, "mean and std need one value for each of 3 channels, got 1 and 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"classes": ("a",)}, "two or more different names"),
        ({"classes": ("a", "a")}, "two or more different names"),
    ],
)
def test_preprocessing_out_of_range(change: dict[str, Any], message: str) -> None:
    values = {"size": (32, 32), "channels": 3, "mean": (0.5,) * 3, "std": (1.0,) * 3}
    with pytest.raises(ValueError, match=message):
        ImagePreprocessing(**{**values, "classes": ("a", "b"), **change})
