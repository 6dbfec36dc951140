"""Image sets as one uint8 tensor per split, augmented and normalised in batches.

Shape notation: N images of a set, B of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import math
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.sources import cache_dir, locate, locate_first
from zoo.errors import DataError, UnknownNameError, nearest
from zoo.files import is_hidden, partial_path
from zoo.progress import track

__all__ = [
    "CIFAR100_COARSE",
    "IMAGE_SETS",
    "IMAGE_SUFFIXES",
    "AugmentConfig",
    "ImageBatch",
    "ImageDataModule",
    "ImagePreprocessing",
    "ImageSplit",
    "augment_batch",
    "evenly_spread",
    "picture_pixels",
    "read_cifar_pickle",
    "read_idx",
    "read_image",
    "read_image_folder",
    "read_parquet_images",
    "set_apart",
]

_EVALUATION_BATCH = 500
_SPLIT_SEED = 20_250_101
"""Of what is held out: the same images whatever the seed of the training."""


# --- what a model is told about its input ---------------------------------------------------------


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


# --- readers --------------------------------------------------------------------------------------


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
        names begin with a dot are none.

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
    files = [_pictures(path / name) for name in classes]
    for name, of_class in zip(classes, files, strict=True):
        if not of_class:
            raise DataError(f"The class folder {path / name} has no pictures.")
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([*map(len, files)]))
    paths = [file for of_class in files for file in of_class]
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


def _pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and those below it, in order; no hidden ones."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    return sorted(p for p in found if not is_hidden(p, folder))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """C x h x w to C x H x W (bilinear, antialiased); the type stays."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    resized = F.interpolate(
        image[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )[0]
    return resized.round().clamp(0, 255).to(torch.uint8) if image.dtype == torch.uint8 else resized


# --- the known sets -------------------------------------------------------------------------------

