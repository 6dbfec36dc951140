"""A classifier that trains in a second, and sets of images made for it: shared by the tests."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from zoo import registry
from zoo.tasks.image_classification import ImageClassifier

CLASSES = ("dark", "left", "right")
"""Of the made images: all dark, bright on the left, bright on the right."""

SIZE = (8, 10)
"""Height and width of the made images; not square, so that no test can mix them up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyNetConfig:
    num_classes: int = 3
    in_channels: int = 3
    width: int = 8


class TinyNet(nn.Module):
    """A convolution, batch normalisation with its buffers, dropout, and a head."""

    def __init__(self, config: TinyNetConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.in_channels, config.width, 3, padding=1)
        self.norm = nn.BatchNorm2d(config.width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(4 * config.width, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2)
        out: Tensor = self.head(self.dropout(x.flatten(1)))
        return out


class TinyClassifier(ImageClassifier):
    network_config: ClassVar[type[Any]] = TinyNetConfig
    network_class: ClassVar[type[nn.Module]] = TinyNet

    def __init__(self, network: TinyNetConfig = TinyNetConfig(), **options: Any) -> None:
        super().__init__(network, **options)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The classifier under the name "tiny-classifier", and afterwards no more."""
    before = dict(registry.ARCHITECTURES)
    registry.register("tiny-classifier", task="image-classification", family="tests")(
        TinyClassifier
    )
    yield
    registry._architectures.clear()
    registry._architectures.update(before)


def make_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images N x H x W x 3 uint8 of the three classes in turn, and their labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    images = generator.integers(0, 100, (count, *SIZE, 3), dtype=np.uint8)
    half = SIZE[1] // 2
    images[labels == 1, :, :half] += 100
    images[labels == 2, :, half:] += 100
    return images, labels


def folder_overrides(folder: Path) -> list[str]:
    """What a recipe of a classifier is changed by, to train on pictures written to `folder`."""
    return [
        f"data.path={write_folder(folder)}",
        f"data.size={list(SIZE)}",
        f"model.network.num_classes={len(CLASSES)}",
        "model.network.in_channels=3",
    ]


def write_folder(folder: Path, count: int = 60, seed: int = 0) -> Path:
    """A folder of class folders of PNG files of the made images."""
    for index, (pixels, label) in enumerate(zip(*make_images(count, seed), strict=True)):
        path = folder / CLASSES[label] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of the tiny classifier on `write_folder`; `changes` go to its section `model`."""
    images = folder / "images"
    if not images.exists():
        write_folder(images)
    values = {
        "zoo": {
            "architecture": "tiny-classifier",
            "data": "images",
            "weight": "tiny-classifier.made",
        },
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 4,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
        "model": {
            "optimizer": {
                "name": "sgd",
                "lr": 0.2,
                "schedule": "one-cycle",
                "warmup_fraction": 0.2,
            },
            **changes,
        },
        "data": {
            "path": str(images),
            "size": list(SIZE),
            "batch_size": 12,
            "augment": {"crop_padding": 1, "cutout": 2},
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's tensors."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
