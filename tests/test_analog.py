"""`zoo evaluate NAME --analog`, on a classifier that trains in a second."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests import tiny, tiny_images
from zoo import _card_tables, analog, cards, evaluation, figures, training
from zoo.analog import AnalogSettings, parse_settings
from zoo.data import images
from zoo.data.images import ImageDataModule
from zoo.data.pictures import ImageSplit
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.sau_shufflenet.analog import AnalogConfig, to_analog


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("analog") / "run"
    overrides = [
        *tiny.SHRUNK["sau-shufflenet-v2-x0-5"],
        *tiny_images.folder_overrides(tmp_path_factory.mktemp("pictures")),
        "trainer.limit_train_batches=1.0",
        "trainer.max_epochs=6",
        "model.ema_decay=0.5",
    ]
    return training.fit("sau-shufflenet-v2-x0-5.cifar100", overrides, out=out).checkpoint


def test_settings_from_words() -> None:
    assert parse_settings([]) == AnalogSettings()
    found = parse_settings(["bits=4,6", "noise=0.5", "repeats=2", "seed=7", "scale=unit"])
    assert found == AnalogSettings(bits=(4.0, 6.0), noise=(0.5,), repeats=2, seed=7, scale="unit")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bitz=4", "Cannot read 'bitz=4' after --analog. Did you mean 'bits'"),
        ("bits", "Cannot read 'bits'"),
        ("bits=four", "analog bits takes numbers, got 'four'"),
        ("bits=", "analog bits takes numbers"),
        ("repeats=0", "repeats must be at least 1, got 0"),
        ("images=0", "images must be at least 1, got 0"),
        ("seed=-1", r"seed must be from 0 to about 2\^63, got -1"),
        (f"seed={2**63 - 3}", "seed must be from 0 to"),  # of the third draw it is too large
        ("bits=4,6,4", "analog bits has 4 more than once"),
        ("noise=0.5 noise=0.2", "analog noise is given twice; write noise=A,B for several"),
        ("seed=1 seed=1", "analog seed is given twice"),
        ("scale=calib", "analog scale must be one of calibrated, unit, got calib"),
    ],
)
def test_bad_words(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_settings(word.split())
    assert "\n" not in str(caught.value)


def test_calibration_sees_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_images.write_folder(tmp_path)
    data = ImageDataModule(path=str(folder), size=tiny_images.SIZE)
    monkeypatch.setattr(analog, "_CALIBRATION_IMAGES", 6)
    found = analog._calibration_images(data)
    every = data.preprocessing.normalise(data.train_images)
    of_class = [every[data.train_labels == label] for label in range(3)]
    seen = [[any(torch.equal(one, o) for o in images) for one in found] for images in of_class]
    assert [sum(row) for row in seen] == [2, 2, 2]
    monkeypatch.setattr(analog, "_CALIBRATION_IMAGES", 10 * len(every))
    assert torch.equal(analog._calibration_images(data), every)


def test_scale_unit_reads_no_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    read = images.read_known

    def only_some(name: str, part: Any, data_dir: Any) -> images.ImageSplit:
        if part == "train":
            raise DataError("there are no training images")
        return ImageSplit(*(tensor[:100] for tensor in read(name, part, data_dir)))

    monkeypatch.setattr(images, "read_known", only_some)
    weight = "sau-shufflenet-v2-x0-5.fashion-mnist"
    settings = AnalogSettings(bits=(12.0,), noise=(0.0,), repeats=1, scale="unit")
    found = analog.sweep(weight, settings)
    assert found.results[0].n == 100
    # Values are cut off at 1, as by the network that is wrapped by hand.
    module = zoo.load(weight)
    module.network = to_analog(module.network, AnalogConfig(bits=12, scale="unit"))
    data = ImageDataModule("fashion-mnist")
    assert found.results[0].mean == float(module.measure(data, "test").sums.mean())
    with pytest.raises(DataError, match="no training images"):
        analog.sweep(weight, dataclasses.replace(settings, scale="calibrated"))


def test_nothing_is_measured_in_vain(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong is said before; what fails afterwards leaves the table."""
    words = ["evaluate", folder, "--analog", "bits=6", "noise=0.2", "repeats=1"]
    (tmp_path / "file").write_text("no folder")
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "evaluate_module", None)
        for more, message in (
            (("--beside", "nowhere"), "nowhere"),
            (("--beside", "cached-transformer-lm"), "is no image classifier"),
            (("--figures", tmp_path / "file"), "File exists"),
        ):
            said = tiny.run(*words, *more)
            assert said.status == 2
            assert message in said.err
        patched.setitem(sys.modules, "matplotlib.figure", None)
        said = tiny.run(*words, "--figures", tmp_path / "figures")
        assert (said.status, said.out) == (2, "")
        assert "Figures need matplotlib" in said.err
    assert not (tmp_path / "figures").exists()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures, "draw_analog", fail)
    said = tiny.run(*words, "--figures", tmp_path / "figures")
    assert said.status == 2
    assert said.out.splitlines()[0].split()[:2] == ["model", "bits"]
    assert len(said.out.splitlines()) == 2


