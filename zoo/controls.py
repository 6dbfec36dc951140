"""Train the controls of a weight, and say whether the mechanism earned its place.

The controls of a weight are the recipes in `recipes/controls/<weight>/`; the model itself at the
same budget is one of them, the one whose recipe the others are based on. Where that budget is
shorter than the weight's own, there may be two more of full length, of which one says with
`zoo.against` that it is compared with the other. Each is trained with each seed. Runs that are
finished are kept, so the command can be interrupted and repeated, and several of it can work on
different seeds at once.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import _card_tables, cards, evaluation, training
from zoo.cards import Control, shipped_folder
from zoo.configs import build, to_json
from zoo.errors import UnknownNameError, ZooError, nearest
from zoo.files import RESULTS_FILE, WEIGHTS_FILE, read_json, write_json
from zoo.intervals import bootstrap_interval, student_quantile
from zoo.progress import track
from zoo.provenance import made_by, versions

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.tasks.base import Measurement

__all__ = [
    "check_keepable",
    "check_recordable",
    "collect",
    "find_recipes",
    "finished_runs",
    "keep",
    "markdown",
    "paired_difference",
    "record",
    "run",
    "tolerances",
]

_OUTCOME = "outcome.json"
_TIMED_STEPS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Arm:
    """All runs of one control under one protocol."""

    recipe: training.Recipe
    seeds: tuple[int, ...]
    measurements: tuple[Measurement, ...]
    cpu_minutes: float
    parameters: int
    versions: dict[str, str] | None
    """That the runs were measured with; None where one does not say."""

    def mean_sums(self, seeds: Sequence[int]) -> Tensor:
        """Mean over some of the seeds of the sum over each sampling unit."""
        import torch

        chosen = zip(self.seeds, self.measurements, strict=True)
        return torch.stack([m.sums for seed, m in chosen if seed in seeds]).mean(0)


def find_recipes(name: str) -> list[Path]:
    """Recipes of the controls of a weight; the model's own first.

    Raises:
        ZooError: the weight has no controls.
    """
    home = shipped_folder("recipes") / "controls"
    paths = sorted((home / name).glob("*.yaml"))
    if not paths:
        known = [path.name for path in home.glob("*")]
        raise ZooError(
            f"There are no controls for {name!r} under recipes/controls/.{nearest(name, known)}"
        )
    # The recipe that the others are based on is the one that stands alone.
    return sorted(paths, key=lambda path: "\n  base:" in path.read_text(encoding="utf-8"))


def _read_recipes(name: str, overrides: Sequence[str] = ()) -> list[training.Recipe]:
    """Recipes of the controls of a weight; the model's own first.

    Raises:
        UnknownNameError: one is to be compared with a control that is not among them.
        ZooError: the weight has no controls.
    """
    recipes = [training.read_recipe(path, overrides) for path in find_recipes(name)]
    stems = [recipe.path.stem for recipe in recipes]
    for recipe in recipes:
        if recipe.against and recipe.against not in stems:
            raise UnknownNameError(
                f"{recipe.path}: zoo.against names no control of {name}: {recipe.against!r}."
                f"{nearest(recipe.against, stems)} There are: {', '.join(stems)}."
            )
    return recipes


def _full_name(name: str) -> str:
    """The full name of a weight; what is no weight stays, since its recipes may be there."""
    try:
        return cards.find(name).name
    except UnknownNameError:
        return name


def run(
    name: str,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    out: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] | None = None,
    speeds: bool = True,
) -> list[Control]:
    """Train what is missing, and return one `Control` per trained recipe and protocol.

    Controls may have unlike numbers of seeds: each is recorded with all that it was trained with,
    now or before, and differences are between means over the seeds that both have, where there are
    such. Those with no finished run are left out, and so are differences to them; so is a protocol
    that a control cannot be measured by.

    Args:
        name: of a weight, or of an architecture, which means its default weight.
        seeds: the seeds to train with, where that has not been done.
        out: folder of the runs; None: `runs/controls/<name>`.
        overrides: `section.key=value`, applied to every control alike.
        only: names of the recipes to train now, without folder and suffix; None: all.
        speeds: whether to count multiplications and measure the speed of training steps of each,
            both with the weights of its first finished run; `record` needs them.

    Raises:
        UnknownNameError: there is no such recipe.
        ConfigError: a finished run was made with other options.
        ZooError: there are no controls, or a run is not possible.
    """
    name = _full_name(name)
    folder = _folder(name, out)
    recipes = _read_recipes(name, overrides)
    stems = [recipe.path.stem for recipe in recipes]
    for stem in only or ():
        if stem not in stems:
            raise UnknownNameError(
                f"{name} has no control {stem!r}.{nearest(stem, stems)}"
                f" There are: {', '.join(stems)}."
            )
    _check_finished(recipes, folder, overrides)
    jobs = [
        (r, seed)
        for seed in dict.fromkeys(seeds)
        for r in recipes
        if only is None or r.path.stem in only
    ]
    for recipe, seed in track(jobs, "controls"):
        _train(recipe, seed, folder / recipe.path.stem / f"seed_{seed}", overrides)
    trained = [recipe for recipe in recipes if _outcomes(folder / recipe.path.stem)]
    return _collect(name, trained, folder, model=stems[0], speeds=speeds)


def collect(
    name: str,
    *,
    out: str | os.PathLike[str],
    overrides: Sequence[str] = (),
) -> list[Control]:
    """The `Control` records of all finished runs; see `run`.

    Raises:
        ConfigError: a run was made with other options.
        ZooError: a control has no finished run.
    """
    name = _full_name(name)
    recipes = _read_recipes(name, overrides)
    _check_finished(recipes, Path(out), overrides)
    return _collect(name, recipes, Path(out), model=recipes[0].path.stem, speeds=True)


def _collect(
    name: str, recipes: Sequence[training.Recipe], folder: Path, *, model: str, speeds: bool
) -> list[Control]:
    runs = {recipe.path.stem: _load_runs(recipe, folder / recipe.path.stem) for recipe in recipes}
    measured = _speeds(recipes, folder) if speeds else {}
    controls: list[Control] = []
    # The model comes first, so that what it is measured by gives the order.
    stored = [run["measured"] for of_seeds in runs.values() for run in of_seeds.values()]
    for protocol in dict.fromkeys(name for names in stored for name in names):
        arms = {
            recipe.path.stem: _arm(recipe, folder / recipe.path.stem, with_it, protocol)
            for recipe in recipes
            if (
                with_it := {
                    seed: run
                    for seed, run in runs[recipe.path.stem].items()
                    if protocol in run["measured"]
                }
            )
        }
        for stem, arm in arms.items():
            reference = None if stem == model else arms.get(arm.recipe.against or model)
            controls.append(_control(name, arm, protocol, reference, measured))
    return controls


def finished_runs(name: str, out: str | os.PathLike[str] | None = None) -> dict[str, list[Path]]:
    """Run folders of finished controls, by the names of the controls; see `run`.

    Raises:
        ZooError: there are no controls.
    """
    name = _full_name(name)
    folder = _folder(name, out)
    recipes = _read_recipes(name)
    found = {
        recipe.name: [path.parent for path in _outcomes(folder / recipe.path.stem).values()]
        for recipe in recipes
    }
    return {control: runs for control, runs in found.items() if runs}


def check_recordable(
    name: str,
    folder: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    only: Sequence[str] | None = None,
) -> None:
    """Check, before anything is trained or timed, that `record` will take what `run` returns.

    Args:
        name, out, only: as of `run`.
        folder: the checkpoint folder.

    Raises:
        ZooError: there are no controls; or `record` would refuse, and says why.
    """
    name = _full_name(name)
    evaluation.recorded(folder)
    home = _folder(name, out)
    _refuse_missing(
        [
            path.stem
            for path in find_recipes(name)
            if only is not None and path.stem not in only and not _outcomes(home / path.stem)
        ]
    )


def _refuse_missing(stems: Sequence[str], *, any_control: bool = True) -> None:
    if stems or not any_control:
        raise ZooError(
            f"Nothing is recorded: no finished run of {', '.join(stems) or 'any control'}."
        )


def record(controls: Sequence[Control], folder: str | os.PathLike[str]) -> None:
    """Write controls into the `results.json` of a checkpoint folder.

    The spread over seeds of the model at the controls' budget becomes the tolerance of
    `zoo reproduce`, for each protocol its own; see `tolerances`.

    Raises:
        ZooError: the folder has no results yet; write those first. Or a control is missing.
    """
    before = evaluation.recorded(folder)
    known = {control.recipe for control in controls}
    homes = {Path(recipe).parent.name for recipe in known} - {""}
    _refuse_missing(
        [
            path.stem
            for home in sorted(homes)
            for path in find_recipes(home)
            if f"controls/{home}/{path.name}" not in known
        ],
        any_control=bool(known),
    )
    facts = dict(before.training)
    if allowed := tolerances(controls):
        facts["reproduction_tolerance"] = allowed
    measurements = dataclasses.replace(before, controls=tuple(controls), training=facts)
    write_json(Path(folder) / RESULTS_FILE, to_json(measurements))


def check_keepable(name: str, card: str | os.PathLike[str]) -> None:
    """Check, before anything is trained or timed, that `keep` will take what `run` returns.

    Args:
        name, card: as of `keep`.

    Raises:
        ConfigError: the card cannot be read, or lacks the markers.
        ZooError: the controls are those of a weight.
    """
    if _full_name(name) in cards.load_cards():
        raise ZooError(
            f"{name} is a weight; the controls of a weight are kept with --record FOLDER."
        )
    _card_tables.check_file(Path(card), name)


def keep(
    name: str, controls: Sequence[Control], card: str | os.PathLike[str], command: str = ""
) -> Path:
    """Keep controls that belong to no weight, and write their table into a card.

    Args:
        name: folder of their recipes under `recipes/controls/`; the table is written between the
            card's markers `zoo:<name>`.
        controls: what `run` returned.
        card: a Markdown file; the record is written to `controls/<name>.json` beside it.
        command: that they were trained with, for the record.

    Returns:
        The file of the record.

    Raises:
        ConfigError: the card cannot be read, or lacks the markers; nothing is written then.
        ZooError: the controls are those of a weight, or there are none.
    """
    check_keepable(name, card)
    _refuse_missing([], any_control=bool(controls))
    content = {
        **made_by(command),
        "controls": [to_json(control) for control in controls],
    }
    path = Path(card).parent / "controls" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    _card_tables.fill_file(Path(card), name, markdown(content))
    return path


def markdown(content: Mapping[str, Any]) -> str:
    """What `keep` keeps, as a table."""
    found = [build(Control, control, "controls") for control in content["controls"]]
    return _card_tables.controls_table(found)


def tolerances(controls: Sequence[Control]) -> dict[str, float]:
    """Protocol -> how far apart two trainings of the model may come out, 95 times in 100.

    The difference of two trainings has the variance of both, which is known from few seeds: so it
    is Student's quantile times the root of two times the standard deviation over seeds.

    Args:
        controls: of a weight, the model first.
    """
    return {
        control.result.protocol: student_quantile(len(control.result.seeds) - 1)
        * math.sqrt(2)
        * control.result.seed_spread
        for control in controls
        # Another than the model has no difference where there is nothing to compare it with.
        if control.recipe == controls[0].recipe and control.result.seed_spread is not None
    }


def _folder(name: str, out: str | os.PathLike[str] | None) -> Path:
    """Where the runs of a weight's controls are."""
    return Path("runs/controls") / name if out is None else Path(out)


