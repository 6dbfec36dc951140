"""The networks through timm's own functions."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
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


@torch.no_grad()
def test_features_only() -> None:
    model = timm.create_model(NAMES[0], features_only=True).eval()
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
