"""Tests of streams: each sample once, orders and boundaries, and the measures by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from zoo.data.streams import (
    StreamConfig,
    StreamDataModule,
    StreamRecord,
    cached_encodings,
    make_stream,
)
from zoo.errors import DataError


def labels(n: int = 120, classes: int = 10) -> Tensor:
    return torch.arange(n) % classes


@given(
    schedule=st.sampled_from(["tasks", "gaussian", "shuffled"]),
    tasks=st.integers(1, 10),
    batch_size=st.integers(1, 70),
    seed=st.integers(0, 50),
)
def test_each_sample_comes_once(schedule: str, tasks: int, batch_size: int, seed: int) -> None:
    config = StreamConfig(schedule=schedule, tasks=tasks, batch_size=batch_size)  # type: ignore[arg-type]
    stream = make_stream(labels(), config, seed)
    batches = list(stream)
    assert torch.cat(batches).sort().values.tolist() == list(range(120))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert len(stream) == len(batches) == stream.task_ends[-1]
    assert len(stream.task_ends) == len(stream.task_classes) == tasks
    again = make_stream(labels(), config, seed)
    assert torch.equal(again.order, stream.order)


@given(tasks=st.integers(1, 10), seed=st.integers(0, 50))
def test_tasks_are_groups_of_classes_that_follow_each_other(tasks: int, seed: int) -> None:
    y = labels()
    stream = make_stream(y, StreamConfig(tasks=tasks, batch_size=7), seed)
    assert sorted(c for group in stream.task_classes for c in group) == list(range(10))
    sizes = [len(group) for group in stream.task_classes]
    assert max(sizes) - min(sizes) <= 1
    batches, start = list(stream), 0
    for end, group in zip(stream.task_ends, stream.task_classes, strict=True):
        assert set(y[torch.cat(batches[start:end])].tolist()) == set(group)
        start = end


def test_the_order_of_classes_is_random() -> None:
    first = {make_stream(labels(), StreamConfig(), seed).task_classes[0] for seed in range(20)}
    assert len(first) > 5


def test_the_gaussian_schedule_has_bells_of_half_the_distance() -> None:
    y = torch.arange(40_000) % 4
    stream = make_stream(y, StreamConfig(schedule="gaussian"), 3)
    ordered = y[stream.order]
    places = torch.arange(40_000, dtype=torch.float64)
    centres = torch.stack([places[ordered == c].mean() for c in range(4)]).sort().values
    assert centres.diff().min() > 5000, "classes follow each other"
    # Neighbours overlap as normal distributions one apart with deviation one half do: in the
    # middle between the first two, both come alike.
    ranks = torch.stack([places[ordered == c].mean() for c in range(4)]).argsort()
    first, second = int(ranks[0]), int(ranks[1])
    window = ordered[9_000:11_000]
    share = float((window == first).sum() / ((window == first) | (window == second)).sum())
    assert 0.3 < share < 0.7
    assert float((ordered[:2000] == first).double().mean()) > 0.9


def test_too_few_classes_and_no_samples_are_refused() -> None:
    with pytest.raises(DataError, match="3 classes, too few for 5 tasks"):
        make_stream(labels(9, 3), StreamConfig())
    for schedule in ("shuffled", "gaussian"):
        with pytest.raises(DataError, match="4 samples, too few for 5 tasks"):
            make_stream(labels(4), StreamConfig(schedule=schedule))
    with pytest.raises(DataError, match="no samples"):
        make_stream(labels(0), StreamConfig())
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        StreamConfig(batch_size=0)
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        StreamConfig(tasks=0)


# ------------------------------------------------------------------------------------- measures


def test_the_measures_are_those_of_a_table_by_hand() -> None:
    # Two classes a task; two test samples a class. Rows: measurements; numbers of right answers.
    right = [[2, 2, 0, 0], [2, 0, 2, 1], [1, 0, 2, 2]]
    truth = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    record = StreamRecord(4, ((0, 1), (2, 3)))
    ended = (0, None, 1)
    for row, task in zip(right, ended, strict=True):
        predicted = truth.clone()
        for c, good in enumerate(row):
            predicted[2 * c + good : 2 * c + 2] = (c + 1) % 4
        seen = torch.tensor([True, True, task != 0, task != 0])
        record.add(predicted, truth, seen, task)
    per_class = np.array(right) / 2
    np.testing.assert_allclose(record.per_class, per_class)
    assert record.final_accuracy == pytest.approx(5 / 8)
    anytime = (per_class[0, :2].mean() + per_class[1].mean() + per_class[2].mean()) / 3
    assert record.anytime_accuracy == pytest.approx(anytime)
    assert record.forgetting == pytest.approx(1.0 - 0.25)
    assert record.backward_transfer == pytest.approx(0.25 - 1.0)
    assert set(record.summary()) == {
        "final_accuracy",
        "anytime_accuracy",
        "forgetting",
        "backward_transfer",
    }


def test_one_task_forgets_nothing() -> None:
    record = StreamRecord(2, ((0, 1),))
    record.add(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool), 0)
    assert (record.forgetting, record.backward_transfer) == (0.0, 0.0)


# --------------------------------------------------------------------------------------- images


def folder(path: Path) -> Path:
    generator = np.random.default_rng(0)
    for index, name in enumerate(("ant", "bee", "cat")):
        (path / name).mkdir(parents=True)
        for number in range(10):
            pixels = generator.integers(0, 60, (8, 8), dtype=np.uint8)
            pixels[:, 2 * index : 2 * index + 2] += 150
            Image.fromarray(pixels).save(path / name / f"{number}.png")
    return path


def test_a_folder_is_a_stream(tmp_path: Path) -> None:
    data = StreamDataModule(
        path=str(folder(tmp_path)), size=(8, 8), stream=StreamConfig(tasks=3, batch_size=5)
    )
    batches = list(data.train_dataloader())
    assert data.preprocessing.classes == ("ant", "bee", "cat")
    assert (data.preprocessing.mean, data.preprocessing.std) == ((0.0,), (1.0,))
    rows = torch.cat([batch.rows for batch in batches])
    assert rows.sort().values.tolist() == list(range(24))
    assert [batch.ended for batch in batches if batch.ended is not None] == [0, 1, 2]
    for batch in batches:
        assert torch.equal(batch.images, data.train_images[batch.rows])
        assert torch.equal(batch.labels, data.train_labels[batch.rows])
        assert len(batch.labels.unique()) == 1


def test_a_limit_takes_the_first_of_each_class(tmp_path: Path) -> None:
    data = StreamDataModule(
        path=str(folder(tmp_path)), size=(8, 8), stream=StreamConfig(tasks=3), limit=4
    )
    assert data.rows.tolist() == [*range(4), *range(8, 12), *range(16, 20)]
    assert sorted(data.stream.order.tolist()) == data.rows.tolist()
    with pytest.raises(ValueError, match="limit must be at least 1 or null, got 0"):
        StreamDataModule(limit=0)


def test_encodings_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path))
    images = torch.arange(2 * 4, dtype=torch.uint8).view(2, 1, 2, 2)
    calls = []

    def encode(part: Tensor) -> Tensor:
        calls.append(len(part))
        return part.flatten(1) * 255

    first = cached_encodings(images, encode, "a", "images")
    torch.testing.assert_close(first, torch.arange(8.0).view(2, 4))
    assert torch.equal(cached_encodings(images, encode, "a", "images"), first)
    assert calls == [2]
    cached_encodings(images, encode, "b", "images")
    cached_encodings(images + 1, encode, "a", "images")
    assert calls == [2, 2, 2], "another encoder and other images are encoded anew"
    for path in (tmp_path / "data" / "encodings").iterdir():
        path.write_bytes(b"damaged")
    assert torch.equal(cached_encodings(images, encode, "a", "images"), first)
