"""What a fine-tuning is, as plain configuration: the section `zoo.finetune` of a recipe."""

from __future__ import annotations

import dataclasses
from typing import Literal

from zoo.configs import omit_default

__all__ = ["FineTuning"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Which weights a training starts from, and which of them it may change.

    Raises:
        ValueError: a value is out of range or does not fit the others.
    """

    base_model: str
    """A weight of the zoo, a checkpoint folder, or a repository on the Hub."""
    freeze: str | tuple[str, ...] | None = None
    """"encoder" for all but the head, or shell wildcards on names; null: everything learns."""
    adapters: Literal["lora", "lora-fa"] | None = None
    """Learn low-rank adapters alone (and a head that is new), which are merged in the end."""
    rank: int = 8
    """Of the adapters, if any."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank; null: by one."""
    target: tuple[str, ...] | None = None
    """Layers that get an adapter; null: all linear ones and 1x1 convolutions but a new head."""
    save_memory: bool = True
    """Keep no more for the backward pass than it needs; the results stay the same to rounding."""
    recompute_blocks: bool = omit_default(False)
    """Keep the input of each block alone, and compute the rest again in the backward pass."""

    def __post_init__(self) -> None:
        if self.freeze is not None and self.adapters is not None:
            raise ValueError("adapters freeze everything else, so freeze must be left out")
        for name, value in (("alpha", self.alpha), ("target", self.target)):
            if value is not None and self.adapters is None:
                raise ValueError(f"{name} is for adapters; choose lora or lora-fa")
        for name, names in (("freeze", self.freeze), ("target", self.target)):
            if names == ():
                raise ValueError(f"{name} is an empty list; name something, or leave it out")
