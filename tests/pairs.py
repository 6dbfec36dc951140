"""Small sets of pictures in the layout of MNIST, shared by the tests of image pairs."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo.data import sources
from zoo.data.image_pairs import ImagePairDataModule

COUNT, HELD_OUT, PICTURES = 60, 20, 30
"""Training pictures, those of them that are held out, and test pictures."""


def _idx(values: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    header = struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape)
    return header + values.tobytes()


def write_pictures(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """MNIST of a few pictures, whose checksums the sources are told.

    A picture of class c is bright in row 2 + 2 c, on a background of noise.
    """
    generator = np.random.default_rng(0)
    target = folder / "MNIST" / "raw"
    target.mkdir(parents=True)
    for part, prefix, count in (("train", "train", COUNT), ("test", "t10k", PICTURES)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = generator.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for index, label in enumerate(labels):
            images[index, 2 + 2 * label : 4 + 2 * label] = 250
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = _idx(values)
            with gzip.open(target / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
                file.write(content)
            name = f"mnist-{part}-{kind.split('-')[0]}"
            record = dataclasses.replace(
                sources.SOURCES[name],
                size=len(content),
                digest=hashlib.md5(content, usedforsecurity=False).hexdigest(),
            )
            patch.setitem(sources.SOURCES, name, record)
    return folder


def data(folder: Path, **options: Any) -> ImagePairDataModule:
    """Pairs of these pictures."""
    return ImagePairDataModule(holdout=HELD_OUT, data_dir=str(folder), **options)
