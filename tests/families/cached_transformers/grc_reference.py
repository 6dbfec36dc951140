"""GRC attention written out from its equations: float64, token by token and head by head.

Slow on purpose. It takes the weights of a module by name and shares no code with the package.
Notation as in the paper (arXiv:2312.12742): X is T x D, C is M x Dm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]


def weights_of(module: nn.Module) -> dict[str, Array]:
    """Parameters and buffers of a module as float64 arrays."""
    return {name: t.detach().double().numpy().copy() for name, t in module.state_dict().items()}


def below(weights: Weights, prefix: str) -> dict[str, Array]:
    """The weights whose name starts with `prefix`, without it."""
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def gelu(x: Array) -> Array:
    return np.vectorize(lambda v: 0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))))(x)


def layer_norm(x: Array, weights: Weights) -> Array:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weights["weight"] + weights["bias"]


def rms_norm(x: Array, epsilon: float = float(np.finfo(np.float64).eps)) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def linear(x: Array, weights: Weights, rows: slice = slice(None)) -> Array:
    y = x @ weights["weight"][rows].T
    return y + weights["bias"][rows] if "bias" in weights else y


def turn(x: Array, position: int, base: float) -> Array:
    """Rotary position: channels (i, i + d/2), a complex number, by position / base^(2i/d)."""
    half = len(x) // 2
    z = x[:half] + 1j * x[half:]
    z = z * np.exp(1j * position * base ** (-2.0 * np.arange(half) / len(x)))
    return np.concatenate((z.real, z.imag))


def interpolate(x: Array, slots: int, mode: str = "nearest") -> Array:
    """T x Dm -> M x Dm by the function that the papers name."""
    channels_first = torch.from_numpy(np.ascontiguousarray(x.T))[None]
    extra = {"align_corners": False} if mode == "linear" else {}
    y = nn.functional.interpolate(channels_first, size=slots, mode=mode, **extra)
    return y[0].T.numpy()


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    heads: int,
    sees: Callable[[int, int], bool] = lambda i, j: True,
    prepare: Callable[[Array], Array] = lambda head: head,
    query_positions: Sequence[int] | None = None,
    key_positions: Sequence[int] | None = None,
    base: float = 10_000.0,
) -> Array:
    """softmax(q k^T / sqrt(d)) v for every token and head; zeros where nothing is seen."""
    d = queries.shape[1] // heads
    out = np.zeros_like(queries)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(queries)):
            seen = [j for j in range(len(keys)) if sees(i, j)]
            if not seen:
                continue
            q = prepare(queries[i, part])
            if query_positions is not None:
                q = turn(q, query_positions[i], base)
            scores = []
            for j in seen:
                k = prepare(keys[j, part])
                if key_positions is not None:
                    k = turn(k, key_positions[j], base)
                scores.append(q @ k / math.sqrt(d))
            share = np.exp(np.array(scores) - max(scores))
            share = share / share.sum()
            out[i, part] = sum(s * values[j, part] for s, j in zip(share, seen, strict=True))
    return out


def multi_head(x: Array, context: Array, heads: int, weights: Weights, **options: Any) -> Array:
    """Queries from `x`, keys and values from `context`; the output projection if there is one."""
    dim = x.shape[1]
    qkv = below(weights, "qkv.")
    q = linear(x, qkv, slice(0, dim))
    k = linear(context, qkv, slice(dim, 2 * dim))
    v = linear(context, qkv, slice(2 * dim, 3 * dim))
    y = attend(q, k, v, heads, **options)
    if "out.weight" in weights:
        y = linear(y, below(weights, "out."))
    sees = options.get("sees", lambda i, j: True)
    for i in range(len(x)):
        if not any(sees(i, j) for j in range(len(context))):
            y[i] = 0.0  # the branch has nothing to say, not even the bias of its projection
    return y


def write(cache: Array, update: Array, weights: Weights) -> Array:
    """Eqs. (4) and (5) slot by slot; with weights of a norm the released candidate."""
    width = cache.shape[1]
    gates, candidate = below(weights, "gates."), below(weights, "candidate.")
    rows = []
    for c, s in zip(cache, update, strict=True):
        both = np.concatenate((c, s))
        g_r = sigmoid(linear(both, gates, slice(0, width)))
        g_u = sigmoid(linear(both, gates, slice(width, 2 * width)))
        new = linear(np.concatenate((g_r * c, s)), candidate)
        if "norm.weight" in weights:
            new = layer_norm(gelu(new), below(weights, "norm."))
        rows.append((1.0 - g_u) * c + g_u * new)
    return np.stack(rows)


def mix(own: Array, cached: Array, logits: Array) -> Array:
    """Eq. (2) per head, the narrower cached heads filled up with zeros."""
    heads = len(logits)
    d, d_m = own.shape[1] // heads, cached.shape[1] // heads
    out = np.zeros_like(own)
    for h, weight in enumerate(sigmoid(logits)):
        wide = np.zeros((len(own), d))
        wide[:, :d_m] = cached[:, h * d_m : (h + 1) * d_m]
        out[:, h * d : (h + 1) * d] = weight * wide + (1.0 - weight) * own[:, h * d : (h + 1) * d]
    return out


def convolve(x: Array, height: int, width: int, weights: Weights) -> Array:
    """Grouped 3 x 3 convolution on the grid of the last tokens, zeros for those before it."""
    kernel, bias = weights["weight"], weights["bias"]  # D x (D / groups) x 3 x 3
    dim, per_group = kernel.shape[:2]
    extra = len(x) - height * width
    out = np.zeros_like(x)
    for row in range(height):
        for column in range(width):
            for channel in range(dim):
                first = channel // per_group * per_group
                total = bias[channel]
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        y, z = row + dy, column + dx
                        if 0 <= y < height and 0 <= z < width:
                            token = x[extra + y * width + z, first : first + per_group]
                            total = total + kernel[channel, :, dy + 1, dx + 1] @ token
                out[extra + row * width + column, channel] = total
    return out


def paper(
    x: Array, weights: Weights, heads: int, grid: tuple[int, int], *, training: bool
) -> tuple[Array, Array]:
    """Section 1.1, Algorithm 1: B x T x D to the output and the cache that is stored (M x Dm)."""
    cache = weights["cache"][0]
    slots, width = cache.shape
    if training:
        update = below(weights, "update.")
        each = [write(cache, interpolate(row[:, :width], slots), update) for row in x]
        cache = np.mean(each, axis=0)
    out = []
    for row in x:
        own = multi_head(row, row, heads, below(weights, "attention."))
        cached = multi_head(row[:, :width], cache, heads, below(weights, "memory_attention."))
        mixed = linear(mix(own, cached, weights["mixing_logits"]), below(weights, "out."))
        out.append(mixed + convolve(row, *grid, below(weights, "positional_conv.")))
    return np.stack(out), cache


def released(x: Array, weights: Weights, heads: int, grid: tuple[int, int]) -> tuple[Array, Array]:
    """Section 1.2: B x T x D to the output and, for training, the cache that is stored."""
    cache = weights["cache"][0]
    if len(cache) == 0:  # before the first forward
        cache = np.zeros((x.shape[1], weights["cache"].shape[2]))
    slots, width = cache.shape
    out, caches = [], []
    for row in x:
        y = multi_head(row, row, heads, below(weights, "attention."))
        c = write(cache, interpolate(y[:, :width], slots), below(weights, "update."))
        m = multi_head(row[:, :width], c, heads, below(weights, "memory_attention."))
        mixed = mix(y, m, weights["mixing_logits"])
        out.append(mixed + convolve(row, *grid, below(weights, "positional_conv.")))
        caches.append(c)
    return np.stack(out), np.mean(caches, axis=0)


def switches(
    x: Array, weights: Weights, heads: int, config: Any, *, training: bool
) -> tuple[Array, Array]:
    """Section 1.3 row by row, without the convolution: output and new caches, B x M x Dm."""
    cache = weights["cache"][0]
    slots, width = cache.shape
    own = [multi_head(row, row, heads, below(weights, "attention.")) for row in x]
    source = x if config.update_source == "input" else own
    old = [cache for _ in x]
    new = old
    if training or config.inference == "blend":
        update = below(weights, "update.")
        new = [
            write(cache, interpolate(s[:, :width], slots, config.interpolation), update)
            for s in source
        ]
    read = new if config.order == "write_read" else old
    if config.read == "batch_mean":
        read = [np.mean(read, axis=0) for _ in x]
    out = []
    for row, y, c in zip(x, own, read, strict=True):
        m = multi_head(row[:, :width], c, heads, below(weights, "memory_attention."))
        mixed = mix(y, m, weights["mixing_logits"])
        out.append(linear(mixed, below(weights, "out.")) if "out.weight" in weights else mixed)
    return np.stack(out), np.stack(new)


def last_source(slot: int, slots: int, length: int, mode: str) -> int:
    """The last token that a slot of `interpolate` depends on, found by trying each of them."""
    needed = [
        t
        for t in range(length)
        if abs(interpolate(np.eye(length)[:, [t]], slots, mode)[slot, 0]) > 1e-9
    ]
    return max(needed)


def causal_segment(
    x: Array,
    cache: Array,
    weights: Weights,
    heads: int,
    config: Any,
    *,
    base: float | None,
    qk_norm: bool = False,
    length: int | None = None,
) -> tuple[Array, Array]:
    """One stream, one segment (T x D) of `length` tokens, of which T have come; output and cache.

    Each token is computed from tokens 0..i alone; a slot exists for it once its last source has
    come. Slots whose source never came keep their content.
    """
    tokens = len(x)
    length = tokens if length is None else length
    slots, width = cache.shape
    prepare = rms_norm if qk_norm else (lambda head: head)
    positions = None if base is None else list(range(tokens))
    own = multi_head(
        x,
        x,
        heads,
        below(weights, "attention."),
        sees=lambda i, j: j <= i,
        prepare=prepare,
        query_positions=positions,
        key_positions=positions,
        base=base or 1.0,
    )
    source = (x if config.update_source == "input" else own)[:, :width]
    full = np.concatenate((source, np.zeros((length - tokens, width))))
    last = [last_source(j, slots, length, config.interpolation) for j in range(slots)]
    update = interpolate(full, slots, config.interpolation)
    written = write(cache, update, below(weights, "update."))
    new = np.where(np.array(last)[:, None] < tokens, written, cache)
    options: dict[str, Any] = {"prepare": prepare}
    if config.slot_rotary:
        shift = 0 if config.order == "write_read" else -length
        options["query_positions"] = list(range(tokens))
        options["key_positions"] = [position + shift for position in last]
        options["base"] = 10_000.0 if base is None else base
    if config.order == "write_read":
        options["sees"] = lambda i, j: last[j] <= i
    read = new if config.order == "write_read" else cache
    m = multi_head(x[:, :width], read, heads, below(weights, "memory_attention."), **options)
    mixed = mix(own, m, weights["mixing_logits"])
    return linear(mixed, below(weights, "out.")) if "out.weight" in weights else mixed, new


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer a value that matters (fresh output projections are zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(noise * (0.7 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5))
    return module


def to_array(x: Tensor) -> Array:
    return x.detach().double().numpy()
