"""Images that encoders are trained on, none of which is ever in the stream they encode."""

from __future__ import annotations

import functools
import io
import os
import zipfile
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.augmentation import AugmentConfig
from zoo.data.images import ImageDataModule
from zoo.data.pictures import ImagePreprocessing, ImageSplit
from zoo.data.sources import locate
from zoo.errors import DataError

__all__ = ["EncoderImages", "grey", "read_omniglot"]

_SIZE = 28
_TEST_SHARE = 10
"""One of so many Omniglot images is tested on."""


def read_omniglot(path: str | os.PathLike[str]) -> ImageSplit:
    """Characters in a zip archive of Omniglot, read where they are; nothing is extracted.

    Returns:
        Images N x 1 x 28 x 28 uint8, bright strokes on black; labels are characters in the
        alphabetical order of their folders.

    Raises:
        DataError: the file is missing or is no such archive.
    """
    from PIL import Image

    images, folders = [], []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
                with Image.open(io.BytesIO(archive.read(name))) as picture:
                    small = picture.convert("L").resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
                images.append(255 - np.asarray(small))
                folders.append(os.path.dirname(name))  # noqa: PTH120  a name in an archive
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"Cannot read Omniglot from {path}: {error}.") from None
    if not images:
        raise DataError(f"{path} holds no pictures.")
    label = {folder: index for index, folder in enumerate(sorted(set(folders)))}
    return ImageSplit(
        torch.from_numpy(np.stack(images))[:, None],
        torch.tensor([label[folder] for folder in folders]),
    )


def grey(images: Tensor) -> Tensor:
    """Brightness (ITU-R BT.601) of N x 3 x H x W uint8 at 28 x 28, N x 1 x 28 x 28 uint8."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    brightness = (images.float() * weights).sum(1, keepdim=True)
    small = F.interpolate(
        brightness, (_SIZE, _SIZE), mode="bilinear", antialias=True, align_corners=False
    )
    return small.round().clamp(0, 255).to(torch.uint8)


class EncoderImages(ImageDataModule):
    """Grey images of 28 x 28: characters of Omniglot, or the pictures of CIFAR-100.

    Args:
        dataset: which of them.
        batch_size, augment, data_dir, seed: as for `ImageDataModule`.
    """

    def __init__(
        self,
        dataset: Literal["omniglot", "cifar100-grey"] = "omniglot",
        batch_size: int = 48,
        augment: AugmentConfig = AugmentConfig(),
        data_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            dataset="cifar100", batch_size=batch_size, augment=augment, data_dir=data_dir, seed=seed
        )
        self.dataset = dataset

    @functools.cached_property
    def preprocessing(self) -> ImagePreprocessing:
        """Pixels stay in [0, 1]."""
        return ImagePreprocessing(
            size=(_SIZE, _SIZE), channels=1, mean=(0.0,), std=(1.0,), classes=self._parts[2]
        )

    @functools.cached_property
    def _parts(self) -> tuple[ImageSplit, ImageSplit, tuple[str, ...]]:
        """Training set, test set and names of the classes."""
        if self.dataset == "omniglot":
            first, second = (
                read_omniglot(locate(f"omniglot-small-{part}", self.data_dir)) for part in (1, 2)
            )
            labels = torch.cat((first.labels, second.labels + int(first.labels.max()) + 1))
            images = torch.cat((first.images, second.images))
            test = torch.arange(len(labels)) % _TEST_SHARE == 0
            names = tuple(f"character {i}" for i in range(int(labels.max()) + 1))
            return (
                ImageSplit(images[~test], labels[~test]),
                ImageSplit(images[test], labels[test]),
                names,
            )
        colour = ImageDataModule(dataset="cifar100", data_dir=self.data_dir)
        return (
            ImageSplit(_all_grey(colour.train_images), colour.train_labels),
            ImageSplit(_all_grey(colour.test_images), colour.test_labels),
            colour.preprocessing.classes,
        )

    @functools.cached_property
    def _train(self) -> tuple[ImageSplit, ImageSplit | None]:
        return self._parts[0], None

    @functools.cached_property
    def _test(self) -> ImageSplit:
        return self._parts[1]


def _all_grey(images: Tensor) -> Tensor:
    return torch.cat([grey(part) for part in torch.split(images, 1000)])
