"""Tests of ODE blocks, weights that vary in depth, and the image networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo.errors import SolverError
from zoo.families.continuous_depth import (
    ODE_RESNET_PRESETS,
    ODEBlock,
    ODEResNet,
    ODEResNetConfig,
    SolverConfig,
    TimeVaryingConv2d,
    basis_weights,
    ode_resnet_preset,
)
from zoo.families.continuous_depth.image_networks import TimeChannelConv2d, TimeChannelField

TINY = {"widths": (4, 6), "hidden": 6, "nodes": 3, "groups": 2}


def images(batch: int = 3, size: int = 12) -> Tensor:
    return torch.randn(batch, 1, size, size, generator=torch.Generator().manual_seed(0))


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def count(config: ODEResNetConfig) -> int:
    return sum(p.numel() for p in ODEResNet(config).parameters())


# ------------------------------------------------------------------------------------- the basis


@given(
    basis=st.sampled_from(["piecewise_constant", "piecewise_linear"]),
    nodes=st.integers(1, 7),
    t=st.floats(-0.5, 1.5),
)
def test_pieces_and_hats_are_a_partition_of_one(basis: Any, nodes: int, t: float) -> None:
    weights = basis_weights(basis, nodes, t)
    assert sum(w for _, w in weights) == pytest.approx(1.0)
    assert all(0 <= i < nodes and 0 <= w <= 1 for i, w in weights)
    inside = min(max(t, 0.0), 1.0)
    assert weights == basis_weights(basis, nodes, inside), "clamped outside"
    if basis == "piecewise_linear" and nodes > 1:
        where = sum(w * i / (nodes - 1) for i, w in weights)
        assert where == pytest.approx(inside, abs=1e-12), "hats reproduce t itself"


@given(nodes=st.integers(1, 49), element=st.integers(0, 48))
def test_a_boundary_belongs_to_the_element_on_its_right(nodes: int, element: int) -> None:
    element %= nodes
    assert basis_weights("piecewise_constant", nodes, element / nodes) == [(element, 1.0)]


@given(nodes=st.integers(1, 6), t=st.floats(0.0, 1.0))
def test_legendre_is_numpys(nodes: int, t: float) -> None:
    for i, w in basis_weights("legendre", nodes, t):
        expected = np.polynomial.legendre.legval(2 * t - 1, [0.0] * i + [1.0])
        assert w == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_time_varying_convolution_is_the_blend_of_its_nodes(groups: int) -> None:
    conv = TimeVaryingConv2d(4, 6, groups=groups, nodes=3, basis="piecewise_linear")
    x = torch.randn(2, 4, 5, 5)
    plain = []
    for node in range(3):
        one = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
        one.load_state_dict({"weight": conv.weight[node], "bias": conv.bias[node]})
        plain.append(one(x))
    torch.testing.assert_close(conv(0.125, x), 0.75 * plain[0] + 0.25 * plain[1])
    torch.testing.assert_close(conv(1.0, x), plain[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"kernel_size": 0}, "kernel_size must be odd, got 0"),
        ({"groups": 3}, "groups must divide in_channels=2 and out_channels=2, got 3"),
        ({"groups": 0}, "groups must divide in_channels=2 and out_channels=2, got 0"),
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"basis": "foo"}, "basis must be one of 'piecewise_constant', .*, got 'foo'"),
    ],
)
def test_a_wrong_time_varying_convolution_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeVaryingConv2d(2, 2, **options)


def test_a_wrong_basis_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"basis must be one of 'piecewise_constant', .* got 'foo'"
    ):
        basis_weights("foo", 3, 0.5)  # type: ignore[arg-type]
    for basis in ("piecewise_constant", "piecewise_linear", "legendre"):
        with pytest.raises(ValueError, match="nodes must be at least 1, got 0"):
            basis_weights(basis, 0, 0.5)  # type: ignore[arg-type]


def test_a_time_channel_is_a_concatenated_plane() -> None:
    conv, x = TimeChannelConv2d(3, 4), torch.randn(2, 3, 5, 6)
    joint = nn.Conv2d(4, 4, 3, padding=1)
    weight = torch.cat((conv.time_weight, conv.weight), 1)
    joint.load_state_dict({"weight": weight, "bias": conv.bias})
    plane = torch.full((2, 1, 5, 6), 0.3)
    torch.testing.assert_close(conv(0.3, x), joint(torch.cat((plane, x), 1)))


def test_euler_with_a_node_per_step_is_a_residual_network() -> None:
    """The weights of step k, and of no other step, are those of node k."""
    conv = TimeVaryingConv2d(2, 2, nodes=4)

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, t: float, x: Tensor) -> Tensor:
            return torch.tanh(self.conv(t, x))

    x = torch.randn(2, 2, 4, 4)
    for method in ("euler", "rk4"):
        block = ODEBlock(Field(), SolverConfig(method=method, steps=4))  # type: ignore[arg-type]
        y = block(x)
        expected = x
        for k in range(4):
            alone = TimeVaryingConv2d(2, 2)
            alone.load_state_dict({"weight": conv.weight[k : k + 1], "bias": conv.bias[k : k + 1]})
            field = Field()
            field.conv = alone
            one = SolverConfig(method=method, steps=1)  # type: ignore[arg-type]
            expected = ODEBlock(field, one, (k / 4, (k + 1) / 4))(expected)
        torch.testing.assert_close(y, expected)


# ------------------------------------------------------------------------------ the image networks


@pytest.mark.parametrize(
    ("preset", "ode", "six", "none"),
    [("published", 208_266, 576_778, 132_874), ("published-residual", 232_970, 601_482, 157_578)],
)
def test_parameters_are_those_of_the_released_example(
    preset: str, ode: int, six: int, none: int
) -> None:
    assert count(ode_resnet_preset(preset)) == ode
    assert count(ode_resnet_preset(preset, body="residual", residual_blocks=6)) == six
    assert count(ode_resnet_preset(preset, body="none")) == none
    one = count(ode_resnet_preset(preset, body="residual"))
    assert one - none == (six - none) / 6 == 73_984


def test_the_published_field_ends_in_a_norm() -> None:
    field = TimeChannelField(64)
    y = field(0.5, 10 * torch.randn(2, 64, 6, 6)).view(2, 32, -1)
    torch.testing.assert_close(y.mean(2), torch.zeros(2, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(2, correction=0), torch.ones(2, 32), atol=1e-2, rtol=0)


@pytest.mark.parametrize("stem", ["published_conv", "published_residual", "plain", "strided"])
@pytest.mark.parametrize("body", ["ode", "residual", "none"])
def test_every_network_trains_all_of_its_parameters(stem: Any, body: Any) -> None:
    config = ODEResNetConfig(stem=stem, body=body, transition="residual", **TINY)
    network = randomised(ODEResNet(config))
    logits = network(images())
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_fresh_ode_is_the_identity() -> None:
    torch.manual_seed(0)
    with_ode = ODEResNet(ODEResNetConfig(**TINY))
    without = ODEResNet(ODEResNetConfig(body="none", **TINY))
    state = {k: v for k, v in with_ode.state_dict().items() if "field" not in k}
    without.load_state_dict(state)
    assert torch.equal(with_ode(images()), without(images()))


def test_the_head_and_features_make_the_forward_pass() -> None:
    network = ODEResNet(ODEResNetConfig(**TINY)).eval()
    features = network.forward_features(images())
    assert features.shape == (3, 6)
    assert torch.equal(network.forward_head(features), network(images()))
    assert set(network.group_matcher()) == {"stem", "blocks", "head"}
    decaying = {n for n, _ in network.named_parameters()} - network.no_weight_decay()
    assert all(n.endswith("weight") and "norm" not in n for n in decaying)


# ----------------------------------------------------------------------------------------- knob


def test_the_knob_chooses_the_solver_of_all_blocks() -> None:
    network = randomised(ODEResNet(ODEResNetConfig(body_from=0, **TINY)))
    assert (network.solver, network.steps, network.nfe) == ("midpoint", 2, 8)
    with torch.no_grad():
        exact = {}
        for solver, steps, nfe in (("rk4", 32, 256), ("midpoint", 64, 256), ("euler", 1, 2)):
            network.solver, network.steps = solver, steps
            exact[solver] = network(images())
            assert network.nfe == nfe
        network.solver, network.tolerance = "dopri5", 1e-5
        assert network.nfe == 0, "not known beforehand"
        adaptive = network(images())
    assert network.nfe >= 2 * 8
    assert {block.solver.method for block in network.ode_blocks()} == {"dopri5"}
    # Weights jump between nodes, so that orders do not hold; all solve the same problem though.
    torch.testing.assert_close(exact["rk4"], exact["midpoint"], atol=2e-2, rtol=0)
    torch.testing.assert_close(exact["rk4"], adaptive, atol=2e-2, rtol=0)
    assert (exact["rk4"] - exact["euler"]).abs().max() > 5e-2


def test_the_knob_reaches_the_error_control_and_the_cap() -> None:
    network = randomised(ODEResNet(ODEResNetConfig(body_from=0, **TINY))).double()
    pictures = images().double()
    assert (network.error_control, network.max_nfe) == ("batch", 10_000)
    network.solver, network.error_control = "dopri5", "each_sample"
    with torch.no_grad():
        together, alone = network(pictures), network(pictures[:1])
        torch.testing.assert_close(together[:1], alone)
        assert all(len(b.statistics.nfe_per_sample) == 1 for b in network.ode_blocks())
        network.max_nfe = 5
        assert {b.solver.max_nfe for b in network.ode_blocks()} == {5}
        with pytest.raises(SolverError, match="cap of max_nfe=5"):
            network(pictures)


def test_a_network_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = ODEResNet(ODEResNetConfig(**TINY))
        assert network(torch.empty(2, 1, 12, 12)).shape == (2, 10)


def test_gradient_modes_agree_on_a_fine_grid() -> None:
    config = ODEResNetConfig(widths=(4, 6), groups=2, solver=SolverConfig(method="rk4", steps=16))
    network = randomised(ODEResNet(config)).double()
    found = {}
    for mode in ("discrete", "checkpoint", "adjoint"):
        network.gradient_mode = mode
        network.zero_grad()
        network(images().double()).square().sum().backward()
        found[mode] = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        assert network.nfe_backward == (0 if mode == "discrete" else 64)
    for exact, other in zip(found["discrete"], found["checkpoint"], strict=True):
        assert torch.equal(exact, other)
    for exact, other in zip(found["discrete"], found["adjoint"], strict=True):
        torch.testing.assert_close(exact, other, rtol=5e-3, atol=5e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("gradient", ["discrete", "checkpoint"])
def test_a_network_compiles_as_one_graph(gradient: Any) -> None:
    config = ODEResNetConfig(solver=SolverConfig(steps=2, gradient=gradient), **TINY)
    network = randomised(ODEResNet(config))
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), network(images()))
    exported = torch.export.export(network.eval(), (images(),)).module()
    torch.testing.assert_close(exported(images()), network(images()))


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("solver", "rk5", "no solver 'rk5'.*rk4"),
        ("steps", 0, "at least 1, got 0"),
        ("tolerance", 0.0, "must be positive, got 0.0"),
        ("gradient_mode", "exact", "gradient must be one of 'discrete', .* got 'exact'"),
        ("error_control", "no", "error_control must be one of 'batch', .* got 'no'"),
        ("max_nfe", 0, "max_nfe must be at least 1, got 0"),
    ],
)
def test_a_wrong_value_of_the_knob_is_refused_and_changes_nothing(
    attribute: str, value: Any, message: str
) -> None:
    network = ODEResNet(ODEResNetConfig(**TINY))
    before = [block.solver for block in network.ode_blocks()]
    with pytest.raises(ValueError, match=message):
        setattr(network, attribute, value)
    assert [block.solver for block in network.ode_blocks()] == before


def test_a_network_without_ode_has_no_knob() -> None:
    network = ODEResNet(ODEResNetConfig(body="none", **TINY))
    with pytest.raises(ValueError, match="no ODE block"):
        network.solver = "rk4"


def test_images_of_another_kind_are_refused() -> None:
    network = ODEResNet(ODEResNetConfig(**TINY))
    with pytest.raises(ValueError, match=r"B x 1 x H x W, got \(2, 3, 8, 8\)"):
        network(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="no preset 'paper'"):
        ode_resnet_preset("paper")
    assert set(ODE_RESNET_PRESETS) == {"published", "published-residual"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, "widths must be positive"),
        ({"body_from": 2}, "body_from must be a stage from 0 to 1"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"hidden": -1}, "hidden must be at least 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"basis": "foo"}, "basis must be one of 'piecewise_constant', .* got 'foo'"),
        ({"body": "foo"}, "body must be one of 'ode', 'residual', 'none', got 'foo'"),
        ({"stem": "foo"}, "stem must be one of 'published_conv', .* got 'foo'"),
        ({"field": "foo"}, "field must be one of 'basis', 'time_channel', got 'foo'"),
        ({"transition": "foo"}, "transition must be one of 'conv', 'residual', got 'foo'"),
    ],
)
def test_a_wrong_shape_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ODEResNetConfig(**options)


def test_a_state_that_explodes_is_named_through_the_block() -> None:
    class Square(nn.Module):
        def forward(self, t: float, y: Tensor) -> Tensor:
            return y.square()

    block = ODEBlock(Square(), SolverConfig(method="rk4", steps=64), (0.0, 2.0))
    with pytest.raises(ArithmeticError, match="sample 1 is not finite at time"):
        block(torch.tensor([[0.1], [3.0]]))
    assert math.isfinite(float(block(torch.tensor([[0.1]]))))
