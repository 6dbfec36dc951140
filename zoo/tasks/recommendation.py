"""Recommendation with several tasks: who watches what, and how they rate it."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.data.ratings import (
    RATING_SETS,
    TITLE_FILES,
    RatingBatch,
    Ratings,
    RatingsDataModule,
    have_movielens,
    load_movielens,
)
from zoo.errors import ConfigError, DataError, UnknownNameError, ZooError, nearest
from zoo.families.dselect_k import (
    MatrixFactorisation,
    MatrixFactorisationConfig,
    MultiTaskNet,
    RecommenderConfig,
    RecommenderNet,
)
from zoo.families.dselect_k.networks import Task
from zoo.progress import track
from zoo.tasks.base import Exportable, Measurement, ZooModule, check_count, count_macs, finite
from zoo.tasks.mixtures import MixtureModule
from zoo.tasks.optimization import OptimizerConfig

__all__ = [
    "Catalogue",
    "Explanation",
    "FactorisationRecommender",
    "PairPrediction",
    "Recommendation",
    "Recommender",
    "SimilarItem",
    "TaskExplanation",
]

_TOP = 10
_BATCH = 16_384
_TASK_OF: dict[str, Task] = {"rating": "rate", "pairs-watch": "watch", "pairs-rating": "rate"}
"""Protocols that measure the loss of a task."""
_FOLD_IN_STEPS = 100
_FOLD_IN_RATE = 0.05
_FOLD_IN_DECAY = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The users and items that a recommender knows, kept in its `config.json`.

    Raises:
        ValueError: an id is there twice, the titles do not fit, or the scale is upside down.
    """

    users: tuple[str, ...]
    """Id of each user, in the order of the network's table."""
    items: tuple[str, ...]
    """Id of each item, likewise."""
    scale: tuple[float, float]
    """Lowest and highest rating."""
    titles: tuple[str, ...] = ()
    """Title of each item; empty where titles must not be passed on."""
    dataset: str = ""
    """A known set to look titles and histories up in, where this machine has it."""

    def __post_init__(self) -> None:
        for name in ("users", "items"):
            ids = getattr(self, name)
            if not ids or len(set(ids)) < len(ids):
                raise ValueError(f"{name} must be one or more different ids")
        if self.titles and len(self.titles) != len(self.items):
            raise ValueError(f"{len(self.titles)} titles do not fit {len(self.items)} items")
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale must be a lowest and a highest rating, got {self.scale}")
        if self.dataset and self.dataset not in RATING_SETS:
            raise ValueError(f"dataset {self.dataset!r} is not one of {', '.join(RATING_SETS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairPrediction:
    """What is expected of a user and an item."""

    user: str
    item: str
    title: str
    watch: float | None
    """Score of watching, from 0 to 1: comparable between items, and no calibrated probability,
    since unrated items were drawn for training; None for a model without this task."""
    rating: float | None
    """Expected rating, within the scale; None for a model without this task."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One item of a list, best first."""

    item: str
    title: str
    score: float
    """What the list is ordered by: the score of watching, or else the expected rating."""
    rating: float | None
    """Expected rating, within the scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimilarItem:
    """An item whose vector points the same way."""

    item: str
    title: str
    similarity: float
    """Cosine of the angle between the two vectors, from -1 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskExplanation:
    """How one task's answer came about."""

    task: str
    value: float
    """Score of watching from 0 to 1, or expected rating."""
    experts: dict[int, float]
    """Experts that were used, with their weights, heaviest first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """How the answers on a user and an item came about."""

    user: str
    item: str
    title: str
    tasks: tuple[TaskExplanation, ...]


class Recommender(MixtureModule):
    """A recommender with shared experts: one task is watching, the other rating.

    The loss is a * (cross-entropy of watching) + (1 - a) * (squared error of the rating, where
    there is one) + what the gates add. With one task its loss counts in full.

    Args:
        network: shape of the network.
        optimizer: how it is trained.
        preprocessing: users and items; None: those of the data that it is trained on.
        watch_weight: a, in [0, 1]; not used with one task.
        compile: compile the network's blocks for training.

    Raises:
        ConfigError: an option is out of range.
    """

    network_config: ClassVar[type[Any]] = RecommenderConfig
    preprocessing_config: ClassVar[type[Any] | None] = Catalogue
    head_parameters: ClassVar[tuple[str, ...]] = ("towers.head.weight", "towers.head.bias")
    protocols: ClassVar[dict[str, str]] = {
        "ndcg": "temporal split: NDCG@10 of each user's last item among all unrated items",
        "recall": "temporal split: share of users whose last item is among the first 10",
        "rating": "temporal split: squared error of the rating of each user's last item",
        "pairs-watch": "pair split: cross-entropy of watching, rated and drawn pairs",
        "pairs-rating": "pair split: squared error of the rating, rated pairs",
    }

    network: RecommenderNet | MatrixFactorisation
    preprocessing: Catalogue | None

    def __init__(
        self,
        network: RecommenderConfig = RecommenderConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        preprocessing: Catalogue | None = None,
        watch_weight: float = 0.5,
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, compile)
        if not 0.0 <= watch_weight <= 1.0:
            raise ConfigError(f"watch_weight must be in [0, 1], got {watch_weight}")
        self.watch_weight = watch_weight
        self.task_names = tuple(network.tasks)
        self.preprocessing = preprocessing
        if preprocessing is not None:
            self._check_fit(preprocessing)
        self.network = self._build(network)
        self.val_loss, self.val_watch, self.val_rate = MeanMetric(), MeanMetric(), MeanMetric()
        self._ratings: Ratings | None = None

    def _build(self, network: Any) -> RecommenderNet | MatrixFactorisation:
        return RecommenderNet(network)

    def protocols_on(self, datamodule: Any) -> tuple[str, ...]:
        """See `ZooModule.protocols_on`. A model without watching ranks by the rating; losses are
        those of its own tasks."""
        by_pairs = getattr(datamodule, "split", "temporal") == "pairs"
        return tuple(
            name
            for name in self.protocols
            if name.startswith("pairs-") is by_pairs
            and _TASK_OF.get(name, self.task_names[0]) in self.task_names
        )

    # ---------------------------------------------------------------- training

    def _check_fit(self, catalogue: Catalogue) -> None:
        for what, have in (("users", len(catalogue.users)), ("items", len(catalogue.items))):
            takes = getattr(self.config, f"num_{what}")
            if have != takes:
                raise ConfigError(
                    f"The data have {have} {what}, but the network is for {takes}: "
                    f"set model.network.num_{what}={have}"
                )

    def bind(self, datamodule: RatingsDataModule) -> None:
        """Take users, items and ratings of a data module.

        Raises:
            ConfigError: the network is for other numbers of users, items or features.
        """
        ratings = datamodule.ratings
        known = datamodule.path is None
        catalogue = Catalogue(
            users=ratings.user_ids,
            items=ratings.item_ids,
            scale=ratings.scale,
            # MovieLens may not be passed on; a user's own titles are theirs. Ids are no titles.
            titles=() if known or ratings.titles == ratings.item_ids else ratings.titles,
            dataset=datamodule.dataset if known else "",
        )
        self._check_fit(catalogue)
        tables = {}
        for what in ("user", "item") if isinstance(self.network, RecommenderNet) else ():
            table = getattr(ratings, f"{what}_features")
            width = getattr(self.config, f"{what}_features")
            if width and table.shape[1] != width:
                raise ConfigError(
                    f"The data have {table.shape[1]} features of each {what}, but the network "
                    f"is for {width}: set model.network.{what}_features={table.shape[1]}"
                )
            if width:
                tables[f"{what}_table"] = table
        # Nothing is taken before all of it is known to fit.
        for name, table in tables.items():
            getattr(self.network, name).copy_(table)
        self.preprocessing, self._ratings = catalogue, ratings

    def take_preprocessing(self, preprocessing: Any, datamodule: Any) -> None:
        """Users and items are those of the data, whatever the base knows."""
        self.bind(datamodule)

    def carried_rows(self, base: ZooModule) -> dict[str, tuple[Tensor, Tensor]]:
        """Users and items that the base knows by their ids keep their vectors."""
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for what in ("users", "items"):
            known = {name: row for row, name in enumerate(getattr(base.preprocessing, what))}
            ids = getattr(self.catalogue, what)
            pairs = [(row, known[name]) for row, name in enumerate(ids) if name in known]
            index = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
            names = [n for n in self.network.state_dict() if n.startswith((what, f"{what[:-1]}_t"))]
            rows |= dict.fromkeys(names, (index[:, 0], index[:, 1]))
        return rows

    def on_fit_start(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, RatingsDataModule):
            self.bind(datamodule)
        super().on_fit_start()

    def _losses(self, outputs: Tensor, batch: RatingBatch) -> dict[str, Tensor]:
        """Loss of each task for each pair, B; that of rating is 0 where there is none."""
        losses = {}
        for index, task in enumerate(self.task_names):
            value = outputs[:, index].float()
            if task == "watch":
                losses[task] = F.binary_cross_entropy_with_logits(
                    value, batch.watched, reduction="none"
                )
            else:
                losses[task] = (value - batch.ratings).square() * batch.watched
        return losses

    def _weigh(self, means: dict[str, Tensor]) -> Tensor:
        if len(means) == 1:  # nothing to be weighed against
            return next(iter(means.values()))
        weights = {"watch": self.watch_weight, "rate": 1.0 - self.watch_weight}
        return torch.stack([weights[task] * mean for task, mean in means.items()]).sum()

    def training_step(self, batch: RatingBatch, batch_idx: int) -> Tensor:
        """Weighed loss of the tasks, and what the gates add."""
        output = self.network(batch.users, batch.items)
        losses = self._losses(output.outputs, batch)
        rated = batch.watched.sum().clamp(min=1.0)
        means = {
            task: loss.mean() if task == "watch" else loss.sum() / rated
            for task, loss in losses.items()
        }
        for task, mean in means.items():
            self.log(f"train_{task}", mean)
        loss = self._weigh(means) + self.regulariser(output)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: RatingBatch, batch_idx: int) -> None:
        losses = self._losses(self.network(batch.users, batch.items).outputs, batch)
        for task, metric in (("watch", self.val_watch), ("rate", self.val_rate)):
            if task in losses:
                metric.update(losses[task] if task == "watch" else losses[task][batch.watched > 0])
                self.log(f"val_{task}", metric, prog_bar=True)
        if batch_idx == 0:
            self.watch_gates(batch.users, batch.items)

    def on_validation_epoch_end(self) -> None:
        means = {}
        for task, metric in (("watch", self.val_watch), ("rate", self.val_rate)):
            if task in self.task_names:
                means[task] = metric.compute()
        self.log("val_loss", self._weigh(means))

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """Positions of users and items B in the catalogue in, outputs B x T out; see `forward` of
        the network."""
        counts = {"users": self.config.num_users, "items": self.config.num_items}
        return self._exportable(
            {name: torch.randint(n, (batch,), generator=generator) for name, n in counts.items()}
        )

    # -------------------------------------------------------------- evaluation

    def samples(self, batch: RatingBatch) -> int:
        return len(batch.users)

    def macs(self, batch: RatingBatch) -> int:
        """Multiply-accumulates of a forward pass per pair."""
        users, items = batch.users.to(self.device), batch.items.to(self.device)
        return count_macs(self.network, users, items) // len(users)

    @torch.no_grad()
    def measure(self, datamodule: RatingsDataModule, protocol: str) -> Measurement:  # type: ignore[override]
        """Measure by one of `protocols`, in eval mode.

        Sampling units are users with the temporal split, and pairs with the other.

        Raises:
            ZooError: there is no such protocol, it is not one of this split, or it is of a task
                that the model does not have; or a score is not finite.
        """
        if protocol not in self.protocols:
            raise ZooError(
                f"Unknown protocol {protocol!r}; choose one of {', '.join(self.protocols)}."
            )
        task = _TASK_OF.get(protocol)
        if task is not None and task not in self.task_names:
            raise ZooError(
                f"This model does not predict {task!r}; its tasks are {self.task_names}."
            )
        if protocol not in self.protocols_on(datamodule):
            raise ZooError(
                f"Protocol {protocol!r} is not for data.split={datamodule.split}; choose one of "
                f"{', '.join(self.protocols_on(datamodule))}."
            )
        datamodule.setup()
        self._check_same(datamodule.ratings)
        if task is None:
            sums = self.gains(datamodule, protocol)
            expected = len(datamodule.parts["test"].users)
        else:
            sums, expected = self._test_losses(datamodule, task)
        if len(sums) != expected:
            raise AssertionError(f"counted {len(sums)} samples of {expected}")
        metric, unit = {
            "ndcg": ("ndcg@10", "user"),
            "recall": ("recall@10", "user"),
            "rating": ("squared_error", "user"),
            "pairs-watch": ("cross_entropy", "pair"),
            "pairs-rating": ("squared_error", "pair"),
        }[protocol]
        return Measurement(
            metric=metric,
            unit=unit,
            sums=sums,
            counts=torch.ones(len(sums), dtype=torch.int64),
            kind="proportion" if protocol == "recall" else "mean",
            split="test",
        )

    def _test_losses(self, datamodule: RatingsDataModule, task: Task) -> tuple[Tensor, int]:
        """Loss of each test pair, and how many there are to be."""
        pairs = datamodule.parts["test"]
        expected = len(pairs.users) if task == "watch" else int(pairs.watched.sum())
        if task == "rate":
            pairs = pairs.rows(pairs.watched > 0)
        losses = []
        for start in range(0, len(pairs.users), _BATCH):
            batch = pairs.rows(slice(start, start + _BATCH))
            outputs = self._outputs(batch.users, batch.items)
            losses.append(self._losses(outputs, batch)[task].double())
        return torch.cat(losses), expected

    def _outputs(self, users: Tensor, items: Tensor) -> Tensor:
        """Outputs B x T of the network, on the CPU."""
        with self.evaluating():
            outputs: Tensor = self.network(users.to(self.device), items.to(self.device)).outputs
        return outputs.float().cpu()

    def _score(self, outputs: Tensor) -> Tensor:
        """What items are ordered by, B: the logit of watching, else the rating."""
        task = "watch" if "watch" in self.task_names else self.task_names[0]
        return outputs[:, self.task_names.index(task)]

    def gains(
        self,
        datamodule: RatingsDataModule,
        protocol: str,
        part: Literal["validation", "test"] = "test",
    ) -> Tensor:
        """NDCG@10 ("ndcg") or Recall@10 ("recall") of each user who has an item in the part.

        Of items with equal scores every order is as likely, and the mean over these is taken.
        """
        best, worst = self.ranks(datamodule, part)
        ranks = torch.arange(1, len(datamodule.ratings.item_ids) + 1, dtype=torch.float64)
        gain = 1.0 / torch.log2(ranks + 1.0) if protocol == "ndcg" else torch.ones_like(ranks)
        total = F.pad(torch.where(ranks <= _TOP, gain, 0.0).cumsum(0), (1, 0))
        return (total[worst] - total[best - 1]) / (worst - best + 1)

    @torch.no_grad()
    def ranks(
        self, datamodule: RatingsDataModule, part: Literal["validation", "test"] = "test"
    ) -> tuple[Tensor, Tensor]:
        """Rank (1 is best) of the item in `part` of each user among all items that the user has not
        rated before it: none is sampled.

        Returns:
            For each user who has an item in the part, the best and the worst rank that the item has
            among those with an equal score.

        Raises:
            ZooError: a score is not finite.
        """
        pairs, items = datamodule.parts[part], len(datamodule.ratings.item_ids)
        before = [datamodule.parts["train"]]
        if part == "test":
            before.append(datamodule.parts["validation"])
        rated = torch.zeros(len(datamodule.ratings.user_ids), items, dtype=torch.bool)
        for earlier in before:
            rated[earlier.users, earlier.items] = True
        at_once = max(_BATCH // items, 1)
        every, best, worst = torch.arange(items), [], []
        for start in track(range(0, len(pairs.users), at_once), "users"):
            users = pairs.users[start : start + at_once]
            wanted = pairs.items[start : start + at_once, None]
            outputs = self._outputs(users.repeat_interleave(items), every.repeat(len(users)))
            scores = finite(self._score(outputs), "scores").view(len(users), items)
            own = scores.gather(1, wanted)
            others = ~rated[users]
            others.scatter_(1, wanted, False)
            best.append(1 + ((scores > own) & others).sum(1))
            worst.append(1 + ((scores >= own) & others).sum(1))
        return torch.cat(best), torch.cat(worst)

    # ------------------------------------------------------------------- usage

    @property
    def catalogue(self) -> Catalogue:
        """The users and items that the model knows.

        Raises:
            ZooError: it was not trained yet.
        """
        if self.preprocessing is None:
            raise ZooError("This recommender knows no users and items: train it first.")
        return self.preprocessing

    def _check_same(self, ratings: Ratings) -> None:
        if (ratings.user_ids, ratings.item_ids) != (self.catalogue.users, self.catalogue.items):
            raise DataError(
                f"The data have {len(ratings.user_ids)} users and {len(ratings.item_ids)} items "
                f"that are not the model's {len(self.catalogue.users)} and "
                f"{len(self.catalogue.items)}."
            )

    def attach(self, ratings: Ratings) -> None:
        """Use these ratings for titles and for what users have seen.

        Raises:
            DataError: they are of other users or items.
        """
        self._check_same(ratings)
        self._ratings = ratings

    @property
    def ratings(self) -> Ratings | None:
        """The ratings that were trained on, where they are at hand: attached, or on this machine.
        They are not part of a checkpoint."""
        dataset = self.catalogue.dataset
        if self._ratings is None and dataset and have_movielens(dataset):
            self.attach(load_movielens(dataset))
        return self._ratings

    @property
    def titles(self) -> tuple[str, ...]:
        """Title of each item; the id where titles are not at hand."""
        items = self.catalogue.items
        stored = self.catalogue.titles or items
        # Where an id stands in for a title, what is attached may know better.
        if all(map(operator.ne, stored, items)) or (ratings := self.ratings) is None:
            return stored
        return tuple(
            theirs if own == name else own
            for own, theirs, name in zip(stored, ratings.titles, items, strict=True)
        )

    def _user(self, user: str | int) -> int:
        try:
            return self.catalogue.users.index(str(user))
        except ValueError:
            raise UnknownNameError(
                f"No user {str(user)!r} among {len(self.catalogue.users)}."
                f"{nearest(str(user), self.catalogue.users)} For someone new, give `liked` titles."
            ) from None

    def _item(self, item: str | int) -> int:
        """Position of an item by id, by title, or by a part of the title that only it has.

        A title that is no more than the id has no part that would tell an item.
        """
        name = str(item)
        if name in self.catalogue.items:
            return self.catalogue.items.index(name)
        titles = self.titles
        folded = [title.lower() for title in titles]
        found = [i for i, title in enumerate(folded) if title == name.lower()]
        found = found or [
            i
            for i, title in enumerate(folded)
            if name and name.lower() in title and titles[i] != self.catalogue.items[i]
        ]
        if len(found) == 1:
            return found[0]
        if found:
            # Ids tell apart what has one title.
            distinct = len({folded[i] for i in found}) == len(found)
            names = titles if distinct else self.catalogue.items
            some = " or ".join(repr(names[i]) for i in found[:3])
            raise UnknownNameError(f"{name!r} fits {len(found)} items: say {some}.")
        hint = nearest(name, titles)
        if titles == self.catalogue.items:
            hint += f" Titles are not at hand: {self._where_titles()}"
        raise UnknownNameError(f"No item {name!r} among {len(titles)}.{hint}")

    def _where_titles(self) -> str:
        dataset = self.catalogue.dataset
        if not dataset:
            return "attach() ratings that were read with a title_column."
        file = TITLE_FILES[dataset]
        if self.ratings is None:
            return f"put {dataset} with its {file} into $ZOO_DATA_DIR, or attach() its ratings."
        return f"put {file} of {dataset} beside its ratings, and load the model again."

    def _where_ratings(self) -> str:
        if self.catalogue.dataset:
            return f"put {self.catalogue.dataset} into $ZOO_DATA_DIR, or attach() its ratings."
        return "attach() the ratings that the model was trained on."

    @torch.no_grad()
    def predict(self, pairs: Iterable[tuple[str | int, str | int]]) -> list[PairPrediction]:
        """What is expected of users and items.

        Args:
            pairs: ids of users and ids or titles of items.

        Raises:
            DataError: there is no pair, or something that is none.
            UnknownNameError: an id or a title is not known.
            ZooError: an output is not finite.
        """
        given = _in_a_list(pairs)
        if given is None:
            raise DataError(f"predict takes pairs of a user and an item, got {pairs!r:.60}.")
        listed = [self._pair(pair) for pair in given]
        if not listed:
            raise DataError("predict got no pairs of a user and an item.")
        users, items = torch.tensor(listed).T
        outputs, titles = finite(self._outputs(users, items)), self.titles
        return [
            PairPrediction(
                user=self.catalogue.users[user],
                item=self.catalogue.items[item],
                title=titles[item],
                watch=values.get("watch"),
                rating=values.get("rate"),
            )
            for (user, item), values in zip(listed, map(self._readable, outputs), strict=True)
        ]

    def _pair(self, pair: Any) -> tuple[int, int]:
        both = _in_a_list(pair)
        # A text of two characters is a sequence of two as well.
        if both is None or len(both) != 2:
            raise DataError(f"predict takes pairs of a user and an item, got {pair!r:.60}.")
        return self._user(both[0]), self._item(both[1])

    def _readable(self, outputs: Tensor) -> dict[str, float]:
        """Score from 0 to 1 and rating within the scale, by task, of T outputs."""
        low, high = self.catalogue.scale
        return {
            task: float(value.sigmoid() if task == "watch" else value.clamp(low, high))
            for task, value in zip(self.task_names, outputs, strict=True)
        }

    def recommend(
        self,
        user: str | int | None = None,
        k: int = 10,
        *,
        liked: Iterable[str | int] | None = None,
        exclude_seen: bool = True,
    ) -> list[Recommendation]:
        """The best k items for a user, or for someone new who likes some titles.

        Args:
            user: id of a user that the model was trained on.
            k: length of the list.
            liked: in place of a user: titles or ids of items that somebody likes; a vector for
                them is fitted, with the rest of the model as it is.
            exclude_seen: leave out what the user has rated (the ratings must be at hand), or what
                is liked.

        Raises:
            ConfigError: `k` is no positive whole number, or not exactly one of `user` and `liked`
                is given.
            DataError: `liked` is empty or no list, or what the user has seen is not known.
            UnknownNameError: an id or a title is not known.
            ZooError: a score is not finite.
        """
        k = check_count("k", k)
        if (user is None) == (liked is None):
            raise ConfigError("recommend needs a user or a list of liked items, and not both.")
        # A vector is fitted by gradients, which inference mode would not record.
        with torch.inference_mode(False), self.evaluating():
            if liked is not None:
                named = _in_a_list(liked)
                if not named:
                    raise DataError(
                        f"liked must be a list of at least one title or id, got {liked!r:.60}."
                    )
                seen = torch.tensor([self._item(item) for item in named])
                vector = self._fold_in(seen)
            else:
                assert user is not None
                index = self._user(user)
                seen = self._seen(index) if exclude_seen else torch.tensor([], dtype=torch.long)
                with torch.no_grad():
                    vector = self.network.user_vectors(torch.tensor([index], device=self.device))
            with torch.no_grad():
                outputs = self._of_all_items(vector, self.network).float().cpu()
        scores = finite(self._score(outputs), "scores").clone()
        if exclude_seen:
            scores[seen] = -math.inf
        best, titles = scores.sort(descending=True, stable=True).indices[:k], self.titles
        return [
            Recommendation(
                item=self.catalogue.items[item],
                title=titles[item],
                score=values.get("watch", values.get("rate", 0.0)),
                rating=values.get("rate"),
            )
            for item, values in ((i, self._readable(outputs[i])) for i in best.tolist())
            if scores[item] > -math.inf
        ]

    def _seen(self, user: int) -> Tensor:
        ratings = self.ratings
        if ratings is None:
            raise DataError(
                "What users have rated is not part of a checkpoint: "
                f"{self._where_ratings()} Or pass exclude_seen=False."
            )
        return ratings.items[ratings.users == user]

    def _of_all_items(self, user: Tensor, network: Any) -> Tensor:
        """Outputs I x T for one user's vector, 1 x D."""
        count = len(self.catalogue.items)
        items = network.item_vectors(torch.arange(count, device=self.device))
        outputs: Tensor = network.of_vectors(user.expand(count, -1), items).outputs
        return outputs

    def _fold_in(self, liked: Tensor) -> Tensor:
        """Vector 1 x D of someone who likes some items: from the mean user's, by gradient, so that
        the liked items score high among all; kept near the mean user by decay."""
        network = _differentiable(self.network)
        everyone = torch.arange(len(self.catalogue.users), device=self.device)
        with torch.no_grad():
            vectors = network.user_vectors(everyone)
            # In half precision the steps would be lost in rounding, and their squares in zero.
            mean = vectors.float().mean(0, keepdim=True)
        offset = torch.zeros_like(mean, requires_grad=True)
        optimizer = torch.optim.Adam([offset], _FOLD_IN_RATE)
        liked = liked.to(self.device)
        with torch.enable_grad():
            for _ in range(_FOLD_IN_STEPS):
                vector = (mean + offset).to(vectors.dtype)
                scores = self._score(self._of_all_items(vector, network)).float()
                # As many draws of liked items as of others: every item stands for the average one.
                loss = F.softplus(-scores[liked]).mean() + F.softplus(scores).mean()
                loss = loss + _FOLD_IN_DECAY * offset.square().sum()
                (offset.grad,) = torch.autograd.grad(loss, offset)
                optimizer.step()
        fitted: Tensor = (mean + offset.detach()).to(vectors.dtype)
        return fitted

    @torch.no_grad()
    def similar_items(self, item: str | int, k: int = 10) -> list[SimilarItem]:
        """The k items whose vectors are most alike, without the item itself.

        Args:
            item: an id or a title.
            k: length of the list.

        Raises:
            ConfigError: `k` is no positive whole number.
            UnknownNameError: the id or title is not known.
            ZooError: a vector is not finite.
        """
        k = check_count("k", k)
        index = self._item(item)
        every = torch.arange(len(self.catalogue.items), device=self.device)
        with self.evaluating():
            vectors = finite(self.network.item_vectors(every).float(), "vectors of items")
        vectors = F.normalize(vectors, dim=1)
        cosines = (vectors @ vectors[index]).cpu()
        cosines[index] = -math.inf
        best, titles = cosines.topk(min(k, len(cosines) - 1)), self.titles
        return [
            SimilarItem(item=self.catalogue.items[i], title=titles[i], similarity=min(value, 1.0))
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    @torch.no_grad()
    def explain(self, user: str | int, item: str | int) -> Explanation:
        """Which experts each task uses for a user and an item, and with what weights.

        Raises:
            UnknownNameError: an id or title is not known.
            ZooError: the model has no experts, or an output or a weight is not finite.
        """
        if not isinstance(self.network, MultiTaskNet):
            raise ZooError("This model has no experts to explain by.")
        pair = self._user(user), self._item(item)
        users, items = (torch.tensor([index], device=self.device) for index in pair)
        with self.evaluating():
            output = self.network(users, items)
        values = self._readable(finite(output.outputs[0].float().cpu()))
        routing = finite(output.routing.weights[0].float().cpu(), "weights of experts")
        tasks = []
        for task, weights in zip(self.task_names, routing, strict=True):
            used = {i: float(w) for i, w in enumerate(weights.tolist()) if w > 0}
            heaviest = dict(sorted(used.items(), key=lambda pair: -pair[1]))
            tasks.append(TaskExplanation(task=task, value=values[task], experts=heaviest))
        return Explanation(
            user=self.catalogue.users[pair[0]],
            item=self.catalogue.items[pair[1]],
            title=self.titles[pair[1]],
            tasks=tuple(tasks),
        )


def _differentiable(network: nn.Module) -> Any:
    """A network that gradients can pass through: a copy, where it was made in inference mode."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network) if any(t.is_inference() for t in tensors) else network


def _in_a_list(several: Any) -> list[Any] | None:
    """What a user has given several of; None where it is one thing, as a text is."""
    if hasattr(several, "tolist"):  # numbers of arrays and tensors as those of Python
        several = several.tolist()
    if isinstance(several, (str, bytes)) or not isinstance(several, Iterable):
        return None
    return list(several)


class FactorisationRecommender(Recommender):
    """The control without experts: offsets and a product of vectors; see `MatrixFactorisation`.

    Args:
        network: shape of the network.
        optimizer, preprocessing, watch_weight, compile: as of `Recommender`.
    """

    network_config: ClassVar[type[Any]] = MatrixFactorisationConfig
    head_parameters: ClassVar[tuple[str, ...]] = ("bias",)

    def __init__(
        self,
        network: MatrixFactorisationConfig = MatrixFactorisationConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        preprocessing: Catalogue | None = None,
        watch_weight: float = 0.5,
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, preprocessing, watch_weight, compile)  # type: ignore[arg-type]

    def _build(self, network: Any) -> RecommenderNet | MatrixFactorisation:
        return MatrixFactorisation(network)
