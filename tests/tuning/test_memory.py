"""Tests of networks that save memory: what they keep, that they learn the same, and what stays."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zoo.families.cached_transformers import CachedTransformerLM, CachedTransformerLMConfig
from zoo.families.cached_transformers.attention import grc_preset
from zoo.families.continuous_depth.image_networks import ODEResNet, ODEResNetConfig
from zoo.families.sau_shufflenet import SAU, ShuffleNetConfig, ShuffleNetV2
from zoo.memory_table import apply_policy
from zoo.tuning.lora import add_lora
from zoo.tuning.memory import (
    checkpoint_blocks,
    graph_bytes,
    restore_memory,
    save_memory,
)
from zoo.tuning.memory.convolutions import SavingConv2d


def shufflenet(activation: Any = "relu") -> ShuffleNetV2:
    return ShuffleNetV2(ShuffleNetConfig(activation=activation, stem="large"))


def small() -> nn.Sequential:
    """Convolutions, norms and ReLUs, of which the first and last convolution share their weight."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 2),
    )
    network[6].weight = network[0].weight
    return network


# --- ratios --------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ours": shufflenet,
    "torchvision's": torchvision.models.shufflenet_v2_x1_0,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_ratios_of_the_paper_s_method_on_shufflenet(name: str) -> None:
    """8 images of 3 x 128 x 128; the figures are of the prototype that the method was chosen by."""
    network = NETWORKS[name]()
    x = torch.randn(8, 3, 128, 128)
    plain: dict[str, int] = {}
    saved: dict[str, int] = {}
    for model, found in ((network, plain), (copy.deepcopy(network), saved)):
        if found is saved:
            save_memory(model)
        model.train().requires_grad_(True)
        found["all"] = graph_bytes(model, x)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(_is_norm(model, parameter_name))
        found["norms"] = graph_bytes(model, x)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.endswith("bias"))
        model.eval()
        found["biases"] = graph_bytes(model, x)
        model.requires_grad_(False)
        found["input"] = graph_bytes(model, x.requires_grad_())
        x = x.detach()
    assert plain["all"] == pytest.approx(49.4 * 2**20, rel=0.02)
    ratio = {policy: saved[policy] / plain[policy] for policy in plain}
    assert ratio["all"] <= 1.0
    assert ratio["norms"] == pytest.approx(0.50, abs=0.01)
    assert ratio["biases"] == pytest.approx(0.11, abs=0.01)
    assert ratio["input"] == pytest.approx(0.11, abs=0.01)


def _is_norm(model: nn.Module, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), nn.BatchNorm2d)


LAYERS = st.sampled_from(
    [
        "conv",
        "1x1",
        "transposed",
        "norm",
        "relu",
        "relu_",
        "leaky",
        "hardtanh_",
        "prelu",
        "sau",
        "max",
        "avg",
        "dropout",
        "group norm",
        "block",
    ]
)


class _Residual(nn.Module):
    """Defined in another order than it is called in, with one ReLU for two places."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y)) + x
        result: Tensor = self.relu(y)
        return result


def _layer(kind: str) -> nn.Module:
    return {
        "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
        "1x1": lambda: nn.Conv2d(4, 4, 1),
        "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
        "norm": lambda: nn.BatchNorm2d(4),
        "relu": lambda: nn.ReLU(),
        "relu_": lambda: nn.ReLU(inplace=True),
        "leaky": lambda: nn.LeakyReLU(),
        "hardtanh_": lambda: nn.Hardtanh(inplace=True),
        "prelu": lambda: nn.PReLU(),
        "sau": lambda: SAU(),
        "max": lambda: nn.MaxPool2d(3, 1, 1),
        "avg": lambda: nn.AvgPool2d(3, 1, 1),
        "dropout": lambda: nn.Dropout(0.5),
        "group norm": lambda: nn.GroupNorm(2, 4),
        "block": lambda: _Residual(),
    }[kind]()


@settings(max_examples=60)
@given(st.lists(LAYERS, min_size=1, max_size=7), st.lists(st.integers(1, 3), max_size=3), st.data())
def test_never_more_than_plain_and_the_same_gradients(
    kinds: list[str], sizes: list[int], data: st.DataObject
) -> None:
    """Any network, cut into parts anywhere, of which anything is frozen or in eval mode."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 1), *(_layer(kind) for kind in kinds)]
    parts, start = [], 0
    for size in sizes:
        parts.append(nn.Sequential(*layers[start : start + size]))
        start += size
    network = nn.Sequential(*parts, *layers[start:], nn.Flatten(), nn.Linear(4 * 36, 2))
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.train(data.draw(st.booleans()))
    for parameter in network.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    network.double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=data.draw(st.booleans()))
    ours = copy.deepcopy(network)
    save_memory(ours)
    # A frozen norm keeps its scale, 4 numbers, also where plain PyTorch keeps nothing of its own:
    # where its input is the batch or is kept by another layer.
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert graph_bytes(ours, x) <= graph_bytes(network, x) + 32 * norms
    expected = _pass(network, x)
    if expected is not None:
        torch.testing.assert_close(_pass(ours, x), expected, rtol=1e-9, atol=1e-9)


