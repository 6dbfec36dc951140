"""Do gates find the experts that the data were made of?"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.expert_recovery import ExpertRecoveryDataModule, RegressionBatch
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.dselect_k import RegressionConfig, RegressionNet
from zoo.families.dselect_k.gates import ACTIVE_TOLERANCE
from zoo.tasks.base import Exportable, Measurement, as_numbers, count_macs, finite
from zoo.tasks.mixtures import MixtureModule
from zoo.tasks.optimization import OptimizerConfig

__all__ = ["ExpertRecovery", "Recovery", "match_experts", "support_recovery"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """How well the supports of all tasks were found.

    Attributes:
        jaccard: of each task, |found and true| / |found or true| after matching, T values.
        active: experts that each task uses, T values.
    """

    jaccard: Tensor
    active: Tensor


def match_experts(estimate: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which true expert each column of an estimate stands for: learned experts have no order.

    Columns are assigned one to one so that the sum of absolute differences is least.

    Args:
        estimate: T x n weights.
        truth: T x n weights, of as many experts.

    Returns:
        Position of the true column for each column of the estimate.

    Raises:
        ZooError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ZooError("Matching experts needs scipy: pip install scipy") from None
    cost = np.abs(estimate[:, :, None] - truth[:, None, :]).sum(0)
    columns: NDArray[np.int64] = linear_sum_assignment(cost)[1]
    return columns


def support_recovery(estimate: Tensor, truth: Tensor, matched: bool = True) -> Recovery:
    """Compare supports at a tolerance of 1e-5.

    Args:
        estimate: weights of a gate, T x any number of experts.
        truth: true weights, T x any number; where the numbers differ, experts without weight are
            added to the fewer.
        matched: match experts first; otherwise expert i is true expert i.

    Raises:
        ValueError: they are of other numbers of tasks.
    """
    if len(estimate) != len(truth):
        raise ValueError(f"estimate has {len(estimate)} tasks, but truth has {len(truth)}")
    count = max(estimate.shape[1], truth.shape[1])
    aligned, truth = (F.pad(w.double(), (0, count - w.shape[1])) for w in (estimate, truth))
    if matched:
        columns = torch.from_numpy(match_experts(aligned.numpy(), truth.numpy()))
        aligned = torch.empty_like(aligned).index_copy_(1, columns, aligned)
    found, true = aligned > ACTIVE_TOLERANCE, truth > ACTIVE_TOLERANCE
    jaccard = (found & true).sum(1).double() / (found | true).sum(1).double()
    return Recovery(jaccard=jaccard, active=found.sum(1).double())


class ExpertRecovery(MixtureModule):
    """Regression tasks whose true experts are known, to see whether a static gate finds them.

    The loss is the squared error, summed over tasks, and what the gates add.

    Args:
        network: shape of the network; its gate is static.
        optimizer: how it is trained.
        true_experts: give the network the true experts and heads and keep them, so that the gates
            alone are trained, and experts need no matching.
        compile: compile the network's blocks for training.

    Raises:
        ConfigError: the gate is not static.
    """

    network_config: ClassVar[type[Any]] = RegressionConfig
    head_parameters: ClassVar[tuple[str, ...]] = ("towers.head.weight", "towers.head.bias")
    protocols: ClassVar[dict[str, str]] = {
        "error": "mean squared error on test examples free of noise, over all tasks",
        "recovery": "Jaccard index of found and true experts, mean over tasks, after matching",
        "active": "experts with weight, mean over tasks",
    }

    network: RegressionNet

    def __init__(
        self,
        network: RegressionConfig = RegressionConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        true_experts: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, compile)
        if network.gate.per_example:
            raise ConfigError("expert recovery needs a static gate: gate.per_example=false")
        self.network = RegressionNet(network)
        self.true_experts = true_experts
        self.task_names = tuple(str(task) for task in range(network.num_tasks))

    def on_fit_start(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, ExpertRecoveryDataModule):
            self._check_fit(datamodule)
            if self.true_experts:
                self._take_experts(datamodule)
        super().on_fit_start()

    def _check_fit(self, data: ExpertRecoveryDataModule) -> None:
        for have, field in (
            (data.tasks, "num_tasks"),
            (data.features, "in_features"),
        ):
            if have != getattr(self.config, field):
                raise ConfigError(
                    f"The data have {field} {have}, but the network is for "
                    f"{getattr(self.config, field)}: set model.network.{field}={have}"
                )

    def _take_experts(self, data: ExpertRecoveryDataModule) -> None:
        for have, field in ((data.width, "expert_width"), (data.experts, "num_experts")):
            if have != getattr(self.config, field):
                raise ConfigError(
                    f"The true experts have {field} {have}, but the network "
                    f"{getattr(self.config, field)}: set model.network.{field}={have}"
                )
        layer = self.network.moe.experts.layers[0]  # type: ignore[index]
        with torch.no_grad():
            layer.weight.copy_(data.truth.expert_weights)  # type: ignore[union-attr]
            layer.bias.copy_(data.truth.expert_biases)  # type: ignore[union-attr]
            self.network.towers.head.weight.copy_(data.truth.heads[:, None])
        self.network.moe.experts.requires_grad_(False)
        self.network.towers.requires_grad_(False)

    def training_step(self, batch: RegressionBatch, batch_idx: int) -> Tensor:
        """Squared error, summed over tasks, and what the gates add."""
        output = self.network(batch.inputs)
        error = F.mse_loss(output.outputs, batch.targets) * len(self.task_names)
        loss = error + self.regulariser(output)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: RegressionBatch, batch_idx: int) -> None:
        error = F.mse_loss(self.network(batch.inputs).outputs, batch.targets)
        self.log("val_loss", error, prog_bar=True, batch_size=len(batch.inputs))
        reports = self.network.report()
        self.log("active", sum(r.active for r in reports) / len(reports), batch_size=1)

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """Inputs B x p in, answers of all tasks B x T out."""
        shape = (batch, self.config.in_features)
        return self._exportable({"inputs": torch.randn(shape, generator=generator)})

    def samples(self, batch: RegressionBatch) -> int:
        return len(batch.inputs)

    def macs(self, batch: RegressionBatch) -> int:
        """Multiply-accumulates of a forward pass per example."""
        return count_macs(self.network, batch.inputs.to(self.device)) // len(batch.inputs)

    @torch.no_grad()
    def recovery(self, datamodule: ExpertRecoveryDataModule) -> Recovery:
        """Compare the supports of the gate with the true ones.

        Raises:
            ConfigError: the data have other tasks or inputs.
            ZooError: a weight is not finite.
        """
        self._check_fit(datamodule)
        with self.evaluating():
            weights = finite(self.network.gate().weights[0].cpu(), "weights of experts")
        return support_recovery(weights, datamodule.truth.mixture, not self.true_experts)

    @torch.no_grad()
    def measure(self, datamodule: ExpertRecoveryDataModule, protocol: str) -> Measurement:  # type: ignore[override]
        """Measure by one of `protocols`, in eval mode.

        Sampling units are test examples for the error, and tasks for the rest.

        Raises:
            ZooError: there is no such protocol, or an output is not finite.
            ConfigError: the data have other tasks or inputs.
        """
        if protocol not in self.protocols:
            raise ZooError(
                f"Unknown protocol {protocol!r}; choose one of {', '.join(self.protocols)}."
            )
        self._check_fit(datamodule)
        if protocol == "error":
            test = datamodule.test
            outputs = self._outputs(test.inputs)
            sums, metric = (outputs - test.targets).double().square().mean(1), "squared_error"
        else:
            found = self.recovery(datamodule)
            sums, metric = (
                (found.jaccard, "jaccard") if protocol == "recovery" else (found.active, "experts")
            )
        return Measurement(
            metric=metric,
            unit="example" if protocol == "error" else "task",
            sums=sums,
            counts=torch.ones(len(sums), dtype=torch.int64),
            split="test",
        )

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """Answers of all tasks, N x T, of inputs N x p.

        Raises:
            DataError: the inputs are no finite numbers, or have another shape.
            ZooError: an output is not finite.
        """
        x = as_numbers(inputs, "Inputs").float()
        if x.ndim != 2 or x.shape[1] != self.config.in_features:
            raise DataError(
                f"predict takes N x {self.config.in_features} numbers, got {tuple(x.shape)}."
            )
        if not x.isfinite().all():
            raise DataError("Inputs must be finite in single precision; one is not.")
        return self._outputs(x)

    def _outputs(self, inputs: Tensor) -> Tensor:
        """Answers N x T of the network, on the CPU."""
        dtype = next(self.network.parameters()).dtype
        with self.evaluating():
            outputs: Tensor = self.network(inputs.to(self.device, dtype)).outputs
        return finite(outputs.float().cpu())
