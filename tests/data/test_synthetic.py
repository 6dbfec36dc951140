"""Tests of the made data: spirals and densities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from zoo.data import densities
from zoo.data.densities import DENSITIES, DensityDataModule, draw, true_entropy
from zoo.data.spirals import SPACING, WINDOW, SpiralDataModule, make_spirals
from zoo.errors import UnknownNameError


def test_spirals_are_archimedean_and_turn_both_ways() -> None:
    spirals = make_spirals(40, 30, 0.0, seed=5)
    x, y = spirals.truth.double().unbind(-1)
    radius = torch.hypot(x, y)
    angle = radius / 0.3
    assert float(angle.min()) >= 0
    assert float(angle.max()) <= 6 * math.pi + 1e-4
    torch.testing.assert_close(
        angle.diff(dim=1), torch.full((40, 199), SPACING).double(), atol=1e-4, rtol=0
    )
    way = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0).double()[:, None]
    torch.testing.assert_close(x, radius * torch.cos(angle), atol=1e-4, rtol=0)
    torch.testing.assert_close(y, way * radius * torch.sin(angle), atol=1e-4, rtol=0)
    assert len(set(angle[:, 0].tolist())) == 40, "each starts at another point"


@pytest.mark.parametrize("n", [2, 30, WINDOW])
def test_observations_are_noisy_points_of_the_window_in_order(n: int) -> None:
    spirals = make_spirals(200, n, 0.3, seed=5)
    assert spirals.values.shape == (200, n, 2)
    assert bool((spirals.chosen.diff(dim=1) > 0).all())
    assert 0 <= int(spirals.chosen.min()) <= int(spirals.chosen.max()) < WINDOW
    torch.testing.assert_close(spirals.times, (spirals.chosen + 1) * SPACING)
    at = spirals.chosen[..., None].expand(-1, -1, 2)
    noise = spirals.values - spirals.truth.gather(1, at)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.1)
    assert torch.equal(spirals.truth, make_spirals(200, 7, 0.3, seed=5).truth)


def test_training_and_test_spirals_differ_and_only_the_order_has_a_seed() -> None:
    one, other = (SpiralDataModule(observations=5, count=12, batch_size=4, seed=s) for s in (0, 1))
    assert torch.equal(one.train.values, other.train.values)
    assert torch.equal(one.test.truth, other.test.truth)
    assert not torch.equal(one.train.truth, one.test.truth)
    batches = list(one.train_dataloader())
    assert [len(b.values) for b in batches] == [4, 4, 4]
    seen = torch.cat([b.truth for b in batches])
    assert not torch.equal(seen, one.train.truth)
    torch.testing.assert_close(
        seen.flatten(1).sum(1).sort().values, one.train.truth.flatten(1).sum(1).sort().values
    )
    later = torch.cat([b.truth for b in other.train_dataloader()])
    assert not torch.equal(seen, later)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observations": 1}, "from 2 to 100, got 1"),
        ({"observations": 101}, "from 2 to 100, got 101"),
        ({"count": 0}, "count must be at least 1"),
        ({"noise": -0.1}, "noise must not be negative"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_wrong_options_of_spirals_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpiralDataModule(**options)


def test_made_data_are_equal_on_every_machine() -> None:
    """Rounded sums that were written down once; they change when the generator does."""
    spirals = make_spirals(10, 20, 0.3, seed=0)
    sums = [float(spirals.truth.double().sum()), float(spirals.chosen.sum())]
    points = [float(draw(name, 100, 0).double().sum()) for name in DENSITIES]
    assert [round(v, 2) for v in (*sums, *points)] == GOLDEN


GOLDEN = [-932.41, 9278.0, 48.67, -5.27, -42.36, -17.19, 25.25, 19.55]


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_densities_are_points_of_the_plane(name: str) -> None:
    points = draw(name, 4000, 3)
    assert points.shape == (4000, 2)
    assert float(points.abs().max()) < 6
    assert torch.equal(points, draw(name, 4000, 3))
    assert not torch.equal(points, draw(name, 4000, 4))


def test_the_checkerboard_is_uniform_on_eight_of_sixteen_cells() -> None:
    points = draw("checkerboard", 16_000, 0)
    cells = (points + 2).floor().long()
    counts = torch.zeros(4, 4).index_put((cells[:, 0], cells[:, 1]), torch.ones(16_000), True)
    dark = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert float(counts[~dark].sum()) == 0
    assert float((counts[dark] / 2000 - 1).abs().max()) < 0.15


def test_known_entropies_are_those_of_the_samples() -> None:
    """By the nearest of eight centres, whose overlap is negligible, and by the area."""
    points = draw("eight-gaussians", 50_000, 0).double()
    angle = math.pi / 4 * torch.arange(8, dtype=torch.float64)
    centres = 2 * torch.stack((angle.cos(), angle.sin()), 1)
    distance = (points[:, None] - centres).square().sum(-1)
    density = (-distance / 0.08).exp().sum(1) / (8 * 2 * math.pi * 0.04)
    entropy = true_entropy("eight-gaussians")
    assert entropy == pytest.approx(float(-density.log().mean()), abs=0.02)
    assert true_entropy("checkerboard") == pytest.approx(math.log(8))
    assert true_entropy("moons") is None


def test_training_points_are_fresh_in_every_step_and_epoch() -> None:
    data = DensityDataModule(batch_size=12, steps=3, test_points=10)
    loader = data.train_dataloader()
    first = [b.points for b in loader]
    assert [len(p) for p in first] == [12, 12, 12]
    assert next(iter(loader)).which.tolist() == [k for k in range(6) for _ in range(2)]
    assert torch.equal(first[0], next(iter(loader)).points)
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    second = [b.points for b in loader]
    everything = torch.cat([*first, *second])
    assert len({tuple(p) for p in everything.tolist()}) == 72
    assert torch.equal(
        data.test_set("moons"), DensityDataModule(test_points=10, seed=5).test_set("moons")
    )


def test_training_and_test_points_of_densities_never_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No generator starts in the state of another: numpy fills seeds up with zeros."""
    seen: list[Any] = []

    def record(name: str, n: int, seed: Any) -> torch.Tensor:
        seen.append(seed)
        return draw(name, n, seed)

    monkeypatch.setattr(densities, "draw", record)
    data = DensityDataModule(test_points=10)
    for name in DENSITIES:
        data.test_set(name)
    tested, seen = seen, []
    for seed, epoch in itertools.product(range(4), range(3)):
        loader = DensityDataModule(batch_size=6, steps=3, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        list(loader)
    states = [
        {str(np.random.default_rng(seed).bit_generator.state) for seed in seeds}
        for seeds in (tested, seen)
    ]
    assert [len(s) for s in states] == [6, 4 * 3 * 3 * 6]
    assert states[0].isdisjoint(states[1])
    assert torch.equal(data.test_set("circles"), draw("circles", 10, (1, 1))), "as published"


def test_wrong_options_of_densities_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"No density 'moon'\. Did you mean 'moons'"):
        draw("moon", 3, 0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        DensityDataModule(steps=0)
