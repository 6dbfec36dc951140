"""What saving memory costs in time, and what is kept for the backward pass, by what is trained.

A forward and backward pass of ShuffleNet V2 1.0x on 8 images of 128 pixels; plain PyTorch is the
peer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.benchmarks._harness import Comparison, race, repeated
from zoo.families.sau_shufflenet import Activation, ShuffleNetConfig, ShuffleNetV2
from zoo.memory_table import Policy, apply_policy
from zoo.tuning.memory import graph_bytes, save_memory

ROUNDS = 15
AT_MOST = 1.1
CASES: list[tuple[Activation, Policy, float]] = [
    ("relu", "all", 1.0),
    ("relu", "biases", 0.12),
    ("relu", "norms", 0.51),
    ("relu", "first layers", 1.0),
    ("sau-2", "biases", 1.0),
]
"""Activation, what is trained, and at most what share of the bytes is to be kept."""


def run(rounds: int) -> list[Comparison]:
    """Each case: a step's time, and the bytes between its passes."""
    comparisons = []
    for activation, policy, share in CASES:
        torch.manual_seed(0)
        config = ShuffleNetConfig(activation=activation, stem="large")
        plain = ShuffleNetV2(config).to(memory_format=torch.channels_last)
        x = torch.randn(8, 3, 128, 128).contiguous(memory_format=torch.channels_last)
        apply_policy(plain, x, policy)
        ours = copy.deepcopy(plain)
        save_memory(ours)
        name = f"ShuffleNet V2 1.0x with {activation}, trained: {policy}"
        taken = race({"ours": repeated(_pass(ours, x)), "plain": repeated(_pass(plain, x))}, rounds)
        comparisons += [
            Comparison(
                name=f"forward and backward, {name}",
                contestant="saving",
                peer="plain PyTorch",
                values=taken["ours"],
                peer_values=taken["plain"],
                at_most=AT_MOST,
            ),
            Comparison(
                name=f"kept for backward, {name}",
                contestant="saving",
                peer="plain PyTorch",
                values=(float(graph_bytes(ours, x)),),
                peer_values=(float(graph_bytes(plain, x)),),
                unit="bytes",
                at_most=share,
            ),
        ]
    return comparisons


def _pass(network: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        network.zero_grad()
        network(x).square().mean().backward()

    return run
