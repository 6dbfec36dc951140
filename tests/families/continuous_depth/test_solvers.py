"""Tests of the solvers: closed forms, observed orders, gradients, memory, counts, and bad input."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from zoo.errors import SolverError
from zoo.families.continuous_depth import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    METHODS,
    TABLEAUS,
    ODEBlock,
    SolverConfig,
    solve,
)
from zoo.families.continuous_depth.solvers import Tableau, runge_kutta_step

ORDERS = {"euler": 1, "midpoint": 2, "low_storage_rk3": 3, "rk4": 4}


class Field(nn.Module):
    """A smooth field that depends on time, with a parameter it does not use."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(width, 5, generator=generator).double())
        self.b = nn.Parameter(torch.randn(5, width, generator=generator).double())
        self.unused = nn.Parameter(torch.ones(2).double())

    def forward(self, t: float, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.a + math.sin(3 * t)) @ self.b


def initial(batch: int = 4, width: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, generator=generator, dtype=torch.float64)


def gradients(config: SolverConfig, y0: Tensor, times: Any = (0.0, 1.0)) -> list[Tensor]:
    """Of a loss on the states at all times but the first: for the state and for a and b."""
    field = Field(y0.shape[1])
    y0 = y0.clone().requires_grad_()
    states = solve(field, y0, times, config).states
    loss = sum((i + 1) * s.square().sum() for i, s in enumerate(states[1:]))
    return list(torch.autograd.grad(loss, [y0, field.a, field.b]))


# -------------------------------------------------------------------------------- solutions


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_the_observed_order_is_that_of_the_method(method: str) -> None:
    """y' = y cos(t) has the solution y0 exp(sin t)."""
    y0 = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    errors = []
    for steps in (32, 64, 128):
        config = SolverConfig(method=method, steps=steps)
        last = solve(lambda t, y: y * math.cos(t), y0, (0.0, 1.0), config).last
        errors.append(float((last - y0 * math.exp(math.sin(1.0))).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[method], abs=0.15)
    assert TABLEAUS[method].order == ORDERS[method]


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_a_method_of_order_p_integrates_polynomials_of_degree_p_minus_1(method: str) -> None:
    order = ORDERS[method]
    config = SolverConfig(method=method, steps=3)
    y0 = torch.zeros(1, 1, dtype=torch.float64)
    for degree in range(order):
        last = solve(lambda t, y, d=degree: 0 * y + (d + 1) * t**d, y0, (0.5, 2.0), config).last
        assert float(last) == pytest.approx(2.0 ** (degree + 1) - 0.5 ** (degree + 1), rel=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_every_solver_agrees_with_scipy_both_ways_in_time(method: str) -> None:
    y0, field = initial(2), Field()
    config = SolverConfig(method=method, steps=60, tolerance=1e-7)
    if method == "euler":
        config = SolverConfig(method=method, steps=1_000)
    for times in ((0.0, 0.4, 1.0), (1.0, 0.0)):
        with torch.no_grad():
            states = solve(field, y0, times, config).states

            def flat(t: float, y: np.ndarray) -> np.ndarray:
                return field(t, torch.from_numpy(y).view(2, 3)).flatten().numpy()

            reference = solve_ivp(
                flat,
                (times[0], times[-1]),
                y0.flatten(),
                t_eval=times,
                rtol=1e-10,
                atol=1e-10,
            ).y.T
        assert len(states) == len(times)
        tolerance = {"euler": 3e-3, "midpoint": 5e-4, "implicit_adams": 5e-4}.get(method, 2e-5)
        for state, expected in zip(states, reference, strict=True):
            np.testing.assert_allclose(state.flatten().numpy(), expected, atol=tolerance)


THREE_EIGHTHS = Tableau(
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), b=(1 / 8, 3 / 8, 3 / 8, 1 / 8), order=4
)


@pytest.mark.parametrize(
    ("tableau", "theirs"),
    [(TABLEAUS["euler"], "euler"), (TABLEAUS["midpoint"], "midpoint"), (THREE_EIGHTHS, "rk4")],
)
def test_steps_are_those_of_torchdiffeq(tableau: Tableau, theirs: str) -> None:
    field, y = Field(), initial()
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = torchdiffeq.odeint(
        lambda t, y: field(float(t), y), y, times, method=theirs, options={"step_size": 0.125}
    )[-1]
    for i in range(8):
        y = runge_kutta_step(tableau, field, i / 8, 1 / 8, y)
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-8)


