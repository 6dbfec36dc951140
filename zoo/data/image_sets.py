"""The image sets that are known by name, each checked by its checksums."""

from __future__ import annotations

import hashlib
import os
import tarfile
from typing import Literal

import torch

from zoo.data.pictures import (
    ImagePreprocessing,
    ImageSplit,
    read_cifar_pickle,
    read_idx,
    read_parquet_images,
)
from zoo.data.sources import cache_dir, locate, locate_first
from zoo.errors import DataError
from zoo.files import partial_path

__all__ = [
    "CIFAR100_COARSE",
    "IMAGE_SETS",
    "Part",
    "read_known",
]

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


def read_known(name: str, part: Part, data_dir: str | os.PathLike[str] | None) -> ImageSplit:
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
