"""Classification of two pictures on one canvas, a task for each, with shared experts."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from zoo.data.image_pairs import SHIFT, ImagePairDataModule, PairBatch
from zoo.data.pictures import ImagePreprocessing
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.dselect_k import ImagePairConfig, ImagePairNet
from zoo.progress import track
from zoo.tasks.base import Exportable, Measurement, count_macs, finite
from zoo.tasks.mixtures import MixtureModule
from zoo.tasks.optimization import OptimizerConfig

__all__ = ["ImagePairClassifier", "ImagePairPrediction"]

_TASKS = ("top-left", "bottom-right")
_BATCH = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePairPrediction:
    """What a model sees on a canvas.

    Attributes:
        labels: name of the likeliest class of the top left and of the bottom right picture.
        probabilities: of these two classes.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


class ImagePairClassifier(MixtureModule):
    """A classifier of two pictures on one canvas: one task for each, experts shared by gates.

    The loss is the sum of the two cross-entropies, and what the gates add.

    Args:
        network: shape of the network.
        optimizer: how it is trained.
        preprocessing: size and statistics of canvases, names of classes; None: those of the data
            that it is trained on.
        compile: compile the network's blocks for training.

    Raises:
        ConfigError: an option is out of range.
    """

    network_config: ClassVar[type[Any]] = ImagePairConfig
    preprocessing_config: ClassVar[type[Any] | None] = ImagePreprocessing
    head_parameters: ClassVar[tuple[str, ...]] = ("towers.head.weight", "towers.head.bias")
    protocols: ClassVar[dict[str, str]] = {
        "test": "share of right answers over both tasks, each test canvas counted once for each",
        "top-left": "share of test canvases whose top left picture is classified rightly",
        "bottom-right": "share of test canvases whose bottom right picture is classified rightly",
    }

    network: ImagePairNet
    preprocessing: ImagePreprocessing | None
    task_names = _TASKS

    def __init__(
        self,
        network: ImagePairConfig = ImagePairConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        preprocessing: ImagePreprocessing | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, compile)
        if network.num_tasks != len(_TASKS):
            raise ConfigError(
                f"num_tasks must be {len(_TASKS)}, as pictures of a canvas; got {network.num_tasks}"
            )
        if preprocessing is not None:
            self._check_fit(preprocessing)
        self.network = ImagePairNet(network)
        self.preprocessing = preprocessing
        self.val_loss = MeanMetric()
        self.val_accuracy = torch.nn.ModuleList(MeanMetric() for _ in _TASKS)

    @classmethod
    def swap_head(cls, preprocessing: ImagePreprocessing, num_classes: int) -> ImagePreprocessing:
        """The same canvases with classes that have numbers for names, until training names them."""
        return preprocessing.with_numbered_classes(num_classes)

    # ---------------------------------------------------------------- training

    def _check_fit(self, preprocessing: ImagePreprocessing) -> None:
        """Compare what canvases are with what the network takes."""
        for what, have, field in (
            ("classes", len(preprocessing.classes), "num_classes"),
            ("channels", preprocessing.channels, "in_channels"),
            ("pixels a side", preprocessing.size[0], "size"),
        ):
            takes = getattr(self.config, field)
            if have != takes:
                # Pictures of a folder can be made to fit a network that is trained already.
                sized = field == "size" and takes > SHIFT
                other = f" or data.size={takes - SHIFT}" if sized else ""
                raise ConfigError(
                    f"The canvases have {have} {what}, but the network is for {takes}: "
                    f"set model.network.{field}={have}{other}"
                )

    def bind(self, datamodule: ImagePairDataModule) -> None:
        """Agree with a data module on preprocessing.

        A module without any takes that of the data. One that has, as a pretrained one, keeps its
        statistics, tells the data module so, and takes the names of the classes.

        Raises:
            ConfigError: the data have another number of classes or channels, or another size.
        """
        self._check_fit(datamodule.preprocessing)
        self._agree_with(datamodule)

    def take_preprocessing(self, preprocessing: Any, datamodule: Any) -> None:
        super().take_preprocessing(preprocessing, datamodule)
        self.bind(datamodule)

    def on_fit_start(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, ImagePairDataModule):
            self.bind(datamodule)
        super().on_fit_start()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Sum of the mean cross-entropies of the tasks, and what the gates add, nats."""
        output = self.network(batch.images)
        loss = _cross_entropy(output.outputs, batch.labels) + self.regulariser(output)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        logits = self.network(batch.images).outputs
        self.val_loss.update(_cross_entropy(logits, batch.labels), len(batch.labels))
        self.log("val_loss", self.val_loss)
        right = (logits.argmax(-1) == batch.labels).float()
        for index, (name, metric) in enumerate(zip(_TASKS, self.val_accuracy, strict=True)):
            assert isinstance(metric, MeanMetric)
            metric.update(right[:, index])
            self.log(f"val_accuracy_{name}", metric, prog_bar=True)
        if batch_idx == 0:
            self.watch_gates(batch.images)

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """Normalised canvases B x C x S x S in, logits B x 2 x K out."""
        shape = (batch, self.config.in_channels, self.config.size, self.config.size)
        return self._exportable({"images": torch.randn(shape, generator=generator)})

    # -------------------------------------------------------------- evaluation

    def samples(self, batch: PairBatch) -> int:
        return len(batch.images)

    def macs(self, batch: PairBatch) -> int:
        """Multiply-accumulates of a forward pass per canvas, on a batch."""
        return count_macs(self.network, batch.images.to(self.device)) // len(batch.images)

    @torch.no_grad()
    def measure(self, datamodule: ImagePairDataModule, protocol: str) -> Measurement:  # type: ignore[override]
        """Accuracy on the test canvases, from 0 to 1, in eval mode.

        Sampling units are canvases.

        Raises:
            ZooError: there is no such protocol, or a logit is not finite.
            DataError: the data have other classes.
            ConfigError: the canvases are of another size.
        """
        if protocol not in self.protocols:
            raise ZooError(
                f"Unknown protocol {protocol!r}; choose one of {', '.join(self.protocols)}."
            )
        datamodule.setup("test")
        known = self._known_preprocessing()
        if datamodule.preprocessing.classes != known.classes:
            raise DataError("The classes of the data are not those of the model.")
        self._check_fit(datamodule.preprocessing)
        datamodule.preprocessing = known  # by which canvases are normalised
        right = []
        for batch in track(datamodule.test_dataloader(), "canvases"):
            answers = self._classify(batch.images).argmax(-1)
            right.append(answers == batch.labels)
        table = torch.cat(right).double()
        expected = 2 * len(datamodule.pictures.test_labels)
        if len(table) != expected:
            raise AssertionError(f"counted {len(table)} canvases of {expected}")
        single = protocol in _TASKS
        return Measurement(
            metric="accuracy",
            unit="picture",
            sums=table[:, _TASKS.index(protocol)] if single else table.sum(1),
            counts=torch.full((len(table),), 1 if single else len(_TASKS)),
            kind="proportion" if single else "mean",
            split="test",
        )

    def _classify(self, images: Tensor) -> Tensor:
        """Logits B x 2 x C of normalised canvases, on the CPU, all of them finite."""
        dtype = next(self.network.parameters()).dtype
        with self.evaluating():
            logits: Tensor = self.network(images.to(self.device, dtype)).outputs
        return finite(logits.float().cpu(), "logits")

    def _known_preprocessing(self) -> ImagePreprocessing:
        if self.preprocessing is None:
            raise ZooError(
                "This classifier does not know what its images are: train it, or pass "
                "preprocessing."
            )
        return self.preprocessing

    # ------------------------------------------------------------------- usage

    @torch.no_grad()
    def predict(self, canvases: Any) -> list[ImagePairPrediction]:
        """Name the two pictures on each canvas, in eval mode.

        Args:
            canvases: array or tensor, one H x W or several B x H x W (a dimension of one channel
                may be there): uint8, or floating point from 0 to 2, as what
                `zoo.data.image_pairs.compose` makes of two pictures.

        Raises:
            DataError: it has a wrong shape, type or range.
            ZooError: a logit is not finite.
        """
        known = self._known_preprocessing()
        images = _checked(canvases, known)
        predictions = []
        for start in range(0, len(images), _BATCH):
            part = known.normalise(images[start : start + _BATCH])
            best = self._classify(part).softmax(-1).max(-1)
            predictions += [
                ImagePairPrediction(
                    labels=tuple(known.classes[index] for index in labels),
                    probabilities=tuple(probabilities),
                )
                for probabilities, labels in zip(
                    best.values.tolist(), best.indices.tolist(), strict=True
                )
            ]
        return predictions


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tasks of the mean over the batch; logits B x T x C, labels B x T."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    return losses / len(labels)


def _checked(canvases: Any, preprocessing: ImagePreprocessing) -> Tensor:
    """A batch B x 1 x H x W of known type and range."""
    try:
        if isinstance(canvases, np.ndarray):
            canvases = canvases.astype(canvases.dtype.newbyteorder("="), copy=False)
        images = torch.as_tensor(canvases)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"predict takes arrays and tensors, got {type(canvases).__name__}."
        ) from None
    size = tuple(preprocessing.size)
    shape = tuple(images.shape)
    if shape[-2:] != size or not 2 <= images.ndim <= 4 or (images.ndim == 4 and shape[1] != 1):
        raise DataError(
            f"A tensor of shape {shape} is no canvas: expected {size[0]} x {size[1]}, "
            "or several of these."
        )
    images = images.reshape(-1, 1, *size)
    if not len(images):
        raise DataError("predict got no canvases.")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"Canvases must be uint8 or floating point, got {images.dtype}.")
    if not (images.isfinite().all() and images.min() >= 0 and images.max() <= 2):
        raise DataError("Floating point canvases go from 0 to 2; this one has other values.")
    return images.float()
