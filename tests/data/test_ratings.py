"""Tests of zoo.data.ratings: readers on files of the official formats, both splits, bad input."""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.data import ratings as ratings_module
from zoo.data import sources
from zoo.data.ratings import (
    RATING_SETS,
    RatingBatch,
    Ratings,
    RatingsDataModule,
    have_movielens,
    load_movielens,
    read_movielens,
    read_ratings_csv,
)
from zoo.data.tables import ordered_names
from zoo.errors import DataError, UnknownNameError

USERS, ITEMS = 12, 30


def rows(seed: int = 0) -> list[tuple[int, int, int, int]]:
    """User, item, rating and time; users from 1, items from 1, every user with 4 ratings or more,
    times in no order and with ties."""
    generator = np.random.default_rng(seed)
    found = []
    for user in range(1, USERS + 1):
        rated = generator.choice(ITEMS, int(generator.integers(4, 12)), replace=False) + 1
        found += [
            (user, int(item), int(generator.integers(1, 6)), int(generator.integers(100, 106)))
            for item in rated
        ]
    generator.shuffle(found)
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in found]


def movielens_100k(folder: Path) -> Path:
    flags = "|".join(["0"] * 5 + ["1"] + ["0"] * 13)
    items = [
        f"{i}|Film {i} (19{60 + i})|01-Jan-1990||http://x|{flags}" for i in range(1, ITEMS + 1)
    ]
    users = [f"{u}|{20 + u}|{'MF'[u % 2]}|writer|55414" for u in range(1, USERS + 1)]
    return archive(
        folder / "ml-100k.zip",
        {
            "u.data": "\n".join("\t".join(map(str, row)) for row in rows()) + "\n",
            "u.item": "\n".join(items).replace("Film 7 ", "Café 7 ") + "\n",
            "u.user": "\n".join(users) + "\n",
        },
        "latin-1",
    )


def movielens_1m(folder: Path) -> Path:
    items = [f"{i}::Film {i} (1960)::Action|Drama" for i in range(1, ITEMS + 1)]
    users = [f"{u}::{'MF'[u % 2]}::25::7::55414" for u in range(1, USERS + 1)]
    return archive(
        folder / "ml-1m.zip",
        {
            "ratings.dat": "\n".join("::".join(map(str, row)) for row in rows()) + "\n",
            "movies.dat": "\n".join(items).replace("Film 7 ", "Café 7 ") + "\n",
            "users.dat": "\n".join(users) + "\n",
        },
        "latin-1",
    )


def movielens_latest(folder: Path) -> Path:
    items = [f'{i},"Film {i}, The (1960)",Action|Drama' for i in range(1, ITEMS + 1)]
    lines = [",".join(map(str, row)) for row in rows()]
    return archive(
        folder / "ml-latest-small.zip",
        {
            "ratings.csv": "userId,movieId,rating,timestamp\n" + "\n".join(lines) + "\n",
            "movies.csv": "movieId,title,genres\n"
            + "\n".join(items).replace("Film 7,", "Café 7,")
            + "\n",
        },
        "utf-8",
    )


def archive(path: Path, members: dict[str, str], encoding: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(f"{path.stem}/{name}", text.encode(encoding))
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "movielens-100k": movielens_100k,
    "movielens-1m": movielens_1m,
    "movielens-latest-small": movielens_latest,
}


def write_csv(folder: Path, header: str = "user,item,rating,when,title") -> Path:
    path = folder / "mine.csv"
    lines = [f"u{u},i{i},{r},{t},Thing {i}" for u, i, r, t in rows()]
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def data(folder: Path, **options: Any) -> RatingsDataModule:
    defaults = {"time_column": "when", "title_column": "title", "batch_size": 16}
    return RatingsDataModule(path=str(write_csv(folder)), **{**defaults, **options})


def as_triples(ratings: Ratings) -> set[tuple[str, str, float]]:
    return {
        (ratings.user_ids[u], ratings.item_ids[i], float(r))
        for u, i, r in zip(ratings.users, ratings.items, ratings.ratings, strict=True)
    }


