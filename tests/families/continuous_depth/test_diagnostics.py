"""Tests of the diagnostics on systems whose answers are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor, nn

from zoo.families.continuous_depth import ODEBlock, ODEResNet, ODEResNetConfig, SolverConfig
from zoo.families.continuous_depth.diagnostics import (
    _estimator_ratio,
    _hessenberg,
    block_steps,
    diagnose_block,
    field_extremes,
    flow_exponents,
    input_lipschitz,
    largest_of_symmetric,
    log_lipschitz_bound,
    spectral_radius,
    step_gain,
)
from zoo.families.continuous_depth.solvers import TABLEAUS, step_grid


class Linear(nn.Module):
    """dy/dt = A y."""

    def __init__(self, a: Any) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.as_tensor(a, dtype=torch.float64))

    def forward(self, t: float, y: Tensor) -> Tensor:
        return y @ self.a.T


def block(a: Any, method: str = "rk4", steps: int = 8, end: float = 1.0) -> ODEBlock:
    return ODEBlock(Linear(a), SolverConfig(method=method, steps=steps), (0.0, end))  # type: ignore[arg-type]


def states(n: int = 3, d: int = 4) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def matrix(d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------- Krylov methods


@pytest.mark.parametrize("d", [1, 2, 5, 12])
def test_arnoldi_finds_all_eigenvalues_of_a_small_matrix(d: int) -> None:
    a = matrix(d)
    h = _hessenberg(lambda v: v @ a.T, states(2, d), 16, 0)
    for row in h:
        found = torch.linalg.eigvals(row).abs().sort().values
        torch.testing.assert_close(found, torch.linalg.eigvals(a).abs().sort().values)


def test_repeated_eigenvalues_do_not_end_the_search() -> None:
    a = torch.diag(torch.tensor([-1.0, -1.0, -1.0, -3.0], dtype=torch.float64))
    assert float(largest_of_symmetric(lambda v: v @ a, states()).max()) == pytest.approx(-1.0)
    torch.testing.assert_close(
        spectral_radius(lambda v: v @ a, states()), torch.full((3,), 3.0, dtype=torch.float64)
    )


def test_gain_and_extremes_are_those_of_linear_algebra() -> None:
    a = matrix()
    gain = step_gain(lambda y: torch.tanh(y @ a.T), states())
    for y, found in zip(states(), gain, strict=True):
        jacobian = torch.diag(1 - torch.tanh(a @ y) ** 2) @ a
        assert float(found) == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)))
    radius, log_norm = field_extremes(block(a), 0.0, states())
    assert float(radius[0]) == pytest.approx(float(torch.linalg.eigvals(a).abs().max()))
    assert float(log_norm[0]) == pytest.approx(float(torch.linalg.eigvalsh((a + a.T) / 2).max()))


# ------------------------------------------------------------------------------------- exponents


def test_exponents_of_a_linear_field_are_those_of_its_matrix_exponential() -> None:
    a, end = matrix(), 1.5
    found = flow_exponents(block(a, steps=24, end=end), states(), 4, rounds=2)
    singular = torch.linalg.svdvals(torch.from_numpy(expm(end * a.numpy())))
    expected = singular.log() / end
    for row in found:
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3)


def test_a_rotation_has_no_exponents_and_euler_blows_it_up() -> None:
    speed, steps = 3.0, 10
    a = [[0.0, -speed], [speed, 0.0]]
    exact = flow_exponents(block(a, steps=16), states(2, 2), 2, rounds=2)
    torch.testing.assert_close(exact, torch.zeros(2, 2).to(exact), atol=1e-3, rtol=0)
    euler = flow_exponents(block(a, "euler", steps), states(2, 2), 2, rounds=2)
    gain = (1 + (speed / steps) ** 2) ** (steps / 2)
    torch.testing.assert_close(euler, torch.full((2, 2), math.log(gain)).to(euler))
    assert float(field_extremes(block(a), 0.0, states(2, 2))[1].abs().max()) < 1e-9


def test_k_is_checked() -> None:
    with pytest.raises(ValueError, match="k must be from 1 to 4, got 5"):
        flow_exponents(block(matrix()), states(), 5)


# ----------------------------------------------------------------------------------- a diagnosis


def test_products_of_steps_are_matrix_powers() -> None:
    a, steps = 0.4 * matrix(), 6
    found = diagnose_block(block(a, "euler", steps), states())
    step = torch.eye(4, dtype=torch.float64) + a / steps
    for k in range(steps):
        product = torch.linalg.matrix_power(step, k + 1)
        expected = float(torch.linalg.matrix_norm(product, 2))
        assert found.product_gain[k] == pytest.approx(expected, rel=1e-6)
    assert found.step_radius[0] == pytest.approx(float(torch.linalg.eigvals(step).abs().max()))
    assert found.log_norm_integral == pytest.approx(
        float(torch.linalg.eigvalsh((a + a.T) / 2).max()), rel=1e-6
    )
    assert found.product_gain[-1] <= math.exp(found.log_norm_integral) + 1e-9
    inverse = torch.linalg.matrix_power(torch.eye(4, dtype=torch.float64) - a / steps, steps)
    assert found.inverse_exponent == pytest.approx(
        math.log(float(torch.linalg.matrix_norm(inverse, 2))), rel=1e-3
    )
    assert (found.method, found.steps, found.samples) == ("euler", steps, 3)


def test_a_mild_flow_raises_no_alarm() -> None:
    found = diagnose_block(block(0.2 * matrix()), states())
    assert found.alarms == ()
    assert found.reconstruction < 1e-6
    assert found.adjoint_cosine > 0.9999
    assert found.stiffness < 0.1


@pytest.mark.parametrize(
    ("a", "method", "steps", "alarm"),
    [
        ([[-100.0, 0.0], [0.0, -1.0]], "euler", 20, "is 5.00, above 2.0: not stable"),
        ([[8.0, 0.0], [0.0, 7.0]], "rk4", 16, "largest exponent times duration is 8.0, above 5"),
        ([[8.0, 0.0], [0.0, 7.0]], "rk4", 16, "grows exponentially with depth"),
        ([[8.0, 0.0], [0.0, 7.0]], "euler", 16, "spectral radius of a step above 1.1"),
        ([[-8.0, 0.0], [0.0, -8.0]], "rk4", 16, "no adjoint"),
        ([[-3.0, 0.0], [0.0, -3.0]], "euler", 8, "integrating back misses the start"),
    ],
)
def test_alarms(a: Any, method: str, steps: int, alarm: str) -> None:
    found = diagnose_block(block(a, method, steps), states(3, 2))
    assert any(alarm in text for text in found.alarms), found.alarms


def test_gradients_through_the_last_steps_grow_to_the_whole() -> None:
    """With dy/dt = a y, steps (1 + h a) and one parameter a, the gradient is known."""
    value, steps = 0.5, 8
    flow = ODEBlock(Linear([[value]]), SolverConfig(method="euler", steps=steps))
    y = torch.ones(1, 1, dtype=torch.float64)
    found = diagnose_block(flow, y, k=1)
    weight = float(torch.randn(1, 1, generator=torch.Generator().manual_seed(98)))
    growth = 1 + value / steps
    expected = [abs(weight) * m / steps * growth ** (steps - 1) for m in (1, 2, 4, 8)]
    assert list(found.gradient_norms) == pytest.approx(expected, rel=1e-6)


class Driven(nn.Module):
    """dy/dt = p + a y, with a fixed and p to be learned."""

    def __init__(self, a: Any) -> None:
        super().__init__()
        self.a = torch.as_tensor(a, dtype=torch.float64)
        self.p = nn.Parameter(torch.ones_like(self.a))

    def forward(self, t: float, y: Tensor) -> Tensor:
        return self.p + self.a * y


def test_the_direction_of_gradients_through_the_last_steps() -> None:
    """With dy/dt = p + a y, m Euler steps have the gradient ((1 + h a)^m - 1) / a in p."""
    steps, a = 8, (6.0, 0.5)
    flow = ODEBlock(Driven(a), SolverConfig(method="euler", steps=steps))
    found = diagnose_block(flow, torch.ones(1, 2, dtype=torch.float64), k=1)
    weights = torch.randn(1, 2, generator=torch.Generator().manual_seed(98))[0].tolist()
    gradients = [
        [w * ((1 + value / steps) ** m - 1) / value for w, value in zip(weights, a, strict=True)]
        for m in (1, 2, 4, 8)
    ]
    norms = [math.hypot(*g) for g in gradients]
    assert list(found.gradient_norms) == pytest.approx(norms, rel=1e-6)
    cosines = [
        sum(x * y for x, y in zip(g, gradients[-1], strict=True)) / norm / norms[-1]
        for g, norm in zip(gradients, norms, strict=True)
    ]
    assert list(found.gradient_cosines) == pytest.approx(cosines, rel=1e-6)
    assert cosines[0] < 0.95
    text = "the gradient grows faster than the number of steps"
    for rates, alarm in (((6.0, 6.0), True), ((0.3, 0.2), False)):
        flow = ODEBlock(Driven(rates), SolverConfig(method="euler", steps=steps))
        found = diagnose_block(flow, torch.ones(1, 2, dtype=torch.float64), k=1)
        assert any(text in said for said in found.alarms) is alarm


@pytest.mark.parametrize(("value", "alarm"), [(0.5, False), (8.0, True)])
def test_the_variance_of_gradients_over_depth(value: float, alarm: bool) -> None:
    """With dy/dt = a y, n Euler steps have the gradient n h (1 + h a)^(n - 1) in a."""
    steps = 8
    flow = ODEBlock(Linear([[value]]), SolverConfig(method="euler", steps=steps))
    found = diagnose_block(flow, torch.ones(1, 1, dtype=torch.float64), k=1)
    weight = float(torch.randn(1, 1, generator=torch.Generator().manual_seed(97)))
    generator = torch.Generator().manual_seed(96)
    noise = [float(torch.randn(1, 1, generator=generator)) for _ in range(16)]
    for n in range(1, steps + 1):
        gradients = [
            weight * n / steps * (1 + value * (1 + 0.01 * e) / steps) ** (n - 1) for e in noise
        ]
        expected = float(torch.tensor(gradients, dtype=torch.float64).var())
        assert found.gradient_variances[n - 1] == pytest.approx(expected, rel=1e-6, abs=1e-30)
    text = "the variance of the gradient grows exponentially"
    assert any(text in said for said in found.alarms) is alarm


def test_the_variance_of_both_estimators_is_that_of_quadrature() -> None:
    """With dy/dt = a y, n Euler steps lead to (1 + h a)^n; a is moved by a hundredth of itself."""
    value, steps = 30.0, 8
    flow = ODEBlock(Linear([[value]]), SolverConfig(method="euler", steps=steps))
    y = torch.ones(1, 1, dtype=torch.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    step, scale = 1 / steps, 0.01 * value

    def loss(z: np.ndarray) -> np.ndarray:
        return (1 + step * (value + scale * z)) ** steps

    def slope(z: np.ndarray) -> np.ndarray:
        return steps * step * scale * (1 + step * (value + scale * z)) ** (steps - 1)

    by_gradient = (slope(nodes) + slope(-nodes)) / 2
    by_values = (loss(nodes) - loss(-nodes)) * nodes / 2
    means = [weights @ found for found in (by_gradient, by_values)]
    assert means[0] == pytest.approx(means[1], rel=1e-9)  # of the same gradient
    ours, theirs = (
        weights @ (found - mean) ** 2
        for found, mean in zip((by_gradient, by_values), means, strict=True)
    )
    tableau, count = TABLEAUS["euler"], steps
    found = _estimator_ratio(flow, y, list(step_grid(0.0, 1.0, count)), tableau, pairs=4000)
    assert found == pytest.approx(3 * ours / theirs, rel=0.2)
    assert diagnose_block(flow, y, k=1).estimator_ratio == pytest.approx(found, rel=1.0)


@pytest.mark.parametrize(("rate", "alarm"), [(2.5, False), (3.7, True)])
def test_gradients_through_chaos_vary_more_than_evolution_strategies(
    rate: float, alarm: bool
) -> None:
    """The logistic map has a stable fixed point at rates below 3, and is chaotic at 3.7."""
    steps = 40

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor([rate], dtype=torch.float64))

        def forward(self, t: float, y: Tensor) -> Tensor:
            return steps * (self.rate * y * (1 - y) - y)

    flow = ODEBlock(Logistic(), SolverConfig(method="euler", steps=steps))
    found = diagnose_block(flow, torch.tensor([[0.3]], dtype=torch.float64), k=1)
    assert (found.estimator_ratio > 1e6) is alarm
    text = "times as much as evolution strategies"
    assert any(text in said for said in found.alarms) is alarm


def test_percentiles_are_over_the_samples() -> None:
    """dy/dt = y^3 stretches each state by another factor."""

    class Cubic(nn.Module):
        def forward(self, t: float, y: Tensor) -> Tensor:
            return y**3

    y = torch.linspace(0.1, 0.5, 9, dtype=torch.float64)[:, None]
    found = diagnose_block(ODEBlock(Cubic(), SolverConfig(method="euler", steps=1)), y, k=1)
    slopes = 1 + 3 * y[:, 0] ** 2
    for median, p95, exact in (
        (found.step_gain[0], found.step_gain_p95[0], slopes),
        (found.step_radius[0], found.step_radius_p95[0], slopes),
        (found.stiffness, found.stiffness_p95, slopes - 1),
        (found.log_norm_integral, found.log_norm_integral_p95, slopes - 1),
    ):
        assert median == pytest.approx(float(exact.quantile(0.5)), rel=1e-6)
        assert p95 == pytest.approx(float(exact.quantile(0.95)), rel=1e-6)
    missed = (y + y**3 - (y + y**3) ** 3 - y).abs()[:, 0] / y[:, 0]
    assert found.reconstruction_p95 == pytest.approx(float(missed.quantile(0.95)), rel=1e-6)
    assert found.inverse_exponent_p95 >= found.inverse_exponent
    assert found.gradient_norms == found.gradient_cosines == found.gradient_variances == ()
    assert found.estimator_ratio is None


def test_an_adaptive_block_is_looked_at_on_a_fixed_grid() -> None:
    flow = ODEBlock(Linear(matrix()), SolverConfig(method="dopri5", tolerance=1e-8))
    with torch.no_grad():
        y = states()
        exact = flow(y)
        for step in block_steps(flow):
            y = step(y)
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- Lipschitz bounds


def test_a_linear_net_has_equal_bounds_below_and_above() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double().eval()
    images = torch.randn(5, 1, 3, 4, dtype=torch.float64)
    found = input_lipschitz(net[1], images.flatten(1), 2.0, (12,))
    exact = 2.0 * float(torch.linalg.matrix_norm(net[1].weight, 2))
    for value in (found.lower, found.lower_with_midpoints, found.mean, found.rms, found.p95):
        assert value == pytest.approx(exact)
    assert found.log10_upper == pytest.approx(math.log10(exact))
    assert found.vacuous is False


def test_each_channel_is_scaled_by_its_own_deviation() -> None:
    """A net that reads channel 0 alone does not feel that channel 1 was stretched."""
    std, weight = (0.5, 0.1), torch.tensor([3.0, 4.0], dtype=torch.float64)

    class ReadsOne(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0, 0, :1] * weight

    images = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    found = input_lipschitz(ReadsOne(), images, [1.0 / s for s in std], (2, 3, 4))
    for value in (found.lower, found.lower_with_midpoints, found.mean, found.rms, found.p95):
        assert value == pytest.approx(2.0 * 5.0)
    # Above, nothing is known of what a layer reads: the narrowest channel counts.
    net = nn.Conv2d(2, 1, 1).double()
    upper = input_lipschitz(net, images[..., :1, :1], [1.0 / s for s in std], (2, 1, 1)).log10_upper
    gain = 10.0 * float(torch.linalg.vector_norm(net.weight))
    assert upper == pytest.approx(math.log10(1.01 * gain), abs=1e-6)


@pytest.mark.parametrize("aligned", [True, False])
def test_two_layers_meet_the_bound_only_when_aligned(aligned: bool) -> None:
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        one.weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
        two.weight.copy_(torch.diag(torch.tensor([2.0, 1.0] if aligned else [1.0, 2.0])))
    net = nn.Sequential(one, two).double()
    found = input_lipschitz(net, torch.randn(4, 2, dtype=torch.float64), 1.0, (2,))
    assert found.lower == pytest.approx(6.0 if aligned else 3.0)
    assert 10 ** float(found.log10_upper or 0.0) == pytest.approx(6.0)


def test_a_convolutions_bound_is_found_on_its_own_device() -> None:
    """The meta device stands for any that is not the convolution's."""
    conv = nn.Conv2d(1, 1, 1)
    with torch.device("meta"):
        bound = log_lipschitz_bound(conv, (1, 4, 4))
    assert bound == pytest.approx(math.log(1.01 * float(conv.weight.detach().abs())), abs=1e-6)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0)])
