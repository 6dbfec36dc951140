"""Continuous-depth ResNets for images, the published one and ours, and what they replace.

Source: Chen et al., "Neural Ordinary Differential Equations" (arXiv:1806.07366), section 3, and
its released example for MNIST; weights as functions of depth after Queiruga et al.
(arXiv:2106.10820).

Shape notation: B images, C channels, H x W pixels of the current stage.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.choices import check_choices
from zoo.families.continuous_depth.blocks import (
    BasisName,
    ODEBlock,
    SolverKnob,
    TimeVaryingConv2d,
)
from zoo.families.continuous_depth.solvers import SolverConfig

__all__ = [
    "ODE_RESNET_PRESETS",
    "BasisField",
    "ODEResNet",
    "ODEResNetConfig",
    "ResidualBlock",
    "TimeChannelConv2d",
    "TimeChannelField",
    "ode_resnet_preset",
]


_SOLVER = SolverConfig(method="midpoint", steps=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ODEResNetConfig:
    """Shape of an image classifier whose residual blocks are ODEs.

    Raises:
        ValueError: a value is out of range, or none of its choices.
    """

    num_classes: int = 10
    """Number of classes."""
    in_channels: int = 1
    """Channels of the images."""
    stem: Literal["published_conv", "published_residual", "plain", "strided"] = "strided"
    """How images become features. The two of the released example for MNIST (three convolutions,
    or one and two residual blocks; 4 times smaller); a 3x3 convolution; a 5x5 one of stride 2."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of the stages; images shrink by 2 between stages."""
    body_from: int = 1
    """First stage (0, 1, ...) that has a body."""
    transition: Literal["conv", "residual"] = "conv"
    """Between stages: norm, ReLU and a 3x3 convolution of stride 2, or a residual block."""
    body: Literal["ode", "residual", "none"] = "ode"
    """What a stage does: an ODE, residual blocks, or nothing (the controls)."""
    residual_blocks: int = 1
    """Blocks per stage of the body "residual"."""
    field: Literal["basis", "time_channel"] = "basis"
    """Right-hand side of the ODE: convolutions with weights theta(t), or the published one, with
    time as a further channel and a norm at the end."""
    hidden: int = 0
    """Channels between the two convolutions of a field "basis" or of a residual block in a body;
    0: as many as the stage has."""
    nodes: int = 1
    """Basis functions of theta(t); 1: the same weights at all times."""
    basis: BasisName = "piecewise_constant"
    """See `basis_weights`."""
    groups: int = 8
    """Groups of channels that are normalised together, at most; their number divides the channels.
    As many groups as channels would take away the mean of each."""
    dropout: float = 0.0
    """On the features before the head."""
    solver: SolverConfig = _SOLVER
    """How the network was trained; `network.solver`, `.steps` and `.tolerance` choose another."""

    def __post_init__(self) -> None:
        check_choices(self)
        for field in ("num_classes", "in_channels", "residual_blocks", "nodes", "groups"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be positive, one per stage, got {list(self.widths)}")
        if not 0 <= self.body_from < len(self.widths):
            raise ValueError(
                f"body_from must be a stage from 0 to {len(self.widths) - 1}, got {self.body_from}"
            )
        if self.hidden < 0:
            raise ValueError(f"hidden must be at least 0, got {self.hidden}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


_PUBLISHED: dict[str, Any] = {
    "widths": (64,),
    "body_from": 0,
    "field": "time_channel",
    "groups": 32,
    "solver": SolverConfig(method="dopri5", tolerance=1e-3, gradient="adjoint"),
}

ODE_RESNET_PRESETS: dict[str, ODEResNetConfig] = {
    "published": ODEResNetConfig(stem="published_conv", **_PUBLISHED),
    "published-residual": ODEResNetConfig(stem="published_residual", **_PUBLISHED),
}
"""`published`: the released example for MNIST, 208,266 parameters; `published-residual`: its other
way of shrinking images, 232,970. The paper's table says 0.22 M, which is neither."""


def ode_resnet_preset(name: str, **changes: Any) -> ODEResNetConfig:
    """A preset of `ODE_RESNET_PRESETS` with some fields changed.

    Raises:
        ValueError: no preset has this name.
    """
    if name not in ODE_RESNET_PRESETS:
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(ODE_RESNET_PRESETS)}")
    return dataclasses.replace(ODE_RESNET_PRESETS[name], **changes)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    """The largest number of groups up to `groups` that divides the channels."""
    count = next(n for n in range(min(groups, channels), 0, -1) if channels % n == 0)
    return nn.GroupNorm(count, channels)


class TimeChannelConv2d(nn.Module):
    """A 3x3 convolution of an image and one more channel that is t everywhere.

    The channel's share is computed apart, so that nothing is concatenated; at the border the
    zeros of the padding make it differ from a bias.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        joint = nn.Conv2d(in_channels + 1, out_channels, 3)  # for its initialisation
        assert joint.bias is not None
        self.time_weight = nn.Parameter(joint.weight.detach()[:, :1].clone())
        self.weight = nn.Parameter(joint.weight.detach()[:, 1:].clone())
        self.bias = nn.Parameter(joint.bias.detach())

    def forward(self, t: float, x: Tensor) -> Tensor:
        """B x in x H x W at time t to B x out x H x W."""
        plane = x.new_full((1, 1, *x.shape[2:]), t)
        shift = self._convolve(plane, self.time_weight, None)
        return self._convolve(x, self.weight, self.bias) + shift

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)


class TimeChannelField(nn.Module):
    """The published right-hand side: norm, ReLU, convolution, twice, and a norm at the end."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (_norm(channels, groups) for _ in range(3))
        self.relu = nn.ReLU()
        self.conv1 = TimeChannelConv2d(channels, channels)
        self.conv2 = TimeChannelConv2d(channels, channels)

    def forward(self, t: float, x: Tensor) -> Tensor:
        """dx/dt, B x C x H x W."""
        y = self.conv1(t, self.relu(self.norm1(x)))
        y = self.conv2(t, self.relu(self.norm2(y)))
        derivative: Tensor = self.norm3(y)
        return derivative


class BasisField(nn.Module):
    """A pre-activation residual branch whose convolutions have weights theta(t).

    The last convolution starts at zero, so that the flow starts as the identity.
    """

    def __init__(
        self, channels: int, hidden: int, nodes: int, basis: BasisName, groups: int = 8
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels, groups), _norm(hidden, groups)
        self.relu = nn.ReLU()
        self.conv1 = TimeVaryingConv2d(channels, hidden, nodes=nodes, basis=basis)
        self.conv2 = TimeVaryingConv2d(hidden, channels, nodes=nodes, basis=basis)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, t: float, x: Tensor) -> Tensor:
        """dx/dt, B x C x H x W."""
        y = self.conv1(t, self.relu(self.norm1(x)))
        derivative: Tensor = self.conv2(t, self.relu(self.norm2(y)))
        return derivative


