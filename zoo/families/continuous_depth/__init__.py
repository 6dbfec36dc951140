"""Continuous-depth networks: layers that are the flow of an ordinary differential equation.

Source: Chen, Rubanova, Bettencourt, Duvenaud, "Neural Ordinary Differential Equations", NeurIPS
2018 (arXiv:1806.07366).
"""

from zoo.families.continuous_depth.blocks import (
    ODEBlock,
    SolverKnob,
    TimeVaryingConv2d,
    basis_weights,
)
from zoo.families.continuous_depth.image_networks import (
    ODE_RESNET_PRESETS,
    ODEResNet,
    ODEResNetConfig,
    ode_resnet_preset,
)
from zoo.families.continuous_depth.solvers import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    METHODS,
    TABLEAUS,
    Solution,
    SolverConfig,
    Statistics,
    solve,
)

__all__ = [
    "ADAPTIVE_METHODS",
    "FIXED_METHODS",
    "METHODS",
    "ODE_RESNET_PRESETS",
    "TABLEAUS",
    "ODEBlock",
    "ODEResNet",
    "ODEResNetConfig",
    "Solution",
    "SolverConfig",
    "SolverKnob",
    "Statistics",
    "TimeVaryingConv2d",
    "basis_weights",
    "ode_resnet_preset",
    "solve",
]
