"""Tests that the bundled weights give the numbers they gave when they were accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zoo
from tests import golden
from tests.golden import TOLERANCE, deviation, outputs
from zoo import cards

BUNDLED = golden.bundled()


def test_there_are_golden_outputs_of_every_bundled_weight_and_of_no_other() -> None:
    stored = {path.name for path in golden.FOLDER.iterdir()}
    assert stored == {f"{name}.safetensors" for name in BUNDLED}
    assert len(stored) == len(BUNDLED) >= 1
    for name in BUNDLED:
        assert golden.path(name).stat().st_size < golden.LARGEST_FILE
        values = golden.expected(name)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        assert values.std() > 0


@pytest.mark.parametrize("name", BUNDLED)
def test_golden_outputs_come_out(name: str) -> None:
    module = zoo.load(name, local_files_only=True)
    assert deviation(outputs(module), golden.expected(name)) < TOLERANCE


@pytest.mark.parametrize("name", BUNDLED)
def test_a_small_change_of_any_kind_is_seen(name: str) -> None:
    """Two parts in a hundred of the middle parameter are far more than the tolerance."""
    module = zoo.load(name, local_files_only=True)
    parameters = [p for p in module.network.parameters() if p.ndim > 1]
    with torch.no_grad():
        parameters[len(parameters) // 2].mul_(1.02)
    assert deviation(outputs(module), golden.expected(name)) > 3 * TOLERANCE


def test_accepting_writes_the_same_file_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = BUNDLED[0]
    monkeypatch.setattr(golden, "FOLDER", tmp_path / "new")
    monkeypatch.setattr(golden, "bundled", lambda: [name])
    assert golden.main([]) == 1
    assert f"python -m tests.golden --accept {name}" in capsys.readouterr().out
    assert golden.main(["--accept", cards.find(name).name]) == 0
    first = golden.path(name).read_bytes()
    assert golden.main(["--accept", name]) == 0
    assert golden.path(name).read_bytes() == first
    assert len(load_file(golden.path(name))["outputs"]) <= 4096
    assert golden.main([]) == 0


def test_accepting_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(["--accept", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("Unknown model 'nothing'")


def test_deviation() -> None:
    expected = torch.tensor([0.0, 2.0, 4.0])  # a standard deviation of 2
    assert deviation(torch.tensor([0.0, 2.0, 5.0]), expected) == pytest.approx(0.5)
    assert deviation(expected, expected) == 0.0
    assert deviation(expected[:2], expected) == float("inf")
    assert not deviation(expected * torch.nan, expected) < TOLERANCE
