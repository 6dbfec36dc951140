"""Ensembles of linear classifiers behind a gate over keys, trained by gradient in one pass.

Sources: Shanahan, Kaplanis, Mitrovic, "Encoders and Ensembles for Task-Free Continual Learning",
arXiv:2105.13327 (E&E: hard gate); Wojcik et al., "Neural Architecture for Online Ensemble Continual
Learning", arXiv:2211.14963 (DE&E: differentiable gate).

An encoding z selects classifiers by the cosines c_n of their keys; the gate makes memberships a_n
of them; classifier n votes v_nc = phi(W_cn z + b_cn) for class c with phi(u) = tau tanh(u / tau),
and the votes are averaged with weights made of a and c.

Shape notation: B encodings of a batch, d encoding width, N classifiers, C classes, P classes whose
votes are needed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.online_ensemble.gates import GateConfig, gate
from zoo.families.online_ensemble.learners import OnlineLearner, normal_rows

__all__ = ["ENSEMBLE_PRESETS", "EnsembleConfig", "GatedEnsemble", "ensemble_preset"]

_GATE = GateConfig(k=16)

_TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a normal distribution that is cut at two of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Every choice in which the descriptions and the released code of E&E and DE&E differ.

    See `ENSEMBLE_PRESETS` for the named combinations.

    Raises:
        ValueError: a value is out of range, or two choices contradict each other.
    """

    classifiers: int = 128
    """Number of classifiers N."""
    gate: GateConfig = _GATE
    """How an encoding selects classifiers."""
    batch_scaled: bool = False
    """Multiply the temperature by the largest transport cost in the batch, as the released code
    does; what a sample gets then depends on the others in its batch."""
    cut: float = 0.0
    """Memberships below this become zero (released DE&E: 0.3)."""
    centre: bool = False
    """Subtract the running mean of all encodings so far, from what is looked up and classified."""
    inputs: Literal["raw", "normalised"] = "normalised"
    """What classifiers see: encodings as they are, or of unit length."""
    vote: Literal["cosine", "squared", "membership", "mispaired"] = "cosine"
    """Weights of the votes: c a / sum(c a); c a^2 / sum(c a) (released DE&E); a / k; or the sorted
    cosines of the selected in the order of their index (an error in the released E&E)."""
    squash: float | None = 250.0
    """tau; None: no squashing."""
    loss: Literal["dot", "cross-entropy"] = "dot"
    """Minus the vote for the label, which leaves rows of absent classes alone; or cross-entropy of
    the votes of all classes seen."""
    optimizer: Literal["sign", "sgd", "adam"] = "sign"
    """Steps of fixed size along the sign of the gradient (sources), SGD, or Adam. The sources' sign
    rule also grows weights by 1e-8 of themselves a step, which single precision rounds away."""
    lr: float = 1e-4
    """Learning rate of the classifiers."""
    keys: Literal["fixed", "trained"] = "fixed"
    """Random unit keys for ever, or trained by the same loss through a soft gate."""
    key_lr: float = 1e-2
    """Learning rate of trained keys (SGD; they are normalised after each step)."""
    key_pull: float = 0.0
    """Weight of the loss sum_n (1 - c_n) a_n, which pulls selected trained keys to the input."""
    init_fan: int | None = None
    """Initial weights have standard deviation (fan d)^-1/2; None: fan N."""
    init_bias: bool = False
    """Initial biases uniform in +-d^-1/2 (released DE&E) instead of zero."""
    seed: int = 0
    """Of the keys and of the initial weights."""

    def __post_init__(self) -> None:
        if self.classifiers < 1:
            raise ValueError(f"classifiers must be at least 1, got {self.classifiers}")
        if self.gate.k > self.classifiers:
            raise ValueError(
                f"k must not exceed the {self.classifiers} classifiers, got {self.gate.k}"
            )
        for field in ("lr", "key_lr"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if not 0.0 <= self.cut < 1.0:
            raise ValueError(f"cut must be in [0, 1), got {self.cut}")
        if self.squash is not None and not self.squash > 0:
            raise ValueError(f"squash must be positive or None, got {self.squash}")
        if self.key_pull < 0:
            raise ValueError(f"key_pull must not be negative, got {self.key_pull}")
        if self.gate.kind == "hard" and self.keys == "trained":
            raise ValueError("a hard gate has no gradient to train keys with; choose a soft one")
        if self.gate.kind != "hard" and self.vote == "mispaired":
            raise ValueError("vote='mispaired' is an error of the hard gate's code; choose it")


ENSEMBLE_PRESETS: dict[str, EnsembleConfig] = {
    "ee-published": EnsembleConfig(gate=GateConfig(kind="hard", k=16)),
    "ee-released": EnsembleConfig(
        gate=GateConfig(kind="hard", k=16), vote="mispaired", init_fan=60, init_bias=True
    ),
    "dee-released": EnsembleConfig(
        gate=GateConfig(kind="entropic", k=16, temperature=2.5e-4),
        batch_scaled=True,
        cut=0.3,
        inputs="raw",
        vote="squared",
        init_fan=128,
        init_bias=True,
    ),
    "dee-described": EnsembleConfig(
        gate=GateConfig(kind="entropic", k=16, temperature=0.01),
        vote="cosine",
        keys="trained",
        key_pull=1.0,
    ),
}
"""Named configurations; N and k are chosen on top.

`ee-published`: the parent method. `ee-released`: the baseline in the code of DE&E, with the wrong
pairing of weights. `dee-released`: what that code computes for DE&E, where the gate is nearly hard
and keys are never trained. `dee-described`: what the paper describes, with keys that learn.
"""


def ensemble_preset(name: str, *, classifiers: int, k: int, **changes: Any) -> EnsembleConfig:
    """A preset of `ENSEMBLE_PRESETS` with its size and some fields changed.

    Raises:
        ValueError: no preset has this name, or the values do not fit.
    """
    if name not in ENSEMBLE_PRESETS:
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(ENSEMBLE_PRESETS)}")
    preset = ENSEMBLE_PRESETS[name]
    changes.setdefault("gate", dataclasses.replace(preset.gate, k=k))
    return dataclasses.replace(preset, classifiers=classifiers, **changes)


