"""Two-dimensional densities for flows, made from a seed, equal on every machine.

Points are a function of the seed alone. Where the true density has a closed form it is given, so
that a flow's log-likelihood can be held against the best there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.errors import UnknownNameError, nearest

__all__ = ["DENSITIES", "DensityBatch", "DensityDataModule", "draw", "true_entropy"]

_Array = NDArray[np.float64]
_TEST_SEED = 1
_TRAINING = 1
_VALIDATED = 1_000


def _moons(n: int, generator: np.random.Generator) -> _Array:
    angle = math.pi * generator.random(n)
    upper = generator.random(n) < 0.5
    x = np.where(upper, np.cos(angle), 1.0 - np.cos(angle))
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
    points: _Array = 2.0 * np.stack((x - 0.5, y - 0.25), 1)
    return points + 0.1 * generator.standard_normal((n, 2))


def _circles(n: int, generator: np.random.Generator) -> _Array:
    angle = 2 * math.pi * generator.random(n)
    radius = np.where(generator.random(n) < 0.5, 2.0, 1.0)
    points: _Array = radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)
    return points + 0.1 * generator.standard_normal((n, 2))


def _eight_gaussians(n: int, generator: np.random.Generator) -> _Array:
    angle = math.pi / 4 * generator.integers(0, 8, n)
    centres = 2.0 * np.stack((np.cos(angle), np.sin(angle)), 1)
    return centres + 0.2 * generator.standard_normal((n, 2))


def _pinwheel(n: int, generator: np.random.Generator) -> _Array:
    arm = 2 * math.pi / 5 * generator.integers(0, 5, n)
    along = 1.2 + 0.4 * generator.standard_normal(n)
    across = 0.1 * generator.standard_normal(n)
    turn = arm + 0.6 * along
    cosine, sine = np.cos(turn), np.sin(turn)
    return np.stack((cosine * along - sine * across, sine * along + cosine * across), 1)


def _checkerboard(n: int, generator: np.random.Generator) -> _Array:
    column = generator.integers(0, 4, n)
    row = 2 * generator.integers(0, 2, n) + column % 2
    corners: _Array = np.stack((column, row), 1) - 2.0
    return corners + generator.random((n, 2))


def _spirals(n: int, generator: np.random.Generator) -> _Array:
    angle = 3 * math.pi * np.sqrt(generator.random(n))
    sign = np.where(generator.random(n) < 0.5, 1.0, -1.0)
    radius = sign * angle / math.pi
    points: _Array = radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)
    return points + 0.1 * generator.standard_normal((n, 2))


DENSITIES: dict[str, Callable[[int, np.random.Generator], _Array]] = {
    "moons": _moons,
    "circles": _circles,
    "eight-gaussians": _eight_gaussians,
    "pinwheel": _pinwheel,
    "checkerboard": _checkerboard,
    "spirals": _spirals,
}
"""How points are drawn, by name; the order is that of a flow's conditions."""


def draw(name: str, n: int, seed: int | tuple[int, ...]) -> Tensor:
    """Points of a density, n x 2 float32.

    Raises:
        UnknownNameError: no density has this name.
    """
    if name not in DENSITIES:
        raise UnknownNameError(
            f"No density {name!r}.{nearest(name, DENSITIES)} There are: {', '.join(DENSITIES)}."
        )
    return torch.from_numpy(DENSITIES[name](n, np.random.default_rng(seed))).float()


def true_entropy(name: str) -> float | None:
    """Entropy of a density in nats, the least a flow's mean negative log-likelihood can be.

    None where it has no closed form. The eight Gaussians are 7.6 standard deviations apart, so
    that their overlap is worth less than 1e-3 nats.
    """
    if name == "checkerboard":
        return math.log(8.0)
    if name == "eight-gaussians":
        return math.log(8.0) + math.log(2 * math.pi * math.e * 0.2**2)
    return None


class DensityBatch(NamedTuple):
    """Points and which density each is from."""

    points: Tensor
    """B x 2."""
    which: Tensor
    """B, an index into `DENSITIES`."""


class _Steps(Sampler[tuple[int, ...]]):
    """Seeds of the batches of an epoch."""

    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.seed, self.epoch = steps, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter([(self.seed, self.epoch, step) for step in range(self.steps)])


class _Drawn(Dataset[DensityBatch]):
    """Draws the batches that `_Steps` asks for."""

    def __init__(self, size: int) -> None:
        self.share = -(-size // len(DENSITIES))

    def __getitem__(self, seed: tuple[int, ...]) -> DensityBatch:
        # numpy fills seeds up with zeros to four numbers, so that of four some would be those of
        # `test_set`; of five, whose last is not zero, none is.
        points = [draw(name, self.share, (*seed, k, _TRAINING)) for k, name in enumerate(DENSITIES)]
        which = torch.arange(len(DENSITIES)).repeat_interleave(self.share)
        return DensityBatch(torch.cat(points), which)


class DensityDataModule(pl.LightningDataModule):
    """All densities together: fresh points for training, fixed ones to measure on.

    Args:
        batch_size: points of a training batch, shared evenly by the densities.
        steps: training batches of an epoch.
        test_points: points of each density that are measured on, always the same.
        data_dir: not used: there are no files.
        seed: of the training points.

    Raises:
        ValueError: an option is out of range.
    """

    dataset = "two-dimensional densities"

    def __init__(
        self,
        batch_size: int = 510,
        steps: int = 500,
        test_points: int = 10_000,
        data_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("steps", steps),
            ("test_points", test_points),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.batch_size, self.steps, self.test_points = batch_size, steps, test_points
        self.data_dir, self.seed = data_dir, seed

    def setup(self, stage: str | None = None) -> None:
        """Nothing: points are drawn when they are asked for."""

    def test_set(self, name: str) -> Tensor:
        """Points of a density to measure on, `test_points` x 2."""
        return draw(name, self.test_points, (_TEST_SEED, list(DENSITIES).index(name)))

    def val_dataloader(self) -> DataLoader[DensityBatch]:
        """Up to 1,000 test points of each density, a batch each."""
        batches = []
        for index, name in enumerate(DENSITIES):
            points = self.test_set(name)[:_VALIDATED]
            batches.append(DensityBatch(points, torch.full((len(points),), index)))
        return DataLoader(batches, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[DensityBatch]:
        """Batches of `DensityBatch`, other ones in each epoch."""
        return DataLoader(
            _Drawn(self.batch_size),
            sampler=_Steps(self.steps, self.seed),
            batch_size=None,
            generator=torch.Generator(),
        )
