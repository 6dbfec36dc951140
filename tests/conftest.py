"""What all tests share: one thread, a fixed seed, and no deadlines on a busy machine."""

from __future__ import annotations

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "zoo",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("zoo")


@pytest.fixture(autouse=True)
def deterministic() -> None:
    """Each test starts from the same seed, with as many threads as it was given: one."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
