"""Figures of a card, drawn from what a run has left behind and from the weight itself.

Needs matplotlib: `pip install zoo[figures]`.
"""

from __future__ import annotations

import csv
import functools
import operator
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import checkpoints, evaluation, hub, training
from zoo.cards import Card
from zoo.errors import DataError, ZooError

if TYPE_CHECKING:
    from zoo.analog import AnalogSweep

__all__ = [
    "draw",
    "draw_analog",
    "draw_controls",
    "expert_usage",
    "loss_unit",
    "losses_by_position",
    "prepare",
    "read_metrics",
]

_WINDOW = 10
_FEW_CLASSES = 20

Metrics = dict[str, list[tuple[int, float]]]
"""Logged values by name, as (step, value)."""


def draw(
    card: Card, run: str | os.PathLike[str] | None = None, out: Path | None = None
) -> list[Path]:
    """Draw all figures that the task of a card has.

    Args:
        card: the weight.
        run: run folder of its training; None leaves out the curves of what was logged.
        out: folder to write to; None: `model_cards/figures/<name>`.

    Returns:
        Paths of the PNG files.

    Raises:
        ZooError: matplotlib is missing, or the run folder has no metrics.
    """
    out = Path("model_cards/figures") / card.name if out is None else out
    metrics = {} if run is None else read_metrics(Path(run))
    folder, _ = hub.resolve(card.name)
    module = checkpoints.load(folder, files=card.files)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    if run is not None and card.task not in _WITHOUT_LOSS:
        paths.append(_loss_curves(metrics, out / "loss.png", *_LOSS.get(card.task, ())))
    for drawer in _DRAWERS.get(card.task, ()):
        paths += drawer(module, folder, metrics, out)
    return paths


def prepare(out: Path) -> None:
    """Make the folder of figures; to be called before what takes long and is drawn afterwards.

    Raises:
        ZooError: matplotlib is missing.
        OSError: there can be no such folder.
    """
    _figure_class()
    out.mkdir(parents=True, exist_ok=True)


def draw_analog(sweeps: Sequence[AnalogSweep], out: Path) -> list[Path]:
    """Accuracy over precision at the least noise, and over noise at the highest precision.

    Args:
        sweeps: one line each; bars are the spread over draws of the noise.
        out: folder to write to.

    Returns:
        Paths of the PNG files.

    Raises:
        ZooError: matplotlib is missing.
    """
    prepare(out)
    paths = []
    for over, fixed, best, label in (
        ("bits", "noise", min, "bits: 2^bits levels per unit"),
        ("noise", "bits", max, "noise: error probability"),
    ):
        at = best(getattr(result, fixed) for one in sweeps for result in one.results)
        paths.append(out / f"analog_{over}.png")
        with _figure(paths[-1]) as axes:
            for one in sweeps:
                line = sorted(
                    (getattr(r, over), r.mean, r.spread or 0.0)
                    for r in one.results
                    if getattr(r, fixed) == at
                )
                places, means, spreads = zip(*line, strict=True)
                axes.errorbar(places, means, yerr=spreads, marker="o", capsize=2, label=one.name)
            axes.set(xlabel=label, ylabel="accuracy", title=f"{fixed} {at:g}")
            axes.legend(frameon=False)
    return paths


def loss_unit(task: str) -> str:
    """Unit of the loss that a task logs."""
    return _LOSS.get(task, ("nats", ""))[0]


_BESIDE_LINES = 6
"""Controls that a legend has room for among the lines."""


