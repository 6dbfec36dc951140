"""Trainings that take a second, and the command run in this process: shared by the tests."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

import zoo.cli
from tests.texts import TINY_BERT, write_encoder, write_texts
from zoo import training

ROOT = Path(__file__).parents[1]
"""The source checkout."""

SEGMENT = 32
"""Bytes per segment of a shrunk language model."""

_TRAINER = [
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.enable_progress_bar=false",
    "model.compile=false",
]

_LANGUAGE_MODEL = [
    "model.network.dim=16",
    "model.network.depth=1",
    "model.network.num_heads=2",
    f"model.network.segment={SEGMENT}",
    f"model.network.memory_length={SEGMENT}",
    f"model.network.grc.segment={SEGMENT}",
    "model.network.grc.slots=8",
    f"data.segment={SEGMENT}",
    "data.streams=4",
]

_RATED = 12
"""Users, and items, of `write_ratings`."""

_RATINGS = [
    f"model.network.num_users={_RATED}",
    f"model.network.num_items={_RATED}",
    "model.network.embedding_dim=4",
    "data.batch_size=16",
]
_PICTURE = 12
"""Pixels a side of the pictures of `write_pictures`."""


_IMAGES = [
    "trainer.check_val_every_n_epoch=1",
    "model.channels_last=false",
    "data.batch_size=8",
    "model.network.num_classes=2",
    "model.network.in_channels=1",
]

_ODE_RESNET = [
    "model.network.num_classes=2",
    "model.network.in_channels=1",
    "model.network.widths=[4, 6]",
    "model.network.body_from=0",
    "data.batch_size=8",
]

SHRUNK: dict[str, list[str]] = {
    "cached-transformer-lm": [*_TRAINER, *_LANGUAGE_MODEL],
    "dselect-k-recommender": [
        *_TRAINER,
        *_RATINGS,
        "model.network.expert_widths=[8]",
        "model.network.tower_widths=[4]",
    ],
    "factorisation-recommender": [*_TRAINER, *_RATINGS],
    "dselect-k-moe": [
        *_TRAINER,
        "model.network.num_classes=2",
        f"model.network.size={_PICTURE + 8}",
        "model.network.channels=[3]",
        "model.network.expert_widths=[6]",
        "model.network.tower_widths=[6]",
        "data.batch_size=8",
    ],
    "dselect-k-recovery": [*_TRAINER, "data.batch_size=64"],
    "sau-shufflenet-v2-x0-5": [*_TRAINER, *_IMAGES],
    "sau-shufflenet-v2-x1": [*_TRAINER, *_IMAGES],
    "sau-shufflenet-v2-x2": [*_TRAINER, *_IMAGES],
    "ode-resnet": [*_TRAINER, *_ODE_RESNET],
    "latent-ode": [*_TRAINER, "model.network.hidden=6", "trainer.check_val_every_n_epoch=1"],
    "continuous-flow": [*_TRAINER, "model.network.hidden=6"],
    "online-ensemble": [
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.enable_progress_bar=false",
        "model.encoder_weights=null",
        "model.network.encoder.kind=autoencoder",
        "model.network.encoder.dim=6",
        "model.network.encoder.channels=1",
        f"model.network.encoder.image_size={_PICTURE}",
        "model.network.encoder.resize=null",
        "model.network.ridge_ensemble.classifiers=4",
        "model.network.ridge_ensemble.features=2",
        "model.network.ridge_ensemble.gate.k=2",
        "model.network.ensemble.classifiers=4",
        "model.network.ensemble.gate.k=2",
        "data.stream.tasks=2",
        "data.stream.batch_size=4",
    ],
    "online-ensemble-text": [
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.enable_progress_bar=false",
        "model.encoder_weights=null",
        *(f"model.network.encoder.{key}={value}" for key, value in TINY_BERT.items()),
        "model.network.ridge_ensemble.classifiers=4",
        "model.network.ridge_ensemble.features=2",
        "model.network.ridge_ensemble.gate.k=2",
        "data.stream.tasks=2",
        "data.stream.batch_size=4",
    ],
}
"""Architecture -> overrides that make a second's training of any of its recipes."""

