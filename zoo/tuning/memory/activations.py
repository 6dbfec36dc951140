"""ReLUs and their like that keep a byte per element, where nobody keeps their output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.tuning.memory._kept import (
    apply,
    frozen,
    keeping,
    may_hook,
    watched,
)
from zoo.tuning.memory.readers import reads_its_input

# Overloads by name, the search for which takes longer than a small layer.
_threshold_backward = torch.ops.aten.threshold_backward.default
_aten = torch.ops.aten


def _open(y: Tensor) -> Tensor:
    # What is not zero is True: several times faster than a comparison.
    return y.to(torch.bool)


def _as_numbers(open: Tensor, dtype: torch.dtype) -> Tensor:
    # By way of int8, from which vectorised code casts, as it does not from bool.
    return open.view(torch.int8).to(dtype)


def _where_open(grad: Tensor | None, open: Tensor) -> Tensor | None:
    if grad is None:
        return None
    in_x: Tensor = _threshold_backward(grad, _as_numbers(open, grad.dtype), 0)
    return in_x


class _Clamp(torch.autograd.Function):
    """Clamps, and keeps a byte per element that tells where the derivative is 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float, high: float, inplace: bool) -> tuple[Tensor, Tensor]:
        if (low, high) == (0.0, math.inf):
            y = torch.relu_(x) if inplace else torch.relu(x)
            return y, _open(y)
        y = F.hardtanh(x, low, high, inplace)
        return y, _open(y - low).logical_and(_open(high - y))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        if inputs[3]:
            ctx.mark_dirty(inputs[0])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _where_open(grads[0], ctx.saved_tensors[0]), None, None, None


class _Leak(torch.autograd.Function):
    """A leaky ReLU that keeps a byte per element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slope: float, inplace: bool) -> tuple[Tensor, Tensor]:
        open = torch.relu(x).to(torch.bool)
        return F.leaky_relu(x, slope, inplace), open

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.slope = inputs[1]
        if inputs[2]:
            ctx.mark_dirty(inputs[0])
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        above = _as_numbers(ctx.saved_tensors[0], grads[0].dtype)
        return _aten.leaky_relu_backward(grads[0], above, ctx.slope, False), None, None


class _LeakPerChannel(torch.autograd.Function):
    """A parametric ReLU that keeps a byte per element, or the input where the slope is trained."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        return torch._prelu_kernel(x, slope), torch.relu(x).to(torch.bool)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        # See `_Convolution.setup_context`.
        ctx.save_for_backward(inputs[0] if ctx.needs_input_grad[1] else output[1], inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        grad = grads[0]
        kept, slope = ctx.saved_tensors
        in_slope = None
        if ctx.needs_input_grad[1]:
            in_slope = (grad * kept.clamp(max=0)).sum_to_size(slope.shape)
            kept = kept > 0
        above = _as_numbers(kept, grad.dtype)
        # One of the two is zero everywhere, so that the sum is exact.
        steep = _threshold_backward(grad, above, 0)
        flat = _threshold_backward(grad, 1 - above, 0)
        return steep + slope * flat, in_slope


class SavingActivation(nn.Module):
    """Base of those below."""

    _readers: tuple[nn.Module, ...] | None
    """Modules that may read the output; None: others than modules may keep it."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the layer takes no other layers along; `Links` of what holds all of them gives
        it those of the copy."""
        return {**vars(self), "_readers": None}

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not watched(input) or not input.is_floating_point() or self._shares_its_output():
            y: Tensor = super().forward(input)
            return y
        if type(self) is SavingReLU and may_hook(input):
            dtype = input.dtype
            plain: Callable[[Tensor], Tensor] = super().forward
            return keeping(_open, lambda kept: _as_numbers(kept, dtype), plain, input)
        if not getattr(self, "inplace", False):
            return self._masked(input, False)
        if _is_plain(input):
            return self._masked(input, True)
        return input.copy_(self._masked(input, False))

    def _shares_its_output(self) -> bool:
        """Whether somebody keeps the output anyway, so that a mask would come on top of it."""
        return self._readers is None or any(map(reads_its_input, self._readers))


class Links:
    """What activations know of their readers, where a module that holds both keeps it: a copy of
    that module has links within itself."""

    def __init__(self) -> None:
        self.readers: list[tuple[SavingActivation, tuple[nn.Module, ...]]] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for activation, readers in self.readers:
            activation._readers = readers


LINKS = "_saving_links"
"""Attribute of a module that has `Links`."""


def _is_plain(x: Tensor) -> bool:
    """Whether a function of our own may overwrite a tensor: not a view, nor within a transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or x._is_view()
        or x.is_leaf
    )


class SavingReLU(SavingActivation, nn.ReLU):
    """`nn.ReLU` that keeps a byte per element, where nobody keeps its output."""

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = apply(_Clamp, x, 0.0, math.inf, inplace)[0]
        return y


class SavingHardtanh(SavingActivation, nn.Hardtanh):
    """`nn.Hardtanh` that keeps a byte per element, where nobody keeps its output."""

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = apply(_Clamp, x, float(self.min_val), float(self.max_val), inplace)[0]
        return y


class SavingReLU6(SavingHardtanh, nn.ReLU6):
    """`nn.ReLU6` that keeps a byte per element, where nobody keeps its output."""


class SavingLeakyReLU(SavingActivation, nn.LeakyReLU):
    """`nn.LeakyReLU` that keeps a byte per element, where nobody keeps its output."""

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = apply(_Leak, x, self.negative_slope, inplace)[0]
        return y


class SavingPReLU(SavingActivation, nn.PReLU):
    """`nn.PReLU` that keeps a byte per element, where frozen and nobody keeps its output."""

    def _shares_its_output(self) -> bool:
        return not frozen(self.weight) or super()._shares_its_output()

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        if x.ndim < 2 or torch.is_autocast_enabled(x.device.type):
            return F.prelu(x, self.weight)
        y: Tensor = apply(_LeakPerChannel, x, self.weight.view(-1, *[1] * (x.ndim - 2)))[0]
        return y


ACTIVATIONS: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        nn.ReLU: SavingReLU,
        nn.ReLU6: SavingReLU6,
        nn.Hardtanh: SavingHardtanh,
        nn.LeakyReLU: SavingLeakyReLU,
        nn.PReLU: SavingPReLU,
    }
)
"""As in `CONVOLUTIONS`."""
