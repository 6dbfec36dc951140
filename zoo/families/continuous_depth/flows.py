"""Normalising flows: continuous in time, and a discrete one of affine couplings.

Sources: Chen et al. (arXiv:1806.07366), section 4, for the change of variables
d log p(z(t)) / dt = -tr(df/dz); Hutchinson's estimator of the trace, with its probe held fixed
during a solve, as in Grathwohl et al. (arXiv:1810.01367); Dinh et al. (arXiv:1605.08803) for
couplings.

Shape notation: B points, D dimensions, K conditions (which density a point is from), M tangents.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.choices import check_choices
from zoo.families.continuous_depth.blocks import ODEBlock, SolverKnob
from zoo.families.continuous_depth.solvers import SolverConfig

__all__ = ["ContinuousFlow", "CouplingFlow", "FlowConfig", "FlowField", "build_flow"]


_SOLVER = SolverConfig(method="rk4", steps=16)
_EXACT_UP_TO = 16
"""Dimensions up to which eval mode computes the trace exactly, whatever it is trained with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Shape of a normalising flow.

    Raises:
        ValueError: a value is out of range, or none of its choices.
    """

    kind: Literal["continuous", "coupling"] = "continuous"
    """An ODE, or affine couplings (the control)."""
    dim: int = 2
    """Dimensions D."""
    conditions: int = 1
    """Densities K that the flow knows; it is told which one a point is from."""
    hidden: int = 64
    """Units of the hidden layers."""
    hidden_layers: int = 3
    """Hidden layers of the field; a coupling has two."""
    trace: Literal["exact", "hutchinson"] = "exact"
    """Trace of the Jacobian in training: D products, or an unbiased estimate from one. In eval mode
    nothing is drawn; see `ContinuousFlow.log_prob`."""
    couplings: int = 8
    """Couplings of the control."""
    solver: SolverConfig = _SOLVER
    """How the flow was trained. Steps that are too coarse make a density whose mass is not 1, and
    maximum likelihood finds it: see `DensityModel.mass`."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("conditions", "hidden", "hidden_layers", "couplings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim < 2:
            raise ValueError(f"dim must be at least 2, got {self.dim}")


class FlowField(nn.Module):
    """dz/dt of points, and minus the trace of its Jacobian for their log-density.

    The state holds all that a point needs, so that every solver and gradient mode applies: z (D),
    the change of log-density (1), the condition (K), and for Hutchinson's estimator the probe (D);
    without a probe the trace is exact.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.point = nn.Linear(config.dim, config.hidden)
        self.context = nn.Linear(config.conditions + 1, config.hidden, bias=False)
        self.layers = nn.ModuleList(
            nn.Linear(config.hidden, config.hidden) for _ in range(config.hidden_layers - 1)
        )
        self.out = nn.Linear(config.hidden, config.dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def velocity(
        self, t: float, z: Tensor, condition: Tensor, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dz/dt, B x D, and its derivatives along tangents at z, M x B x D.

        Forward-mode differentiation written out, so that the trace costs one pass.
        """
        context = torch.cat((condition, torch.full_like(condition[:, :1], t)), -1)
        y = torch.tanh(self.point(z) + self.context(context))
        dy = F.linear(tangents, self.point.weight) * (1.0 - y.square())
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            y = torch.tanh(layer(y))
            dy = F.linear(dy, layer.weight) * (1.0 - y.square())
        return self.out(y), F.linear(dy, self.out.weight)

    def forward(self, t: float, state: Tensor) -> Tensor:
        """Derivative of the state, B x (D + 1 + K [+ D])."""
        dim, known = self.config.dim, self.config.dim + 1 + self.config.conditions
        z, condition, probe = state[:, :dim], state[:, dim + 1 : known], state[:, known:]
        if not probe.shape[1]:
            tangents = torch.eye(dim, dtype=z.dtype, device=z.device)[:, None].expand(
                -1, z.shape[0], -1
            )
        else:
            tangents = probe[None]
        dz, along = self.velocity(t, z, condition, tangents)
        trace = (tangents * along).sum((0, 2))
        rest = torch.zeros_like(state[:, dim + 1 :])
        return torch.cat((dz, -trace[:, None], rest), -1)


