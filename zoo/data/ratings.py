"""Ratings of items by users: MovieLens and files of your own, split by time or by pairs.

Shape notation: N ratings, B pairs of a batch, U users, I items.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.sources import SOURCES, data_dirs, locate_first
from zoo.data.tables import ordered_names, read_table, read_utf8
from zoo.errors import DataError, UnknownNameError, nearest

__all__ = [
    "RATING_SETS",
    "TITLE_FILES",
    "RatingBatch",
    "Ratings",
    "RatingsDataModule",
    "have_movielens",
    "load_movielens",
    "read_movielens",
    "read_ratings_csv",
]

RATING_SETS = ("movielens-100k", "movielens-1m", "movielens-latest-small")
"""The known sets of ratings."""
TITLE_FILES = {
    "movielens-100k": "u.item",
    "movielens-1m": "movies.dat",
    "movielens-latest-small": "movies.csv",
}
"""File of each that has the titles; ratings are read without it too."""

_EVALUATION_BATCH = 8192
_ROUNDS = 50
"""Draws after which a user who has rated nearly everything gets no further negative."""

_GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratings:
    """Ratings in the order of their file, with users and items as positions in lists of ids.

    Attributes:
        users, items: N int64, positions in `user_ids` and `item_ids`.
        ratings: N float32.
        times: N int64, in any unit; their ranks where they have fractions, the position in the
            file where there are none.
        user_ids, item_ids: as in the file.
        scale: lowest and highest rating.
        titles: title of each item; the id where there is none.
        user_features: U x F float32, ones for what applies; F is 0 where there are none.
        item_features: I x F float32, likewise.
    """

    users: Tensor
    items: Tensor
    ratings: Tensor
    times: Tensor
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    scale: tuple[float, float]
    titles: tuple[str, ...]
    user_features: Tensor
    item_features: Tensor

    def __len__(self) -> int:
        return len(self.users)

    @property
    def keys(self) -> NDArray[np.int64]:
        """One sorted number for each (user, item) that is rated: user * I + item."""
        return _keys(self.users.numpy(), self.items.numpy(), len(self.item_ids))


def _keys(users: NDArray[np.int64], items: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    keys: NDArray[np.int64] = np.sort(users * count + items)
    return keys


def _contains(keys: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not len(keys):
        return np.zeros(len(values), dtype=bool)
    place = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    found: NDArray[np.bool_] = keys[place] == values
    return found


def _time(text: str) -> int | float:
    """A time as a whole number where it is one.

    Raises:
        ValueError: it is no finite number, or needs more than 64 bits.
    """
    try:
        value: int | float = int(text)
    except ValueError:
        value = float(text)
        if abs(value) < 2**53 and value.is_integer():
            value = int(value)
    if not math.isfinite(value) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        raise ValueError(text)
    return value


def _scale(scale: object) -> tuple[float, float]:
    """A checked scale.

    Raises:
        ValueError: it is not a lowest and a highest rating.
    """
    try:
        # A text of two digits would be two numbers.
        ends = () if isinstance(scale, (str, bytes)) else scale
        low, high = (float(end) for end in ends)  # type: ignore[attr-defined]
        if -math.inf < low < high < math.inf:
            return low, high
    except (TypeError, ValueError):
        pass
    raise ValueError(f"scale must be a lowest and a highest rating, got {scale!r}")


def _check_columns(*columns: str | None) -> None:
    """Check the columns of user, item, rating and time.

    Raises:
        ValueError: one is there twice.
    """
    named = [column for column in columns if column is not None]
    for column in named:
        if named.count(column) > 1:
            raise ValueError(
                "user_column, item_column, rating_column and time_column must be different, got "
                f"{column!r} twice"
            )


def _as_number(name: str) -> str:
    """An id without what leaves its number the same, as in 01 or 1.0; others as they are."""
    found = re.fullmatch(r"0*(\d+)(?:\.0*)?", name, re.ASCII)
    return name if found is None else found[1]


def _build(
    rows: Sequence[Sequence[str]],
    where: str,
    scale: tuple[float, float],
    *,
    lines: Sequence[int] | None = None,
    titles: Mapping[str, str] | None = None,
    user_features: Mapping[str, Sequence[str]] | None = None,
    item_features: Mapping[str, Sequence[str]] | None = None,
) -> Ratings:
    """Check rows of user, item, rating and (perhaps) time, and number users and items.

    Raises:
        DataError: there is no row, or one is incomplete, no number, off the scale or a duplicate,
            or an id differs from an earlier one in blanks alone, or as `01` and `1.0` do from `1`;
            the text has its number in `lines`, by default from 1 on.
    """
    if not rows:
        raise DataError(f"{where} holds no ratings.")
    seen: dict[tuple[str, str], int] = {}
    spelt: dict[tuple[int, str], str] = {}
    values: list[float] = []
    times: list[int | float] = []
    for line, row in zip(lines or range(1, len(rows) + 1), rows, strict=True):
        if len(row) < 3 or not (row[0].strip() and row[1].strip()):
            raise DataError(f"{where}, line {line}: expected a user, an item and a rating.")
        for column, what in enumerate(("user", "item")):
            earlier = spelt.setdefault((column, _as_number(row[column].strip())), row[column])
            if earlier != row[column]:
                blanks = earlier.strip() == row[column].strip()
                raise DataError(
                    f"{where}, line {line}: {what} {row[column]!r} was {earlier!r} before; write "
                    f"it {'with the same blanks, or none' if blanks else 'the same way'}."
                )
        try:
            values.append(float(row[2]))
        except ValueError:
            raise DataError(f"{where}, line {line}: rating {row[2]!r} is no number.") from None
        try:
            times.append(_time(row[3]) if len(row) > 3 else line)
        except (ValueError, OverflowError):
            raise DataError(
                f"{where}, line {line}: time {row[3]!r:.60} is no number of up to 64 bits."
            ) from None
        if not scale[0] <= values[-1] <= scale[1]:
            raise DataError(
                f"{where}, line {line}: rating {row[2]} is not between {scale[0]:g} and "
                f"{scale[1]:g}; set data.scale if the scale is another."
            )
        before = seen.setdefault((row[0], row[1]), line)
        if before != line:
            raise DataError(
                f"{where}, line {line}: user {row[0]!r} rated item {row[1]!r} on line {before} "
                "already; keep one of them."
            )
    if any(isinstance(time, float) for time in times):
        # Fractions tell what came first, as their ranks do.
        ranks = {time: rank for rank, time in enumerate(sorted(set(times)))}
        times = [ranks[time] for time in times]
    user_ids, item_ids = (ordered_names(row[column] for row in rows) for column in (0, 1))
    user_index = {name: index for index, name in enumerate(user_ids)}
    item_index = {name: index for index, name in enumerate(item_ids)}
    named = titles or {}
    return Ratings(
        users=torch.tensor([user_index[row[0]] for row in rows]),
        items=torch.tensor([item_index[row[1]] for row in rows]),
        ratings=torch.tensor(values, dtype=torch.float32),
        times=torch.tensor(times),
        user_ids=user_ids,
        item_ids=item_ids,
        scale=scale,
        titles=tuple(named.get(name, name) for name in item_ids),
        user_features=_one_hot(user_ids, user_features or {}),
        item_features=_one_hot(item_ids, item_features or {}),
    )


def _one_hot(ids: Sequence[str], features: Mapping[str, Sequence[str]]) -> Tensor:
    names = sorted({feature for name in ids for feature in features.get(name, ())})
    table = torch.zeros(len(ids), len(names))
    for row, name in enumerate(ids):
        for feature in features.get(name, ()):
            table[row, names.index(feature)] = 1.0
    return table


# --- readers -------------------------------------------------------------------------------------


def read_ratings_csv(
    path: str | os.PathLike[str],
    *,
    user_column: str = "user",
    item_column: str = "item",
    rating_column: str = "rating",
    time_column: str | None = None,
    title_column: str | None = None,
    scale: tuple[float, float] = (1.0, 5.0),
) -> Ratings:
    """Ratings of your own: a CSV file with a header.

    Args:
        path: the file.
        user_column, item_column, rating_column: names of its columns.
        time_column: of the time of a rating, a number, with a fraction or without; None: the lines
            are in order of time.
        title_column: of the title of the item; None: the id is its title.
        scale: lowest and highest rating.

    Raises:
        DataError: the file is missing, lacks a column or has one twice, or has a bad row.
        ValueError: `scale` is none, or one column is to be two things.
    """
    _check_columns(user_column, item_column, rating_column, time_column)
    path = Path(path).expanduser()
    return _from_csv(
        read_utf8(path, "ratings"),
        str(path),
        (user_column, item_column, rating_column, time_column),
        _scale(scale),
        title_column=title_column,
    )


def _from_csv(
    text: str,
    where: str,
    columns: Sequence[str | None],
    scale: tuple[float, float],
    *,
    title_column: str | None = None,
    titles: Mapping[str, str] | None = None,
    item_features: Mapping[str, Sequence[str]] | None = None,
) -> Ratings:
    wanted = [column for column in columns if column is not None]
    titled = [] if title_column is None else [title_column]
    table = read_table(text, where, [*wanted, *titled])
    rows = [[row.values[column] for column in wanted] for row in table]
    if title_column is not None:
        # A row without the title of its item takes it from none that has it.
        named = [(row.values[wanted[1]], row.values[title_column]) for row in table]
        titles = {item: title for item, title in named if title.strip()}
    return _build(
        rows,
        where,
        scale,
        lines=[row.line for row in table],
        titles=titles,
        item_features=item_features,
    )


class _Files:
    """Members of a data set by name: of an archive, read in place, or of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def text(self, name: str, encoding: str, required: bool = True) -> str:
        """Content of a member; empty when it is missing and not required.

        Raises:
            DataError: it is missing or unreadable.
        """
        try:
            if self.path.suffix == ".zip":
                with zipfile.ZipFile(self.path) as archive:
                    return archive.read(f"{self.path.stem}/{name}").decode(encoding)
            return (self.path / name).read_text(encoding=encoding)
        except (KeyError, FileNotFoundError):
            if not required:
                return ""
            raise DataError(f"{self.path} has no {name}.") from None
        except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
            raise DataError(f"Cannot read {name} of {self.path}: {error}.") from None

    def rows(
        self, name: str, separator: str, encoding: str, required: bool, fields: int = 0
    ) -> list[list[str]]:
        """Lines of a member, split.

        Raises:
            DataError: it is missing or unreadable, or a line has fewer than so many fields.
        """
        # `str.splitlines` would also split at characters that may stand in a title.
        lines = self.text(name, encoding, required).split("\n")
        if not lines[-1]:
            lines.pop()
        rows = [line.removesuffix("\r").split(separator) for line in lines]
        for number, row in enumerate(rows, 1):
            if len(row) < fields:
                raise DataError(
                    f"{name} of {self.path}, line {number}: expected {fields} fields or more "
                    f"between {separator!r}, got {len(row)}."
                )
        return rows


