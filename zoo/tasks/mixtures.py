"""What the multi-task modules with a mixture of experts have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.families.dselect_k import MultiTaskNet, MultiTaskOutput
from zoo.tasks.base import Exportable, ZooModule

__all__ = ["MixtureModule"]


class MixtureModule(ZooModule):
    """A `ZooModule` whose network mixes experts: its gates add to the loss and are logged.

    Subclasses set `task_names`, add `regulariser` to their loss, and hand the inputs of validation
    batches to `watch_gates`. Logged per task are the mean number of active experts, the share of
    saturated bits, the gap between soft and hardened weights, and the mean weight of each expert.
    """

    task_names: tuple[str, ...]

    @property
    def published_config(self) -> Any:
        """See `ZooModule.published_config`; a network that was pruned brings its own along."""
        own = getattr(self.network, "config", None)
        return own if type(own) is type(self.config) else self.config

    def _exportable(self, inputs: dict[str, Tensor]) -> Exportable:
        """The outputs as a function of tensors; experts that no task uses are left out."""
        network = self.network
        if isinstance(network, MultiTaskNet):
            network = _Dense(network.pruned() if network.gate.is_static else network)
        return Exportable(network=_Outputs(network), inputs=inputs, outputs=("outputs",))

    def regulariser(self, output: MultiTaskOutput) -> Tensor:
        """What the gates add to the loss at this point of the training."""
        if not isinstance(self.network, MultiTaskNet):
            return output.outputs.new_zeros(())
        progress = 1.0
        if self._trainer is not None:  # a step may be timed on its own
            progress = min(self.global_step / self.trainer.estimated_stepping_batches, 1.0)
        return self.network.gate.regulariser(output.routing, progress)

    def watch_gates(self, *inputs: Any) -> None:
        """Log what the gates do on a validation batch."""
        if not isinstance(self.network, MultiTaskNet):
            return
        values = {}
        reports = self.network.report(*inputs)
        for name, report in zip(self.task_names, reports, strict=True):
            values[f"active_{name}"] = report.active
            values[f"hardening_gap_{name}"] = report.hardening_gap
            if report.saturated is not None:
                values[f"saturated_{name}"] = report.saturated
            values |= {f"usage_{name}_{i}": weight for i, weight in enumerate(report.usage)}
        values["active"] = sum(report.active for report in reports) / len(reports)
        self.log_dict(values, batch_size=len(inputs[0]))


class _Dense(nn.Module):
    """A network that computes all its experts: which are skipped cannot depend on the input."""

    def __init__(self, network: MultiTaskNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> MultiTaskOutput:
        output: MultiTaskOutput = self.network(*inputs, dispatch="dense")
        return output


class _Outputs(nn.Module):
    """The outputs of a network alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self.network(*inputs).outputs,)
