"""Which samples of a set are taken, and in which order: batches, shares, parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from zoo.errors import DataError

__all__ = [
    "ShuffledBatches",
    "Step",
    "evenly_spread",
    "set_apart",
]

_SPLIT_SEED = 20_250_101
"""Of what is held out: the same images whatever the seed of the training."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A training batch: its images, and the seed of what happens to them."""

    rows: Tensor
    seed: tuple[int, ...]


class ShuffledBatches(Sampler[Step]):
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

    def __iter__(self) -> Iterator[Step]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = torch.from_numpy(generator.permutation(self.length))
        for step in range(len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield Step(rows, (self.seed, self.epoch, step))


def evenly_spread(count: int, total: int) -> list[int]:
    """So many of `total` positions from first to last, as evenly as can be; all, where they are
    fewer. Of a folder, which is read class by class, they are of all classes."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


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
