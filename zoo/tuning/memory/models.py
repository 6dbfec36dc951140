"""Whole networks: saving layers put in and taken out, bytes counted, blocks recomputed."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo.tuning.memory.activations import ACTIVATIONS, LINKS, Links, SavingActivation
from zoo.tuning.memory.convolutions import CONVOLUTIONS
from zoo.tuning.memory.norms import NORMS
from zoo.tuning.memory.pooling import POOLING
from zoo.tuning.memory.readers import readers_of

_SAVING: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {**CONVOLUTIONS, **NORMS, **ACTIVATIONS, **POOLING}
)
_PLAIN = MappingProxyType({saving: plain for plain, saving in _SAVING.items()})


@dataclasses.dataclass(frozen=True)
class Report:
    """What `save_memory` did.

    Attributes:
        model: the network.
        converted: path of each module that saves memory now -> name of its class. A module that
            occurs under several paths is listed under each.
    """

    model: nn.Module
    converted: dict[str, str]

    def undo(self) -> None:
        """Make the modules what they were."""
        restore_memory(self.model)

    def __str__(self) -> str:
        counts = Counter(self.converted.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        return f"{len(self.converted)} modules save memory ({kinds or 'none'})"


def save_memory(model: nn.Module) -> Report:
    """Let the layers of a network keep no more than the backward pass needs, in place.

    Outputs and gradients stay what they are. Convolutions and transposed ones, batch
    normalisation, ReLU, ReLU6, Hardtanh, leaky and parametric ReLU, maximum and average pooling
    are given another class; parameters, their names, buffers, hooks and modes are not touched, and
    an optimizer goes on with what it holds. What is kept is decided in each forward pass from what
    is trained then, so that freezing and unfreezing may come before or after. A frozen batch
    normalisation keeps nothing in eval mode only; in training mode its gradient needs its input.

    ReLUs and their like keep a byte per element, in place of their output, unless a layer that
    reads that output has to keep it anyway; which layers those may be is read from the order of
    modules. After modules have been replaced, call it again.

    Subclasses are left alone, as are those that `torch.nn.utils.parametrize` makes, and what is
    called as a function, `F.relu` as well as `F.conv2d`, cannot be seen: it keeps what it keeps.
    Linear layers, embeddings and softmax keep no more than is needed as they are; layer and group
    normalisation and smooth activations need their input.

    Args:
        model: a network, or a module with networks in it.

    Returns:
        What was converted; its `undo` makes it undone.
    """
    converted: dict[str, str] = {}
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        vars(module).pop(LINKS, None)
        module.__class__ = _SAVING.get(type(module), type(module))
        if type(module) in _PLAIN:
            converted[path] = _PLAIN[type(module)].__name__
            paths.setdefault(module, []).append(path)
    first = {module: path for path, module in model.named_modules()}
    for module, places in paths.items():
        if isinstance(module, SavingActivation):
            found = [readers_of(model, place) if place else None for place in places]
            known = [readers for readers in found if readers is not None]
            module._readers = sum(known, ()) if len(known) == len(found) else None
            if module._readers is not None:
                holder = _common([first[module], *(first[reader] for reader in module._readers)])
                links = vars(model.get_submodule(holder)).setdefault(LINKS, Links())
                links.readers.append((module, module._readers))
    return Report(model, converted)


def _common(paths: Sequence[str]) -> str:
    """Path of the innermost module that holds all of these, and is none of them."""
    parents = [path.split(".")[:-1] for path in paths]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    return ".".join(parts[0] for parts in shared)


def restore_memory(model: nn.Module) -> None:
    """Undo `save_memory`, in place; also where a copy or a part of the network is given."""
    for module in model.modules():
        vars(module).pop(LINKS, None)
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
            vars(module).pop("_readers", None)


def graph_bytes(model: nn.Module, batch: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass, by this measure the same each time.

    Parameters, buffers and the batch itself are not counted, and what several operations keep is
    counted once. The pass is run in the network's present mode, and leaves no trace: buffers and
    the random state are put back. What functions keep as attributes of their context instead of
    with `save_for_backward` is invisible; none of this package does.

    Args:
        model: the network; what is frozen in it, and whether the batch has a gradient, counts.
        batch: what the network takes: one argument, a tuple of them, or a dictionary by name.
    """
    positional: tuple[Any, ...] = batch if isinstance(batch, tuple) else (batch,)
    named: dict[str, Any] = {}
    if isinstance(batch, dict):
        positional, named = (), batch
    buffers = list(model.buffers())
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *buffers, *_tensors((positional, named)))
    }
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    before = [buffer.clone() for buffer in buffers]
    devices = {buffer.device for buffer in buffers} | {p.device for p in model.parameters()}
    cards = [device for device in devices if device.type == "cuda"]
    try:
        with (
            torch.random.fork_rng(devices=cards),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(*positional, **named)
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
    return sum(kept.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def checkpoint_blocks(model: nn.Module, on: bool = True) -> int:
    """Keep the input of each block alone, and compute the rest again in the backward pass.

    It takes one more forward pass per step. For transformers, whose linear layers have nothing to
    spare; ODE blocks have `gradient_mode = "checkpoint"` for the same.

    Args:
        model: a network with an attribute `recompute_blocks`, as `CachedTransformerLM`, or a
            module with such networks in it.
        on: False keeps everything again.

    Returns:
        The number of networks.

    Raises:
        ValueError: there is none.
    """
    networks = [module for module in model.modules() if hasattr(module, "recompute_blocks")]
    if not networks:
        raise ValueError(
            f"{type(model).__name__} has no blocks that can be computed again; a network says so "
            "by an attribute recompute_blocks"
        )
    for network in networks:
        cast(Any, network).recompute_blocks = on
    return len(networks)
