"""Do gates find the experts that the tasks were made of, and what becomes of it with more tasks?

Every gate is trained on the same synthetic tasks, with each seed, for several numbers of tasks. The
recipes are those under `recipes/controls/dselect-k-recovery.synthetic`. Runs that are finished are
kept, so the command can be interrupted and repeated.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo import _card_tables, controls, evaluation, training
from zoo.configs import build
from zoo.errors import ConfigError, ZooError
from zoo.files import read_json, write_json
from zoo.intervals import Summary, summarise
from zoo.progress import track
from zoo.provenance import made_by

__all__ = [
    "NAME",
    "Arm",
    "Difference",
    "differences",
    "draw",
    "markdown",
    "rows",
    "run",
    "update_readme",
    "write",
]

NAME = "dselect-k-recovery.synthetic"
MEASURES = ("error", "recovery", "active", "wall_minutes")
"""What is kept of a run: test error, Jaccard index, active experts, and time."""

_OUTCOME = "outcome.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """All runs of one gate at one number of tasks."""

    gate: str
    tasks: int
    seeds: tuple[int, ...]
    values: dict[str, tuple[float, ...]]
    """Measure -> value of each seed."""

    def summary(self, measure: str) -> Summary:
        """Mean and interval of one of `MEASURES`."""
        return summarise(self.values[measure])


def run(
    tasks: Sequence[int] = (8, 32, 128),
    *,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    out: str | os.PathLike[str] = "runs/recovery",
    overrides: Sequence[str] = (),
) -> list[Arm]:
    """Train what is missing, and return all runs by gate and number of tasks.

    Args:
        tasks: numbers of tasks.
        seeds: of the data and the training.
        out: folder of the runs.
        overrides: `section.key=value`, applied to every gate alike. With `model.true_experts=true`
            the gates alone are trained, and nets of fewer or more experts are left out.

    Raises:
        ConfigError: there is no number of tasks or no seed, or a finished run was made with other
            options.
        ZooError: a run is not possible.
    """
    if not tasks or not seeds:
        raise ConfigError("recovery needs at least one number of tasks and one seed.")
    # The same run counted twice would narrow the intervals.
    tasks, seeds = tuple(dict.fromkeys(tasks)), tuple(dict.fromkeys(seeds))
    jobs = [
        (job, count, Path(out) / f"tasks_{count}" / job.path.stem / f"seed_{seed}")
        for seed in seeds
        for count in tasks
        for path in controls.find_recipes(NAME)
        if (job := _job(path, count, seed, overrides)) is not None
    ]
    for recipe, _, folder in jobs:
        if (folder / _OUTCOME).is_file():
            training.check_finished(recipe, folder)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for recipe, count, folder in track(jobs, "recovery"):
        found.setdefault((recipe.name, count), []).append(_train(recipe, folder))
    return [
        Arm(
            gate=gate,
            tasks=count,
            seeds=seeds,
            values={name: tuple(result[name] for result in results) for name in MEASURES},
        )
        for (gate, count), results in found.items()
    ]


def _job(path: Path, tasks: int, seed: int, overrides: Sequence[str]) -> training.Recipe | None:
    """The recipe of one run; None where the gate is none that the overrides are for."""
    changes = [
        *overrides,
        f"data.tasks={tasks}",
        f"model.network.num_tasks={tasks}",
        f"seed_everything={seed}",
        f"data.seed={seed}",
    ]
    recipe = training.read_recipe(path, changes)
    if recipe.options["model"]["network"]["gate"]["kind"] == "fixed":
        recipe.options["model"]["network"]["num_experts"] = tasks  # one for each task
    model = recipe.options["model"]
    as_many = model["network"]["num_experts"] == recipe.options["data"]["experts"]
    return recipe if as_many or not model["true_experts"] else None


def _train(recipe: training.Recipe, folder: Path) -> dict[str, float]:
    path = folder / _OUTCOME
    if not path.is_file():
        done = training.fit(recipe, out=folder, resume=True, longer=False)
        values = {
            protocol: evaluation.measure(
                done.module, done.datamodule, protocol, f"{folder}: "
            ).value
            for protocol in done.module.protocols
        }
        write_json(path, {**values, "wall_minutes": done.wall_minutes})
    stored: dict[str, float] = read_json(path)
    return stored


def write(arms: Sequence[Arm], path: str | os.PathLike[str], command: str = "zoo recovery") -> None:
    """Keep all values, and DSelect-k less Top-k paired over seeds, as JSON.

    Args:
        arms: what `run` returned.
        path: of the file.
        command: that made them.
    """
    write_json(
        Path(path),
        {
            **made_by(command),
            "arms": [dataclasses.asdict(arm) for arm in arms],
            "dselect_k_less_top_k": [dataclasses.asdict(d) for d in differences(arms)],
        },
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """DSelect-k less Top-k at one number of tasks, paired over seeds."""

    tasks: int
    measure: str
    difference: Summary


def differences(arms: Sequence[Arm]) -> list[Difference]:
    """DSelect-k less Top-k, for each number of tasks and measure."""
    by_key = {(arm.gate, arm.tasks): arm for arm in arms}
    return [
        Difference(
            tasks=arm.tasks,
            measure=measure,
            difference=summarise(
                [
                    ours - theirs
                    for ours, theirs in zip(
                        arm.values[measure],
                        by_key["Top-k", arm.tasks].values[measure],
                        strict=True,
                    )
                ]
            ),
        )
        for arm in arms
        if arm.gate == "DSelect-k" and ("Top-k", arm.tasks) in by_key
        for measure in MEASURES
    ]


HEADER = ("tasks", "gate", "squared error", "Jaccard index", "active experts", "minutes")


def rows(arms: Sequence[Arm]) -> list[list[str]]:
    """One row for each gate and number of tasks; intervals are of 95 %, over seeds."""
    return [
        [f"{arm.tasks}", arm.gate, *(f"{arm.summary(measure):.4f}" for measure in MEASURES)]
        for arm in sorted(arms, key=lambda arm: arm.tasks)  # gates stay in their order
    ]


def markdown(record: Mapping[str, Any]) -> str:
    """What `write` keeps as tables: all gates, and DSelect-k against Top-k."""
    arms = [build(Arm, arm, "recovery") for arm in record["arms"]]
    against: dict[int, list[str]] = {}
    for found in differences(arms):
        against.setdefault(found.tasks, []).append(f"{found.difference:+.4f}")
    less = [[f"{tasks}", "DSelect-k less Top-k", *cells] for tasks, cells in against.items()]
    return _card_tables.table(HEADER, [*rows(arms), *sorted(less, key=lambda row: int(row[0]))])


def update_readme(readme: Path, path: Path) -> None:
    """Keep what `write` wrote, its figure, and its table between `zoo:recovery` in a README.

    Args:
        readme: record and figure are kept beside it, in `model_cards/recovery`.
        path: of the file that `write` wrote.

    Raises:
        ConfigError: the README lacks the markers; nothing is kept then.
        ZooError: matplotlib is missing.
    """
    home, record = readme.parent / "model_cards" / "recovery", read_json(path)
    _card_tables.fill_file(readme, "recovery", markdown(record))
    home.mkdir(parents=True, exist_ok=True)
    draw([build(Arm, arm, "recovery") for arm in record["arms"]], home / "recovery.png")
    write_json(home / "recovery.json", record)


def draw(arms: Sequence[Arm], path: str | os.PathLike[str]) -> Path:
    """Each of `MEASURES` against the number of tasks, a line for each gate.

    Raises:
        ZooError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ZooError("Figures need matplotlib: pip install 'zoo[figures]'.") from None
    figure = Figure(figsize=(9.0, 7.0), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    gates = list(dict.fromkeys(arm.gate for arm in arms))
    for axes, measure, label in zip(
        panels,
        MEASURES,
        (
            "squared error on noise-free answers",
            "Jaccard index of supports",
            "active experts of a task",
            "minutes of training",
        ),
        strict=True,
    ):
        axes.spines[["top", "right"]].set_visible(False)
        for gate in gates:
            own = sorted((arm for arm in arms if arm.gate == gate), key=lambda arm: arm.tasks)
            summaries = [arm.summary(measure) for arm in own]
            means = [summary.mean for summary in summaries]
            spread = [0.0 if s.interval is None else s.interval[1] - s.mean for s in summaries]
            axes.errorbar([arm.tasks for arm in own], means, spread, marker="o", label=gate)
        counts = sorted({arm.tasks for arm in arms})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, labels=[f"{count}" for count in counts])
        axes.set(xlabel="tasks", ylabel=label)
    panels[0].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
