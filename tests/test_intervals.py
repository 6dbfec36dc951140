"""Tests of zoo.intervals against other implementations, and against counted coverage."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import intervals
from zoo.intervals import (
    Summary,
    bootstrap_interval,
    few_units_interval,
    student_quantile,
    summarise,
    wilson_interval,
)


@given(degrees=st.floats(1, 1e4), confidence=st.floats(0.5, 0.999))
def test_students_quantile(degrees: float, confidence: float) -> None:
    expected = scipy.stats.t.ppf(0.5 + confidence / 2, degrees)
    assert student_quantile(degrees, confidence) == pytest.approx(expected, rel=1e-9)


@given(n=st.integers(1, 100_000), share=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
def test_wilson_interval(n: int, share: float, confidence: float) -> None:
    successes = round(share * n)
    test = scipy.stats.binomtest(successes, n)
    expected = test.proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx(expected, abs=1e-12)


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40),
    confidence=st.floats(0.5, 0.999),
)
def test_interval_over_seeds(values: list[float], confidence: float) -> None:
    summary = summarise(values, confidence)
    assert summary.mean == pytest.approx(float(np.mean(values)), abs=1e-9)
    scale = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    expected = scipy.stats.t.interval(confidence, len(values) - 1, float(np.mean(values)), scale)
    if scale > 0:
        assert summary.interval == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_interval_over_three_seeds_holds_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    intervals = [summarise(list(values)).interval for values in draws]
    held = sum(interval is not None and interval[0] <= 0 <= interval[1] for interval in intervals)
    # Four standard deviations of the share of 2,000.
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_one_seed_has_no_interval() -> None:
    assert summarise([0.25]) == Summary(mean=0.25, interval=None)
    assert f"{summarise([0.25]):+.2f}" == "+0.25"
    assert f"{Summary(mean=0.25, interval=(-1.0, 1.5)):+.2f}" == "+0.25 (-1.00 to +1.50)"
    with pytest.raises(ValueError, match="at least one data point"):
        summarise([])


def test_wilson_interval_solves_its_equation() -> None:
    # The ends are the proportions p from which the observed one is z standard errors away.
    z = NormalDist().inv_cdf(0.975)
    for p in wilson_interval(37, 50):
        assert abs(37 / 50 - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 50), rel=1e-12)


@pytest.mark.parametrize("n", [1, 3, 10_000])
def test_wilson_interval_stays_a_proportion(n: int) -> None:
    assert wilson_interval(0, n)[0] == 0.0
    assert wilson_interval(n, n)[1] == 1.0


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_of_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"cannot take {successes} successes of {n} samples"):
        wilson_interval(successes, n)


def units(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and counts of sampling units of unequal size."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 20, number)
    sums = counts * generator.gamma(2.0, 1.0, number)
    return torch.from_numpy(sums), torch.from_numpy(counts)


@pytest.mark.parametrize("number", [30, 1_000])  # the larger is resampled in several chunks
def test_bootstrap_interval(number: int) -> None:
    sums, counts = units(number)
    expected = scipy.stats.bootstrap(
        (sums.numpy(), counts.numpy()),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=intervals.RESAMPLES,
        batch=500,
        rng=np.random.default_rng(1),
    ).confidence_interval
    low, high = bootstrap_interval(sums, counts)
    # An end of 10,000 resamples has a standard error of 0.027 standard deviations of the value;
    # there are 3.92 of those between the ends. Two ends from two samplers, four standard errors:
    tolerance = 4 * math.sqrt(2) * 0.027 * (high - low) / 3.92
    assert low == pytest.approx(expected.low, abs=tolerance)
    assert high == pytest.approx(expected.high, abs=tolerance)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, trials, covered = torch.Generator().manual_seed(3), 400, 0
    counts = torch.ones(60, dtype=torch.int64)
    for trial in range(trials):
        sums = torch.randn(60, generator=generator, dtype=torch.float64) + 5.0
        low, high = bootstrap_interval(sums, counts, resamples=400, confidence=0.9, seed=trial)
        covered += low <= 5.0 <= high
    # Four standard errors of a share of 0.9 over 400 trials are 0.06.
    assert 0.84 <= covered / trials <= 0.96


@pytest.mark.parametrize("units", [2, 3, 8])
def test_an_interval_over_few_units_holds_the_truth_as_often_as_it_says(units: int) -> None:
    """Resampling two units would hold it in half of the trials."""
    generator, trials, covered = torch.Generator().manual_seed(4), 2000, 0
    counts = torch.ones(units, dtype=torch.int64)
    for _ in range(trials):
        sums = torch.randn(units, generator=generator, dtype=torch.float64) + 5.0
        low, high = few_units_interval(sums, counts, confidence=0.9)
        covered += low <= 5.0 <= high
    # Four standard errors of a share of 0.9 over 2,000 trials are 0.027.
    assert 0.873 <= covered / trials <= 0.927


def test_an_interval_over_few_units_is_students_and_of_a_ratio() -> None:
    sums = torch.tensor([1.0, 4.0, 2.5, 3.0], dtype=torch.float64)
    expected = scipy.stats.ttest_1samp(sums.numpy(), 0).confidence_interval(0.95)
    equal = torch.full((4,), 1)
    assert few_units_interval(sums, equal) == pytest.approx((expected.low, expected.high))
    # Blocks of two samples each, with the same values: half of everything.
    halves = few_units_interval(sums, 2 * equal)
    assert halves == pytest.approx((expected.low / 2, expected.high / 2))
    counts = torch.tensor([1, 4, 2, 3])
    assert few_units_interval(0.5 * counts.double(), counts) == pytest.approx((0.5, 0.5))


def test_bootstrap_interval_is_repeatable_and_narrows_with_confidence() -> None:
    sums, counts = units(50)
    assert bootstrap_interval(sums, counts) == bootstrap_interval(sums, counts)
    assert bootstrap_interval(sums, counts) != bootstrap_interval(sums, counts, seed=1)
    narrow, wide = (
        bootstrap_interval(sums, counts, confidence=0.5),
        bootstrap_interval(sums, counts),
    )
    assert wide[0] < narrow[0] < float(sums.sum() / counts.sum()) < narrow[1] < wide[1]


def test_bootstrap_interval_of_a_constant_is_a_point() -> None:
    counts = torch.tensor([1, 5, 9])
    assert bootstrap_interval(2.5 * counts.double(), counts) == pytest.approx((2.5, 2.5))
