"""SAU, the smooth activation unit: a leaky ReLU convolved with a Gaussian.

Source: Biswas, Kumar, Banerjee, Pandey, "SAU: Smooth Activation Function Using Convolution with
Approximate Identities", ECCV 2022 (arXiv:2109.13210). With `a` the leak, `1/b` the standard
deviation of the Gaussian, `phi` and `Phi` density and distribution function of the standard normal:

    SAU(x)    = x * slope(x) + (1 - a) phi(b x) / b
    slope(x)  = a + (1 - a) Phi(b x)                  the derivative in x
    dSAU/da   = x (1 - Phi(b x)) - phi(b x) / b
    dSAU/db   = -(1 - a) phi(b x) / b^2

which is the convolution worked out; it tends to leaky ReLU as b grows. Everything is computed in
float32 (float64 for float64 inputs), whatever the dtype of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

__all__ = ["SAU", "SAU_PRESETS", "sau"]

_BLOCK = 1 << 18
"""Elements worked on at a time on a CPU: few enough to stay in cache between the passes."""
_SHARP = 4.0
"""Beta from which inputs of unit variance are often far outside the Gaussian."""
_STEP = 5_000.0
"""Beta from which few inputs of unit variance are anywhere near the Gaussian."""
_NEAR = 9.0
"""Standard deviations beyond which a Gaussian is nothing beside 1 in float64."""
_ROWS = 32
"""Elements that are looked at together, when those near the Gaussian are looked for."""
_PLAIN = (Tensor, nn.Parameter)
_SQRT_HALF = math.sqrt(0.5)
_SQRT_TWO_PI = math.sqrt(2 * math.pi)
_LOG2_E = math.log2(math.e)


class _Preset(TypedDict, total=False):
    alpha: float
    beta: float
    train_alpha: bool
    train_beta: bool


SAU_PRESETS: Mapping[str, _Preset] = MappingProxyType(
    {
        "published": {"alpha": 0.15, "beta": 20_000.0, "train_alpha": True},
        "1": {"alpha": 0.15, "beta": 1.0},
        "2": {"alpha": 0.15, "beta": 2.0},
        "4": {"alpha": 0.15, "beta": 4.0},
        "1-trained": {"alpha": 0.15, "beta": 1.0, "train_alpha": True, "train_beta": True},
        "2-trained": {"alpha": 0.15, "beta": 2.0, "train_alpha": True, "train_beta": True},
        "4-trained": {"alpha": 0.15, "beta": 4.0, "train_alpha": True, "train_beta": True},
    }
)
"""Arguments of `SAU` by name. "published" is what third parties report for the paper: with so large
a beta it is a PReLU to within 2e-5. The others are smooth over the width of their inputs."""


def sau(x: Tensor, alpha: float | Tensor = 0.15, beta: float | Tensor = 2.0) -> Tensor:
    """The smooth activation unit, elementwise.

    Any finite `x` and any `beta` up to 1e5 give finite values and gradients in float64, float32,
    bfloat16 and float16. The absolute error is a few units in the last place of the largest of 1,
    |x| and 1 / beta. For backward one tensor of the size of `x` is kept: the slope where only `x`
    needs a gradient, and `x` itself otherwise. Second derivatives come from the slope alone, so
    that in half precision they have no more digits than it. Of `torch.func`, `grad` and `vjp` work,
    while `vmap` and forward mode (`jvp`, `hessian`) do not: there is `torch.autograd.functional`.

    Args:
        x: any shape and floating dtype; strides are kept.
        alpha: leak, below 1; a number, a tensor of one element, or one value per channel
            (dimension 1 of `x`).
        beta: sharpness, the inverse of the Gaussian's standard deviation, positive; likewise.

    Returns:
        Same shape and dtype as `x`.

    Raises:
        ValueError: `alpha` or `beta` is out of range (tensors are not checked), or has another
            number of values than `x` has channels.
        TypeError: `x` is not floating.
    """
    if not x.is_floating_point():
        raise TypeError(f"SAU takes floating point tensors, got {x.dtype}")
    _check_range(alpha, beta)
    alpha, beta = _per_channel(x, "alpha", alpha), _per_channel(x, "beta", beta)
    trained = any(isinstance(p, Tensor) and p.requires_grad for p in (alpha, beta))
    if torch.is_grad_enabled() and (trained or x.requires_grad):
        # A compiler fuses the recomputation for nothing, and would compute gradients of the slope.
        if trained or torch.compiler.is_compiling():
            return _KeepInput.apply(x, alpha, beta)  # type: ignore[no-any-return]
        y: Tensor = _KeepSlope.apply(x, alpha, beta)[0]
        return y
    return _evaluate(x, alpha, beta)[0]


def _check_range(alpha: float | Tensor, beta: float | Tensor) -> None:
    if not isinstance(alpha, Tensor) and not -math.inf < alpha < 1:
        raise ValueError(f"alpha must be below 1 (1 is the identity), got {alpha}")
    if not isinstance(beta, Tensor) and not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")


def _per_channel(x: Tensor, name: str, value: float | Tensor) -> float | Tensor:
    """Shape a parameter to broadcast along dimension 1; one value becomes 0-dimensional."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        return value.reshape(())
    if value.ndim != 1 or x.ndim < 2 or x.shape[1] != len(value):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which fits no channels of an input of shape "
            f"{tuple(x.shape)}"
        )
    return value.view(-1, *[1] * (x.ndim - 2))


