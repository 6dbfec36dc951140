"""Tests of zoo.data.image_pairs, on small sets in the layout of MNIST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.pairs import COUNT, HELD_OUT, PICTURES, data, write_pictures
from zoo.data.image_pairs import ImagePairDataModule, PairBatch, compose
from zoo.errors import DataError, UnknownNameError


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_pictures(tmp_path, monkeypatch)


def test_two_pictures_lie_in_their_corners_and_add_up_without_clipping() -> None:
    first = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    second = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    canvas = compose(first, second)
    expected = np.zeros((3, 1, 36, 36))
    for row in range(28):
        for column in range(28):
            expected[:, :, row, column] += first[:, :, row, column].numpy() / 255
            expected[:, :, row + 8, column + 8] += second[:, :, row, column].numpy() / 255
    np.testing.assert_allclose(canvas.numpy(), expected, atol=1e-6)
    assert canvas.max() > 1
    floats = compose(first.float() / 255, second.float() / 255)
    torch.testing.assert_close(floats, canvas)


def test_every_picture_is_in_the_top_left_corner_twice(pictures: Path) -> None:
    module = data(pictures)
    for part, count in (("train", COUNT - HELD_OUT), ("validation", HELD_OUT), ("test", PICTURES)):
        pairs = module.pairs(part)  # type: ignore[arg-type]
        assert len(pairs) == 2 * count
        batch = pairs.batch(torch.arange(len(pairs)))
        split = pairs.split
        corner = (split.images[:, :, :8, :].float() / 255).repeat(2, 1, 1, 1)
        shown = batch.images[:, :, :8, :28] * module.preprocessing.std[0]
        torch.testing.assert_close(shown + module.preprocessing.mean[0], corner)
        assert torch.equal(batch.labels[:, 0], split.labels.repeat(2))
        last = batch.images[:, 0, 35, 35] * module.preprocessing.std[0]
        partners = split.images[pairs.partners, 0, 27, 27].float() / 255
        torch.testing.assert_close(last + module.preprocessing.mean[0], partners)
        assert torch.equal(batch.labels[:, 1], split.labels[pairs.partners])
        assert int(pairs.partners.max()) == count - 1, "the last candidate can be drawn"


def test_parts_are_of_different_pictures(pictures: Path) -> None:
    module = data(pictures)
    kept, apart = (
        {image.numpy().tobytes() for image in module.pairs(part).split.images}
        for part in ("train", "validation")
    )
    assert len(kept) == COUNT - HELD_OUT
    assert len(apart) == HELD_OUT
    assert not kept & apart


def test_statistics_are_those_of_the_canvases_of_independent_pictures(pictures: Path) -> None:
    module = data(pictures)
    single = module.pictures.preprocessing
    # Pictures of these statistics, each pixel drawn on its own.
    generator = np.random.default_rng(0)
    values = generator.normal(single.mean[0], single.std[0], (2, 500, 28, 28))
    canvas = np.zeros((500, 36, 36))
    canvas[:, :28, :28] += values[0]
    canvas[:, 8:, 8:] += values[1]
    assert module.preprocessing.mean[0] == pytest.approx(canvas.mean(), abs=2e-3)
    assert module.preprocessing.std[0] == pytest.approx(canvas.std(), abs=2e-3)


def epoch(module: ImagePairDataModule, number: int) -> PairBatch:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return PairBatch(*(torch.cat(column) for column in zip(*loader, strict=True)))


@pytest.mark.parametrize("redraw", [False, True])
def test_partners_are_drawn_once_or_in_each_epoch(redraw: bool, pictures: Path) -> None:
    module = data(pictures, redraw=redraw, batch_size=20)
    seen = []
    for number in (0, 1, 0):
        batch = epoch(module, number)
        assert len(batch.labels) == 2 * (COUNT - HELD_OUT)
        seen.append(batch.images)
    assert torch.equal(seen[0], seen[2]), "an epoch is a function of the seed and its number"
    keys = [{image.numpy().tobytes() for image in images} for images in seen]
    if redraw:
        assert len(keys[0] & keys[1]) < len(keys[0]) // 4
    else:
        assert keys[0] == keys[1]


def test_evaluation_has_each_canvas_once(pictures: Path) -> None:
    module = data(pictures)
    for loader, count in (
        (module.val_dataloader(), HELD_OUT),
        (module.test_dataloader(), PICTURES),
    ):
        once = torch.cat([batch.images for batch in loader])
        assert len(once) == 2 * count
        again = torch.cat([batch.images for batch in loader])
        assert torch.equal(once, again)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dataset": "multi-mnst"}, UnknownNameError, "Did you mean 'multi-mnist'"),
        ({"holdout": 0}, ValueError, "holdout must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
    ],
)
def test_bad_options_have_one_clear_line(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        ImagePairDataModule(**options)
    assert "\n" not in str(caught.value)


def test_pictures_of_different_kinds_cannot_be_composed() -> None:
    with pytest.raises(DataError, match=r"compose takes two tensors .* got \(1, 1, 28, 28\)"):
        compose(torch.zeros(1, 1, 28, 28), torch.zeros(1, 1, 27, 28))
