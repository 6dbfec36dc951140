"""Tests of adapters: against the formula written out by hand, merged, unmerged, saved alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny_images import TinyNet, TinyNetConfig
from zoo.errors import CheckpointError, ConfigError
from zoo.families.cached_transformers import CachedTransformerLM, CachedTransformerLMConfig
from zoo.families.sau_shufflenet import ShuffleNetConfig, ShuffleNetV2
from zoo.tuning.freezing import unfreeze
from zoo.tuning.lora import (
    adaptable_layers,
    add_lora,
    load_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    save_lora,
    unmerge_lora,
)


def lm(seed: int = 0) -> CachedTransformerLM:
    torch.manual_seed(seed)
    config = CachedTransformerLMConfig()
    import dataclasses

    grc = dataclasses.replace(config.grc, segment=8, slots=4)
    config = dataclasses.replace(config, dim=16, depth=2, num_heads=2, segment=8, grc=grc)
    network = CachedTransformerLM(config)
    with torch.no_grad():
        for parameter in network.parameters():  # some start at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


TOKENS = (torch.arange(40) * 37 % 96).view(2, 20)


def move(network: nn.Module) -> None:
    """What training does to adapters."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(network).values():
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator))


def convolution(kind: str) -> nn.Conv2d:
    options: dict[str, Any] = {"plain": {}, "strided": {"stride": 2}, "padded": {"padding": 1}}
    return nn.Conv2d(5, 7, 1, bias=kind != "strided", **options[kind])


# --- the formula ---------------------------------------------------------------------------------


@given(
    into=st.integers(2, 9),
    out=st.integers(2, 9),
    rank=st.integers(1, 2),
    alpha=st.floats(0.1, 8.0),
    bias=st.booleans(),
)
def test_a_linear_layer_by_hand(into: int, out: int, rank: int, alpha: float, bias: bool) -> None:
    layer = nn.Sequential(nn.Linear(into, out, bias=bias)).double()
    w, b = layer[0].weight.detach().clone(), layer[0].bias
    add_lora(layer, rank=rank, alpha=alpha)
    move(layer)
    x = torch.randn(3, 4, into, dtype=torch.float64, requires_grad=True)
    a, low = layer[0].lora_a, layer[0].lora_b
    assert a.shape == (rank, into)
    expected = torch.einsum("oi,bti->bto", w + alpha / rank * low @ a, x)
    expected = expected if b is None else expected + b
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer[0].weight, w + alpha / rank * low @ a)
    # Gradients by the formula: of B, scale * g (A x)^T; of A, scale * B^T g x^T; of x, W'^T g.
    g = torch.randn(3, 4, out, dtype=torch.float64)
    layer(x).backward(g)
    flat_g, flat_x = g.flatten(0, 1), x.detach().flatten(0, 1)
    torch.testing.assert_close(low.grad, alpha / rank * flat_g.T @ flat_x @ a.detach().T)
    torch.testing.assert_close(a.grad, alpha / rank * low.detach().T @ flat_g.T @ flat_x)
    torch.testing.assert_close(x.grad, g @ layer[0].weight.detach())
    assert layer[0]._parameters["weight"].grad is None


@pytest.mark.parametrize("kind", ["plain", "strided", "padded"])
def test_a_pointwise_convolution_is_a_linear_layer_at_each_place(kind: str) -> None:
    conv = convolution(kind)
    layer = nn.Sequential(copy.deepcopy(conv))
    add_lora(layer, rank=3, alpha=6.0)
    move(layer)
    x = torch.randn(2, 5, 6, 4)
    delta = 2.0 * layer[0].lora_b[:, :, 0, 0] @ layer[0].lora_a[:, :, 0, 0]
    plain = F.conv2d(x, conv.weight + delta[:, :, None, None], conv.bias, conv.stride, conv.padding)
    torch.testing.assert_close(layer(x), plain)