class _KeepSlope(torch.autograd.Function):
    """SAU with fixed parameters. The slope is a second output, so that what is kept for backward
    has a gradient of its own, and derivatives of all orders follow from it."""

    @staticmethod
    def forward(x: Tensor, alpha: Any, beta: Any) -> tuple[Tensor, Tensor]:
        y, slope = _evaluate(x, alpha, beta, keep_slope=True)
        assert slope is not None
        return y, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.alpha, ctx.beta = inputs[1:]
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad_y, grad_slope = grads
        (slope,) = ctx.saved_tensors
        grad = None if grad_y is None else grad_y * slope
        if grad_slope is not None:
            second = grad_slope * _curvature(slope, ctx.alpha, ctx.beta)
            grad = second if grad is None else grad + second
        return grad, None, None


def _curvature(slope: Tensor, alpha: float | Tensor, beta: float | Tensor) -> Tensor:
    """Second derivative (1 - a) b phi(b x), from the slope alone."""
    wide = slope.to(_compute_dtype(slope))
    z = torch.special.ndtri(((wide - alpha) / (1 - alpha)).clamp(0, 1))
    return ((1 - alpha) * beta / _SQRT_TWO_PI * torch.exp(-0.5 * z * z)).to(slope.dtype)


class _KeepInput(torch.autograd.Function):
    """SAU whose backward computes everything from the input again."""

    @staticmethod
    def forward(x: Tensor, alpha: Any, beta: Any) -> Tensor:
        return _evaluate(x, alpha, beta)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, alpha, beta = inputs
        ctx.numbers = tuple(None if isinstance(p, Tensor) else p for p in (alpha, beta))
        ctx.save_for_backward(x, *(p for p in (alpha, beta) if isinstance(p, Tensor)))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, *tensors = ctx.saved_tensors
        alpha, beta = (tensors.pop(0) if p is None else p for p in ctx.numbers)
        # Grad mode is on when the gradient is itself to be differentiated.
        by_blocks = not torch.is_grad_enabled() and _by_blocks(x, alpha, beta)
        gradients = _gradients_by_blocks if by_blocks else _gradients
        return gradients(grad_y, x, alpha, beta, ctx.needs_input_grad)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, and no operation at all where that is `x`.

    The compiler of PyTorch 2.11, for one, loses the gradient in the input of an autograd function
    within which such an operation returns that very input.
    """
    return x if x.dtype == dtype else x.to(dtype)


def _by_blocks(x: Tensor, alpha: float | Tensor, beta: float | Tensor) -> bool:
    """Whether the parameters are plain numbers at hand; on an accelerator reading them waits.

    Nor are tensors without values looked at (subclasses, as `FakeTensor`), or while operations are
    recorded: the blocks of one input are not those of another.
    """
    single = all(not isinstance(p, Tensor) or p.ndim == 0 for p in (alpha, beta))
    at_hand = single and x.device.type == "cpu" and type(x) in _PLAIN
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return at_hand and not (torch.compiler.is_compiling() or tracing)


def _evaluate(
    x: Tensor, alpha: float | Tensor, beta: float | Tensor, keep_slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Value and, where asked for, slope, both in the dtype of `x`."""
    if _by_blocks(x, alpha, beta):
        return _evaluate_by_blocks(x, float(alpha), float(beta), keep_slope)
    wide = _cast(x, _compute_dtype(x))
    slope, _, bump = _terms(wide, alpha, beta)
    y = _cast(wide * slope + (1 - alpha) * bump, x.dtype)
    return y, _cast(slope, x.dtype) if keep_slope else None


