"""Cached Transformers: gated recurrent cache (GRC) attention and networks built of it.

Source: Zhang et al., "Cached Transformers: Improving Transformers with Differentiable Memory
Cache", AAAI 2024 (arXiv:2312.12742).
"""

from zoo.families.cached_transformers.attention import (
    GRC_PRESETS,
    AttentionState,
    GatedRecurrentUpdate,
    GRCAttention,
    GRCConfig,
    MultiHeadAttention,
    RecurrentAttention,
    grc_preset,
)
from zoo.families.cached_transformers.language_model import (
    CachedTransformerLM,
    CachedTransformerLMConfig,
    LanguageModelState,
)

__all__ = [
    "GRC_PRESETS",
    "AttentionState",
    "CachedTransformerLM",
    "CachedTransformerLMConfig",
    "GRCAttention",
    "GRCConfig",
    "GatedRecurrentUpdate",
    "LanguageModelState",
    "MultiHeadAttention",
    "RecurrentAttention",
    "grc_preset",
]
