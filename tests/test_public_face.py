"""Tests of `import zoo`: what it offers, and that it costs next to nothing."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import zoo
from zoo import cards, checkpoints, hub
from zoo.errors import ConfigError, UnknownNameError
from zoo.files import FileRecord

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("torch", "lightning", "numpy", "huggingface_hub", "timm")


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ).stdout.strip()


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(zoo.__all__) == list(zoo.__all__)
    assert set(zoo._MODULES) | {"load"} == set(zoo.__all__)
    for name in zoo.__all__:
        assert inspect.getdoc(getattr(zoo, name)), name
        assert name in dir(zoo)
    assert len(zoo.__all__) == 10


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'laod'"):
        zoo.laod  # noqa: B018


@pytest.mark.parametrize("given", [None, 5, ["a"]])
def test_what_is_no_name(given: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        zoo.load(given)
    assert str(caught.value) == (
        "load takes the name of a weight, a checkpoint folder or owner/name on the Hub, got "
        f"{given!r}."
    )


@pytest.mark.parametrize(
    "code",
    [
        "import zoo",
        "import zoo; zoo.list_models()",
        "import zoo; zoo.info('cached-transformer-lm')",
        "import zoo; zoo.register",
        "import zoo.cli",
        "from zoo import cards, configs, errors, files, hub, registry",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    check = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run(f"{code}; {check}") == "[]"


def test_load_finds_the_folder_and_checks_it_by_the_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = cards.find("cached-transformer-lm")
    calls: list[object] = []

    def resolve(*arguments: object) -> hub.Located:
        calls.append(arguments)
        return hub.Located(tmp_path, card)

    module = SimpleNamespace()

    def load(folder: Path, **options: object) -> SimpleNamespace:
        calls.append((folder, options))
        return module

    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(checkpoints, "load", load)
    loaded: object = zoo.load(
        "x",
        "v1",
        device="cpu",
        dtype="bfloat16",
        num_classes=3,
        seed=5,
        width=4,
        local_files_only=True,
    )
    assert loaded is module
    assert module.loaded_from == card.name
    assert calls == [
        ("x", "v1", True),
        (
            tmp_path,
            {
                "files": card.files,
                "device": "cpu",
                "dtype": "bfloat16",
                "strict": True,
                "num_classes": 3,
                "seed": 5,
                "width": 4,
            },
        ),
    ]


def test_load_of_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'cached-transformer-lm'"):
        zoo.load("cached-transformer-ml")


BUNDLED = [
    "cached-transformer-lm.tiny-shakespeare",
    "continuous-flow.toy",
    "dselect-k-moe.multi-fashion-mnist",
    "dselect-k-moe.multi-mnist",
    "dselect-k-recommender.movielens-100k",
    "latent-ode.spirals-30",
    "latent-ode.spirals-50",
    "latent-ode.spirals",
    "ode-resnet.fashion-mnist",
    "ode-resnet.mnist",
    "online-ensemble.split-cifar100",
    "online-ensemble.split-fashion-mnist",
    "online-ensemble.split-mnist",
    "sau-shufflenet-v2-x0-5.cifar100",
    "sau-shufflenet-v2-x0-5.fashion-mnist",
    "sau-shufflenet-v2-x1.cifar100",
]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_weight_loads_whole(name: str) -> None:
    module = zoo.load(name, local_files_only=True)
    card = zoo.info(name)
    report = module.load_report
    assert report.loaded
    assert report.dropped == report.initialised == ()
    assert sum(parameter.numel() for parameter in module.parameters()) == card.parameters
    folder = cards.pretrained_folder(name)
    for record in card.files:
        assert record == FileRecord.of(record.name, (folder / record.name).read_bytes())


def test_every_listed_weight_was_loaded_above() -> None:
    assert zoo.list_models() == BUNDLED
