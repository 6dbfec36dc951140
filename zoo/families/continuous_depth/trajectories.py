"""Latent ODEs for irregularly sampled trajectories, and the recurrent network they replace.

Source: Chen et al. (arXiv:1806.07366), section 5 and its appendix for the sizes.

Shape notation: B trajectories, N observations, D coordinates, T times, Z latent components.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import SolverError
from zoo.families.choices import check_choices
from zoo.families.continuous_depth.blocks import ODEBlock, SolverKnob
from zoo.families.continuous_depth.solvers import SolverConfig

__all__ = ["LatentODE", "TrajectoryConfig", "TrajectoryRNN", "build_trajectory_network"]


_SOLVER = SolverConfig(method="midpoint", steps=1)

_NARROW = 3.0
"""By how much the posterior's log standard deviation starts below the prior's."""

HORIZON = 10
"""Points that are predicted when no times are given, one spacing apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """Shape of a model of trajectories.

    Raises:
        ValueError: a value is out of range, or none of its choices.
    """

    kind: Literal["latent_ode", "rnn"] = "latent_ode"
    """A latent ODE, or a recurrent network that predicts the next observation (the control)."""
    dim: int = 2
    """Coordinates D of an observation."""
    latent: int = 4
    """Latent components Z."""
    hidden: int = 20
    """Units of the hidden layers of the field and of the decoder."""
    field_layers: int = 1
    """Hidden layers of the field: 1 in the paper's text, 2 in its released example."""
    recurrent: int = 25
    """Units of the recurrent network: the recognition network's, or the control's."""
    noise: float = 0.3
    """Standard deviation of an observation around the decoded state."""
    scale: float = 1.0
    """Size of a coordinate that counts as 1 within the network."""
    spacing: float = 0.02
    """Longest interval of time that is integrated in `solver.steps` steps."""
    solver: SolverConfig = _SOLVER
    """How the network was trained."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("dim", "latent", "hidden", "field_layers", "recurrent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("noise", "scale", "spacing"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class _Field(nn.Module):
    """An autonomous field: linear layers with ELU between them."""

    def __init__(self, latent: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [latent, *[hidden] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(hidden, latent)

    def forward(self, t: float, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = F.elu(layer(z))
        derivative: Tensor = self.out(z)
        return derivative


class LatentODE(SolverKnob, nn.Module):
    """q(z0 | observations), an ODE in latent space from time 0 on, and a decoder.

    Args:
        config: the shape.
    """

    def __init__(self, config: TrajectoryConfig) -> None:
        super().__init__()
        self.config = config
        self.recognition = nn.RNN(config.dim + 1, config.recurrent, batch_first=True)
        self.posterior = nn.Linear(config.recurrent, 2 * config.latent)
        with torch.no_grad():  # draws as wide as the prior would at first drown what is decoded
            self.posterior.bias[config.latent :].sub_(_NARROW)
        self.flow = ODEBlock(
            _Field(config.latent, config.hidden, config.field_layers),
            config.solver,
            one_interval=False,
        )
        self.decoder = nn.Sequential(
            nn.Linear(config.latent, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.dim)
        )

    def encode(self, times: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z0), each B x Z.

        The recognition network runs from the last observation to the first, and is told at each
        how long ago the one before it was; time 0 stands before the first.

        Args:
            times: B x N, increasing along each row, at least 0.
            values: B x N x D.
        """
        gaps = torch.diff(times, dim=1, prepend=torch.zeros_like(times[:, :1]))
        inputs = _inputs(values, gaps, self.config).flip(1)
        _, last = self.recognition(inputs)
        mean, log_std = self.posterior(last[0]).chunk(2, -1)
        return mean, log_std

    def _latent(self, z0: Tensor, times: Sequence[float]) -> Tensor:
        """Latent states at times, B x T x Z."""
        grid, wanted = refined_times(times, self.config.spacing, self.flow.solver.max_nfe)
        if len(grid) == 1:
            return z0[:, None]
        states = self.flow.trajectory(z0, grid).states
        return torch.stack([states[i] for i in wanted], 1)

    def decode(self, z0: Tensor, times: Sequence[float]) -> Tensor:
        """Trajectories, B x T x D, at increasing times of at least 0 from latent states, B x Z."""
        return self.forward_head(self._latent(z0, times))

    def forward_features(
        self, times: Tensor, values: Tensor, at: Sequence[float] | None = None
    ) -> Tensor:
        """As `forward`, but the latent states before the decoder, B x T x Z."""
        at = _next_times(times, self.config.spacing) if at is None else at
        return self._latent(self.encode(times, values)[0], at)

    def forward_head(self, features: Tensor) -> Tensor:
        """Points, ... x D, of latent states, ... x Z."""
        decoded: Tensor = self.decoder(features)
        return self.config.scale * decoded

    def forward(self, times: Tensor, values: Tensor, at: Sequence[float] | None = None) -> Tensor:
        """Trajectories at other times, B x T x D, from the mean of q(z0 | observations).

        Args:
            times, values: observations, see `encode`.
            at: increasing times of at least 0; None: `HORIZON` times after the batch's last.

        Raises:
            ValueError: the times are none, negative, not finite or not increasing.
            SolverError: they are so late that there are more intervals of `spacing` to integrate
                over than the solver's `max_nfe`; or see `solve`.
        """
        return self.forward_head(self.forward_features(times, values, at))

    def loss(self, times: Tensor, values: Tensor, index: Tensor, grid: Sequence[float]) -> Tensor:
        """Negative evidence lower bound per observation, nats, with one draw of z0.

        Args:
            times, values: observations, see `encode`.
            index: which times of the grid they are at, B x N.
            grid: times that all observations are at.
        """
        mean, log_std = self.encode(times, values)
        z0 = mean + torch.randn_like(mean) * log_std.exp()
        decoded = self.decode(z0, grid)
        at = index[..., None].expand(-1, -1, decoded.shape[-1])
        variance = decoded.new_tensor(self.config.noise**2)
        likelihood = F.gaussian_nll_loss(
            decoded.gather(1, at), values, variance.expand_as(values), full=True, reduction="none"
        )
        divergence = 0.5 * (mean.square() + (2 * log_std).exp() - 1.0) - log_std
        return likelihood.sum(-1).mean() + divergence.sum(-1).mean() / values.shape[1]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output, for layer-wise learning rates."""
        return {"stem": r"^(?:recognition|posterior)", "blocks": r"^flow", "head": r"^decoder"}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: biases."""
        return {n for n, p in self.named_parameters() if p.ndim < 2}