@given(
    a=st.lists(st.floats(-2.0, 2.0), min_size=4, max_size=4),
    method=st.sampled_from(FIXED_METHODS),
    steps=st.integers(1, 6),
)
def test_on_linear_fields_a_step_is_the_stability_function(
    a: list[float], method: Any, steps: int
) -> None:
    """Each step multiplies by the Taylor polynomial of exp(hA) up to the order."""
    matrix = torch.tensor(a, dtype=torch.float64).view(2, 2)
    h = 0.75 / steps
    factor = sum(
        torch.linalg.matrix_power(h * matrix, k) / math.factorial(k)
        for k in range(ORDERS[method] + 1)
    )
    expected = initial(3, 2) @ torch.linalg.matrix_power(factor, steps).T
    config = SolverConfig(method=method, steps=steps)
    last = solve(lambda t, y: y @ matrix.T, initial(3, 2), (0.25, 1.0), config).last
    torch.testing.assert_close(last, expected)


# -------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("method", FIXED_METHODS)
@pytest.mark.parametrize("gradient", ["discrete", "checkpoint"])
def test_discrete_gradients_are_those_of_finite_differences(method: Any, gradient: Any) -> None:
    field = Field()
    config = SolverConfig(method=method, steps=3, gradient=gradient)

    def outcome(y0: Tensor, a: Tensor) -> Tensor:
        return solve(
            lambda t, y: torch.tanh(y @ a + math.sin(3 * t)) @ field.b, y0, (0.0, 1.0), config
        ).last

    inputs = (initial(2).requires_grad_(), field.a)
    assert torch.autograd.gradcheck(outcome, inputs)
    assert torch.autograd.gradgradcheck(outcome, inputs)


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_checkpointing_changes_no_bit_of_the_gradient(method: Any) -> None:
    times = (0.0, 0.3, 1.0)
    direct = gradients(SolverConfig(method=method, steps=3), initial(), times)
    stored = gradients(
        SolverConfig(method=method, steps=3, gradient="checkpoint"), initial(), times
    )
    for one, other in zip(direct, stored, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_the_adjoint_converges_to_the_discrete_gradient_with_the_order(method: Any) -> None:
    times = (0.0, 0.6, 1.0)
    exact = gradients(SolverConfig(method="rk4", steps=64), initial(), times)
    errors = []
    for steps in (8, 16, 32):
        found = gradients(
            SolverConfig(method=method, steps=steps, gradient="adjoint"), initial(), times
        )
        errors.append(max(float((f - e).abs().max()) for f, e in zip(found, exact, strict=True)))
    assert math.log2(errors[1] / errors[2]) == pytest.approx(ORDERS[method], abs=0.4)


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "implicit_adams"])
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_gradients_of_torchdiffeqs_solvers_agree_with_ours(method: Any, gradient: Any) -> None:
    exact = gradients(SolverConfig(method="rk4", steps=48), initial())
    found = gradients(
        SolverConfig(method=method, steps=50, tolerance=1e-7, gradient=gradient), initial()
    )
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("method", ["midpoint", "low_storage_rk3", "rk4", "dopri5"])
def test_the_adjoint_runs_the_field_in_the_precision_of_the_forward_pass(method: Any) -> None:
    """Under autocast the state is in bfloat16 and the weights are not."""
    torch.manual_seed(0)
    before = nn.Linear(3, 3)
    inner = nn.Linear(3, 3)
    found = {}
    for gradient in ("discrete", "adjoint"):
        config = SolverConfig(method=method, steps=4, gradient=gradient)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            y0 = before(initial().float())
            last = solve(
                lambda t, y: torch.tanh(inner(y)), y0, (0.0, 1.0), config, [*inner.parameters()]
            ).last
        assert y0.dtype == torch.bfloat16
        loss = last.float().square().sum()
        grads = torch.autograd.grad(loss, [before.weight, inner.weight])
        found[gradient] = torch.cat([g.flatten() for g in grads])
    assert found["adjoint"].dtype == torch.float32
    assert torch.isfinite(found["adjoint"]).all()
    # Numbers of 8 binary digits, and each step is rounded to them.
    scale = float(found["discrete"].abs().max())
    torch.testing.assert_close(found["adjoint"], found["discrete"], rtol=0, atol=0.05 * scale)


