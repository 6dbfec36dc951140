"""Contestants take turns in one process, medians are compared, and the rounds are resampled.

A machine drifts: other programs come and go, its clock changes. What runs in the same round is hit
alike, so a ratio over rounds is steadier than either time.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import importlib
import os
import pkgutil
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tests import benchmarks
from zoo import _card_tables, provenance
from zoo.configs import build, to_json
from zoo.errors import UnknownNameError, nearest
from zoo.files import read_json, write_json

ROOT = Path(__file__).parents[2]
"""The source checkout."""

RESAMPLES = 2_000
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One quantity of a contestant beside that of a peer, round by round."""

    name: str
    """What is compared: `"forward, 16 x 256 x 256"`."""
    contestant: str
    """Whose cost it is."""
    peer: str
    """What it is held against."""
    values: tuple[float, ...]
    """The contestant's cost in each round."""
    peer_values: tuple[float, ...]
    """The peer's, in the same rounds."""
    unit: Literal["s", "bytes"] = "s"
    """Of the values."""
    expected: float = 1.0
    """Ratio that the arithmetic of both would give; the target is relative to it."""
    at_most: float | None = None
    """Target: the largest cost, over `expected` times that of the peer."""
    at_most_value: float | None = None
    """Target: the largest cost itself."""

    def __post_init__(self) -> None:
        if not self.values or len(self.values) != len(self.peer_values):
            raise ValueError(
                f"contestant and peer need a value in each round, got {len(self.values)} and "
                f"{len(self.peer_values)}"
            )
        if min(*self.values, *self.peer_values) <= 0:
            raise ValueError("costs must be positive")

    @property
    def value(self) -> float:
        """Median cost of the contestant."""
        return statistics.median(self.values)

    @property
    def peer_value(self) -> float:
        """Median cost of the peer."""
        return statistics.median(self.peer_values)

    @property
    def ratio(self) -> float:
        """Median cost over that of the peer."""
        return self.value / self.peer_value

    @property
    def interval(self) -> tuple[float, float]:
        """Percentile bootstrap of `ratio` over rounds, 95 %; a round is drawn as a whole."""
        pairs = list(zip(self.values, self.peer_values, strict=True))
        generator = random.Random(0)
        ratios = []
        for _ in range(RESAMPLES):
            drawn = generator.choices(pairs, k=len(pairs))
            ratios.append(
                statistics.median(own for own, _ in drawn)
                / statistics.median(peer for _, peer in drawn)
            )
        ratios.sort()
        tail = round((1 - CONFIDENCE) / 2 * (RESAMPLES - 1))
        return ratios[tail], ratios[-1 - tail]

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        verdicts = []
        if self.at_most is not None:
            verdicts.append(self.ratio <= self.at_most * self.expected)
        if self.at_most_value is not None:
            verdicts.append(self.value <= self.at_most_value)
        return all(verdicts) if verdicts else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All comparisons of one topic, and where they were made."""

    topic: str
    """Name of the module."""
    about: str
    """What it asks, in a line."""
    comparisons: tuple[Comparison, ...]
    machine: str
    """Processor and cores."""
    threads: int
    """Threads that torch was given."""
    load_average: float
    """Processes that wanted to run in the minute before; what is above 0 disturbs."""
    versions: dict[str, str]
    date: str
    commit: str | None
    wall_minutes: float
    """Time that the topic took."""

    @property
    def met(self) -> bool:
        """Whether no target is missed."""
        return all(comparison.met is not False for comparison in self.comparisons)


def race(
    contestants: Mapping[str, Callable[[], float | None]], rounds: int, warmup: int = 1
) -> dict[str, tuple[float, ...]]:
    """Seconds of each contestant in each round.

    Args:
        contestants: what to run, by name. One that returns a number has taken its own time.
        rounds: how often each is run; every other round goes backwards.
        warmup: runs of each before that are not counted.

    Raises:
        ValueError: there are no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(-warmup, rounds):
        order = list(contestants) if index % 2 == 0 else list(reversed(contestants))
        for name in order:
            gc.collect()
            start = time.perf_counter()
            own = contestants[name]()
            seconds = time.perf_counter() - start
            if index >= 0:
                taken[name].append(seconds if own is None else own)
    return {name: tuple(seconds) for name, seconds in taken.items()}


def repeated(function: Callable[[], object], at_least: float = 0.05) -> Callable[[], float]:
    """A contestant that runs `function` as often as fills some time; seconds of one run."""
    start = time.perf_counter()
    function()  # the first run of anything is slow
    first, start = time.perf_counter() - start, time.perf_counter()
    function()
    count = max(1, round(at_least / min(first, time.perf_counter() - start)))

    def run() -> float:
        start = time.perf_counter()
        for _ in range(count):
            function()
        return (time.perf_counter() - start) / count

    return run


