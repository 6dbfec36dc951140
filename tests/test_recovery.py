"""Tests of zoo.recovery, on made values and on trainings of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import SHRUNK, run
from zoo import controls, recovery
from zoo.cards import shipped_folder
from zoo.controls import find_recipes
from zoo.errors import ConfigError
from zoo.files import read_json
from zoo.intervals import Summary

GATES = {"DSelect-k", "softmax (MMoE)", "Top-k", "Gumbel", "shared bottom", "single task"}


def arm(gate: str, tasks: int, values: tuple[float, ...]) -> recovery.Arm:
    return recovery.Arm(
        gate=gate,
        tasks=tasks,
        seeds=tuple(range(len(values))),
        values=dict.fromkeys(recovery.MEASURES, values),
    )


def test_every_gate_is_trained_for_every_number_of_tasks_and_kept(tmp_path: Path) -> None:
    overrides = [*SHRUNK["dselect-k-recovery"], "data.steps=2"]
    arms = recovery.run([2, 3], seeds=[1, 2], out=tmp_path, overrides=overrides)
    assert {(a.gate, a.tasks) for a in arms} == {(gate, n) for gate in GATES for n in (2, 3)}
    assert all(len(a.values[m]) == 2 for a in arms for m in recovery.MEASURES)
    single = next(a for a in arms if a.gate == "single task")
    assert single.values["active"] == (1.0, 1.0)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("outcome.json")}
    assert len(kept) == 6 * 2 * 2
    again = recovery.run([2, 3], seeds=[1, 2], out=tmp_path, overrides=overrides)
    assert again == arms
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    words = ["--tasks", 2, 3, "--seeds", 1, 2, "--out", tmp_path, "--figure", tmp_path / "x.png"]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- zoo:recovery -->\n<!-- /zoo:recovery -->\nafter\n")
    said = run("recovery", *overrides, *words, "--readme", readme)
    assert said.status == 0
    assert len(said.out.splitlines()) == 1 + 12
    stored = json.loads((tmp_path / "recovery.json").read_text())
    assert stored["command"] == " ".join(["zoo recovery", *overrides, "--tasks 2 3 --seeds 1 2"]), (
        "what is said to make it does"
    )
    home = tmp_path / "model_cards" / "recovery"
    assert json.loads((home / "recovery.json").read_text()) == stored
    assert (home / "recovery.png").read_bytes()[:4] == b"\x89PNG"
    before, _, *table, _, after = readme.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert table == recovery.markdown(stored).splitlines()
    assert len(stored["arms"]) == 12
    assert len(stored["dselect_k_less_top_k"]) == 2 * len(recovery.MEASURES)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_finished_runs_of_other_options_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short run of one who tries the command out is none of the real ones."""
    monkeypatch.setattr(controls, "find_recipes", lambda name: find_recipes(name)[:1])
    overrides = [*SHRUNK["dselect-k-recovery"], "data.steps=2"]
    (first,) = recovery.run([2], seeds=[1, 1], out=tmp_path, overrides=overrides)
    assert first.seeds == (1,), "each seed is counted once"
    assert recovery.run([2, 2], seeds=[1], out=tmp_path, overrides=overrides) == [first]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for change, message in (
        ("trainer.max_epochs=2", "trainer.max_epochs was 1, not 2"),
        ("data.steps=3", "data.steps was 2, not 3"),
        ("model.network.gate.kind=softmax", "model.network.gate.kind was "),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            recovery.run([2], seeds=[2, 1], out=tmp_path, overrides=[*overrides, change])
        assert "seed_1 was made with other options" in str(caught.value)
        assert str(caught.value).endswith("choose another --out.")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == kept
    # What is shown on the way, and on which machine, is nobody's option.
    other = [*overrides, "trainer.enable_progress_bar=true", "trainer.accelerator=auto"]
    assert recovery.run([2], seeds=[1], out=tmp_path, overrides=other) == [first]


def test_true_experts_are_for_nets_of_as_many(tmp_path: Path) -> None:
    overrides = [*SHRUNK["dselect-k-recovery"], "data.steps=2", "model.true_experts=true"]
    arms = recovery.run([2], seeds=[1], out=tmp_path, overrides=overrides)
    assert {a.gate for a in arms} == GATES - {"shared bottom", "single task"}


def test_differences_are_paired_over_seeds() -> None:
    arms = [arm("DSelect-k", 2, (1.0, 5.0)), arm("Top-k", 2, (0.5, 4.5)), arm("Gumbel", 2, (0, 0))]
    found = recovery.differences(arms)
    assert [d.measure for d in found] == list(recovery.MEASURES)
    assert all(d.difference == Summary(mean=0.5, interval=(0.5, 0.5)) for d in found)


def test_the_table_has_each_gate_and_what_dselect_k_gains(tmp_path: Path) -> None:
    arms = [
        arm("Top-k", 8, (2.0, 4.0)),
        arm("DSelect-k", 8, (1.0, 2.0)),
        arm("Top-k", 2, (3.0, 3.0)),
    ]
    recovery.write(arms, tmp_path / "x.json", "zoo recovery --tasks 8 2 --seeds 0 1")
    header, _, *lines = recovery.markdown(json.loads((tmp_path / "x.json").read_text())).split("\n")
    assert header == ("| tasks | gate | squared error | Jaccard index | active experts | minutes |")
    # Student's quantile of one degree of freedom is 12.7062; half the interval is that times .5.
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| 2", "Top-k", "3.0000 (3.0000 to 3.0000)"],
        ["| 8", "Top-k", "3.0000 (-9.7062 to 15.7062)"],
        ["| 8", "DSelect-k", "1.5000 (-4.8531 to 7.8531)"],
        ["| 8", "DSelect-k less Top-k", "-1.5000 (-7.8531 to +4.8531)"],
    ]


