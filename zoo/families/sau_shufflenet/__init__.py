"""SAU, a smooth leaky ReLU, and ShuffleNet V2 built with it.

Source: Biswas, Kumar, Banerjee, Pandey, "SAU: Smooth Activation Function Using Convolution with
Approximate Identities", ECCV 2022 (arXiv:2109.13210).
"""

from zoo.families.sau_shufflenet.activation import SAU, SAU_PRESETS, sau
from zoo.families.sau_shufflenet.shufflenet import ShuffleNetConfig, ShuffleNetV2
from zoo.families.sau_shufflenet.swap import (
    Activation,
    SwapReport,
    make_activation,
    swap_activation,
)

__all__ = [
    "SAU",
    "SAU_PRESETS",
    "Activation",
    "ShuffleNetConfig",
    "ShuffleNetV2",
    "SwapReport",
    "make_activation",
    "sau",
    "swap_activation",
]
