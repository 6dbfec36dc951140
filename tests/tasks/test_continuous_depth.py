"""Tests of the tasks with a solver inside: the knob, training, measures, predictions, diagnoses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import zoo
from tests import tiny
from tests.tiny_images import CLASSES, SIZE, write_folder
from zoo import _card_tables, cards, checkpoints, training
from zoo.data.augmentation import ImageBatch
from zoo.data.densities import DENSITIES, DensityDataModule
from zoo.data.pictures import ImagePreprocessing
from zoo.data.spirals import SPACING, WINDOW, SpiralDataModule
from zoo.errors import ConfigError, DataError, SolverError, UnknownNameError, ZooError
from zoo.families.continuous_depth import ODEResNetConfig, SolverConfig
from zoo.families.continuous_depth.flows import FlowConfig
from zoo.families.continuous_depth.trajectories import HORIZON, TrajectoryConfig
from zoo.figures import read_metrics
from zoo.tasks.continuous_depth import ODEResNetClassifier
from zoo.tasks.density import DensityModel
from zoo.tasks.trajectories import TrajectoryModel

NETWORK = ODEResNetConfig(num_classes=3, in_channels=3, widths=(4, 6), hidden=5, nodes=2)
PREPROCESSING = ImagePreprocessing(
    size=SIZE, channels=3, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2), classes=CLASSES
)


def classifier(**options: Any) -> ODEResNetClassifier:
    torch.manual_seed(0)
    return ODEResNetClassifier(NETWORK, preprocessing=PREPROCESSING, **options).eval()


def write(folder: Path, values: dict[str, Any]) -> Path:
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 1, "trainer": trainer, **values}))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> training.Run:
    """A classifier on made images, trained by the adjoint of an adaptive solver."""
    folder = tmp_path_factory.mktemp("ode")
    write_folder(folder / "images")
    values = {
        "zoo": {"architecture": "ode-resnet", "data": "images", "weight": "ode-resnet.made"},
        "model": {
            "ema_decay": 0.5,
            "network": {
                "num_classes": 3,
                "in_channels": 3,
                "widths": [4, 6],
                "solver": {"method": "dopri5", "tolerance": 0.01, "gradient": "adjoint"},
            },
            "optimizer": {"lr": 0.02, "warmup_steps": 0, "weight_decay": 0.0},
        },
        "data": {"path": str(folder / "images"), "size": list(SIZE), "batch_size": 12},
    }
    return training.fit(write(folder, values), out=folder / "run")


# ------------------------------------------------------------------------------ the classifier


def test_training_logs_evaluations_forward_and_backward(run: training.Run) -> None:
    metrics = read_metrics(run.folder)
    assert min(v for _, v in metrics["nfe"]) >= 8
    assert min(v for _, v in metrics["nfe_backward"]) >= 8


def test_the_solver_comes_with_the_weight_and_the_knob_changes_it(run: training.Run) -> None:
    model = checkpoints.load(run.checkpoint)
    assert (model.solver, model.tolerance, model.gradient_mode) == ("dopri5", 0.01, "adjoint")
    images = torch.rand(2, 3, *SIZE)
    before = model.predict(images)
    assert model.nfe > 0
    model.tolerance = 1e-6
    tight = model.predict(images)
    assert model.nfe > 8
    model.solver = "rk4"
    model.steps = 32
    assert model.nfe == 128
    fixed = model.predict(images)
    assert model.nfe == 128
    for one, other in zip(fixed, tight, strict=True):
        assert one.classes == other.classes
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-3)
    assert len(before) == 2
    overridden = checkpoints.load(run.checkpoint, solver={"method": "euler", "steps": 2})
    assert (overridden.solver, overridden.nfe) == ("euler", 2)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("solver", "rk5", "no solver 'rk5'.*There are: euler"),
        ("steps", 0, "at least 1, got 0"),
        ("tolerance", -1.0, "must be positive"),
        ("gradient_mode", "no", "gradient must be one of 'discrete'"),
        ("error_control", "no", "error_control must be one of 'batch'"),
        ("max_nfe", 2.5, "max_nfe must be an integer, got 2.5"),
        ("tolerance", "x", "tolerance must be a number, got 'x'"),
    ],
)
def test_a_wrong_knob_is_one_line(attribute: str, value: Any, message: str) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        setattr(classifier(), attribute, value)
    assert "\n" not in str(caught.value)


def test_the_knob_reaches_the_average_of_the_weights() -> None:
    model = classifier(ema_decay=0.9)
    model.solver, model.steps = "rk4", 3
    for network in (model.network, model.published_network):
        assert [b.solver.method for b in network.ode_blocks()] == ["rk4"]
    assert model.nfe == 12
    with model.another_solver(method="euler", steps=1):
        assert model.nfe == 1
    for network in (model.network, model.published_network):
        assert [(b.solver.method, b.solver.steps) for b in network.ode_blocks()] == [("rk4", 3)]


def test_the_knob_reaches_the_error_control_and_the_cap() -> None:
    model = classifier(ema_decay=0.9)
    assert (model.error_control, model.max_nfe) == ("batch", 10_000)
    model.solver, model.error_control, model.max_nfe = "dopri5", "each_sample", 400
    for network in (model.network, model.published_network):
        (solver,) = (b.solver for b in network.ode_blocks())
        assert (solver.error_control, solver.max_nfe) == ("each_sample", 400)
    model.max_nfe = 5
    with pytest.raises(SolverError, match="cap of max_nfe=5"):
        model.predict(torch.rand(2, 3, *SIZE))


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_the_shipped_classifier_with_an_adaptive_solver_in_float16(method: str) -> None:
    """Against the same weights in float32, with each error control."""
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    half = zoo.load("ode-resnet.mnist", dtype=torch.float16)
    full = zoo.load("ode-resnet.mnist")
    assert isinstance(half, ODEResNetClassifier)
    assert isinstance(full, ODEResNetClassifier)
    for control in ("batch", "worst_sample", "each_sample"):
        for model in (half, full):
            model.solver, model.error_control = method, control
        found = [model.predict(images) for model in (half, full)]
        for one, other in zip(*found, strict=True):
            assert one.label == other.label
            assert one.probabilities[0] == pytest.approx(other.probabilities[0], abs=0.01)


def test_training_draws_the_number_of_steps(tmp_path: Path, run: training.Run) -> None:
    values = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    options = {
        "zoo": values["zoo"],
        "model": {
            "train_steps": [1, 2, 5],
            "network": {"num_classes": 3, "in_channels": 3, "widths": [4, 6]},
            "ema_decay": 0.5,
        },
        "data": values["data"],
    }
    runs = []
    for name, epochs in (("whole", 4), ("halves", 2), ("halves", 4)):
        options["trainer"] = {"max_epochs": epochs, "accelerator": "cpu", "log_every_n_steps": 1}
        path = write(tmp_path, options)
        runs.append(training.fit(path, out=tmp_path / name, resume=True))
    whole, _, halves = runs
    drawn = [[nfe for _, nfe in read_metrics(r.folder)["nfe"]] for r in (whole, halves)]
    assert {nfe / min(drawn[0]) for nfe in drawn[0]} == {1.0, 2.0, 5.0}
    assert drawn[0] == drawn[1], "a resumed run draws what the whole one does"
    assert whole.module.steps == ODEResNetConfig().solver.steps


def test_the_loss_of_a_batch_is_that_of_its_drawn_steps() -> None:
    model = classifier(train_steps=(3,)).train()
    batch = ImageBatch(torch.rand(4, 3, *SIZE), torch.tensor([0, 1, 2, 0]))
    plain = classifier().train()
    plain.steps = 3
    expected = torch.nn.functional.cross_entropy(plain.network(batch.images), batch.targets)
    model.log = lambda *arguments, **options: None  # type: ignore[method-assign]
    assert float(model.training_step(batch, 0)) == pytest.approx(float(expected), rel=1e-6)
    assert model.network.nfe == plain.network.nfe
    assert model.steps == NETWORK.solver.steps != 3


@pytest.mark.parametrize(
    ("network", "steps", "message"),
    [
        (NETWORK, (2, 0), r"train_steps must all be at least 1, got \[2, 0\]"),
        (dataclasses.replace(NETWORK, body="none"), (2,), "needs an ODE .*; got body 'none'"),
        (
            dataclasses.replace(NETWORK, solver=SolverConfig(method="dopri5")),
            (2,),
            "a solver of fixed steps, one of euler, .* with 'dopri5'",
        ),
    ],
)
def test_steps_that_cannot_be_drawn(
    network: ODEResNetConfig, steps: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ODEResNetClassifier(network, train_steps=steps)


def test_a_control_without_ode_has_no_knob_and_no_diagnosis() -> None:
    config = ODEResNetConfig(num_classes=3, in_channels=3, widths=(4, 6), body="none")
    model = ODEResNetClassifier(config, preprocessing=PREPROCESSING)
    with pytest.raises(ConfigError, match="no ODE block"):
        model.solver = "rk4"
    with pytest.raises(ConfigError, match="no ODE block"):
        _ = model.nfe


def test_evaluate_diagnoses_and_records(run: training.Run, monkeypatch: Any) -> None:
    monkeypatch.setattr("zoo.tasks.continuous_depth._TOLERANCES", (1e-2, 1e-3))
    # The products of the first one, two, ... maps take time with the square of their number.
    monkeypatch.setattr("zoo.families.continuous_depth.diagnostics.ADAPTIVE_STEPS", 4)
    said = tiny.run("evaluate", run.checkpoint, "--record", "--diagnose", "--json")
    assert said.status == 0, said.err
    stored = json.loads((run.checkpoint / "results.json").read_text())["diagnostics"]
    curve = stored["solver_curve"]
    assert curve[0]["solver"] == "dopri5"
    assert curve[0]["value"] == said.json["outcomes"][0]["value"]
    assert all(0.0 <= entry["value"] <= 1.0 for entry in curve)
    # More evaluations for tighter tolerances, and as many as counted for fixed steps.
    assert curve[-1]["nfe"] >= curve[-2]["nfe"]
    euler = next(entry for entry in curve if entry["solver"] == "euler")
    assert euler["nfe"] == euler["steps"]
    (block,) = stored["blocks"]
    assert (block["method"], block["steps"], len(block["product_gain"])) == ("rk4", 4, 4)
    assert stored["lipschitz"]["lower"] <= stored["lipschitz"]["lower_with_midpoints"]
    assert stored["batch_invariance"]["trained"] >= 0.0
    assert stored["refinement"]["verdict"].split(":")[0] in (
        "an ODE",
        "a residual network in disguise",
    )
    # A card that has a place for them shows them, of whatever task.
    card = dataclasses.replace(
        cards.find("ode-resnet.mnist"),
        body="".join(
            f"<!-- zoo:{name} -->\n<!-- /zoo:{name} -->\n"
            for name in ("results", "reported", "controls", "files", "diagnostics")
        ),
    )
    shown = _card_tables.fill_all(card, stored).partition("<!-- zoo:diagnostics -->")[2]
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ").split(",")[0] for row in rows[2 : 2 + len(curve)]] == [
        entry["solver"] for entry in curve
    ]
    assert [int(row[2]) for row in rows[2 : 2 + len(curve)]] == [entry["nfe"] for entry in curve]
    assert f"{curve[0]['value']:.5f}" in rows[2][3]
    assert stored["refinement"]["verdict"] in shown
    assert f"{stored['lipschitz']['lower_with_midpoints']:.1f}" in shown
    at = next(index for index, row in enumerate(rows) if "Gradient of block" in row[0])
    gradient = rows[at + 2]
    growth = block["gradient_variances"][-1] / block["gradient_variances"][0]
    assert [float(cell.strip(" |")) for cell in gradient[1:]] == pytest.approx(
        [*block["gradient_cosines"][:2], growth, block["estimator_ratio"]], rel=0.01, abs=1e-3
    )
    del block["estimator_ratio"]  # as in results of before
    assert "Gradient of" not in _card_tables.fill_all(card, stored)
    stored = json.loads((run.checkpoint / "results.json").read_text())["diagnostics"]
    assert "None." in _card_tables.fill_all(card).partition("<!-- zoo:diagnostics -->")[2]
    # A second record without --diagnose keeps what is known.
    assert tiny.run("evaluate", run.checkpoint, "--record").status == 0
    again = json.loads((run.checkpoint / "results.json").read_text())["diagnostics"]
    assert again == stored


@pytest.mark.parametrize(
    ("solver", "refined"),
    [
        (SolverConfig(method="midpoint", steps=2), {1e-4, 1e-5}),
        (SolverConfig(method="dopri5", tolerance=1e-2), {1e-3, 1e-4, 1e-5}),
        (SolverConfig(method="adaptive_heun", tolerance=1e-4), {1e-5}),
        (SolverConfig(method="implicit_adams", steps=4, tolerance=1e-2), {1e-4, 1e-5}),
    ],
)
def test_tolerances_that_count_as_refined(solver: SolverConfig, refined: set[float]) -> None:
    model = ODEResNetClassifier(
        dataclasses.replace(NETWORK, solver=solver), preprocessing=PREPROCESSING
    )
    # What is measured does not matter here.
    model.measure = lambda datamodule, protocol: SimpleNamespace(value=0.5)  # type: ignore[method-assign, assignment, return-value]
    curve = model.solver_curve(None)  # type: ignore[arg-type]
    adaptive = [e for e in curve[1:] if "tolerance" in e and e["solver"] == "dopri5"]
    assert {e["tolerance"] for e in adaptive if e["refined"]} == refined
    assert len(adaptive) == 5


def test_the_lipschitz_bound_is_told_the_deviation_of_each_channel(monkeypatch: Any) -> None:
    from zoo.tasks import continuous_depth

    given = []

    def bounds(network: Any, images: Any, scale: Any, shape: Any) -> SolverConfig:
        given.append(scale)
        return SolverConfig()  # any configuration, to be stored

    monkeypatch.setattr(continuous_depth, "input_lipschitz", bounds)
    monkeypatch.setattr(continuous_depth.TaskSolverKnob, "diagnose", lambda *arguments: {})
    model = classifier()
    model.preprocessing = dataclasses.replace(PREPROCESSING, std=(0.5, 0.1, 0.25))
    images = torch.randn(2, 3, *SIZE)
    model._diagnosed_images = lambda datamodule: images  # type: ignore[method-assign]
    model.diagnose(None)  # type: ignore[arg-type]
    assert given == [pytest.approx([2.0, 10.0, 4.0])]


def test_the_refinement_report_tells_a_flow_from_a_residual_network() -> None:
    """A metric that is the first logit: with a strong field Euler's steps matter, a weak one's
    do not."""

    class Datamodule:
        pass

    model = classifier()
    model.solver, model.steps = "euler", 2
    images = torch.randn(4, 3, *SIZE)

    class Measured:
        def __init__(self, value: float) -> None:
            self.value = value

    def measure(datamodule: Any, protocol: str) -> Measured:
        with torch.no_grad():
            return Measured(float(model.network(images)[0, 0]))

    model.measure = measure  # type: ignore[method-assign, assignment]
    model.block_states = lambda datamodule: []  # type: ignore[method-assign]
    verdicts = []
    for scale in (0.0, 3.0):
        with torch.no_grad():
            for block in model.network.ode_blocks():
                block.field.conv2.weight.normal_().mul_(scale)
        report = super(ODEResNetClassifier, model).diagnose(Datamodule())  # type: ignore[arg-type]
        verdicts.append(report["refinement"]["verdict"])
        assert (report["refinement"]["spread"] > 0.002) == (scale > 0)
    assert verdicts[0].startswith("an ODE")
    assert verdicts[1].startswith("a residual network in disguise")


# ---------------------------------------------------------------------------------- trajectories


def trajectories(**changes: Any) -> TrajectoryModel:
    torch.manual_seed(0)
    return TrajectoryModel(TrajectoryConfig(**changes)).eval()


@pytest.mark.parametrize("kind", ["latent_ode", "rnn"])
def test_a_trajectory_model_goes_round(kind: str, tmp_path: Path) -> None:
    values = {
        "zoo": {"architecture": "latent-ode", "data": "spirals", "weight": "latent-ode.made"},
        "model": {
            "network": {"kind": kind, "hidden": 4, "recurrent": 5},
            "optimizer": {"lr": 0.01, "warmup_steps": 0, "weight_decay": 0.0},
        },
        "data": {"observations": 6, "count": 16, "batch_size": 8},
    }
    run = training.fit(write(tmp_path, values), out=tmp_path / "run")
    model = checkpoints.load(run.checkpoint)
    measured = model.measure(run.datamodule, "extrapolation")
    spirals = run.datamodule.test
    at = [(WINDOW + i + 1) * SPACING for i in range(WINDOW)]
    (one,) = model.predict((spirals.times[3], spirals.values[3]), at)
    error = (one.mean - spirals.truth[3, WINDOW:]).square().mean().sqrt()
    assert float(measured.sums[3]) == pytest.approx(float(error), rel=1e-5)
    assert (measured.n, measured.metric, measured.split) == (16, "rmse", "test")
    metrics = read_metrics(run.folder)
    if kind == "latent_ode":  # two stages for each interval of the window
        assert {nfe for _, nfe in metrics["nfe"]} == {2 * WINDOW}
        assert {nfe for _, nfe in metrics["nfe_backward"]} == {0}
    else:
        assert not {"nfe", "nfe_backward"} & set(metrics)


def test_predictions_are_points_and_draws_at_any_times() -> None:
    model = trajectories()
    times, values = [0.1, 0.5, 0.9], [[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]]
    at = [0.0, 0.3, 2.0]
    (found,) = model.predict((times, values), at, draws=5, seed=3)
    assert found.mean.shape == (3, 2)
    assert found.draws.shape == (5, 3, 2)
    (again,) = model.predict((times, values), at, draws=5, seed=3)
    assert torch.equal(found.draws, again.draws)
    assert len({tuple(d.flatten().tolist()) for d in found.draws}) == 5
    assert model.predict((times, values), [0.3])[0].draws.shape == (0, 1, 2)
    several = model.predict([(times, values), (times[:2], values[:2])])
    assert [e.mean.shape for e in several] == [(HORIZON, 2)] * 2
    assert [e.times[0] for e in several] == pytest.approx([0.92, 0.52])
    model.solver, model.tolerance = "dopri5", 1e-6
    torch.testing.assert_close(
        found.mean, model.predict((times, values), at)[0].mean, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.1], [[0.0, 1.0]], [1.0]), DataError, "at least two observations"),
        (([0.1, 0.2], [[0.0, 1.0]], [1.0]), DataError, r"N x 2 values, got \(2,\)"),
        (([0.2, 0.1], [[0.0, 1.0]] * 2, [1.0]), DataError, "must be increasing"),
        (([-0.2, 0.1], [[0.0, 1.0]] * 2, [1.0]), DataError, "from 0 on"),
        (([0.1, 0.2], [[0.0, math.nan]] * 2, [1.0]), DataError, "must be finite"),
        (([0.1, 0.2], [[0.0, 1.0]] * 2, []), DataError, "one time to predict"),
        (([0.1, 0.2], [[0.0, 1.0]] * 2, "soon"), DataError, "Times to predict must be numbers"),
        (([0.1, 0.2], [["a", "b"]] * 2, [1.0]), DataError, "Observations must be numbers, got"),
        (
            (["0.1", "0.2"], [[0.0, 1.0]] * 2, [1.0]),
            DataError,
            "Times of observations must be numbers, got '0.1'",
        ),
        ((3.0, 4.0, [1.0]), DataError, "pairs of times and values, got 3.0"),
        (([0.1, 0.2], [[0.0, 1.0]] * 2, [1.0, 0.5]), ZooError, "increasing from 0 on"),
        (([0.1, 0.2], [[0.0, 1.0]] * 2, [1e6]), SolverError, "more than max_nfe=10000 intervals"),
    ],
)
def test_wrong_observations_are_refused(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        trajectories().predict(arguments[:2], arguments[2])


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ("a", "seed must be a whole number, got 'a'"),
        (1.5, "seed must be a whole number, got 1.5"),
        (True, "seed must be a whole number, got True"),
        (2**64, "seed must be at most"),
    ],
)
def test_wrong_seeds_are_refused(seed: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trajectories().predict(([0.1, 0.2], [[0.0, 1.0]] * 2), [1.0], draws=1, seed=seed)
    with pytest.raises(ConfigError, match=message):
        densities().sample("moons", 2, seed=seed)
    assert torch.equal(
        densities().sample("moons", 2, seed=-1), densities().sample("moons", 2, seed=-1)
    )


def test_no_trajectories_are_refused() -> None:
    with pytest.raises(DataError, match="got no trajectories"):
        trajectories().predict([])


def test_pairs_come_in_lists_and_tuples() -> None:
    model = trajectories()
    one = ([0.1, 0.5], [[0.0, 1.0], [1.0, 0.0]])
    (expected,) = model.predict(one)
    for given in ([*one], tuple(map(torch.tensor, one)), [one], (one,), (one, one), ([*one],) * 2):
        for found in model.predict(given):  # type: ignore[arg-type]
            assert torch.equal(found.mean, expected.mean)
    assert len(model.predict((one, one))) == 2
    for draws, message in ((1.5, "a whole number, got 1.5"), (-1, "at least 0, got -1")):
        with pytest.raises(ConfigError, match=f"draws must be {message}"):
            model.predict(one, draws=draws)  # type: ignore[arg-type]


def test_the_recurrent_network_says_what_it_cannot_do() -> None:
    model = trajectories(kind="rnn")
    observed = ([0.1, 0.2], [[0.0, 1.0]] * 2)
    with pytest.raises(ZooError, match="no latent state to draw"):
        model.predict(observed, [1.0], draws=2)
    with pytest.raises(ZooError, match="onwards only"):
        model.predict(observed, [0.15])
    with pytest.raises(ZooError, match="no ODE block"):
        model.solver = "rk4"
    with pytest.raises(ConfigError, match="compile=false"):
        TrajectoryModel(compile=True)


def test_a_latent_ode_is_diagnosed_over_the_time_that_is_predicted() -> None:
    model = trajectories()
    data = SpiralDataModule(observations=5, count=6)
    ((block, states),) = model.block_states(data)
    assert states.shape == (6, 4)
    assert block.interval == (0.0, 2 * WINDOW * SPACING)
    assert block.field is model.network.flow.field


@pytest.mark.parametrize("kind", ["latent_ode", "rnn"])
def test_a_trajectory_model_is_used_in_any_precision(kind: str) -> None:
    data = SpiralDataModule(observations=5, count=6)
    model = trajectories(kind=kind)
    expected = model.measure(data, "extrapolation").value
    model.to(torch.bfloat16)
    assert model.measure(data, "extrapolation").value == pytest.approx(expected, rel=0.05)
    if kind == "latent_ode":
        ((block, states),) = model.block_states(data)
        assert block(states).dtype == torch.bfloat16


def test_a_trajectory_model_is_diagnosed_where_it_is() -> None:
    """The meta device stands for any that the data is not on."""
    model = trajectories().to("meta")
    ((_, states),) = model.block_states(SpiralDataModule(observations=5, count=6))
    assert states.device.type == "meta"


# --------------------------------------------------------------------------------------- flows


def densities(**changes: Any) -> DensityModel:
    torch.manual_seed(0)
    return DensityModel(FlowConfig(conditions=6, hidden=6, couplings=2, **changes)).eval()


@pytest.mark.parametrize("kind", ["continuous", "coupling"])
def test_a_flow_goes_round_and_learns(kind: str, tmp_path: Path) -> None:
    values = {
        "zoo": {"architecture": "continuous-flow", "data": "densities", "weight": "flow.made"},
        "model": {
            "network": {"kind": kind, "conditions": 6, "hidden": 12, "couplings": 2},
            "optimizer": {"lr": 0.02, "warmup_steps": 0, "weight_decay": 0.0},
        },
        "data": {"batch_size": 60, "steps": 15, "test_points": 50},
    }
    run = training.fit(write(tmp_path, values), out=tmp_path / "run")
    model = checkpoints.load(run.checkpoint)
    measured = model.measure(run.datamodule, "all")
    assert measured.n == 300
    parts = [model.measure(run.datamodule, name) for name in DENSITIES]
    assert measured.value == pytest.approx(sum(p.value for p in parts) / 6)
    points = run.datamodule.test_set("circles")
    assert parts[1].value == pytest.approx(-float(model.predict(points, "circles").mean()))
    fresh = densities(kind=kind).measure(run.datamodule, "all").value
    assert measured.value < fresh - 0.05
    metrics = read_metrics(run.folder)
    if kind == "continuous":  # four stages in each of 16 steps
        assert {nfe for _, nfe in metrics["nfe"]} == {64}
        assert {nfe for _, nfe in metrics["nfe_backward"]} == {0}
    else:
        assert not {"nfe", "nfe_backward"} & set(metrics)


def test_samples_are_repeatable_and_follow_the_density() -> None:
    model = densities()
    points = model.sample("moons", 500, seed=2)
    assert torch.equal(points, model.sample("moons", 500, seed=2))
    assert not torch.equal(points, model.sample("moons", 500, seed=3))
    # Untrained, the flow is the standard normal density.
    assert float(points.std()) == pytest.approx(1.0, abs=0.1)


def test_mass_tells_a_density_from_a_number_that_coarse_steps_made() -> None:
    model = densities()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.normal_()
    model.solver = "rk4"
    errors = {}
    for steps in (1, 4, 16):
        model.steps = steps
        errors[steps] = abs(model.mass("moons", extent=10.0, cells=100) - 1.0)
    assert errors[1] > 0.05
    assert errors[4] < errors[1] / 10
    assert errors[16] < 1e-4


@pytest.mark.parametrize("kind", ["continuous", "coupling"])
def test_mass_of_a_standard_normal_density(kind: str) -> None:
    # Within a square of side 2: the square of the mass within one standard deviation.
    model = densities(kind=kind)
    assert model.mass("moons") == pytest.approx(1.0, abs=1e-5)
    assert model.mass("moons", extent=1.0) == pytest.approx(math.erf(0.5**0.5) ** 2, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.mass("moons", cells=0), ConfigError, "cells must be at least 1, got 0"),
        (
            lambda m: m.mass("moons", cells=1.5),
            ConfigError,
            "cells must be a whole number, got 1.5",
        ),
        (lambda m: m.mass("moons", extent="a"), ConfigError, "extent must be a number, got 'a'"),
        (
            lambda m: m.mass("moons", extent=0.0),
            ConfigError,
            "extent must be positive and finite, got 0.0",
        ),
        (lambda m: m.mass("moons", extent=math.inf), ConfigError, "extent must be positive"),
        (lambda m: m.mass(None), UnknownNameError, "No density None. The flow knows: moons"),
        (lambda m: m.sample(["moons"], 3), UnknownNameError, r"No density \['moons'\]"),
        (lambda m: m.sample("moons", 2.5), ConfigError, "n must be a whole number, got 2.5"),
        (lambda m: m.sample("moons", "5"), ConfigError, "n must be a whole number, got '5'"),
        (lambda m: m.sample("moons", True), ConfigError, "n must be a whole number, got True"),
        (lambda m: m.sample("moons", None), ConfigError, "n must be a whole number, got None"),
        (lambda m: m.predict("abc"), DataError, "Points must be numbers, got 'abc'"),
        (lambda m: m.predict(None), DataError, "Points must be numbers, got None"),
        (lambda m: m.predict([[1.0, 2.0], [1.0]]), DataError, "Points must be numbers, got"),
        (lambda m: m.predict([["1", "2"]]), DataError, "Points must be numbers, got"),
        (lambda m: m.predict([[0.0, 1.0]], None), UnknownNameError, "The flow knows: moons"),
        (lambda m: m.predict([[0.0, 1.0]], 3), UnknownNameError, "No density 3"),
        (lambda m: m.mass("moon"), UnknownNameError, "Did you mean 'moons'"),
        (lambda m: m.sample("moon", 3), UnknownNameError, "Did you mean 'moons'"),
        (lambda m: m.sample("moons", 0), ZooError, "n must be at least 1"),
        (lambda m: m.predict([[0.0, 1.0]], "rings"), UnknownNameError, "The flow knows: moons"),
        (lambda m: m.predict([0.0, 1.0], "moons"), DataError, "N x 2"),
        (lambda m: m.predict([[0.0, math.inf]], "moons"), DataError, "finite"),
        (lambda m: m.measure(DensityDataModule(), "some"), ZooError, "Unknown protocol"),
    ],
)
def test_wrong_requests_of_a_flow_are_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(densities())


@pytest.mark.parametrize("kind", ["continuous", "coupling"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_flow_is_used_in_any_precision(kind: str, dtype: torch.dtype) -> None:
    model = densities(kind=kind).to(dtype)
    points = [[0.0, 1.0], [0.5, -0.25]]
    # Untrained, the flow is the standard normal density.
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(points).double()).sum(1)
    found = model.predict(points, "moons")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert model.sample("moons", 3, seed=0).dtype == dtype
    data = DensityDataModule(test_points=20)
    assert model.measure(data, "moons").n == 20
    if kind == "continuous":
        for block, states in model.block_states(data):
            assert block(states).dtype == dtype


def test_a_flow_for_other_densities_is_refused() -> None:
    with pytest.raises(ConfigError, match="conditions=6"):
        DensityModel(FlowConfig(conditions=2))


def test_the_shipped_flow_has_a_density_of_mass_one() -> None:
    model = zoo.load("continuous-flow.toy", local_files_only=True)
    assert model.mass("moons") == pytest.approx(1.0, abs=2e-4)
    model.solver, model.steps = "rk4", 1  # a better likelihood, of what is no density
    assert model.mass("moons") > 1.1


def test_a_flow_is_diagnosed_density_by_density() -> None:
    model = densities(solver=SolverConfig(method="rk4", steps=2))
    found = model.block_states(DensityDataModule(test_points=20))
    assert len(found) == len(DENSITIES)
    for block, points in found:
        assert points.shape == (20, 2)
        assert block.interval == (1.0, 0.0)
        assert block(points).shape == (20, 2)


# -------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("make", [classifier, densities])
def test_fixed_steps_are_exported_and_others_refused(make: Any, tmp_path: Path) -> None:
    from zoo import exporting

    model = make()
    model.steps = 2  # a program has each step by itself
    exported = exporting.export_module(model, tmp_path / "x.pt2", "torch-export")
    assert exported.path.is_file()
    for method, why in (
        ("dopri5", "dopri5 chooses its steps while it runs"),
        ("implicit_adams", "implicit_adams iterates until it converges"),
    ):
        model.solver = method
        with pytest.raises(ConfigError, match=f"^{why}, and cannot be exported: choose another"):
            exporting.export_module(model, tmp_path / "y.pt2", "torch-export")


# ------------------------------------------------------------------------------------- figures


def test_figures_of_every_task_are_drawn(run: training.Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from zoo import figures

    drawn = figures._solvers(
        checkpoints.load(run.checkpoint), run.checkpoint, figures.read_metrics(run.folder), tmp_path
    )
    assert (tmp_path / "evaluations.png") in drawn
    drawn += figures._densities(densities(), tmp_path, {}, tmp_path)
    assert len(drawn) >= 1 + len(DENSITIES)
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
