"""What a mixture of experts costs once its gate is sparse, over computing all of them.

Sixteen experts of one layer, two of which each example uses; at most a sixth of the dense time.
Convolutional experts, all in use, against grouped convolutions, which is how one would write them.
torch-rechub's MMoE and LibMTL's DSelect-k, whose gates see the example and which computes all
experts, take part where they are installed, and are to be no faster.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks._harness import Comparison, race, repeated
from zoo.families.dselect_k import (
    ConvExperts,
    DSelectK,
    MixtureOfExperts,
    MLPExperts,
    SoftmaxGate,
    Towers,
    mix,
)

ROUNDS = 15
AT_MOST = 1 / 6
AT_MOST_OF_PEER = 1.0

EXPERTS, ACTIVE, WIDTH = 16, 2, 256
BATCHES = (512, 4096)
THREADS = (1, 2)


def run(rounds: int) -> list[Comparison]:
    """Each batch and number of threads, forward alone and with backward; then the peer."""
    comparisons = []
    before = torch.get_num_threads()
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            for batch in BATCHES:
                comparisons += _dispatch(batch, threads, rounds)
    finally:
        torch.set_num_threads(before)
    comparisons += _convolutional(rounds)
    return comparisons + _against_rechub(rounds) + _against_libmtl(rounds)


def _dispatch(batch: int, threads: int, rounds: int) -> list[Comparison]:
    generator = torch.Generator().manual_seed(0)
    experts = MLPExperts(EXPERTS, WIDTH, (WIDTH,))
    x = torch.randn(batch, WIDTH, generator=generator)
    weights = torch.zeros(batch, 1, EXPERTS)
    chosen = torch.rand(batch, EXPERTS, generator=generator).topk(ACTIVE).indices
    weights[:, 0].scatter_(1, chosen, 1 / ACTIVE)
    comparisons = []
    for what, backward in (("forward", False), ("forward and backward", True)):
        taken = race(
            {
                way: repeated(
                    _pass(lambda x, w, way=way: mix(experts, x, w, way), x, weights, backward)
                )
                for way in ("sparse", "dense")
            },
            rounds,
        )
        comparisons.append(
            Comparison(
                name=f"{what}, batch {batch}, {EXPERTS} experts of {WIDTH}, {ACTIVE} in use, "
                f"{threads} thread{'s' * (threads > 1)}",
                contestant="sorted dispatch",
                peer="all experts in one product",
                values=taken["sparse"],
                peer_values=taken["dense"],
                at_most=AT_MOST,
            )
        )
    return comparisons


def _convolutional(rounds: int, batch: int = 256, count: int = 8) -> list[Comparison]:
    experts = ConvExperts(count, 1, 36)
    images = torch.randn(batch, 1, 36, 36, generator=torch.Generator().manual_seed(0))

    def grouped(x: Tensor) -> Tensor:
        groups = 1
        for layer in experts.convolutions:
            kernels = layer.weight.view(-1, layer.in_features // 25, 5, 5)  # type: ignore[operator, union-attr]
            x = F.conv2d(x, kernels, layer.bias.flatten(), groups=groups)  # type: ignore[operator, union-attr]
            x, groups = F.relu(F.max_pool2d(x, 2)), count
        features: Tensor = experts.dense(x.view(batch, count, -1))
        return features

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: function(images).sum().backward()

    taken = race({"ours": repeated(step(experts)), "grouped": repeated(step(grouped))}, rounds)
    return [
        Comparison(
            name=f"training, batch {batch}, {count} convolutional experts, all in use",
            contestant="a convolution for each, channels last",
            peer="grouped convolutions",
            values=taken["ours"],
            peer_values=taken["grouped"],
            at_most=AT_MOST_OF_PEER,
        )
    ]


def _pass(
    function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Tensor, backward: bool
) -> Callable[[], None]:
    def run() -> None:
        source, mixture = (t.detach().requires_grad_(backward) for t in (x, weights))
        with torch.set_grad_enabled(backward):
            y = function(source, mixture)
            if backward:
                y.backward(torch.ones_like(y))

    return run


class _Net(nn.Module):
    """Ours in the shape of the peer: experts, one gate and one tower per task."""

    def __init__(self, gate: nn.Module, tasks: int) -> None:
        super().__init__()
        experts = MLPExperts(EXPERTS, WIDTH, (WIDTH,))
        self.moe = MixtureOfExperts(experts, gate)  # type: ignore[arg-type]
        self.towers = Towers(tasks, WIDTH, (64,), 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.towers(self.moe(x, x).features).squeeze(-1).sigmoid()
        return outputs


def _against_rechub(rounds: int, batch: int = 512, tasks: int = 2) -> list[Comparison]:
    if importlib.util.find_spec("torch_rechub") is None:
        return []
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.multi_task import MMOE

    features = [DenseFeature("x", embed_dim=WIDTH)]
    expert = {"dims": [WIDTH], "activation": "relu", "dropout": 0.0}
    tower = {"dims": [64], "activation": "relu", "dropout": 0.0}
    peer = MMOE(features, ["classification"] * tasks, EXPERTS, expert, [tower] * tasks)
    softmax = _Net(SoftmaxGate(EXPERTS, num_tasks=tasks, in_features=WIDTH), tasks)
    gate = DSelectK(EXPERTS, ACTIVE, num_tasks=tasks)
    with torch.no_grad():
        gate.codes.bias.copy_(gate.gamma * gate.codes.bias.sign())  # as training leaves it
    ours = {
        "softmax gates, all experts": softmax,
        "DSelect-k, converged static gates": _Net(gate, tasks),
    }
    return _against("torch-rechub MMOE", peer, lambda x: peer({"x": x}), ours, rounds, batch, tasks)


def _against_libmtl(rounds: int, batch: int = 512, tasks: int = 2) -> list[Comparison]:
    if importlib.util.find_spec("LibMTL") is None:
        return []
    # Its encoders want a module that torchvision no longer has.
    gone = types.ModuleType("torchvision.models.utils")
    vars(gone)["load_state_dict_from_url"] = torch.hub.load_state_dict_from_url
    sys.modules.setdefault(gone.__name__, gone)
    from LibMTL.architecture import DSelect_k

    names = [f"task {task}" for task in range(tasks)]
    towers = {
        name: nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
        for name in names
    }
    peer = DSelect_k(
        names,
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
        nn.ModuleDict(towers),
        rep_grad=False,
        multi_input=False,
        device=torch.device("cpu"),
        img_size=[WIDTH],
        num_experts=[EXPERTS],
        num_nonzeros=ACTIVE,
        kgamma=1.0,
    )
    gate = DSelectK(EXPERTS, ACTIVE, num_tasks=tasks, in_features=WIDTH)
    with torch.no_grad():  # bits that are decided, as training leaves them
        gate.codes.weight.mul_(1e4)
        for layer in peer._z_logits.values():
            layer.weight.mul_(1e4)
    ours = {"DSelect-k, converged gates per example": _Net(gate, tasks)}

    def joined(x: Tensor) -> Tensor:
        outputs: dict[str, Tensor] = peer(x)
        return torch.stack(list(outputs.values()))

    return _against("LibMTL DSelect_k", peer, joined, ours, rounds, batch, tasks)


def _against(
    peer_name: str,
    peer: nn.Module,
    peer_outputs: Callable[[Tensor], Tensor],
    ours: dict[str, nn.Module],
    rounds: int,
    batch: int,
    tasks: int,
) -> list[Comparison]:
    """Nets of ours and a peer's, which take turns, forward alone and in training."""
    x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(0))
    comparisons = []
    for what, backward in (("inference", False), ("training", True)):

        def step(
            outputs: Callable[[Tensor], Tensor], backward: bool = backward
        ) -> Callable[[], None]:
            def run() -> None:
                with torch.set_grad_enabled(backward):
                    y = outputs(x)
                    if backward:
                        y.sum().backward()

            return run

        for module in (peer, *ours.values()):
            module.train(backward)
        taken = race(
            {
                peer_name: repeated(step(peer_outputs)),
                **{name: repeated(step(net)) for name, net in ours.items()},
            },
            rounds,
        )
        comparisons += [
            Comparison(
                name=f"{what}, batch {batch}, {EXPERTS} experts of {WIDTH}, {tasks} tasks",
                contestant=name,
                peer=peer_name,
                values=taken[name],
                peer_values=taken[peer_name],
                at_most=AT_MOST_OF_PEER,
            )
            for name in ours
        ]
    return comparisons
