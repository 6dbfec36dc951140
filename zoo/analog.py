"""Measure classifiers as if on analog hardware: over precisions, amounts of noise, and draws of it.

Noise is on while measuring, so that an accuracy is itself random: every setting is measured with
several draws, and has a mean and a spread over them.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from zoo import checkpoints, evaluation, hub, training
from zoo.configs import to_json
from zoo.errors import ConfigError, ZooError, nearest
from zoo.families.sau_shufflenet.analog import AnalogConfig, Scale, to_analog
from zoo.files import RECIPE_FILE, RESULTS_FILE, write_json
from zoo.progress import track
from zoo.provenance import made_by

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.data.images import ImageDataModule
    from zoo.tasks.image_classification import ImageClassifier

__all__ = [
    "AnalogResult",
    "AnalogSettings",
    "AnalogSweep",
    "parse_settings",
    "record",
    "sweep",
    "sweeps",
]

_CALIBRATION_IMAGES = 500
_LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalogSettings:
    """What to measure: each precision with each amount of noise.

    Raises:
        ConfigError: a value is out of range, or given twice.
    """

    bits: tuple[float, ...] = (4.0, 6.0, 8.0)
    """Precisions: 2^bits levels per unit."""
    noise: tuple[float, ...] = (0.2, 0.5)
    """Error probabilities of the noise, in [0, 1)."""
    repeats: int = 3
    """Draws of the noise for each of them."""
    seed: int = 0
    """Of the first draw; the others count on."""
    scale: Scale = "calibrated"
    """What 1 stands for: the largest value of each tensor on training images, or 1, which needs no
    training images, and cuts off what is larger."""

    images: int | None = None
    """Test images to measure on, evenly spread over the set; None: all."""

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 1:
            raise ConfigError(f"analog images must be at least 1, got {self.images}")
        for name in ("bits", "noise"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"analog {name} needs at least one value")
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise ConfigError(f"analog {name} has {twice:g} more than once")
        if self.repeats < 1:
            raise ConfigError(f"analog repeats must be at least 1, got {self.repeats}")
        if not 0 <= self.seed <= _LARGEST_SEED - self.repeats:
            raise ConfigError(f"analog seed must be from 0 to about 2^63, got {self.seed}")
        if self.scale not in get_args(Scale):
            raise ConfigError(
                f"analog scale must be one of {', '.join(get_args(Scale))}, got {self.scale}"
            )


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
        name: what was measured: a weight or a control by its name, else the name of its folder.
        digital: accuracy without any of it.
        results: one for each setting.
    """

    name: str
    digital: float
    results: tuple[AnalogResult, ...]


