"""Random changes of training images, a whole batch at once.

Shape notation: N images of a set, B of a batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from zoo.data.pictures import ImagePreprocessing

__all__ = [
    "AugmentConfig",
    "ImageBatch",
    "augment_batch",
]


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
