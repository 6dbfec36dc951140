"""Tests of zoo.tasks.optimization: schedules against their formulas, SGD against its definition."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zoo.tasks.optimization import OptimizerConfig, build_optimizer, schedule_factor


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "one-cycle"])
@given(total=st.integers(2, 300), share=st.floats(0, 0.9))
def test_schedules(schedule: Any, total: int, share: float) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_fraction=share)
    warmup = math.ceil(share * total)
    for step in range(total):
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        fall = {
            "linear": 1 - step / total,
            "cosine": (1 + math.cos(math.pi * step / total)) / 2,
            "constant": 1.0,
            "one-cycle": 1.0
            if step < warmup
            else (1 + math.cos(math.pi * (step + 1 - warmup) / (total - warmup))) / 2,
        }[schedule]
        assert schedule_factor(config, step, total) == pytest.approx(rise * fall, abs=1e-12)


def test_one_cycle_reaches_the_peak_and_ends_at_zero() -> None:
    config = OptimizerConfig(schedule="one-cycle", warmup_steps=30)
    factors = [schedule_factor(config, step, 100) for step in range(100)]
    assert factors.index(max(factors)) == 29
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)


def test_a_share_takes_the_place_of_steps() -> None:
    by_steps = OptimizerConfig(warmup_steps=25)
    by_share = OptimizerConfig(warmup_steps=7, warmup_fraction=0.25)
    for step in range(100):
        assert schedule_factor(by_steps, step, 100) == schedule_factor(by_share, step, 100)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_sgd_is_nesterovs(momentum: float) -> None:
    """Three steps on a quadratic, followed in numpy."""
    layer = nn.Linear(4, 1, bias=False)
    config = OptimizerConfig(
        name="sgd",
        lr=0.1,
        momentum=momentum,
        weight_decay=0.01,
        schedule="constant",
        warmup_steps=0,
    )
    optimizer = build_optimizer(layer, config, 3)["optimizer"]
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weight, velocity = layer.weight.detach().double().numpy().copy(), np.zeros((1, 4))
    for _ in range(3):
        optimizer.zero_grad()
        (0.5 * scale * layer.weight.square()).sum().backward()
        optimizer.step()
        gradient = scale.numpy() * weight + 0.01 * weight
        velocity = momentum * velocity + gradient
        weight = weight - 0.1 * (gradient + momentum * velocity)
    assert np.allclose(layer.weight.detach().numpy(), weight, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \(0, 1\), got 1.0"),
        ({"momentum": 0.0}, r"momentum must be in \(0, 1\), got 0.0"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction must be in \[0, 1\), got 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"momentum": math.nan}, r"momentum must be in \(0, 1\), got nan"),
        ({"warmup_fraction": math.nan}, r"warmup_fraction must be in \[0, 1\), got nan"),
        ({"layer_decay": math.nan}, r"layer_decay must be in \(0, 1\], or null, got nan"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.inf}, "lr must be positive and finite, got inf"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative, got -0.1"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and not negative, got inf"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and not negative, got nan"),
    ],
)
def test_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OptimizerConfig(), **change)
