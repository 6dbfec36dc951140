"""The solver as a knob of a task, what it does to a trained network, and classifiers of images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from zoo.configs import to_json
from zoo.data.augmentation import ImageBatch
from zoo.data.images import ImageDataModule
from zoo.errors import ConfigError, SolverError
from zoo.families.continuous_depth import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    ODEBlock,
    ODEResNet,
    ODEResNetConfig,
    SolverKnob,
)
from zoo.families.continuous_depth.diagnostics import diagnose_block, input_lipschitz
from zoo.progress import track
from zoo.tasks.base import Exportable, ZooModule
from zoo.tasks.image_classification import ImageClassifier

__all__ = ["ODEResNetClassifier", "TaskSolverKnob"]

_TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_REFINED_TOLERANCE = 1e-4
"""Looser, an adaptive solver may be less exact than the fixed steps of the training."""
_DIAGNOSED = 64


class TaskSolverKnob(SolverKnob):
    """The knob of the network of a task: `m.solver`, `m.steps`, `m.tolerance`, `m.gradient_mode`,
    `m.error_control`, `m.max_nfe`, and `m.nfe`.

    Raises:
        ConfigError: a value that `SolverConfig` refuses, or the network has no ODE block.
    """

    refinement_tolerance: ClassVar[float]
    """How far the primary metric may move when steps are refined, for the net to count as an ODE;
    our choice."""

    def ode_blocks(self) -> list[ODEBlock]:
        """ODE blocks of the network that is measured and used."""
        assert isinstance(self, ZooModule)
        network = self.published_network
        blocks = (
            network.ode_blocks() if isinstance(network, SolverKnob) and _has_ode(network) else []
        )
        if not blocks:
            raise ConfigError("This network has no ODE block, so there is no solver to choose.")
        return blocks

    def _networks(self) -> list[SolverKnob]:
        """The network that is used, and the one that is trained where that is another."""
        assert isinstance(self, ZooModule)
        networks = [self.published_network]
        if self.network is not self.published_network:
            networks.append(self.network)
        return [network for network in networks if isinstance(network, SolverKnob)]

    def _set(self, **changes: Any) -> None:
        self.ode_blocks()
        try:
            for network in self._networks():
                network._set(**changes)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @contextlib.contextmanager
    def another_solver(self, **changes: Any) -> Iterator[None]:
        """Use other values of `SolverConfig` for a while."""
        self.ode_blocks()
        blocks = [block for network in self._networks() for block in network.ode_blocks()]
        before = [block.solver for block in blocks]
        try:
            self._set(**changes)
            yield
        finally:
            for block, solver in zip(blocks, before, strict=True):
                block.solver = solver

    def check_exportable(self) -> None:
        """Refuse what cannot be a fixed program.

        Raises:
            ConfigError: a solver chooses its steps while it runs, or iterates until it converges.
        """
        solver = self.ode_blocks()[0].solver
        if not solver.is_fixed:
            adaptive = solver.method in ADAPTIVE_METHODS
            why = "chooses its steps while it runs" if adaptive else "iterates until it converges"
            raise ConfigError(
                f"{solver.method} {why}, and cannot be exported: choose another solver first, one "
                f"of {', '.join(FIXED_METHODS)}."
            )

    def log_evaluations(self, name: Literal["nfe", "nfe_backward"]) -> None:
        """Log what the last forward pass of the training cost, where the network has an ODE."""
        assert isinstance(self, ZooModule)
        network = self.network
        if isinstance(network, SolverKnob) and _has_ode(network):
            self.log(name, float(network.nfe if name == "nfe" else network.nfe_backward))

    def on_after_backward(self) -> None:
        self.log_evaluations("nfe_backward")

    # ------------------------------------------------------------- diagnostics

    def solver_curve(self, datamodule: pl.LightningDataModule) -> list[dict[str, Any]]:
        """The primary metric, and evaluations of the field, under one solver after the other.

        The first entry is the solver of the training. Those marked `refined` are more exact: its
        own steps cut into 2, 4 and 8, rk4 with 4 times as many (8 steps, where it chooses them
        itself), and dopri5 with a tolerance of at most 1e-4, or below that of an adaptive solver.
        """
        assert isinstance(self, ZooModule)
        trained = self.ode_blocks()[0].solver
        primary, fixed = next(iter(self.protocols)), {"gradient": "discrete"}
        settings: list[tuple[bool, dict[str, Any]]] = [(False, {})]
        if trained.is_fixed:
            # Finer steps of the same solver, then coarser ones.
            settings += [(True, {"steps": trained.steps * factor}) for factor in (2, 4, 8)]
            settings += [(False, {"steps": s}) for s in (1, 2) if s < trained.steps]
        for method in ("euler", "midpoint", "rk4"):
            fine = 4 * trained.steps if trained.is_fixed else 8
            if method != trained.method:
                settings.append((method == "rk4", {"method": method, "steps": fine}))
        for tolerance in _TOLERANCES:
            adaptive = {"method": "dopri5", "tolerance": tolerance}
            if trained.method in ADAPTIVE_METHODS:
                refined = tolerance < trained.tolerance
            else:
                refined = tolerance <= _REFINED_TOLERANCE
            settings.append((refined, adaptive))
        curve = []
        for refined, changes in track(settings, "solvers"):
            entry: dict[str, Any] = {"refined": refined}
            with self.another_solver(**fixed, **changes):
                solver = self.ode_blocks()[0].solver
                entry["solver"] = solver.method
                if solver.is_fixed:
                    entry["steps"] = solver.steps
                else:
                    entry["tolerance"] = solver.tolerance
                try:
                    entry["value"] = self.measure(datamodule, primary).value
                    entry["nfe"] = self.nfe
                except SolverError as error:
                    entry["error"] = str(error)
            curve.append(entry)
        return curve

    def block_states(self, datamodule: pl.LightningDataModule) -> list[tuple[ODEBlock, Tensor]]:
        """ODE blocks with states at their start, of test samples."""
        raise NotImplementedError

    def diagnose(self, datamodule: pl.LightningDataModule) -> dict[str, Any]:
        """How far the metric depends on the solver, and what each block does to its states.

        Returns:
            `solver_curve`; `refinement`: the largest change of the metric when steps are refined,
            and whether the net is an ODE, or depends on the steps it was trained with; `blocks`:
            one `BlockDiagnosis` each.
        """
        curve = self.solver_curve(datamodule)
        trained = curve[0]["value"]
        refined = [entry for entry in curve if entry["refined"]]
        spread = max((abs(e["value"] - trained) for e in refined if "value" in e), default=0.0)
        is_flow = spread <= self.refinement_tolerance and all("value" in e for e in refined)
        return {
            "solver_curve": curve,
            "refinement": {
                "spread": spread,
                "tolerance": self.refinement_tolerance,
                "verdict": "an ODE: refining its steps changes nothing that matters"
                if is_flow
                else "a residual network in disguise: it depends on the steps it was trained with",
            },
            "blocks": [to_json(diagnose_block(b, y)) for b, y in self.block_states(datamodule)],
        }


def _has_ode(network: nn.Module) -> bool:
    return any(isinstance(module, ODEBlock) for module in network.modules())


class ODEResNetClassifier(TaskSolverKnob, ImageClassifier):
    """A classifier of images whose residual blocks are ODEs.

    The solver is part of the trained network and can be changed afterwards:
    `m.solver = "rk4"; m.steps = 4; m.tolerance = 1e-3`; `m.nfe` counts evaluations.

    Trained with one number of steps, a network learns to need it, and a finer solver makes another
    network of it (Ott et al., arXiv:2007.15386). Where each batch draws its number of steps, what
    is learned is what they have in common, the flow of the field.

    Args:
        network: shape of the network.
        train_steps: numbers of steps of the fixed-step solver, one of which each training batch
            draws, the same in each run; none: those of `network.solver`, which is also what the
            network is measured and published with.
        options: those of `ImageClassifier`.

    Raises:
        ConfigError: there is no solver of fixed steps to draw the steps of, or a number is below 1.
    """

    network_config: ClassVar[type[Any]] = ODEResNetConfig
    network_class: ClassVar[type[nn.Module]] = ODEResNet
    refinement_tolerance: ClassVar[float] = 0.002

    network: ODEResNet

    def __init__(
        self,
        network: ODEResNetConfig = ODEResNetConfig(),
        train_steps: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        super().__init__(network, **options)
        self.train_steps = tuple(train_steps)
        if not self.train_steps:
            return
        if network.body != "ode" or not network.solver.is_fixed:
            raise ConfigError(
                "train_steps needs an ODE with a solver of fixed steps, one of "
                f"{', '.join(FIXED_METHODS)}; got body {network.body!r} with "
                f"{network.solver.method!r}"
            )
        if min(self.train_steps) < 1:
            raise ConfigError(f"train_steps must all be at least 1, got {[*self.train_steps]}")

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy, nats; evaluations of the field are logged beside it."""
        with self._drawn_steps():
            loss = super().training_step(batch, batch_idx)
        self.log_evaluations("nfe")
        return loss

    @contextlib.contextmanager
    def _drawn_steps(self) -> Iterator[None]:
        """Take one of `train_steps` for a forward pass; which one, the step says, so that a resumed
        run agrees."""
        if not self.train_steps:
            yield
            return
        generator = torch.Generator().manual_seed(self.global_step)
        drawn = int(torch.randint(len(self.train_steps), (), generator=generator))
        with self.another_solver(steps=self.train_steps[drawn]):
            yield

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """As of every classifier; solvers of fixed steps only.

        Raises:
            ConfigError: the solver is none of fixed steps, or there is no preprocessing.
        """
        if self.config.body == "ode":
            self.check_exportable()
        return super().exportable(batch, generator)

    def _diagnosed_images(self, datamodule: ImageDataModule) -> Tensor:
        datamodule.setup("test")
        preprocessing = self._known_preprocessing()
        # Spread over the test set, which may be in the order of its classes.
        total = len(datamodule.test_images)
        rows = torch.arange(min(_DIAGNOSED, total)) * total // min(_DIAGNOSED, total)
        dtype = next(self.published_network.parameters()).dtype
        return preprocessing.normalise(datamodule.test_images[rows]).to(self.device, dtype)

    @torch.no_grad()
    def block_states(self, datamodule: ImageDataModule) -> list[tuple[ODEBlock, Tensor]]:  # type: ignore[override]
        network = self.published_network
        assert isinstance(network, ODEResNet)
        with self.evaluating():
            return network.block_inputs(self._diagnosed_images(datamodule))

    @torch.no_grad()
    def diagnose(self, datamodule: ImageDataModule) -> dict[str, Any]:  # type: ignore[override]
        """As for every task; with `lipschitz`, bounds with respect to the images, and
        `batch_invariance`, how far logits change when an image comes alone."""
        with self.evaluating():
            return self._diagnosis(datamodule)

    def _diagnosis(self, datamodule: ImageDataModule) -> dict[str, Any]:
        found = super().diagnose(datamodule)
        network, images = self.published_network, self._diagnosed_images(datamodule)
        invariance = {}
        for name, changes in (("trained", {}), ("dopri5", {"method": "dopri5"})):
            with self.another_solver(gradient="discrete", **changes):
                together = network(images)
                alone = torch.cat([network(image[None]) for image in images[:8]])
            invariance[name] = float((together[:8] - alone).abs().max())
        preprocessing = self._known_preprocessing()
        with self.another_solver(gradient="discrete"):
            lipschitz = input_lipschitz(
                network, images, [1.0 / s for s in preprocessing.std], tuple(images.shape[1:])
            )
        return {**found, "lipschitz": to_json(lipschitz), "batch_invariance": invariance}
