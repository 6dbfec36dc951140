"""Tests of zoo.tasks.mixtures: what is exported is what the model computes, with fewer experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples import give_preprocessing
from zoo import checkpoints, exporting
from zoo.families.dselect_k import GateConfig, ImagePairConfig, RecommenderConfig
from zoo.tasks.image_pairs import ImagePairClassifier
from zoo.tasks.recommendation import FactorisationRecommender, Recommender


def modules() -> list[Any]:
    return [
        Recommender(RecommenderConfig(num_users=5, num_items=6)),
        Recommender(RecommenderConfig(num_users=5, num_items=6, gate=GateConfig(per_example=True))),
        ImagePairClassifier(ImagePairConfig(size=20, channels=(3,), expert_widths=(4,))),
        FactorisationRecommender(),
    ]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("index", [0, 2])
def test_a_pruned_model_is_saved_and_loaded(index: int, hard: bool, tmp_path: Path) -> None:
    module = modules()[index].eval()
    give_preprocessing(module)
    with torch.no_grad():
        module.network.gate.codes.bias.copy_(module.network.gate.codes.bias.sign())
    inputs = module.exportable(7, torch.Generator().manual_seed(1)).inputs.values()
    with torch.no_grad():
        expected = module.network(*inputs).outputs
    module.network = module.network.pruned(hard=hard)
    checkpoints.save(module, tmp_path / "pruned")
    loaded = checkpoints.load(tmp_path / "pruned")
    kept = loaded.network.moe.experts.num_experts  # type: ignore[union-attr]
    assert kept == loaded.config.num_experts < module.config.num_experts
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(*inputs).outputs, expected)


@pytest.mark.parametrize("index", range(4))
def test_an_exported_model_computes_what_the_model_does(index: int, tmp_path: Path) -> None:
    module = modules()[index].eval()
    give_preprocessing(module)
    gate = getattr(module.network, "gate", None)
    if gate is not None and gate.is_static:
        with torch.no_grad():
            gate.codes.bias.copy_(gate.codes.bias.sign())
    done = exporting.export_module(module, tmp_path / "x", "torch-export")
    assert done.difference <= exporting.TOLERANCE
    example = module.exportable(7, torch.Generator().manual_seed(1))
    (found,) = exporting.run(done.path, "torch-export", example.inputs)
    with torch.no_grad():
        expected = module.network(*example.inputs.values()).outputs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if gate is not None and gate.is_static:
        used = int((gate().weights[0] > 0).any(0).sum())
        kept = example.network.network.network.moe.experts.num_experts  # type: ignore[union-attr]
        assert kept == used < module.config.num_experts
