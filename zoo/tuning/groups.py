"""Groups of parameters: a smaller learning rate for earlier layers, and none of the decay."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]


def parameter_groups(
    network: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    fallback: bool = False,
) -> list[dict[str, Any]]:
    """Groups for an optimizer, by the network's own `group_matcher` and `no_weight_decay`.

    The last of the n groups of layers learns at `lr`, the i-th at `lr * layer_decay ** (n - i)`
    (as in BEiT, arXiv:2106.08254). Frozen parameters are left out. Vectors, and what the network
    exempts, do not decay.

    Args:
        network: a network of the zoo or of timm.
        lr: learning rate of the head.
        weight_decay: of what decays.
        layer_decay: factor from a group to the one before it.
        fallback: whether what the network exempts is marked for the second optimizer of Muon.
    """
    import timm.optim  # here, since it imports all models of timm

    groups: list[dict[str, Any]] = timm.optim.param_groups_layer_decay(
        network,
        weight_decay=weight_decay,
        no_weight_decay_list=getattr(network, "no_weight_decay", set)(),
        fallback_no_weight_decay=fallback,
        layer_decay=layer_decay,
    )
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale")
    return groups
