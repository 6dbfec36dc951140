"""Tests of expert recovery: the data, the matching, and whether gates find the true experts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from zoo import training
from zoo.data.expert_recovery import ExpertRecoveryDataModule
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.dselect_k import GateConfig, RegressionConfig
from zoo.tasks.expert_recovery import ExpertRecovery, match_experts, support_recovery


def test_answers_are_the_formula_written_out() -> None:
    data = ExpertRecoveryDataModule(tasks=5, experts=4, k=2, group=2, features=3, width=2)
    truth, batch = data.truth, data.test
    for row in range(3):
        x = batch.inputs[row].double().numpy()
        for task in range(5):
            expected = 0.0
            for expert in range(4):
                w = truth.expert_weights[expert].double().numpy()
                hidden = np.maximum(w @ x + truth.expert_biases[expert].double().numpy(), 0)
                share = float(truth.mixture[task, expert])
                expected += share * float(truth.heads[task].double().numpy() @ hidden)
            assert float(batch.targets[row, task]) == pytest.approx(expected, abs=1e-5)


@given(
    tasks=st.integers(1, 128),
    experts=st.integers(1, 16),
    group=st.integers(1, 8),
    seed=st.integers(0, 3),
)
def test_tasks_of_a_group_share_k_experts_of_unlike_weights(
    tasks: int, experts: int, group: int, seed: int
) -> None:
    k = min(2, experts)
    data = ExpertRecoveryDataModule(
        tasks=tasks, experts=experts, k=k, group=group, features=2, width=1, seed=seed
    )
    mixture = data.truth.mixture
    assert mixture.shape == (tasks, experts)
    assert ((mixture > 0).sum(1) == k).all()
    torch.testing.assert_close(mixture.sum(1), torch.ones(tasks))
    assert mixture[mixture > 0].min() >= 0.5 / k - 1e-6
    for first in range(0, tasks, group):
        supports = mixture[first : first + group] > 0
        assert (supports == supports[0]).all()


def test_data_are_a_function_of_the_seed_and_tasks_have_variance_one() -> None:
    first, again, other = (ExpertRecoveryDataModule(seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.test.targets, again.test.targets)
    assert not torch.equal(first.test.targets, other.test.targets)
    torch.testing.assert_close(first.test.targets.std(0), torch.ones(8), rtol=0.1, atol=0)
    loader = first.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append(torch.cat([batch.inputs[:1] for batch in loader]))
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    assert len(epochs[0].unique(dim=0)) == first.steps, "every batch is new"
    noisy = first.draw(7, 4000)
    error = noisy.targets - first.truth.answers(noisy.inputs)
    assert float(error.std()) == pytest.approx(first.noise, rel=0.05)


def test_true_experts_that_never_answer_are_refused() -> None:
    """What is the same for all inputs cannot be scaled to a variance of one."""
    options: dict[str, Any] = {"features": 1, "width": 1, "k": 1}
    assert ExpertRecoveryDataModule(**options, seed=1).truth.heads.isfinite().all()
    with pytest.raises(ValueError, match="a task are the same for all inputs with seed 53; take"):
        _ = ExpertRecoveryDataModule(**options, seed=53).truth
    with pytest.raises(ValueError, match=r"tasks must be a whole number, got 2\.5"):
        ExpertRecoveryDataModule(tasks=2.5)  # type: ignore[arg-type]


@given(n=st.integers(1, 6), tasks=st.integers(1, 5), seed=st.integers(0, 10))
def test_matching_is_the_best_of_all_permutations(n: int, tasks: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    estimate, truth = generator.random((2, tasks, n))
    columns = match_experts(estimate, truth)
    assert sorted(columns) == list(range(n))

    def cost(order: tuple[int, ...]) -> float:
        return float(sum(np.abs(estimate[:, i] - truth[:, j]).sum() for i, j in enumerate(order)))

    best = min(cost(order) for order in itertools.permutations(range(n)))
    assert cost(tuple(columns)) == pytest.approx(best)


def test_recovery_is_the_jaccard_index_of_supports() -> None:
    truth = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.3, 0.7, 0], [0, 0, 0.4, 0.6]])
    permuted = truth[:, [2, 0, 3, 1]]
    assert support_recovery(permuted, truth).jaccard.tolist() == [1, 1, 1]
    assert support_recovery(truth, truth, matched=False).jaccard.tolist() == [1, 1, 1]
    estimate = torch.tensor([[1.0, 0, 0, 0], [0, 0.3, 0.6, 0.1], [0.9, 0, 0, 0.1]])
    found = support_recovery(estimate, truth, matched=False)
    assert found.jaccard.tolist() == pytest.approx([1 / 2, 2 / 3, 1 / 3])
    assert found.active.tolist() == [1, 3, 2]
    shared = torch.ones(3, 1)  # one expert for all, which matches the second or the third
    assert support_recovery(shared, truth).jaccard.tolist() in ([0.5, 0.5, 0], [0, 0.5, 0.5])
    tiny = torch.tensor([[0.5, 0.5, 9e-6, 0]])
    assert support_recovery(tiny, truth[:1], matched=False).active.tolist() == [2]


def recipe(folder: Path, **model: Any) -> Path:
    values = {
        "zoo": {"architecture": "dselect-k-recovery", "data": "expert-recovery"},
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "enable_model_summary": False,
        },
        "model": {
            "true_experts": True,
            "network": {
                "in_features": 6,
                "num_tasks": 4,
                "num_experts": 4,
                "expert_width": 3,
                "gate": {"kind": "dselect-k", "k": 2, "entropy": 1e-3},
            },
            "optimizer": {"lr": 0.02, "weight_decay": 0.0, "schedule": "constant"},
            **model,
        },
        "data": {"tasks": 4, "experts": 4, "features": 6, "width": 3, "noise": 0.0, "group": 1},
    }
    path = folder / "recovery.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_gates_find_true_experts_that_are_given(tmp_path: Path) -> None:
    run = training.fit(recipe(tmp_path), ["trainer.max_epochs=4"], out=tmp_path / "run")
    module, data = run.module, run.datamodule
    layer = module.network.moe.experts.layers[0]
    assert torch.equal(layer.weight, data.truth.expert_weights), "kept as they are"
    values = {name: module.measure(data, name) for name in module.protocols}
    assert {name: m.n for name, m in values.items()} == {"error": 8192, "recovery": 4, "active": 4}
    assert values["error"].value < 0.1, "of a variance of 1"
    assert values["recovery"].value > 0.5, "two of four by chance would be 1/3"
    test = data.test
    with torch.no_grad():
        expected = (module.network(test.inputs).outputs - test.targets).square().mean()
    assert values["error"].value == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(module.predict(test.inputs[:2]), module.network(test.inputs[:2])[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.tasks=5"],
            r"num_tasks 5, .* is for 4: set model\.network\.num_tasks=5",
        ),
        (["data.experts=8"], r"set model\.network\.num_experts=8"),
        (["data.width=2"], r"set model\.network\.expert_width=2"),
        (["model.network.gate.per_example=true"], "needs a static gate"),
        (["data.k=9"], "k must be from 1 to the number of experts, 4; got 9"),
        (["data.noise=-1"], "must not be negative, got -1"),
        (["data.noise=.nan"], "noise must be finite, got nan"),
        (["data.tasks=0"], "tasks must be at least 1, got 0"),
    ],
)
def test_bad_input_has_one_clear_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        training.fit(recipe(tmp_path), overrides, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 4), r"^predict takes N x 10 numbers, got \(3, 4\)\.$"),
        (torch.zeros(10), r"^predict takes N x 10 numbers, got \(10,\)\.$"),
        ("abc", r"^Inputs must be numbers, got 'abc'\.$"),
        (None, r"^Inputs must be numbers, got None\.$"),
        ([[1.0] * 10, [1.0] * 9], r"^Inputs must be numbers, got \[\[1\.0, "),
        (torch.full((1, 10), torch.nan), r"^Inputs must be finite in single precision; one is not"),
        ([[1e300] * 10], r"^Inputs must be finite in single precision; one is not"),
    ],
)
def test_inputs_that_are_none_have_one_clear_line(given: Any, message: str) -> None:
    module = ExpertRecovery(RegressionConfig(gate=GateConfig(kind="softmax")))
    with pytest.raises(DataError, match=message):
        module.predict(given)


@pytest.mark.parametrize("changes", [{"tasks": 4}, {"tasks": 1}, {"features": 4}])
def test_data_of_another_shape_are_not_measured(changes: dict[str, int]) -> None:
    """One task would otherwise stand for all, without a word."""
    module = ExpertRecovery(RegressionConfig(gate=GateConfig(kind="softmax")))
    data = ExpertRecoveryDataModule(**changes)
    for one, other in ((module, data), (ExpertRecovery(RegressionConfig(num_tasks=3)), data)):
        for protocol in one.protocols:
            with pytest.raises(
                ConfigError, match=r"but the network is for \d+: set model\.network"
            ):
                one.measure(other, protocol)
    with pytest.raises(ValueError, match="estimate has 1 tasks, but truth has 2"):
        support_recovery(torch.ones(1, 3), torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_single(dtype: torch.dtype) -> None:
    module = ExpertRecovery(RegressionConfig()).eval()
    data = ExpertRecoveryDataModule()
    inputs = data.test.inputs[:50]
    expected = module.predict(inputs), module.measure(data, "error").value
    module.to(dtype)
    found = module.predict(inputs), module.measure(data, "error").value
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert module.measure(data, "active").n == 8


def test_damaged_weights_answer_nothing() -> None:
    module = ExpertRecovery(RegressionConfig()).eval()
    with torch.no_grad():
        module.network.towers.head.weight[3] = torch.nan
    message = "^The model's outputs are not finite"
    with pytest.raises(ZooError, match=message):
        module.predict(torch.zeros(1, 10))
    with pytest.raises(ZooError, match=message):
        module.measure(ExpertRecoveryDataModule(), "error")
    with torch.no_grad():
        module.network.gate.codes.bias[0] = torch.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(ZooError, match=r"^The model's weights of experts are not finite"):
        module.measure(ExpertRecoveryDataModule(), "recovery")
