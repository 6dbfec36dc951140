"""Surgery on the networks of other libraries."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import create_act
from torch import Tensor, nn

from zoo.families.sau_shufflenet import SAU, make_activation, swap_activation


@pytest.mark.parametrize("trained", [False, True])
def test_torchvision(trained: bool) -> None:
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=4).train(trained)
    report = swap_activation(model, "sau-published")
    assert len(report.replaced) == 37
    assert set(report.replaced.values()) == {"ReLU"}
    assert str(report) == "replaced 37 activations (37 ReLU)"
    layers = [model.get_submodule(path) for path in report.replaced]
    assert len(set(layers)) == 37  # each has parameters of its own
    assert all(isinstance(m, SAU) and m.training is trained for m in layers)
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(m.alpha.grad is not None for m in layers)


def test_nothing_but_the_activation_changes() -> None:
    """A leaky ReLU as SAU with a large beta computes what it did."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.15), nn.Conv2d(4, 2, 3), nn.Sigmoid())
    x = torch.randn(2, 3, 9, 9)
    before = model(x).detach()
    report = swap_activation(model, functools.partial(SAU, 0.15, 1e5))
    assert report.replaced == {"1": "LeakyReLU"}
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_timm() -> None:
    model = timm.create_model("efficientnet_b0", num_classes=3).eval()
    report = swap_activation(model, "gelu", kinds=["SiLU"])
    assert "SiLU" in report.replaced.values()
    assert not any(isinstance(m, nn.SiLU) for m in model.modules())
    # The gates of its squeeze and excitation are no activations.
    assert any(isinstance(m, nn.Sigmoid) for m in model.modules())
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_all_of_timm_are_known() -> None:
    gates = {"Sigmoid", "Tanh", "Hardsigmoid", "Identity"}
    made = [timm.layers.get_act_layer(name)() for name in create_act._ACT_LAYER_DEFAULT]
    layers = [layer for layer in made if type(layer).__name__ not in gates]
    assert len(layers) >= 14
    report = swap_activation(nn.Sequential(*layers), "gelu")
    assert len(report.replaced) == len(layers)


def test_shared_modules_stay_shared() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(2, 2), shared))
    report = swap_activation(model, "prelu")
    assert set(report.replaced) == {"0", "1.1"}
    assert model[0] is model[1][1]
    assert sum(isinstance(m, nn.PReLU) for m in model.modules()) == 1


def test_device_and_dtype_follow() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.ReLU())
    swap_activation(model, "sau-2-trained")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for name in ("prelu", "sau-2-trained"):
        half = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).bfloat16()
        swap_activation(half, name)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert half(torch.ones(1, 2, dtype=torch.bfloat16)).isfinite().all()


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


@pytest.mark.parametrize("model", [Functional(), nn.Linear(2, 2), nn.ReLU()])
def test_nothing_to_replace(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no modules to replace .* called as a function"):
        swap_activation(model, "sau-2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "sau-3"}, "no activation 'sau-3'; choose one of relu"),
        ({"activation": None}, "no activation None; choose one of relu"),
        ({"activation": SAU()}, r"got the layer SAU\(alpha=0.15, beta=2\); pass its class"),
        ({"activation": "gelu", "kinds": "ReLU"}, "kinds must be several .* the string 'ReLU'"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match=message) as caught:
        swap_activation(model, **arguments)
    assert "\n" not in str(caught.value)
    assert isinstance(model[0], nn.ReLU)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", F.relu),
        ("leaky-relu", lambda x: F.leaky_relu(x, 0.15)),
        ("prelu", lambda x: F.leaky_relu(x, 0.15)),
        ("gelu", F.gelu),
        ("silu", F.silu),
    ],
)
def test_activations_by_name(name: str, expected: object) -> None:
    assert callable(expected)
    x = torch.linspace(-3, 3, 61)
    torch.testing.assert_close(make_activation(name)(x.clone()), expected(x))  # type: ignore[arg-type]
