"""What a fixed-step ODE block costs over a hand-written loop, and beside torchdiffeq and torchode.

The field is that of the MNIST network, at its size, and a small one, where the solver's own work
shows. Solvers of fixed steps take the same steps with the same method; torchdiffeq's rk4 is the
3/8 rule, ours the classical one, both with four evaluations a step. Where the field is most of the
work, no solver can be much faster than another.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from tests.benchmarks._harness import Comparison, race, repeated
from zoo.families.continuous_depth import ODEBlock, ODEResNet, ODEResNetConfig, SolverConfig
from zoo.families.continuous_depth.image_networks import ODE_RESNET_PRESETS, BasisField

ROUNDS = 15
OVER_TORCHDIFFEQ = 0.7
OVER_LOOP = 1.05
STEPS = 8
TOLERANCE = 1e-3


class _Mlp(nn.Module):
    """A field so small that what is around it shows."""

    def __init__(self, width: int = 64, hidden: int = 64) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, t: float, y: Tensor) -> Tensor:
        out: Tensor = self.two(torch.tanh(self.one(y)))
        return out


def _fields() -> dict[str, tuple[nn.Module, Tensor]]:
    """Field and state, by name."""
    torch.manual_seed(0)
    conv = BasisField(64, 32, 4, "piecewise_linear")
    nn.init.normal_(conv.conv2.weight, std=0.02)
    return {
        "convolutions, 128 x 64 x 7 x 7": (conv, torch.randn(128, 64, 7, 7)),
        "small MLP, 32 x 64": (_Mlp(), torch.randn(32, 64)),
    }


def run(rounds: int) -> list[Comparison]:
    """Steps of Euler and rk4 against both peers; a compiled block; adaptive solvers; an epoch."""
    comparisons = []
    for name, (field, y) in _fields().items():
        for method in ("euler", "rk4"):
            comparisons += _fixed_steps(name, method, field, y, rounds)
    comparisons += _compiled(rounds)
    comparisons += _adaptive(rounds)
    comparisons += _training_step(rounds)
    return comparisons


def _both_ways(function: Callable[[Tensor], Tensor], y: Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        source = y.detach().requires_grad_()
        function(source).sum().backward()

    return run


def _loop(method: str, field: nn.Module) -> Callable[[Tensor], Tensor]:
    """What one would write by hand."""
    h = 1.0 / STEPS

    def euler(y: Tensor) -> Tensor:
        for i in range(STEPS):
            y = y + h * field(i * h, y)
        return y

    def rk4(y: Tensor) -> Tensor:
        for i in range(STEPS):
            t = i * h
            k1 = field(t, y)
            k2 = field(t + h / 2, y + h / 2 * k1)
            k3 = field(t + h / 2, y + h / 2 * k2)
            k4 = field(t + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y

    return {"euler": euler, "rk4": rk4}[method]


def _theirs(method: str, field: nn.Module) -> Callable[[Tensor], Tensor]:
    times = torch.tensor([0.0, 1.0])
    options = {"step_size": 1.0 / STEPS}

    def solve(y: Tensor) -> Tensor:
        states: Tensor = torchdiffeq.odeint(
            lambda t, y: field(float(t), y), y, times, method=method, options=options
        )
        return states[-1]

    return solve


def _fixed_steps(
    name: str, method: Any, field: nn.Module, y: Tensor, rounds: int
) -> list[Comparison]:
    block = ODEBlock(field, SolverConfig(method=method, steps=STEPS))
    taken = race(
        {
            "ours": repeated(_both_ways(block, y)),
            "loop": repeated(_both_ways(_loop(method, field), y)),
            "torchdiffeq": repeated(_both_ways(_theirs(method, field), y)),
        },
        rounds,
    )
    peers = (
        ("hand-written loop", "loop", OVER_LOOP),
        ("torchdiffeq", "torchdiffeq", OVER_TORCHDIFFEQ),
    )
    return [
        Comparison(
            name=f"{STEPS} steps of {method}, forward and backward, {name}",
            contestant="ODE block",
            peer=peer,
            values=taken["ours"],
            peer_values=taken[key],
            at_most=at_most,
        )
        for peer, key, at_most in peers
    ]


def _compiled(rounds: int) -> list[Comparison]:
    """The block as one graph, against the compiled loop, the block in eager mode, and torchdiffeq,
    which is not made to be compiled."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return []
    comparisons = []
    for name, (field, y) in _fields().items():
        block = ODEBlock(field, SolverConfig(method="euler", steps=STEPS))
        ours = torch.compile(block, fullgraph=True)
        loop = torch.compile(_loop("euler", field), fullgraph=True)
        taken = race(
            {
                "ours": repeated(_both_ways(ours, y)),
                "loop": repeated(_both_ways(loop, y)),
                "eager": repeated(_both_ways(block, y)),
                "torchdiffeq": repeated(_both_ways(_theirs("euler", field), y)),
            },
            rounds,
        )
        for peer, key, at_most in (
            ("compiled loop", "loop", OVER_LOOP),
            ("the block in eager mode", "eager", None),
            ("torchdiffeq, eager", "torchdiffeq", OVER_TORCHDIFFEQ),
        ):
            comparisons.append(
                Comparison(
                    name=f"{STEPS} steps of euler, compiled, forward and backward, {name}",
                    contestant="compiled ODE block",
                    peer=peer,
                    values=taken["ours"],
                    peer_values=taken[key],
                    at_most=at_most,
                )
            )
    return comparisons


