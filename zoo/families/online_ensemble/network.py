"""A frozen encoder and what learns a stream of its encodings.

Shape notation: B images or texts, d encoding width, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.families.online_ensemble.encoders import EncoderConfig, build_encoder
from zoo.families.online_ensemble.ensemble import EnsembleConfig, GatedEnsemble
from zoo.families.online_ensemble.learners import (
    LinearDiscriminant,
    NearestMean,
    OnlineLearner,
    RidgeClassifier,
    SoftmaxClassifier,
)
from zoo.families.online_ensemble.ridge_ensemble import RidgeEnsemble, RidgeEnsembleConfig
from zoo.families.online_ensemble.texts import TextEncoderConfig

__all__ = [
    "AnchorConfig",
    "OnlineNetwork",
    "OnlineNetworkConfig",
    "OnlineTextNetworkConfig",
    "build_learner",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """Options of the learners that are no ensembles; see their classes."""

    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Of the nearest mean."""
    shrinkage: float = 1e-3
    """Of the covariance of the linear discriminant."""
    ridge: float = 1e-3
    """Penalty of the ridge regression, relative."""
    projection: int = 0
    """Random ReLU features before the ridge regression; 0: none."""
    lr: float = 0.1
    """Learning rate of the softmax head."""
    seed: int = 0
    """Of the random projection."""


# Frozen, so that one of each can be the default of many.
_ENCODER, _TEXT_ENCODER, _ANCHOR = EncoderConfig(), TextEncoderConfig(), AnchorConfig()
_ENSEMBLE, _RIDGE_ENSEMBLE = EnsembleConfig(), RidgeEnsembleConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineNetworkConfig:
    """Shape of an `OnlineNetwork`.

    Raises:
        ValueError: a value is out of range.
    """

    encoder: EncoderConfig = _ENCODER
    """The frozen encoder."""
    learner: Literal[
        "ridge-ensemble",
        "ensemble",
        "nearest-mean",
        "linear-discriminant",
        "ridge",
        "softmax",
    ] = "ridge-ensemble"
    """What learns: an ensemble solved together, one trained by gradient, or an anchor."""
    ridge_ensemble: RidgeEnsembleConfig = _RIDGE_ENSEMBLE
    """The ensemble, when `learner` is "ridge-ensemble"."""
    ensemble: EnsembleConfig = _ENSEMBLE
    """The ensemble, when `learner` is "ensemble"."""
    anchor: AnchorConfig = _ANCHOR
    """The anchor, when `learner` is one."""
    num_classes: int = 0
    """Classes there is room for at first."""
    grows: bool = True
    """Make room for a class when it first appears; else it is refused."""

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {self.num_classes}")
        if not self.grows and not self.num_classes:
            raise ValueError("a fixed head (grows=False) needs num_classes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineTextNetworkConfig(OnlineNetworkConfig):
    """Shape of an `OnlineNetwork` over texts.

    Raises:
        ValueError: a value is out of range.
    """

    encoder: TextEncoderConfig = _TEXT_ENCODER  # type: ignore[assignment]
    """The frozen encoder."""


def build_learner(config: OnlineNetworkConfig) -> OnlineLearner:
    """The learner of a configuration, of which nothing has been learned yet."""
    dim, anchor = config.encoder.dim, config.anchor
    room = (config.num_classes, config.grows)
    if config.learner == "ridge-ensemble":
        return RidgeEnsemble(dim, config.ridge_ensemble, *room)
    if config.learner == "ensemble":
        return GatedEnsemble(dim, config.ensemble, *room)
    if config.learner == "nearest-mean":
        return NearestMean(dim, anchor.metric, *room)
    if config.learner == "linear-discriminant":
        return LinearDiscriminant(dim, anchor.shrinkage, *room)
    if config.learner == "ridge":
        return RidgeClassifier(dim, anchor.ridge, anchor.projection, *room, anchor.seed)
    return SoftmaxClassifier(dim, anchor.lr, *room)


class OnlineNetwork(nn.Module):
    """Classifies images or texts by what it has learned of a stream of them, in one pass.

    "Inputs" are images, B x C x H x W in [0, 1], or tokens of texts, B x T.

    Args:
        config: its shape.
    """

    def __init__(self, config: OnlineNetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.encoder).requires_grad_(False)
        self.learner = build_learner(config)

    @property
    def current_config(self) -> OnlineNetworkConfig:
        """The configuration with as many classes as there is room for now."""
        return dataclasses.replace(self.config, num_classes=self.learner.num_classes)

    @torch.no_grad()
    def forward_features(self, inputs: Tensor) -> Tensor:
        """Encodings of inputs, B x d; the encoder is never trained.

        Raises:
            ValueError: the inputs have another shape, or values that have no encoding.
        """
        self.config.encoder.check(inputs)
        encodings: Tensor = self.encoder.eval()(inputs)
        return encodings

    def forward_head(self, encodings: Tensor) -> Tensor:
        """Scores of all classes from encodings, B x C."""
        scores: Tensor = self.learner(encodings)
        return scores

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of all classes, B x C; minus infinity for classes that were never seen."""
        return self.forward_head(self.forward_features(inputs))

    def learn(self, inputs: Tensor, labels: Tensor) -> None:
        """Learn one batch of the stream, in place; see `OnlineLearner.learn`."""
        if len(inputs) == 0:
            raise ValueError("the batch is empty; there is nothing to learn")
        self.learner.learn(self.forward_features(inputs), labels)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probabilities of the classes, B x C, as far as the scores of this learner mean any.

        Regression estimates them directly; they are cut to be positive and to sum to one. Other
        scores go through a softmax.
        """
        if isinstance(self.learner, (RidgeClassifier, RidgeEnsemble)):
            return nn.functional.normalize(scores.clamp_min(0), p=1.0, dim=1)
        return scores.softmax(1)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output."""
        return {"stem": r"^encoder", "head": r"^learner"}

    def no_weight_decay(self) -> set[str]:
        """All parameters: nothing here is trained by a decaying optimizer."""
        return {name for name, _ in self.named_parameters()}
