"""Does pretraining pay? Fine-tuning against training from scratch on the same few samples.

Each example fine-tunes one weight of the zoo on other data, of which there are few, and trains the
same network from scratch on the same samples for as many steps, with the same seeds. What both are
measured on is held out and the same throughout. Runs that are finished are kept, so the command can
be interrupted and repeated.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zoo import _card_tables, cards, checkpoints, evaluation, files, finetuning, hub, training
from zoo.configs import build
from zoo.data.images import ImageDataModule
from zoo.data.pictures import ImageSplit
from zoo.data.ratings import Ratings, RatingsDataModule, read_ratings_csv
from zoo.data.sources import data_dirs
from zoo.errors import ConfigError, DataError, UnknownNameError, nearest
from zoo.evaluation import Outcome
from zoo.files import read_json, write_json
from zoo.intervals import Summary, summarise, wilson_interval
from zoo.progress import track
from zoo.provenance import made_by

__all__ = ["EXAMPLES", "Example", "Point", "markdown", "rows", "run", "update_readme", "write"]

SCRATCH, PRETRAINED = "from scratch", "fine-tuned"
_AMONG_NEW = "fine-tuned, asked among the new alone"
_OUTCOME, _RECORD = "outcome.json", "transfer.json"
_TEST_IMAGES = 2000
_TEST_BYTES = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """What one way to train came to with one amount of data.

    Attributes:
        arm: "from scratch", or a way to fine-tune.
        amount: of data, in the unit of the example.
        metric, n: what was measured, and of how many samples that were held out.
        seeds: of the few samples and of the training.
        values: one for each seed.
        intervals: 95 % for the sampling of the `n` samples, one for each seed.
        mean: over seeds, with a 95 % interval over seeds.
        gain: value less that from scratch, paired over seeds; None for that one itself.
    """

    arm: str
    amount: int
    metric: str
    n: int
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    mean: Summary
    gain: Summary | None = None

    @property
    def verdict(self) -> str:
        """Whether pretraining paid, where all of the interval of the gain says so."""
        if self.gain is None:
            return "-"
        if self.gain.interval is None:
            return "cannot tell"
        low, high = self.gain.interval
        if self.metric in _SMALLER_IS_BETTER:
            low, high = -high, -low
        return "pays" if low > 0 else "costs" if high < 0 else "cannot tell"


_SMALLER_IS_BETTER = ("nats_per_character", "squared_error", "cross_entropy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One weight and other data.

    Attributes:
        base: the weight.
        title: in words.
        unit: of `amounts`.
        amounts: of data to train on.
        steps: of every training, about.
        lr: from scratch, the recipe's order of magnitude.
        ways: name of each way to fine-tune -> options of `zoo.finetune`.
        write: folder, amount, seed, source -> data to train on, and options of the data module.
    """

    base: str
    title: str
    unit: str
    amounts: tuple[int, ...]
    steps: int
    lr: float
    ways: Mapping[str, Mapping[str, Any]]
    write: Callable[[Path, int, int, Path | None], tuple[Path, dict[str, Any]]]


# --- data ----------------------------------------------------------------------------------------


def _novels(source: Path | None) -> bytes:
    """All texts of a folder, one after the other in the order of their names."""
    folders = [source] if source else [folder / "austen" for folder in data_dirs()]
    for folder in folders:
        paths = [folder] if folder.is_file() else sorted(folder.glob("*.txt"))
        if paths:
            return b"\n".join(path.read_bytes() for path in paths)
    raise DataError(
        f"No novels in {' or '.join(map(str, folders))}: put Austen's there as .txt (Project "
        f"Gutenberg 105, 121, 141, 158, 161 and 1342), or give a file or folder as --data."
    )


