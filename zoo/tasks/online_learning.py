"""Learning a stream of images once: predict, learn in place, measure, and fit by a stream."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.cards import pretrained_folder
from zoo.configs import build, to_json
from zoo.data.pictures import ImagePreprocessing
from zoo.data.streams import StreamBatch, StreamDataModule, StreamRecord, cached_encodings
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.online_ensemble import (
    EncoderConfig,
    GatedEnsemble,
    OnlineNetwork,
    OnlineNetworkConfig,
    RidgeEnsemble,
)
from zoo.families.online_ensemble.learners import MomentLearner
from zoo.files import WEIGHTS_FILE, format_json
from zoo.progress import track
from zoo.tasks.base import Exportable, Measurement, ZooModule, check_count, count_macs
from zoo.tasks.image_classification import FromPixels, ImagePrediction, images_of
from zoo.tasks.optimization import OptimizerConfig

__all__ = ["OnlineClassifier", "encoder_of_a_checkpoint"]

_BATCH = 200


def _unnamed(number: int) -> str:
    """What a class is called that nobody has named."""
    return f"class {number}"


class OnlineClassifier(ZooModule):
    """Classifies images by what it has learned of a stream of them, and goes on learning.

    Args:
        network: the frozen encoder and the learner.
        optimizer: not used; the learner has its own rule.
        preprocessing: size, channels and class names of the images; None: those of the first data.
        encoder_weights: where a new stream takes its encoder from: a checkpoint folder, or the name
            of a bundled weight; None: the encoder stays as it is.
        compile: not used; one pass is too short for it.

    Raises:
        ConfigError: the images do not fit the encoder.
    """

    network_config: ClassVar[type[Any]] = OnlineNetworkConfig
    preprocessing_config: ClassVar[type[Any] | None] = ImagePreprocessing
    data_class: ClassVar[type[Any]] = StreamDataModule
    """Of the streams that it learns."""
    unit: ClassVar[str] = "image"
    """What one sample is."""
    protocols: ClassVar[dict[str, str]] = {
        "test": "share of the test images of all classes whose best score is that of the right "
        "class, each counted once"
    }

    network: OnlineNetwork
    preprocessing: ImagePreprocessing | None

    def __init__(
        self,
        network: OnlineNetworkConfig = OnlineNetworkConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        preprocessing: ImagePreprocessing | None = None,
        encoder_weights: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, compile=False)
        self.automatic_optimization = False
        if preprocessing is not None:
            self._check_fit(network, preprocessing)
        self.network = OnlineNetwork(network)
        self.preprocessing, self.encoder_weights = preprocessing, encoder_weights
        self.record: StreamRecord | None = None
        self._encodings: Tensor | None = None
        self._test_encodings: Tensor | None = None
        self._encoded_stream: tuple[Any, str] | None = None

    @property
    def config(self) -> OnlineNetworkConfig:
        """The network's arguments, with as many classes as it has room for now."""
        network = getattr(self, "network", None)
        return self._config if network is None else network.current_config

    @config.setter
    def config(self, value: OnlineNetworkConfig) -> None:
        self._config = value

    @staticmethod
    def _check_fit(network: OnlineNetworkConfig, preprocessing: ImagePreprocessing) -> None:
        shape, expected = (preprocessing.channels, *preprocessing.size), network.encoder.input_shape
        if shape != expected:
            raise ConfigError(
                f"The images are {' x '.join(map(str, shape))} (channels, height, width), but the "
                f"encoder takes {' x '.join(map(str, expected))}."
            )

    # -------------------------------------------------------------------- usage

    @torch.no_grad()
    def learn(self, images: Any, labels: Any) -> None:
        """Learn one batch of a stream, in place; new classes may come at any time.

        What is wrong with a batch is found before anything of it is learned.

        Args:
            images: one or a list of paths, PIL images, arrays or tensors; see `predict`.
            labels: class of each, integers from 0 on.

        Raises:
            DataError: the batch is empty, an image or a label is no such thing, or a class is
                beyond a fixed head.
        """
        encodings = self._encoded(images)
        try:
            given = torch.as_tensor(labels).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"Labels must be integers, got {labels!r:.60} ({type(labels).__name__})."
            ) from None
        try:
            self.network.learner.learn(encodings, given.to(self.device))
        except ValueError as error:
            raise DataError(f"{str(error)[:1].upper()}{str(error)[1:]}.") from None
        self._name_classes()

    @torch.no_grad()
    def predict(self, images: Any, *, top_k: int = 5) -> list[ImagePrediction]:
        """Name what is in images, with probabilities.

        Args:
            images: one or a list of: paths of pictures and PIL images, which are brought to the
                model's size and colours; arrays H x W x C or H x W and tensors C x H x W or H x W,
                uint8 or floating point from 0 to 1, of the model's size. An array or tensor of one
                dimension more is a batch.
            top_k: number of classes to name, at most all that were seen.

        Raises:
            ConfigError: `top_k` is no positive whole number.
            DataError: an image is no such thing, or nothing has been learned yet.
        """
        top_k = check_count("top_k", top_k)
        names = self._known_preprocessing().classes
        k = min(top_k, int(self.network.learner.seen.sum()))
        predictions = []
        for part in torch.split(self._encoded(images), _BATCH):
            scores = self._scores(part)
            order = scores.topk(max(k, 1)).indices
            chances = self.network.probabilities(scores).gather(1, order)
            for row, values in zip(order.tolist(), chances.tolist(), strict=True):
                predictions.append(
                    ImagePrediction(
                        classes=tuple(names[i] for i in row), probabilities=tuple(values)
                    )
                )
        return predictions

    def _known_preprocessing(self) -> ImagePreprocessing:
        if self.preprocessing is None:
            encoder = self.network.config.encoder
            self.preprocessing = ImagePreprocessing(
                size=(encoder.image_size, encoder.image_size),
                channels=3 if encoder.channels == 3 else 1,
                mean=(0.0,) * encoder.channels,
                std=(1.0,) * encoder.channels,
                classes=(_unnamed(0), _unnamed(1)),
            )
        return self.preprocessing

    def _name_classes(self) -> None:
        """Classes beyond those that have names get their number for one."""
        known = self._known_preprocessing()
        extra = range(len(known.classes), self.network.learner.num_classes)
        if extra:
            names = (*known.classes, *map(_unnamed, extra))
            self.preprocessing = dataclasses.replace(known, classes=names)

    def _images(self, images: Any) -> Tensor:
        """Checked images in [0, 1], B x C x H x W."""
        preprocessing = self._known_preprocessing()
        single = isinstance(images, (str, os.PathLike)) or not isinstance(images, Sequence)
        if tuple(getattr(images, "shape", (1,)))[:1] == (0,):
            raise DataError("There are no images; the batch is empty.")
        found = [
            preprocessing.normalise(checked)
            for image in ([images] if single else images)
            for checked in images_of(image, preprocessing)
        ]
        if not found:
            raise DataError("There are no images; the batch is empty.")
        return torch.stack(found)

    def _encoded(self, images: Any) -> Tensor:
        """Encodings of what a user holds, B x d."""
        return torch.cat([self._encode(part) for part in torch.split(self._images(images), _BATCH)])

    def _encode(self, images: Tensor) -> Tensor:
        encoder = self.network.config.encoder
        assert isinstance(encoder, EncoderConfig)
        parts = torch.split(images.to(self.device, self._precision), encoder.batch_size)
        with self.evaluating():
            return torch.cat([self.network.forward_features(part) for part in parts])

    @property
    def _precision(self) -> torch.dtype:
        return next((p.dtype for p in self.network.encoder.parameters()), torch.float32)

    def _scores(self, encodings: Tensor) -> Tensor:
        try:
            with self.evaluating():
                return self.network.forward_head(encodings)
        except ValueError as error:
            raise DataError(f"{str(error)[:1].upper()}{str(error)[1:]}.") from None

    # ----------------------------------------------------------------- training

    def bind(self, datamodule: StreamDataModule) -> None:
        """Agree with a data module on the images; names of classes that were learned stay.

        Raises:
            ConfigError: the images do not fit the encoder, or the data call a class by another name
                than the model.
        """
        data = datamodule.preprocessing
        self._check_fit(self.network.config, data)
        self.preprocessing = dataclasses.replace(data, classes=self._all_classes(data.classes))
        self._name_classes()

    def _all_classes(self, of_data: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the classes of data and of those that the model has learned.

        Raises:
            ConfigError: they differ.
        """
        known = () if self.preprocessing is None else self.preprocessing.classes
        if not self.network.learner.seen.any():
            return of_data
        for number, (theirs, ours) in enumerate(zip(of_data, known, strict=False)):
            # A class that came without a name has its number for one, until data name it.
            if theirs != ours != _unnamed(number):
                raise ConfigError(
                    f"The data's class {number} is {theirs!r}, the model's is {ours!r}; a stream "
                    "goes on with the same classes in the same order."
                )
        return (*of_data, *known[len(of_data) :])

    def configure_optimizers(self) -> None:
        """None: the learner updates itself."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.encoder_weights is not None:
            self.load_encoder(self.encoder_weights)
        if not isinstance(datamodule, self.data_class):
            return
        self.bind(datamodule)
        classes = max(len(datamodule.classes), self.network.learner.num_classes)
        self.record = StreamRecord(classes, datamodule.stream.task_classes)
        self._encodings, self._test_encodings = self._kept_encodings(datamodule)
        self._encoded_stream = datamodule, self._encoder_digest()

    def load_encoder(self, name: str | os.PathLike[str]) -> None:
        """Take the encoder of a checkpoint folder, or of a weight that is bundled.

        Raises:
            ZooError: there is no such folder, or its encoder is another one.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = pretrained_folder(str(name))
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise ZooError(
                f"No encoder weights at {name!r}: neither a folder nor a bundled weight."
            )
        self._take_encoder(path, encoder_of_a_checkpoint)

    def _take_encoder(
        self, path: Path, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> None:
        """Give the encoder all tensors of a file, renamed by `convert`, or none."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = convert(load_file(path))
            # torch copies what fits before it says what does not.
            copy.deepcopy(self.network.encoder).load_state_dict(state)
        except OSError as error:
            raise ZooError(f"Cannot read {path}: {error.strerror or error}.") from None
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ZooError(f"{path} has no encoder of this kind: {reason}") from None
        self.network.encoder.load_state_dict(state)

    def _encoder_digest(self) -> str:
        """Of the encoder's configuration and weights, in hexadecimal."""
        digest = hashlib.sha256(format_json(to_json(self.network.config.encoder)))
        for tensor in self.network.encoder.state_dict().values():
            # As bytes, since numpy has no bfloat16.
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _kept_encodings(self, datamodule: Any) -> tuple[Tensor, Tensor]:
        """Encodings of what is learned and of what is tested, from the cache."""
        digest = self._encoder_digest()
        encode = lambda part: self._encode(part).float().cpu()  # noqa: E731
        return (
            cached_encodings(datamodule.train_images, encode, digest, "training images"),
            cached_encodings(datamodule.test_images, encode, digest, "test images"),
        )

    def _encode_batch(self, batch: Any) -> Tensor:
        """Encodings of the batch of a stream, B x d."""
        return self._encode(batch.images / 255)

    def training_step(self, batch: StreamBatch, batch_idx: int) -> Tensor:
        """Learn a batch; measure at the end of a task, of which the learner is not told.

        Returns:
            Zero, for those who expect a loss; there is nothing left to be done with it.
        """
        if self._encodings is None:
            encodings = self._encode_batch(batch)
        else:
            encodings = self._encodings[batch.rows].to(self.device)
        self.network.learner.learn(encodings, batch.labels.to(self.device))
        done = torch.zeros((), requires_grad=True)
        if self._trainer is None:
            return done
        # Lightning counts the steps of optimizers, and there is none.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.total.completed += 1
        if batch.ended is not None and self._test_encodings is not None and self.record is not None:
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            seen = torch.zeros(self.record.num_classes, dtype=torch.bool)
            seen[: self.network.learner.num_classes] = self.network.learner.seen.cpu()
            self.record.add(
                self._classify(self._test_encodings), datamodule.test_labels, seen, batch.ended
            )
            accuracy = self.record.final_accuracy
            self.log("val_accuracy", accuracy, prog_bar=True)
            self._log_measurement(datamodule, batch_idx + 1)
        return done

    @torch.no_grad()
    def _log_measurement(self, datamodule: StreamDataModule, step: int) -> None:
        """Accuracy of each class, and at the end how far each selects each classifier."""
        assert self.record is not None
        assert self._test_encodings is not None
        if self.trainer.logger is None:
            return
        named = datamodule.classes
        found = self.record.per_class[-1, : len(named)].tolist()
        values = {f"class_accuracy/{name}": value for name, value in zip(named, found, strict=True)}
        learner = self.network.learner
        if step == len(datamodule.stream) and isinstance(learner, (GatedEnsemble, RidgeEnsemble)):
            parts = torch.split(self._test_encodings, _BATCH)
            selected = torch.cat(
                [learner.memberships(part.to(self.device)).cpu() for part in parts]
            )
            for index, name in enumerate(named):
                mean = selected[datamodule.test_labels == index].mean(0)
                values |= {f"membership/{name}/{n}": m for n, m in enumerate(mean.tolist())}
        self.trainer.logger.log_metrics(values, step=step)

    def on_train_end(self) -> None:
        if self.record is not None and self.trainer.logger is not None:
            self.trainer.logger.log_metrics(
                {f"stream_{name}": value for name, value in self.record.summary().items()},
                step=self.trainer.global_step,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._name_classes()
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "zoo_preprocessing" in checkpoint:
            values = checkpoint["zoo_preprocessing"]
            assert self.preprocessing_config is not None
            self.preprocessing = build(self.preprocessing_config, values, "training checkpoint")

    @torch.no_grad()
    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """Images B x C x H x W with values from 0 to 1 in, scores of all classes B x C out, minus
        infinity for classes that were never seen; what has been learned so far, frozen.

        Raises:
            ConfigError: nothing has been learned yet, there is no encoder, or what a sample gets
                depends on the others in its batch.
        """
        config = self.network.config
        if config.encoder.kind == "none":
            raise ConfigError("there is no encoder, so images cannot be what a program takes")
        if config.learner == "ensemble" and config.ensemble.batch_scaled:
            raise ConfigError("batch_scaled lets the samples of a batch change each other's scores")
        shape = (batch, *config.encoder.input_shape)
        images = torch.rand(shape, generator=generator)
        try:
            self.network(images)  # solves for the weights, once
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return Exportable(
            network=FromPixels(_FrozenScores(self.network), self._known_preprocessing()),
            inputs={"images": images},
            outputs=("scores",),
        )

    # --------------------------------------------------------------- evaluation

    def samples(self, batch: StreamBatch) -> int:
        return len(batch.labels)

    def macs(self, batch: StreamBatch) -> int:
        """Multiply-accumulates of a forward pass per image, encoder included."""
        return count_macs(self.network, batch.images[:1] / 255)

    def _classify(self, encodings: Tensor) -> Tensor:
        """Predicted classes, on the CPU."""
        with torch.no_grad():
            return torch.cat(
                [
                    self._scores(part.to(self.device)).argmax(1).cpu()
                    for part in torch.split(encodings, _BATCH)
                ]
            )

    def _encodings_of_tests(self, datamodule: Any) -> Tensor:
        """Those of a stream that was just learned, where these are its data and its encoder."""
        if self._encoded_stream is not None and self._test_encodings is not None:
            data, digest = self._encoded_stream
            if data is datamodule and digest == self._encoder_digest():
                return self._test_encodings
        return self._encode_test(datamodule)

    def _encode_test(self, datamodule: Any) -> Tensor:
        """Encodings of what is tested, computed anew."""
        self._check_fit(self.network.config, datamodule.preprocessing)
        parts = torch.split(datamodule.test_images, _BATCH)
        return torch.cat([self._encode(part / 255) for part in track(parts, "images")])

    @torch.no_grad()
    def measure(self, datamodule: StreamDataModule, protocol: str) -> Measurement:  # type: ignore[override]
        """Accuracy on the test images of all classes, from 0 to 1; sampling units are images.

        Raises:
            ZooError: there is no such protocol, or the data have other classes.
        """
        if protocol not in self.protocols:
            raise ZooError(
                f"Unknown protocol {protocol!r}; choose one of {', '.join(self.protocols)}."
            )
        datamodule.setup("test")
        classes, labels = datamodule.classes, datamodule.test_labels
        if classes != self._known_preprocessing().classes[: len(classes)]:
            raise DataError("The classes of the data are not those of the model.")
        predicted = self._classify(self._encodings_of_tests(datamodule))
        if len(predicted) != len(labels):
            raise AssertionError(f"counted {len(predicted)} {self.unit}s of {len(labels)}")
        return Measurement(
            metric="accuracy",
            unit=self.unit,
            sums=(predicted == labels).double(),
            counts=torch.ones_like(labels),
            kind="proportion",
            split="test",
        )


def encoder_of_a_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the encoder among those of an `OnlineNetwork`, under its own names."""
    prefix = "encoder."
    return {
        key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)
    }


class _FrozenScores(nn.Module):
    """Images to scores by what has been learned, without a look at values."""

    def __init__(self, network: OnlineNetwork) -> None:
        super().__init__()
        self.encoder, self.learner = network.encoder, copy.deepcopy(network.learner)
        if isinstance(self.learner, MomentLearner):
            # It has been solved, and the moments would be most of the file.
            self.learner.gram = self.learner.gram[:0, :0].clone()
            self.learner.sums = self.learner.sums[:0].clone()

    def forward(self, images: Tensor) -> Tensor:
        return self.learner.unchecked(self.encoder(images))
