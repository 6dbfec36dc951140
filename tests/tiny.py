"""Trainings that take a second, and the command run in this process: shared by the tests."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import zoo.cli
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

SHRUNK: dict[str, list[str]] = {"cached-transformer-lm": [*_TRAINER, *_LANGUAGE_MODEL]}
"""Architecture -> overrides that make a second's training of any of its recipes."""

LESS_DATA: dict[str, list[str]] = {"text": ["data.validation_fraction=0.01"]}
"""Data module -> overrides that leave little to measure on."""


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