def test_the_adjoint_leaves_frozen_and_unused_parameters_without_gradient() -> None:
    field = Field()
    field.b.requires_grad_(False)
    config = SolverConfig(method="rk4", steps=4, gradient="adjoint")
    solve(field, initial(), (0.0, 1.0), config).last.sum().backward()
    assert field.a.grad is not None
    assert field.b.grad is None
    assert field.unused.grad is None or not field.unused.grad.any()


@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
def test_a_parameter_that_changes_before_the_backward_pass_is_refused(gradient: Any) -> None:
    field = Field()
    last = solve(field, initial(), (0.0, 1.0), SolverConfig(steps=4, gradient=gradient)).last
    with torch.no_grad():
        field.a.mul_(-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last.sum().backward()


def test_the_adjoint_takes_parameters_that_are_computed() -> None:
    """Such have no gradient to keep; it goes on to what they are computed of."""
    found = []
    for gradient in ("discrete", "adjoint"):
        field, scale = Field(), torch.tensor(0.5).double().requires_grad_()
        a = scale * field.a
        config = SolverConfig(method="rk4", steps=64, gradient=gradient)  # type: ignore[arg-type]
        last = solve(
            lambda t, y, a=a, b=field.b: torch.tanh(y @ a) @ b,  # type: ignore[misc]
            initial(),
            (0.0, 1.0),
            config,
            [a, field.b],
        ).last
        found.append(torch.autograd.grad(last.square().sum(), [scale, field.a, field.b]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint", "adjoint"])
@pytest.mark.parametrize("with_parameter", [False, True])
def test_a_slope_of_the_time_alone_passes_the_gradient(gradient: Any, with_parameter: bool) -> None:
    y0, unused = initial().requires_grad_(), torch.ones(2, requires_grad=True)
    config = SolverConfig(method="rk4", steps=2, gradient=gradient)
    parameters = [unused] if with_parameter else []
    solution = solve(lambda t, y: torch.full_like(y, t), y0, (0.0, 1.0), config, parameters)
    torch.testing.assert_close(solution.last, y0 + 0.5)
    solution.last.sum().backward()
    torch.testing.assert_close(y0.grad, torch.ones_like(y0))
    assert unused.grad is None or not unused.grad.any()


def with_parameters(field: nn.Module, factor: float) -> dict[str, Tensor]:
    """Parameters of a block around the field, that are leaves of their own."""
    return {
        f"field.{name}": (factor * p.detach()).requires_grad_()
        for name, p in field.named_parameters()
    }


@pytest.mark.parametrize("method", ["rk4", "low_storage_rk3", "dopri5", "implicit_adams"])
@pytest.mark.parametrize("gradient", ["discrete", "checkpoint", "adjoint"])
def test_parameters_lent_for_the_forward_pass_alone(method: Any, gradient: Any) -> None:
    """Evaluated again, the field would have its own: a gradient of zero, or that of another one."""
    if gradient == "checkpoint" and method not in FIXED_METHODS:
        pytest.skip("refused, see the bad input")
    config = SolverConfig(method=method, gradient=gradient)
    block, lent = ODEBlock(Field(), config), with_parameters(Field(), 0.5)
    last = torch.func.functional_call(block, lent, (initial(),))
    if gradient != "discrete":
        message = f"^gradient='{gradient}' evaluates .* 'a' is another parameter .*'discrete'"
        with pytest.raises(SolverError, match=message) as caught:
            last.sum().backward()
        assert "\n" not in str(caught.value)
        return
    other = ODEBlock(Field(), config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other(initial()).sum().backward()
    last.sum().backward()
    assert torch.equal(lent["field.a"].grad, other.field.a.grad)
    assert torch.equal(lent["field.b"].grad, other.field.b.grad)


class Shifted(nn.Module):
    """Of the shift, the steps keep nothing for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)

    def forward(self, t: float, y: Tensor) -> Tensor:
        return torch.sin(y + self.shift)


@pytest.mark.parametrize(
    ("method", "gradient"), [("rk4", "checkpoint"), ("rk4", "adjoint"), ("dopri5", "adjoint")]
)
def test_a_frozen_parameter_that_changes_before_it_is_used_again_is_refused(
    method: Any, gradient: Any
) -> None:
    field, y0 = Shifted(), initial().requires_grad_()
    last = solve(field, y0, (0.0, 1.0), SolverConfig(method=method, gradient=gradient)).last
    with torch.no_grad():
        field.shift.add_(1.0)
    message = "'shift' was modified by an inplace operation since the forward pass"
    with pytest.raises(SolverError, match=message):
        last.sum().backward()


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_trainings_go_on_as_with_the_discrete_gradient(gradient: Any, distributed: bool) -> None:
    """Two batches per step of the optimizer; every other step is that of a copy."""
    found = []
    for mode in ("discrete", gradient):
        field = Field()
        field.unused.requires_grad_(False)  # which `DistributedDataParallel` would miss
        block = ODEBlock(field, SolverConfig(steps=16, gradient=mode))
        for _ in range(3):
            block = copy.deepcopy(block)
            net = nn.parallel.DistributedDataParallel(block) if distributed else block
            optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
            for _ in range(2):
                for seed in (1, 2):
                    net(initial(seed=seed)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in block.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    start = torch.cat([p.detach().flatten() for p in Field().parameters()])
    assert float((found[0] - start).abs().max()) > 0.01


# -------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
@pytest.mark.parametrize("control", ["batch", "worst_sample", "each_sample"])
@pytest.mark.parametrize("gradient", ["discrete", "adjoint"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_in_half_precision(method: Any, control: Any, gradient: Any, dtype: Any) -> None:
    """They are those of float64 to the last digit. Gradients are rounded at each evaluation, up and
    down at random, and once more where they are added up."""
    config = SolverConfig(method=method, tolerance=1e-4, error_control=control, gradient=gradient)
    found, evaluations = [], 0
    for kind, solver in ((dtype, config), (torch.float64, SolverConfig(method="rk4", steps=64))):
        field, y0 = Field().to(dtype).to(kind), initial().to(dtype).to(kind).requires_grad_()
        solution = solve(field, y0, (0.0, 1.0), solver)
        assert solution.last.dtype == kind
        solution.last.sum().backward()
        found.append([solution.last.detach(), y0.grad, field.a.grad, field.b.grad])
        evaluations = evaluations or solution.statistics.nfe
    digits = [1.0, *[2.0 * math.sqrt(evaluations)] * 3]
    for one, other, allowed in zip(*found, digits, strict=True):
        assert one.dtype == dtype
        atol = allowed * torch.finfo(dtype).eps * float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=atol)


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_large_states_in_half_precision_keep_their_digits(method: Any) -> None:
    """Their squares leave float16."""
    y0 = torch.full((2, 8), 1000.0, dtype=torch.float16)
    last = solve(lambda t, y: -y, y0, (0.0, 1.0), SolverConfig(method=method, tolerance=1e-4)).last
    exact = torch.full((2, 8), 1000.0 * math.exp(-1.0), dtype=torch.float64)
    torch.testing.assert_close(last.double(), exact, rtol=1e-3, atol=0)


# ----------------------------------------------------------------------- memory and counts


def saved_bytes(config: SolverConfig, *, frozen: bool = False) -> int:
    """Bytes of distinct tensors that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    field, alive = Field(16).requires_grad_(not frozen), []  # type: ignore[var-annotated]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        solve(field, initial(64, 16).requires_grad_(not frozen), (0.0, 1.0), config)
    return sum(kept.values())


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint", "adjoint"])
def test_where_nothing_learns_nothing_is_kept(gradient: Any) -> None:
    assert saved_bytes(SolverConfig(method="rk4", gradient=gradient), frozen=True) == 0


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_memory_of_the_gradient_modes(method: Any) -> None:
    """Adjoint: none per step. Checkpoint: one state per step. Discrete: all stages."""

    def growth(gradient: Any) -> float:
        few, many = (
            saved_bytes(SolverConfig(method=method, steps=steps, gradient=gradient))
            for steps in (8, 24)
        )
        return (many - few) / 16

    state = 64 * 16 * 8
    assert growth("adjoint") == 0
    assert growth("checkpoint") == state
    assert growth("discrete") > 0.9 * TABLEAUS[method].stages * 64 * 5 * 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", ["discrete", "checkpoint", "adjoint"])
def test_evaluations_are_counted_forward_and_backward(method: Any, gradient: Any) -> None:
    if gradient == "checkpoint" and method not in FIXED_METHODS:
        pytest.skip("refused, see the bad input")
    field, calls, beyond = Field(), [0], [0.0]

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = field

        def forward(self, t: float, y: Tensor) -> Tensor:
            calls[0] += 1
            beyond[0] = max(beyond[0], t)
            return self.inner(t, y)

    config = SolverConfig(method=method, steps=3, gradient=gradient, tolerance=1e-2)
    solution = solve(Counting(), initial().requires_grad_(), (0.0, 0.5, 1.0), config)
    statistics = solution.statistics
    assert statistics.nfe == calls[0] > 0
    assert statistics.nfe_backward == 0
    if config.is_fixed:
        assert statistics.nfe == 2 * 3 * TABLEAUS[method].stages
        assert statistics.accepted == 6
        assert beyond[0] <= 1.0
    if method == "dopri5":
        # The documented arithmetic of torchdiffeq, overstepping of the end included.
        assert statistics.nfe == 2 + 6 * (statistics.accepted + statistics.rejected)
        assert beyond[0] > 1.0
    solution.last.sum().backward()
    assert statistics.nfe_backward == calls[0] - statistics.nfe
    assert (statistics.nfe_backward == 0) == (gradient == "discrete")
    assert statistics.nfe == calls[0] - statistics.nfe_backward


# -------------------------------------------------------------------------- batch invariance


@pytest.mark.parametrize("method", [*FIXED_METHODS, "dopri5", "adaptive_heun"])
def test_a_samples_result_depends_on_its_batch_exactly_where_it_is_said(method: Any) -> None:
    field, y0 = Field(), initial(4)
    crowd = y0.clone()
    crowd[1:] *= 30.0
    for control in ("batch", "each_sample"):
        config = SolverConfig(method=method, steps=4, tolerance=1e-2, error_control=control)
        alone = solve(field, y0[:1], (0.0, 1.0), config)
        among = solve(field, crowd, (0.0, 1.0), config)
        assert among.statistics.batch_dependent == config.is_batch_dependent
        gap = float((alone.last[0] - among.last[0]).abs().max())
        assert (gap > 1e-9) == config.is_batch_dependent
        if control == "each_sample" and not config.is_fixed:
            assert len(among.statistics.nfe_per_sample) == 4
            assert among.statistics.nfe == max(among.statistics.nfe_per_sample)


def test_worst_sample_control_keeps_the_hard_sample_within_tolerance() -> None:
    """One fast oscillator among many that stand still: an average over the batch hides it."""
    speed = torch.zeros(256, 1, dtype=torch.float64)
    speed[0] = 12.0
    y0 = torch.zeros(256, 2, dtype=torch.float64)
    y0[:, 0] = 1.0

    def field(t: float, y: Tensor) -> Tensor:
        return speed * torch.stack((-y[:, 1], y[:, 0]), 1)

    exact = torch.tensor([math.cos(12.0), math.sin(12.0)], dtype=torch.float64)
    errors, steps, tolerance = {}, {}, 1e-3
    for control in ("batch", "worst_sample"):
        config = SolverConfig(method="dopri5", tolerance=tolerance, error_control=control)  # type: ignore[arg-type]
        solution = solve(field, y0, (0.0, 1.0), config)
        errors[control] = float((solution.last[0] - exact).norm())
        steps[control] = solution.statistics.accepted
    # A step is accepted when the root mean square over both components of its error, over
    # tolerance (1 + |component|), is at most 1: the error is at most 2 sqrt(2) tolerance long. A
    # rotation neither shrinks nor stretches it, so that of the solve is at most the sum.
    bound = {control: count * 2 * math.sqrt(2) * tolerance for control, count in steps.items()}
    assert errors["worst_sample"] < bound["worst_sample"]
    assert errors["batch"] > bound["batch"]
    assert errors["batch"] > 3 * errors["worst_sample"]


# -------------------------------------------------------------- compilers and transformations


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_steps_are_one_graph_export_and_transform(method: Any) -> None:
    field, y0 = Field(), initial()
    config = SolverConfig(method=method, steps=2)

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, y: Tensor) -> Tensor:
            return solve(self.field, y, (0.0, 1.0), config).last

    flow = Flow()
    expected = flow(y0)
    torch._dynamo.reset()
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y0), expected)
    exported = torch.export.export(flow, (y0,)).module()
    torch.testing.assert_close(exported(y0), expected)
    # Jacobians three ways: reverse and forward mode over a batch, and row by row.
    per_sample = torch.func.vmap(torch.func.jacrev(lambda y: flow(y[None])[0]))(y0)
    forward_mode = torch.func.vmap(torch.func.jacfwd(lambda y: flow(y[None])[0]))(y0)
    torch.testing.assert_close(per_sample, forward_mode)
    whole = torch.autograd.functional.jacobian(flow, y0)
    torch.testing.assert_close(per_sample, torch.stack([whole[i, :, i] for i in range(4)]))


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk45"}, r"no solver 'rk45'\. Did you mean 'rk4'\?.*There are: euler.*dopri5"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 2.0}, "steps must be an integer"),
        ({"tolerance": 0.0}, "tolerance must be positive, got 0.0"),
        ({"tolerance": -1e-3}, "tolerance must be positive"),
        ({"tolerance": math.nan}, "tolerance must be positive"),
        ({"gradient": "exact"}, "gradient must be one of 'discrete', 'checkpoint', 'adjoint'"),
        ({"error_control": "no"}, "error_control must be one of 'batch'.*got 'no'"),
        ({"max_nfe": 0}, "max_nfe must be at least 1"),
        ({"tolerance": "x"}, "tolerance must be a number, got 'x'"),
        ({"tolerance": None}, "tolerance must be a number, got None"),
        ({"tolerance": True}, "tolerance must be a number, got True"),
        ({"max_nfe": "x"}, "max_nfe must be an integer, got 'x'"),
        ({"max_nfe": 2.5}, "max_nfe must be an integer, got 2.5"),
        ({"max_nfe": True}, "max_nfe must be an integer, got True"),
        ({"method": "dopri5", "gradient": "checkpoint"}, "needs a solver of fixed steps"),
    ],
)
def test_a_wrong_configuration_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolverConfig(**options)


