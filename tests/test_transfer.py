"""Tests of the worked examples of fine-tuning: each of them whole, with little to do."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples import give_preprocessing
from tests.hub import published
from tests.tiny import run
from zoo import checkpoints, transfer
from zoo.cards import shipped_folder
from zoo.data.pictures import ImageSplit
from zoo.data.ratings import read_ratings_csv
from zoo.errors import ConfigError, DataError, UnknownNameError
from zoo.families.continuous_depth import ODEResNetConfig
from zoo.families.sau_shufflenet import ShuffleNetConfig
from zoo.files import WEIGHTS_FILE, read_json
from zoo.intervals import Summary
from zoo.transfer import EXAMPLES, Point

CLOTHES = 10


def shades(count: int, channels: int, size: int, classes: int) -> ImageSplit:
    """Pictures whose brightness tells their class."""
    labels = torch.arange(count) % classes
    images = (labels * 200 // classes)[:, None, None, None].repeat(1, channels, size, size)
    return ImageSplit((images + torch.arange(size) % 20).to(torch.uint8), labels)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known sets, made."""

    def read(name: str, part: str, data_dir: Any) -> ImageSplit:
        sizes = {"fashion-mnist": (1, 28, 10), "cifar100-coarse": (3, 32, 20)}[name]
        return shades(60 if part == "train" else 40, *sizes)

    monkeypatch.setattr("zoo.data.images.read_known", read)


def untrained(name: str, folder: Path) -> Path:
    """A base for an example: small, and with random weights."""
    from zoo.registry import architecture

    configs: dict[str, Any] = {
        "sau-shufflenet-v2-x0-5": ShuffleNetConfig(width=0.5, num_classes=100, in_channels=3),
        "ode-resnet": ODEResNetConfig(num_classes=10, in_channels=1, widths=(4, 6), body_from=0),
    }
    module = architecture(name).module_class()(network=configs[name])
    give_preprocessing(module)
    if name == "ode-resnet":
        module.preprocessing = dataclasses.replace(module.preprocessing, size=(28, 28))
    checkpoints.save(module, folder)
    return folder


def check(name: str, points: list[Point], amounts: list[int], n: int) -> None:
    arms = ["from scratch", *EXAMPLES[name].ways]
    assert [(point.amount, point.arm) for point in points] == [
        (amount, arm) for amount in amounts for arm in arms
    ]
    for point in points:
        assert point.n == n
        assert point.seeds == (1, 2)
        assert len(point.values) == len(point.intervals) == 2
        assert point.mean.mean == pytest.approx(sum(point.values) / 2)
        for value, (low, high) in zip(point.values, point.intervals, strict=True):
            assert low <= value <= high
        scratch = next(p for p in points if p.arm == "from scratch" and p.amount == point.amount)
        if point.gain is not None:
            assert point.gain.mean == pytest.approx(point.mean.mean - scratch.mean.mean)