def test_a_convolutions_bound_is_the_norm_of_its_matrix(stride: int, padding: int) -> None:
    conv = nn.Conv2d(2, 3, 3, stride, padding).double()
    shape = (2, 7, 6)
    rows = torch.eye(84, dtype=torch.float64).view(84, *shape)
    columns = (conv(rows) - conv(torch.zeros(1, *shape).double())).flatten(1)
    exact = float(torch.linalg.matrix_norm(columns, 2))
    bound = math.exp(log_lipschitz_bound(conv, shape))
    assert exact <= bound <= 1.011 * exact


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_convolution_that_pads_with_its_image_has_no_bound(mode: Any) -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode)
    with pytest.raises(NotImplementedError, match=f"Conv2d with padding_mode='{mode}'"):
        log_lipschitz_bound(conv, (1, 4, 4))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_the_bound_of_an_elu_is_its_steepest_slope(alpha: float) -> None:
    x = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    slopes = nn.ELU(alpha)(x).diff() / x.diff()
    bound = math.exp(log_lipschitz_bound(nn.ELU(alpha), (2,)))
    assert bound == pytest.approx(float(slopes.max()), rel=1e-3)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["group", "layer", "batch"])
def test_the_bound_of_a_normalisation_holds_for_its_jacobian(kind: str, affine: bool) -> None:
    shape = (4, 3, 2)
    norm: nn.Module
    if kind == "group":
        norm = nn.GroupNorm(2, 4, eps=0.1, affine=affine)
    elif kind == "layer":
        norm = nn.LayerNorm(shape, eps=0.1, elementwise_affine=affine)
    else:
        norm = nn.BatchNorm2d(4, eps=0.1, affine=affine)
        norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 0.7]))  # type: ignore[operator, union-attr]
    norm = norm.double().eval()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(-2, 1, parameter.numel()).view_as(parameter))
    bound = math.exp(log_lipschitz_bound(norm, shape))
    images = torch.randn(8, *shape, dtype=torch.float64) * 0.01
    gains = []
    for image in images:
        jacobian = torch.autograd.functional.jacobian(lambda x: norm(x[None]).flatten(), image)
        gains.append(float(torch.linalg.matrix_norm(jacobian.flatten(1), 2)))
    assert 0.5 * bound < max(gains) <= bound * (1 + 1e-9)
    if kind == "batch":
        assert max(gains) == pytest.approx(bound)


