"""The online ensemble: learns a stream of classes once, without a memory of samples.

Sources: Shanahan et al., "Encoders and Ensembles for Task-Free Continual Learning",
arXiv:2105.13327; Wojcik et al., "Neural Architecture for Online Ensemble Continual Learning",
arXiv:2211.14963, and "Domain-Agnostic Neural Architecture for Class Incremental Continual Learning
in Document Processing Platform", arXiv:2307.05399.
"""

from zoo.families.online_ensemble.encoders import (
    EncoderConfig,
    EncoderNetwork,
    EncoderNetworkConfig,
    build_encoder,
    convert_efficientnet_lite0,
)
from zoo.families.online_ensemble.ensemble import (
    ENSEMBLE_PRESETS,
    EnsembleConfig,
    GatedEnsemble,
    ensemble_preset,
)
from zoo.families.online_ensemble.gates import (
    GateConfig,
    gate,
    hard_topk,
    sinkhorn,
    sinkhorn_topk,
    sorting_network_topk,
    threshold_topk,
)
from zoo.families.online_ensemble.learners import (
    LinearDiscriminant,
    NearestMean,
    OnlineLearner,
    RidgeClassifier,
    SoftmaxClassifier,
)
from zoo.families.online_ensemble.network import (
    AnchorConfig,
    OnlineNetwork,
    OnlineNetworkConfig,
    OnlineTextNetworkConfig,
    build_learner,
)
from zoo.families.online_ensemble.ridge_ensemble import RidgeEnsemble, RidgeEnsembleConfig
from zoo.families.online_ensemble.texts import MiniLMEncoder, TextEncoderConfig, convert_minilm

__all__ = [
    "ENSEMBLE_PRESETS",
    "AnchorConfig",
    "EncoderConfig",
    "EncoderNetwork",
    "EncoderNetworkConfig",
    "EnsembleConfig",
    "GateConfig",
    "GatedEnsemble",
    "LinearDiscriminant",
    "MiniLMEncoder",
    "NearestMean",
    "OnlineLearner",
    "OnlineNetwork",
    "OnlineNetworkConfig",
    "OnlineTextNetworkConfig",
    "RidgeClassifier",
    "RidgeEnsemble",
    "RidgeEnsembleConfig",
    "SoftmaxClassifier",
    "TextEncoderConfig",
    "build_encoder",
    "build_learner",
    "convert_efficientnet_lite0",
    "convert_minilm",
    "ensemble_preset",
    "gate",
    "hard_topk",
    "sinkhorn",
    "sinkhorn_topk",
    "sorting_network_topk",
    "threshold_topk",
]