def test_integers_of_numpy_are_taken_for_pythons() -> None:
    config = SolverConfig(steps=np.int64(3), max_nfe=np.int32(12))  # type: ignore[arg-type]
    assert (type(config.steps), type(config.max_nfe)) == (int, int)
    assert config == SolverConfig(steps=3, max_nfe=12)
    with pytest.raises(ValueError, match=r"steps must be an integer of at least 1, got .*True"):
        SolverConfig(steps=np.bool_(True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((0.0,), "at least two, got 1"),
        ((0.0, 1.0, 0.5), r"times\[1\] = 1 is followed by 0.5"),
        ((0.0, 0.0), "strictly"),
        ((1.0, 0.5, 0.7), r"times\[1\] = 0.5 is followed by 0.7"),
        ((0.0, math.nan), "times must be finite, got 0, nan"),
        ((0.0, math.inf), "times must be finite, got 0, inf"),
    ],
)
def test_times_that_are_not_monotone_are_refused(times: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(Field(), initial(), times)


def test_an_integer_state_is_refused() -> None:
    with pytest.raises(ValueError, match="floating point"):
        solve(lambda t, y: y, torch.ones(2, 2, dtype=torch.long), (0.0, 1.0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "wrong"), [((3, 1), (3,)), ((3, 1), (1, 3, 1)), ((1, 3), (1, 1)), ((2, 3), (4, 3))]
)
def test_a_field_of_another_shape_is_refused(method: Any, shape: Any, wrong: Any) -> None:
    """All but the last would be broadcast, some to a state of another shape."""
    message = re.escape(f"the field must return the shape of its state, {shape}, got {wrong}")
    with pytest.raises(ValueError, match=message):
        solve(
            lambda t, y: y.new_ones(wrong),
            torch.ones(shape),
            (0.0, 1.0),
            SolverConfig(method=method),
        )


@pytest.mark.parametrize("method", [*FIXED_METHODS, *ADAPTIVE_METHODS])
def test_a_state_that_explodes_names_sample_and_time(method: Any) -> None:
    """y' = y^2 from 1/c leaves every bound at time c; sample 1 does so at 0.5."""
    y0 = torch.tensor([[0.01], [2.0], [0.01]], dtype=torch.float64)
    config = SolverConfig(method=method, steps=64, tolerance=1e-3)
    with pytest.raises(SolverError) as caught:
        solve(lambda t, y: y**2, y0, (0.0, 2.0), config)
    text = str(caught.value)
    assert "\n" not in text
    if method in FIXED_METHODS:
        assert "sample 1 is not finite at time" in text
        when = float(text.split("at time ")[1].split(" ")[0])
        assert 0.5 <= when < 1.0
    else:
        assert "time 0." in text, "the last time reached"
        assert "the step size underflows" in text


def decay_until(end: float) -> Any:
    """A field, y' = -y, that is NaN after a time for samples whose first component is above 5."""

    def field(t: float, y: Tensor) -> Tensor:
        return torch.where((y[:, :1] > 5) & (t > end), math.nan, -y)

    return field


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
@pytest.mark.parametrize("control", ["batch", "worst_sample"])
@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0)])
def test_a_field_that_is_not_finite_is_no_stiffness(method: Any, control: Any, times: Any) -> None:
    y0 = torch.ones(4, 2, dtype=torch.float64)
    y0[2] = 20.0
    field = decay_until(0.5)
    if times[0] > times[1]:  # the same, mirrored
        inner, field = field, lambda t, y: -inner(1.0 - t, y)
    config = SolverConfig(method=method, error_control=control)
    message = rf"^{method}: the state of sample 2 is not finite after time 0\.\d+"
    with pytest.raises(SolverError, match=message) as caught:
        solve(field, y0, times, config)
    # A stage that looks beyond the end is not named; any other lies in the broken half.
    stage = str(caught.value).partition("(at ")[2].rstrip(").")
    if stage:
        assert 0.0 <= abs(float(stage) - times[0]) <= 1.0
        assert abs(float(stage) - times[0]) > 0.5


