"""A frozen encoder of texts: tokens to the vectors that the classifiers of a stream see.

Source: Reimers and Gurevych, "Sentence-BERT", arXiv:1908.10084; the architecture is BERT's
(arXiv:1810.04805), with the shape of all-MiniLM-L6-v2 by default.

Shape notation: B texts, T tokens of the longest of them, d encoding width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError

__all__ = ["PADDING", "MiniLMEncoder", "TextEncoderConfig", "convert_minilm"]

PADDING = 0
"""The token that fills up short texts; no text contains it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Shape of an encoder of texts; the defaults are those of all-MiniLM-L6-v2.

    Raises:
        ValueError: a value is out of range.
    """

    kind: Literal["minilm"] = "minilm"
    """BERT, averaged over the tokens of a text and scaled to length one."""
    dim: int = 384
    """Encoding width d."""
    layers: int = 6
    """Blocks of attention and of an MLP."""
    heads: int = 12
    """Of each attention."""
    hidden: int = 1536
    """Width within the MLPs."""
    vocabulary: int = 30_522
    """Different tokens."""
    positions: int = 512
    """Most tokens that a text can have."""

    def __post_init__(self) -> None:
        for field in ("dim", "layers", "heads", "hidden", "vocabulary", "positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must divide by the {self.heads} heads")

    def check(self, tokens: Tensor) -> None:
        """Refuse what cannot be encoded.

        Raises:
            ValueError: the tokens have another shape or type, or one that there is no embedding of.
        """
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] > self.positions:
            raise ValueError(
                f"expected tokens of shape B x T, integers with T at most {self.positions}, got "
                f"{tuple(tokens.shape)} {tokens.dtype}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise ValueError(f"tokens must be from 0 to {self.vocabulary - 1}")
        if bool((tokens == PADDING).all(1).any()):
            raise ValueError("a text has no tokens")


class MiniLMEncoder(nn.Module):
    """BERT of transformers; the mean over the tokens of a text, scaled to length one.

    Args:
        config: its shape.

    Raises:
        ZooError: transformers is not installed.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertModel  # here, since it takes seconds
        except ImportError:
            raise ZooError("Encoding texts needs transformers: pip install 'zoo[text]'") from None
        shape = BertConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            max_position_embeddings=config.positions,
            pad_token_id=PADDING,
        )
        self.network = BertModel(shape, add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encodings of length one, B x d, of tokens B x T, filled up with `PADDING`."""
        mask = tokens != PADDING
        states = self.network(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        # The mean is this sum over a number of tokens, which the scaling takes out again.
        return F.normalize((states * mask[:, :, None]).sum(1), dim=1)


def convert_minilm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a sentence-transformers model to those of `MiniLMEncoder`.

    The pooler, which sentence-transformers does not use, and the numbers of positions, which are
    no weights, are left out.

    Args:
        state: the content of its `model.safetensors`.
    """
    return {
        f"network.{name}": tensor
        for name, tensor in state.items()
        if not name.startswith("pooler.") and not name.endswith(".position_ids")
    }