# --- readers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RATING_SETS)
def test_an_official_archive_is_read_in_place(name: str, tmp_path: Path) -> None:
    path = MAKERS[name](tmp_path)
    ratings = read_movielens(name, path)
    assert as_triples(ratings) == {(str(u), str(i), float(r)) for u, i, r, _ in rows()}
    assert ratings.times.tolist() == [t for *_, t in rows()]
    assert ratings.user_ids == tuple(str(u) for u in range(1, USERS + 1)), "in order of numbers"
    assert ratings.titles[ratings.item_ids.index("7")].startswith("Café 7")
    assert ratings.item_features.shape[1] >= 1
    assert ratings.item_features.all(), "every item has the same genres here"
    assert ratings.user_features.shape == (
        USERS,
        0 if "latest" in name else ratings.user_features.shape[1],
    )
    assert list(tmp_path.iterdir()) == [path], "nothing was extracted"


def test_user_features_are_one_of_each_kind(tmp_path: Path) -> None:
    features = read_movielens("movielens-100k", movielens_100k(tmp_path)).user_features
    # Ages 21 to 32, two genders, one job: a group of age, a gender and the job for each user.
    assert features.shape == (USERS, 2 + 2 + 1)
    assert features.sum(1).tolist() == [3.0] * USERS


def test_a_folder_with_the_ratings_alone_suffices(tmp_path: Path) -> None:
    text = "\n".join("\t".join(map(str, row)) for row in rows()) + "\n"
    (tmp_path / "u.data").write_text(text)
    ratings = read_movielens("movielens-100k", tmp_path)
    assert len(ratings) == len(rows())
    assert ratings.titles == ratings.item_ids
    assert ratings.item_features.shape[1] == ratings.user_features.shape[1] == 0


@pytest.mark.parametrize("name", RATING_SETS)
def test_sources_are_checked_before_they_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    assert not have_movielens(name)
    path = MAKERS[name](tmp_path)
    assert have_movielens(name)
    with pytest.raises(DataError, match="expected"):
        load_movielens(name)
    content = path.read_bytes()
    record = sources.Source(
        path=path.name,
        size=len(content),
        digest=__import__("hashlib").sha256(content).hexdigest(),
        url=None,
        licence="none",
    )
    monkeypatch.setitem(sources.SOURCES, f"{name}-archive", record)
    assert len(load_movielens(name)) == len(rows())


def test_a_file_of_ones_own_needs_only_the_names_of_its_columns(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "wer,was,wie,wann,titel")
    ratings = read_ratings_csv(
        path,
        user_column="wer",
        item_column="was",
        rating_column="wie",
        time_column="wann",
        title_column="titel",
    )
    assert as_triples(ratings) == {(f"u{u}", f"i{i}", float(r)) for u, i, r, _ in rows()}
    assert ratings.titles[ratings.item_ids.index("i7")] == "Thing 7"
    assert ratings.times.tolist() == [t for *_, t in rows()]
    plain = read_ratings_csv(path, user_column="wer", item_column="was", rating_column="wie")
    assert (plain.times.diff() > 0).all(), "without times, the order of the lines"
    assert plain.titles == plain.item_ids


# --- the temporal split --------------------------------------------------------------------------


def test_the_last_rating_is_for_test_and_the_one_before_for_validation(tmp_path: Path) -> None:
    module = data(tmp_path)
    ratings, parts = module.ratings, module.parts
    for user in range(USERS):
        name = ratings.user_ids[user]
        own = [(t, line, f"i{i}") for line, (u, i, _, t) in enumerate(rows()) if f"u{u}" == name]
        expected = [item for *_, item in sorted(own)]
        for part, wanted in (
            ("test", expected[-1:]),
            ("validation", expected[-2:-1]),
            ("train", expected[:-2]),
        ):
            batch = parts[part]
            found = [ratings.item_ids[i] for i in batch.items[batch.users == user]]
            assert sorted(found) == sorted(wanted), part
    assert sum(len(part.users) for part in parts.values()) == len(ratings)
    assert all(part.watched.all() for part in parts.values())