def test_a_language_model_on_novels(tmp_path: Path) -> None:
    lm = published.write_weight(tmp_path / "lm")
    for name in ("a", "b"):
        text = "".join(f"{name} said that {i % 7} was more than {i % 5}.\n" for i in range(60))
        (tmp_path / f"{name}.txt").write_text(text)
    words = ["transfer", "austen", "--base", lm, "--data", tmp_path, "--seeds", 1, 2, "--steps", 2]
    words += ["--amounts", 300, "--out", tmp_path / "out", "--json"]
    said = run(*words)
    assert said.status == 0, said.err
    held = (tmp_path / "a.txt").stat().st_size * 2 + 1
    stored = json.loads((tmp_path / "out" / "transfer.json").read_text())
    points = transfer.run(
        "austen", base=lm, amounts=[300], seeds=(1, 2), steps=2, out=tmp_path / "out"
    )
    check("austen", points, [300], held // 4)
    assert [point["values"] for point in stored["points"]] == [list(p.values) for p in points]
    assert stored["command"] == "zoo transfer austen --amounts 300 --seeds 1 2 --steps 2"
    assert stored["base"] == str(lm), "not the example's, which had no part in it"
    meet = functools.partial(
        transfer.run, "austen", base=lm, amounts=[300], steps=2, out=tmp_path / "out", data=tmp_path
    )
    again = meet(amounts=[300, 300], seeds=(2, 1, 2))
    assert [p.seeds for p in again] == [(2, 1)] * len(points), "each seed is counted once"
    assert [p.values for p in again] == [p.values[::-1] for p in points]
    for options, message in (
        ({"base": lm, "steps": 3}, "steps was 2, not 3"),
        ({"base": published.write_weight(tmp_path / "other"), "steps": 2}, "base was '"),
        ({"steps": 2}, "base was '"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            transfer.run("austen", amounts=[300], seeds=(1,), out=tmp_path / "out", **options)
        assert "was made with other options" in str(caught.value)
        assert str(caught.value).endswith("choose another --out.")
    folder = tmp_path / "out" / "amount_300" / "seed_1"
    own = (lm / "model.safetensors").read_bytes()
    shutil.copy(folder / "fine-tuned" / "checkpoint" / "model.safetensors", lm)
    with pytest.raises(ConfigError, match=r"fine-tuned was made with other weights of the same na"):
        meet(seeds=(1,))
    (lm / "model.safetensors").write_bytes(own)
    learned = (folder / "text.txt").read_bytes()
    (tmp_path / "a.txt").write_text("other words " * 200)
    assert meet(seeds=(1,))[0].n == held // 4, "what is finished is not written again"
    (folder / "LoRA" / "outcome.json").rename(tmp_path / "kept.json")
    with pytest.raises(ConfigError, match=r"seed_1 was made with other data; choose another --out"):
        meet(seeds=(1,))
    assert (folder / "text.txt").read_bytes() == learned
    assert not (folder / "LoRA" / "outcome.json").exists()
    table = (tmp_path / "out" / "transfer.md").read_text()
    assert table.startswith("# Tiny Shakespeare to Austen's novels\n\nData in bytes.\n\n| training")
    assert table.count("\n| ") == 2 + len(points)
    scratch, tuned = (
        checkpoints.load(tmp_path / "out" / "amount_300" / "seed_1" / arm / "checkpoint")
        for arm in ("from scratch", "fine-tuned")
    )
    base = checkpoints.load(lm)
    for name, far in (("embedding.weight", scratch), ("blocks.0.mlp_in.weight", scratch)):
        weight = base.network.state_dict()[name]
        other = tuned.network.state_dict()[name]
        assert (other - weight).norm() < 0.1 * (far.network.state_dict()[name] - weight).norm()


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("mnist-to-fashion-mnist", 40),
        pytest.param("cifar100-to-fashion-mnist", 40, marks=pytest.mark.slow),
        pytest.param("cifar100-to-coarse", 40, marks=pytest.mark.slow),
    ],
)
def test_classifiers_on_few_pictures(few: None, name: str, n: int, tmp_path: Path) -> None:
    base = untrained(EXAMPLES[name].base.partition(".")[0], tmp_path / "base")
    points = transfer.run(name, base=base, amounts=[2], seeds=(1, 2), steps=2, out=tmp_path / "out")
    check(name, points, [2], n)
    data = tmp_path / "out" / "amount_2" / "seed_1"
    classes = 20 if name.endswith("coarse") else CLOTHES
    assert len(list((data / "train").glob("*/*.png"))) == 2 * classes
    assert len(list((data / "test").glob("*/*.png"))) == 40
    one, two = (
        {p.name for p in (tmp_path / "out" / "amount_2" / f"seed_{s}" / "train").glob("*/*")}
        for s in (1, 2)
    )
    assert one != two, "each seed draws its own"


def test_an_ensemble_meets_new_classes(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.families.online_ensemble import OnlineNetworkConfig
    from zoo.families.online_ensemble.encoders import EncoderConfig
    from zoo.tasks.online_learning import OnlineClassifier

    encoder = EncoderConfig(kind="autoencoder", dim=12)
    module = OnlineClassifier(network=OnlineNetworkConfig(encoder=encoder))
    digits = shades(20, 1, 28, 10)
    module.learn(digits.images, digits.labels)  # which look like the clothes to come
    checkpoints.save(module, tmp_path / "base")
    before = checkpoints.load(tmp_path / "base").predict(digits.images[:2])
    drawn, draw = [], torch.manual_seed
    with monkeypatch.context() as patched:
        patched.setattr(torch, "manual_seed", lambda seed: (drawn.append(seed), draw(seed))[1])
        points = transfer.run(
            "new-classes", base=tmp_path / "base", amounts=[2], seeds=(1, 2), out=tmp_path / "out"
        )
    assert drawn == [1, 2], "each seed has an encoder of its own"
    check("new-classes", points, [2], 40)
    _, among_all, among_new = points
    assert max(among_all.values) < 0.9 < min(among_new.values)
    assert checkpoints.load(tmp_path / "base").predict(digits.images[:2]) == before
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    with pytest.raises(ConfigError, match="was made with other options"):
        transfer.run("new-classes", base=tmp_path / "other", amounts=[2], out=tmp_path / "out")
    for path in (tmp_path / "out").rglob("outcome.json"):  # as they were before they named it
        path.write_text(json.dumps({k: v for k, v in read_json(path).items() if k != "base"}))
    again = transfer.run(
        "new-classes", base=tmp_path / "other", amounts=[2], seeds=(1, 2), out=tmp_path / "out"
    )
    assert again == points


def test_data_are_compared_with_those_of_finished_runs(few: None, tmp_path: Path) -> None:
    example = EXAMPLES["mnist-to-fashion-mnist"]
    where, done = tmp_path / "seed_1", [tmp_path / "seed_1" / arm for arm in ("a", "b")]
    path, _ = transfer._write_data(where, [], example, 2, 1, None)
    digest = transfer._digest(path)
    for arm, data in zip(done, (digest, None), strict=True):  # the other is from before
        arm.mkdir()
        (arm / "outcome.json").write_text(json.dumps({} if data is None else {"data": data}))
    stray = path / "train" / "000 shirt" / "stray.png"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"of other data")
    assert transfer._digest(path) != digest
    path, _ = transfer._write_data(where, done, example, 2, 1, None)
    assert not stray.exists()
    assert transfer._digest(path) == digest
    with pytest.raises(ConfigError, match="seed_1 was made with other data"):
        transfer._write_data(where, done, example, 2, 2, None)
    assert transfer._digest(path) == digest
    other, _ = transfer._write_data(where, done[1:], example, 2, 2, None)
    assert transfer._digest(other) != digest


def write_ratings(folder: Path) -> Path:
    folder.mkdir()
    pairs = [(u, i) for i in range(12) for u in range(20) if (u + i) % 3]
    lines = [f"{u},{i},{1 + (u * i) % 5}" for u, i in pairs]
    lines += [f"{u},{100 + u},3" for u in range(20)]  # an item that nobody else has rated
    (folder / "all.csv").write_text("\n".join(["user,item,rating", *lines]) + "\n")
    return folder / "all.csv"


def test_a_recommender_meets_new_users(tmp_path: Path) -> None:
    path = write_ratings(tmp_path / "data")
    tiny = [
        "model.network.embedding_dim=4",
        "model.network.expert_widths=[8]",
        "model.network.tower_widths=[4]",
        "trainer.max_epochs=1",
        "data.batch_size=64",
    ]
    meet = functools.partial(
        transfer.run,
        "new-users",
        amounts=[3],
        seeds=(1, 2),
        steps=2,
        out=tmp_path / "out",
        data=path,
    )
    points = meet(pretraining=tiny)
    check("new-users", points, [3], 4)  # a fifth of 20 users
    transfer.write("new-users", points, tmp_path / "out")
    trained = tmp_path / "out" / "base" / "run" / "checkpoint"
    assert read_json(tmp_path / "out" / "transfer.json")["base"] == str(trained)
    weights = (trained / WEIGHTS_FILE).read_bytes()
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs was 1, not 2"):
        meet(pretraining=[*tiny, "trainer.max_epochs=2"])
    assert (trained / WEIGHTS_FILE).read_bytes() == weights
    others = read_ratings_csv(tmp_path / "out" / "base" / "ratings.csv", time_column="time")
    new = read_ratings_csv(
        tmp_path / "out" / "amount_3" / "seed_1" / "ratings.csv", time_column="time"
    )
    assert not set(others.user_ids) & set(new.user_ids)
    assert len(others.user_ids) + len(new.user_ids) == 20
    assert set(new.item_ids) <= set(others.item_ids), "of others the base knows nothing"
    assert torch.bincount(new.users).tolist() == [5] * 4, "three to learn from, two held out"


# --- what the table says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "interval", "verdict"),
    [
        ("accuracy", (0.01, 0.2), "pays"),
        ("accuracy", (-0.2, -0.01), "costs"),
        ("accuracy", (-0.1, 0.1), "cannot tell"),
        ("nats_per_character", (-0.2, -0.1), "pays"),
        ("nats_per_character", (0.1, 0.2), "costs"),
        ("squared_error", (0.0, 0.2), "cannot tell"),
    ],
)
def test_verdicts(metric: str, interval: tuple[float, float], verdict: str) -> None:
    summary = Summary(mean=sum(interval) / 2, interval=interval)
    point = Point(arm="x", amount=5, metric=metric, n=9, seeds=(1,), values=(0.5,),
                  intervals=((0.4, 0.6),), mean=summary, gain=summary)  # fmt: skip
    assert point.verdict == verdict
    (row,) = transfer.rows([point])
    assert row[-1] == verdict
    assert dataclasses.replace(point, gain=None).verdict == "-"
    one = dataclasses.replace(point, gain=Summary(mean=0.5, interval=None))
    assert one.verdict == "cannot tell"