class ResidualBlock(nn.Module):
    """A pre-activation residual block (He et al., arXiv:1603.05027), as the released example has.

    Args:
        in_channels, out_channels: channels; a 1x1 convolution is on the shortcut when they differ
            or the stride is not 1.
        hidden: channels between the two convolutions; 0: `out_channels`.
        stride: of the first convolution and the shortcut.
        groups: of normalisation, at most.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden: int = 0,
        stride: int = 1,
        groups: int = 8,
    ) -> None:
        super().__init__()
        hidden = hidden or out_channels
        self.norm1, self.norm2 = _norm(in_channels, groups), _norm(hidden, groups)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(hidden, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """B x in x H x W to B x out x H/stride x W/stride."""
        y = self.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        branch: Tensor = self.conv2(self.relu(self.norm2(self.conv1(y))))
        return branch + shortcut


class Transition(nn.Module):
    """Norm, ReLU and a 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(in_channels, groups)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.relu(self.norm(x)))
        return y


class ODEResNet(SolverKnob, nn.Module):
    """Stem, stages, and a head of norm, ReLU, average pooling and a linear layer.

    Args:
        config: the shape.
    """

    def __init__(self, config: ODEResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = _stem(config)
        self.blocks = nn.ModuleList()
        for index, width in enumerate(config.widths):
            if index:
                narrow = config.widths[index - 1]
                if config.transition == "conv":
                    self.blocks.append(Transition(narrow, width, config.groups))
                else:
                    self.blocks.append(ResidualBlock(narrow, width, stride=2, groups=config.groups))
            if index >= config.body_from:
                self.blocks.extend(_body(config, width))
        self.norm = _norm(config.widths[-1], config.groups)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.widths[-1], config.num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """B x in_channels x H x W images to B x C features.

        Raises:
            ValueError: the images have another number of channels or are no batch.
        """
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"expected images as B x {self.config.in_channels} x H x W, "
                f"got {tuple(images.shape)}"
            )
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.relu(self.norm(x)).mean((2, 3))
        return features

    def block_inputs(self, images: Tensor) -> list[tuple[ODEBlock, Tensor]]:
        """Every ODE block with the state at its start, for diagnostics."""
        x, found = self.stem(images), []
        for block in self.blocks:
            if isinstance(block, ODEBlock):
                found.append((block, x))
            x = block(x)
        return found

    def forward_head(self, features: Tensor) -> Tensor:
        """B x C features to B x num_classes logits."""
        logits: Tensor = self.head(self.dropout(features))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits, B x num_classes, of images, B x in_channels x H x W."""
        return self.forward_head(self.forward_features(images))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)", "head": r"^(?:norm|head)"}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: gains and biases, those of theta(t) too."""
        return {n for n, p in self.named_parameters() if p.ndim < 2 or n.endswith("bias")}


def _stem(config: ODEResNetConfig) -> nn.Module:
    channels, width = config.in_channels, config.widths[0]
    if config.stem == "published_conv":
        return nn.Sequential(
            nn.Conv2d(channels, width, 3),
            _norm(width, config.groups),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            _norm(width, config.groups),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
        )
    if config.stem == "published_residual":
        return nn.Sequential(
            nn.Conv2d(channels, width, 3),
            ResidualBlock(width, width, stride=2, groups=config.groups),
            ResidualBlock(width, width, stride=2, groups=config.groups),
        )
    if config.stem == "plain":
        return nn.Conv2d(channels, width, 3, padding=1)
    return nn.Conv2d(channels, width, 5, stride=2, padding=2)


def _body(config: ODEResNetConfig, width: int) -> list[nn.Module]:
    hidden = config.hidden or width
    if config.body == "none":
        return []
    if config.body == "residual":
        return [
            ResidualBlock(width, width, hidden=hidden, groups=config.groups)
            for _ in range(config.residual_blocks)
        ]
    field: nn.Module
    if config.field == "time_channel":
        field = TimeChannelField(width, config.groups)
    else:
        field = BasisField(width, hidden, config.nodes, config.basis, config.groups)
    return [ODEBlock(field, config.solver)]
