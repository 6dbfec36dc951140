"""Streams of labelled texts, from a CSV file or a folder, and how texts become tokens."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from zoo.data.sampling import set_apart
from zoo.data.streams import Stream, StreamConfig, make_stream, stream_loader
from zoo.data.tables import ordered_names, read_table, read_utf8
from zoo.errors import DataError, ZooError

__all__ = [
    "TextStreamBatch",
    "TextStreamDataModule",
    "WordPieces",
    "read_labelled_texts",
    "read_vocabulary",
]

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


# --- what a model is told about its input ---------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPieces:
    """What turns a text into tokens, and a network's output to words: BERT's, in lower case.

    Raises:
        ValueError: a value is out of range, or the vocabulary is none of BERT's.
    """

    vocabulary: tuple[str, ...] = dataclasses.field(repr=False)
    """Word pieces, in the order of their tokens; the first is [PAD], which no text contains."""
    length: int = 256
    """Tokens of a text that are read, [CLS] and [SEP] included; the rest is cut off."""
    classes: tuple[str, ...]
    """Name of each class, in the order of the network's outputs."""

    def __post_init__(self) -> None:
        missing = [piece for piece in _SPECIAL if piece not in self.vocabulary]
        if missing or self.vocabulary[0] != _SPECIAL[0]:
            raise ValueError(f"vocabulary needs {_SPECIAL[0]} first, and {', '.join(_SPECIAL[1:])}")
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("vocabulary has a piece twice")
        if self.length < 3:
            raise ValueError(f"length must be at least 3, got {self.length}")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be two or more different names")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
        except ImportError:
            raise ZooError("Reading texts needs tokenizers: pip install 'zoo[text]'") from None
        numbers = {piece: number for number, piece in enumerate(self.vocabulary)}
        # Without special tokens: "[PAD]" in a text is a word in brackets.
        tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        ends = (("[SEP]", numbers["[SEP]"]), ("[CLS]", numbers["[CLS]"]))
        tokenizer.post_processor = processors.BertProcessing(*ends)
        tokenizer.enable_truncation(self.length)
        return tokenizer

    def tokens(self, texts: Sequence[str]) -> list[Tensor]:
        """Tokens of each text, int64, one more for [CLS] and one for [SEP].

        Raises:
            DataError: there are none, or one is no text or empty.
            ZooError: tokenizers is not installed.
        """
        if not len(texts):
            raise DataError("There are no texts; the batch is empty.")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"Texts must be strings, got {text!r:.60} ({type(text).__name__}).")
            if not text.strip():
                raise DataError(f"Text {number} of {len(texts)} is empty.")
        return [torch.tensor(one.ids) for one in self._tokenizer.encode_batch(list(texts))]


