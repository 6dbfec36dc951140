"""An ODE as a layer, weights that vary in depth, and the knob that chooses the solver.

Sources: Chen et al. (arXiv:1806.07366); for weights as functions of depth, Queiruga et al.
(arXiv:2008.02389, arXiv:2106.10820).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.choices import check_choice
from zoo.families.continuous_depth.solvers import (
    TABLEAUS,
    Solution,
    SolverConfig,
    Statistics,
    solve,
)

__all__ = ["BasisName", "ODEBlock", "SolverKnob", "TimeVaryingConv2d", "basis_weights"]

BasisName = Literal["piecewise_constant", "piecewise_linear", "legendre"]

_BASES: tuple[str, ...] = get_args(BasisName)

_ROUNDING = 1e-12
"""Relative room for rounding where a time stands for the boundary of an element."""


class ODEBlock(nn.Module):
    """The flow of a field over an interval of time, as a layer.

    Args:
        field: dy/dt of `(t, y)`; y and the result are B x S.
        solver: how to integrate; may be set to another at any time.
        interval: start and end.
        one_interval: whether calls are over one interval, so that evaluations of fixed steps are
            known beforehand; not where `trajectory` is called with any number of times.

    Attributes:
        statistics: cost of the last call in eager mode; None before.
    """

    def __init__(
        self,
        field: nn.Module,
        solver: SolverConfig = SolverConfig(),
        interval: tuple[float, float] = (0.0, 1.0),
        *,
        one_interval: bool = True,
    ) -> None:
        super().__init__()
        self.field, self.solver, self.interval = field, solver, interval
        self.one_interval = one_interval
        self.statistics: Statistics | None = None

    def forward(self, y: Tensor) -> Tensor:
        """State at the end of the interval of a state at its start; both B x S."""
        return self.trajectory(y, self.interval).last

    def trajectory(self, y: Tensor, times: Sequence[float]) -> Solution:
        """States at several times, from the state `y` at the first of them; see `solve`."""
        solution = solve(self.field, y, times, self.solver)
        if not torch.compiler.is_compiling():
            self.statistics = solution.statistics
        return solution

    def extra_repr(self) -> str:
        return f"solver={self.solver}, interval={self.interval}"


class SolverKnob:
    """For modules with ODE blocks somewhere inside: one place to choose the solver of all of them.

    `module.solver = "rk4"; module.steps = 4; module.tolerance = 1e-3`, and so `gradient_mode`,
    `error_control` and `max_nfe`; after a call in eager mode `module.nfe` tells what it cost. The
    values apply to all blocks; reading gives those of the first one.

    Raises:
        ValueError: a value that `SolverConfig` refuses, or there is no ODE block.
    """

    def ode_blocks(self) -> list[ODEBlock]:
        """All ODE blocks, in order."""
        assert isinstance(self, nn.Module)
        blocks = [module for module in self.modules() if isinstance(module, ODEBlock)]
        if not blocks:
            raise ValueError("this network has no ODE block, so there is no solver to choose")
        return blocks

    def _set(self, **changes: Any) -> None:
        for block in self.ode_blocks():
            block.solver = dataclasses.replace(block.solver, **changes)
            block.statistics = None

    @property
    def solver(self) -> str:
        """Name of the solver, one of `METHODS`."""
        return self.ode_blocks()[0].solver.method

    @solver.setter
    def solver(self, method: Any) -> None:
        self._set(method=method)

    @property
    def steps(self) -> int:
        """Steps per interval of fixed-step solvers."""
        return self.ode_blocks()[0].solver.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._set(steps=steps)

    @property
    def tolerance(self) -> float:
        """Tolerance of adaptive solvers."""
        return self.ode_blocks()[0].solver.tolerance

    @tolerance.setter
    def tolerance(self, tolerance: float) -> None:
        self._set(tolerance=tolerance)

    @property
    def gradient_mode(self) -> str:
        """How gradients are computed: "discrete", "checkpoint" or "adjoint"."""
        return self.ode_blocks()[0].solver.gradient

    @gradient_mode.setter
    def gradient_mode(self, mode: Any) -> None:
        self._set(gradient=mode)

    @property
    def error_control(self) -> str:
        """What the error of adaptive solvers is of: "batch", "worst_sample" or "each_sample"."""
        return self.ode_blocks()[0].solver.error_control

    @error_control.setter
    def error_control(self, control: Any) -> None:
        self._set(error_control=control)

    @property
    def max_nfe(self) -> int:
        """Largest number of evaluations in one solve; more is an error."""
        return self.ode_blocks()[0].solver.max_nfe

    @max_nfe.setter
    def max_nfe(self, evaluations: int) -> None:
        self._set(max_nfe=evaluations)

    @property
    def nfe(self) -> int:
        """Evaluations of all fields in the last forward pass.

        Fixed steps over one interval are known beforehand; else it is 0 before the first call.
        """
        return sum(_nfe(block) for block in self.ode_blocks())

    @property
    def nfe_backward(self) -> int:
        """Further evaluations in the backward pass of the last forward pass; see `Statistics`."""
        found = (block.statistics for block in self.ode_blocks())
        return sum(s.nfe_backward for s in found if s is not None)


def _nfe(block: ODEBlock) -> int:
    if block.statistics is not None:
        return block.statistics.nfe
    if not (block.solver.is_fixed and block.one_interval):
        return 0
    return block.solver.steps * TABLEAUS[block.solver.method].stages


def basis_weights(basis: BasisName, nodes: int, t: float) -> list[tuple[int, float]]:
    """Functions of a basis on [0, 1] at a time, as (index, value) of those that are not zero.

    Times outside are clamped: adaptive solvers look a little past the end.

    Args:
        basis: "piecewise_constant" (one function per element), "piecewise_linear" (hat functions
            on equally spaced nodes) or "legendre" (shifted Legendre polynomials).
        nodes: number of functions, at least 1.
        t: the time.

    Raises:
        ValueError: there is no such basis, or no function.
    """
    if basis not in _BASES:
        check_choice("basis", basis, BasisName)
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, got {nodes}")
    t = min(max(t, 0.0), 1.0)
    if basis == "legendre":
        x, values = 2.0 * t - 1.0, [1.0, 2.0 * t - 1.0]
        for n in range(1, nodes - 1):
            values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
        return list(enumerate(values[:nodes]))
    if basis == "piecewise_constant":
        return [(min(math.floor(nodes * t + _ROUNDING), nodes - 1), 1.0)]
    position = t * (nodes - 1)
    left = min(math.floor(position), nodes - 2)
    if nodes == 1:
        return [(0, 1.0)]
    share = position - left
    return [(i, w) for i, w in ((left, 1.0 - share), (left + 1, share)) if w]


class TimeVaryingConv2d(nn.Module):
    """A convolution whose kernel and bias are functions of time, theta(t) = sum_k phi_k(t) theta_k.

    Args:
        in_channels, out_channels: channels.
        kernel_size: odd; the size of images is kept.
        groups: groups of channels.
        nodes: number of basis functions; 1 is an ordinary convolution.
        basis: see `basis_weights`.

    Raises:
        ValueError: the kernel's size is not odd, the groups do not divide the channels, or there is
            no such basis, or no function.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        groups: int = 1,
        nodes: int = 1,
        basis: BasisName = "piecewise_constant",
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels={in_channels} and out_channels={out_channels}, "
                f"got {groups}"
            )
        basis_weights(basis, nodes, 0.0)
        self.groups, self.nodes, self.basis = groups, nodes, basis
        self.padding = kernel_size // 2
        shape = (out_channels, in_channels // groups, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(nodes, *shape))
        self.bias = nn.Parameter(torch.empty(nodes, out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of a convolution, for each node; polynomials start constant."""
        fan_in = self.weight[0, 0].numel()
        bound = 1.0 / math.sqrt(fan_in)
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)
            if self.basis == "legendre":
                nn.init.zeros_(parameter[1:])

    def forward(self, t: float, x: Tensor) -> Tensor:
        """B x in x H x W at time t to B x out x H x W."""
        return self._convolve(x, self._at(self.weight, t), self._at(self.bias, t))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.padding, groups=self.groups)

    def _at(self, coefficients: Tensor, t: float) -> Tensor:
        terms = basis_weights(self.basis, self.nodes, t)
        index, share = terms[0]
        value = coefficients[index] if share == 1.0 else share * coefficients[index]
        for index, share in terms[1:]:
            value = torch.add(value, coefficients[index], alpha=share)
        return value

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape[1:])}, nodes={self.nodes}, basis={self.basis}"
