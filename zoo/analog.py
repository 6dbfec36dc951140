"""Measure classifiers as if on analog hardware: over precisions, amounts of noise, and draws of it.

Noise is on while measuring, so that an accuracy is itself random: every setting is measured with
several draws, and has a mean and a spread over them.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from zoo import checkpoints, evaluation, hub, training
from zoo.errors import ConfigError, ZooError, nearest
from zoo.files import RECIPE_FILE
from zoo.progress import track

__all__ = ["AnalogResult", "AnalogSettings", "AnalogSweep", "parse_settings", "sweep"]

_CALIBRATION_IMAGES = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalogSettings:
    """What to measure: each precision with each amount of noise.

    Raises:
        ConfigError: a value is out of range.
    """

    bits: tuple[float, ...] = (4.0, 6.0, 8.0)
    """Precisions: 2^bits levels per unit."""
    noise: tuple[float, ...] = (0.2, 0.5)
    """Error probabilities of the noise, in [0, 1)."""
    repeats: int = 3
    """Draws of the noise for each of them."""
    seed: int = 0
    """Of the first draw; the others count on."""

    def __post_init__(self) -> None:
        for name in ("bits", "noise"):
            if not getattr(self, name):
                raise ConfigError(f"analog {name} needs at least one value")
        if self.repeats < 1:
            raise ConfigError(f"analog repeats must be at least 1, got {self.repeats}")
        if self.seed < 0:
            raise ConfigError(f"analog seed must not be negative, got {self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalogResult:
    """Accuracy at one precision and amount of noise.

    Attributes:
        bits, noise: the setting.
        accuracies: one for each draw of the noise, from 0 to 1.
        n: images that each is measured on.
    """

    bits: float
    noise: float
    accuracies: tuple[float, ...]
    n: int

    @property
    def mean(self) -> float:
        """Over draws."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over draws; None with one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalogSweep:
    """All settings of one classifier.

    Attributes:
        name: what was measured.
        digital: accuracy without any of it.
        results: one for each setting.
    """

    name: str
    digital: float
    results: tuple[AnalogResult, ...]


def parse_settings(words: Iterable[str]) -> AnalogSettings:
    """Settings from `bits=4,6 noise=0.2,0.5 repeats=3 seed=0`.

    Raises:
        ConfigError: a key is unknown or a value is no number.
    """
    known = {field.name for field in dataclasses.fields(AnalogSettings)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"Cannot read {word!r} after --analog.{nearest(key, known)} Write bits=4,6 "
                "noise=0.2,0.5 repeats=3 seed=0."
            )
        try:
            if key in ("bits", "noise"):
                values[key] = tuple(float(part) for part in text.split(","))
            else:
                values[key] = int(text)
        except ValueError:
            raise ConfigError(f"analog {key} takes numbers, got {text!r}.") from None
    return AnalogSettings(**values)


def sweep(
    name: str | os.PathLike[str],
    settings: AnalogSettings = AnalogSettings(),
    data_dir: str | os.PathLike[str] | None = None,
) -> AnalogSweep:
    """Measure a classifier on its test images, at each setting and without any.

    Scales are calibrated on the first training images; see `zoo.families.sau_shufflenet.analog`.

    Args:
        name: a weight, a checkpoint folder, or a repository on the Hub.
        settings: what to measure.
        data_dir: folder to look for the data in first.

    Raises:
        ConfigError: a setting is out of range.
        ZooError: the model is no image classifier, or its data are not to be had.
    """
    from zoo.families.sau_shufflenet.analog import AnalogConfig, to_analog
    from zoo.tasks.image_classification import ImageClassifier

    try:
        jobs = [
            (AnalogConfig(bits=bits, noise=noise), repeat)
            for bits in settings.bits
            for noise in settings.noise
            for repeat in range(settings.repeats)
        ]
    except ValueError as error:
        raise ConfigError(f"--analog: {error}") from None
    folder, card = hub.resolve(name)
    module = checkpoints.load(folder, files=None if card is None else card.files)
    if not isinstance(module, ImageClassifier):
        raise ZooError(f"{name} is no image classifier, which --analog is for.")
    datamodule = training.data_module(training.read_recipe(folder / RECIPE_FILE), data_dir)
    datamodule.setup()
    images = datamodule.preprocessing.normalise(datamodule.train_images[:_CALIBRATION_IMAGES])
    digital_network = module.network
    (digital,) = evaluation.evaluate_module(module, datamodule)
    accuracies: dict[tuple[float, float], list[float]] = {}
    for config, repeat in track(jobs, "analog"):
        module.network = to_analog(
            digital_network, config, seed=settings.seed + repeat, calibrate=[images]
        )
        (outcome,) = evaluation.evaluate_module(module, datamodule)
        assert config.bits is not None
        accuracies.setdefault((config.bits, config.noise), []).append(outcome.value)
    return AnalogSweep(
        name=str(name) if card is None else card.name,
        digital=digital.value,
        results=tuple(
            AnalogResult(bits=bits, noise=noise, accuracies=tuple(values), n=digital.n)
            for (bits, noise), values in accuracies.items()
        ),
    )


def rows(sweeps: Sequence[AnalogSweep]) -> list[list[str]]:
    """The sweeps as lines of a table: name, bits, noise, mean, spread, digital, images."""
    return [
        [
            one.name,
            f"{result.bits:g}",
            f"{result.noise:g}",
            f"{result.mean:.4f}",
            "-" if result.spread is None else f"{result.spread:.4f}",
            f"{one.digital:.4f}",
            f"{result.n:,}",
        ]
        for one in sweeps
        for result in one.results
    ]
