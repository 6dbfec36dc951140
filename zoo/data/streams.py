"""Streams of classes: the order in which samples come, once each, and what is asked of a learner.

A stream cuts a labelled set into batches. No batch and no learner is told where a task ends; the
boundaries here are only where it is measured. Test samples of all classes are scored at once, and
a class that has not come yet counts as an error wherever all classes are asked for.

Definitions, with a[e, c] the share of the test samples of class c that are right at measurement e
(of E), S_e the classes that have begun by then, T_i the classes of task i (of T), measured at its
end, and a[e, i] the mean of a[e, c] over T_i:

    final accuracy         right answers over all test samples, at the last measurement
    anytime accuracy       mean over e of the mean of a[e, c] over S_e
    forgetting             mean over i < T of max_e a[e, i] - a[E, i]
    backward transfer      mean over i < T of a[E, i] - a[end of i, i]
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.classification import multiclass_stat_scores

from zoo.data.images import ImageDataModule
from zoo.data.pictures import ImagePreprocessing
from zoo.data.sources import cache_dir
from zoo.errors import DataError
from zoo.files import partial_path
from zoo.progress import track

__all__ = [
    "Stream",
    "StreamBatch",
    "StreamConfig",
    "StreamDataModule",
    "StreamRecord",
    "cached_encodings",
    "kept_encodings",
    "make_stream",
    "stream_loader",
]

_ENCODING_BATCH = 200
_Batch = TypeVar("_Batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How a labelled set becomes a stream.

    Raises:
        ValueError: a value is out of range.
    """

    schedule: Literal["tasks", "gaussian", "shuffled"] = "tasks"
    """tasks: groups of classes one after the other; gaussian: classes rise and fade one after the
    other, each with a bell of half the distance between them (E&E); shuffled: no order."""
    tasks: int = 5
    """Groups of classes; with the other schedules, how often the stream is measured."""
    batch_size: int = 60
    """Samples that come at once; the last batch of a task may be smaller."""

    def __post_init__(self) -> None:
        for field in ("tasks", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")


@dataclasses.dataclass(frozen=True)
class Stream:
    """An order of samples.

    Attributes:
        order: index of each sample, in the order they come; each of the set once.
        batch_ends: position in `order` after each batch.
        task_ends: number of batches after which each task has ended.
        task_classes: classes of each task; all of them, where tasks are no groups of classes.
    """

    order: Tensor
    batch_ends: tuple[int, ...]
    task_ends: tuple[int, ...]
    task_classes: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.batch_ends)

    def __iter__(self) -> Iterator[Tensor]:
        """Indices of the samples of each batch."""
        start = 0
        for end in self.batch_ends:
            yield self.order[start:end]
            start = end


def make_stream(labels: Tensor, config: StreamConfig, seed: int = 0) -> Stream:
    """The order of a stream, a function of the arguments alone.

    Args:
        labels: class of each sample, N integers.
        config: schedule and batches.
        seed: of the order of classes and of the samples in a class.

    Raises:
        DataError: there are no samples, or fewer samples or classes than tasks.
    """
    classes = torch.unique(labels)
    if len(labels) == 0:
        raise DataError("The set has no samples to make a stream of.")
    if config.schedule == "tasks" and len(classes) < config.tasks:
        raise DataError(
            f"The set has {len(classes)} classes, too few for {config.tasks} tasks of at least one."
        )
    if len(labels) < config.tasks:
        raise DataError(
            f"The set has {len(labels)} samples, too few for {config.tasks} tasks of at least one."
        )
    generator = torch.Generator().manual_seed(seed)
    rank = torch.empty(int(classes.max()) + 1, dtype=torch.int64)
    shuffled = classes[torch.randperm(len(classes), generator=generator)]
    rank[shuffled] = torch.arange(len(classes))
    position = rank[labels]
    everything = tuple(tuple(classes.tolist()) for _ in range(config.tasks))
    if config.schedule == "tasks":
        task = position * config.tasks // len(classes)
        # A random order within the task: keys in [0, 1) do not reach the next one.
        time = task + torch.rand(len(labels), generator=generator, dtype=torch.float64)
        order = time.argsort(stable=True)
        groups = torch.arange(len(classes)) * config.tasks // len(classes)
        members = tuple(tuple(shuffled[groups == t].tolist()) for t in range(config.tasks))
        sizes = torch.bincount(task, minlength=config.tasks).tolist()
        return _cut(order, sizes, config.batch_size, members)
    if config.schedule == "gaussian":
        noise = torch.randn(len(labels), generator=generator, dtype=torch.float64)
        order = (position + 0.5 * noise).argsort(stable=True)
    else:
        order = torch.randperm(len(labels), generator=generator)
    ends = [round((t + 1) * len(labels) / config.tasks) for t in range(config.tasks)]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return _cut(order, sizes, config.batch_size, everything)