def draw_controls(arms: Mapping[str, Sequence[Path]], unit: str, path: Path) -> Path:
    """Loss curves of controls: the mean over seeds, training as lines, validation as points.

    Args:
        arms: name of each control -> run folders of its seeds.
        unit: of the loss, for the axis.
        path: PNG file to write.

    Returns:
        `path`.

    Raises:
        ZooError: matplotlib is missing, or a run folder has no metrics.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    many = len(arms) > _BESIDE_LINES
    with _figure(path, width=9.0 if many else 6.0) as axes:
        tops, lengths = [], []
        for index, (name, runs) in enumerate(arms.items()):
            metrics = [read_metrics(run) for run in runs]
            for loss in ("train_loss", "val_loss"):
                logged = [dict(_series(one, loss)) for one in metrics]
                steps = sorted(functools.reduce(operator.and_, (one.keys() for one in logged)))
                means = [statistics.fmean(one[step] for one in logged) for step in steps]
                if loss == "train_loss":
                    label = f"{name}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
                    smooth = _smooth(tuple(means))
                    # Colours come again after ten.
                    style = "--" if index >= 10 else "-"
                    (line,) = axes.plot(steps, smooth, style, label=label)
                    lengths.append(steps[-1])
                    # Smoothed labels, dropout: it may end far above the loss in validation.
                    tops.append(smooth[len(smooth) // 4])
                else:
                    axes.plot(steps, means, "o", color=line.get_color())
                    tops.append(means[0])
        axes.set(xlabel="step", ylabel=unit)
        # The first steps fall from far above and would flatten all that follows.
        axes.set_ylim(top=1.2 * max(tops))
        if max(lengths) > 5 * min(lengths):
            axes.set_xscale("log")  # else the short ones are too small to see
        outside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}
        axes.legend(frameon=False, **outside)
    return path


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ZooError("Figures need matplotlib: pip install 'zoo[figures]'.") from None
    return Figure


@contextmanager
def _figure(path: Path, width: float = 6.0, height: float = 3.5) -> Iterator[Any]:
    """An axes to draw on, saved to `path` at the end."""
    figure = _figure_class()(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    # No date or version in the file: drawn twice, it is the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def read_metrics(run: Path) -> Metrics:
    """Logged values of a run by name, as (step, value), over all its interruptions.

    Raises:
        ZooError: there are none.
    """
    series: dict[str, dict[int, float]] = {}
    parts = sorted(run.glob("logs/part_*/metrics.csv"), key=lambda p: int(p.parent.name[5:]))
    for part in parts:
        with part.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if value and key not in ("step", "epoch"):
                        # A step that was logged again after a resume replaces the first one.
                        series.setdefault(key, {})[int(row["step"])] = float(value)
    if not series:
        raise ZooError(f"No metrics under {run}/logs; is this a run folder?")
    return {key: sorted(values.items()) for key, values in series.items()}


def _series(metrics: Metrics, name: str) -> list[tuple[int, float]]:
    if name not in metrics:
        raise ZooError(f"The run logged no {name}; there is: {', '.join(_listed(metrics))}.")
    return metrics[name]


def _listed(metrics: Metrics) -> list[str]:
    """Names of metrics, those of many classes or parts as one."""
    groups: dict[str, list[str]] = {}
    for name in metrics:
        groups.setdefault(name.partition("/")[0], []).append(name)
    return [
        names[0] if len(names) == 1 else f"{group}/* ({len(names):,})"
        for group, names in groups.items()
    ]


def _loss_curves(
    metrics: Metrics, path: Path, unit: str = "nats", validation: str = "validation"
) -> Path:
    with _figure(path) as axes:
        for name, label in (("train_loss", "training"), ("val_loss", validation)):
            steps, values = zip(*_series(metrics, name), strict=True)
            if name == "train_loss":
                values = _smooth(values)
            axes.plot(steps, values, label=label)
        # The first steps fall from far above and would flatten all that follows.
        axes.set(xlabel="step", ylabel=unit)
        axes.set_ylim(top=1.2 * metrics["val_loss"][0][1])
        axes.legend(frameon=False)
    return path


def _smooth(values: tuple[float, ...]) -> tuple[float, ...]:
    """Mean of the last few values."""
    return tuple(
        sum(values[max(0, i + 1 - _WINDOW) : i + 1]) / min(i + 1, _WINDOW)
        for i in range(len(values))
    )


def losses_by_position(module: Any, text: Any, memory: bool) -> Any:
    """Mean loss at each position of a segment, with the memory carried along or without.

    The first segment and the incomplete last one are left out.

    Args:
        module: a language model.
        text: bytes.
        memory: carry the state from segment to segment.

    Returns:
        One value per position, nats.

    Raises:
        DataError: the text has no two whole segments and a byte after them.
    """
    import torch

    segment, rows, state = module.config.segment, [], None
    tokens = text.long()
    with torch.no_grad():
        for start in range(0, len(tokens) - segment, segment):
            piece = tokens[None, start : start + segment + 1].to(module.device)
            losses, new = module._losses(piece, state)
            state = new if memory else None
            if start:
                rows.append(losses[0].double().cpu())
    if not rows:
        raise DataError(
            f"The text has {len(tokens)} bytes, too few for losses by position in a second "
            f"segment of {segment}."
        )
    return torch.stack(rows).mean(0)


def _by_position(module: Any, text: Any, path: Path) -> Path:
    width = min(8, module.config.segment)
    with _figure(path) as axes:
        for memory, label in ((False, "without memory"), (True, "with memory")):
            values = losses_by_position(module, text, memory)
            values = values[: len(values) // width * width].view(-1, width).mean(1)
            axes.plot([width * (i + 0.5) for i in range(len(values))], values, label=label)
        axes.set(xlabel="position in the segment", ylabel="nats per character")
        axes.legend(frameon=False)
    return path


def _mixing(weights: Any, path: Path) -> Path:
    values = weights.detach().tolist()
    with _figure(path, 5.0, 3.0) as axes:
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for layer, row in enumerate(values):
            for head, value in enumerate(row):
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color="white")
        axes.set(xlabel="head", ylabel="layer", title="weight of cached attention")
        axes.set_xticks(range(len(values[0])))
        axes.set_yticks(range(len(values)))
        axes.figure.colorbar(image, ax=axes)
    return path


def _language_model(module: Any, folder: Path, metrics: Metrics, out: Path) -> list[Path]:
    datamodule = training.data_module(training.read_recipe(folder / "recipe.yaml"))
    datamodule.setup()
    paths = [_by_position(module, datamodule.validation_text, out / "position.png")]
    if module.network.mixing_weights is not None:
        paths.append(_mixing(module.network.mixing_weights, out / "mixing.png"))
    return paths


def _accuracy(module: Any, folder: Path, metrics: Metrics, out: Path) -> list[Path]:
    if not metrics:
        return []
    path = out / "accuracy.png"
    with _figure(path) as axes:
        for name, label in (("val_accuracy", "top 1"), ("val_top5_accuracy", "top 5")):
            if name in metrics:
                steps, values = zip(*metrics[name], strict=True)
                axes.plot(steps, [100 * value for value in values], label=label)
        axes.set(xlabel="step", ylabel="accuracy, %")
        axes.legend(frameon=False)
    return [path]


def _solvers(module: Any, folder: Path, metrics: Metrics, out: Path) -> list[Path]:
    """Of a network with ODE blocks: evaluations over training, and the metric under solvers."""
    paths = []
    if "nfe" in metrics:
        paths.append(out / "evaluations.png")
        with _figure(paths[-1]) as axes:
            for name, label in (("nfe", "forward"), ("nfe_backward", "backward, beside those")):
                if name in metrics:
                    axes.plot(*zip(*metrics[name], strict=True), label=label)
            axes.set(xlabel="step", ylabel="evaluations of the field")
            axes.legend(frameon=False)
    measured = evaluation.read_results(folder)
    curve = [] if measured is None else measured.diagnostics.get("solver_curve", [])
    by_solver: dict[str, list[tuple[int, float]]] = {}
    for entry in curve:
        if "value" in entry:
            by_solver.setdefault(entry["solver"], []).append((entry["nfe"], entry["value"]))
    if by_solver:
        paths.append(out / "solvers.png")
        with _figure(paths[-1]) as axes:
            for solver, points in by_solver.items():
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=solver)
            axes.set(xlabel="evaluations of the field", ylabel=next(iter(module.protocols)))
            axes.set_xscale("log", base=2)
            axes.legend(frameon=False)
    return paths


def _trajectories(module: Any, folder: Path, metrics: Metrics, out: Path) -> list[Path]:
    """A few test spirals: the truth, what is observed, and draws of what follows."""
    from zoo.data.spirals import SPACING, WINDOW

    datamodule = training.data_module(training.read_recipe(folder / "recipe.yaml"))
    spirals, path = datamodule.test, out / "trajectories.png"
    times = [(i + 1) * SPACING for i in range(2 * WINDOW)]
    with _figure(path, 5.0, 5.0) as axes:
        for index in range(4):
            pair = (spirals.times[index], spirals.values[index])
            (found,) = module.predict(pair, times, draws=5, seed=0)
            for drawn in found.draws:
                axes.plot(*drawn.T.tolist(), color="C0", alpha=0.3, linewidth=1)
            axes.plot(*spirals.truth[index].T.tolist(), color="black", linewidth=1)
            axes.scatter(*spirals.values[index].T.tolist(), color="C1", s=4, zorder=3)
        axes.set_aspect("equal")
    return [path]


def _densities(module: Any, folder: Path, metrics: Metrics, out: Path) -> list[Path]:
    """Each density of a flow over the plane, with points drawn from it."""
    import torch

    from zoo.data.densities import DENSITIES

    axis, paths = torch.linspace(-4, 4, 161), []
    grid = torch.cartesian_prod(axis, axis)
    for name in DENSITIES:
        paths.append(out / f"{name}.png")
        density = module.predict(grid, name).exp().view(161, 161)
        with _figure(paths[-1], 4.0, 4.0) as axes:
            axes.imshow(density.T.tolist(), origin="lower", extent=(-4, 4, -4, 4), cmap="viridis")
            axes.scatter(*module.sample(name, 300, seed=0).T.tolist(), color="white", s=1)
            axes.set(title=name, xlim=(-4, 4), ylim=(-4, 4))
    return paths


def expert_usage(metrics: Metrics, task: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and at each step the mean weight of each expert for a task.

    Raises:
        ZooError: none was logged.
    """
    names = sorted(
        (name for name in metrics if name.startswith(f"usage_{task}_")),
        key=lambda name: int(name.rpartition("_")[2]),
    )
    if not names:
        raise ZooError(f"The run logged no use of experts for {task}.")
    steps = [step for step, _ in metrics[names[0]]]
    series = [[value for _, value in metrics[name]] for name in names]
    return steps, [list(row) for row in zip(*series, strict=True)]


