"""Models of irregularly sampled trajectories: training, extrapolation, and draws of the future."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from zoo.data.spirals import SPACING, WINDOW, SpiralDataModule, SpiralSet
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.continuous_depth import ODEBlock
from zoo.families.continuous_depth.trajectories import (
    HORIZON,
    LatentODE,
    TrajectoryConfig,
    TrajectoryRNN,
    build_trajectory_network,
)
from zoo.progress import track
from zoo.tasks.base import (
    Exportable,
    Measurement,
    ZooModule,
    as_numbers,
    check_count,
    count_macs,
    seeded_generator,
)
from zoo.tasks.continuous_depth import TaskSolverKnob
from zoo.tasks.optimization import OptimizerConfig

__all__ = ["Extrapolation", "TrajectoryModel"]

_BATCH = 250
_DIAGNOSED = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """What a model makes of a few observations.

    Attributes:
        times: when, T.
        mean: points from the mean of the latent state, T x D.
        draws: points from draws of the latent state, S x T x D.
    """

    times: tuple[float, ...]
    mean: Tensor
    draws: Tensor


Observed: TypeAlias = tuple[Sequence[float] | Tensor, Sequence[Sequence[float]] | Tensor]
"""Times and values of the observations of one trajectory."""


class TrajectoryModel(TaskSolverKnob, ZooModule):
    """A latent ODE, or the recurrent network it is compared with.

    Args:
        network: shape of the network.
        optimizer: how it is trained.
        compile: refused: the loops over time are too long to compile.

    Raises:
        ConfigError: `compile` is True.
    """

    network_config: ClassVar[type[Any]] = TrajectoryConfig
    head_parameters: ClassVar[tuple[str, ...]] = tuple(
        f"decoder.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    )
    protocols: ClassVar[dict[str, str]] = {
        "extrapolation": "root mean square error over the 100 points after the window, without "
        "noise, of each test spiral; the mean over spirals",
    }

    refinement_tolerance: ClassVar[float] = 0.005

    network: LatentODE | TrajectoryRNN

    def __init__(
        self,
        network: TrajectoryConfig = TrajectoryConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, compile)
        if compile:
            raise ConfigError("models of trajectories are not compiled: set model.compile=false")
        self.network = build_trajectory_network(network)

    def _loss(self, batch: SpiralSet) -> Tensor:
        grid = [(i + 1) * SPACING for i in range(WINDOW)]
        return self.network.loss(batch.times, batch.values, batch.chosen, grid)

    def validation_step(self, batch: SpiralSet, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), batch_size=len(batch.values))

    def training_step(self, batch: SpiralSet, batch_idx: int) -> Tensor:
        """Negative evidence lower bound (latent ODE) or log-likelihood per observation, nats;
        evaluations of the field are logged beside it."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        self.log_evaluations("nfe")
        return loss

    def samples(self, batch: SpiralSet) -> int:
        return len(batch.values)

    def macs(self, batch: SpiralSet) -> int:
        """Multiply-accumulates per spiral of predicting the 100 points after the window."""
        after = [(WINDOW + i + 1) * SPACING for i in range(WINDOW)]
        return count_macs(self.network, batch.times[:1], batch.values[:1], after)

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a model of trajectories takes any number of observations and is asked for any times, "
            "where an exported program has one number of each"
        )

    @torch.no_grad()
    def measure(self, datamodule: SpiralDataModule, protocol: str) -> Measurement:  # type: ignore[override]
        """Root mean square error of each test spiral; sampling units are spirals.

        Raises:
            ZooError: there is no such protocol.
        """
        if protocol not in self.protocols:
            raise ZooError(
                f"Unknown protocol {protocol!r}; choose one of {', '.join(self.protocols)}."
            )
        spirals = datamodule.test
        at = [(i + 1) * SPACING for i in range(WINDOW, 2 * WINDOW)]
        errors = []
        starts = range(0, len(spirals.truth), _BATCH)
        for start in track(starts, "spirals", len(starts)):
            rows = slice(start, start + _BATCH)
            with self.evaluating():
                predicted = self.network(*self._observed(spirals, rows), at).cpu()
            gap = (predicted - spirals.truth[rows, WINDOW:]).double()
            errors.append(gap.square().mean((1, 2)).sqrt())
        sums = torch.cat(errors)
        if len(sums) != datamodule.count:
            raise AssertionError(f"counted {len(sums)} spirals of {datamodule.count}")
        return Measurement(
            metric="rmse",
            unit="spiral",
            sums=sums,
            counts=torch.ones(len(sums), dtype=torch.int64),
            split="test",
        )

    def _observed(self, spirals: SpiralSet, rows: slice) -> tuple[Tensor, Tensor]:
        """Times and values of some spirals, as the network's parameters are kept."""
        like = next(self.network.parameters())
        return spirals.times[rows].to(like), spirals.values[rows].to(like)

    @torch.no_grad()
    def block_states(self, datamodule: SpiralDataModule) -> list[tuple[ODEBlock, Tensor]]:  # type: ignore[override]
        assert isinstance(self.network, LatentODE)
        spirals = datamodule.test
        with self.evaluating():
            z0, _ = self.network.encode(*self._observed(spirals, slice(_DIAGNOSED)))
        solver = dataclasses.replace(self.network.flow.solver, steps=WINDOW, gradient="discrete")
        return [(ODEBlock(self.network.flow.field, solver, (0.0, 2 * WINDOW * SPACING)), z0)]

    @torch.no_grad()
    def predict(
        self,
        observed: Observed | Sequence[Observed],
        at: Sequence[float] | Tensor | None = None,
        *,
        draws: int = 0,
        seed: int | None = None,
    ) -> list[Extrapolation]:
        """Points of trajectories at other times, before, between or after their observations.

        Args:
            observed: pairs of times (N, increasing, at least 0) and values (N x D), or one pair;
                the trajectories may have different numbers of observations.
            at: where to predict, T, increasing, at least 0; None: `HORIZON` points after the last
                observation of each.
            draws: number of draws S from the distribution of the latent state.
            seed: makes the draws repeatable.

        Raises:
            ConfigError: `draws` is no whole number, or negative; `seed` is none.
            DataError: observations or times are no numbers, too few, not finite, or do not fit
                together.
            ZooError: the recurrent network is asked for draws, or for a time before the last.
            SolverError: a time is too late for the solver's `max_nfe`, see `LatentODE`.
        """
        draws = check_count("draws", draws, 0)
        if draws and not isinstance(self.network, LatentODE):
            raise ZooError("A recurrent network has no latent state to draw; use draws=0.")
        wanted = None
        if at is not None:
            moments = as_numbers(at, "Times to predict").flatten()
            wanted = tuple(float(t) for t in moments)
            if not wanted:
                raise DataError("Give at least one time to predict.")
        generator = seeded_generator(seed)
        return [
            self._extrapolate(times, values, wanted, draws, generator)
            for times, values in _pairs(observed)
        ]

    def _extrapolate(
        self,
        times: Sequence[float] | Tensor,
        values: Sequence[Sequence[float]] | Tensor,
        at: tuple[float, ...] | None,
        draws: int,
        generator: torch.Generator,
    ) -> Extrapolation:
        dtype = next(self.network.parameters()).dtype
        moments = as_numbers(times, "Times of observations").to(self.device, dtype)
        points = as_numbers(values, "Observations").to(self.device, dtype)
        if moments.ndim != 1 or points.shape != (len(moments), self.config.dim):
            raise DataError(
                f"Expected N times and N x {self.config.dim} values, got {tuple(moments.shape)} "
                f"and {tuple(points.shape)}."
            )
        if len(moments) < 2:
            raise DataError("Give at least two observations.")
        if not (torch.isfinite(points).all() and torch.isfinite(moments).all()):
            raise DataError("Observations and their times must be finite.")
        if bool((moments.diff() <= 0).any()) or float(moments[0]) < 0:
            raise DataError("Times of observations must be increasing, from 0 on.")
        if at is None:
            at = tuple(float(moments[-1]) + (i + 1) * self.config.spacing for i in range(HORIZON))
        network = self.network
        try:
            with self.evaluating():
                mean = network(moments[None], points[None], at)[0].cpu()
                drawn = mean[None][:0]
                if draws:
                    assert isinstance(network, LatentODE)
                    centre, log_std = network.encode(moments[None], points[None])
                    noise = torch.randn(draws, centre.shape[1], generator=generator).to(centre)
                    drawn = network.decode(centre + noise * log_std.exp(), at).cpu()
        except ValueError as error:
            raise ZooError(f"{error}.") from None
        return Extrapolation(times=at, mean=mean, draws=drawn)


def _pairs(observed: Any) -> list[Observed]:
    """Pairs of times and values, of which one may come alone; lists and tuples are alike.

    Raises:
        DataError: it is something else.
    """
    listed = None if isinstance(observed, str) or not hasattr(observed, "__iter__") else [*observed]
    if listed is not None and len(listed) == 2 and _is_row(listed[0]):
        return [(listed[0], listed[1])]
    if listed == []:
        raise DataError("predict got no trajectories.")
    pairs = []
    for pair in [observed] if listed is None else listed:
        if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise DataError(f"predict takes pairs of times and values, got {pair!r:.60}.")
        pairs.append((pair[0], pair[1]))
    return pairs


def _is_row(given: Any) -> bool:
    """Whether something is a row of numbers: the times of one pair, and no pair itself."""
    try:
        return torch.as_tensor(given).ndim == 1
    except (TypeError, ValueError, RuntimeError):
        return False
