"""Tests of zoo.evaluation: intervals against other implementations, verdicts, whole rounds."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from tests import tiny
from tests.tiny import SEGMENT, copy, write_recipe
from zoo import _card_tables, cards, checkpoints, controls, evaluation, training
from zoo.cards import Card, Control, Measurements, Result
from zoo.errors import CheckpointError, ConfigError, ZooError
from zoo.evaluation import Evaluation, Outcome
from zoo.files import RECIPE_FILE, RESULTS_FILE, WEIGHTS_FILE
from zoo.intervals import wilson_interval
from zoo.tasks.base import Measurement

# --- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "method"),
    [
        (1, "none: there is one block"),
        (29, "Student's t over 29 blocks"),
        (30, "bootstrap over 30 blocks, 10000 resamples"),
    ],
)
def test_the_method_follows_the_number_of_units(units: int, method: str) -> None:
    measurement = Measurement(
        metric="x",
        unit="character",
        kind="mean",
        sums=torch.linspace(1, 2, units),
        counts=torch.full((units,), 2),
    )
    (low, high), said = evaluation._interval(measurement)
    assert said == method
    assert (low < measurement.value < high) == (units > 1)


def test_proportions_get_a_wilson_interval() -> None:
    measurement = Measurement(
        metric="accuracy",
        unit="image",
        kind="proportion",
        sums=torch.tensor([30.0, 7.0]),
        counts=torch.tensor([40, 10]),
    )
    assert evaluation._interval(measurement) == (wilson_interval(37, 50), "Wilson")


# --- verdicts ------------------------------------------------------------------------------------


def result(value: float = 1.5, n: int = 100, tolerance: float = 0.01, **other: str) -> Result:
    fields = {"metric": "loss", "unit": "character", "protocol": "stream", **other}
    return Result(
        **fields,
        value=value,
        n=n,
        interval=(1.0, 2.0),
        interval_method="bootstrap",
        seeds=(1,),
        tolerance=tolerance,
        dataset="d",
        split="validation",
        command="zoo evaluate x",
        date="2026-01-01",
        versions={},
        primary=True,
    )


def outcome(value: float = 1.5, n: int = 100, **other: str) -> Outcome:
    fields = {"metric": "loss", "unit": "character", "protocol": "stream", **other}
    return Outcome(**fields, value=value, n=n, interval=(1.0, 2.0), interval_method="bootstrap")


@pytest.mark.parametrize(
    ("measured", "recorded", "passed"),
    [
        (outcome(), result(), True),
        (outcome(1.509), result(), True),
        (outcome(1.491), result(), True),
        (outcome(1.511), result(), False),
        (outcome(1.489), result(), False),
        (outcome(n=99), result(), False),  # the same value on other samples
        (outcome(math.nan), result(), False),
        (outcome(1.5), result(tolerance=0.0), True),
        (outcome(), result(protocol="blocks"), None),
        (outcome(), result(metric="accuracy"), None),
        (outcome(), None, None),
    ],
)
def test_verdict(measured: Outcome, recorded: Result | None, passed: bool | None) -> None:
    compared = evaluation._compare(measured, () if recorded is None else (recorded,))
    assert compared.passed is passed
    words = {True: "reproduced", False: "NOT reproduced", None: "not recorded"}
    assert compared.verdict == words[passed]
    assert (compared.recorded is None) == (passed is None)


def test_a_tolerance_for_all_replaces_that_of_the_record() -> None:
    assert evaluation._compare(outcome(1.6), [result()]).passed is False
    assert evaluation._compare(outcome(1.6), [result()], 0.2).passed is True
    assert evaluation._compare(outcome(1.6), [result()], 0.2).tolerance == 0.2


def test_an_outcome_is_compared_with_the_record_of_its_protocol() -> None:
    recorded = [result(9.0, protocol="blocks"), result(1.5)]
    assert evaluation._compare(outcome(), recorded).recorded is recorded[1]


@pytest.mark.parametrize(
    ("values", "passed", "verdict"),
    [
        ((1.5, 1.5), True, "reproduced"),
        ((1.5, 1.6), False, "NOT reproduced"),
        ((1.6, 1.5), False, "NOT reproduced"),
    ],
)
def test_an_evaluation_passes_when_all_of_it_does(
    values: tuple[float, ...], passed: bool, verdict: str
) -> None:
    outcomes = tuple(evaluation._compare(outcome(value), [result()]) for value in values)
    whole = Evaluation(name="x", outcomes=outcomes)
    assert (whole.passed, whole.verdict) == (passed, verdict)
    assert (whole.value, whole.n, whole.interval) == (values[0], 100, (1.0, 2.0))


def test_an_evaluation_without_record_neither_passes_nor_fails() -> None:
    nothing = Evaluation(name="x", outcomes=(outcome(), outcome()))
    assert (nothing.passed, nothing.verdict) == (False, "not recorded")
    half = Evaluation(
        name="x", outcomes=(evaluation._compare(outcome(), [result()]), outcome(protocol="new"))
    )
    assert (half.passed, half.verdict) == (False, "NOT reproduced")
    assert not Evaluation(name="x", outcomes=()).passed


# --- whole rounds, on a net trained for a second -------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> training.Run:
    folder = tmp_path_factory.mktemp("tiny")
    return training.fit(write_recipe(folder), out=folder / "run")


@pytest.fixture
def folder(run: training.Run, tmp_path: Path) -> Path:
    """A copy of the checkpoint folder, with its results."""
    copied = copy(run.checkpoint, tmp_path / "checkpoint", lambda content: content, "")
    evaluation.record(copied, run=run.folder, commit="f" * 40)
    return copied


def naive_losses(run: training.Run) -> tuple[float, float]:
    """Nats per character as stream and in blocks, one byte at a time from first principles."""
    text = run.datamodule.validation_text.long().tolist()
    network = checkpoints.load(run.checkpoint).network
    stream = blocks = 0.0
    with torch.no_grad():
        state = None
        for before, byte in zip([10, *text], text, strict=False):
            logits, state = network(torch.tensor([[before]]), state)
            stream -= float(F.log_softmax(logits[0, -1].double(), -1)[byte])
        for index, byte in enumerate(text[1:]):
            if index % SEGMENT == 0:
                state = None
            logits, state = network(torch.tensor([[text[index]]]), state)
            blocks -= float(F.log_softmax(logits[0, -1].double(), -1)[byte])
    return stream / len(text), blocks / (len(text) - 1)


def test_record_then_evaluate(run: training.Run, folder: Path) -> None:
    evaluated = evaluation.evaluate(folder)
    assert (evaluated.passed, evaluated.verdict) == (True, "reproduced")
    text = run.datamodule.validation_text
    assert [o.protocol for o in evaluated.outcomes] == ["stream", "blocks"]
    assert [o.n for o in evaluated.outcomes] == [len(text), len(text) - 1]
    assert [o.value for o in evaluated.outcomes] == pytest.approx(naive_losses(run), abs=1e-5)
    for o in evaluated.outcomes:
        assert o.recorded is not None
        assert o.value == o.recorded.value
        assert o.tolerance == o.recorded.tolerance == pytest.approx(2e-4 * o.value)
        assert o.interval[0] < o.value < o.interval[1]
        assert o.interval_method == f"Student's t over {-(-o.n // SEGMENT)} blocks"


def test_what_is_recorded(run: training.Run, folder: Path) -> None:
    measured = cards.read_measurements(folder / RESULTS_FILE)
    assert measured.weight == "cached-transformer-lm.tiny-shakespeare"
    assert [r.primary for r in measured.results] == [True, False]
    assert all(r.seeds == (1,) and r.seed_spread is None for r in measured.results)
    assert all(r.command == f"zoo evaluate {measured.weight}" for r in measured.results)
    assert all(r.versions["torch"] == version("torch") for r in measured.results)
    assert measured.training["source_commit"] == "f" * 40
    assert (measured.training["epochs"], measured.training["steps"]) == (1, 2)
    assert all(r.cpu_minutes == measured.training["cpu_minutes"] for r in measured.results)


def test_record_again_keeps_controls_and_facts(folder: Path) -> None:
    before = cards.read_measurements(folder / RESULTS_FILE)
    arm = cards.Control(
        name="c", differs="d", recipe="r.yaml", parameters=1, result=before.results[0]
    )
    controls.record([arm], folder)
    evaluation.record(folder)
    after = cards.read_measurements(folder / RESULTS_FILE)
    assert after.controls == (arm,)
    assert after.training == before.training  # one seed has no spread to be a tolerance
    assert after.results == before.results


def nudge(content: bytes) -> bytes:
    tensors = load(content)
    tensors["head.weight"] = tensors["head.weight"] + 0.05 * torch.randn_like(
        tensors["head.weight"]
    )
    return save(tensors, {"format": "pt"})


def recount(content: bytes) -> bytes:
    values = json.loads(content)
    values["results"][0]["n"] += 1
    return json.dumps(values).encode()


def revalue(content: bytes) -> bytes:
    values = json.loads(content)
    values["results"][1]["value"] += 1.01 * values["results"][1]["tolerance"]
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("change", "name", "verdicts"),
    [
        (nudge, WEIGHTS_FILE, ["NOT reproduced", "NOT reproduced"]),
        (recount, RESULTS_FILE, ["NOT reproduced", "reproduced"]),
        (revalue, RESULTS_FILE, ["reproduced", "NOT reproduced"]),
    ],
)
def test_what_does_not_come_out_fails(
    folder: Path, tmp_path: Path, change: Callable[[bytes], bytes], name: str, verdicts: list[str]
) -> None:
    evaluated = evaluation.evaluate(copy(folder, tmp_path / "changed", change, name))
    assert [o.verdict for o in evaluated.outcomes] == verdicts
    assert not evaluated.passed


def test_what_is_recorded_and_not_measured_fails(folder: Path, tmp_path: Path) -> None:
    def claim(content: bytes) -> bytes:
        values = json.loads(content)
        values["results"].append({**values["results"][1], "protocol": "backwards"})
        return json.dumps(values).encode()

    claimed = copy(folder, tmp_path / "claimed", claim, RESULTS_FILE)
    evaluated = evaluation.evaluate(claimed)
    assert [o.verdict for o in evaluated.outcomes] == ["reproduced", "reproduced"]
    assert not evaluated.passed
    assert evaluated.missing == ("backwards (nats_per_character)",)
    assert "backwards (nats_per_character) is recorded and was not measured" in evaluated.verdict
    said = tiny.run("evaluate", claimed, "--json")
    assert (said.status, said.json["passed"]) == (1, False)
    assert said.json["missing"] == ["backwards (nats_per_character)"]
    assert evaluation.evaluate(claimed, protocols=["blocks"]).passed  # as was asked for


def test_what_is_not_finite_is_no_result(folder: Path, tmp_path: Path) -> None:
    def destroy(content: bytes) -> bytes:
        tensors = load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return save(
            {name: tensor * math.nan for name, tensor in tensors.items()},
            metadata["__metadata__"],
        )

    broken = copy(folder, tmp_path / "broken", destroy, WEIGHTS_FILE)
    with pytest.raises(ZooError, match=r"stream: nats_per_character is nan\. The training has div"):
        evaluation.evaluate(broken)


def test_one_protocol_alone(folder: Path) -> None:
    evaluated = evaluation.evaluate(folder, protocols=["blocks"])
    assert [o.protocol for o in evaluated.outcomes] == ["blocks"]
    with pytest.raises(ZooError, match="Unknown protocol 'blokcs'; choose one of stream, blocks"):
        evaluation.evaluate(folder, protocols=["blokcs"])


def test_a_model_without_diagnostics_is_not_measured_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate_module", None)
    with pytest.raises(ZooError, match=r"^\w+ has no diagnostics\.$"):
        evaluation.evaluate(folder, diagnose=True)


def test_a_folder_without_results_is_not_recorded(run: training.Run) -> None:
    assert not (run.checkpoint / RESULTS_FILE).exists()
    assert evaluation.evaluate(run.checkpoint, protocols=["blocks"]).verdict == "not recorded"


def test_a_folder_without_recipe(folder: Path) -> None:
    (folder / RECIPE_FILE).unlink()
    for call in (evaluation.evaluate, evaluation.record):
        with pytest.raises(
            CheckpointError, match=r"has no recipe\.yaml, so the data to measure it"
        ):
            call(folder)
    with pytest.raises(CheckpointError, match="There is no checkpoint folder nowhere"):
        evaluation.record("nowhere")


def test_record_needs_the_name_of_a_weight(tmp_path: Path) -> None:
    run = training.fit(write_recipe(tmp_path, weight=""), out=tmp_path / "run")
    with pytest.raises(ZooError, match="names no weight; pass its name"):
        evaluation.record(run.checkpoint)
    recorded = evaluation.record(run.checkpoint, "a.b")
    assert cards.read_measurements(run.checkpoint / RESULTS_FILE).weight == "a.b"
    assert recorded == evaluation.evaluate(run.checkpoint), "what was measured is what is returned"
    assert recorded.passed


@pytest.fixture
def tiny_card(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    """The card of the tiny weight, in the place of the real one."""
    real = cards.find("cached-transformer-lm")
    measured = cards.read_measurements(folder / RESULTS_FILE)
    card = dataclasses.replace(
        real,
        recipe=str(write_recipe(tmp_path)),
        results=measured.results,
        training={
            **measured.training,
            "reproduction_tolerance": {"stream": 1e-6, "blocks": 10.0},
        },
    )
    monkeypatch.setattr(cards, "find", lambda name: {"tiny": card}[name])
    return card


def test_reproduce(tiny_card: Card, tmp_path: Path) -> None:
    same = evaluation.reproduce("tiny", out=tmp_path / "same")
    assert (same.passed, same.name) == (True, tiny_card.name)
    assert [o.n for o in same.outcomes] == [r.n for r in tiny_card.results]
    assert [o.tolerance for o in same.outcomes] == [1e-6, 10.0], "each protocol has its own"
    other = evaluation.reproduce("tiny", out=tmp_path / "other", overrides=["seed_everything=2"])
    assert [o.passed for o in other.outcomes] == [False, True]
    assert (other.passed, other.verdict) == (False, "NOT reproduced")


def test_a_tolerance_that_cannot_tell_says_so(
    tiny_card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second protocol's tolerance is wider than the gap to a control."""
    arms = tuple(
        Control(
            name=f"{name} {result.protocol}",
            differs="",
            recipe="",
            parameters=1,
            result=result,
            difference=gap,
        )
        for result in tiny_card.results
        for name, gap in (("near", 9.0), ("far", -11.0), ("itself", None))
    )
    card = dataclasses.replace(tiny_card, controls=arms)
    monkeypatch.setattr(cards, "find", lambda name: card)
    found = evaluation.reproduce("tiny", out=tmp_path / "run")
    assert [o.indistinct for o in found.outcomes] == [(), ("near blocks",)]
    said = tiny.run("reproduce", "tiny", "--out", tmp_path / "run", "--resume")
    assert said.status == 0, said.err
    assert "blocks: a tolerance of 10.00000 cannot tell the model from near blocks." in said.out


