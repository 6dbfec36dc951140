"""Pictures from files: readers of the common layouts, and what a network is told of its input.

Shape notation: N images of a set, B of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import os
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import DataError, nearest
from zoo.files import files_below
from zoo.progress import track

__all__ = [
    "IMAGE_SUFFIXES",
    "ImagePreprocessing",
    "ImageSplit",
    "picture_pixels",
    "read_cifar_pickle",
    "read_idx",
    "read_image",
    "read_image_folder",
    "read_parquet_images",
    "resize",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """What turns a picture into the tensor that a network was trained on, and its output to words.

    Raises:
        ValueError: a value is out of range or does not fit the others.
    """

    size: tuple[int, int]
    """Height and width, pixels."""
    channels: Literal[1, 3]
    """1 for grey, 3 for red, green and blue."""
    mean: tuple[float, ...]
    """Of each channel, on the scale from 0 to 1; is subtracted."""
    std: tuple[float, ...]
    """Of each channel, likewise; is divided by."""
    classes: tuple[str, ...]
    """Name of each class, in the order of the network's outputs."""

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size must be at least 1 x 1, got {list(self.size)}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"mean and std need one value for each of {self.channels} channels, got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be positive, got {list(self.std)}")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be two or more different names")

    def with_numbered_classes(self, count: int) -> ImagePreprocessing:
        """The same images with `count` classes that have numbers for names."""
        names = tuple(f"class {index}" for index in range(count))
        return dataclasses.replace(self, classes=names)

    def normalise(self, images: Tensor) -> Tensor:
        """B x C x H x W uint8 (0 to 255) or float (0 to 1) to normalised float32."""
        unit = 255.0 if images.dtype == torch.uint8 else 1.0
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.to(torch.float32, copy=True).mul_(1.0 / (unit * std)).sub_(mean / std)


