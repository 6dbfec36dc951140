"""What a training step keeps for its backward pass, by what is trained: plain PyTorch against ours.

Bytes are those of `zoo.tuning.memory.graph_bytes`, of networks with random weights on random data;
both are the same on every machine.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from zoo import _card_tables
from zoo.errors import UnknownNameError, nearest
from zoo.families.cached_transformers import CachedTransformerLM, CachedTransformerLMConfig
from zoo.families.continuous_depth.image_networks import ODEResNet, ODEResNetConfig
from zoo.families.dselect_k import RecommenderConfig, RecommenderNet
from zoo.families.online_ensemble.encoders import (
    EncoderConfig,
    EncoderNetwork,
    EncoderNetworkConfig,
)
from zoo.families.sau_shufflenet import Activation, ShuffleNetConfig, ShuffleNetV2
from zoo.tuning.freezing import freeze, unfreeze
from zoo.tuning.lora import adaptable_layers, add_lora
from zoo.tuning.memory import checkpoint_blocks, graph_bytes, save_memory

__all__ = [
    "NETWORKS",
    "POLICIES",
    "Policy",
    "Row",
    "apply_policy",
    "markdown",
    "measure",
    "rows",
    "update_readme",
]

Policy = Literal[
    "all", "input", "first layers", "last layers", "norms", "biases", "LoRA", "LoRA-FA"
]
POLICIES: dict[Policy, str] = {
    "all": "every parameter, in training mode",
    "input": "a gradient for the input alone",
    "first layers": "the stem and the first stage or block",
    "last layers": "the last stage or block and the head",
    "norms": "what norms scale and shift by, with statistics of the batch",
    "biases": "every bias, those of norms included",
    "LoRA": "adapters of rank 4 on linear layers and 1x1 convolutions",
    "LoRA-FA": "the outer matrices of such adapters",
}
"""What is trained. The rest is frozen, and BatchNorm with it in eval mode, except under "norms"."""

RANK = 4
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MISSING: dict[Policy, str] = {
    "input": "inputs are numbers of tokens or of users",
    "norms": "it has no norms that scale or shift",
    "biases": "it has no biases",
    "first layers": "all of its layers but the head are one block",
    "LoRA": "it has no linear layers or 1x1 convolutions",
    "LoRA-FA": "it has no linear layers or 1x1 convolutions",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One network under one policy.

    Attributes:
        network: name in `NETWORKS`.
        policy: what is trained.
        trained: number of parameters that are.
        plain: bytes kept by plain PyTorch.
        saved: bytes kept after `save_memory`.
        recomputed: bytes kept when blocks, or steps of an ODE, are computed again as well; None
            where there are none.
        left_out: why this policy makes no sense here; None where it does.
    """

    network: str
    policy: Policy
    trained: int = 0
    plain: int = 0
    saved: int = 0
    recomputed: int | None = None
    left_out: str | None = None

    @property
    def ratio(self) -> float:
        """Bytes kept over those of plain PyTorch; 1 where there are none."""
        return self.saved / self.plain if self.plain else 1.0


class _Classifier(nn.Module):
    """An encoder under its head, as it is trained."""

    def __init__(self, network: EncoderNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """B x C x H x W images to logits."""
        return self.network.classify(images)

    def group_matcher(self) -> dict[str, str]:
        """As of the network."""
        return {end: f"^network.{rx[1:]}" for end, rx in self.network.group_matcher().items()}


def _shufflenet(
    activation: Activation, stem: Literal["small", "large"], size: int
) -> tuple[nn.Module, Any]:
    config = ShuffleNetConfig(activation=activation, stem=stem)
    return ShuffleNetV2(config), torch.randn(8, 3, size, size)


def _ode_resnet() -> tuple[nn.Module, Any]:
    return ODEResNet(ODEResNetConfig(body_from=0)), torch.randn(8, 1, 28, 28)


def _language_model() -> tuple[nn.Module, Any]:
    config = CachedTransformerLMConfig()
    tokens = torch.randint(config.vocab_size, (1, 2 * config.segment))
    return CachedTransformerLM(config), tokens


def _recommender() -> tuple[nn.Module, Any]:
    config = RecommenderConfig()
    batch = tuple(torch.randint(n, (256,)) for n in (config.num_users, config.num_items))
    return RecommenderNet(config), batch


def _encoder() -> tuple[nn.Module, Any]:
    encoder = EncoderConfig(kind="conv", dim=256)
    network = EncoderNetwork(EncoderNetworkConfig(encoder=encoder, num_classes=10))
    return _Classifier(network), torch.randn(8, 1, 28, 28)


NETWORKS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Any]]]] = {
    "sau-shufflenet-v2-x1": (
        "8 images of 3 x 32 x 32, SAU",
        lambda: _shufflenet("sau-2", "small", 32),
    ),
    "relu-shufflenet-v2-x1": (
        "8 images of 3 x 128 x 128, ReLU, the stem for large images",
        lambda: _shufflenet("relu", "large", 128),
    ),
    "ode-resnet": ("8 images of 1 x 28 x 28, two ODEs of 4 evaluations each", _ode_resnet),
    "cached-transformer-lm": ("one text of two segments of 256 bytes", _language_model),
    "dselect-k-recommender": ("256 users and items", _recommender),
    "online-ensemble-encoder": (
        "8 images of 1 x 28 x 28; in a stream the encoder is frozen and keeps nothing",
        _encoder,
    ),
}
"""Architectures, and the first of the ReLU controls, with what their batch is and what makes both.
The ensembles themselves learn in closed form or by a rule of their own."""