def _seeded(recipe: training.Recipe, seed: int, overrides: Sequence[str]) -> training.Recipe:
    return training.read_recipe(
        recipe.path, [*overrides, f"seed_everything={seed}", f"data.seed={seed}"]
    )


def _check_finished(
    recipes: Sequence[training.Recipe], folder: Path, overrides: Sequence[str]
) -> None:
    """Check that all finished runs, of whatever seed, are of these recipes and overrides."""
    for recipe in recipes:
        for seed, path in _outcomes(folder / recipe.path.stem).items():
            training.check_finished(_seeded(recipe, seed, overrides), path.parent)


def _train(recipe: training.Recipe, seed: int, folder: Path, overrides: Sequence[str]) -> None:
    if (folder / _OUTCOME).is_file():
        return
    done = training.fit(_seeded(recipe, seed, overrides), out=folder, resume=True, longer=False)
    measured = {}
    for protocol in done.module.protocols_on(done.datamodule):
        measurement = evaluation.measure(done.module, done.datamodule, protocol, f"{folder}: ")
        measured[protocol] = {
            "metric": measurement.metric,
            "unit": measurement.unit,
            "kind": measurement.kind,
            "split": measurement.split,
            "sums": measurement.sums.tolist(),
            "counts": measurement.counts.tolist(),
        }
    facts = {"cpu_minutes": done.cpu_minutes, "versions": versions()}
    write_json(folder / _OUTCOME, {**facts, "measured": measured})
    # A trainer and its module hold each other and few objects of many bytes, which the garbage
    # collector would leave until the next runs need the memory.
    del done
    gc.collect()


