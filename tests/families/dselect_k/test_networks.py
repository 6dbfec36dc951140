"""Tests of the multi-task networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.configs import build, to_json
from zoo.errors import ConfigError
from zoo.families.dselect_k import (
    GateConfig,
    ImagePairConfig,
    ImagePairNet,
    MatrixFactorisation,
    MatrixFactorisationConfig,
    MultiTaskNet,
    RecommenderConfig,
    RecommenderNet,
    RegressionConfig,
    RegressionNet,
)

USERS, ITEMS = 7, 11


def recommender(**changes: Any) -> RecommenderNet:
    shape: dict[str, Any] = {
        "num_users": USERS,
        "num_items": ITEMS,
        "embedding_dim": 4,
        "num_experts": 5,
        "expert_widths": (6,),
        "tower_widths": (3,),
        "dropout": 0.0,
    }
    return RecommenderNet(RecommenderConfig(**{**shape, **changes}))


def pairs_of_images(**changes: Any) -> ImagePairNet:
    shape: dict[str, Any] = {
        "size": 18,
        "num_experts": 5,
        "channels": (2, 3),
        "expert_widths": (4,),
        "tower_widths": (4,),
    }
    return ImagePairNet(ImagePairConfig(**{**shape, **changes}))


def regression(**changes: Any) -> RegressionNet:
    return RegressionNet(RegressionConfig(**{"num_experts": 5, **changes}))


def inputs_of(net: MultiTaskNet, batch: int = 6) -> tuple[Tensor, ...]:
    if isinstance(net, RecommenderNet):
        return torch.randint(0, USERS, (batch,)), torch.randint(0, ITEMS, (batch,))
    if isinstance(net, ImagePairNet):
        return (torch.randn(batch, 1, 18, 18),)
    return (torch.randn(batch, 10),)


NETS: list[Callable[..., MultiTaskNet]] = [recommender, pairs_of_images, regression]
SHAPES = [(6, 2), (6, 2, 10), (6, 8)]


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize(("make", "shape"), list(zip(NETS, SHAPES, strict=True)))
def test_shapes_and_a_gradient_for_every_parameter(
    make: Callable[..., MultiTaskNet], shape: tuple[int, ...], per_example: bool
) -> None:
    net = make(gate=GateConfig(per_example=per_example, entropy=0.1))
    inputs = inputs_of(net)
    output = net(*inputs)
    assert output.outputs.shape == shape
    assert torch.isfinite(output.outputs).all()
    ((output.outputs**2).sum() + net.gate.regulariser(output.routing)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert len(net.report(*inputs)) == shape[1]
    dense = net(*inputs, dispatch="dense").outputs
    torch.testing.assert_close(net(*inputs, dispatch="sparse").outputs, dense)


@pytest.mark.parametrize("make", NETS)
def test_a_configuration_rebuilds_its_network(make: Callable[..., MultiTaskNet]) -> None:
    net = make(gate=GateConfig(kind="top-k"))
    config = build(type(net.config), to_json(net.config), "config.json")
    assert config == net.config
    other = type(net)(config)  # type: ignore[call-arg]
    other.load_state_dict(net.state_dict())
    inputs = inputs_of(net)
    assert torch.equal(other(*inputs).outputs, net(*inputs).outputs)


@pytest.mark.parametrize("make", NETS)
def test_a_converged_network_is_pruned_and_can_be_stored(
    make: Callable[..., MultiTaskNet],
) -> None:
    net = make(gate=GateConfig()).eval()
    bits = net.gate.codes.bias  # type: ignore[union-attr]
    assert isinstance(bits, Tensor)
    with torch.no_grad():
        bits.copy_(bits.sign())
    inputs = inputs_of(net)
    pruned = net.pruned()
    used = (net.gate().weights[0] > 0).any(0).sum()
    assert pruned.moe.experts.num_experts == used < 5
    torch.testing.assert_close(pruned(*inputs).outputs, net(*inputs).outputs)
    # The stored configuration and tensors are those of an ordinary network.
    stored = build(type(net.config), to_json(pruned.config), "config.json")
    again = type(net)(stored).eval()  # type: ignore[call-arg]
    again.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(again(*inputs).outputs, net(*inputs).outputs)


@pytest.mark.parametrize("make", NETS)
def test_groups_cover_all_parameters_and_exemptions_exist(
    make: Callable[..., MultiTaskNet],
) -> None:
    net = make()
    names = [name for name, _ in net.named_parameters()]
    patterns = net.group_matcher().values()
    for name in names:
        assert sum(bool(re.match(pattern, name)) for pattern in patterns) == 1, name
    exempt = net.no_weight_decay()
    assert exempt <= set(names)
    assert any(name.startswith("moe.gate") for name in exempt)
    assert "towers.head.weight" not in exempt


def test_features_then_head_is_the_whole() -> None:
    images = pairs_of_images()
    (x,) = inputs_of(images)
    torch.testing.assert_close(images.forward_head(images.forward_features(x)), images(x).outputs)
    net = recommender(rating_centre=2.0)
    users, items = inputs_of(net)
    outputs = net.forward_head(net.forward_features(users, items))
    torch.testing.assert_close(outputs, net(users, items).outputs)
    plain = net.towers(net.forward_features(users, items)).squeeze(-1)
    torch.testing.assert_close(outputs, plain + torch.tensor([0.0, 2.0]))


def test_side_features_move_the_vectors_by_a_linear_map() -> None:
    net = recommender(user_features=3, item_features=2)
    net.user_table.copy_(torch.rand(USERS, 3))
    assert net.user_side is not None
    expected = net.users.weight[2] + net.user_side.weight @ net.user_table[2]
    torch.testing.assert_close(net.user_vectors(torch.tensor([2]))[0], expected)
    assert {"user_table", "item_table"} <= set(net.state_dict())
    users, items = inputs_of(net)
    assert net(users, items).outputs.shape == (6, 2)


@pytest.mark.parametrize("product", [True, False])
def test_experts_see_both_vectors_and_perhaps_their_product(product: bool) -> None:
    net = recommender(product=product)
    users, items = inputs_of(net)
    u, v = net.users.weight[users], net.items.weight[items]
    expected = torch.cat([u, v, u * v] if product else [u, v], 1)
    assert torch.equal(net.gate_input(users, items), expected)
    features = net.moe(expected, expected).features
    torch.testing.assert_close(net(users, items).outputs, net.forward_head(features))


def test_fixed_gates_share_nothing() -> None:
    net = pairs_of_images(num_experts=2, gate=GateConfig(kind="fixed"))
    x = torch.randn(3, 1, 18, 18)
    net(x).outputs[:, 0].sum().backward()
    weight = net.moe.experts.convolutions[0].weight  # type: ignore[union-attr, index]
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    assert weight.grad[0].any()
    assert not weight.grad[1].any()


def test_matrix_factorisation_is_its_sum() -> None:
    net = MatrixFactorisation(
        MatrixFactorisationConfig(num_users=USERS, num_items=ITEMS, embedding_dim=3)
    ).double()
    users, items = torch.tensor([1, 4]), torch.tensor([0, 9])
    outputs = net(users, items).outputs
    for row, (user, item) in enumerate(zip(users, items, strict=True)):
        for task, centre in enumerate((0.0, 3.5)):
            u = net.users.weight[user].view(2, 4)[task]
            v = net.items.weight[item].view(2, 4)[task]
            expected = centre + net.bias[task] + u[0] + v[0] + u[1:] @ v[1:]
            torch.testing.assert_close(outputs[row, task], expected)


def test_without_vectors_every_user_has_the_same_order() -> None:
    net = MatrixFactorisation(
        MatrixFactorisationConfig(num_users=USERS, num_items=ITEMS, embedding_dim=0)
    )
    every = torch.arange(ITEMS)
    orders = [
        net(torch.full((ITEMS,), user), every).outputs[:, 0].argsort().tolist()
        for user in range(USERS)
    ]
    assert len({tuple(order) for order in orders}) == 1


@pytest.mark.parametrize(("users", "items"), [([USERS], [0]), ([0], [ITEMS]), ([-1], [0])])
def test_ids_out_of_range_have_one_clear_line(users: list[int], items: list[int]) -> None:
    with pytest.raises(ValueError, match=r"(user|item) numbers go from 0 to \d+, got") as caught:
        recommender()(torch.tensor(users), torch.tensor(items))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        ([1, 2], [1, 2, 3], r"^users and items must be as many, got shapes \(2,\) and \(3,\)$"),
        ([1.0], [1], r"^user numbers must be int64 or int32, got torch\.float32$"),
        ([1], [True], r"^item numbers must be int64 or int32, got torch\.bool$"),
    ],
)
def test_pairs_that_are_none_have_one_clear_line(
    users: list[Any], items: list[Any], message: str
) -> None:
    factors = MatrixFactorisation(MatrixFactorisationConfig(num_users=USERS, num_items=ITEMS))
    for net in (recommender(), factors):
        for call in (net, net.forward_features):
            with pytest.raises(ValueError, match=message):
                call(torch.tensor(users), torch.tensor(items))


def test_no_pairs_at_all_have_no_outputs() -> None:
    factors = MatrixFactorisation(MatrixFactorisationConfig(num_users=USERS, num_items=ITEMS))
    none = torch.empty(0, dtype=torch.int64)
    for net in (recommender(), factors):
        assert net(none, none).outputs.shape == (0, 2)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (pairs_of_images, (2, 1, 18, 20), r"images B x 1 x 18 x 18, got \(2, 1, 18, 20\)$"),
        (pairs_of_images, (2, 3, 18, 18), r"images B x 1 x 18 x 18, got \(2, 3, 18, 18\)$"),
        (pairs_of_images, (1, 18, 18), r"images B x 1 x 18 x 18, got \(1, 18, 18\)$"),
        (regression, (2, 9), r"inputs B x 10, got \(2, 9\)$"),
        (regression, (10,), r"inputs B x 10, got \(10,\)$"),
    ],
)
@pytest.mark.parametrize("per_example", [False, True])
def test_inputs_of_another_shape_have_one_clear_line(
    make: Callable[..., MultiTaskNet], shape: tuple[int, ...], message: str, per_example: bool
) -> None:
    net = make(gate=GateConfig(per_example=per_example))
    for call in (net, net.forward_features, net.gate_input):
        with pytest.raises(ValueError, match=f"^expected {message}"):
            call(torch.randn(shape))  # type: ignore[operator]


@pytest.mark.parametrize("config", [RecommenderConfig, MatrixFactorisationConfig])
def test_tasks_that_are_none_have_one_clear_line(config: type[Any]) -> None:
    with pytest.raises(ValueError, match=r"^a task must be 'watch' or 'rate', got 'click'$"):
        config(tasks=("click", "rate"))
    with pytest.raises(ValueError, match=r"^tasks must be a tuple of names, got 'watch'$"):
        config(tasks="watch")


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (RecommenderConfig, {"gate": {"k": 9}}, "k must be from 1 to the number of experts, 8"),
        (RecommenderConfig, {"num_experts": 0}, "num_experts must be at least 1, got 0"),
        (RecommenderConfig, {"tasks": []}, "tasks is empty; choose from 'watch' and 'rate'"),
        (RecommenderConfig, {"tasks": ["watch", "watch"]}, "tasks has one of them twice"),
        (RecommenderConfig, {"tasks": ["buy"]}, "expected one of 'watch', 'rate', got 'buy'"),
        (RecommenderConfig, {"num_users": 0}, "num_users must be at least 1, got 0"),
        (RecommenderConfig, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (RecommenderConfig, {"expert_widths": []}, "expert_widths is empty"),
        (RecommenderConfig, {"gate": {"gamma": -1.0}}, "gate: gamma must be positive, got -1.0"),
        (ImagePairConfig, {"num_experts": 1, "gate": {"k": 2}}, "number of experts, 1; got 2"),
        (ImagePairConfig, {"num_tasks": 0}, "num_tasks must be at least 1, got 0"),
        (RegressionConfig, {"num_tasks": 0}, "num_tasks must be at least 1, got 0"),
        (MatrixFactorisationConfig, {"tasks": []}, "tasks is empty"),
        (MatrixFactorisationConfig, {"embedding_dim": -1}, "embedding_dim must not be negative"),
    ],
)
def test_bad_configurations_have_one_clear_line(
    config: type[Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(config, values, "config.json")
    assert "\n" not in str(caught.value)
