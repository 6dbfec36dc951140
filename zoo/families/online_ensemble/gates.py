"""Soft selection of the k largest of N scores, under one interface.

Every gate turns scores c into memberships a in [0, 1] that sum to k. All but two are one formula,

    a_i = F((c_i - t) / T),   with t such that sum_i a_i = k,

with another distribution function F: the logistic one is, exactly, top-k by entropic optimal
transport to two anchors (SOFT: Xie et al., arXiv:2002.06504) at temperature T = eps / 2; the
Laplace one is LapSum (Struski et al., arXiv:2503.06242); the clipped ramp is the Euclidean
projection on the capped simplex, which is sparse; the Cauchy one has tails that reach every key.
t is found by a safeguarded Newton method, and the gradient comes from the implicit function
theorem on one scalar, so that a gate costs O(N) per row and stores no iterates:

    dL/dc_i = (w_i / T) (g_i - <w, g> / sum_j w_j),   w_i = F'((c_i - t) / T),  g = dL/da.

The two others: optimal transport by Sinkhorn iterations, which is the reference for the first, and
relaxed sorting networks (Petersen et al., arXiv:2203.09630) on the few largest scores.

Shape notation: ... any batch dimensions, N scores, M of them that enter a sorting network.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "Distribution",
    "GateConfig",
    "gate",
    "hard_topk",
    "sinkhorn",
    "sinkhorn_topk",
    "sorting_network_topk",
    "threshold_topk",
]

Distribution = Literal["logistic", "laplace", "clip", "cauchy"]

_NEWTON_STEPS = 100
_EXPORTED_STEPS = 16
"""Of a program, which cannot stop early. A dozen are enough for all gates; what is exported is
compared with the model before it is kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Which gate selects the classifiers of an input.

    Raises:
        ValueError: a value is out of range.
    """

    kind: Literal[
        "hard",
        "entropic",
        "laplace",
        "clip",
        "cauchy",
        "sinkhorn",
        "sinkhorn-unrolled",
        "sorting-network",
    ] = "entropic"
    """hard: k nearest keys; entropic: optimal transport in closed form; laplace: LapSum; clip:
    sparse; cauchy: heavy tails; sinkhorn: the same optimal transport by iterations, with implicit
    or unrolled gradient; sorting-network: relaxed sorting of the `preselect` largest."""
    k: int = 32
    """Memberships sum to k."""
    temperature: float = 0.02
    """Width of the soft boundary, on the axis of the scores; not used by the hard gate."""
    preselect: int = 64
    """Scores that enter the sorting network; the others are out."""
    iterations: int = 400
    """Iterations of Sinkhorn's algorithm."""

    def __post_init__(self) -> None:
        for field in ("k", "preselect", "iterations"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.kind == "sorting-network" and self.k > self.preselect:
            raise ValueError(f"k {self.k} must not exceed preselect {self.preselect}")


def gate(scores: Tensor, config: GateConfig, temperature: Tensor | float | None = None) -> Tensor:
    """Memberships of the k largest scores.

    Args:
        scores: ... x N.
        config: which gate.
        temperature: instead of that of `config`; a number, or ... x 1.

    Returns:
        ... x N in [0, 1], summing to k (Sinkhorn: when it has converged).

    Raises:
        ValueError: k is larger than N.
    """
    width = config.temperature if temperature is None else temperature
    if config.kind == "hard":
        return hard_topk(scores, config.k)
    if config.kind == "sorting-network":
        return sorting_network_topk(scores, config.k, width, config.preselect)
    if config.kind in ("sinkhorn", "sinkhorn-unrolled"):
        return sinkhorn_topk(
            scores, config.k, width, config.iterations, implicit=config.kind == "sinkhorn"
        )
    distributions: dict[str, Distribution] = {"entropic": "logistic"}
    name: Any = config.kind
    return threshold_topk(scores, config.k, width, distributions.get(name, name))


def _check(scores: Tensor, k: int) -> None:
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be from 1 to the number of scores {scores.shape[-1]}, got {k}")


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """One for the k largest scores and zero for the others, without gradient; ... x N."""
    _check(scores, k)
    index = scores.detach().topk(k, -1).indices
    return torch.zeros_like(scores, requires_grad=False).scatter(-1, index, 1.0)


def _distribution(name: Distribution, u: Tensor) -> tuple[Tensor, Tensor]:
    """F(u) and F'(u)."""
    if name == "logistic":
        value = u.sigmoid()
        return value, value * (1 - value)
    if name == "laplace":
        tail = 0.5 * (-u.abs()).exp()
        return torch.where(u > 0, 1 - tail, tail), tail
    if name == "clip":
        inside = (u.abs() < 0.5).to(u.dtype)
        return (u + 0.5).clamp(0, 1), inside
    return 0.5 + u.atan() / math.pi, 1 / (math.pi * (1 + u * u))


def _threshold(x: Tensor, k: int, name: Distribution) -> Tensor:
    """s with sum_i F(x_i - s) = k, ... x 1: Newton's method inside a shrinking bracket."""
    n = x.shape[-1]
    ordered = x.topk(k + 1, -1).values
    s = ordered[..., k - 1 : k + 1].mean(-1, keepdim=True)
    # F(-n) n < 1 <= k and F(n) n > n - 1 >= k for each F, with the Cauchy tails the widest.
    low, high = x.amin(-1, keepdim=True) - n, x.amax(-1, keepdim=True) + n
    tolerance = 4 * torch.finfo(x.dtype).eps * n
    exporting = torch.compiler.is_exporting()
    for _ in range(_EXPORTED_STEPS if exporting else _NEWTON_STEPS):
        value, slope = _distribution(name, x - s)
        excess = value.sum(-1, keepdim=True) - k
        done = excess.abs() <= tolerance
        if not exporting and bool(done.all()):
            break
        low = torch.where(excess > 0, s, low)
        high = torch.where(excess > 0, high, s)
        step = s + excess / slope.sum(-1, keepdim=True)
        usable = (step > low) & (step < high)  # false where the slope is zero
        following = torch.where(usable, step, (low + high) / 2)
        if exporting:
            s = torch.where(done, s, following)
            continue
        if bool((following == s).all()):
            break
        s = following
    return s


class _ThresholdTopK(torch.autograd.Function):
    """a = F(x - s(x)) with the implicit gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, name: Distribution) -> Tensor:
        value, slope = _distribution(name, x - _threshold(x, k, name))
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        total = slope.sum(-1, keepdim=True)
        # A fully hard gate has no slope anywhere; its gradient is zero, not 0 / 0.
        mean = (slope * g).sum(-1, keepdim=True) / total.clamp_min(torch.finfo(g.dtype).tiny)
        return slope * (g - mean), None, None


def threshold_topk(
    scores: Tensor, k: int, temperature: Tensor | float, distribution: Distribution = "logistic"
) -> Tensor:
    """Memberships a_i = F((c_i - t) / T) with t such that they sum to k.

    Args:
        scores: c, ... x N.
        k: number to select.
        temperature: T, positive; a number, or ... x 1.
        distribution: F.

    Returns:
        ... x N. The gradient is exact in `scores` and in `temperature`.

    Raises:
        ValueError: k is not in 1..N.
    """
    _check(scores, k)
    if k == scores.shape[-1]:
        return torch.ones_like(scores)
    # Distances from the boundary, so that small temperatures lose no precision.
    boundary = scores.detach().topk(k, -1).values[..., -1:]
    memberships: Tensor = _ThresholdTopK.apply((scores - boundary) / temperature, k, distribution)
    return memberships


# --- optimal transport ---------------------------------------------------------------------------


def _plan(cost: Tensor, rows: Tensor, columns: Tensor, eps: Tensor, iterations: int) -> Tensor:
    """Transport plan after Sinkhorn iterations in the log domain, the last one on the rows."""
    kernel = -cost / eps
    log_rows, log_columns = rows.log().unsqueeze(-1), columns.log().unsqueeze(-2)
    g = torch.zeros_like(log_columns + kernel[..., :1, :])
    f = log_rows - (kernel + g).logsumexp(-1, keepdim=True)
    for _ in range(iterations):
        g = log_columns - (kernel + f).logsumexp(-2, keepdim=True)
        f = log_rows - (kernel + g).logsumexp(-1, keepdim=True)
    return (f + g + kernel).exp()


class _Sinkhorn(torch.autograd.Function):
    """The plan with the implicit gradient in the cost, by the Schur complement on the columns."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, rows: Tensor, columns: Tensor, eps: Tensor, iterations: int
    ) -> Tensor:
        plan = _plan(cost, rows, columns, eps, iterations)
        ctx.save_for_backward(plan, rows, eps)
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        plan, rows, eps = ctx.saved_tensors
        s = g * plan
        r, q = s.sum(-1), s.sum(-2)[..., :-1]
        # One potential is free, so the last column is left out. The sums of the plan stand for
        # its nominal column sums, which a truncated iteration has not reached.
        part = plan[..., :-1]
        scaled = part / rows.unsqueeze(-1)
        schur = torch.diag_embed(part.sum(-2)) - part.mT @ scaled
        right = q - (scaled.mT @ r.unsqueeze(-1)).squeeze(-1)
        # Zero for a fully hard plan, whose gradient is zero as well.
        b = (torch.linalg.pinv(schur, hermitian=True) @ right.unsqueeze(-1)).mT
        b = torch.nn.functional.pad(b, (0, 1))
        a = (r.unsqueeze(-1) - (plan * b).sum(-1, keepdim=True)) / rows.unsqueeze(-1)
        return (plan * (a + b) - s) / eps, None, None, None, None