def test_users_with_two_ratings_are_trained_on_only(tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    path.write_text("user,item,rating\na,1,5\na,2,4\na,3,3\nb,1,2\nb,2,1\n")
    parts = RatingsDataModule(path=str(path)).parts
    assert [len(parts[name].users) for name in ("train", "validation", "test")] == [3, 1, 1]


def test_negatives_are_new_in_each_epoch_and_never_trained_positives(tmp_path: Path) -> None:
    module = data(tmp_path, negatives=3)
    positives = module.parts["train"]
    known = set(zip(positives.users.tolist(), positives.items.tolist(), strict=True))
    loader = module.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        assert len(batches) == len(loader)
        pairs = RatingBatch(*(torch.cat(column) for column in zip(*batches, strict=True)))
        assert len(pairs.users) == 4 * len(known), "every pair once"
        drawn = pairs.rows(pairs.watched == 0)
        found = list(zip(drawn.users.tolist(), drawn.items.tolist(), strict=True))
        assert not known & set(found)
        counts = Counter(positives.users.tolist())
        assert Counter(drawn.users.tolist()) == {user: 3 * n for user, n in counts.items()}
        assert not drawn.ratings.any()
        shown = pairs.rows(pairs.watched == 1)
        assert set(zip(shown.users.tolist(), shown.items.tolist(), strict=True)) == known
        epochs.append(found)
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("n", [1, 15, 16, 31, 32, 47, 100])
def test_training_batches_are_full_and_alike(n: int) -> None:
    from zoo.data.ratings import _EpochBatches

    number, one = torch.arange(n), torch.ones(n)
    pairs = RatingBatch(number, torch.zeros_like(number), one, one)
    batches = list(_EpochBatches(pairs, 5, 0, 16, 0, 0, 1))
    sizes = [len(batch.users) for batch in batches]
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1
    assert min(16, n) <= min(sizes)
    assert max(sizes) < 32


def test_processes_share_a_batch(tmp_path: Path) -> None:
    from zoo.data.ratings import _EpochBatches

    module = data(tmp_path)
    pairs, items = module.parts["train"], len(module.ratings.item_ids)
    whole = list(_EpochBatches(pairs, items, 2, 16, 0, 0, 1))
    halves = [list(_EpochBatches(pairs, items, 2, 16, 0, rank, 2)) for rank in (0, 1)]
    for all_, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(all_.items[::2], first.items)
        assert torch.equal(all_.items[1::2], second.items)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_validation_pairs(tmp_path: Path, processes: int) -> None:
    module = data(tmp_path)
    whole = module.pairs("validation")
    found, counts = [], []
    for rank in range(processes):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=processes)  # type: ignore[assignment]
        batches = list(module.val_dataloader())
        counts.append(len(batches))
        found += [pair for b in batches for pair in zip(*map(Tensor.tolist, b), strict=True)]
    assert len(set(counts)) == 1
    assert sorted(found) == sorted(zip(*map(Tensor.tolist, whole), strict=True))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("split", ["temporal", "pairs"])
def test_each_validation_batch_has_pairs_of_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: Any, processes: int
) -> None:
    monkeypatch.setattr(ratings_module, "_EVALUATION_BATCH", 5)
    module = data(tmp_path, split=split)
    share = module.pairs("validation").watched.mean()
    for rank in range(processes):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=processes)  # type: ignore[assignment]
        batches = list(module.val_dataloader())
        assert len(batches) > 1
        for batch in batches:
            assert abs(batch.watched.sum() - share * len(batch.watched)) < 1.5


def test_validation_pairs_are_the_same_each_time_and_never_rated(tmp_path: Path) -> None:
    module = data(tmp_path)
    (first,), (second,) = list(module.val_dataloader()), list(module.val_dataloader())
    assert torch.equal(first.items, second.items)
    drawn = first.rows(first.watched == 0)
    assert len(drawn.users) == USERS
    keys = set(module.ratings.keys.tolist())
    assert not keys & set((drawn.users * len(module.ratings.item_ids) + drawn.items).tolist())


