"""Tests of the table of memory: what each policy trains, what it leaves out, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from tests.tiny import run
from zoo import memory_table
from zoo.families.dselect_k import RecommenderConfig, RecommenderNet
from zoo.families.sau_shufflenet import ShuffleNetConfig, ShuffleNetV2
from zoo.memory_table import NETWORKS, POLICIES, Policy, apply_policy, measure


def networks() -> dict[str, tuple[nn.Module, Any]]:
    """Of each family, as small as it gets."""
    shufflenet = ShuffleNetV2(ShuffleNetConfig(width=0.5, activation="relu", num_classes=7))
    recommender = RecommenderNet(
        RecommenderConfig(num_users=9, num_items=9, embedding_dim=4, expert_widths=(8,))
    )
    users = torch.arange(9)
    return {
        "shufflenet": (shufflenet, torch.randn(1, 3, 16, 16)),
        "recommender": (recommender, (users, users)),
    }


def trained(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


def test_every_policy_has_a_line() -> None:
    assert tuple(POLICIES) == get_args(Policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_policy_trains(policy: Policy) -> None:
    network, batch = networks()["shufflenet"]
    names = {name for name, _ in network.named_parameters()}
    batch = apply_policy(network, batch, policy)
    network(batch).sum().backward()
    norms = {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    in_norms = {f"{path}.{name}" for path in norms for name in ("weight", "bias")}
    training = {path for path, norm in norms.items() if norm.training}
    stem = {name for name in names if name.startswith("stem.")}
    expected = {
        "all": names,
        "input": set(),
        "first layers": stem | {name for name in names if name.startswith("stages.0.")},
        "last layers": {n for n in names if n.startswith(("stages.2.", "last.", "head."))},
        "norms": in_norms,
        "biases": {name for name in names if name.endswith("bias")},
    }
    if policy in expected:
        assert trained(network) == expected[policy]
        moving = {
            "all": norms.keys(),
            "norms": norms.keys(),
            "first layers": {path for path in norms if path.startswith(("stem", "stages.0"))},
            "last layers": {path for path in norms if path.startswith(("stages.2", "last"))},
        }
        assert training == moving.get(policy, set())
    else:
        parts = {name.rpartition(".")[2] for name in trained(network)}
        assert parts == ({"lora_a", "lora_b"} if policy == "LoRA" else {"lora_b"})
        assert not training
    assert batch.requires_grad == (policy == "input")
    assert (batch.grad is not None) == (policy == "input")
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_what_makes_no_sense_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "small", ("9 users and items", lambda: networks()["recommender"]))
    measured = {row.policy: row for row in measure(["small"])}
    assert list(measured) == list(POLICIES)
    left_out = {policy: row.left_out for policy, row in measured.items() if row.left_out}
    assert left_out == {
        "input": "inputs are numbers of tokens or of users",
        "first layers": "all of its layers but the head are one block",
        "norms": "it has no norms that scale or shift",
        "LoRA": "it has no linear layers or 1x1 convolutions",
        "LoRA-FA": "it has no linear layers or 1x1 convolutions",
    }
    for policy in measured.keys() - left_out.keys():
        row = measured[policy]
        assert 0 < row.saved <= row.plain, policy
        assert row.trained > 0
        assert row.recomputed is None
    header, cells = memory_table.rows(list(measured.values()))
    assert all(len(line) == len(header) for line in cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_never_more_than_plain(name: str) -> None:
    rows = [row for row in measure([name]) if row.left_out is None]
    assert {"all", "last layers", "biases"} <= {row.policy for row in rows}
    for row in rows:
        assert row.saved <= row.plain, row.policy
        assert row.recomputed is None or row.recomputed <= row.saved, row.policy
    again = list(measure([name]))
    assert [row for row in again if row.left_out is None] == rows


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        memory_table,
        "NETWORKS",
        {"small": ("an image", lambda: networks()["shufflenet"])},
    )
    said = run("memory", "--json")
    assert said.status == 0, said.err
    rows = {row["policy"]: row for row in said.json}
    assert list(rows) == list(POLICIES)
    assert rows["biases"]["ratio"] == rows["biases"]["saved"] / rows["biases"]["plain"] < 0.2
    assert rows["norms"]["ratio"] < 0.6
    shown = run("memory", "small")
    assert shown.out.split()[:6] == ["network", "trained", "parameters", "plain", "MiB", "ours"]
    assert len(shown.out.splitlines()) == 1 + len(POLICIES)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- zoo:memory -->\nold\n<!-- /zoo:memory -->\nafter\n")
    assert run("memory", "--readme", readme).status == 0
    lines = readme.read_text().splitlines()
    assert lines[:3] == ["before", "<!-- zoo:memory -->", "| trained | `small` |"]
    assert lines[-2:] == ["<!-- /zoo:memory -->", "after"]
    assert len(lines) == 6 + len(POLICIES)
    for line, (policy, row) in zip(lines[4:-2], rows.items(), strict=True):
        plain, saved = (row[key] / 2**20 for key in ("plain", "saved"))
        assert line == f"| {policy} | {plain:.2f} to {saved:.2f} ({saved / plain:.2f}) |"
    readme.write_text("no markers")
    assert "expected <!-- zoo:memory -->" in run("memory", "--readme", readme).err
    wrong = run("memory", "smal")
    assert (wrong.status, wrong.out) == (2, "")
    assert wrong.err == ("zoo: No network 'smal' in the table of memory. Did you mean 'small'?\n")
