"""Classification of images: training, accuracy, and predictions with names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from zoo.configs import build
from zoo.data.augmentation import ImageBatch
from zoo.data.images import ImageDataModule
from zoo.data.pictures import ImagePreprocessing, picture_pixels, read_image, resize
from zoo.errors import ConfigError, DataError, ZooError
from zoo.progress import track
from zoo.tasks.base import Exportable, Measurement, ZooModule, check_count, count_macs, finite
from zoo.tasks.optimization import OptimizerConfig

__all__ = ["ImageClassifier", "ImagePrediction", "images_of"]

_BATCH = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePrediction:
    """What a model sees in an image.

    Attributes:
        classes: names of the likeliest classes, the likeliest first.
        probabilities: one for each of `classes`.
    """

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def label(self) -> str:
        """Name of the likeliest class."""
        return self.classes[0]

    @property
    def probability(self) -> float:
        """Probability of the likeliest class."""
        return self.probabilities[0]


def _average(
    averaged: tuple[Tensor, ...] | list[Tensor],
    current: tuple[Tensor, ...] | list[Tensor],
    updates: Tensor | int,
    decay: float,
) -> None:
    """Move averages towards current values, faster at first; counters are copied."""
    # The first steps would otherwise weigh in for 1 / (1 - decay) steps. timm's warm-up is alike.
    decay = min(decay, (1 + float(updates)) / (10 + float(updates)))
    if averaged[0].is_floating_point():
        torch._foreach_lerp_(averaged, current, 1 - decay)
    else:
        torch._foreach_copy_(averaged, current)


class FromPixels(nn.Module):
    """A network with the normalisation of its images before it."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocessing: ImagePreprocessing) -> None:
        super().__init__()
        self.network = network
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (preprocessing.mean, preprocessing.std)
        )
        self.register_buffer("scale", 1.0 / std)
        self.register_buffer("shift", mean / std)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.network(images * self.scale - self.shift),)


