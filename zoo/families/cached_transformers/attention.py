"""Gated recurrent cache (GRC) attention.

Source: Zhang et al., "Cached Transformers: Improving Transformers with Differentiable Memory
Cache", AAAI 2024 (arXiv:2312.12742); equation numbers below are the paper's.

Shape notation used in this file:

    B   batch; every row is one independent stream
    T   tokens of this call
    P   tokens of the open segment that earlier calls have already seen
    D   model width                     H   attention heads
    Dm  cache width, `ratio * D`        M   cache slots

The layers are pure functions of `(x, state)`: nothing is written to a buffer during `forward`.
That makes activation checkpointing (which runs a forward twice) and gradient accumulation safe
by construction. Only `GRCAttention.commit` changes the module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "GRC_PRESETS",
    "AttentionState",
    "GRCAttention",
    "GRCConfig",
    "GatedRecurrentUpdate",
    "MultiHeadAttention",
    "RecurrentAttention",
    "grc_preset",
    "slot_positions",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRCConfig:
    """Every choice in which descriptions of GRC attention differ.

    The paper and its released code disagree on most of these, and neither says how the cache is
    to be used in a causal model; see `GRC_PRESETS` for the named combinations.

    Raises:
        ValueError: a value is out of range, or two choices contradict each other.
    """

    ratio: float = 0.5
    """Cache width over model width, r in (0, 1]."""
    slots: int | Literal["first_T"] = 64
    """Cache length M; "first_T": the number of tokens of the first call (shared scope only)."""
    update_source: Literal["input", "attn_out"] = "input"
    """What is written: the layer input (eq. 4) or the output of self-attention (released code)."""
    candidate: Literal["linear", "ln_gelu"] = "linear"
    """Candidate content: linear (eq. 5) or LayerNorm(GELU(linear)) (released code)."""
    read: Literal["batch_mean", "per_sample"] = "batch_mean"
    """What cached attention reads: the batch mean of the new cache, or each sample's own."""
    inference: Literal["frozen", "blend"] = "frozen"
    """Shared scope in eval mode: read the stored cache as it is, or blend the sample into it."""
    lambda_init: float = 0.0
    """Initial mixing logit of every head; 0 weighs both branches alike (eq. 2)."""
    interpolation: Literal["nearest", "linear"] = "nearest"
    """How T tokens are resampled to M slots."""
    order: Literal["write_read", "read_write"] = "write_read"
    """Whether the current tokens are in the memory they attend to."""
    scope: Literal["shared", "per_stream"] = "shared"
    """One cache for all (a buffer, like BatchNorm statistics) or one per batch row (a state)."""
    positional_conv: bool = True
    """Add a grouped 3x3 convolution of the input on the token grid (vision only)."""
    projection: Literal["after_mix", "per_branch"] = "after_mix"
    """One output projection after mixing heads, or one in each branch before it (released code)."""
    slot_rotary: bool = False
    """Give slots the rotary position of the token they were written from. Not in the paper, where
    slots carry no position and cached attention is by content only; needs `segment`."""
    segment: int | None = None
    """Tokens per segment, when it is fixed: slot j then stands for token floor(j * segment / M)
    also while the segment is still being written. None: the tokens of each call."""

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")
        if self.slots != "first_T" and (not isinstance(self.slots, int) or self.slots < 1):
            raise ValueError(f"slots must be a positive integer or 'first_T', got {self.slots!r}")
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment must be a positive integer or None, got {self.segment}")
        if self.scope == "per_stream":
            if self.read == "batch_mean":
                raise ValueError("read='batch_mean' would mix streams; choose 'per_sample'")
            if self.slots == "first_T":
                raise ValueError("slots='first_T' needs scope='shared'; per_stream needs a number")
        if self.slot_rotary and self.segment is None:
            raise ValueError("slot_rotary=True needs segment, the number of tokens per segment")


