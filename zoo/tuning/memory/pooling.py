"""Pooling that keeps indices, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from zoo.tuning.memory._kept import (
    apply,
    lies_innermost,
    may_hook,
    spread,
    stand_in_for,
    watched,
    without,
)

_aten = torch.ops.aten


class _MaxPool(torch.autograd.Function):
    """Maxima over windows of two or three dimensions; keeps where they were."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, options: tuple[Any, ...], innermost: bool) -> tuple[Tensor, Tensor]:
        three = len(options[0]) == 3
        pool = _aten.max_pool3d_with_indices if three else _aten.max_pool2d_with_indices
        y, indices = pool(x, *options)
        return y, indices

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.options, ctx.innermost = inputs
        ctx.shape = x.shape
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        back = (
            _aten.max_pool3d_with_indices_backward
            if len(ctx.options[0]) == 3
            else _aten.max_pool2d_with_indices_backward
        )
        x = stand_in_for(grads[0], ctx.shape, ctx.innermost)
        return back(grads[0], x, *ctx.options, indices), None, None


class _AvgPool(torch.autograd.Function):
    """Averages over windows of two or three dimensions; keeps nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, options: tuple[Any, ...], innermost: bool) -> Tensor:
        y: Tensor = (_aten.avg_pool3d if len(options[0]) == 3 else _aten.avg_pool2d)(x, *options)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.options, ctx.innermost = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        three = len(ctx.options[0]) == 3
        back = _aten.avg_pool3d_backward if three else _aten.avg_pool2d_backward
        x = stand_in_for(grads[0], ctx.shape, ctx.innermost)
        return back(grads[0], x, *ctx.options), None, None


def _windows(value: Any, dimensions: int, alone: int) -> tuple[int, ...]:
    """One number per dimension; a line is a plane of height 1, with `alone` for that dimension."""
    each = spread(value, dimensions)
    return (alone, *each) if dimensions == 1 else each


class SavingMaxPool(nn.modules.pooling._MaxPoolNd):
    """Base of those below."""

    _dimensions: int

    def forward(self, input: Tensor) -> Any:
        if not watched(input):
            return super().forward(input)
        if may_hook(input):
            return without(input, None, super().forward, input)
        line = self._dimensions == 1
        options = (
            *_pooled_windows(self),
            _windows(self.dilation, self._dimensions, 1),
            self.ceil_mode,
        )
        x = input.unsqueeze(-2) if line else input
        y, indices = apply(_MaxPool, x, options, lies_innermost(x))
        if line:
            y, indices = y.squeeze(-2), indices.squeeze(-2)
        return (y, indices) if self.return_indices else y


class SavingMaxPool1d(SavingMaxPool, nn.MaxPool1d):
    """`nn.MaxPool1d` that keeps indices alone."""

    _dimensions = 1


class SavingMaxPool2d(SavingMaxPool, nn.MaxPool2d):
    """`nn.MaxPool2d` that keeps indices alone."""

    _dimensions = 2


class SavingMaxPool3d(SavingMaxPool, nn.MaxPool3d):
    """`nn.MaxPool3d` that keeps indices alone."""

    _dimensions = 3


def _pooled_windows(
    pool: SavingMaxPool | SavingAvgPool,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Size, stride and padding of a pooling's windows, as the operators of torch take them."""
    dimensions = pool._dimensions
    return (
        _windows(pool.kernel_size, dimensions, 1),
        _windows(pool.stride, dimensions, 1),
        _windows(pool.padding, dimensions, 0),
    )


class SavingAvgPool(nn.modules.pooling._AvgPoolNd):
    """Base of those below."""

    _dimensions: int
    kernel_size: Any
    stride: Any
    padding: Any
    ceil_mode: bool
    count_include_pad: bool

    def forward(self, input: Tensor) -> Tensor:
        if not watched(input):
            y: Tensor = super().forward(input)
            return y
        if may_hook(input):
            plain: Callable[[Tensor], Tensor] = super().forward
            return without(input, None, plain, input)
        line = self._dimensions == 1
        options = (
            *_pooled_windows(self),
            self.ceil_mode,
            self.count_include_pad,
            getattr(self, "divisor_override", None),
        )
        x = input.unsqueeze(-2) if line else input
        y = apply(_AvgPool, x, options, lies_innermost(x))
        return y.squeeze(-2) if line else y


class SavingAvgPool1d(SavingAvgPool, nn.AvgPool1d):
    """`nn.AvgPool1d` that keeps nothing."""

    _dimensions = 1


class SavingAvgPool2d(SavingAvgPool, nn.AvgPool2d):
    """`nn.AvgPool2d` that keeps nothing."""

    _dimensions = 2


class SavingAvgPool3d(SavingAvgPool, nn.AvgPool3d):
    """`nn.AvgPool3d` that keeps nothing."""

    _dimensions = 3


POOLING: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        nn.MaxPool1d: SavingMaxPool1d,
        nn.MaxPool2d: SavingMaxPool2d,
        nn.MaxPool3d: SavingMaxPool3d,
        nn.AvgPool1d: SavingAvgPool1d,
        nn.AvgPool2d: SavingAvgPool2d,
        nn.AvgPool3d: SavingAvgPool3d,
    }
)
"""As in `CONVOLUTIONS`."""
