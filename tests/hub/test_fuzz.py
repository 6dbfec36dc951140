"""Malformed files by the thousand: each is loaded whole or refused in one line, within its memory.

The fast tests draw a few hundred cases; the slow ones at least 10,000 of each file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import resource
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo import cards, checkpoints
from zoo.cards import Card
from zoo.configs import to_json
from zoo.errors import ZooError
from zoo.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from zoo.tasks.base import ZooModule

SLOW_CASES = 10_000
FAST_CASES = 100

COUNTED: dict[str, int] = {}
"""How many cases each run has had."""

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["os:system", "../x", "__class__", "", "\0", "grc", "xl", "mean"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["network", "grc"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places within plain JSON."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        found += paths(item, (*path, key))
    return found


@st.composite
def mutated(draw: Callable[[Any], Any], original: dict[str, Any]) -> dict[str, Any]:
    """Plain JSON with one to three places replaced, removed, renamed or added to."""
    value: dict[str, Any] = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        places = paths(value)
        if not places:
            break
        *parents, last = draw(st.sampled_from(places))
        holder: Any = value
        for key in parents:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "number", "remove", "rename", "add"]))
        if action == "replace":
            holder[last] = draw(junk)
        elif action == "number" and type(holder[last]) in (int, float):
            holder[last] = holder[last] * draw(st.sampled_from([-1, 0, 2, 3, 1000, 10**9, 0.5]))
        elif action == "remove":
            del holder[last]
        elif isinstance(holder, dict) and action == "rename":
            holder[draw(st.text(max_size=6))] = holder.pop(last)
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = draw(junk)
    return value


@st.composite
def damaged(draw: Callable[[Any], Any], original: bytes, where: int) -> bytes:
    """Bytes with bits flipped, pieces cut out, doubled or put in, mostly in the first `where`."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(content), where if draw(st.booleans()) else len(content))
        at = draw(st.integers(0, max(0, end - 1)))
        size = draw(st.integers(1, 8))
        action = draw(st.sampled_from(["flip", "cut", "double", "insert", "end"]))
        if action == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del content[at : at + size]
        elif action == "double":
            content[at:at] = content[at : at + size]
        elif action == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif action == "end":
            del content[at:]
    return bytes(content)


def refused_or_whole(load: Callable[[], Any], key: str) -> Any:
    """What is loaded, or None where it was refused as it should."""
    COUNTED[key] = COUNTED.get(key, 0) + 1
    try:
        return load()
    except ZooError as error:
        line = str(error)
    assert line
    assert "\n" not in line
    return None


def is_whole(module: ZooModule | None) -> None:
    """Nothing is left at random, and nothing was left out."""
    if module is None:
        return
    report = module.load_report
    assert report.dropped == report.initialised == ()
    assert set(report.loaded) == set(checkpoints._tensors(module.network))


