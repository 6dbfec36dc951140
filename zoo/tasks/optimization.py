"""Optimizers and learning rate schedules, chosen by plain configuration."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import torch
from torch import nn

from zoo.tuning.groups import parameter_groups

__all__ = ["OptimizerConfig", "build_optimizer", "schedule_factor"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer of timm with warm-up and decay per step.

    Raises:
        ValueError: a value is out of range.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """AdamW; Muon (matrices by orthogonalised momentum, the rest by AdamW); SGD (Nesterov)."""
    lr: float = 1e-3
    """Peak learning rate. Muon's updates are scaled to the size of AdamW's."""
    weight_decay: float = 0.1
    """Not applied to vectors or to what the network exempts. Decoupled; of SGD, part of the
    gradient."""
    momentum: float = 0.9
    """Of SGD and of Muon, in (0, 1)."""
    schedule: Literal["linear", "cosine", "constant", "one-cycle"] = "linear"
    """Shape of the decay from the peak to zero, over all steps. With "one-cycle" it is a cosine
    that starts where the warm-up ends, so that the peak is reached."""
    warmup_steps: int = 50
    """Steps of linear growth from zero at the beginning."""
    warmup_fraction: float | None = None
    """The same as a share of all steps, in [0, 1); takes the place of `warmup_steps`."""
    layer_decay: float | None = None
    """Factor of the learning rate from a group of layers to the one before it, in (0, 1]; null:
    all layers learn alike."""

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay must be finite and not negative, got {self.weight_decay}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if not 0.0 < self.momentum < 1.0:
            raise ValueError(f"momentum must be in (0, 1), got {self.momentum}")
        if self.warmup_fraction is not None and not 0.0 <= self.warmup_fraction < 1.0:
            raise ValueError(f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be in (0, 1], or null, got {self.layer_decay}")


def schedule_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate at `step` (0, 1, ...) over the peak."""
    warmup = config.warmup_steps
    if config.warmup_fraction is not None:
        warmup = math.ceil(config.warmup_fraction * total_steps)
    warm = min(1.0, (step + 1) / max(warmup, 1))
    if config.schedule == "one-cycle":
        after = (step + 1 - warmup) / max(total_steps - warmup, 1)
        return warm * 0.5 * (1.0 + math.cos(math.pi * min(max(after, 0.0), 1.0)))
    progress = min(step / max(total_steps, 1), 1.0)
    if config.schedule == "linear":
        return warm * (1.0 - progress)
    if config.schedule == "cosine":
        return warm * 0.5 * (1.0 + math.cos(math.pi * progress))
    return warm


def build_optimizer(
    network: nn.Module, config: OptimizerConfig, total_steps: int
) -> dict[str, Any]:
    """Optimizer and per-step schedule of a network, as Lightning's `configure_optimizers` wants.

    Args:
        network: its `no_weight_decay()`, where there is one, names parameters that do not decay.
        config: what to build.
        total_steps: optimizer steps of the whole training.
    """
    import timm.optim  # here, since it imports all models of timm, and most users only load

    if config.name == "muon" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        _orthogonalise_in_float32()
    # Orthogonalised updates suit maps between features, not tables that are looked up.
    fallback = config.name == "muon"
    groups = None
    if config.layer_decay is not None:
        groups = functools.partial(
            parameter_groups,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            fallback=fallback,
        )
    optimizer = timm.optim.create_optimizer_v2(
        network,
        opt=config.name,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        fallback_no_weight_decay=fallback,
        param_group_fn=groups,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule_factor(config, step, total_steps)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _orthogonalise_in_float32() -> None:
    """Let timm's Muon do its products in float32, where bfloat16 would be emulated.

    timm computes them in bfloat16 and has no option for it. On a processor without such
    arithmetic that took more than half of a training step.
    """
    import timm.optim.muon as muon

    function = muon.zeropower_via_newtonschulz
    if not isinstance(function, functools.partial):
        muon.zeropower_via_newtonschulz = functools.partial(function, dtype=torch.float32)