GRC_PRESETS: dict[str, GRCConfig] = {
    "paper": GRCConfig(),
    "released": GRCConfig(
        slots="first_T",
        update_source="attn_out",
        candidate="ln_gelu",
        read="per_sample",
        inference="blend",
        lambda_init=-1.0,
        projection="per_branch",
    ),
    "causal-masked": GRCConfig(
        update_source="attn_out",
        candidate="ln_gelu",
        read="per_sample",
        scope="per_stream",
        positional_conv=False,
    ),
    "causal-recurrent": GRCConfig(
        update_source="attn_out",
        candidate="ln_gelu",
        read="per_sample",
        order="read_write",
        scope="per_stream",
        positional_conv=False,
    ),
}
"""Named configurations.

`paper`: the printed equations. `released`: what the authors' code computes. `causal-masked`: one
cache per stream, written before it is read, with slots hidden from the tokens before their source.
`causal-recurrent`: one cache per stream that holds earlier segments only.
"""


def grc_preset(name: str, **changes: Any) -> GRCConfig:
    """Return a preset of `GRC_PRESETS` with some fields changed.

    Raises:
        ValueError: no preset has this name.
    """
    if name not in GRC_PRESETS:
        raise ValueError(f"no GRC preset {name!r}; choose one of {', '.join(GRC_PRESETS)}")
    return dataclasses.replace(GRC_PRESETS[name], **changes)