@pytest.mark.parametrize("kind", ["linear", "plain", "strided", "padded"])
def test_it_computes_and_learns_as_peft_does(kind: str) -> None:
    """With the same A and B: output, gradients of A, B and input, and the merged weight."""
    peft = pytest.importorskip("peft")
    layer = nn.Linear(5, 7) if kind == "linear" else convolution(kind)
    ours = nn.Sequential(layer).double()
    theirs = copy.deepcopy(ours)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    peft.inject_adapter_in_model(config, theirs)
    add_lora(ours, rank=3, alpha=6.0)
    move(ours)
    adapter: Any = theirs[0]
    pairs = [
        (ours[0].lora_a, adapter.lora_A["default"].weight),
        (ours[0].lora_b, adapter.lora_B["default"].weight),
    ]
    with torch.no_grad():
        for own, other in pairs:
            assert other.shape == own.shape
            other.copy_(own)
    shape = (2, 4, 5) if kind == "linear" else (2, 5, 6, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    grads = [
        torch.autograd.grad(out, (x, *(pair[index] for pair in pairs)), g)
        for index, out in enumerate((y, expected))
    ]
    torch.testing.assert_close(*grads)
    merge_lora(ours)
    adapter.merge()
    torch.testing.assert_close(ours[0]._parameters["weight"], adapter.get_base_layer().weight)


def test_it_starts_as_peft_does() -> None:
    """B is zero; A is Kaiming-uniform with a = sqrt(5): uniform within 1 / sqrt(fan-in)."""
    layer = nn.Sequential(nn.Linear(400, 300))
    before = copy.deepcopy(layer)
    random = torch.get_rng_state()
    add_lora(layer, rank=64, seed=5)
    assert torch.equal(torch.get_rng_state(), random), "the global source is left alone"
    a = layer[0].lora_a.detach()
    assert float(a.abs().max()) <= 1 / 20
    assert float(a.abs().max()) == pytest.approx(1 / 20, rel=1e-2)
    assert float(a.var()) == pytest.approx(1 / (3 * 400), rel=0.02)
    assert not layer[0].lora_b.any()
    x = torch.randn(2, 400)
    assert torch.equal(layer(x), before(x))
    again, other = copy.deepcopy(before), copy.deepcopy(before)
    add_lora(again, rank=64, seed=5)
    add_lora(other, rank=64, seed=6)
    assert torch.equal(again[0].lora_a, a)
    assert not torch.equal(other[0].lora_a, a)


def test_alpha_is_the_rank_by_default() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    add_lora(layer, rank=4)
    assert layer[0].lora_scale == 1.0


# --- in networks ---------------------------------------------------------------------------------


def test_layers_that_can_have_one() -> None:
    names = adaptable_layers(lm())
    assert {n for n in names if n.startswith("blocks.0")} == {
        "blocks.0.attention.attention.qkv",
        "blocks.0.attention.memory_attention.qkv",
        "blocks.0.attention.out",
        "blocks.0.attention.update.gates",
        "blocks.0.attention.update.candidate",
        "blocks.0.mlp_in",
        "blocks.0.mlp_out",
    }
    assert "embedding" not in names
    network = ShuffleNetV2(ShuffleNetConfig(width=0.5, num_classes=3))
    modules = dict(network.named_modules())
    for name in adaptable_layers(network):
        module = modules[name]
        assert isinstance(module, nn.Linear) or module.kernel_size == (1, 1), name
    pointwise = [m for m in modules.values() if getattr(m, "kernel_size", 0) == (1, 1)]
    assert len(adaptable_layers(network)) == len(pointwise) + 1
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 3), nn.Bilinear(2, 2, 2))
    assert adaptable_layers(grouped) == ()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("qkv", [f"blocks.{i}.attention.{kind}attention.qkv" for i in (0, 1)
                 for kind in ("", "memory_")]),
        (["blocks.1.mlp_in", "head"], ["blocks.1.mlp_in", "head"]),
        ("blocks.0.mlp_*", ["blocks.0.mlp_in", "blocks.0.mlp_out"]),
        (["update"], [f"blocks.{i}.attention.update.{n}" for i in (0, 1)
                      for n in ("gates", "candidate")]),
    ],
)  # fmt: skip
def test_targets(target: Any, expected: list[str]) -> None:
    network = lm()
    assert list(add_lora(network, rank=2, target=target)) == expected
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name in expected for part in "ab"}


