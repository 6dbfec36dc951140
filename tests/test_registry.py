"""Tests of zoo.registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from zoo import registry
from zoo.errors import ConfigError, UnknownNameError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyConfig:
    width: int = 2


class TinyModule:
    network_config = TinyConfig


class OtherModule:
    network_config = TinyConfig


@pytest.fixture(autouse=True)
def restore_registry() -> Iterator[None]:
    before = dict(registry.ARCHITECTURES)
    yield
    registry._architectures.clear()
    registry._architectures.update(before)


def test_lookup_by_name() -> None:
    entry = registry.architecture("cached-transformer-lm")
    assert (entry.family, entry.task) == ("cached-transformers", "language-modeling")


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'cached-transformer-lm'"):
        registry.architecture("cached-transformr-lm")


def test_unknown_architecture_far_from_all_lists_all() -> None:
    with pytest.raises(UnknownNameError, match="There are: cached-transformer-lm"):
        registry.architecture("zzz")


def test_every_architecture_can_be_imported() -> None:
    covered = []
    for entry in registry.ARCHITECTURES.values():
        assert dataclasses.is_dataclass(entry.module_class().network_config)
        covered.append(entry.name)
    assert len(covered) == 14


def test_the_mapping_cannot_be_written_to() -> None:
    with pytest.raises(TypeError):
        registry.ARCHITECTURES["x"] = None  # type: ignore[index]


def test_a_decorator_adds_a_users_class() -> None:
    decorate = registry.register("tiny", task="nothing", family="mine")
    assert decorate(TinyModule) is TinyModule
    entry = registry.architecture("tiny")
    assert entry.module_class() is TinyModule
    assert entry.module == f"{__name__}:TinyModule"


def test_the_same_class_may_be_registered_again_and_another_may_not() -> None:
    registry.register("tiny", task="nothing", family="mine")(TinyModule)
    registry.register("tiny", task="nothing", family="mine")(TinyModule)
    with pytest.raises(ConfigError, match=r"'tiny' is taken by .*TinyModule"):
        registry.register("tiny", task="nothing", family="mine")(OtherModule)


def test_a_built_in_name_cannot_be_taken() -> None:
    with pytest.raises(ConfigError, match=r"is taken by zoo.tasks"):
        registry.register("cached-transformer-lm", task="a", family="b")(TinyModule)


@pytest.mark.parametrize("name", ["", "Tiny", "tiny_lm", "tiny.lm", "../tiny", "tiny-", "tiny\n"])
def test_names_are_kebab_case(name: str) -> None:
    with pytest.raises(ConfigError, match="kebab case"):
        registry.register(name, task="nothing", family="mine")


def test_a_class_without_network_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="network_config must be the dataclass"):
        registry.register("tiny", task="nothing", family="mine")(dict)