def _pass(network: nn.Module, x: Tensor) -> list[Tensor | None] | None:
    """Loss and gradients; None where a layer overwrites what another needs, as torch reports."""
    torch.manual_seed(1)
    loss = network(x).square().sum()
    wanted = [t for t in (x, *network.parameters()) if t.requires_grad]
    try:
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return None
    return [loss.detach(), *grads]


def test_a_mask_only_where_nobody_keeps_the_output() -> None:
    """Of a residual block, both the second convolution and what follows the block count."""
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    plane = 4 * x.numel()
    network = nn.Sequential(_Residual(), nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 1)))
    network.requires_grad_(False).eval()
    save_memory(network)
    scales = 2 * 16
    assert graph_bytes(network, x) == 2 * plane / 4 + scales
    network[1][1].requires_grad_()
    assert graph_bytes(network, x) == 2 * plane + scales, "the ReLU's and the convolution's are one"
    network[1][1].requires_grad_(False)
    network[0].conv2.requires_grad_()
    assert graph_bytes(network, x) == 2 * plane + scales
    network[0].conv2.weight.requires_grad_(False)
    assert graph_bytes(network, x) == 2 * plane / 4 + scales, "a bias needs nothing"


def test_adapters() -> None:
    """LoRA keeps the input of each layer for its inner matrix; LoRA-FA does not."""
    x = torch.randn(2, 4, 6, 6)
    plane = 4 * x.numel()
    for variant, inner in (("lora", 2), ("lora-fa", 0)):
        network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *network)
        add_lora(network, rank=1, target=["1", "3"], variant=variant)  # type: ignore[arg-type]
        save_memory(network)
        low = plane // 4
        expected = plane + 2 * low + (2 * plane if inner else low)
        assert graph_bytes(network, x) == expected, variant


# --- what stays ----------------------------------------------------------------------------------


def test_everything_but_the_class_stays() -> None:
    network = small()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network[1].eval()
    before = {name: (id(p), p._version) for name, p in network.named_parameters()}
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    classes = [type(module) for module in network.modules()]
    report = save_memory(network)
    assert {name: (id(p), p._version) for name, p in network.named_parameters()} == before
    assert [module.training for module in network.modules()] == modes
    assert network[6].weight is network[0].weight
    assert network[2].inplace
    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items())
    assert all(isinstance(m, c) for m, c in zip(network.modules(), classes, strict=True))
    assert (
        str(report)
        == "8 modules save memory (3 Conv2d, 2 ReLU, 1 BatchNorm2d, 1 MaxPool2d, 1 AvgPool2d)"
    )
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(network[0].weight, state["0.weight"])
    again = save_memory(network)
    assert again.converted == report.converted
    report.undo()
    assert [type(module) for module in network.modules()] == classes
    assert "_readers" not in vars(network[2])
    restore_memory(network)
    assert list(network.state_dict()) == list(state)


def test_copies_and_pickles_save_memory_on_their_own() -> None:
    network = small().requires_grad_(False).eval()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    plain = graph_bytes(network, x)
    save_memory(network)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), network(x))
        assert graph_bytes(other, x) == graph_bytes(network, x) < plain
        assert other[2]._readers[0] is other[3]
        other[3].requires_grad_()
        assert graph_bytes(other, x) > graph_bytes(network, x)
        restore_memory(other)
        assert type(other[0]) is nn.Conv2d
        assert type(network[0]) is SavingConv2d


def test_a_copy_of_one_activation_takes_no_other_layers_along() -> None:
    network = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 500, 3), nn.ReLU(), nn.Conv2d(500, 3, 3))
    network.requires_grad_(False).eval()
    save_memory(network)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert len(pickle.dumps(network[0])) < 10_000
    for other in (copy.deepcopy(network[0]), pickle.loads(pickle.dumps(network[0]))):
        assert other._readers is None
        assert torch.equal(other(x), network[0](x))
        # Who reads it is not known: it keeps its output, as the plain one does.
        assert graph_bytes(other, x) == graph_bytes(nn.ReLU(), x)
    assert network[0]._readers == (network[1],)


def test_a_copy_of_a_part_knows_what_is_in_it() -> None:
    first = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU())
    network = nn.Sequential(first, nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))
    save_memory(network)
    part = copy.deepcopy(network[0])
    assert part[0]._readers == (part[1],)
    assert part[2]._readers is None
    whole = copy.deepcopy(network)
    assert whole[0][2]._readers == (whole[1][0],)
    names = {name for module in nn.Sequential(nn.ReLU()).modules() for name in vars(module)}
    for other in (part, whole, network):
        restore_memory(other)
        assert all(set(vars(module)) <= names | set(vars(nn.Conv2d(1, 1, 1))) for module in other)


# --- training ------------------------------------------------------------------------------------