def _adaptive(rounds: int) -> list[Comparison]:
    """dopri5 through the steps and by the adjoint, against torchode where it is installed."""
    if importlib.util.find_spec("torchode") is None:
        return []
    import torchode

    field, y = _fields()["small MLP, 32 x 64"]
    term = torchode.ODETerm(lambda t, y: field(0.0, y))
    stepper = torchode.Dopri5(term=term)
    controller = torchode.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
    solver = torchode.AutoDiffAdjoint(stepper, controller)
    ends = torch.tensor([0.0, 1.0]).expand(len(y), 2)

    def theirs(y: Tensor) -> Tensor:
        solution = solver.solve(torchode.InitialValueProblem(y0=y, t_eval=ends))
        last: Tensor = solution.ys[:, -1]
        return last

    contestants = {"torchode": repeated(_both_ways(theirs, y))}
    for gradient in ("discrete", "adjoint"):
        config = SolverConfig(method="dopri5", tolerance=TOLERANCE, gradient=gradient)  # type: ignore[arg-type]
        contestants[gradient] = repeated(_both_ways(ODEBlock(field, config), y))
    taken = race(contestants, rounds)
    return [
        Comparison(
            name=f"dopri5, tolerance {TOLERANCE:g}, {gradient} gradient, small MLP, 32 x 64",
            contestant="ODE block by torchdiffeq",
            peer="torchode, discrete gradient",
            values=taken[gradient],
            peer_values=taken["torchode"],
        )
        for gradient in ("discrete", "adjoint")
    ]


def _training_step(rounds: int) -> list[Comparison]:
    """A training step of our network against one of the released example's configuration; an epoch
    is 468 of either."""
    images = torch.randn(128, 1, 28, 28)
    ours = ODEResNet(
        ODEResNetConfig(
            widths=(24, 64),
            hidden=32,
            nodes=4,
            basis="piecewise_linear",
            solver=SolverConfig(method="midpoint", steps=2),
        )
    )
    published = ODEResNet(ODE_RESNET_PRESETS["published"])
    published.gradient_mode = "discrete"  # as the script does unless told otherwise

    def step(network: nn.Module) -> Callable[[], None]:
        return lambda: network(images).logsumexp(1).sum().backward()

    taken = race({"ours": repeated(step(ours)), "theirs": repeated(step(published))}, rounds)
    return [
        Comparison(
            name="a training step on 128 images of MNIST, forward and backward",
            contestant="our network",
            peer="the released example's, dopri5 at 1e-3",
            values=taken["ours"],
            peer_values=taken["theirs"],
        )
    ]
