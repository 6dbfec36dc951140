"""Activations by name, and surgery that replaces those of any network."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from torch import nn

from zoo.families.sau_shufflenet.activation import SAU, SAU_PRESETS

__all__ = ["Activation", "SwapReport", "make_activation", "swap_activation"]

Activation = Literal[
    "relu",
    "leaky-relu",
    "prelu",
    "gelu",
    "silu",
    "sau-published",
    "sau-1",
    "sau-2",
    "sau-4",
    "sau-1-trained",
    "sau-2-trained",
    "sau-4-trained",
]
"""Names of activations. The leak of "leaky-relu" is 0.15, where "prelu" and all SAU start."""

_LEAK = 0.15
_OTHERS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky-relu": lambda: nn.LeakyReLU(_LEAK, inplace=True),
    "prelu": lambda: nn.PReLU(init=_LEAK),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
_SWAPPED = (
    *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "CELU", "SELU", "Softplus"),
    *("GELU", "GELUTanh", "QuickGELU", "SiLU", "Swish", "Mish", "HardMish", "Hardswish"),
    *("HardMishMe", "HardSwish", "SAU"),
)
"""Classes of torch and timm that stand between layers. Gates (sigmoid, tanh) are left alone."""


def make_activation(name: Activation) -> nn.Module:
    """A new activation layer.

    Raises:
        ValueError: there is none of this name.
    """
    if name in _OTHERS:
        return _OTHERS[name]()
    prefix, _, preset = str(name).partition("-")
    if prefix != "sau" or preset not in SAU_PRESETS:
        raise ValueError(f"no activation {name!r}; choose one of {', '.join(get_args(Activation))}")
    return SAU.preset(preset)


@dataclasses.dataclass(frozen=True)
class SwapReport:
    """What `swap_activation` did.

    Attributes:
        replaced: path of each module that was replaced -> name of its class. A module that occurs
            under several paths is listed under each, and replaced by one module.
    """

    replaced: dict[str, str]

    def __str__(self) -> str:
        counts = Counter(self.replaced.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        return f"replaced {len(self.replaced)} activations ({kinds})"


def swap_activation(
    model: nn.Module,
    activation: Activation | Callable[[], nn.Module],
    *,
    kinds: Iterable[str] = _SWAPPED,
) -> SwapReport:
    """Replace the activations of a network, in place.

    Works on modules, whichever library they are from: what a network calls as a function in its
    `forward` is not seen. Nothing is trained again, so that a pretrained network loses accuracy
    until it is fine-tuned.

    Args:
        model: the network.
        activation: a name, or what makes a new layer, as `functools.partial(SAU, beta=2.0)`.
        kinds: names of the classes to replace.

    Returns:
        What was replaced.

    Raises:
        ValueError: there is no activation of this name, or nothing to replace; or `activation` is
            a layer instead of what makes one, or `kinds` a single string.
    """
    if isinstance(activation, nn.Module):
        raise ValueError(
            f"activation must be a name or make a new layer on each call, got the layer "
            f"{activation}; pass its class, or a functools.partial of it"
        )
    if isinstance(kinds, str):
        raise ValueError(f"kinds must be several names of classes, got the string {kinds!r}")
    make = activation if callable(activation) else lambda: make_activation(activation)
    wanted = frozenset(kinds)
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    made: dict[nn.Module, nn.Module] = {}
    replaced: dict[str, str] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        kind = type(module).__name__
        if not path or kind not in wanted:
            continue
        if module not in made:
            made[module] = make().train(module.training)
            if first is not None:
                made[module].to(first.device, first.dtype)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
        replaced[path] = kind
    if not replaced:
        looked_for = ", ".join(sorted(wanted))
        raise ValueError(
            f"{type(model).__name__} has no modules to replace (looked for {looked_for}); what is "
            "called as a function cannot be replaced"
        )
    return SwapReport(replaced)
