"""Tests of the training of encoders, on archives and pictures made for it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import checkpoints, training
from zoo.data import encoder_images
from zoo.data.encoder_images import EncoderImages, grey, read_omniglot
from zoo.errors import DataError, ZooError
from zoo.families.online_ensemble import (
    EncoderConfig,
    EncoderNetworkConfig,
    OnlineNetworkConfig,
)
from zoo.tasks.encoder_training import EncoderTraining
from zoo.tasks.online_learning import OnlineClassifier


def archive(path: Path, characters: int, drawers: int = 4) -> Path:
    """A zip in the layout of Omniglot: black strokes on white, 105 x 105."""
    with zipfile.ZipFile(path, "w") as file:
        for character in range(characters):
            for drawer in range(drawers):
                pixels = np.full((105, 105), 255, dtype=np.uint8)
                pixels[10 * character : 10 * character + 8, 5 * drawer : 100] = 0
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "png")
                name = f"images/Script/character{character:02d}/{drawer:02d}.png"
                file.writestr(name, content.getvalue())
    return path


def test_omniglot_is_read_without_being_extracted(tmp_path: Path) -> None:
    path = archive(tmp_path / "one.zip", 3)
    split = read_omniglot(path)
    assert split.images.shape == (12, 1, 28, 28)
    assert split.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert float(split.images[:, :, -1].max()) == 0, "paper is black"
    assert float(split.images.max()) == 255, "strokes are bright"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.zip"]


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read Omniglot from"):
        read_omniglot(tmp_path / "missing.zip")
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match="Cannot read Omniglot from"):
        read_omniglot(tmp_path / "bad.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(DataError, match="holds no pictures"):
        read_omniglot(tmp_path / "empty.zip")


def test_grey_is_brightness() -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, 0], images[1] = 200, 100
    expected = [round(0.299 * 200), 100]
    assert [int(image.min()) for image in grey(images)] == expected
    assert [int(image.max()) for image in grey(images)] == expected


def test_an_encoder_is_trained_and_taken_by_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    paths = {f"omniglot-small-{i}": archive(tmp_path / f"{i}.zip", 5 + i) for i in (1, 2)}
    monkeypatch.setattr(encoder_images, "locate", lambda name, data_dir=None: paths[name])
    tiny = [
        "model.network.encoder.dim=6",
        "trainer.max_epochs=3",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "data.batch_size=8",
    ]
    recipe = "online-ensemble-encoder.omniglot"
    runs = [training.fit(recipe, tiny, out=tmp_path / name) for name in ("a", "b")]
    states = [run.module.network.state_dict() for run in runs]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]), "same command, same"
    data = runs[0].datamodule
    assert isinstance(data, EncoderImages)
    assert (len(data.train_labels), len(data.test_labels)) == (46, 6)
    assert len(data.preprocessing.classes) == 13
    measured = runs[0].module.measure(data, "test")
    assert (measured.metric, measured.n) == ("squared_error", 6)
    with torch.no_grad():
        images = data.test_images / 255
        error = (runs[0].module.network.reconstruct(images)[0] - images).square().mean()
    assert measured.value == pytest.approx(float(error), rel=1e-4)
    with pytest.raises(ZooError, match="Unknown protocol 'x'"):
        runs[0].module.measure(data, "x")
    stream = OnlineClassifier(OnlineNetworkConfig(encoder=EncoderConfig(dim=6)))
    stream.load_encoder(runs[0].checkpoint)
    stored = checkpoints.load(runs[0].checkpoint).network.encoder.state_dict()
    taken = stream.network.encoder.state_dict()
    assert taken.keys() == stored.keys()
    assert all(torch.equal(taken[k], stored[k]) for k in taken)
    other = OnlineClassifier(OnlineNetworkConfig(encoder=EncoderConfig(dim=7)))
    with pytest.raises(ZooError, match="has no encoder of this kind"):
        other.load_encoder(runs[0].checkpoint)


def test_what_diverged_names_nothing_right() -> None:
    network = EncoderNetworkConfig(encoder=EncoderConfig(dim=6), num_classes=3)
    module = EncoderTraining(network).eval()
    images, labels = torch.rand(4, *network.encoder.input_shape), torch.zeros(4, dtype=torch.long)
    assert not module._errors(images, labels).isnan().any()
    images[1] = torch.nan
    assert module._errors(images, labels).isnan().tolist() == [False, True, False, False]
