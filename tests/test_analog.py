"""`zoo evaluate NAME --analog`, on a classifier that trains in a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny, tiny_images
from zoo import analog, evaluation, figures, training
from zoo.analog import AnalogSettings, parse_settings
from zoo.errors import ConfigError, ZooError


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
    found = parse_settings(["bits=4,6", "noise=0.5", "repeats=2", "seed=7"])
    assert found == AnalogSettings(bits=(4.0, 6.0), noise=(0.5,), repeats=2, seed=7)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bitz=4", "Cannot read 'bitz=4' after --analog. Did you mean 'bits'"),
        ("bits", "Cannot read 'bits'"),
        ("bits=four", "analog bits takes numbers, got 'four'"),
        ("bits=", "analog bits takes numbers"),
        ("repeats=0", "repeats must be at least 1, got 0"),
        ("seed=-1", "seed must not be negative, got -1"),
    ],
)
def test_bad_words(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings([word])


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


def test_command(folder: Path) -> None:
    words = ("evaluate", folder, "--analog", "bits=6", "noise=0.2", "repeats=2")
    said = tiny.run(*words)
    assert said.status == 0, said.err
    assert said.out.splitlines()[0].split()[:4] == ["model", "bits", "noise", "accuracy"]
    assert len(said.out.splitlines()) == 2
    document = json.loads(tiny.run(*words, "--json").out)
    assert len(document[0]["results"][0]["accuracies"]) == 2


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