def parse_settings(words: Iterable[str]) -> AnalogSettings:
    """Settings from `bits=4,6 noise=0.2,0.5 repeats=3 seed=0 scale=calibrated images=1000`.

    Raises:
        ConfigError: a key is unknown or given twice, or a value is no number.
    """
    known = {field.name for field in dataclasses.fields(AnalogSettings)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"Cannot read {word!r} after --analog.{nearest(key, known)} Write bits=4,6 "
                "noise=0.2,0.5 repeats=3 seed=0 scale=calibrated images=1000."
            )
        if key in values:
            raise ConfigError(f"analog {key} is given twice; write {key}=A,B for several values.")
        try:
            if key == "scale":
                values[key] = text
            elif key in ("bits", "noise"):
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

    Scales are calibrated on 500 training images, evenly spread over the set; see
    `zoo.families.sau_shufflenet.analog`. With `settings.scale="unit"` no training image is read.

    Args:
        name: a weight, a checkpoint folder, or a repository on the Hub.
        settings: what to measure.
        data_dir: folder to look for the data in first.

    Raises:
        ConfigError: a setting is out of range.
        ZooError: the model is no image classifier, or its data are not to be had.
    """
    return sweeps([name], settings, data_dir)[0]


def sweeps(
    names: Sequence[str | os.PathLike[str]],
    settings: AnalogSettings = AnalogSettings(),
    data_dir: str | os.PathLike[str] | None = None,
) -> list[AnalogSweep]:
    """Measure several classifiers as `sweep` does.

    All models and data are loaded before the first is measured, so that one that cannot be had
    costs no measurement.

    Raises:
        ConfigError, ZooError: as of `sweep`.
    """
    try:
        configs = [
            AnalogConfig(bits=bits, noise=noise, scale=settings.scale)
            for bits in settings.bits
            for noise in settings.noise
        ]
    except ValueError as error:
        raise ConfigError(f"--analog: {error}") from None
    loaded = [_load(name, settings, data_dir) for name in names]
    called = [one.name for one in loaded]
    return [
        # Two of one name, as runs of one control, are told apart by their numbers.
        _measure(
            one._replace(name=f"{one.name} ({called[: index + 1].count(one.name)})")
            if called.count(one.name) > 1
            else one,
            configs,
            settings,
        )
        for index, one in enumerate(loaded)
    ]


def record(
    sweeps: Sequence[AnalogSweep], settings: AnalogSettings, folder: str | os.PathLike[str]
) -> None:
    """Write what was measured into the `results.json` of the first classifier's folder.

    Raises:
        ZooError: the folder has no results yet; write those first.
    """
    before = evaluation.recorded(folder)
    words = ["zoo", "evaluate", before.weight, "--analog", *_words(settings)]
    for one in sweeps[1:]:
        words += ["--beside", one.name]
    found = {
        **made_by(shlex.join(words)),
        "settings": to_json(settings),
        "sweeps": [to_json(one) for one in sweeps],
    }
    write_json(Path(folder) / RESULTS_FILE, to_json(dataclasses.replace(before, analog=found)))


def _words(settings: AnalogSettings) -> list[str]:
    """What `parse_settings` reads as these settings."""

    def word(value: float) -> str:
        return repr(int(value) if value == int(value) else value)

    return [
        f"{key}={','.join(map(word, value)) if isinstance(value, (list, tuple)) else value}"
        for key, value in to_json(settings).items()
        if value is not None
    ]


class _Loaded(NamedTuple):
    """A classifier and its images."""

    name: str
    module: ImageClassifier
    datamodule: ImageDataModule


def _load(
    name: str | os.PathLike[str],
    settings: AnalogSettings,
    data_dir: str | os.PathLike[str] | None,
) -> _Loaded:
    from zoo.tasks.image_classification import ImageClassifier

    folder, card = hub.resolve(name)
    module = checkpoints.load(folder, files=None if card is None else card.files)
    if not isinstance(module, ImageClassifier):
        raise ZooError(f"{name} is no image classifier, which --analog is for.")
    recipe = training.read_recipe(folder / RECIPE_FILE)
    datamodule = training.data_module(recipe, data_dir)
    datamodule.setup("test" if settings.scale == "unit" else None)
    if settings.images is not None:
        datamodule.measure_on(settings.images)
    # Where a folder lies is nobody's business.
    called = recipe.name or recipe.weight or Path(name).name if card is None else card.name
    return _Loaded(called, module, datamodule)


def _measure(
    loaded: _Loaded, configs: Sequence[AnalogConfig], settings: AnalogSettings
) -> AnalogSweep:
    name, module, datamodule = loaded
    images = [] if settings.scale == "unit" else [_calibration_images(datamodule)]
    digital_network = module.network
    (digital,) = evaluation.evaluate_module(module, datamodule)
    accuracies: dict[AnalogConfig, list[float]] = {config: [] for config in configs}
    jobs = [(config, repeat) for config in configs for repeat in range(settings.repeats)]
    for config, repeat in track(jobs, "analog"):
        module.network = to_analog(
            digital_network, config, seed=settings.seed + repeat, calibrate=images
        )
        (outcome,) = evaluation.evaluate_module(module, datamodule)
        accuracies[config].append(outcome.value)
    results = []
    for config, values in accuracies.items():
        assert config.bits is not None
        results.append(
            AnalogResult(
                bits=config.bits, noise=config.noise, accuracies=tuple(values), n=digital.n
            )
        )
    return AnalogSweep(name=name, digital=digital.value, results=tuple(results))


def _calibration_images(datamodule: ImageDataModule) -> Tensor:
    """Normalised training images from all over the set."""
    from zoo.data.sampling import evenly_spread

    images = datamodule.train_images
    rows = evenly_spread(_CALIBRATION_IMAGES, len(images))
    return datamodule.preprocessing.normalise(images[rows])


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