def measure(names: Sequence[str] = ()) -> Iterator[Row]:
    """Bytes of networks under each policy.

    Args:
        names: of `NETWORKS`; none: all of them.

    Yields:
        A row for each network and policy, those that make no sense included.

    Raises:
        UnknownNameError: a name is none of them.
    """
    for name in names:
        if name not in NETWORKS:
            hint = nearest(name, NETWORKS) or f" There are: {', '.join(NETWORKS)}."
            raise UnknownNameError(f"No network {name!r} in the table of memory.{hint}")
    for name in names or NETWORKS:
        for policy in get_args(Policy):
            yield _measure(name, policy)


def _measure(name: str, policy: Policy) -> Row:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, batch = NETWORKS[name][1]()
        batch = apply_policy(network, batch, policy)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        if batch is None:
            return Row(network=name, policy=policy, left_out=_MISSING[policy])
        plain = graph_bytes(network, batch)
        save_memory(network)
        saved = graph_bytes(network, batch)
        recomputed = None
        if isinstance(network, CachedTransformerLM):
            checkpoint_blocks(network)
            recomputed = graph_bytes(network, batch)
        elif isinstance(network, ODEResNet):
            network.gradient_mode = "checkpoint"
            recomputed = graph_bytes(network, batch)
    return Row(
        network=name,
        policy=policy,
        trained=trained,
        plain=plain,
        saved=saved,
        recomputed=recomputed,
    )


def apply_policy(network: nn.Module, batch: Any, policy: Policy) -> Any:
    """Freeze a network by a policy, in place.

    Args:
        network: a network of the zoo.
        batch: what it takes.
        policy: one of `POLICIES`.

    Returns:
        The batch, with a gradient where the policy asks for one; None where the policy makes no
        sense for the network.
    """
    network.train()
    if policy == "all":
        return batch
    if policy in ("LoRA", "LoRA-FA"):
        if not adaptable_layers(network):
            return None
        add_lora(network, rank=RANK, variant="lora" if policy == "LoRA" else "lora-fa")
        return batch
    freeze(network, "*")
    if policy == "input":
        floating = isinstance(batch, Tensor) and batch.is_floating_point()
        return batch.requires_grad_() if floating else None
    names = _chosen(network, policy)
    if not names:
        return None
    if policy == "norms":
        # All that is in a norm, statistics included.
        names = sorted({f"{name.rpartition('.')[0]}.*" for name in names})
        unfreeze(network, names)
        network.train()
        return batch
    if policy == "biases":
        for name in names:
            network.get_parameter(name).requires_grad_()
        return batch
    unfreeze(network, _with_statistics(network, names))
    network.train()
    return batch


def _chosen(network: nn.Module, policy: Policy) -> list[str]:
    """Names of the parameters that a policy trains."""
    parameters = [name for name, _ in network.named_parameters()]
    if policy == "biases":
        return [name for name in parameters if name.endswith("bias")]
    if policy == "norms":
        return [
            f"{path}.{name}"
            for path, module in network.named_modules()
            if isinstance(module, _NORMS)
            for name, _ in module.named_parameters()
        ]
    matcher = network.group_matcher()  # type: ignore[operator]
    stage = {name: _stage(matcher.get("blocks", "$^"), name) for name in parameters}
    stages = sorted({index for index in stage.values() if index is not None})
    if policy == "first layers" and len(stages) < 2:
        return []
    end, edge = ("stem", 0) if policy == "first layers" else ("head", -1)
    return [
        name
        for name in parameters
        if re.match(matcher[end], name) or (len(stages) > 1 and stage[name] == stages[edge])
    ]


def _stage(pattern: str, name: str) -> int | None:
    found = re.match(pattern, name)
    if found is None:
        return None
    return int(found.group(1)) if found.groups() else 0


def _with_statistics(network: nn.Module, parameters: Sequence[str]) -> list[str]:
    """The parameters, and the buffers that are beside one of them."""
    owners = {name.rpartition(".")[0] for name in parameters}
    buffers = [n for n, _ in network.named_buffers() if n.rpartition(".")[0] in owners]
    return [*parameters, *buffers]


def rows(measured: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table of what was measured."""
    header = [
        "network",
        "trained",
        "parameters",
        "plain MiB",
        "ours MiB",
        "ratio",
        "recomputed MiB",
    ]
    cells = []
    for row in measured:
        if row.left_out is not None:
            cells.append([row.network, row.policy, "-", "-", "-", "-", f"- ({row.left_out})"])
            continue
        cells.append(
            [
                row.network,
                row.policy,
                f"{row.trained:,}",
                f"{row.plain / 2**20:.2f}",
                f"{row.saved / 2**20:.2f}",
                f"{row.ratio:.2f}",
                "-" if row.recomputed is None else f"{row.recomputed / 2**20:.2f}",
            ]
        )
    return header, cells


def markdown(measured: Sequence[Row]) -> str:
    """A table with a line for each policy and a column for each network."""
    found = {(row.network, row.policy): row for row in measured}
    networks = list(dict.fromkeys(row.network for row in measured))
    policies = list(dict.fromkeys(row.policy for row in measured))
    return _card_tables.table(
        ["trained", *(f"`{network}`" for network in networks)],
        [[policy, *(_cell(found[name, policy]) for name in networks)] for policy in policies],
    )


def _cell(row: Row) -> str:
    if row.left_out is not None:
        return "-"
    again = "" if row.recomputed is None else f", recomputed {row.recomputed / 2**20:.2f}"
    return f"{row.plain / 2**20:.2f} to {row.saved / 2**20:.2f} ({row.ratio:.2f}){again}"


def update_readme(path: Path, measured: Sequence[Row]) -> None:
    """Write the table into a README, between its markers `zoo:memory`.

    Raises:
        ConfigError: it lacks the markers.
    """
    _card_tables.fill_file(path, "memory", markdown(measured))
