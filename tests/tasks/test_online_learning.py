"""Tests of online learning in hand: predict, learn, store, fit, measure."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from zoo import checkpoints, training
from zoo.configs import to_json
from zoo.data.pictures import ImagePreprocessing
from zoo.data.streams import StreamConfig, StreamDataModule
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.online_ensemble import (
    EncoderConfig,
    GateConfig,
    OnlineNetworkConfig,
    RidgeEnsembleConfig,
)
from zoo.files import format_json
from zoo.tasks.online_learning import OnlineClassifier

SIZE = 8
NETWORK = OnlineNetworkConfig(
    encoder=EncoderConfig(kind="autoencoder", dim=6, image_size=SIZE),
    ridge_ensemble=RidgeEnsembleConfig(classifiers=4, features=2, gate=GateConfig(k=2)),
)
TINY = [
    "model.encoder_weights=null",
    "model.network.encoder.dim=6",
    f"model.network.encoder.image_size={SIZE}",
    "model.network.ridge_ensemble.classifiers=4",
    "model.network.ridge_ensemble.features=2",
    "model.network.ridge_ensemble.gate.k=2",
    f"data.size=[{SIZE},{SIZE}]",
    "data.stream.tasks=3",
    "data.stream.batch_size=4",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
]


def module(network: OnlineNetworkConfig = NETWORK, **options: Any) -> OnlineClassifier:
    torch.manual_seed(3)
    return OnlineClassifier(network, **options).eval()


def pictures(classes: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(len(classes), 1, SIZE, SIZE, generator=generator) * 0.3
    for image, c in zip(images, classes, strict=True):
        image[:, :, 2 * c : 2 * c + 2] += 0.6
    return images, torch.tensor(classes)


def folder(path: Path) -> Path:
    for index, name in enumerate(("ant", "bee", "cat")):
        (path / name).mkdir(parents=True)
        for number in range(10):
            image = pictures([index], seed=100 * index + number)[0][0, 0]
            pixels = (image * 255).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(path / name / f"{number}.png")
    return path


def same_state(a: OnlineClassifier, b: OnlineClassifier) -> bool:
    ours, theirs = a.network.state_dict(), b.network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_it_learns_in_place_and_names_what_it_has_seen() -> None:
    m = module()
    m.learn(*pictures([0, 1] * 10))
    m.learn(*pictures([2] * 10, seed=1))
    x, y = pictures([0, 1, 2] * 5, seed=2)
    predictions = m.predict(x)
    names = [p.label for p in predictions]
    assert np.mean([name == f"class {c}" for name, c in zip(names, y.tolist(), strict=True)]) > 0.9
    for prediction in predictions:
        assert sum(prediction.probabilities) == pytest.approx(1.0, abs=1e-5)
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
    assert len(m.predict(x[:1], top_k=2)[0].classes) == 2


def test_images_come_in_any_form(tmp_path: Path) -> None:
    m = module()
    path = folder(tmp_path) / "ant" / "0.png"
    picture = Image.open(path)
    array = np.asarray(picture)
    m.learn([str(path), picture, array, torch.from_numpy(array.copy())], [0, 0, 1, 1])
    m.learn(*pictures([0, 1, 2]))
    answers = m.predict([str(path), picture, array])
    assert answers[0] == answers[1] == answers[2]


def test_the_encoder_never_changes_and_the_global_state_neither() -> None:
    m = module()
    before = copy.deepcopy(m.network.encoder.state_dict())
    random = torch.get_rng_state()
    m.learn(*pictures([0, 1, 2]))
    m.predict(pictures([0])[0])
    assert all(torch.equal(v, before[k]) for k, v in m.network.encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(p.requires_grad for p in m.network.encoder.parameters())


def test_a_checkpoint_in_mid_stream_goes_on_bit_for_bit(tmp_path: Path) -> None:
    m = module()
    m.learn(*pictures([0, 1, 0, 1]))
    checkpoints.save(m, tmp_path / "stored")
    loaded = checkpoints.load(tmp_path / "stored")
    assert isinstance(loaded, OnlineClassifier)
    assert loaded.config.num_classes == 2
    for one in (m, loaded):
        one.learn(*pictures([3, 1, 3], seed=4))
    assert same_state(m, loaded)
    assert m.predict(pictures([3])[0]) == loaded.predict(pictures([3])[0])
    assert m.preprocessing == loaded.preprocessing


def fixed() -> OnlineClassifier:
    return module(dataclasses.replace(NETWORK, num_classes=3, grows=False))


ONE = torch.zeros(1, 1, SIZE, SIZE)
BAD: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "float labels": (lambda: (ONE, torch.tensor([1.0])), "Labels must be integers"),
    "names for labels": (lambda: (ONE, ["cat"]), "Labels must be integers, got"),
    "negative label": (lambda: (ONE, [-1]), "Labels must be 0 or larger, got -1"),
    "beyond a fixed head": (lambda: (ONE, [3]), "Class 3 is beyond the 3 classes"),
    "another number of labels": (lambda: (ONE, [0, 1]), "Expected 1 labels"),
    "another shape": (lambda: (torch.zeros(1, 1, SIZE, SIZE + 1), [0]), "8 x 9; the model takes"),
    "another number of channels": (lambda: (torch.zeros(1, 3, SIZE, SIZE), [0]), "have 3 channels"),
    "nan": (lambda: (torch.full_like(ONE, torch.nan), [0]), "not finite"),
    "out of range": (lambda: (ONE + 2, [0]), "go from 0 to 1"),
    "empty tensor": (lambda: (ONE[:0], []), "batch is empty"),
    "empty list": (lambda: ([], []), "batch is empty"),
    "empty tensor in a list": (lambda: ([ONE[:0]], []), r"no images in a batch of shape \(0, 1,"),
    "no picture": (lambda: ("nowhere.png", [0]), "No picture at nowhere.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_leaves_the_state(case: str) -> None:
    m = fixed()
    m.learn(*pictures([0, 1, 2]))
    before, named = copy.deepcopy(m.network.state_dict()), m.preprocessing
    make, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        m.learn(*make())
    assert "\n" not in str(caught.value)
    after = m.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert m.preprocessing == named


def test_nan_features_are_refused_whatever_they_come_from() -> None:
    m = module()
    with torch.no_grad():
        m.network.encoder.mean[0].bias[0] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(DataError, match="encodings contain NaN"):
        m.learn(*pictures([0, 1]))
    assert m.network.learner.num_classes == 0


def test_other_mistakes_are_one_line() -> None:
    with pytest.raises(DataError, match="Nothing has been learned yet"):
        module().predict(ONE)
    with pytest.raises(ConfigError, match="top_k must be at least 1, got 0"):
        module().predict(ONE, top_k=0)
    with pytest.raises(ConfigError, match=r"top_k must be a whole number, got 2\.5"):
        module().predict(ONE, top_k=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must not exceed the 4 classifiers, got 5"):
        RidgeEnsembleConfig(classifiers=4, gate=GateConfig(k=5))
    with pytest.raises(ValueError, match="needs num_classes"):
        OnlineNetworkConfig(grows=False)
    wrong = ImagePreprocessing(size=(9, 8), channels=1, mean=(0.0,), std=(1.0,), classes=("a", "b"))
    with pytest.raises(ConfigError, match=r"1 x 9 x 8 .* encoder takes 1 x 8 x 8"):
        module(preprocessing=wrong)
    with pytest.raises(ZooError, match="No encoder weights at 'nowhere'"):
        module().load_encoder("nowhere")


def test_fit_runs_a_stream_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    data = f"data.path={folder(tmp_path / 'pictures')}"
    recipe = "online-ensemble.split-mnist"
    runs = [
        training.fit(recipe, [*TINY, data], out=tmp_path / name) for name in ("first", "second")
    ]
    assert same_state(runs[0].module, runs[1].module), "the same command gives the same weights"
    m = checkpoints.load(runs[0].checkpoint)
    assert m.preprocessing.classes == ("ant", "bee", "cat")
    metrics = (tmp_path / "first" / "logs" / "part_0" / "metrics.csv").read_text()
    assert "stream_final_accuracy" in metrics
    assert "stream_forgetting" in metrics
    record = runs[0].module.record
    measured = m.measure(runs[0].datamodule, "test")
    assert measured.n == len(runs[0].datamodule.test_labels) == 6
    assert measured.value == pytest.approx(record.final_accuracy)
    # The same stream by hand: encode and learn batch by batch.
    hand = checkpoints.load(runs[0].checkpoint)
    fresh = OnlineClassifier(runs[0].module.network.config)
    fresh.network.encoder.load_state_dict(hand.network.encoder.state_dict())
    for batch in runs[0].datamodule.train_dataloader():
        fresh.network.learn(batch.images / 255, batch.labels)
    a, b = fresh.network.learner, m.network.learner
    torch.testing.assert_close(a.gram, b.gram, rtol=1e-5, atol=1e-6)
    assert torch.equal(a.counts, b.counts)
    # A new stream takes the encoder of a stored one.
    other = module(runs[0].module.network.config)
    other.load_encoder(runs[0].checkpoint)
    stored = hand.network.encoder.state_dict()
    assert all(torch.equal(v, stored[k]) for k, v in other.network.encoder.state_dict().items())


def test_measuring_needs_the_classes_of_the_model(tmp_path: Path) -> None:
    data = StreamDataModule(
        path=str(folder(tmp_path)), size=(SIZE, SIZE), stream=StreamConfig(tasks=3)
    )
    m = module()
    m.learn(*pictures([0, 1, 2]))
    with pytest.raises(DataError, match="classes of the data are not those of the model"):
        m.measure(data, "test")
    with pytest.raises(ZooError, match="Unknown protocol 'x'; choose one of test"):
        m.measure(data, "x")


def bound(path: Path, names: str) -> StreamDataModule:
    """A stream of pictures of classes with these names."""
    for index, name in enumerate(names.split()):
        (path / name).mkdir(parents=True)
        for number, image in enumerate(pictures([index] * 6, seed=index)[0]):
            pixels = (image[0] * 255).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(path / name / f"{number}.png")
    stream = StreamConfig(tasks=2, batch_size=4)
    return StreamDataModule(path=str(path), size=(SIZE, SIZE), stream=stream)


def names(m: OnlineClassifier) -> tuple[str, ...]:
    assert m.preprocessing is not None
    return m.preprocessing.classes


def test_classes_that_were_learned_keep_their_names(tmp_path: Path) -> None:
    three = bound(tmp_path / "three", "ant bee cat")
    m = module()
    m.bind(bound(tmp_path / "before", "0 1"))  # nothing was learned of these
    m.bind(three)
    m.learn(three.train_images, three.train_labels)
    m.bind(bound(tmp_path / "two", "ant bee"))
    assert names(m) == ("ant", "bee", "cat")
    assert {p.label for p in m.predict(three.test_images)} == {"ant", "bee", "cat"}
    m.bind(bound(tmp_path / "four", "ant bee cat dog"))
    assert names(m) == ("ant", "bee", "cat", "dog")
    with pytest.raises(ConfigError, match="The data's class 1 is 'cat', the model's is 'bee'"):
        m.bind(bound(tmp_path / "others", "ant cat"))
    assert names(m) == ("ant", "bee", "cat", "dog")
    unnamed = module()
    unnamed.learn(three.train_images, three.train_labels)
    unnamed.bind(bound(tmp_path / "named", "ant bee"))
    assert names(unnamed) == ("ant", "bee", "class 2")


def test_a_stream_of_fewer_classes_goes_on_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    three = bound(tmp_path / "three", "ant bee cat")
    m = module()
    m.bind(three)
    m.learn(three.train_images, three.train_labels)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    two = bound(tmp_path / "two", "ant bee")
    trainer.fit(m, datamodule=two)
    assert m.record is not None
    assert m.record.per_class.shape == (2, 3)
    assert m.measure(two, "test").n == len(two.test_labels)


def test_an_encoder_that_does_not_fit_leaves_the_one_there_is(tmp_path: Path) -> None:
    m = module()
    before = copy.deepcopy(m)
    stored = {f"encoder.{k}": v + 1 for k, v in m.network.encoder.state_dict().items()}
    last = list(stored)[-1]
    for change in ({last: torch.zeros(99)}, {"encoder.more": torch.zeros(1)}):
        save_file({**stored, **change}, tmp_path / "model.safetensors")
        with pytest.raises(ZooError, match="has no encoder of this kind") as caught:
            m.load_encoder(tmp_path)
        assert "\n" not in str(caught.value)
        assert same_state(m, before)
    save_file(stored, tmp_path / "model.safetensors")
    m.load_encoder(tmp_path)
    assert not same_state(m, before)


def test_the_digest_of_an_encoder_is_that_of_its_bytes() -> None:
    m = module()
    expected = hashlib.sha256(format_json(to_json(NETWORK.encoder)))
    for tensor in m.network.encoder.state_dict().values():
        expected.update(tensor.numpy().tobytes())
    assert m._encoder_digest() == expected.hexdigest()
    assert m.bfloat16()._encoder_digest() != expected.hexdigest()


def test_large_images_are_encoded_a_few_at_a_time() -> None:
    encoder = EncoderConfig(kind="conv", dim=16, image_size=200)
    m = module(dataclasses.replace(NETWORK, encoder=encoder)).double()
    sizes: list[int] = []
    m.network.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    images = torch.rand(14, 1, 200, 200, generator=torch.Generator().manual_seed(4))
    m.learn(images, torch.arange(14) % 2)
    together = [p.probabilities for p in m.predict(images)]
    assert max(sizes) == encoder.batch_size == 6
    alone = [m.predict(image)[0].probabilities for image in images]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-9)


def test_what_was_encoded_for_the_stream_is_not_encoded_again(tmp_path: Path) -> None:
    options = ["data.path=" + str(folder(tmp_path / "own")), *TINY]
    done = training.fit(
        training.read_recipe("online-ensemble.split-mnist", options), out=tmp_path / "run"
    )
    encoder, calls = done.module.network.encoder, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    encoder.register_forward_pre_hook(count)
    known = done.module.measure(done.datamodule, "test")
    assert calls == 0
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.0  # in place, and of the same value
    assert torch.equal(done.module.measure(done.datamodule, "test").sums, known.sums)
    assert calls == 0
    loaded = checkpoints.load(tmp_path / "run" / "checkpoint")
    again = loaded.measure(done.datamodule, "test")
    torch.testing.assert_close(again.sums, known.sums)
    with torch.no_grad():
        next(encoder.parameters()).mul_(2)
    done.module.measure(done.datamodule, "test")
    assert calls > 0, "another encoder encodes anew"
