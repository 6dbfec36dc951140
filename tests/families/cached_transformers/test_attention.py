"""Tests of GRC attention: acceptance checks (a) to (j), then the switches one by one.

The letters: (a) evaluation leaves the cache alone, (b) the reset gate at a zero cache, (c) no leak,
(d) state dict, (e) activation checkpointing, (f) counted parameters and MACs, (g) sizes and
precisions, (h) reset and reorder, (i) pieces, (j) without cache it is plain attention.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.families.cached_transformers import grc_reference as reference
from tests.families.cached_transformers.grc_reference import randomised, to_array
from zoo.families.cached_transformers import (
    GRC_PRESETS,
    AttentionState,
    GatedRecurrentUpdate,
    GRCAttention,
    GRCConfig,
    MultiHeadAttention,
    RecurrentAttention,
    grc_preset,
)
from zoo.families.cached_transformers.attention import slot_positions

CAUSAL = ("causal-masked", "causal-recurrent")
DIM, HEADS = 8, 2


def layer(config: GRCConfig, *, seed: int = 0, double: bool = True, **options: Any) -> GRCAttention:
    """A small layer in which every parameter and the cache are random."""
    module = GRCAttention(DIM, HEADS, config, **options)
    randomised(module.double() if double else module, seed)
    return module


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run_pieces(
    module: Callable[..., tuple[Tensor, AttentionState]],
    x: Tensor,
    pieces: list[int],
    state: AttentionState | None = None,
) -> tuple[Tensor, AttentionState]:
    """One segment in pieces of these sizes, the last of which commits."""
    out, start = [], 0
    for index, size in enumerate(pieces):
        commit = index == len(pieces) - 1
        y, state = module(x[:, start : start + size], state, commit=commit)
        out.append(y)
        start += size
    assert start == x.shape[1]
    assert state is not None
    return torch.cat(out, 1), state


def causal_config(name: str, slots: int, segment: int | None, **changes: Any) -> GRCConfig:
    return grc_preset(name, slots=slots, segment=segment, **changes)


# --------------------------------------------------------- the equations, as a naive loop


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slots", [5, 6, 9])
def test_the_paper_preset_is_the_printed_equations(training: bool, slots: int) -> None:
    module = layer(grc_preset("paper", slots=slots)).train(training)
    x = tokens(3, 6)
    y, state = module(x, grid=(2, 3))
    expected, cache = reference.paper(
        to_array(x), reference.weights_of(module), HEADS, (2, 3), training=training
    )
    torch.testing.assert_close(y, torch.from_numpy(expected))
    assert state.memory is not None
    torch.testing.assert_close(state.memory[0], torch.from_numpy(cache))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_released_preset_is_the_released_code(steps: int) -> None:
    module = layer(GRC_PRESETS["released"])
    for step in range(steps):
        x = tokens(3, 7, seed=step)  # a class token and a grid of 2 x 3
        expected, cache = reference.released(
            to_array(x), reference.weights_of(module), HEADS, (2, 3)
        )
        y, state = module(x, grid=(2, 3))
        torch.testing.assert_close(y, torch.from_numpy(expected))
        module.commit(state)
        torch.testing.assert_close(module.cache[0], torch.from_numpy(cache))


def test_presets_are_the_switches_of_their_source() -> None:
    assert set(GRC_PRESETS) == {"paper", "released", *CAUSAL}
    paper, released = GRC_PRESETS["paper"], GRC_PRESETS["released"]
    assert (paper.lambda_init, released.lambda_init) == (0.0, -1.0)
    for preset in (paper, released):
        weights = GRCAttention(DIM, HEADS, preset).mixing_weights
        expected = torch.tensor(preset.lambda_init).sigmoid().expand(HEADS)
        torch.testing.assert_close(weights, expected)
        assert preset.ratio == 0.5
        assert preset.positional_conv
        assert preset.scope == "shared"
    fresh = GRCAttention(DIM, HEADS, paper)
    assert not fresh.cache.any(), "C_0 = 0"


@given(
    changes=st.fixed_dictionaries(
        {
            "ratio": st.sampled_from([0.25, 0.5, 1.0]),
            "slots": st.integers(1, 9),
            "update_source": st.sampled_from(["input", "attn_out"]),
            "candidate": st.sampled_from(["linear", "ln_gelu"]),
            "read": st.sampled_from(["batch_mean", "per_sample"]),
            "inference": st.sampled_from(["frozen", "blend"]),
            "interpolation": st.sampled_from(["nearest", "linear"]),
            "order": st.sampled_from(["write_read", "read_write"]),
            "projection": st.sampled_from(["after_mix", "per_branch"]),
        }
    ),
    batch=st.integers(1, 3),
    length=st.integers(1, 8),
    training=st.booleans(),
)
def test_every_combination_of_switches_equals_the_naive_loop(
    changes: dict[str, Any], batch: int, length: int, training: bool
) -> None:
    config = GRCConfig(positional_conv=False, **changes)
    module = layer(config).train(training)
    x = tokens(batch, length)
    y, state = module(x)
    expected, caches = reference.switches(
        to_array(x), reference.weights_of(module), HEADS, config, training=training
    )
    torch.testing.assert_close(y, torch.from_numpy(expected))
    assert state.memory is not None
    torch.testing.assert_close(state.memory[0], torch.from_numpy(caches.mean(0)))


@given(
    name=st.sampled_from(CAUSAL),
    interpolation=st.sampled_from(["nearest", "linear"]),
    source=st.sampled_from(["input", "attn_out"]),
    projection=st.sampled_from(["after_mix", "per_branch"]),
    rotary=st.booleans(),
    slot_rotary=st.booleans(),
    qk_norm=st.booleans(),
    slots=st.integers(1, 7),
    segment=st.integers(1, 7),
    rest=st.integers(1, 7),
)
def test_a_causal_layer_equals_the_naive_loop_over_three_segments(
    name: str,
    interpolation: Any,
    source: Any,
    projection: Any,
    rotary: bool,
    slot_rotary: bool,
    qk_norm: bool,
    slots: int,
    segment: int,
    rest: int,
) -> None:
    config = causal_config(
        name,
        slots,
        segment,
        interpolation=interpolation,
        update_source=source,
        projection=projection,
        slot_rotary=slot_rotary,
    )
    base = 100.0 if rotary else None
    module = layer(config, causal=True, qk_norm=qk_norm, rotary_base=base)
    weights = reference.weights_of(module)
    lengths = [segment, segment, min(rest, segment)]  # the last may end early
    x = tokens(2, sum(lengths))
    state = None
    caches = [torch.zeros(slots, module.width).double().numpy() for _ in range(2)]
    for part in x.split(lengths, 1):
        y, state = module(part, state)
        for row in range(2):
            expected, caches[row] = reference.causal_segment(
                to_array(part[row]),
                caches[row],
                weights,
                HEADS,
                config,
                base=base,
                qk_norm=qk_norm,
                length=segment,
            )
            # Rotary tables are float32, and RMS normalisation has the epsilon of its precision.
            tolerance = {"rtol": 1e-4, "atol": 2e-6} if rotary or slot_rotary or qk_norm else {}
            torch.testing.assert_close(y[row], torch.from_numpy(expected), **tolerance)
            assert state.memory is not None
            torch.testing.assert_close(
                state.memory[row], torch.from_numpy(caches[row]), **tolerance
            )


@given(
    length=st.integers(1, 40),
    slots=st.integers(1, 40),
    mode=st.sampled_from(["nearest", "linear"]),
)
def test_slots_are_resampled_as_interpolate_does_it(length: int, slots: int, mode: Any) -> None:
    low, high, weight = slot_positions(length, slots, mode)
    x = torch.randn(1, 3, length, dtype=torch.float64)
    share = torch.tensor(weight, dtype=torch.float64)
    ours = x[..., low] * (1 - share) + x[..., high] * share
    options = {"align_corners": False} if mode == "linear" else {}
    expected = nn.functional.interpolate(x, size=slots, mode=mode, **options)
    torch.testing.assert_close(ours, expected)
    # Exactly the tokens that count, in ascending order, by rational arithmetic.
    for j in range(slots):
        if mode == "nearest":
            assert low[j] == high[j] == Fraction(j * length, slots).__floor__()
        else:
            centre = max(Fraction(2 * j + 1, 2) * length / slots - Fraction(1, 2), Fraction(0))
            last = min(centre.__ceil__(), length - 1)
            assert (low[j], high[j]) == (min(centre.__floor__(), length - 1), last)
    assert high == sorted(high)
    assert max(high) < length


# ----------------------------------------------------------------- acceptance checks


@pytest.mark.parametrize("name", ["paper", "released"])
def test_a_eval_leaves_the_cache_bit_identical_and_rows_alone(name: str) -> None:
    module = layer(grc_preset(name, slots=9), double=False).eval()
    before = copy.deepcopy(module.state_dict())
    x = tokens(4, 9, dtype=torch.float32)
    y, _ = module(x)
    alone = torch.cat([module(row[None])[0] for row in x])
    torch.testing.assert_close(y, alone, rtol=1e-6, atol=1e-6)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["paper", "released"])
def test_a_training_forward_writes_nothing_before_commit(name: str) -> None:
    module = layer(grc_preset(name, slots=9)).train()
    before = module.cache.clone()
    _, state = module(tokens(2, 9))
    assert torch.equal(module.cache, before)
    assert state.memory is not None
    assert not state.memory.requires_grad
    module.commit(state)
    assert torch.equal(module.cache, state.memory)
    assert not torch.equal(module.cache, before)


@pytest.mark.parametrize("name", ["paper", "released", *CAUSAL])
def test_b_a_zero_cache_gives_the_reset_gate_no_gradient(name: str) -> None:
    config = grc_preset(name, slots=9, positional_conv=False)
    module = layer(config, causal=name in CAUSAL)
    if config.scope == "shared":
        module.cache.zero_()
    width = module.width
    y, state = module(tokens(2, 9))
    if name != "causal-recurrent":  # which reads before it writes: nothing is learned of it yet
        y.square().sum().backward()
        gates = module.update.gates
        for parameter in (gates.weight, gates.bias):
            assert parameter.grad is not None
            assert not parameter.grad[:width].any(), "reset gate"
            assert parameter.grad[width:].any(), "update gate"
        module.zero_grad()
        y, state = module(tokens(2, 9))
    if config.scope == "shared":
        module.commit(state)
    module(tokens(2, 9, seed=2), state)[0].square().sum().backward()
    assert module.update.gates.weight.grad is not None
    if name == "causal-recurrent":
        # The second segment reads what was written onto zeros: still no gradient for the reset.
        assert not module.update.gates.weight.grad[:width].any()
        assert module.update.gates.weight.grad[width:].any()
    else:
        assert module.update.gates.weight.grad[:width].any()


LENGTH = 6
CAUSAL_GRID = [
    pytest.param(*case, id="-".join(str(part) for part in case))
    for case in itertools.product(
        ("write_read", "read_write"),
        ("nearest", "linear"),
        ("input", "attn_out"),
        (LENGTH, 4, 9),
        ((LENGTH,), (1,) * LENGTH, (2, 3, 1)),
    )
]


@pytest.mark.parametrize(("order", "interpolation", "source", "slots", "pieces"), CAUSAL_GRID)
def test_c_no_causal_configuration_leaks(
    order: Any, interpolation: Any, source: Any, slots: int, pieces: tuple[int, ...]
) -> None:
    config = GRCConfig(
        slots=slots,
        order=order,
        interpolation=interpolation,
        update_source=source,
        read="per_sample",
        scope="per_stream",
        positional_conv=False,
        segment=LENGTH,
    )
    module = layer(config, causal=True, double=False)
    first, x = tokens(2, 2 * LENGTH, dtype=torch.float32).chunk(2, 1)
    _, state = module(first)
    y, _ = run_pieces(module, x, list(pieces), state)
    for p in range(LENGTH):
        changed = x.clone()
        changed[:, p] += 3.0
        z, _ = run_pieces(module, changed, list(pieces), state)
        assert torch.equal(y[:, :p], z[:, :p]), f"token {p} is seen before it comes"
        assert not torch.equal(y[:, p], z[:, p])


def test_c_the_grid_of_causal_configurations_is_whole() -> None:
    assert len(CAUSAL_GRID) == 2 * 2 * 2 * 3 * 3


@pytest.mark.parametrize("slots", [LENGTH, 4, 9])
@pytest.mark.parametrize("order", ["write_read", "read_write"])
def test_c_without_a_fixed_segment_nothing_leaks_either(order: Any, slots: int) -> None:
    config = grc_preset("causal-masked", order=order, slots=slots)
    module = layer(config, causal=True, double=False)
    x = tokens(2, LENGTH, dtype=torch.float32)
    y, _ = module(x)
    for p in range(LENGTH):
        changed = x.clone()
        changed[:, p] += 3.0
        assert torch.equal(y[:, :p], module(changed)[0][:, :p])


def test_c_the_released_form_would_leak() -> None:
    """The reason for the slot mask: without it the check above does find the leak."""
    module = layer(grc_preset("causal-masked", slots=LENGTH), causal=True)
    module.config = dataclasses.replace(module.config, order="read_write")
    write = module._write
    x = tokens(1, LENGTH)
    changed = x.clone()
    changed[:, -1] += 3.0

    def naive(x: Tensor) -> Tensor:
        y, _ = module(x)  # read_write: the cache that is read below is the new one, unmasked
        cache = write(torch.zeros(1, LENGTH, module.width).double(), y[..., : module.width], None)
        return module(x, AttentionState(cache))[0]

    assert not torch.equal(naive(x)[:, :-1], naive(changed)[:, :-1])


@pytest.mark.parametrize("name", ["paper", "released", *CAUSAL])
def test_d_the_state_dict_fits_a_fresh_layer(name: str) -> None:
    causal = name in CAUSAL
    module = layer(GRC_PRESETS[name], causal=causal)
    if name == "released":  # the length of the cache is that of the first call
        assert module.cache.shape[1] == 0
    state = module(tokens(2, 9))[1]
    if not causal:
        module.commit(state)
    fresh = GRCAttention(DIM, HEADS, GRC_PRESETS[name], causal=causal).double()
    fresh.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    x = tokens(2, 9, seed=5)
    if not causal:
        assert torch.equal(fresh.cache, module.cache)
        assert fresh.cache.shape[1] == (9 if name == "released" else 64)
    for mode in (True, False):
        assert torch.equal(fresh.train(mode)(x)[0], module.train(mode)(x)[0])


def test_d_a_cache_of_another_length_is_refused_where_the_length_is_fixed() -> None:
    stored = GRCAttention(DIM, HEADS, grc_preset("paper", slots=5)).state_dict()
    with pytest.raises(RuntimeError, match="cache"):
        GRCAttention(DIM, HEADS, grc_preset("paper", slots=6)).load_state_dict(stored)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["paper", "released", *CAUSAL])
def test_e_activation_checkpointing_gives_equal_gradients_and_one_write(
    name: str, reentrant: bool
) -> None:
    causal = name in CAUSAL
    module = layer(grc_preset(name, slots=9), causal=causal)
    plain = copy.deepcopy(module)
    x, z = tokens(2, 9).requires_grad_(), tokens(2, 9, seed=2).requires_grad_()

    def flat(module: GRCAttention) -> Callable[..., tuple[Tensor, Tensor]]:
        # The reentrant kind sees tensors at the top level of the outputs only.
        def call(x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
            y, state = module(x, None if memory is None else AttentionState(memory))
            assert state.memory is not None
            return y, state.memory

        return call

    def step(module: GRCAttention, wrapped: bool) -> dict[str, Tensor]:
        call = flat(module)
        if wrapped:
            inner = call

            def call(x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
                out: tuple[Tensor, Tensor] = checkpoint(inner, x, memory, use_reentrant=reentrant)
                return out

        first, memory = call(x, None)
        second, memory = call(z, memory)
        loss = (first * torch.linspace(0, 1, DIM)).sum() + second.square().sum()
        found = gradients(module, loss)
        if not causal:
            module.commit(AttentionState(memory))
        return found

    expected, found = step(plain, wrapped=False), step(module, wrapped=True)
    assert found.keys() == expected.keys() == dict(module.named_parameters()).keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)
    if not causal:
        assert torch.equal(module.cache, plain.cache)


def test_e_a_commit_before_backward_is_an_error_not_a_wrong_gradient() -> None:
    module = layer(grc_preset("paper", slots=9))
    y, state = module(tokens(2, 9))
    module.commit(state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["paper", "released"])
def test_e_gradient_accumulation_commits_once_per_step(name: str) -> None:
    module = layer(grc_preset(name, slots=9, read="per_sample"))
    whole = copy.deepcopy(module)
    x = tokens(4, 9)
    y, state = whole(x)
    y.square().sum().backward()
    whole.commit(state)
    states = []
    for half in x.chunk(2):
        y, state = module(half)
        y.square().sum().backward()
        states.append(state)
    module.commit(*states)
    torch.testing.assert_close(module.cache, whole.cache)
    for (key, p), q in zip(module.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=key)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("dim", "heads", "ratio"), [(64, 4, 0.5), (48, 3, 0.25), (32, 2, 1.0)])
@pytest.mark.parametrize("name", ["paper", "released", *CAUSAL])
def test_f_parameters(name: str, dim: int, heads: int, ratio: float) -> None:
    plain = count(nn.MultiheadAttention(dim, heads))
    config = grc_preset(name, ratio=ratio)
    extra = count(GRCAttention(dim, heads, config, causal=name in CAUSAL)) - plain
    width = int(dim * ratio)
    expected = 10 * width**2 + 9 * width + heads  # the released module
    if config.projection == "after_mix":
        expected -= width**2 + width  # there is no second output projection
    if config.candidate == "linear":
        expected -= 2 * width  # no gain and bias of a norm
    if config.positional_conv:
        expected += round(9 * dim / ratio) + dim
    assert extra == expected


def macs(module: nn.Module, *inputs: Any, **options: Any) -> int:
    """Multiply-accumulates of a forward pass; fused attention is taken apart to be counted."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(*inputs, **options)
    flops: int = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize(("dim", "heads", "ratio"), [(64, 4, 0.5), (48, 3, 0.25), (32, 2, 1.0)])
