"""What must hold for every model: each registered architecture, and each weight with a card."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from tests.examples import example, first_tensor, give_preprocessing
from tests.tiny import OWN_SUITE, ROOT, SHRUNK
from zoo import cards, checkpoints, training
from zoo.configs import build, to_json
from zoo.errors import ConfigError
from zoo.families.dselect_k import DSelectK
from zoo.files import FileRecord
from zoo.registry import ARCHITECTURES, architecture, architecture_of
from zoo.tasks.base import count_macs
from zoo.tasks.trajectories import Extrapolation

WEIGHTS = list(cards.load_cards())
REGISTERED = [name for name, entry in ARCHITECTURES.items() if entry.module.startswith("zoo.")]
BUILT_IN = [name for name in REGISTERED if name not in OWN_SUITE]


def shrunk(name: str) -> Any:
    """A small module of an architecture, every parameter random, from the first of its recipes."""
    assert name in SHRUNK, f"add overrides for {name!r} to tests/tiny.py"
    for path in sorted(cards.shipped_folder("recipes").rglob("*.yaml")):
        if training.read_recipe(path).architecture == name:
            recipe = training.read_recipe(path, SHRUNK[name])
            module = training.instantiate(recipe, logger=False, callbacks=[]).model
            give_preprocessing(module)
            return randomised(module)
    raise AssertionError(f"there is no recipe for {name!r}")


def randomised(module: Any) -> Any:
    """Fresh networks have layers of zeros, behind which gradients are zero as well."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.add_(scale * noise)
        if module.published_network is not module.network:  # an average, which is what is stored
            module.published_network.load_state_dict(module.network.state_dict())
    return module.eval()


def weight(name: str) -> Any:
    """The module of a weight: with its values where they are bundled, random ones elsewhere."""
    if cards.pretrained_folder(name).is_dir():
        return zoo.load(name, local_files_only=True)
    card = cards.find(name)
    module_class = architecture(card.architecture).module_class()
    return randomised(module_class(network=build(module_class.network_config, card.config, name)))


def outputs(module: Any) -> Tensor:
    return first_tensor(module.network(*example(module).inputs))


def assert_gradients(module: Any) -> None:
    """On every parameter that is trained by gradient: there, finite, and not all of it zero."""
    module.train().zero_grad()
    found = outputs(module).float()
    trained = {n: p for n, p in module.network.named_parameters() if p.requires_grad}
    if architecture_of(type(module)).family == "online-ensemble":  # its encoder is frozen
        assert all(name.startswith("learner.") for name in trained)
        if not trained:
            assert not found.requires_grad
            return
    else:
        assert len(trained) == len(list(module.network.parameters()))
    target = torch.linspace(-1, 1, found.shape[-1])
    (found * target).square().mean().backward()
    # The codes of a gate that has chosen are beyond the edges of the smooth step, where it is flat.
    settled = {
        f"{name}.codes.bias"
        for name, gate in module.network.named_modules()
        if isinstance(gate, DSelectK) and gate.is_static
        if all(report.saturated == 1 for report in gate.report())
    }
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() == (name not in settled), name


# --- architectures -------------------------------------------------------------------------------


