"""Who reads what a module returns, and whether he keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from zoo.tuning.memory._kept import (
    frozen,
)
from zoo.tuning.memory.convolutions import CONVOLUTIONS
from zoo.tuning.memory.norms import SavingBatchNorm
from zoo.tuning.memory.pooling import SavingAvgPool, SavingMaxPool

_LINEAR = frozenset((nn.Linear, *CONVOLUTIONS.values()))
"""Keep their input for their weight alone."""
_PASSES_ON = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten)
"""May return their input, or a view of it."""
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def reads_its_input(module: nn.Module) -> bool:
    """Whether the backward pass through a module, as it is now, takes its input."""
    parameters = module._parameters
    if isinstance(module, SavingBatchNorm):
        return module.reads_its_input()
    if type(module) not in _LINEAR and "lora_a" not in parameters:
        return True
    for name, parameter in parameters.items():
        # Of an adapter, the outer matrix takes the product with the inner one.
        if not frozen(parameter) and name not in ("bias", "lora_b"):
            return True
    return False


def _weighted(module: nn.Module) -> list[nn.Module]:
    """The modules in it that have matrices of their own."""
    return [
        one
        for one in module.modules()
        if any(p is not None and p.ndim > 1 for p in one._parameters.values())
    ]


def _following(model: nn.Module, path: str) -> list[nn.Module]:
    """Modules that are defined after one, in the one that both are in."""
    above, _, name = path.rpartition(".")
    children = dict(model.get_submodule(above).named_children())
    return list(children.values())[list(children).index(name) + 1 :]


def _next_reader(modules: list[nn.Module]) -> list[nn.Module] | None:
    """Who in a sequence may keep what comes in; None: what comes in may come out."""
    for module in modules:
        if type(module) is nn.Sequential:
            found = _next_reader(list(module.children()))
            if found is not None:
                return found
        elif isinstance(module, (SavingMaxPool, SavingAvgPool)):
            return []
        elif not isinstance(module, _PASSES_ON):
            return [module] if next(module.children(), None) is None else _weighted(module)
    return None


def readers_of(model: nn.Module, path: str) -> tuple[nn.Module, ...] | None:
    """Who may keep what a module returns; None: it is not known.

    Within a sequence it is what comes next. Elsewhere the order of calls is not written down: it
    may be anything with a weight in the same block or the next one, or a norm that is defined next.
    """
    above = path.rpartition(".")[0]
    while type(model.get_submodule(above)) is nn.Sequential:
        found = _next_reader(_following(model, path))
        if found is not None:
            return tuple(found)
        if not above:
            return None
        path, above = above, above.rpartition(".")[0]
    following = _following(model, path)
    norms = [module for module in following[:1] if isinstance(module, _NORMS)]
    return (*norms, *_weighted(model.get_submodule(above)), *_next_block(model, above))


def _next_block(model: nn.Module, path: str) -> list[nn.Module]:
    """What has a weight in the first block with any that is defined after one."""
    while path:
        for module in _blocks(_following(model, path)):
            if found := _weighted(module):
                return found
        path = path.rpartition(".")[0]
    return []


def _blocks(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules, with sequences and lists taken apart."""
    for module in modules:
        if type(module) in (nn.Sequential, nn.ModuleList):
            yield from _blocks(module.children())
        else:
            yield module