OWN_SUITE = {
    "online-ensemble-encoder": "tests/tasks/test_encoder_training.py",
}
"""Architectures that the suites over all models and recipes leave out, with where they are tested:
it trains encoders on fixed files and has no `predict`."""


def write_ratings(folder: Path) -> Path:
    """Ratings of as many items as users; each user leaves a few out."""
    path = folder / "ratings.csv"
    pairs = [(u, i) for i in range(_RATED) for u in range(_RATED) if (u + i) % 3]
    lines = [f"{u},{i},{1 + (u * i) % 5}" for u, i in pairs]
    path.write_text("\n".join(["user,item,rating", *lines]) + "\n")
    return path


def write_pictures(folder: Path) -> Path:
    """A folder of grey pictures of two classes."""
    for label in ("dark", "light"):
        (folder / label).mkdir(parents=True)
        for index in range(10):
            shade = 20 * (label == "light") + index
            Image.new("L", (_PICTURE, _PICTURE), shade).save(folder / label / f"{index}.png")
    return folder


class _LessData(dict[str, list[str]]):
    """Made data are written when they are first asked for."""

    def __missing__(self, data: str) -> list[str]:
        folder = Path(tempfile.mkdtemp(prefix="zoo-tests-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self[data] = {
            "images": lambda: [
                f"data.path={write_pictures(folder)}",
                f"data.size=[{_PICTURE}, {_PICTURE}]",
                "data.channels=1",
            ],
            "streams": lambda: [
                f"data.path={write_pictures(folder)}",
                f"data.size=[{_PICTURE}, {_PICTURE}]",
                "data.channels=1",
            ],
            "text-streams": lambda: [
                f"data.path={write_texts(folder / 'texts.csv')}",
                f"model.encoder_weights={write_encoder(folder / 'encoder')}",
            ],
            "ratings": lambda: [f"data.path={write_ratings(folder)}"],
            "image-pairs": lambda: [
                f"data.path={write_pictures(folder)}",
                f"data.size={_PICTURE}",
                "data.holdout=4",
            ],
        }.get(data, list)()
        return self[data]


LESS_DATA = _LessData(
    {
        "text": ["data.validation_fraction=0.01"],
        "spirals": ["data.count=8", "data.batch_size=4"],
        "densities": ["data.batch_size=12", "data.steps=4", "data.test_points=20"],
    }
)
"""Data module -> overrides that leave little to train and measure on."""


def write_text(folder: Path, lines: int = 120) -> Path:
    """A text of about 33 bytes per line, the same each time."""
    path = folder / "text.txt"
    path.write_text(
        "".join(
            f"line {i:4d} says {i * i % 97:2d} and {i * 7 % 31:2d} again\n" for i in range(lines)
        ),
        encoding="utf-8",
    )
    return path


def write_recipe(folder: Path, **header: str) -> Path:
    """A recipe of a shrunk language model on `write_text`; its header names a weight."""
    recipe = training.read_recipe(
        ROOT / "recipes" / "cached-transformer-lm.tiny-shakespeare.yaml",
        [*SHRUNK["cached-transformer-lm"], f"data.path={write_text(folder)}"],
    )
    named = {"architecture": recipe.architecture, "data": recipe.data, "weight": recipe.weight}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"zoo": {**named, **header}, **recipe.options}))
    return path


def copy(source: Path, target: Path, change: Callable[[bytes], bytes], name: str) -> Path:
    """Copy a checkpoint folder with one file changed."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        content = path.read_bytes()
        (target / path.name).write_bytes(change(content) if path.name == name else content)
    return target


class Said(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


def run(*words: object) -> Said:
    """Run `zoo WORDS...` in this process."""
    with _captured() as (out, err):
        status = zoo.cli.main([str(word) for word in words])
    return Said(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _captured() -> Iterator[Sequence[io.StringIO]]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err
