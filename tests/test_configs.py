"""Tests of zoo.configs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.configs import build, omit_default, to_json
from zoo.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    mode: Literal["nearest", "linear"] = "nearest"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must be at least 0, got {self.rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    width: int
    name: str = "x"
    causal: bool = True
    tokens: int | Literal["first"] = "first"
    limit: float | None = None
    sizes: tuple[int, ...] = ()
    interval: tuple[float, float] = (0.0, 1.0)
    extra: dict[str, int] = dataclasses.field(default_factory=dict)
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    second: Inner | None = None
    later: str = omit_default("")


finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, rate=st.floats(0, 1e300), mode=st.sampled_from(["nearest", "linear"]))
outers = st.builds(
    Outer,
    width=st.integers(),
    name=st.text(),
    causal=st.booleans(),
    tokens=st.integers() | st.just("first"),
    limit=st.none() | finite,
    sizes=st.lists(st.integers()).map(tuple),
    interval=st.tuples(finite, finite),
    extra=st.dictionaries(st.text(), st.integers()),
    inner=inners,
    inners=st.lists(inners, max_size=3).map(tuple),
    second=st.none() | inners,
    later=st.text(max_size=3),
)


@given(outers)
def test_json_round_trip(config: Outer) -> None:
    text = json.dumps(to_json(config), allow_nan=False)
    assert build(Outer, json.loads(text), "test") == config
    assert ("later" in json.loads(text)) == (config.later != "")
    assert "name" in json.loads(text)


def test_defaults_are_filled_in_and_numbers_get_their_declared_type() -> None:
    config = build(Outer, {"width": 3, "limit": 2, "sizes": [1, 2]}, "test")
    assert config == Outer(width=3, limit=2.0, sizes=(1, 2))
    assert isinstance(config.limit, float)


BAD_VALUES: list[tuple[Any, str]] = [
    ([], "config.json: expected a mapping of options, got [] (list)"),
    ({}, "config.json: missing key 'width'"),
    ({"width": 1, "widht": 2}, "config.json: unknown key 'widht'. Did you mean 'width'?"),
    ({"width": 1, 3: 2}, "config.json: unknown key 3. Allowed: width, name,"),
    ({"width": True}, "config.json: width: expected int, got True (bool)."),
    ({"width": 1.0}, "config.json: width: expected int, got 1.0 (float)."),
    ({"width": "1"}, "config.json: width: expected int, got '1' (str)."),
    ({"width": None}, "config.json: width: expected int, got None (NoneType)."),
    ({"width": 1, "causal": 1}, "config.json: causal: expected bool, got 1 (int)."),
    ({"width": 1, "name": 1}, "config.json: name: expected str, got 1 (int)."),
    ({"width": 1, "limit": "1"}, "config.json: limit: expected a finite number, got '1' (str)."),
    ({"width": 1, "limit": float("nan")}, "limit: expected a finite number, got nan (float)."),
    ({"width": 1, "limit": float("inf")}, "limit: expected a finite number, got inf (float)."),
    ({"width": 1, "limit": 10**400}, "limit: expected a finite number, got 1000"),
    ({"width": 1, "limit": True}, "limit: expected a finite number, got True (bool)."),
    ({"width": 1, "tokens": "frist"}, "tokens: expected int or 'first', got 'frist' (str)"),
    ({"width": 1, "sizes": 3}, "config.json: sizes: expected a list, got 3 (int)."),
    ({"width": 1, "sizes": [1, "a"]}, "config.json: sizes.1: expected int, got 'a' (str)."),
    ({"width": 1, "interval": [1.0]}, "config.json: interval: expected 2 values, got 1"),
    ({"width": 1, "extra": {"a": "b"}}, "config.json: extra.a: expected int, got 'b' (str)."),
    ({"width": 1, "extra": [1]}, "config.json: extra: expected a mapping, got [1] (list)."),
    (
        {"width": 1, "inner": {"mode": "linaer"}},
        "mode: expected one of 'nearest', 'linear', got 'linaer' (str). Did you mean 'linear'?",
    ),
    ({"width": 1, "inner": {"rate": -1}}, "config.json: inner: rate must be at least 0, got -1.0"),
    ({"width": 1, "second": {"rate": -1}}, "config.json: second: rate must be at least 0"),
    ({"width": 1, "inners": [{}, {"x": 1}]}, "config.json: inners.1: unknown key 'x'."),
    ({"width": 1, "name": "y" * 500, "x": 1}, "config.json: unknown key 'x'."),
]


@pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=[text for _, text in BAD_VALUES])
def test_bad_values_are_refused_in_one_line(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Outer, values, "config.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_class_path_is_just_an_unknown_key() -> None:
    values = {"width": 1, "inner": {"class_path": "os.system", "init_args": {"command": "true"}}}
    with pytest.raises(ConfigError, match="inner: unknown key 'class_path'"):
        build(Outer, values, "config.json")


def test_a_field_type_that_json_cannot_hold_is_a_programming_error() -> None:
    @dataclasses.dataclass
    class Holder:
        members: set[int]

    with pytest.raises(TypeError, match="members: configurations cannot hold"):
        build(Holder, {"members": [1]}, "config.json")
