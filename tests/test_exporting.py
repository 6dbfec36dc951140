"""Tests of zoo.exporting: what the file computes is what the model computes, for any batch."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.hub import published
from tests.test_models import REGISTERED, shrunk
from tests.tiny import run as run_command
from tests.tiny_images import CLASSES, SIZE, TinyClassifier
from zoo import cards, checkpoints, exporting, hub
from zoo.data.pictures import ImagePreprocessing
from zoo.errors import ConfigError, UnknownNameError, ZooError
from zoo.exporting import FORMATS, ExportFormat
from zoo.families.online_ensemble import (
    EncoderConfig,
    EncoderNetworkConfig,
    EnsembleConfig,
    GateConfig,
    OnlineNetworkConfig,
    RidgeEnsembleConfig,
    ensemble_preset,
    gate,
)
from zoo.tasks.base import ZooModule
from zoo.tasks.encoder_training import EncoderTraining
from zoo.tasks.online_learning import OnlineClassifier
from zoo.tasks.optimization import OptimizerConfig

HAS_ONNX = all(importlib.util.find_spec(name) for name in exporting._NEEDED)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs pip install 'zoo[export]'")
EITHER = [pytest.param("torch-export"), pytest.param("onnx", marks=needs_onnx)]


@pytest.fixture(scope="module")
def weight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.write_weight(tmp_path_factory.mktemp("weight") / "tiny")


@pytest.mark.parametrize("format", EITHER)
def test_segments_in_a_row_are_the_whole_text(tmp_path: Path, format: ExportFormat) -> None:
    """The state goes out of the file and into it again; three streams, fresh ones from zeros."""
    module = published.module()
    done = exporting.export_module(module, tmp_path / "x", format)
    assert done.difference <= exporting.TOLERANCE
    assert list(done.inputs) == ["tokens", "memory_0"]
    assert done.outputs == ("logits", "new_memory_0")
    segment = module.config.segment
    tokens = torch.randint(256, (3, 3 * segment))
    with torch.no_grad():
        expected, _ = module.network(tokens)
    memory = torch.zeros(3, *done.inputs["memory_0"])
    found = []
    for piece in tokens.split(segment, dim=1):
        logits, memory = exporting.run(done.path, format, {"tokens": piece, "memory_0": memory})
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", EITHER)
def test_an_image_classifier_takes_pixels(tmp_path: Path, format: ExportFormat) -> None:
    """Normalisation is in the file: it is given what `normalise` is given."""
    preprocessing = ImagePreprocessing(
        size=SIZE, channels=3, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7), classes=CLASSES
    )
    module = TinyClassifier(preprocessing=preprocessing).eval()
    done = exporting.export_module(module, tmp_path / "x", format)
    assert done.inputs == {"images": (3, *SIZE)}
    images = torch.rand(5, 3, *SIZE)
    (found,) = exporting.run(done.path, format, {"images": images})
    with torch.no_grad():
        expected = module.network(preprocessing.normalise(images))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_in_another_precision_is_exported_in_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    preprocessing = ImagePreprocessing(
        size=SIZE, channels=3, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7), classes=CLASSES
    )
    module = TinyClassifier(preprocessing=preprocessing).to(dtype).eval()
    done = exporting.export_module(module, tmp_path / "x", "torch-export")
    assert {p.dtype for p in module.parameters()} == {dtype}, "it stays what it was"
    images = torch.rand(5, 3, *SIZE)
    (found,) = exporting.run(done.path, "torch-export", {"images": images})
    with torch.no_grad():
        expected = copy.deepcopy(module).float().network(preprocessing.normalise(images))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", EITHER)
def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, format: ExportFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Any, format: Any, inputs: dict[str, torch.Tensor]) -> Any:
        return [tensor * 1.001 for tensor in right(path, format, inputs)]

    right = exporting.run
    monkeypatch.setattr(exporting, "run", wrong)
    with pytest.raises(ZooError, match=r"differs from the model by 1\.0e-03 \(relative\)"):
        exporting.export_module(published.module(), tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_that_computes_no_number_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def wrong(path: Any, format: Any, inputs: dict[str, torch.Tensor]) -> Any:
        return [torch.full_like(tensor, value) for tensor in right(path, format, inputs)]

    right = exporting.run
    monkeypatch.setattr(exporting, "run", wrong)
    with pytest.raises(ZooError, match="differs from the model by inf"):
        exporting.export_module(published.module(), tmp_path / "x", "torch-export")
    assert list(tmp_path.iterdir()) == []


def test_a_memory_that_begins_empty_cannot_be_exported(tmp_path: Path) -> None:
    from zoo.tasks.language_modeling import LanguageModel

    config = dataclasses.replace(published.module().config, memory="xl", memory_length=16)
    with pytest.raises(ConfigError, match="a Transformer-XL memory begins empty"):
        exporting.export_module(LanguageModel(network=config), tmp_path / "x", "torch-export")


def test_a_model_without_memory(tmp_path: Path) -> None:
    from zoo.tasks.language_modeling import LanguageModel

    config = dataclasses.replace(published.module().config, memory="none")
    done = exporting.export_module(LanguageModel(network=config), tmp_path / "x", "torch-export")
    assert list(done.inputs) == ["tokens"]


def test_what_the_card_declares_is_the_error(
    tmp_path: Path, weight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = published.card(not_exported={"onnx": "no such operator"})
    monkeypatch.setattr(hub, "resolve", lambda name, revision: hub.Located(weight, card))
    with pytest.raises(ConfigError, match="cannot be exported to onnx: no such operator"):
        exporting.export(published.NAME, tmp_path / "x", format="onnx")


def test_the_command(tmp_path: Path, weight: Path) -> None:
    out = tmp_path / "deep" / "x.pt2"
    said = run_command("export", weight, "--out", out, "--json")
    assert said.status == 0
    assert said.json["path"] == str(out)
    assert out.is_file()
    for words, message in [
        ([weight, "--format", "onxx"], "Unknown format 'onxx'. Did you mean 'onnx'"),
        (["nothing"], "Unknown model 'nothing'"),
    ]:
        said = run_command("export", *words)
        assert said.status == 2
        assert message in said.err
    with pytest.raises(UnknownNameError):
        exporting.export(weight, format="tflite")  # type: ignore[arg-type]


# --- all architectures ---------------------------------------------------------------------------

REFUSED = {
    "latent-ode": "takes any number of observations",
    "online-ensemble-text": "takes words apart",
}
"""Architectures that cannot be exported, with the reason."""
BUILT_IN = sorted(REGISTERED)
ALL = [pytest.param("torch-export"), pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow])]


def learned(**changes: Any) -> OnlineClassifier:
    """A tiny online ensemble that has seen the classes 0, 1 and 3."""
    network = OnlineNetworkConfig(
        encoder=EncoderConfig(dim=6, image_size=8),
        ridge_ensemble=RidgeEnsembleConfig(classifiers=8, features=2, gate=GateConfig(k=2)),
    )
    module = OnlineClassifier(dataclasses.replace(network, **changes)).eval()
    module.learn(torch.rand(40, 1, 8, 8), torch.tensor([0, 1, 1, 3] * 10))
    return module


def small(name: str) -> Any:
    """A module of an architecture whose program has few steps."""
    if name == "online-ensemble":
        return learned()
    if name == "online-ensemble-encoder":
        encoder = EncoderConfig(dim=6, image_size=8)
        return EncoderTraining(EncoderNetworkConfig(encoder=encoder)).eval()
    module = shrunk(name)
    if name == "continuous-flow":
        module.steps = 1
    return module


def test_every_architecture_is_counted() -> None:
    exported = set(BUILT_IN) - set(REFUSED)
    assert len(exported) == 12
    assert len(REFUSED) == 2
    assert len(exported) + len(REFUSED) == len(BUILT_IN) == 14


OF_EACH_FAMILY = {
    "cached-transformer-lm",
    "dselect-k-recommender",
    "sau-shufflenet-v2-x0-5",
    "ode-resnet",
    "latent-ode",
    "online-ensemble",
}
"""Exported in the fast tests; the others are alike and slow."""


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in OF_EACH_FAMILY else [pytest.mark.slow])
        for name in BUILT_IN
    ],
)
def test_an_architecture_is_exported_or_says_why_not(
    tmp_path: Path, name: str, format: ExportFormat
) -> None:
    module = small(name)
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]):
            exporting.export_module(module, tmp_path / "x", format)
        assert list(tmp_path.iterdir()) == []
        return
    done = exporting.export_module(module, tmp_path / "x", format)
    assert done.difference <= exporting.TOLERANCE
    assert done.path.is_file()


@pytest.mark.parametrize("learner", ["nearest-mean", "linear-discriminant", "softmax", "ensemble"])
def test_what_an_online_learner_has_learned_is_exported(tmp_path: Path, learner: str) -> None:
    """Scores of the file are those of the model, and a class that was never seen has none."""
    config = EnsembleConfig(classifiers=8, gate=GateConfig(kind="hard", k=2))
    module = learned(learner=learner, ensemble=config)
    done = exporting.export_module(module, tmp_path / "x", "torch-export")
    images = torch.rand(5, 1, 8, 8)
    (found,) = exporting.run(done.path, "torch-export", {"images": images})
    with torch.no_grad():
        expected = module.network(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.isneginf().tolist() == [[False, False, True, False]] * 5


@pytest.mark.parametrize("kind", ["entropic", "laplace", "clip", "cauchy"])
@pytest.mark.parametrize("temperature", [1e-4, 0.1, 10.0])
def test_gates_find_their_boundary_in_the_steps_of_a_program(
    kind: Any, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their loop ends where it is exact enough, and a program's after a fixed number of steps."""
    scores = torch.randn(64, 40).cumsum(1) / 6
    config = GateConfig(kind=kind, k=5, temperature=temperature)
    expected = gate(scores, config)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(gate(scores, config), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": EncoderConfig(kind="none", dim=64)}, "there is no encoder"),
        (
            {
                "learner": "ensemble",
                "ensemble": ensemble_preset("dee-released", classifiers=8, k=2),
            },
            "batch_scaled lets the samples of a batch change each other's scores",
        ),
        ({}, "nothing has been learned yet"),
    ],
)
def test_what_an_online_learner_cannot_export(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    module = OnlineClassifier(OnlineNetworkConfig(**changes)).eval()
    with pytest.raises(ConfigError, match=message):
        exporting.export_module(module, tmp_path / "x", "torch-export")


# --- all weights ---------------------------------------------------------------------------------


def test_every_weight_is_exported_or_says_why_not() -> None:
    """A card names formats, with a reason, and all of them where its kind of model has none; the
    slow test below exports all others."""
    exported, declared = [], []
    for name, card in cards.load_cards().items():
        for format in FORMATS:
            (declared if format in card.not_exported else exported).append((name, format))
        for format, reason in card.not_exported.items():
            assert format in FORMATS, name
            assert len(reason) > 10, name
        if set(card.not_exported) < set(FORMATS) and cards.pretrained_folder(name).is_dir():
            module = zoo.load(name, local_files_only=True)
            example = module.exportable(1, torch.Generator().manual_seed(0))
            assert example.inputs, name
    assert len(exported) + len(declared) == len(zoo.list_models()) * len(FORMATS)
    assert exported


@pytest.mark.slow
@needs_onnx
def test_all_pairs_are_exported_or_declared(tmp_path: Path) -> None:
    exported, declared = [], []
    for name in zoo.list_models():
        folder, card = hub.resolve(name)
        assert card is not None
        for format in FORMATS:
            if format in card.not_exported:
                declared.append((name, format))
                module = checkpoints.load(folder, files=card.files)
                with pytest.raises(Exception):  # noqa: B017, PT011 - what is declared does fail
                    exporting.export_module(module, tmp_path / "x", format)
            else:
                done = exporting.export(name, tmp_path / "x", format=format)
                assert done.difference <= exporting.TOLERANCE, (name, format)
                exported.append((name, format))
    assert len(exported) + len(declared) == len(zoo.list_models()) * len(FORMATS)
    assert exported


def test_a_module_that_does_not_say_how(tmp_path: Path) -> None:
    module = ZooModule(None, OptimizerConfig())
    with pytest.raises(ConfigError, match="ZooModule does not say how it is exported"):
        exporting.export_module(module, tmp_path / "x", "torch-export")
