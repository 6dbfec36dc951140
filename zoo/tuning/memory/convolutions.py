"""Convolutions that keep their input for their weight alone, and the weight for the input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.continuous_depth.blocks import TimeVaryingConv2d
from zoo.families.continuous_depth.image_networks import TimeChannelConv2d
from zoo.tuning.memory._kept import (
    Size,
    apply,
    frozen,
    lies_innermost,
    may_hook,
    spread,
    stand_in_for,
    watched,
    without,
)

# An overload by name, the search for which takes longer than a small layer.
_convolution_backward = torch.ops.aten.convolution_backward.default


class _Convolution(torch.autograd.Function):
    """A convolution that keeps the input for the weight alone, and the weight for the input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...], innermost: bool
    ) -> Tensor:
        return torch.convolution(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, ctx.options, ctx.innermost = inputs
        # The weight has no gradient where `convolution` looks, but may have one in a transform
        # around a `vmap`, which hides it there.
        for_x, for_weight = ctx.needs_input_grad[:2]
        ctx.shapes = x.shape, weight.shape
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        in_x = in_weight = in_bias = None
        if for_x or for_weight:
            x, weight = ctx.saved_tensors
            in_x, in_weight, _ = _convolution_backward(
                grad,
                stand_in_for(grad, ctx.shapes[0], ctx.innermost) if x is None else x,
                stand_in_for(grad, ctx.shapes[1]) if weight is None else weight,
                None,
                *ctx.options,
                [for_x, for_weight, False],
            )
        if for_bias:
            in_bias = grad.sum([0, *range(2, grad.ndim)])
        return in_x, in_weight, in_bias, None, None


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocasting does to the arguments of a convolution; it does not see ours."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv1d`, `F.conv2d` or `F.conv3d`, whichever the weight is for, without needless memory.

    The input is kept for the backward pass only where the weight needs a gradient.

    Args:
        x: B x C x S, or C x S.
        weight: out x C / groups x kernel.
        bias: one value per output channel.
        stride, padding, dilation, groups: as for `F.conv2d`.

    Returns:
        B x out x S', or out x S'.
    """
    dimensions = weight.ndim - 2
    plain = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    if weight.requires_grad or not watched(x, bias) or not x.is_floating_point():
        y: Tensor = plain(x, weight, bias, stride, padding, dilation, groups)
        return y
    if isinstance(padding, str):
        dilation = spread(dilation, dimensions)
        x, padding = _explicit(x, weight, padding, dilation)
    if may_hook(x):
        return without(x, weight, plain, x, weight, bias, stride, padding, dilation, groups)
    options = (
        spread(stride, dimensions),
        spread(padding, dimensions),
        spread(dilation, dimensions),
        False,
        (0,) * dimensions,
        groups,
    )
    return _convolve(x, weight, bias, options)


def _explicit(
    x: Tensor, weight: Tensor, padding: str, dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Padding by name as numbers; what it has more on the right is added to the input."""
    if padding == "valid":
        return x, (0,) * len(dilation)
    both = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in both):
        x = F.pad(x, [pad for total in reversed(both) for pad in (0, total % 2)])
    return x, tuple(total // 2 for total in both)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    x, weight, bias = _cast(x, weight, bias)
    single = x.ndim == weight.ndim - 1
    batch = x.unsqueeze(0) if single else x
    y: Tensor = apply(_Convolution, batch, weight, bias, options, lies_innermost(batch))
    return y.squeeze(0) if single else y


class _SavingConv(nn.modules.conv._ConvNd):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return convolution(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class SavingConv1d(_SavingConv, nn.Conv1d):
    """`nn.Conv1d` that keeps what the backward pass needs."""


class SavingConv2d(_SavingConv, nn.Conv2d):
    """`nn.Conv2d` that keeps what the backward pass needs."""


class SavingConv3d(_SavingConv, nn.Conv3d):
    """`nn.Conv3d` that keeps what the backward pass needs."""


class _SavingConvTranspose(nn.modules.conv._ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not watched(input, self.bias) or not frozen(self.weight):
            y: Tensor = super().forward(input, output_size)
            return y
        if may_hook(input):
            plain: Callable[..., Tensor] = super().forward
            return without(input, self.weight, plain, input, output_size)
        dimensions = self.weight.ndim - 2
        # Annotated as lists, called with tuples by torch itself.
        infer: Any = self._output_padding
        output_padding = infer(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            dimensions,
            self.dilation,
        )
        options = (
            self.stride,
            self.padding,
            self.dilation,
            True,
            tuple(output_padding),
            self.groups,
        )
        return _convolve(input, self.weight, self.bias, options)


class SavingConvTranspose1d(_SavingConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` that keeps what the backward pass needs."""


class SavingConvTranspose2d(_SavingConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` that keeps what the backward pass needs."""


class SavingConvTranspose3d(_SavingConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` that keeps what the backward pass needs."""


class SavingTimeVaryingConv2d(TimeVaryingConv2d):
    """`TimeVaryingConv2d` that keeps what the backward pass needs."""

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolution(x, weight, bias, padding=self.padding, groups=self.groups)


class SavingTimeChannelConv2d(TimeChannelConv2d):
    """`TimeChannelConv2d` that keeps what the backward pass needs."""

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolution(x, weight, bias, padding=1)


CONVOLUTIONS: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        nn.Conv1d: SavingConv1d,
        nn.Conv2d: SavingConv2d,
        nn.Conv3d: SavingConv3d,
        nn.ConvTranspose1d: SavingConvTranspose1d,
        nn.ConvTranspose2d: SavingConvTranspose2d,
        nn.ConvTranspose3d: SavingConvTranspose3d,
        TimeVaryingConv2d: SavingTimeVaryingConv2d,
        TimeChannelConv2d: SavingTimeChannelConv2d,
    }
)
"""Exact class of a module -> what it becomes; a subclass may compute something else."""
