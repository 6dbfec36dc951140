"""Measure a weight and say whether its recorded numbers come out.

`evaluate` re-measures a checkpoint: the tolerance covers floating point differences between
machines. `reproduce` trains from the recipe first: the tolerance covers the spread over seeds.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import cards, checkpoints, files, hub, training
from zoo.cards import Card, Control, Measurements, Result
from zoo.errors import CheckpointError, ConfigError, DataError, ZooError
from zoo.intervals import (
    RESAMPLES,
    bootstrap_interval,
    few_units_interval,
    wilson_interval,
)
from zoo.provenance import versions

if TYPE_CHECKING:
    from zoo.tasks.base import Measurement, ZooModule

__all__ = [
    "Evaluation",
    "Outcome",
    "command_of",
    "evaluate",
    "evaluate_module",
    "measure",
    "reproduce",
]

FEW_UNITS = 30
"""Sampling units below which resampling them promises too much."""

FLOAT_TOLERANCE = 2e-4
"""How far the same weights may be off on another machine, relative to the value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One metric under one protocol, beside what was recorded for it.

    Attributes:
        protocol: name of the evaluation protocol.
        metric, unit: what was measured.
        value: the metric over all samples.
        n: number of samples, each counted once.
        interval: 95 % interval for the sampling of the `n` samples.
        interval_method: how the interval was computed.
        recorded: the recorded result; None when there is none.
        tolerance: largest difference from the recorded value that passes; None without one.
        split: part of the data set that was measured.
        indistinct: names of controls that differ from the model by no more than the tolerance.
    """

    protocol: str
    metric: str
    unit: str
    value: float
    n: int
    interval: tuple[float, float]
    interval_method: str
    recorded: Result | None = None
    tolerance: float | None = None
    split: str = "validation"
    indistinct: tuple[str, ...] = ()

    @property
    def passed(self) -> bool | None:
        """Whether the recorded value came out, on as many samples; None: nothing recorded."""
        if self.recorded is None or self.tolerance is None:
            return None
        close = abs(self.value - self.recorded.value) <= self.tolerance
        return close and self.n == self.recorded.n

    @property
    def verdict(self) -> str:
        """One word for people."""
        return {True: "reproduced", False: "NOT reproduced", None: "not recorded"}[self.passed]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was measured of one weight; the first outcome is the primary one.

    Attributes:
        name: what was evaluated.
        outcomes: one per protocol.
        diagnostics: figures on robustness, plain JSON; None where they were not asked for.
        missing: recorded results, as protocol and metric, that were not measured.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    diagnostics: dict[str, Any] | None = None
    missing: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there are recorded values and all of them came out."""
        came_out = all(outcome.passed is True for outcome in self.outcomes)
        return came_out and bool(self.outcomes) and not self.missing

    @property
    def value(self) -> float:
        """Value of the primary outcome."""
        return self.outcomes[0].value

    @property
    def n(self) -> int:
        """Samples of the primary outcome."""
        return self.outcomes[0].n

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of the primary outcome."""
        return self.outcomes[0].interval

    @property
    def verdict(self) -> str:
        """Verdict over all outcomes."""
        if all(outcome.passed is None for outcome in self.outcomes):
            return "not recorded"
        if self.missing:
            return f"NOT reproduced: {', '.join(self.missing)} is recorded and was not measured"
        return "reproduced" if self.passed else "NOT reproduced"


def measure(module: ZooModule, datamodule: Any, protocol: str, where: str = "") -> Measurement:
    """What a module measures by a protocol, which is finite: no record can hold anything else.

    Raises:
        ZooError: the module has no such protocol; or the value is NaN or infinite, in a message
            that begins with `where`.
    """
    measurement = module.measure(datamodule, protocol)
    if not math.isfinite(measurement.value):
        raise ZooError(
            f"{where}{protocol}: {measurement.metric} is {measurement.value}. The training has "
            "diverged, or the weights are damaged."
        )
    return measurement


def _interval(measurement: Measurement) -> tuple[tuple[float, float], str]:
    if measurement.kind == "proportion":
        return wilson_interval(float(measurement.sums.sum()), measurement.n), "Wilson"
    sums, counts = measurement.sums.double(), measurement.counts
    if len(counts) == 1:
        return few_units_interval(sums, counts), f"none: there is one {_unit(measurement)}"
    if len(counts) < FEW_UNITS:
        return few_units_interval(sums, counts), f"Student's t over {units(measurement)}"
    interval = bootstrap_interval(sums, counts)
    return interval, f"bootstrap over {units(measurement)}, {RESAMPLES} resamples"


def units(measurement: Measurement) -> str:
    """What is resampled, in words: "10000 images", or blocks of several samples."""
    return f"{len(measurement.counts)} {_unit(measurement)}s"


def _unit(measurement: Measurement) -> str:
    return "block" if bool((measurement.counts != 1).any()) else measurement.unit


def evaluate_module(
    module: ZooModule, datamodule: Any, protocols: Sequence[str] | None = None
) -> tuple[Outcome, ...]:
    """Measure a module on a data module by each of its protocols, or by those named.

    Raises:
        ZooError: the module has no such protocol, or what it computes is not finite.
    """
    module.eval()
    outcomes = []
    for protocol in protocols or module.protocols_on(datamodule):
        measurement = measure(module, datamodule, protocol)
        interval, method = _interval(measurement)
        outcomes.append(
            Outcome(
                protocol=protocol,
                metric=measurement.metric,
                unit=measurement.unit,
                value=measurement.value,
                n=measurement.n,
                interval=interval,
                interval_method=method,
                split=measurement.split,
            )
        )
    return tuple(outcomes)


def evaluate(
    name: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    protocols: Sequence[str] | None = None,
    revision: str | None = None,
    diagnose: bool = False,
) -> Evaluation:
    """Measure a weight again and compare with what is recorded for it.

    Args:
        name: a weight, a checkpoint folder, or a repository on the Hub.
        data_dir: folder to look for the data in first.
        protocols: names of evaluation protocols; None: all of the model's.
        revision: of a repository on the Hub.
        diagnose: also compute the model's diagnostics.

    Raises:
        ZooError: the weight, its data or a protocol is not to be had; or it has no diagnostics.
    """
    folder, card = hub.resolve(name, revision)
    module = checkpoints.load(folder, files=None if card is None else card.files)
    recipe = _recipe(folder)
    datamodule = training.data_module(recipe, data_dir)
    _check_there(recipe, datamodule)
    if diagnose and not module.has_diagnostics:
        module.diagnose(datamodule)  # says that there are none, before anything is measured
    outcomes = evaluate_module(module, datamodule, protocols)
    recorded = _recorded(folder, card)
    compared = tuple(_compare(outcome, recorded) for outcome in outcomes)
    return Evaluation(
        name=card.name if card else str(name),
        outcomes=compared,
        diagnostics=module.diagnose(datamodule) if diagnose else None,
        missing=() if protocols else _missing(compared, recorded),
    )


def reproduce(
    name: str,
    *,
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    record: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Train a weight again from its recipe and say whether its recorded numbers come out.

    Each protocol's tolerance is that of `training.reproduction_tolerance` in the results file; it
    comes from its spread over seeds.

    Args:
        name: a weight of the zoo.
        out: run folder; None: `runs/<name>`.
        overrides: `section.key=value` changes to the recipe; the verdict then says what they did.
        resume: go on with an interrupted run.
        data_dir: folder to look for the data in first.
        record: checkpoint folder whose `results.json` is to tell what came out, and what it cost.

    Raises:
        ConfigError: what is trained with overrides is to be recorded.
        ZooError: the weight has no recorded tolerance, `record` has no results, or training is not
            possible.
    """
    card = cards.find(name)
    if record is not None and overrides:
        raise ConfigError(
            f"Only the recipe as it is can be recorded, without {', '.join(overrides)}."
        )
    if record is not None and read_results(Path(record)) is None:
        raise ZooError(f"{record} has no {files.RESULTS_FILE} to add a reproduction to.")
    tolerances = card.training.get("reproduction_tolerance")
    if not tolerances:
        raise ZooError(f"{card.name} has no recorded spread over seeds to be reproduced within.")
    recipe = training.read_recipe(card.recipe, overrides)
    if data_dir is not None:
        recipe.options.setdefault("data", {})["data_dir"] = os.fspath(data_dir)
    folder = Path("runs") / card.name if out is None else Path(out)
    run = training.fit(recipe, out=folder, resume=resume, longer=False)
    module = checkpoints.load(run.checkpoint)  # what was written, not what is in memory
    outcomes = evaluate_module(module, run.datamodule)
    compared = tuple(
        _among_controls(_compare(o, card.results, tolerances.get(o.protocol)), card.controls)
        for o in outcomes
    )
    missing = _missing(compared, card.results)
    evaluation = Evaluation(name=card.name, outcomes=compared, missing=missing)
    if record is not None:
        _record_reproduction(Path(record), evaluation, folder)
    return evaluation