def _write_text(
    folder: Path, amount: int, seed: int, source: Path | None
) -> tuple[Path, dict[str, Any]]:
    """`amount` bytes from a random place, then the end of the last novel, which is held out."""
    text = _novels(source)
    held = min(_TEST_BYTES, len(text) // 4)
    place = int(np.random.default_rng(seed).integers(0, max(len(text) - held - amount, 1)))
    part = text[place : min(place + amount, len(text) - held)] + text[-held:]
    path = folder / "text.txt"
    path.write_bytes(part)
    # The half keeps rounding away from the byte at the boundary.
    return path, {"validation_fraction": (held - 0.5) / len(part)}


def _few(dataset: str) -> Callable[[Path, int, int, Path | None], tuple[Path, dict[str, Any]]]:
    """Writes a folder of pictures of a known set: `amount` of each class, and the test images."""

    def write(
        folder: Path, amount: int, seed: int, source: Path | None
    ) -> tuple[Path, dict[str, Any]]:
        data = ImageDataModule(dataset, data_dir=None if source is None else str(source))
        data.setup()
        names = data.preprocessing.classes
        generator = np.random.default_rng(seed)
        train = ImageSplit(data.train_images, data.train_labels)
        rows = [
            generator.choice(members, min(amount, len(members)), replace=False)
            for members in _members(train)
        ]
        for part in ("train", "test"):  # where pictures of other data may lie
            shutil.rmtree(folder / part, ignore_errors=True)
        _write_pictures(folder / "train", train, np.concatenate(rows), names)
        # The first of each class, whatever the seed.
        test = ImageSplit(data.test_images, data.test_labels)
        share = max(_TEST_IMAGES // len(names), 1)
        kept = np.concatenate([members[:share] for members in _members(test)])
        _write_pictures(folder / "test", test, kept, names)
        return folder, {}

    return write


def _members(split: ImageSplit) -> list[NDArray[np.int64]]:
    labels = split.labels.numpy()
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _write_pictures(
    folder: Path, split: ImageSplit, rows: NDArray[np.int64], names: Sequence[str]
) -> None:
    from PIL import Image

    for row in rows.tolist():
        # In the order of the classes, which names in alphabetical order would not keep.
        label = int(split.labels[row])
        path = folder / f"{label:03d} {names[label].replace('/', '-')}" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = split.images[row].permute(1, 2, 0).numpy()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path)


def _group(ratings: Ratings) -> set[str]:
    """A fifth of the users, whom the base does not get to see."""
    order = np.random.default_rng(0).permutation(len(ratings.user_ids))
    return {ratings.user_ids[row] for row in order[: max(len(order) // 5, 1)]}


def _ratings(source: Path | None) -> Ratings:
    if source is not None and source.is_file():
        return read_ratings_csv(source)
    return RatingsDataModule(data_dir=None if source is None else str(source)).ratings


def _by_user(ratings: Ratings, rows: Sequence[int], users: set[str]) -> dict[int, list[int]]:
    """The rows of each of the users, in their order."""
    found: dict[int, list[int]] = {}
    for row in rows:
        user = int(ratings.users[row])
        if ratings.user_ids[user] in users:
            found.setdefault(user, []).append(row)
    return found


def _write_ratings(
    path: Path, ratings: Ratings, users: set[str], most: int | None, known_to: set[str] | None
) -> Path:
    """Ratings of some users in order of time; of each the first `most` and the last two.

    Of items that nobody of `known_to` has rated, there are none: a base that has not seen them has
    nothing to carry over.
    """
    rows = torch.argsort(ratings.times, stable=True).tolist()
    if known_to is not None:
        others = _by_user(ratings, rows, known_to).values()
        known = {int(ratings.items[row]) for rated in others if len(rated) >= 3 for row in rated}
        rows = [row for row in rows if int(ratings.items[row]) in known]
    kept: list[int] = []
    for rated in _by_user(ratings, rows, users).values():
        if len(rated) >= (3 if most is None else most + 2):
            kept += rated if most is None else [*rated[:most], *rated[-2:]]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "rating", "time"])
        for row in kept:
            user, item = int(ratings.users[row]), int(ratings.items[row])
            writer.writerow(
                [
                    ratings.user_ids[user],
                    ratings.item_ids[item],
                    f"{float(ratings.ratings[row]):g}",
                    int(ratings.times[row]),
                ]
            )
    return path


def _new_users(
    folder: Path, amount: int, seed: int, source: Path | None
) -> tuple[Path, dict[str, Any]]:
    """The first `amount` ratings of each user of the group; the last two are held out."""
    ratings = _ratings(source)
    group = _group(ratings)
    others = set(ratings.user_ids) - group
    path = _write_ratings(folder / "ratings.csv", ratings, group, amount, others)
    return path, {"time_column": "time"}


# --- examples ------------------------------------------------------------------------------------

_CIFAR100 = Example(
    base="sau-shufflenet-v2-x0-5.cifar100",
    title="CIFAR-100 to Fashion-MNIST",
    unit="images per class",
    amounts=(5, 20, 100),
    steps=300,
    lr=3e-3,
    ways={
        PRETRAINED: {"lr": 1e-3, "layer_decay": 0.9},
        "head alone": {"lr": 1e-2, "freeze": "encoder"},
    },
    write=_few("fashion-mnist"),
)

EXAMPLES: dict[str, Example] = {
    "austen": Example(
        base="cached-transformer-lm.tiny-shakespeare",
        title="Tiny Shakespeare to Austen's novels",
        unit="bytes",
        amounts=(20_000, 100_000, 500_000),
        steps=200,
        lr=2e-3,
        ways={PRETRAINED: {"lr": 5e-4}, "LoRA": {"lr": 3e-3, "adapters": "lora", "rank": 8}},
        write=_write_text,
    ),
    "cifar100-to-fashion-mnist": _CIFAR100,
    "cifar100-to-coarse": dataclasses.replace(
        _CIFAR100,
        title="CIFAR-100 to its 20 coarse classes, on images that the base has seen",
        write=_few("cifar100-coarse"),
    ),
    "mnist-to-fashion-mnist": Example(
        base="ode-resnet.mnist",
        title="MNIST to Fashion-MNIST, in continuous depth",
        unit="images per class",
        amounts=(5, 20, 100),
        steps=300,
        lr=3e-3,
        ways={PRETRAINED: {"lr": 1e-3}, "head alone": {"lr": 1e-2, "freeze": "encoder"}},
        write=_few("fashion-mnist"),
    ),
    "new-users": Example(
        base="dselect-k-recommender.movielens-100k",
        title="a recommender to users whom its base has not seen",
        unit="ratings per user",
        amounts=(3, 10, 30),
        steps=400,
        lr=4e-3,
        ways={
            PRETRAINED: {"lr": 2e-3},
            "users alone": {"lr": 1e-2, "freeze": ["items", "moe", "towers"]},
        },
        write=_new_users,
    ),
    "new-classes": Example(
        base="online-ensemble.split-mnist",
        title="an ensemble that knows digits meets ten kinds of clothes",
        unit="images per class",
        amounts=(5, 20, 100),
        steps=0,
        lr=0.0,
        ways={PRETRAINED: {}, _AMONG_NEW: {}},
        write=_few("fashion-mnist"),
    ),
}
"""The worked examples by name."""


# --- runs ----------------------------------------------------------------------------------------


def run(
    name: str,
    *,
    base: str | os.PathLike[str] | None = None,
    amounts: Sequence[int] | None = None,
    seeds: Sequence[int] = (1, 2, 3),
    steps: int | None = None,
    out: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    pretraining: Sequence[str] = (),
) -> list[Point]:
    """Train what is missing of an example, and return all of it.

    Args:
        name: of one of `EXAMPLES`.
        base: in place of the example's: a name or a checkpoint folder.
        amounts: of data; None: the example's.
        seeds: of the few samples and of the trainings.
        steps: of every training, about; None: the example's. Not of "new-classes", which learns in
            one pass.
        out: folder of the runs; None: `runs/transfer/<name>`.
        data: where the data are looked for first; a file or a folder, by example.
        pretraining: `section.key=value` for the base of "new-users", which is trained here, without
            the users that are to be new.

    Raises:
        ConfigError: there is no amount or no seed, a number is too small or does not apply, or a
            finished run was made with other options, from other weights or on other data; the last
            is looked at where other runs of the same amount and seed are missing.
        UnknownNameError: there is no such example.
        ZooError: a weight or data are not to be had, or a run is not possible.
    """
    if name not in EXAMPLES:
        raise UnknownNameError(
            f"No example {name!r}.{nearest(name, EXAMPLES)} There are: {', '.join(EXAMPLES)}."
        )
    example, source = EXAMPLES[name], None if data is None else Path(data)
    amounts = example.amounts if amounts is None else amounts
    if not seeds or min(amounts, default=0) < 1:
        raise ConfigError("transfer needs at least one seed, and amounts of at least 1.")
    if steps is not None and not example.steps:
        raise ConfigError(f"{name} learns in one pass; leave out steps.")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}.")
    steps = example.steps if steps is None else steps
    # The same run counted twice would narrow the intervals.
    amounts, seeds = tuple(dict.fromkeys(amounts)), tuple(dict.fromkeys(seeds))
    folder = Path("runs") / "transfer" / name if out is None else Path(out)
    start = _start(name, base, folder)
    arms = [SCRATCH, *example.ways]
    jobs = [
        (amount, seed, folder / f"amount_{amount}" / f"seed_{seed}")
        for amount in amounts
        for seed in seeds
    ]
    finished = [
        where / arm for _, _, where in jobs for arm in arms if (where / arm / _OUTCOME).is_file()
    ]
    for path in finished:
        _check_finished(path, start, steps)
    if start == _own_base(folder):
        _train_base_of_others(folder / "base", source, pretraining)
    weights = _weights(start)  # before anything is written
    for path in finished:
        if path.name != SCRATCH:
            _check_weights(path, weights)
    found: dict[tuple[str, int], list[Outcome]] = {}
    for amount, seed, where in track(jobs, name):
        if not all((where / arm / _OUTCOME).is_file() for arm in arms):
            where.mkdir(parents=True, exist_ok=True)
            done = [where / arm for arm in arms if (where / arm / _OUTCOME).is_file()]
            path, options = _write_data(where, done, example, amount, seed, source)
            made_of = {"base": os.fspath(start), "weights": weights, "data": _digest(path)}
            if name == "new-classes":
                _learn_classes(where, path, start, seed, made_of)
            else:
                _train(where, example, start, path, options, seed, steps, made_of)
        for arm in arms:
            found.setdefault((arm, amount), []).append(_outcome(where / arm))
    return _points(found, seeds)


def _start(name: str, base: str | os.PathLike[str] | None, folder: Path) -> str | os.PathLike[str]:
    """What an example starts from, with its runs in a folder: a name or a checkpoint folder."""
    if name == "new-users" and base is None:
        return _own_base(folder)
    return base or EXAMPLES[name].base


def _own_base(folder: Path) -> Path:
    """Where the base of "new-users" is, which is trained beside its runs."""
    return folder / "base" / "run" / "checkpoint"


def _check_finished(run: Path, base: str | os.PathLike[str], steps: int) -> None:
    """Check that a finished run started from this base and was that long, where it says so.

    Raises:
        ConfigError: it did not, or was not.
    """
    before: dict[str, Any] = {"base": read_json(run / _OUTCOME).get("base")}
    if (run / files.RECIPE_FILE).is_file():
        recipe = training.read_recipe(run / files.RECIPE_FILE)
        before["steps"] = recipe.options["trainer"].get("max_steps")
        if recipe.finetune is not None:
            before["base"] = recipe.finetune.base_model
    wanted: dict[str, str | int] = {"base": os.fspath(base), "steps": steps}
    for key, now in wanted.items():
        known = before.get(key)
        if known is not None and not _same(known, now):
            raise ConfigError(
                f"{run} was made with other options ({key} was {known!r}, not {now!r}); choose "
                f"another --out."
            )


def _weights(base: str | os.PathLike[str]) -> str:
    """Digest of the weights that a base stands for; a name may come to stand for others."""
    return files.digest(hub.resolve(base)[0] / files.WEIGHTS_FILE)


def _check_weights(run: Path, weights: str) -> None:
    """Check that a finished run started from these weights, where it says so.

    Raises:
        ConfigError: it did not.
    """
    if read_json(run / _OUTCOME).get("weights", weights) != weights:
        raise ConfigError(
            f"{run} was made with other weights of the same name; choose another --out, or remove "
            f"it to make it anew."
        )


def _write_data(
    where: Path,
    done: Sequence[Path],
    example: Example,
    amount: int,
    seed: int,
    source: Path | None,
) -> tuple[Path, dict[str, Any]]:
    """Write the data of an amount and a seed, of which some runs may be done.

    Raises:
        ConfigError: those learned from other data; what was written for them is left as it is.
    """
    before = {read_json(run / _OUTCOME).get("data") for run in done} - {None}
    if before:
        with tempfile.TemporaryDirectory() as folder:
            path, _ = example.write(Path(folder), amount, seed, source)
            now = _digest(path)
        if before != {now}:
            raise ConfigError(f"{where} was made with other data; choose another --out.")
    return example.write(where, amount, seed, source)


def _digest(path: Path) -> str:
    """Of a file; or of the pictures in a folder, beside which the runs lie: those of each part."""
    if path.is_file():
        return files.digest(path)
    return " ".join(files.digest(path / part, (".png",)) for part in ("train", "test"))


def _same(a: str | int, b: str | int) -> bool:
    """Whether options are the same, or lead to the same weight or folder."""
    if a == b or not (isinstance(a, str) and isinstance(b, str)):
        return a == b
    if Path(a).exists() and Path(b).exists():
        return Path(a).samefile(b)
    try:
        return cards.find(a) == cards.find(b)
    except UnknownNameError:
        return False


def _train_base_of_others(folder: Path, source: Path | None, overrides: Sequence[str]) -> None:
    """Train the recommender by its recipe on all users but the new ones."""
    ratings = _ratings(source)
    folder.mkdir(parents=True, exist_ok=True)
    others = set(ratings.user_ids) - _group(ratings)
    path = _write_ratings(folder / "ratings.csv", ratings, others, None, None)
    seen = read_ratings_csv(path, time_column="time")
    recipe = training.read_recipe(
        EXAMPLES["new-users"].base,
        [
            f"data.path={path}",
            "data.time_column=time",
            f"model.network.num_users={len(seen.user_ids)}",
            f"model.network.num_items={len(seen.item_ids)}",
            *overrides,
        ],
    )
    if (folder / "run" / "checkpoint").is_dir():
        # More epochs than it has would make another base of it, under runs that began with it.
        training.check_finished(recipe, folder / "run")
    training.fit(recipe, out=folder / "run", resume=True)


def _train(
    where: Path,
    example: Example,
    base: str | os.PathLike[str],
    path: Path,
    options: dict[str, Any],
    seed: int,
    steps: int,
    made_of: Mapping[str, str],
) -> None:
    for way, changes in example.ways.items():
        if (where / way / _OUTCOME).is_file():
            continue
        overrides = [f"data.{key}={value}" for key, value in options.items()]
        # Passes over few samples are many; measuring after each would cost more than they do.
        overrides += [f"trainer.max_steps={steps}", "trainer.limit_val_batches=0"]
        tuned = finetuning.finetune(
            base, path, epochs=steps, seed=seed, out=where / way, overrides=overrides, **changes
        )
        _keep(where / way, tuned.finetuned.after[0], made_of)
    if not (where / SCRATCH / _OUTCOME).is_file():
        recipe = training.read_recipe(where / PRETRAINED / "checkpoint" / "recipe.yaml")
        optimizer = recipe.options["model"]["optimizer"]
        optimizer |= {"lr": example.lr, "layer_decay": None}
        done = training.fit(
            dataclasses.replace(recipe, finetune=None), out=where / SCRATCH, resume=True
        )
        module = checkpoints.load(done.checkpoint)
        measured = evaluation.evaluate_module(module, training.data_module(recipe))
        _keep(where / SCRATCH, measured[0], made_of)


def _learn_classes(
    where: Path, path: Path, base: str | os.PathLike[str], seed: int, made_of: Mapping[str, str]
) -> None:
    """New classes go into the stream after those that are known; from scratch, into an empty
    learner behind the same encoder with random weights. The seed draws these, and the order."""
    folder, card = hub.resolve(base)
    known: Any = checkpoints.load(folder, files=None if card is None else card.files)
    size, channels = known.preprocessing.size, known.preprocessing.channels
    data = ImageDataModule(path=str(path), size=size, channels=channels)
    data.setup()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        empty = dataclasses.replace(known.config, num_classes=0, grows=True)
        fresh = type(known)(network=empty, preprocessing=known.preprocessing).eval()
    for arm, module in ((PRETRAINED, known), (SCRATCH, fresh)):
        first = module.network.learner.num_classes
        order = torch.randperm(
            len(data.train_labels), generator=torch.Generator().manual_seed(seed)
        )
        for rows in torch.split(order, 60):
            module.learn(data.train_images[rows], data.train_labels[rows] + first)
        names = module.preprocessing.classes[first:] if first else module.preprocessing.classes
        truth = [names[label] for label in data.test_labels.tolist()]
        known_now = len(module.preprocessing.classes)
        ranked = [p.classes for p in module.predict(data.test_images, top_k=known_now)]
        first_choice = [classes[0] for classes in ranked]
        _keep(where / arm, _accuracy(first_choice, truth, "all"), made_of)
        if first:
            # One of twenty is harder to tell than one of ten, which is what the other learned.
            new = set(names)
            labels = [next(name for name in classes if name in new) for classes in ranked]
            _keep(where / _AMONG_NEW, _accuracy(labels, truth, "the new"), made_of)


def _accuracy(labels: Sequence[str], truth: Sequence[str], among: str) -> Outcome:
    right = sum(label == true for label, true in zip(labels, truth, strict=True))
    return Outcome(
        protocol=f"new classes among {among}",
        metric="accuracy",
        unit="image",
        value=right / len(truth),
        n=len(truth),
        interval=wilson_interval(right, len(truth)),
        interval_method="Wilson",
        split="test",
    )


_KEPT = ("metric", "value", "n", "interval", "interval_method", "protocol")
"""What is kept of an outcome, beside what it was made of."""


def _keep(folder: Path, outcome: Outcome, made_of: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(outcome)
    write_json(folder / _OUTCOME, {**{key: values[key] for key in _KEPT}, **made_of})


def _outcome(folder: Path) -> Outcome:
    values = read_json(folder / _OUTCOME)
    stored = {key: values[key] for key in _KEPT}
    low, high = stored.pop("interval")
    return Outcome(unit="sample", interval=(low, high), **stored)


def _points(found: Mapping[tuple[str, int], list[Outcome]], seeds: tuple[int, ...]) -> list[Point]:
    points = []
    for (arm, amount), outcomes in found.items():
        values = tuple(outcome.value for outcome in outcomes)
        scratch = [outcome.value for outcome in found[SCRATCH, amount]]
        gains = [value - other for value, other in zip(values, scratch, strict=True)]
        points.append(
            Point(
                arm=arm,
                amount=amount,
                metric=outcomes[0].metric,
                n=outcomes[0].n,
                seeds=seeds,
                values=values,
                intervals=tuple(outcome.interval for outcome in outcomes),
                mean=summarise(values),
                gain=None if arm == SCRATCH else summarise(gains),
            )
        )
    return points


# --- tables --------------------------------------------------------------------------------------


HEADER = ("training", "data", "metric", "n", "value", "gain over scratch", "pretraining")


def rows(points: Sequence[Point]) -> list[list[str]]:
    """One row for each point, in words; intervals are of 95 %, over seeds."""
    return [
        [
            point.arm,
            f"{point.amount:,}",
            point.metric.replace("_", " "),
            f"{point.n:,}",
            f"{point.mean:.4f}",
            "-" if point.gain is None else f"{point.gain:+.4f}",
            point.verdict,
        ]
        for point in points
    ]


def write(
    name: str,
    points: Sequence[Point],
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    command: str | None = None,
) -> None:
    """Keep everything as `transfer.json`, and the table as `transfer.md`.

    Args:
        name: of the example.
        points: what `run` returned.
        folder: of the runs.
        base: as of `run`.
        command: that made them; None: the one without options.
    """
    folder, example = Path(folder), EXAMPLES[name]
    write_json(
        folder / _RECORD,
        {
            "example": name,
            "base": os.fspath(_start(name, base, folder)),
            "unit": example.unit,
            **made_by(command or f"zoo transfer {name}"),
            "points": [dataclasses.asdict(point) | {"verdict": point.verdict} for point in points],
        },
    )
    table = _card_tables.table(HEADER, rows(points))
    text = (
        f"# {example.title[0].upper()}{example.title[1:]}\n\nData in {example.unit}.\n\n{table}\n"
    )
    files.write_bytes(folder / "transfer.md", text.encode())


def update_readme(readme: Path, folder: Path) -> None:
    """Keep what `write` wrote, and write the table of all that was kept, between `zoo:transfer`.

    Args:
        readme: the outcomes are kept beside it, in `model_cards/transfer`.
        folder: of the runs.

    Raises:
        ConfigError: the README lacks the markers; nothing is kept then.
    """
    home = readme.parent / "model_cards" / "transfer"
    new = read_json(folder / _RECORD)
    if new["base"] != EXAMPLES[new["example"]].base:
        del new["base"]  # a folder of this machine
    kept = {path.stem: read_json(path) for path in home.glob("*.json")} | {new["example"]: new}
    _card_tables.fill_file(readme, "transfer", markdown([kept[n] for n in EXAMPLES if n in kept]))
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / f"{new['example']}.json", new)


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """One table of several outcomes, each as `write` keeps it."""
    lines = []
    for record in records:
        title = f"`{record['example']}`: {EXAMPLES[record['example']].title}"
        for stored in record["points"]:
            values = {key: value for key, value in stored.items() if key != "verdict"}
            (row,) = rows([build(Point, values, record["example"])])
            row[1] += f" {record['unit']}"
            lines.append([title, *row])
            title = ""
    return _card_tables.table(["example", *HEADER], lines)