def test_every_architecture_is_covered() -> None:
    assert set(BUILT_IN) == set(SHRUNK)
    assert len(BUILT_IN) == len(REGISTERED) - len(OWN_SUITE) == 13
    assert all((ROOT / path).is_file() for path in OWN_SUITE.values())


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_architecture_computes_what_it_documents(name: str) -> None:
    module = shrunk(name)
    with torch.no_grad():
        found = outputs(module)
        assert tuple(found.shape) == example(module).shape
        assert found.isfinite().all()
        assert torch.equal(outputs(module), found), "evaluation is deterministic"
        for row in range(2):  # samples do not see each other
            alone = [x[row : row + 1] for x in example(module).inputs]
            one = first_tensor(module.network(*alone))
            torch.testing.assert_close(one, found[row : row + 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_architecture_has_a_gradient_on_every_parameter(name: str) -> None:
    assert_gradients(shrunk(name))


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_architecture_is_used_in_eval_mode_whatever_mode_it_is_in(name: str) -> None:
    module = shrunk(name)
    given = example(module).predict
    expected = module.predict(given)
    kept = copy.deepcopy(module.state_dict())
    module.train()
    frozen = list(module.network.modules())[-1].eval()
    modes = [part.training for part in module.modules()]
    assert_alike(module.predict(given), expected)
    assert [part.training for part in module.modules()] == modes
    assert not frozen.training
    for key, value in module.state_dict().items():
        assert torch.equal(value, kept[key]), f"{key} changed"


def assert_alike(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, list) and isinstance(expected[0], Extrapolation):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.mean, other.mean)
    else:
        assert found == expected


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_products_of_an_architecture_are_counted(name: str) -> None:
    """At least those of its linear and convolution layers, which hooks count one by one."""
    module = shrunk(name)
    seen = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        seen.append(output.numel() * layer.weight[0].numel())

    for layer in module.network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(count)
    assert count_macs(module.network, *example(module).inputs) >= sum(seen)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_architecture_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    module = shrunk(name)
    checkpoints.save(module, tmp_path / "x")
    loaded = checkpoints.load(tmp_path / "x")
    assert type(loaded) is type(module)
    assert loaded.config == module.config
    assert loaded.load_report.dropped == loaded.load_report.initialised == ()
    assert set(loaded.load_report.loaded) == set(module.network.state_dict())
    with torch.no_grad():
        assert torch.equal(outputs(loaded), outputs(module))
    assert architecture_of(type(loaded)).name == name


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_architecture_has_what_trainers_and_users_ask_for(name: str) -> None:
    module = shrunk(name)
    network: Any = module.network
    names = {n for n, _ in network.named_parameters()}
    assert network.no_weight_decay() <= names
    patterns = network.group_matcher()
    flat = [p for pattern in patterns.values() for p in _patterns(pattern)]
    for parameter in names:
        assert sum(bool(re.match(pattern, parameter)) for pattern in flat) == 1, parameter
    assert set(module.head_parameters) <= set(network.state_dict())
    assert module.head_parameters or name.startswith("online-ensemble"), "it grows as classes come"
    assert module.protocols
    with torch.no_grad():
        features = network.forward_features(*example(module).inputs)
        logits = network.forward_head(first_tensor(features))
        torch.testing.assert_close(first_tensor(logits), outputs(module))


def _patterns(pattern: Any) -> list[str]:
    """Of one group: a pattern, or timm's list of (pattern, order)."""
    return [pattern] if isinstance(pattern, str) else [one for one, _ in pattern]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_default_configuration_is_plain_json(name: str) -> None:
    config_class = architecture(name).module_class().network_config
    config = config_class()
    assert build(config_class, to_json(config), name) == config


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_head_is_replaced(name: str, tmp_path: Path) -> None:
    module = shrunk(name)
    checkpoints.save(module, tmp_path / "x")
    if not (hasattr(module.config, "num_classes") and module.head_parameters):
        with pytest.raises(ConfigError, match="num_classes"):
            checkpoints.load(tmp_path / "x", num_classes=7)
        return
    swapped = checkpoints.load(tmp_path / "x", num_classes=7)
    assert set(swapped.load_report.initialised) == set(module.head_parameters)
    assert outputs(swapped).shape[-1] == 7
    before = module.network.state_dict()
    for key, value in swapped.network.state_dict().items():
        assert key in module.head_parameters or torch.equal(value, before[key])


# --- weights -------------------------------------------------------------------------------------


def test_every_weight_is_covered() -> None:
    files = {path.stem for path in (Path(__file__).parents[1] / "model_cards").glob("*.md")}
    assert set(WEIGHTS) == files == set(zoo.list_models())
    assert len(WEIGHTS) >= 1
    folders = {path.name for path in cards.pretrained_folder("x").parent.iterdir()}
    assert folders <= files, "a folder without a card"
    for name in WEIGHTS:
        assert name in folders or cards.find(name).hub.revision is not None, name


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_computes_what_it_documents(name: str) -> None:
    module = weight(name)
    with torch.no_grad():
        found = outputs(module)
    assert tuple(found.shape) == example(module).shape
    assert found.isfinite().all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_has_a_gradient_on_every_parameter(name: str) -> None:
    assert_gradients(weight(name))


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_card_counts_parameters_and_bytes(name: str) -> None:
    card = cards.find(name)
    module = weight(name)
    assert card.parameters == sum(p.numel() for p in module.network.parameters())
    assert card.size == sum(record.size for record in card.files)
    folder = cards.pretrained_folder(name)
    if folder.is_dir():
        for record in card.files:
            assert FileRecord.of(record.name, (folder / record.name).read_bytes()) == record
        stored = load_file(folder / "model.safetensors")
        assert stored.keys() == module.network.state_dict().keys()
        assert {p.name for p in folder.iterdir()} == {r.name for r in card.files} | {"README.md"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    module = weight(name)
    before = copy.deepcopy(module.network.state_dict())
    checkpoints.save(module, tmp_path / "x")
    loaded = checkpoints.load(tmp_path / "x")
    after = loaded.network.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert loaded.preprocessing == module.preprocessing
    if cards.pretrained_folder(name).is_dir():
        stored = load_file(cards.pretrained_folder(name) / "model.safetensors").values()
        numbers = [tensor.dtype for tensor in stored if tensor.is_floating_point()]
        checkpoints.save(
            module, tmp_path / "same", dtype=min(numbers, key=lambda dtype: dtype.itemsize)
        )
        again = (tmp_path / "same" / "model.safetensors").read_bytes()
        assert again == (cards.pretrained_folder(name) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_bundled_configuration_is_that_of_the_card(name: str) -> None:
    card = cards.find(name)
    module = weight(name)
    config_class = type(module).network_config
    assert build(config_class, card.config, name) == module.config
    entry = architecture(card.architecture)
    assert (card.family, card.task) == (entry.family, entry.task)
    assert isinstance(module.network, nn.Module)
    assert type(module) is entry.module_class()