def train(network: nn.Module, change: Callable[[nn.Module], None], steps: int = 12) -> list[float]:
    """Losses; half-way through, what is trained is changed."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        if step == steps // 2:
            change(network)
        x = torch.randn(4, 3, 8, 8, generator=generator)
        target = torch.randint(2, (4,), generator=generator)
        loss = nn.functional.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("mode", "rounding"), [("train", 0.0), ("eval", 1e-4)])
def test_unfreezing_in_mid_training(mode: str, rounding: float) -> None:
    """Loss curves, weights and statistics of a network that learns biases, then everything."""
    curves, networks = [], []
    for saves in (False, True):
        network = small()
        network.train(mode == "train")
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        before = network[0].weight.clone()
        if saves:
            save_memory(network)
        curves.append(train(network, lambda one: one.requires_grad_()))
        assert not torch.equal(network[0].weight, before)
        networks.append(network)
    assert curves[0] == pytest.approx(curves[1], rel=max(rounding, 1e-6))
    for name, tensor in networks[0].state_dict().items():
        other = networks[1].state_dict()[name]
        torch.testing.assert_close(other, tensor, rtol=max(10 * rounding, 1e-5), atol=1e-5)
    assert curves[0][0] > curves[0][-1] or curves[0][0] != curves[0][6]


def test_freezing_in_mid_training() -> None:
    curves = []
    for saves in (False, True):
        network = small()
        if saves:
            save_memory(network)
        curves.append(train(network, lambda one: one[:4].requires_grad_(False) and None))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


# --- the measure ---------------------------------------------------------------------------------


def test_the_measure_leaves_no_trace() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    state = copy.deepcopy(network.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = [graph_bytes(network, x) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert kept[0] == kept[1] > 0
    assert all(torch.equal(t, state[name]) for name, t in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_the_measure_counts_what_is_kept_once() -> None:
    """Closed form: x is the batch, its sine is kept by two products, their sum by nobody."""

    class Network(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            y = x.sin()
            return y * y + y[:2].exp().sum() + scale * x

    x, scale = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    whole, part = 6 * 5 * 4, 2 * 5 * 4
    assert graph_bytes(Network(), {"x": x, "scale": scale}) == whole + part
    assert graph_bytes(Network(), {"x": x.detach(), "scale": scale}) == 0
    assert graph_bytes(nn.Bilinear(2, 2, 2), (x[:, :2], x[:, :2])) == 0


# --- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["norms", "biases", "input"])
def test_an_ode_saves_with_every_evaluation(policy: Any) -> None:
    """Four per block: what is saved grows with them, and recomputation comes on top."""
    config = ODEResNetConfig(widths=(8,), body_from=0)
    x = torch.randn(2, 1, 12, 12)
    kept = {}
    for steps, saves, mode in itertools.product((1, 2), (False, True), ("discrete", "checkpoint")):
        torch.manual_seed(0)
        network = ODEResNet(config)
        network.steps, network.gradient_mode = steps, mode
        batch = apply_policy(network, x.clone(), policy)
        if saves:
            save_memory(network)
        kept[steps, saves, mode] = graph_bytes(network, batch)
    plain, saved = (
        kept[2, saves, "discrete"] - kept[1, saves, "discrete"] for saves in (False, True)
    )
    # Two evaluations more. Of each, plain PyTorch keeps what both norms take and both ReLUs give.
    plane = 2 * 8 * 6 * 6 * 4
    statistics = 2 * 2 * (2 * 8) * 4
    assert plain == pytest.approx(2 * 4 * plane, abs=3 * statistics)
    assert saved == pytest.approx(2 * 2.5 * plane, abs=3 * statistics)
    assert kept[2, True, "checkpoint"] < kept[2, False, "checkpoint"] < kept[2, False, "discrete"]


def language_model() -> CachedTransformerLM:
    torch.manual_seed(0)
    grc = grc_preset(
        "causal-recurrent", slots=4, update_source="input", slot_rotary=True, segment=8
    )
    network = CachedTransformerLM(
        CachedTransformerLMConfig(dim=16, depth=4, num_heads=2, segment=8, grc=grc, dropout=0.1)
    )
    for parameter in network.parameters():  # the head and the branches start at zero
        nn.init.normal_(parameter, std=0.2)
    return network


def test_blocks_that_are_computed_again() -> None:
    network = language_model()
    tokens = torch.randint(256, (2, 24))
    found = []
    for on in (False, True, False):
        assert checkpoint_blocks(network, on) == 1
        torch.manual_seed(1)
        logits, _ = network(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        grads = torch.autograd.grad(loss, list(network.parameters()))
        found.append((graph_bytes(network, tokens), loss.detach(), grads))
    (plain, *expected), (recomputed, *ours), (again, *_) = found
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert again == plain
    assert recomputed < 0.2 * plain
    with pytest.raises(ValueError, match="ShuffleNetV2 has no blocks that can be computed again"):
        checkpoint_blocks(shufflenet())


def test_what_is_optimal_stays_as_it_is() -> None:
    network = language_model()
    report = save_memory(network)
    assert report.converted == {}
    assert str(report) == "0 modules save memory (none)"


def test_measuring_leaves_no_trace_where_the_pass_fails() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 2))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError):
        graph_bytes(network, torch.randn(5, 3) + 4)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
