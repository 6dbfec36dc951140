"""Training the encoders of online ensembles, on images that are never in their streams."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from zoo.data.augmentation import ImageBatch
from zoo.data.encoder_images import EncoderImages
from zoo.data.pictures import ImagePreprocessing
from zoo.errors import ZooError
from zoo.families.online_ensemble import EncoderNetwork, EncoderNetworkConfig
from zoo.tasks.base import Exportable, Measurement, ZooModule, count_macs
from zoo.tasks.optimization import OptimizerConfig

__all__ = ["EncoderTraining"]

_BATCH = 200


class EncoderTraining(ZooModule):
    """Trains an autoencoder, or an encoder under a head that names the images of another set.

    Args:
        network: the encoder and what trains it.
        optimizer: how it is trained.
        preprocessing: of the images; None: that of the first data.
        divergence: weight of the divergence of an autoencoder's code from a standard normal.
        invert: turn half of the images of a classifier into their negatives.
        compile: compile the network's parts.
    """

    network_config: ClassVar[type[Any]] = EncoderNetworkConfig
    preprocessing_config: ClassVar[type[Any] | None] = ImagePreprocessing
    protocols: ClassVar[dict[str, str]] = {
        "test": "on images of the same kind that it was not trained on: squared error of a pixel "
        "after reconstruction from the mean code, or share of images that are named right"
    }

    network: EncoderNetwork
    preprocessing: ImagePreprocessing | None

    def __init__(
        self,
        network: EncoderNetworkConfig = EncoderNetworkConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        preprocessing: ImagePreprocessing | None = None,
        divergence: float = 1e-3,
        invert: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, compile)
        self.network = EncoderNetwork(network)
        self.preprocessing = preprocessing
        self.divergence, self.invert = divergence, invert
        self.val_loss = MeanMetric()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, EncoderImages):
            self.preprocessing = datamodule.preprocessing

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Squared error and divergence, or cross-entropy in nats."""
        images = batch.images
        if self.config.num_classes:
            if self.invert:
                negative = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
                images = torch.where(negative, 1 - images, images)
            loss = F.cross_entropy(self.network.classify(images), batch.targets)
        else:
            noise = torch.randn(len(images), self.config.encoder.dim, device=images.device)
            reconstruction, divergence = self.network.reconstruct(images, noise)
            loss = F.mse_loss(reconstruction, images) + self.divergence * divergence.mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        losses = self._errors(batch.images, batch.targets)
        self.val_loss.update(losses.mean(), len(losses))
        self.log("val_loss", self.val_loss, prog_bar=True)

    def _errors(self, images: Tensor, labels: Tensor) -> Tensor:
        """Squared error of each image, or one where its class is wrong; B."""
        if self.config.num_classes:
            logits = self.network.classify(images)
            wrong = (logits.argmax(1) != labels).float()
            # The largest of what is not finite says nothing.
            return wrong.where(logits.isfinite().all(1), torch.nan)
        reconstruction = self.network.reconstruct(images)[0]
        return (reconstruction - images).square().flatten(1).mean(1)

    def samples(self, batch: ImageBatch) -> int:
        return len(batch.images)

    def macs(self, batch: ImageBatch) -> int:
        """Multiply-accumulates of the encoder per image."""
        return count_macs(self.network.encoder, batch.images[:1])

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """Images B x C x H x W with values from 0 to 1 in, encodings B x d out."""
        shape = (batch, *self.config.encoder.input_shape)
        return Exportable(
            network=_Encodings(self.network),
            inputs={"images": torch.rand(shape, generator=generator)},
            outputs=("encodings",),
        )

    @torch.no_grad()
    def measure(self, datamodule: EncoderImages, protocol: str) -> Measurement:  # type: ignore[override]
        """Mean squared error of a pixel, or accuracy from 0 to 1; sampling units are images.

        Raises:
            ZooError: there is no such protocol.
        """
        if protocol not in self.protocols:
            raise ZooError(
                f"Unknown protocol {protocol!r}; choose one of {', '.join(self.protocols)}."
            )
        datamodule.setup("test")
        images, labels = datamodule.test_images, datamodule.test_labels
        batches = zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True)
        with self.evaluating():
            errors = torch.cat(
                [
                    self._errors(part.to(self.device) / 255, named.to(self.device)).cpu()
                    for part, named in batches
                ]
            ).double()
        classifies = bool(self.config.num_classes)
        return Measurement(
            metric="accuracy" if classifies else "squared_error",
            unit="image",
            sums=1 - errors if classifies else errors,
            counts=torch.ones_like(labels),
            kind="proportion" if classifies else "mean",
            split="test",
        )


class _Encodings(torch.nn.Module):
    """The encodings in a tuple, as exported programs have them."""

    def __init__(self, network: EncoderNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.network(images),)