def _age_group(age: str) -> str:
    return f"age {int(age) // 10 * 10}" if age.isdecimal() else "age unknown"


def read_movielens(name: str, path: str | os.PathLike[str]) -> Ratings:
    """A MovieLens set from its official archive, which is read in place, or from a folder.

    Args:
        name: one of `RATING_SETS`.
        path: the archive, or the folder that holds the same files (for 100k, `u.data` suffices).

    Raises:
        DataError: a file is missing or damaged.
        UnknownNameError: there is no such set.
    """
    _check_known(name)
    files = _Files(Path(path))
    if name == "movielens-100k":
        flags_from = 5
        items = files.rows(
            "u.item", "|", "latin-1", required=False, fields=flags_from + len(_GENRES_100K)
        )
        users = files.rows("u.user", "|", "latin-1", required=False, fields=4)
        return _build(
            files.rows("u.data", "\t", "ascii", required=True),
            f"u.data of {path}",
            (1.0, 5.0),
            titles={row[0]: row[1] for row in items},
            user_features={
                row[0]: (_age_group(row[1]), f"gender {row[2]}", f"job {row[3]}") for row in users
            },
            item_features={
                row[0]: [
                    genre
                    for genre, flag in zip(_GENRES_100K, row[flags_from:], strict=False)
                    if flag == "1"
                ]
                for row in items
            },
        )
    if name == "movielens-1m":
        items = files.rows("movies.dat", "::", "latin-1", required=False, fields=3)
        users = files.rows("users.dat", "::", "latin-1", required=False, fields=4)
        return _build(
            files.rows("ratings.dat", "::", "latin-1", required=True),
            f"ratings.dat of {path}",
            (1.0, 5.0),
            titles={row[0]: row[1] for row in items},
            user_features={
                row[0]: (f"gender {row[1]}", f"age {row[2]}", f"job {row[3]}") for row in users
            },
            item_features={row[0]: row[2].split("|") for row in items},
        )
    text, columns = (
        files.text("movies.csv", "utf-8", required=False),
        ("movieId", "title", "genres"),
    )
    movies = (
        [row.values for row in read_table(text, f"movies.csv of {path}", columns)] if text else []
    )
    return _from_csv(
        files.text("ratings.csv", "utf-8"),
        f"ratings.csv of {path}",
        ("userId", "movieId", "rating", "timestamp"),
        (0.5, 5.0),
        titles={row["movieId"]: row["title"] for row in movies},
        item_features={row["movieId"]: row["genres"].split("|") for row in movies},
    )


