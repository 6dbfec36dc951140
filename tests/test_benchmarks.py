"""Tests of the benchmarks' harness; what it measures is no test's business."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks import _harness as harness
from tests.benchmarks._harness import Comparison, Report
from zoo.errors import ConfigError, UnknownNameError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "speed.json"


def comparison(
    values: tuple[float, ...] = (2.0, 4.0, 6.0),
    peer_values: tuple[float, ...] = (1.0, 2.0, 4.0),
    **changes: object,
) -> Comparison:
    return Comparison(
        name="a shape",
        contestant="ours",
        peer="theirs",
        values=values,
        peer_values=peer_values,
        **changes,  # type: ignore[arg-type]
    )


def report(topic: str, *comparisons: Comparison, **changes: object) -> Report:
    values: dict[str, object] = {
        "topic": topic,
        "about": "What it costs",
        "comparisons": comparisons,
        "machine": "a machine, 2 cores",
        "threads": 2,
        "load_average": 0.5,
        "versions": {"python": "3.12.1", "torch": "2.10.0"},
        "date": "2026-01-02",
        "commit": None,
        "wall_minutes": 0.1,
        **changes,
    }
    return Report(**values)  # type: ignore[arg-type]


def test_the_ratio_is_that_of_the_medians() -> None:
    one = comparison(values=(9.0, 1.0, 4.0), peer_values=(2.0, 1.0, 30.0))
    assert (one.value, one.peer_value, one.ratio) == (4.0, 2.0, 2.0)


def test_what_hits_both_alike_leaves_no_interval() -> None:
    slow = (1.0, 5.0, 2.0, 9.0, 1.5)
    one = comparison(values=tuple(3 * s for s in slow), peer_values=slow)
    assert one.interval == pytest.approx((3.0, 3.0))


def test_the_interval_is_that_of_all_resamples_of_three_rounds() -> None:
    """With three rounds all 27 resamples can be listed; each end has to have its share."""
    one = comparison(values=(2.0, 4.0, 9.0), peer_values=(1.0, 2.5, 4.0))
    pairs = list(zip(one.values, one.peer_values, strict=True))
    ratios = sorted(
        sorted(a for a, _ in drawn)[1] / sorted(b for _, b in drawn)[1]
        for drawn in itertools.product(pairs, repeat=3)
    )
    # The extremes have 7 of 27 resamples each, far more than the 2.5 % beyond either end.
    assert one.interval == (ratios[0], ratios[-1])
    assert one.interval[0] < one.ratio or one.ratio == ratios[0]


@pytest.mark.parametrize(
    ("targets", "met"),
    [
        ({}, None),
        ({"at_most": 2.0}, True),
        ({"at_most": 1.9}, False),
        ({"at_most": 1.9, "expected": 1.1}, True),
        ({"at_most_value": 4.0}, True),
        ({"at_most_value": 3.9}, False),
        ({"at_most": 2.0, "at_most_value": 3.9}, False),
    ],
)
def test_targets(targets: dict[str, float], met: bool | None) -> None:
    one = comparison(**targets)
    assert one.ratio == 2.0
    assert one.met is met
    assert report("topic", one).met is (met is not False)


def test_costs_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="a value in each round, got 3 and 1"):
        comparison(peer_values=(1.0,))
    with pytest.raises(ValueError, match="a value in each round, got 0 and 0"):
        comparison(values=(), peer_values=())
    with pytest.raises(ValueError, match="positive"):
        comparison(values=(0.0, 1.0, 1.0))


def test_contestants_take_turns_backwards_in_every_other_round() -> None:
    calls: list[str] = []

    def contestant(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds + len(calls)

    taken = harness.race({"a": lambda: contestant("a", 10), "b": lambda: contestant("b", 20)}, 3)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert taken == {"a": (13.0, 16.0, 17.0), "b": (24.0, 25.0, 28.0)}
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        harness.race({}, 0)


def test_the_ratio_of_waiting_is_measured() -> None:
    """Sleeping is what a busy machine can only lengthen; neither can take less."""
    taken = harness.race({"long": lambda: time.sleep(0.06), "short": lambda: time.sleep(0.02)}, 5)
    assert min(taken["long"]) >= 0.06
    assert min(taken["short"]) >= 0.02
    assert min(taken["long"]) / min(taken["short"]) == pytest.approx(3.0, rel=0.5)


def test_a_short_function_is_repeated_and_a_long_one_is_not() -> None:
    calls = 0

    def short() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.001)

    seconds = harness.repeated(short, at_least=0.02)()
    assert calls > 4
    assert seconds >= 0.001
    calls = 0
    harness.repeated(short, at_least=0.0)()
    assert calls == 3


def test_topics_are_found() -> None:
    assert {"generation", "grc_layer", "import_time", "load", "training"} <= set(harness.topics())
    assert not {"__main__", "_harness", "results"} & set(harness.topics())
    with pytest.raises(UnknownNameError, match="Did you mean 'grc_layer'"):
        harness.measure("grc-layer")


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "speed.json"
    first = report("b", comparison(at_most=1.05), comparison(unit="bytes"), commit="abc")
    assert harness.write_reports(path, [first]) == [first]
    assert harness.read_reports(path) == [first]
    second, other = report("b", comparison(expected=1.16)), report("a")
    assert harness.write_reports(path, [second, other]) == [other, second]
    assert harness.read_reports(path) == [other, second]


def test_results_with_an_unknown_key(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    harness.write_reports(path, [report("a", comparison())])
    stored = json.loads(path.read_text())
    stored["a"]["comparisons"][0]["fastest"] = 1.0
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"a: comparisons.0: unknown key 'fastest'"):
        harness.read_reports(path)


def test_the_table() -> None:
    reports = [
        report("a", comparison(values=(0.2,), peer_values=(0.1,), at_most=1.15, expected=1.2)),
        report("b", comparison(values=(3e6,), peer_values=(2e6,), unit="bytes")),
        report("c", comparison(values=(1.5,), peer_values=(3.0,), at_most_value=2.0), threads=1),
    ]
    lines = harness.render(reports).splitlines()
    assert lines[2] == (
        "| ours: a shape | 200 ms | theirs | 100 ms | 2.000 (2.000 to 2.000) "
        "| ratio up to 1.380 (arithmetic: 1.200) | **no** |"
    )
    # What has no target is in the file alone.
    assert lines[3] == (
        "| ours: a shape | 1.5 s | theirs | 3 s | 0.500 (0.500 to 0.500) | up to 2 s | yes |"
    )
    measured = "2026-01-02, a machine, 2 cores, {} threads, python 3.12.1, torch 2.10.0, load"
    assert lines[5].startswith(f"a, b: {measured.format(2)} average 0.5")
    assert lines[6].startswith(f"c: {measured.format(1)} average 0.5")
    assert len(lines) == 7


def test_the_readme_is_filled_between_its_markers(tmp_path: Path) -> None:
    path, reports = tmp_path / "README.md", [report("a", comparison())]
    path.write_text("before\n<!-- zoo:speed -->\nold\n<!-- /zoo:speed -->\nafter\n")
    harness.update_readme(path, reports)
    text = path.read_text()
    table = harness.render(reports)
    assert text == f"before\n<!-- zoo:speed -->\n{table}\n<!-- /zoo:speed -->\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ConfigError, match="zoo:speed"):
        harness.update_readme(path, reports)


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(topic: str, rounds: int | None) -> Report:
        assert rounds == 3
        return report(topic, comparison(at_most=1.0 if topic == "load" else 9.0))

    monkeypatch.setattr(harness, "measure", measure)
    path, readme = tmp_path / "speed.json", tmp_path / "README.md"
    readme.write_text("<!-- zoo:speed -->\n<!-- /zoo:speed -->")
    where = ["--json", str(path), "--readme", str(readme), "--rounds", "3"]
    assert command.main(["training", *where]) == 0
    assert [one.topic for one in harness.read_reports(path)] == ["training"]
    assert command.main(["all", *where]) == 0
    assert [one.topic for one in harness.read_reports(path)] == list(harness.topics())
    assert harness.render(harness.read_reports(path)) in readme.read_text()
    assert command.main(["training", "--strict", "--rounds", "3"]) == 0
    assert command.main(["load", "--rounds", "3"]) == 0
    assert command.main(["load", "--strict", "--rounds", "3"]) == 1
    assert "**no**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No benchmark 'nothing'"),
        (["load", "--readme", "README.md"], "name it with --json"),
        (["load", "--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = command.main(arguments)
    except SystemExit as leave:
        status = int(leave.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_readme_shows_the_recorded_results() -> None:
    recorded = harness.render(harness.read_reports(RESULTS)) + "\n" if RESULTS.exists() else ""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- zoo:speed -->\n{recorded}<!-- /zoo:speed -->" in readme