def test_names_of_the_network_stay_and_it_says_the_same() -> None:
    network = lm()
    before, logits = network.state_dict(), network(TOKENS)[0]
    add_lora(network, rank=2)
    assert torch.equal(network(TOKENS)[0], logits)
    after = network.state_dict()
    extra = {n for n in after if n.endswith(("lora_a", "lora_b"))}
    assert after.keys() - extra == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)


def test_every_adapter_of_a_transformer_takes_part_and_gets_a_gradient() -> None:
    """Also where the weight is read without calling the layer, as for cached keys and values."""
    network = lm().train()
    add_lora(network, rank=2, target="blocks")
    move(network)
    network(TOKENS)[0].square().mean().backward()
    for name, layer in lora_layers(network).items():
        assert layer.lora_a.grad.abs().max() > 0, name
        assert layer.lora_b.grad.abs().max() > 0, name


@pytest.mark.parametrize("network", [lm(), ShuffleNetV2(ShuffleNetConfig(width=0.5)).eval()])
def test_merging_is_exact_and_can_be_undone(network: nn.Module) -> None:
    text = isinstance(network, CachedTransformerLM)
    x = TOKENS if text else torch.randn(2, network.config.in_channels, 16, 16)  # type: ignore[union-attr]
    outputs = lambda: network(x)[0] if text else network(x)  # noqa: E731
    plain = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    at_first = outputs()
    add_lora(network, rank=2, alpha=0.5)
    move(network)
    adapted = outputs()
    assert not torch.allclose(adapted, at_first, atol=1e-3)
    weights = {name: layer.weight.clone() for name, layer in lora_layers(network).items()}
    merge_lora(network)
    merge_lora(network)
    for name, weight in weights.items():
        assert torch.equal(network.get_parameter(f"{name}.weight"), weight)
    torch.testing.assert_close(outputs(), adapted, rtol=2e-4, atol=2e-5)
    unmerge_lora(network)
    assert torch.equal(outputs(), adapted)
    for name, tensor in plain.items():
        assert torch.equal(network.state_dict()[name], tensor)
    merge_lora(network)
    merged = outputs()
    remove_lora(network)
    assert torch.equal(outputs(), merged)
    assert network.state_dict().keys() == plain.keys()
    assert not lora_layers(network)
    assert {type(m) for m in network.modules()} >= {nn.Linear}


def test_what_is_stored_of_a_merged_network_can_be_loaded_merged_or_not(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(6, 5), nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 4, 1))
    fresh = copy.deepcopy(network)
    add_lora(network, rank=2, alpha=3.0)
    keys = list(network.state_dict())
    move(network)
    x = torch.randn(3, 6)
    unmerged = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    adapted = network(x)
    merge_lora(network)
    merged = network(x)
    torch.testing.assert_close(merged, adapted)
    assert list(network.state_dict()) == keys
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, unmerged[name])
    torch.save(network.state_dict(), tmp_path / "state.pt")

    for assign in (False, True):
        state = torch.load(tmp_path / "state.pt")
        other = copy.deepcopy(fresh)
        add_lora(other, rank=2, alpha=3.0, seed=7)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), adapted), "not merged"
        other = copy.deepcopy(fresh)
        add_lora(other, rank=2, alpha=3.0, seed=8)
        move(other)
        merge_lora(other)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), merged), "merged"
        unmerge_lora(other)
        assert torch.equal(other(x), adapted)
        for name, tensor in state.items():
            assert torch.equal(tensor, unmerged[name]), "what was given stays as it was"
    network.load_state_dict(network.state_dict())
    assert torch.equal(network(x), merged)
    assert network.half().state_dict()["0.weight"].dtype == torch.float16


