"""Progress on standard error, for whatever lasts: a bar, or now and then a line in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from time import monotonic
from typing import TypeVar

T = TypeVar("T")

__all__ = ["track"]

_SECONDS_BETWEEN_LINES = 30.0


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar that disappears at the end.

    In a log file or a pipe there is a line every half minute instead, and none for what is shorter.

    Args:
        items: what to iterate over.
        description: a word or two before the bar.
        total: number of items, when `len` does not tell.
    """
    if not sys.stderr.isatty():
        yield from _lines(items, description, total)
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(
        items, description, total=total, console=Console(stderr=True), transient=True
    )


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    if total is None and isinstance(items, Sized):
        total = len(items)
    start = last = monotonic()
    for done, item in enumerate(items):
        now = monotonic()
        if done and now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            print(_line(description, done, total, now - start), file=sys.stderr, flush=True)
        yield item


def _line(description: str, done: int, total: int | None, seconds: float) -> str:
    """One line of what is done and how long the rest will take at the same speed."""
    if not total:
        return f"{description}: {done:,} done in {_duration(seconds)}"
    left = seconds / done * max(total - done, 0)
    return f"{description}: {done:,} of {total:,} ({done / total:.0%}), {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
