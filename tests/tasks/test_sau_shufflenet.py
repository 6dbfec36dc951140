"""The classifiers of the SAU ShuffleNets, from training to prediction, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from tests import tiny
from tests.tiny_images import CLASSES, SIZE, folder_overrides
from zoo import training
from zoo.errors import ConfigError, DataError
from zoo.families.sau_shufflenet import SAU, ShuffleNetConfig
from zoo.tasks.sau_shufflenet import SAUShuffleNetX0_5, SAUShuffleNetX1, SAUShuffleNetX2

RECIPE = "sau-shufflenet-v2-x0-5.cifar100"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A second's training on colour pictures of three classes."""
    return [
        *tiny.SHRUNK["sau-shufflenet-v2-x0-5"],
        *folder_overrides(tmp_path_factory.mktemp("pictures")),
        "model.network.activation=sau-2-trained",
    ]


@pytest.fixture(scope="module")
def folder(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sau") / "run"
    return training.fit(RECIPE, overrides, out=out).checkpoint


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return zoo.load(folder)


def test_trained_activations_come_back(model: Any) -> None:
    layers = [m for m in model.network.modules() if isinstance(m, SAU)]
    assert len(layers) == 37
    assert all(layer.log_beta is not None for layer in layers)
    assert model.load_report.dropped == model.load_report.initialised == ()
    assert any(layer.alpha.item() != pytest.approx(0.15, abs=1e-7) for layer in layers)


def test_paths_and_pictures_get_names_and_probabilities(model: Any, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "cat.png")
    (by_path,) = model.predict([str(tmp_path / "cat.png")])
    (by_picture,) = model.predict(picture)
    assert by_path == by_picture
    assert set(by_path.classes) == set(CLASSES)
    assert sum(by_path.probabilities) == pytest.approx(1.0, abs=1e-5)
    assert by_path.label == by_path.classes[0]


def test_bad_images_get_one_line(model: Any, tmp_path: Path) -> None:
    text = tmp_path / "cat.png"
    text.write_text("no picture")
    nan = torch.full((3, *SIZE), torch.nan)
    cases = [
        (str(text), "it is no picture"),
        (str(tmp_path / "dog.png"), "No picture at"),
        (torch.zeros(3, 5, 5), "3 channels and are 5 x 5; the model takes 3 and 8 x 10"),
        (torch.zeros(1, *SIZE), "1 channels"),
        (nan, "not finite"),
        (object(), "predict takes paths, PIL images, arrays and tensors, got object"),
    ]
    for given, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            model.predict([given])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module_class", [SAUShuffleNetX0_5, SAUShuffleNetX1, SAUShuffleNetX2])
def test_a_class_is_of_one_width(module_class: Any) -> None:
    assert module_class().network.config.width == module_class.width
    with pytest.raises(ConfigError, match=f"is of width {module_class.width}, got 1.5"):
        module_class(ShuffleNetConfig(width=1.5))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.network.width=1.0", "is of width 0.5, got 1.0"),
        ("model.network.activation=relo", "activation"),
        ("model.network.num_classes=7", "set model.network.num_classes=3"),
        ("model.network.in_channels=1", "set model.network.in_channels=3"),
    ],
)
def test_bad_recipes_get_one_line(
    override: str, message: str, overrides: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        training.fit(RECIPE, [*overrides, override], out=tmp_path / "run")
    assert "\n" not in str(caught.value)
