"""Gates that weigh n experts for each of T tasks: DSelect-k, and what it is compared with.

Source: Hazimeh et al., "DSelect-k: Differentiable Selection in the Mixture of Experts with
Applications to Multi-Task Learning", NeurIPS 2021 (arXiv:2106.03760).

Every gate comes in two forms: static (one set of weights per task, whatever the example) and per
example (weights computed from an input of width p). All tasks of a network share one module.

Shape notation: B examples, b rows (B per example, 1 static), T tasks, n experts, k selectors,
m = ceil(log2 n) bits, p input width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "DSelectK",
    "FixedGate",
    "Gate",
    "GateConfig",
    "GateReport",
    "GumbelGate",
    "Routing",
    "SoftmaxGate",
    "TopKGate",
    "build_gate",
    "smooth_step",
]

GateKind = Literal["dselect-k", "softmax", "top-k", "gumbel", "fixed"]
MissingCodes = Literal["fold", "penalty"]
EntropySchedule = Literal["constant", "linear"]

ACTIVE_TOLERANCE = 1e-5
"""Weight above which a report counts an expert as active."""
_EPSILON = 1e-6
"""Keeps the entropy and the penalty finite."""


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """Cubic step: 0 below -gamma/2, 1 above gamma/2, once differentiable in between.

    The factored form u^2 (3 - 2u) with u = clamp(t/gamma + 1/2, 0, 1) never leaves [0, 1] in
    floating point, and its value and gradient are exact at both ends; the expanded cubic is not.

    Args:
        t: any shape.
        gamma: width of the step, positive.
    """
    u = (t / gamma + 0.5).clamp(0.0, 1.0)
    return u * u * (3.0 - 2.0 * u)


class Routing(NamedTuple):
    """Weights of the experts, and what a regulariser needs beside them."""

    weights: Tensor
    """b x T x n, not negative; they add up to 1 (less, while a penalty drives codes away)."""
    selectors: Tensor | None = None
    """b x T x k x n: weights of each selector, before they are mixed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateReport:
    """What one task's gate does on a batch of examples."""

    active: float
    """Mean number of experts with a weight above 1e-5."""
    selected: tuple[int, ...]
    """Experts that the hardened gate gives any weight, for at least one example."""
    usage: tuple[float, ...]
    """Mean weight of each expert; n values."""
    mass: float
    """Mean sum of the weights."""
    saturated: float | None
    """Share of selector bits that are exactly 0 or 1; None for a gate without bits."""
    hardening_gap: float
    """Mean sum of absolute differences between soft and hardened weights, from 0 to 2."""


