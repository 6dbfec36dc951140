"""Intervals: of proportions, of ratios over sampling units, and of means over a few seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Summary",
    "bootstrap_interval",
    "few_units_interval",
    "student_quantile",
    "summarise",
    "wilson_interval",
]

CONFIDENCE = 0.95
RESAMPLES = 10_000


def student_quantile(degrees: float, confidence: float = CONFIDENCE) -> float:
    """By how many standard errors Student's interval goes to either side (1908, Biometrika 6:1).

    Args:
        degrees: of freedom; any positive number, as Welch's are.
        confidence: coverage.
    """
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + confidence / 2))


def wilson_interval(
    successes: float, n: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927, JASA 22:209).

    Args:
        successes: number of ones.
        n: number of samples.
        confidence: coverage.

    Raises:
        ValueError: there are no samples, or more successes than samples.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"cannot take {successes} successes of {n} samples for a proportion")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Without a success the lower bound is zero, without a failure the upper one is one; rounding
    # could lead a hair's breadth away from either.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def bootstrap_interval(
    sums: Tensor,
    counts: Tensor,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of `sums.sum() / counts.sum()` over sampling units.

    Args:
        sums: one value per unit.
        counts: samples per unit.
        resamples: bootstrap samples.
        confidence: coverage.
        seed: of the resampling, so that the same measurement has the same interval.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    units, values = len(sums), []
    chunk = max(1, 4_000_000 // units)  # bounds the memory of the index to 32 MB
    for start in range(0, resamples, chunk):
        size = (min(chunk, resamples - start), units)
        index = torch.randint(units, size, generator=generator)
        values.append(sums[index].sum(1) / counts[index].sum(1))
    tail = (1 - confidence) / 2
    low, high = torch.cat(values).quantile(torch.tensor([tail, 1 - tail], dtype=sums.dtype))
    return float(low), float(high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean over seeds, with a 95 % interval; None where one seed says nothing about others."""

    mean: float
    interval: tuple[float, float] | None

    def __format__(self, spec: str) -> str:
        """Mean and interval, each in the format of a float."""
        if self.interval is None:
            return f"{self.mean:{spec}}"
        low, high = self.interval
        return f"{self.mean:{spec}} ({low:{spec}} to {high:{spec}})"


def summarise(values: Sequence[float], confidence: float = CONFIDENCE) -> Summary:
    """Mean of values, one per seed, with Student's t interval (Student, 1908, Biometrika 6:1).

    Seeds are few. Resampling three values would give an interval that holds the mean about three
    times in four; this one holds it as often as it says where the values are about normal.

    Args:
        values: one for each seed.
        confidence: coverage.

    Raises:
        ValueError: there is no value.
    """
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Summary(mean=mean, interval=None)
    half = student_quantile(n - 1, confidence) * statistics.stdev(values) / math.sqrt(n)
    return Summary(mean=mean, interval=(mean - half, mean + half))


def few_units_interval(
    sums: Tensor, counts: Tensor, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Student's interval of `sums.sum() / counts.sum()` over a few sampling units.

    Resampling two units holds the mean every second time. Here the ratio is linearised (Cochran,
    Sampling Techniques, 3rd ed., section 6.3). A single unit says nothing about others, and has
    its value for both bounds.

    Args:
        sums: one value per unit.
        counts: samples per unit.
        confidence: coverage.
    """
    ratio, units = float(sums.sum() / counts.sum()), len(sums)
    if units == 1:
        return ratio, ratio
    residuals = sums - ratio * counts
    error = math.sqrt(float(residuals.square().sum()) * units / (units - 1))
    half = student_quantile(units - 1, confidence) * error / float(counts.sum())
    return ratio - half, ratio + half
