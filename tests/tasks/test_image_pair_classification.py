"""Tests of zoo.tasks.image_pairs, on a tiny network through the whole of the zoo."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import zoo
from tests.pairs import HELD_OUT, PICTURES, write_pictures
from zoo import checkpoints, evaluation, intervals, training
from zoo.data.image_pairs import ImagePairDataModule, compose
from zoo.data.pictures import ImagePreprocessing
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.dselect_k import ImagePairConfig
from zoo.figures import read_metrics
from zoo.tasks.image_pairs import ImagePairClassifier

PREPROCESSING = ImagePreprocessing(
    size=(36, 36), channels=1, mean=(0.2,), std=(0.3,), classes=tuple("0123456789")
)
NETWORK: dict[str, Any] = {
    "num_experts": 4,
    "channels": [4],
    "expert_widths": [16],
    "tower_widths": [16],
    "gate": {"kind": "dselect-k", "k": 2, "entropy": 0.01},
}


def write_recipe(folder: Path) -> Path:
    values = {
        "zoo": {"architecture": "dselect-k-moe", "data": "image-pairs"},
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 25,
            "enable_model_summary": False,
        },
        "model": {"network": NETWORK, "optimizer": {"lr": 0.01, "warmup_steps": 3}},
        "data": {
            "dataset": "multi-mnist",
            "holdout": HELD_OUT,
            "batch_size": 20,
            "redraw": True,
            "data_dir": str(folder),
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[training.Run]:
    folder = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        write_pictures(folder, patch)
        yield training.fit(write_recipe(folder), out=folder / "run")


@pytest.fixture
def model(run: training.Run) -> Any:
    return checkpoints.load(run.checkpoint)


def untrained(**network: Any) -> ImagePairClassifier:
    return ImagePairClassifier(ImagePairConfig(**network), preprocessing=PREPROCESSING).eval()


def test_training_learns_both_pictures(run: training.Run) -> None:
    values = {
        protocol: run.module.measure(run.datamodule, protocol).value
        for protocol in run.module.protocols
    }
    # Ten classes: chance is 0.1.
    assert values["top-left"] > 0.5
    assert values["bottom-right"] > 0.5
    assert values["test"] == pytest.approx((values["top-left"] + values["bottom-right"]) / 2)


def test_evaluation_counts_every_canvas_once_for_each_task(run: training.Run) -> None:
    outcomes = evaluation.evaluate(run.checkpoint).outcomes
    assert [o.protocol for o in outcomes] == ["test", "top-left", "bottom-right"]
    assert [o.n for o in outcomes] == [4 * PICTURES, 2 * PICTURES, 2 * PICTURES]
    batch = run.datamodule.pairs("test").batch(torch.arange(2 * PICTURES))
    model: Any = checkpoints.load(run.checkpoint)
    with torch.no_grad():
        answers = model.network(batch.images).outputs.argmax(-1)
    for outcome, task in zip(outcomes[1:], (0, 1), strict=True):
        right = int((answers[:, task] == batch.labels[:, task]).sum())
        assert outcome.value == pytest.approx(right / (2 * PICTURES))
        assert outcome.interval == intervals.wilson_interval(right, 2 * PICTURES)


def test_predictions_are_names_of_both_pictures(run: training.Run, model: Any) -> None:
    pictures = run.datamodule.pictures.test_images
    canvases = compose(pictures[:5], pictures[5:10])
    with torch.no_grad():
        logits = model.network(model.preprocessing.normalise(canvases)).outputs
    for given in (canvases, canvases[:, 0], canvases.numpy()):
        for row, prediction in enumerate(model.predict(given)):
            best = logits[row].softmax(-1).max(-1)
            assert prediction.labels == tuple(str(int(i)) for i in best.indices)
            assert prediction.probabilities == pytest.approx(best.values.tolist())
    one = model.predict((canvases[0, 0].clamp(max=1) * 255).to(torch.uint8))
    assert len(one) == 1


def write_own_pictures(folder: Path) -> Path:
    """Pictures of three classes with names of their own, each bright in rows of its own."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for row, name in enumerate(("cat", "dog", "fox")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 60, (28, 28), dtype=np.uint8)
                pixels[9 * row : 9 * row + 4] = 250
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return folder