# --- what is kept --------------------------------------------------------------------------------


def a_point(arm: str, mean: float, gain: Summary | None) -> Point:
    return Point(
        arm=arm,
        amount=2000,
        metric="nats_per_character",
        n=9000,
        seeds=(1, 2),
        values=(mean - 0.25, mean + 0.25),
        intervals=((0.0, 9.0), (0.0, 9.0)),
        mean=Summary(mean=mean, interval=(mean - 0.5, mean + 0.5)),
        gain=gain,
    )


def test_outcomes_are_kept_beside_the_readme_that_shows_them(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- zoo:transfer -->\nold\n<!-- /zoo:transfer -->\nafter\n")
    gain = Summary(mean=-1.0, interval=(-1.5, -0.5))
    points = [a_point("from scratch", 3.0, None), a_point("fine-tuned", 2.0, gain)]
    for name in ("new-users", "austen"):
        (tmp_path / name).mkdir()
        transfer.write(name, points, tmp_path / name)
        transfer.update_readme(readme, tmp_path / name)
    before, _, header, _, *lines, _, after = readme.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert header.startswith("| example | training | data | metric | n | value |")
    assert [line.split(" | ")[1:3] for line in lines] == [
        ["from scratch", "2,000 bytes"],
        ["fine-tuned", "2,000 bytes"],
        ["from scratch", "2,000 ratings per user"],
        ["fine-tuned", "2,000 ratings per user"],
    ]
    assert lines[0].startswith("| `austen`: Tiny Shakespeare to Austen's novels | ")
    assert lines[1].endswith(
        " | nats per character | 9,000 | 2.0000 (1.5000 to 2.5000) | "
        "-1.0000 (-1.5000 to -0.5000) | pays |"
    )
    for name, left_out in (("austen", set()), ("new-users", {"base"})):  # which is a local folder
        kept = read_json(tmp_path / "model_cards" / "transfer" / f"{name}.json")
        whole = read_json(tmp_path / name / "transfer.json")
        assert kept == {key: value for key, value in whole.items() if key not in left_out}


def test_a_readme_keeps_no_outcome_of_another_base(tmp_path: Path) -> None:
    for option in ("--base", "--data"):
        words = ("transfer", "new-classes", option, tmp_path, "--readme", tmp_path / "README.md")
        said = run(*words, "--out", tmp_path / "out")
        assert said.status == 2
        assert "leave out --base and --data, or --readme" in said.err
    assert not (tmp_path / "out").exists()


def test_a_readme_without_markers_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing\n")
    transfer.write("austen", [a_point("from scratch", 3.0, None)], tmp_path)
    with pytest.raises(ConfigError, match="expected <!-- zoo:transfer -->"):
        transfer.update_readme(tmp_path / "README.md", tmp_path)
    assert not (tmp_path / "model_cards").exists()


def test_the_readme_shows_what_is_kept() -> None:
    home = shipped_folder("model_cards")
    text = (home.parent / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- zoo:transfer -->\n")[1].split("\n<!-- /zoo:transfer -->")[0]
    kept = {path.stem: read_json(path) for path in (home / "transfer").glob("*.json")}
    assert shown == transfer.markdown([kept[name] for name in EXAMPLES if name in kept])
    for record in kept.values():
        for point in record["points"]:
            assert point["mean"]["mean"] == pytest.approx(statistics.fmean(point["values"]))
            assert len(point["seeds"]) >= 3


def test_every_example_is_named_where_people_look() -> None:
    home = shipped_folder("model_cards").parent
    readme = (home / "README.md").read_text(encoding="utf-8").split("<!-- zoo:transfer -->")[0]
    said = "".join(run("transfer", "--help").out.split())  # long names are broken at hyphens
    for name in EXAMPLES:
        assert name in readme
        assert name in said


def test_every_example_has_a_recipe_of_its_base() -> None:
    assert len(EXAMPLES) == 6
    for example in EXAMPLES.values():
        assert (shipped_folder("recipes") / f"{example.base}.yaml").is_file()
        assert "fine-tuned" in example.ways


# --- bad input -----------------------------------------------------------------------------------


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"No example 'austin'\. Did you mean 'austen'"):
        transfer.run("austin")
    with pytest.raises(ConfigError, match="at least one seed, and amounts of at least 1"):
        transfer.run("austen", seeds=())
    with pytest.raises(ConfigError, match="at least one seed, and amounts of at least 1"):
        transfer.run("austen", amounts=[0])
    with pytest.raises(ConfigError, match="at least one seed, and amounts of at least 1"):
        transfer.run("austen", amounts=[])
    for steps in (0, -1):
        with pytest.raises(ConfigError, match=f"steps must be at least 1, got {steps}"):
            transfer.run("austen", steps=steps)
    with pytest.raises(ConfigError, match="new-classes learns in one pass; leave out steps"):
        transfer.run("new-classes", steps=5)
    lm = published.write_weight(tmp_path / "lm")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"No novels in .*none: put Austen's there as \.txt"):
        transfer.run("austen", base=lm, data=tmp_path / "none", out=tmp_path / "out")
