"""Tests of the gates against their equations in numpy, finite differences and exact zeros."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.families.dselect_k import dselect_reference as reference
from zoo.configs import build
from zoo.errors import ConfigError
from zoo.families.dselect_k import (
    DSelectK,
    FixedGate,
    Gate,
    GateConfig,
    GumbelGate,
    SoftmaxGate,
    TopKGate,
    build_gate,
    smooth_step,
)

WIDTH = 3
SIZES = (1, 5, 9, 16)
KINDS: tuple[Callable[..., Gate], ...] = (DSelectK, SoftmaxGate, TopKGate, GumbelGate, FixedGate)


def randomised(gate: Gate, scale: float = 0.4, seed: int = 0) -> Gate:
    """The gate in double precision with random parameters."""
    generator = torch.Generator().manual_seed(seed)
    gate.double()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator).double())
    return gate


def examples(batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64)


def logits(gate: DSelectK, x: Tensor | None) -> tuple[Any, Any]:
    """Logits of the bits, b x T x k x m, and of the mixture, b x T x k."""
    z, alpha = gate.codes(x).detach(), gate.mixing(x).detach()
    return (
        z.view(len(z), gate.num_tasks, gate.k, gate.num_bits).numpy(),
        alpha.view(len(z), gate.num_tasks, gate.k).numpy(),
    )


# ------------------------------------------------------------------------------- the smooth step


@given(
    t=st.floats(-20, 20, allow_nan=False), gamma=st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 5.0, 10.0])
)
def test_the_step_is_the_printed_cubic(t: float, gamma: float) -> None:
    value = float(smooth_step(torch.tensor(t, dtype=torch.float64), gamma))
    assert value == pytest.approx(reference.smooth_step(t, gamma), abs=1e-12)


@given(gamma=st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 10.0]), steps=st.integers(0, 200))
def test_the_step_never_leaves_the_unit_interval_in_single_precision(
    gamma: float, steps: int
) -> None:
    # The expanded cubic gives -6e-8 a few representable numbers above the lower edge.
    edge = torch.tensor([-gamma / 2, gamma / 2])
    near = edge + torch.tensor([1.0, -1.0]) * steps * torch.finfo(torch.float32).eps * gamma
    values = smooth_step(near, gamma)
    assert values.min() >= 0
    assert values.max() <= 1


@pytest.mark.parametrize("gamma", [0.1, 1.0, 10.0])
def test_the_width_of_the_step_is_gamma(gamma: float) -> None:
    t = torch.tensor([-0.51, -0.5, -0.49, 0.0, 0.49, 0.5, 0.51], dtype=torch.float64) * gamma
    t.requires_grad_(True)
    value = smooth_step(t, gamma)
    (slope,) = torch.autograd.grad(value.sum(), t)
    assert value[[0, 1]].tolist() == [0, 0]
    assert value[[5, 6]].tolist() == [1, 1]
    assert float(value[3]) == 0.5
    assert slope[[0, 1, 5, 6]].tolist() == [0, 0, 0, 0]
    assert float(slope[3]) == pytest.approx(1.5 / gamma)
    assert float(slope[2]) > 0
    assert float(slope[4]) > 0


# --------------------------------------------------------------------- the equations of DSelect-k


@given(
    n=st.integers(1, 20),
    k=st.integers(1, 4),
    tasks=st.integers(1, 3),
    batch=st.integers(1, 3),
    gamma=st.sampled_from([0.1, 1.0, 7.0]),
    missing=st.sampled_from(["fold", "penalty"]),
    per_example=st.booleans(),
)
def test_dselect_k_is_its_equations(
    n: int,
    k: int,
    tasks: int,
    batch: int,
    gamma: float,
    missing: Literal["fold", "penalty"],
    per_example: bool,
) -> None:
    k = min(k, n)
    width = WIDTH if per_example else None
    gate = DSelectK(n, k, num_tasks=tasks, in_features=width, gamma=gamma, missing_codes=missing)
    randomised(gate)
    x = examples(batch) if per_example else None
    routing = gate(x)
    assert routing.weights.shape == (batch if per_example else 1, tasks, n)
    z, alpha = logits(gate, x)
    for b, row in enumerate(routing.weights.detach().numpy()):
        for t in range(tasks):
            expected = reference.dselect_k(z[b, t], alpha[b, t], n, gamma, missing == "fold")
            np.testing.assert_allclose(row[t], expected, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("per_example", [False, True])
def test_gradients_are_finite_differences(n: int, per_example: bool) -> None:
    width = WIDTH if per_example else None
    gate = DSelectK(
        n,
        min(2, n),
        num_tasks=2,
        in_features=width,
        missing_codes="penalty",
        entropy=0.3,
        penalty=0.2,
    )
    randomised(gate, 0.15)
    x = examples(2) if per_example else None
    weight = torch.randn(2, n, dtype=torch.float64)
    names = [name for name, p in gate.named_parameters() if p.numel()]
    values = [dict(gate.named_parameters())[name].detach().requires_grad_() for name in names]

    def loss(*parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        routing = torch.func.functional_call(gate, state, (x,))
        return (routing.weights * weight).sum() + gate.regulariser(routing)

    assert torch.autograd.gradcheck(loss, tuple(values))


@pytest.mark.parametrize("per_example", [False, True])
def test_initialisation_is_the_official_one(per_example: bool) -> None:
    gate = DSelectK(16, 2, num_tasks=50, in_features=8 if per_example else None, gamma=2.0)
    for parameters, bound in ((gate.codes, 0.02), (gate.mixing, 0.05)):
        values = torch.cat([p.detach().flatten() for p in parameters.parameters()])
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.9 * bound
        assert abs(float(values.mean())) < 0.2 * bound
    x = 0.05 * torch.randn(4, 8) if per_example else None
    weights = gate(x).weights
    assert weights.min() > 0.05, "dense at the start, all near 1/16"
    assert weights.max() < 0.08


# ----------------------------------------------------------------------- bits that are saturated


def saturate(gate: DSelectK, code: list[list[int]]) -> None:
    """Set the bits of each selector of every task so that it picks one code."""
    with torch.no_grad():
        z = gate.codes.bias.view(gate.num_tasks, gate.k, gate.num_bits)
        for c, bits in enumerate(code):
            z[:, c] = torch.tensor(bits, dtype=z.dtype) * 2 * gate.gamma - gate.gamma


@pytest.mark.parametrize("missing", ["fold", "penalty"])
def test_saturated_selectors_pick_their_codes_and_get_no_gradient(
    missing: Literal["fold", "penalty"],
) -> None:
    gate = DSelectK(16, 2, num_tasks=3, missing_codes=missing, entropy=1.0)
    saturate(gate, [[1, 0, 1, 0], [0, 0, 0, 1]])  # experts 5 and 8
    routing = gate()
    mixture = gate.mixing.bias.view(3, 2).softmax(-1)
    expected = torch.zeros(3, 16)
    expected[:, 5], expected[:, 8] = mixture[:, 0], mixture[:, 1]
    assert torch.equal(routing.weights[0], expected)
    ((routing.weights * torch.randn(16)).sum() + gate.regulariser(routing)).backward()
    assert gate.codes.bias.grad is not None
    assert not gate.codes.bias.grad.any(), "exactly zero, not merely small"
    report = gate.report()[1]
    assert (report.active, report.selected, report.saturated) == (2.0, (5, 8), 1.0)
    assert report.hardening_gap == 0
    assert report.mass == pytest.approx(1)


def test_a_single_saturated_bit_halves_the_experts_and_is_final() -> None:
    gate = DSelectK(8, 1)
    with torch.no_grad():
        gate.codes.bias.copy_(torch.tensor([0.01, -0.5, 0.02]))  # bit 1 is 0 for good
    weights = gate().weights
    assert weights[0, 0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    (weights * torch.arange(8.0)).sum().backward()
    assert gate.codes.bias.grad is not None
    assert gate.codes.bias.grad[1] == 0
    assert gate.codes.bias.grad[[0, 2]].all()
    assert gate.report()[0].saturated == pytest.approx(1 / 3)


def test_two_selectors_may_pick_one_expert() -> None:
    gate = DSelectK(4, 2)
    saturate(gate, [[1, 1], [1, 1]])
    assert gate.report()[0].active == 1
    assert gate().weights[0, 0].tolist() == pytest.approx([0, 0, 0, 1])


# -------------------------------------------------------------------------- codes without experts


@given(n=st.integers(1, 20), scale=st.sampled_from([0.1, 1.0, 5.0]), seed=st.integers(0, 5))
def test_folded_weights_are_a_distribution(n: int, scale: float, seed: int) -> None:
    gate = randomised(DSelectK(n, min(2, n), num_tasks=2, in_features=WIDTH), scale, seed)
    weights = gate(examples(4)).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, dtype=torch.float64))
    assert (weights >= 0).all()


@pytest.mark.parametrize(("n", "mass"), [(5, 0.625), (9, 0.5625), (16, 1.0), (1, 1.0)])
def test_the_penalty_starts_at_the_inverse_of_the_mass_on_experts(n: int, mass: float) -> None:
    k = min(2, n)
    gate = DSelectK(n, k, num_tasks=3, missing_codes="penalty", penalty=0.5)
    with torch.no_grad():
        gate.codes.bias.zero_()
    routing = gate()
    assert gate.report()[0].mass == pytest.approx(mass)
    expected = 0.0 if mass == 1 else 0.5 * 3 * k / mass
    assert float(gate.regulariser(routing)) == pytest.approx(expected, rel=1e-5)


def test_the_penalty_is_finite_where_all_weight_is_on_missing_codes() -> None:
    gate = DSelectK(5, 1, missing_codes="penalty")
    saturate(gate, [[0, 1, 1]])  # code 6 of 0 .. 7
    routing = gate()
    assert routing.weights.sum() == 0
    loss = gate.regulariser(routing)
    assert torch.isfinite(loss)
    loss.backward()
    assert torch.isfinite(gate.codes.bias.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_gates_add_is_finite_in_half_precision(dtype: torch.dtype) -> None:
    gate = DSelectK(5, 1, missing_codes="penalty", entropy=0.1)
    saturate(gate, [[0, 1, 1]])  # all weight is lost, and half precision has no room for 1e6
    expected = gate.regulariser(gate())
    gate.to(dtype)
    loss = gate.regulariser(gate())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    loss.backward()
    assert torch.isfinite(gate.codes.bias.grad).all()  # type: ignore[arg-type]


def test_a_folded_code_is_the_expert_without_its_top_bit() -> None:
    gate = DSelectK(5, 1)
    saturate(gate, [[0, 1, 1]])  # code 6 stands for expert 2
    assert gate().weights[0, 0].tolist() == [0, 0, 1, 0, 0]


def test_the_penalty_trains_the_mass_onto_experts() -> None:
    gate = DSelectK(5, 2, missing_codes="penalty")
    optimizer = torch.optim.Adam(gate.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        gate.regulariser(gate()).backward()
        optimizer.step()
    assert gate.report()[0].mass > 0.999


# ------------------------------------------------------------------------------------ the entropy


@pytest.mark.parametrize("per_example", [False, True])
def test_the_entropy_is_a_batch_mean_summed_over_selectors_and_tasks(per_example: bool) -> None:
    gate = DSelectK(
        9, 2, num_tasks=2, in_features=WIDTH if per_example else None, entropy=0.7, gamma=2.0
    )
    randomised(gate)
    x = examples(5) if per_example else None
    z, _ = logits(gate, x)
    total = sum(
        reference.entropy(reference.fold(reference.codes(z[b, t, c], 2.0), 9))
        for b in range(len(z))
        for t in range(2)
        for c in range(2)
    )
    value = float(gate.regulariser(gate(x)))
    assert value == pytest.approx(0.7 * total / len(z), rel=1e-9)


def test_the_entropy_of_every_task_has_a_gradient_and_none_at_the_symmetric_point() -> None:
    gate = DSelectK(16, 2, num_tasks=4, entropy=1.0)
    gate.regulariser(gate()).backward()
    grad = gate.codes.bias.grad
    assert grad is not None
    assert (grad.view(4, -1).abs().sum(1) > 0).all()
    with torch.no_grad():
        gate.codes.bias.zero_()
    gate.zero_grad()
    gate.regulariser(gate()).backward()
    assert gate.codes.bias.grad is not None
    assert gate.codes.bias.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    "gate",
    [
        DSelectK(5, 2, in_features=WIDTH, entropy=0.1, missing_codes="penalty"),
        TopKGate(5, 2, in_features=WIDTH, balance=0.1),
    ],
)
def test_of_an_empty_batch_a_gate_asks_nothing(gate: Gate) -> None:
    assert float(gate.regulariser(gate(torch.randn(4, WIDTH)))) > 0
    assert float(gate.regulariser(gate(torch.randn(0, WIDTH)))) == 0


def test_the_weight_of_the_entropy_may_grow_over_the_training() -> None:
    gate = DSelectK(8, 2, entropy=0.5, entropy_schedule="linear")
    routing = gate()
    full = float(gate.regulariser(routing, 1.0))
    assert full > 0
    assert float(gate.regulariser(routing, 0.25)) == pytest.approx(0.25 * full)
    assert float(gate.regulariser(routing, 0.0)) == 0


# -------------------------------------------------------------------------------- the other gates


@given(n=st.integers(1, 9), k=st.integers(1, 4), tasks=st.integers(1, 3), static=st.booleans())
def test_top_k_is_a_softmax_over_the_largest(n: int, k: int, tasks: int, static: bool) -> None:
    k = min(k, n)
    gate = TopKGate(n, k, num_tasks=tasks, in_features=None if static else WIDTH)
    randomised(gate)
    x = None if static else examples(3)
    scores = gate.scores(x).detach().view(-1, tasks, n).numpy()
    for row, expected in zip(gate(x).weights.detach().numpy(), scores, strict=True):
        for t in range(tasks):
            np.testing.assert_allclose(row[t], reference.top_k(expected[t], k), atol=1e-12)


def test_a_score_of_exactly_zero_can_be_selected() -> None:
    gate = TopKGate(3, 2)
    with torch.no_grad():
        gate.scores.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    assert gate().weights[0, 0].nonzero().flatten().tolist() == [1, 2]


def test_top_k_gives_the_others_no_gradient() -> None:
    gate = TopKGate(6, 2)
    kept = gate().weights[0, 0] > 0
    (gate().weights * torch.randn(6)).sum().backward()
    assert gate.scores.bias.grad is not None
    assert gate.scores.bias.grad[kept].all()
    assert not gate.scores.bias.grad[~kept].any()


def test_noise_is_for_training_alone_and_its_size_is_learned() -> None:
    gate = TopKGate(6, 2, in_features=WIDTH, noise=True)
    x = examples(200).float()
    noisy = [gate(x).weights for _ in range(2)]
    assert not torch.equal(*noisy)
    noisy[0][:, 0, 0].sum().backward()
    assert gate.noise is not None
    assert gate.noise.weight is not None
    assert gate.noise.weight.grad is not None
    assert gate.noise.weight.grad.any()
    assert torch.equal(gate(x, hard=True).weights, gate(x, hard=True).weights)
    gate.eval()
    assert torch.equal(gate(x).weights, gate(x, hard=True).weights)


def test_balance_is_the_squared_coefficient_of_variation() -> None:
    gate = randomised(TopKGate(4, 2, num_tasks=2, in_features=WIDTH, balance=0.3), 1.0)
    routing = gate(examples(6))
    weights = routing.weights.detach().numpy().sum(0)
    expected = sum((np.std(row) / np.mean(row)) ** 2 for row in weights)
    assert float(gate.regulariser(routing)) == pytest.approx(0.3 * expected)
    assert float(gate.regulariser(routing)) > 0


@pytest.mark.parametrize("static", [True, False])
def test_softmax_weighs_all_and_selects_nothing(static: bool) -> None:
    gate = randomised(SoftmaxGate(5, num_tasks=2, in_features=None if static else WIDTH))
    x = None if static else examples(3)
    scores = gate.scores(x).detach().view(-1, 2, 5).numpy()
    expected = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(gate(x).weights.detach().numpy(), expected, atol=1e-12)
    assert torch.equal(gate(x).weights, gate(x, hard=True).weights)
    assert gate.report(x)[0].active == 5


def test_gumbel_draws_experts_in_proportion_and_takes_the_likeliest_at_last() -> None:
    gate = GumbelGate(3, 1, in_features=WIDTH)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        gate.scores.bias.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    x = torch.zeros(20_000, WIDTH)
    drawn = gate(x).weights[:, 0]
    assert ((drawn > 0).sum(-1) == 1).all()
    # Four standard errors of a proportion of 20,000.
    np.testing.assert_allclose(drawn.detach().mean(0), [0.2, 0.5, 0.3], atol=0.015)
    drawn.mul(torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert gate.scores.bias.grad is not None
    assert gate.scores.bias.grad.all(), "experts that were not drawn have a gradient as well"
    gate.eval()
    assert gate(x[:1]).weights[0, 0].tolist() == [0, 1, 0]


def test_a_fixed_gate_gives_each_task_its_own_expert() -> None:
    gate = FixedGate(3, num_tasks=3)
    assert torch.equal(gate().weights[0], torch.eye(3))
    assert not list(gate.parameters())
    assert list(gate.state_dict()) == ["table"]


# --------------------------------------------------------------------------------- one interface


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("kind", ["dselect-k", "softmax", "top-k", "gumbel", "fixed"])
def test_every_gate_reports_every_task(kind: Any, per_example: bool, n: int) -> None:
    if kind == "fixed" and per_example:
        with pytest.raises(ValueError, match="static"):
            GateConfig(kind=kind, per_example=True)
        return
    config = GateConfig(kind=kind, per_example=per_example, k=min(2, n))
    gate = build_gate(config, n, 3, WIDTH)
    assert gate.is_static is not per_example
    x = examples(7).float()
    reports = gate.report(x)
    assert gate.training, "a report leaves the mode as it was"
    if per_example:
        with pytest.raises(ValueError, match="got none"):
            gate.report()
        assert gate.training, "also where it fails"
    assert len(reports) == 3
    for report in reports:
        assert len(report.usage) == n
        assert sum(report.usage) == pytest.approx(report.mass, abs=1e-6)
        assert report.mass == pytest.approx(1, abs=1e-6)
        assert 1 <= report.active <= n
        assert set(report.selected) <= set(range(n))
        assert 0 <= report.hardening_gap <= 2
        assert (report.saturated is None) is (kind != "dselect-k")
    hard = gate(x, hard=True).weights
    if kind != "softmax":
        assert ((hard > 0).sum(-1) <= min(2, n)).all()
    torch.testing.assert_close(hard.sum(-1), torch.ones(len(hard), 3))
    assert float(gate.regulariser(gate(x))) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DSelectK(4, 5), "k must be from 1 to the number of experts, 4; got 5"),
        (lambda: DSelectK(4, 0), "k must be from 1 to the number of experts, 4; got 0"),
        (lambda: TopKGate(2, 3), "number of experts, 2; got 3"),
        (lambda: GumbelGate(2, 3), "number of experts, 2; got 3"),
        (lambda: DSelectK(0, 1), "num_experts must be at least 1, got 0"),
        (lambda: SoftmaxGate(0), "num_experts must be at least 1, got 0"),
        (lambda: DSelectK(4, 2, gamma=0.0), "gamma must be positive, got 0.0"),
        (lambda: DSelectK(4, 2, gamma=-1.0), "gamma must be positive, got -1.0"),
        (lambda: DSelectK(4, 2, gamma=float("nan")), "gamma must be positive, got nan"),
        (lambda: DSelectK(4, 2, num_tasks=0), "a gate needs at least one task, got 0"),
        (lambda: DSelectK(4, 2, missing_codes="x"), "must be 'fold' or 'penalty', got 'x'"),  # type: ignore[arg-type]
        (lambda: TopKGate(4, 2, balance=1.0), "balance needs a per-example gate"),
        (lambda: GumbelGate(4, 2, temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: DSelectK(4, 2, in_features=0), "in_features must be at least 1"),
        (lambda: DSelectK(4, 2, in_features=3)(torch.zeros(2, 4)), r"B x 3, got shape \(2, 4\)"),
        (lambda: DSelectK(4, 2, in_features=3)(), "B x 3, got none"),
        (lambda: DSelectK(8, "2"), "^k must be a whole number, got '2'$"),  # type: ignore[arg-type]
        (lambda: DSelectK(8, 2.0), r"^k must be a whole number, got 2\.0$"),  # type: ignore[arg-type]
        (lambda: DSelectK(8.0, 2), r"^num_experts must be a whole number, got 8\.0$"),  # type: ignore[arg-type]
        (lambda: TopKGate(8, True), "^k must be a whole number, got True$"),
        (lambda: SoftmaxGate(8, num_tasks=2.0), "^num_tasks must be a whole number"),  # type: ignore[arg-type]
        (lambda: SoftmaxGate(8, in_features="3"), "^in_features must be a whole number"),  # type: ignore[arg-type]
        (lambda: DSelectK(8, gamma=None), "^gamma must be a number, got None$"),  # type: ignore[arg-type]
        (lambda: DSelectK(8, entropy="1"), "^entropy must be a number, got '1'$"),  # type: ignore[arg-type]
        (lambda: DSelectK(8, gamma=math.inf), "^gamma must be finite, got inf$"),
        (lambda: DSelectK(8, entropy=-1.0), "^entropy must not be negative, got -1.0$"),
        (lambda: DSelectK(8, penalty=-1.0), "^penalty must not be negative, got -1.0$"),
        (
            lambda: DSelectK(8, entropy_schedule="cosine"),  # type: ignore[arg-type]
            "^entropy_schedule must be 'constant' or 'linear', got 'cosine'$",
        ),
        (
            lambda: TopKGate(8, in_features=3, balance=-1.0),
            "^balance must not be negative, got -1.0$",
        ),
        (lambda: GumbelGate(4, temperature=math.inf), "^temperature must be finite, got inf$"),
        (
            lambda: GateConfig(kind="Top-k"),  # type: ignore[arg-type]
            "^kind must be 'dselect-k', 'softmax', 'top-k', 'gumbel' or 'fixed', got 'Top-k'$",
        ),
        (
            lambda: GateConfig(missing_codes="x"),  # type: ignore[arg-type]
            "^missing_codes must be 'fold' or 'penalty', got 'x'$",
        ),
        (
            lambda: GateConfig(entropy_schedule="cosine"),  # type: ignore[arg-type]
            "^entropy_schedule must be 'constant' or 'linear', got 'cosine'$",
        ),
        (lambda: GateConfig(entropy=math.nan), "^entropy must be finite, got nan$"),
        (lambda: GateConfig(k=2.0), r"^k must be a whole number, got 2\.0$"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_has_one_clear_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "gate: k must be at least 1, got 0"),
        ({"gamma": 0.0}, "gate: gamma must be positive, got 0.0"),
        ({"kind": "dselectk"}, "Did you mean 'dselect-k'"),
        ({"entropy": -1.0}, "gate: entropy must not be negative, got -1.0"),
        ({"kind": "top-k", "balance": 1.0}, "gate: balance needs a per-example gate"),
    ],
)
def test_bad_configurations_have_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(GateConfig, values, "gate")
    assert "\n" not in str(caught.value)
