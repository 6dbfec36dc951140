"""Tests of zoo.errors."""

import pytest

from zoo import errors


@pytest.mark.parametrize(
    "name", ["ZooError", "UnknownNameError", "ConfigError", "CheckpointError", "DataError"]
)
def test_every_error_is_a_zoo_error_that_shows_its_text_plainly(name: str) -> None:
    error = getattr(errors, name)("Unknown model 'x'.")
    assert isinstance(error, errors.ZooError)
    assert str(error) == "Unknown model 'x'."


def test_errors_are_also_what_python_users_expect() -> None:
    assert issubclass(errors.UnknownNameError, KeyError)
    assert issubclass(errors.ConfigError, ValueError)


def test_nearest_suggests_misspellings_and_forgotten_tails() -> None:
    names = ["cached-transformer-lm", "sau-shufflenet", "dselect-k"]
    assert errors.nearest("cashed-transfomer-lm", names) == (
        " Did you mean 'cached-transformer-lm'?"
    )
    assert errors.nearest("CACHED", names) == " Did you mean 'cached-transformer-lm'?"


def test_nearest_names_no_more_than_n_choices_and_each_once() -> None:
    choices = ["aaaa1", "aaaa2", "aaaa3", "aaaa4"]
    assert errors.nearest("aaaa", choices, n=2).count("'") == 4


@pytest.mark.parametrize("name", ["zzzzzz", ""])
def test_nearest_is_silent_when_nothing_is_near(name: str) -> None:
    assert errors.nearest(name, ["alpha", "beta"]) == ""
