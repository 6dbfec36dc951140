"""Text as bytes: parallel streams for training, and every byte counted once for evaluation."""

from __future__ import annotations

import codecs
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.sources import locate
from zoo.errors import DataError, UnknownNameError, nearest

__all__ = ["START", "StreamBatch", "TextDataModule", "decode_bytes", "encode_bytes", "read_text"]

TEXTS = ("tiny-shakespeare",)
"""Names of the known texts, all of them in `zoo.data.sources`."""

START = 10
"""The byte that stands before the first of a text (a line feed), so that the first is predicted."""


_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
"""What texts of two or four bytes to a character begin with."""


def encode_bytes(text: str) -> Tensor:
    """UTF-8 bytes of a text as a one-dimensional uint8 tensor.

    Bytes that Python could not decode, and keeps as U+DC80 to U+DCFF, are those bytes again.

    Raises:
        DataError: the text has another half of a surrogate pair, which has no encoding.
    """
    try:
        content = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError(
            f"Character {error.start} of the text is {text[error.start]!a}, half of a "
            "surrogate pair, which has no bytes."
        ) from None
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def decode_bytes(tokens: Tensor) -> str:
    """Text of bytes; invalid UTF-8 shows as U+FFFD."""
    return bytes(tokens.to(torch.uint8).tolist()).decode("utf-8", "replace")


def read_text(path: str | Path) -> Tensor:
    """Bytes of a text file as a uint8 tensor.

    Any encoding will do in which a character is at least a byte, as UTF-8 and Latin-1.

    Raises:
        DataError: the file is missing, unreadable or empty, or is of UTF-16, UTF-32 or no text.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"No text file at {path}.") from None
    except OSError as error:
        raise DataError(f"Cannot read the text file {path}: {error.strerror}.") from None
    if not content:
        raise DataError(f"The text file {path} is empty.")
    if content.startswith(_WIDE):
        raise DataError(f"The text file {path} is of UTF-16 or UTF-32; save it as UTF-8.")
    if (zero := content.find(0)) >= 0:
        raise DataError(
            f"{path} is no text file of UTF-8 or Latin-1: byte {zero} is zero; save it as UTF-8."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


class StreamBatch(NamedTuple):
    """The next tokens of B streams."""

    tokens: Tensor
    """B x (n + 1) integers: n inputs and the targets one later."""
    reset: Tensor
    """B booleans: the stream forgets what came before."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a batch is made of: where each stream stands, and which of them are reset."""

    starts: Tensor
    reset: Tensor