@pytest.mark.parametrize("name", ["paper", "released", *CAUSAL])
def test_f_macs(name: str, dim: int, heads: int, ratio: float) -> None:
    length = 16
    x = torch.zeros(1, length, dim)
    config = grc_preset(name, ratio=ratio, slots=length)
    own = 4 * length * dim**2 + 2 * length**2 * dim
    module = GRCAttention(dim, heads, config, causal=name in CAUSAL).train()
    width = int(dim * ratio)
    expected = 10 * length * width**2 + 2 * length**2 * width
    if config.projection == "after_mix":
        expected -= length * width**2
    if config.positional_conv:
        expected += round(9 * length * dim / ratio)
    assert macs(module, x) - own == expected


def test_f_macs_of_plain_attention() -> None:
    """The baseline that the test above subtracts is counted as well."""
    module = RecurrentAttention(64, 4)
    x = torch.zeros(1, 16, 64)
    assert macs(module, x) == 4 * 16 * 64**2 + 2 * 16**2 * 64


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4
    ),
    name=st.sampled_from(["paper", "released"]),
    training=st.booleans(),
)
def test_g_tokens_and_grids_may_change_between_calls(
    sizes: list[tuple[int, int, int]], name: str, training: bool
) -> None:
    module = layer(grc_preset(name, slots=5)).train(training)
    for batch, height, width in sizes:
        x = tokens(batch, height * width)
        y, state = module(x, grid=(height, width))
        assert y.shape == x.shape
        assert y.isfinite().all()
        assert state.memory is not None
        assert state.memory.shape == (1, 5, module.width)
        if training:
            module.commit(state)