def _record_reproduction(folder: Path, evaluation: Evaluation, run: Path) -> None:
    """Write what came out of a reproduction beside the facts on the training of a weight."""
    from zoo.configs import to_json

    before = read_results(folder)
    assert before is not None
    reproduction = {
        "command": f"zoo reproduce {evaluation.name}",
        "date": datetime.date.today().isoformat(),
        **training.read_facts(run),
        "outcomes": [
            {
                "protocol": outcome.protocol,
                "metric": outcome.metric,
                "value": outcome.value,
                "recorded": None if outcome.recorded is None else outcome.recorded.value,
                "tolerance": outcome.tolerance,
                "passed": outcome.passed,
            }
            for outcome in evaluation.outcomes
        ],
    }
    facts = {**before.training, "reproduction": reproduction}
    after = dataclasses.replace(before, training=facts)
    files.write_json(folder / files.RESULTS_FILE, to_json(after))


def record(
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    commit: str | None = None,
    diagnose: bool = False,
) -> Evaluation:
    """Evaluate a checkpoint folder and write what came out to its `results.json`.

    Controls, diagnostics, analog measurements and facts on the training that the file already
    holds are kept.

    Args:
        folder: a checkpoint folder.
        name: full name of the weight; None: what its recipe says.
        data_dir: folder to look for the data in first.
        run: run folder that the weight comes from, for the facts on its training.
        commit: commit of this project that trained it; None: what the run says.
        diagnose: compute the model's diagnostics anew.

    Returns:
        What was measured, beside the record that it became.

    Raises:
        ZooError: the folder has no recipe that names a weight, or `run` is no run folder.
    """
    from zoo.configs import to_json

    folder = Path(folder)
    recipe = _recipe(folder)
    weight = name or recipe.weight
    if not weight:
        raise ZooError(f"The recipe in {folder} names no weight; pass its name.")
    before = read_results(folder)
    facts = {} if before is None else dict(before.training)
    if run is not None:
        facts.update(training.read_facts(Path(run)))
    if commit is not None:
        facts["source_commit"] = commit
    evaluation = evaluate(folder, data_dir, diagnose=diagnose)
    seed = recipe.options.get("seed_everything", 0)
    results = tuple(
        as_result(
            outcome,
            recipe,
            seeds=(int(seed),),
            command=command_of(folder, recipe, weight),
            cpu_minutes=facts.get("cpu_minutes"),
            primary=index == 0,
        )
        for index, outcome in enumerate(evaluation.outcomes)
    )
    measurements = Measurements(
        weight=weight,
        results=results,
        controls=() if before is None else before.controls,
        training=facts,
        diagnostics=evaluation.diagnostics or (before.diagnostics if before else {}),
        analog=None if before is None else before.analog,
    )
    files.write_json(folder / files.RESULTS_FILE, to_json(measurements))
    compared = tuple(_compare(outcome, results) for outcome in evaluation.outcomes)
    return dataclasses.replace(evaluation, outcomes=compared)


