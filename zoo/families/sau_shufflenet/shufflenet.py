"""ShuffleNet V2 with any activation, for small images and for those of ImageNet.

Source: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design", ECCV 2018 (arXiv:1807.11164), with the widths of its table 5 and 244 channels in the second
stage of the widest. For images of 28 or 32 pixels the first convolution has stride 1 and is not
followed by pooling, as is usual.

Shape notation: B images, C channels, H x W pixels, K classes, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.families.choices import check_choice
from zoo.families.sau_shufflenet.swap import Activation, make_activation

__all__ = ["ShuffleNetConfig", "ShuffleNetV2"]

Stem = Literal["small", "large"]

_STEM = 24
_UNITS = (4, 8, 4)
_CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
"""Width multiplier -> channels of the three stages and of the last convolution."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleNetConfig:
    """Shape of a `ShuffleNetV2`.

    Raises:
        ValueError: a value is out of range.
    """

    width: float = 1.0
    """Width multiplier: 0.5, 1.0, 1.5 or 2.0."""
    num_classes: int = 100
    """Number of classes K."""
    in_channels: int = 3
    """Channels of an image: 1 for grey, 3 for colour."""
    stem: Stem = "small"
    """For images of about 32 pixels, or, with a stride of 2 and pooling, of about 224."""
    activation: Activation = "sau-2"
    """What follows each normalisation, except those of depthwise convolutions."""

    def __post_init__(self) -> None:
        if self.width not in _CHANNELS:
            widths = ", ".join(map(str, _CHANNELS))
            raise ValueError(f"width must be one of {widths}, got {self.width}")
        for field in ("num_classes", "in_channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        check_choice("stem", self.stem, Stem)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution without bias, and batch normalisation."""
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return [convolution, nn.BatchNorm2d(outputs)]


def _interleave(a: Tensor, b: Tensor) -> Tensor:
    """Channels a0, b0, a1, b1, ...: concatenation and shuffle of two groups in one.

    Keeps channels innermost where they are, which a plain transposition would not.
    """
    if b.is_contiguous() or not b.is_contiguous(memory_format=torch.channels_last):
        return torch.stack((a, b), 2).flatten(1, 2)
    joined = torch.cat((a, b), 1).permute(0, 2, 3, 1)
    shuffled = torch.unflatten(joined, 3, (2, -1)).transpose(3, 4).flatten(3)
    return shuffled.permute(0, 3, 1, 2)


class Unit(nn.Module):
    """A unit of figure 3 (c) of the paper, or (d) where `stride` is 2 and all channels are used.

    Args:
        inputs, outputs: channels; equal for stride 1, and outputs is even.
        stride: 1 or 2.
        activation: makes an activation layer.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        half = outputs // 2
        self.branch1: nn.Sequential | None = None
        if stride > 1:
            self.branch1 = nn.Sequential(
                *_convolution(inputs, inputs, 3, stride, groups=inputs),
                *_convolution(inputs, half, 1),
                activation(),
            )
        self.branch2 = nn.Sequential(
            *_convolution(inputs if stride > 1 else half, half, 1),
            activation(),
            *_convolution(half, half, 3, stride, groups=half),
            *_convolution(half, half, 1),
            activation(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.branch1 is not None:
            return _interleave(self.branch1(x), self.branch2(x))
        kept, changed = x.chunk(2, 1)
        return _interleave(kept, self.branch2(changed))


class ShuffleNetV2(nn.Module):
    """ShuffleNet V2 with 37 activations of one kind.

    Args:
        config: the shape.
    """

    def __init__(self, config: ShuffleNetConfig) -> None:
        super().__init__()
        self.config = config

        def activation() -> nn.Module:
            return make_activation(config.activation)

        *stages, features = _CHANNELS[config.width]
        large = config.stem == "large"
        stem = [*_convolution(config.in_channels, _STEM, 3, 2 if large else 1), activation()]
        if large:
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.stem = nn.Sequential(*stem)
        self.stages = nn.Sequential()
        inputs = _STEM
        for units, outputs in zip(_UNITS, stages, strict=True):
            first = Unit(inputs, outputs, 2, activation)
            rest = (Unit(outputs, outputs, 1, activation) for _ in range(units - 1))
            self.stages.append(nn.Sequential(first, *rest))
            inputs = outputs
        self.last = nn.Sequential(*_convolution(inputs, features, 1), activation())
        self.stage_channels, self.num_features = tuple(stages), features
        self.head: nn.Module = nn.Linear(features, config.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps before pooling, B x C x H x W to B x F x H/8 x W/8 (H/32 with the large
        stem), rounded up."""
        self._check(x)
        y: Tensor = self.last(self.stages(self.stem(x)))
        return y

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Feature maps after the stem, each of the three stages, and the last convolution."""
        self._check(x)
        maps = [self.stem(x)]
        for part in (*self.stages, self.last):
            maps.append(part(maps[-1]))
        return maps

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """B x F x H x W feature maps to B x K logits, or with `pre_logits` to B x F averages."""
        pooled = features.mean((2, 3))
        logits: Tensor = pooled if pre_logits else self.head(pooled)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W normalised images to B x K logits.

        Raises:
            ValueError: `x` is of another shape.
        """
        return self.forward_head(self.forward_features(x))

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"expected images B x {self.config.in_channels} x H x W, got {tuple(x.shape)}"
            )

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)\.(\d+)", "head": r"^(?:last|head)"}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: those of normalisations and activations."""
        return {name for name, p in self.named_parameters() if p.ndim < 2}