def test_a_readme_without_markers_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing\n")
    recovery.write([arm("Top-k", 2, (1.0,))], tmp_path / "x.json")
    with pytest.raises(ConfigError, match="expected <!-- zoo:recovery -->"):
        recovery.update_readme(tmp_path / "README.md", tmp_path / "x.json")
    assert not (tmp_path / "model_cards").exists()


def test_the_readme_shows_what_is_kept() -> None:
    home = shipped_folder("model_cards")
    text = (home.parent / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- zoo:recovery -->\n")[1].split("\n<!-- /zoo:recovery -->")[0]
    record = read_json(home / "recovery" / "recovery.json")
    assert shown == recovery.markdown(record)
    assert (home / "recovery" / "recovery.png").is_file()
    assert {(a["gate"], a["tasks"]) for a in record["arms"]} == {
        (gate, tasks) for gate in GATES for tasks in (8, 32, 128)
    }
    assert all(len(a["seeds"]) >= 5 for a in record["arms"])


def test_the_figure_has_a_panel_for_each_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    arms = []
    for tasks in (8, 2):
        values = {m: (tasks + 1.0 + i, tasks + 3.0 + i) for i, m in enumerate(recovery.MEASURES)}
        arms.append(recovery.Arm(gate="Top-k", tasks=tasks, seeds=(1, 2), values=values))
    recovery.draw(arms, tmp_path / "x.png")
    (panels,) = [one.axes for one in drawn]
    assert len({axes.get_ylabel() for axes in panels}) == len(recovery.MEASURES)
    for i, axes in enumerate(panels):
        assert axes.lines[0].get_xdata().tolist() == [2, 8]
        assert axes.lines[0].get_ydata().tolist() == [4.0 + i, 10.0 + i]


@pytest.mark.parametrize(("tasks", "seeds"), [([], [1]), ([8], [])])
def test_nothing_to_do_has_one_clear_line(tasks: list[int], seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match="at least one number of tasks and one seed"):
        recovery.run(tasks, seeds=seeds)