def _experts(module: Any, folder: Path, metrics: Metrics, out: Path) -> list[Path]:
    if not metrics:
        return []
    paths = []
    for task in module.task_names:
        steps, rows = expert_usage(metrics, task)
        path = out / f"experts-{task}.png"
        with _figure(path) as axes:
            labels = [f"{index}" for index in range(len(rows[0]))]
            axes.stackplot(steps, *zip(*rows, strict=True), labels=labels)
            axes.set(xlabel="step", ylabel=f"weight of experts, {task}", ylim=(0, 1))
            axes.legend(frameon=False, title="expert", loc="upper left", bbox_to_anchor=(1, 1))
        paths.append(path)
    return paths


def _stream(module: Any, folder: Path, metrics: Metrics, out: Path) -> list[Path]:
    """Accuracy of each class over a stream, what was forgotten of it, and what it selects."""
    if not metrics:
        return []
    curves = _by_name(metrics, "class_accuracy/")
    paths = [out / "stream.png", out / "forgetting.png"]
    with _figure(paths[0]) as axes:
        steps = [step for step, _ in next(iter(curves.values()))]
        few = len(curves) <= _FEW_CLASSES
        for name, curve in curves.items():
            label = name if few else None
            axes.plot(steps, [100 * value for _, value in curve], lw=1, alpha=0.7, label=label)
        columns = zip(*([value for _, value in curve] for curve in curves.values()), strict=True)
        means = [100 * statistics.fmean(column) for column in columns]
        axes.plot(steps, means, "ko-", label="mean of all")
        axes.set(xlabel="batches learned", ylabel="accuracy, %")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    with _figure(paths[1]) as axes:
        values = [[value for _, value in curve] for curve in curves.values()]
        lost = [100 * (max(column) - column[-1]) for column in values]
        axes.bar(list(curves) if few else range(len(curves)), lost)
        axes.set(xlabel="class", ylabel="best accuracy minus last, points")
        axes.tick_params(axis="x", labelrotation=45 if few else 0)
    selected = _by_name(metrics, "membership/")
    if selected:
        paths.append(out / "classifiers.png")
        rows: dict[str, list[float]] = {}
        for key, series in selected.items():
            rows.setdefault(key.rsplit("/", 1)[0], []).append(series[-1][1])
        with _figure(paths[-1]) as axes:
            image = axes.imshow(list(rows.values()), aspect="auto", interpolation="nearest")
            axes.set(xlabel="classifier", ylabel="class")
            if few:
                axes.set_yticks(range(len(rows)), list(rows))
            axes.figure.colorbar(image, label="mean membership, test set")
    return paths


