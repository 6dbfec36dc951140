"""What the next token costs when much has been written, with caches and without.

With caches the cost of a token is to be that of the first segment however long the text is. Without
them the whole prefix goes through the network for each token.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tests.benchmarks._harness import Comparison, race
from zoo.configs import build
from zoo.families.cached_transformers import (
    CachedTransformerLM,
    CachedTransformerLMConfig,
    LanguageModelState,
)
from zoo.training import read_recipe

ROUNDS = 7
RECIPE = "cached-transformer-lm.tiny-shakespeare"
WRITTEN = [1024, 4096]
"""Tokens at the start of the segment that is timed; the peer is the first segment."""
TIMED = 32
"""Last tokens of a segment: its keys and values are most then, and the memory is written."""
FLAT = 1.1
"""A token may cost so much more than one of the first segment."""


@torch.no_grad()
def run(rounds: int) -> list[Comparison]:
    """Seconds per token, over the end of a segment with caches, and for one token without."""
    options = read_recipe(RECIPE).options["model"]["network"]
    network = CachedTransformerLM(build(CachedTransformerLMConfig, options, RECIPE)).eval()
    segment = network.config.segment
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(256, (1, max(WRITTEN) + segment), generator=generator)
    contestants: dict[str, Callable[[], float | None]] = {}
    for start in (0, *WRITTEN):
        written = start + segment - TIMED
        _, state = network(text[:, :written])
        new = text[:, written : start + segment]
        contestants[f"cached {start}"] = _cached(network, new, state)
    for start in WRITTEN:
        contestants[f"recomputed {start}"] = _recomputed(network, text[:, :start])
    taken = race(contestants, rounds)
    comparisons = []
    for written in WRITTEN:
        name = f"{written:,} tokens written"
        comparisons += [
            Comparison(
                name=f"token after {name}",
                contestant="with caches",
                peer="token of the first segment",
                values=taken[f"cached {written}"],
                peer_values=taken["cached 0"],
                at_most=FLAT,
            ),
            Comparison(
                name=f"token after {name}",
                contestant="with caches",
                peer="recomputing the prefix",
                values=taken[f"cached {written}"],
                peer_values=taken[f"recomputed {written}"],
                at_most=1.0,
            ),
        ]
    return comparisons


def _cached(
    network: CachedTransformerLM, text: torch.Tensor, state: LanguageModelState
) -> Callable[[], float]:
    def run() -> float:
        now, start = state, time.perf_counter()
        for index in range(text.shape[1]):
            _, now = network(text[:, index : index + 1], now)
        return (time.perf_counter() - start) / text.shape[1]

    return run


def _recomputed(network: CachedTransformerLM, text: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        network(text)

    return run