def _outcomes(folder: Path) -> dict[int, Path]:
    """What the finished runs of a control have written, by their seeds in order."""
    found = {
        int(path.parent.name.removeprefix("seed_")): path
        for path in folder.glob(f"seed_*/{_OUTCOME}")
    }
    return dict(sorted(found.items()))


def _load_runs(recipe: training.Recipe, folder: Path) -> dict[int, dict[str, Any]]:
    """What the finished runs of a control have written, by their seeds in order.

    Raises:
        ZooError: there is none.
    """
    paths = _outcomes(folder)
    if not paths:
        raise ZooError(f"There is no finished run of {recipe.path.stem} in {folder}.")
    return {seed: read_json(path) for seed, path in paths.items()}


def _arm(
    recipe: training.Recipe, folder: Path, runs: dict[int, dict[str, Any]], protocol: str
) -> _Arm:
    import torch

    from zoo.tasks.base import Measurement

    measurements, minutes = [], 0.0
    for stored in runs.values():
        one: dict[str, Any] = stored["measured"][protocol]
        measurements.append(
            Measurement(
                metric=one["metric"],
                unit=one["unit"],
                kind=one["kind"],
                split=one.get("split", "validation"),
                sums=torch.tensor(one["sums"], dtype=torch.float64),
                counts=torch.tensor(one["counts"]),
            )
        )
        minutes += float(stored["cpu_minutes"])
    return _Arm(
        recipe=recipe,
        seeds=tuple(runs),
        measurements=tuple(measurements),
        cpu_minutes=minutes,
        parameters=_parameters(folder / f"seed_{max(runs)}" / "checkpoint" / WEIGHTS_FILE),
        versions=_joined([stored.get("versions") for stored in runs.values()]),
    )


