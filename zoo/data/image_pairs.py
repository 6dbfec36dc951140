"""Multi-MNIST and Multi-Fashion-MNIST: two pictures on one canvas, one task for each.

Shape notation: N pictures, B canvases of a batch, S = 36 height and width of a canvas.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.images import ImageDataModule
from zoo.data.pictures import ImagePreprocessing, ImageSplit
from zoo.data.sampling import ShuffledBatches
from zoo.errors import DataError, UnknownNameError, nearest

__all__ = [
    "PAIR_SETS",
    "SHIFT",
    "ImagePairDataModule",
    "PairBatch",
    "compose",
]

PAIR_SETS = {"multi-mnist": "mnist", "multi-fashion-mnist": "fashion-mnist"}
"""Name of a set of pairs -> the set that its pictures are of."""

SHIFT = 8
"""Pixels between the corners of the two pictures."""
_EVALUATION_BATCH = 1000
_PARTNER_SEEDS = {"train": 0, "validation": 1, "test": 2}


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Two pictures on one canvas, their values added where they overlap, without clipping.

    Args:
        first: B x C x H x W uint8 or float, put into the top left corner.
        second: likewise, put into the bottom right corner.

    Returns:
        B x C x (H + 8) x (W + 8) float32 on the scale from 0 to 2.

    Raises:
        DataError: the shapes or types differ.
    """
    if first.shape != second.shape or first.ndim != 4 or first.dtype != second.dtype:
        raise DataError(
            f"compose takes two tensors B x C x H x W of one kind, got {tuple(first.shape)} "
            f"{first.dtype} and {tuple(second.shape)} {second.dtype}."
        )
    batch, channels, height, width = first.shape
    canvas = torch.zeros(batch, channels, height + SHIFT, width + SHIFT, device=first.device)
    canvas[:, :, :height, :width] = first.float()
    canvas[:, :, SHIFT:, SHIFT:] += second.float()
    return canvas.div_(255.0) if first.dtype == torch.uint8 else canvas


class PairBatch(NamedTuple):
    """Canvases and what is on them."""

    images: Tensor
    """B x 1 x S x S float32, normalised."""
    labels: Tensor
    """B x 2 int64: class of the picture in the top left corner, and of the other."""


class _Pairs(Dataset[PairBatch]):
    """Every picture twice in the top left corner, each time with a partner.

    Args:
        split: the pictures.
        preprocessing: statistics of canvases.
        seed: of the partners.
        redraw: draw partners anew for each batch, by its seed.
    """

    def __init__(
        self, split: ImageSplit, preprocessing: ImagePreprocessing, seed: int, redraw: bool = False
    ) -> None:
        self.split, self.preprocessing, self.redraw = split, preprocessing, redraw
        self.count = len(split.labels)
        generator = np.random.default_rng(seed)
        self.partners = torch.from_numpy(generator.integers(0, self.count, 2 * self.count))

    def __len__(self) -> int:
        return 2 * self.count

    def batch(self, rows: Tensor, seed: Sequence[int] | None = None) -> PairBatch:
        """The pairs `rows`, integers below `len(self)`."""
        partners = self.partners[rows]
        if seed is not None and self.redraw:
            drawn = np.random.default_rng(seed).integers(0, self.count, len(rows))
            partners = torch.from_numpy(drawn)
        first = rows % self.count
        images = compose(self.split.images[first], self.split.images[partners])
        labels = torch.stack((self.split.labels[first], self.split.labels[partners]), 1)
        return PairBatch(self.preprocessing.normalise(images), labels)


class _TrainingBatches(Dataset[PairBatch]):
    """Makes the batches that a sampler asks for, each process its part of them."""

    def __init__(self, pairs: _Pairs, part: slice) -> None:
        self.pairs, self.part = pairs, part

    def __getitem__(self, step: object) -> PairBatch:
        rows, seed = step.rows, step.seed  # type: ignore[attr-defined]
        batch = self.pairs.batch(rows, seed)
        return PairBatch(batch.images[self.part], batch.labels[self.part])


