"""Is it a flow, how does it stretch what goes through it, and can its gradients be trusted?

Sources: Metz et al., "Gradients are Not All You Need" (arXiv:2111.05803), for products of
Jacobians; Khromov and Singh (arXiv:2302.10886) for Lipschitz bounds; Ott et al.
(arXiv:2007.15386) for comparing solvers. The thresholds of the alarms are our choices.

All figures are of the net with its own solver and steps, in eval mode. Solvers with adaptive steps
are looked at as rk4 with `ADAPTIVE_STEPS` equal steps, since torchdiffeq's cannot be transformed.

Shape notation: B samples, d components of a state, k exponents, M rounds of a Krylov method.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.families.continuous_depth.blocks import ODEBlock, TimeVaryingConv2d
from zoo.families.continuous_depth.image_networks import (
    BasisField,
    ODEResNet,
    ResidualBlock,
    TimeChannelConv2d,
    TimeChannelField,
    Transition,
)
from zoo.families.continuous_depth.solvers import (
    TABLEAUS,
    SolverConfig,
    Tableau,
    runge_kutta_step,
    solve,
    step_grid,
)

__all__ = [
    "ADAPTIVE_STEPS",
    "VACUOUS_LOG",
    "BlockDiagnosis",
    "InputLipschitz",
    "block_steps",
    "diagnose_block",
    "field_extremes",
    "flow_exponents",
    "input_lipschitz",
    "log_lipschitz_bound",
    "step_gain",
]

Map = Callable[[Tensor], Tensor]

ADAPTIVE_STEPS = 16
"""Equal steps of rk4 that stand for a solver with adaptive steps."""

VACUOUS_LOG = 30.0
"""Natural logarithm above which an upper Lipschitz bound says nothing."""

_STABLE = {1: 2.0, 2: 2.0, 3: 2.51, 4: 2.78}
"""Order -> where the real axis leaves the stability region of our methods."""

_KRYLOV = 16

_DRAWS, _NOISE = 16, 0.01
"""Draws of moved parameters, and how far they are moved, relative to their size."""

_PAIRS, _DIRECTIONS = 64, 8
"""Pairs of moved parameters plus and minus, and the directions that they are moved in."""

_COST_OF_GRADIENT = 3.0
"""Of a forward and backward pass, in forward passes."""

_MOST = 1e30
"""Stands for every ratio above it, and for those that are not finite."""

_PLATEAU = 1.25
"""Growth of the gradient, relative to that of the number of steps, that is too much."""


# --- steps and fields ----------------------------------------------------------------------------


def _fixed(block: ODEBlock) -> tuple[Tableau, int]:
    if block.solver.is_fixed:
        return TABLEAUS[block.solver.method], block.solver.steps
    return TABLEAUS["rk4"], ADAPTIVE_STEPS


def block_steps(block: ODEBlock) -> list[Map]:
    """The maps that a block composes, one per step, each B x S to B x S."""
    tableau, steps = _fixed(block)

    def step(t: float, h: float) -> Map:
        return lambda y: runge_kutta_step(tableau, block.field, t, h, y)

    return [step(t, h) for t, h in step_grid(*block.interval, steps)]


def _chain(maps: Sequence[Map]) -> Map:
    def composed(y: Tensor) -> Tensor:
        for function in maps:
            y = function(y)
        return y

    return composed


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, B."""
    return (a * b).reshape(len(a), -1).sum(1)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor.view(-1, *[1] * (x.ndim - 1))


def _forward(function: Map, y: Tensor) -> Map:
    """J v at y, sample by sample: samples do not see each other."""
    return lambda v: torch.func.jvp(function, (y,), (v,))[1]


def _backward(function: Map, y: Tensor) -> Map:
    """J^T v at y."""
    pull = torch.func.vjp(function, y)[1]
    return lambda v: pull(v)[0]


def _random(y: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator, device=generator.device).to(y)


# --- eigenvalues and singular values -------------------------------------------------------------


