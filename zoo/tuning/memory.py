"""Training with only the memory that the backward pass needs.

For a layer that is linear in its parameters, the gradient of the input takes the weight, and that
of the weight takes the input. PyTorch keeps both, whichever of them is asked for, in convolutions
and in batch normalisation; it keeps the input of pooling, of which only the shape is read, and a
whole float per element of a ReLU, of which one bit is read. `save_memory` makes these layers keep
what is used, which changes neither outputs nor gradients. Linear layers need no such help.

It is done by hooks on what the operators of torch keep, which run these as they are. Transforms of
functions, compilers and autocasting do not go with hooks: there, functions of our own do it.

Sources: Bhatia, Dangel, "Lowering PyTorch's Memory Consumption for Selective Differentiation"
(arXiv:2404.12406); Chen et al., "Training Deep Nets with Sublinear Memory Cost"
(arXiv:1604.06174) for checkpoints. Leaky and bounded ReLUs, average pooling, double backward and
the transforms of `torch.func` are added here.

Shape notation: B examples, C channels, S spatial dimensions (one to three of them).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from zoo.families.continuous_depth.blocks import TimeVaryingConv2d
from zoo.families.continuous_depth.image_networks import TimeChannelConv2d

__all__ = [
    "Report",
    "checkpoint_blocks",
    "convolution",
    "graph_bytes",
    "restore_memory",
    "save_memory",
]

# Overloads by name, the search for which takes longer than a small layer.
_convolution_backward = torch.ops.aten.convolution_backward.default
_threshold_backward = torch.ops.aten.threshold_backward.default
_aten = torch.ops.aten
_hooks: Any = torch._C._autograd
_Size = int | tuple[int, ...]
_T = TypeVar("_T")


def _watched(*tensors: Tensor | None) -> bool:
    """Whether a gradient goes to any of them, in reverse mode.

    Derivatives in forward mode keep nothing, and are left to the operators themselves.
    """
    if forward_ad._current_level >= 0 or not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator takes as long as all else here
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _frozen(parameter: Tensor | None) -> bool:
    return parameter is None or not parameter.requires_grad


def _stand_in(
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


def _for(grad: Tensor, shape: torch.Size, innermost: bool = False) -> Tensor:
    """A stand-in beside a gradient, which may stand for several in a `vmap`."""
    if torch._C._functorch.is_batchedtensor(grad):
        return grad.new_empty(1).expand(shape)
    return _stand_in(shape, grad.dtype, grad.device, innermost)


def _may_hook(x: Tensor) -> bool:
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


def _keeping(
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


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
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


# --- convolution ---------------------------------------------------------------------------------


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
                _for(grad, ctx.shapes[0], ctx.innermost) if x is None else x,
                _for(grad, ctx.shapes[1]) if weight is None else weight,
                None,
                *ctx.options,
                [for_x, for_weight, False],
            )
        if for_bias:
            in_bias = grad.sum([0, *range(2, grad.ndim)])
        return in_x, in_weight, in_bias, None, None


def _lies_innermost(x: Tensor) -> bool:
    """Whether channels are innermost, where it is worth knowing and can be asked."""
    if x.ndim < 4 or torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(x):
        return False
    # Strides say so of a slice of channels too.
    return not x.is_contiguous() and x.stride(1) == 1 and x.stride(-1) >= x.shape[1]


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocasting does to the arguments of a convolution; it does not see ours."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _spread(value: _Size, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Size = 1,
    padding: _Size | str = 0,
    dilation: _Size = 1,
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
    if weight.requires_grad or not _watched(x, bias) or not x.is_floating_point():
        y: Tensor = plain(x, weight, bias, stride, padding, dilation, groups)
        return y
    if isinstance(padding, str):
        dilation = _spread(dilation, dimensions)
        x, padding = _explicit(x, weight, padding, dilation)
    if _may_hook(x):
        return _without(x, weight, plain, x, weight, bias, stride, padding, dilation, groups)
    options = (
        _spread(stride, dimensions),
        _spread(padding, dimensions),
        _spread(dilation, dimensions),
        False,
        (0,) * dimensions,
        groups,
    )
    return _convolve(x, weight, bias, options)


def _without(x: Tensor, weight: Tensor | None, layer: Callable[..., _T], *args: Any) -> _T:
    """A layer that keeps nothing of `x`, or of a view of it, but how it lay."""
    place, version = x.data_ptr(), None if weight is None else weight._version

    def keep(tensor: Tensor) -> Any:
        if tensor.data_ptr() == place != 0:
            return tensor.shape, tensor.dtype, tensor.device, _lies_innermost(tensor)
        return tensor

    def get(kept: Any) -> Tensor:
        if not isinstance(kept, Tensor):
            return _stand_in(*kept)
        if weight is not None and weight._version != version:
            # Of which torch loses sight behind hooks.
            raise RuntimeError(
                "The weight of a convolution has been modified by an inplace operation between "
                "the forward and the backward pass, which needs it as it was."
            )
        return kept

    return _keeping(keep, get, layer, *args)


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
    y: Tensor = _apply(_Convolution, batch, weight, bias, options, _lies_innermost(batch))
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
        if not _watched(input, self.bias) or not _frozen(self.weight):
            y: Tensor = super().forward(input, output_size)
            return y
        if _may_hook(input):
            plain: Callable[..., Tensor] = super().forward
            return _without(input, self.weight, plain, input, output_size)
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


# --- batch normalisation -------------------------------------------------------------------------


class _SavingBatchNorm(nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if _reads_its_input(self) or not _watched(input, self.bias):
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return self._folded(input)

    def _folded(self, x: Tensor) -> Tensor:
        """Scale and shift: operations of which autograd keeps C numbers.

        On small images it is the number of operations that counts.
        """
        # Past `nn.Module.__getattr__`, which takes as long as one of them.
        mean, variance = self._buffers["running_mean"], self._buffers["running_var"]
        weight: Tensor | None = self._parameters["weight"]
        bias: Tensor | None = self._parameters["bias"]
        assert mean is not None
        assert variance is not None
        narrow = x.dtype
        wide = torch.promote_types(narrow, torch.float32)
        if not narrow == mean.dtype == wide:
            x, mean, variance = x.to(wide), mean.to(wide), variance.to(wide)
            weight = None if weight is None else weight.to(wide)
            bias = None if bias is None else bias.to(wide)
        scale = torch.rsqrt(variance + self.eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        shape = (-1, *[1] * (x.ndim - 2))
        shift, scale = shift.view(shape), scale.view(shape)
        if x.is_contiguous() and not torch._C._are_functorch_transforms_active():
            # Of two numbers per plane, kernels vectorise with one at a time.
            y = (x * scale).add_(shift)
        else:
            y = torch.addcmul(shift, x, scale)
        return y if narrow == wide else y.to(narrow)


class SavingBatchNorm1d(_SavingBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d` that keeps what the backward pass needs."""


