"""What a GRC layer costs over plain attention of the same shape, beside the ratio of MACs.

MACs are those that `torch.utils.flop_counter` counts, with attention in its plain form, since the
fused one is not counted on a CPU. Memory is what the layer keeps for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks._harness import Comparison, race, repeated
from zoo.families.cached_transformers import (
    AttentionState,
    GRCAttention,
    MultiHeadAttention,
    RecurrentAttention,
    grc_preset,
)

ROUNDS = 15
AT_MOST = 1.15
"""Over the ratio of counted MACs."""
MEMORY_SLOTS = 64

CAUSAL = [(16, 256, 256, 4), (1, 256, 256, 4), (4, 512, 512, 8)]
"""Streams, tokens, width, heads of the language model's layer; the first is the recipe's."""
VISION = [(8, 196, 384, 6)]
"""Likewise of a layer that sees all tokens, without the convolution."""


class _Plain(nn.Module):
    """Attention of all tokens to all tokens, with the interface of `GRCAttention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(dim, num_heads)

    def forward(
        self, x: Tensor, state: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState]:
        return self.attention.attend(*self.attention.project_self(x)), AttentionState()


def run(rounds: int) -> list[Comparison]:
    """Each shape: the forward pass alone, forward and backward, and what is kept between them."""
    comparisons = []
    for causal, shapes in ((True, CAUSAL), (False, VISION)):
        for batch, tokens, dim, heads in shapes:
            kind = "causal" if causal else "not causal"
            name = f"{batch} x {tokens} x {dim}, {heads} heads, {kind}"
            comparisons += _compare(name, *_layers(causal, tokens, dim, heads), batch, rounds)
    return comparisons


def _layers(causal: bool, tokens: int, dim: int, heads: int) -> tuple[nn.Module, nn.Module]:
    if not causal:
        config = grc_preset("paper", slots=MEMORY_SLOTS, positional_conv=False)
        return GRCAttention(dim, heads, config), _Plain(dim, heads)
    config = grc_preset(
        "causal-recurrent",
        slots=MEMORY_SLOTS,
        update_source="input",
        slot_rotary=True,
        segment=tokens,
    )
    ours = GRCAttention(
        dim, heads, config, causal=True, bias=False, qk_norm=True, rotary_base=10_000.0
    )
    return ours, RecurrentAttention(dim, heads, bias=False, qk_norm=True)


def _compare(
    name: str, ours: nn.Module, plain: nn.Module, batch: int, rounds: int
) -> list[Comparison]:
    tokens, dim = int(name.split(" x ")[1]), ours.dim
    x = torch.randn(batch, tokens, int(dim), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, state = ours(x)  # a segment in the middle of a stream, not the first
    comparisons = []
    for what, backward in (("forward", False), ("forward and backward", True)):
        own, peer = _pass(ours, x, state, backward), _pass(plain, x, None, backward)
        taken = race({"own": repeated(own), "peer": repeated(peer)}, rounds, warmup=0)
        comparisons.append(
            Comparison(
                name=f"{what}, {name}",
                contestant="GRC layer",
                peer="plain attention layer",
                values=taken["own"],
                peer_values=taken["peer"],
                expected=_macs(own) / _macs(peer),
                at_most=AT_MOST,
            )
        )
    comparisons.append(
        Comparison(
            name=f"kept for backward, {name}",
            contestant="GRC layer",
            peer="plain attention layer",
            values=(_kept(ours, x, state),),
            peer_values=(_kept(plain, x, None),),
            unit="bytes",
        )
    )
    return comparisons


def _pass(
    layer: nn.Module, x: Tensor, state: AttentionState | None, backward: bool
) -> Callable[[], None]:
    def run() -> None:
        source = x.detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            y, new = layer(source, state)
            if backward:
                # The next segment reads the new cache, so it has a gradient as well.
                total = y.sum()
                if new.memory is not None and new.memory.requires_grad:
                    total = total + new.memory.sum()
                total.backward()

    return run


def _macs(function: Callable[[], None]) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


def _kept(layer: nn.Module, x: Tensor, state: AttentionState | None) -> float:
    """Bytes of activations that the forward pass keeps, each storage once; no parameters."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x.detach().requires_grad_(), state)
    return float(sum(kept.values()))
