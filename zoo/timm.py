"""Registers the zoo's networks with timm: `import zoo.timm`, then `timm.create_model(...)`.

Untrained networks alone; pretrained weights come from `zoo.load`, which checks them.
"""

from __future__ import annotations

import contextlib
from typing import Any, get_args

import torch.nn.functional as F
from timm.layers import create_classifier, get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.families.sau_shufflenet import Activation, ShuffleNetConfig, ShuffleNetV2, swap_activation
from zoo.families.sau_shufflenet.shufflenet import Stem

__all__ = [
    "sau_shufflenet_v2_x0_5",
    "sau_shufflenet_v2_x1_0",
    "sau_shufflenet_v2_x1_5",
    "sau_shufflenet_v2_x2_0",
]


class _ShuffleNet(ShuffleNetV2):
    """A ShuffleNet with the arguments and attributes of timm's models."""

    global_pool: Any

    def __init__(
        self,
        width: float,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        stem: Stem = "large",
        activation: Activation = "sau-2",
        act_layer: Any = None,
    ) -> None:
        config = ShuffleNetConfig(
            width=width,
            num_classes=max(num_classes, 1),
            in_channels=in_chans,
            stem=stem,
            activation=activation,
        )
        super().__init__(config)
        if isinstance(act_layer, str) and act_layer not in get_args(Activation):
            with contextlib.suppress(KeyError):  # a name that timm does not know either
                act_layer = get_act_layer(act_layer)
        if act_layer is not None:
            swap_activation(self, act_layer)
        first = 2 if stem == "small" else 8
        self.feature_info = [
            {"num_chs": channels, "reduction": first << i, "module": f"stages.{i}"}
            for i, channels in enumerate(self.stage_channels)
        ]
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits of features."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace that layer by a new one; 0 classes leave features.

        Args:
            num_classes: number of classes.
            global_pool: timm's name of the pooling: "avg", "max", "avgmax", "catavgmax", or "" for
                feature maps, which go with 0 classes alone; None: as it is.

        Raises:
            ValueError: classes are asked for without pooling.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        if num_classes and not global_pool:
            raise ValueError(f"global_pool='' is for num_classes=0, got {num_classes}: name a pool")
        like = next(self.last.parameters())
        pool, head = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * pool.feat_mult()
        self.global_pool = pool.train(self.training)
        self.head = head.to(like.device, like.dtype).train(self.training)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and, without `pre_logits`, the classifier."""
        pooled: Tensor = F.dropout(self.global_pool(features), self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(  # type: ignore[override]
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps after stages, as timm's models give them.

        Args:
            x: B x C x H x W normalised images.
            indices: which of the three stages; a number means that many last ones, None all.
            norm: without effect; maps are normalised.
            stop_early: compute no more than the last of them needs.
            output_fmt: "NCHW".
            intermediates_only: whether to return the maps alone.

        Returns:
            Features as of `forward_features`, or where it stopped early; and the maps.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        self._check(x)
        parts = [self.stem, *self.stages, self.last]
        if stop_early and last < len(self.stages) - 1:
            parts = parts[: last + 2]
        maps = []
        for index, part in enumerate(parts, start=-1):
            x = part(x)
            if index in taken:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Not supported.

        Raises:
            ZooError: it is asked for.
        """
        if enable:
            raise ZooError("SAU ShuffleNets have no gradient checkpointing.")


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {f"sau_shufflenet_v2_{width}": _cfg() for width in ("x0_5", "x1_0", "x1_5", "x2_0")}
)


def _create(name: str, width: float, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise ZooError(
            f"{name} has no weights of timm's kind; pretrained ones come from zoo.load, see: "
            "zoo list --family sau-shufflenet"
        )
    model: nn.Module = build_model_with_cfg(
        _ShuffleNet,
        name,
        False,
        width=width,
        feature_cfg={"feature_cls": "hook", "out_indices": (0, 1, 2)},
        **options,
    )
    return model


@register_model
def sau_shufflenet_v2_x0_5(pretrained: bool = False, **options: Any) -> nn.Module:
    """ShuffleNet V2 0.5x; `stem="small"` for images of about 32 pixels, any `activation`."""
    return _create("sau_shufflenet_v2_x0_5", 0.5, pretrained, options)


@register_model
def sau_shufflenet_v2_x1_0(pretrained: bool = False, **options: Any) -> nn.Module:
    """ShuffleNet V2 1.0x; options as of `sau_shufflenet_v2_x0_5`."""
    return _create("sau_shufflenet_v2_x1_0", 1.0, pretrained, options)


@register_model
def sau_shufflenet_v2_x1_5(pretrained: bool = False, **options: Any) -> nn.Module:
    """ShuffleNet V2 1.5x; options as of `sau_shufflenet_v2_x0_5`."""
    return _create("sau_shufflenet_v2_x1_5", 1.5, pretrained, options)


@register_model
def sau_shufflenet_v2_x2_0(pretrained: bool = False, **options: Any) -> nn.Module:
    """ShuffleNet V2 2.0x; options as of `sau_shufflenet_v2_x0_5`."""
    return _create("sau_shufflenet_v2_x2_0", 2.0, pretrained, options)
