"""What an operator keeps for its backward pass: hooks on it, and what stands in for the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_hooks: Any = torch._C._autograd
Size = int | tuple[int, ...]
_T = TypeVar("_T")


def watched(*tensors: Tensor | None) -> bool:
    """Whether a gradient goes to any of them, in reverse mode.

    Derivatives in forward mode keep nothing, and are left to the operators themselves.
    """
    if forward_ad._current_level >= 0 or not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator takes as long as all else here
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def frozen(parameter: Tensor | None) -> bool:
    return parameter is None or not parameter.requires_grad


def stand_in(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, innermost: bool = False
) -> Tensor:
    """A tensor for what is not read.

    On a CPU, memory that nobody touches is none, and its kernels want it in one piece: of one
    element that is expanded they would make a copy. Elsewhere it is that one element.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(1, dtype=dtype, device=device).expand(shape)
    layout = torch.contiguous_format
    if innermost:
        layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=dtype, memory_format=layout)


def stand_in_for(grad: Tensor, shape: torch.Size, innermost: bool = False) -> Tensor:
    """A stand-in beside a gradient, which may stand for several in a `vmap`."""
    if torch._C._functorch.is_batchedtensor(grad):
        return grad.new_empty(1).expand(shape)
    return stand_in(shape, grad.dtype, grad.device, innermost)


def may_hook(x: Tensor) -> bool:
    """Whether hooks on what is kept may do it: much quicker than functions of our own.

    Transforms refuse them, compilers would keep what they return, and autocasting makes copies of
    which they do not know whose they are.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and _hooks._saved_tensors_hooks_is_enabled()
        and not torch._C._is_any_autocast_enabled()
    )


def keeping(
    keep: Callable[[Tensor], Any],
    get: Callable[[Any], Tensor],
    layer: Callable[..., _T],
    *args: Any,
) -> _T:
    """Call an operator, with a say in what it keeps.

    Args:
        keep: what is kept of a tensor: another one, or something else in its place.
        get: from that, what the backward pass is given.
        layer, args: the call.
    """
    outer = _hooks._top_saved_tensors_default_hooks(False)
    pair = (keep, get) if outer is None else _within(outer, keep, get)
    _hooks._push_saved_tensors_default_hooks(*pair)
    try:
        return layer(*args)
    finally:
        _hooks._pop_saved_tensors_default_hooks()


def _within(
    outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]],
    keep: Callable[[Tensor], Any],
    get: Callable[[Any], Tensor],
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Hooks that hand the tensors on to those of `graph_bytes`, of a checkpoint or of a user."""

    def pack(tensor: Tensor) -> Any:
        kept = keep(tensor)
        return (True, outer[0](kept)) if isinstance(kept, Tensor) else (False, kept)

    def unpack(packed: Any) -> Tensor:
        by_outer, kept = packed
        return get(outer[1](kept) if by_outer else kept)

    return pack, unpack


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply`, in the way that is quick where no transform asks for the other."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    return _eager(function).apply(*inputs)


@functools.cache
def _eager(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """A function that sets up its context in `forward`.

    Of one that does so in `setup_context`, each call goes through `inspect.signature`, which takes
    as long as a small layer.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), members)


def lies_innermost(x: Tensor) -> bool:
    """Whether channels are innermost, where it is worth knowing and can be asked."""
    if x.ndim < 4 or torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(x):
        return False
    # Strides say so of a slice of channels too.
    return not x.is_contiguous() and x.stride(1) == 1 and x.stride(-1) >= x.shape[1]


def spread(value: Size, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def without(x: Tensor, weight: Tensor | None, layer: Callable[..., _T], *args: Any) -> _T:
    """A layer that keeps nothing of `x`, or of a view of it, but how it lay."""
    place, version = x.data_ptr(), None if weight is None else weight._version

    def keep(tensor: Tensor) -> Any:
        if tensor.data_ptr() == place != 0:
            return tensor.shape, tensor.dtype, tensor.device, lies_innermost(tensor)
        return tensor

    def get(kept: Any) -> Tensor:
        if not isinstance(kept, Tensor):
            return stand_in(*kept)
        if weight is not None and weight._version != version:
            # Of which torch loses sight behind hooks.
            raise RuntimeError(
                "The weight of a convolution has been modified by an inplace operation between "
                "the forward and the backward pass, which needs it as it was."
            )
        return kept

    return keeping(keep, get, layer, *args)