class GatedEnsemble(OnlineLearner):
    """N linear classifiers, selected by a gate and trained in one pass.

    All classifiers are evaluated in one product. The loss "dot" concerns the classes of the batch
    alone, and only those are computed and updated.

    Args:
        dim: encoding width d.
        config: all choices.
        num_classes, grows: see `OnlineLearner`.
    """

    class_tensors: tuple[str, ...] = ("counts", "weight", "bias")
    keys: Tensor
    mean: Tensor
    first: Tensor
    second: Tensor
    updates: Tensor

    def __init__(
        self, dim: int, config: EnsembleConfig, num_classes: int = 0, grows: bool = True
    ) -> None:
        super().__init__(dim, 0, grows)
        self.config = config
        n = config.classifiers
        self.keys = nn.Parameter(F.normalize(normal_rows(n, dim, config.seed)))
        self.weight = nn.Parameter(torch.zeros(0, n, dim))
        self.bias = nn.Parameter(torch.zeros(0, n))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        if config.optimizer == "adam":
            self.class_tensors += ("first", "second", "updates")
            self.register_buffer("first", torch.zeros(0, n, dim + 1))
            self.register_buffer("second", torch.zeros(0, n, dim + 1))
            self.register_buffer("updates", torch.zeros(0, dtype=torch.int64))
        self.grow(num_classes)

    def _new_classes(self, name: str, extra: int) -> Tensor:
        new = super()._new_classes(name, extra)
        if name not in ("weight", "bias"):
            return new
        first, config = len(getattr(self, name)), self.config
        for row, values in enumerate(new):
            # A class has a seed of its own: it starts alike whenever it appears.
            seed = config.seed * 1_000_003 + 7919 * (first + row + 1) + (name == "bias")
            generator = torch.Generator().manual_seed(seed)
            if name == "weight":
                nn.init.trunc_normal_(values, generator=generator)
                values *= ((config.init_fan or config.classifiers) * self.dim) ** -0.5
                values /= _TRUNCATED_STD
            elif config.init_bias:
                nn.init.uniform_(values, -1, 1, generator=generator)
                values *= self.dim**-0.5
        return new

    @property
    def input_dtype(self) -> torch.dtype | None:
        return self.weight.dtype

    # ----------------------------------------------------------------- forward

    def cosines(self, encodings: Tensor) -> Tensor:
        """Cosines of encodings and keys, B x N."""
        return F.normalize(self._centred(encodings)) @ F.normalize(self.keys).T

    def memberships(self, encodings: Tensor) -> Tensor:
        """How far each classifier is selected, B x N."""
        return self._memberships(self.cosines(encodings))

    def _centred(self, encodings: Tensor) -> Tensor:
        return encodings - self.mean.to(encodings.dtype) if self.config.centre else encodings

    def _memberships(self, cosines: Tensor) -> Tensor:
        config = self.config
        temperature = config.gate.temperature
        if config.batch_scaled and len(cosines):
            distance = 1 - cosines.detach()
            temperature *= float(torch.maximum(distance**2, (distance - 1) ** 2).max())
        a = gate(cosines, config.gate, temperature)
        return a if config.cut == 0 else a * (a >= config.cut)

    def _vote_weights(self, cosines: Tensor, memberships: Tensor) -> Tensor:
        """Weight of each classifier's vote, B x N; gradients flow through the memberships only."""
        c, a, config = cosines.detach(), memberships, self.config
        if config.vote == "membership":
            return a / config.gate.k
        if config.vote == "mispaired":
            values, index = c.topk(config.gate.k, -1)
            weights = values / values.sum(-1, keepdim=True)
            return torch.zeros_like(c).scatter(-1, index.sort(-1).values, weights)
        total = (c * a).sum(-1, keepdim=True)
        # The sum is positive unless all that was selected points away from the input.
        return c * (a if config.vote == "cosine" else a * a) / total

    def _votes(self, inputs: Tensor, weights: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
        """Averaged votes, B x P, by rows P x N x d and biases P x N."""
        u = F.linear(inputs, rows.flatten(0, 1), bias.flatten()).view(-1, *bias.shape)
        tau = self.config.squash
        v = u if tau is None else tau * torch.tanh(u / tau)
        return torch.einsum("bpn,bn->bp", v, weights)

    def _inputs(self, encodings: Tensor) -> Tensor:
        centred = self._centred(encodings)
        return F.normalize(centred) if self.config.inputs == "normalised" else centred

    def _scores(self, encodings: Tensor) -> Tensor:
        cosines = self.cosines(encodings)
        weights = self._vote_weights(cosines, self._memberships(cosines))
        return self._votes(self._inputs(encodings), weights, self.weight, self.bias)

    # ---------------------------------------------------------------- learning

    @torch.no_grad()
    def _learn(self, encodings: Tensor, labels: Tensor) -> None:
        config = self.config
        total = int(self.counts.sum()) + len(labels)
        self.mean += (encodings.double() - self.mean).sum(0) / total
        if config.loss == "dot":
            present = torch.unique(labels).tolist()
        else:
            present = self.seen.index_fill(0, labels, True).nonzero()[:, 0].tolist()
        # Views, not copies: a class has rows of its own in memory.
        rows = [self.weight[c].detach().requires_grad_() for c in present]
        bias = [self.bias[c].detach().requires_grad_() for c in present]
        keys = self.keys.detach().requires_grad_(config.keys == "trained")
        with torch.enable_grad():
            loss = self._loss(encodings, labels, present, rows, bias, keys)
            wanted = rows + bias + ([keys] if keys.requires_grad else [])
            gradients = torch.autograd.grad(loss, wanted)
        for index, c in enumerate(present):
            self._update(c, gradients[index], gradients[len(present) + index])
        if keys.requires_grad:
            self.keys.copy_(F.normalize(self.keys - config.key_lr * gradients[-1]))

    def _loss(
        self,
        encodings: Tensor,
        labels: Tensor,
        present: list[int],
        rows: list[Tensor],
        bias: list[Tensor],
        keys: Tensor,
    ) -> Tensor:
        """Mean loss of a batch by the rows N x d and biases N of each class that it concerns."""
        config, inputs = self.config, self._inputs(encodings)
        cosines = F.normalize(self._centred(encodings)) @ keys.T
        memberships = self._memberships(cosines)
        weights = self._vote_weights(cosines, memberships)
        if config.loss == "dot":
            # The vote for the own class of each sample is all that is needed.
            total = torch.zeros(())
            for c, w, b in zip(present, rows, bias, strict=True):
                own = labels == c
                total = total - self._votes(inputs[own], weights[own], w[None], b[None]).sum()
            loss = total / len(labels)
        else:
            votes = self._votes(inputs, weights, torch.stack(rows), torch.stack(bias))
            loss = F.cross_entropy(votes, torch.searchsorted(torch.tensor(present), labels))
        if keys.requires_grad and config.key_pull:
            loss = loss + config.key_pull * ((1 - cosines) * memberships).sum(1).mean()
        return loss

    def _update(self, c: int, rows: Tensor, bias: Tensor) -> None:
        """Take a step of class c, against the gradients N x d and N."""
        if self.config.optimizer == "sign":
            rows, bias = rows.sign_(), bias.sign_()
        elif self.config.optimizer == "adam":
            step = self._adam(c, torch.cat((rows, bias[:, None]), 1))
            rows, bias = step[:, :-1], step[:, -1]
        self.weight[c].sub_(rows, alpha=self.config.lr)
        self.bias[c].sub_(bias, alpha=self.config.lr)

    def _adam(self, c: int, gradient: Tensor) -> Tensor:
        """Step of Adam (arXiv:1412.6980), N x (d + 1); moments of absent classes stay."""
        first = self.first[c].lerp_(gradient, 0.1)
        second = self.second[c].lerp_(gradient**2, 1e-3)
        self.updates[c] += 1
        t = int(self.updates[c])
        return (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
