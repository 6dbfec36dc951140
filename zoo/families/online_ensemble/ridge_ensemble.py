"""An ensemble whose classifiers are solved together: gated, centred, decorrelated, and exact.

The classifiers of `zoo.families.online_ensemble.ensemble` are trained one step per batch, each as
if it were alone. Here classifier n sees a few random features of the encoding, weighted by how far
the gate selects it,

    h_n(z) = a_n(z) [1, P_n (z - m) / s],

one more classifier sees all of (z - m) / s ungated, and the votes of all of them are summed. That
sum is linear in the weights, so the weights that fit one-hot targets best, given every sample seen
so far, are a ridge regression on accumulated moments: no learning rate, nothing is forgotten, and
the order of the stream does not matter. What E&E's classifiers lack, each other's correlations, is
in the Gram matrix.

With no classifiers it is ridge regression on the encodings; what the gate adds is measured against
that, and against as many ungated random features (RanPAC).

Shape notation: B encodings, d encoding width, N classifiers, M features of a classifier,
D = d + N (1 + M) features in all, C classes.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.families.online_ensemble.gates import GateConfig, gate
from zoo.families.online_ensemble.learners import MomentLearner, normal_rows, solve_ridge

__all__ = ["RidgeEnsemble", "RidgeEnsembleConfig"]

_GATE = GateConfig(kind="entropic", k=16, temperature=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RidgeEnsembleConfig:
    """Shape of a `RidgeEnsemble`.

    Raises:
        ValueError: a value is out of range.
    """

    classifiers: int = 128
    """Number of gated classifiers N."""
    features: int = 8
    """Random projections M of the encoding that each of them sees besides its membership."""
    gate: GateConfig = _GATE
    """How an encoding selects classifiers, by cosines of centred encodings and keys; the
    temperature is in standard deviations of the cosines in the first batch."""
    ridge: float = 1e-3
    """Penalty over the mean diagonal entry of the centred Gram matrix."""
    seed: int = 0
    """Of the keys and the random features."""

    def __post_init__(self) -> None:
        if self.classifiers < 1:
            raise ValueError(f"classifiers must be at least 1, got {self.classifiers}")
        if self.features < 0:
            raise ValueError(f"features must not be negative, got {self.features}")
        if self.gate.k > self.classifiers:
            raise ValueError(
                f"k must not exceed the {self.classifiers} classifiers, got {self.gate.k}"
            )
        if not self.ridge > 0:
            raise ValueError(f"ridge must be positive, got {self.ridge}")


class RidgeEnsemble(MomentLearner):
    """N gated classifiers and an ungated one, solved together from moments.

    The first batch fixes the centre m, the scale s and the width of the gate; all else is a sum
    over the samples.

    Args:
        dim: encoding width d.
        config: its shape.
        num_classes, grows: see `OnlineLearner`.
    """

    keys: Tensor
    projections: Tensor
    centre: Tensor
    scale: Tensor
    width: Tensor

    def __init__(
        self, dim: int, config: RidgeEnsembleConfig, num_classes: int = 0, grows: bool = True
    ) -> None:
        n, m = config.classifiers, config.features
        super().__init__(dim, dim + n * (1 + m), num_classes, grows)
        self.config = config
        self.register_buffer("keys", F.normalize(normal_rows(n, dim, config.seed)))
        self.register_buffer("projections", normal_rows(n * m, dim, config.seed, first=n))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("width", torch.ones(()))

    @property
    def input_dtype(self) -> torch.dtype | None:
        return self.projections.dtype

    def memberships(self, encodings: Tensor) -> Tensor:
        """How far each classifier is selected, B x N."""
        return self._memberships(encodings - self.centre)

    def _memberships(self, centred: Tensor) -> Tensor:
        temperature = self.config.gate.temperature * self.width
        return gate(F.normalize(centred) @ self.keys.T, self.config.gate, temperature)

    def _features(self, encodings: Tensor) -> Tensor:
        """What all classifiers see, B x D: first the ungated, then the memberships."""
        centred = encodings - self.centre
        a, x = self._memberships(centred), centred / self.scale
        seen = F.linear(x, self.projections).view(*a.shape, self.config.features)
        return torch.cat((x, a, (a.unsqueeze(-1) * seen).flatten(1)), 1)

    def _learn(self, encodings: Tensor, labels: Tensor) -> None:
        if not bool(self.counts.any()):
            self._calibrate(encodings)
        super()._learn(encodings, labels)

    def _calibrate(self, encodings: Tensor) -> None:
        # The mean of one sample is the sample; it would be left with nothing to be centred.
        if len(encodings) > 1:
            self.centre.copy_(encodings.mean(0))
        centred = encodings - self.centre
        smallest = torch.finfo(centred.dtype).eps
        self.scale.copy_(centred.norm(dim=1).mean().clamp_min(smallest))
        self.width.copy_((F.normalize(centred) @ self.keys.T).std(correction=0).clamp_min(smallest))

    def _solve(self) -> tuple[Tensor, Tensor]:
        return solve_ridge(self.gram, self.sums, self.counts, self.config.ridge)