def _hessenberg(product: Map, y: Tensor, rounds: int, seed: int) -> Tensor:
    """Arnoldi's projection of a linear map onto a Krylov space, B x M x M.

    Where a space is exhausted it goes on from another random direction.
    """
    size = y[0].numel()
    rounds = min(rounds, size)
    v = _random(y, seed)
    basis = [_scaled(v, _dot(v, v).rsqrt())]
    h = torch.zeros(len(y), rounds, rounds, dtype=y.dtype, device=y.device)
    for j in range(rounds):
        w = product(basis[j])
        before = _dot(w, w).sqrt()
        for _ in range(2):  # once more for the rounding of the first time
            for i, u in enumerate(basis):
                share = _dot(w, u)
                h[:, i, j] += share
                w = w - _scaled(u, share)
        norm = _dot(w, w).sqrt()
        if j + 1 == rounds:
            break
        exhausted = norm <= 1e-5 * before + torch.finfo(y.dtype).tiny
        if bool(exhausted.any()):
            fresh = _random(y, seed + j + 1)
            for _ in range(2):
                for u in basis:
                    fresh = fresh - _scaled(u, _dot(fresh, u))
            shape = (-1, *[1] * (w.ndim - 1))
            w = torch.where(exhausted.view(shape), fresh, w)
        h[:, j + 1, j] = torch.where(exhausted, torch.zeros_like(norm), norm)
        basis.append(_scaled(w, _dot(w, w).rsqrt()))
    return h


def spectral_radius(product: Map, y: Tensor, seed: int = 0) -> Tensor:
    """Largest modulus of an eigenvalue of a linear map, for each sample, B; by Arnoldi."""
    h = _hessenberg(product, y, _KRYLOV, seed)
    radius: Tensor = torch.linalg.eigvals(h).abs().amax(1)
    return radius


def largest_of_symmetric(product: Map, y: Tensor, seed: int = 0) -> Tensor:
    """Largest eigenvalue of a symmetric linear map, for each sample, B; approached from below."""
    h = _hessenberg(product, y, _KRYLOV, seed)
    largest: Tensor = torch.linalg.eigvalsh((h + h.mT) / 2).amax(1)
    return largest


def step_gain(function: Map, y: Tensor, seed: int = 0) -> Tensor:
    """Largest singular value of the Jacobian of a map at y, for each sample, B; from below."""
    ahead, back = _forward(function, y), _backward(function, y)
    gain = largest_of_symmetric(lambda v: back(ahead(v)), y, seed)
    return gain.clamp(min=0).sqrt()


def flow_exponents(block: ODEBlock, y: Tensor, k: int = 4, rounds: int = 20) -> Tensor:
    """Finite-time Lyapunov exponents, B x k, largest first: log singular values of the Jacobian of
    the block's map, per unit of time.

    By subspace iteration with the transposed Jacobian times the Jacobian; approached from below.

    Raises:
        ValueError: `k` is not between 1 and the number of components.
    """
    size = y[0].numel()
    if not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to {size}, got {k}")
    function = _chain(block_steps(block))
    ahead, back = _forward(function, y), _backward(function, y)
    space = torch.stack([_random(y, seed) for seed in range(k)], -1)
    values = torch.zeros(len(y), k)
    for _ in range(rounds):
        basis = torch.linalg.qr(space.reshape(len(y), size, k))[0]
        vectors = basis.reshape(*y.shape, k).unbind(-1)
        images = [ahead(v.contiguous()) for v in vectors]
        stretched = torch.stack([i.reshape(len(y), -1) for i in images], -1)
        values = torch.linalg.svdvals(stretched)
        space = torch.stack([back(i) for i in images], -1)
    duration = abs(block.interval[1] - block.interval[0])
    return values.clamp(min=torch.finfo(y.dtype).tiny).log() / duration


