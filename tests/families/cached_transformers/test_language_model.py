"""Tests of the language model: its memory, its pieces, its gradients."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.families.cached_transformers import grc_reference as reference
from tests.families.cached_transformers.grc_reference import randomised, to_array
from zoo.families.cached_transformers import (
    AttentionState,
    CachedTransformerLM,
    CachedTransformerLMConfig,
    GRCConfig,
    LanguageModelState,
    grc_preset,
)

SEGMENT = 4
MEMORIES = ["grc", "grc-masked", "xl", "none"]


def config_of(memory: str, **changes: Any) -> CachedTransformerLMConfig:
    """A tiny shape; "grc" is the default kind of cache, "grc-masked" is written, then read."""
    kind = "causal-masked" if memory == "grc-masked" else "causal-recurrent"
    source = "attn_out" if memory == "grc-masked" else "input"
    values: dict[str, Any] = {
        "vocab_size": 13,
        "dim": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "segment": SEGMENT,
        "memory": memory.removesuffix("-masked"),
        "grc": grc_preset(kind, slots=3, update_source=source, slot_rotary=True, segment=SEGMENT),
        "memory_length": 5,
    }
    return CachedTransformerLMConfig(**values | changes)


def model_of(memory: str, *, double: bool = True, seed: int = 0, **changes: Any) -> Any:
    """A small model in which every parameter is random."""
    model = CachedTransformerLM(config_of(memory, **changes))
    return randomised(model.double() if double else model, seed)


def text(batch: int, length: int, seed: int = 1, vocabulary: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator)


def tensors(state: LanguageModelState) -> Iterator[Tensor]:
    for layer in state.layers:
        yield from (t for t in layer if t is not None)


def assert_same_state(left: LanguageModelState, right: LanguageModelState) -> None:
    assert left.position == right.position
    for a, b in zip(tensors(left), tensors(right), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------- naive reference


def naive_logits(model: CachedTransformerLM, tokens: Tensor) -> Tensor:
    """The network written out for one stream, layer by layer over the whole text."""
    config, weights = model.config, reference.weights_of(model)
    heads, segment = config.num_heads, config.segment
    x = weights["embedding.weight"][tokens.numpy()]
    for index in range(config.depth):
        block = reference.below(weights, f"blocks.{index}.")
        attention = reference.below(block, "attention.")
        normed = reference.rms_norm(x) * block["attention_norm.weight"]
        if config.memory == "grc":
            cache = np.zeros((int(config.grc.slots), int(config.dim * config.grc.ratio)))
            out = []
            for start in range(0, len(x), segment):
                y, cache = reference.causal_segment(
                    normed[start : start + segment],
                    cache,
                    attention,
                    heads,
                    config.grc,
                    base=config.rotary_base,
                    qk_norm=True,
                    length=segment,
                )
                out.append(y)
            x = x + np.concatenate(out)
        else:
            x = x + naive_recurrent(normed, reference.below(attention, "attention."), config)
        normed = reference.rms_norm(x) * block["mlp_norm.weight"]
        hidden = np.maximum(reference.linear(normed, reference.below(block, "mlp_in.")), 0.0) ** 2
        x = x + reference.linear(hidden, reference.below(block, "mlp_out."))
    x = reference.rms_norm(x) * weights["norm.weight"]
    return torch.from_numpy(reference.linear(x, reference.below(weights, "head.")))


def naive_recurrent(
    x: reference.Array, weights: reference.Weights, config: CachedTransformerLMConfig
) -> reference.Array:
    """Attention over all of the text, to the own segment and `memory_length` tokens before it."""
    memory = config.memory_length if config.memory == "xl" else 0
    positions = list(range(len(x)))

    def sees(i: int, j: int) -> bool:
        return i // config.segment * config.segment - memory <= j <= i

    return reference.multi_head(
        x,
        x,
        config.num_heads,
        weights,
        sees=sees,
        prepare=reference.rms_norm,
        query_positions=positions,
        key_positions=positions,
        base=config.rotary_base,
    )


@pytest.mark.parametrize("length", [SEGMENT, 3 * SEGMENT + 2])
@pytest.mark.parametrize("memory", MEMORIES)
def test_it_equals_the_naive_network(memory: str, length: int) -> None:
    model = model_of(memory)
    tokens = text(2, length)
    logits, _ = model(tokens)
    for row, found in zip(tokens, logits, strict=True):
        # Tables of rotary positions are float32.
        torch.testing.assert_close(found, naive_logits(model, row), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------- pieces


@given(
    memory=st.sampled_from(MEMORIES),
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    batch=st.integers(1, 3),
)
def test_i_pieces_of_any_size_equal_one_long_call(
    memory: str, pieces: list[int], batch: int
) -> None:
    model = model_of(memory)
    tokens = text(batch, sum(pieces))
    whole, after = model(tokens)
    assert whole.shape == (batch, sum(pieces), 13)
    state, out = None, []
    for piece in tokens.split(pieces, 1):
        logits, state = model(piece, state)
        out.append(logits)
    torch.testing.assert_close(torch.cat(out, 1), whole)
    assert state is not None
    assert_same_state(state, after)
    assert after.position == sum(pieces) % SEGMENT
    assert all(layer.is_open == (after.position > 0) for layer in after.layers)


@pytest.mark.parametrize("memory", ["grc", "grc-masked", "xl"])
def test_i_the_memory_is_written_at_segment_ends_only(memory: str) -> None:
    model = model_of(memory)
    state = model(text(2, SEGMENT, seed=3))[1]
    for position, token in enumerate(text(2, 3 * SEGMENT).split(1, 1), 1):
        before = [layer.memory for layer in state.layers]
        _, state = model(token, state)
        for old, layer in zip(before, state.layers, strict=True):
            assert old is not None
            assert layer.memory is not None
            assert torch.equal(old, layer.memory) == (position % SEGMENT != 0)


@pytest.mark.parametrize("memory", MEMORIES)
def test_one_long_call_equals_segments_without_a_key_value_cache(memory: str) -> None:
    """Only what closed segments left is carried; the open one is computed anew for each token."""
    model = model_of(memory)
    tokens = text(2, 3 * SEGMENT)
    whole, _ = model(tokens)
    closed, out = None, []
    for start in range(0, tokens.shape[1], SEGMENT):
        for end in range(start + 1, start + SEGMENT + 1):
            logits, after = model(tokens[:, start:end], closed)
            out.append(logits[:, -1])
        closed = after
    torch.testing.assert_close(torch.stack(out, 1), whole)


@given(memory=st.sampled_from(MEMORIES), length=st.integers(1, 11), data=st.data())
def test_c_nothing_leaks(memory: str, length: int, data: st.DataObject) -> None:
    model = model_of(memory, double=False)
    p = data.draw(st.integers(0, length - 1))
    tokens = text(2, length)
    changed = tokens.clone()
    changed[:, p] = (tokens[:, p] + data.draw(st.integers(1, 12))) % 13
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :p], after[:, :p])
    assert not torch.equal(before[:, p], after[:, p])


@pytest.mark.parametrize(
    ("memory", "reach"),
    # The last segment in which a change of token 0 is felt. A recurrent cache never ends. In XL
    # memory (5 tokens) the first layer of segment 1 sees tokens -1..3, so that its outputs up to
    # token 7 differ, which the second layer of segment 3 (memory 7..11) is the last to see.
    [("grc", 6), ("grc-masked", 6), ("xl", 3), ("none", 0)],
)
def test_the_memory_is_used(memory: str, reach: int) -> None:
    model = model_of(memory)
    tokens = text(1, 7 * SEGMENT)
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % 13
    difference = (model(tokens)[0] - model(changed)[0]).abs().amax((0, 2))
    felt = [bool(part.any()) for part in difference.chunk(7)]
    assert felt == [segment <= reach for segment in range(7)]


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_fresh_network_predicts_all_tokens_alike(memory: str) -> None:
    model = CachedTransformerLM(config_of(memory))
    logits, _ = model(text(2, 3 * SEGMENT))
    assert not logits.any()


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_are_independent_streams(memory: str) -> None:
    model = model_of(memory)
    tokens = text(3, 2 * SEGMENT + 1)
    together, _ = model(tokens)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], model(tokens[row : row + 1])[0])


# ------------------------------------------------------------------------------ state


@pytest.mark.parametrize("seen", [SEGMENT, 2 * SEGMENT, SEGMENT + 3, 2])
@pytest.mark.parametrize("memory", MEMORIES)
def test_h_streams_are_reordered(memory: str, seen: int) -> None:
    model = model_of(memory)
    tokens = text(3, seen + 5)
    order = torch.tensor([2, 0, 0, 1])
    whole, _ = model(tokens[order])
    _, state = model(tokens[:, :seen])
    state = state.reorder(order)
    assert state.streams == (None if memory == "none" and seen % SEGMENT == 0 else 4)
    rest, _ = model(tokens[order, seen:], state)
    torch.testing.assert_close(rest, whole[:, seen:])


@pytest.mark.parametrize("memory", MEMORIES)
def test_h_streams_are_reset(memory: str) -> None:
    model = model_of(memory)
    tokens = text(3, 2 * SEGMENT)
    head, tail = tokens.chunk(2, 1)
    whole, _ = model(tokens)
    mask = torch.tensor([False, True, False])
    _, state = model(head)
    rest, _ = model(tail, state.reset(mask))
    torch.testing.assert_close(rest[~mask], whole[~mask][:, SEGMENT:])
    torch.testing.assert_close(rest[mask], model(tail[mask])[0])
    fresh = model.initial_state()
    assert_same_state(fresh.reset(mask), fresh)


def test_h_a_reset_in_mid_segment_is_refused() -> None:
    model = model_of("grc")
    _, state = model(text(2, SEGMENT + 1))
    with pytest.raises(ValueError, match="at a segment start only, not at position 1"):
        state.reset(torch.tensor([True, False]))


def test_h_a_stream_that_diverged_is_reset_too() -> None:
    _, state = model_of("grc")(text(2, SEGMENT))
    broken = dataclasses.replace(
        state, layers=tuple(s.map(lambda t: torch.full_like(t, torch.nan)) for s in state.layers)
    )
    for layer in broken.reset(torch.tensor([True, False])).layers:
        assert layer.memory is not None
        assert not layer.memory[0].any()
        assert layer.memory[1].isnan().all()


@pytest.mark.parametrize("mask", [torch.tensor([1, 0]), torch.tensor([True]), torch.tensor(True)])
def test_h_only_a_boolean_for_each_stream_resets(mask: Tensor) -> None:
    _, state = model_of("grc")(text(2, SEGMENT))
    with pytest.raises(ValueError, match=r"the mask must be 2 booleans, got torch\.\w+ of shape"):
        state.reset(mask)


@pytest.mark.parametrize("every", [1, 2, 3, None])
@pytest.mark.parametrize("calls", [1, 5])
def test_gradients_are_cut_every_so_many_segments(every: int | None, calls: int) -> None:
    """Each segment has a token of its own, so that its embedding tells where gradients arrive."""
    model = model_of("grc")
    segments = 5
    tokens = torch.arange(segments).repeat_interleave(SEGMENT)[None]
    for target in range(segments):
        model.zero_grad()
        state, out = None, []
        for piece in tokens.chunk(calls, 1):
            logits, state = model(piece, state, detach_every=every)
            out.append(logits)
        torch.cat(out, 1)[:, target * SEGMENT :][:, :SEGMENT].square().sum().backward()
        arrived = model.embedding.weight.grad[:segments].any(1).tolist()
        group = segments if every is None else every
        expected = [s <= target and s // group == target // group for s in range(segments)]
        assert arrived == expected


def test_detach_cuts_all_gradients_and_nothing_else() -> None:
    model = model_of("grc")
    _, state = model(text(2, SEGMENT + 2))
    assert any(t.requires_grad for t in tensors(state))
    assert (state.attached, state.detach().attached) == (1, 0)
    assert not any(t.requires_grad for t in tensors(state.detach()))
    assert_same_state(state.detach(), state)
    assert all(t.dtype == torch.float32 for t in tensors(state.to(dtype=torch.float32)))
    assert all(t.device.type == "meta" for t in tensors(state.to("meta")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.position = 0  # type: ignore[misc]


def test_a_call_does_not_change_the_state_it_was_given() -> None:
    model = model_of("grc")
    _, state = model(text(2, SEGMENT + 1))
    before = [t.clone() for t in tensors(state)]
    first, _ = model(text(2, 6, seed=2), state)
    second, _ = model(text(2, 6, seed=2), state)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))


@pytest.mark.parametrize("memory", ["grc", "grc-masked", "xl"])
@pytest.mark.parametrize("seen", [2, SEGMENT])
def test_a_state_of_other_streams_is_refused(memory: str, seen: int) -> None:
    model = model_of(memory)
    _, state = model(text(2, seen))
    for batch in (1, 3):
        with pytest.raises(ValueError, match=f"the state holds 2 streams, tokens {batch}"):
            model(text(batch, 2), state)
    with pytest.raises(ValueError, match="the state is of 2 blocks, the network has 3"):
        model_of(memory, depth=3)(text(2, 2), state)


@pytest.mark.parametrize("shape", [(2, 0), (3,), (1, 2, 3)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected tokens as B x T with T > 0"):
        model_of("none")(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match="detach_every must be at least 1 or None, got 0"):
        model_of("none")(text(1, 1), detach_every=0)


# ------------------------------------------------------------------- gradients, precision


def gradients(model: CachedTransformerLM, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits, _ = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_parameter_gets_a_gradient(memory: str) -> None:
    model = model_of(memory)
    every = {n for n, _ in model.named_parameters()}
    # In the first segment nothing that was written is read, where reading comes first; in the
    # second, what is read was written onto zeros, which the reset gate cannot change.
    unread = {n for n in every if ".update." in n} if memory == "grc" else set()
    assert every - gradients(model, text(2, SEGMENT + 1)).keys() == unread
    for name, gradient in gradients(model, text(2, 3 * SEGMENT + 1)).items():
        assert gradient.any(), name
        every.discard(name)
    assert not every


@pytest.mark.parametrize("memory", MEMORIES)
def test_gradients_equal_finite_differences(memory: str) -> None:
    model = model_of(memory)
    tokens = text(2, 3 * SEGMENT + 1)
    found = gradients(model, tokens)

    @torch.no_grad()
    def loss() -> float:
        logits, _ = model(tokens[:, :-1])
        return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-5)
            values.append(loss())
            with torch.no_grad():
                parameter.sub_(direction, alpha=sign * 1e-5)
        slope = torch.tensor((values[0] - values[1]) / 2e-5, dtype=torch.float64)
        if memory == "xl" and not name.startswith(("norm", "head", "blocks.1.mlp")):
            continue  # gradients stop at the memory, finite differences do not
        torch.testing.assert_close(
            (found[name] * direction).sum(), slope, rtol=1e-5, atol=1e-8, msg=name
        )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("memory", MEMORIES)
def test_e_activation_checkpointing_gives_equal_gradients(memory: str, reentrant: bool) -> None:
    model = model_of(memory)
    tokens = text(2, 3 * SEGMENT + 1)
    expected = gradients(model, tokens)
    for block in model.blocks:
        block.forward = checkpointed(block.forward, reentrant)
    found = gradients(model, tokens)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def checkpointed(forward: Any, reentrant: bool) -> Any:
    """The same call, computed again in the backward pass; state goes in and out as flat tensors."""

    def call(x: Tensor, state: AttentionState, commit: bool) -> tuple[Tensor, AttentionState]:
        layout: list[bool] = []

        def flat(x: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
            y, after = forward(x, AttentionState(*parts), commit)
            layout[:] = [part is not None for part in after]
            return (y, *(part for part in after if part is not None))

        y, *parts = checkpoint(flat, x, *state, use_reentrant=reentrant)
        held = iter(parts)
        return y, AttentionState(*(next(held) if present else None for present in layout))

    return call


@pytest.mark.parametrize("memory", MEMORIES)
def test_e_gradient_accumulation_over_streams(memory: str) -> None:
    model = model_of(memory)
    tokens = text(4, 3 * SEGMENT + 1)
    expected = gradients(model, tokens)
    halves = [gradients(model, half) for half in tokens.chunk(2)]
    for name, value in expected.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value, msg=name)


@pytest.mark.parametrize("memory", MEMORIES)
def test_g_bfloat16(memory: str) -> None:
    model = model_of(memory, double=False)
    tokens = text(2, 3 * SEGMENT + 2)
    expected, _ = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        whole, state = model(tokens)
        _, middle = model(tokens[:, :5])
        rest, _ = model(tokens[:, 5:], middle)
    for layer in state.layers:
        assert layer.memory is None or memory == "xl" or layer.memory.dtype == torch.float32
    assert F.cosine_similarity(whole.float(), expected, dim=-1).min() > 0.98
    torch.testing.assert_close(rest.float(), whole[:, 5:].float(), rtol=0.1, atol=0.15)
    low, _ = copy.deepcopy(model).bfloat16()(tokens)
    assert low.dtype == torch.bfloat16
    assert F.cosine_similarity(low.float(), expected, dim=-1).min() > 0.95


def test_dropout_acts_in_training_only() -> None:
    model = model_of("grc", dropout=0.5)
    tokens = text(2, 6)
    assert not torch.equal(model.train()(tokens)[0], model(tokens)[0])
    assert torch.equal(model.eval()(tokens)[0], model(tokens)[0])
    torch.testing.assert_close(model(tokens)[0], model_of("grc")(tokens)[0])


# ------------------------------------------------------------- parameters and configuration


@pytest.mark.parametrize("memory", MEMORIES)
def test_d_the_state_dict_fits_a_fresh_network(memory: str) -> None:
    model = model_of(memory)
    fresh = CachedTransformerLM(config_of(memory)).double()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    tokens = text(2, 2 * SEGMENT)
    assert torch.equal(fresh(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("memory", MEMORIES)
def test_f_parameters(memory: str) -> None:
    config = config_of(memory)
    d, m, h = config.dim, int(config.dim * config.grc.ratio), config.num_heads
    block = 4 * d * d + 2 * d * int(d * config.mlp_ratio) + 2 * d
    if memory.startswith("grc"):
        # Section 1.6 without the biases of attention and with one output projection for both.
        block += 10 * m * m + 9 * m + h - (m * m + m) - 3 * m
    expected = 2 * config.vocab_size * d + config.depth * block + d
    found = sum(p.numel() for p in CachedTransformerLM(config).parameters())
    assert found == expected


def test_the_default_shape_is_a_recurrent_cache() -> None:
    config = CachedTransformerLMConfig()
    assert config.vocab_size == 256
    assert config.grc.order == "read_write"
    assert config.grc.scope == "per_stream"
    assert config.grc.segment == config.segment


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_trainers_ask_for(memory: str) -> None:
    import re

    model = CachedTransformerLM(config_of(memory))
    weights = model.mixing_weights
    if memory.startswith("grc"):
        assert weights is not None
        torch.testing.assert_close(weights, torch.full((2, 2), 0.5))
    else:
        assert weights is None
    exempt = model.no_weight_decay()
    patterns = model.group_matcher()
    for name, parameter in model.named_parameters():
        assert (name in exempt) == (parameter.ndim < 2 or name == "embedding.weight")
        assert sum(bool(re.match(pattern, name)) for pattern in patterns.values()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"depth": -1}, "depth must be at least 1, got -1"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"segment": 0}, "segment must be at least 1, got 0"),
        ({"memory_length": 0}, "memory_length must be at least 1, got 0"),
        ({"num_heads": 3}, "dim 8 is not divisible by num_heads 3"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive, got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"segment": 5}, "grc.segment is 4, must equal segment 5"),
        ({"grc": GRCConfig()}, "needs grc.scope='per_stream'"),
    ],
)
def test_bad_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of("grc", **changes)


@pytest.mark.parametrize("memory", ["xl", "none"])
def test_the_cache_is_not_looked_at_where_there_is_none(memory: str) -> None:
    assert config_of(memory, segment=5).segment == 5


# ------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_block_compiles_without_a_break_and_exports(memory: str) -> None:
    model = model_of(memory, double=False)
    block = model.blocks[1]
    x = torch.randn(2, SEGMENT, 8)
    _, state = block(x, AttentionState(), True)
    expected, after = block(x, state, True)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found, compiled_after = compiled(x, state, True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled_after.memory, after.memory)
    program = torch.export.export(block, (x, state, True)).module()
    torch.testing.assert_close(program(x, state, True)[0], expected)


@pytest.mark.slow
def test_training_with_compiled_blocks_has_equal_gradients() -> None:
    model = model_of("grc", double=False)
    tokens = text(2, 3 * SEGMENT + 1)
    expected = gradients(model, tokens)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True)
    found = gradients(model, tokens)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_logits_are_the_head_of_the_features() -> None:
    model = model_of("grc")
    tokens = text(2, 6)
    features, _ = model.forward_features(tokens)
    assert features.shape == (2, 6, 8)
    expected = to_array(features) @ to_array(model.head.weight).T
    torch.testing.assert_close(model(tokens)[0], torch.from_numpy(expected))
    torch.testing.assert_close(model.forward_head(features), model(tokens)[0])