def _terms(x: Tensor, alpha: float | Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, 1 - Phi(b x) and phi(b x) / b."""
    if isinstance(alpha, Tensor):
        alpha = _cast(alpha, x.dtype)
    if isinstance(beta, Tensor):
        beta = _cast(beta, x.dtype)
    # b x first: its square may overflow to infinity, where the exponential is zero; b^2 x^2 could
    # be infinity times zero.
    z = _SQRT_HALF * beta * x
    if x.dtype == torch.float32 and torch.compiler.is_compiling():
        above, density = _one_exponential(z)
    else:
        above, density = 0.5 - 0.5 * torch.erf(z), torch.exp(-z * z)
    return 1 - (1 - alpha) * above, above, density / (beta * _SQRT_TWO_PI)


def _one_exponential(z: Tensor) -> tuple[Tensor, Tensor]:
    """erfc(z) / 2 and exp(-z^2) with one exponential for both, to 1.5e-7.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; fused by a compiler it takes
    half the time of erf and exp.
    """
    size = z.abs()
    # Subnormal products would be many times slower, and exp(-64) is nothing beside the rest.
    density = torch.exp(-(z * z).clamp(max=64.0))
    t = 1 / (1 + 0.3275911 * size)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    tail = 0.5 * density * t * (0.254829592 + t * (-0.284496736 + t * series))
    return torch.where(z > 0, tail, 1 - tail), density


def _gradients(
    grad_y: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, alpha and beta where `needed`, by differentiable operations."""
    wide, grad = _cast(x, _compute_dtype(x)), _cast(grad_y, _compute_dtype(x))
    slope, above, bump = _terms(wide, alpha, beta)
    in_x = _cast(grad * slope, x.dtype) if needed[0] else None
    in_alpha = in_beta = None
    if needed[1]:
        assert isinstance(alpha, Tensor)
        in_alpha = (grad * (wide * above - bump)).sum_to_size(alpha.shape)
        in_alpha = _cast(in_alpha, alpha.dtype)
    if needed[2]:
        assert isinstance(beta, Tensor)
        in_beta = (grad * ((alpha - 1) / beta * bump)).sum_to_size(beta.shape)
        in_beta = _cast(in_beta, beta.dtype)
    return in_x, in_alpha, in_beta


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Corresponding pieces of dense tensors of equal strides, as they lie in memory."""
    flat = [
        None if t is None else torch.split(t.as_strided((t.numel(),), (1,)), _BLOCK)
        for t in tensors
    ]
    count = max(len(pieces) for pieces in flat if pieces is not None)
    return zip(*([None] * count if p is None else p for p in flat), strict=True)


def _dense(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor without gaps in memory, and a new one of the same layout."""
    new = torch.empty_like(x)
    if new.stride() != x.stride():
        x = new.copy_(x)
        new = torch.empty_like(x)
    return x, new


def _evaluate_by_blocks(
    x: Tensor, alpha: float, beta: float, keep_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_evaluate`, for numbers and a CPU: few passes, each over a block that is in cache."""
    dtype = _compute_dtype(x)
    x, y = _dense(x)
    slope = torch.empty_like(x) if keep_slope else None
    size = min(x.numel(), _BLOCK)
    spare_y = None if dtype == x.dtype else x.new_empty(size, dtype=dtype)
    spare_slope = None if dtype == x.dtype and keep_slope else x.new_empty(size, dtype=dtype)
    middle = torch.tensor((1 + alpha) / 2, dtype=dtype)
    half = (1 - alpha) / 2
    # The factor of the exponential is its value at 0, so it goes into the exponent.
    exponent = _exponent((1 - alpha) / (beta * _SQRT_TWO_PI), dtype)
    for x_block, y_block, slope_block in _blocks(x, y, slope):
        wide = x_block.to(dtype)
        n = wide.numel()
        value = y_block if spare_y is None else spare_y[:n]
        s = slope_block if spare_slope is None else spare_slope[:n]
        columns = _near_columns(wide, beta, s)
        if columns is not None:
            _evaluate_step(wide, alpha, beta, columns, value, s if keep_slope else None)
        else:
            _gaussian(wide, beta, exponent, out=value)
            if alpha > 1:
                value.neg_()
            torch.mul(wide, beta * _SQRT_HALF, out=s)
            torch.erf(s, out=s)
            torch.add(middle, s, alpha=half, out=s)
            value.addcmul_(wide, s)
        if value is not y_block:
            y_block.copy_(value)
        if slope_block is not None and s is not slope_block:
            slope_block.copy_(s)
    return y, slope


def _near_columns(x: Tensor, beta: float, spare: Tensor) -> Tensor | None:
    """Columns of `_table(x)` with an element that the Gaussian reaches.

    None where SAU is no step to most elements, so that all are to be computed as they are.
    """
    if beta < _STEP or x.numel() % _ROWS:
        return None
    torch.abs(x, out=spare)
    columns = _table(spare).amin(0).lt(_NEAR / beta).nonzero().flatten()
    return columns if 4 * _ROWS * len(columns) <= x.numel() else None


def _table(x: Tensor) -> Tensor:
    return x.view(_ROWS, -1)


def _exact(x: Tensor, alpha: float, beta: float, columns: Tensor) -> tuple[Tensor, ...]:
    """These columns, and slope, 1 - Phi(b x) and phi(b x) / b there."""
    near = _table(x).index_select(1, columns)
    return near, *_terms(near.clamp(-_NEAR / beta, _NEAR / beta), alpha, beta)


def _evaluate_step(
    x: Tensor, alpha: float, beta: float, columns: Tensor, value: Tensor, slope: Tensor | None
) -> None:
    """Value and slope, from a leaky ReLU but for these columns."""
    torch.ops.aten.leaky_relu.out(x, alpha, out=value)
    near, exact, _, bump = _exact(x, alpha, beta, columns)
    if slope is not None:
        torch.gt(x, 0, out=slope)
        torch.add(torch.tensor(alpha, dtype=x.dtype), slope, alpha=1 - alpha, out=slope)
        _table(slope).index_copy_(1, columns, exact)
    _table(value).index_copy_(1, columns, near * exact + (1 - alpha) * bump)


def _exponent(factor: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(math.log2(abs(factor)) if factor else -math.inf, dtype=dtype)


def _gaussian(x: Tensor, beta: float, exponent: Tensor, out: Tensor) -> None:
    """2^exponent * exp(-(b x)^2 / 2) into `out`; the base 2 since its power is the faster one."""
    torch.addcmul(exponent, x, x, value=-0.5 * _LOG2_E * beta * beta, out=out)
    if beta > _SHARP:
        out.clamp_(min=-126.0)  # results that underflow take three times as long
    torch.exp2(out, out=out)


def _gradients_by_blocks(
    grad_y: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `_gradients`, for numbers and a CPU."""
    a, b, dtype = float(alpha), float(beta), _compute_dtype(x)
    x, in_x = _dense(x)
    if grad_y.stride() != x.stride():
        grad_y = torch.empty_like(x).copy_(grad_y)
    leak, bump = [], []
    spare = x.new_empty(min(x.numel(), _BLOCK), dtype=dtype)
    exponent = _exponent(1 / (b * _SQRT_TWO_PI), dtype)
    for x_block, grad_block, in_x_block in _blocks(x, grad_y, in_x):
        wide, grad = x_block.to(dtype), grad_block.to(dtype)
        out = in_x_block if dtype == x.dtype else torch.empty_like(wide)
        q = spare[: wide.numel()]
        columns = _near_columns(wide, b, q)
        if columns is not None:
            parts = _gradients_step(grad, wide, a, b, columns, q, out)
            leak.append(parts[0])
            bump.append(parts[1])
        else:
            if needed[1] or needed[2]:
                _gaussian(wide, b, exponent, out=q)
                bump.append(torch.dot(grad, q))
            torch.mul(wide, b * _SQRT_HALF, out=q)
            torch.erf(q, out=q)
            torch.addcmul(grad, grad, q, value=-1, out=q)
            if needed[1]:
                leak.append(0.5 * torch.dot(q, wide))
            torch.add(grad, q, alpha=(a - 1) / 2, out=out)
        if out is not in_x_block:
            in_x_block.copy_(out)
    in_alpha = in_beta = None
    if needed[1]:
        assert isinstance(alpha, Tensor)
        in_alpha = (_total(leak) - _total(bump)).to(alpha.dtype)
    if needed[2]:
        assert isinstance(beta, Tensor)
        in_beta = ((a - 1) / b * _total(bump)).to(beta.dtype)
    return in_x if needed[0] else None, in_alpha, in_beta


def _gradients_step(
    grad: Tensor,
    x: Tensor,
    alpha: float,
    beta: float,
    columns: Tensor,
    spare: Tensor,
    in_x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient in `x` into `in_x`; the sums over `grad` of x (1 - Phi(b x)) and phi(b x) / b."""
    torch.clamp(x, max=0, out=spare)
    leak = torch.dot(grad, spare)
    torch.ops.aten.leaky_relu_backward.grad_input(grad, x, alpha, False, grad_input=in_x)
    near, slope, above, bump = _exact(x, alpha, beta, columns)
    above = near * above - near.clamp(max=0)
    grad = _table(grad).index_select(1, columns)
    _table(in_x).index_copy_(1, columns, grad * slope)
    return leak + (grad * above).sum(), (grad * bump).sum()


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(dtype=torch.float64)


class SAU(nn.Module):
    """The smooth activation unit as a layer; see `sau`.

    Fixed parameters are not part of the state dict. A trained beta is kept as its logarithm, which
    keeps it positive and its gradient of the size of the Gaussian bump. Neither should decay: decay
    pulls alpha to a smoothed ReLU, and beta to 1.

    Args:
        alpha: leak, below 1; where it starts, when it is trained.
        beta: sharpness, positive; likewise.
        train_alpha: learn alpha.
        train_beta: learn beta.
        channels: learn one value per channel (dimension 1) instead of one per layer.
        inplace: accepted for the sake of libraries that pass it, and without effect.

    Raises:
        ValueError: `alpha` or `beta` is out of range, or `channels` is given with nothing trained.
    """

    def __init__(
        self,
        alpha: float = 0.15,
        beta: float = 2.0,
        *,
        train_alpha: bool = False,
        train_beta: bool = False,
        channels: int | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        _check_range(alpha, beta)
        alpha, beta = float(alpha), float(beta)  # whole numbers would make tensors of integers
        if channels is not None and not (train_alpha or train_beta):
            raise ValueError("channels is for trained parameters: set train_alpha or train_beta")
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        shape = () if channels is None else (channels,)
        self.alpha = nn.Parameter(torch.full(shape, alpha)) if train_alpha else alpha
        self._beta = None if train_beta else beta
        self.log_beta = nn.Parameter(torch.full(shape, math.log(beta))) if train_beta else None

    @classmethod
    def preset(cls, name: str, *, channels: int | None = None, inplace: bool = False) -> SAU:
        """The layer with the arguments of `SAU_PRESETS`.

        Raises:
            ValueError: no preset has this name.
        """
        if name not in SAU_PRESETS:
            raise ValueError(f"no SAU preset {name!r}; choose one of {', '.join(SAU_PRESETS)}")
        return cls(**SAU_PRESETS[name], channels=channels, inplace=inplace)

    @property
    def beta(self) -> float | Tensor:
        """Sharpness: a number when fixed, else exp(log_beta), in float32 at least: float16 ends
        at 65,504."""
        if self.log_beta is not None:
            return self.log_beta.to(_compute_dtype(self.log_beta)).exp()
        assert self._beta is not None
        return self._beta

    def forward(self, x: Tensor) -> Tensor:
        """Apply it elementwise; same shape, dtype and strides as `x`."""
        return sau(x, self.alpha, self.beta)

    def extra_repr(self) -> str:
        shown = []
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if isinstance(value, Tensor) and value.is_meta:
                shown.append(f"{name}=trained")
            elif isinstance(value, Tensor):
                shown.append(f"{name}={value.detach().mean().item():.4g} (trained)")
            else:
                shown.append(f"{name}={value:g}")
        return ", ".join(shown)