def _check_known(name: str) -> None:
    if name not in RATING_SETS:
        raise UnknownNameError(
            f"No set of ratings {name!r}.{nearest(name, RATING_SETS)}"
            f" There are: {', '.join(RATING_SETS)}."
        )


def _layouts(name: str) -> list[str]:
    """Sources of a set, as ratings alone and as the official archive."""
    return [key for key in (f"{name}-ratings", f"{name}-archive") if key in SOURCES]


def load_movielens(name: str, data_dir: str | os.PathLike[str] | None = None) -> Ratings:
    """A MovieLens set, downloaded if there is no other way.

    Raises:
        DataError: it is damaged, or is nowhere and could not be downloaded.
        UnknownNameError: there is no such set.
    """
    _check_known(name)
    _, path = locate_first(_layouts(name), data_dir)
    return read_movielens(name, path if path.suffix == ".zip" else path.parent)


def have_movielens(name: str, data_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether a MovieLens set is on this machine."""
    _check_known(name)
    return any(
        (folder / path).is_file()
        for folder in data_dirs(data_dir)
        for key in _layouts(name)
        for path in SOURCES[key].paths
    )


# --- batches -------------------------------------------------------------------------------------


class RatingBatch(NamedTuple):
    """Pairs of users and items."""

    users: Tensor
    """B int64."""
    items: Tensor
    """B int64."""
    watched: Tensor
    """B float32: 1 where the user rated the item, 0 where the pair was drawn."""
    ratings: Tensor
    """B float32; 0 where there is none."""

    def rows(self, index: Tensor | slice) -> RatingBatch:
        """Some of the pairs."""
        return RatingBatch(*(part[index] for part in self))


def _negatives(
    users: NDArray[np.int64],
    keys: NDArray[np.int64],
    items: int,
    generator: np.random.Generator,
) -> RatingBatch:
    """One item for each of `users`, drawn evenly from those that are not in `keys` with them.

    Users for whom none is found in many draws, since they rated nearly all, get fewer.
    """
    drawn = generator.integers(0, items, len(users))
    open_ = np.flatnonzero(_contains(keys, users * items + drawn))
    for _ in range(_ROUNDS):
        if not len(open_):
            break
        drawn[open_] = generator.integers(0, items, len(open_))
        open_ = open_[_contains(keys, users[open_] * items + drawn[open_])]
    kept = np.ones(len(users), dtype=bool)
    kept[open_] = False
    count = int(kept.sum())
    return RatingBatch(
        torch.from_numpy(users[kept]),
        torch.from_numpy(drawn[kept]),
        torch.zeros(count),
        torch.zeros(count),
    )


def _joined(parts: Sequence[RatingBatch]) -> RatingBatch:
    return RatingBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _EpochBatches(Sampler[RatingBatch]):
    """Training batches of an epoch: positives, and negatives that are drawn anew each time.

    All of an epoch have the same size, to within one pair: at least `batch_size` and less than
    twice as many, or all pairs where they are fewer. All is a function of (seed, epoch) alone, so
    that a run resumed at an epoch boundary goes on as if it had not stopped. Processes take every
    `world_size`-th pair of a batch.
    """

    def __init__(
        self,
        pairs: RatingBatch,
        items: int,
        negatives: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.pairs, self.items, self.negatives = pairs, items, negatives
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.keys = _keys(pairs.users.numpy(), pairs.items.numpy(), items)
        self.part = slice(rank, None, world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(len(self.pairs.users) * (1 + self.negatives) // self.batch_size, 1)

    def __iter__(self) -> Iterator[RatingBatch]:
        generator = np.random.default_rng((self.seed, self.epoch))
        pairs = self.pairs
        if self.negatives:
            users = np.repeat(pairs.users.numpy(), self.negatives)
            pairs = _joined([pairs, _negatives(users, self.keys, self.items, generator)])
        order = torch.from_numpy(generator.permutation(len(pairs.users)))
        for rows in order.tensor_split(len(self)):
            yield pairs.rows(rows[self.part])


class _AsGiven(Dataset[RatingBatch]):
    """Hands on the batches that a sampler made."""

    def __getitem__(self, batch: RatingBatch) -> RatingBatch:
        return batch


class RatingsDataModule(pl.LightningDataModule):
    """Ratings for recommenders, split in one of two ways.

    "temporal": the last rating of each user is for test, the one before for validation, the rest
    for training, with negatives drawn anew in each epoch; users with fewer than three ratings are
    trained on only. Equal times are in the order of the file.

    "pairs": as many unrated items as rated ones are drawn for each user, once, without
    replacement, and all pairs are split at random, stratified by label: 10 % for test, 11.25 % for
    validation. Popular items leak through this split; it is the one of the papers.

    Args:
        dataset: name of a known set.
        path: a CSV file of your own; None takes `dataset`.
        user_column, item_column, rating_column: columns of that file.
        time_column: of the time of a rating; None: the lines are in order of time.
        title_column: of the title of an item; None: its id.
        scale: lowest and highest rating of that file.
        split: how to split, see above.
        negatives: drawn in each epoch per rating, with the temporal split.
        batch_size: pairs of a training batch, over all processes, at least: what is left over after
            so many in each is shared evenly by the batches, so that one may have nearly twice as
            many where there is one alone.
        split_seed: of the negatives and the split of "pairs".
        data_dir: folder to look for `dataset` in first.
        seed: of order and negatives in training.

    Raises:
        DataError: files are missing, damaged or too few.
        UnknownNameError: no known set has this name.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        dataset: str = "movielens-100k",
        path: str | None = None,
        user_column: str = "user",
        item_column: str = "item",
        rating_column: str = "rating",
        time_column: str | None = None,
        title_column: str | None = None,
        scale: tuple[float, float] = (1.0, 5.0),
        split: Literal["temporal", "pairs"] = "temporal",
        negatives: int = 4,
        batch_size: int = 512,
        split_seed: int = 0,
        data_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_known(dataset)
        if split not in ("temporal", "pairs"):
            raise ValueError(f"split must be 'temporal' or 'pairs', got {split!r}")
        _check_columns(user_column, item_column, rating_column, time_column)
        whole: dict[str, Any] = {
            "negatives": negatives,
            "batch_size": batch_size,
            "seed": seed,
            "split_seed": split_seed,
        }
        for name, number in whole.items():
            if not isinstance(number, numbers.Integral):
                raise ValueError(f"{name} must be a whole number, got {number!r}")
        if negatives < 1 or batch_size < 1:
            raise ValueError(
                f"negatives and batch_size must be at least 1, got {negatives} and {batch_size}"
            )
        if min(seed, split_seed) < 0:
            raise ValueError(f"seeds must not be negative, got {seed} and {split_seed}")
        self.dataset, self.path, self.data_dir = dataset, path, data_dir
        self.user_column, self.item_column, self.rating_column = (
            user_column,
            item_column,
            rating_column,
        )
        self.time_column, self.title_column = time_column, title_column
        self.scale, self.split = _scale(scale), split
        self.negatives, self.batch_size = negatives, batch_size
        self.split_seed, self.seed = split_seed, seed

    @functools.cached_property
    def ratings(self) -> Ratings:
        """All ratings."""
        if self.path is None:
            return load_movielens(self.dataset, self.data_dir)
        return read_ratings_csv(
            self.path,
            user_column=self.user_column,
            item_column=self.item_column,
            rating_column=self.rating_column,
            time_column=self.time_column,
            title_column=self.title_column,
            scale=self.scale,
        )

    @functools.cached_property
    def parts(self) -> dict[str, RatingBatch]:
        """Pairs of "train", "validation" and "test"; the temporal ones are positives alone.

        Raises:
            DataError: a part would be empty.
        """
        parts = self._by_time() if self.split == "temporal" else self._by_pairs()
        for name, part in parts.items():
            if not len(part.users):
                few = " (no user has three ratings)" if self.split == "temporal" else ""
                raise DataError(
                    f"{self.path or self.dataset} has {len(self.ratings)} ratings, too few for a "
                    f"{name} part{few}."
                )
        return parts

    def _positives(self) -> RatingBatch:
        ratings = self.ratings
        ones = torch.ones(len(ratings))
        return RatingBatch(ratings.users, ratings.items, ones, ratings.ratings)

    def _by_time(self) -> dict[str, RatingBatch]:
        users, times = self.ratings.users.numpy(), self.ratings.times.numpy()
        order = np.lexsort((np.arange(len(users)), times, users))
        counts = np.bincount(users)
        ends = counts.cumsum()
        from_end = np.repeat(ends, counts) - np.arange(len(users))  # 1 for a user's last rating
        enough = np.repeat(counts >= 3, counts)
        chosen = {
            "train": ~enough | (from_end > 2),
            "validation": enough & (from_end == 2),
            "test": enough & (from_end == 1),
        }
        positives = self._positives()
        return {
            name: positives.rows(torch.from_numpy(np.sort(order[mask])))
            for name, mask in chosen.items()
        }

    def _by_pairs(self) -> dict[str, RatingBatch]:
        ratings = self.ratings
        generator = np.random.default_rng(self.split_seed)
        users, items = [], []
        for user in range(len(ratings.user_ids)):
            rated = ratings.items[ratings.users == user].numpy()
            unrated = np.setdiff1d(np.arange(len(ratings.item_ids)), rated)
            size = min(len(rated), len(unrated))
            items.append(generator.choice(unrated, size, replace=False))
            users.append(np.full(size, user))
        drawn_users, drawn_items = np.concatenate(users), np.concatenate(items)
        zeros = torch.zeros(len(drawn_users))
        drawn = RatingBatch(
            torch.from_numpy(drawn_users), torch.from_numpy(drawn_items), zeros, zeros
        )
        pieces: dict[str, list[RatingBatch]] = {"train": [], "validation": [], "test": []}
        for pairs in (self._positives(), drawn):
            count = len(pairs.users)
            order = torch.from_numpy(generator.permutation(count))
            test = round(0.1 * count)
            validation = round(0.125 * (count - test))
            bounds = [count - test - validation, count - test]
            for name, rows in zip(pieces, order.tensor_split(bounds), strict=True):
                pieces[name].append(pairs.rows(rows))
        return {name: _joined(pair) for name, pair in pieces.items()}

    def setup(self, stage: str | None = None) -> None:
        """Read and split the ratings."""
        _ = self.parts

    @property
    def _process(self) -> tuple[int, int]:
        """Number of this process, and how many there are."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> DataLoader[RatingBatch]:
        """Batches of `RatingBatch` in random order."""
        sampler = _EpochBatches(
            self.parts["train"],
            len(self.ratings.item_ids),
            self.negatives if self.split == "temporal" else 0,
            self.batch_size,
            self.seed,
            *self._process,
        )
        return DataLoader(_AsGiven(), sampler=sampler, batch_size=None, generator=torch.Generator())

    def pairs(self, part: Literal["validation", "test"]) -> RatingBatch:
        """Positives and negatives of a part; with the temporal split one negative per positive,
        the same each time, of items the user never rated."""
        pairs = self.parts[part]
        if self.split == "pairs":
            return pairs
        generator = np.random.default_rng(self.split_seed)
        drawn = _negatives(
            pairs.users.numpy(), self.ratings.keys, len(self.ratings.item_ids), generator
        )
        return _joined([pairs, drawn])

    def val_dataloader(self) -> DataLoader[RatingBatch]:
        """The pairs of the validation part, of each kind as many in every batch; of several
        processes each takes its share, in as many batches."""
        pairs, (rank, world) = self.pairs("validation"), self._process
        total = len(pairs.users)
        count = math.ceil(math.ceil(total / world) / _EVALUATION_BATCH)
        rows = torch.arange(rank, total, world)
        # Positives come before negatives, and what gates do is looked at in the first batch.
        batches = [pairs.rows(rows[first::count]) for first in range(count)]
        return DataLoader(batches, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]
