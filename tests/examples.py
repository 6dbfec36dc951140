"""One input for each task, computed without a random generator, for the suites over all models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.registry import architecture_of

__all__ = ["Example", "example", "first_tensor"]


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


_EXAMPLES: dict[str, Callable[[Any], Example]] = {
    "language-modeling": _text,
    "image-classification": _images,
}
"""Task -> its example, for a given module."""
