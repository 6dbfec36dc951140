"""Density estimation by normalising flows: training, log-densities, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.densities import DENSITIES, DensityBatch, DensityDataModule
from zoo.errors import ConfigError, DataError, UnknownNameError, ZooError, nearest
from zoo.families.continuous_depth import ODEBlock
from zoo.families.continuous_depth.flows import (
    ContinuousFlow,
    CouplingFlow,
    FlowConfig,
    build_flow,
)
from zoo.progress import track
from zoo.tasks.base import (
    Exportable,
    Measurement,
    ZooModule,
    as_numbers,
    check_count,
    check_positive,
    count_macs,
    seeded_generator,
)
from zoo.tasks.continuous_depth import TaskSolverKnob
from zoo.tasks.optimization import OptimizerConfig

__all__ = ["DensityModel"]

_BATCH = 5_000
_DIAGNOSED = 64
_ALL = "all"


class DensityModel(TaskSolverKnob, ZooModule):
    """A flow that knows several two-dimensional densities.

    Args:
        network: shape of the flow, with one condition for each of `DENSITIES`.
        optimizer: how it is trained.
        compile: compile the flow for training.

    Raises:
        ConfigError: the network is for another number of densities or dimensions.
    """

    network_config: ClassVar[type[Any]] = FlowConfig
    head_parameters: ClassVar[tuple[str, ...]] = ("flow.field.out.weight", "flow.field.out.bias")
    protocols: ClassVar[dict[str, str]] = {
        _ALL: "mean negative log-likelihood of the test points of all densities, each counted once",
        **{name: f"the same for {name} alone" for name in DENSITIES},
    }

    refinement_tolerance: ClassVar[float] = 0.005

    network: ContinuousFlow | CouplingFlow

    def __init__(
        self,
        network: FlowConfig = FlowConfig(conditions=len(DENSITIES)),
        optimizer: OptimizerConfig = OptimizerConfig(),
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, compile)
        if network.conditions != len(DENSITIES) or network.dim != 2:
            raise ConfigError(
                f"the flow is for {network.conditions} densities in {network.dim} dimensions, but "
                f"there are {len(DENSITIES)} in 2: set model.network.conditions={len(DENSITIES)}"
            )
        self.network = build_flow(network)

    def _own(self, given: Tensor) -> Tensor:
        """A tensor on the device and in the precision of the network's parameters."""
        return given.to(next(self.network.parameters()))

    def _condition(self, which: Tensor) -> Tensor:
        return self._own(F.one_hot(which, len(DENSITIES)))

    def training_step(self, batch: DensityBatch, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood, nats; evaluations of the field are logged beside it."""
        loss = -self.network.log_prob(batch.points, self._condition(batch.which)).mean()
        self.log("train_loss", loss, prog_bar=True)
        self.log_evaluations("nfe")
        return loss

    def validation_step(self, batch: DensityBatch, batch_idx: int) -> None:
        loss = -self.network.log_prob(batch.points, self._condition(batch.which)).mean()
        self.log("val_loss", loss, batch_size=len(batch.points))

    def samples(self, batch: DensityBatch) -> int:
        return len(batch.points)

    def macs(self, batch: DensityBatch) -> int:
        """Multiply-accumulates per point of drawing it."""
        return count_macs(
            _Transform(self.network), batch.points[:1], self._condition(batch.which[:1])
        )

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """Points B x 2, and B x K ones and zeros that say which density they are of, in;
        log-densities out. Solvers of fixed steps only.

        Raises:
            ConfigError: the solver is none of fixed steps.
        """
        if self.config.kind == "continuous":
            self.check_exportable()
        which = torch.arange(batch) % len(DENSITIES)
        return Exportable(
            network=_LogDensity(self.network),
            inputs={
                "points": torch.randn(batch, 2, generator=generator),
                "condition": self._condition(which),
            },
            outputs=("log_density",),
        )

    @torch.no_grad()
    def measure(self, datamodule: DensityDataModule, protocol: str) -> Measurement:  # type: ignore[override]
        """Mean negative log-likelihood in nats, as `predict` tells it; sampling units are points.

        Raises:
            ZooError: there is no such protocol.
        """
        if protocol not in self.protocols:
            raise ZooError(
                f"Unknown protocol {protocol!r}; choose one of {', '.join(self.protocols)}."
            )
        names = list(DENSITIES) if protocol == _ALL else [protocol]
        sums = torch.cat(
            [
                -self._log_density(datamodule.test_set(name), name)
                for name in track(names, "densities", len(names))
            ]
        )
        expected = len(names) * datamodule.test_points
        if len(sums) != expected:
            raise AssertionError(f"counted {len(sums)} points of {expected}")
        return Measurement(
            metric="negative_log_likelihood",
            unit="point",
            sums=sums,
            counts=torch.ones(len(sums), dtype=torch.int64),
            split="test",
        )

    @torch.no_grad()
    def block_states(self, datamodule: DensityDataModule) -> list[tuple[ODEBlock, Tensor]]:  # type: ignore[override]
        assert isinstance(self.network, ContinuousFlow)
        found = []
        for index, name in enumerate(DENSITIES):
            points = self._own(datamodule.test_set(name)[:_DIAGNOSED])
            found.append(
                self.network.points_alone(
                    points, self._condition(torch.full((len(points),), index))
                )
            )
        return found

    def _log_density(self, points: Tensor, name: str) -> Tensor:
        parts = []
        for part in torch.split(points, _BATCH):
            which = torch.full((len(part),), list(DENSITIES).index(name))
            with self.evaluating():
                parts.append(self.network.log_prob(self._own(part), self._condition(which)))
        return torch.cat(parts).double().cpu()

    @torch.no_grad()
    def predict(self, points: Sequence[Sequence[float]] | Tensor, density: str = "moons") -> Tensor:
        """Natural logarithm of a density at points, N float64.

        The same for the same points each time: the trace is exact, also in a flow that is trained
        with an estimate of it.

        Args:
            points: N x 2.
            density: one of `zoo.data.densities.DENSITIES`.

        Raises:
            DataError: the points are not N x 2 finite numbers.
            UnknownNameError: the flow knows no such density.
        """
        _check_name(density)
        x = self._own(as_numbers(points, "Points"))
        if x.ndim != 2 or x.shape[1] != 2 or not len(x):
            raise DataError(f"Expected points as N x 2, got shape {tuple(x.shape)}.")
        if not torch.isfinite(x).all():
            raise DataError("Points must be finite.")
        return self._log_density(x, density)

    def mass(self, density: str, *, extent: float = 5.0, cells: int = 200) -> float:
        """Integral of a density over a square, by the midpoint rule.

        It is 1 for the exact solution of the flow's equation, whatever the weights. With too coarse
        a solver it is not, and what is called a likelihood is none.

        Args:
            density: one of `zoo.data.densities.DENSITIES`.
            extent: the square reaches from -extent to extent.
            cells: of the grid along each side.

        Raises:
            ConfigError: `extent` is no positive number, or `cells` no positive whole number.
            UnknownNameError: the flow knows no such density.
        """
        _check_name(density)
        extent, cells = check_positive("extent", extent), check_count("cells", cells)
        side = 2 * extent / cells
        middles = torch.arange(cells) * side + (side / 2 - extent)
        log_density = self.predict(torch.cartesian_prod(middles, middles), density)
        return float(log_density.exp().sum()) * side**2

    @torch.no_grad()
    def sample(self, density: str, n: int, *, seed: int | None = None) -> Tensor:
        """Points drawn from a density, n x 2, in the precision of the network's parameters.

        Args:
            density: one of `zoo.data.densities.DENSITIES`.
            n: how many, at least 1.
            seed: makes them repeatable.

        Raises:
            ConfigError: `n` is no whole number, or below 1; `seed` is no whole number.
            UnknownNameError: the flow knows no such density.
        """
        _check_name(density)
        n = check_count("n", n)
        base = self._own(torch.randn(n, 2, generator=seeded_generator(seed)))
        which = torch.full((n,), list(DENSITIES).index(density))
        with self.evaluating():
            return self.network.transform(base, self._condition(which)).cpu()


class _Transform(torch.nn.Module):
    """`transform` as a forward pass, to be counted."""

    def __init__(self, network: ContinuousFlow | CouplingFlow) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.network.transform(z, condition)


class _LogDensity(torch.nn.Module):
    """`log_prob` with a tuple for its result, as exported programs have it."""

    def __init__(self, network: ContinuousFlow | CouplingFlow) -> None:
        super().__init__()
        self.network = network

    def forward(self, points: Tensor, condition: Tensor) -> tuple[Tensor]:
        return (self.network.log_prob(points, condition),)


def _check_name(density: Any) -> None:
    if not isinstance(density, str) or density not in DENSITIES:
        raise UnknownNameError(
            f"No density {density!r:.60}.{nearest(str(density), DENSITIES)} "
            f"The flow knows: {', '.join(DENSITIES)}."
        )
