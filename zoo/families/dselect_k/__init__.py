"""DSelect-k: differentiable selection of experts, fast sparse experts, and multi-task networks.

Source: Hazimeh et al., "DSelect-k: Differentiable Selection in the Mixture of Experts with
Applications to Multi-Task Learning", NeurIPS 2021 (arXiv:2106.03760).
"""

from zoo.families.dselect_k.experts import (
    ConvExperts,
    ExpertBank,
    Mixture,
    MixtureOfExperts,
    MLPExperts,
    Towers,
    mix,
)
from zoo.families.dselect_k.gates import (
    DSelectK,
    FixedGate,
    Gate,
    GateConfig,
    GateReport,
    GumbelGate,
    Routing,
    SoftmaxGate,
    TopKGate,
    build_gate,
    smooth_step,
)
from zoo.families.dselect_k.networks import (
    ImagePairConfig,
    ImagePairNet,
    MatrixFactorisation,
    MatrixFactorisationConfig,
    MultiTaskNet,
    MultiTaskOutput,
    RecommenderConfig,
    RecommenderNet,
    RegressionConfig,
    RegressionNet,
)

__all__ = [
    "ConvExperts",
    "DSelectK",
    "ExpertBank",
    "FixedGate",
    "Gate",
    "GateConfig",
    "GateReport",
    "GumbelGate",
    "ImagePairConfig",
    "ImagePairNet",
    "MLPExperts",
    "MatrixFactorisation",
    "MatrixFactorisationConfig",
    "Mixture",
    "MixtureOfExperts",
    "MultiTaskNet",
    "MultiTaskOutput",
    "RecommenderConfig",
    "RecommenderNet",
    "RegressionConfig",
    "RegressionNet",
    "Routing",
    "SoftmaxGate",
    "TopKGate",
    "Towers",
    "build_gate",
    "mix",
    "smooth_step",
]
