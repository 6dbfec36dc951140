"""Bi-directional spirals with irregular observations, made from a seed, equal on every machine.

After the data of Chen et al. (arXiv:1806.07366), section 5: half of the spirals turn one way and
half the other, each starts at another point, and models see a few noisy observations of a window
and have to go on after it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.sampling import ShuffledBatches

__all__ = ["SPACING", "WINDOW", "SpiralDataModule", "SpiralSet", "make_spirals"]

WINDOW = 100
"""Points of a spiral that observations are chosen from; as many follow and are predicted."""

SPACING = 6 * math.pi / 1000
"""Time, and angle, between points."""

_RADIUS = 0.3
_TURNS = 6 * math.pi
_TRAIN, _TEST = 0, 1


class SpiralSet(NamedTuple):
    """N spirals."""

    truth: Tensor
    """Points without noise, N x 2 WINDOW x 2, float32."""
    values: Tensor
    """Noisy observations in order of time, N x n x 2, float32."""
    chosen: Tensor
    """Which points of the window they are of, N x n, int64, increasing."""

    @property
    def times(self) -> Tensor:
        """Times of the observations, N x n; the first point of the window is at `SPACING`."""
        return (self.chosen + 1) * SPACING


def make_spirals(count: int, observations: int, noise: float, seed: int) -> SpiralSet:
    """Archimedean spirals r = 0.3 angle, within three turns; every other one is mirrored.

    The spirals and their noise do not depend on `observations`.

    Args:
        count: how many.
        observations: points of the window that are observed, at random.
        noise: standard deviation of the noise on each coordinate.
        seed: of everything.
    """
    generator = np.random.default_rng(seed)
    room = _TURNS - (2 * WINDOW - 1) * SPACING
    start = room * generator.random(count)
    angle = start[:, None] + SPACING * np.arange(2 * WINDOW)
    way = np.where(np.arange(count) % 2 == 0, 1.0, -1.0)[:, None]
    truth = _RADIUS * angle[..., None] * np.stack((np.cos(angle), way * np.sin(angle)), -1)
    noisy = truth[:, :WINDOW] + noise * generator.standard_normal((count, WINDOW, 2))
    chosen = np.sort(
        generator.permuted(np.tile(np.arange(WINDOW), (count, 1)), axis=1)[:, :observations]
    )
    values = np.take_along_axis(noisy, chosen[..., None], 1)
    return SpiralSet(
        torch.from_numpy(truth).float(), torch.from_numpy(values).float(), torch.from_numpy(chosen)
    )


class _Batches(Dataset[SpiralSet]):
    """The batches that `ShuffledBatches` asks for."""

    def __init__(self, spirals: SpiralSet) -> None:
        self.spirals = spirals

    def __getitem__(self, step: object) -> SpiralSet:
        rows: Tensor = step.rows  # type: ignore[attr-defined]
        return SpiralSet(*(part[rows] for part in self.spirals))


class SpiralDataModule(pl.LightningDataModule):
    """Spirals to train on and others to measure on; both are always the same.

    Args:
        observations: of each spiral, from 2 to `WINDOW`.
        count: spirals of each of the two sets.
        noise: standard deviation of the noise on each coordinate.
        batch_size: spirals of a training batch.
        data_dir: not used: there are no files.
        seed: of the order of training.

    Raises:
        ValueError: an option is out of range.
    """

    dataset = "spirals"

    def __init__(
        self,
        observations: int = 100,
        count: int = 1000,
        noise: float = 0.3,
        batch_size: int = 250,
        data_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 2 <= observations <= WINDOW:
            raise ValueError(f"observations must be from 2 to {WINDOW}, got {observations}")
        for name, value in (("count", count), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.observations, self.count, self.noise = observations, count, noise
        self.batch_size, self.data_dir, self.seed = batch_size, data_dir, seed

    def setup(self, stage: str | None = None) -> None:
        """Nothing: spirals are made when they are first asked for."""

    @functools.cached_property
    def train(self) -> SpiralSet:
        """What is trained on."""
        return make_spirals(self.count, self.observations, self.noise, _TRAIN)

    @functools.cached_property
    def test(self) -> SpiralSet:
        """What is measured on."""
        return make_spirals(self.count, self.observations, self.noise, _TEST)

    def val_dataloader(self) -> DataLoader[SpiralSet]:
        """The test spirals in batches; they play no part in training, nor in choosing weights."""
        rows = torch.split(torch.arange(self.count), min(self.batch_size, self.count))
        batches = [SpiralSet(*(part[index] for part in self.test)) for index in rows]
        return DataLoader(batches, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[SpiralSet]:
        """Batches of `SpiralSet` in random order."""
        size = min(self.batch_size, self.count)
        sampler: Sampler[object] = ShuffledBatches(self.count, size, self.seed)
        return DataLoader(
            _Batches(self.train), sampler=sampler, batch_size=None, generator=torch.Generator()
        )