def _joined(found: Sequence[dict[str, str] | None]) -> dict[str, str] | None:
    """Versions of all runs, where each says which: several of one library beside each other."""
    known = [of_run for of_run in found if of_run is not None]
    if len(known) < len(found):
        return None
    names = dict.fromkeys(name for of_run in known for name in of_run)
    return {
        name: ", ".join(dict.fromkeys(of_run[name] for of_run in known if name in of_run))
        for name in names
    }


def _parameters(weights: Path) -> int:
    """As stored with a finished run: a network may have grown in training."""
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        return int(file.metadata()["parameters"])


def paired_difference(a: Tensor, b: Tensor, counts: Tensor) -> tuple[float, tuple[float, float]]:
    """Difference a - b of a metric on the same sampling units, with a paired bootstrap interval.

    Args:
        a, b: sum over each unit, under the two models.
        counts: samples per unit.
    """
    difference = a - b
    value = float(difference.sum() / counts.sum())
    return value, bootstrap_interval(difference, counts)


def _control(
    name: str,
    arm: _Arm,
    protocol: str,
    reference: _Arm | None,
    speeds: dict[Path, tuple[int, float]],
) -> Control:
    first = arm.measurements[0]
    values = [m.value for m in arm.measurements]
    outcome = evaluation.Outcome(
        protocol=protocol,
        metric=first.metric,
        unit=first.unit,
        value=statistics.fmean(values),
        n=first.n,
        interval=bootstrap_interval(arm.mean_sums(arm.seeds), first.counts),
        interval_method=f"bootstrap over {evaluation.units(first)} of the mean over seeds",
        split=first.split,
    )
    result = evaluation.as_result(
        outcome,
        arm.recipe,
        seeds=arm.seeds,
        seed_spread=statistics.stdev(values) if len(values) > 1 else None,
        command=f"zoo controls {name}",
        cpu_minutes=arm.cpu_minutes,
        measured_with=arm.versions,
    )
    difference, interval = None, None
    if reference is not None:
        # A seed is easy or hard for both, so that means over unlike ones differ by themselves.
        common = [seed for seed in arm.seeds if seed in reference.seeds]
        ours, theirs = (a.mean_sums(common or a.seeds) for a in (arm, reference))
        difference, interval = paired_difference(ours, theirs, first.counts)
    macs, speed = speeds.get(arm.recipe.path, (None, None))
    return Control(
        name=arm.recipe.name,
        differs=arm.recipe.differs,
        recipe=f"controls/{name}/{arm.recipe.path.name}",
        parameters=arm.parameters,
        macs=macs,
        speed="" if speed is None else f"{speed:,.0f} samples/s",
        result=result,
        difference=difference,
        difference_interval=interval,
        against=reference.recipe.name if reference is not None and arm.recipe.against else "",
        values=tuple(values),
    )