class _Scores(nn.Module):
    """`count` numbers per row: free parameters, or an affine map of the example."""

    def __init__(self, count: int, in_features: int | None, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.bias = nn.Parameter(torch.empty(count))
        self.weight = None if in_features is None else nn.Parameter(torch.empty(count, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform(-bound, bound) for map and offset alike, as in the official layer."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -self.bound, self.bound)

    def forward(self, x: Tensor | None) -> Tensor:
        """b x count, never in reduced precision: a bit near the edge must not be rounded over."""
        if self.weight is None:
            return self.bias[None]
        if x is None or x.ndim != 2 or x.shape[1] != self.weight.shape[1]:
            got = "none" if x is None else f"shape {tuple(x.shape)}"
            raise ValueError(f"the gate needs inputs B x {self.weight.shape[1]}, got {got}")
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Gate(nn.Module):
    """Base of the gates.

    Args:
        num_experts: number of experts n.
        num_tasks: number of tasks T.
        in_features: input width p of a per-example gate; None for a static one.

    Raises:
        ValueError: a number is below 1 or not whole.
    """

    exact_zeros: ClassVar[bool] = True
    """Whether an expert of weight 0 gets and gives no gradient in training, and can be skipped."""

    def __init__(self, num_experts: int, num_tasks: int, in_features: int | None) -> None:
        super().__init__()
        check_at_least_1("num_experts", num_experts)
        _check_whole("num_tasks", num_tasks)
        if num_tasks < 1:
            raise ValueError(f"a gate needs at least one task, got {num_tasks}")
        if in_features is not None:
            _check_whole("in_features", in_features)
        if in_features is not None and in_features < 1:
            raise ValueError(f"in_features must be at least 1 or None, got {in_features}")
        self.num_experts, self.num_tasks, self.in_features = num_experts, num_tasks, in_features

    @property
    def is_static(self) -> bool:
        """Whether the weights are the same for all examples."""
        return self.in_features is None

    def forward(self, x: Tensor | None = None, *, hard: bool = False) -> Routing:
        """Weights of the experts.

        Args:
            x: B x p for a per-example gate; not used by a static one.
            hard: the discrete choice that training leads to, with at most k experts per task.
        """
        raise NotImplementedError

    def regulariser(self, routing: Routing, progress: float = 1.0) -> Tensor:
        """What the gate adds to the loss: a mean over the batch, a sum over tasks, with weights.

        It is 0 for an empty batch.

        Args:
            routing: what `forward` returned.
            progress: share of the training that is done, for scheduled terms.
        """
        return routing.weights.new_zeros(())

    def saturation(self, x: Tensor | None = None) -> Tensor | None:
        """Share of bits that are exactly 0 or 1, per task (T); None for a gate without bits."""
        return None

    @torch.no_grad()
    def report(self, x: Tensor | None = None) -> tuple[GateReport, ...]:
        """What each task's gate does on a batch, as it is in evaluation.

        Args:
            x: B x p for a per-example gate; not used by a static one.
        """
        was_training = self.training
        self.eval()
        try:
            soft, hard = self(x).weights, self(x, hard=True).weights
            saturation = self.saturation(x)
        finally:
            self.train(was_training)
        return tuple(
            GateReport(
                active=float((soft[:, t] > ACTIVE_TOLERANCE).sum(-1).double().mean()),
                selected=tuple((hard[:, t] > 0).any(0).nonzero().flatten().tolist()),
                usage=tuple(soft[:, t].double().mean(0).tolist()),
                mass=float(soft[:, t].sum(-1).double().mean()),
                saturated=None if saturation is None else float(saturation[t]),
                hardening_gap=float((soft[:, t] - hard[:, t]).abs().sum(-1).double().mean()),
            )
            for t in range(self.num_tasks)
        )


def _check_whole(name: str, value: Any) -> None:
    # A number of numpy is whole too, and True is none.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_at_least_1(name: str, value: int) -> None:
    """Check a number of things.

    Raises:
        ValueError: it is not whole, or below 1.
    """
    _check_whole(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Check one of a closed list, a `Literal`.

    Raises:
        ValueError: it is not on the list.
    """
    known = get_args(choices)
    if value not in known:
        *others, last = map(repr, known)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def _check_number(name: str, value: Any) -> None:
    # Numbers of numpy and of torch are numbers too; texts and None are none.
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number, got {value!r}")


def _check_positive(name: str, value: float) -> None:
    _check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    if value == math.inf:
        raise ValueError(f"{name} must be finite, got {value}")


def _check_weight(name: str, value: float) -> None:
    _check_number(name, value)
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_k(k: int, num_experts: int) -> None:
    _check_whole("k", k)
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be from 1 to the number of experts, {num_experts}; got {k}")


class DSelectK(Gate):
    """Mixes k selectors, each of which is a smooth binary code of one expert.

    With z the k x m logits of the bits and a the k logits of the mixture,

        s = smooth_step(z),  r_c[i] = prod_j (s_cj if bit j of i is set, else 1 - s_cj),
        q = sum_c softmax(a)_c r_c.

    z and a are parameters (static) or affine in the example. Training drives bits to exactly 0 or
    1; once all are there, at most k experts have weight. At the start all have.

    Where n is no power of two, codes n .. 2^m - 1 have no expert. "fold" lets such a code stand
    for the expert whose code lacks the top bit, so that weights always add up to 1. "penalty" is
    the official way: those codes' weight is lost, and a loss term 1 / (weight on real experts)
    drives it away, here as a batch mean and bounded.

    Args:
        num_experts: number of experts n; any number.
        k: number of selectors, at most n.
        num_tasks: number of tasks T.
        in_features: input width p of a per-example gate; None for a static one.
        gamma: width of the smooth step, positive.
        missing_codes: what to do with codes without an expert.
        entropy: weight of the selectors' entropy in the loss (batch mean, sum over selectors).
        entropy_schedule: "constant", or "linear" for a weight that grows from 0 to `entropy`.
        penalty: weight of the penalty, for `missing_codes="penalty"`.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        num_experts: int,
        k: int = 2,
        *,
        num_tasks: int = 1,
        in_features: int | None = None,
        gamma: float = 1.0,
        missing_codes: MissingCodes = "fold",
        entropy: float = 0.0,
        entropy_schedule: EntropySchedule = "constant",
        penalty: float = 1.0,
    ) -> None:
        super().__init__(num_experts, num_tasks, in_features)
        _check_k(k, num_experts)
        _check_positive("gamma", gamma)
        check_choice("missing_codes", missing_codes, MissingCodes)
        check_choice("entropy_schedule", entropy_schedule, EntropySchedule)
        _check_weight("entropy", entropy)
        _check_weight("penalty", penalty)
        self.k, self.gamma, self.missing_codes = k, gamma, missing_codes
        self.entropy, self.entropy_schedule, self.penalty = entropy, entropy_schedule, penalty
        self.num_bits = (num_experts - 1).bit_length()
        self.codes = _Scores(num_tasks * k * self.num_bits, in_features, gamma / 100)
        self.mixing = _Scores(num_tasks * k, in_features, 0.05)

    def _bits(self, x: Tensor | None, hard: bool) -> Tensor:
        z: Tensor = self.codes(x)
        z = z.view(z.shape[0], self.num_tasks, self.k, self.num_bits)
        return (z > 0).to(z.dtype) if hard else smooth_step(z, self.gamma)

    def _selectors(self, bits: Tensor) -> Tensor:
        """Weights of the experts from bits, ... x m to ... x n."""
        r = bits.new_ones(*bits.shape[:-1], 1)
        for bit in range(self.num_bits):  # each doubles the codes: those without it, those with it
            s = bits[..., bit : bit + 1]
            r = torch.cat((r * (1 - s), r * s), dim=-1)
        missing = r.shape[-1] - self.num_experts
        if not missing:
            return r
        if self.missing_codes == "penalty":
            return r[..., : self.num_experts]
        half = r.shape[-1] // 2
        lost = F.pad(r[..., self.num_experts :], (half - missing, half - missing))
        return r[..., : self.num_experts] + lost

    def forward(self, x: Tensor | None = None, *, hard: bool = False) -> Routing:
        """See `Gate.forward`; hardened, a bit is 1 where its logit is positive."""
        selectors = self._selectors(self._bits(x, hard))
        mixture: Tensor = self.mixing(x)
        mixture = mixture.view(mixture.shape[0], self.num_tasks, self.k, 1).softmax(-2)
        return Routing((mixture * selectors).sum(-2), selectors)

    def regulariser(self, routing: Routing, progress: float = 1.0) -> Tensor:
        """Entropy and penalty, where they have a weight."""
        assert routing.selectors is not None
        # In half precision a lost code of weight 0 would add infinity.
        lower = routing.selectors.dtype.itemsize < 4
        r = routing.selectors.float() if lower else routing.selectors
        total = r.new_zeros(())
        rows = max(len(r), 1)
        if self.entropy:
            weight = self.entropy * (progress if self.entropy_schedule == "linear" else 1.0)
            total = total - weight * (r * (r + _EPSILON).log()).sum() / rows
        if self.missing_codes == "penalty" and self.num_experts < 2**self.num_bits:
            total = total + self.penalty * (1 / (r.sum(-1) + _EPSILON)).sum() / rows
        return total

    @torch.no_grad()
    def saturation(self, x: Tensor | None = None) -> Tensor:
        """See `Gate.saturation`; a single expert has no bits, which counts as saturated."""
        bits = self._bits(x, hard=False).transpose(0, 1).flatten(1)
        return ((bits == 0) | (bits == 1)).double().mean(1).nan_to_num(1.0)


class SoftmaxGate(Gate):
    """All experts, weighed by a softmax: the gate of MMoE (Ma et al., KDD 2018).

    It selects nothing: soft and hardened weights are the same.

    Args:
        num_experts: number of experts n.
        num_tasks: number of tasks T.
        in_features: input width p of a per-example gate; None for a static one.
    """

    def __init__(
        self, num_experts: int, *, num_tasks: int = 1, in_features: int | None = None
    ) -> None:
        super().__init__(num_experts, num_tasks, in_features)
        self.scores = _Scores(num_tasks * num_experts, in_features, 0.05)

    def forward(self, x: Tensor | None = None, *, hard: bool = False) -> Routing:
        """See `Gate.forward`."""
        scores: Tensor = self.scores(x)
        return Routing(scores.view(scores.shape[0], self.num_tasks, self.num_experts).softmax(-1))


class TopKGate(Gate):
    """Softmax over the k largest scores (Shazeer et al., 2017, arXiv:1701.06538).

    Args:
        num_experts: number of experts n.
        k: experts that are kept.
        num_tasks: number of tasks T.
        in_features: input width p of a per-example gate; None for a static one.
        noise: add normal noise of a learned, example-dependent size to the scores in training.
        balance: weight of the squared coefficient of variation, over experts, of their weights
            summed over the batch; per-example gates only.

    Raises:
        ValueError: a value is out of range, or a static gate is to be balanced.
    """

    def __init__(
        self,
        num_experts: int,
        k: int = 2,
        *,
        num_tasks: int = 1,
        in_features: int | None = None,
        noise: bool = False,
        balance: float = 0.0,
    ) -> None:
        super().__init__(num_experts, num_tasks, in_features)
        _check_k(k, num_experts)
        _check_weight("balance", balance)
        if balance and in_features is None:
            raise ValueError("balance needs a per-example gate: a static one has to be unequal")
        self.k, self.balance = k, balance
        self.scores = _Scores(num_tasks * num_experts, in_features, 0.05)
        self.noise = _Scores(num_tasks * num_experts, in_features, 0.0) if noise else None

    def forward(self, x: Tensor | None = None, *, hard: bool = False) -> Routing:
        """See `Gate.forward`; hardened is without noise."""
        scores: Tensor = self.scores(x)
        if self.noise is not None and self.training and not hard:
            scores = scores + torch.randn_like(scores) * F.softplus(self.noise(x))
        scores = scores.view(scores.shape[0], self.num_tasks, self.num_experts)
        kept = scores.topk(self.k, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1))
        return Routing(weights)

    def regulariser(self, routing: Routing, progress: float = 1.0) -> Tensor:
        """Imbalance over the batch, where it has a weight."""
        total = super().regulariser(routing)
        if self.balance and len(routing.weights):
            importance = routing.weights.mean(0)
            variation = importance.var(-1, correction=0) / importance.mean(-1).square()
            total = total + self.balance * variation.sum()
        return total


class GumbelGate(Gate):
    """Mixes k selectors, each of which draws one expert (Jang et al., 2017, arXiv:1611.01144).

    The forward pass has the drawn experts alone, the backward pass the gradient of the relaxed
    draw; evaluation takes the likeliest expert of each selector. It differs from `DSelectK` in how
    a selector chooses, and in nothing else.

    Args:
        num_experts: number of experts n.
        k: number of selectors, at most n.
        num_tasks: number of tasks T.
        in_features: input width p of a per-example gate; None for a static one.
        temperature: of the relaxed draw, positive.

    Raises:
        ValueError: a value is out of range.
    """

    exact_zeros = False

    def __init__(
        self,
        num_experts: int,
        k: int = 2,
        *,
        num_tasks: int = 1,
        in_features: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(num_experts, num_tasks, in_features)
        _check_k(k, num_experts)
        _check_positive("temperature", temperature)
        self.k, self.temperature = k, temperature
        self.scores = _Scores(num_tasks * k * num_experts, in_features, 0.05)
        self.mixing = _Scores(num_tasks * k, in_features, 0.05)

    def forward(self, x: Tensor | None = None, *, hard: bool = False) -> Routing:
        """See `Gate.forward`; hardened takes the likeliest expert of each selector."""
        scores: Tensor = self.scores(x)
        scores = scores.view(scores.shape[0], self.num_tasks, self.k, self.num_experts)
        if self.training and not hard:
            selectors = F.gumbel_softmax(scores, self.temperature, hard=True)
        else:
            selectors = F.one_hot(scores.argmax(-1), self.num_experts).to(scores.dtype)
        mixture: Tensor = self.mixing(x)
        mixture = mixture.view(mixture.shape[0], self.num_tasks, self.k, 1).softmax(-2)
        return Routing((mixture * selectors).sum(-2), selectors)


class FixedGate(Gate):
    """A table of weights that is not trained: what a pruned network keeps of its static gate.

    A new one gives task t the expert t mod n alone; with as many experts as tasks that makes
    networks that share nothing.

    Args:
        num_experts: number of experts n.
        num_tasks: number of tasks T.
    """

    table: Tensor

    def __init__(self, num_experts: int, *, num_tasks: int = 1) -> None:
        super().__init__(num_experts, num_tasks, None)
        own = torch.arange(num_tasks) % num_experts
        self.register_buffer("table", F.one_hot(own, num_experts).float())

    def forward(self, x: Tensor | None = None, *, hard: bool = False) -> Routing:
        """See `Gate.forward`."""
        return Routing(self.table[None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Which gate, in a network's configuration; fields that a kind does not have are not used.

    Raises:
        ValueError: a value is out of range.
    """

    kind: GateKind = "dselect-k"
    """Kind of gate."""
    per_example: bool = False
    """Weights from each example, or the same for all."""
    k: int = 2
    """Selectors of DSelect-k and Gumbel, experts kept by top-k."""
    gamma: float = 1.0
    """DSelect-k: width of the smooth step."""
    missing_codes: MissingCodes = "fold"
    """DSelect-k: codes without an expert fold onto a real one, or are penalised."""
    penalty: float = 1.0
    """DSelect-k: weight of that penalty."""
    entropy: float = 0.0
    """DSelect-k: weight of the selectors' entropy in the loss."""
    entropy_schedule: EntropySchedule = "constant"
    """DSelect-k: that weight throughout, or growing from 0 over the training."""
    temperature: float = 1.0
    """Gumbel: temperature of the relaxed draw."""
    noise: bool = False
    """Top-k: learned noise on the scores in training."""
    balance: float = 0.0
    """Top-k: weight of the load-balance loss."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, GateKind)
        check_choice("missing_codes", self.missing_codes, MissingCodes)
        check_choice("entropy_schedule", self.entropy_schedule, EntropySchedule)
        check_at_least_1("k", self.k)
        for name in ("gamma", "temperature"):
            _check_positive(name, getattr(self, name))
        for name in ("penalty", "entropy", "balance"):
            _check_weight(name, getattr(self, name))
        if self.kind == "fixed" and self.per_example:
            raise ValueError("a fixed gate is static; per_example must be false")
        if self.kind == "top-k" and self.balance and not self.per_example:
            raise ValueError("balance needs a per-example gate: a static one has to be unequal")

    def check(self, num_experts: int) -> None:
        """Check against the number of experts.

        Raises:
            ValueError: there is no expert, or fewer than k.
        """
        check_at_least_1("num_experts", num_experts)
        if self.kind in ("dselect-k", "top-k", "gumbel"):
            _check_k(self.k, num_experts)


def build_gate(config: GateConfig, num_experts: int, num_tasks: int, in_features: int) -> Gate:
    """The gate of a configuration.

    Args:
        config: which gate.
        num_experts: number of experts n.
        num_tasks: number of tasks T.
        in_features: input width p; a static gate does not use it.

    Raises:
        ValueError: a number does not fit the others.
    """
    width = in_features if config.per_example else None
    if config.kind == "dselect-k":
        return DSelectK(
            num_experts,
            config.k,
            num_tasks=num_tasks,
            in_features=width,
            gamma=config.gamma,
            missing_codes=config.missing_codes,
            entropy=config.entropy,
            entropy_schedule=config.entropy_schedule,
            penalty=config.penalty,
        )
    if config.kind == "top-k":
        return TopKGate(
            num_experts,
            config.k,
            num_tasks=num_tasks,
            in_features=width,
            noise=config.noise,
            balance=config.balance,
        )
    if config.kind == "gumbel":
        return GumbelGate(
            num_experts,
            config.k,
            num_tasks=num_tasks,
            in_features=width,
            temperature=config.temperature,
        )
    if config.kind == "softmax":
        return SoftmaxGate(num_experts, num_tasks=num_tasks, in_features=width)
    if config.kind == "fixed":
        return FixedGate(num_experts, num_tasks=num_tasks)
    raise AssertionError(f"no gate of kind {config.kind!r}")