@pytest.mark.parametrize("grid", [(2, 6), (6, 2), (3, 4), (1, 12)])
@pytest.mark.parametrize("class_tokens", [0, 1, 2])
def test_g_rectangular_grids(grid: tuple[int, int], class_tokens: int) -> None:
    module = layer(grc_preset("released", slots=5))
    x = tokens(2, 12 + class_tokens)
    y, _ = module(x, grid=grid)
    expected, _ = reference.released(to_array(x), reference.weights_of(module), HEADS, grid)
    torch.testing.assert_close(y, torch.from_numpy(expected))


@pytest.mark.parametrize("length", [9, 10])
def test_g_a_square_grid_is_found(length: int) -> None:
    module = layer(grc_preset("paper", slots=5))
    x = tokens(2, length)
    assert torch.equal(module(x)[0], module(x, grid=(3, 3))[0])


def test_g_a_grid_that_does_not_fit_is_refused() -> None:
    module = layer(GRC_PRESETS["paper"])
    with pytest.raises(ValueError, match="12 tokens are no square grid"):
        module(tokens(1, 12))
    with pytest.raises(ValueError, match="3 x 5 has more cells than the 12 tokens"):
        module(tokens(1, 12), grid=(3, 5))


@pytest.mark.parametrize("name", ["paper", "released", *CAUSAL])
def test_g_bfloat16(name: str) -> None:
    causal = name in CAUSAL
    module = layer(grc_preset(name, slots=9), causal=causal, double=False)
    x = tokens(2, 9, dtype=torch.float32)
    y, _state = module(x)
    low, low_state = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert low_state.memory is not None
    assert low_state.memory.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, mixed_state = module(x)
        second, _ = module(x, mixed_state if causal else None)
    assert mixed_state.memory is not None
    assert mixed_state.memory.dtype == torch.float32
    torch.testing.assert_close(mixed.float(), y, rtol=0.1, atol=0.1)
    assert second.isfinite().all()
    mixed.float().square().sum().backward()
    for parameter in module.attention.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", CAUSAL)