def sinkhorn(
    cost: Tensor,
    rows: Tensor,
    columns: Tensor,
    eps: Tensor | float,
    iterations: int = 400,
    *,
    implicit: bool = True,
) -> Tensor:
    """Entropic optimal transport.

    Args:
        cost: ... x N x m.
        rows, columns: masses, N and m, that sum to the same.
        eps: weight of the entropy; a number, or ... x 1 x 1.
        iterations: of Sinkhorn's algorithm.
        implicit: differentiate the optimality conditions, O(N m) memory; else the iterations. The
            implicit gradient is in `cost` alone.

    Returns:
        The plan, ... x N x m; its row sums are exact, its column sums in the limit.
    """
    eps = torch.as_tensor(eps, dtype=cost.dtype, device=cost.device)
    if not implicit:
        return _plan(cost, rows, columns, eps, iterations)
    plan: Tensor = _Sinkhorn.apply(cost, rows, columns, eps, iterations)
    return plan


def sinkhorn_topk(
    scores: Tensor,
    k: int,
    temperature: Tensor | float,
    iterations: int = 400,
    *,
    implicit: bool = True,
) -> Tensor:
    """Top-k as optimal transport of N scores to the anchors "in" and "out" (SOFT).

    Distances s = 1 - c move to the anchors 0 (mass k/N) and 1 at cost (s - y)^2, with entropy
    weight eps = 2 T. This is the reference for `threshold_topk` with the logistic distribution,
    to which it converges.

    Args:
        scores: ... x N.
        k: number to select.
        temperature: T; a number, or ... x 1.
        iterations, implicit: as for `sinkhorn`.

    Returns:
        Memberships, ... x N.

    Raises:
        ValueError: k is not in 1..N.
    """
    _check(scores, k)
    n = scores.shape[-1]
    if k == n:
        return torch.ones_like(scores)
    distance = 1 - scores
    anchors = torch.tensor([0.0, 1.0], dtype=scores.dtype, device=scores.device)
    cost = (distance.unsqueeze(-1) - anchors) ** 2
    rows = torch.full((n,), 1 / n, dtype=scores.dtype, device=scores.device)
    columns = torch.tensor([k / n, (n - k) / n], dtype=scores.dtype, device=scores.device)
    eps = 2 * torch.as_tensor(temperature, dtype=scores.dtype, device=scores.device)
    eps = eps.unsqueeze(-1) if eps.ndim else eps
    return n * sinkhorn(cost, rows, columns, eps, iterations, implicit=implicit)[..., 0]