def _by_name(metrics: Metrics, prefix: str) -> Metrics:
    return {
        key.removeprefix(prefix): series
        for key, series in metrics.items()
        if key.startswith(prefix)
    }


Drawer = Callable[[Any, Path, Metrics, Path], list[Path]]

_LOSS: dict[str, tuple[str, str]] = {
    "density-estimation": ("nats per point", "test points"),
    "language-modeling": ("nats per character", "validation (blocks)"),
    "recommendation": ("weighed loss of both tasks", "validation, one drawn item for each rated"),
    "trajectory-forecasting": ("nats per observation", "test spirals"),
}
"""Task -> unit of the loss, and what it is validated on."""

_WITHOUT_LOSS = ("online-learning", "online-text-learning")
"""Tasks that learn without one."""

_DRAWERS: dict[str, tuple[Drawer, ...]] = {
    "density-estimation": (_densities, _solvers),
    "image-classification": (_accuracy, _solvers),
    "image-pair-classification": (_experts,),
    "language-modeling": (_language_model,),
    "online-learning": (_stream,),
    "online-text-learning": (_stream,),
    "recommendation": (_experts,),
    "trajectory-forecasting": (_trajectories, _solvers),
}
"""Task -> what draws its further figures, of module, checkpoint folder, metrics, output folder."""