def test_h_reset_and_reorder_of_streams(name: str) -> None:
    module = layer(causal_config(name, 5, LENGTH), causal=True)
    x, z = tokens(3, LENGTH), tokens(3, LENGTH, seed=2)
    _, state = module(x)
    y, _ = module(z, state)
    order = torch.tensor([2, 0, 0, 1])
    beams, _ = module(z[order], state.map(lambda t: t[order]))
    torch.testing.assert_close(beams, y[order])
    keep = torch.tensor([True, False, True])
    forgot, _ = module(z, state.map(lambda t: t * keep[:, None, None]))
    torch.testing.assert_close(forgot[keep], y[keep])
    torch.testing.assert_close(forgot[~keep], module(z[~keep])[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_h_beams_in_mid_segment(name: str) -> None:
    module = layer(causal_config(name, 5, LENGTH), causal=True, rotary_base=100.0)
    x = tokens(2, LENGTH)
    order = torch.tensor([1, 1, 0])
    whole, _ = module(x[order])
    _, state = module(x[:, :4], commit=False)
    assert state.is_open
    rest, _ = module(x[order, 4:], state.map(lambda t: t[order]))
    torch.testing.assert_close(rest, whole[:, 4:])


cuts = st.lists(st.integers(1, 4), min_size=1, max_size=6)


@given(
    name=st.sampled_from(CAUSAL),
    pieces=cuts,
    early=st.integers(0, 3),
    slots=st.integers(1, 20),
    interpolation=st.sampled_from(["nearest", "linear"]),
    source=st.sampled_from(["input", "attn_out"]),
    slot_rotary=st.booleans(),
    batch=st.integers(1, 3),
)
def test_i_pieces_of_any_size_equal_one_call(
    name: str,
    pieces: list[int],
    early: int,
    slots: int,
    interpolation: Any,
    source: Any,
    slot_rotary: bool,
    batch: int,
) -> None:
    length = sum(pieces)
    config = causal_config(
        name,
        slots,
        length + early,  # the segment may be ended before it is full
        interpolation=interpolation,
        update_source=source,
        slot_rotary=slot_rotary,
    )
    module = layer(config, causal=True, rotary_base=100.0)
    _, state = module(tokens(batch, length, seed=9))
    x = tokens(batch, length)
    whole, after = module(x, state)
    parts, after_parts = run_pieces(module, x, pieces, state)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(after_parts.memory, after.memory)
    assert not after_parts.is_open
    assert after_parts.keys is None
    assert after_parts.values is None


@pytest.mark.parametrize("name", ["paper", "released"])
def test_j_without_weight_on_the_cache_it_is_plain_attention(name: str) -> None:
    module = layer(grc_preset(name, slots=9, positional_conv=False))
    with torch.no_grad():
        module.mixing_logits.fill_(-torch.inf)
    plain = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    out = module.out if name == "paper" else module.attention.out
    assert isinstance(out, nn.Linear)
    plain.load_state_dict(
        {
            "in_proj_weight": module.attention.qkv.weight,
            "in_proj_bias": module.attention.qkv.bias,
            "out_proj.weight": out.weight,
            "out_proj.bias": out.bias,
        }
    )
    x = tokens(3, 9)
    torch.testing.assert_close(module(x)[0], plain(x, x, x, need_weights=False)[0])
    with torch.no_grad():
        module.mixing_logits.fill_(-40.0)
    torch.testing.assert_close(module(x)[0], plain(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_j_a_causal_layer_without_weight_is_plain_causal_attention(name: str) -> None:
    module = layer(grc_preset(name, slots=9), causal=True)
    with torch.no_grad():
        module.mixing_logits.fill_(-torch.inf)
    x = tokens(3, 9)
    _, state = module(x)
    q, k, v = module.attention.project_self(x)
    scores = q @ k.transpose(-1, -2) / (DIM / HEADS) ** 0.5
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(module(x, state)[0], module.out(y.transpose(1, 2).flatten(2)))


# ------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("candidate", ["linear", "ln_gelu"])
def test_gradients_of_the_gates_equal_finite_differences(candidate: Any) -> None:
    update = GatedRecurrentUpdate(3, candidate).double()
    names = [n for n, _ in update.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in update.parameters()]
    cache, x, z = (torch.randn(2, 4, 3).double().requires_grad_() for _ in range(3))

    def two_segments(cache: Tensor, x: Tensor, z: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        cache = torch.func.functional_call(update, weights, (cache, x))
        result: Tensor = torch.func.functional_call(update, weights, (cache, z))
        return result

    assert torch.autograd.gradcheck(two_segments, (cache, x, z, *parameters))


@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_through_two_segments_equal_finite_differences(
    name: str, interpolation: Any
) -> None:
    config = causal_config(name, 2, 3, interpolation=interpolation)
    module = GRCAttention(4, 1, config, causal=True).double()
    randomised(module)
    names = [n for n, _ in module.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = torch.randn(1, 6, 4).double().requires_grad_()

    def two_segments(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        weights = dict(zip(names, values, strict=True))
        first, state = torch.func.functional_call(module, weights, (x[:, :3],))
        second, state = torch.func.functional_call(module, weights, (x[:, 3:], state))
        return torch.cat((first, second), 1), state.memory

    assert torch.autograd.gradcheck(two_segments, (x, *parameters))


@pytest.mark.parametrize("name", ["paper", "released"])
def test_gradients_of_a_vision_layer_equal_finite_differences(name: str) -> None:
    module = GRCAttention(4, 1, grc_preset(name, slots=3)).double()
    randomised(module)
    names = [n for n, _ in module.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = torch.randn(2, 4, 4).double().requires_grad_()

    def call(x: Tensor, *values: Tensor) -> Tensor:
        y, _ = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
        result: Tensor = y
        return result

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("name", ["paper", "released", *CAUSAL])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """Over three segments. In one: all but the update, where reading comes before writing."""
    causal = name in CAUSAL
    module = layer(grc_preset(name, slots=9), causal=causal)
    y, state = module(tokens(2, 9))
    found = gradients(module, y.square().sum())
    missing = {n for n, _ in module.named_parameters()} - found.keys()
    unread = {n for n, _ in module.named_parameters() if n.startswith("update.")}
    assert missing == (unread if name == "causal-recurrent" else set())
    total, state = torch.zeros(()), None
    for seed in range(3):
        y, state = module(tokens(2, 9, seed=seed), state)
        total = total + y.square().sum()
    found = gradients(module, total)
    for key, parameter in module.named_parameters():
        width = parameter.shape[0]
        if key.endswith("qkv.bias"):  # a bias of the keys shifts all scores of a row alike
            keys = slice(width // 3, 2 * width // 3)
            assert found[key][keys].abs().max() < 1e-9
            found[key] = torch.cat((found[key][: width // 3], found[key][2 * width // 3 :]))
        assert found[key].any(), key


# --------------------------------------------------- padding, arguments, configuration


@given(
    name=st.sampled_from(["paper", "released"]),
    interpolation=st.sampled_from(["nearest", "linear"]),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    slots=st.integers(1, 9),
)
def test_padding_is_neither_attended_to_nor_written(
    name: str, interpolation: Any, lengths: list[int], slots: int
) -> None:
    config = grc_preset(
        name,
        slots=slots,
        interpolation=interpolation,
        positional_conv=False,
        read="per_sample",
        scope="per_stream",
    )
    module = layer(config)
    x = tokens(len(lengths), max(lengths))
    y, state = module(x, lengths=torch.tensor(lengths))
    assert state.memory is not None
    for row, length in enumerate(lengths):
        expected, alone = module(x[row : row + 1, :length])
        torch.testing.assert_close(y[row : row + 1, :length], expected)
        torch.testing.assert_close(state.memory[row : row + 1], alone.memory)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 8], [-1, 3], [3], [3, 3, 3]])
def test_lengths_out_of_range_are_refused(lengths: list[int]) -> None:
    module = layer(grc_preset("paper", slots=4, positional_conv=False))
    with pytest.raises(ValueError, match="lengths"):
        module(tokens(2, 7), lengths=torch.tensor(lengths))


def test_calls_that_do_not_fit_are_refused() -> None:
    vision, causal = layer(GRC_PRESETS["paper"]), layer(GRC_PRESETS["causal-masked"], causal=True)
    with pytest.raises(ValueError, match=r"expected B x T x 8, got \(2, 9\)"):
        vision(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"expected B x T x 8, got \(2, 9, 7\)"):
        vision(torch.zeros(2, 9, 7))
    with pytest.raises(ValueError, match="lengths is for non-causal attention"):
        causal(tokens(2, 9), lengths=torch.tensor([9, 9]))
    with pytest.raises(ValueError, match="only a causal layer can be called with pieces"):
        vision(tokens(2, 9), commit=False)
    with pytest.raises(ValueError, match=r"pieces of a segment needs GRCConfig\.segment"):
        causal(tokens(2, 9), commit=False)
    with pytest.raises(ValueError, match="the state holds 2 streams, the batch has 3 rows"):
        causal(tokens(3, 9), causal(tokens(2, 9))[1])
    fixed = layer(causal_config("causal-masked", 4, 4), causal=True)
    with pytest.raises(ValueError, match="the segment has 5 tokens, the configuration says 4"):
        fixed(tokens(1, 5))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_segment_cannot_grow_beyond_its_length_by_pieces(name: str) -> None:
    module = layer(causal_config(name, 4, 4), causal=True)
    _, state = module(tokens(1, 3), commit=False)
    with pytest.raises(ValueError, match="the segment has 5 tokens, the configuration says 4"):
        module(tokens(1, 2), state, commit=False)


def test_commit_refuses_what_it_cannot_store() -> None:
    vision, causal = layer(GRC_PRESETS["paper"]), layer(GRC_PRESETS["causal-masked"], causal=True)
    with pytest.raises(ValueError, match="at least one state"):
        vision.commit()
    with pytest.raises(ValueError, match="each with a cache"):
        vision.commit(AttentionState())
    with pytest.raises(ValueError, match="belong to the caller"):
        causal.commit(AttentionState(torch.zeros(1, 64, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.0}, "ratio must be in"),
        ({"ratio": 1.5}, "ratio must be in"),
        ({"slots": 0}, "slots must be a positive integer"),
        ({"slots": "first"}, "slots must be a positive integer"),
        ({"segment": 0}, "segment must be a positive integer"),
        ({"scope": "per_stream"}, "would mix streams"),
        ({"scope": "per_stream", "read": "per_sample", "slots": "first_T"}, "needs scope='shared'"),
        ({"slot_rotary": True}, "needs segment"),
    ],
)
def test_contradictory_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRCConfig(**changes)


@pytest.mark.parametrize(
    ("dim", "heads", "changes", "causal", "message"),
    [
        (64, 4, {"ratio": 0.3}, False, "cache width 19 .* is not divisible by 4 heads"),
        (64, 4, {"ratio": 0.75}, False, "needs the cache width 48 to divide the width 64"),
        (64, 5, {"positional_conv": False, "ratio": 0.3125}, False, "width 64 is not divisible"),
        (64, 4, {}, True, "looks ahead on the grid"),
        (64, 4, {"slots": "first_T", "positional_conv": False}, True, "is for fixed grids"),
    ],
)
def test_widths_that_do_not_fit_are_refused(
    dim: int, heads: int, changes: dict[str, Any], causal: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GRCAttention(dim, heads, GRCConfig(**changes), causal=causal)


def test_three_quarters_of_the_width_work_without_the_convolution() -> None:
    module = GRCAttention(64, 4, GRCConfig(ratio=0.75, positional_conv=False))
    assert module(torch.zeros(1, 9, 64))[0].shape == (1, 9, 64)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="no GRC preset 'papr'; choose one of paper, released"):
        grc_preset("papr")


@given(batch=st.integers(2, 4), name=st.sampled_from(CAUSAL))
def test_rows_of_a_batch_are_independent_streams(batch: int, name: str) -> None:
    module = layer(causal_config(name, 4, LENGTH), causal=True)
    x, z = tokens(batch, LENGTH), tokens(batch, LENGTH, seed=2)
    together, _ = module(z, module(x)[1])
    for row in range(batch):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], module(z[one], module(x[one])[1])[0])


def test_documented_shapes() -> None:
    module = layer(causal_config("causal-masked", 5, LENGTH), causal=True)
    y, state = module(tokens(3, 4), commit=False)
    shapes = [None if t is None else tuple(t.shape) for t in state]
    assert y.shape == (3, 4, DIM)
    assert shapes == [None, (3, HEADS, 4, DIM // HEADS), (3, HEADS, 4, DIM // HEADS), (3, 4, 4)]
    y, state = module(tokens(3, 2), state)
    assert state.memory is not None
    assert state.memory.shape == (3, 5, module.width)
    assert state[1:] == (None, None, None)
    assert module.mixing_weights.shape == (HEADS,)
    plain = MultiHeadAttention(DIM, HEADS)
    q, k, v = plain.project_self(torch.zeros(3, 4, DIM))
    assert q.shape == k.shape == v.shape == (3, HEADS, 4, DIM // HEADS)
    assert plain.attend(q, k, v).shape == (3, 4, DIM)


# ----------------------------------------------------------------- Transformer-XL control


def naive_xl(module: RecurrentAttention, text: Tensor, segments: list[int]) -> Tensor:
    """Full attention over the text, each token to its segment and `memory_length` before it."""
    weights = reference.below(reference.weights_of(module), "attention.")
    starts = [s for i, n in enumerate(segments) for s in [sum(segments[:i])] * n]
    allowed = lambda i, j: starts[i] - module.memory_length <= j <= i  # noqa: E731
    positions = list(range(len(text)))
    y = reference.multi_head(
        to_array(text),
        to_array(text),
        HEADS,
        weights,
        sees=allowed,
        prepare=reference.rms_norm if module.attention.qk_norm else lambda head: head,
        query_positions=None if module.rotary_base is None else positions,
        key_positions=None if module.rotary_base is None else positions,
        base=module.rotary_base or 1.0,
    )
    return torch.from_numpy(y)


@given(
    segments=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    memory=st.integers(0, 7),
    rotary=st.booleans(),
    qk_norm=st.booleans(),
    bias=st.booleans(),
)
def test_recurrent_attention_equals_full_attention_over_the_text(
    segments: list[int], memory: int, rotary: bool, qk_norm: bool, bias: bool
) -> None:
    base = 100.0 if rotary else None
    module = RecurrentAttention(
        DIM, HEADS, memory_length=memory, bias=bias, qk_norm=qk_norm, rotary_base=base
    ).double()
    randomised(module)
    x = tokens(2, sum(segments))
    out, state, seen = [], None, 0
    for part in x.split(segments, 1):
        y, state = module(part, state)
        out.append(y)
        seen += part.shape[1]
        assert not state.is_open
        remembered = None if state.memory is None else state.memory.shape[1]
        assert remembered == (min(memory, seen) or None)
    for row, y in zip(x, torch.cat(out, 1), strict=True):
        torch.testing.assert_close(y, naive_xl(module, row, segments), rtol=1e-4, atol=2e-6)


@given(pieces=cuts, memory=st.integers(0, 7))
def test_recurrent_attention_in_pieces(pieces: list[int], memory: int) -> None:
    module = RecurrentAttention(DIM, HEADS, memory_length=memory).double()
    x = tokens(2, sum(pieces))
    _, state = module(tokens(2, 5, seed=3))
    whole, after = module(x, state)
    parts, after_parts = run_pieces(module, x, pieces, state)
    torch.testing.assert_close(parts, whole)
    if memory:
        assert torch.equal(after.memory, after_parts.memory)  # type: ignore[arg-type]


def test_the_memory_of_recurrent_attention_has_no_gradient() -> None:
    module = RecurrentAttention(DIM, HEADS, memory_length=4).double()
    x = tokens(2, 5).requires_grad_()
    _, state = module(x)
    assert state.memory is not None
    assert not state.memory.requires_grad
    assert torch.equal(state.memory, x[:, -4:])


def test_a_negative_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_length must not be negative, got -1"):
        RecurrentAttention(DIM, HEADS, memory_length=-1)
    with pytest.raises(ValueError, match="rotary positions need an even head width, got 3"):
        RecurrentAttention(6, 2)(torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 heads"):
        MultiHeadAttention(8, 3)


# ------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("name", ["paper", "released", *CAUSAL])
def test_it_compiles_without_a_break_and_exports(name: str) -> None:
    causal = name in CAUSAL
    module = layer(grc_preset(name, slots=9), causal=causal, double=False)
    x = tokens(2, 9, dtype=torch.float32)
    _, state = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y, after = module(x, state)
    z, compiled_after = compiled(x, state)
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(compiled_after.memory, after.memory)
    program = torch.export.export(module, (x, state)).module()
    torch.testing.assert_close(program(x, state)[0], y)


def test_documented_presets_have_text() -> None:
    text = f"{GRCAttention(DIM, HEADS)}"
    assert "dim=8, num_heads=2, causal=False" in text
    assert "GRCConfig(ratio=0.5" in text
