"""What learns a stream of encodings once, and the anchors that every ensemble is measured against.

A learner takes batches of encodings with labels in any order of classes, keeps nothing of them but
a state of constant size, and answers for all classes seen so far at any time. All of its state is
in its state dict, so a stream that is stored in the middle goes on bit for bit.

The anchors need no gradient and no ensemble: the nearest class mean; linear discriminant analysis
on running moments (Hayes and Kanan, arXiv:1909.01520); ridge regression to one-hot targets on
accumulated moments, also on a random projection (RanPAC: McDonnell et al., arXiv:2307.02251); and,
as the naive one, a linear softmax head trained by stochastic gradient descent.

Shape notation: B encodings of a batch, d encoding width, C classes, D features of a regression.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "LinearDiscriminant",
    "MomentLearner",
    "NearestMean",
    "OnlineLearner",
    "RidgeClassifier",
    "SoftmaxClassifier",
    "normal_rows",
    "solve_ridge",
]

_SMALLEST = 1e-12
"""Variance that stands for none, so that samples that are all alike leave something to solve."""


def normal_rows(rows: int, columns: int, seed: int, first: int = 0) -> Tensor:
    """Standard normal rows `first` to `first + rows` of an endless matrix that a seed stands for.

    Each row has a generator of its own, so that a row is the same whenever it is drawn, and the
    global random state is left alone.

    Returns:
        rows x columns, float32.
    """
    drawn = torch.empty(rows, columns)
    for row in range(rows):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + first + row)
        torch.randn(columns, generator=generator, out=drawn[row])
    return drawn


class OnlineLearner(nn.Module):
    """Base of all learners.

    Subclasses register `counts` by the constructor here, name in `class_tensors` those tensors
    whose first dimension is the class, and implement `_learn` and `_scores`.

    Args:
        dim: encoding width d.
        num_classes: classes there is room for at first.
        grows: make room for a class when it first appears; else it is refused.
    """

    class_tensors: tuple[str, ...] = ("counts",)
    """Tensors whose first dimension is the class."""

    counts: Tensor

    def __init__(self, dim: int, num_classes: int = 0, grows: bool = True) -> None:
        super().__init__()
        if dim < 1 or num_classes < 0:
            raise ValueError(f"dim and num_classes must be positive, got {dim} and {num_classes}")
        self.dim, self.grows = dim, grows
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def num_classes(self) -> int:
        """Classes there is room for, C: one more than the largest label, where it grows."""
        return len(self.counts)

    @property
    def seen(self) -> Tensor:
        """Which of the classes have appeared, C booleans."""
        return self.counts > 0

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What encodings are cast to; None: they are used as they come."""
        return None

    def learn(self, encodings: Tensor, labels: Tensor) -> None:
        """Learn one batch of the stream, in place. Bad input leaves the state as it was.

        Args:
            encodings: B x d, floating point and finite.
            labels: B integers, 0 or larger; new ones at any time.

        Raises:
            ValueError: the batch is empty or malformed, or a class is beyond a fixed head or the
                memory.
        """
        encodings = self._checked(encodings)
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        if labels.shape != encodings.shape[:1]:
            raise ValueError(
                f"expected {len(encodings)} labels, one per image, got shape {tuple(labels.shape)}"
            )
        if len(labels) == 0:
            raise ValueError("the batch is empty; there is nothing to learn")
        low, high = int(labels.min()), int(labels.max())
        if low < 0:
            raise ValueError(f"labels must be 0 or larger, got {low}")
        if high >= self.num_classes:
            if not self.grows:
                raise ValueError(
                    f"class {high} is beyond the {self.num_classes} classes of this fixed head"
                )
            self.grow(high + 1)
        labels = labels.long()
        self._learn(encodings, labels)
        self.counts += torch.bincount(labels, minlength=self.num_classes)

    def forward(self, encodings: Tensor) -> Tensor:
        """Scores of all classes, B x C; minus infinity for classes that were never seen.

        Raises:
            ValueError: the encodings are malformed, or nothing has been learned yet.
        """
        encodings = self._checked(encodings)
        if not bool(self.seen.any()):
            raise ValueError("nothing has been learned yet, so there is no class to predict")
        return self.unchecked(encodings)

    def unchecked(self, encodings: Tensor) -> Tensor:
        """As `forward`, for input that is known to be sound: a program that looks at no values."""
        return self._scores(encodings).masked_fill(~self.seen, -torch.inf)

    def grow(self, num_classes: int) -> None:
        """Make room for more classes; those there are stay as they are.

        Raises:
            ValueError: there is no memory for so many.
        """
        extra = num_classes - self.num_classes
        if extra <= 0:
            return
        grown = {}
        try:
            for name in self.class_tensors:
                old = getattr(self, name)
                grown[name] = torch.cat((old.detach(), self._new_classes(name, extra).to(old)))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"there is no memory for {num_classes:,} classes; labels are numbers from 0"
            ) from error
        for name, value in grown.items():  # all or none, since their lengths must agree
            self._replace(name, value)

    def _replace(self, name: str, value: Tensor) -> None:
        # A new parameter, since autograd remembers the shape of the old one.
        old = getattr(self, name)
        setattr(self, name, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)

    def _new_classes(self, name: str, extra: int) -> Tensor:
        """Initial value of a class tensor for classes C to C + extra; zero."""
        return torch.zeros(extra, *getattr(self, name).shape[1:])

    def _checked(self, encodings: Tensor) -> Tensor:
        if not encodings.is_floating_point():
            raise ValueError(f"encodings must be floating point, got {encodings.dtype}")
        if encodings.ndim != 2 or encodings.shape[1] != self.dim:
            raise ValueError(
                f"expected encodings of shape B x {self.dim}, got {tuple(encodings.shape)}"
            )
        if not bool(encodings.isfinite().all()):
            raise ValueError("the encodings contain NaN or infinity")
        return encodings if self.input_dtype is None else encodings.to(self.input_dtype)

    def _learn(self, encodings: Tensor, labels: Tensor) -> None:
        raise NotImplementedError

    def _scores(self, encodings: Tensor) -> Tensor:
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # A stream that is stored has as many classes as it has seen by then.
        stored = state_dict.get(f"{prefix}counts")
        if stored is not None and self.grows:
            for name in self.class_tensors:
                self._replace(name, getattr(self, name).detach()[: len(stored)].clone())
            self.grow(len(stored))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class NearestMean(OnlineLearner):
    """The class whose mean encoding is nearest.

    Args:
        dim: encoding width d.
        metric: "euclidean", or "cosine" of encoding and mean.
        num_classes, grows: see `OnlineLearner`.
    """

    class_tensors: tuple[str, ...] = ("counts", "sums")
    sums: Tensor

    def __init__(
        self,
        dim: int,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        num_classes: int = 0,
        grows: bool = True,
    ) -> None:
        super().__init__(dim, num_classes, grows)
        self.metric = metric
        self.register_buffer("sums", torch.zeros(num_classes, dim, dtype=torch.float64))

    def _learn(self, encodings: Tensor, labels: Tensor) -> None:
        self.sums.index_add_(0, labels, encodings.to(self.sums.dtype))

    def _scores(self, encodings: Tensor) -> Tensor:
        means = (self.sums / self.counts.clamp_min(1)[:, None]).to(encodings.dtype)
        if self.metric == "cosine":
            return F.normalize(encodings) @ F.normalize(means).T
        return encodings @ means.T - means.square().sum(1) / 2