def test_removing_what_is_not_merged_gives_the_network_back() -> None:
    network = lm()
    logits = network(TOKENS)[0]
    add_lora(network, rank=2)
    move(network)
    remove_lora(network)
    assert torch.equal(network(TOKENS)[0], logits)


def test_training_changes_the_adapters_alone_and_lora_fa_b_alone() -> None:
    for variant in ("lora", "lora-fa"):
        network = TinyNet(TinyNetConfig())
        add_lora(network, rank=2, variant=variant)  # type: ignore[arg-type]
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.5)
        network.train()
        for _ in range(2):
            optimizer.zero_grad()
            network(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        after = network.state_dict()
        changed = {n for n in after if not torch.equal(after[n], before[n])}
        assert changed == {"head.lora_b"} | ({"head.lora_a"} if variant == "lora" else set())


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that the graph keeps, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    held: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in held.values())


def test_what_the_two_variants_keep_for_backward() -> None:
    """LoRA keeps x (n x in) and A x (n x r); LoRA-FA only A x."""
    x, found = torch.randn(50, 64), {}
    for variant in ("lora", "lora-fa"):
        layer = nn.Sequential(nn.Linear(64, 32))
        add_lora(layer, rank=4, variant=variant)  # type: ignore[arg-type]
        found[variant] = kept_bytes(layer, x)
    assert found == {"lora": 4 * 50 * (64 + 4), "lora-fa": 4 * 50 * 4}


def test_half_precision_and_autocast() -> None:
    layer = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    add_lora(layer, rank=2)
    assert layer[0].lora_a.dtype == layer[0].lora_b.dtype == torch.bfloat16
    assert layer(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    full = nn.Sequential(nn.Linear(8, 8))
    add_lora(full, rank=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert full(torch.randn(2, 8)).dtype == torch.bfloat16


def test_a_copy_and_another_type() -> None:
    network = lm()
    add_lora(network, rank=2)
    move(network)
    copied = copy.deepcopy(network).double()
    torch.testing.assert_close(copied(TOKENS)[0].float(), network(TOKENS)[0], rtol=1e-4, atol=1e-5)


# --- files ---------------------------------------------------------------------------------------


def test_saved_alone_and_loaded(tmp_path: Path) -> None:
    network = lm()
    plain = copy.deepcopy(network)
    add_lora(network, rank=2, alpha=6.0, target=["qkv", "mlp_in"])
    move(network)
    unfreeze(network, "head")
    with torch.no_grad():
        network.head.weight.add_(1.0)
    expected = network(TOKENS)[0]
    save_lora(network, tmp_path / "adapter.safetensors", beside=["head.weight"])
    stored = load_file(tmp_path / "adapter.safetensors")
    assert stored.keys() == {
        *(f"{name}.lora_{part}" for name in lora_layers(network) for part in "ab"),
        "head.weight",
    }
    assert load_lora(plain, tmp_path / "adapter.safetensors") == tuple(lora_layers(network))
    assert torch.equal(plain(TOKENS)[0], expected)
    merge_lora(network)
    save_lora(network, tmp_path / "again.safetensors", beside=["head.weight"])
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "adapter.safetensors"
    ).read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.lora_b"), "tensor 'head.lora_b' does not fit this network"),
        (lambda t: t.pop("head.lora_a"), "tensor 'head.lora_"),
        (lambda t: t.update({"head.lora_a": torch.ones(0, 32)}), "tensor 'head.lora_a' does not"),
        (lambda t: t.update({"head.lora_a": torch.tensor(1.0)}), "tensor 'head.lora_a' does not"),
        (lambda t: t.update(x=torch.ones(1)), "tensor 'x' does not fit this network"),
        (lambda t: t.update({"head.lora_a": torch.ones(2, 5)}), "tensor 'head.lora_a' does not"),
        (lambda t: t.update({"head.lora_b": torch.ones(3, 1)}), "tensor 'head.lora_b' does not"),
        (lambda t: t.update({"conv.bias": torch.ones(3)}), "tensor 'conv.bias' does not fit"),
    ],
)
def test_a_file_that_does_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    network = TinyNet(TinyNetConfig())
    add_lora(network, rank=2)
    path = tmp_path / "adapter.safetensors"
    save_lora(network, path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"lora": json.dumps({"variant": "lora", "scales": {"head": 1.0}})})
    fresh = TinyNet(TinyNetConfig())
    with pytest.raises(CheckpointError) as caught:
        load_lora(fresh, path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not lora_layers(fresh)


def test_a_file_for_another_network(tmp_path: Path) -> None:
    network = TinyNet(TinyNetConfig())
    add_lora(network, rank=2)
    save_lora(network, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"an adapter for 'head', which is no layer of this"):
        load_lora(nn.Sequential(nn.Linear(2, 2)), tmp_path / "adapter.safetensors")


def test_the_variant_is_stored(tmp_path: Path) -> None:
    network, path = TinyNet(TinyNetConfig()), tmp_path / "adapter.safetensors"
    add_lora(network, rank=2, variant="lora-fa")
    save_lora(network, path)
    again = TinyNet(TinyNetConfig())
    load_lora(again, path)
    assert lora_layers(again)
    for layer in lora_layers(again).values():
        assert (layer.lora_a.requires_grad, layer.lora_b.requires_grad) == (False, True)
    tensors = load_file(path)
    for variant, scale in (("lora", math.inf), ("x", 1.0)):
        words = {"variant": variant, "scales": {"head": scale}}
        save_file(tensors, path, {"lora": json.dumps(words)})
        with pytest.raises(CheckpointError, match="is no file of adapters"):
            load_lora(TinyNet(TinyNetConfig()), path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"PK\x03\x04", None])