class SavingBatchNorm2d(_SavingBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that keeps what the backward pass needs."""


class SavingBatchNorm3d(_SavingBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` that keeps what the backward pass needs."""


# --- activations ---------------------------------------------------------------------------------


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


class _SavingActivation(nn.Module):
    _readers: tuple[nn.Module, ...] | None
    """Modules that may read the output; None: others than modules may keep it."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the layer takes no other layers along; `_Links` of what holds all of them gives
        it those of the copy."""
        return {**vars(self), "_readers": None}

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not _watched(input) or not input.is_floating_point() or self._shares_its_output():
            y: Tensor = super().forward(input)
            return y
        if type(self) is SavingReLU and _may_hook(input):
            dtype = input.dtype
            plain: Callable[[Tensor], Tensor] = super().forward
            return _keeping(_open, lambda kept: _as_numbers(kept, dtype), plain, input)
        if not getattr(self, "inplace", False):
            return self._masked(input, False)
        if _is_plain(input):
            return self._masked(input, True)
        return input.copy_(self._masked(input, False))

    def _shares_its_output(self) -> bool:
        """Whether somebody keeps the output anyway, so that a mask would come on top of it."""
        return self._readers is None or any(map(_reads_its_input, self._readers))


class _Links:
    """What activations know of their readers, where a module that holds both keeps it: a copy of
    that module has links within itself."""

    def __init__(self) -> None:
        self.readers: list[tuple[_SavingActivation, tuple[nn.Module, ...]]] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for activation, readers in self.readers:
            activation._readers = readers


_LINKS = "_saving_links"
"""Attribute of a module that has `_Links`."""


def _is_plain(x: Tensor) -> bool:
    """Whether a function of our own may overwrite a tensor: not a view, nor within a transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or x._is_view()
        or x.is_leaf
    )


class SavingReLU(_SavingActivation, nn.ReLU):
    """`nn.ReLU` that keeps a byte per element, where nobody keeps its output."""

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = _apply(_Clamp, x, 0.0, math.inf, inplace)[0]
        return y


class SavingHardtanh(_SavingActivation, nn.Hardtanh):
    """`nn.Hardtanh` that keeps a byte per element, where nobody keeps its output."""

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = _apply(_Clamp, x, float(self.min_val), float(self.max_val), inplace)[0]
        return y


class SavingReLU6(SavingHardtanh, nn.ReLU6):
    """`nn.ReLU6` that keeps a byte per element, where nobody keeps its output."""


class SavingLeakyReLU(_SavingActivation, nn.LeakyReLU):
    """`nn.LeakyReLU` that keeps a byte per element, where nobody keeps its output."""

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = _apply(_Leak, x, self.negative_slope, inplace)[0]
        return y


class SavingPReLU(_SavingActivation, nn.PReLU):
    """`nn.PReLU` that keeps a byte per element, where frozen and nobody keeps its output."""

    def _shares_its_output(self) -> bool:
        return not _frozen(self.weight) or super()._shares_its_output()

    def _masked(self, x: Tensor, inplace: bool) -> Tensor:
        if x.ndim < 2 or torch.is_autocast_enabled(x.device.type):
            return F.prelu(x, self.weight)
        y: Tensor = _apply(_LeakPerChannel, x, self.weight.view(-1, *[1] * (x.ndim - 2)))[0]
        return y


# --- pooling -------------------------------------------------------------------------------------


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
        x = _for(grads[0], ctx.shape, ctx.innermost)
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
        x = _for(grads[0], ctx.shape, ctx.innermost)
        return back(grads[0], x, *ctx.options), None, None


def _windows(value: Any, dimensions: int, alone: int) -> tuple[int, ...]:
    """One number per dimension; a line is a plane of height 1, with `alone` for that dimension."""
    spread = _spread(value, dimensions)
    return (alone, *spread) if dimensions == 1 else spread


class _SavingMaxPool(nn.modules.pooling._MaxPoolNd):
    _dimensions: int

    def forward(self, input: Tensor) -> Any:
        if not _watched(input):
            return super().forward(input)
        if _may_hook(input):
            return _without(input, None, super().forward, input)
        line = self._dimensions == 1
        options = (
            *_pooled_windows(self),
            _windows(self.dilation, self._dimensions, 1),
            self.ceil_mode,
        )
        x = input.unsqueeze(-2) if line else input
        y, indices = _apply(_MaxPool, x, options, _lies_innermost(x))
        if line:
            y, indices = y.squeeze(-2), indices.squeeze(-2)
        return (y, indices) if self.return_indices else y


class SavingMaxPool1d(_SavingMaxPool, nn.MaxPool1d):
    """`nn.MaxPool1d` that keeps indices alone."""

    _dimensions = 1


class SavingMaxPool2d(_SavingMaxPool, nn.MaxPool2d):
    """`nn.MaxPool2d` that keeps indices alone."""

    _dimensions = 2


class SavingMaxPool3d(_SavingMaxPool, nn.MaxPool3d):
    """`nn.MaxPool3d` that keeps indices alone."""

    _dimensions = 3


def _pooled_windows(
    pool: _SavingMaxPool | _SavingAvgPool,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Size, stride and padding of a pooling's windows, as the operators of torch take them."""
    dimensions = pool._dimensions
    return (
        _windows(pool.kernel_size, dimensions, 1),
        _windows(pool.stride, dimensions, 1),
        _windows(pool.padding, dimensions, 0),
    )


class _SavingAvgPool(nn.modules.pooling._AvgPoolNd):
    _dimensions: int
    kernel_size: Any
    stride: Any
    padding: Any
    ceil_mode: bool
    count_include_pad: bool

    def forward(self, input: Tensor) -> Tensor:
        if not _watched(input):
            y: Tensor = super().forward(input)
            return y
        if _may_hook(input):
            plain: Callable[[Tensor], Tensor] = super().forward
            return _without(input, None, plain, input)
        line = self._dimensions == 1
        options = (
            *_pooled_windows(self),
            self.ceil_mode,
            self.count_include_pad,
            getattr(self, "divisor_override", None),
        )
        x = input.unsqueeze(-2) if line else input
        y = _apply(_AvgPool, x, options, _lies_innermost(x))
        return y.squeeze(-2) if line else y


class SavingAvgPool1d(_SavingAvgPool, nn.AvgPool1d):
    """`nn.AvgPool1d` that keeps nothing."""

    _dimensions = 1


class SavingAvgPool2d(_SavingAvgPool, nn.AvgPool2d):
    """`nn.AvgPool2d` that keeps nothing."""

    _dimensions = 2


class SavingAvgPool3d(_SavingAvgPool, nn.AvgPool3d):
    """`nn.AvgPool3d` that keeps nothing."""

    _dimensions = 3


# --- which modules, and who reads what they return -----------------------------------------------

_SAVING: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        nn.Conv1d: SavingConv1d,
        nn.Conv2d: SavingConv2d,
        nn.Conv3d: SavingConv3d,
        nn.ConvTranspose1d: SavingConvTranspose1d,
        nn.ConvTranspose2d: SavingConvTranspose2d,
        nn.ConvTranspose3d: SavingConvTranspose3d,
        TimeVaryingConv2d: SavingTimeVaryingConv2d,
        TimeChannelConv2d: SavingTimeChannelConv2d,
        nn.BatchNorm1d: SavingBatchNorm1d,
        nn.BatchNorm2d: SavingBatchNorm2d,
        nn.BatchNorm3d: SavingBatchNorm3d,
        nn.ReLU: SavingReLU,
        nn.ReLU6: SavingReLU6,
        nn.Hardtanh: SavingHardtanh,
        nn.LeakyReLU: SavingLeakyReLU,
        nn.PReLU: SavingPReLU,
        nn.MaxPool1d: SavingMaxPool1d,
        nn.MaxPool2d: SavingMaxPool2d,
        nn.MaxPool3d: SavingMaxPool3d,
        nn.AvgPool1d: SavingAvgPool1d,
        nn.AvgPool2d: SavingAvgPool2d,
        nn.AvgPool3d: SavingAvgPool3d,
    }
)
"""Exact class of a module -> what it becomes; a subclass may compute something else."""
_PLAIN = MappingProxyType({saving: plain for plain, saving in _SAVING.items()})

