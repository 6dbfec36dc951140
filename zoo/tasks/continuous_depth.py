"""Classification of images by continuous-depth ResNets, with the solver as a knob."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.data.images import ImageBatch
from zoo.errors import ConfigError
from zoo.families.continuous_depth import ODEBlock, ODEResNet, ODEResNetConfig, SolverKnob
from zoo.tasks.base import ZooModule
from zoo.tasks.image_classification import ImageClassifier

__all__ = ["ODEResNetClassifier", "TaskSolverKnob"]


class TaskSolverKnob(SolverKnob):
    """The knob of the network of a task: `m.solver`, `m.steps`, `m.tolerance`, `m.nfe`.

    Raises:
        ConfigError: a value that `SolverConfig` refuses, or the network has no ODE block.
    """

    def ode_blocks(self) -> list[ODEBlock]:
        """ODE blocks of the network that is measured and used."""
        assert isinstance(self, ZooModule)
        network = self.published_network
        assert isinstance(network, SolverKnob)
        try:
            return network.ode_blocks()
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _set(self, **changes: Any) -> None:
        assert isinstance(self, ZooModule)
        try:
            for network in {self.published_network, self.network}:
                assert isinstance(network, SolverKnob)
                network._set(**changes)
        except ValueError as error:
            raise ConfigError(str(error)) from None


class ODEResNetClassifier(TaskSolverKnob, ImageClassifier):
    """A classifier of images whose residual blocks are ODEs.

    The solver is part of the trained network and can be changed afterwards:
    `m.solver = "rk4"; m.steps = 4; m.tolerance = 1e-3`; `m.nfe` counts evaluations.

    Args:
        network: shape of the network.
        options: those of `ImageClassifier`.
    """

    network_config: ClassVar[type[Any]] = ODEResNetConfig
    network_class: ClassVar[type[nn.Module]] = ODEResNet

    network: ODEResNet

    def __init__(self, network: ODEResNetConfig = ODEResNetConfig(), **options: Any) -> None:
        super().__init__(network, **options)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy, nats; evaluations of the field are logged beside it."""
        loss = super().training_step(batch, batch_idx)
        if self.config.body == "ode":
            self.log("nfe", float(self.network.nfe))
        return loss

    def on_after_backward(self) -> None:
        if self.config.body == "ode":
            self.log("nfe_backward", float(self.network.nfe_backward))