class ImageSplit(NamedTuple):
    """The images of a training or a test set."""

    images: Tensor
    """N x C x H x W uint8."""
    labels: Tensor
    """N int64."""


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """A file of unsigned bytes in the IDX format of MNIST, packed by gzip or not.

    Returns:
        A uint8 tensor of the shape that the file's header says.

    Raises:
        DataError: the file is missing, damaged, or of another format.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise DataError(f"No file at {path}.") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"Cannot read {path}: {reason}.") from None
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is no IDX file of unsigned bytes.")
    dimensions = content[3]
    offset = 4 + 4 * dimensions
    if len(content) < offset:
        raise DataError(f"{path} ends within its header.")
    shape = struct.unpack(f">{dimensions}I", content[4:offset])
    if len(content) - offset != math.prod(shape):
        raise DataError(
            f"{path} has {len(content) - offset} values, but its header says "
            f"{' x '.join(map(str, shape))}."
        )
    if not math.prod(shape):
        raise DataError(f"{path} holds no values.")
    return torch.frombuffer(bytearray(content[offset:]), dtype=torch.uint8).view(shape)


def read_parquet_images(
    path: str | os.PathLike[str],
    *,
    image_column: str = "img",
    label_column: str = "fine_label",
) -> ImageSplit:
    """Pictures in a parquet file, in the layout of the Hub: a column of {bytes, path}.

    Args:
        path: the file.
        image_column, label_column: names of its columns.

    Raises:
        DataError: the file is missing, has no such columns, or a picture cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"Cannot read {path}: {str(error).splitlines()[0]}") from None
    with file:
        names = file.schema_arrow.names
        for column in (image_column, label_column):
            if column not in names:
                raise DataError(
                    f"{path} has no column {column!r}.{nearest(column, names)}"
                    f" There are: {', '.join(names)}."
                )
        images: list[NDArray[np.uint8]] = []
        labels: list[int] = []
        batches = file.iter_batches(batch_size=250, columns=[image_column, label_column])
        total = -(-file.metadata.num_rows // 250)
        for batch in track(batches, f"decoding {Path(path).name}", total):
            rows = batch.to_pydict()
            for number, row in enumerate(rows[image_column], start=len(images)):
                images.append(_decode(io.BytesIO(row["bytes"]), f"{path}, row {number}"))
            labels += rows[label_column]
    return ImageSplit(_stack(images, str(path)), torch.tensor(labels, dtype=torch.int64))


class _PlainUnpickler(pickle.Unpickler):
    """Builds nothing but the containers, bytes and arrays that CIFAR's files are made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_cifar_pickle(file: BinaryIO, where: str) -> ImageSplit:
    """Images of one file of the official CIFAR-100 archive, whose format is a pickle.

    Nothing but arrays, bytes and containers is ever built of it.

    Args:
        file: the opened file.
        where: its name, for messages.

    Raises:
        DataError: the file asks for anything else, or is not such a file.
    """
    try:
        content = _PlainUnpickler(file, encoding="bytes").load()
        pixels, labels = content[b"data"], content[b"fine_labels"]
        images = torch.from_numpy(np.array(pixels, dtype=np.uint8)).view(-1, 3, 32, 32)
        split = ImageSplit(images, torch.tensor(labels, dtype=torch.int64))
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{where} is no file of CIFAR-100: {error}.") from None
    if len(split.images) != len(split.labels):
        raise DataError(f"{where} has {len(split.images)} images and {len(split.labels)} labels.")
    return split


def read_image(path: str | os.PathLike[str], channels: int = 3) -> Tensor:
    """One picture in a file of any common format, C x H x W uint8; see `picture_pixels`.

    Raises:
        DataError: the file is missing, is no picture, or has values of 32 bits or other colours
            than can be converted.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            pixels = _decode(file, str(path), channels)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"No picture at {path}.") from None
        raise DataError(f"Cannot read the picture {path}: {error.strerror or error}.") from None
    except ValueError as error:  # as of a path with a null byte
        raise DataError(f"{str(path)!r} is no path of a picture: {error}.") from None
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _decode(file: Any, where: str, channels: int = 3) -> NDArray[np.uint8]:
    """Pixels of a picture, H x W x C."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture_pixels(picture, where, channels)
    except DataError:
        raise
    except Exception as error:  # the decoders of the many formats raise many kinds
        reason = "it is damaged" if "identify" not in str(error) else "it is no picture"
        raise DataError(f"Cannot read the picture {where}: {reason}.") from None


_TOO_DEEP = "32-bit values"


def picture_pixels(picture: Any, where: str, channels: int) -> NDArray[np.uint8]:
    """Pixels of a PIL image as it is looked at, H x W x C: the right way up, and of 8 bits.

    What is transparent is seen on white, so that colours that nobody sees do not count.

    Args:
        picture: the image.
        where: what it is, for messages.
        channels: 1 for grey, 3 for colour.

    Raises:
        DataError: it has no pixels, colours that cannot be converted, or values of 32 bits, of
            which nobody knows what is white.
    """
    from PIL import Image, ImageOps

    mode = picture.mode
    if 0 in picture.size:
        raise DataError(f"The picture {where} is {picture.width} x {picture.height}: no pixels.")
    # Pillow opens PNM files of 16 bits as "I", and did so with PNG before version 11.
    sixteen = mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM"))
    if mode in ("I", "F") and not sixteen:
        raise DataError(f"The picture {where} has {_TOO_DEEP}; save it with 8 bits.")
    try:
        upright = ImageOps.exif_transpose(picture)
    except Exception:  # a damaged note on how the camera was held; the pixels may be fine
        upright = picture
    if sixteen:
        # Pillow itself would clip: nearly everything is above 255.
        values = np.asarray(upright).astype(np.int64)
        grey = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], channels, axis=2)
    wanted = "L" if channels == 1 else "RGB"
    try:
        if mode == "LAB":  # which Pillow brings to no other colours
            upright = upright.convert("RGB")
        if upright.has_transparency_data:
            seen = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        pixels: NDArray[np.uint8] = np.asarray(upright.convert(wanted))
    except ValueError as error:  # as of one that was closed
        raise DataError(
            f"The picture {where} cannot be read as {wanted}: {error}; give one of mode {wanted}."
        ) from None
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _stack(images: Sequence[NDArray[np.uint8]], where: str) -> Tensor:
    sizes = {image.shape for image in images}
    if len(sizes) != 1:
        found = "no pictures" if not sizes else f"pictures of {len(sizes)} sizes"
        raise DataError(f"{where} has {found}; all must be of one size.")
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


IMAGE_SUFFIXES = frozenset(
    (
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe"),
        *(".jpeg", ".jpg", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga"),
        *(".tif", ".tiff", ".webp", ".xbm"),
    )
)
"""Of files that are taken for pictures, in lower case."""


def read_image_folder(
    path: str | os.PathLike[str], size: tuple[int, int], channels: int = 3
) -> tuple[ImageSplit, tuple[str, ...]]:
    """A folder that has one folder of pictures for each class.

    Args:
        path: the folder.
        size: height and width that each picture is resized to (bilinear, antialiased).
        channels: 1 for grey, 3 for colour.

    Returns:
        The images, and the names of the classes in alphabetical order. Files and folders whose
        names begin with a dot are none; links to folders are followed.

    Raises:
        DataError: there is no such folder, fewer than two classes, a class without pictures, or a
            picture that cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise DataError(f"There is no folder {path}.")
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        found = "no folders" if not classes else f"one folder, {classes[0]!r}"
        raise DataError(
            f"{path} has {found}; it needs one folder of pictures for each of two or more classes."
        )
    # As `zoo.files.digest` goes through them, so that no picture is read that it does not cover.
    files: dict[str, list[Path]] = {name: [] for name in classes}
    for file in files_below(path, IMAGE_SUFFIXES):
        files.get(file.relative_to(path).parts[0], []).append(file)
    for name, of_class in files.items():
        if not of_class:
            raise DataError(f"The class folder {path / name} has no pictures.")
    counts = torch.tensor([len(of_class) for of_class in files.values()])
    labels = torch.repeat_interleave(torch.arange(len(classes)), counts)
    paths = [file for of_class in files.values() for file in of_class]
    images = torch.empty(len(paths), channels, *size, dtype=torch.uint8)
    unreadable, too_deep = [], False
    for index, file in enumerate(track(paths, "reading pictures")):
        try:
            images[index] = resize(read_image(file, channels), size)
        except DataError as error:
            unreadable.append(str(file))
            too_deep |= _TOO_DEEP in str(error)
    if unreadable:
        more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise DataError(
            f"{len(unreadable)} of {len(paths)} pictures cannot be read: "
            f"{', '.join(unreadable[:5])}{more}."
            f"{f' Some have {_TOO_DEEP}; save them with 8 bits.' if too_deep else ''}"
        )
    return ImageSplit(images, labels), tuple(classes)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """C x h x w to C x H x W (bilinear, antialiased); the type stays."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    resized = F.interpolate(
        image[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )[0]
    return resized.round().clamp(0, 255).to(torch.uint8) if image.dtype == torch.uint8 else resized
