"""Tests of the figures: what is drawn is checked as numbers, the drawing as files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import SEGMENT, write_recipe
from zoo import cards, checkpoints, figures, hub, training
from zoo.cards import Card
from zoo.errors import DataError, ZooError
from zoo.files import FileRecord


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> training.Run:
    folder = tmp_path_factory.mktemp("figures")
    overrides = ["trainer.max_epochs=2", "trainer.log_every_n_steps=1"]
    return training.fit(write_recipe(folder), overrides, out=folder / "run")


@pytest.fixture
def card(run: training.Run, monkeypatch: pytest.MonkeyPatch) -> Card:
    """The card of a tiny weight, which is found in its run folder."""
    files = tuple(FileRecord.of(p.name, p.read_bytes()) for p in run.checkpoint.iterdir())
    found = dataclasses.replace(cards.find("cached-transformer-lm"), files=files)
    monkeypatch.setattr(hub, "resolve", lambda name: hub.Located(run.checkpoint, found))
    return found


@torch.no_grad()
def naive_losses(run: training.Run, text: list[int], memory: bool) -> list[float]:
    """One byte at a time; positions of whole segments, without the first."""
    network = checkpoints.load(run.checkpoint).network
    whole = (len(text) - 1) // SEGMENT
    sums, state = torch.zeros(SEGMENT, dtype=torch.float64), None
    for index in range(whole * SEGMENT):
        if index % SEGMENT == 0 and not memory:
            state = None
        logits, state = network(torch.tensor([[text[index]]]), state)
        if index >= SEGMENT:
            loss = -logits[0, -1].double().log_softmax(-1)[text[index + 1]]
            sums[index % SEGMENT] += loss
    found: list[float] = (sums / (whole - 1)).tolist()
    return found


@pytest.mark.parametrize("rest", [1, 5, SEGMENT])
@pytest.mark.parametrize("memory", [True, False])
def test_losses_by_position(run: training.Run, memory: bool, rest: int) -> None:
    text = run.datamodule.text[: 4 * SEGMENT + rest]
    module = checkpoints.load(run.checkpoint)
    found = figures.losses_by_position(module, text, memory)
    expected = naive_losses(run, text.tolist(), memory)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_memory_is_what_makes_the_difference(run: training.Run) -> None:
    module = checkpoints.load(run.checkpoint)
    with torch.no_grad():  # a net of a few steps hardly uses its cache
        for parameter in module.network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    text = run.datamodule.text[: 4 * SEGMENT + 1]
    losses = [figures.losses_by_position(module, text, memory) for memory in (True, False)]
    assert not torch.allclose(losses[0], losses[1], rtol=1e-6, atol=0)


def test_a_text_too_short_for_positions(run: training.Run) -> None:
    module = checkpoints.load(run.checkpoint)
    with pytest.raises(DataError, match=rf"The text has {2 * SEGMENT} bytes, too few"):
        figures.losses_by_position(module, run.datamodule.text[: 2 * SEGMENT], True)


def test_metrics_of_an_interrupted_run(tmp_path: Path) -> None:
    parts = {
        "part_0": "epoch,step,train_loss,val_loss\n0,0,5.0,\n0,1,4.5,\n0,1,,4.4\n1,2,9.0,\n",
        "part_2": "epoch,step,train_loss,val_loss\n1,2,4.0,\n1,3,,3.9\n",
        "part_10": "epoch,step,train_loss\n2,3,3.0\n",
    }
    for name, content in parts.items():
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(content)
    assert figures.read_metrics(tmp_path) == {
        "train_loss": [(0, 5.0), (1, 4.5), (2, 4.0), (3, 3.0)],
        "val_loss": [(1, 4.4), (3, 3.9)],
    }


def test_a_run_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"No metrics under .*/logs; is this a run folder\?"):
        figures.read_metrics(tmp_path)


def test_the_mean_of_the_last_few_values() -> None:
    values = tuple(float(i * i % 17) for i in range(40))
    found = figures._smooth(values)
    assert len(found) == len(values)
    for i, value in enumerate(found):
        window = values[max(0, i - 9) : i + 1]
        assert value == pytest.approx(sum(window) / len(window))


def test_drawn_twice_it_is_the_same_file(card: Card, run: training.Run, tmp_path: Path) -> None:
    first = figures.draw(card, run.folder, tmp_path / "a")
    second = figures.draw(card, run.folder, tmp_path / "b")
    assert [path.name for path in first] == ["loss.png", "position.png", "mixing.png"]
    for one, other in zip(first, second, strict=True):
        content = one.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) > 3_000
        assert other.read_bytes() == content


def test_the_folder_of_a_cards_figures(
    card: Card, run: training.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = figures.draw(card, run.folder)
    assert {path.parent for path in paths} == {Path("model_cards/figures") / card.name}
    assert all(path.is_file() for path in paths)


def test_without_matplotlib(
    card: Card, run: training.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ZooError) as caught:
        figures.draw(card, run.folder, tmp_path / "a")
    assert str(caught.value) == "Figures need matplotlib: pip install 'zoo[figures]'."


def test_a_run_that_logged_something_else(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"The run logged no train_loss; there is: other\."):
        figures._loss_curves({"other": [(0, 1.0)]}, tmp_path / "loss.png")
    of_classes = {f"class_accuracy/{i}": [(0, 1.0)] for i in range(1200)}
    with pytest.raises(ZooError, match=r"; there is: class_accuracy/\* \(1,200\), val_accuracy\.$"):
        figures._loss_curves({**of_classes, "val_accuracy": []}, tmp_path / "loss.png")


def test_expert_usage_is_the_logged_weights_in_order_of_experts() -> None:
    metrics = {f"usage_watch_{i}": [(5, i / 66), (9, (11 - i) / 66)] for i in range(12)}
    metrics["usage_rate_0"] = [(5, 1.0)]
    steps, rows = figures.expert_usage(metrics, "watch")
    assert steps == [5, 9]
    assert rows[0] == [i / 66 for i in range(12)], "10 comes after 9, not after 1"
    assert rows[1] == [(11 - i) / 66 for i in range(12)]
    with pytest.raises(ZooError, match="logged no use of experts for buy"):
        figures.expert_usage(metrics, "buy")


def test_loss_curves_of_controls(tmp_path: Path) -> None:
    """Both losses of every seed are needed; steps that only one seed has logged are left out."""
    for seed, losses in (("1", "9,3.0,\n19,,2.0\n"), ("2", "9,5.0,\n19,,4.0\n29,1.0,\n")):
        part = tmp_path / seed / "logs" / "part_0"
        part.mkdir(parents=True)
        (part / "metrics.csv").write_text("step,train_loss,val_loss\n" + losses)
    runs = [tmp_path / "1", tmp_path / "2"]
    path = figures.draw_controls({"model": runs}, "nats", tmp_path / "new" / "controls.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "1" / "logs" / "part_0" / "metrics.csv").write_text("step,train_loss\n9,3.0\n")
    with pytest.raises(ZooError, match="logged no val_loss; there is: train_loss"):
        figures.draw_controls({"model": runs}, "nats", tmp_path / "controls.png")


def test_many_controls_of_unlike_length_can_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {}
    for index in range(12):
        steps = (10, 20) if index else (10, 200)
        part = tmp_path / str(index) / "logs" / "part_0"
        part.mkdir(parents=True)
        losses = "".join(f"{step},3.0,2.0\n" for step in steps)
        (part / "metrics.csv").write_text("step,train_loss,val_loss\n" + losses)
        runs[f"arm {index}"] = [tmp_path / str(index)]
    drawn: list[Any] = []
    original = figures._figure

    @contextmanager
    def watched(path: Path, **size: float) -> Iterator[Any]:
        with original(path, **size) as axes:
            drawn.append(axes)
            yield axes

    monkeypatch.setattr(figures, "_figure", watched)
    figures.draw_controls(runs, "nats", tmp_path / "controls.png")
    few = dict(list(runs.items())[1:4])
    figures.draw_controls(few, "nats", tmp_path / "few.png")
    lines = [line for line in drawn[0].get_lines() if line.get_label().startswith("arm")]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(runs)
    assert [axes.get_xscale() for axes in drawn] == ["log", "linear"]
    # Beside the lines and not over them, where there are many.
    boxes = [axes.get_legend().get_window_extent() for axes in drawn]
    assert boxes[0].x0 >= drawn[0].get_window_extent().x1 - 1
    assert boxes[1].x0 < drawn[1].get_window_extent().x1


def test_a_stream_is_drawn_class_by_class(tmp_path: Path) -> None:
    curves = {
        "class_accuracy/cat": [(2, 0.9), (4, 0.7)],
        "class_accuracy/dog": [(2, 0.0), (4, 0.8)],
        "membership/cat/0": [(4, 0.1)],
        "membership/cat/1": [(4, 0.9)],
        "membership/dog/0": [(4, 0.6)],
        "membership/dog/1": [(4, 0.4)],
    }
    drawn: list[Any] = []
    original = figures._figure

    @contextmanager
    def watched(path: Path, *size: float) -> Iterator[Any]:
        with original(path, *size) as axes:
            drawn.append(axes)
            yield axes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_figure", watched)
        paths = figures._stream(None, tmp_path, curves, tmp_path)
    assert [path.name for path in paths] == ["stream.png", "forgetting.png", "classifiers.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn[0].lines}
    assert lines["cat"] == [90.0, 70.0]
    assert lines["mean of all"] == pytest.approx([45.0, 75.0])
    assert [bar.get_height() for bar in drawn[1].patches] == pytest.approx([20.0, 0.0])
    assert drawn[2].images[0].get_array().tolist() == [[0.1, 0.9], [0.6, 0.4]]