def test_what_is_no_such_file(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no file of adapters"):
        load_lora(TinyNet(TinyNetConfig()), path)
    save_file({"head.lora_a": torch.ones(2, 32)}, path)  # without our words in its header
    with pytest.raises(CheckpointError, match="is no file of adapters"):
        load_lora(TinyNet(TinyNetConfig()), path)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    network = TinyNet(TinyNetConfig())
    with pytest.raises(CheckpointError, match="has no adapters to save"):
        save_lora(network, tmp_path / "x")
    add_lora(network, rank=2)
    with pytest.raises(CheckpointError, match=r"Cannot write .*: No such file or directory"):
        save_lora(network, tmp_path / "no" / "x")


# --- bad input -----------------------------------------------------------------------------------


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (TinyNet(TinyNetConfig()), {"target": "haed"},
         "No layer 'haed' for an adapter. Did you mean 'head'? There are: head."),
        (TinyNet(TinyNetConfig()), {"target": ["head", "q"]},
         "No layer 'q' for an adapter. There are: head."),
        (TinyNet(TinyNetConfig()), {"target": "norm"},
         "'norm' has no linear layers and 1x1 convolutions, which adapters are for. There are: "
         "head."),
        (nn.Sequential(nn.ReLU()), {}, "Sequential has no linear layers and 1x1 convolutions"),
        (TinyNet(TinyNetConfig()), {"rank": 0}, "rank must be an integer of at least 1, got 0"),
        (TinyNet(TinyNetConfig()), {"rank": 2.5}, "rank must be an integer of at least 1, got 2.5"),
        (TinyNet(TinyNetConfig()), {"rank": 4},
         "rank 4 is above the smaller side of head, which is 32 to 3"),
        (TinyNet(TinyNetConfig()), {"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        (TinyNet(TinyNetConfig()), {"alpha": math.inf},
         "alpha must be positive and finite, got inf"),
        (TinyNet(TinyNetConfig()), {"variant": "dora"},
         "adapters must be one of lora, lora-fa, got dora"),
        (_Tied(), {"rank": 1}, "The weight of out is also that of another layer"),
    ],
)  # fmt: skip
def test_bad_input(network: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        add_lora(network, **{"rank": 2, **options})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not lora_layers(network)
    assert all(p.requires_grad for p in network.parameters())


def test_twice() -> None:
    network = TinyNet(TinyNetConfig())
    add_lora(network, rank=2)
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(network, rank=2)
