"""What a training step costs under `zoo fit` over a bare torch loop.

Both train the same net on the same batches with the same optimizer, schedule, clipping and
precision. The bare loop has its batches ready, logs nothing and shows nothing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from tests.benchmarks._harness import Comparison, race
from zoo import training
from zoo.tasks.optimization import build_optimizer

ROUNDS = 4
RECIPE = "cached-transformer-lm.tiny-shakespeare"
AT_MOST_LOST = 0.05

SIZES = {
    "the recipe's net, 4 streams": (8, ["data.streams=4"]),
    "a small net, 2 streams": (
        100,
        [
            "data.streams=2",
            "data.segments_per_step=1",
            "model.network.dim=64",
            "model.network.depth=2",
        ],
    ),
}
"""Timed steps of a round (one more is not timed), and what differs from the recipe: smaller batches
show a cost per step the better."""


def run(rounds: int) -> list[Comparison]:
    """Seconds per step, each round in a fit of its own."""
    comparisons = []
    for name, (steps, changes) in SIZES.items():
        overrides = [
            *changes,
            "model.compile=false",  # compiling takes longer than all the rest
            "trainer.precision=32-true",
            "trainer.accelerator=cpu",
            "trainer.max_epochs=1",
            f"trainer.limit_train_batches={steps + 1}",
            "trainer.limit_val_batches=0",
        ]
        taken = race(
            {
                "zoo": functools.partial(_zoo, overrides),
                "bare": functools.partial(_bare, overrides, steps),
            },
            rounds,
        )
        comparisons.append(
            Comparison(
                name=name,
                contestant="step of `zoo fit`",
                peer="step of a bare torch loop",
                values=taken["zoo"],
                peer_values=taken["bare"],
                at_most=1 / (1 - AT_MOST_LOST),
            )
        )
    return comparisons


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the terminal, nor on what Lightning takes for one."""
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        mock.patch.object(sys, "argv", sys.argv[:1]),  # the command's words are not LightningCLI's
    ):
        warnings.simplefilter("ignore")
        yield


class _Watch(Callback):
    """Takes the time from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.ends.append(time.perf_counter())


def _zoo(overrides: list[str]) -> float:
    """Seconds per step of `zoo.fit`, with all of its own callbacks and its logger."""
    watch, callbacks = _Watch(), training._callbacks
    with (
        tempfile.TemporaryDirectory() as folder,
        _quiet(),
        # Ahead of the others, whose work at the end of a step then counts for the next one.
        mock.patch.object(training, "_callbacks", lambda *given: [watch, *callbacks(*given)]),
    ):
        training.fit(RECIPE, overrides, out=Path(folder) / "run")
    return (watch.ends[-1] - watch.ends[0]) / (len(watch.ends) - 1)


def _bare(overrides: list[str], steps: int) -> float:
    """Seconds per step of what one would write without Lightning."""
    recipe = training.read_recipe(RECIPE, overrides)
    with _quiet():
        cli = training.instantiate(recipe, logger=False, enable_progress_bar=False)
    network, config = cli.model.network.train(), cli.model.optimizer_config
    clip = recipe.options["trainer"]["gradient_clip_val"]
    cli.datamodule.setup()
    batches = list(itertools.islice(cli.datamodule.train_dataloader(), steps + 1))
    built = build_optimizer(network, config, steps + 1)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    state, start = None, 0.0
    for index, (tokens, reset) in enumerate(batches):
        state = None if state is None else state.reset(reset)
        logits, state = network(tokens[:, :-1], state)
        state = state.detach()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        scheduler.step()
        if index == 0:
            start = time.perf_counter()
    return (time.perf_counter() - start) / steps