# --- the split by pairs --------------------------------------------------------------------------


def test_pairs_are_balanced_disjoint_and_split_by_label(tmp_path: Path) -> None:
    module = data(tmp_path, split="pairs")
    ratings, parts = module.ratings, module.parts
    pairs = [
        (int(u), int(i), int(w)) for p in parts.values() for u, i, w in zip(*p[:3], strict=True)
    ]
    assert len({pair[:2] for pair in pairs}) == len(pairs) == 2 * len(ratings)
    per_user = Counter((u, w) for u, _, w in pairs)
    for user in range(USERS):
        assert per_user[user, 0] == per_user[user, 1]
    for label in (0, 1):
        sizes = {name: int((part.watched == label).sum()) for name, part in parts.items()}
        n = len(ratings)
        test = round(0.1 * n)
        validation = round(0.125 * (n - test))
        assert sizes == {"train": n - test - validation, "validation": validation, "test": test}
    truth = {
        (int(u), int(i)): float(r)
        for u, i, r in zip(ratings.users, ratings.items, ratings.ratings, strict=True)
    }
    for part in parts.values():
        for u, i, w, r in zip(*part, strict=True):
            assert float(r) == (truth[int(u), int(i)] if w else 0.0)


def test_a_user_who_rated_nearly_all_gets_as_many_negatives_as_there_are(tmp_path: Path) -> None:
    path = tmp_path / "keen.csv"
    lines = [f"keen,{i},3" for i in range(18)] + [f"shy,{i},3" for i in range(10, 20)]
    path.write_text("\n".join(["user,item,rating", *lines]))
    parts = RatingsDataModule(path=str(path), split="pairs").parts
    keen = sum(int(((p.users == 0) & (p.watched == 0)).sum()) for p in parts.values())
    shy = sum(int(((p.users == 1) & (p.watched == 0)).sum()) for p in parts.values())
    assert (keen, shy) == (2, 10)


