"""Tests of freezing: what is frozen is the same, bit for bit, after training; the rest is not."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.tiny_images import TinyNet, TinyNetConfig
from zoo.errors import ConfigError
from zoo.families.sau_shufflenet import ShuffleNetConfig, ShuffleNetV2
from zoo.tuning.freezing import freeze, matching, unfreeze

TENSORS = {
    "conv.weight",
    "conv.bias",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
    "head.weight",
    "head.bias",
}


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def train(network: nn.Module, steps: int = 3, size: int = 8) -> None:
    """A training loop as people write it, with weight decay on all parameters."""
    optimizer = torch.optim.AdamW(network.parameters(), 0.1, weight_decay=0.5)
    network.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(
            network(torch.randn(6, 3, size, size)), torch.randint(3, (6,))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    after = network.state_dict()
    assert after.keys() == before.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize(
    ("what", "free"),
    [
        ("encoder", {"head.weight", "head.bias"}),
        (["conv"], TENSORS - {"conv.weight", "conv.bias"}),
        (["norm"], {n for n in TENSORS if not n.startswith("norm")}),
        ("n*m", {n for n in TENSORS if not n.startswith("norm")}),
        (["*.bias", "head"], {n for n in TENSORS if n[-4:] != "bias" and n[:4] != "head"}),
        (["norm.running_mean"], TENSORS - {n for n in TENSORS if "running" in n or "num" in n}),
    ],
)
def test_what_is_frozen_stays_and_the_rest_moves(what: Any, free: set[str]) -> None:
    network = TinyNet(TinyNetConfig())
    names = freeze(network, what, head=("head.weight", "head.bias"))
    assert set(names) <= TENSORS - free
    before = state(network)
    train(network)
    assert changed(network, before) == free


def test_a_head_that_the_network_describes_itself() -> None:
    network = ShuffleNetV2(ShuffleNetConfig(width=0.5, num_classes=3))
    names = set(freeze(network))
    head = {n for n in network.state_dict() if n.startswith(("last", "head"))}
    assert names == network.state_dict().keys() - head
    before = state(network)
    train(network, 1, 16)
    assert changed(network, before) == head


def test_a_network_without_a_head() -> None:
    with pytest.raises(ConfigError) as caught:
        freeze(TinyNet(TinyNetConfig()))
    assert str(caught.value) == (
        "TinyNet does not say what its head is; freeze parts by their names: conv, norm, dropout, "
        "head."
    )


def test_frozen_statistics_are_those_that_normalise_in_training() -> None:
    network = TinyNet(TinyNetConfig())
    network.norm.running_mean.uniform_()
    x = torch.randn(4, 3, 8, 8)
    expected = network.eval().norm(network.conv(x))
    freeze(network, "norm")
    network.train()
    assert network.dropout.training
    assert torch.equal(network.norm(network.conv(x)), expected)


def test_unfreezing_in_mid_training() -> None:
    network = TinyNet(TinyNetConfig())
    freeze(network, "*")
    assert unfreeze(network, "conv") == ("conv.weight", "conv.bias")
    before = state(network)
    train(network)
    assert changed(network, before) == {"conv.weight", "conv.bias"}
    unfreeze(network)
    before = state(network)
    train(network)
    assert changed(network, before) == TENSORS


def test_a_norm_with_one_statistic_unfrozen_keeps_the_other() -> None:
    network = TinyNet(TinyNetConfig())
    freeze(network, "norm")
    unfreeze(network, "norm.running_mean")
    before = state(network)
    train(network)
    assert not {n for n in changed(network, before) if n.startswith("norm")}


def test_freezing_twice_and_a_copy() -> None:
    network = TinyNet(TinyNetConfig())
    freeze(network, "norm")
    freeze(network, "norm")
    copied = copy.deepcopy(network)
    for one in (copied, network):
        before = state(one)
        train(one)
        assert not {n for n in changed(one, before) if n.startswith("norm")}
    unfreeze(network)
    before = state(network)
    train(network)
    assert {"norm.running_mean", "norm.weight"} <= changed(network, before)


class _Task(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNet(TinyNetConfig())

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.1)


def test_under_a_trainer_that_validates_in_between() -> None:
    task = _Task()
    freeze(task, ["network.conv", "network.norm"])
    before = state(task)
    data = [(torch.randn(3, 8, 8), i % 3) for i in range(8)]
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task.train(), DataLoader(data, 4), DataLoader(data, 4))  # type: ignore[arg-type]
    assert changed(task, before) == {"network.head.weight", "network.head.bias"}


def test_names_of_tensors_and_of_parts() -> None:
    network = ShuffleNetV2(ShuffleNetConfig(width=0.5, num_classes=3))
    assert matching(network, "head") == ["head.weight", "head.bias"]
    within = matching(network, "stages.[01]")
    assert within
    assert {name[:8] for name in within} == {"stages.0", "stages.1"}
    buffers = {name for name, _ in network.named_buffers()}
    assert buffers & set(within)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("haed", "Nothing in TinyNet is called 'haed'. Did you mean 'head'"),
        ("nrom.weight", "Nothing in TinyNet is called 'nrom.weight'. Did you mean 'norm.weight'"),
        ("x?", "Nothing in TinyNet is called 'x?'. Its parts are: conv, norm, dropout, head."),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, message: str) -> None:
    network = TinyNet(TinyNetConfig())
    with pytest.raises(ConfigError) as caught:
        freeze(network, ["conv", pattern])
    assert str(caught.value).startswith(message)
    assert all(p.requires_grad for p in network.parameters()), "nothing is frozen by halves"


class _WithTable(nn.Module):
    """A network that holds a buffer itself, beside a part to freeze and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2))
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x * self.table))
        return out


def test_a_buffer_at_the_root_leaves_the_head_in_training() -> None:
    network = _WithTable()
    freeze(network, ["table", "encoder"])
    network.train()
    x = torch.ones(3, 4)
    one, other = network(x), network(x)
    assert not network.training, "its own buffer is frozen"
    assert network.head[0].training
    assert not torch.equal(one, other), "the head's dropout draws"
