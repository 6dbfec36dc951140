"""The networks through timm's own functions."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from timm.layers import get_act_layer
from torch import nn

import zoo.timm
from zoo.errors import ZooError
from zoo.families.sau_shufflenet import SAU

NAMES = [f"sau_shufflenet_v2_{width}" for width in ("x0_5", "x1_0", "x1_5", "x2_0")]


def test_all_are_registered() -> None:
    assert timm.list_models("sau_*") == NAMES
    assert sorted(n for n in zoo.timm.__all__ if n.startswith("sau")) == NAMES
    # This module is not mistaken for the package it imports.
    assert timm.__name__ == "timm"
    assert hasattr(timm, "create_model")


def test_parameters_of_the_original() -> None:
    # torchvision's counts for 1000 classes.
    counts = [1_366_792, 2_278_604, 3_503_624, 7_393_996]
    for name, count in zip(NAMES, counts, strict=True):
        model = timm.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == count, name
        assert model.pretrained_cfg["input_size"] == (3, 224, 224)


@torch.no_grad()
def test_options_and_heads() -> None:
    model = timm.create_model(
        NAMES[0], num_classes=7, in_chans=1, stem="small", activation="gelu"
    ).eval()
    assert sum(isinstance(m, nn.GELU) for m in model.modules()) == 37
    x = torch.randn(2, 1, 28, 28)
    assert model(x).shape == (2, 7)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 1024)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().out_features == 3
    assert timm.create_model(NAMES[0], num_classes=0).eval()(torch.randn(1, 3, 64, 64)).shape == (
        1,
        1024,
    )


def steps(name: str) -> list[object]:
    """What a model answers, up to numbers of channels."""
    x = torch.randn(2, 3, 64, 64)
    found: list[object] = []
    model = timm.create_model(name, num_classes=0, global_pool="", drop_rate=0.5).eval()
    found += [model.drop_rate, model(x).ndim, torch.equal(model(x), model.forward_features(x))]
    for classes, pool in ((3, "catavgmax"), (0, None), (4, "avg"), (5, None), (0, "")):
        model.reset_classifier(classes, pool)
        y = model(x)
        found.append((model.num_classes, y.shape[1:] if classes else y.ndim))
        found.append(model.head_hidden_size / model.num_features)
    model = model.bfloat16()
    model.reset_classifier(3, "max")
    found.append({p.dtype for p in model.parameters()})
    found.append((model(x.bfloat16()).dtype, model.get_classifier().training))
    model.train().float().get_classifier().weight.data.fill_(1.0)
    features = torch.ones(2, model.num_features, 1, 1)
    dropped = model.forward_head(features, pre_logits=True)
    found += [bool((dropped == 0).any()), sorted(set(dropped.flatten().tolist()))]
    return found


@torch.no_grad()
def test_heads_are_as_those_of_timm() -> None:
    assert steps(NAMES[0]) == steps("resnet10t")
    model = timm.create_model(NAMES[0], num_classes=0, global_pool="")
    with pytest.raises(ValueError, match="global_pool='' is for num_classes=0, got 3: name a pool"):
        model.reset_classifier(3)


@torch.no_grad()
def test_intermediates_are_as_those_of_timm() -> None:
    x = torch.randn(1, 3, 64, 64)
    ours, theirs = (timm.create_model(name).eval() for name in (NAMES[0], "efficientnet_lite0"))
    for model, stages in ((ours, 3), (theirs, 5)):
        last, maps = model.forward_intermediates(x)
        assert len(maps) == stages
        assert torch.equal(last, model.forward_features(x))
        (only,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
        assert torch.equal(only, maps[-1])
        found = model.forward_intermediates(x, [-1, 1], intermediates_only=True)
        assert [m.shape for m in found] == [maps[1].shape, maps[-1].shape]
        stopped, (first,) = model.forward_intermediates(x, [0], stop_early=True)
        assert torch.equal(stopped, first)
        assert torch.equal(first, maps[0])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        ours.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("mish", get_act_layer("mish")),
        ("hard_swish", get_act_layer("hard_swish")),
        ("prelu", nn.PReLU),
        ("sau-4", SAU),
    ],
)
def test_activations_by_names_of_timm_and_ours(name: str, layer: type[nn.Module]) -> None:
    model = timm.create_model(NAMES[0], act_layer=name)
    assert sum(type(m) is layer for m in model.modules()) == 37
    with pytest.raises(ValueError, match="no activation 'mash'; choose one of relu"):
        timm.create_model(NAMES[0], act_layer="mash")


@pytest.mark.parametrize("how", ["hook", "getter"])
@torch.no_grad()
def test_features_only(how: str) -> None:
    model = timm.create_model(NAMES[0], features_only=True, feature_cls=how).eval()
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(48, 8, 8), (96, 4, 4), (192, 2, 2)]
    assert model.feature_info.channels() == [48, 96, 192]
    assert model.feature_info.reduction() == [8, 16, 32]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_timm_models_take_the_layer(name: str) -> None:
    model = timm.create_model(name, act_layer=functools.partial(SAU, beta=4.0), num_classes=2)
    layers = [m for m in model.modules() if isinstance(m, SAU)]
    assert len(layers) > 10
    assert all(layer.beta == 4.0 for layer in layers)
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_pretrained_is_refused_in_one_line() -> None:
    with pytest.raises(ZooError, match=r"pretrained ones come from zoo\.load") as caught:
        timm.create_model(NAMES[1], pretrained=True)
    assert "\n" not in str(caught.value)
