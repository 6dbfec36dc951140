"""A decoder-only language model with a memory across segments.

The text is cut into segments. Within a segment tokens attend to each other (causally, with a
key-value cache when the segment comes in pieces); across segments they attend to the memory of
each layer: a gated recurrent cache (GRC), a Transformer-XL cache, or none.

Shape notation: B streams, T tokens of this call, L tokens per segment, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.families.cached_transformers.attention import (
    AttentionState,
    GRCAttention,
    GRCConfig,
    RecurrentAttention,
    grc_preset,
)

__all__ = ["CachedTransformerLM", "CachedTransformerLMConfig", "LanguageModelState"]


_GRC = grc_preset(
    "causal-recurrent", slots=64, update_source="input", slot_rotary=True, segment=256
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedTransformerLMConfig:
    """Shape of a `CachedTransformerLM`.

    Raises:
        ValueError: a value is out of range or does not fit the others.
    """

    vocab_size: int = 256
    """Number of tokens; 256 for bytes."""
    dim: int = 256
    """Width D."""
    depth: int = 6
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads, a divisor of D (and of the cache width)."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers over D."""
    segment: int = 256
    """Tokens per segment L."""
    memory: Literal["grc", "xl", "none"] = "grc"
    """Memory across segments: gated recurrent cache, Transformer-XL cache, or none."""
    grc: GRCConfig = _GRC
    """The cache, when `memory` is "grc"; causal, with one cache per stream."""
    memory_length: int = 256
    """Tokens remembered per layer, when `memory` is "xl"."""
    dropout: float = 0.0
    """Dropout of embeddings and of both branches of each block, in [0, 1)."""
    rotary_base: float = 10_000.0
    """Wavelength base of rotary positions."""

    def __post_init__(self) -> None:
        for field in ("vocab_size", "dim", "depth", "num_heads", "segment", "memory_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not divisible by num_heads {self.num_heads}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.memory == "grc":
            if self.grc.scope != "per_stream":
                raise ValueError("a language model needs grc.scope='per_stream'")
            if self.grc.segment != self.segment:
                raise ValueError(
                    f"grc.segment is {self.grc.segment}, must equal segment {self.segment}"
                )


@dataclasses.dataclass(frozen=True)
class LanguageModelState:
    """What the model remembers of B streams: explicit, immutable, handed in and out of `forward`.

    Attributes:
        layers: one `AttentionState` per block.
        position: tokens of the open segment seen so far, 0 at a segment start.
        attached: closed segments through whose memory gradients flow.
    """

    layers: tuple[AttentionState, ...]
    position: int = 0
    attached: int = 0

    @property
    def streams(self) -> int | None:
        """Number of streams B; None while nothing has been seen, which fits any number."""
        tensors = (t for layer in self.layers for t in layer if t is not None)
        return next((t.shape[0] for t in tensors), None)

    def _map(self, function: Callable[[Tensor], Tensor]) -> LanguageModelState:
        return dataclasses.replace(self, layers=tuple(s.map(function) for s in self.layers))

    def detach(self) -> LanguageModelState:
        """The same values without gradient history (truncated back-propagation through time)."""
        return dataclasses.replace(self._map(Tensor.detach), attached=0)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LanguageModelState:
        """Move or cast, as `torch.Tensor.to` does."""
        return self._map(lambda t: t.to(device=device, dtype=dtype))

    def reorder(self, index: Tensor) -> LanguageModelState:
        """Take streams `index` (integers; repeats allowed): beam search, or another batch size."""
        return self._map(lambda t: t.index_select(0, index))

    def reset(self, mask: Tensor) -> LanguageModelState:
        """Forget everything of the streams where `mask` (B booleans) is True.

        Raises:
            ValueError: in mid-segment, where the rows share one position; start those streams
                afresh with state None, or reset when `position` is 0. Or the mask is not B
                booleans.
        """
        rows = len(mask) if self.streams is None else self.streams
        if mask.dtype != torch.bool or mask.shape != (rows,):
            raise ValueError(
                f"the mask must be {rows} booleans, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if self.position:
            raise ValueError(
                f"streams can be reset at a segment start only, not at position {self.position}"
            )
        # Filled, since a product would keep the NaN of a stream that has diverged.
        return self._map(lambda t: t.masked_fill(mask.view(-1, *[1] * (t.ndim - 1)), 0.0))


class Block(nn.Module):
    """Pre-norm transformer block with a memory."""

    def __init__(self, config: CachedTransformerLMConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, int(config.dim * config.mlp_ratio)
        self.attention_norm = nn.RMSNorm(dim)
        self.attention: GRCAttention | RecurrentAttention
        if config.memory == "grc":
            self.attention = GRCAttention(
                dim,
                config.num_heads,
                config.grc,
                causal=True,
                bias=False,
                qk_norm=True,
                rotary_base=config.rotary_base,
            )
        else:
            self.attention = RecurrentAttention(
                dim,
                config.num_heads,
                memory_length=config.memory_length if config.memory == "xl" else 0,
                bias=False,
                qk_norm=True,
                rotary_base=config.rotary_base,
            )
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp_in = nn.Linear(dim, hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, state: AttentionState, commit: bool
    ) -> tuple[Tensor, AttentionState]:
        y, state = self.attention(self.attention_norm(x), state, commit=commit)
        x = x + self.dropout(y)
        h = F.relu(self.mlp_in(self.mlp_norm(x))).square()
        return x + self.dropout(self.mlp_out(h)), state


class CachedTransformerLM(nn.Module):
    """Decoder-only language model whose layers carry a memory from segment to segment.

    Pre-norm blocks with RMS normalisation (arXiv:1910.07467), rotary positions
    (arXiv:2104.09864), normalised queries and keys, and squared-ReLU feed-forward layers
    (arXiv:2109.08668).

    Args:
        config: the shape.

    Attributes:
        recompute_blocks: keep the input of each block alone for the backward pass, which then
            computes the block again.
    """

    def __init__(self, config: CachedTransformerLMConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_blocks = False
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 1/fan_in) matrices; residual branches and the head start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=1.0)
        for block in self.blocks:
            assert isinstance(block, Block)
            attention = block.attention
            last = attention.out if isinstance(attention, GRCAttention) else attention.attention.out
            for layer in (last, block.mlp_out):
                if isinstance(layer, nn.Linear):
                    nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.head.weight)

    def initial_state(self) -> LanguageModelState:
        """The state of streams of which nothing has been seen, for any batch size."""
        return LanguageModelState(tuple(AttentionState() for _ in self.blocks))

    def forward_features(
        self,
        tokens: Tensor,
        state: LanguageModelState | None = None,
        *,
        detach_every: int | None = None,
    ) -> tuple[Tensor, LanguageModelState]:
        """As `forward`, but the normalised features before the head, B x T x D."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"expected tokens as B x T with T > 0, got {tuple(tokens.shape)}")
        if detach_every is not None and detach_every < 1:
            raise ValueError(f"detach_every must be at least 1 or None, got {detach_every}")
        state = self.initial_state() if state is None else state
        if state.streams not in (None, tokens.shape[0]):
            raise ValueError(f"the state holds {state.streams} streams, tokens {tokens.shape[0]}")
        if len(state.layers) != len(self.blocks):
            raise ValueError(
                f"the state is of {len(state.layers)} blocks, the network has {len(self.blocks)}"
            )
        pieces, start = [], 0
        while start < tokens.shape[1]:
            room = self.config.segment - state.position
            piece = tokens[:, start : start + room]
            features, state = self._segment(piece, state)
            if state.position == 0 and detach_every is not None and state.attached >= detach_every:
                state = state.detach()
            pieces.append(features)
            start += piece.shape[1]
        return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0], state

    def forward(
        self,
        tokens: Tensor,
        state: LanguageModelState | None = None,
        *,
        detach_every: int | None = None,
    ) -> tuple[Tensor, LanguageModelState]:
        """Logits of the next token at every position.

        Any number of tokens may come at once: calls with pieces of a text give what one call with
        all of it gives. The memory is written at segment ends only.

        Args:
            tokens: B x T integers.
            state: what the previous call returned; None for fresh streams.
            detach_every: cut the gradient through the memory after this many segments; None:
                never within the call. The state returned is not detached by itself.

        Returns:
            Logits, B x T x V, and the new state.

        Raises:
            ValueError: `tokens` is empty or not B x T, or the state holds other streams.
        """
        features, state = self.forward_features(tokens, state, detach_every=detach_every)
        return self.forward_head(features), state

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits from features, ... x D to ... x V."""
        logits: Tensor = self.head(features)
        return logits

    def _segment(
        self, tokens: Tensor, state: LanguageModelState
    ) -> tuple[Tensor, LanguageModelState]:
        """Tokens of one segment, up to its end or not."""
        position = state.position + tokens.shape[1]
        closes = position == self.config.segment
        x = self.dropout(self.embedding(tokens))
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            if self.recompute_blocks and torch.is_grad_enabled():
                x, layer = checkpoint(block, x, layer, closes, use_reentrant=False)
            else:
                x, layer = block(x, layer, closes)
            layers.append(layer)
        state = LanguageModelState(
            tuple(layers), 0 if closes else position, state.attached + int(closes)
        )
        return self.norm(x), state

    @property
    def mixing_weights(self) -> Tensor | None:
        """Weight of cached attention, depth x heads; None without a gated recurrent cache."""
        weights = [
            block.attention.mixing_weights
            for block in self.blocks
            if isinstance(block, Block) and isinstance(block.attention, GRCAttention)
        ]
        return torch.stack(weights) if weights else None

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output, for layer-wise learning rates."""
        return {"stem": r"^embedding", "blocks": r"^blocks\.(\d+)", "head": r"^(?:norm|head)"}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: embeddings, gains and mixing logits."""
        return {n for n, p in self.named_parameters() if p.ndim < 2 or n.startswith("embedding")}