def test_a_reproduction_is_recorded(tiny_card: Card, folder: Path, tmp_path: Path) -> None:
    target = shutil.copytree(folder, tmp_path / "weight")
    before = cards.read_measurements(target / RESULTS_FILE)
    result = evaluation.reproduce("tiny", out=tmp_path / "run", record=target)
    after = cards.read_measurements(target / RESULTS_FILE)
    found = after.training["reproduction"]
    assert dataclasses.replace(after, training=before.training) == before
    assert {k: v for k, v in after.training.items() if k != "reproduction"} == before.training
    assert found["command"] == f"zoo reproduce {tiny_card.name}"
    assert (found["seed"], found["epochs"]) == (1, 1)
    assert [one["value"] for one in found["outcomes"]] == [o.value for o in result.outcomes]
    assert [one["passed"] for one in found["outcomes"]] == [True, True]
    text = _card_tables.fill_all(
        dataclasses.replace(tiny_card, training={**tiny_card.training, "reproduction": found})
    )
    line = next(x for x in text.splitlines() if x.startswith("Trained again by"))
    assert f"{result.value:.4f} (stream; within 0.0000 of the recorded {result.value:.4f})" in line
    with pytest.raises(ConfigError, match=r"as it is can be recorded, without seed_everything=2\."):
        evaluation.reproduce("tiny", record=target, overrides=["seed_everything=2"])
    (target / RESULTS_FILE).unlink()
    with pytest.raises(ZooError, match=r"has no results\.json to add a reproduction to"):
        evaluation.reproduce("tiny", record=target)


def test_reproduce_needs_a_spread(tiny_card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "find", lambda name: dataclasses.replace(tiny_card, training={}))
    with pytest.raises(ZooError, match="has no recorded spread over seeds"):
        evaluation.reproduce("tiny")


def test_results_survive_the_file(folder: Path) -> None:
    stored = json.loads((folder / RESULTS_FILE).read_text())
    assert isinstance(cards.read_measurements(folder / RESULTS_FILE), Measurements)
    assert str(folder.parent) not in json.dumps(stored["training"])