Part = Literal["train", "test"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_DIGITS = tuple("0123456789")
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR100 = _words(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """
)
_CIFAR100_GROUPS = _words(
    """
    aquatic_mammals fish flowers food_containers fruit_and_vegetables
    household_electrical_devices household_furniture insects large_carnivores
    large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
    medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1
    vehicles_2
    """
)
CIFAR100_COARSE = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15),
    *(3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4),
    *(2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13),
    *(16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)
"""Fine class of CIFAR-100 -> coarse class."""

_CIFAR100_DIGESTS: dict[Part, str] = {
    "train": "0019cde32919086eb09f4956e3e41e2ad1c7859b38722374bacbae2cd90bddbb",
    "test": "ad55d351338f44cb7af75defa4d2b65af311c819d67289b32370f2c4ee5b42e9",
}
"""sha256 over the sorted sha256 of each image with its label; order and encoding do not matter."""


def _small(mean: float, std: float, classes: tuple[str, ...]) -> ImagePreprocessing:
    return ImagePreprocessing(size=(28, 28), channels=1, mean=(mean,), std=(std,), classes=classes)


def _cifar(classes: tuple[str, ...]) -> ImagePreprocessing:
    return ImagePreprocessing(
        size=(32, 32),
        channels=3,
        mean=(0.50707516, 0.48654887, 0.44091784),
        std=(0.26733429, 0.25643846, 0.27615047),
        classes=classes,
    )


IMAGE_SETS: dict[str, ImagePreprocessing] = {
    "mnist": _small(0.13066048, 0.30810781, _DIGITS),
    "fashion-mnist": _small(0.28604060, 0.35302424, _CLOTHES),
    "cifar100": _cifar(_CIFAR100),
    "cifar100-coarse": _cifar(_CIFAR100_GROUPS),
}
"""The known sets by name, with the statistics of their training images."""


def _read_known(name: str, part: Part, data_dir: str | os.PathLike[str] | None) -> ImageSplit:
    if name.startswith("cifar100"):
        split = _read_cifar100(part, data_dir)
        if name == "cifar100-coarse":
            split = ImageSplit(split.images, torch.tensor(CIFAR100_COARSE)[split.labels])
    else:
        images = read_idx(locate(f"{name}-{part}-images", data_dir))
        labels = read_idx(locate(f"{name}-{part}-labels", data_dir))
        split = ImageSplit(images[:, None], labels.long())
    return split


def _read_cifar100(part: Part, data_dir: str | os.PathLike[str] | None) -> ImageSplit:
    """CIFAR-100 from any of its layouts, in one order, decoded once and kept in the cache."""
    from filelock import FileLock
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    digest = _CIFAR100_DIGESTS[part]
    cached = cache_dir() / "decoded" / f"cifar100-{part}-{digest[:16]}.safetensors"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):
            if cached.is_file():
                try:
                    tensors = load_file(cached)
                    return ImageSplit(tensors["images"], tensors["labels"])
                except (SafetensorError, KeyError):
                    cached.unlink()  # it can be made again
            split = _canonical(_decode_cifar100(part, data_dir), digest, f"CIFAR-100 ({part})")
            partial = partial_path(cached)
            try:
                save_file({"images": split.images, "labels": split.labels}, partial)
                partial.replace(cached)
            finally:
                partial.unlink(missing_ok=True)
            return split
    except OSError as error:
        raise DataError(f"Cannot keep decoded images in {cached.parent}: {error}.") from error


def _decode_cifar100(part: Part, data_dir: str | os.PathLike[str] | None) -> ImageSplit:
    layouts = [f"cifar100-{part}-parquet", f"cifar100-{part}-pickle", "cifar100-archive"]
    name, path = locate_first(layouts, data_dir)
    if name == layouts[0]:
        return read_parquet_images(path)
    if name == layouts[1]:
        with path.open("rb") as file:
            return read_cifar_pickle(file, str(path))
    with tarfile.open(path) as archive:  # read in place; nothing is extracted
        member = archive.extractfile(f"cifar-100-python/{part}")
        assert member is not None  # the archive's checksum has been compared
        return read_cifar_pickle(member, f"{path}, {part}")  # type: ignore[arg-type]


def _canonical(split: ImageSplit, digest: str, what: str) -> ImageSplit:
    """The images in the order of their checksums, whatever order they came in.

    Raises:
        DataError: they are not the images of that digest.
    """
    pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
    keys = [
        hashlib.sha256(image.tobytes() + bytes([label])).hexdigest()
        for image, label in zip(pixels, split.labels.tolist(), strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    found = hashlib.sha256("".join(keys[index] for index in order).encode()).hexdigest()
    if found != digest:
        raise DataError(f"The images of {what} have the digest {found}, expected {digest}.")
    index = torch.tensor(order)
    return ImageSplit(split.images[index], split.labels[index])


# --- augmentation ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are changed at random; by default not at all.

    Raises:
        ValueError: a value is out of range.
    """

    crop_padding: int = 0
    """Pixels of black added on each side before a crop of the former size at a random place."""
    flip: bool = False
    """Mirror one image in two, left to right."""
    cutout: int = 0
    """Side of a square at a random place, partly outside perhaps, that is set to the mean."""
    mixup: float = 0.0
    """Images are mixed in pairs, with their labels, by a share from Beta(mixup, mixup)."""
    rotation: float = 0.0
    """Largest angle, in degrees, by which images are turned."""
    scale: float = 0.0
    """Largest relative change of height and of width, each drawn by itself, below 1."""
    shear: float = 0.0
    """Largest shear: pixels to the side per pixel downwards."""

    def __post_init__(self) -> None:
        if not self.scale < 1:
            raise ValueError(f"scale must be below 1, got {self.scale}")
        for name in ("crop_padding", "cutout", "mixup", "rotation", "scale", "shear"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class ImageBatch(NamedTuple):
    """What a network is trained or measured on in one step."""

    images: Tensor
    """B x C x H x W float32, normalised."""
    targets: Tensor
    """B int64 labels; B x K float32 probabilities where images were mixed."""


def augment_batch(
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    config: AugmentConfig,
    preprocessing: ImagePreprocessing,
    generator: np.random.Generator,
    part: slice = slice(None),
) -> ImageBatch:
    """Pick, augment and normalise a batch of a set, all images at once.

    What is drawn depends on the generator and the length of `rows` alone, not on `part`: processes
    that share a batch see together what one process alone would.

    Args:
        images: N x C x H x W uint8.
        labels: N int64.
        rows: which of them, B int64.
        config: what to do.
        preprocessing: statistics to normalise with.
        generator: source of randomness.
        part: the part of the batch that is wanted.
    """
    count, (height, width) = len(rows), images.shape[2:]
    padding = config.crop_padding
    tops, lefts = generator.integers(0, 2 * padding + 1, (2, count))
    flips = torch.from_numpy(generator.random(count) < 0.5)
    holes = torch.from_numpy(generator.random((2, count)))
    partners = torch.from_numpy(generator.permutation(count))
    share = float(generator.beta(config.mixup, config.mixup)) if config.mixup else 1.0
    affine = None
    if config.rotation or config.scale or config.shear:
        affine = _affine_maps(generator.uniform(-1.0, 1.0, (4, count)), config, height / width)

    def picked(which: Tensor) -> Tensor:
        # index_select copies whole images at a time, and so does numpy from views of windows;
        # indexing a tensor by tensors goes pixel by pixel, and takes many times as long.
        batch = images.index_select(0, rows[which])
        if padding:
            padded = F.pad(batch, (padding,) * 4).numpy()
            windows = sliding_window_view(padded, (height, width), axis=(2, 3))
            chosen = windows[np.arange(len(which)), :, tops[which], lefts[which]]
            batch = torch.from_numpy(chosen)
        if config.flip:
            turned = flips[which].nonzero().flatten()
            batch.index_copy_(0, turned, batch.index_select(0, turned).flip(3))
        if affine is not None:
            size = [len(which), *batch.shape[1:]]
            grid = F.affine_grid(affine[which], size, align_corners=False)
            batch = F.grid_sample(batch.float().div_(255), grid, align_corners=False)
        batch = preprocessing.normalise(batch)
        if config.cutout:
            inside = []
            for length, place in ((height, holes[0]), (width, holes[1])):
                start = (place[which] * length).floor() - config.cutout // 2
                at = torch.arange(length) - start[:, None]
                inside.append((at >= 0) & (at < config.cutout))
            batch.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)
        return batch

    mine = torch.arange(count)[part]
    batch, targets = picked(mine), labels[rows[mine]]
    if config.mixup:
        theirs = partners[mine]
        batch.mul_(share).add_(picked(theirs), alpha=1.0 - share)
        mixed = torch.zeros(len(mine), len(preprocessing.classes))
        mixed.scatter_add_(1, targets[:, None], torch.full((len(mine), 1), share))
        partner_targets = labels[rows[theirs]]
        mixed.scatter_add_(1, partner_targets[:, None], torch.full((len(mine), 1), 1.0 - share))
        targets = mixed
    return ImageBatch(batch, targets)


def _affine_maps(drawn: Any, config: AugmentConfig, aspect: float) -> Tensor:
    """Maps from places in the new image to places in the old one, B x 2 x 3, of 4 x B draws.

    Args:
        drawn: numbers from -1 to 1, for the angle, height, width and shear.
        config: how far each may go.
        aspect: height over width; places run from -1 to 1 along both.
    """
    angle, high, wide, shear = torch.from_numpy(drawn).float()
    angle = torch.deg2rad(config.rotation * angle)
    high, wide = 1.0 + config.scale * high, 1.0 + config.scale * wide
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turned = config.shear * shear * cosine - sine
    return torch.stack(
        [
            torch.stack([wide * cosine, aspect * wide * turned, zero], 1),
            torch.stack(
                [high * sine / aspect, high * (config.shear * shear * sine + cosine), zero], 1
            ),
        ],
        1,
    )


# --- batches --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Step:
    """A training batch: its images, and the seed of what happens to them."""

    rows: Tensor
    seed: tuple[int, ...]


class ShuffledBatches(Sampler[_Step]):
    """Batches of a set in random order, the incomplete last one dropped.

    Order and augmentation are a function of (seed, epoch, step) alone, so that a run resumed at an
    epoch boundary goes on as if it had not stopped.

    Args:
        length: images of the set.
        batch_size: images of a batch, over all processes.
        seed: of the order and of the augmentation.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[_Step]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = torch.from_numpy(generator.permutation(self.length))
        for step in range(len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield _Step(rows, (self.seed, self.epoch, step))


class _TrainingBatches(Dataset[ImageBatch]):
    """Makes the batches that `ShuffledBatches` asks for, each process its part of them."""

    def __init__(
        self,
        split: ImageSplit,
        config: AugmentConfig,
        preprocessing: ImagePreprocessing,
        part: slice,
    ) -> None:
        self.split, self.config, self.preprocessing = split, config, preprocessing
        self.part = part

    def __getitem__(self, step: _Step) -> ImageBatch:
        return augment_batch(
            *self.split,
            step.rows,
            self.config,
            self.preprocessing,
            np.random.default_rng(step.seed),
            self.part,
        )


class _EvaluationBatches(Dataset[ImageBatch]):
    """Each image once: process r of w has images r, r + w, ..., all have as many batches."""

    def __init__(
        self, split: ImageSplit, preprocessing: ImagePreprocessing, rank: int, world_size: int
    ) -> None:
        self.split, self.preprocessing = split, preprocessing
        total = len(split.labels)
        batches = math.ceil(math.ceil(total / world_size) / _EVALUATION_BATCH)
        self.rows = torch.arange(rank, total, world_size).tensor_split(batches)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = self.rows[index]
        return ImageBatch(
            self.preprocessing.normalise(self.split.images[rows]), self.split.labels[rows]
        )


class ImageDataModule(pl.LightningDataModule):
    """A set of labelled images: one of the known ones, or a folder of your own.

    A folder has one folder of pictures per class; or two folders, `train` and `test`, that do. In
    place of `test` there may be `val`, `valid` or `validation`; capitals make no difference. Names
    that begin with a dot are passed over. What is transparent is seen on white.

    Args:
        dataset: name of a known set.
        path: a folder of your own; None takes `dataset`.
        size: height and width that pictures of a folder are resized to.
        channels: of a folder's pictures: 1 for grey, 3 for colour.
        test_fraction: of each class of a folder without `test`, that is measured on, in (0, 1); at
            least one picture of each class that has two.
        batch_size: images of a training batch, over all processes.
        augment: how training images are changed at random.
        holdout: training images kept apart, which validation then uses, so that the test set
            plays no part in tuning; 0: none, and validation uses the test set. They are the same
            images whatever the seed, in the proportions of the classes.
        data_dir: folder to look for `dataset` in first.
        seed: of order and augmentation.

    Raises:
        DataError: files are missing, damaged or too few.
        UnknownNameError: no known set has this name.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        dataset: str = "fashion-mnist",
        path: str | None = None,
        size: tuple[int, int] = (32, 32),
        channels: Literal[1, 3] = 3,
        test_fraction: float = 0.2,
        batch_size: int = 128,
        augment: AugmentConfig = AugmentConfig(),
        holdout: int = 0,
        data_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dataset not in IMAGE_SETS:
            raise UnknownNameError(
                f"No image set {dataset!r}.{nearest(dataset, IMAGE_SETS)}"
                f" There are: {', '.join(IMAGE_SETS)}."
            )
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be a height and a width in pixels, got {list(size)}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels!r}")
        if not 0.0 < test_fraction < 1.0:
            raise ValueError(f"test_fraction must be in (0, 1), got {test_fraction}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if holdout < 0:
            raise ValueError(f"holdout must not be negative, got {holdout}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.dataset, self.path, self.data_dir = dataset, path, data_dir
        self.size, self.channels, self.test_fraction = (size[0], size[1]), channels, test_fraction
        self.batch_size, self.augment, self.holdout = batch_size, augment, holdout
        self.seed = seed

    @functools.cached_property
    def preprocessing(self) -> ImagePreprocessing:
        """What a network trained on these images is to be told."""
        if self.path is None:
            return IMAGE_SETS[self.dataset]
        values = self._folder[0].images.double().div_(255)
        return ImagePreprocessing(
            size=self.size,
            channels=self.channels,
            mean=tuple(values.mean((0, 2, 3)).tolist()),
            std=tuple(values.std((0, 2, 3), correction=0).clamp(min=1e-3).tolist()),
            classes=self._folder[2],
        )

    @functools.cached_property
    def _folder(self) -> tuple[ImageSplit, ImageSplit, tuple[str, ...]]:
        """Training set, test set and classes of the user's folder."""
        assert self.path is not None
        root = Path(self.path).expanduser()
        parts = _parts_of(root)
        if parts is not None:
            fit, held = parts
            train, classes = read_image_folder(root / fit, self.size, self.channels)
            test, others = read_image_folder(root / held, self.size, self.channels)
            if others != classes:
                differ = ", ".join(sorted({*classes} ^ {*others}))
                raise DataError(
                    f"Only one of {fit} and {held} in {root} has the classes: {differ}."
                )
            return train, test, classes
        split, classes = read_image_folder(root, self.size, self.channels)
        count = max(round(self.test_fraction * len(split.labels)), len(classes))
        kept, apart = _set_apart(split, count, str(root), classes)
        return kept, apart, classes

    @functools.cached_property
    def _train(self) -> tuple[ImageSplit, ImageSplit | None]:
        """What is trained on, and what is held out of it."""
        if self.path is None:
            split = _read_known(self.dataset, "train", self.data_dir)
        else:
            split = self._folder[0]
        if not self.holdout:
            return split, None
        names = self.preprocessing.classes
        return _set_apart(split, self.holdout, self.path or self.dataset, names)

    def measure_on(self, count: int) -> None:
        """Measure on so many of the test images from now on, evenly spread over the set.

        Args:
            count: how many, at least 1; all of them, where they are fewer.
        """
        images, labels = self._test
        rows = evenly_spread(count, len(labels))
        self.__dict__["_test"] = ImageSplit(images[rows], labels[rows])

    @functools.cached_property
    def _test(self) -> ImageSplit:
        if self.path is None:
            return _read_known(self.dataset, "test", self.data_dir)
        return self._folder[1]

    @property
    def train_images(self) -> Tensor:
        """N x C x H x W uint8, without those held out."""
        return self._train[0].images

    @property
    def train_labels(self) -> Tensor:
        """N int64."""
        return self._train[0].labels

    @property
    def holdout_images(self) -> Tensor:
        """The training images that are held out, `holdout` x C x H x W uint8."""
        return self._train[0].images[:0] if self._train[1] is None else self._train[1].images

    @property
    def holdout_labels(self) -> Tensor:
        """`holdout` int64."""
        return self._train[0].labels[:0] if self._train[1] is None else self._train[1].labels

    @property
    def test_images(self) -> Tensor:
        """N x C x H x W uint8."""
        return self._test.images

    @property
    def test_labels(self) -> Tensor:
        """N int64."""
        return self._test.labels

    @property
    def validation_labels(self) -> Tensor:
        """Those of the images of `val_dataloader`, int64."""
        return (self._train[1] or self._test).labels if self.holdout else self.test_labels

    @property
    def _process(self) -> tuple[int, int]:
        """Number of this process, and how many there are."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs: for "test" and "predict" the test set alone."""
        if stage in (None, "fit"):
            _ = self._train
        _ = self._test

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """Batches of `ImageBatch`; a set smaller than `batch_size` is one batch.

        Raises:
            DataError: the batch cannot be shared evenly by the processes.
        """
        rank, world_size = self._process
        batch_size = min(self.batch_size, len(self.train_labels) // world_size * world_size)
        if batch_size % world_size or not batch_size:
            raise DataError(f"A batch of {batch_size} cannot be shared by {world_size} processes.")
        sampler = ShuffledBatches(len(self.train_labels), batch_size, self.seed)
        batches = _TrainingBatches(
            self._train[0], self.augment, self.preprocessing, slice(rank, None, world_size)
        )
        return _loader(batches, sampler)

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        """Each image that is held out once; of the test set where none is."""
        return self._evaluation((self._train[1] or self._test) if self.holdout else self._test)

    def test_dataloader(self) -> DataLoader[ImageBatch]:
        """Each image of the test set once."""
        return self._evaluation(self._test)

    def _evaluation(self, split: ImageSplit) -> DataLoader[ImageBatch]:
        batches = _EvaluationBatches(split, self.preprocessing, *self._process)
        return _loader(batches)


_TEST_PARTS = ("test", "val", "valid", "validation")


def _parts_of(root: Path) -> tuple[str, str] | None:
    """Names of the folders of training and of test pictures; None where `root` has classes.

    Raises:
        DataError: only one of the two is there.
    """
    listed = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    folders = {name.lower(): name for name in listed if not name.startswith(".")}
    parts = {name: folders[name] for name in ("train", *_TEST_PARTS) if name in folders}
    main = [parts[name] for name in ("train", "test") if name in parts]
    others = len(parts) < len(folders)
    # A class may be called "train", but has pictures, and stands beside other classes.
    if not main or (others and not any(_has_classes(root / name) for name in main)):
        return None
    held = next((parts[name] for name in _TEST_PARTS if name in parts), None)
    if held is None:
        raise DataError(
            f"{root} has 'train' but no 'test'; add {' or '.join(map(repr, _TEST_PARTS))}, or "
            "name a folder in which each folder is a class."
        )
    if "train" not in parts:
        raise DataError(
            f"{root} has 'test' but no 'train'; add it, or name a folder in which each folder is a "
            "class."
        )
    return parts["train"], held


def _has_classes(folder: Path) -> bool:
    """Whether there are folders rather than pictures in a folder."""
    inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
    pictures = any(p.suffix.lower() in IMAGE_SUFFIXES for p in inside if p.is_file())
    return not pictures and any(p.is_dir() for p in inside)


def _loader(
    batches: Dataset[ImageBatch], sampler: Sampler[_Step] | None = None
) -> DataLoader[ImageBatch]:
    # A loader draws a number whenever it is started. From the global source that would shift the
    # dropout of a resumed run, which starts its loaders at other moments.
    return DataLoader(batches, sampler=sampler, batch_size=None, generator=torch.Generator())


def evenly_spread(count: int, total: int) -> list[int]:
    """So many of `total` positions from first to last, as evenly as can be; all, where they are
    fewer. Of a folder, which is read class by class, they are of all classes."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def _set_apart(
    split: ImageSplit, count: int, where: str, names: Sequence[str]
) -> tuple[ImageSplit, ImageSplit]:
    """Two parts of a set, the second of `count` images in the proportions of the classes.

    Raises:
        DataError: a class would be left without a training image.
    """
    parts = set_apart(split.labels, count, where, names=names)
    kept, apart = (ImageSplit(split.images[i], split.labels[i]) for i in parts)
    return kept, apart


def set_apart(
    labels: Tensor,
    count: int,
    where: str,
    *,
    what: str = "images",
    seed: int = _SPLIT_SEED,
    names: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Rows of two parts of a set, the second of `count` samples in the proportions of the classes.

    Where `count` allows, at least one of each class that has two or more is among these, and none
    of a class that has one alone.

    Args:
        labels: class of each sample, integers.
        count: samples of the second part.
        where: what the set is, for messages.
        what: what the samples are, likewise.
        seed: of which samples of a class they are.
        names: of the classes, for messages; none: their numbers.

    Raises:
        DataError: a class would be left without a training sample.
    """
    values = labels.numpy()
    if count >= len(values):
        raise DataError(f"{where} has {len(values)} training {what}; {count} cannot be held out.")
    shuffled = np.random.default_rng(seed).permutation(len(values))
    # The k-th sample of a class of n stands at (k + 1/2) / n; the first `count` in this order are
    # the classes in their proportions.
    place = np.empty(len(values))
    sizes = dict(
        zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True)
    )
    several = sum(size > 1 for size in sizes.values())
    for label, size in sizes.items():
        members = shuffled[values[shuffled] == label]
        place[members] = (np.arange(size) + 0.5) / size if size > 1 else 1.0
        if size > 1 and count >= several:
            place[members[0]] = 0.0
    order = np.lexsort((values, place))
    apart, kept = np.sort(order[:count]), np.sort(order[count:])
    lost = np.setdiff1d(values, values[kept])
    if len(lost):
        name = repr(names[lost[0]]) if len(names) else lost[0]
        raise DataError(
            f"{where} has too few {what}: with {count} held out, class {name} has none left."
        )
    return torch.from_numpy(kept), torch.from_numpy(apart)
