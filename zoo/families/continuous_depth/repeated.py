"""Repeated composition of one ReLU network of fixed size.

Source: Zhang, Lu, Zhao, "On Enhancing Expressive Power via Compositions of Single Fixed-Size ReLU
Network", ICML 2023 (arXiv:2301.12353): with g a ReLU network of fixed size and L1, L2 affine,
L2 o g o ... o g o L1 with r compositions approximates a 1-Lipschitz function on [0, 1]^d with an
error of order r^(-1/d).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["MAX_EXACT_COMPOSITIONS", "RepeatedComposition", "lipschitz_approximant"]

MAX_EXACT_COMPOSITIONS = 24
"""Each composition of `lipschitz_approximant` reads two bits of one number; float64 has 53."""


class RepeatedComposition(nn.Module):
    """L2 o g^r o L1, with one shared g of two hidden layers, however often it is composed.

    Args:
        in_features, out_features: dimensions of input and output.
        width: dimension of the state that g maps to itself.
        hidden: units in each hidden layer of g.
        compositions: r; may be set to another number at any time.

    Raises:
        ValueError: a size is no integer, or not positive.
    """

    def __init__(
        self, in_features: int, out_features: int, *, width: int, hidden: int, compositions: int
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_features", in_features),
            ("out_features", out_features),
            ("width", width),
            ("hidden", hidden),
            ("compositions", compositions),
        ):
            if type(value) is not int:
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.compositions = compositions
        self.first = nn.Linear(in_features, width)
        self.repeated = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        )
        self.last = nn.Linear(width, out_features)

    def states(self, x: Tensor) -> list[Tensor]:
        """The state before and after each composition, r + 1 of ... x width."""
        states = [self.first(x)]
        for _ in range(self.compositions):
            states.append(self.repeated(states[-1]))
        return states

    def forward(self, x: Tensor) -> Tensor:
        """... x in_features to ... x out_features."""
        y: Tensor = self.last(self.states(x)[-1])
        return y


@torch.no_grad()
def lipschitz_approximant(
    function: Callable[[float], float], compositions: int
) -> RepeatedComposition:
    """A network whose error on a 1-Lipschitz function on [0, 1] is at most 2 / r, by construction.

    Our own construction for one dimension. With r cells, f is rounded down to multiples of 1/r at
    the nodes, so that it goes up, down or stays from node to node; all these choices are the base-4
    digits of one number s. The state is (u, s, y): where x lies relative to the cell, the digits
    not yet read, and what has been added up; f at 0 is the bias of the last layer. Each composition
    reads a digit, adds the rise or fall over the cell as far as x reaches into it, and moves on:

        v = clamp(u, 0, 1),  d = floor(4 s),
        u <- u - 1,  s <- 4 s - d,  y <- y + (d - 1) v / r.

    Digits 0, 1, 2 leave a gap below each whole number in which floor is a steep ramp, and (d - 1) v
    is a difference of two ReLUs; nine units in each hidden layer do.

    Args:
        function: 1-Lipschitz on [0, 1].
        compositions: r, at most `MAX_EXACT_COMPOSITIONS`.

    Returns:
        A float64 network from 1 to 1 features.

    Raises:
        ValueError: `compositions` is no integer or out of range, or the function is not finite, or
            not 1-Lipschitz, at the nodes.
    """
    r = compositions
    if type(r) is not int:
        raise ValueError(f"compositions must be an integer, got {r!r}")
    if not 1 <= r <= MAX_EXACT_COMPOSITIONS:
        raise ValueError(
            f"compositions must be from 1 to {MAX_EXACT_COMPOSITIONS}, got {r}: a float64 holds no "
            f"more digits exactly"
        )
    # A value that is a multiple of 1/r but for rounding counts as that multiple.
    values = [function(k / r) for k in range(r + 1)]
    if not all(map(math.isfinite, values)):
        where = next(k / r for k, value in enumerate(values) if not math.isfinite(value))
        raise ValueError(f"the function must be finite on [0, 1], but is not at {where:g}")
    levels = [math.floor(r * value + 1e-9) for value in values]
    rises = [after - before for before, after in itertools.pairwise(levels)]
    if max(map(abs, rises)) > 1:
        raise ValueError("the function rises or falls by more than its argument: not 1-Lipschitz")
    code = sum((rise + 1) * 4.0 ** -(k + 1) for k, rise in enumerate(rises))

    net = RepeatedComposition(1, 1, width=3, hidden=9, compositions=r).double()
    for parameter in net.parameters():
        parameter.zero_()
    net.first.weight[0, 0] = r
    net.first.bias[1] = code
    # What is added up starts at 0 and stays within 1 of it, however large the function is.
    net.last.weight[0, 2], net.last.bias[0] = 1.0, levels[0] / r

    one, two, three = (net.repeated[i] for i in (0, 2, 4))
    assert isinstance(one, nn.Linear)
    assert isinstance(two, nn.Linear)
    assert isinstance(three, nn.Linear)
    u, s, y = range(3)
    # Of 4 s, the fraction is at most 2/3: the ramps up to digits 2 and 1 lie in the gaps below.
    rows = [(u, 1.0, 0.0), (u, -1.0, 0.0), (u, 1.0, -1.0), (s, 1.0, 0.0), (y, 1.0, _FLOOR)]
    rows += [(s, 12.0, -5.0), (s, 12.0, -6.0), (s, 12.0, -2.0), (s, 12.0, -3.0)]
    for unit, (source, weight, bias) in enumerate(rows):
        one.weight[unit, source], one.bias[unit] = weight, bias
    u_plus, u_minus, u_beyond, s_kept, y_kept, p_up, p_over, q_up, q_over = range(9)
    clamp = {u_plus: 1.0, u_beyond: -1.0}
    is_two = {p_up: 1.0, p_over: -1.0}
    is_some = {q_up: 1.0, q_over: -1.0}
    second: list[tuple[dict[int, float], float]] = [
        ({u_plus: 1.0}, 0.0),
        ({u_minus: 1.0}, 0.0),
        (_sum({s_kept: 4.0}, _scaled(is_two, -1.0), _scaled(is_some, -1.0)), 0.0),
        ({y_kept: 1.0}, 0.0),
        (_sum(clamp, is_two), -1.0),  # v where the digit is 2
        (_sum(clamp, _scaled(is_some, -1.0)), 0.0),  # v where the digit is 0
    ]
    for unit, (terms, bias) in enumerate(second):
        for source, weight in terms.items():
            two.weight[unit, source] = weight
        two.bias[unit] = bias
    three.weight[u, 0], three.weight[u, 1], three.bias[u] = 1.0, -1.0, -1.0
    three.weight[s, 2] = 1.0
    three.weight[y, 3], three.bias[y] = 1.0, -_FLOOR
    three.weight[y, 4], three.weight[y, 5] = 1.0 / r, -1.0 / r
    return net


_FLOOR = 2.0**10
"""Added to what has been summed up, at most 1 in size, so that it passes through ReLUs."""


def _scaled(terms: dict[int, float], factor: float) -> dict[int, float]:
    return {key: factor * value for key, value in terms.items()}


def _sum(*parts: dict[int, float]) -> dict[int, float]:
    total: dict[int, float] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total