_LINEAR = frozenset(saving for plain, saving in _SAVING.items() if "Conv" in plain.__name__) | {
    nn.Linear
}
"""Keep their input for their weight alone."""
_PASSES_ON = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten)
"""May return their input, or a view of it."""
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _reads_its_input(module: nn.Module) -> bool:
    """Whether the backward pass through a module, as it is now, takes its input."""
    parameters = module._parameters
    if isinstance(module, _SavingBatchNorm):
        return (
            module.training
            or module._buffers["running_mean"] is None
            or not _frozen(parameters["weight"])
        )
    if type(module) not in _LINEAR and "lora_a" not in parameters:
        return True
    for name, parameter in parameters.items():
        # Of an adapter, the outer matrix takes the product with the inner one.
        if not _frozen(parameter) and name not in ("bias", "lora_b"):
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
        elif isinstance(module, (_SavingMaxPool, _SavingAvgPool)):
            return []
        elif not isinstance(module, _PASSES_ON):
            return [module] if next(module.children(), None) is None else _weighted(module)
    return None


def _readers(model: nn.Module, path: str) -> tuple[nn.Module, ...] | None:
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


# --- models --------------------------------------------------------------------------------------


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
        vars(module).pop(_LINKS, None)
        module.__class__ = _SAVING.get(type(module), type(module))
        if type(module) in _PLAIN:
            converted[path] = _PLAIN[type(module)].__name__
            paths.setdefault(module, []).append(path)
    first = {module: path for path, module in model.named_modules()}
    for module, places in paths.items():
        if isinstance(module, _SavingActivation):
            found = [_readers(model, place) if place else None for place in places]
            known = [readers for readers in found if readers is not None]
            module._readers = sum(known, ()) if len(known) == len(found) else None
            if module._readers is not None:
                holder = _common([first[module], *(first[reader] for reader in module._readers)])
                links = vars(model.get_submodule(holder)).setdefault(_LINKS, _Links())
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
        vars(module).pop(_LINKS, None)
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