class StreamSampler(Sampler[_Step]):
    """Cuts a text, rotated by a random offset in each epoch, into streams that run in parallel.

    The order is a function of (seed, epoch) alone, so that a run resumed at an epoch boundary goes
    on as if it had not stopped.

    Args:
        length: bytes of the text.
        streams: streams in parallel, over all processes.
        step: tokens each stream advances in a batch.
        reset_probability: chance that a stream forgets its past before a batch.
        seed: of the offsets and resets.
        rank, world_size: this process takes every `world_size`-th stream.
    """

    def __init__(
        self,
        length: int,
        streams: int,
        step: int,
        reset_probability: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length, self.streams, self.step = length, streams, step
        self.reset_probability, self.seed, self.epoch = reset_probability, seed, 0
        self.rows = slice(rank, None, world_size)
        self.steps = length // streams // step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[_Step]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        offset = int(torch.randint(self.length, (), generator=generator))
        heads = offset + torch.arange(self.streams) * self.length // self.streams
        for index in range(self.steps):
            reset = torch.rand(self.streams, generator=generator) < self.reset_probability
            if index == 0:
                reset = torch.ones_like(reset)
            yield _Step((heads + index * self.step)[self.rows], reset[self.rows])


class _Streams(Dataset[StreamBatch]):
    """Reads the batches that `StreamSampler` asks for out of one tensor, around its end."""

    def __init__(self, text: Tensor, step: int) -> None:
        self.text = torch.cat((text, text[: step + 1]))  # so that no batch wraps around
        self.length, self.window = len(text), torch.arange(step + 1)

    def __getitem__(self, step: _Step) -> StreamBatch:
        index = step.starts[:, None] % self.length + self.window
        return StreamBatch(self.text[index].long(), step.reset)


class _Blocks(Dataset[StreamBatch]):
    """Independent blocks of a text, without memory: the last one may be shorter.

    Of several processes, which must all have as many batches, each takes every `world_size`-th; the
    last one may be empty.
    """

    def __init__(
        self, text: Tensor, block: int, batch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.text, self.block, self.batch = text, block, batch
        self.rank, self.world_size = rank, world_size
        self.full = (len(text) - 1) // block

    @property
    def _batches(self) -> int:
        """Of all processes together."""
        rest = (len(self.text) - 1) % self.block
        return -(-self.full // self.batch) + int(rest > 0)

    def __len__(self) -> int:
        return -(-self._batches // self.world_size)

    def __getitem__(self, index: int) -> StreamBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        index = index * self.world_size + self.rank
        first = index * self.batch
        if index >= self._batches:
            tokens = self.text[:0, None].expand(0, self.block + 1)
        elif first >= self.full:
            tokens = self.text[None, self.full * self.block :]
        else:
            starts = torch.arange(first, min(first + self.batch, self.full)) * self.block
            tokens = self.text[starts[:, None] + torch.arange(self.block + 1)]
        return StreamBatch(tokens.long(), torch.ones(len(tokens), dtype=torch.bool))


class TextDataModule(pl.LightningDataModule):
    """A text for language models over bytes: the first part to train on, the last to validate.

    Args:
        path: a text file of your own; None takes `dataset`.
        dataset: name of a known text.
        streams: streams that are trained on in parallel (batch size, over all processes).
        segment: tokens per segment of the model.
        segments_per_step: segments that each stream advances in a training step; the gradient
            flows through the memory between them.
        validation_fraction: last part of the text that is validated on, in (0, 1).
        reset_probability: chance that a stream forgets its past before a step, so that the model
            also learns to start without memory.
        data_dir: folder to look for `dataset` in first.
        seed: of the order of training.

    Raises:
        DataError: the file is missing or empty, or a part is shorter than a segment.
        UnknownNameError: no known text has this name.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        path: str | None = None,
        dataset: str = "tiny-shakespeare",
        streams: int = 32,
        segment: int = 256,
        segments_per_step: int = 2,
        validation_fraction: float = 0.1,
        reset_probability: float = 0.1,
        data_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dataset not in TEXTS:
            raise UnknownNameError(f"No text {dataset!r}.{nearest(dataset, TEXTS)}")
        for name, value in (
            ("streams", streams),
            ("segment", segment),
            ("segments_per_step", segments_per_step),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction}")
        if not 0.0 <= reset_probability <= 1.0:
            raise ValueError(f"reset_probability must be in [0, 1], got {reset_probability}")
        self.path, self.dataset, self.data_dir = path, dataset, data_dir
        self.streams, self.segment, self.segments_per_step = streams, segment, segments_per_step
        self.validation_fraction, self.reset_probability = validation_fraction, reset_probability
        self.seed = seed

    @functools.cached_property
    def text(self) -> Tensor:
        """The whole text as bytes."""
        if self.path is not None:
            return read_text(self.path)
        return read_text(locate(self.dataset, self.data_dir))

    @property
    def train_text(self) -> Tensor:
        """The first part, bytes."""
        return self.text[: self._boundary]

    @property
    def validation_text(self) -> Tensor:
        """The last part, bytes."""
        return self.text[self._boundary :]

    @property
    def _boundary(self) -> int:
        return int((1.0 - self.validation_fraction) * len(self.text))

    def setup(self, stage: str | None = None) -> None:
        """Read the text and check that it is long enough."""
        for part, text in (("training", self.train_text), ("validation", self.validation_text)):
            if len(text) <= self.segment:
                raise DataError(
                    f"The {part} part of {self.path or self.dataset} has {len(text)} bytes, fewer "
                    f"than a segment of {self.segment} and the byte after it; use a longer text, "
                    "a shorter segment or another validation_fraction."
                )

    @property
    def _process(self) -> tuple[int, int]:
        """Number of this process, and how many there are."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> DataLoader[StreamBatch]:
        """Batches of `StreamBatch`; short texts get fewer streams, so that each has a batch.

        Raises:
            DataError: the streams cannot be shared evenly by the processes.
        """
        rank, world = self._process
        text = self.train_text
        step = min(self.segments_per_step, len(text) // self.segment) * self.segment
        streams = max(min(self.streams, len(text) // step), 1)
        if streams % world:
            raise DataError(f"{streams} streams of text cannot be shared by {world} processes.")
        sampler = StreamSampler(
            len(text), streams, step, self.reset_probability, self.seed, rank, world
        )
        return _loader(_Streams(text, step), sampler)

    def val_dataloader(self) -> DataLoader[StreamBatch]:
        """This process's share of `blocks`."""
        return _loader(_Blocks(self.validation_text, self.segment, 64, *self._process))

    def blocks(self) -> DataLoader[StreamBatch]:
        """Independent blocks of one segment; every byte but the first is a target once."""
        return _loader(_Blocks(self.validation_text, self.segment, 64))


def _loader(
    batches: Dataset[StreamBatch], sampler: Sampler[_Step] | None = None
) -> DataLoader[StreamBatch]:
    # A loader draws a number whenever it is started. From the global source that would shift the
    # dropout of a resumed run, which starts its loaders at other moments.
    return DataLoader(batches, sampler=sampler, batch_size=None, generator=torch.Generator())