def _recipe(folder: Path) -> training.Recipe:
    """The recipe in a checkpoint folder, which says what the weight is measured on."""
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no checkpoint folder {folder}; results are written into one, so give its "
            f"path and not a name."
        )
    if not (folder / files.RECIPE_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no {files.RECIPE_FILE}, so the data to measure it on are not known."
        )
    return training.read_recipe(folder / files.RECIPE_FILE)


def _check_there(recipe: training.Recipe, datamodule: Any) -> None:
    """Check that data of the user's own are where they are looked for.

    Raises:
        DataError: they are not; says whose path it is, and what to give.
    """
    path = getattr(datamodule, "path", None)
    if path and not Path(path).expanduser().exists():
        raise DataError(
            f"There is no {path}, which the recipe says this weight was trained on; give as "
            f"--data-dir a folder that has {training.data_name(recipe)!r}."
        )


def command_of(folder: Path, recipe: training.Recipe, weight: str) -> str:
    """The command that measures a weight again.

    One that was fine-tuned is known by its folder, unless the package has it too; of an absolute
    path no more than the end is told.
    """
    card = cards.load_cards().get(weight)
    if recipe.finetune is None or (card is not None and cards.holds(card, folder)):
        return f"zoo evaluate {weight}"
    path, here = folder.absolute(), Path.cwd()
    near = path.relative_to(here) if path.is_relative_to(here) else Path(*path.parts[-2:])
    return f"zoo evaluate {near}"