# --- sorting network -----------------------------------------------------------------------------


class _Swaps(NamedTuple):
    """One layer of an odd-even network: the pairs (start, start + 1), (start + 2, ...) ..."""

    start: int
    pairs: int


def _optimal_sigmoid(u: Tensor) -> Tensor:
    """The monotonic sigmoid of slope 1 with the smallest error (arXiv:2203.09630): linear in the
    middle, and tails of 1/u."""
    tail = 1 / (16 * u.abs().clamp_min(0.25))
    return torch.where(u.abs() <= 0.25, u + 0.5, torch.where(u > 0, 1 - tail, tail))


def sorting_network_topk(
    scores: Tensor, k: int, temperature: Tensor | float, preselect: int = 64
) -> Tensor:
    """Memberships from a relaxed odd-even transposition network on the largest scores.

    Each swap of neighbours a, b is relaxed to a mixture with weight F((b - a) / T); the product
    of all layers is doubly stochastic, and a membership is the mass that a score sends to the k
    largest ranks. That mass is propagated from the ranks back to the scores, O(M) per layer.

    Args:
        scores: ... x N.
        k: number to select.
        temperature: T, width of a relaxed swap.
        preselect: the M largest scores that are sorted; the others get exactly 0.

    Returns:
        ... x N, summing to k.

    Raises:
        ValueError: k is not in 1..min(N, M).
    """
    _check(scores, k)
    m = min(preselect, scores.shape[-1])
    if k > m:
        raise ValueError(f"k must be at most the {m} scores that are sorted, got {k}")
    index = scores.detach().topk(m, -1).indices
    # Exactly sorted wires are a fixed point of hard swaps only; soft ones mix near ties.
    wires = scores.gather(-1, index)
    layers, mixtures = [_Swaps(i % 2, (m - i % 2) // 2) for i in range(m)], []
    for layer in layers:
        upper, lower = _pairs(wires, layer)
        keep = _optimal_sigmoid((upper - lower) / temperature)
        mixtures.append(keep)
        wires = _joined(
            wires, layer, keep * upper + (1 - keep) * lower, (1 - keep) * upper + keep * lower
        )
    mass = torch.zeros_like(wires)
    mass[..., :k] = 1.0
    for layer, keep in zip(reversed(layers), reversed(mixtures), strict=True):
        upper, lower = _pairs(mass, layer)
        mass = _joined(
            mass, layer, keep * upper + (1 - keep) * lower, (1 - keep) * upper + keep * lower
        )
    return torch.zeros_like(scores).scatter(-1, index, mass)


def _pairs(wires: Tensor, layer: _Swaps) -> tuple[Tensor, Tensor]:
    both = wires[..., layer.start : layer.start + 2 * layer.pairs]
    return both[..., 0::2], both[..., 1::2]


def _joined(wires: Tensor, layer: _Swaps, upper: Tensor, lower: Tensor) -> Tensor:
    stop = layer.start + 2 * layer.pairs
    both = torch.stack((upper, lower), -1).flatten(-2)
    return torch.cat((wires[..., : layer.start], both, wires[..., stop:]), -1)
