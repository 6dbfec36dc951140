"""Tests of parameter groups: against the learning rates written down by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.test_models import BUILT_IN, shrunk
from zoo.families.cached_transformers import CachedTransformerLM, CachedTransformerLMConfig
from zoo.tasks.optimization import OptimizerConfig, build_optimizer
from zoo.tuning.freezing import freeze
from zoo.tuning.groups import parameter_groups
from zoo.tuning.lora import add_lora


def lm(depth: int = 2) -> CachedTransformerLM:
    config = CachedTransformerLMConfig(dim=16, depth=depth, num_heads=2, memory="none")
    return CachedTransformerLM(config)


def rates(network: nn.Module, groups: Any) -> dict[str, tuple[float, float]]:
    """Parameter -> its learning rate and decay."""
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = network.named_parameters()
    return {name: found[id(p)] for name, p in named if id(p) in found}


def test_a_transformer_by_hand() -> None:
    network = lm()
    found = rates(network, parameter_groups(network, lr=0.1, weight_decay=0.3, layer_decay=0.5))
    depths = {"embedding": 0, "blocks.0": 1, "blocks.1": 2, "norm": 3, "head": 3}
    assert found.keys() == dict(network.named_parameters()).keys()
    for name, parameter in network.named_parameters():
        (depth,) = [d for prefix, d in depths.items() if name.startswith(f"{prefix}.")]
        decays = parameter.ndim >= 2 and not name.startswith("embedding")
        assert found[name] == (pytest.approx(0.1 * 0.5 ** (3 - depth)), 0.3 * decays), name


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_network_of_the_zoo_describes_its_groups(name: str) -> None:
    network: Any = shrunk(name).network
    groups = parameter_groups(network, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    found = rates(network, groups)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert found.keys() == trained
    # Of what is solved in closed form, behind a frozen encoder, nothing is trained.
    assert max((lr for lr, _ in found.values()), default=1.0) == 1.0
    exempt = network.no_weight_decay()
    for parameter, (lr, decay) in found.items():
        assert lr in [0.5**k for k in range(40)]
        assert decay == 0.0 or parameter not in exempt
    assert all(found[p][0] == 1.0 for p in found if p.startswith("head."))


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_the_schedule_scales_every_group(optimizer: Any) -> None:
    network = lm()
    config = OptimizerConfig(
        name=optimizer, lr=0.1, layer_decay=0.5, schedule="linear", warmup_steps=0
    )
    built = build_optimizer(network, config, total_steps=10)
    found = rates(network, built["optimizer"].param_groups)
    assert found["head.weight"][0] == pytest.approx(0.1)
    assert found["embedding.weight"][0] == pytest.approx(0.1 / 8)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(5):
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    halved = rates(network, built["optimizer"].param_groups)
    assert {n: pytest.approx(lr / 2) for n, (lr, _) in found.items()} == {
        n: lr for n, (lr, _) in halved.items()
    }


def test_without_layer_decay_all_learn_alike() -> None:
    network = lm()
    built = build_optimizer(network, OptimizerConfig(lr=0.1, warmup_steps=0), 10)
    assert {lr for lr, _ in rates(network, built["optimizer"].param_groups).values()} == {0.1}


def test_what_is_frozen_is_in_no_group() -> None:
    network = lm()
    freeze(network, ["embedding", "blocks.0"])
    found = rates(network, parameter_groups(network, lr=1.0, weight_decay=0.1, layer_decay=0.5))
    assert {name.split(".")[0] for name in found} == {"blocks", "norm", "head"}
    assert not any(name.startswith("blocks.0") for name in found)
    assert found["blocks.1.mlp_in.weight"][0] == 0.5, "depth is counted with what is frozen"


def test_adapters_learn_as_their_layers_would() -> None:
    network = lm()
    add_lora(network, rank=2, target="qkv")
    found = rates(network, parameter_groups(network, lr=1.0, weight_decay=0.1, layer_decay=0.5))
    assert {name: lr for name, (lr, _) in found.items()} == {
        f"blocks.{i}.attention.attention.qkv.lora_{part}": 0.5 ** (2 - i)
        for i in range(2)
        for part in "ab"
    }


@pytest.mark.parametrize("factor", [0.0, -0.5, 1.5])
def test_a_factor_out_of_range(factor: float) -> None:
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], or null, got"):
        OptimizerConfig(layer_decay=factor)
