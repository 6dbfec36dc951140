"""Tests of zoo.tasks.image_classification, on a tiny classifier through the whole of the zoo."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests import tiny
from tests.tiny_images import (
    CLASSES,
    SIZE,
    TinyClassifier,
    TinyNetConfig,
    assert_same,
    make_images,
    registered,
    state,
    write_folder,
    write_recipe,
)
from zoo import cards, checkpoints, controls, evaluation, figures, hub, training
from zoo.data.augmentation import ImageBatch
from zoo.data.images import ImageDataModule
from zoo.data.pictures import ImagePreprocessing
from zoo.errors import CheckpointError, ConfigError, DataError, ZooError
from zoo.intervals import wilson_interval
from zoo.tasks.base import count_macs
from zoo.tasks.image_classification import ImagePrediction
from zoo.tasks.optimization import OptimizerConfig

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


def test_a_training_checkpoint_is_converted_to_the_average(
    run: training.Run, tmp_path: Path
) -> None:
    checkpoints.convert(run.folder / "last.ckpt", tmp_path / "converted")
    converted = tmp_path / "converted"
    for name in ("model.safetensors", "config.json"):
        assert (converted / name).read_bytes() == (run.checkpoint / name).read_bytes()
    assert training.read_facts(run.folder)["weights"] == "exponential moving average"


class PowerCutError(Exception):
    """Ends a training as nothing that it knows of would."""


def cut_power_in_third_epoch(module: TinyClassifier) -> None:
    super(TinyClassifier, module).on_train_epoch_start()
    if module.current_epoch == 2:
        raise PowerCutError


# --- the average of the weights -------------------------------------------------------------------


def test_the_average_is_the_one_of_its_definition(tmp_path: Path) -> None:
    """Followed step by step in numpy, from copies of the weights after each optimizer step."""
    history: list[dict[str, np.ndarray]] = []

    class Recorded(TinyClassifier):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            history.append({k: v.numpy().copy() for k, v in self.network.state_dict().items()})

    data = ImageDataModule(path=str(write_folder(tmp_path)), size=SIZE, batch_size=12)
    module = Recorded(ema_decay=0.6, optimizer=OptimizerConfig(name="sgd", lr=0.1))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
    )
    trainer.fit(module, datamodule=data)
    assert len(history) == trainer.global_step == 4
    assert module.ema is not None
    for name, found in module.ema.module.state_dict().items():
        average = history[0][name].astype(float)
        for updates, weights in enumerate(history[1:], start=1):
            decay = min(0.6, (1 + updates) / (10 + updates))
            average = decay * average + (1 - decay) * weights[name]
        if name == "norm.num_batches_tracked":
            average = history[-1][name]
            assert average > 0
        assert np.allclose(found.numpy(), average, atol=1e-6), name
    assert module.published_network is module.ema.module
    assert not any(p.requires_grad for p in module.ema.parameters())


def test_without_an_average_the_last_step_is_published() -> None:
    module = TinyClassifier()
    assert module.ema is None
    assert module.published_network is module.network
    assert all(name.startswith("network.") for name in module.state_dict())


# --- loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_smoothed_cross_entropy(smoothing: float, soft: bool) -> None:
    module = TinyClassifier(label_smoothing=smoothing).eval()
    images, labels = torch.randn(6, 3, *SIZE), torch.arange(6) % 3
    targets = np.eye(3)[labels.numpy()]
    if soft:
        targets = 0.7 * targets + 0.3 * targets[::-1]
    given = torch.from_numpy(targets.copy()).float() if soft else labels
    loss = module.training_step(ImageBatch(images, given), 0)
    logits = module.network(images).detach().double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = (1 - smoothing) * targets + smoothing / 3
    assert float(loss) == pytest.approx(-(wanted * log_p).sum(1).mean(), rel=1e-5)


# --- predictions ----------------------------------------------------------------------------------


def expected_probabilities(model: Any, pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(v) for v in (model.preprocessing.mean, model.preprocessing.std))
    inputs = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        logits = model.network(torch.from_numpy(inputs).float()).double().numpy()
    exps = np.exp(logits)
    return exps / exps.sum(1, keepdims=True)


def test_all_kinds_of_input_agree(model: Any, tmp_path: Path) -> None:
    pixels, _ = make_images(4, seed=3)
    expected = expected_probabilities(model, pixels)
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for given in (
        paths,
        [str(path) for path in paths],
        [Image.open(path) for path in paths],
        list(pixels),
        pixels,
        pixels / 255,
        channels_first,
        list(channels_first),
        channels_first / 255,
        [paths[0], pixels[1], channels_first[2], (channels_first[3] / 255).double()],
    ):
        predictions = model.predict(given)
        assert len(predictions) == 4
        for prediction, probabilities in zip(predictions, expected, strict=True):
            assert isinstance(prediction, ImagePrediction)
            order = np.argsort(-probabilities)
            assert prediction.classes == tuple(CLASSES[i] for i in order)
            assert prediction.probabilities == pytest.approx(probabilities[order], abs=1e-5)
            assert prediction.label == prediction.classes[0]
            assert prediction.probability == prediction.probabilities[0]


def test_one_image_alone_and_the_number_of_classes(model: Any, tmp_path: Path) -> None:
    Image.fromarray(make_images(1)[0][0]).save(tmp_path / "a.png")
    (one,) = model.predict(tmp_path / "a.png", top_k=2)
    assert len(one.classes) == len(one.probabilities) == 2
    (all_of_them,) = model.predict(str(tmp_path / "a.png"), top_k=99)
    assert sorted(all_of_them.classes) == sorted(CLASSES)
    with pytest.raises(ConfigError, match="top_k must be at least 1, got 0"):
        model.predict(tmp_path / "a.png", top_k=0)


def test_pictures_of_another_size_or_colour_are_fitted(model: Any, tmp_path: Path) -> None:
    pixels, labels = make_images(3, seed=4)
    for image, label in zip(pixels, labels, strict=True):
        picture = Image.fromarray(image).resize((SIZE[1] * 5, SIZE[0] * 4))
        picture.convert("RGBA").save(tmp_path / "large.png")
        (found,) = model.predict(tmp_path / "large.png")
        assert found.label == CLASSES[label]


def test_grey_images() -> None:
    preprocessing = ImagePreprocessing(
        size=(4, 6), channels=1, mean=(0.5,), std=(0.5,), classes=("a", "b")
    )
    network = TinyNetConfig(num_classes=2, in_channels=1)
    model = TinyClassifier(network, preprocessing=preprocessing).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6), dtype=np.uint8)
    expected = model.predict(list(pixels))
    assert model.predict(pixels) == expected
    assert model.predict(pixels[..., None]) == expected
    assert model.predict(torch.from_numpy(pixels)) == expected
    assert model.predict(torch.from_numpy(pixels)[:, None]) == expected
    assert model.predict([Image.fromarray(p) for p in pixels]) == expected
    for shape in ((4, 6, 3), (4, 6, 4), (2, 4, 6, 3)):
        with pytest.raises(DataError, match=r"6, [34]\) is no image: expected H x W x 1\.$"):
            model.predict(np.zeros(shape, dtype=np.uint8))


GOOD = np.zeros((*SIZE, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            np.zeros((5, 10, 3), np.uint8),
            r"have 3 channels and are 5 x 10; the model takes 3 and 8 x 10",
        ),
        (torch.zeros(1, 8, 10), "have 1 channels and are 8 x 10; the model takes 3 and 8 x 10"),
        (
            np.zeros((8, 10), np.uint8),
            r"A tensor of shape \(8, 10\) is no image: expected 3 x H x W",
        ),
        (np.zeros((3, 8, 10), np.uint8), r"shape \(3, 8, 10\) is no image: expected H x W x 3"),
        (GOOD.astype(np.int64), "Images must be uint8 or floating point, got torch.int64"),
        (GOOD + np.nan, "has values that are not finite"),
        (GOOD + np.inf, "has values that are not finite"),
        (GOOD + 255.0, "Floating point images go from 0 to 1, got values from 255 to 255"),
        (GOOD - 0.5, "Floating point images go from 0 to 1, got values from -0.5"),
        (3, "predict takes paths, PIL images, arrays and tensors, got int"),
        (None, "predict takes paths, PIL images, arrays and tensors, got NoneType"),
        ("nowhere.png", r"No picture at nowhere\.png"),
        ("a\0b.png", r"'a\\x00b\.png' is no path of a picture: embedded null byte"),
        (Path(__file__), "Cannot read the picture .*: it is no picture"),
        ([], "predict got no images"),
        ([torch.zeros(0, 3, *SIZE)], r"no images in a batch of shape \(0, 3,"),
        (GOOD.astype(object), "Images must be uint8 or floating point, got an array of object"),
        (Image.fromarray(np.full(SIZE, 3, np.int32)), "has 32-bit values; save it with 8 bits"),
        (Image.fromarray(np.full(SIZE, 3, np.float32)), "has 32-bit values; save it with 8 bits"),
    ],
)
def test_what_cannot_be_predicted(model: Any, given: Any, message: str) -> None:
    for wrong in (given,) if isinstance(given, list) else (given, [given]):
        with pytest.raises(DataError, match=message) as caught:
            model.predict(wrong)
        assert "\n" not in str(caught.value)


def closed() -> Image.Image:
    picture = Image.new("RGB", SIZE[::-1])
    picture.close()
    return picture


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Image.new("La", SIZE[::-1]), "cannot be read as RGB: conversion from La to L"),
        (closed, "that was given cannot be read as RGB: Operation on closed image; give one"),
        (lambda: Image.new("RGB", (0, 5)), "that was given is 0 x 5: no pixels"),
    ],
)
def test_pictures_in_hand_that_cannot_be_predicted(model: Any, make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        model.predict(make())
    assert "\n" not in str(caught.value)


def test_the_order_of_bytes_makes_no_difference(model: Any) -> None:
    pixels = make_images(2)[0] / 255
    expected = model.predict(pixels)
    for kind in (">f8", "<f8"):
        assert model.predict(pixels.astype(kind)) == expected


def test_what_is_transparent_is_seen_on_white(model: Any) -> None:
    hidden = np.zeros((*SIZE, 4), np.uint8)
    white = np.full((*SIZE, 3), 255, np.uint8)
    assert model.predict(Image.fromarray(hidden)) == model.predict(white)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_model_that_diverged_is_not_measured(run: training.Run, broken: float) -> None:
    module: Any = checkpoints.load(run.checkpoint)
    with torch.no_grad():
        module.network.head.bias[1] = broken
    message = r"^The model's logits are not finite: its training diverged, or .* are damaged\.$"
    with pytest.raises(ZooError, match=message):
        module.measure(run.datamodule, "test")
    with pytest.raises(ZooError, match=message):
        module.predict(GOOD)


def test_an_empty_batch_has_no_images(model: Any) -> None:
    for given in (torch.zeros(0, 3, *SIZE), np.zeros((0, *SIZE, 3)), torch.zeros(0)):
        with pytest.raises(DataError, match=r"predict got no images\.$"):
            model.predict(given)
    with pytest.raises(ConfigError, match=r"top_k must be a whole number, got 2\.5"):
        model.predict(GOOD, top_k=2.5)


def test_counting_leaves_every_module_in_its_mode() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
    network[1].eval()
    assert count_macs(network, torch.randn(1, 3)) == 6
    assert [part.training for part in network.modules()] == [True, True, False]
    with pytest.raises(RuntimeError):
        count_macs(network, torch.randn(1, 4))
    assert [part.training for part in network.modules()] == [True, True, False]


def test_it_is_measured_in_the_middle_of_a_training(run: training.Run, model: Any) -> None:
    expected = model.measure(run.datamodule, "test").sums
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train().published_network.dropout.eval()
    modes = [part.training for part in model.modules()]
    assert torch.equal(model.measure(run.datamodule, "test").sums, expected)

    def fail() -> None:
        with model.evaluating():
            assert not any(part.training for part in model.modules())
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_picture_in_hand_is_as_its_file(model: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(make_images(1)[0][0])
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.arange(80, dtype=np.uint16).reshape(SIZE) * 800).save(tmp_path / "16.png")
    for name in ("turned.png", "16.png"):
        with Image.open(tmp_path / name) as picture:
            assert model.predict(picture) == model.predict(tmp_path / name)
    with Image.open(tmp_path / "turned.png") as picture:
        upright = turned.transpose(Image.Transpose.ROTATE_270)
        assert model.predict(picture) == model.predict(upright)


def test_a_classifier_that_knows_no_images_yet(tmp_path: Path) -> None:
    module = TinyClassifier()
    with pytest.raises(ZooError, match="does not know what its images are: train it, or pass"):
        module.predict(GOOD)
    with pytest.raises(CheckpointError, match="does not know its preprocessing: train it, or pass"):
        checkpoints.save(module, tmp_path / "x")


# --- what fits and what does not ------------------------------------------------------------------


def test_a_head_swap_names_classes_by_numbers_until_training(
    run: training.Run, tmp_path: Path
) -> None:
    module: Any = checkpoints.load(run.checkpoint, num_classes=4)
    names = tuple(f"class {i}" for i in range(4))
    assert module.preprocessing == dataclasses.replace(run.datamodule.preprocessing, classes=names)
    assert module.load_report.initialised == ("head.weight", "head.bias")
    assert sorted(module.predict(GOOD)[0].classes) == sorted(names)


def test_training_on_keeps_the_statistics_and_takes_the_names(
    run: training.Run, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, 30, seed=5)
    (folder / "left").rename(folder / "port")
    data = ImageDataModule(path=str(folder), size=SIZE)
    other = data.preprocessing
    module: Any = checkpoints.load(run.checkpoint)
    module.bind(data)
    assert other.mean != run.datamodule.preprocessing.mean
    assert module.preprocessing == data.preprocessing
    assert data.preprocessing == dataclasses.replace(
        run.datamodule.preprocessing, classes=("dark", "port", "right")
    )
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch.images, module.preprocessing.normalise(data.test_images))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            TinyNetConfig(num_classes=5),
            "have 3 classes, but the network is for 5: set model.network.num_classes=3",
        ),
        (
            TinyNetConfig(in_channels=1),
            "have 3 channels, but the network is for 1: set model.network.in_channels=3",
        ),
    ],
)
def test_data_that_do_not_fit_the_network(
    tmp_path: Path, network: TinyNetConfig, message: str
) -> None:
    data = ImageDataModule(path=str(write_folder(tmp_path, 9)), size=SIZE)
    with pytest.raises(ConfigError, match=message):
        TinyClassifier(network).bind(data)
    with pytest.raises(ConfigError, match=message):
        TinyClassifier(network, preprocessing=PREPROCESSING)


def test_data_of_another_size(run: training.Run, tmp_path: Path) -> None:
    module: Any = checkpoints.load(run.checkpoint)
    data = ImageDataModule(path=str(write_folder(tmp_path, 9)), size=(4, 4))
    with pytest.raises(ConfigError, match=r"are 4 x 4, but .* trained on 8 x 10: set data\.size"):
        module.bind(data)


def test_measuring_on_other_classes(run: training.Run, tmp_path: Path) -> None:
    module: Any = checkpoints.load(run.checkpoint)
    folder = write_folder(tmp_path, 9)
    (folder / "left").rename(folder / "port")
    with pytest.raises(
        DataError, match=r"\(dark, port, right\) are not those of the model \(dark, l"
    ):
        module.measure(ImageDataModule(path=str(folder), size=SIZE), "test")
    with pytest.raises(ZooError, match="Unknown protocol 'tets'; choose one of test"):
        module.measure(run.datamodule, "tets")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\), or null for none, got 1.0"),
        ({"ema_decay": 0.0}, r"ema_decay must be in \(0, 1\), or null for none, got 0.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyClassifier(**options)


def test_validation_counts_the_images(
    run: training.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageDataModule, "validation_labels", torch.zeros(999))
    with pytest.raises(AssertionError, match="counted 12 images of 999"):
        training.fit(write_recipe(tmp_path), out=tmp_path / "run")
    # One batch is asked for, which is no more than that.
    some = ["trainer.limit_val_batches=1", "trainer.max_epochs=1"]
    done = training.fit(write_recipe(tmp_path), some, out=tmp_path / "some")
    assert done.checkpoint.is_dir()


# --- around it: command, card, controls, figures --------------------------------------------------


def test_zoo_predict(run: training.Run, tmp_path: Path) -> None:
    pixels, labels = make_images(2, seed=8)
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    said = tiny.run("predict", run.checkpoint, "--image", *paths, "--top-k", "2", "--json")
    assert said.status == 0, said.err
    assert [entry["image"] for entry in said.json] == [str(path) for path in paths]
    assert [entry["classes"][0] for entry in said.json] == [CLASSES[n] for n in labels]
    assert all(len(e["classes"]) == len(e["probabilities"]) == 2 for e in said.json)
    table = tiny.run("predict", run.checkpoint, "--image", *paths).out.splitlines()
    assert table[0].split() == ["picture", "class", "probability"]
    assert len(table) == 1 + 2 * len(CLASSES)
    assert table[1].split()[:2] == [str(paths[0]), CLASSES[labels[0]]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "a"], "is for image-classification; it takes --image."),
        (["--image", "nowhere.png"], "No picture at nowhere.png."),
        (["--image", __file__], "it is no picture."),
        (["--image", __file__, "--top-k", "0"], "top_k must be at least 1, got 0"),
    ],
)
def test_zoo_predict_with_bad_input(run: training.Run, words: list[str], message: str) -> None:
    said = tiny.run("predict", run.checkpoint, *words)
    assert (said.status, said.out) == (2, "")
    assert message in said.err
    assert said.err.count("\n") == 1


def test_controls_are_paired_over_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "recipes" / "controls" / "tiny-classifier.made"
    home.mkdir(parents=True)
    write_recipe(tmp_path, ema_decay=0.9).rename(home / "model.yaml")
    recipe = {"zoo": {"base": "model.yaml", "name": "narrow", "differs": "one channel"}}
    changed = {**recipe, "model": {"network": {"width": 1}}, "trainer": {"max_epochs": 1}}
    (home / "narrow.yaml").write_text(yaml.safe_dump(changed))
    monkeypatch.setattr(controls, "shipped_folder", lambda name: tmp_path / name)
    model, narrow = controls.run("tiny-classifier.made", seeds=(1, 2), out=tmp_path / "out")
    assert (model.result.metric, model.result.split, model.result.n) == ("accuracy", "test", 12)
    assert model.result.interval_method.startswith("bootstrap over 12 images of the mean")
    assert narrow.difference == pytest.approx(narrow.result.value - model.result.value)
    assert narrow.difference_interval is not None
    assert narrow.difference_interval[0] <= narrow.difference <= narrow.difference_interval[1]
    # A convolution of 3 x 3 over 3 channels at each pixel, and the head.
    for control, width in ((model, 8), (narrow, 1)):
        assert control.macs == 9 * 3 * width * SIZE[0] * SIZE[1] + 4 * width * 3
        assert control.parameters == (27 + 1) * width + 2 * width + 4 * width * 3 + 3
        assert control.speed.endswith(" samples/s")


def test_figures(run: training.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = dataclasses.replace(
        cards.find("cached-transformer-lm"), task="image-classification", files=()
    )
    monkeypatch.setattr(hub, "resolve", lambda name: hub.Located(run.checkpoint, None))
    monkeypatch.setattr(checkpoints, "load", lambda folder, files: None)
    drawn = figures.draw(card, run.folder, tmp_path)
    assert [path.name for path in drawn] == ["loss.png", "accuracy.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert {"train_loss", "val_loss", "val_accuracy"} <= figures.read_metrics(run.folder).keys()


def test_a_card_names_the_task_as_the_hub_does() -> None:
    card = dataclasses.replace(cards.find("cached-transformer-lm"), task="image-classification")
    assert "pipeline_tag: image-classification\n" in cards.render(card)


@pytest.mark.slow
def test_two_processes_count_each_image_once(tmp_path: Path) -> None:
    """The count is asserted in the validation itself, over both processes."""
    recipe = write_recipe(tmp_path, ema_decay=0.9)
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from tests.tiny_images import registered\n"
        "from zoo import training\n"
        "if __name__ == '__main__':\n"
        "    with registered():\n"
        "        training.fit(sys.argv[1], ['trainer.strategy=ddp', 'trainer.devices=2',\n"
        "                                   'trainer.max_epochs=2'], out=sys.argv[2])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(recipe), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = figures.read_metrics(tmp_path / "run")
    assert len(metrics["val_accuracy"]) == 2
    model: Any = checkpoints.load(tmp_path / "run" / "checkpoint")
    datamodule = training.data_module(training.read_recipe(recipe))
    measured = model.measure(datamodule, "test")
    assert measured.value == pytest.approx(metrics["val_accuracy"][-1][1])