def field_extremes(block: ODEBlock, t: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of the Jacobian J of the field at (t, y): spectral radius, and the logarithmic norm, which is
    the largest eigenvalue of (J + J^T) / 2; each B."""

    def field(y: Tensor) -> Tensor:
        derivative: Tensor = block.field(t, y)
        return derivative

    ahead, back = _forward(field, y), _backward(field, y)
    return (
        spectral_radius(ahead, y),
        largest_of_symmetric(lambda v: (ahead(v) + back(v)) / 2, y),
    )


# --- a block -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiagnosis:
    """What an ODE block does to some states; medians, and 95th percentiles, over the samples."""

    samples: int
    """How many states."""
    method: str
    """Solver whose steps were looked at."""
    steps: int
    """How many."""
    step_radius: tuple[float, ...]
    """Spectral radius of the Jacobian of each step, median."""
    step_radius_p95: tuple[float, ...]
    """The same, 95th percentile."""
    step_gain: tuple[float, ...]
    """Largest singular value of the Jacobian of each step, median."""
    step_gain_p95: tuple[float, ...]
    """The same, 95th percentile."""
    product_gain: tuple[float, ...]
    """Largest singular value of the Jacobian of the first 1, 2, ... steps together, median."""
    product_gain_p95: float
    """The same of all steps, 95th percentile."""
    exponents: tuple[float, ...]
    """Largest finite-time Lyapunov exponents, median."""
    exponent_p95: float
    """The largest exponent, 95th percentile."""
    inverse_exponent: float
    """Largest exponent of the flow back in time, median: how fast the adjoint amplifies errors."""
    inverse_exponent_p95: float
    """The same, 95th percentile."""
    log_norm_integral: float
    """Integral of the logarithmic norm along the path, by its values where steps start, median; exp
    of it bounds the local gain of the exact flow, up to the error of that sum. The solver's steps
    may stretch more: those of Euler's method do where the flow only turns."""
    log_norm_integral_p95: float
    """The same, 95th percentile."""
    stiffness: float
    """Largest step times spectral radius of the field, median."""
    stiffness_p95: float
    """The same, 95th percentile."""
    reconstruction: float
    """Relative distance from the state at the start to what integrating there and back gives,
    median."""
    reconstruction_p95: float
    """The same, 95th percentile."""
    adjoint_cosine: float
    """Cosine between the adjoint's and the exact gradient of a random functional of the end."""
    gradient_norms: tuple[float, ...]
    """Norm of the parameters' gradient through the last 1, 2, 4, ... steps alone, then all."""
    gradient_cosines: tuple[float, ...]
    """Cosine of each of these gradients with the one through all steps."""
    gradient_variances: tuple[float, ...]
    """Variance of the parameters' gradient of the state after 1, 2, ... steps, summed over
    parameters, when these are moved at random by a hundredth of their size."""
    estimator_ratio: float | None
    """Variance of the gradient by backpropagation over that of evolution strategies at equal cost,
    where parameters are moved by a hundredth of their size in a few directions; None without
    parameters."""
    alarms: tuple[str, ...]
    """What to worry about, in a sentence each."""


@torch.no_grad()
def diagnose_block(block: ODEBlock, y: Tensor, k: int = 4) -> BlockDiagnosis:
    """Look at a block around the paths from given states.

    Args:
        block: in eval mode.
        y: states at its start, B x S.
        k: number of Lyapunov exponents.
    """
    tableau, count = _fixed(block)
    method = block.solver.method if block.solver.is_fixed else "rk4"
    maps, grid = block_steps(block), list(step_grid(*block.interval, count))
    k = min(k, y[0].numel())
    radius, gain, product, stiffness, log_norms, states = [], [], [], [], [], [y]
    for index, (function, (t, h)) in enumerate(zip(maps, grid, strict=True)):
        here = states[-1]
        radius.append(spectral_radius(_forward(function, here), here))
        gain.append(step_gain(function, here))
        product.append(step_gain(_chain(maps[: index + 1]), y))
        fast, log_norm = field_extremes(block, t, here)
        stiffness.append(abs(h) * fast)
        log_norms.append(h * log_norm if h > 0 else -h * field_extremes_back(block, t, here))
        states.append(function(here))
    exponents = flow_exponents(block, y, k)
    start, end = block.interval
    back = ODEBlock(block.field, SolverConfig(method=method, steps=count), (end, start))
    returned = _chain(block_steps(back))(states[-1])
    inverse = flow_exponents(back, states[-1], 1)[:, 0]
    distance = (_dot(returned - y, returned - y) / _dot(y, y).clamp(min=1e-30)).sqrt()
    duration = abs(end - start)
    log_norm, stiff = torch.stack(log_norms).sum(0), torch.stack(stiffness).amax(0)
    norms, cosines = _truncated_gradients(block, states, grid, tableau)
    diagnosis = BlockDiagnosis(
        samples=len(y),
        method=method,
        steps=count,
        step_radius=tuple(_median(r) for r in radius),
        step_radius_p95=tuple(_p95(r) for r in radius),
        step_gain=tuple(_median(g) for g in gain),
        step_gain_p95=tuple(_p95(g) for g in gain),
        product_gain=tuple(_median(g) for g in product),
        product_gain_p95=_p95(product[-1]),
        exponents=tuple(_median(column) for column in exponents.unbind(1)),
        exponent_p95=_p95(exponents[:, 0]),
        inverse_exponent=_median(inverse),
        inverse_exponent_p95=_p95(inverse),
        log_norm_integral=_median(log_norm),
        log_norm_integral_p95=_p95(log_norm),
        stiffness=_median(stiff),
        stiffness_p95=_p95(stiff),
        reconstruction=_median(distance),
        reconstruction_p95=_p95(distance),
        adjoint_cosine=_adjoint_cosine(block, y, method, count),
        gradient_norms=norms,
        gradient_cosines=cosines,
        gradient_variances=_gradient_variances(block, y, grid, tableau),
        estimator_ratio=_estimator_ratio(block, y, grid, tableau),
        alarms=(),
    )
    return dataclasses.replace(diagnosis, alarms=_alarms(diagnosis, duration, tableau))


def field_extremes_back(block: ODEBlock, t: float, y: Tensor) -> Tensor:
    """Logarithmic norm of minus the field, which is the one that counts back in time, B."""

    def field(y: Tensor) -> Tensor:
        derivative: Tensor = block.field(t, y)
        return -derivative

    ahead, back = _forward(field, y), _backward(field, y)
    return largest_of_symmetric(lambda v: (ahead(v) + back(v)) / 2, y)


def _median(values: Tensor) -> float:
    return float(values.double().quantile(0.5))


def _p95(values: Tensor) -> float:
    return float(values.double().quantile(0.95))


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@torch.enable_grad()
def _adjoint_cosine(block: ODEBlock, y: Tensor, method: Any, steps: int) -> float:
    parameters = [p for p in block.field.parameters() if p.requires_grad]
    if not parameters:
        return 1.0
    weights, found = _random(y, 99), []
    for gradient in ("discrete", "adjoint"):
        config = SolverConfig(method=method, steps=steps, gradient=gradient)
        loss = (solve(block.field, y, block.interval, config).last * weights).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(_flat(grads, parameters).double())
    return float(torch.nn.functional.cosine_similarity(found[0], found[1], dim=0))


@torch.enable_grad()
def _truncated_gradients(
    block: ODEBlock, states: list[Tensor], grid: list[tuple[float, float]], tableau: Tableau
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Norms of the gradients through the last 1, 2, 4, ... steps; their cosines with the last."""
    parameters = [p for p in block.field.parameters() if p.requires_grad]
    if not parameters:
        return (), ()
    weights, found = _random(states[0], 98), []
    for length in _lengths(len(grid)):
        y = states[-1 - length]
        for t, h in grid[-length:]:
            y = runge_kutta_step(tableau, block.field, t, h, y)
        loss = (y * weights).sum() / len(y)
        found.append(
            _flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters).double()
        )
    cosines = torch.nn.functional.cosine_similarity(torch.stack(found), found[-1][None])
    return tuple(float(g.norm()) for g in found), tuple(cosines.tolist())


def _lengths(steps: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({*(2**i for i in range(steps.bit_length())), steps})


def _parameters(block: ODEBlock) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in block.field.named_parameters() if p.requires_grad}


def _noise_scale(p: Tensor) -> float:
    """How far a parameter is moved."""
    return _NOISE * float(p.double().square().mean().sqrt())


def _losses(
    block: ODEBlock,
    moved: dict[str, Tensor],
    y: Tensor,
    grid: list[tuple[float, float]],
    tableau: Tableau,
) -> Iterator[Tensor]:
    """A random functional of the state after 1, 2, ... steps of the field with moved parameters."""
    weights = _random(y, 97)

    def field(t: float, y: Tensor) -> Tensor:
        derivative: Tensor = functional_call(block.field, moved, (t, y))
        return derivative

    state = y
    for t, h in grid:
        state = runge_kutta_step(tableau, field, t, h, state)
        yield (state * weights).sum() / len(y)


@torch.enable_grad()
def _gradient_variances(
    block: ODEBlock, y: Tensor, grid: list[tuple[float, float]], tableau: Tableau
) -> tuple[float, ...]:
    parameters = _parameters(block)
    if not parameters:
        return ()
    found, generator = [], torch.Generator().manual_seed(96)
    for _ in range(_DRAWS):
        drawn = {
            name: (p + _noise_scale(p) * torch.randn(p.shape, generator=generator).to(p))
            .to(p.dtype)
            .requires_grad_()
            for name, p in parameters.items()
        }
        values, gradients = tuple(drawn.values()), []
        for loss in _losses(block, drawn, y, grid, tableau):
            of_step = torch.autograd.grad(loss, values, allow_unused=True, retain_graph=True)
            gradients.append(_flat(of_step, values).double())
        found.append(torch.stack(gradients))
    return tuple(torch.stack(found).var(0).sum(1).tolist())


@torch.enable_grad()
def _estimator_ratio(
    block: ODEBlock,
    y: Tensor,
    grid: list[tuple[float, float]],
    tableau: Tableau,
    pairs: int = _PAIRS,
) -> float | None:
    """Variance of the reparameterised gradient over that of antithetic evolution strategies.

    Both estimate the gradient of the expectation of the loss at `parameters + scale U z` in z, with
    z of a unit normal distribution and U random orthonormal directions (arXiv:2111.05803, section
    3), from the same pairs z, -z: the mean of both gradients, (l(z) - l(-z)) z / 2. Each variance
    counts by the forward passes that a pair costs.
    """
    parameters = _parameters(block)
    if not parameters:
        return None
    generator = torch.Generator().manual_seed(95)
    size = sum(p.numel() for p in parameters.values())
    count = min(_DIRECTIONS, size)
    drawn = torch.randn(size, count, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(drawn).Q.T.to(y.device)
    scales = [_noise_scale(p) for p in parameters.values()]

    def loss(z: Tensor) -> Tensor:
        moves = (z @ directions).split([p.numel() for p in parameters.values()])
        moved = {
            name: p + (scale * move).view_as(p).to(p.dtype)
            for (name, p), scale, move in zip(parameters.items(), scales, moves, strict=True)
        }
        *_, last = _losses(block, moved, y, grid, tableau)
        return last.double()

    by_gradient, by_values = [], []
    for _ in range(pairs):
        z = torch.randn(count, generator=generator, dtype=torch.float64).to(y.device)
        ends = [(sign * z).requires_grad_() for sign in (1.0, -1.0)]
        values = [loss(end) for end in ends]
        slopes = [torch.autograd.grad(v, end)[0] for v, end in zip(values, ends, strict=True)]
        by_gradient.append((slopes[0] + slopes[1]) / 2)
        by_values.append((values[0] - values[1]).detach() * z / 2)
    ours, theirs = (float(torch.stack(found).var(0).sum()) for found in (by_gradient, by_values))
    if ours == 0:
        return 0.0
    ratio = _COST_OF_GRADIENT * ours / theirs if theirs else math.inf
    # JSON has neither NaN, of gradients that overflow, nor infinity.
    return min(ratio, _MOST) if math.isfinite(ratio) else _MOST


def _alarms(d: BlockDiagnosis, duration: float, tableau: Tableau) -> tuple[str, ...]:
    alarms = []
    if sum(r > 1.1 for r in d.step_radius) > d.steps / 2:
        alarms.append("spectral radius of a step above 1.1 over more than half of the depth")
    logs = [math.log(max(g, 1e-30)) for g in d.product_gain]
    if len(logs) >= 4 and logs[-1] > 1.0 and _is_linear(logs):
        alarms.append("the gain of the product grows exponentially with depth")
    pairs = list(zip(_lengths(d.steps), d.gradient_norms, strict=False))
    faster = [b > _PLATEAU * a * n / m > 0 for (m, a), (n, b) in itertools.pairwise(pairs)]
    if len(faster) >= 2 and all(faster):
        alarms.append("the gradient grows faster than the number of steps that it goes through")
    # The gradient is a sum over steps, each of which moves with all steps before it.
    excess = [math.log(v) - 4 * math.log(n) for n, v in enumerate(d.gradient_variances, 1) if v > 0]
    if len(excess) >= 4 and excess[-1] - excess[0] > 3.0 and _is_linear(excess):
        alarms.append("the variance of the gradient grows exponentially with depth")
    if d.estimator_ratio is not None and d.estimator_ratio > 1.0:
        alarms.append(
            f"backpropagation varies {d.estimator_ratio:.3g} times as much as evolution strategies"
        )
    if d.exponents[0] * duration > 5.0:
        alarms.append(
            f"largest exponent times duration is {d.exponents[0] * duration:.1f}, above 5"
        )
    if d.inverse_exponent * duration > 5.0:
        alarms.append("the flow back in time amplifies errors more than 150 times: no adjoint")
    limit = _STABLE[tableau.order]
    if d.stiffness > limit:
        alarms.append(f"step times spectral radius is {d.stiffness:.2f}, above {limit}: not stable")
    if d.reconstruction > 1e-2:
        alarms.append(f"integrating back misses the start by {d.reconstruction:.1%}")
    if d.adjoint_cosine < 0.99:
        alarms.append(
            f"the adjoint's gradient has cosine {d.adjoint_cosine:.3f} with the exact one"
        )
    return tuple(alarms)


def _is_linear(values: Sequence[float]) -> bool:
    """Whether equally spaced values rise along a line: correlation above 0.98."""
    x = torch.arange(len(values), dtype=torch.float64)
    pair = torch.stack((x, torch.tensor(values, dtype=torch.float64)))
    return bool(torch.corrcoef(pair)[0, 1] > 0.98)


# --- Lipschitz bounds ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputLipschitz:
    """Lipschitz constant of the logits with respect to images from 0 to 1, in 2-norms.

    The first figures are local: the true constant is at least the largest of them. The upper bound
    is a product over layers; for nets with group normalisation it is so large as to say nothing.
    """

    samples: int
    """Images looked at."""
    lower: float
    """Largest norm of the Jacobian on the images."""
    lower_with_midpoints: float
    """The same with midpoints of random pairs of them."""
    mean: float
    """Mean norm."""
    rms: float
    """Root mean square norm."""
    p95: float
    """95th percentile."""
    log10_upper: float | None
    """Decimal logarithm of the upper bound; None where a layer has no known bound."""
    vacuous: bool | None
    """Whether the upper bound is too large to say anything (natural logarithm above 30)."""


@torch.no_grad()
def input_lipschitz(
    network: nn.Module,
    images: Tensor,
    scale: float | Sequence[float],
    shape: Sequence[int],
    seed: int = 0,
) -> InputLipschitz:
    """Bounds of a classifier in eval mode.

    Args:
        network: takes B x C x H x W.
        images: normalised, as the network takes them.
        scale: factor between a change of a normalised image and that of one from 0 to 1 (one over
            the standard deviation that images were divided by), of all channels or of each. The
            upper bound is with the largest.
        shape: C, H, W.
        seed: of the pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    partner = torch.randperm(len(images), generator=generator)
    scales = torch.as_tensor(scale, dtype=torch.float64, device=images.device)
    norms = _jacobian_norms(network, images, scales)
    middle = _jacobian_norms(network, (images + images[partner]) / 2, scales)
    try:
        upper: float | None = math.log(float(scales.max())) + log_lipschitz_bound(
            network, tuple(shape)
        )
    except NotImplementedError:
        upper = None
    return InputLipschitz(
        samples=len(images),
        lower=float(norms.max()),
        lower_with_midpoints=float(torch.maximum(norms.max(), middle.max())),
        mean=float(norms.mean()),
        rms=float(norms.square().mean().sqrt()),
        p95=_p95(norms),
        log10_upper=None if upper is None else upper / math.log(10.0),
        vacuous=None if upper is None else upper > VACUOUS_LOG,
    )


@torch.enable_grad()
def _jacobian_norms(network: nn.Module, images: Tensor, scales: Tensor, batch: int = 128) -> Tensor:
    """2-norm of the Jacobian of the logits at each image, by one backward pass per class.

    The columns of each channel are multiplied by its scale; there may be one of all.
    """
    columns = scales.view(-1, *[1] * (images.ndim - 2)).expand(images.shape[1:]).flatten()
    norms = []
    for part in torch.split(images, batch):
        x = part.detach().requires_grad_()
        logits = network(x)
        rows = [
            torch.autograd.grad(logits[:, c].sum(), x, retain_graph=True)[0].flatten(1)
            for c in range(logits.shape[1])
        ]
        jacobian = columns * torch.stack(rows, 1).double()
        norms.append(torch.linalg.matrix_norm(jacobian, ord=2))
    return torch.cat(norms).detach()


def log_lipschitz_bound(module: nn.Module, shape: tuple[int, ...]) -> float:
    """Natural logarithm of an upper bound of a module's Lipschitz constant, in 2-norms.

    Linear layers exactly; convolutions by power iteration through them with their own padding and
    size, with 1 % added since it comes from below; group and layer normalisation by their bound for
    all inputs; batch normalisation as it is in eval mode.

    Args:
        module: of the kinds that the networks of this folder are made of.
        shape: of its input, without the batch.

    Raises:
        NotImplementedError: there is no bound for this kind of layer, or for a convolution that
            pads with anything but zeros.
    """
    return _bound(module, shape)[0]


def _bound(module: nn.Module, shape: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """The bound, and the shape of the output."""
    if isinstance(module, nn.Sequential):
        total = 0.0
        for part in module:
            log, shape = _bound(part, shape)
            total += log
        return total, shape
    if isinstance(module, (nn.ReLU, nn.Tanh, nn.Identity, nn.Dropout)):
        return 0.0, shape
    if isinstance(module, nn.ELU):
        return math.log(max(1.0, abs(module.alpha))), shape
    if isinstance(module, nn.Linear):
        return _log(float(torch.linalg.matrix_norm(module.weight.double(), ord=2))), (
            *shape[:-1],
            module.out_features,
        )
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise NotImplementedError(
                f"no Lipschitz bound is known for Conv2d with padding_mode={module.padding_mode!r}"
            )
        size = module(module.weight.new_zeros(1, *shape)).shape[1:]
        # Biases do not count: the map is taken less its value at zero.
        linear = _without_bias(module)
        return _log(_linear_gain(linear, shape, module.weight)), tuple(size)
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        largest = 1.0 if module.weight is None else float(module.weight.abs().max())
        return _log(largest / math.sqrt(module.eps)), shape
    if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
        gains = (module.running_var + module.eps).rsqrt()
        if module.weight is not None:
            gains = gains * module.weight.abs()
        return _log(float(gains.max())), shape
    if isinstance(module, ResidualBlock):
        branch = 0.0
        inner = shape
        for part in (module.norm1, module.conv1, module.norm2, module.conv2):
            log, inner = _bound(part, inner)
            branch += log
        # The shortcut of a shrinking block starts after the first norm.
        straight = 0.0
        if module.shortcut is not None:
            straight = _bound(module.norm1, shape)[0] + _bound(module.shortcut, shape)[0]
        return _log_sum(straight, branch), inner
    if isinstance(module, Transition):
        norm = _bound(module.norm, shape)[0]
        log, shape = _bound(module.conv, shape)
        return norm + log, shape
    if isinstance(module, ODEBlock):
        return _log_flow_bound(module, _log_field_bound(module.field, shape)), shape
    if isinstance(module, ODEResNet):
        total, shape = _bound(module.stem, shape)
        for block in module.blocks:
            log, shape = _bound(block, shape)
            total += log
        pooling = -0.5 * math.log(shape[1] * shape[2])
        return (
            total + _bound(module.norm, shape)[0] + pooling + _bound(module.head, (shape[0],))[0]
        ), (module.head.out_features,)
    raise NotImplementedError(f"no Lipschitz bound is known for {type(module).__name__}")


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _log_sum(a: float, b: float) -> float:
    """log(exp a + exp b)."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _without_bias(conv: nn.Conv2d) -> Map:
    def linear(x: Tensor) -> Tensor:
        return nn.functional.conv2d(
            x,
            conv.weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )

    return linear


def _linear_gain(linear: Map, shape: tuple[int, ...], like: Tensor, rounds: int = 100) -> float:
    """Norm of a linear map of images: power iteration, and 1 % more."""
    x = _random(torch.empty(1, *shape, dtype=like.dtype, device=like.device), 0)
    gain = 0.0
    pull = torch.func.vjp(linear, torch.zeros_like(x))[1]
    for _ in range(rounds):
        x = x / x.norm()
        y = linear(x)
        gain = float(y.norm())
        x = pull(y)[0]
        if not gain:
            return 0.0
    return 1.01 * gain


def _log_field_bound(field: nn.Module, shape: tuple[int, ...]) -> float:
    """Bound of a field at the worst time in [0, 1]."""
    if isinstance(field, BasisField):
        norms = (field.norm1, field.norm2)
        convs = (field.conv1, field.conv2)
    elif isinstance(field, TimeChannelField):
        norms = (field.norm1, field.norm2, field.norm3)  # type: ignore[assignment]
        convs = (field.conv1, field.conv2)  # type: ignore[assignment]
    else:
        raise NotImplementedError(f"no Lipschitz bound is known for {type(field).__name__}")
    total = sum(_bound(norm, shape)[0] for norm in norms)
    for conv in convs:
        total += _log(_conv_gain(conv, (conv.weight.shape[-3], *shape[1:])))
    return total


def _conv_gain(conv: TimeVaryingConv2d | TimeChannelConv2d, shape: tuple[int, ...]) -> float:
    if isinstance(conv, TimeChannelConv2d):
        # Time is no input: a change of the image goes through the image's kernel alone.
        return _linear_gain(
            lambda x: nn.functional.conv2d(x, conv.weight, padding=1), shape, conv.weight
        )
    shape = (shape[0] * conv.groups, *shape[1:])
    gains = [
        _linear_gain(
            lambda x, w=weight: nn.functional.conv2d(
                x, w, padding=conv.padding, groups=conv.groups
            ),  # type: ignore[misc]
            shape,
            weight,
        )
        for weight in conv.weight
    ]
    # Pieces and hats are convex combinations; Legendre polynomials are at most 1 in size.
    return sum(gains) if conv.basis == "legendre" else max(gains)


def _log_flow_bound(block: ODEBlock, log_field: float) -> float:
    """Of all steps, from the absolute values of the method's coefficients."""
    tableau, steps = _fixed(block)
    h = abs(block.interval[1] - block.interval[0]) / steps
    # In logarithms, since a field's bound can be 1e30: stage i is at most L (1 + h sum |a| k).
    stages: list[float] = []
    for row in tableau.a:
        inside = 0.0
        for weight, stage in zip(row, stages, strict=True):
            inside = _log_sum(inside, _log(abs(weight) * h) + stage)
        stages.append(log_field + inside)
    total = 0.0
    for weight, stage in zip(tableau.b, stages, strict=True):
        total = _log_sum(total, _log(abs(weight) * h) + stage)
    return steps * total
