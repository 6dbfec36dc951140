"""Tests of the encoder of texts, against sentence-transformers' formula in numpy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.texts import TINY_BERT, write_encoder
from zoo.errors import ZooError
from zoo.families.online_ensemble import (
    MiniLMEncoder,
    OnlineNetwork,
    OnlineTextNetworkConfig,
    TextEncoderConfig,
    convert_minilm,
)

CONFIG = TextEncoderConfig(**TINY_BERT)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("bert") / "encoder")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> MiniLMEncoder:
    encoder = MiniLMEncoder(CONFIG).eval()
    encoder.load_state_dict(convert_minilm(load_file(folder / "model.safetensors")))
    return encoder


def padded(*lengths: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, CONFIG.vocabulary, (len(lengths), max(lengths)), generator=generator)
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = 0
    return tokens


@torch.no_grad()
def test_an_encoding_is_that_of_sentence_transformers(folder: Path, encoder: MiniLMEncoder) -> None:
    from transformers import BertConfig, BertModel

    reference = BertModel(
        BertConfig(
            vocab_size=CONFIG.vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=24,
        )
    ).eval()
    reference.load_state_dict(load_file(folder / "model.safetensors"))
    tokens = padded(9, 3, 24, 5)
    mask = (tokens != 0).long()
    states = reference(tokens, attention_mask=mask).last_hidden_state.double().numpy()
    # Sum of the states under the mask over the number of tokens (at least 1e-9), then by length.
    weights = np.broadcast_to(mask.numpy()[:, :, None], states.shape).astype(float)
    mean = (states * weights).sum(1) / np.clip(weights.sum(1), 1e-9, None)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder(tokens).numpy(), expected, rtol=1e-4, atol=1e-6)
    # Without other texts, nothing is filled up, and the mask plays no part.
    for row, count in enumerate(mask.sum(1).tolist()):
        alone = reference(tokens[row : row + 1, :count]).last_hidden_state[0].double().numpy()
        mean = alone.mean(0)
        np.testing.assert_allclose(expected[row], mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=4),
    more=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_padding_changes_nothing(
    encoder: MiniLMEncoder, lengths: list[int], more: int, seed: int
) -> None:
    tokens = padded(*lengths, seed=seed)
    longer = torch.nn.functional.pad(tokens, (0, more))
    found = encoder(tokens)
    torch.testing.assert_close(encoder(longer), found, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(lengths)))


def test_the_pooler_is_left_out(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    left_out = {"pooler.dense.weight", "pooler.dense.bias"}
    assert left_out <= stored.keys()
    stored["embeddings.position_ids"] = torch.arange(24)[None]  # as older files have
    kept = {f"network.{name}" for name in load_file(folder / "model.safetensors")} - {
        f"network.{name}" for name in left_out
    }
    assert convert_minilm(stored).keys() == kept == MiniLMEncoder(CONFIG).state_dict().keys()


def test_the_default_is_the_shape_of_minilm() -> None:
    """22,713,216 parameters are published with the pooler, which has 384 x 384 + 384."""
    count = sum(parameter.numel() for parameter in MiniLMEncoder(TextEncoderConfig()).parameters())
    assert count == 22_713_216 - 384 * 384 - 384


BAD_TOKENS: dict[str, tuple[Tensor, str]] = {
    "pixels": (torch.rand(2, 3), "expected tokens of shape B x T, integers"),
    "one text alone": (torch.ones(3, dtype=torch.int64), r"got \(3,\)"),
    "too long": (torch.ones(1, 25, dtype=torch.int64), "T at most 24"),
    "unknown": (torch.tensor([[1, CONFIG.vocabulary]]), "tokens must be from 0 to"),
    "negative": (torch.tensor([[1, -1]]), "tokens must be from 0 to"),
    "padding alone": (torch.tensor([[1, 2], [0, 0]]), "a text has no tokens"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_bad_tokens_are_one_line(case: str) -> None:
    network = OnlineNetwork(OnlineTextNetworkConfig(encoder=CONFIG))
    tokens, message = BAD_TOKENS[case]
    with pytest.raises(ValueError, match=message) as caught:
        network(tokens)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dim": 33}, "dim 33 must divide by the 2 heads"),
    ],
)
def test_impossible_shapes_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEncoderConfig(**{**TINY_BERT, **change})  # type: ignore[arg-type]


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ZooError, match=r"needs transformers: pip install 'zoo\[text\]'") as caught:
        MiniLMEncoder(CONFIG)
    assert "\n" not in str(caught.value)