def test_a_stage_beyond_the_end_is_not_named() -> None:
    """A field of no size makes dopri5 try steps ten times as long, far beyond the end."""

    def field(t: float, y: Tensor) -> Tensor:
        return torch.full_like(y, math.nan if t > 1.0 else 1e-9)

    with pytest.raises(SolverError, match=r"sample 0 is not finite after time 0(\.\d+)?\.$"):
        solve(field, initial(), (0.0, 1.0), SolverConfig(method="dopri5"))


@pytest.mark.parametrize("method", [*ADAPTIVE_METHODS, "implicit_adams"])
def test_a_sample_that_is_solved_alone_has_one_number(method: Any) -> None:
    y0 = torch.ones(4, 2, dtype=torch.float64)
    y0[2] = 20.0
    config = SolverConfig(method=method, steps=20, error_control="each_sample")
    with pytest.raises(SolverError, match=r"^Sample 2: .*[Tt]he state is not finite") as caught:
        solve(decay_until(0.5), y0, (0.0, 1.0), config)
    assert "sample 0" not in str(caught.value)


def test_implicit_adams_names_the_time_of_the_first_broken_stage() -> None:
    y0 = torch.ones(4, 2, dtype=torch.float64)
    y0[2] = 20.0
    config = SolverConfig(method="implicit_adams", steps=20)
    with pytest.raises(SolverError, match="state of sample 2 is not finite at time") as caught:
        solve(decay_until(0.5), y0, (0.0, 1.0), config)
    assert 0.5 < float(str(caught.value).split("at time ")[1].split(" ")[0]) <= 0.6


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_steps_run_on_the_meta_device(method: Any) -> None:
    y0 = torch.empty(4, 3, device="meta")
    last = solve(lambda t, y: -y, y0, (0.0, 1.0), SolverConfig(method=method)).last
    assert (last.device.type, last.shape) == ("meta", y0.shape)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_starts_broken_is_named(method: Any) -> None:
    y0 = initial()
    y0[2, 1] = math.nan
    with pytest.raises(SolverError, match="sample 2 is not finite"):
        solve(Field(), y0, (0.0, 1.0), SolverConfig(method=method, steps=2))


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_a_field_is_not_asked_at_a_time_that_is_no_number(method: Any) -> None:
    """With so small a tolerance the norm of a state is infinite in float32."""

    def field(t: float, y: Tensor) -> Tensor:
        assert math.isfinite(t)
        return -y

    config = SolverConfig(method=method, tolerance=1e-30)
    with pytest.raises(SolverError, match="loosen the tolerance 1e-30"):
        solve(field, torch.ones(2, 3), (0.0, 1.0), config)


