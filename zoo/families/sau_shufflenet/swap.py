"""Activations by name, and surgery that replaces those of any network."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from torch import Tensor, nn

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
    *("SwishMe", "MishMe", "HardSwishMe", "SquaredReLU", "StarReLU", "GammaAct"),
)
"""Classes of torch and timm that stand between layers. Gates (sigmoid, tanh) are left alone."""
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
)


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


class _Gained(nn.Module):
    """An activation times a number, as timm's `GammaAct`, which has its own as a function."""

    def __init__(self, activation: nn.Module, gamma: float) -> None:
        super().__init__()
        self.activation, self.gamma = activation, gamma

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(x) * self.gamma
        return y

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}"


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of `old`, so that their handles still remove them."""
    for name in _HOOKS:
        hooks = getattr(old, name)
        hooks.update(getattr(new, name))
        setattr(new, name, hooks)
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def swap_activation(
    model: nn.Module,
    activation: Activation | Callable[[], nn.Module],
    *,
    kinds: Iterable[str] = _SWAPPED,
) -> SwapReport:
    """Replace the activations of a network, in place.

    Works on modules, whichever library they are from: what a network calls as a function in its
    `forward` is not seen. Nothing is trained again, so that a pretrained network loses accuracy
    until it is fine-tuned. An activation that is made of others is replaced whole; of timm's
    `GammaAct` the factor stays, which keeps the variance of normaliser-free networks. Hooks of a
    replaced module, as those of timm's `features_only`, go on to the new one.

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
    # A model that is itself an activation has no place in which another could stand.
    paths = [] if type(model).__name__ in wanted else model.named_modules(remove_duplicate=False)
    made: dict[nn.Module, nn.Module] = {}
    replaced: dict[str, str] = {}
    for path, module in list(paths):
        kind = type(module).__name__
        if not path or kind not in wanted or _is_inside(path, replaced):
            continue
        if module not in made:
            new = make()
            if kind == "GammaAct":
                new = _Gained(new, float(getattr(module, "gamma", 1.0)))
            made[module] = new.train(module.training)
            if first is not None:
                made[module].to(first.device, first.dtype)
            _move_hooks(module, made[module])
        before, _, child = path.rpartition(".")
        parent = model.get_submodule(before)
        setattr(parent, child, made[module])
        if isinstance(parent, nn.TransformerEncoderLayer) and child == "activation":
            # Without gradients it would go on with the activation it was made with.
            parent.activation_relu_or_gelu = 0
        replaced[path] = kind
    if not replaced:
        looked_for = ", ".join(sorted(wanted))
        raise ValueError(
            f"{type(model).__name__} has no modules to replace (looked for {looked_for}); what is "
            "called as a function cannot be replaced"
        )
    return SwapReport(replaced)


def _is_inside(path: str, replaced: dict[str, str]) -> bool:
    """Whether a module around this one was replaced."""
    return any(path[:end] in replaced for end, letter in enumerate(path) if letter == ".")
