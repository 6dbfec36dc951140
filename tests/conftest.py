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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Also for what a module's tests share, whose sums would come out in another order."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def deterministic(one_thread: None) -> None:
    """Each test starts from the same seed, with as many threads as it was given: one."""
    import torch

    torch.set_num_threads(1)  # a test before may have changed it
    torch.manual_seed(0)
