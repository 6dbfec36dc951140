"""The noise model against its definition, counted frequencies, and published ratios."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor, nn

from zoo.families.continuous_depth.blocks import ODEBlock, TimeVaryingConv2d
from zoo.families.continuous_depth.image_networks import (
    ODEResNet,
    ODEResNetConfig,
    TimeChannelConv2d,
)
from zoo.families.sau_shufflenet import SAU, ShuffleNetConfig, ShuffleNetV2
from zoo.families.sau_shufflenet.analog import (
    AnalogConfig,
    AnalogLayer,
    gradient_error,
    noise_std,
    reduce_precision,
    to_analog,
)


def test_ties_go_towards_zero() -> None:
    x = torch.tensor([0.125, 0.1251, 0.375, 0.5, -0.125, -0.3751, 2.0, 0.0])
    expected = torch.tensor([0.0, 0.25, 0.25, 0.5, 0.0, -0.5, 2.0, 0.0])
    assert torch.equal(reduce_precision(x, 4), expected)


@settings(deadline=None)
@given(x=st.floats(-3, 3), levels=st.integers(1, 300))
def test_precision_is_the_nearest_level(x: float, levels: int) -> None:
    value = torch.tensor(x, dtype=torch.float64)
    found = reduce_precision(value, levels).item()
    assert abs(found - x) <= 0.5 / levels + 1e-12
    assert abs(found * levels - round(found * levels)) < 1e-9
    assert abs(found) <= abs(x) + 0.5 / levels


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24), (torch.float64, 24)],
)
def test_levels_stay_where_they_are(dtype: torch.dtype, most: int) -> None:
    """In every dtype whose digits are enough to tell them apart."""
    for levels in (*(2**bits for bits in range(most + 1)), 3 * 2 ** (most - 3)):
        step = max(1, levels // 10_007)
        last = levels - torch.arange(min(levels, 9))
        which = torch.cat((torch.arange(0, levels + 1, step), last))
        x = (torch.cat((which, -which)).double() / levels).to(dtype).requires_grad_()
        found = reduce_precision(x, levels)
        assert found.dtype == dtype
        assert torch.equal(found, x), levels
        (slope,) = torch.autograd.grad(found.sum(), x)
        assert torch.equal(slope, torch.ones_like(x))


# Error probability -> noise in steps.
STEPS = {0.01: 0.1941, 0.05: 0.2551, 0.1: 0.3040, 0.2: 0.3902, 0.3: 0.4824, 0.5: 0.7413}
STEPS[0.8] = 1.9736


@pytest.mark.parametrize("levels", [1, 16, 64, 256])
def test_noise_by_error_probability(levels: int) -> None:
    for probability, steps in STEPS.items():
        std = noise_std(probability, levels)
        assert std * levels == pytest.approx(steps, abs=6e-5)
        assert 2 * norm.cdf(-0.5 / (std * levels)) == pytest.approx(probability, rel=1e-9)
    assert noise_std(0.0, levels) == 0.0


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.8])
def test_error_probability_is_what_is_counted(probability: float) -> None:
    levels, n = 16, 200_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (n,), generator=generator) / levels
    noise = noise_std(probability, levels) * torch.randn(n, generator=generator)
    moved = (reduce_precision(x + noise, levels) != x).double().mean().item()
    assert abs(moved - probability) < 4 * math.sqrt(probability * (1 - probability) / n)


def layer(config: AnalogConfig, seed: int = 0) -> AnalogLayer:
    torch.manual_seed(1)
    return AnalogLayer(nn.Linear(5, 3), config, torch.Generator().manual_seed(seed))


def quantised(x: np.ndarray, levels: int) -> np.ndarray:
    x = np.clip(x, -1, 1)
    return np.sign(x) * np.ceil(np.abs(x) * levels - 0.5) / levels


def test_layer_without_noise_by_hand() -> None:
    analog = layer(AnalogConfig(bits=3, scale="unit"))
    x = torch.randn(7, 5)
    linear = analog.layer
    assert isinstance(linear, nn.Linear)
    weight, bias = (quantised(p.detach().numpy(), 8) for p in (linear.weight, linear.bias))
    expected = quantised(quantised(x.numpy(), 8) @ weight.T + bias, 8)
    np.testing.assert_allclose(analog(x).detach().numpy(), expected, atol=1e-6)


def test_scales_take_the_largest_value() -> None:
    config = AnalogConfig(bits=3, outputs=False)
    analog = layer(config)
    analog.input_scale.fill_(4.0)
    linear = analog.layer
    assert isinstance(linear, nn.Linear)
    x = torch.randn(7, 5) * 2
    largest = [float(p.abs().max()) for p in (linear.weight, linear.bias)]
    weight, bias = (
        quantised(p.detach().numpy() / s, 8) * s
        for p, s in zip((linear.weight, linear.bias), largest, strict=True)
    )
    expected = quantised(x.numpy() / 4, 8) * 4 @ weight.T + bias
    np.testing.assert_allclose(analog(x).detach().numpy(), expected, atol=1e-5)


def test_gradients_go_straight_through() -> None:
    analog = layer(AnalogConfig(bits=2, noise=0.3, scale="unit", outputs=False))
    linear = analog.layer
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight[0, 0] = 3.0  # outside of the range: its gradient passes all the same
    x = torch.tensor([[0.3, -0.2, 1.5, -1.0, 0.0]], requires_grad=True)
    entered: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].detach()))
    weights: list[Tensor] = []
    linear.register_forward_hook(lambda module, *_: weights.append(module.weight.detach()))
    y = analog(x)
    sent = torch.tensor([[1.0, -2.0, 0.5]])
    y.backward(sent)
    assert linear.weight.grad is not None
    assert linear.bias.grad is not None
    torch.testing.assert_close(linear.weight.grad, sent.T @ entered[0])
    torch.testing.assert_close(linear.bias.grad, sent[0])
    inside = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]])  # the clamp's mask, its ends within
    assert x.grad is not None
    torch.testing.assert_close(x.grad, sent @ weights[0] * inside)
    assert not torch.equal(weights[0], linear.weight)


def test_output_noise_comes_before_the_quantiser() -> None:
    analog = layer(AnalogConfig(bits=3, noise=0.5, inputs=False, weights=False, scale="unit"))
    y = analog(torch.randn(50, 5) / 4)
    assert torch.equal(y * 8, (y * 8).round())
    analog = layer(AnalogConfig(bits=3, noise=0.5, outputs=False, weights=False, scale="unit"))
    entered: list[Tensor] = []
    analog.layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    analog(torch.randn(50, 5) / 4)
    assert (entered[0] * 8 != (entered[0] * 8).round()).float().mean() > 0.99


def network() -> ShuffleNetV2:
    torch.manual_seed(0)
    config = ShuffleNetConfig(width=0.5, num_classes=5, activation="sau-2")
    return ShuffleNetV2(config).eval()


def test_network_keeps_its_digital_parts() -> None:
    digital, images = network(), torch.randn(4, 3, 16, 16)
    analog = to_analog(digital, AnalogConfig(bits=6, noise=0.2), calibrate=[images])
    layers = [m for m in analog.modules() if isinstance(m, AnalogLayer)]
    plain = [m for m in digital.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == len(plain) == 57
    assert not any(isinstance(m, AnalogLayer) for m in digital.modules())
    # Normalisation is not touched, and parameters are the stored ones.
    trained = {n.replace(".layer.", "."): p for n, p in analog.named_parameters()}
    assert trained.keys() == dict(digital.named_parameters()).keys()
    assert all(torch.equal(p, trained[n]) for n, p in digital.named_parameters())
    first = layers[0]
    assert float(first.input_scale) == float(images.abs().max())


@torch.no_grad()
def test_noise_is_on_in_evaluation_and_follows_the_seed() -> None:
    digital, images = network(), torch.randn(4, 3, 16, 16)
    config = AnalogConfig(bits=5, noise=0.5)
    analog = to_analog(digital, config, seed=3, calibrate=[images])
    torch.manual_seed(0)
    first, second = analog(images), analog(images)
    assert not torch.equal(first, second)
    torch.manual_seed(99)  # the global source plays no part
    again = to_analog(digital, config, seed=3, calibrate=[images])
    assert torch.equal(first, again(images))


@torch.no_grad()
def test_more_bits_come_closer() -> None:
    digital, images = network(), torch.randn(4, 3, 16, 16)
    exact = digital(images)
    errors = [
        float((to_analog(digital, AnalogConfig(bits=b), calibrate=[images])(images) - exact).norm())
        for b in (4, 8, 12, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * float(exact.norm())
    off = to_analog(digital, AnalogConfig(bits=None))
    assert torch.equal(off(images), exact)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Sequential(nn.ReLU(), self.first)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def test_shared_layers_stay_shared() -> None:
    torch.manual_seed(0)
    config, network = AnalogConfig(bits=2, scale="unit"), Twice()
    analog = to_analog(network, config)
    assert isinstance(analog, Twice)
    assert isinstance(analog.first, AnalogLayer)
    assert analog.second[1] is analog.first
    # As two layers of equal weights that are not shared.
    apart = nn.Sequential(network.first, nn.ReLU(), copy.deepcopy(network.first))
    x = torch.randn(4, 3)
    assert torch.equal(analog(x), to_analog(apart, config)(x))


def test_a_single_layer() -> None:
    linear, x = nn.Linear(5, 3), torch.randn(4, 5)
    config = AnalogConfig(bits=3)
    analog = to_analog(linear, config, calibrate=[x])
    assert isinstance(analog, AnalogLayer)
    assert analog.layer is not linear
    inside = to_analog(nn.Sequential(linear), config, calibrate=[x])
    assert torch.equal(analog(x), inside(x))


def test_attention_of_torch_is_refused() -> None:
    network = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    for model, where in ((network, r"0\.self_attn"), (nn.MultiheadAttention(8, 2), "the network")):
        with pytest.raises(ValueError, match=rf"^{where} is an nn\.MultiheadAttention") as caught:
            to_analog(model, AnalogConfig(scale="unit"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(lambda: nn.LSTM(4, 3), "LSTM"), (lambda: nn.Bilinear(4, 4, 3), "Bilinear")],
)
def test_layers_that_would_stay_digital_are_refused(
    make: Callable[[], nn.Module], kind: str
) -> None:
    network = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(ValueError, match=f"^1 is a {kind}, which has a matrix"):
        to_analog(network, AnalogConfig(scale="unit"))
    looked_up = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    assert isinstance(to_analog(looked_up, AnalogConfig(scale="unit"))[1], AnalogLayer)


@pytest.mark.parametrize(
    ("conv", "operands"),
    [
        (TimeVaryingConv2d(2, 3, nodes=2, basis="legendre"), ("weight", "bias")),
        (TimeChannelConv2d(2, 3), ("weight", "bias", "time_weight")),
    ],
)
@torch.no_grad()
def test_convolutions_in_time_by_hand(conv: nn.Module, operands: tuple[str, ...]) -> None:
    """What is stored is quantised; what is computed from it, at a time, is as it was."""
    x = torch.rand(2, 2, 5, 5) * 2 - 1
    analog = to_analog(conv, AnalogConfig(bits=3, scale="unit", outputs=False))
    assert {name for name, _ in conv.named_parameters()} == set(operands)
    by_hand = copy.deepcopy(conv)
    for parameter in by_hand.parameters():
        parameter.copy_(reduce_precision(parameter.clamp(-1, 1), 8))
    expected = by_hand(0.3, reduce_precision(x, 8))
    torch.testing.assert_close(analog(0.3, x), expected)
    assert not torch.allclose(expected, conv(0.3, x))


@torch.no_grad()
def test_all_products_of_an_ode_resnet_are_analog() -> None:
    torch.manual_seed(0)
    network = ODEResNet(ODEResNetConfig(widths=(4, 8), num_classes=5)).eval()
    images = torch.randn(3, 1, 28, 28)
    analog = to_analog(network, AnalogConfig(bits=4, noise=0.5), calibrate=[images])
    layers = [m for m in analog.modules() if isinstance(m, AnalogLayer)]
    inside = {id(p) for one in layers for p in one.parameters()}
    matrices = [p for p in analog.parameters() if p.ndim > 1]
    assert {id(p) for p in matrices} <= inside
    block = next(m for m in analog.modules() if isinstance(m, ODEBlock))
    same = next(m for m in network.modules() if isinstance(m, ODEBlock))
    h = torch.randn(3, 8, 7, 7)
    assert not torch.equal(block(h), same(h))


ERRORS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "sau-published": SAU(0.15, 20_000.0),
    "sau-4": SAU(0.15, 4.0),
    "sau-1": SAU(0.15, 1.0),
}


@pytest.fixture(scope="module")
def errors() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: gradient_error(activation) for name, activation in ERRORS.items()}


def simulated(derivative: Callable[[np.ndarray], np.ndarray]) -> float:
    """Mean gradient error where the product is near zero, from the definition, in numpy."""
    levels, generator = 256, np.random.default_rng(0)
    std = 1 / (2 * norm.isf(0.25) * levels)  # half of the values on a level leave it

    def read(x: np.ndarray) -> np.ndarray:
        return quantised(x + std * generator.standard_normal(x.shape), levels)

    grid = np.arange(-levels, levels + 1) / levels
    a, b = np.meshgrid(grid, grid)
    error = np.abs(derivative(read(read(a) * read(b))) - derivative(a * b))
    return float(error[np.abs(a * b) < 0.01].mean())


def test_gradient_error_of_relu_and_gelu(errors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The figure of the paper, at 8 bits and error probability 0.5: 70 to 90 times near zero."""
    near = {
        name: error[exact.abs() < 0.01].mean().item() for name, (error, exact) in errors.items()
    }
    references = {
        "relu": simulated(lambda z: (z > 0).astype(float)),
        "gelu": simulated(lambda z: norm.cdf(z) + z * norm.pdf(z)),
    }
    for name, expected in references.items():
        assert near[name] == pytest.approx(expected, rel=0.03), name
    assert near["relu"] == pytest.approx(0.16, abs=0.01)
    assert 70 < near["relu"] / near["gelu"] < 90
    zoom = {n: gradient_error(ERRORS[n], largest=0.25)[0].max().item() for n in ("relu", "gelu")}
    assert zoom["relu"] == 1.0
    assert 70 < zoom["relu"] / zoom["gelu"] < 100


