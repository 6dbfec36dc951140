"""The closed list of architectures, and the decorator by which users add their own.

A file names an architecture and never a class: what is not listed here cannot be constructed.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from zoo.errors import ConfigError, UnknownNameError, nearest

ModuleClass = TypeVar("ModuleClass", bound=type[Any])

_KEBAB_CASE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One kind of model, for which there may be several weights."""

    name: str
    """Kebab case: `"cached-transformer-lm"`; a weight's name adds a dot and a tag."""

    family: str
    """The mechanism, named after its folder in `zoo/families`: `"cached-transformers"`."""

    task: str
    """What it does: `"language-modeling"`."""

    module: str
    """Where its LightningModule is: `"package.module:Class"`. Never read from a file."""

    registered: type[Any] | None = dataclasses.field(default=None, repr=False, compare=False)
    """The class itself where a decorator gave it; it may live where no import reaches."""

    def module_class(self) -> type[Any]:
        """Import and return the LightningModule's class (this is where torch comes in)."""
        if self.registered is not None:
            return self.registered
        module, _, name = self.module.partition(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


_architectures = {
    entry.name: entry
    for entry in [
        Architecture(
            name="cached-transformer-lm",
            family="cached-transformers",
            task="language-modeling",
            module="zoo.tasks.language_modeling:LanguageModel",
        ),
        Architecture(
            name="ode-resnet",
            family="continuous-depth",
            task="image-classification",
            module="zoo.tasks.continuous_depth:ODEResNetClassifier",
        ),
        Architecture(
            name="latent-ode",
            family="continuous-depth",
            task="trajectory-forecasting",
            module="zoo.tasks.trajectories:TrajectoryModel",
        ),
        Architecture(
            name="continuous-flow",
            family="continuous-depth",
            task="density-estimation",
            module="zoo.tasks.density:DensityModel",
        ),
        Architecture(
            name="dselect-k-recommender",
            family="dselect-k",
            task="recommendation",
            module="zoo.tasks.recommendation:Recommender",
        ),
        Architecture(
            name="factorisation-recommender",
            family="dselect-k",
            task="recommendation",
            module="zoo.tasks.recommendation:FactorisationRecommender",
        ),
        Architecture(
            name="dselect-k-moe",
            family="dselect-k",
            task="image-pair-classification",
            module="zoo.tasks.image_pairs:ImagePairClassifier",
        ),
        Architecture(
            name="dselect-k-recovery",
            family="dselect-k",
            task="expert-recovery",
            module="zoo.tasks.expert_recovery:ExpertRecovery",
        ),
        Architecture(
            name="sau-shufflenet-v2-x0-5",
            family="sau-shufflenet",
            task="image-classification",
            module="zoo.tasks.sau_shufflenet:SAUShuffleNetX0_5",
        ),
        Architecture(
            name="sau-shufflenet-v2-x1",
            family="sau-shufflenet",
            task="image-classification",
            module="zoo.tasks.sau_shufflenet:SAUShuffleNetX1",
        ),
        Architecture(
            name="sau-shufflenet-v2-x2",
            family="sau-shufflenet",
            task="image-classification",
            module="zoo.tasks.sau_shufflenet:SAUShuffleNetX2",
        ),
        Architecture(
            name="online-ensemble",
            family="online-ensemble",
            task="online-learning",
            module="zoo.tasks.online_learning:OnlineClassifier",
        ),
        Architecture(
            name="online-ensemble-text",
            family="online-ensemble",
            task="online-text-learning",
            module="zoo.tasks.online_texts:OnlineTextClassifier",
        ),
        Architecture(
            name="online-ensemble-encoder",
            family="online-ensemble",
            task="representation-learning",
            module="zoo.tasks.encoder_training:EncoderTraining",
        ),
    ]
}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(_architectures)
"""All architectures by name, a read-only view."""


def architecture(name: str) -> Architecture:
    """Look up an architecture.

    Raises:
        UnknownNameError: When there is none of that name; the text has the nearest names.
    """
    try:
        return ARCHITECTURES[name]
    except KeyError:
        hint = nearest(name, ARCHITECTURES) or f" There are: {', '.join(sorted(ARCHITECTURES))}."
        raise UnknownNameError(f"Unknown architecture {name!r}.{hint}") from None


def architecture_of(module_class: type[Any]) -> Architecture:
    """Look up the architecture that a LightningModule's class is registered as.

    Raises:
        UnknownNameError: When it is not registered.
    """
    reference = _reference(module_class)
    for entry in ARCHITECTURES.values():
        if entry.module == reference:
            return entry
    raise UnknownNameError(
        f"{module_class.__name__} is not registered; decorate it with @zoo.register(name, ...)."
    )


def register(name: str, *, task: str, family: str) -> Callable[[ModuleClass], ModuleClass]:
    """Add a LightningModule of your own, so that its checkpoints can be saved and loaded by name.

    The class needs an attribute `network_config`, the frozen dataclass of its network's arguments.

    Args:
        name: The architecture's name, kebab case, not taken by another class.
        task: What the model does, kebab case.
        family: The mechanism, kebab case.

    Returns:
        A class decorator that gives back the class unchanged.

    Raises:
        ConfigError: When a name is not kebab case, is taken, or `network_config` is missing.

    Example:
        ```python
        @zoo.register("my-lm", task="language-modeling", family="mine")
        class MyLanguageModel(ZooModule):
            network_config = MyConfig
        ```
    """
    for argument, value in [("name", name), ("task", task), ("family", family)]:
        if not _KEBAB_CASE.fullmatch(value):
            raise ConfigError(
                f"{argument} {value!r} is not in kebab case: use lower-case letters, digits and "
                f"single hyphens, as in 'my-model'."
            )

    def add(cls: ModuleClass) -> ModuleClass:
        if not dataclasses.is_dataclass(getattr(cls, "network_config", None)):
            raise ConfigError(
                f"{cls.__name__} cannot be registered as {name!r}: its class attribute "
                f"network_config must be the dataclass of its network's arguments."
            )
        module = _reference(cls)
        # The same class may come again: a notebook cell is run twice, a module is reloaded.
        if name in _architectures and _architectures[name].module != module:
            taken_by = _architectures[name].module
            raise ConfigError(f"The name {name!r} is taken by {taken_by}; choose another.")
        _architectures[name] = Architecture(
            name=name, family=family, task=task, module=module, registered=cls
        )
        return cls

    return add


def _reference(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