class _EvaluationBatches(Dataset[PairBatch]):
    """Each pair once, in order: process r of w has pairs r, r + w, ..."""

    def __init__(self, pairs: _Pairs, rank: int, world_size: int) -> None:
        self.pairs = pairs
        mine = torch.arange(rank, len(pairs), world_size)
        self.rows = torch.split(mine, _EVALUATION_BATCH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PairBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.pairs.batch(self.rows[index])


class ImagePairDataModule(pl.LightningDataModule):
    """Pairs of pictures on canvases of 36 x 36, as in the benchmark with 100,000 training,
    20,000 validation and 20,000 test canvases.

    The training pictures are split 50,000 to 10,000 in the proportions of the classes; each picture
    of a part is in the top left corner twice, with partners from the same part. Two of one class
    may meet.

    Args:
        dataset: name of a set of pairs.
        path: a folder of your own pictures, see `ImageDataModule`; None takes `dataset`.
        size: height and width that pictures of a folder are resized to.
        holdout: training pictures kept for validation.
        redraw: draw the partners of training canvases anew in each epoch; otherwise the 100,000
            canvases stay the same, as in the benchmark.
        batch_size: canvases of a training batch, over all processes.
        data_dir: folder to look for the pictures in first.
        seed: of order and of redrawn partners.

    Raises:
        DataError: files are missing, damaged or too few.
        UnknownNameError: no known set has this name.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        dataset: str = "multi-mnist",
        path: str | None = None,
        size: int = 28,
        holdout: int = 10_000,
        redraw: bool = False,
        batch_size: int = 256,
        data_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dataset not in PAIR_SETS:
            raise UnknownNameError(
                f"No set of pairs {dataset!r}.{nearest(dataset, PAIR_SETS)}"
                f" There are: {', '.join(PAIR_SETS)}."
            )
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if holdout < 1:
            raise ValueError(f"holdout must be at least 1, got {holdout}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.dataset, self.path, self.size = dataset, path, size
        self.holdout, self.redraw = holdout, redraw
        self.batch_size, self.data_dir, self.seed = batch_size, data_dir, seed

    @functools.cached_property
    def pictures(self) -> ImageDataModule:
        """The single pictures."""
        return ImageDataModule(
            PAIR_SETS[self.dataset],
            path=self.path,
            size=(self.size, self.size),
            channels=1,
            holdout=self.holdout,
            data_dir=self.data_dir,
        )

    @functools.cached_property
    def preprocessing(self) -> ImagePreprocessing:
        """What a network trained on these canvases is to be told; one that is trained already puts
        its own here, by which canvases are normalised."""
        single = self.pictures.preprocessing
        # Of the sum of two independent pictures that cover the same share of the canvas.
        share = single.size[0] * single.size[1] / ((single.size[0] + SHIFT) ** 2)
        mean = 2 * share * single.mean[0]
        square = 2 * share * (single.std[0] ** 2 + single.mean[0] ** 2)
        overlap = ((single.size[0] - SHIFT) / (single.size[0] + SHIFT)) ** 2
        square += 2 * overlap * single.mean[0] ** 2
        return ImagePreprocessing(
            size=(single.size[0] + SHIFT, single.size[1] + SHIFT),
            channels=1,
            mean=(round(mean, 4),),
            std=(round((square - mean**2) ** 0.5, 4),),
            classes=single.classes,
        )

    def pairs(self, part: Literal["train", "validation", "test"]) -> _Pairs:
        """The canvases of a part."""
        pictures = self.pictures
        split = {
            "train": lambda: ImageSplit(pictures.train_images, pictures.train_labels),
            "validation": lambda: ImageSplit(pictures.holdout_images, pictures.holdout_labels),
            "test": lambda: ImageSplit(pictures.test_images, pictures.test_labels),
        }[part]()
        redraw = self.redraw and part == "train"
        return _Pairs(split, self.preprocessing, _PARTNER_SEEDS[part], redraw)

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs: for "test" and "predict" the test set alone."""
        self.pictures.setup(stage)

    @property
    def _process(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Batches of `PairBatch` in random order."""
        rank, world_size = self._process
        pairs = self.pairs("train")
        sampler = ShuffledBatches(len(pairs), min(self.batch_size, len(pairs)), self.seed)
        batches = _TrainingBatches(pairs, slice(rank, None, world_size))
        return DataLoader(batches, sampler=sampler, batch_size=None, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader[PairBatch]:
        """Each validation canvas once."""
        batches = _EvaluationBatches(self.pairs("validation"), *self._process)
        return DataLoader(batches, batch_size=None, generator=torch.Generator())

    def test_dataloader(self) -> DataLoader[PairBatch]:
        """Each test canvas once."""
        batches = _EvaluationBatches(self.pairs("test"), *self._process)
        return DataLoader(batches, batch_size=None, generator=torch.Generator())