def topics() -> dict[str, str]:
    """Names of all topics, with the module of each."""
    return {
        module.name: f"{benchmarks.__name__}.{module.name}"
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if not module.name.startswith(("_", "test_"))
    }


def measure(topic: str, rounds: int | None = None) -> Report:
    """Run a topic.

    Args:
        topic: one of `topics`.
        rounds: rounds of each comparison; None: what the topic takes for a published figure.

    Raises:
        UnknownNameError: there is no such topic.
    """
    import torch

    known = topics()
    if topic not in known:
        raise UnknownNameError(
            f"No benchmark {topic!r}.{nearest(topic, known)} There are: {', '.join(known)}."
        )
    module = importlib.import_module(known[topic])
    load_average, start = os.getloadavg()[0], time.perf_counter()
    comparisons = tuple(module.run(module.ROUNDS if rounds is None else rounds))
    return Report(
        topic=topic,
        about=(module.__doc__ or "").partition("\n")[0].rstrip("."),
        comparisons=comparisons,
        machine=provenance.machine(),
        threads=torch.get_num_threads(),
        load_average=round(load_average, 2),
        versions=provenance.versions(),
        date=datetime.date.today().isoformat(),
        commit=provenance.source_commit(),
        wall_minutes=round((time.perf_counter() - start) / 60, 2),
    )


def read_reports(path: Path) -> list[Report]:
    """The reports that `write_reports` wrote.

    Raises:
        ZooError: the file cannot be read, or holds something else.
    """
    stored = read_json(path)
    return [build(Report, values, f"{path}: {topic}") for topic, values in stored.items()]


def write_reports(path: Path, reports: Iterable[Report]) -> list[Report]:
    """Write reports into a JSON file, in place of earlier ones on the same topics.

    Returns:
        All reports that are now in the file, in the order of their topics.
    """
    merged = {report.topic: report for report in read_reports(path)} if path.exists() else {}
    merged.update({report.topic: report for report in reports})
    ordered = [merged[topic] for topic in sorted(merged)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {report.topic: to_json(report) for report in ordered})
    return ordered


def render(reports: Sequence[Report]) -> str:
    """The reports as Markdown: a table of what has a target, and what it was measured with."""
    header = ["What", "Cost", "Against", "Its cost", "Ratio (95 % interval)", "Target", "Met"]
    compared = [comparison for report in reports for comparison in report.comparisons]
    rows = [_row(comparison) for comparison in compared if comparison.met is not None]
    table = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    # Topics that were measured alike share a line.
    measured: dict[str, list[str]] = {}
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        where = (
            f"{report.date}, {report.machine}, {report.threads} threads, {versions}, "
            f"load average {report.load_average:.1f} at the start"
        )
        measured.setdefault(where, []).append(report.topic)
    lines = [f"{', '.join(names)}: {where}." for where, names in measured.items()]
    return "\n".join([*table, "", *lines])


def _row(comparison: Comparison) -> list[str]:
    low, high = comparison.interval
    return [
        f"{comparison.contestant}: {comparison.name}",
        _shown(comparison.value, comparison.unit),
        comparison.peer,
        _shown(comparison.peer_value, comparison.unit),
        f"{comparison.ratio:.3f} ({low:.3f} to {high:.3f})",
        _target(comparison),
        {True: "yes", False: "**no**", None: "-"}[comparison.met],
    ]


def _target(comparison: Comparison) -> str:
    targets = []
    if comparison.at_most is not None:
        limit = comparison.at_most * comparison.expected
        arithmetic = f" (arithmetic: {comparison.expected:.3f})" if comparison.expected != 1 else ""
        targets.append(f"ratio up to {limit:.3f}{arithmetic}")
    if comparison.at_most_value is not None:
        targets.append(f"up to {_shown(comparison.at_most_value, comparison.unit)}")
    return "; ".join(targets) or "-"


def _shown(value: float, unit: str) -> str:
    """Three digits, with a prefix that fits."""
    if unit == "bytes":
        return f"{value / 1e6:.3g} MB"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def update_readme(path: Path, reports: Sequence[Report]) -> None:
    """Write the table into a README, between its markers `zoo:speed`.

    Raises:
        ConfigError: it lacks the markers.
    """
    _card_tables.fill_file(path, "speed", render(reports))


def as_text(report: Report) -> str:
    """A report for a terminal."""
    columns: list[list[Any]] = [_row(comparison) for comparison in report.comparisons]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in columns
    ]
    return "\n".join([f"{report.topic}: {report.about} ({report.wall_minutes} min)", *lines])