def _speeds(recipes: Sequence[training.Recipe], folder: Path) -> dict[Path, tuple[int, float]]:
    """MACs per sample and training samples per second of each recipe, as it is once trained.

    Each has the weights of its first finished run: a gate that has converged skips experts, a
    solver takes other steps than at the start, and a net may have grown. The recipes take turns, so
    that a machine whose speed drifts treats them alike; eager mode and the median of a few steps,
    so that the figure needs no compiler.
    """
    import warnings

    import torch

    from zoo import checkpoints

    built = {}
    times: dict[Path, list[float]] = {recipe.path: [] for recipe in recipes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # among others, that there is no trainer to log to
        for recipe in recipes:
            path = next(iter(_outcomes(folder / recipe.path.stem).values()))
            trained = checkpoints.load(path.parent / "checkpoint")
            model = {**recipe.options.get("model", {}), "network": to_json(trained.config)}
            cli = training.instantiate(
                dataclasses.replace(recipe, options={**recipe.options, "model": model}),
                logger=False,
                enable_progress_bar=False,
            )
            weights = trained.network.state_dict()
            for network in (cli.model.network, cli.model.published_network):
                network.load_state_dict(weights)
            cli.datamodule.setup("fit")
            batch = next(iter(cli.datamodule.train_dataloader()))
            built[recipe.path] = (cli.model.train(), batch, cli.trainer.precision_plugin)
        for _ in range(_TIMED_STEPS + 1):
            for path, (module, batch, precision) in built.items():
                start = time.perf_counter()
                with precision.forward_context():
                    loss = module.training_step(batch, 0)
                torch.autograd.backward(loss)
                times[path].append(time.perf_counter() - start)
    return {
        path: (
            module.macs(batch),
            module.samples(batch) / statistics.median(times[path][1:]),
        )
        for path, (module, batch, _) in built.items()
    }