def test_other_classes_get_a_fresh_head_and_their_names(run: training.Run, tmp_path: Path) -> None:
    """That head is the one that `zoo.load` makes for as many classes."""
    own = write_own_pictures(tmp_path / "own")
    data = ImagePairDataModule(path=str(own), holdout=6, batch_size=20)
    options: dict[str, Any] = {"epochs": 1, "accelerator": "cpu", "progress_bar": False}
    tuned: Any = zoo.finetune(
        run.checkpoint, data, out=tmp_path / "run", freeze="encoder", lr=1e-9, **options
    )
    assert tuned.preprocessing.classes == ("cat", "dog", "fox")
    base = zoo.load(run.checkpoint).preprocessing
    assert (tuned.preprocessing.mean, tuned.preprocessing.std) == (base.mean, base.std)
    fresh = ImagePairDataModule(path=str(own), holdout=6)
    assert fresh.preprocessing.mean != base.mean, "what is kept is not what the data have"
    assert set(tuned.predict(torch.zeros(36, 36))[0].labels) <= {"cat", "dog", "fox"}
    (measured, *_) = tuned.finetuned.after
    assert (measured.protocol, measured.n) == ("test", 2 * 2 * 18)
    loaded: Any = zoo.load(tuned.finetuned.checkpoint)
    assert loaded.measure(fresh, "test").value == pytest.approx(measured.value)
    assert fresh.preprocessing == loaded.preprocessing, "canvases are normalised as in training"
    head = zoo.load(run.checkpoint, num_classes=3, seed=0).network.state_dict()
    for name, tensor in loaded.network.state_dict().items():
        # At such a learning rate nothing moves far.
        torch.testing.assert_close(tensor, head[name], rtol=0.0, atol=1e-6)
    other = ImagePairDataModule(path=str(own), holdout=6, size=20)
    message = r"have 28 pixels a side, .* for 36: set model\.network\.size=28 or data\.size=28$"
    with pytest.raises(ConfigError, match=message):
        loaded.measure(other, "test")
    with pytest.raises(ConfigError, match=message):
        zoo.finetune(run.checkpoint, other, out=tmp_path / "other", **options)


def test_what_the_gates_do_is_logged_over_the_training(run: training.Run) -> None:
    metrics = read_metrics(run.folder)
    for task in ("top-left", "bottom-right"):
        assert 1 <= metrics[f"active_{task}"][-1][1] <= 4
        assert 0 <= metrics[f"saturated_{task}"][-1][1] <= 1
        total = sum(metrics[f"usage_{task}_{i}"][-1][1] for i in range(4))
        assert total == pytest.approx(1, abs=1e-5)
    mean = sum(metrics[f"active_{task}"][-1][1] for task in ("top-left", "bottom-right")) / 2
    assert metrics["active"][-1][1] == pytest.approx(mean)


def test_the_loss_is_the_sum_of_both_tasks() -> None:
    module = untrained()
    logits, labels = torch.randn(3, 2, 10), torch.randint(0, 10, (3, 2))
    expected = 0.0
    for b in range(3):
        for t in range(2):
            row = logits[b, t]
            expected += math.log(float(row.exp().sum())) - float(row[labels[b, t]])
    from zoo.tasks.image_pairs import _cross_entropy

    assert float(_cross_entropy(logits, labels)) == pytest.approx(expected / 3, rel=1e-5)
    assert module.task_names == ("top-left", "bottom-right")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(28, 28), r"shape \(28, 28\) is no canvas: expected 36 x 36"),
        (torch.zeros(1, 3, 36, 36), "is no canvas"),
        (torch.full((36, 36), 3.0), "go from 0 to 2"),
        (torch.full((36, 36), float("nan")), "go from 0 to 2"),
        (torch.zeros(36, 36, dtype=torch.int64), "must be uint8 or floating point"),
        (torch.zeros(0, 36, 36), "no canvases"),
        ("picture.png", "takes arrays and tensors, got str"),
    ],
)
def test_bad_canvases_have_one_clear_line(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        untrained().predict(given)
    assert "\n" not in str(caught.value)


def test_what_comes_of_damaged_weights_has_no_name() -> None:
    module = untrained()
    assert module.predict(np.zeros((36, 36), ">f4")) == module.predict(torch.zeros(36, 36))
    with torch.no_grad():
        next(module.network.parameters()).fill_(math.nan)
    with pytest.raises(ZooError, match=r"^The model's logits are not finite: its training"):
        module.predict(torch.zeros(36, 36))


def test_other_bad_input_has_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="num_tasks must be 2"):
        untrained(num_tasks=3)
    with pytest.raises(ConfigError, match=r"10 classes.*set model\.network\.num_classes=10"):
        untrained(num_classes=5)
    with pytest.raises(ZooError, match="does not know what its images are"):
        ImagePairClassifier().predict(torch.zeros(36, 36))
    with pytest.raises(ZooError, match="Unknown protocol 'ndcg'; choose one of test"):
        untrained().measure(None, "ndcg")  # type: ignore[arg-type]