class AttentionState(NamedTuple):
    """What an attention layer remembers of a stream. Immutable; every call returns a new one."""

    memory: Tensor | None = None
    """Memory of closed segments. GRC: the cache, B x M x Dm. Transformer-XL: layer inputs of the
    last segment, B x M x D. None: nothing yet (GRC: zeros)."""
    keys: Tensor | None = None
    """Keys of the open segment (and of XL memory), B x H x P x D/H; None at a segment start."""
    values: Tensor | None = None
    """Values that go with `keys`."""
    source: Tensor | None = None
    """Update source of the open segment, B x P x (Dm or D)."""

    def map(self, function: Callable[[Tensor], Tensor]) -> AttentionState:
        """Apply a function to every tensor held (to move, cast, detach, reorder...)."""
        return AttentionState(*(None if t is None else function(t) for t in self))

    @property
    def is_open(self) -> bool:
        """Whether part of a segment has been seen that is not yet in `memory`."""
        return self.source is not None


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with one fused projection, for self- or cross-attention.

    Args:
        dim: width of queries and context, divisible by `num_heads`.
        num_heads: attention heads H.
        bias: biases in all projections.
        qk_norm: RMS-normalise queries and keys per head before the product.
        project: own the output projection; without it `forward` returns the concatenated heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        qk_norm: bool = False,
        project: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.dim, self.num_heads, self.qk_norm = dim, num_heads, qk_norm
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias) if project else nn.Identity()

    def _heads(self, y: Tensor) -> Tensor:
        """B x T x (count * D), from rows of the fused projection, as count x B x H x T x D/H."""
        parts = torch.unflatten(y, -1, (-1, self.num_heads, self.dim // self.num_heads))
        return parts.permute(2, 0, 3, 1, 4)

    def _rows(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
        """Weight and bias of the fused projection, each as that of queries and of the rest."""
        sizes = [self.dim, 2 * self.dim]
        # Slices instead would each fill a tensor with zeros in the backward pass.
        for_q, for_kv = torch.split(self.qkv.weight, sizes)
        bias = self.qkv.bias
        bias_q, bias_kv = (None, None) if bias is None else torch.split(bias, sizes)
        return (for_q, for_kv), (bias_q, bias_kv)

    def _normalise(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        if self.qk_norm:
            x = F.rms_norm(x, x.shape[-1:])
        return x if rotary is None else rotate(x, rotary)

    def project_self(
        self, x: Tensor, rotary: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of `x` (B x T x D), each B x H x T x D/H."""
        q, k, v = self._heads(self.qkv(x))
        return self._normalise(q, rotary), self._normalise(k, rotary), v

    def project_cross(
        self,
        x: Tensor,
        context: Tensor,
        rotary: Tensor | None = None,
        context_rotary: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x` (B x T x D), keys and values of `context` (B x S x D)."""
        (for_q, for_kv), (bias_q, bias_kv) = self._rows()
        q = self._heads(F.linear(x, for_q, bias_q))[0]
        k, v = self._heads(F.linear(context, for_kv, bias_kv))
        return self._normalise(q, rotary), self._normalise(k, context_rotary), v

    def project_context(self, x: Tensor, rotary: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of `x` alone."""
        (_, weight), (_, bias) = self._rows()
        k, v = self._heads(F.linear(x, weight, bias))
        return self._normalise(k, rotary), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attention output, B x T x D, after the output projection where there is one.

        Args:
            q, k, v: B x H x T x D/H and B x H x S x D/H (twice).
            mask: True where a key may be seen, broadcastable to B x H x T x S.
            causal: token i sees keys 0..i; for q and k of equal length.
        """
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def rotary_table(positions: Tensor, dim: int, base: float = 10_000.0) -> Tensor:
    """Cosines and sines of rotary position embedding (Su et al., arXiv:2104.09864, eq. 34).

    Args:
        positions: T integer positions, negative ones allowed.
        dim: head width, even.
        base: wavelength base.

    Returns:
        2 x T x dim/2, float32.
    """
    if dim % 2:
        raise ValueError(f"rotary positions need an even head width, got {dim}")
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions.to(torch.float32)[:, None] * base**-exponent
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the two halves of the channels of `x` (... x T x d) by a table of `rotary_table`."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def offset_causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """T x S mask in which the last query sees all keys and each earlier one sees one fewer."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def slot_positions(
    length: int, slots: int, interpolation: Literal["nearest", "linear"] = "nearest"
) -> tuple[list[int], list[int], list[float]]:
    """Which tokens each slot is resampled from, as `torch.nn.functional.interpolate` does it.

    Args:
        length: tokens T.
        slots: slots M.
        interpolation: "nearest" (slot j from token floor(j T / M)) or "linear" (half-pixel
            centres, clamped at the edges).

    Returns:
        For each slot the lower token, the upper token, and the weight of the upper one. Slot j
        is known once its upper token has been seen.
    """
    if interpolation == "nearest":  # in short, since it is done for every token that is generated
        nearest = [j * length // slots for j in range(slots)]
        return nearest, list(nearest), [0.0] * slots
    lower, upper, weight = [], [], []
    for j in range(slots):
        centre = max((j + 0.5) * length / slots - 0.5, 0.0)
        low = min(int(centre), length - 1)
        high = min(low + 1, length - 1)
        fraction = centre - low if high > low else 0.0
        high = high if fraction else low
        lower.append(low)
        upper.append(high)
        weight.append(fraction)
    return lower, upper, weight


class GatedRecurrentUpdate(nn.Module):
    """The cache update, eqs. (4) and (5): each slot is a gated recurrent cell of its own.

    Args:
        dim: cache width Dm.
        candidate: see `GRCConfig.candidate`.
    """

    def __init__(self, dim: int, candidate: Literal["linear", "ln_gelu"] = "linear") -> None:
        super().__init__()
        self.gates = nn.Linear(2 * dim, 2 * dim)
        self.candidate = nn.Linear(2 * dim, dim)
        self.norm = nn.LayerNorm(dim) if candidate == "ln_gelu" else None

    def forward(self, cache: Tensor, update: Tensor) -> Tensor:
        """Blend `update` into `cache`; both B x M x Dm, as is the result."""
        g_r, g_u = torch.sigmoid(self.gates(torch.cat((cache, update), -1))).chunk(2, -1)
        content = self.candidate(torch.cat((g_r * cache, update), -1))
        if self.norm is not None:
            content = self.norm(F.gelu(content))
        # lerp in the cache's own precision: under autocast the linear layers return bfloat16, and
        # a state that is carried through many segments should not be rounded at each of them.
        return torch.lerp(cache, content.to(cache.dtype), g_u.to(cache.dtype))


class RecurrentAttention(nn.Module):
    """Causal self-attention with rotary positions, alone or with a Transformer-XL memory.

    With `memory_length` > 0 the inputs of the layer at the last `memory_length` tokens of closed
    segments are extra context, without gradient (Dai et al., arXiv:1901.02860, section 3.2).
    Without, it is the plain layer that GRC attention is compared with.

    Args:
        dim: width D.
        num_heads: heads H.
        memory_length: tokens remembered from closed segments, 0 for none.
        bias, qk_norm: see `MultiHeadAttention`.
        rotary_base: wavelength base; None for no rotary positions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        memory_length: int = 0,
        bias: bool = True,
        qk_norm: bool = False,
        rotary_base: float | None = 10_000.0,
    ) -> None:
        super().__init__()
        if memory_length < 0:
            raise ValueError(f"memory_length must not be negative, got {memory_length}")
        self.memory_length = memory_length
        self.rotary_base = rotary_base
        self.attention = MultiHeadAttention(dim, num_heads, bias=bias, qk_norm=qk_norm)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, *, commit: bool = True
    ) -> tuple[Tensor, AttentionState]:
        """Attend within the segment and to the memory.

        Args:
            x: B x T x D, the next tokens.
            state: what the previous call returned; None for a fresh stream.
            commit: these tokens end the segment.

        Returns:
            The output, B x T x D, and the new state.
        """
        state = AttentionState() if state is None else state
        attention, past, memory = self.attention, state.source, state.memory
        seen = 0 if past is None else past.shape[1]
        q, k, v = attention.project_self(x, self._rotary(seen, x))
        keys, values = state.keys, state.values
        if keys is None and memory is not None:
            keys, values = attention.project_context(memory, self._rotary(-memory.shape[1], memory))
        if keys is not None and values is not None:
            k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        y = causal_attend(attention, q, k, v, None if memory is None else written_rows(memory))
        # A layer without memory remembers only how far the segment is: width 0 costs nothing.
        fresh = x.detach() if self.memory_length else x.new_empty(*x.shape[:2], 0)
        source = fresh if past is None else torch.cat((past, fresh), 1)
        if not commit:
            return y, AttentionState(memory, k, v, source)
        if not self.memory_length:
            return y, AttentionState()
        if memory is not None:
            source = torch.cat((memory.to(source.dtype), source), 1)
        return y, AttentionState(source[:, -self.memory_length :])

    def _rotary(self, start: int, x: Tensor) -> Tensor | None:
        """Table for the tokens of `x`, the first of which is at `start` (negative: memory)."""
        if self.rotary_base is None:
            return None
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        attention = self.attention
        return rotary_table(positions, attention.dim // attention.num_heads, self.rotary_base)


def written_rows(memory: Tensor) -> Tensor:
    """B x M: where a memory holds anything; a stream that was reset has rows of zeros."""
    return (memory != 0).any(-1)


def causal_attend(
    attention: MultiHeadAttention, q: Tensor, k: Tensor, v: Tensor, memory: Tensor | None = None
) -> Tensor:
    """Attention of the last tokens of a sequence to all of it; picks the cheapest exact mask.

    Args:
        attention: the layer.
        q, k, v: B x H x T x D/H and B x H x S x D/H (twice).
        memory: which of the first M keys may be seen, B x M; None: all.
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return attention.attend(q, k, v, causal=True)
    mask = None if queries == 1 else offset_causal_mask(queries, keys, q.device)
    if memory is not None:
        seen = F.pad(memory, (0, keys - memory.shape[1]), value=True)[:, None, None]
        mask = seen if mask is None else mask & seen
    return attention.attend(q, k, v, mask)


class GRCAttention(nn.Module):
    """Self-attention and attention to a gated recurrent cache, mixed per head (eqs. 1-5).

    Causal or not, with the cache shared like BatchNorm statistics (vision) or one per stream
    (language models); see `GRCConfig`. In every causal configuration the output at token i depends
    on tokens 0..i of the segment and on closed segments alone: either slots are hidden from the
    tokens before their source ("write_read"), or the cache is read before it is written
    ("read_write").

    Args:
        dim: width D. `num_heads` must divide D and Dm; `positional_conv` needs Dm to divide D.
        num_heads: heads H, in both branches.
        config: see `GRCConfig`.
        causal: token i sees tokens 0..i only.
        bias, qk_norm: see `MultiHeadAttention`.
        rotary_base: wavelength base of rotary positions in self-attention; None (default) for
            none, as in the paper, where positions are the network's business.

    Raises:
        ValueError: widths, heads and configuration do not fit together.
    """

    cache: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        config: GRCConfig = GRC_PRESETS["paper"],
        *,
        causal: bool = False,
        bias: bool = True,
        qk_norm: bool = False,
        rotary_base: float | None = None,
    ) -> None:
        super().__init__()
        width = int(dim * config.ratio)
        if width < 1 or width % num_heads:
            raise ValueError(
                f"cache width {width} (ratio {config.ratio} of {dim}) is not divisible by "
                f"{num_heads} heads"
            )
        if config.positional_conv and dim % width:
            raise ValueError(
                f"positional_conv needs the cache width {width} to divide the width {dim}; "
                "choose ratio = 1/k or positional_conv=False"
            )
        if causal and config.positional_conv:
            raise ValueError("positional_conv looks ahead on the grid; causal needs it False")
        if causal and config.slots == "first_T":
            raise ValueError("slots='first_T' is for fixed grids; causal needs a number")
        self.dim, self.num_heads, self.width = dim, num_heads, width
        self.config, self.causal, self.rotary_base = config, causal, rotary_base
        own = config.projection == "per_branch"
        self.attention = MultiHeadAttention(dim, num_heads, bias=bias, qk_norm=qk_norm, project=own)
        self.memory_attention = MultiHeadAttention(
            width, num_heads, bias=bias, qk_norm=qk_norm, project=own
        )
        self.out = nn.Identity() if own else nn.Linear(dim, dim, bias=bias)
        self.update = GatedRecurrentUpdate(width, config.candidate)
        self.mixing_logits = nn.Parameter(torch.full((num_heads,), float(config.lambda_init)))
        self.positional_conv = (
            nn.Conv2d(dim, dim, 3, padding=1, groups=width) if config.positional_conv else None
        )
        if config.scope == "shared":
            slots = 0 if config.slots == "first_T" else int(config.slots)
            self.register_buffer("cache", torch.zeros(1, slots, width))

    # ------------------------------------------------------------------ public

    @property
    def mixing_weights(self) -> Tensor:
        """Weight of cached attention in each head, sigma(lambda) of eq. (2); H values."""
        return torch.sigmoid(self.mixing_logits)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        commit: bool = True,
        lengths: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """One segment, or the next tokens of one.

        Args:
            x: B x T x D.
            state: what the previous call returned. None: a fresh stream, or in shared scope the
                stored cache.
            commit: these tokens end the segment: the new cache holds them and the keys and values
                of the segment are dropped. False (causal only) keeps the segment open; calling
                with pieces of a segment then gives what one call with all of it gives.
            lengths: B valid tokens per row of a padded batch; padding is neither attended to nor
                written. Not for causal layers, where padding on the right is harmless to read.
            grid: height and width of the trailing T' = height * width tokens, for
                `positional_conv`; leading tokens (class tokens) get zeros. None: the largest
                square that leaves at most one class token.

        Returns:
            The output, B x T x D, and the new state. In shared scope `state.memory` is 1 x M x Dm
            and without gradient; nothing is stored until it is given to `commit`.

        Raises:
            ValueError: shapes or arguments do not fit the configuration.
        """
        state = AttentionState() if state is None else state
        past = state.source
        seen = 0 if past is None else past.shape[1]
        self._check_call(x, state, commit, lengths)
        old = self._memory(state.memory, x)

        # Self-attention, eq. (1).
        q, k, v = self.attention.project_self(x, self._rotary(seen, x.shape[1], self.dim, x))
        if state.keys is not None and state.values is not None:
            k, v = torch.cat((state.keys, k), 2), torch.cat((state.values, v), 2)
        if self.causal:
            y = causal_attend(self.attention, q, k, v)
        else:
            y = self.attention.attend(q, k, v, padding_mask(lengths, x.shape[1]))

        # What is written.
        lead = x[..., : self.width]
        update = lead if self.config.update_source == "input" else y[..., : self.width]
        source = update if past is None else torch.cat((past, update), 1)
        reads_new = self.config.order == "write_read"
        new = None
        if self._updates() and (commit or reads_new):
            new = self._write(old, source, lengths)
        elif not self._updates():
            new = old  # the stored cache, as it is

        # Cached attention, eq. (3).
        read = new if reads_new and new is not None else old
        if self.config.read == "batch_mean":
            read = read.mean(0, keepdim=True).expand(x.shape[0], -1, -1)
        m = self._attend_memory(lead, read, seen)

        out = self._mix(y, m)
        if self.positional_conv is not None:
            out = out + self._convolve(x, grid)
        if not commit:
            return out, AttentionState(state.memory, k, v, source)
        assert new is not None
        if self.config.scope == "shared":
            new = new.detach().mean(0, keepdim=True)
        return out, AttentionState(new)

    @torch.no_grad()
    def commit(self, *states: AttentionState) -> None:
        """Store the mean of the caches of these states (shared scope only).

        Call it once per optimizer step and after the backward pass (which still needs the cache
        that was read), with the states of all micro-batches of the step.

        Raises:
            ValueError: no state given, a state without cache, or a layer with per-stream scope.
        """
        if self.config.scope != "shared":
            raise ValueError("commit is for scope='shared'; per-stream states belong to the caller")
        caches = [s.memory for s in states if s.memory is not None]
        if not caches or len(caches) != len(states):
            raise ValueError("commit needs at least one state, each with a cache")
        mean = torch.stack([c.mean(0, keepdim=True) for c in caches]).mean(0)
        if self.cache.shape[1] == 0:
            self.cache = self.cache.new_zeros(mean.shape)
        self.cache.copy_(mean)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, causal={self.causal}, {self.config}"

    # ----------------------------------------------------------------- private

    def _check_call(
        self, x: Tensor, state: AttentionState, commit: bool, lengths: Tensor | None
    ) -> None:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"expected B x T x {self.dim}, got {tuple(x.shape)}")
        rows, tokens = x.shape[:2]
        in_pieces = not commit or state.is_open
        if not self.causal and in_pieces:
            raise ValueError("only a causal layer can be called with pieces of a segment")
        segment = self.config.segment
        if segment is None:
            if not commit and self.config.order == "write_read":
                raise ValueError("calling with pieces of a segment needs GRCConfig.segment")
        else:
            seen = tokens + (0 if state.source is None else state.source.shape[1])
            if seen > segment:
                raise ValueError(f"the segment has {seen} tokens, the configuration says {segment}")
        if lengths is None:
            return
        if self.causal:
            raise ValueError("lengths is for non-causal attention")
        if lengths.shape != (rows,) or not all(0 < n <= tokens for n in lengths.tolist()):
            raise ValueError(
                f"lengths must be {rows} integers from 1 to {tokens}, got {lengths.tolist()}"
            )

    def _updates(self) -> bool:
        config = self.config
        return config.scope == "per_stream" or self.training or config.inference == "blend"

    def _rotary(self, start: int, count: int, dim: int, x: Tensor) -> Tensor | None:
        if self.rotary_base is None:
            return None
        positions = torch.arange(start, start + count, device=x.device)
        return rotary_table(positions, dim // self.num_heads, self.rotary_base)

    def _memory(self, memory: Tensor | None, x: Tensor) -> Tensor:
        """The cache before this segment, B x M x Dm."""
        if memory is None:
            if self.config.scope == "shared":
                memory = self.cache
                if memory.shape[1] == 0:
                    memory = memory.new_zeros(1, x.shape[1], self.width)
            else:
                memory = x.new_zeros(x.shape[0], int(self.config.slots), self.width)
        if memory.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"the state holds {memory.shape[0]} streams, the batch has {x.shape[0]} rows"
            )
        return memory.expand(x.shape[0], -1, -1)

    def _write(self, old: Tensor, source: Tensor, lengths: Tensor | None) -> Tensor:
        """The cache after `source` (B x S x Dm) has been written into `old`.

        With a fixed segment length, slots whose source token has not come yet keep their content:
        they are hidden from the tokens read so far, and a segment that ends early leaves them.
        """
        slots, seen = old.shape[1], source.shape[1]
        length = seen if self.config.segment is None else self.config.segment
        if lengths is not None:
            written: Tensor = self.update(old, resample_valid(source, lengths, slots, self.config))
            return written
        low, high, weight = slot_positions(length, slots, self.config.interpolation)
        known = sum(position < seen for position in high)  # positions ascend: a prefix of slots
        if known == 0:
            return old
        # Tokens at equal distances are a view; picking them by index is slow to differentiate.
        step = low[1] if known > 1 and low[1] > 0 else 1
        regular = low[:known] == list(range(0, known * step, step))
        update = source[:, : known * step : step] if regular else source[:, low[:known]]
        if any(weight):
            share = torch.tensor(weight[:known], dtype=source.dtype, device=source.device)
            update = torch.lerp(update, source[:, high[:known]], share[:, None].expand_as(update))
        if known == slots:
            whole: Tensor = self.update(old, update.to(old.dtype))
            return whole
        new = self.update(old[:, :known], update.to(old.dtype))
        return torch.cat((new, old[:, known:]), 1)

    def _attend_memory(self, x: Tensor, read: Tensor, seen: int) -> Tensor:
        """Cached attention of the leading channels `x` (B x T x Dm) to `read`; B x T x Dm."""
        config, tokens = self.config, x.shape[1]
        hides = self.causal and config.order == "write_read"
        length = seen + tokens if config.segment is None else config.segment
        _, high, _ = slot_positions(length, read.shape[1], config.interpolation)
        q_table = k_table = None
        if config.slot_rotary:
            base = 10_000.0 if self.rotary_base is None else self.rotary_base
            head = self.width // self.num_heads
            here = torch.arange(seen, seen + tokens, device=x.device)
            there = torch.tensor(high, device=x.device)
            if config.order == "read_write":
                there = there - length  # slots hold the previous segment
            table = rotary_table(torch.cat((here, there)), head, base)
            q_table, k_table = table[:, :tokens], table[:, tokens:]
        q, k, v = self.memory_attention.project_cross(x, read.to(x.dtype), q_table, k_table)
        if not hides:
            return self.memory_attention.attend(q, k, v)
        tokens_at = torch.arange(seen, seen + tokens, device=x.device)
        mask = torch.tensor(high, device=x.device) <= tokens_at[:, None]  # T x M
        # Under linear interpolation the first tokens may see no slot at all. A row of a softmax
        # cannot be empty, so such rows look at one slot and their result is replaced by zero.
        empty = ~mask.any(1, keepdim=True)
        first = torch.arange(len(high), device=x.device) == 0
        m = self.memory_attention.attend(q, k, v, mask | (empty & first))
        return m.masked_fill(empty, 0.0)

    def _mix(self, y: Tensor, m: Tensor) -> Tensor:
        """Eq. (2): the narrower memory heads are filled up with zeros."""
        weight = self.mixing_weights.to(y.dtype)[:, None]
        own = torch.unflatten(y, -1, (self.num_heads, -1))
        cached = torch.unflatten(m, -1, (self.num_heads, -1))
        # Only the channels that both have are mixed; zeros would be written, read and added.
        shared = cached.shape[-1]
        both, rest = torch.split(own, [shared, own.shape[-1] - shared], -1)
        mixed = torch.cat((torch.lerp(both, cached, weight), rest * (1 - weight)), -1)
        out: Tensor = self.out(mixed.flatten(2))
        return out

    def _convolve(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        assert self.positional_conv is not None
        tokens = x.shape[1]
        if grid is None:
            side = int(tokens**0.5)
            grid = (side, side)
            if tokens - side * side > 1:
                raise ValueError(f"{tokens} tokens are no square grid; pass grid=(height, width)")
        height, width = grid
        extra = tokens - height * width
        if extra < 0:
            raise ValueError(f"grid {height} x {width} has more cells than the {tokens} tokens")
        image = torch.unflatten(x[:, extra:].transpose(1, 2), 2, (height, width))
        y: Tensor = self.positional_conv(image).flatten(2).transpose(1, 2)
        return F.pad(y, (0, 0, extra, 0))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        stored = state_dict.get(prefix + "cache")
        if self.config.slots == "first_T" and isinstance(stored, Tensor) and stored.ndim == 3:
            # The length is part of what was learned: take the stored one.
            self.cache = self.cache.new_zeros(1, stored.shape[1], self.width)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def padding_mask(lengths: Tensor | None, tokens: int) -> Tensor | None:
    """B x 1 x 1 x T mask of valid tokens."""
    if lengths is None:
        return None
    return (torch.arange(tokens, device=lengths.device) < lengths[:, None])[:, None, None, :]


def resample_valid(source: Tensor, lengths: Tensor, slots: int, config: GRCConfig) -> Tensor:
    """Resample the first `lengths[b]` tokens of each row to `slots`; B x M x Dm."""
    rows = []
    for row, length in zip(source, lengths.tolist(), strict=True):
        low, high, weight = slot_positions(int(length), slots, config.interpolation)
        share = torch.tensor(weight, dtype=source.dtype, device=source.device)[:, None]
        rows.append(row[low] + share * (row[high] - row[low]))
    return torch.stack(rows)
