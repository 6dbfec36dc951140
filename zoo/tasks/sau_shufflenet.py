"""SAU ShuffleNets as classifiers of images, one class for each width."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from zoo.errors import ConfigError
from zoo.families.sau_shufflenet import ShuffleNetConfig, ShuffleNetV2
from zoo.tasks.image_classification import ImageClassifier

__all__ = [
    "SAUShuffleNet",
    "SAUShuffleNetX0_5",
    "SAUShuffleNetX1",
    "SAUShuffleNetX2",
]


class SAUShuffleNet(ImageClassifier):
    """A ShuffleNet V2; its subclasses are for one width each.

    Args:
        network: shape of the network; its width must be that of the class.
        options: see `ImageClassifier`.

    Raises:
        ConfigError: an option is out of range, or the width is another one.
    """

    network_config: ClassVar[type[Any]] = ShuffleNetConfig
    network_class: ClassVar[type[nn.Module]] = ShuffleNetV2
    width: ClassVar[float]

    def __init__(self, network: ShuffleNetConfig, **options: Any) -> None:
        if network.width != self.width:
            raise ConfigError(
                f"{type(self).__name__} is of width {self.width}, got {network.width}: set "
                f"model.network.width={self.width}"
            )
        super().__init__(network, **options)


class SAUShuffleNetX0_5(SAUShuffleNet):  # noqa: N801
    """ShuffleNet V2 0.5x."""

    width = 0.5

    def __init__(
        self, network: ShuffleNetConfig = ShuffleNetConfig(width=0.5), **options: Any
    ) -> None:
        super().__init__(network, **options)


class SAUShuffleNetX1(SAUShuffleNet):
    """ShuffleNet V2 1.0x."""

    width = 1.0

    def __init__(
        self, network: ShuffleNetConfig = ShuffleNetConfig(width=1.0), **options: Any
    ) -> None:
        super().__init__(network, **options)


class SAUShuffleNetX2(SAUShuffleNet):
    """ShuffleNet V2 2.0x."""

    width = 2.0

    def __init__(
        self, network: ShuffleNetConfig = ShuffleNetConfig(width=2.0), **options: Any
    ) -> None:
        super().__init__(network, **options)