def test_the_split_depends_on_its_own_seed_alone(tmp_path: Path) -> None:
    def items(**options: Any) -> list[int]:
        found: list[int] = data(tmp_path, split="pairs", **options).parts["test"].items.tolist()
        return found

    assert items(seed=0) == items(seed=5)
    assert items(split_seed=0) != items(split_seed=1)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,film,rating\na,1,5\n", "has no column 'item'.* There are: user, film, rating"),
        ("user,item,ratings\na,1,5\n", "no column 'rating'. Did you mean 'ratings'"),
        ("", "has no column 'user'. There are: none"),
        ("user;item;rating\na;1;5\n", "separates its columns by ';'; save it with commas."),
        ("user\titem\trating\na\t1\t5\n", r"separates its columns by .*t'; save it with commas."),
        ("user,Item,rating\na,1,5\n", "has no column 'item', but 'Item': rename it, or name it by"),
        ("user, item,rating\na,1,5\n", "has no column 'item', but ' item': rename it, or name it"),
        ("user,item,rating\n", "holds no ratings"),
        ("user,item,rating\na,1,5\na,2,6\n", "line 3: rating 6 is not between 1 and 5"),
        ("user,item,rating\na,1,0\n", "line 2: rating 0 is not between 1 and 5"),
        ("user,item,rating\na,1,nan\n", "line 2: rating nan is not between"),
        ("user,item,rating\na,1,good\n", "line 2: rating 'good' is no number"),
        ("user,item,rating\na,1,5\nb,1,4\na,1,3\n", "line 4: user 'a' rated item '1' on line 2"),
        ("user,item,rating\n ,1,5\n", "line 2: expected a user, an item and a rating"),
        ("user,item,rating\na,2,5\nb, 2,4\n", "line 3: item ' 2' was '2' before"),
        ("user,item,rating\na ,2,5\na,3,4\n", "line 3: user 'a' was 'a ' before"),
        ("user,item,rating,rating\na,1,5,4\n", "has 2 columns 'rating'"),
        ("user,item,rating\na,,5\n", "line 2: expected a user, an item and a rating"),
        ("user,item,rating\na,1\n", "line 2: rating '' is no number"),
        ("user,item,rating\na,1,5\nb,2,4,5\n", "line 3: more fields than the header; quote what"),
        ('user,item,rating\na,1,5\nb,"2,4\nc,3,4\n', "row from line 3 on: unexpected end of data"),
        ("user,item,rating\n\n\na,1,9\n", "line 4: rating 9 is not between"),
        ('user,item,rating,x\na,1,5,"two\nlines"\nb,1,9,y\n', "line 4: rating 9 is not between"),
        (
            f"user,item,rating\na,1,5\n{'b' * 200_000},1,5\n",
            "row from line 3 on: field larger than",
        ),
    ],
)
def test_a_bad_file_has_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        RatingsDataModule(path=str(path)).setup()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("time", ["inf", "nan", "-inf", "1e400", str(2**63), "noon", ""])
def test_a_time_that_is_no_number_has_one_clear_line(time: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"user,item,rating,time\na,1,5,3\na,2,5,{time}\n")
    with pytest.raises(DataError, match=f"line 3: time '{time}' is no number") as caught:
        read_ratings_csv(path, time_column="time")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["30", "-1", "30"], [30, -1, 30]),
        (["3e1", "20.0", str(2**63 - 1)], [30, 20, 2**63 - 1]),
        (["0.75", "0.5", "0.25", "0.5", "2"], [2, 1, 0, 1, 3]),
        (["1e300", str(2**62), "-0.5"], [2, 1, 0]),
    ],
)
def test_times_with_fractions_keep_their_order(
    times: list[str], expected: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "mine.csv"
    lines = [f"a,{item},5,{time}" for item, time in enumerate(times)]
    path.write_text("\n".join(["user,item,rating,time", *lines]))
    assert read_ratings_csv(path, time_column="time").times.tolist() == expected


def test_a_title_that_is_missing_in_some_rows_is_taken_from_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("user,item,rating,title\na,1,5,One\nb,1,4\na,2,3,\nb,2,2,Two\na,3,1\n")
    assert read_ratings_csv(path, title_column="title").titles == ("One", "Two", "3")


def test_names_that_are_one_number_have_an_order() -> None:
    assert ordered_names(["1", "01", "2", "001", "02"]) == ("001", "01", "1", "02", "2")


@pytest.mark.parametrize("other", ["1.0", "01", "1.", "001.00"])
@pytest.mark.parametrize("what", ["user", "item"])
def test_a_number_that_is_written_in_two_ways_is_refused(
    tmp_path: Path, what: str, other: str
) -> None:
    """As by a spreadsheet that made floats of a column in half of the file."""
    path = tmp_path / "mine.csv"
    first, second = ("1,7", f"{other},8") if what == "user" else ("7,1", f"8,{other}")
    path.write_text(f"user,item,rating\n{first},5\n{second},4\n")
    message = rf"line 3: {what} '{re.escape(other)}' was '1' before; write it the same way\.$"
    with pytest.raises(DataError, match=message):
        read_ratings_csv(path)
    path.write_text("user,item,rating\n01,10.0,5\n10,1.5,4\n100,1.50,3\na1,0,3\n1e1,1,3\n")
    ratings = read_ratings_csv(path)
    assert (len(ratings.user_ids), len(ratings.item_ids)) == (5, 5), "these are different"


def test_another_scale_is_an_option(tmp_path: Path) -> None:
    path = tmp_path / "ten.csv"
    path.write_text("user,item,rating\na,1,10\na,2,9\na,3,1\n")
    assert RatingsDataModule(path=str(path), scale=(0, 10)).ratings.scale == (0.0, 10.0)


def test_too_few_ratings_to_split_have_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    path.write_text("user,item,rating\na,1,5\nb,1,5\n")
    with pytest.raises(DataError, match="2 ratings, too few for a validation part"):
        RatingsDataModule(path=str(path)).setup()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset": "movielens-10k"}, UnknownNameError, "Did you mean 'movielens-100k'"),
        ({"split": "random"}, ValueError, "must be 'temporal' or 'pairs', got 'random'"),
        ({"scale": (5, 1)}, ValueError, "scale must be a lowest and a highest rating"),
        ({"scale": "15"}, ValueError, "scale must be a lowest and a highest rating, got '15'"),
        ({"scale": 5}, ValueError, "scale must be a lowest and a highest rating, got 5"),
        ({"scale": (1, 2, 3)}, ValueError, "scale must be a lowest and a highest rating"),
        ({"scale": (1, math.inf)}, ValueError, "scale must be a lowest and a highest rating"),
        ({"negatives": 1.5}, ValueError, "^negatives must be a whole number, got 1.5$"),
        ({"split_seed": 1.5}, ValueError, "^split_seed must be a whole number, got 1.5$"),
        ({"user_column": "item"}, ValueError, "must be different, got 'item' twice$"),
        ({"time_column": "rating"}, ValueError, "must be different, got 'rating' twice$"),
        ({"negatives": 0}, ValueError, "must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "must be at least 1"),
        ({"seed": -1}, ValueError, "must not be negative, got -1"),
    ],
)
def test_bad_options_have_one_clear_line(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        RatingsDataModule(**options)
    assert "\n" not in str(caught.value)


def test_columns_of_a_file_are_different(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be different, got 'item' twice"):
        read_ratings_csv(write_csv(tmp_path), user_column="item")


@pytest.mark.parametrize(
    ("name", "member", "line", "message"),
    [
        ("movielens-100k", "u.item", "", "expected 24 fields or more between '|', got 1."),
        ("movielens-100k", "u.item", "31|Film|x", "expected 24 fields or more between '|', got 3."),
        ("movielens-100k", "u.user", "13|33", "expected 4 fields or more between '|', got 2."),
        ("movielens-100k", "u.data", "", "expected a user, an item and a rating."),
        ("movielens-1m", "movies.dat", "31::Film", "expected 3 fields or more between '::', got 2"),
        ("movielens-1m", "users.dat", "", "expected 4 fields or more between '::', got 1."),
    ],
)
def test_a_damaged_movielens_file_has_one_clear_line(
    name: str, member: str, line: str, message: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(MAKERS[name](tmp_path)) as file:
        for path in file.namelist():
            (tmp_path / Path(path).name).write_bytes(file.read(path))
    damaged = tmp_path / member
    count = len(damaged.read_text("latin-1").splitlines())
    damaged.write_text(damaged.read_text("latin-1") + line + "\n", "latin-1")
    with pytest.raises(DataError) as caught:
        read_movielens(name, tmp_path)
    assert str(caught.value).startswith(f"{member} of {tmp_path}, line {count + 1}: {message}")


def test_a_title_may_hold_what_other_readers_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(movielens_100k(tmp_path)) as file:
        members = {Path(path).name: file.read(path).decode("latin-1") for path in file.namelist()}
    members["u.item"] = members["u.item"].replace("Film 3 ", "Film\x85\x1c3 ")
    lines = {name: text.replace("\n", "\r\n") for name, text in members.items()}
    ratings = read_movielens("movielens-100k", archive(tmp_path / "ml-100k.zip", lines, "latin-1"))
    assert ratings.titles[ratings.item_ids.index("3")] == "Film\x85\x1c3 (1963)"
    assert as_triples(ratings) == {(str(u), str(i), float(r)) for u, i, r, _ in rows()}


def test_missing_files_have_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No ratings at"):
        RatingsDataModule(path=str(tmp_path / "none.csv")).setup()
    with pytest.raises(DataError, match=r"has no u\.data"):
        read_movielens("movielens-100k", tmp_path)
    (tmp_path / "ml-1m.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"Cannot read movies\.dat"):
        read_movielens("movielens-1m", tmp_path / "ml-1m.zip")