def test_a_stiff_problem_ends_at_the_cap_with_the_time_reached() -> None:
    config = SolverConfig(method="dopri5", tolerance=1e-6, max_nfe=2_000)
    with pytest.raises(SolverError, match=r"cap of max_nfe=2000 .* time 0\.\d+: .* stiff"):
        solve(lambda t, y: -1e5 * (y - math.cos(t)), initial(), (0.0, 1.0), config)
    with pytest.raises(SolverError, match="needs 4000 evaluations, more than max_nfe=100"):
        solve(Field(), initial(), (0.0, 1.0), SolverConfig(steps=1000, max_nfe=100))


def test_the_cap_holds_in_the_backward_pass_too() -> None:
    config = SolverConfig(method="dopri5", tolerance=1e-3, gradient="adjoint", max_nfe=30)
    field = Field()
    solution = solve(field, initial().requires_grad_(), (0.0, 1.0), config)
    object.__setattr__(config, "max_nfe", solution.statistics.nfe - 20)
    with pytest.raises(SolverError, match="cap of max_nfe"):
        solution.last.sum().backward()


def test_an_underflow_in_the_backward_pass_is_named_too() -> None:
    """Backwards in time y' = -k y^3 explodes, so that steps become too short."""
    k = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    config = SolverConfig(method="dopri5", tolerance=1e-3, gradient="adjoint")
    y0 = torch.tensor([[3.0]], dtype=torch.float64)
    solution = solve(lambda t, y: -k * y**3, y0, (0.0, 50.0), config, [k])
    with pytest.raises(
        SolverError, match=r"dopri5: the step size underflows after time \d"
    ) as caught:
        solution.last.sum().backward()
    assert "\n" not in str(caught.value)