class ImageClassifier(ZooModule):
    """A classifier of images; a family adds a subclass that names its network.

    A subclass sets `network_config` and `network_class`, whose constructor takes such a
    configuration, with at least the fields `num_classes` and `in_channels`, and whose `forward`
    takes B x C x H x W normalised images to B x K logits:

        class ShuffleNetClassifier(ImageClassifier):
            network_config = ShuffleNetConfig
            network_class = ShuffleNet

            def __init__(
                self, network: ShuffleNetConfig = ShuffleNetConfig(), **options: Any
            ) -> None:
                super().__init__(network, **options)

    Args:
        network: shape of the network.
        optimizer: how it is trained.
        preprocessing: size and statistics of images, and the names of classes; None: those of the
            data that it is trained on. Where it is given, as by `zoo.load`, training goes on with
            its statistics, and takes the names of the data.
        label_smoothing: probability that is spread evenly over all classes, in [0, 1).
        ema_decay: decay per step of an exponential moving average of the weights, in (0, 1), with
            statistics of batch normalisation averaged as well. The average is what is measured,
            used and published. None: the weights of the last step.
        channels_last: keep images and weights with channels innermost, which convolutions on CPUs
            and recent GPUs are faster with.
        compile: compile the network's blocks for training.

    Raises:
        ConfigError: an option is out of range.
    """

    network_class: ClassVar[type[nn.Module]]
    """Class of the network, constructed from `network_config` alone."""
    preprocessing_config: ClassVar[type[Any] | None] = ImagePreprocessing
    head_parameters: ClassVar[tuple[str, ...]] = ("head.weight", "head.bias")
    protocols: ClassVar[dict[str, str]] = {
        "test": "share of the test images whose likeliest class is the right one, each counted once"
    }

    preprocessing: ImagePreprocessing | None
    ema: AveragedModel | None

    def __init__(
        self,
        network: Any,
        optimizer: OptimizerConfig = OptimizerConfig(),
        preprocessing: ImagePreprocessing | None = None,
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, compile)
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if ema_decay is not None and not 0.0 < ema_decay < 1.0:
            raise ConfigError(f"ema_decay must be in (0, 1), or null for none, got {ema_decay}")
        if preprocessing is not None:
            self._check_fit(preprocessing)
        self.network = self.network_class(network)
        self.preprocessing = preprocessing
        self.label_smoothing, self.ema_decay = label_smoothing, ema_decay
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.ema = None
        if ema_decay is not None:
            self.ema = AveragedModel(
                self.network,
                multi_avg_fn=lambda a, c, n: _average(a, c, n, ema_decay),
                use_buffers=True,
            ).requires_grad_(False)
        classes: int = network.num_classes
        self.val_loss, self.val_count = MeanMetric(), SumMetric()
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.val_top5: MulticlassAccuracy | None = None
        if classes > 5:
            self.val_top5 = MulticlassAccuracy(classes, average="micro", top_k=5)

    @property
    def published_network(self) -> nn.Module:
        return self.network if self.ema is None else self.ema.module

    @classmethod
    def swap_head(cls, preprocessing: ImagePreprocessing, num_classes: int) -> ImagePreprocessing:
        """The same images with classes that have numbers for names, until training names them."""
        return preprocessing.with_numbered_classes(num_classes)

    # ---------------------------------------------------------------- training

    def _check_fit(self, preprocessing: ImagePreprocessing) -> None:
        """Compare what images are with what the network takes."""
        for what, have, field in (
            ("classes", len(preprocessing.classes), "num_classes"),
            ("channels", preprocessing.channels, "in_channels"),
        ):
            takes = getattr(self.config, field)
            if have != takes:
                raise ConfigError(
                    f"The images have {have} {what}, but the network is for {takes}: "
                    f"set model.network.{field}={have}"
                )

    def bind(self, datamodule: ImageDataModule) -> None:
        """Agree with a data module on preprocessing.

        A module without any takes that of the data. One that has, as a pretrained one, keeps size
        and statistics, tells the data module so, and takes the names of the classes.

        Raises:
            ConfigError: the data have another number of classes or channels, or another size.
        """
        data = datamodule.preprocessing
        self._check_fit(data)
        own = self.preprocessing
        if own is not None and data.size != own.size:
            raise ConfigError(
                f"The images are {_by(data.size)}, but the model was trained on {_by(own.size)}: "
                f"set data.size={list(own.size)}"
            )
        self._agree_with(datamodule)

    def take_preprocessing(self, preprocessing: Any, datamodule: Any) -> None:
        super().take_preprocessing(preprocessing, datamodule)
        self.bind(datamodule)

    def on_fit_start(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, ImageDataModule):
            self.bind(datamodule)
        super().on_fit_start()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "zoo_preprocessing" in checkpoint:
            values = checkpoint["zoo_preprocessing"]
            self.preprocessing = build(ImagePreprocessing, values, "training checkpoint")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update_parameters(self.network)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy, nats."""
        logits = self.network(self._placed(batch.images))
        loss = F.cross_entropy(logits.float(), batch.targets, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        logits = self.published_network(self._placed(batch.images)).float()
        self.val_loss.update(F.cross_entropy(logits, batch.targets), len(batch.targets))
        self.val_accuracy.update(logits, batch.targets)
        self.val_count.update(len(batch.targets))
        self.log("val_loss", self.val_loss)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)
        if self.val_top5 is not None:
            self.val_top5.update(logits, batch.targets)
            self.log("val_top5_accuracy", self.val_top5)

    def on_validation_epoch_end(self) -> None:
        count = int(self.val_count.compute())  # over all processes
        self.val_count.reset()
        datamodule = getattr(self.trainer, "datamodule", None)
        limit = self.trainer.limit_val_batches  # 1.0 is all batches, 1 is one
        whole = isinstance(limit, float) and limit == 1.0 and not self.trainer.sanity_checking
        if whole and isinstance(datamodule, ImageDataModule):
            expected = len(datamodule.validation_labels)
            if count != expected:
                raise AssertionError(f"counted {count} images of {expected}")

    def _placed(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.memory_format)

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """Images B x C x H x W with values from 0 to 1 in, logits out; normalisation is inside."""
        if self.preprocessing is None:
            raise ConfigError("The model does not know the size of its images before it is trained")
        shape = (batch, self.preprocessing.channels, *self.preprocessing.size)
        return Exportable(
            network=FromPixels(self.published_network, self.preprocessing),
            inputs={"images": torch.rand(shape, generator=generator)},
            outputs=("logits",),
        )

    # -------------------------------------------------------------- evaluation

    def samples(self, batch: ImageBatch) -> int:
        return len(batch.images)

    def macs(self, batch: ImageBatch) -> int:
        """Multiply-accumulates of a forward pass per image."""
        return count_macs(self.published_network, self._placed(batch.images[:1].to(self.device)))

    @torch.no_grad()
    def measure(self, datamodule: ImageDataModule, protocol: str) -> Measurement:  # type: ignore[override]
        """Accuracy on the test images, from 0 to 1, in eval mode.

        Sampling units are images.

        Raises:
            ZooError: there is no such protocol, the data have other classes, or a logit is not
                finite.
        """
        if protocol not in self.protocols:
            raise ZooError(
                f"Unknown protocol {protocol!r}; choose one of {', '.join(self.protocols)}."
            )
        datamodule.setup("test")
        preprocessing = self._known_preprocessing()
        if datamodule.preprocessing.classes != preprocessing.classes:
            raise DataError(
                f"The classes of the data ({_listed(datamodule.preprocessing.classes)}) are not "
                f"those of the model ({_listed(preprocessing.classes)})."
            )
        images, labels = datamodule.test_images, datamodule.test_labels
        self._check_shape(images, preprocessing)
        starts = range(0, len(images), _BATCH)
        correct = torch.cat(
            [
                self._classify(preprocessing.normalise(images[start : start + _BATCH])).argmax(1)
                == labels[start : start + _BATCH]
                for start in track(starts, "images", len(starts))
            ]
        )
        if len(correct) != len(labels):
            raise AssertionError(f"counted {len(correct)} images of {len(labels)}")
        return Measurement(
            metric="accuracy",
            unit="image",
            sums=correct.double(),
            counts=torch.ones_like(labels),
            kind="proportion",
            split="test",
        )

    def _classify(self, images: Tensor) -> Tensor:
        """Logits of normalised images, on the CPU, all of them finite."""
        dtype = next(self.published_network.parameters()).dtype
        with self.evaluating():
            logits: Tensor = self.published_network(self._placed(images.to(self.device, dtype)))
        return finite(logits.float().cpu(), "logits")

    def _known_preprocessing(self) -> ImagePreprocessing:
        if self.preprocessing is None:
            raise ZooError(
                "This classifier does not know what its images are: train it, or pass "
                "preprocessing."
            )
        return self.preprocessing

    @staticmethod
    def _check_shape(images: Tensor, preprocessing: ImagePreprocessing) -> None:
        expected = (preprocessing.channels, *preprocessing.size)
        if tuple(images.shape[1:]) != expected:
            raise DataError(
                f"The images have {images.shape[1]} channels and are {_by(images.shape[2:])}; the "
                f"model takes {expected[0]} and {_by(expected[1:])}."
            )

    # ------------------------------------------------------------------- usage

    @torch.no_grad()
    def predict(self, images: Any, *, top_k: int = 5) -> list[ImagePrediction]:
        """Name what is in images, with probabilities, in eval mode.

        Args:
            images: one or a list of: paths of pictures and PIL images, which are brought to the
                model's size and colours, what is transparent on white; arrays H x W x C or H x W
                and tensors C x H x W or H x W, uint8 or floating point from 0 to 1, of the model's
                size. An array or tensor of one dimension more is a batch.
            top_k: number of classes to name, at most all.

        Raises:
            ConfigError: `top_k` is no positive whole number.
            DataError: a file is missing or no picture, or an array has a wrong shape, type or
                range.
            ZooError: a logit is not finite.
        """
        top_k = check_count("top_k", top_k)
        preprocessing = self._known_preprocessing()
        if tuple(getattr(images, "shape", (1,)))[:1] == (0,):
            raise DataError("predict got no images.")
        single = isinstance(images, (str, os.PathLike)) or not isinstance(images, Sequence)
        inputs = [
            preprocessing.normalise(checked)
            for image in ([images] if single else images)
            for checked in images_of(image, preprocessing)
        ]
        if not inputs:
            raise DataError("predict got no images.")
        return [
            ImagePrediction(
                classes=tuple(preprocessing.classes[i] for i in index),
                probabilities=tuple(probabilities),
            )
            for start in range(0, len(inputs), _BATCH)
            for probabilities, index in zip(
                *(
                    part.tolist()
                    for part in self._classify(torch.stack(inputs[start : start + _BATCH]))
                    .softmax(1)
                    .topk(min(top_k, len(preprocessing.classes)))
                ),
                strict=True,
            )
        ]


def images_of(image: Any, preprocessing: ImagePreprocessing) -> list[Tensor]:
    """Checked C x H x W tensors of one thing that a user has handed in."""
    if isinstance(image, (str, os.PathLike)):
        picture = read_image(Path(image).expanduser(), preprocessing.channels)
        return [resize(picture, preprocessing.size)]
    if isinstance(image, np.ndarray):
        try:
            native = image.astype(image.dtype.newbyteorder("="), copy=False)
            tensor = torch.from_numpy(np.ascontiguousarray(native))
        except TypeError:
            raise DataError(
                f"Images must be uint8 or floating point, got an array of {image.dtype}."
            ) from None
        if tensor.ndim >= 3 and tensor.shape[-1] == preprocessing.channels:
            tensor = tensor.movedim(-1, -3)
        elif tensor.ndim >= 3 and (
            preprocessing.channels > 1
            # Colours, where a grey image would be as wide as the model takes.
            or (tensor.shape[-1] in (3, 4) and tensor.shape[-1] != preprocessing.size[1])
        ):
            raise DataError(
                f"An array of shape {tuple(image.shape)} is no image: expected H x W x "
                f"{preprocessing.channels}."
            )
    elif isinstance(image, Tensor):
        tensor = image
    elif hasattr(image, "convert"):  # a PIL image
        try:
            pixels = picture_pixels(image, "that was given", preprocessing.channels).copy()
        except (OSError, SyntaxError) as error:  # it is only read now
            raise DataError(f"Cannot read the picture that was given: {error}.") from None
        return [resize(torch.from_numpy(pixels).movedim(-1, 0), preprocessing.size)]
    else:
        raise DataError(
            f"predict takes paths, PIL images, arrays and tensors, got {type(image).__name__}."
        )
    return list(_checked(tensor, preprocessing))


def _checked(tensor: Tensor, preprocessing: ImagePreprocessing) -> Tensor:
    """A batch B x C x H x W of known type and range."""
    channels = preprocessing.channels
    if channels == 1 and (tensor.ndim == 2 or (tensor.ndim == 3 and tensor.shape[0] != 1)):
        tensor = tensor.unsqueeze(-3)  # grey images may come without the dimension of channels
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4:
        raise DataError(
            f"A tensor of shape {tuple(tensor.shape)} is no image: expected {channels} x H x W."
        )
    ImageClassifier._check_shape(tensor, preprocessing)
    if not len(tensor):
        raise DataError(f"There are no images in a batch of shape {tuple(tensor.shape)}.")
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        raise DataError(f"Images must be uint8 or floating point, got {tensor.dtype}.")
    if not torch.isfinite(tensor).all():
        raise DataError("An image has values that are not finite (NaN or infinity).")
    low, high = float(tensor.min()), float(tensor.max())
    if low < 0.0 or high > 1.0:
        raise DataError(
            f"Floating point images go from 0 to 1, got values from {low:g} to {high:g}; pass "
            f"uint8 for 0 to 255, and nothing that is normalised already."
        )
    return tensor.float()


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
