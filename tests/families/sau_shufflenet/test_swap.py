"""Surgery on the networks of other libraries."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import activations_me, create_act
from timm.models import metaformer, nfnet
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
    layers += [activations_me.SwishMe(), activations_me.MishMe(), activations_me.HardSwishMe()]
    report = swap_activation(nn.Sequential(*layers), "gelu")
    assert len(report.replaced) == len(layers)


@pytest.mark.parametrize("kind", [metaformer.SquaredReLU, metaformer.StarReLU])
def test_an_activation_made_of_another_is_replaced_whole(kind: Any) -> None:
    """Its inside alone would be squared."""
    x = torch.linspace(-2, 2, 9)
    model = nn.Sequential(nn.Sequential(kind()), kind())
    report = swap_activation(model, "gelu")
    assert report.replaced == {"0.0": kind.__name__, "1": kind.__name__}
    torch.testing.assert_close(model(x), F.gelu(F.gelu(x)))
    with pytest.raises(ValueError, match="no modules to replace"):
        swap_activation(kind(), "gelu")


def test_the_factor_of_normaliser_free_networks_stays() -> None:
    x = torch.linspace(-2, 2, 9)
    model = nn.Sequential(nfnet.GammaAct("relu", gamma=1.7))
    assert swap_activation(model, "gelu").replaced == {"0": "GammaAct"}
    torch.testing.assert_close(model(x), 1.7 * F.gelu(x))
    assert swap_activation(model, "silu").replaced == {"0.activation": "GELU"}
    torch.testing.assert_close(model(x), 1.7 * F.silu(x))


# ------------------------------------------------------------------------------------------ hooks


def test_hooks_go_on_and_are_removed_by_their_handles() -> None:
    model, called = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), []

    def hook(name: str) -> Any:
        return lambda *_: called.append(name)

    old, x = model[1], torch.ones(1, 2)
    handles = [
        old.register_forward_pre_hook(hook("pre")),
        old.register_forward_pre_hook(hook("pre with kwargs"), with_kwargs=True),
        old.register_forward_hook(hook("forward")),
        old.register_forward_hook(hook("forward with kwargs"), with_kwargs=True),
        old.register_full_backward_pre_hook(hook("backward pre")),
        old.register_full_backward_hook(hook("backward")),
    ]
    swap_activation(model, "sau-2")
    model(x).sum().backward()
    expected = ["pre", "pre with kwargs", "forward", "forward with kwargs"]
    assert called == [*expected, "backward pre", "backward"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(called) == 6


def test_hooks_that_are_called_after_an_error_are_so_still() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model, called = nn.Sequential(nn.ReLU()), []
    model[0].register_forward_hook(lambda *_: called.append(1), always_call=True)
    swap_activation(model, Broken)
    with pytest.raises(RuntimeError, match="broken"):
        model(torch.ones(1))
    assert called == [1]


def test_extractors_of_timm_keep_all_their_maps() -> None:
    with torch.device("meta"):
        model = timm.create_model("legacy_xception", features_only=True).eval()
        x = torch.zeros(1, 3, 128, 128)
    before = [y.shape for y in model(x)]
    swap_activation(model, "sau-2")
    assert [y.shape for y in model(x)] == before
    assert len(before) == 5


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor.*")
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
def test_an_encoder_computes_the_same_without_gradients(activation: nn.Module) -> None:
    """Its fast path knows ReLU and GELU only, and which one it was made with."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
    before = encoder(x).detach()
    assert len(swap_activation(encoder, "sau-1").replaced) == 2
    with_gradients = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), with_gradients)
    assert float((with_gradients.detach() - before).abs().max()) > 0.01


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
