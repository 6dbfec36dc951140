"""Tests of the experts: dense, sorted and pruned are the same, and a loop over plain layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zoo.families.dselect_k import (
    ConvExperts,
    DSelectK,
    ExpertBank,
    Gate,
    GumbelGate,
    MixtureOfExperts,
    MLPExperts,
    SoftmaxGate,
    TopKGate,
    Towers,
    mix,
)

WIDTH = 6


def mlp(n: int, *widths: int) -> MLPExperts:
    bank = MLPExperts(n, WIDTH, widths or (5,)).double()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    return bank


def by_hand(bank: MLPExperts, x: Tensor, i: int) -> Tensor:
    """Expert i as plain layers."""
    for layer in bank.layers:
        x = F.relu(x @ layer.weight[i].T + layer.bias[i])  # type: ignore[index, union-attr, operator]
    return x


def random_weights(batch: int, tasks: int, n: int, active: int, seed: int = 0) -> Tensor:
    """Weights with about `active` experts per task, and rows without any."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch, tasks, n, generator=generator, dtype=torch.float64)
    return weights * (torch.rand(batch, tasks, n, generator=generator) < active / n)


@given(
    n=st.integers(1, 9),
    batch=st.integers(1, 8),
    tasks=st.integers(1, 3),
    active=st.integers(0, 3),
    layers=st.integers(1, 3),
    static=st.booleans(),
)
def test_a_mixture_is_the_sum_written_out_however_it_is_computed(
    n: int, batch: int, tasks: int, active: int, layers: int, static: bool
) -> None:
    bank = mlp(n, *(5,) * layers)
    x = torch.randn(batch, WIDTH, dtype=torch.float64)
    weights = random_weights(1 if static else batch, tasks, n, active)
    expected = torch.zeros(batch, tasks, 5, dtype=torch.float64)
    for t in range(tasks):
        for i in range(n):
            expected[:, t] += weights[:, t, i, None] * by_hand(bank, x, i)
    for dispatch in ("dense", "sparse", "auto"):
        torch.testing.assert_close(mix(bank, x, weights, dispatch), expected)


