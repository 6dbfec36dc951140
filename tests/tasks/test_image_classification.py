"""Tests of zoo.tasks.image_classification, on a tiny classifier through the whole of the zoo."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import (
    CLASSES,
    SIZE,
    TinyClassifier,
    assert_same,
    make_images,
    registered,
    state,
    write_recipe,
)

from zoo import checkpoints, evaluation, training
from zoo.data.images import ImagePreprocessing
from zoo.evaluation import wilson_interval

PREPROCESSING = ImagePreprocessing(
    size=SIZE, channels=3, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2), classes=CLASSES
)


@pytest.fixture(autouse=True)
def tiny_architecture() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> training.Run:
    folder = tmp_path_factory.mktemp("classifier")
    with registered():
        return training.fit(write_recipe(folder, ema_decay=0.9), out=folder / "run")


@pytest.fixture
def model(run: training.Run) -> Any:
    return checkpoints.load(run.checkpoint)


# --- a whole round --------------------------------------------------------------------------------


def test_training_binds_the_preprocessing_of_the_data(run: training.Run, model: Any) -> None:
    assert model.preprocessing == run.datamodule.preprocessing
    assert model.preprocessing.classes == CLASSES
    stored = json.loads((run.checkpoint / "config.json").read_text())["preprocessing"]
    assert stored["size"] == list(SIZE)
    pixels = run.datamodule.train_images.double().numpy() / 255
    assert stored["mean"] == pytest.approx(pixels.mean((0, 2, 3)))
    assert stored["std"] == pytest.approx(pixels.std((0, 2, 3)))


def test_the_trained_classifier_knows_its_classes(run: training.Run, model: Any) -> None:
    images, labels = make_images(30, seed=9)
    predictions = model.predict(list(images))
    assert [CLASSES.index(p.label) for p in predictions] == labels.tolist()
    assert all(p.probability > 0.5 for p in predictions)


def test_evaluate_counts_every_test_image_once(run: training.Run) -> None:
    evaluated = evaluation.evaluate(run.checkpoint)
    (outcome,) = evaluated.outcomes
    images, labels = run.datamodule.test_images, run.datamodule.test_labels
    assert (outcome.metric, outcome.unit, outcome.n) == ("accuracy", "image", len(labels))
    right = 0
    network = checkpoints.load(run.checkpoint).network
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (run.datamodule.preprocessing.mean, run.datamodule.preprocessing.std)
    )
    for image, label in zip(images, labels, strict=True):
        with torch.no_grad():
            right += int(network(((image / 255 - mean) / std)[None]).argmax()) == int(label)
    assert outcome.value == right / len(labels)
    assert outcome.interval == wilson_interval(right, len(labels))


def test_resumed_at_an_epoch_boundary_is_bit_identical(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ema_decay=0.9, channels_last=True)
    whole = training.fit(recipe, out=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyClassifier, "on_train_epoch_start", cut_power_in_third_epoch)
        with pytest.raises(PowerCutError):
            training.fit(recipe, out=tmp_path / "parts")
    resumed = training.fit(recipe, out=tmp_path / "parts", resume=True)
    assert_same(state(whole.module), state(resumed.module))
    assert any(name.startswith("ema.module.norm.running_mean") for name in state(whole.module))
    for name in ("model.safetensors", "config.json"):
        assert (whole.checkpoint / name).read_bytes() == (resumed.checkpoint / name).read_bytes()


class PowerCutError(Exception):
    """Ends a training as nothing that it knows of would."""


def cut_power_in_third_epoch(module: TinyClassifier) -> None:
    super(TinyClassifier, module).on_train_epoch_start()
    if module.current_epoch == 2:
        raise PowerCutError