def test_sweep(folder: Path, tmp_path: Path) -> None:
    settings = AnalogSettings(bits=(1.0, 12.0), noise=(0.0, 0.8), repeats=2)
    found = analog.sweep(folder, settings)
    assert [(r.bits, r.noise) for r in found.results] == [(1, 0), (1, 0.8), (12, 0), (12, 0.8)]
    assert found.digital == evaluation.evaluate(folder).value
    assert {r.n for r in found.results} == {evaluation.evaluate(folder).n}
    quiet = found.results[2]
    assert quiet.accuracies[0] == quiet.accuracies[1]  # without noise there is nothing to draw
    assert quiet.mean == pytest.approx(found.digital, abs=0.1)
    assert found == analog.sweep(folder, settings)
    paths = figures.draw_analog([found], tmp_path)
    assert [path.name for path in paths] == ["analog_bits.png", "analog_noise.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_some_of_the_images(folder: Path) -> None:
    """Of all classes alike, though a folder is read class by class."""
    settings = AnalogSettings(bits=(12.0,), noise=(0.0,), repeats=1, images=6)
    assert analog.sweep(folder, settings).results[0].n == 6
    whole = dataclasses.replace(settings, images=10**6)
    assert analog.sweep(folder, whole) == analog.sweep(
        folder, dataclasses.replace(settings, images=None)
    )
    recipe = training.read_recipe(folder / "recipe.yaml")
    datamodule: Any = training.data_module(recipe)
    datamodule.setup()
    datamodule.measure_on(6)
    assert len(set(datamodule.test_labels.tolist())) == len(tiny_images.CLASSES)


def test_command(folder: Path) -> None:
    words = ("evaluate", folder, "--analog", "bits=6", "noise=0.2", "repeats=2")
    said = tiny.run(*words)
    assert said.status == 0, said.err
    assert said.out.splitlines()[0].split()[:4] == ["model", "bits", "noise", "accuracy"]
    assert len(said.out.splitlines()) == 2
    document = json.loads(tiny.run(*words, "--json").out)
    assert len(document[0]["results"][0]["accuracies"]) == 2


def test_record(folder: Path, tmp_path: Path) -> None:
    """In results and card, under the names of controls, and kept when the weight is measured."""
    main, twin = tmp_path / "weight", tmp_path / "twin"
    for copy in (main, twin):
        shutil.copytree(folder, copy)
    recipe = twin / "recipe.yaml"
    named = recipe.read_text().replace("zoo:\n", 'zoo:\n  name: "ReLU, twin"\n', 1)
    recipe.write_text(named.replace("  weight: sau-shufflenet-v2-x0-5.cifar100\n", ""))
    words = ["evaluate", main, "--analog", "bits=6,8", "noise=0.2", "repeats=2", "--record"]
    (main / "results.json").unlink(missing_ok=True)
    refused = tiny.run(*words)
    assert (refused.status, refused.out) == (2, "")
    assert "has no results: zoo evaluate" in refused.err
    assert tiny.run("evaluate", main, "--record").status == 0
    said = tiny.run(*words, "--beside", twin, "--json")
    assert said.status == 0, said.err
    found = json.loads((main / "results.json").read_text())["analog"]
    assert found["sweeps"] == said.json
    weight = "sau-shufflenet-v2-x0-5.cifar100"
    assert [one["name"] for one in found["sweeps"]] == [weight, "ReLU, twin"]
    command = shlex.split(found["command"])
    assert command[:4] == ["zoo", "evaluate", weight, "--analog"]
    assert command[-2:] == ["--beside", "ReLU, twin"]
    assert parse_settings(command[4:-2]) == AnalogSettings(bits=(6.0, 8.0), noise=(0.2,), repeats=2)
    exact = AnalogSettings(noise=(0.1234567,), scale="unit", seed=3)
    assert parse_settings(analog._words(exact)) == exact
    two = analog.sweeps([main, main], AnalogSettings(bits=(6.0,), noise=(0.2,), repeats=1))
    assert [one.name for one in two] == [f"{weight} (1)", f"{weight} (2)"]
    assert tiny.run("evaluate", main, "--record").status == 0
    assert json.loads((main / "results.json").read_text())["analog"] == found

    card = cards.find("sau-shufflenet-v2-x0-5.fashion-mnist")
    body = card.body + "<!-- zoo:analog -->\n<!-- /zoo:analog -->\n"
    card = dataclasses.replace(card, body=body)
    assert "<!-- zoo:analog -->\nNone.\n" in _card_tables.fill_all(card)
    shown = _card_tables.fill_all(card, None, found).partition("<!-- zoo:analog -->")[2]
    row = next(line for line in shown.splitlines() if line.startswith("| ReLU, twin |"))
    accuracies = found["sweeps"][1]["results"][0]["accuracies"]
    spread = abs(accuracies[0] - accuracies[1]) / 2**0.5  # the deviation of two
    assert row.split(" | ")[3] == f"{sum(accuracies) / 2:.4f} ({spread:.4f})"
    assert "| Net | Images | Digital | 6 bits, noise 0.2 | 8 bits, noise 0.2 |" in shown
    for line in (found["command"], "standard deviation over 2 draws"):
        assert line in shown


def test_bad_commands(folder: Path) -> None:
    for words, message in (
        (("--analog", "noise=1.5"), "error probability in [0, 1), got 1.5"),
        (("--analog", "bits=2.5"), "whole number of levels"),
        (("--beside", "x"), "--beside and --figures go with --analog"),
    ):
        said = tiny.run("evaluate", folder, *words)
        assert said.status == 2
        assert message in said.err
        assert said.err.count("\n") == 1


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    run = training.fit(tiny.write_recipe(tmp_path), out=tmp_path / "run")
    with pytest.raises(ZooError, match="is no image classifier"):
        analog.sweep(run.checkpoint)