def gradients(make: Callable[[], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(inputs, torch.autograd.grad(make(), list(inputs.values())), strict=True))


def half_saturated(gate: Gate) -> Gate:
    """Parameters so large that about half of the bits are 0 or 1, and some experts are out."""
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(std=0.8)
    return gate


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("kind", ["dselect-k", "top-k", "softmax"])
def test_sorted_dispatch_has_the_gradients_of_dense(kind: str, per_example: bool) -> None:
    width = WIDTH if per_example else None
    makers: dict[str, Callable[[], Gate]] = {
        "dselect-k": lambda: DSelectK(16, 2, num_tasks=2, in_features=width, entropy=0.1),
        "top-k": lambda: TopKGate(16, 2, num_tasks=2, in_features=width),
        "softmax": lambda: SoftmaxGate(16, num_tasks=2, in_features=width),
    }
    bank, gate = mlp(16, 5, 4), half_saturated(makers[kind]().double())
    layer = MixtureOfExperts(bank, gate)
    x = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = {"x": x, **dict(layer.named_parameters())}
    target = torch.randn(12, 2, 4, dtype=torch.float64)
    zeros = int((gate(x).weights == 0).sum())
    assert (zeros > 0) is (kind != "softmax"), "or there is nothing to skip"

    def loss(dispatch: Any) -> Tensor:
        features, routing = layer(x, x, dispatch=dispatch)
        return F.mse_loss(features, target) + gate.regulariser(routing)

    dense = gradients(lambda: loss("dense"), inputs)
    sparse = gradients(lambda: loss("sparse"), inputs)
    for name in inputs:
        torch.testing.assert_close(sparse[name], dense[name], msg=name)
    assert all(gradient.any() for gradient in dense.values())


def test_gradients_of_sorted_dispatch_are_finite_differences() -> None:
    bank = MLPExperts(4, 3, (2,)).double()
    weights = random_weights(5, 2, 4, 2).requires_grad_()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    # A weight of exactly zero is not computed, so only those in use can be moved.
    mask = (weights != 0).double()
    assert torch.autograd.gradcheck(lambda x, w: mix(bank, x, w * mask, "sparse"), (x, weights))


def test_experts_without_examples_get_a_gradient_of_zero() -> None:
    bank = mlp(6)
    weights = torch.zeros(3, 1, 6, dtype=torch.float64)
    weights[:, 0, 2] = 1.0
    mix(bank, torch.randn(3, WIDTH, dtype=torch.float64), weights, "sparse").sum().backward()
    grad = bank.layers[0].weight.grad
    assert isinstance(grad, Tensor)
    assert grad.flatten(1).any(1).nonzero().flatten().tolist() == [2]


def test_only_experts_in_use_are_computed() -> None:
    calls: list[int] = []

    class Counting(MLPExperts):
        def grouped(self, groups: Any) -> list[Tensor]:
            calls.extend(0 if group is None else len(group) for group in groups)
            return super().grouped(groups)

    bank = Counting(16, WIDTH, (4,))
    weights = torch.zeros(40, 1, 16)
    weights.scatter_(2, torch.randint(0, 16, (40, 1, 2)), 1.0)
    mix(bank, torch.randn(40, WIDTH), weights)
    assert sum(calls) == int((weights > 0).sum())
    calls.clear()
    mix(bank, torch.randn(40, WIDTH), torch.rand(40, 1, 16))
    assert not calls, "a dense gate is computed densely"


def test_a_gumbel_gate_is_computed_densely_in_training() -> None:
    layer = MixtureOfExperts(mlp(4).float(), GumbelGate(4, 1, in_features=WIDTH))
    x = torch.randn(64, WIDTH)
    features, routing = layer(x, x)
    assert (routing.weights == 0).any(), "or skipping would be right"
    features.sum().backward()
    assert layer.gate.scores.bias.grad.all()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("channels", [(4,), (4, 6)])
def test_convolutional_experts_are_plain_convolutions(channels: tuple[int, ...]) -> None:
    bank = ConvExperts(3, 2, 18, channels, (7, 5), kernel=3).double()
    images = torch.randn(4, 2, 18, 18, dtype=torch.float64)
    for i in range(3):
        x = images
        for layer in bank.convolutions:
            kernel = layer.weight[i].view(len(layer.bias[i]), -1, 3, 3)  # type: ignore[index, union-attr, arg-type, operator]
            x = F.max_pool2d(F.relu(F.conv2d(x, kernel, layer.bias[i])), 2)  # type: ignore[index, union-attr]
        expected = by_hand(bank.dense, x.flatten(1), i)
        torch.testing.assert_close(bank(images)[:, i], expected)
    weights = random_weights(4, 2, 3, 1)
    torch.testing.assert_close(
        mix(bank, images, weights, "sparse"), mix(bank, images, weights, "dense")
    )
    last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(bank(last), bank(images))
    assert bank(images[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize("bank_of", ["mlp", "conv"])
@pytest.mark.parametrize("hard", [False, True])
def test_pruning_keeps_what_is_used_and_the_output(bank_of: str, hard: bool) -> None:
    bank: ExpertBank
    if bank_of == "mlp":
        bank, x = mlp(8), torch.randn(5, WIDTH, dtype=torch.float64)
    else:
        bank = ConvExperts(8, 1, 14, (3,), (5,), kernel=3).double()
        x = torch.randn(5, 1, 14, 14, dtype=torch.float64)
    gate = DSelectK(8, 2, num_tasks=3).double()
    with torch.no_grad():
        gate.codes.bias.view(3, 2, 3)[:] = torch.tensor([[1.0, -1, 1], [-1, -1, 1]])
        gate.codes.bias.view(3, 2, 3)[2, 0, 0] = -0.1  # task 2 has a bit that is not saturated
    layer = MixtureOfExperts(bank, gate).eval()
    pruned = layer.pruned(hard=hard)
    # Experts 4 and 5; unsaturated, the bit of task 2 adds nothing new.
    assert pruned.experts.num_experts == 2
    torch.testing.assert_close(pruned(x).features, layer(x, hard=hard).features)
    assert sum(p.numel() for p in pruned.experts.parameters()) == (
        sum(p.numel() for p in bank.parameters()) // 4
    )
    assert bank.num_experts == 8, "the original is left alone"


@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("dispatch", ["auto", "dense", "sparse"])
def test_a_gate_sees_as_many_examples_as_the_experts(rows: int, dispatch: Any) -> None:
    moe = MixtureOfExperts(mlp(4), TopKGate(4, 1, num_tasks=2, in_features=3)).double()
    x = torch.randn(4, WIDTH).double()
    with pytest.raises(ValueError, match=rf"row for each example of x, got shapes \({rows}, 3\)"):
        moe(x, torch.randn(rows, 3), dispatch=dispatch)
    assert moe(x, torch.randn(4, 3), dispatch=dispatch).features.shape[:2] == (4, 2)
    static = MixtureOfExperts(mlp(4), TopKGate(4, 1, num_tasks=2)).double()
    assert static(x, torch.randn(rows, 3)).features.shape[:2] == (4, 2), "it sees nothing"


def test_a_per_example_gate_cannot_be_pruned() -> None:
    layer = MixtureOfExperts(mlp(4), DSelectK(4, 2, in_features=WIDTH))
    with pytest.raises(ValueError, match="only a static gate can be pruned"):
        layer.pruned()


def test_towers_are_plain_networks_of_each_task() -> None:
    towers = Towers(3, 6, (5,), 2).double()
    features = torch.randn(4, 3, 6, dtype=torch.float64)
    first, last = towers.hidden[0], towers.head
    with torch.no_grad():
        first.bias.normal_()  # type: ignore[union-attr, operator]
    for t in range(3):
        hidden = F.relu(features[:, t] @ first.weight[t].T + first.bias[t])  # type: ignore[index, union-attr, operator]
        expected = hidden @ last.weight[t].T + last.bias[t]  # type: ignore[index, union-attr, operator]
        torch.testing.assert_close(towers(features)[:, t], expected)


def test_reduced_precision_agrees_in_both_ways() -> None:
    layer = MixtureOfExperts(mlp(8).float(), half_saturated(DSelectK(8, 2, in_features=WIDTH)))
    x = torch.randn(32, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        dense, routing = layer(x, x, dispatch="dense")
        sparse, _ = layer(x, x, dispatch="sparse")
    assert routing.weights.dtype == torch.float32
    assert sparse.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(sparse, dense, rtol=0.05, atol=0.3)
    exact = layer(x, x).features
    assert (sparse - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("rows", [1, 5])
def test_no_weight_at_all_has_the_same_type_in_both_ways(rows: int) -> None:
    x, weights = torch.randn(5, WIDTH), torch.zeros(rows, 2, 4)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            dense, sparse = (mix(mlp(4).float(), x, weights, way) for way in ("dense", "sparse"))  # type: ignore[arg-type]
        assert sparse.dtype == dense.dtype
        assert sparse.shape == dense.shape
        assert not sparse.any()


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("dispatch", ["dense", "sparse", "auto"])
def test_without_examples_or_weight_gradients_are_zeros_and_not_missing(
    dispatch: Any, rows: int
) -> None:
    bank = mlp(4)
    x = torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.zeros(rows, 2, 4, dtype=torch.float64, requires_grad=True)
    y = mix(bank, x, weights, dispatch)
    assert y.shape == (rows, 2, 5)
    for gradient in torch.autograd.grad(y.sum(), [x, *bank.parameters()]):
        assert not gradient.any()
    if not rows:
        assert y.sum().item() == 0
        (of_weights,) = torch.autograd.grad(mix(bank, x, weights, dispatch).sum(), weights)
        assert of_weights.shape == (0, 2, 4)


def test_dense_dispatch_has_derivatives_of_second_order() -> None:
    bank = MLPExperts(4, 3, (2,)).double()
    weights = random_weights(5, 2, 4, 2).requires_grad_()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: mix(bank, x, w, "dense"), (x, weights))


def test_pruning_leaves_frozen_experts_frozen() -> None:
    gate = DSelectK(8, 1)
    with torch.no_grad():
        gate.codes.bias.copy_(torch.tensor([1.0, -1, 1]))
    layer = MixtureOfExperts(mlp(8, 5, 4).float(), gate)
    layer.experts.layers[0].weight.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    pruned = layer.pruned().experts
    assert {name: p.requires_grad for name, p in pruned.named_parameters()} == {
        "layers.0.weight": False,
        "layers.0.bias": True,
        "layers.1.weight": True,
        "layers.1.bias": True,
    }


def test_a_gate_without_weight_on_experts_cannot_be_pruned() -> None:
    gate = DSelectK(5, 1, missing_codes="penalty")
    with torch.no_grad():
        gate.codes.bias.copy_(torch.tensor([-1.0, 1.0, 1.0]))  # code 6 of 0 .. 7
    layer = MixtureOfExperts(mlp(5).float(), gate)
    with pytest.raises(ValueError, match=r"^no task gives any expert weight"):
        layer.pruned()
    assert layer.experts.num_experts == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPExperts(0, 3, (2,)), "num_experts must be at least 1, got 0"),
        (lambda: MLPExperts(2, 3, ()), "at least one layer"),
        (
            lambda: MLPExperts(2, 3, 4),  # type: ignore[arg-type]
            "^widths must be a list of the width of each layer, got 4$",
        ),
        (lambda: MLPExperts(2, 3, (-1,)), "^a width must be at least 1, got -1$"),
        (lambda: MLPExperts(2, 0, (3,)), "^in_features must be at least 1, got 0$"),
        (lambda: ConvExperts(-1, 1, 36), "^num_experts must be at least 1, got -1$"),
        (lambda: ConvExperts(2, 0, 36), "^in_channels must be at least 1, got 0$"),
        (lambda: ConvExperts(2, 1, 36, (3, 0)), "^a number of channels must be at least 1, got 0$"),
        (
            lambda: mix(mlp(4), torch.randn(2, WIDTH), torch.ones(2, 1, 4), "spares"),  # type: ignore[arg-type]
            "^dispatch must be 'auto', 'dense' or 'sparse', got 'spares'$",
        ),
        (lambda: ConvExperts(2, 1, 8), "too small for 2 convolutions"),
        (lambda: ConvExperts(2, 1, 28, ()), "at least one convolution"),
        (lambda: MixtureOfExperts(mlp(4), DSelectK(5)), "weighs 5 experts, the bank has 4"),
    ],
)
def test_bad_input_has_one_clear_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
