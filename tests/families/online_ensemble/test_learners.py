"""Tests of the learners: anchors against numpy, and what all learners share."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zoo.families.online_ensemble import (
    EnsembleConfig,
    GateConfig,
    GatedEnsemble,
    LinearDiscriminant,
    NearestMean,
    OnlineLearner,
    RidgeClassifier,
    RidgeEnsemble,
    RidgeEnsembleConfig,
    SoftmaxClassifier,
    ensemble_preset,
)

D = 6
GATE = GateConfig(k=2, temperature=0.1)

LEARNERS: dict[str, Callable[..., OnlineLearner]] = {
    "nearest-mean": lambda **o: NearestMean(D, **o),
    "cosine-mean": lambda **o: NearestMean(D, "cosine", **o),
    "linear-discriminant": lambda **o: LinearDiscriminant(D, **o),
    "ridge": lambda **o: RidgeClassifier(D, **o),
    "projected-ridge": lambda **o: RidgeClassifier(D, projection=9, **o),
    "softmax": lambda **o: SoftmaxClassifier(D, **o),
    "ridge-ensemble": lambda **o: RidgeEnsemble(
        D, RidgeEnsembleConfig(classifiers=5, features=3, gate=GATE), **o
    ),
    "ee-published": lambda **o: GatedEnsemble(
        D, ensemble_preset("ee-published", classifiers=5, k=2), **o
    ),
    "dee-described": lambda **o: GatedEnsemble(
        D, ensemble_preset("dee-described", classifiers=5, k=2), **o
    ),
    "adam": lambda **o: GatedEnsemble(
        D,
        EnsembleConfig(classifiers=5, gate=GATE, optimizer="adam", loss="cross-entropy", lr=0.05),
        **o,
    ),
    "centred": lambda **o: GatedEnsemble(
        D, EnsembleConfig(classifiers=5, gate=GATE, optimizer="sgd", centre=True, lr=1.0), **o
    ),
}
INVARIANT = ("nearest-mean", "linear-discriminant", "ridge", "projected-ridge")


def samples(n: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Encodings around a mean per class, and labels; all classes occur."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(classes, D, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    labels = labels[torch.randperm(n, generator=generator)]
    return means[labels] + torch.randn(n, D, generator=generator) + 1.0, labels


def learned(name: str, *batches: tuple[Tensor, Tensor], **options: object) -> OnlineLearner:
    learner = LEARNERS[name](**options)
    for encodings, labels in batches:
        learner.learn(encodings, labels)
    return learner


def cut(encodings: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(encodings.split(size), labels.split(size), strict=True))


def same_state(a: OnlineLearner, b: OnlineLearner) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# ------------------------------------------------------------------ anchors, by their definition


def test_nearest_mean_is_the_nearest_mean() -> None:
    z, y = samples(30)
    x = samples(20, seed=1)[0].double().numpy()
    means = np.stack([z[y == c].double().numpy().mean(0) for c in range(3)])
    distances = ((x[:, None] - means) ** 2).sum(2)
    scores = learned("nearest-mean", *cut(z, y, 7))(torch.from_numpy(x))
    # Scores are minus half the squared distance, up to what all classes have in common.
    relative = scores - scores[:, :1]
    np.testing.assert_allclose(relative, (distances[:, :1] - distances) / 2, atol=1e-5)
    cosines = (x @ means.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    found = learned("cosine-mean", *cut(z, y, 7))(torch.from_numpy(x))
    np.testing.assert_allclose(found, cosines, atol=1e-6)


def test_the_linear_discriminant_is_that_of_the_whole_batch() -> None:
    z, y = samples(40)
    x = samples(20, seed=1)[0].double().numpy()
    points, labels = z.double().numpy(), y.numpy()
    means = np.stack([points[labels == c].mean(0) for c in range(3)])
    centred = points - means[labels]
    covariance = centred.T @ centred / len(points)
    s = 0.1
    covariance = (1 - s) * covariance + s * np.trace(covariance) / D * np.eye(D)
    # Gaussian log-density with the common covariance, up to what all classes have in common.
    inverse = np.linalg.inv(covariance)
    density = np.stack([-((x - m) @ inverse * (x - m)).sum(1) / 2 for m in means], 1)
    learner = LinearDiscriminant(D, shrinkage=s)
    for batch in cut(z, y, 9):
        learner.learn(*batch)
    scores = learner(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(
        scores - scores[:, :1], density - density[:, :1], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["ridge", "projected-ridge"])
def test_ridge_is_penalised_least_squares_with_an_intercept(name: str) -> None:
    z, y = samples(40)
    x = samples(20, seed=1)[0]
    learner = learned(name, *cut(z, y, 9))
    h, hx = z.double().numpy(), x.double().numpy()
    if name == "projected-ridge":
        assert isinstance(learner, RidgeClassifier)
        r = learner.projection.double().numpy()  # type: ignore[union-attr]
        h, hx = np.maximum(h @ r.T, 0), np.maximum(hx @ r.T, 0)
    centred = h - h.mean(0)
    penalty = 1e-3 * (centred**2).sum() / h.shape[1]
    # Least squares on rows that stand for the penalty, the intercept left free.
    design = np.block(
        [
            [h, np.ones((len(h), 1))],
            [np.sqrt(penalty) * np.eye(h.shape[1]), np.zeros((h.shape[1], 1))],
        ]
    )
    targets = np.concatenate([np.eye(3)[y.numpy()], np.zeros((h.shape[1], 3))])
    solution = np.linalg.lstsq(design, targets, rcond=None)[0]
    expected = hx @ solution[:-1] + solution[-1]
    np.testing.assert_allclose(learner(x).numpy(), expected, atol=1e-4)


def test_softmax_is_gradient_descent_on_the_cross_entropy() -> None:
    z, y = samples(12)
    learner = SoftmaxClassifier(D, lr=0.3)
    weight, bias = np.zeros((3, D)), np.zeros(3)
    for encodings, labels in cut(z, y, 4):
        learner.learn(encodings, labels)
        x, n = encodings.double().numpy(), len(labels)
        seen = sorted({*y[: learner.counts.sum()].tolist()})
        logits = x @ weight[seen].T + bias[seen]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        error = p - (labels.numpy()[:, None] == np.array(seen))
        weight[seen] -= 0.3 * error.T @ x / n
        bias[seen] -= 0.3 * error.mean(0)
    np.testing.assert_allclose(learner.weight.detach().numpy(), weight, atol=1e-5)
    np.testing.assert_allclose(learner.bias.detach().numpy(), bias, atol=1e-5)


# --------------------------------------------------------------------- what all learners share


@pytest.mark.parametrize(
    "name", [n for n in LEARNERS if n not in ("ee-published", "dee-described")]
)
def test_it_learns_what_can_be_learned(name: str) -> None:
    z, y = samples(300)
    learner = learned(name, *cut(z, y, 10))
    x, labels = samples(200, seed=1)
    accuracy = float((learner(x).argmax(1) == labels).float().mean())
    assert accuracy > 0.55, "three classes; chance is a third"


@pytest.mark.parametrize("name", LEARNERS)
@given(at=st.integers(1, 7))
def test_a_stored_stream_goes_on_bit_for_bit(name: str, at: int) -> None:
    # Sorted by class, so that classes appear after the state was stored.
    z, y = samples(32, classes=4)
    order = y.argsort(stable=True)
    batches = cut(z[order], y[order], 4)
    whole = learned(name, *batches)
    stored = copy.deepcopy(learned(name, *batches[:at]).state_dict())
    resumed = LEARNERS[name]()
    resumed.load_state_dict(stored)
    for batch in batches[at:]:
        resumed.learn(*batch)
    assert same_state(whole, resumed)
    assert torch.equal(whole(z), resumed(z))


@pytest.mark.parametrize("name", INVARIANT)
@given(seed=st.integers(0, 100), size=st.integers(1, 13))
def test_order_and_batches_do_not_matter(name: str, seed: int, size: int) -> None:
    z, y = samples(24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    a, b = learned(name, (z, y)), learned(name, *cut(z[order], y[order], size))
    torch.testing.assert_close(a(z), b(z), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LEARNERS)
def test_classes_appear_at_any_time_and_unseen_ones_are_never_predicted(name: str) -> None:
    z, y = samples(12)
    learner = learned(name, (z[:6], 2 * y[:6]))
    assert learner.num_classes == 5
    scores = learner(z)
    assert scores.shape == (12, 5)
    assert bool(scores[:, [1, 3]].isinf().all())
    assert bool(scores[:, [0, 2, 4]].isfinite().all())
    learner.learn(z[6:8], torch.tensor([7, 7]))
    assert learner.num_classes == 8
    assert learner.seen.nonzero()[:, 0].tolist() == [0, 2, 4, 7]


@pytest.mark.parametrize("name", LEARNERS)
def test_state_has_one_size_whatever_the_length(name: str) -> None:
    z, y = samples(60)
    learner = learned(name, (z[:6], y[:6]))
    before = {key: value.shape for key, value in learner.state_dict().items()}
    for batch in cut(z, y, 6):
        learner.learn(*batch)
    assert {key: value.shape for key, value in learner.state_dict().items()} == before


BAD: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], str]] = {
    "labels of float": (lambda: (torch.ones(2, D), torch.ones(2)), "labels must be integers"),
    "labels of bool": (
        lambda: (torch.ones(2, D), torch.tensor([True, False])),
        "labels must be integers",
    ),
    "negative": (lambda: (torch.ones(2, D), torch.tensor([0, -1])), "0 or larger, got -1"),
    "too few labels": (lambda: (torch.ones(2, D), torch.tensor([0])), "expected 2 labels"),
    "empty": (lambda: (torch.ones(0, D), torch.ones(0).long()), "the batch is empty"),
    "width": (
        lambda: (torch.ones(2, D + 1), torch.tensor([0, 1])),
        r"expected encodings of shape B x 6, got \(2, 7\)",
    ),
    "nan": (
        lambda: (torch.full((2, D), torch.nan), torch.tensor([0, 1])),
        "contain NaN or infinity",
    ),
    "infinity": (
        lambda: (torch.full((2, D), torch.inf), torch.tensor([0, 1])),
        "contain NaN or infinity",
    ),
    "encodings of integers": (
        lambda: (torch.ones(2, D).long(), torch.tensor([0, 1])),
        "encodings must be floating point, got torch.int64",
    ),
    "beyond a fixed head": (
        lambda: (torch.ones(2, D), torch.tensor([0, 3])),
        "class 3 is beyond the 3 classes of this fixed head",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", LEARNERS)
def test_bad_input_leaves_the_state_as_it_was(name: str, case: str) -> None:
    z, y = samples(9)
    learner = learned(name, (z, y), num_classes=3, grows=False)
    before, scores = copy.deepcopy(learner), learner(z)
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        learner.learn(*make())
    assert same_state(before, learner)
    assert torch.equal(learner(z), scores)


def test_nothing_learned_is_nothing_to_predict() -> None:
    with pytest.raises(ValueError, match="nothing has been learned yet"):
        NearestMean(D)(torch.ones(1, D))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearDiscriminant(D, shrinkage=0.0), r"shrinkage must be in \(0, 1\], got 0"),
        (lambda: RidgeClassifier(D, ridge=0.0), "ridge must be positive, got 0"),
        (lambda: SoftmaxClassifier(D, lr=0.0), "lr must be positive, got 0"),
        (lambda: NearestMean(0), "must be positive, got 0"),
        (lambda: RidgeEnsembleConfig(classifiers=3), "k must not exceed the 3 classifiers, got 16"),
        (lambda: RidgeEnsembleConfig(features=-1), "features must not be negative, got -1"),
        (lambda: RidgeEnsembleConfig(ridge=0.0), "ridge must be positive, got 0"),
        (lambda: RidgeEnsembleConfig(classifiers=0), "classifiers must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_ridge_of_samples_that_are_almost_alike_is_solved() -> None:
    """Their Gram matrix, in single precision, is that of their mean up to rounding."""
    generator = torch.Generator().manual_seed(0)
    mean = 100 * torch.rand(12, generator=generator)
    encodings = mean + 1e-3 * torch.randn(40, 12, generator=generator)
    labels = torch.arange(40) % 2
    ridge = RidgeClassifier(12)
    ridge.learn(encodings, labels)
    n, doubles = 40, encodings.double()
    gram = ridge.gram - n * torch.outer(doubles.mean(0), doubles.mean(0))
    assert float(torch.linalg.eigvalsh(gram).min()) < 0, "the example is not one"
    scores = ridge(encodings)
    assert scores.isfinite().all()
    assert float(scores.abs().max()) < 10


def test_a_symmetric_matrix_is_stored_once() -> None:
    ridge = RidgeClassifier(5)
    ridge.learn(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3)
    state = ridge.state_dict()
    assert state["gram"].shape == (15,)
    assert torch.equal(state["gram"], ridge.gram[tuple(np.tril_indices(5))])
    again = RidgeClassifier(5)
    again.load_state_dict(state)
    assert torch.equal(again.gram.tril(), ridge.gram.tril())
    assert torch.equal(again.gram, again.gram.T)
    with pytest.raises(RuntimeError, match="gram"):
        RidgeClassifier(6).load_state_dict(state)


@pytest.mark.parametrize("name", LEARNERS)
def test_encodings_may_have_another_precision(name: str) -> None:
    """What numpy gives is float64."""
    z, y = samples(12)
    learner, other = learned(name, (z, y)), learned(name, (z.double(), y))
    torch.testing.assert_close(other(z.double()).float(), learner(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_label_beyond_the_memory_leaves_the_state_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, y = samples(9)
    learner = learned(name, (z, y))
    before, last = copy.deepcopy(learner), learner.class_tensors[-1]
    allocate = learner._new_classes

    def full(what: str, extra: int) -> Tensor:
        if what == last:
            raise RuntimeError("not enough memory: you tried to allocate 8 bytes")
        return allocate(what, extra)

    monkeypatch.setattr(learner, "_new_classes", full)
    with pytest.raises(ValueError, match="there is no memory for 1,001 classes"):
        learner.learn(z[:1], torch.tensor([1000]))
    assert same_state(before, learner)
    assert learner(z).shape == (9, 3)