def test_gradient_error_orders_by_curvature(errors: dict[str, tuple[Tensor, Tensor]]) -> None:
    mean = {name: error.mean().item() for name, (error, _) in errors.items()}
    for name, expected in (("relu", 0.00888), ("gelu", 0.00224), ("silu", 0.00149)):
        assert mean[name] == pytest.approx(expected, rel=0.05), name
    # With the published beta SAU errs as a leaky ReLU does, 0.85 times ReLU.
    assert mean["sau-published"] == pytest.approx(0.85 * mean["relu"], rel=0.03)
    assert mean["sau-1"] < mean["silu"] < mean["gelu"] < mean["sau-4"] < mean["sau-published"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": -1.0}, "bits must be from 0 to 24, got -1.0"),
        ({"bits": 2.5}, "whole number of levels"),
        ({"noise": 1.0}, r"error probability in \[0, 1\), got 1.0"),
        ({"bits": None, "noise": 0.1}, "needs bits"),
        ({"scale": "calib"}, "scale must be one of 'calibrated', 'unit', got 'calib'"),
    ],
)
def test_bad_configurations(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnalogConfig(**options)  # type: ignore[arg-type]


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(ValueError, match="no convolutions or linear layers"):
        to_analog(nn.Sequential(nn.ReLU()), AnalogConfig())
    with pytest.raises(ValueError, match="needs batches to calibrate with"):
        to_analog(nn.Sequential(nn.Linear(2, 2)), AnalogConfig())
    with pytest.raises(ValueError, match="error probability"):
        noise_std(1.0, 4)


def test_levels_and_ranges() -> None:
    for levels in (0, -4):
        for call in (
            lambda n: reduce_precision(torch.ones(2), n),
            lambda n: noise_std(0.0, n),
            lambda n: gradient_error(nn.ReLU(), levels=n),
        ):
            with pytest.raises(ValueError, match=f"levels must be at least 1, got {levels}"):
                call(levels)
    for largest in (0.0, 2.0, math.nan):
        with pytest.raises(ValueError, match=r"largest must be in \(0, 1\], got"):
            gradient_error(nn.ReLU(), levels=4, largest=largest)