class TrajectoryRNN(nn.Module):
    """The control: predicts an observation from those before and the time between.

    Args:
        config: the shape.
    """

    def __init__(self, config: TrajectoryConfig) -> None:
        super().__init__()
        self.config = config
        self.recurrent = nn.RNN(config.dim + 1, config.recurrent, batch_first=True)
        self.out = nn.Linear(config.recurrent, config.dim)

    def forward_features(
        self, times: Tensor, values: Tensor, at: Sequence[float] | None = None
    ) -> Tensor:
        """As `forward`, but the recurrent units before the last layer, B x T x recurrent."""
        at = _next_times(times, self.config.spacing) if at is None else at
        at = _increasing(at)
        last = float(times.max())
        if min(at) < last:
            raise ValueError(
                f"a recurrent network predicts onwards only: {min(at):g} is before the last "
                f"observation at {last:g}"
            )
        state = None
        if values.shape[1] > 1:  # before the last there is something to read
            gaps = torch.diff(times, dim=1)
            _, state = self.recurrent(_inputs(values[:, :-1], gaps, self.config))
        now, value, features = times[:, -1], values[:, -1], []
        for t in at:
            inputs = _inputs(value[:, None], (t - now)[:, None], self.config)
            hidden, state = self.recurrent(inputs, state)
            features.append(hidden[:, 0])
            value = self.forward_head(features[-1])
            now = torch.full_like(now, t)
        return torch.stack(features, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Points, ... x D, of recurrent units, ... x recurrent."""
        points: Tensor = self.out(features)
        return self.config.scale * points

    def forward(self, times: Tensor, values: Tensor, at: Sequence[float] | None = None) -> Tensor:
        """Trajectories at times after the last observation, B x T x D.

        Each prediction is fed back as if it had been observed.

        Args:
            times, values: observations, B x N and B x N x D.
            at: increasing times; None: `HORIZON` times after the batch's last.

        Raises:
            ValueError: a time is not after the last observation.
        """
        return self.forward_head(self.forward_features(times, values, at))

    def loss(self, times: Tensor, values: Tensor, index: Tensor, grid: Sequence[float]) -> Tensor:
        """Negative log-likelihood per observation but the first, nats; see `LatentODE.loss`."""
        gaps = torch.diff(times, dim=1)
        hidden, _ = self.recurrent(_inputs(values[:, :-1], gaps, self.config))
        variance = values.new_tensor(self.config.noise**2).expand_as(values[:, 1:])
        likelihood = F.gaussian_nll_loss(
            self.forward_head(hidden), values[:, 1:], variance, full=True, reduction="none"
        )
        return likelihood.sum(-1).mean()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output, for layer-wise learning rates."""
        return {"stem": r"^recurrent", "head": r"^out"}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: biases."""
        return {n for n, p in self.named_parameters() if p.ndim < 2}


def _inputs(values: Tensor, gaps: Tensor, config: TrajectoryConfig) -> Tensor:
    """What the recurrent networks see: points and the time since the one before, B x N x D + 1."""
    return torch.cat((values / config.scale, gaps[..., None] / config.spacing), -1)


def _next_times(times: Tensor, spacing: float) -> list[float]:
    last = float(times.max())
    return [last + (i + 1) * spacing for i in range(HORIZON)]


def _increasing(times: Sequence[float]) -> list[float]:
    """Checked times to predict.

    Raises:
        ValueError: there are none, or they are negative, not finite or not increasing.
    """
    if not len(times):
        raise ValueError("there must be at least one time")
    checked: list[float] = []
    for t in map(float, times):
        before = checked[-1] if checked else 0.0
        if not before <= t < math.inf or (checked and t == before):
            raise ValueError(f"times must be increasing from 0 on, but {t:g} follows {before:g}")
        checked.append(t)
    return checked


def refined_times(
    times: Sequence[float], spacing: float, max_intervals: float = math.inf
) -> tuple[list[float], list[int]]:
    """Times from 0 on that include `times` and have no gap above `spacing`; where each of them is.

    Args:
        times: increasing, at least 0.
        spacing: the largest gap.
        max_intervals: the largest number of gaps.

    Raises:
        ValueError: there are none, or they are negative, not finite or not increasing.
        SolverError: there would be more gaps than `max_intervals`.
    """
    grid, wanted = [0.0], list[int]()
    for t in _increasing(times):
        start = grid[-1]
        # Before the list is made, which may be larger than memory.
        needed = (t - start) * (1 - 1e-9) / spacing
        if t > start and len(grid) - 1 + max(1.0, needed) > max_intervals:
            raise SolverError(
                f"Up to time {t:g} in steps of at most {spacing:g} are more than "
                f"max_nfe={max_intervals:g} intervals."
            )
        pieces = max(1, -int(-(t - start) * (1 - 1e-9) // spacing))
        if t > start:
            grid.extend(start + (t - start) * k / pieces for k in range(1, pieces))
            grid.append(t)
        wanted.append(len(grid) - 1)
    return grid, wanted


def build_trajectory_network(config: TrajectoryConfig) -> LatentODE | TrajectoryRNN:
    """The network that `config.kind` names."""
    return LatentODE(config) if config.kind == "latent_ode" else TrajectoryRNN(config)
