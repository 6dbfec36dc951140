"""Tests of the ensembles against loops in numpy, one classifier and one sample at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zoo.families.online_ensemble import (
    ENSEMBLE_PRESETS,
    EnsembleConfig,
    GateConfig,
    GatedEnsemble,
    RidgeEnsemble,
    RidgeEnsembleConfig,
    ensemble_preset,
    gate,
)

D, N, K, C = 7, 6, 2, 3


def encodings(n: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 0.3


def ensemble(name: str, **changes: object) -> GatedEnsemble:
    config = ensemble_preset(name, classifiers=N, k=K, **changes)
    learner = GatedEnsemble(D, config, num_classes=C)
    learner.counts += 1  # as if all classes had been seen
    with torch.no_grad():
        learner.weight.copy_(torch.randn(C, N, D, generator=torch.Generator().manual_seed(5)))
        learner.bias.copy_(torch.randn(C, N, generator=torch.Generator().manual_seed(6)))
    return learner


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def votes(learner: GatedEnsemble, batch: Tensor) -> np.ndarray:
    """The forward pass as the papers and the released code have it, a sample at a time."""
    config = learner.config
    keys, weight, bias = (
        t.detach().double().numpy() for t in (learner.keys, learner.weight, learner.bias)
    )
    z = batch.double().numpy()
    cosine = np.array([[unit(x) @ unit(k) for k in keys] for x in z])
    temperature = config.gate.temperature
    if config.batch_scaled:
        s = 1 - cosine
        temperature *= max((s**2).max(), ((s - 1) ** 2).max())
    out = np.zeros((len(z), C))
    for b, x in enumerate(z):
        c = cosine[b]
        a = gate(
            torch.from_numpy(c), dataclasses.replace(config.gate, temperature=temperature)
        ).numpy()
        a = np.where(a >= config.cut, a, 0)
        seen = unit(x) if config.inputs == "normalised" else x
        tau = config.squash
        v = np.array(
            [
                [tau * np.tanh((weight[j, n] @ seen + bias[j, n]) / tau) for n in range(N)]
                for j in range(C)
            ]
        )
        if config.vote == "mispaired":
            order = np.argsort(-c)[:K]
            weights = np.zeros(N)
            for position, n in enumerate(sorted(order)):
                weights[n] = c[order[position]] / c[order].sum()
        elif config.vote == "squared":
            weights = c * a**2 / (c * a).sum()
        elif config.vote == "membership":
            weights = a / K
        else:
            weights = c * a / (c * a).sum()
        out[b] = v @ weights
    return out


@pytest.mark.parametrize("name", ENSEMBLE_PRESETS)
def test_votes_are_those_of_the_loop(name: str) -> None:
    learner, z = ensemble(name), encodings()
    np.testing.assert_allclose(learner(z).detach().numpy(), votes(learner, z), rtol=1e-3, atol=1e-4)


def test_votes_by_membership() -> None:
    learner = ensemble("dee-described", vote="membership", squash=3.0)
    z = encodings()
    np.testing.assert_allclose(learner(z).detach().numpy(), votes(learner, z), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ENSEMBLE_PRESETS if n != "dee-described"])
def test_the_sign_step_of_the_dot_loss_is_the_analytic_one(name: str) -> None:
    learner, z = ensemble(name), encodings(6)
    y = torch.tensor([0, 2, 2, 0, 2, 0])
    before = learner.weight.detach().clone()
    # The vote is linear in s_n phi(u), so its gradient in W_cn is s_n phi'(u) z over the batch.
    single = np.zeros((C, N, D))
    for b in range(6):
        config = learner.config
        seen = unit(z[b].numpy()) if config.inputs == "normalised" else z[b].numpy()
        for n in range(N):
            probe = ensemble(name)
            with torch.no_grad():
                probe.weight.zero_()
                probe.bias.zero_()
                probe.bias[y[b], n] = 1e-3
            share = float(probe(z).detach()[b, y[b]]) / 1e-3  # the vote weight of classifier n
            u = float(before[y[b], n].numpy() @ seen + learner.bias[y[b], n].item())
            single[y[b], n] += share * (1 - np.tanh(u / 250) ** 2) * seen
    learner.learn(z, y)
    step = (learner.weight.detach() - before).numpy()
    clear = np.abs(single) > 1e-4
    np.testing.assert_allclose(step[clear], 1e-4 * np.sign(single[clear]), atol=1e-6)
    assert np.array_equal(step[1], np.zeros((N, D))), "an absent class stays bit for bit"
    assert clear[[0, 2]].any()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("loss", ["dot", "cross-entropy"])
def test_ordinary_optimizers_are_those_of_torch(optimizer: str, loss: str) -> None:
    learner = ensemble("ee-published", optimizer=optimizer, loss=loss, lr=0.05, squash=None)
    weight = learner.weight.detach().clone().requires_grad_()
    bias = learner.bias.detach().clone().requires_grad_()
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
    peer = kind([weight, bias], lr=0.05)
    for step in range(3):
        z, y = encodings(6, seed=step), torch.arange(6) % C  # all classes in each batch
        shares = learner._vote_weights(c := learner.cosines(z), learner._memberships(c)).detach()
        inputs = torch.nn.functional.normalize(z)
        out = torch.einsum("bd,cnd,bn->bc", inputs, weight, shares) + shares @ bias.T
        own = out.gather(1, y[:, None])
        value = -own.mean() if loss == "dot" else torch.nn.functional.cross_entropy(out, y)
        peer.zero_grad()
        value.backward()
        peer.step()
        learner.learn(z, y)
    torch.testing.assert_close(learner.weight.detach(), weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.bias.detach(), bias.detach(), rtol=1e-4, atol=1e-5)


def test_trained_keys_follow_the_gradient_of_the_loss_and_stay_unit() -> None:
    learner = ensemble("dee-described", key_lr=0.1)
    start = learner.keys.detach().double()
    z, y = torch.nn.functional.normalize(encodings(6).double()), torch.arange(6) % C
    u = torch.einsum("bd,cnd->bcn", z, learner.weight.detach().double()) + learner.bias.detach()
    v = 250 * torch.tanh(u / 250)
    # Cosines that weigh the votes are out of the gradient, so they stay those of the start.
    fixed = z @ start.T

    def loss(keys: Tensor) -> float:
        cosines = z @ keys.T
        a = gate(cosines, learner.config.gate)
        shares = fixed * a / (fixed * a).sum(1, keepdim=True)
        own = torch.einsum("bcn,bn->bc", v, shares).gather(1, y[:, None])
        return float(((1 - cosines) * a).sum(1).mean() - own.mean())

    gradient, h = torch.zeros(N, D, dtype=torch.float64), 1e-6
    for n, d in np.ndindex(N, D):
        shift = torch.zeros(N, D, dtype=torch.float64)
        shift[n, d] = h
        gradient[n, d] = (loss(start + shift) - loss(start - shift)) / (2 * h)
    learner.learn(encodings(6), y)
    expected = torch.nn.functional.normalize(start - 0.1 * gradient)
    torch.testing.assert_close(learner.keys.detach().double(), expected, rtol=0, atol=1e-4)
    assert float((expected - start).abs().max()) > 1e-2


def test_fixed_keys_never_move() -> None:
    for name in ("ee-published", "ee-released", "dee-released"):
        learner = ensemble(name)
        before = learner.keys.detach().clone()
        learner.learn(encodings(6), torch.arange(6) % C)
        assert torch.equal(learner.keys.detach(), before)


def test_centring_is_the_running_mean() -> None:
    learner = GatedEnsemble(D, EnsembleConfig(classifiers=N, gate=GateConfig(k=K), centre=True))
    z = encodings(20)
    for part in z.split(3):
        learner.learn(part, torch.zeros(len(part), dtype=torch.int64))
    torch.testing.assert_close(learner.mean, z.double().mean(0))
    expected = torch.nn.functional.normalize(z - z.mean(0)) @ learner.keys.T
    torch.testing.assert_close(learner.cosines(z), expected, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 50))
def test_other_samples_matter_in_the_released_form_only(seed: int) -> None:
    z = encodings(8, seed=seed)
    for name in ("ee-published", "ee-released", "dee-described"):
        learner = ensemble(name)
        torch.testing.assert_close(learner(z)[:2], learner(z[:2]), rtol=1e-4, atol=1e-5)
    released = ensemble("dee-released", gate=GateConfig(k=K, temperature=0.2), cut=0.0)
    far = z.clone()
    far[-1] = -100 * released.keys.detach()[0]
    assert not torch.allclose(released(z)[:2], released(far)[:2], rtol=1e-5, atol=1e-6)


def test_the_growth_of_weights_in_the_sources_is_rounded_away() -> None:
    weight = torch.randn(100_000)
    assert torch.equal(weight + 1e-4 * (1e-4 * weight), weight)


def test_initial_weights_have_their_scale_and_do_not_depend_on_when_a_class_comes() -> None:
    config = ensemble_preset("ee-released", classifiers=40, k=4)
    early, late = GatedEnsemble(64, config, num_classes=3), GatedEnsemble(64, config)
    late.grow(1)
    late.grow(3)
    assert torch.equal(early.weight, late.weight)
    assert torch.equal(early.bias, late.bias)
    assert abs(float(early.weight.detach().std()) * (60 * 64) ** 0.5 - 1.0) < 0.05
    assert float(early.bias.detach().abs().max()) <= 64**-0.5


def test_bad_configurations_are_refused() -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: EnsembleConfig(classifiers=4), "k must not exceed the 4 classifiers, got 16"),
        (lambda: EnsembleConfig(classifiers=0), "classifiers must be at least 1, got 0"),
        (lambda: EnsembleConfig(lr=0.0), "lr must be positive, got 0"),
        (lambda: EnsembleConfig(cut=1.0), "cut must be in"),
        (lambda: EnsembleConfig(squash=0.0), "squash must be positive or None, got 0"),
        (lambda: EnsembleConfig(key_pull=-1.0), "key_pull must not be negative"),
        (
            lambda: EnsembleConfig(gate=GateConfig(kind="hard", k=2), keys="trained"),
            "a hard gate has no gradient",
        ),
        (lambda: EnsembleConfig(vote="mispaired"), "is an error of the hard gate's code"),
        (lambda: ensemble_preset("ee", classifiers=4, k=2), "no preset 'ee'; choose one of"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


# ----------------------------------------------------------------------------- solved together


def ridge_ensemble(features: int = 3) -> RidgeEnsemble:
    config = RidgeEnsembleConfig(
        classifiers=4, features=features, gate=GateConfig(k=2, temperature=0.7), ridge=1e-2
    )
    return RidgeEnsemble(D, config)


@pytest.mark.parametrize("features", [0, 3])
def test_the_ensemble_is_the_least_squares_fit_of_its_summed_votes(features: int) -> None:
    z, y = encodings(30), torch.arange(30) % C
    learner = ridge_ensemble(features)
    for part, labels in zip(z.split(8), y.split(8), strict=True):
        learner.learn(part, labels)
    x = encodings(10, seed=1)

    def seen(batch: Tensor) -> np.ndarray:
        """What each classifier sees, written out."""
        first = z[:8].double().numpy()
        centre = first.mean(0)
        scale = np.mean([np.linalg.norm(v - centre) for v in first])
        keys = learner.keys.double().numpy()
        maps = learner.projections.double().numpy().reshape(4, features, D)
        width = np.array([[unit(v - centre) @ k for k in keys] for v in first]).std()
        rows = []
        for v in batch.double().numpy() - centre:
            cosines = torch.tensor([unit(v) @ k for k in keys])
            a = gate(cosines, GateConfig(k=2, temperature=0.7 * width)).numpy()
            gated = [a[n] * (maps[n, m] @ v / scale) for n in range(4) for m in range(features)]
            rows.append([*(v / scale), *a, *gated])
        return np.array(rows)

    h, hx = seen(z), seen(x)
    centred = h - h.mean(0)
    penalty = 1e-2 * (centred**2).sum() / h.shape[1]
    targets = np.eye(C)[y.numpy()]
    weight = np.linalg.solve(
        centred.T @ centred + penalty * np.eye(h.shape[1]), centred.T @ (targets - targets.mean(0))
    )
    expected = (hx - h.mean(0)) @ weight + targets.mean(0)
    np.testing.assert_allclose(learner(x).numpy(), expected, atol=2e-3)


def test_after_the_first_batch_order_does_not_matter() -> None:
    z, y = encodings(30), torch.arange(30) % C
    a, b = ridge_ensemble(), ridge_ensemble()
    for learner, rest in ((a, torch.arange(10, 30)), (b, torch.arange(29, 9, -1))):
        learner.learn(z[:10], y[:10])
        for part in rest.split(1 if learner is b else 20):
            learner.learn(z[part], y[part])
    torch.testing.assert_close(a(z), b(z), rtol=1e-3, atol=1e-4)


def test_a_first_batch_of_one_is_no_centre() -> None:
    learner = ridge_ensemble()
    learner.learn(encodings(1), torch.tensor([0]))
    assert not learner.centre.any()
    learner.learn(encodings(5, seed=2), torch.tensor([1, 0, 1, 0, 1]))
    assert bool(learner(encodings())[:, :2].isfinite().all())
