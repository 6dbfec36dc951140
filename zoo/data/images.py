"""Image sets as one uint8 tensor per split, augmented and normalised in batches.

Shape notation: N images of a set, B of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.augmentation import AugmentConfig, ImageBatch, augment_batch
from zoo.data.image_sets import IMAGE_SETS, read_known
from zoo.data.pictures import IMAGE_SUFFIXES, ImagePreprocessing, ImageSplit, read_image_folder
from zoo.data.sampling import ShuffledBatches, Step, evenly_spread, set_apart
from zoo.errors import DataError, UnknownNameError, nearest

__all__ = [
    "ImageDataModule",
    "class_roots",
]

_EVALUATION_BATCH = 500


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

    def __getitem__(self, step: Step) -> ImageBatch:
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
            split = read_known(self.dataset, "train", self.data_dir)
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
            return read_known(self.dataset, "test", self.data_dir)
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


def class_roots(path: str | os.PathLike[str]) -> list[Path]:
    """The folders in a folder of pictures whose folders are classes: itself, or two parts of it.

    Raises:
        DataError: only one of the two is there.
    """
    root = Path(path).expanduser()
    parts = _parts_of(root)
    return [root] if parts is None else [root / part for part in parts]


def _has_classes(folder: Path) -> bool:
    """Whether there are folders rather than pictures in a folder."""
    inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
    pictures = any(p.suffix.lower() in IMAGE_SUFFIXES for p in inside if p.is_file())
    return not pictures and any(p.is_dir() for p in inside)


def _loader(
    batches: Dataset[ImageBatch], sampler: Sampler[Step] | None = None
) -> DataLoader[ImageBatch]:
    # A loader draws a number whenever it is started. From the global source that would shift the
    # dropout of a resumed run, which starts its loaders at other moments.
    return DataLoader(batches, sampler=sampler, batch_size=None, generator=torch.Generator())


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