def _cut(
    order: Tensor, sizes: list[int], batch_size: int, classes: tuple[tuple[int, ...], ...]
) -> Stream:
    batch_ends: list[int] = []
    task_ends, start = [], 0
    for size in sizes:
        batch_ends += range(start + batch_size, start + size, batch_size)
        batch_ends += [start + size] if size else []
        task_ends.append(len(batch_ends))
        start += size
    return Stream(order, tuple(batch_ends), tuple(task_ends), classes)


class StreamRecord:
    """Accuracies of each class over a stream, and the measures made of them.

    Args:
        num_classes: classes C of the test set.
        task_classes: classes of each task, as in `Stream`.
    """

    def __init__(self, num_classes: int, task_classes: tuple[tuple[int, ...], ...]) -> None:
        self.num_classes, self.task_classes = num_classes, task_classes
        self._right: list[Tensor] = []
        self._totals: list[Tensor] = []
        self._seen: list[Tensor] = []
        self._tasks: list[int | None] = []

    def add(
        self, predictions: Tensor, labels: Tensor, seen: Tensor, ended: int | None = None
    ) -> None:
        """Add a measurement.

        Args:
            predictions, labels: class of each test sample, predicted and true.
            seen: which classes have begun, C booleans.
            ended: index of the task that has just ended, if one has.
        """
        stats = multiclass_stat_scores(predictions, labels, self.num_classes, average=None)
        self._right.append(stats[:, 0])
        self._totals.append(stats[:, 4])
        self._seen.append(seen)
        self._tasks.append(ended)

    @property
    def per_class(self) -> Tensor:
        """a[e, c], E x C; NaN for classes without test samples."""
        return torch.stack(self._right).double() / torch.stack(self._totals)

    @property
    def per_task(self) -> Tensor:
        """a[e, i], E x T."""
        return torch.stack([self.per_class[:, list(c)].nanmean(1) for c in self.task_classes], 1)

    @property
    def final_accuracy(self) -> float:
        """Share of all test samples that are right at the end."""
        return float(self._right[-1].sum() / self._totals[-1].sum())

    @property
    def anytime_accuracy(self) -> float:
        """Mean over measurements of the mean accuracy of the classes seen by then."""
        seen = torch.stack(self._seen)
        return float(self.per_class.where(seen, torch.nan).nanmean(1).mean())

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy minus the last one."""
        earlier = self.per_task[:, :-1]
        return float((earlier.amax(0) - earlier[-1]).mean()) if earlier.shape[1] else 0.0

    @property
    def backward_transfer(self) -> float:
        """Mean over all tasks but the last of the last accuracy minus that at the task's end."""
        tasks, rows = self.per_task, {t: e for e, t in enumerate(self._tasks) if t is not None}
        count = tasks.shape[1] - 1
        if count < 1:
            return 0.0
        return float(sum(tasks[-1, i] - tasks[rows[i], i] for i in range(count)) / count)

    def summary(self) -> dict[str, float]:
        """All measures by name."""
        return {
            "final_accuracy": self.final_accuracy,
            "anytime_accuracy": self.anytime_accuracy,
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
        }


class StreamBatch(NamedTuple):
    """The samples that come at once."""

    rows: Tensor
    """Index of each in the training set, B."""
    images: Tensor
    """B x C x H x W uint8."""
    labels: Tensor
    """B int64."""
    ended: int | None
    """Index of the task whose last batch this is; a learner is never told."""


class _StreamBatches(Dataset[_Batch]):
    def __init__(self, stream: Stream, batch: Callable[[Tensor, int | None], _Batch]) -> None:
        self.stream, self.batch = stream, batch
        self.starts = (0, *stream.batch_ends)

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: int) -> _Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = self.stream.order[self.starts[index] : self.starts[index + 1]]
        ends = self.stream.task_ends
        return self.batch(rows, ends.index(index + 1) if index + 1 in ends else None)


