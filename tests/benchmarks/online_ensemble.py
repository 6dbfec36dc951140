"""What one learning step of an ensemble costs against a loop, unrolled Sinkhorn, and an anchor.

All steps are of 60 encodings of width 512, two classes, and 1024 classifiers of which 32 are
selected. The loop trains the same classifiers one by one, as modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.benchmarks._harness import Comparison, race, repeated
from zoo.families.online_ensemble import (
    EnsembleConfig,
    GateConfig,
    GatedEnsemble,
    LinearDiscriminant,
    NearestMean,
    RidgeClassifier,
    RidgeEnsemble,
    RidgeEnsembleConfig,
    ensemble_preset,
    sinkhorn_topk,
    threshold_topk,
)

ROUNDS = 15
BATCH, DIM, CLASSIFIERS, SELECTED, CLASSES = 60, 512, 1024, 32, 10

AT_MOST_LOOP = 1 / 20
"""The batched step over the loop."""
AT_MOST_UNROLLED = 1 / 100
"""The gate in closed form over 400 unrolled iterations; 1/250 was measured once."""


def run(rounds: int) -> list[Comparison]:
    """Steps of learners, then gates with their gradient, then a step late in a long stream."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(BATCH, DIM, generator=generator)
    y = torch.arange(BATCH) % 2
    return [*_steps(z, y, rounds), *_gates(rounds), *_length(z, y, rounds)]


def _steps(z: Tensor, y: Tensor, rounds: int) -> list[Comparison]:
    hard = ensemble_preset("ee-published", classifiers=CLASSIFIERS, k=SELECTED)
    soft = EnsembleConfig(
        classifiers=CLASSIFIERS, gate=GateConfig(k=SELECTED, temperature=0.01), keys="trained"
    )
    learners = {
        "E&E": GatedEnsemble(DIM, hard, CLASSES),
        "soft gate, trained keys": GatedEnsemble(DIM, soft, CLASSES),
        "ridge ensemble": RidgeEnsemble(
            DIM,
            RidgeEnsembleConfig(classifiers=CLASSIFIERS, features=1, gate=GateConfig(k=SELECTED)),
            CLASSES,
        ),
        "streaming LDA": LinearDiscriminant(DIM, num_classes=CLASSES),
        "nearest mean": NearestMean(DIM, num_classes=CLASSES),
        "ridge, 2048 random features": RidgeClassifier(DIM, projection=2048, num_classes=CLASSES),
    }
    contestants = {name: repeated(_step(learner, z, y)) for name, learner in learners.items()}
    loop = _Loop(CLASSIFIERS, DIM, CLASSES, learners["E&E"])
    times = race({**contestants, "loop": lambda: loop.learn(z, y)}, rounds)
    name = f"step, N={CLASSIFIERS}, d={DIM}, batch {BATCH}"
    return [
        Comparison(
            name=name,
            contestant="E&E",
            peer="a loop over its classifiers",
            values=times["E&E"],
            peer_values=times["loop"],
            at_most=AT_MOST_LOOP,
        ),
        *(
            Comparison(
                name=name,
                contestant=one,
                peer="streaming LDA",
                values=times[one],
                peer_values=times["streaming LDA"],
            )
            for one in learners
            if one != "streaming LDA"
        ),
    ]


def _step(learner: nn.Module, z: Tensor, y: Tensor) -> Callable[[], None]:
    return lambda: learner.learn(z, y)  # type: ignore[operator]


class _Loop:
    """E&E with a module per classifier, evaluated and updated one after the other."""

    def __init__(self, n: int, dim: int, classes: int, like: nn.Module) -> None:
        self.like = like
        self.classifiers = nn.ModuleList(nn.Linear(dim, classes) for _ in range(n))

    def learn(self, z: Tensor, y: Tensor) -> None:
        inputs = nn.functional.normalize(z)
        cosines = self.like.cosines(z).detach()  # type: ignore[operator]
        memberships = self.like._memberships(cosines)  # type: ignore[operator]
        shares = self.like._vote_weights(cosines, memberships)  # type: ignore[operator]
        votes = torch.zeros(len(z), self.classifiers[0].out_features)  # type: ignore[call-overload]
        for index, classifier in enumerate(self.classifiers):
            u = classifier(inputs)
            votes = votes + shares[:, index, None] * 250 * torch.tanh(u / 250)
        self.classifiers.zero_grad()
        (-votes.gather(1, y[:, None]).mean()).backward()
        with torch.no_grad():
            for parameter in self.classifiers.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad.sign(), alpha=1e-4)


def _gates(rounds: int) -> list[Comparison]:
    scores = torch.randn(BATCH, CLASSIFIERS, generator=torch.Generator().manual_seed(1)) * 0.04

    def both(gate: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def work() -> None:
            leaf = scores.clone().requires_grad_()
            gate(leaf).square().sum().backward()

        return work

    times = race(
        {
            "closed": repeated(both(lambda c: threshold_topk(c, SELECTED, 0.01))),
            "implicit": both(lambda c: sinkhorn_topk(c, SELECTED, 0.01, 400)),
            "unrolled": both(lambda c: sinkhorn_topk(c, SELECTED, 0.01, 400, implicit=False)),
        },
        max(3, rounds // 3),
    )
    name = f"gate forward and backward, {BATCH} x {CLASSIFIERS}"
    return [
        Comparison(
            name=name,
            contestant=shown,
            peer="400 unrolled Sinkhorn iterations",
            values=times[key],
            peer_values=times["unrolled"],
            at_most=AT_MOST_UNROLLED if key == "closed" else None,
        )
        for key, shown in (("closed", "closed form"), ("implicit", "implicit Sinkhorn"))
    ]


def _length(z: Tensor, y: Tensor, rounds: int) -> list[Comparison]:
    """A step after 300 batches against one after 3."""
    config = RidgeEnsembleConfig(features=8)
    early, late = RidgeEnsemble(DIM, config, CLASSES), RidgeEnsemble(DIM, config, CLASSES)
    for learner, steps in ((early, 3), (late, 300)):
        for _ in range(steps):
            learner.learn(z, y)
    times = race(
        {"early": repeated(_step(early, z, y)), "late": repeated(_step(late, z, y))}, rounds
    )
    return [
        Comparison(
            name="step of the ridge ensemble, N=128",
            contestant="after 300 batches",
            peer="after 3 batches",
            values=times["late"],
            peer_values=times["early"],
            at_most=1.1,
        )
    ]