def read_vocabulary(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Word pieces of a `vocab.txt`, one a line.

    Raises:
        DataError: the file cannot be read.
    """
    # Some pieces are separators of lines to Python, though not to the file.
    return tuple(read_utf8(Path(path), "vocabulary").removesuffix("\n").split("\n"))


# --- readers --------------------------------------------------------------------------------------


def read_labelled_texts(
    path: str | os.PathLike[str], *, text_column: str = "text", label_column: str = "label"
) -> tuple[tuple[str, ...], Tensor, tuple[str, ...]]:
    """Labelled texts of your own.

    Args:
        path: a CSV file with a header, or a folder that has one folder of .txt files per class.
        text_column, label_column: names of the file's columns.

    Returns:
        The texts, the class of each, and the names of the classes, in order of number where all
        are numbers, alphabetical elsewhere.

    Raises:
        DataError: a file or a column is missing, a row has fields too many, a text or a label is
            empty, or there are fewer than two classes.
    """
    path = Path(path).expanduser()
    rows = _of_folder(path) if path.is_dir() else _of_csv(path, text_column, label_column)
    classes = ordered_names(label for _, label in rows)
    if len(classes) < 2:
        found = f"one class, {classes[0]!r}" if classes else "no texts"
        raise DataError(f"{path} has {found}; it needs texts of two or more classes.")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([numbers[label] for _, label in rows])
    return tuple(text for text, _ in rows), labels, classes


def _of_csv(path: Path, text_column: str, label_column: str) -> list[tuple[str, str]]:
    columns = (text_column, label_column)
    rows = []
    for line, row in read_table(read_utf8(path, "texts"), str(path), columns):
        text, label = (row[column].strip() for column in columns)
        if not text or not label:
            missing = text_column if not text else label_column
            raise DataError(f"{path}, line {line}: {missing!r} is empty.")
        rows.append((text, label))
    return rows


def _of_folder(path: Path) -> list[tuple[str, str]]:
    rows = []
    for file in sorted(path.glob("*/*.txt")):
        text = read_utf8(file, "text").strip()
        if not text:
            raise DataError(f"The text {file} is empty.")
        rows.append((text, file.parent.name))
    return rows


# --- streams --------------------------------------------------------------------------------------


class TextStreamBatch(NamedTuple):
    """The texts that come at once."""

    rows: Tensor
    """Index of each in the training set, B."""
    texts: list[str]
    """B texts."""
    labels: Tensor
    """B int64."""
    ended: int | None
    """Index of the task whose last batch this is; a learner is never told."""


class TextStreamDataModule(pl.LightningDataModule):
    """A stream of labelled texts of your own, each once.

    Args:
        path: a CSV file with a header, or a folder that has one folder of .txt files per class.
        text_column, label_column: names of the file's columns.
        test_fraction: of each class, that is measured on, in (0, 1).
        split_seed: of which texts these are.
        stream: schedule and batches.
        seed: of the order of classes and of the texts in a class.

    Raises:
        DataError: files are missing, damaged or too few.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        path: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        test_fraction: float = 0.2,
        split_seed: int = 0,
        stream: StreamConfig = StreamConfig(),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0.0 < test_fraction < 1.0:
            raise ValueError(f"test_fraction must be in (0, 1), got {test_fraction}")
        if min(seed, split_seed) < 0:
            raise ValueError(f"seeds must not be negative, got {seed} and {split_seed}")
        self.path, self.text_column, self.label_column = path, text_column, label_column
        self.test_fraction, self.split_seed = test_fraction, split_seed
        self.stream_config, self.seed = stream, seed

    @functools.cached_property
    def _texts(self) -> tuple[tuple[str, ...], Tensor, tuple[str, ...]]:
        if self.path is None:
            raise DataError("There are no texts: set data.path to a CSV file or a folder.")
        return read_labelled_texts(
            self.path, text_column=self.text_column, label_column=self.label_column
        )

    @functools.cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """Rows to learn and rows to test."""
        _, labels, classes = self._texts
        count = max(round(self.test_fraction * len(labels)), len(classes))
        return set_apart(
            labels, count, str(self.path), what="texts", seed=self.split_seed, names=classes
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class."""
        return self._texts[2]

    @functools.cached_property
    def train_texts(self) -> tuple[str, ...]:
        """The texts to learn."""
        return tuple(self._texts[0][row] for row in self._parts[0].tolist())

    @functools.cached_property
    def test_texts(self) -> tuple[str, ...]:
        """The texts to test."""
        return tuple(self._texts[0][row] for row in self._parts[1].tolist())

    @property
    def train_labels(self) -> Tensor:
        """Class of each of `train_texts`, int64."""
        return self._texts[1][self._parts[0]]

    @property
    def test_labels(self) -> Tensor:
        """Class of each of `test_texts`, int64."""
        return self._texts[1][self._parts[1]]

    @functools.cached_property
    def stream(self) -> Stream:
        """The order of the texts to learn."""
        return make_stream(self.train_labels, self.stream_config, self.seed)

    def setup(self, stage: str | None = None) -> None:
        """Read and split the texts."""
        _ = self._parts
        if stage in (None, "fit"):
            _ = self.stream

    def train_dataloader(self) -> DataLoader[TextStreamBatch]:
        """Batches of `TextStreamBatch` in the order of the stream.

        Raises:
            DataError: there are several processes; a stream has one order.
        """
        texts, labels = self.train_texts, self.train_labels

        def batch(rows: Tensor, ended: int | None) -> TextStreamBatch:
            chosen = [texts[row] for row in rows.tolist()]
            return TextStreamBatch(rows, chosen, labels[rows], ended)

        processes = 1 if self.trainer is None else self.trainer.world_size
        return stream_loader(self.stream, batch, processes)