def read_results(folder: Path) -> Measurements | None:
    """The `results.json` of a checkpoint folder; None when there is none."""
    path = folder / files.RESULTS_FILE
    return cards.read_measurements(path) if path.is_file() else None


def recorded(folder: str | os.PathLike[str]) -> Measurements:
    """The `results.json` of a checkpoint folder, for what is added to it.

    Raises:
        ZooError: there is none; says how to make it.
    """
    results = read_results(Path(folder))
    if results is None:
        raise ZooError(f"{folder} has no results: zoo evaluate {folder} --record")
    return results


def as_result(
    outcome: Outcome,
    recipe: training.Recipe,
    *,
    seeds: tuple[int, ...],
    command: str,
    seed_spread: float | None = None,
    cpu_minutes: float | None = None,
    primary: bool = False,
    measured_with: Mapping[str, str] | None = None,
) -> Result:
    """The record of an outcome: with today's date and the versions it was measured with.

    None: measured now, with those in use.
    """
    return Result(
        metric=outcome.metric,
        value=outcome.value,
        unit=outcome.unit,
        n=outcome.n,
        interval=outcome.interval,
        interval_method=outcome.interval_method,
        seeds=seeds,
        seed_spread=seed_spread,
        tolerance=FLOAT_TOLERANCE * abs(outcome.value),
        protocol=outcome.protocol,
        dataset=training.data_name(recipe),
        split=outcome.split,
        command=command,
        date=datetime.date.today().isoformat(),
        versions=dict(versions() if measured_with is None else measured_with),
        cpu_minutes=cpu_minutes,
        primary=primary,
    )


def _recorded(folder: Path, card: Card | None) -> tuple[Result, ...]:
    if card is not None:
        return card.results
    measurements = read_results(folder)
    return () if measurements is None else measurements.results


def _among_controls(outcome: Outcome, controls: Sequence[Control]) -> Outcome:
    """The outcome, with the controls that a training within the tolerance could as well be of."""
    if outcome.tolerance is None:
        return outcome
    names = [
        control.name
        for control in controls
        if control.result.protocol == outcome.protocol
        and not control.against
        and control.difference is not None
        and abs(control.difference) <= outcome.tolerance
    ]
    return dataclasses.replace(outcome, indistinct=tuple(names))


def _missing(outcomes: Sequence[Outcome], recorded: Sequence[Result]) -> tuple[str, ...]:
    found = {(outcome.protocol, outcome.metric) for outcome in outcomes}
    return tuple(
        f"{result.protocol} ({result.metric})"
        for result in recorded
        if (result.protocol, result.metric) not in found
    )


def _compare(
    outcome: Outcome, recorded: Sequence[Result], tolerance: float | None = None
) -> Outcome:
    for result in recorded:
        if (result.protocol, result.metric) == (outcome.protocol, outcome.metric):
            allowed = result.tolerance if tolerance is None else tolerance
            return dataclasses.replace(outcome, recorded=result, tolerance=allowed)
    return outcome