def test_without_statistics_a_batch_normalisation_has_no_bound() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(NotImplementedError, match="BatchNorm2d"):
        log_lipschitz_bound(norm, (4, 3, 2))


def test_a_tiny_networks_bound_is_above_what_is_seen_below() -> None:
    config = ODEResNetConfig(widths=(2, 4), nodes=2, solver=SolverConfig(method="rk4", steps=2))
    network = ODEResNet(config).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    found = input_lipschitz(network, images, 1.0, (1, 8, 8))
    assert found.log10_upper is not None
    assert math.log10(found.lower) < found.log10_upper
    assert found.lower_with_midpoints >= found.lower >= found.p95 >= 0
    assert found.vacuous is True, "three group normalisations and an exponential"


def test_a_fields_bound_holds_for_every_solver() -> None:
    """One Euler step of a field with bound L is at most 1 + hL; rk4 at most its polynomial."""
    from zoo.families.continuous_depth.diagnostics import _log_flow_bound

    bound, h = 2.0, 0.25
    for method, polynomial in (
        ("euler", 1 + h * bound),
        ("midpoint", 1 + h * bound + (h * bound) ** 2 / 2),
        ("rk4", sum((h * bound) ** k / math.factorial(k) for k in range(5))),
    ):
        found = _log_flow_bound(block(matrix(), method, 4), math.log(bound))
        assert found == pytest.approx(4 * math.log(polynomial))


def test_an_unknown_layer_has_no_bound() -> None:
    with pytest.raises(NotImplementedError, match="MaxPool2d"):
        log_lipschitz_bound(nn.MaxPool2d(3, 2), (1, 8, 8))
    net = nn.Sequential(nn.Linear(4, 3), nn.GELU())
    assert input_lipschitz(net, torch.randn(2, 4), 1.0, (4,)).log10_upper is None


def test_a_parameter_that_is_not_used_does_not_count() -> None:
    one = block(-0.5 * torch.eye(4).double())
    cosine = diagnose_block(one, states()).adjoint_cosine
    one.field.unused = nn.Parameter(torch.ones(2).double())
    assert diagnose_block(one, states()).adjoint_cosine == pytest.approx(cosine, abs=1e-9)
