"""One input for each task, computed without a random generator, for the suites over all models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.texts import PIECES, TOPICS, labelled_texts
from zoo.families.continuous_depth.trajectories import HORIZON
from zoo.registry import architecture_of

__all__ = ["Example", "example", "first_tensor", "give_preprocessing"]


class Example(NamedTuple):
    """What a model can be called with, and what must come out."""

    inputs: tuple[Tensor, ...]
    """Arguments of the network's `forward`."""
    shape: tuple[int, ...]
    """Documented shape of its output, or of the first of its outputs."""
    predict: Any
    """Argument of the module's `predict`, two samples."""


def example(module: Any) -> Example:
    """The example of a LightningModule's task."""
    task = architecture_of(type(module)).task
    assert task in _EXAMPLES, f"add an example of {task!r} to tests/examples.py"
    return _EXAMPLES[task](module)


def give_preprocessing(module: Any) -> None:
    """Tell a module that was not trained what its input is, where its task wants that."""
    if module.preprocessing_config is None or module.preprocessing is not None:
        return
    task, config = architecture_of(type(module)).task, module.config
    if task == "recommendation":
        module.preprocessing = module.preprocessing_config(
            users=tuple(str(user) for user in range(config.num_users)),
            items=tuple(str(item) for item in range(config.num_items)),
            scale=(1.0, 5.0),
        )
    elif task == "image-classification":
        channels = config.in_channels
        module.preprocessing = module.preprocessing_config(
            size=(32, 32),
            channels=channels,
            mean=(0.2,) * channels,
            std=(0.3,) * channels,
            classes=tuple(str(index) for index in range(config.num_classes)),
        )
    elif task == "image-pair-classification":
        module.preprocessing = module.preprocessing_config(
            size=(config.size, config.size),
            channels=config.in_channels,
            mean=(0.2,),
            std=(0.3,),
            classes=tuple(str(index) for index in range(config.num_classes)),
        )

    elif task == "online-learning":  # one that has learned nothing has no classes to name
        pixels = torch.rand(6, *config.encoder.input_shape, generator=torch.Generator())
        module.learn(list(pixels), [0, 1, 2, 0, 1, 2])

    elif task == "online-text-learning":
        module.preprocessing = module.preprocessing_config(
            vocabulary=PIECES, length=config.encoder.positions, classes=tuple(TOPICS)
        )
        texts, labels = labelled_texts(2)
        module.learn(texts, labels)


def first_tensor(output: Any) -> Tensor:
    """The output of a network without the state that may come with it."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(found, Tensor)
    return found


def _text(module: Any) -> Example:
    # Three segments and one token more: the third is the first to read what was written onto
    # something, so that every parameter of a cache has a gradient.
    length = 3 * module.config.segment + 1
    tokens = (torch.arange(length) * 37 + torch.arange(2)[:, None] * 11) % 96 + 32
    shape = (2, length, module.config.vocab_size)
    return Example((tokens,), shape, ["To be, or not to be", "that is the question: é€😀"])


def _images(module: Any) -> Example:
    channels = module.config.in_channels
    size = module.preprocessing.size if module.preprocessing else (32, 32)
    number = 2 * channels * size[0] * size[1]
    pixels = (torch.arange(number).double() * 0.7).sin().float().view(2, channels, *size)
    images = list((127 * (pixels + 1)).to(torch.uint8))
    return Example((pixels,), (2, module.config.num_classes), images)


def _trajectories(module: Any) -> Example:
    # Both rows end at the same time, after which the network goes on.
    times = torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.3, 0.5]])
    values = (torch.arange(12).double() * 0.7).sin().float().view(2, 3, 2)
    pairs = [(row.tolist(), points.tolist()) for row, points in zip(times, values, strict=True)]
    return Example((times, values), (2, HORIZON, module.config.dim), pairs)


def _densities(module: Any) -> Example:
    points = torch.tensor([[0.5, -1.0], [1.5, 0.25]])
    condition = torch.eye(module.config.conditions)[:2]
    return Example((points, condition), (2,), points)


def _pairs(module: Any) -> Example:
    users, items = torch.tensor([1, 2]), torch.tensor([3, 0])
    known = module.preprocessing
    asked = [] if known is None else [(known.users[1], known.items[3]), (known.users[2], "0")]
    return Example((users, items), (2, len(module.config.tasks)), asked)


def _canvases(module: Any) -> Example:
    size = module.config.size
    pixels = (torch.arange(2 * size * size).double() * 0.7).sin().float().view(2, 1, size, size)
    shape = (2, module.config.num_tasks, module.config.num_classes)
    return Example((pixels,), shape, pixels.abs())


def _online(module: Any) -> Example:
    shape = (2, *module.config.encoder.input_shape)
    pixels = (torch.arange(math.prod(shape)).double() * 0.7).sin().abs().float().view(shape)
    return Example((pixels,), (2, module.config.num_classes), pixels)


def _online_texts(module: Any) -> Example:
    tokens = torch.arange(12).view(2, 6) % 7 + 4
    tokens[1, 4:] = 0  # a shorter text
    return Example((tokens,), (2, module.config.num_classes), ["a goal", "Rain, rain!"])


def _regression(module: Any) -> Example:
    x = (torch.arange(2 * module.config.in_features).double() * 0.7).sin().float().view(2, -1)
    return Example((x,), (2, module.config.num_tasks), x)


_EXAMPLES: dict[str, Callable[[Any], Example]] = {
    "language-modeling": _text,
    "image-classification": _images,
    "trajectory-forecasting": _trajectories,
    "density-estimation": _densities,
    "recommendation": _pairs,
    "image-pair-classification": _canvases,
    "expert-recovery": _regression,
    "online-learning": _online,
    "online-text-learning": _online_texts,
}
"""Task -> its example, for a given module."""
