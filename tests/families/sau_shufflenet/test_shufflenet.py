"""ShuffleNet V2 against torchvision's and against known counts."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from zoo.families.sau_shufflenet import SAU, ShuffleNetConfig, ShuffleNetV2, make_activation
from zoo.families.sau_shufflenet import shufflenet as module

WIDTHS = (0.5, 1.0, 1.5, 2.0)
PARAMETERS = {
    (0.5, 100): 444_292,
    (1.0, 100): 1_356_104,
    (1.5, 100): 2_581_124,
    (2.0, 100): 5_549_896,
    (0.5, 10): 352_042,
    (1.0, 10): 1_263_854,
    (1.5, 10): 2_488_874,
    (2.0, 10): 5_365_486,
}
"""Width, classes -> parameters for 32 x 32 images, as third parties count them."""
MACS = {0.5: 10_994_176, 1.0: 45_094_272, 1.5: 94_351_872, 2.0: 187_995_520}
"""Width -> multiply-accumulates of a 32 x 32 image, 100 classes."""


def build(**options: object) -> ShuffleNetV2:
    torch.manual_seed(0)
    return ShuffleNetV2(ShuffleNetConfig(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "classes"), PARAMETERS)
def test_parameters(width: float, classes: int) -> None:
    network = build(width=width, num_classes=classes)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[width, classes]
    assert sum(isinstance(m, SAU) for m in network.modules()) == 37


@pytest.mark.parametrize("width", WIDTHS)
def test_arithmetic(width: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = build(width=width).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * MACS[width]


def of_torchvision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under our names."""
    rooms = {"conv1": "stem", "conv5": "last", "fc": "head"}
    rooms.update({f"stage{i}": f"stages.{i - 2}" for i in (2, 3, 4)})
    split = ((name.partition("."), value) for name, value in state.items())
    return {f"{rooms[room]}.{rest}": value for (room, _, rest), value in split}


@pytest.mark.parametrize("width", WIDTHS)
@torch.no_grad()
def test_equals_torchvision(width: float) -> None:
    torch.manual_seed(0)
    name = f"shufflenet_v2_x{width}".replace(".", "_")
    theirs = getattr(torchvision.models, name)().train()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
            layer.weight.uniform_(0.8, 1.2)
            layer.bias.normal_(std=0.1)
    theirs(torch.randn(8, 3, 64, 64))  # statistics with which signals keep their size
    theirs.double().eval()
    ours = build(width=width, num_classes=1000, stem="large", activation="relu").double().eval()
    ours.load_state_dict(of_torchvision(theirs.state_dict()))
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    expected = theirs(x)
    assert expected.std() > 0.01
    assert expected.abs().max() < 100
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-10)
    ours.to(memory_format=torch.channels_last)
    innermost = ours(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(innermost, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [28, 32])
@torch.no_grad()
def test_documented_shapes(size: int) -> None:
    network = build(width=0.5, in_channels=1, num_classes=10).eval()
    x = torch.randn(2, 1, size, size)
    small = -(-size // 8)
    features = network.forward_features(x)
    assert features.shape == (2, 1024, small, small)
    assert torch.equal(network(x), network.forward_head(features))
    assert network.forward_head(features, pre_logits=True).shape == (2, 1024)
    maps = network.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == [24, 48, 96, 192, 1024]
    assert [m.shape[2] for m in maps] == [size, size // 2, size // 4, small, small]
    assert torch.equal(maps[-1], features)


def test_interleave_is_concatenation_and_shuffle() -> None:
    a, b = torch.randn(2, 2, 3, 4, 5).unbind()
    expected = nn.ChannelShuffle(2)(torch.cat((a, b), 1))
    assert torch.equal(module._interleave(a, b), expected)
    innermost = [t.contiguous(memory_format=torch.channels_last) for t in (a, b)]
    shuffled = module._interleave(*innermost)
    assert torch.equal(shuffled, expected)
    assert shuffled.is_contiguous(memory_format=torch.channels_last)


def test_channels_stay_innermost() -> None:
    network = build(width=0.5).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for features in network.forward_intermediates(x):
        assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", ["prelu", "sau-published", "sau-2-trained"])
def test_every_parameter_gets_a_gradient(activation: str) -> None:
    network = build(width=0.5, num_classes=5, activation=activation)
    network(torch.randn(4, 3, 16, 16)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    scalars = [n for n, p in network.named_parameters() if p.numel() == 1]
    assert len(scalars) == (74 if activation == "sau-2-trained" else 37)


def test_groups() -> None:
    import re

    network = build(width=0.5, activation="sau-2-trained")
    exempt = network.no_weight_decay()
    for name, parameter in network.named_parameters():
        matches = [k for k, p in network.group_matcher().items() if re.match(p, name)]
        assert len(matches) == 1, name
        assert (name in exempt) == (parameter.ndim < 2), name
    assert any(name.endswith("log_beta") for name in exempt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.75}, "width must be one of 0.5, 1.0, 1.5, 2.0, got 0.75"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"stem": "medium"}, "stem must be one of 'small', 'large', got 'medium'"),
    ],
)
def test_bad_shapes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShuffleNetConfig(**options)  # type: ignore[arg-type]


def test_bad_activation_names_the_others() -> None:
    with pytest.raises(ValueError, match="no activation 'rellu'; choose one of relu, leaky-relu"):
        make_activation("rellu")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)])
def test_wrong_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected images B x 3 x H x W, got \("):
        build(width=0.5)(torch.zeros(shape))
