"""Registers the zoo's networks with timm: `import zoo.timm`, then `timm.create_model(...)`.

Untrained networks alone; pretrained weights come from `zoo.load`, which checks them.
"""

from __future__ import annotations

from typing import Any, Literal

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from zoo.errors import ZooError
from zoo.families.sau_shufflenet import Activation, ShuffleNetConfig, ShuffleNetV2, swap_activation

__all__ = [
    "sau_shufflenet_v2_x0_5",
    "sau_shufflenet_v2_x1_0",
    "sau_shufflenet_v2_x1_5",
    "sau_shufflenet_v2_x2_0",
]


class _ShuffleNet(ShuffleNetV2):
    """A ShuffleNet with the arguments and attributes of timm's models."""

    def __init__(
        self,
        width: float,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: Literal["small", "large"] = "large",
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
        if act_layer is not None:
            swap_activation(self, act_layer)
        first = 2 if stem == "small" else 8
        self.feature_info = []
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, nn.Sequential)
            self.feature_info.append(
                {"num_chs": stage[-1].channels, "reduction": first << i, "module": f"stages.{i}"}
            )
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits of features."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace that layer; 0 leaves features."""
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
        elif not isinstance(self.head, nn.Linear) or self.head.out_features != num_classes:
            self.head = nn.Linear(self.num_features, num_classes)

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
