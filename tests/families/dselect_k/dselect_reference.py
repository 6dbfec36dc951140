"""The equations of the gates in numpy, one example, one task and one selector at a time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def smooth_step(t: float, gamma: float) -> float:
    """The cubic as it is printed."""
    if t <= -gamma / 2:
        return 0.0
    if t >= gamma / 2:
        return 1.0
    return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5


def codes(z: Array, gamma: float) -> Array:
    """Weight of every code 0 .. 2^m - 1, from the logits of m bits, bit 0 first."""
    weights = []
    for code in range(2 ** len(z)):
        weight = 1.0
        for bit, logit in enumerate(z):
            s = smooth_step(float(logit), gamma)
            weight *= s if code >> bit & 1 else 1 - s
        weights.append(weight)
    return np.array(weights)


def fold(weights: Array, n: int) -> Array:
    """Codes without an expert give their weight to the code without their top bit."""
    folded = weights[:n].copy()
    for code in range(n, len(weights)):
        folded[code - len(weights) // 2] += weights[code]
    return folded


def dselect_k(z: Array, alpha: Array, n: int, gamma: float, folded: bool) -> Array:
    """q of one task, from k x m logits of bits and k logits of the mixture."""
    mixture = np.exp(alpha - alpha.max())
    mixture /= mixture.sum()
    q = np.zeros(n)
    for c in range(len(alpha)):
        r = codes(z[c], gamma)
        q += mixture[c] * (fold(r, n) if folded else r[:n])
    return q


def entropy(r: Array) -> float:
    """Of one selector's weights, in nats."""
    return -sum(float(p) * math.log(float(p) + 1e-6) for p in r)


def top_k(scores: Array, k: int) -> Array:
    """Softmax over the k largest scores of one task."""
    kept = np.argsort(-scores, kind="stable")[:k]
    q = np.zeros(len(scores))
    exponentials = np.exp(scores[kept] - scores[kept].max())
    q[kept] = exponentials / exponentials.sum()
    return q