class MomentLearner(OnlineLearner):
    """Learners that are functions of the moments of a fixed map of the encodings.

    The moments are sums over the samples, so that what is learned does not depend on their order
    nor on how they are cut into batches, up to rounding. They are accumulated in double precision.

    Args:
        dim: encoding width d.
        features: width D of the map.
        num_classes, grows: see `OnlineLearner`.
    """

    class_tensors: tuple[str, ...] = ("counts", "sums")
    gram: Tensor
    sums: Tensor

    def __init__(self, dim: int, features: int, num_classes: int, grows: bool) -> None:
        super().__init__(dim, num_classes, grows)
        self.register_buffer("gram", torch.zeros(features, features, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(num_classes, features, dtype=torch.float64))
        self._solution: tuple[Tensor, Tensor] | None = None

    def _features(self, encodings: Tensor) -> Tensor:
        return encodings

    def _learn(self, encodings: Tensor, labels: Tensor) -> None:
        features = self._features(encodings)
        # The product of one batch is exact enough in its own precision; the sum over all is not.
        self.gram += features.T @ features
        self.sums.index_add_(0, labels, features.to(self.sums.dtype))
        self._solution = None

    def _scores(self, encodings: Tensor) -> Tensor:
        if self._solution is None:
            weight, bias = self._solve()
            self._solution = weight.to(encodings.dtype), bias.to(encodings.dtype)
        weight, bias = self._solution
        return torch.addmm(bias, self._features(encodings), weight)

    def _solve(self) -> tuple[Tensor, Tensor]:
        """Weights D x C and biases C of the scores."""
        raise NotImplementedError

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """The Gram matrix is symmetric: its lower triangle is stored, by rows, since solvers read
        that one."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        rows, columns = torch.tril_indices(*self.gram.shape)
        destination[f"{prefix}gram"] = self.gram.detach()[rows, columns]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        self._solution = None
        triangle = state_dict.get(f"{prefix}gram")
        if triangle is not None and triangle.ndim == 1:
            rows, columns = torch.tril_indices(*self.gram.shape)
            if len(triangle) == len(rows):
                full = triangle.new_empty(self.gram.shape)
                full[rows, columns] = full[columns, rows] = triangle
                state_dict = {**state_dict, f"{prefix}gram": full}
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MomentLearner:
        self._solution = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]


class LinearDiscriminant(MomentLearner):
    """Linear discriminant analysis with one covariance for all classes, from running moments.

    The covariance is that of the samples about their class means. Streaming LDA as published
    deviates from it in that each sample is centred by the mean of the samples of its class before
    it, and that the first of a class is not centred; here the result is that of the whole batch.

    Args:
        dim: encoding width d.
        shrinkage: s of (1 - s) covariance + s (trace / d) identity.
        num_classes, grows: see `OnlineLearner`.
    """

    def __init__(
        self, dim: int, shrinkage: float = 1e-3, num_classes: int = 0, grows: bool = True
    ) -> None:
        super().__init__(dim, dim, num_classes, grows)
        if not 0.0 < shrinkage <= 1.0:
            raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage}")
        self.shrinkage = shrinkage

    def _solve(self) -> tuple[Tensor, Tensor]:
        n = self.counts.clamp_min(1)[:, None]
        means = self.sums / n
        covariance = (self.gram - self.sums.T @ means) / self.counts.sum()
        covariance = covariance.tril() + covariance.tril(-1).T  # what is stored of it
        scale = covariance.diagonal().mean().clamp_min(_SMALLEST)
        covariance = (1 - self.shrinkage) * covariance
        covariance.diagonal().add_(self.shrinkage * scale)
        weight = torch.linalg.solve(covariance, means.T)
        return weight, -(means.T * weight).sum(0) / 2


class RidgeClassifier(MomentLearner):
    """Ridge regression to one-hot targets, with an unpenalised intercept, from running moments.

    Args:
        dim: encoding width d.
        ridge: penalty over the mean diagonal entry of the centred Gram matrix.
        projection: width D of a random projection with ReLU before the regression; 0 for none.
        num_classes, grows: see `OnlineLearner`.
        seed: of the projection.
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        ridge: float = 1e-3,
        projection: int = 0,
        num_classes: int = 0,
        grows: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, projection or dim, num_classes, grows)
        if not ridge > 0:
            raise ValueError(f"ridge must be positive, got {ridge}")
        self.ridge = ridge
        rows = normal_rows(projection, dim, seed) / math.sqrt(dim)
        self.register_buffer("projection", rows)

    @property
    def input_dtype(self) -> torch.dtype | None:
        return self.projection.dtype if len(self.projection) else None

    def _features(self, encodings: Tensor) -> Tensor:
        if not len(self.projection):
            return encodings
        return F.linear(encodings, self.projection).relu()

    def _solve(self) -> tuple[Tensor, Tensor]:
        return solve_ridge(self.gram, self.sums, self.counts, self.ridge)