class ContinuousFlow(SolverKnob, nn.Module):
    """Points of a standard normal density at time 0 are carried to the data at time 1.

    Args:
        config: the shape.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.flow = ODEBlock(FlowField(config), config.solver, interval=(1.0, 0.0))

    def _state(self, z: Tensor, condition: Tensor, probe: Tensor | None) -> Tensor:
        parts = [z, torch.zeros_like(z[:, :1]), condition]
        if self.config.trace == "hutchinson":
            probe = self._probe(z) if probe is None else probe
            parts.append(probe)
        return torch.cat(parts, -1)

    def _probe(self, z: Tensor) -> Tensor:
        """Signs for Hutchinson's estimator, B x D, or B x 0 where the trace is to be exact."""
        if self.training:
            return torch.randint_like(z, 2) * 2 - 1
        dim = self.config.dim
        if dim <= _EXACT_UP_TO:
            return z[:, :0]
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (dim,), generator=generator, device="cpu") * 2 - 1
        return signs.to(z).expand_as(z)

    def log_prob(self, x: Tensor, condition: Tensor, probe: Tensor | None = None) -> Tensor:
        """Natural logarithm of the density, B.

        In eval mode it is a function of the point, also with Hutchinson's estimator: up to 16
        dimensions the trace is exact, and above the signs are the same for all points and calls.

        Args:
            x: points, B x D.
            condition: which density, B x K, ones and zeros.
            probe: signs for Hutchinson's estimator, B x D; None draws them in training.
        """
        return self.forward_head(self.forward_features(x, condition, probe))

    def forward_features(self, x: Tensor, condition: Tensor, probe: Tensor | None = None) -> Tensor:
        """Points of the base density, and the log-determinant of the map from them to the data,
        B x (D + 1); see `log_prob`."""
        last: Tensor = self.flow(self._state(x, condition, probe))
        return last[:, : self.config.dim + 1]

    def forward_head(self, features: Tensor) -> Tensor:
        """Log-density, B, from `forward_features`."""
        return _standard_normal(features[:, :-1]) - features[:, -1]

    forward = log_prob

    def transform(self, z: Tensor, condition: Tensor) -> Tensor:
        """Points of the data, B x D, from points of the base density."""
        # Of their log-density nothing is asked: without signs nothing is drawn for it.
        state = self._state(z, condition, torch.zeros_like(z))
        return self.flow.trajectory(state, (0.0, 1.0)).last[:, : self.config.dim]

    def points_alone(self, x: Tensor, condition: Tensor) -> tuple[ODEBlock, Tensor]:
        """The flow of the points without their log-density, for diagnostics: a block whose state
        is B x D, and the points."""
        block = ODEBlock(
            _PointField(self.flow.field, condition), self.flow.solver, self.flow.interval
        )
        return block, x

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output, for layer-wise learning rates."""
        field = r"^flow\.field\."
        return {
            "stem": field + "(?:point|context)",
            "blocks": field + r"layers\.(\d+)",
            "head": field + "out",
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: biases."""
        return {n for n, p in self.named_parameters() if p.ndim < 2}


class _PointField(nn.Module):
    """dz/dt of points of known conditions."""

    def __init__(self, field: nn.Module, condition: Tensor) -> None:
        super().__init__()
        self.field, self.condition = field, condition

    def forward(self, t: float, z: Tensor) -> Tensor:
        assert isinstance(self.field, FlowField)
        return self.field.velocity(t, z, self.condition, z[None])[0]


class _Coupling(nn.Module):
    """Shifts and scales every other dimension by functions of the rest."""

    def __init__(self, config: FlowConfig, parity: int) -> None:
        super().__init__()
        self.parity = parity
        kept = len(range(parity, config.dim, 2))
        self.net = nn.Sequential(
            nn.Linear(kept + config.conditions, config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, 2 * (config.dim - kept)),
        )
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, condition: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Points after the coupling or its inverse, and the log-determinant of that map, B."""
        y = x.clone()
        shift, scale = self.net(torch.cat((x[:, self.parity :: 2], condition), -1)).chunk(2, -1)
        scale = 3.0 * torch.tanh(scale / 3.0)
        moved = x[:, 1 - self.parity :: 2]
        if inverse:
            y[:, 1 - self.parity :: 2] = (moved - shift) * (-scale).exp()
            return y, -scale.sum(-1)
        y[:, 1 - self.parity :: 2] = moved * scale.exp() + shift
        return y, scale.sum(-1)


class CouplingFlow(nn.Module):
    """The control: a discrete flow of affine couplings (Dinh et al., arXiv:1605.08803).

    Args:
        config: the shape.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.couplings = nn.ModuleList(_Coupling(config, i % 2) for i in range(config.couplings))

    def log_prob(self, x: Tensor, condition: Tensor) -> Tensor:
        """Natural logarithm of the density, B, of points, B x D; see `ContinuousFlow.log_prob`."""
        return self.forward_head(self.forward_features(x, condition))

    def forward_features(self, x: Tensor, condition: Tensor) -> Tensor:
        """As of `ContinuousFlow`."""
        total = torch.zeros_like(x[:, 0])
        for coupling in reversed(self.couplings):
            x, determinant = coupling(x, condition, inverse=True)
            total = total - determinant
        return torch.cat((x, total[:, None]), -1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Log-density, B, from `forward_features`."""
        return _standard_normal(features[:, :-1]) - features[:, -1]

    forward = log_prob

    def transform(self, z: Tensor, condition: Tensor) -> Tensor:
        """Points of the data, B x D, from points of the base density."""
        for coupling in self.couplings:
            z, _ = coupling(z, condition, inverse=False)
        return z

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output, for layer-wise learning rates."""
        return {"blocks": r"^couplings\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: biases."""
        return {n for n, p in self.named_parameters() if p.ndim < 2}


def _standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


def build_flow(config: FlowConfig) -> ContinuousFlow | CouplingFlow:
    """The flow that `config.kind` names."""
    return ContinuousFlow(config) if config.kind == "continuous" else CouplingFlow(config)