@pytest.fixture
def folder(weight: Path, tmp_path: Path) -> Path:
    """Configuration and weights, to be damaged one at a time."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((weight / name).read_bytes())
    return tmp_path


@contextlib.contextmanager
def memory_within(megabytes: int) -> Any:
    """The peak of this process may grow by so much over what it uses now."""
    with contextlib.suppress(OSError):  # Linux: an earlier peak would hide this one
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < megabytes * 1000, f"{grown} kB"


def cases(number: int) -> Any:
    return hypothesis.settings(max_examples=number, deadline=None, derandomize=True)


SIZES = [
    pytest.param(FAST_CASES, id="fast"),
    pytest.param(SLOW_CASES, id="slow", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("number", SIZES)
def test_config(folder: Path, number: int) -> None:
    original = json.loads((folder / CONFIG_FILE).read_text())

    @cases(number)
    @given(value=mutated(original))
    def check(value: dict[str, Any]) -> None:
        (folder / CONFIG_FILE).write_text(json.dumps(value))
        is_whole(refused_or_whole(lambda: checkpoints.load(folder), f"config {number}"))

    @cases(number // 5)
    @given(content=damaged((folder / CONFIG_FILE).read_bytes(), 200))
    def check_bytes(content: bytes) -> None:
        (folder / CONFIG_FILE).write_bytes(content)
        is_whole(refused_or_whole(lambda: checkpoints.load(folder), f"config bytes {number}"))

    with memory_within(400):
        check()
        check_bytes()
    assert COUNTED[f"config {number}"] >= number


@pytest.mark.parametrize("number", SIZES)
def test_weights(folder: Path, number: int) -> None:
    original = (folder / WEIGHTS_FILE).read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    header = json.loads(original[8 : 8 + length])

    @cases(number)
    @given(value=mutated(header), shown=st.sampled_from([None, 0, 1, -1, 2**40, 2**63 - 1]))
    def check(value: dict[str, Any], shown: int | None) -> None:
        text = json.dumps(value).encode()
        announced = (
            len(text) if shown is None else max(0, shown if shown > 1 else len(text) + shown)
        )
        content = struct.pack("<Q", announced) + text + original[8 + length :]
        (folder / WEIGHTS_FILE).write_bytes(content)
        is_whole(refused_or_whole(lambda: checkpoints.load(folder), f"weights {number}"))

    @cases(number // 5)
    @given(content=damaged(original, 8 + length))
    def check_bytes(content: bytes) -> None:
        (folder / WEIGHTS_FILE).write_bytes(content)
        is_whole(refused_or_whole(lambda: checkpoints.load(folder), f"weights bytes {number}"))

    with memory_within(400):
        check()
        check_bytes()
    assert COUNTED[f"weights {number}"] >= number


@pytest.mark.parametrize("number", SIZES)
def test_card(weight: Path, number: int) -> None:
    text = cards.render(cards.computed(cards.parse((weight / CARD_FILE).read_text()), weight))
    original = {"zoo": {**to_json(cards.parse(text))}}
    del original["zoo"]["body"]

    def parsed(document: str) -> Card:
        # Traced one by one: what hypothesis keeps of all cases is not theirs.
        tracemalloc.start()
        try:
            return cards.parse(document)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 10_000_000

    def is_a_card(card: Card | None) -> None:
        if card is not None:
            assert cards.parse(cards.render(card)) == card

    @cases(number)
    @given(value=mutated(original))
    def check(value: dict[str, Any]) -> None:
        # JSON is YAML, but for what a number may be.
        document = f"---\n{json.dumps(value)}\n---\nbody"
        is_a_card(refused_or_whole(lambda: parsed(document), f"card {number}"))

    @cases(number // 5)
    @given(content=damaged(text.encode(), text.index("\n---\n")))
    def check_bytes(content: bytes) -> None:
        document = content.decode("utf-8", errors="replace")
        refused_or_whole(lambda: parsed(document), f"card bytes {number}")

    check()
    check_bytes()
    assert COUNTED[f"card {number}"] >= number


@pytest.mark.parametrize(
    "front_matter",
    [
        "zoo: " + "[" * 100_000,
        "zoo: " + "{a: " * 100_000,
        "zoo: " + "[" * 900 + "]" * 900,
        "- " * 100_000,
        "zoo:\n" + "\n".join(f"  {' ' * depth}a:" for depth in range(3000)),
        "zoo: &a [*a]",
        "a: &a [x,x]\n"
        + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)},*{chr(97 + i)}]\n" for i in range(20)
        )
        + "zoo: {config: {x: *u}}",
        "zoo: 2026-99-99",
        "zoo: {parameters: 0x" + "f" * 10_000 + "}",
        "? [a, b]\n: c",
        "zoo: !!binary 'x'",
        "\x00",
        "zoo: {1: 2, null: 3, [a]: b}",
    ],
    ids=itertools.count(),
)
def test_cards_that_are_made_to_hurt(front_matter: str) -> None:
    refused = refused_or_whole(lambda: cards.parse(f"---\n{front_matter}\n---\n"), "hurtful")
    assert refused is None


def test_configurations_that_are_made_to_hurt(folder: Path) -> None:
    sound = json.loads((folder / CONFIG_FILE).read_text())
    deep = "[" * 100_000
    for content in [
        deep,
        '{"network": ' + deep,
        '{"format_version": 1e999}',
        '{"format_version": ' + "9" * 5000 + "}",
        json.dumps({**sound, "network": {**sound["network"], "depth": 10**9}}),
        json.dumps({**sound, "network": {**sound["network"], "dim": 10**7, "num_heads": 10**7}}),
        json.dumps(sound).replace('"depth": 1', '"depth": NaN'),
        json.dumps(sound)[:-1] + ', "architecture": 3}',
    ]:
        (folder / CONFIG_FILE).write_text(content, encoding="utf-8")
        with memory_within(100):
            assert refused_or_whole(lambda: checkpoints.load(folder), "hurtful") is None


def test_the_counter_counts_what_is_sound(folder: Path) -> None:
    """The checks above can tell: the unharmed folder is loaded, and a renamed tensor is seen."""
    module = refused_or_whole(lambda: checkpoints.load(folder), "sound")
    is_whole(module)
    assert isinstance(module, ZooModule)
    assert dataclasses.is_dataclass(module.config)
    module.load_report = dataclasses.replace(module.load_report, dropped=("x",))
    with pytest.raises(AssertionError):
        is_whole(module)
    assert torch.is_tensor(next(module.parameters()))
