"""Tests of the gates against numpy, scipy, finite differences, and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor

from zoo.families.online_ensemble import (
    GateConfig,
    gate,
    hard_topk,
    sinkhorn,
    sinkhorn_topk,
    sorting_network_topk,
    threshold_topk,
)
from zoo.families.online_ensemble.gates import Distribution

KINDS = (
    *("hard", "entropic", "laplace", "clip", "cauchy"),
    *("sinkhorn", "sinkhorn-unrolled", "sorting-network"),
)
CDFS = {
    "logistic": lambda u: 1 / (1 + np.exp(-u)),
    "laplace": lambda u: np.where(u < 0, np.exp(-np.abs(u)) / 2, 1 - np.exp(-np.abs(u)) / 2),
    "clip": lambda u: np.clip(u + 0.5, 0, 1),
    "cauchy": lambda u: 0.5 + np.arctan(u) / np.pi,
}


def scores(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


# ------------------------------------------------------------------------ the threshold formula


@pytest.mark.parametrize("name", CDFS)
@given(
    n=st.integers(2, 40),
    share=st.floats(0.01, 0.99),
    temperature=st.floats(1e-3, 10.0),
    seed=st.integers(0, 100),
)
def test_memberships_are_those_of_a_root_finder(
    name: Distribution, n: int, share: float, temperature: float, seed: int
) -> None:
    k = max(1, min(n - 1, round(share * n)))
    c = scores(n, seed=seed)
    a = threshold_topk(c, k, temperature, name)
    x = c.numpy()
    excess = lambda t: CDFS[name]((x - t) / temperature).sum() - k  # noqa: E731
    reach = temperature * (n + 40)
    t = brentq(excess, x.min() - reach, x.max() + reach, xtol=1e-14, rtol=1e-14)
    expected = CDFS[name]((x - t) / temperature)
    torch.testing.assert_close(a, torch.from_numpy(expected), rtol=0, atol=1e-8)
    assert abs(float(a.sum()) - k) < 1e-9


@pytest.mark.parametrize("name", CDFS)
def test_gradients_are_finite_differences(name: Distribution) -> None:
    c = scores(3, 9).requires_grad_()
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, t: threshold_topk(c, 3, t, name), (c, temperature))


@given(seed=st.integers(0, 1000), k=st.integers(1, 29))
def test_laplace_is_the_closed_form_of_lapsum(seed: int, k: int) -> None:
    # For each segment between sorted scores, sum_i F = k is a quadratic equation in exp(t).
    x = np.sort(scores(30, seed=seed).numpy())
    for segment in range(31):
        below, above = x[:segment], x[segment:]
        # Scores below t contribute exp(x - t) / 2; those above 1 - exp(t - x) / 2.
        low, high = np.exp(below).sum() / 2, np.exp(-above).sum() / 2
        linear = k - len(above)  # low / e - high e = linear, with e = exp(t)
        if segment == 30:
            e = low / linear if linear > 0 else np.inf
        else:
            e = (-linear + np.sqrt(linear**2 + 4 * low * high)) / (2 * high)
        t = np.log(e) if e > 0 else -np.inf
        left = -np.inf if segment == 0 else x[segment - 1]
        right = np.inf if segment == 30 else x[segment]
        if left <= t <= right:
            break
    else:
        raise AssertionError("no segment holds the root")
    a = threshold_topk(torch.from_numpy(x), k, 1.0, "laplace")
    np.testing.assert_allclose(a.numpy(), CDFS["laplace"](x - t), atol=1e-9)


@given(seed=st.integers(0, 1000), k=st.integers(1, 19), weight=st.floats(0.05, 5.0))
def test_clip_is_the_projection_on_the_capped_simplex(seed: int, k: int, weight: float) -> None:
    c = scores(20, seed=seed)
    a = threshold_topk(c, k, weight, "clip")
    # a = argmin |a - c / weight|^2 under 0 <= a <= 1, sum a = k: check the conditions of KKT.
    dual = c / weight - a
    inside = (a > 1e-9) & (a < 1 - 1e-9)
    if inside.any():
        level = dual[inside].mean()
        torch.testing.assert_close(dual[inside], level.expand(int(inside.sum())), atol=1e-8, rtol=0)
        assert bool((dual[a <= 1e-9] <= level + 1e-8).all())
        assert bool((dual[a >= 1 - 1e-9] >= level - 1e-8).all())
    else:
        assert float(dual[a >= 0.5].min()) >= float(dual[a < 0.5].max()) - 1e-8


def test_a_temperature_per_row() -> None:
    c, temperature = scores(3, 12), torch.tensor([[0.1], [1.0], [5.0]], dtype=torch.float64)
    together = threshold_topk(c, 4, temperature)
    for row, t, a in zip(c, temperature, together, strict=True):
        torch.testing.assert_close(a, threshold_topk(row, 4, float(t)))


# ---------------------------------------------------------------------------- optimal transport


@pytest.mark.parametrize(("n", "k"), [(16, 4), (128, 16), (1024, 32)])
def test_the_closed_form_is_optimal_transport(n: int, k: int) -> None:
    c = scores(3, n, scale=0.05)
    closed = threshold_topk(c, k, 0.02)
    iterated = sinkhorn_topk(c, k, 0.02, 1500)
    assert float((closed - iterated).abs().max()) < 1e-10


def test_gradients_of_the_closed_form_the_implicit_and_the_unrolled_one_agree() -> None:
    c, g = scores(2, 12, scale=0.3), scores(2, 12, seed=1)
    found = []
    for function in (
        lambda c: threshold_topk(c, 4, 0.2),
        lambda c: sinkhorn_topk(c, 4, 0.2, 500),
        lambda c: sinkhorn_topk(c, 4, 0.2, 500, implicit=False),
    ):
        leaf = c.clone().requires_grad_()
        found.append(torch.autograd.grad((function(leaf) * g).sum(), leaf)[0])
    assert float((found[0] - found[1]).abs().max()) < 1e-10
    assert float((found[1] - found[2]).abs().max()) < 1e-10


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_the_implicit_gradient_of_any_transport_is_a_finite_difference(columns: int) -> None:
    cost = scores(6, columns).square().requires_grad_()
    rows = torch.full((6,), 1 / 6, dtype=torch.float64)
    share = torch.arange(1, columns + 1, dtype=torch.float64)
    share /= share.sum()
    assert torch.autograd.gradcheck(lambda c: sinkhorn(c, rows, share, 0.5, 400), cost)
    plan = sinkhorn(cost, rows, share, 0.5, 400)
    torch.testing.assert_close(plan.sum(1), rows)
    torch.testing.assert_close(plan.sum(0), share)


def test_truncated_iterations_leave_an_error_and_the_implicit_gradient_less_of_it() -> None:
    c, g = scores(6, scale=0.5, seed=2), scores(6, seed=3)

    def gradient(iterations: int, implicit: bool) -> Tensor:
        leaf = c.clone().requires_grad_()
        a = sinkhorn_topk(leaf, 2, 0.1, iterations, implicit=implicit)
        return torch.autograd.grad((a * g).sum(), leaf)[0]

    exact = gradient(2000, True)
    errors = [float((gradient(5, implicit) - exact).abs().max()) for implicit in (True, False)]
    assert 0 < errors[0] < errors[1]


# ------------------------------------------------------------------------------ sorting network


def relaxed_bubble_sort(x: list[float], k: int, temperature: float) -> list[float]:
    """The same network with its permutation matrix written out."""
    n = len(x)
    permutation, wires = np.eye(n), np.array(x)
    for layer in range(n):
        swap = np.eye(n)
        for i in range(layer % 2, n - 1, 2):
            u = (wires[i] - wires[i + 1]) / temperature
            tail = 1 / (16 * max(abs(u), 0.25))
            keep = u + 0.5 if abs(u) <= 0.25 else (1 - tail if u > 0 else tail)
            swap[i : i + 2, i : i + 2] = [[keep, 1 - keep], [1 - keep, keep]]
        permutation, wires = swap @ permutation, swap @ wires
    return permutation[:k].sum(0).tolist()


@given(n=st.integers(2, 9), k=st.integers(1, 8), seed=st.integers(0, 100))
def test_the_network_is_the_product_of_its_layers(n: int, k: int, seed: int) -> None:
    k = min(k, n)
    c = scores(n, seed=seed).sort(descending=True).values
    expected = relaxed_bubble_sort(c.tolist(), k, 0.3)
    a = sorting_network_topk(c, k, 0.3, n)
    torch.testing.assert_close(a, torch.tensor(expected, dtype=torch.float64))


def test_the_network_has_a_gradient_and_leaves_the_others_out() -> None:
    c = scores(2, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sorting_network_topk(c, 3, 0.5, 6), c)
    a = sorting_network_topk(c, 3, 0.5, 6)
    assert int((a > 0).sum(1).max()) <= 6
    torch.testing.assert_close(a.sum(1), torch.full((2,), 3.0, dtype=torch.float64))


# ------------------------------------------------------------------------- what all gates share


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 20), k=st.integers(1, 20), seed=st.integers(0, 100))
def test_memberships_are_shares_that_sum_to_k(kind: str, n: int, k: int, seed: int) -> None:
    k = min(k, n)
    config = GateConfig(kind=kind, k=k, temperature=0.5, preselect=20)  # type: ignore[arg-type]
    a = gate(scores(3, n, seed=seed), config)
    assert a.shape == (3, n)
    assert float(a.min()) >= -1e-12
    assert float(a.max()) <= 1 + 1e-9
    tolerance = 1e-3 if "sinkhorn" in kind else 1e-9  # Sinkhorn may not have converged
    torch.testing.assert_close(
        a.sum(1), torch.full((3,), float(k), dtype=torch.float64), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("kind", [k for k in KINDS if "sinkhorn" not in k])
def test_all_gates_become_the_hard_one(kind: str) -> None:
    c = torch.linspace(-1, 1, 16, dtype=torch.float64)[torch.randperm(16)]
    config = GateConfig(kind=kind, k=4, temperature=1e-5, preselect=16)  # type: ignore[arg-type]
    torch.testing.assert_close(gate(c, config), hard_topk(c, 4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "hard"])
def test_more_of_one_score_is_never_less_of_its_membership(kind: str) -> None:
    config = GateConfig(kind=kind, k=3, temperature=0.5, iterations=300)  # type: ignore[arg-type]
    c = scores(8)
    for index in range(8):
        more = c.clone()
        more[index] += 0.2
        assert float(gate(more, config)[index]) >= float(gate(c, config)[index]) - 1e-9


def test_single_precision_sums_to_k_at_the_released_temperature() -> None:
    c = scores(60, 1024, scale=0.04).float()
    a = threshold_topk(c, 32, 2.5e-4)
    assert float((a.double().sum(1) - 32).abs().max()) < 1e-3


def test_a_gate_with_ties_and_without_slope_has_a_zero_gradient() -> None:
    c = torch.tensor([1.0, 1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(threshold_topk(c, 2, 1e-9, "clip")[0], c)
    assert torch.equal(g, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_scores_is_refused(kind: str, k: int) -> None:
    if k == 0:
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            GateConfig(kind=kind, k=k)  # type: ignore[arg-type]
    else:
        with pytest.raises(ValueError, match="k must be from 1 to the number of scores 4, got 5"):
            gate(scores(2, 4), GateConfig(kind=kind, k=k))  # type: ignore[arg-type]


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        GateConfig(temperature=0.0)
    with pytest.raises(ValueError, match="k 65 must not exceed preselect 64"):
        GateConfig(kind="sorting-network", k=65)
    with pytest.raises(ValueError, match="at most the 4 scores that are sorted, got 5"):
        sorting_network_topk(scores(9), 5, 1.0, 4)
