"""Tests of normalising flows, latent ODEs, and the repeated composition of one network."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo.errors import SolverError
from zoo.families.continuous_depth import SolverConfig
from zoo.families.continuous_depth.flows import (
    ContinuousFlow,
    CouplingFlow,
    FlowConfig,
    build_flow,
)
from zoo.families.continuous_depth.repeated import (
    MAX_EXACT_COMPOSITIONS,
    RepeatedComposition,
    lipschitz_approximant,
)
from zoo.families.continuous_depth.trajectories import (
    LatentODE,
    TrajectoryConfig,
    TrajectoryRNN,
    build_trajectory_network,
    refined_times,
)


def randomised(module: Any, scale: float = 0.3) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.double()


def one_hot(index: int, n: int, of: int = 2) -> Tensor:
    return nn.functional.one_hot(torch.full((n,), index), of).double()


def flow(**changes: Any) -> Any:
    config = FlowConfig(conditions=2, hidden=8, couplings=4, **changes)
    return randomised(build_flow(config))


# --------------------------------------------------------------------------------------- flows


@pytest.mark.parametrize("kind", ["continuous", "coupling"])
@pytest.mark.parametrize("condition", [0, 1])
def test_a_density_integrates_to_one(kind: Any, condition: int) -> None:
    axis = torch.linspace(-9, 9, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = flow(kind=kind).log_prob(grid, one_hot(condition, len(grid))).exp()
    total = torch.trapezoid(torch.trapezoid(density.view(121, 121), axis), axis)
    assert float(total) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("kind", ["continuous", "coupling"])
def test_log_density_is_the_change_of_variables(kind: Any) -> None:
    """log p(x) = log p0(z) - log |det dx/dz|, the determinant by automatic differentiation."""
    changes = {"solver": SolverConfig(method="rk4", steps=16)} if kind == "continuous" else {}
    model = flow(kind=kind, **changes)
    z, c = torch.randn(5, 2, dtype=torch.float64), one_hot(1, 5)
    x = model.transform(z, c)
    jacobian = torch.autograd.functional.jacobian(lambda z: model.transform(z, c).sum(0), z)
    determinant = torch.linalg.det(jacobian.transpose(0, 1))
    base = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(
        model.log_prob(x, c), base - determinant.abs().log(), rtol=1e-5, atol=1e-5
    )


def test_derivatives_along_tangents_are_those_of_automatic_differentiation() -> None:
    field = flow().flow.field
    z, c = torch.randn(4, 2, dtype=torch.float64), one_hot(0, 4)
    tangents = torch.randn(3, 4, 2, dtype=torch.float64)
    _, along = field.velocity(0.3, z, c, tangents)
    for tangent, found in zip(tangents, along, strict=True):
        _, expected = torch.autograd.functional.jvp(
            lambda z: field.velocity(0.3, z, c, z[None])[0], z, tangent
        )
        torch.testing.assert_close(found, expected)


def test_hutchinsons_estimate_is_exact_in_the_mean_over_all_signs() -> None:
    """In the limit of one small step the log-density is linear in the trace."""
    steps = SolverConfig(method="euler", steps=1)
    exact, estimated = flow(solver=steps), flow(solver=steps, trace="hutchinson")
    estimated.load_state_dict(exact.state_dict())
    x, c = torch.randn(6, 2, dtype=torch.float64), one_hot(0, 6)
    found = [
        estimated.log_prob(x, c, torch.tensor(signs, dtype=torch.float64).expand(6, 2))
        for signs in itertools.product((-1.0, 1.0), repeat=2)
    ]
    torch.testing.assert_close(torch.stack(found).mean(0), exact.log_prob(x, c))
    assert not torch.allclose(found[0], found[1])


def test_in_eval_mode_a_flow_with_hutchinsons_estimator_has_the_exact_trace() -> None:
    exact, estimated = flow().eval(), flow(trace="hutchinson")
    estimated.load_state_dict(exact.state_dict())
    x, c = torch.randn(6, 2, dtype=torch.float64), one_hot(0, 6)
    assert not torch.equal(estimated.log_prob(x, c), estimated.log_prob(x, c)), "training draws"
    estimated.eval()
    before = torch.get_rng_state()
    torch.testing.assert_close(estimated.log_prob(x, c), exact.log_prob(x, c))
    torch.testing.assert_close(
        estimated.transform(x, c), exact.transform(x, c), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(estimated.train().transform(x, c), estimated.eval().transform(x, c))
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn"


def test_of_many_dimensions_eval_mode_takes_the_same_signs_for_all_points() -> None:
    model = flow(dim=17, trace="hutchinson").eval()
    x, c = torch.randn(6, 17, dtype=torch.float64), one_hot(0, 6)
    before = torch.get_rng_state()
    together = model.log_prob(x, c)
    alone = torch.cat([model.log_prob(x[i : i + 1], c[:1]) for i in reversed(range(6))]).flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn"


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_the_likelihoods_gradient_does_not_depend_on_the_mode(gradient: Any) -> None:
    model, x, c = flow(), torch.randn(6, 2, dtype=torch.float64), one_hot(0, 6)
    found = {}
    for mode in ("discrete", gradient):
        model.gradient_mode, model.steps = mode, 12
        model.zero_grad()
        model.log_prob(x, c).mean().backward()
        found[mode] = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found["discrete"], found[gradient], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["continuous", "coupling"])
def test_a_fresh_flow_is_the_standard_normal(kind: Any) -> None:
    model = build_flow(FlowConfig(kind=kind, conditions=2))
    assert isinstance(model, (ContinuousFlow, CouplingFlow))
    x = torch.randn(7, 2)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_prob(x, one_hot(0, 7).float()), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 1}, "dim must be at least 2"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"kind": "foo"}, "kind must be one of 'continuous', 'coupling', got 'foo'"),
        ({"trace": "foo"}, "trace must be one of 'exact', 'hutchinson', got 'foo'"),
    ],
)
def test_a_wrong_flow_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig(**options)


# -------------------------------------------------------------------------------- trajectories


@given(
    steps=st.lists(st.floats(0.011, 3.0), min_size=1, max_size=6),
    first=st.floats(0.0, 2.0),
    spacing=st.floats(0.1, 1.0),
)
def test_refined_times_include_all_and_leave_no_gap(
    steps: list[float], first: float, spacing: float
) -> None:
    times = list(itertools.accumulate([first, *steps]))
    grid, wanted = refined_times(times, spacing)
    assert [grid[i] for i in wanted] == times
    assert grid[0] == 0.0
    gaps = [b - a for a, b in itertools.pairwise(grid)]
    assert all(0 < gap <= spacing * (1 + 1e-6) for gap in gaps)


def test_times_that_go_back_are_refused() -> None:
    for times in ([1.0, 0.5], [1.0, 1.0], [-0.1], [0.5, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="increasing from 0 on"):
            refined_times(times, 0.1)


def test_a_grid_of_more_intervals_than_evaluations_is_refused_before_it_is_made() -> None:
    assert len(refined_times([0.4, 1.0], 0.1, 10)[0]) == 11
    with pytest.raises(SolverError, match=r"Up to time 1 in steps of at most 0\.1 .* max_nfe=9"):
        refined_times([0.4, 1.0], 0.1, 9)
    with pytest.raises(SolverError, match="more than max_nfe=2 intervals"):
        refined_times([0.1, 0.2, 0.3], 0.5, 2)
    network = LatentODE(TrajectoryConfig())
    for late in (1e300, 1e6):
        with pytest.raises(SolverError, match="more than max_nfe=10000 intervals"):
            network.decode(torch.zeros(1, 4), [0.5, late])


def test_evaluations_of_a_latent_ode_are_not_known_before_a_call() -> None:
    network = LatentODE(TrajectoryConfig(spacing=0.1))
    assert network.nfe == 0
    network.decode(torch.zeros(1, 4), [0.5])
    assert network.nfe == 2 * 5
    network.steps = 2
    assert network.nfe == 0


@pytest.mark.parametrize("kind", ["latent_ode", "rnn"])
def test_networks_refuse_such_times_too(kind: Any) -> None:
    network = build_trajectory_network(TrajectoryConfig(kind=kind))
    times, values = torch.tensor([[0.1, 0.2]]), torch.zeros(1, 2, 2)
    for at in ([0.6, 0.4], [0.6, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="increasing from 0 on"):
            network(times, values, at)
    with pytest.raises(ValueError, match="at least one time"):
        network(times, values, [])


def observed(batch: int = 3, n: int = 5) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    generator = torch.Generator().manual_seed(0)
    grid = [0.1 * (i + 1) for i in range(12)]
    index = torch.stack(
        [torch.randperm(12, generator=generator)[:n].sort().values for _ in range(batch)]
    )
    times = torch.tensor(grid, dtype=torch.float64)[index]
    return times, torch.randn(batch, n, 2, generator=generator).double(), index, grid


def test_decoding_solves_the_latent_ode() -> None:
    model = randomised(LatentODE(TrajectoryConfig(spacing=0.05)))
    z0 = torch.randn(3, 4, dtype=torch.float64)
    decoded = model.decode(z0, [0.0, 0.3, 1.0])
    model.solver, model.tolerance = "dopri5", 1e-9
    torch.testing.assert_close(decoded, model.decode(z0, [0.0, 0.3, 1.0]), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(decoded[:, 0], model.decoder(z0))


def test_the_evidence_bound_is_that_of_torch_distributions() -> None:
    times, values, index, grid = observed()
    model = randomised(LatentODE(TrajectoryConfig(spacing=0.1)))
    torch.manual_seed(3)
    loss = model.loss(times, values, index, grid)
    torch.manual_seed(3)
    mean, log_std = model.encode(times, values)
    z0 = mean + torch.randn_like(mean) * log_std.exp()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        at = [grid[i] for i in index[row].tolist()]
        predicted = model.decode(z0[row : row + 1], at)[0]
        total = total + torch.distributions.Normal(predicted, 0.3).log_prob(values[row]).sum()
    posterior = torch.distributions.Normal(mean, log_std.exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    divergence = torch.distributions.kl_divergence(posterior, prior).sum()
    torch.testing.assert_close(loss, -(total - divergence) / values[..., 0].numel())


def test_the_encoder_reads_from_the_last_observation_to_the_first() -> None:
    times, values, _, _ = observed()
    model = randomised(LatentODE(TrajectoryConfig()))
    state = torch.zeros(3, 25, dtype=torch.float64)
    cell = model.recognition
    before = torch.cat((torch.zeros(3, 1, dtype=torch.float64), times[:, :-1]), 1)
    for i in reversed(range(values.shape[1])):
        gap = (times[:, i] - before[:, i]) / model.config.spacing
        x = torch.cat((values[:, i], gap[:, None]), 1)
        state = torch.tanh(
            x @ cell.weight_ih_l0.T
            + cell.bias_ih_l0
            + state @ cell.weight_hh_l0.T
            + cell.bias_hh_l0
        )
    mean, log_std = model.encode(times, values)
    torch.testing.assert_close(torch.cat((mean, log_std), 1), model.posterior(state))


def test_one_observation_is_enough_to_predict_from() -> None:
    model = randomised(TrajectoryRNN(TrajectoryConfig(kind="rnn")))
    times, values, _, _ = observed(n=1)
    cell = model.recurrent
    state, now, value = torch.zeros(3, 25, dtype=torch.float64), times[:, -1], values[:, -1]
    expected = []
    for t in (1.4, 1.5):
        gap = (t - now) / model.config.spacing
        inputs = torch.cat((value / model.config.scale, gap[:, None]), 1)
        state = torch.tanh(
            inputs @ cell.weight_ih_l0.T
            + cell.bias_ih_l0
            + state @ cell.weight_hh_l0.T
            + cell.bias_hh_l0
        )
        value, now = model.config.scale * model.out(state), torch.full_like(now, t)
        expected.append(value)
    torch.testing.assert_close(model(times, values, [1.4, 1.5]), torch.stack(expected, 1))


def test_the_recurrent_network_feeds_its_predictions_back() -> None:
    times, values, index, grid = observed(n=6)
    model = randomised(TrajectoryRNN(TrajectoryConfig(kind="rnn")))
    two = model(times, values, [1.4, 1.5])
    longer = torch.cat((values, two[:, :1]), 1)
    later = torch.cat((times, torch.full((3, 1), 1.4, dtype=torch.float64)), 1)
    torch.testing.assert_close(model(later, longer, [1.5])[:, 0], two[:, 1])
    # The loss is about the same predictions, one step ahead.
    gaps = times.diff()[..., None] / model.config.spacing
    hidden, _ = model.recurrent(torch.cat((values[:, :-1], gaps), -1))
    likelihood = torch.distributions.Normal(model.out(hidden), 0.3).log_prob(values[:, 1:])
    torch.testing.assert_close(model.loss(times, values, index, grid), -likelihood.sum(-1).mean())
    with pytest.raises(ValueError, match="onwards only"):
        model(times, values, [0.2])


@pytest.mark.parametrize("kind", ["latent_ode", "rnn"])
def test_trajectories_scale_with_their_observations(kind: Any) -> None:
    times, values, index, grid = observed()
    unit = randomised(build_trajectory_network(TrajectoryConfig(kind=kind, noise=0.1)).double())
    scaled = build_trajectory_network(TrajectoryConfig(kind=kind, noise=0.3, scale=3.0)).double()
    scaled.load_state_dict(unit.state_dict())
    torch.testing.assert_close(scaled(times, 3 * values, [1.4]), 3 * unit(times, values, [1.4]))
    losses = []
    for model, points in ((unit, values), (scaled, 3 * values)):
        torch.manual_seed(0)
        losses.append(model.loss(times, points, index, grid))
    # A density of points of D coordinates is 3^D times thinner.
    torch.testing.assert_close(losses[1] - losses[0], torch.tensor(2 * math.log(3.0)).double())


@pytest.mark.parametrize("kind", ["latent_ode", "rnn"])
def test_every_parameter_of_a_trajectory_model_learns(kind: Any) -> None:
    times, values, index, grid = observed()
    model = build_trajectory_network(TrajectoryConfig(kind=kind, spacing=0.1)).double()
    model.loss(times, values, index, grid).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise must be positive"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"latent": 0}, "latent must be at least 1"),
        ({"kind": "lstm"}, "kind must be one of 'latent_ode', 'rnn', got 'lstm'"),
    ],
)
def test_a_wrong_trajectory_model_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectoryConfig(**options)


# ----------------------------------------------------------------------- repeated composition


@given(
    slopes=st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=8),
    offset=st.floats(-2.0, 2.0),
    compositions=st.integers(1, MAX_EXACT_COMPOSITIONS),
)
def test_the_approximant_is_within_two_cells_of_any_lipschitz_function(
    slopes: list[float], offset: float, compositions: int
) -> None:
    width = 1.0 / len(slopes)

    def function(x: float) -> float:
        whole = min(int(x / width), len(slopes) - 1)
        return offset + width * sum(slopes[:whole]) + slopes[whole] * (x - whole * width)

    network = lipschitz_approximant(function, compositions)
    x = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    with torch.no_grad():
        error = network(x)[:, 0] - torch.tensor(
            [function(float(v)) for v in x], dtype=torch.float64
        )
    assert float(error.abs().max()) <= 2.0 / compositions + 1e-8


def test_the_error_falls_like_one_over_the_number_of_compositions() -> None:
    """With the same nine units each time; only their code number and scale differ."""
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    truth = torch.sin(5 * x) / 5
    counts, errors = (3, 6, 12, 24), []
    for r in counts:
        network = lipschitz_approximant(lambda v: math.sin(5 * v) / 5, r)
        assert sum(p.numel() for p in network.parameters()) == 166
        with torch.no_grad():
            errors.append(float((network(x) - truth).abs().max()))
    slope = math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])
    assert slope == pytest.approx(-1.0, abs=0.35)


def test_a_repeated_network_is_its_own_loop_and_can_be_composed_further() -> None:
    network = RepeatedComposition(2, 3, width=5, hidden=7, compositions=2)
    x = torch.randn(4, 2)
    h = network.first(x)
    for r in range(1, 4):
        h = network.repeated(h)
        network.compositions = r
        assert torch.equal(network(x), network.last(h))
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("offset", [-1030.0, -5e6, 5e6])
def test_the_approximant_holds_for_functions_of_any_size(offset: float) -> None:
    network = lipschitz_approximant(lambda v: offset + math.sin(5 * v) / 5, 8)
    x = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    with torch.no_grad():
        error = network(x) - (offset + torch.sin(5 * x) / 5)
    assert float(error.abs().max()) <= 2.0 / 8 + 1e-8


def test_what_no_approximant_can_be_made_of() -> None:
    with pytest.raises(ValueError, match=r"compositions must be an integer, got 2\.0"):
        lipschitz_approximant(lambda x: x, 2.0)  # type: ignore[arg-type]
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"must be finite on \[0, 1\], but is not at 0\.5"):
            lipschitz_approximant(lambda x, v=value: v if x == 0.5 else 0.0, 2)  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"compositions must be an integer, got 2\.0"):
        RepeatedComposition(1, 1, width=1, hidden=1, compositions=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("compositions", [0, MAX_EXACT_COMPOSITIONS + 1])
def test_more_compositions_than_a_number_has_digits_are_refused(compositions: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 24"):
        lipschitz_approximant(lambda x: x, compositions)
    with pytest.raises(ValueError, match="not 1-Lipschitz"):
        lipschitz_approximant(lambda x: 3 * x, 4)
    with pytest.raises(ValueError, match="width must be at least 1"):
        RepeatedComposition(1, 1, width=0, hidden=1, compositions=1)