def solve_ridge(gram: Tensor, sums: Tensor, counts: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression to one-hot targets with an unpenalised intercept.

    Args:
        gram: sum of h h^T over the samples, D x D.
        sums: sum of h over the samples of each class, C x D.
        counts: samples of each class, C.
        ridge: penalty over the mean diagonal entry of the centred Gram matrix.

    Returns:
        Weights D x C and intercepts C.
    """
    n = counts.sum()
    mean, prior = sums.sum(0) / n, counts / n
    centred = gram - n * torch.outer(mean, mean)
    scale = centred.diagonal().mean().clamp_min(_SMALLEST)
    centred.diagonal().add_(ridge * scale)
    targets = (sums - counts[:, None] * mean).T
    factor, failed = torch.linalg.cholesky_ex(centred)
    if failed:
        # Samples far more alike than they are large: the rounding of the Gram matrix is larger
        # than the penalty, and has made eigenvalues negative. What is not larger is rounding, too.
        values, vectors = torch.linalg.eigh(centred)
        values = values.clamp_min(float((-values.min()).clamp_min(ridge * scale)))
        weight = vectors @ ((vectors.T @ targets) / values[:, None])
    else:
        weight = torch.cholesky_solve(targets, factor)
    return weight, prior - mean @ weight


class SoftmaxClassifier(OnlineLearner):
    """A linear head trained by stochastic gradient descent on the cross-entropy of seen classes.

    Args:
        dim: encoding width d.
        lr: learning rate.
        num_classes, grows: see `OnlineLearner`.
    """

    class_tensors: tuple[str, ...] = ("counts", "weight", "bias")

    def __init__(self, dim: int, lr: float = 0.1, num_classes: int = 0, grows: bool = True) -> None:
        super().__init__(dim, num_classes, grows)
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.lr = lr
        self.weight = nn.Parameter(torch.zeros(num_classes, dim))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    @property
    def input_dtype(self) -> torch.dtype | None:
        return self.weight.dtype

    def _learn(self, encodings: Tensor, labels: Tensor) -> None:
        present = self.seen.index_fill(0, labels, True)
        with torch.enable_grad():
            logits = self._scores(encodings).masked_fill(~present, -torch.inf)
            loss = F.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, (self.weight, self.bias))
        with torch.no_grad():
            self.weight.sub_(gradients[0], alpha=self.lr)
            self.bias.sub_(gradients[1], alpha=self.lr)

    def _scores(self, encodings: Tensor) -> Tensor:
        return F.linear(encodings, self.weight, self.bias)