def test_with_control_of_each_sample_backward_evaluations_are_those_of_the_costliest() -> None:
    each = SolverConfig(method="dopri5", gradient="adjoint", error_control="each_sample")
    y0, alone = initial(), []
    for row in y0:
        solution = solve(Field(), row[None].clone().requires_grad_(), (0.0, 1.0), each)
        solution.last.sum().backward()
        alone.append(solution.statistics.nfe_backward)
    solution = solve(Field(), y0.requires_grad_(), (0.0, 1.0), each)
    assert solution.statistics.nfe_backward == 0
    solution.last.sum().backward()
    assert solution.statistics.nfe_backward == max(alone) > 0


@pytest.mark.parametrize(
    ("method", "control"),
    [
        *((method, "batch") for method in METHODS),
        # Only solvers that choose their steps control an error.
        *itertools.product(ADAPTIVE_METHODS, ("worst_sample", "each_sample")),
    ],
)
def test_an_empty_batch_stays_empty(method: Any, control: Any) -> None:
    solution = solve(
        Field(), initial(0), (0.0, 0.5, 1.0), SolverConfig(method=method, error_control=control)
    )
    assert [tuple(s.shape) for s in solution.states] == [(0, 3)] * 3


class Pieces(nn.Module):
    """y' = w_i y with i the quarter of [0, 1] that the time is in, each with its first moment."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, -1.0], dtype=torch.float64))

    def forward(self, t: float, y: Tensor) -> Tensor:
        return self.w[min(int(4 * t), 3)] * y


@pytest.mark.parametrize("method", ["midpoint", "low_storage_rk3", "rk4"])
def test_pieces_in_time_are_seen_from_inside_of_steps_both_ways(method: Any) -> None:
    """In closed form y(1) = y(0) exp(sum w / 4), and each w has the gradient y(0) y(1) / 4."""
    field, y0 = Pieces(), torch.ones(1, 1, dtype=torch.float64)
    config = SolverConfig(method=method, steps=256, gradient="adjoint")
    end = solve(field, y0, (0.0, 1.0), config).last
    end.sum().backward()
    exact = math.exp(0.25)
    assert float(end) == pytest.approx(exact, abs=2e-4)
    assert field.w.grad is not None
    torch.testing.assert_close(field.w.grad, torch.full_like(field.w, exact / 4), rtol=0, atol=2e-4)
    back = solve(field, end.detach(), (1.0, 0.0), config).last
    assert float(back) == pytest.approx(1.0, abs=2e-4)
