"""Tests of the controls: equal budgets, means and spreads over seeds, paired differences."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from safetensors.torch import load_file

from tests.tiny import LESS_DATA, SEGMENT, SHRUNK, write_recipe
from zoo import (
    _card_tables,
    cards,
    checkpoints,
    cli,
    controls,
    evaluation,
    intervals,
    provenance,
    training,
)
from zoo.cards import Control
from zoo.errors import ConfigError, UnknownNameError, ZooError
from zoo.files import RESULTS_FILE, WEIGHTS_FILE

NAME = "cached-transformer-lm.tiny-shakespeare"
SEEDS = (1, 2)
ARMS = ("a-none", "b-grc")
"""Recipes by name; the one of the model itself is the last."""


def write_controls(folder: Path) -> Path:
    """Recipes of the model and of a control without a cache; returns the folder of recipes."""
    recipes = folder / "recipes"
    home = recipes / "controls" / NAME
    home.mkdir(parents=True)
    model = write_recipe(folder, name="with a cache", differs="the model itself")
    model.rename(home / "b-grc.yaml")
    control = {
        "zoo": {"base": "b-grc.yaml", "name": "without", "differs": "no cache"},
        "model": {"network": {"memory": "none"}},
    }
    (home / "a-none.yaml").write_text(yaml.safe_dump(control))
    return recipes


class Trained(NamedTuple):
    arms: list[Control]
    out: Path
    recipes: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("controls")
    recipes = write_controls(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(controls, "shipped_folder", lambda name: folder / name)
        yield Trained(controls.run(NAME, seeds=SEEDS, out=folder / "out"), folder / "out", recipes)


def outcomes(trained: Trained, arm: str, protocol: str) -> list[dict[str, Any]]:
    paths = [trained.out / arm / f"seed_{seed}" / "outcome.json" for seed in SEEDS]
    return [json.loads(path.read_text())["measured"][protocol] for path in paths]


def test_there_is_one_for_each_recipe_and_protocol(trained: Trained) -> None:
    found = [(arm.result.protocol, arm.name, arm.differs, arm.recipe) for arm in trained.arms]
    model = ("with a cache", "the model itself", f"controls/{NAME}/b-grc.yaml")
    control = ("without", "no cache", f"controls/{NAME}/a-none.yaml")
    assert found == [
        ("stream", *model),
        ("stream", *control),
        ("blocks", *model),
        ("blocks", *control),
    ]
    for arm in trained.arms:
        assert arm.result.seeds == SEEDS
        assert arm.result.command == f"zoo controls {NAME}"


def test_values_are_means_over_seeds_of_what_the_checkpoints_give(trained: Trained) -> None:
    recipe_of = {"with a cache": "b-grc", "without": "a-none"}
    for arm in trained.arms:
        values = []
        for seed in SEEDS:
            folder = trained.out / recipe_of[arm.name] / f"seed_{seed}"
            evaluated = evaluation.evaluate(folder / "checkpoint", protocols=[arm.result.protocol])
            values.append(evaluated.value)
            assert evaluated.n == arm.result.n
            recipe = training.read_recipe(folder / "recipe.yaml")
            assert recipe.options["seed_everything"] == recipe.options["data"]["seed"] == seed
        assert len(set(values)) == len(SEEDS), "seeds make a difference"
        assert arm.result.value == pytest.approx(statistics.fmean(values), rel=1e-6)
        assert arm.result.seed_spread == pytest.approx(statistics.stdev(values), rel=1e-3)
        assert arm.result.interval[0] < arm.result.value < arm.result.interval[1]


def test_differences_are_paired_and_have_an_interval(trained: Trained) -> None:
    for protocol in ("stream", "blocks"):
        model, control = (a for a in trained.arms if a.result.protocol == protocol)
        assert model.difference is model.difference_interval is None
        expected = control.result.value - model.result.value
        assert control.difference == pytest.approx(expected, abs=1e-9)
        sums = [
            np.mean([run["sums"] for run in outcomes(trained, arm, protocol)], 0) for arm in ARMS
        ]
        counts = np.array(outcomes(trained, ARMS[0], protocol)[0]["counts"])
        reference = scipy.stats.bootstrap(
            (sums[0] - sums[1], counts),
            lambda d, c, axis: d.sum(axis) / c.sum(axis),
            paired=True,
            method="percentile",
            n_resamples=10_000,
            rng=np.random.default_rng(0),
        ).confidence_interval
        assert control.difference_interval is not None
        # Four standard errors of the difference of two bootstrap ends; see test_evaluation.
        tolerance = 4 * 2**0.5 * 0.027 * (reference.high - reference.low) / 3.92
        assert control.difference_interval == pytest.approx(tuple(reference), abs=tolerance)


def test_a_paired_interval_is_narrower_than_an_unpaired_one() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.full((200,), 10)
    units = 10 * torch.randn(200, generator=generator, dtype=torch.float64)
    a = units + 0.1 * torch.randn(200, generator=generator, dtype=torch.float64) + 1.0
    value, (low, high) = controls.paired_difference(a, units, counts)
    assert value == pytest.approx(float((a - units).sum() / 2000), rel=1e-12)
    assert low < value < high
    unpaired = intervals.bootstrap_interval(a, counts)
    assert high - low < 0.1 * (unpaired[1] - unpaired[0])
    assert controls.paired_difference(units, units, counts) == (0.0, (0.0, 0.0))


def test_parameters_and_macs_are_counted(trained: Trained) -> None:
    dim, cache, slots, hidden, vocabulary = 16, 8, 8, 64, 256
    plain = 4 * SEGMENT * dim**2 + 2 * SEGMENT**2 * dim  # attention
    plain += 2 * SEGMENT * dim * hidden + SEGMENT * dim * vocabulary  # feed-forward, head
    grc = 8 * slots * cache**2 + SEGMENT * cache**2 + 2 * SEGMENT * slots * cache
    for arm, recipe in zip(trained.arms, ("b-grc", "a-none") * 2, strict=True):
        stored = load_file(trained.out / recipe / "seed_1" / "checkpoint" / WEIGHTS_FILE)
        assert arm.parameters == sum(tensor.numel() for tensor in stored.values())
        expected = (plain + (grc if recipe == "b-grc" else 0)) / SEGMENT
        assert arm.macs == pytest.approx(expected, abs=0.51)


def test_speeds_are_of_samples_of_training(trained: Trained) -> None:
    """Which may be others than the sampling units of a protocol, as pairs are other than users."""
    for arm in trained.arms:
        number, unit = arm.speed.split(" ", 1)
        assert float(number.replace(",", "")) > 0
        assert unit == "samples/s"


def test_finished_runs_are_kept(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "fit", fail)
    again = controls.run(NAME, seeds=SEEDS, out=trained.out)
    assert [a.result.value for a in again] == [a.result.value for a in trained.arms]
    # Seeds are what to train with; all that was trained is recorded.
    one, *_ = controls.run(NAME, seeds=SEEDS[1:], out=trained.out)
    assert one.result.seeds == SEEDS
    with pytest.raises(AssertionError, match="trained again"):
        controls.run(NAME, seeds=(1, 2, 3), out=trained.out)


def test_finished_runs_of_other_options_are_not_recorded(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(training, "fit")
    for call in (controls.run, controls.collect):
        with pytest.raises(ConfigError, match=r"trainer\.max_epochs was 1, not 2") as caught:
            call(NAME, out=trained.out, overrides=["trainer.max_epochs=2"])
        folder = trained.out / "b-grc" / "seed_1"
        assert str(caught.value).startswith(f"{folder} was made with other options")
        assert str(caught.value).endswith("choose another --out.")
    # A run from before an option existed had what is its default now; a seed counts once.
    out = tmp_path / "out"
    shutil.copytree(trained.out, out)
    for path in out.glob("*/*/recipe.yaml"):
        values = yaml.safe_load(path.read_text())
        del values["data"]["validation_fraction"]
        path.write_text(yaml.safe_dump(values))
    one, *_ = controls.run(NAME, seeds=(1, 1, 2), out=out)
    assert one.result.seeds == SEEDS
    # What a machine is fast with is the machine's affair.
    for path in out.glob("*/*/recipe.yaml"):
        values = yaml.safe_load(path.read_text())
        values["model"]["compile"] = not values["model"]["compile"]
        path.write_text(yaml.safe_dump(values))
    one, *_ = controls.run(NAME, seeds=SEEDS, out=out)
    assert one.result.seeds == SEEDS
    with pytest.raises(ConfigError, match=r"validation_fraction was 0\.1, not 0\.2"):
        controls.run(NAME, seeds=SEEDS, out=out, overrides=["data.validation_fraction=0.2"])


def test_an_unknown_control_trains_nothing(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"has no control 'b-grcc'.*Did you mean 'b-grc'"):
        controls.run(NAME, only=["b-grcc"], out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_controls_may_have_unlike_numbers_of_seeds(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained.out, out)
    shutil.rmtree(out / "a-none" / f"seed_{SEEDS[1]}")
    model, control = controls.collect(NAME, out=out)[:2]
    assert (model.name, model.result.seeds) == ("with a cache", SEEDS)
    assert (control.name, control.result.seeds) == ("without", SEEDS[:1])
    assert control.result.seed_spread is None
    # The difference is over the seed that both have, whatever the means are over.
    ours, theirs = (outcomes(trained, arm, "stream")[0] for arm in ARMS)
    expected = (np.sum(ours["sums"]) - np.sum(theirs["sums"])) / np.sum(ours["counts"])
    assert control.difference == pytest.approx(expected, rel=1e-12)
    assert control.difference != pytest.approx(control.result.value - model.result.value, rel=1e-3)
    # Nothing is left to train of the model, and the control is not asked for.
    arms = controls.run(NAME, seeds=SEEDS[1:], out=out, only=["b-grc"])[:2]
    assert [arm.result.seeds for arm in arms] == [SEEDS, SEEDS[:1]]
    assert not (out / "a-none" / f"seed_{SEEDS[1]}").exists()


def test_versions_are_those_of_the_runs(trained: Trained, tmp_path: Path) -> None:
    """Not those it is collected with; all of them, where runs were made with several."""
    out = tmp_path / "out"
    shutil.copytree(trained.out, out)
    paths = [out / "b-grc" / f"seed_{seed}" / "outcome.json" for seed in SEEDS]
    for path, version in zip(paths, ("2.10.0", "2.11.0"), strict=True):
        stored = json.loads(path.read_text())
        assert stored["versions"] == provenance.versions()
        path.write_text(
            json.dumps({**stored, "versions": {**stored["versions"], "torch": version}})
        )
    arms = controls.collect(NAME, out=out)
    (found,) = {arm.result.versions["torch"] for arm in arms if arm.name == "with a cache"}
    assert found == "2.10.0, 2.11.0"
    del stored["versions"]  # as in runs of before
    paths[1].write_text(json.dumps(stored))
    found = controls.collect(NAME, out=out)[0].result.versions
    assert found == provenance.versions()


def test_one_control_may_be_trained_by_itself(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained.out / "a-none", out / "a-none")
    alone = controls.run(NAME, seeds=SEEDS, out=out, only=["a-none"], speeds=False)
    assert [(arm.name, arm.result.protocol) for arm in alone] == [
        ("without", "stream"),
        ("without", "blocks"),
    ]
    assert [arm.result.value for arm in alone] == [arm.result.value for arm in trained.arms[1::2]]
    assert all(arm.difference is arm.difference_interval is arm.macs is None for arm in alone)
    assert {arm.speed for arm in alone} == {""}
    assert not (out / "b-grc").exists()
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained.out / "b-grc" / "seed_1" / "checkpoint", folder)
    evaluation.record(folder, NAME)
    before = (folder / RESULTS_FILE).read_bytes()
    with pytest.raises(ZooError, match=r"^Nothing is recorded: no finished run of b-grc\.$"):
        controls.record(alone, folder)
    assert (folder / RESULTS_FILE).read_bytes() == before


def test_a_record_that_would_be_refused_is_so_before_anything_is_trained(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out", tmp_path / "checkpoint"
    shutil.copytree(trained.out / "b-grc" / "seed_1" / "checkpoint", folder)
    command = ["controls", NAME, "--out", str(out), "--record", str(folder), "--only", "b-grc"]
    assert cli.main(command) == cli.BAD_INPUT
    assert "has no results: zoo evaluate" in capsys.readouterr().err
    evaluation.record(folder, NAME)
    assert cli.main(command) == cli.BAD_INPUT
    assert "Nothing is recorded: no finished run of a-none." in capsys.readouterr().err
    assert not out.exists()
    # Those that are finished, or to be trained now, are not missing.
    controls.check_recordable(NAME, folder, out=trained.out, only=["b-grc"])
    controls.check_recordable(NAME, folder, out=out)


def test_a_control_may_be_compared_with_another(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "recipes" / "controls" / NAME
    shutil.copytree(trained.recipes / "controls" / NAME, home)
    out = tmp_path / "out"
    shutil.copytree(trained.out, out)
    shutil.copytree(out / "a-none" / "seed_2", out / "c-none" / "seed_2")
    third = {"base": "a-none.yaml", "name": "again", "differs": "its seeds", "against": "a-none"}
    (home / "c-none.yaml").write_text(yaml.safe_dump({"zoo": third}))
    monkeypatch.setattr(controls, "shipped_folder", lambda name: tmp_path / name)
    model, without, again = controls.collect(NAME, out=out)[:3]
    assert [arm.against for arm in (model, without, again)] == ["", "", "without"]
    assert without.difference == pytest.approx(without.result.value - model.result.value)
    # Over the seed that both have, of which they are the same run; the means are of others.
    assert again.difference == 0.0
    assert again.result.value != without.result.value
    third["against"] = "a-nome"
    (home / "c-none.yaml").write_text(yaml.safe_dump({"zoo": third}))
    with pytest.raises(UnknownNameError, match=r"names no control of .*Did you mean 'a-none'"):
        controls.run(NAME, out=tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_missing_run(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=f"There is no finished run of .* in {tmp_path}"):
        controls.collect(NAME, out=tmp_path)


def test_record(trained: Trained, tmp_path: Path) -> None:
    source = trained.out / "b-grc" / "seed_1" / "checkpoint"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ZooError, match=r"has no results: zoo evaluate .* --record"):
        controls.record(trained.arms, folder)
    evaluation.record(folder, NAME)
    before = cards.read_measurements(folder / RESULTS_FILE)
    controls.record(trained.arms, folder)
    after = cards.read_measurements(folder / RESULTS_FILE)
    assert after.results == before.results
    assert after.controls == tuple(trained.arms)
    models = [arm for arm in trained.arms if arm.name == "with a cache"]
    spreads = {arm.result.protocol: arm.result.seed_spread for arm in models}
    assert list(spreads) == ["stream", "blocks"]
    assert after.training["reproduction_tolerance"] == {
        # Student's 97.5 % quantile with one degree of freedom is 12.7062; see scipy.
        protocol: pytest.approx(scipy.stats.t.ppf(0.975, 1) * 2**0.5 * spread, rel=1e-9)
        for protocol, spread in spreads.items()
        if spread is not None
    }
    # One that there is nothing to compare with has no difference either, and is no model.
    alone = dataclasses.replace(trained.arms[1], difference=None, difference_interval=None)
    controls.record([trained.arms[0], alone, *trained.arms[2:]], folder)
    assert cards.read_measurements(folder / RESULTS_FILE).training == after.training
    assert checkpoints.load(folder).load_report.initialised == ()


def test_controls_of_no_weight_are_kept_beside_a_card(trained: Trained, tmp_path: Path) -> None:
    card, record = tmp_path / "card.md", tmp_path / "controls" / "some-study.json"
    card.write_text("before\n")
    with pytest.raises(ConfigError, match=r"card\.md: expected <!-- zoo:some-study -->"):
        controls.keep("some-study", trained.arms, card)
    assert not record.parent.exists()
    markers = "<!-- zoo:some-study -->\n", "<!-- /zoo:some-study -->\n"
    card.write_text("before\n" + "".join(markers) + "after\n")
    with pytest.raises(ZooError, match="no finished run of any control"):
        controls.keep("some-study", [], card)
    assert controls.keep("some-study", trained.arms, card, "zoo controls some-study") == record
    before, _, rest = card.read_text().partition(markers[0])
    shown, _, after = rest.partition(markers[1])
    assert (before, after) == ("before\n", "after\n")
    # One line for each net and protocol, after those of the header; of each its mean over seeds.
    lines = [line for line in shown.splitlines() if line.startswith("|")][2:]
    assert [line.split(" | ")[3].split()[0] for line in lines] == [
        f"{arm.result.value:.4f}" for arm in trained.arms
    ]
    stored = json.loads(record.read_text())
    assert stored["command"] == "zoo controls some-study"
    assert [one["result"]["value"] for one in stored["controls"]] == [
        arm.result.value for arm in trained.arms
    ]
    assert controls.markdown(stored) == shown.rstrip("\n")


def test_controls_of_a_weight_are_not_kept_beside_a_card(tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("<!-- zoo:ode-resnet.mnist -->\n<!-- /zoo:ode-resnet.mnist -->\n")
    with pytest.raises(ZooError, match=r"ode-resnet\.mnist is a weight; .* --record FOLDER"):
        controls.check_keepable("ode-resnet.mnist", card)
    with pytest.raises(ConfigError, match=r"missing\.md: cannot be read as a card"):
        controls.check_keepable("some-study", tmp_path / "missing.md")


def test_what_cannot_be_kept_or_drawn_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(controls, "run", lambda *args, **options: pytest.fail("it trained"))
    card, study = tmp_path / "card.md", "dselect-k-recommender.movielens-100k-pairs"
    card.write_text("without markers\n")
    assert cli.main(["controls", study, "--card", str(card)]) == cli.BAD_INPUT
    assert f"expected <!-- zoo:{study} -->" in capsys.readouterr().err
    assert cli.main(["controls", study, "--figure", str(tmp_path / "x.png")]) == cli.BAD_INPUT
    assert f"Unknown model {study!r}" in capsys.readouterr().err
    assert card.read_text() == "without markers\n"


def test_cards_show_the_controls_that_are_kept_beside_them() -> None:
    home = cards.shipped_folder("model_cards")
    kept = sorted((home / "controls").glob("*.json"))
    assert kept
    texts = [path.read_text(encoding="utf-8") for path in home.glob("*.md")]
    for path in kept:
        opening, closing = f"<!-- zoo:{path.stem} -->\n", f"\n<!-- /zoo:{path.stem} -->"
        (text,) = (text for text in texts if opening in text)
        shown = text.split(opening)[1].split(closing)[0]
        assert shown == controls.markdown(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("seeds", [3, 5])
def test_an_honest_repetition_is_within_the_tolerance_19_times_in_20(
    trained: Trained, seeds: int
) -> None:
    """Three standard deviations, of as few seeds, would turn away one in six."""
    generator, within, trials = np.random.default_rng(5), 0, 3000
    model = trained.arms[0]
    for _ in range(trials):
        recorded, again, *others = generator.normal(size=seeds + 2)
        result = dataclasses.replace(
            model.result, seeds=tuple(range(seeds)), seed_spread=statistics.stdev(others)
        )
        (allowed,) = controls.tolerances([dataclasses.replace(model, result=result)]).values()
        within += abs(recorded - again) <= allowed
    # Four standard errors of a share of 0.95 over 3,000 trials are 0.016.
    assert 0.934 <= within / trials <= 0.966


def test_the_error_over_seeds_is_students(trained: Trained) -> None:
    """Paired where the values of seeds are known, else Welch's; nothing with a single seed."""
    model, other = (
        dataclasses.replace(
            arm,
            values=values,
            result=dataclasses.replace(
                arm.result, seeds=(1, 2, 3), seed_spread=statistics.stdev(values)
            ),
        )
        for arm, values in zip(trained.arms[:2], ((0.2, 0.5, 0.3), (0.4, 0.6, 0.7)), strict=True)
    )

    def half(interval: Any) -> float:
        return float(interval.high - interval.low) / 2

    paired = scipy.stats.ttest_rel(other.values, model.values).confidence_interval(0.95)
    assert other.seed_error(model) == pytest.approx(half(paired))
    welch = scipy.stats.ttest_ind(other.values, model.values, equal_var=False)
    bare = [dataclasses.replace(arm, values=()) for arm in (other, model)]
    assert bare[0].seed_error(bare[1]) == pytest.approx(half(welch.confidence_interval(0.95)))
    one = dataclasses.replace(model.result, seeds=(9,), seed_spread=None)
    assert other.seed_error(dataclasses.replace(model, result=one, values=(0.4,))) is None
    shown = _card_tables.difference(other, [model, other])
    assert shown.endswith(f"; seeds ±{half(paired):.4f})")
    alone = [dataclasses.replace(model, result=one, values=(0.4,)), other]
    assert "seeds" not in _card_tables.difference(other, alone)


def test_the_models_own_recipe_comes_first(trained: Trained) -> None:
    assert [path.stem for path in controls.find_recipes(NAME)] == ["b-grc", "a-none"]


def test_a_weight_without_controls() -> None:
    with pytest.raises(ZooError) as caught:
        controls.find_recipes("nothing.here")
    assert str(caught.value) == "There are no controls for 'nothing.here' under recipes/controls/."


@pytest.mark.parametrize("name", ["continuous-flow.toy", "latent-ode.spirals"])
def test_of_sets_that_are_drawn_from_a_seed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "shipped_folder", cards.shipped_folder)  # the project's own
    recipe = training.read_recipe(controls.find_recipes(name)[0])
    options = [*SHRUNK[recipe.architecture], *LESS_DATA[recipe.data]]
    arms = controls.run(name, seeds=(1,), out=tmp_path, overrides=options)
    models = [arm for arm in arms if arm.difference is None]
    assert len(arms) == len(models) * len(controls.find_recipes(name))
    for arm in arms:
        assert arm.macs > 0
        assert float(arm.speed.split()[0].replace(",", "")) > 0
        assert np.isfinite(arm.result.value)
