"""Tests of progress where nobody looks: a line now and then, and nothing for what is short."""

from __future__ import annotations

import itertools
import sys

import pytest

from zoo import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds it ten seconds later."""
    ticks = itertools.count(0.0, 10.0)
    monkeypatch.setattr(progress, "monotonic", lambda: next(ticks))


@pytest.mark.usefixtures("clock")
def test_a_log_gets_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(8), "encoding")) == list(range(8))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "encoding: 2 of 8 (25%), 1:30 left",
        "encoding: 5 of 8 (62%), 0:36 left",
    ]


@pytest.mark.usefixtures("clock")
def test_what_has_no_length_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(iter("abcd"), "reading")) == list("abcd")
    assert capsys.readouterr().err == "reading: 2 done in 0:30\n"
    assert list(progress.track(iter("abcd"), "reading", total=400)) == list("abcd")
    assert capsys.readouterr().err == "reading: 2 of 400 (0%), 1:39:30 left\n"


def test_what_is_short_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(progress.track(range(1000), "adding")) == 499_500
    assert list(progress.track([], "nothing")) == []
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert list(progress.track(range(3), "weighing")) == [0, 1, 2]
    assert "weighing" in capsys.readouterr().err