def stream_loader(
    stream: Stream, batch: Callable[[Tensor, int | None], _Batch], processes: int
) -> DataLoader[_Batch]:
    """Batches in the order of a stream.

    Args:
        stream: the order.
        batch: makes a batch of the rows of its samples and of the index of the task that it ends.
        processes: how many there are.

    Raises:
        DataError: there are several processes; a stream has one order.
    """
    if processes > 1:
        raise DataError("A stream is learned by one process, set trainer.devices=1.")
    batches = _StreamBatches(stream, batch)
    return DataLoader(batches, batch_size=None, generator=torch.Generator())


class StreamDataModule(ImageDataModule):
    """A stream of labelled images, each once: a known set, or a folder of your own.

    Args:
        dataset, path, size, channels, test_fraction, data_dir: the images, as for
            `ImageDataModule`.
        stream: schedule and batches.
        limit: take only so many training images of each class, the first ones; None: all.
        seed: of the order of classes and of the samples in a class.

    Raises:
        DataError: files are missing, damaged or too few.
        UnknownNameError: no known set has this name.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        dataset: str = "mnist",
        path: str | None = None,
        size: tuple[int, int] = (28, 28),
        channels: Literal[1, 3] = 1,
        test_fraction: float = 0.2,
        stream: StreamConfig = StreamConfig(),
        limit: int | None = None,
        data_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            dataset=dataset,
            path=path,
            size=size,
            channels=channels,
            test_fraction=test_fraction,
            batch_size=stream.batch_size,
            data_dir=data_dir,
            seed=seed,
        )
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 or null, got {limit}")
        self.stream_config, self.limit = stream, limit

    @functools.cached_property
    def preprocessing(self) -> ImagePreprocessing:
        """Size and classes; pixels stay in [0, 1], since encoders normalise by themselves."""
        found = super().preprocessing
        zeros, ones = (0.0,) * found.channels, (1.0,) * found.channels
        return dataclasses.replace(found, mean=zeros, std=ones)

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.preprocessing.classes

    @functools.cached_property
    def rows(self) -> Tensor:
        """Rows of the training set that the stream is made of."""
        labels = self.train_labels
        if self.limit is None:
            return torch.arange(len(labels))
        kept = [(labels == c).nonzero()[: self.limit, 0] for c in torch.unique(labels)]
        return torch.cat(kept).sort().values

    @functools.cached_property
    def stream(self) -> Stream:
        """The order of the training images."""
        stream = make_stream(self.train_labels[self.rows], self.stream_config, self.seed)
        return dataclasses.replace(stream, order=self.rows[stream.order])

    def train_dataloader(self) -> DataLoader[StreamBatch]:  # type: ignore[override]
        """Batches of `StreamBatch` in the order of the stream.

        Raises:
            DataError: there are several processes; a stream has one order.
        """
        images, labels = self.train_images, self.train_labels
        return stream_loader(
            self.stream,
            lambda rows, ended: StreamBatch(rows, images[rows], labels[rows], ended),
            self._process[1],
        )


def cached_encodings(
    images: Tensor, encode: Callable[[Tensor], Tensor], encoder: str, what: str
) -> Tensor:
    """Encodings of a set, computed once and kept in the cache.

    Args:
        images: N x C x H x W uint8.
        encode: B x C x H x W floating point in [0, 1] to B x d.
        encoder: digest of the encoder's configuration and weights.
        what: what the images are, for the progress bar.

    Returns:
        N x d.

    Raises:
        DataError: the cache cannot be written.
    """
    digest = hashlib.sha256(encoder.encode())
    digest.update(images.contiguous().numpy().data)

    def compute() -> Tensor:
        parts = torch.split(images, _ENCODING_BATCH)
        return torch.cat([encode(part / 255) for part in track(parts, f"encoding {what}")])

    return kept_encodings(digest.hexdigest(), compute)


def kept_encodings(digest: str, compute: Callable[[], Tensor]) -> Tensor:
    """Encodings from the cache, computed where it does not have them.

    Args:
        digest: of all that they depend on, in hexadecimal.
        compute: makes them.

    Raises:
        DataError: the cache cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = cache_dir() / "encodings" / f"{digest}.safetensors"
    if path.is_file():
        try:
            return load_file(path)["encodings"]
        except (SafetensorError, KeyError):
            path.unlink()  # it can be made again
    encoded = compute()
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"encodings": encoded}, partial)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"Cannot keep encodings in {path.parent}: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return encoded
