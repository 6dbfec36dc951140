"""Freeze parts of a network: what is frozen stays as it is, bit for bit, statistics included."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from zoo.errors import ConfigError, nearest

__all__ = ["ENCODER", "freeze", "matching", "unfreeze"]

ENCODER = "encoder"
"""Stands for everything but the head."""

_HOOK = "_frozen_in_eval"


def matching(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Names of the parameters and buffers that patterns stand for.

    Args:
        model: a network.
        patterns: shell wildcards on names of tensors, or of modules, which stand for all that is in
            them: "stem", "blocks.[0-2]", "*.bias".

    Raises:
        ConfigError: a pattern matches nothing; the text has the nearest names.
    """
    tensors = [name for name, _ in _tensors(model)]
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = [
            name
            for name in tensors
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
        ]
        if not matched:
            modules = [name for name, _ in model.named_modules() if name]
            parts = ", ".join(name for name, _ in model.named_children())
            hint = nearest(pattern, [*modules, *tensors]) or f" Its parts are: {parts}."
            raise ConfigError(f"Nothing in {type(model).__name__} is called {pattern!r}.{hint}")
        found.update(matched)
    return [name for name in tensors if name in found]


def freeze(
    model: nn.Module, what: str | Sequence[str] = ENCODER, *, head: Sequence[str] = ()
) -> tuple[str, ...]:
    """Freeze parameters and buffers, in place.

    Frozen parameters take no gradient. A module whose own buffers are frozen, as a BatchNorm with
    its running statistics, stays in eval mode whatever `train()` says, since it would change them.

    Args:
        model: a network.
        what: "encoder", which is everything but the head; or patterns, see `matching`. A network
            with a part of that name takes it as `["encoder"]`.
        head: names of the parameters of the head, as `head_parameters` of a LightningModule of the
            zoo; empty: what the network's `group_matcher` calls so.

    Returns:
        The names of what was frozen.

    Raises:
        ConfigError: a pattern matches nothing, or it is not known what the head is.
    """
    if what == ENCODER:
        kept = set(head) or _head(model)
        names = [name for name, _ in _tensors(model) if name not in kept]
    else:
        if not isinstance(what, str) and ENCODER in what and not hasattr(model, ENCODER):
            raise ConfigError(
                f"{ENCODER!r} stands for all but the head where it is given alone, and nothing in "
                f"{type(model).__name__} is called so: leave out what is beside it."
            )
        names = matching(model, what)
    frozen = set(names)
    for name, tensor in _tensors(model):
        if name in frozen and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(False)
    for module, own in _with_buffers(model):
        if own & frozen:
            if not hasattr(module, _HOOK):
                setattr(module, _HOOK, module.register_forward_pre_hook(_stay_in_eval))
            module.training = False
    return tuple(names)


def unfreeze(model: nn.Module, patterns: str | Sequence[str] = "*") -> tuple[str, ...]:
    """Undo `freeze`, for everything or for what matches; a module's mode is left to `train()`.

    Returns:
        The names of what is no longer frozen.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    names = matching(model, patterns)
    for name, tensor in _tensors(model):
        if name in names and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)
    for module, own in _with_buffers(model):
        # One that keeps some buffers frozen would change them too.
        if own <= set(names) and hasattr(module, _HOOK):
            getattr(module, _HOOK).remove()
            delattr(module, _HOOK)
    return tuple(names)


def _stay_in_eval(module: nn.Module, inputs: Any) -> None:
    # Not `eval()`, which would reach the modules inside: those may be trained, as a head in a
    # network that holds a buffer itself.
    module.training = False


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _with_buffers(model: nn.Module) -> list[tuple[nn.Module, set[str]]]:
    """Modules that have buffers themselves, with the full names of these."""
    found = []
    for prefix, module in model.named_modules():
        own = [name for name, _ in module.named_buffers(recurse=False)]
        if own:
            found.append((module, {".".join(filter(None, (prefix, name))) for name in own}))
    return found


def _head(model: nn.Module) -> set[str]:
    matcher: dict[str, str] = getattr(model, "group_matcher", dict)()
    if "head" not in matcher:
        raise ConfigError(
            f"{type(model).__name__} does not say what its head is; freeze parts by their names: "
            f"{', '.join(name for name, _ in model.named_children())}."
        )
    return {name for name, _ in _tensors(model) if re.match(matcher["head"], name)}
