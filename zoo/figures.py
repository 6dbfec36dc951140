"""Figures of a card, drawn from what a run has left behind and from the weight itself.

Needs matplotlib: `pip install zoo[figures]`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo import checkpoints, hub, training
from zoo.cards import Card
from zoo.errors import DataError, ZooError

__all__ = ["draw", "losses_by_position", "read_metrics"]

_WINDOW = 10

Metrics = dict[str, list[tuple[int, float]]]
"""Logged values by name, as (step, value)."""


def draw(card: Card, run: str | os.PathLike[str], out: Path | None = None) -> list[Path]:
    """Draw all figures that the task of a card has.

    Args:
        card: the weight.
        run: run folder of its training, for the loss curves.
        out: folder to write to; None: `model_cards/figures/<name>`.

    Returns:
        Paths of the PNG files.

    Raises:
        ZooError: matplotlib is missing, or the run folder has no metrics.
    """
    out = Path("model_cards/figures") / card.name if out is None else out
    metrics = read_metrics(Path(run))
    folder, _ = hub.resolve(card.name)
    module = checkpoints.load(folder, files=card.files)
    out.mkdir(parents=True, exist_ok=True)
    paths = [_loss_curves(metrics, out / "loss.png", *_LOSS.get(card.task, ()))]
    for drawer in _DRAWERS.get(card.task, ()):
        paths += drawer(module, folder, metrics, out)
    return paths


@contextmanager
def _figure(path: Path, width: float = 6.0, height: float = 3.5) -> Iterator[Any]:
    """An axes to draw on, saved to `path` at the end."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ZooError("Figures need matplotlib: pip install 'zoo[figures]'.") from None
    figure = Figure(figsize=(width, height), layout="constrained")
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


def _loss_curves(
    metrics: Metrics, path: Path, unit: str = "nats", validation: str = "validation"
) -> Path:
    with _figure(path) as axes:
        for name, label in (("train_loss", "training"), ("val_loss", validation)):
            if name not in metrics:
                raise ZooError(f"The run logged no {name}; there is: {', '.join(metrics)}.")
            steps, values = zip(*metrics[name], strict=True)
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
    path = out / "accuracy.png"
    with _figure(path) as axes:
        for name, label in (("val_accuracy", "top 1"), ("val_top5_accuracy", "top 5")):
            if name in metrics:
                steps, values = zip(*metrics[name], strict=True)
                axes.plot(steps, [100 * value for value in values], label=label)
        axes.set(xlabel="step", ylabel="accuracy, %")
        axes.legend(frameon=False)
    return [path]


Drawer = Callable[[Any, Path, Metrics, Path], list[Path]]

_LOSS: dict[str, tuple[str, str]] = {
    "language-modeling": ("nats per character", "validation (blocks)")
}
"""Task -> unit of the loss, and what it is validated on."""

_DRAWERS: dict[str, tuple[Drawer, ...]] = {
    "image-classification": (_accuracy,),
    "language-modeling": (_language_model,),
}
"""Task -> what draws its further figures, of module, checkpoint folder, metrics, output folder."""
