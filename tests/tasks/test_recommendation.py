"""Tests of zoo.tasks.recommendation, on a tiny recommender through the whole of the zoo."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torchmetrics.retrieval import RetrievalNormalizedDCG

from tests import tiny
from zoo import cards, checkpoints, controls, evaluation, training
from zoo.data.ratings import RatingsDataModule, read_movielens, read_ratings_csv
from zoo.errors import ConfigError, DataError, UnknownNameError, ZooError
from zoo.families.dselect_k import (
    MatrixFactorisationConfig,
    RecommenderConfig,
    RecommenderNet,
)
from zoo.tasks import recommendation
from zoo.tasks.recommendation import Catalogue, FactorisationRecommender, Recommender

USERS, ITEMS = 24, 20
"""Even users watch the first half of the items and odd ones the second; ratings go by the item."""


def title(item: int) -> str:
    return f"{'Comedy' if item < ITEMS // 2 else 'Thriller'} {item}"


def write_ratings(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    lines = ["user,item,rating,when,title"]
    for user in range(USERS):
        first = 0 if user % 2 == 0 else ITEMS // 2
        rated = first + generator.permutation(ITEMS // 2)[:8]
        lines += [
            f"u{user},i{item},{1 + item % 5},{when},{title(item)}"
            for when, item in enumerate(rated)
        ]
    path = folder / "ratings.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


NETWORK: dict[str, Any] = {
    "num_users": USERS,
    "num_items": ITEMS,
    "embedding_dim": 8,
    "num_experts": 4,
    "expert_widths": [16],
    "tower_widths": [8],
    "dropout": 0.0,
    "product": False,
    "gate": {"kind": "dselect-k", "k": 2, "entropy": 0.01},
}


def write_recipe(folder: Path, **data: Any) -> Path:
    values = {
        "zoo": {"architecture": "dselect-k-recommender", "data": "ratings", "weight": ""},
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 40,
            "enable_model_summary": False,
            "log_every_n_steps": 20,
        },
        "model": {
            "network": NETWORK,
            "optimizer": {"name": "adamw", "lr": 0.02, "weight_decay": 0.0, "warmup_steps": 5},
        },
        "data": {
            "path": str(write_ratings(folder)),
            "time_column": "when",
            "title_column": "title",
            "batch_size": 128,
            **data,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> training.Run:
    folder = tmp_path_factory.mktemp("recommender")
    return training.fit(write_recipe(folder), out=folder / "run")


@pytest.fixture
def model(run: training.Run) -> Any:
    """The trained recommender, as it is loaded from its folder."""
    return checkpoints.load(run.checkpoint)


@pytest.fixture
def attached(run: training.Run, model: Any) -> Any:
    model.attach(run.datamodule.ratings)
    return model


def untrained(**options: Any) -> Recommender:
    network = RecommenderConfig(
        num_users=3, num_items=4, embedding_dim=4, num_experts=4, expert_widths=(4,)
    )
    catalogue = Catalogue(
        users=("1", "2", "3"),
        items=("10", "11", "12", "13"),
        titles=("Alien", "Aliens", "Babe", "Casino"),
        scale=(1.0, 5.0),
    )
    return Recommender(network, preprocessing=catalogue, **options).eval()


# --- training and checkpoints --------------------------------------------------------------------


def test_the_two_tastes_are_learned(attached: Any) -> None:
    for user in range(6):
        wanted = "Comedy" if user % 2 == 0 else "Thriller"
        best = attached.recommend(f"u{user}", k=5, exclude_seen=False)
        assert [entry.title.split()[0] for entry in best] == [wanted] * 5
    items = [f"i{item}" for item in range(ITEMS)]
    own, other = (
        [p.watch for p in attached.predict([("u0", item) for item in half])]
        for half in (items[: ITEMS // 2], items[ITEMS // 2 :])
    )
    assert sum(own) > 3 * sum(other)
    for item in (0, 3, 4):
        (pair,) = attached.predict([("u0", f"i{item}")])
        assert abs(pair.rating - (1 + item % 5)) < 0.7


def test_the_folder_has_ids_and_titles_and_no_ratings(run: training.Run) -> None:
    stored = json.loads((run.checkpoint / "config.json").read_text())["preprocessing"]
    assert set(stored) == {"users", "items", "titles", "scale", "dataset"}
    assert sorted(stored["users"]) == sorted(f"u{user}" for user in range(USERS))
    assert stored["titles"][stored["items"].index("i3")] == "Comedy 3"


def test_titles_of_a_known_set_are_not_stored(tmp_path: Path) -> None:
    module = untrained()
    data = RatingsDataModule(path=str(write_ratings(tmp_path)))
    assert data.ratings.titles
    data.path = None  # as if MovieLens had been read
    module.config = RecommenderConfig(num_users=USERS, num_items=ITEMS)
    module.bind(data)
    assert module.catalogue.titles == ()
    assert module.catalogue.dataset == "movielens-100k"
    assert module.titles == data.ratings.titles, "at hand while the data are"


def test_a_loaded_model_says_what_the_trained_one_says(run: training.Run, model: Any) -> None:
    pairs = [("u1", "i2"), ("u5", "i19")]
    assert model.predict(pairs) == run.module.predict(pairs)
    assert not model.load_report.dropped
    assert not model.load_report.initialised


def test_evaluation_counts_every_user_once_on_each_protocol(run: training.Run) -> None:
    evaluated = evaluation.evaluate(run.checkpoint)
    assert [o.protocol for o in evaluated.outcomes] == ["ndcg", "recall", "rating"]
    assert [o.metric for o in evaluated.outcomes] == ["ndcg@10", "recall@10", "squared_error"]
    assert all((o.n, o.unit, o.split) == (USERS, "user", "test") for o in evaluated.outcomes)


def test_resuming_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    recipe, constant = write_recipe(tmp_path), "model.optimizer.schedule=constant"
    two = [constant, "trainer.max_epochs=2"]
    whole = training.fit(recipe, two, out=tmp_path / "whole")
    training.fit(recipe, [constant, "trainer.max_epochs=1"], out=tmp_path / "parts")
    parts = training.fit(recipe, two, out=tmp_path / "parts", resume=True)
    for name, tensor in whole.module.network.state_dict().items():
        assert torch.equal(tensor, parts.module.network.state_dict()[name]), name


def test_the_loss_is_that_of_the_tasks_and_the_gates(run: training.Run) -> None:
    module, data = run.module, run.datamodule
    batch = data.pairs("validation")
    output = module.network(batch.users, batch.items)
    watch, rate = output.outputs.T
    bce = F.binary_cross_entropy_with_logits(watch, batch.watched)
    rated = batch.watched > 0
    mse = (rate[rated] - batch.ratings[rated]).square().mean()
    losses = module._losses(output.outputs, batch)
    torch.testing.assert_close(losses["watch"].mean(), bce)
    torch.testing.assert_close(losses["rate"].sum() / rated.sum(), mse)
    assert not losses["rate"][~rated].any()
    weighed = module._weigh({"watch": bce, "rate": mse})
    torch.testing.assert_close(weighed, module.watch_weight * bce + (1 - module.watch_weight) * mse)


@pytest.mark.parametrize("watch_weight", [0.0, 0.5, 1.0])
def test_the_loss_of_a_single_task_counts_in_full(run: training.Run, watch_weight: float) -> None:
    batch = run.datamodule.pairs("validation")
    for task in ("watch", "rate"):
        network = RecommenderConfig(num_users=USERS, num_items=ITEMS, tasks=(task,), dropout=0.0)
        module = Recommender(network, watch_weight=watch_weight)
        (value,) = module.network(batch.users, batch.items).outputs.T
        if task == "watch":
            expected = F.binary_cross_entropy_with_logits(value, batch.watched)
        else:
            rated = batch.watched > 0
            expected = F.mse_loss(value[rated], batch.ratings[rated])
        with pytest.warns(UserWarning, match="trainer"):
            torch.testing.assert_close(module.training_step(batch, 0), expected)


# --- the protocols against other code ------------------------------------------------------------


def test_ranking_is_that_of_torchmetrics_over_all_unrated_items(run: training.Run) -> None:
    module, data = run.module, run.datamodule
    scores, targets, users = [], [], []
    for user, item in zip(*data.parts["test"][:2], strict=True):
        earlier = {
            int(i)
            for part in ("train", "validation")
            for u, i in zip(*data.parts[part][:2], strict=True)
            if u == user
        }
        candidates = [i for i in range(ITEMS) if i not in earlier]
        assert int(item) in candidates
        with torch.no_grad():
            outputs = module.network(
                torch.full((len(candidates),), int(user)), torch.tensor(candidates)
            ).outputs[:, 0]
        scores.append(outputs)
        targets.append(torch.tensor([i == int(item) for i in candidates]))
        users.append(torch.full((len(candidates),), int(user)))
    joined = [torch.cat(part) for part in (scores, targets, users)]
    expected = RetrievalNormalizedDCG(top_k=10)(joined[0], joined[1], indexes=joined[2])
    assert module.measure(data, "ndcg").value == pytest.approx(float(expected), abs=1e-6)
    hits = []
    for values, wanted in zip(scores, targets, strict=True):
        above = int((values > values[wanted]).sum())
        equal = int((values == values[wanted]).sum())
        hits.append(min(max((10 - above) / equal, 0.0), 1.0))
    assert module.measure(data, "recall").value == pytest.approx(sum(hits) / len(hits))


def test_equal_scores_count_as_the_mean_over_their_orders(run: training.Run) -> None:
    module = FactorisationRecommender(
        MatrixFactorisationConfig(num_users=USERS, num_items=ITEMS, embedding_dim=0)
    )
    with torch.no_grad():
        for parameter in module.network.parameters():
            parameter.zero_()
    # 20 items, 7 of which were rated earlier: all of the 13 others are as good.
    best, worst = module.ranks(run.datamodule)
    assert best.tolist() == [1] * USERS
    assert worst.tolist() == [13] * USERS
    ndcg = sum(1 / math.log2(rank + 1) for rank in range(1, 11)) / 13
    assert module.gains(run.datamodule, "ndcg").tolist() == pytest.approx([ndcg] * USERS)
    assert module.gains(run.datamodule, "recall").tolist() == pytest.approx([10 / 13] * USERS)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_diverged_model_is_not_ranked(run: training.Run, broken: float) -> None:
    module = FactorisationRecommender(
        MatrixFactorisationConfig(num_users=USERS, num_items=ITEMS, embedding_dim=2)
    )
    module.bind(run.datamodule)
    with torch.no_grad():
        module.network.items.weight[3] = broken
    message = r"^The model's scores are not finite: its training diverged, or .* are damaged\.$"
    for protocol in ("ndcg", "recall"):
        with pytest.raises(ZooError, match=message):
            module.measure(run.datamodule, protocol)
    for who in ({"user": "u1", "exclude_seen": False}, {"liked": ["i1"]}):
        with pytest.raises(ZooError, match=message):
            module.recommend(**who)  # type: ignore[arg-type]


def test_a_diverged_model_says_nothing() -> None:
    message = r"^The model's {} are not finite: its training diverged, or .* are damaged\.$"
    module = untrained()
    with torch.no_grad():
        module.network.users.weight[0] = math.nan
    with pytest.raises(ZooError, match=message.format("outputs")):
        module.predict([("2", "10"), ("1", "10")])
    with pytest.raises(ZooError, match=message.format("outputs")):
        module.explain("1", "10")
    assert module.predict([("2", "10")])[0].rating is not None, "another user is as before"
    for row in (0, 2):
        module = untrained()
        with torch.no_grad():
            module.network.items.weight[row] = math.inf
        with pytest.raises(ZooError, match=message.format("vectors of items")):
            module.similar_items("10")


def test_pairs_are_measured_by_their_losses(tmp_path: Path) -> None:
    data = RatingsDataModule(path=str(write_ratings(tmp_path)), split="pairs")
    module = untrained()
    module.network = RecommenderNet(RecommenderConfig(num_users=USERS, num_items=ITEMS)).eval()
    module.preprocessing = Catalogue(
        users=data.ratings.user_ids, items=data.ratings.item_ids, scale=(1.0, 5.0)
    )
    assert module.protocols_on(data) == ("pairs-watch", "pairs-rating")
    test = data.parts["test"]
    watch, rate = module.network(test.users, test.items).outputs.detach().double().T
    p, y = watch.sigmoid().numpy(), test.watched.numpy()
    expected = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    measured = module.measure(data, "pairs-watch")
    assert measured.value == pytest.approx(expected, rel=1e-5)
    assert measured.n == len(y)
    rated = y > 0
    squared = np.mean((rate.numpy()[rated] - test.ratings.numpy()[rated]) ** 2)
    measured = module.measure(data, "pairs-rating")
    assert measured.value == pytest.approx(squared, rel=1e-5)
    assert measured.n == rated.sum()
    with pytest.raises(ZooError, match=r"'ndcg' is not for data\.split=pairs; choose one"):
        module.measure(data, "ndcg")


@pytest.mark.parametrize(
    ("task", "split", "measured", "missing"),
    [
        ("watch", "temporal", ("ndcg", "recall"), "rating"),
        ("rate", "temporal", ("ndcg", "recall", "rating"), "pairs-watch"),
        ("watch", "pairs", ("pairs-watch",), "pairs-rating"),
        ("rate", "pairs", ("pairs-rating",), "pairs-watch"),
    ],
)
def test_a_single_task_is_measured_by_what_it_predicts(
    task: Any, split: Any, measured: tuple[str, ...], missing: str, tmp_path: Path
) -> None:
    data = RatingsDataModule(path=str(write_ratings(tmp_path)), split=split)
    network = RecommenderConfig(num_users=USERS, num_items=ITEMS, tasks=(task,))
    module = Recommender(network).eval()
    module.bind(data)
    outcomes = evaluation.evaluate_module(module, data)
    assert tuple(outcome.protocol for outcome in outcomes) == module.protocols_on(data) == measured
    assert all(math.isfinite(outcome.value) for outcome in outcomes)
    other = "rate" if task == "watch" else "watch"
    with pytest.raises(ZooError, match=f"does not predict '{other}'; its tasks are .'{task}',"):
        module.measure(data, missing)


def test_controls_of_single_tasks_and_of_a_converged_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tiny-recommender.made"
    home = tmp_path / "recipes" / "controls" / name
    home.mkdir(parents=True)
    write_recipe(tmp_path).rename(home / "both.yaml")
    for task in ("rate", "watch"):
        values = {
            "zoo": {"base": "both.yaml", "name": task, "differs": f"{task} alone"},
            "model": {"network": {"tasks": [task]}},
        }
        (home / f"{task}.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(controls, "shipped_folder", lambda folder: tmp_path / folder)
    out, short = tmp_path / "out", ["trainer.max_epochs=1"]
    arms = controls.run(name, seeds=(1,), out=out, overrides=short)
    assert [(arm.recipe.split("/")[-1], arm.result.protocol) for arm in arms] == [
        *((f"{stem}.yaml", "ndcg") for stem in ("both", "rate", "watch")),
        *((f"{stem}.yaml", "recall") for stem in ("both", "rate", "watch")),
        *((f"{stem}.yaml", "rating") for stem in ("both", "rate")),
    ]
    assert [arm.difference is None for arm in arms] == [arm.name == "" for arm in arms]
    # Both tasks use the last expert alone from here on: one layer, no sum, and two towers.
    folder = out / "both" / "seed_1" / "checkpoint"
    trained: Any = checkpoints.load(folder)
    dense = 4 * 16 * 16 + 2 * 4 * 16 + 2 * (16 * 8 + 8)
    assert {arm.macs for arm in arms if not arm.name} == {dense}
    with torch.no_grad():
        trained.network.gate.codes.bias.fill_(1.0)
    checkpoints.save(trained, folder, recipe=(folder / "recipe.yaml").read_text())
    again = controls.run(name, seeds=(1,), out=out, overrides=short)
    sparse = 16 * 16 + 2 * (16 * 8 + 8)
    assert {arm.macs for arm in again if not arm.name} == {sparse}
    assert [arm.macs for arm in again if arm.name] == [arm.macs for arm in arms if arm.name]
    # The record holds them all.
    evaluation.record(folder, name)
    controls.record(again, folder)
    assert cards.read_measurements(folder / "results.json").controls == tuple(again)


# --- what a user holds in hand -------------------------------------------------------------------


def test_what_was_seen_is_left_out_on_request(run: training.Run, attached: Any) -> None:
    ratings = run.datamodule.ratings
    user = ratings.user_ids.index("u0")
    seen = {ratings.item_ids[i] for i in ratings.items[ratings.users == user]}
    fresh = attached.recommend("u0", k=ITEMS)
    assert {entry.item for entry in fresh} == set(ratings.item_ids) - seen
    every = attached.recommend("u0", k=ITEMS, exclude_seen=False)
    assert {entry.item for entry in every} == set(ratings.item_ids)
    scores = [entry.score for entry in every]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert all(1 <= entry.rating <= 5 for entry in every)


def test_without_the_ratings_there_is_one_clear_line(model: Any) -> None:
    with pytest.raises(DataError, match=r"not part of a checkpoint: attach.*exclude_seen=False"):
        model.recommend("u0")
    assert len(model.recommend("u0", k=3, exclude_seen=False)) == 3


def test_someone_new_is_known_by_what_they_like(model: Any) -> None:
    state = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    for word, items in (("Comedy", (1, 4, 7)), ("Thriller", (11, 14, 17))):
        liked = [title(item) for item in items]
        best = model.recommend(liked=liked, k=4)
        assert [entry.title.split()[0] for entry in best] == [word] * 4
        assert not {entry.title for entry in best} & set(liked)
    again = model.recommend(liked=liked, k=4)
    assert again == best, "nothing is drawn at random"
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, state[name]), "the model is as it was"
    assert all(parameter.grad is None for parameter in model.network.parameters())


def fold_in(module: Any, liked: list[int]) -> Any:
    """Scores of all items for someone new, in double precision, by a loop over items."""
    net = copy.deepcopy(module.network).double().eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    mean = net.users.weight.mean(0)
    offset = torch.zeros_like(mean, requires_grad=True)
    optimizer = torch.optim.Adam([offset], lr=0.05)

    def scores() -> torch.Tensor:
        rows = [torch.cat((mean + offset, item)) for item in net.items.weight]
        return net.towers(net.moe(torch.stack(rows)).features)[:, 0, 0]

    for _ in range(100):
        optimizer.zero_grad()
        every = scores()
        loss = F.softplus(-every[liked]).mean() + F.softplus(every).mean()
        (loss + 0.01 * offset.square().sum()).backward()
        optimizer.step()
    return scores().detach()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_someone_new_gets_the_same_list_in_any_precision(run: training.Run, dtype: str) -> None:
    liked = [title(item) for item in (1, 4, 7)]
    reference: Any = checkpoints.load(run.checkpoint)
    places = [reference.catalogue.items.index(f"i{item}") for item in (1, 4, 7)]
    expected = fold_in(reference, places).sigmoid()
    model: Any = checkpoints.load(run.checkpoint, dtype=dtype)
    for entry in model.recommend(liked=liked, k=ITEMS):
        wanted = float(expected[model.catalogue.items.index(entry.item)])
        assert entry.score == pytest.approx(wanted, abs=1e-3 if dtype == "float32" else 0.03)


def test_models_are_used_and_loaded_in_inference_mode(run: training.Run, model: Any) -> None:
    expected = model.recommend(liked=["i1", "i4"]), model.recommend("u1", exclude_seen=False)
    with torch.inference_mode():
        loaded: Any = checkpoints.load(run.checkpoint)
        made = Recommender(loaded.config, preprocessing=loaded.catalogue).eval()
        made.network.load_state_dict(loaded.network.state_dict())
        for module in (model, loaded, made):
            found = module.recommend(liked=["i1", "i4"]), module.recommend("u1", exclude_seen=False)
            assert found == expected
    for module in (loaded, made):
        assert module.recommend(liked=["i1", "i4"]) == expected[0]
    loaded.network.users.weight.sum().backward()  # it can be trained as any other


def test_the_command_lists_items(run: training.Run) -> None:
    said = tiny.run("recommend", run.checkpoint, "--liked", "Comedy 1", "--k", 3, "--json")
    assert said.status == 0
    assert [set(entry) for entry in said.json] == [{"item", "title", "score", "rating"}] * 3
    table = tiny.run("recommend", run.checkpoint, "--user", "u1", "--include-seen").out
    assert len(table.splitlines()) == 1 + 10
    assert "Thriller" in table
    said = tiny.run("recommend", run.checkpoint, "--user", "nobody")
    assert (said.status, len(said.err.splitlines())) == (2, 1)
    assert "No user 'nobody'" in said.err
    said = tiny.run("recommend", run.checkpoint, "--user", "u1")
    assert (said.status, len(said.err.splitlines())) == (2, 1)
    assert said.err.endswith(
        "What users have rated is not part of a checkpoint: add --include-seen, and it is not left "
        "out.\n"
    )


def test_the_command_shows_titles_of_others_in_one_line_each(tmp_path: Path) -> None:
    """A configuration that was downloaded could draw on a terminal, or forge rows."""
    titles = ("Alien\n13  Babe", "\x1b[2Jgone\x07", "a\u2028b\u202ec", "Café  \t noir")
    catalogue = dataclasses.replace(untrained().catalogue, titles=titles)
    module = Recommender(untrained().config, preprocessing=catalogue).eval()
    checkpoints.save(module, tmp_path / "odd")
    said = tiny.run("recommend", tmp_path / "odd", "--user", "1", "--include-seen")
    assert said.status == 0
    shown = {line[: line.index("  0.")].rstrip() for line in said.out.splitlines()[1:]}
    assert shown == {
        "10    Alien 13 Babe",
        "11    ?[2Jgone?",
        "12    a b?c",
        "13    Café noir",
    }
    said = tiny.run("recommend", tmp_path / "odd", "--user", "1", "--include-seen", "--json")
    assert {entry["title"] for entry in said.json} == set(titles), "as they are"


def test_similar_items_are_by_the_cosine_of_their_vectors(model: Any) -> None:
    found = model.similar_items("Comedy 3", k=5)
    items = model.catalogue.items
    vectors = model.network.items.weight.detach().double().numpy()
    own = vectors[items.index("i3")]
    cosines = {
        name: float(v @ own / np.linalg.norm(v) / np.linalg.norm(own))
        for name, v in zip(items, vectors, strict=True)
        if name != "i3"
    }
    expected = sorted(cosines, key=lambda name: -cosines[name])[:5]
    assert [entry.item for entry in found] == expected
    for entry in found:
        assert entry.similarity == pytest.approx(cosines[entry.item], abs=1e-5)


def test_an_explanation_is_the_gate_of_each_task(model: Any) -> None:
    explained = model.explain("u2", "Comedy 5")
    weights = model.network.gate().weights[0]
    (predicted,) = model.predict([("u2", "i5")])
    for task, row, value in zip(
        explained.tasks, weights, (predicted.watch, predicted.rating), strict=True
    ):
        assert task.value == pytest.approx(value)
        assert sum(task.experts.values()) == pytest.approx(1)
        assert all(weight == pytest.approx(float(row[i])) for i, weight in task.experts.items())
        assert list(task.experts.values()) == sorted(task.experts.values(), reverse=True)
        assert len(task.experts) == int((row > 0).sum())


def test_items_are_found_by_id_title_or_a_part_that_fits_one() -> None:
    module = untrained()
    for given in ("12", 12, "Babe", "babe", "ab"):
        assert module.catalogue.items[module._item(given)] == "12"
    assert module._item("Alien") == 0, "a whole title goes before a part of one"


def test_items_of_one_title_are_told_apart_by_their_ids() -> None:
    catalogue = dataclasses.replace(
        untrained().catalogue, titles=("Chasing Amy", "Babe", "chasing amy", "Babette")
    )
    module = Recommender(untrained().config, preprocessing=catalogue).eval()
    for given in ("Chasing Amy", "amy"):
        with pytest.raises(UnknownNameError, match=r"fits 2 items: say '10' or '12'\.$"):
            module._item(given)
    with pytest.raises(UnknownNameError, match=r"fits 2 items: say 'Babe' or 'Babette'\.$"):
        module._item("ab")
    for said, place in (("10", 0), ("12", 2), ("Babe", 1), ("Babette", 3)):
        assert module._item(said) == place


def test_titles_that_are_attached_replace_ids_that_stand_in_for_them(tmp_path: Path) -> None:
    path = write_ratings(tmp_path)
    module = Recommender(RecommenderConfig(num_users=USERS, num_items=ITEMS))
    module.bind(RatingsDataModule(path=str(path)))
    assert module.catalogue.titles == (), "an id is no title"
    advice = r"Titles are not at hand: attach\(\) ratings that were read with a title_column\.$"
    ids = module.catalogue.items
    for titles in ((), ids, ("Heat", *ids[1:])):  # the second is in folders of earlier versions
        module.preprocessing = dataclasses.replace(module.catalogue, titles=titles)
        module.attach(read_ratings_csv(path))
        if titles[:1] != ("Heat",):
            with pytest.raises(UnknownNameError, match=advice):
                module.similar_items("Comedy 3")
        module.attach(read_ratings_csv(path, title_column="title"))
        own = tuple(title(int(name[1:])) for name in ids)
        assert module.titles == (("Heat", *own[1:]) if titles[:1] == ("Heat",) else own)
        assert module._item("Comedy 3") == ids.index("i3")


def test_what_helps_against_missing_titles_of_a_known_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = dataclasses.replace(untrained().catalogue, titles=(), dataset="movielens-100k")
    monkeypatch.setattr(recommendation, "have_movielens", lambda name: False)
    module = Recommender(untrained().config, preprocessing=catalogue).eval()
    with pytest.raises(UnknownNameError, match=r"put movielens-100k with its u\.item into \$ZOO_"):
        module._item("Babe")
    rows = [f"{user}\t{item}\t3\t0" for user in (1, 2, 3) for item in (10, 11, 12, 13)]
    (tmp_path / "u.data").write_text("\n".join(rows) + "\n")
    module.attach(read_movielens("movielens-100k", tmp_path))
    with pytest.raises(UnknownNameError, match=r"put u\.item of movielens-100k beside its ratings"):
        module._item("Babe")
    flags = "|".join("0" * 19)
    names = [
        f"{item}|{name}|||x|{flags}" for item, name in zip((10, 12), ("Alien", "Babe"), strict=True)
    ]
    (tmp_path / "u.item").write_text("\n".join(names) + "\n")
    module.attach(read_movielens("movielens-100k", tmp_path))
    assert module._item("Babe") == 2


def test_an_id_is_no_title_that_parts_of_can_be_found() -> None:
    catalogue = Catalogue(users=("1", "2", "3"), items=("10", "215", "30", "x"), scale=(1.0, 5.0))
    titled = dataclasses.replace(catalogue, titles=("10", "215", "Item 30", "x"))
    for known, found in ((catalogue, "30"), (titled, "Item 30")):
        module = Recommender(untrained().config, preprocessing=known).eval()
        with pytest.raises(UnknownNameError, match=r"^No item '15' among 4\."):
            module.recommend(liked=["15"])
        assert module._item("215") == 1
        assert module._item("X") == 3, "the whole of it, whatever its case"
        assert module._item(found) == 2


def test_a_model_in_training_is_used_as_any_other() -> None:
    module = untrained()
    uses: list[Callable[[], Any]] = [
        lambda: module.recommend("1", exclude_seen=False),
        lambda: module.recommend(liked=["10"]),
        lambda: module.similar_items("10"),
        lambda: module.explain("1", "10"),
        lambda: module.predict([("1", "10")]),
    ]
    expected = [use() for use in uses]
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    for use, found in zip(uses, expected, strict=True):
        assert use() == found
        assert all(part.training for part in module.modules())


def test_lists_may_be_arrays() -> None:
    module = untrained()
    liked = [10, 12]
    expected = module.recommend(liked=liked)
    assert module.recommend(liked=np.array(liked)) == expected
    assert module.recommend(liked=torch.tensor(liked)) == expected
    assert module.recommend(liked=(str(item) for item in liked)) == expected
    assert module.predict(torch.tensor([[1, 10]])) == module.predict([("1", "10")])
    assert module.predict(np.array([[1, 10]])) == module.predict([("1", "10")])


def test_ratings_alone_are_ordered_by_the_rating() -> None:
    network = RecommenderConfig(num_users=3, num_items=4, tasks=("rate",))
    module = Recommender(network, preprocessing=untrained().catalogue).eval()
    best = module.recommend("1", k=4, exclude_seen=False)
    ratings = [entry.rating for entry in best if entry.rating is not None]
    assert ratings == sorted(ratings, reverse=True)
    (pair,) = module.predict([("1", "10")])
    assert pair.watch is None
    assert pair.rating is not None
    assert math.isclose(best[-1].score, ratings[-1])


def test_side_features_come_from_the_data(tmp_path: Path) -> None:
    module = Recommender(
        RecommenderConfig(num_users=USERS, num_items=ITEMS, item_features=2, user_features=0)
    )
    data = RatingsDataModule(path=str(write_ratings(tmp_path)))
    with pytest.raises(ConfigError, match=r"0 features of each item.*item_features=0"):
        module.bind(data)
    assert module.preprocessing is None  # nothing of data that do not fit is taken


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.recommend("9"), UnknownNameError, "No user '9' among 3.*give `liked` titles"),
        (lambda m: m.recommend("1", k=0), ConfigError, "k must be at least 1, got 0"),
        (lambda m: m.recommend("1", k=2.5), ConfigError, "k must be a whole number, got 2.5"),
        (lambda m: m.recommend("1", k=True), ConfigError, "k must be a whole number, got True"),
        (lambda m: m.recommend(liked=5), DataError, "must be a list .*, got 5"),
        (lambda m: m.recommend(liked=torch.tensor(5)), DataError, "must be a list"),
        (lambda m: m.recommend(), ConfigError, "needs a user or a list of liked items"),
        (lambda m: m.recommend("1", liked=["10"]), ConfigError, "and not both"),
        (lambda m: m.recommend(liked=[]), DataError, "at least one title or id"),
        (lambda m: m.recommend(liked="Alien"), DataError, "must be a list"),
        (
            lambda m: m.recommend(liked=["Bambi"]),
            UnknownNameError,
            "No item 'Bambi' among 4.*'Babe'",
        ),
        (lambda m: m.predict([("1", "99")]), UnknownNameError, "No item '99' among 4"),
        (lambda m: m.predict([]), DataError, "predict got no pairs"),
        (lambda m: m.predict(("1", "10")), DataError, "pairs of a user and an item, got '1'"),
        (lambda m: m.predict(("12", "34")), DataError, "pairs of a user and an item, got '12'"),
        (lambda m: m.predict((12, 34)), DataError, "pairs of a user and an item, got 12"),
        (lambda m: m.predict("12"), DataError, "pairs of a user and an item, got '12'"),
        (lambda m: m.predict(3), DataError, "pairs of a user and an item, got 3"),
        (lambda m: m.predict([("1", "10", "2")]), DataError, r"an item, got \('1', '10', '2'\)"),
        (
            lambda m: m.similar_items("lie"),
            UnknownNameError,
            "fits 2 items: say 'Alien' or 'Aliens'",
        ),
        (lambda m: m.similar_items("10", k=0), ConfigError, "k must be at least 1"),
        (lambda m: m.explain("1", ""), UnknownNameError, "No item ''"),
        (lambda m: untrained(watch_weight=1.5), ConfigError, r"watch_weight must be in \[0, 1\]"),
        (lambda m: Recommender().recommend("1"), ZooError, "train it first"),
    ],
)
def test_bad_input_has_one_clear_line(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(untrained())
    assert "\n" not in str(caught.value)


def test_data_of_another_size_say_what_to_set(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(
        ConfigError, match=f"have {USERS} users.*set model.network.num_users={USERS}"
    ):
        training.fit(recipe, ["model.network.num_users=5"], out=tmp_path / "run")


def test_other_ratings_cannot_be_attached(tmp_path: Path) -> None:
    data = RatingsDataModule(path=str(write_ratings(tmp_path)))
    with pytest.raises(DataError, match=f"The data have {USERS} users and {ITEMS} items"):
        untrained().attach(data.ratings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": []}, "users must be one or more different ids"),
        ({"items": ["1", "1"]}, "items must be one or more different ids"),
        ({"titles": ["a"]}, "1 titles do not fit 2 items"),
        ({"scale": [5.0, 1.0]}, "lowest and a highest rating"),
        ({"dataset": "netflix"}, "'netflix' is not one of"),
        ({"histories": []}, "unknown key 'histories'"),
    ],
)
def test_a_bad_catalogue_has_one_clear_line(changes: dict[str, Any], message: str) -> None:
    from zoo.configs import build

    values = {"users": ["1"], "items": ["1", "2"], "scale": [1.0, 5.0], **changes}
    with pytest.raises(ConfigError, match=message):
        build(Catalogue, values, "config.json")


def test_a_factorisation_goes_through_the_same_doors(tmp_path: Path) -> None:
    values = yaml.safe_load(write_recipe(tmp_path).read_text())
    values["zoo"]["architecture"] = "factorisation-recommender"
    values["model"]["network"] = {"num_users": USERS, "num_items": ITEMS, "embedding_dim": 4}
    path = tmp_path / "mf.yaml"
    path.write_text(yaml.safe_dump(values))
    run = training.fit(path, ["trainer.max_epochs=30"], out=tmp_path / "run")
    model: Any = checkpoints.load(run.checkpoint)
    best = model.recommend("u0", k=2, exclude_seen=False)
    assert [entry.title.split()[0] for entry in best] == ["Comedy", "Comedy"]
    with pytest.raises(ZooError, match="no experts to explain by"):
        model.explain("u0", "i0")
