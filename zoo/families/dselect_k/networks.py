"""Multi-task networks built of a mixture of experts: a recommender, digit pairs, and regression.

Shape notation: B examples, T tasks, n experts, H expert output width, C classes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from zoo.families.dselect_k.experts import (
    ConvExperts,
    Dispatch,
    ExpertBank,
    MixtureOfExperts,
    MLPExperts,
    Towers,
)
from zoo.families.dselect_k.gates import (
    Gate,
    GateConfig,
    GateReport,
    Routing,
    build_gate,
    check_choice,
)

__all__ = [
    "ImagePairConfig",
    "ImagePairNet",
    "MatrixFactorisation",
    "MatrixFactorisationConfig",
    "MultiTaskNet",
    "MultiTaskOutput",
    "RecommenderConfig",
    "RecommenderNet",
    "RegressionConfig",
    "RegressionNet",
]

Task = Literal["watch", "rate"]

_GATE = GateConfig()


class MultiTaskOutput(NamedTuple):
    """What a network says to each task, and how its experts were mixed."""

    outputs: Tensor
    """B x T, or B x T x C."""
    routing: Routing


Net = TypeVar("Net", bound="MultiTaskNet")


def _check_tasks(tasks: Sequence[Task]) -> None:
    if isinstance(tasks, str):
        raise ValueError(f"tasks must be a tuple of names, got {tasks!r}")
    if not tasks:
        raise ValueError("tasks is empty; choose from 'watch' and 'rate'")
    for task in tasks:
        check_choice("a task", task, Task)
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks has one of them twice: {list(tasks)}")


def _check_positive(config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        for number in value if isinstance(value, tuple) else (value,):
            if number < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")


def _check_dropout(dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def _check_pairs(users: Tensor, items: Tensor) -> None:
    # The sizes of a compiled or exported graph are symbols; its products compare them.
    if not torch.compiler.is_compiling() and users.shape != items.shape:
        raise ValueError(
            f"users and items must be as many, got shapes {tuple(users.shape)} and "
            f"{tuple(items.shape)}"
        )


def _check_ids(what: str, ids: Tensor, count: int) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{what} numbers must be int64 or int32, got {ids.dtype}")
    # On an accelerator the look would cost a synchronisation, and the kernel asserts by itself;
    # in a compiled or exported graph it would be a break.
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= count:
        raise ValueError(f"{what} numbers go from 0 to {count - 1}, got {low} to {high}")


class MultiTaskNet(nn.Module):
    """Base of the networks: experts that all tasks share, one gate and one tower per task."""

    moe: MixtureOfExperts
    towers: Towers

    def _build(
        self, experts: ExpertBank, gate: Gate, widths: tuple[int, ...], outputs: int, dropout: float
    ) -> None:
        self.moe = MixtureOfExperts(experts, gate)
        self.towers = Towers(gate.num_tasks, experts.out_features, widths, outputs, dropout)

    @property
    def gate(self) -> Gate:
        """The gates of all tasks."""
        return self.moe.gate

    def gate_input(self, *inputs: Tensor) -> Tensor:
        """What a per-example gate sees, B x p, of what `forward` takes."""
        raise NotImplementedError

    @torch.no_grad()
    def report(self, *inputs: Tensor) -> tuple[GateReport, ...]:
        """What the gate of each task does on a batch, of what `forward` takes."""
        return self.gate.report(None if self.gate.is_static else self.gate_input(*inputs))

    def forward_head(self, features: Tensor) -> Tensor:
        """Outputs from features, B x T x H to B x T x C."""
        outputs: Tensor = self.towers(features)
        return outputs

    def pruned(self: Net, *, hard: bool = False) -> Net:
        """A copy without the experts that no task uses; its configuration says how to rebuild it.

        Args:
            hard: with the hardened gate, which has at most k experts per task.

        Raises:
            ValueError: the gate is per example, where any expert may be used by some input.
        """
        other = copy.deepcopy(self)
        other.moe = self.moe.pruned(hard=hard)
        fixed = dataclasses.replace(self.config.gate, kind="fixed", per_example=False)
        other.config = dataclasses.replace(
            self.config, gate=fixed, num_experts=other.moe.experts.num_experts
        )
        return other

    config: RecommenderConfig | ImagePairConfig | RegressionConfig

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output, for layer-wise learning rates."""
        return {
            "stem": r"^(?:users|items|user_side|item_side)",
            "blocks": r"^moe",
            "head": r"^towers",
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: offsets and gates."""
        return {
            name
            for name, _ in self.named_parameters()
            if name.startswith("moe.gate") or name.endswith("bias")
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecommenderConfig:
    """Shape of a `RecommenderNet`.

    Raises:
        ValueError: a value is out of range or does not fit the others.
    """

    num_users: int = 943
    """Number of users."""
    num_items: int = 1682
    """Number of items."""
    tasks: tuple[Task, ...] = ("watch", "rate")
    """What is predicted: whether a user watches an item, and how they rate it."""
    embedding_dim: int = 64
    """Width of the embedding of a user, and of an item."""
    product: bool = True
    """Whether experts and per-example gates see the product of the two embeddings, element by
    element, beside the embeddings themselves, which is all that the papers' network sees."""
    num_experts: int = 8
    """Number of experts n."""
    expert_widths: tuple[int, ...] = (128,)
    """Widths of the layers of an expert."""
    tower_widths: tuple[int, ...] = (64,)
    """Widths of the hidden layers of a task's tower."""
    dropout: float = 0.2
    """Dropout of experts and towers, in [0, 1)."""
    gate: GateConfig = _GATE
    """The gates; per example, they see what the experts see: the embeddings, and with `product`
    their product."""
    rating_centre: float = 3.5
    """What a rating is predicted relative to: the middle of the scale, or the mean."""
    user_features: int = 0
    """Side features of a user that are added to the embedding by a linear map; 0 for none."""
    item_features: int = 0
    """Side features of an item, likewise."""

    def __post_init__(self) -> None:
        _check_positive(
            self, "num_users", "num_items", "embedding_dim", "expert_widths", "tower_widths"
        )
        _check_tasks(self.tasks)
        if not self.expert_widths:
            raise ValueError("expert_widths is empty; an expert needs at least one layer")
        if min(self.user_features, self.item_features) < 0:
            raise ValueError("user_features and item_features must not be negative")
        _check_dropout(self.dropout)
        self.gate.check(self.num_experts)


def _centred(outputs: Tensor, config: RecommenderConfig | MatrixFactorisationConfig) -> Tensor:
    """Outputs B x T with ratings relative to the centre of the scale."""
    centres = [config.rating_centre if task == "rate" else 0.0 for task in config.tasks]
    return outputs + outputs.new_tensor(centres)


class RecommenderNet(MultiTaskNet):
    """Embeddings of a user and an item, experts on both, and a gate and a tower for each task.

    Args:
        config: the shape.
    """

    config: RecommenderConfig
    user_side: nn.Linear | None
    item_side: nn.Linear | None
    user_table: Tensor
    item_table: Tensor

    def __init__(self, config: RecommenderConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embedding_dim
        width = (3 if config.product else 2) * dim
        self.users = nn.Embedding(config.num_users, dim)
        self.items = nn.Embedding(config.num_items, dim)
        for name, count, features in (
            ("user", config.num_users, config.user_features),
            ("item", config.num_items, config.item_features),
        ):
            side = nn.Linear(features, dim, bias=False) if features else None
            self.register_module(f"{name}_side", side)
            self.register_buffer(f"{name}_table", torch.zeros(count, features))
        self._build(
            MLPExperts(config.num_experts, width, config.expert_widths, config.dropout),
            build_gate(config.gate, config.num_experts, len(config.tasks), width),
            config.tower_widths,
            1,
            config.dropout,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal embeddings of half the usual size."""
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.5)

    def user_vectors(self, users: Tensor) -> Tensor:
        """Vectors of users (integers B), B x D."""
        _check_ids("user", users, self.config.num_users)
        vectors: Tensor = self.users(users)
        if self.user_side is not None:
            vectors = vectors + self.user_side(self.user_table[users])
        return vectors

    def item_vectors(self, items: Tensor) -> Tensor:
        """Vectors of items (integers B), B x D."""
        _check_ids("item", items, self.config.num_items)
        vectors: Tensor = self.items(items)
        if self.item_side is not None:
            vectors = vectors + self.item_side(self.item_table[items])
        return vectors

    def forward(
        self, users: Tensor, items: Tensor, *, hard: bool = False, dispatch: Dispatch = "auto"
    ) -> MultiTaskOutput:
        """Logit of watching and predicted rating, in the order of `config.tasks`.

        Args:
            users, items: B integers each.
            hard: with the hardened gate.
            dispatch: see `zoo.families.dselect_k.experts.mix`.

        Raises:
            ValueError: there are more of one than of the other, or a number is not whole or, on a
                CPU, out of range.
        """
        _check_pairs(users, items)
        return self.of_vectors(
            self.user_vectors(users), self.item_vectors(items), hard=hard, dispatch=dispatch
        )

    def gate_input(self, users: Tensor, items: Tensor) -> Tensor:  # type: ignore[override]
        """The two vectors, one behind the other, and their product."""
        _check_pairs(users, items)
        return self._joined(self.user_vectors(users), self.item_vectors(items))

    def _joined(self, users: Tensor, items: Tensor) -> Tensor:
        product = (users * items,) if self.config.product else ()
        return torch.cat((users, items, *product), -1)

    def forward_features(self, users: Tensor, items: Tensor) -> Tensor:
        """Mixed features of each task, B x T x H."""
        pair = self.gate_input(users, items)
        features: Tensor = self.moe(pair, pair).features
        return features

    def of_vectors(
        self, users: Tensor, items: Tensor, *, hard: bool = False, dispatch: Dispatch = "auto"
    ) -> MultiTaskOutput:
        """As `forward`, from vectors B x D: of users that are not in the table, for instance."""
        pair = self._joined(users, items)
        features, routing = self.moe(pair, pair, hard=hard, dispatch=dispatch)
        return MultiTaskOutput(self.forward_head(features), routing)

    def forward_head(self, features: Tensor) -> Tensor:
        """Outputs from features, B x T x H to B x T."""
        return _centred(self.towers(features).squeeze(-1), self.config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixFactorisationConfig:
    """Shape of a `MatrixFactorisation`.

    Raises:
        ValueError: a value is out of range.
    """

    num_users: int = 943
    """Number of users."""
    num_items: int = 1682
    """Number of items."""
    tasks: tuple[Task, ...] = ("watch", "rate")
    """What is predicted; each task has its own vectors."""
    embedding_dim: int = 64
    """Width of the vectors; 0 leaves the offsets alone, which ranks by popularity."""
    rating_centre: float = 3.5
    """What a rating is predicted relative to."""

    def __post_init__(self) -> None:
        _check_positive(self, "num_users", "num_items")
        if self.embedding_dim < 0:
            raise ValueError(f"embedding_dim must not be negative, got {self.embedding_dim}")
        _check_tasks(self.tasks)


class MatrixFactorisation(nn.Module):
    """The control: offset + offset of the user + offset of the item + product of their vectors.

    Args:
        config: the shape.
    """

    def __init__(self, config: MatrixFactorisationConfig) -> None:
        super().__init__()
        self.config = config
        tasks = len(config.tasks)
        self.users = nn.Embedding(config.num_users, tasks * (config.embedding_dim + 1))
        self.items = nn.Embedding(config.num_items, tasks * (config.embedding_dim + 1))
        self.bias = nn.Parameter(torch.zeros(tasks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal vectors."""
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.05)

    def user_vectors(self, users: Tensor) -> Tensor:
        """Vectors and offsets of users (integers B), B x T (D + 1)."""
        _check_ids("user", users, self.config.num_users)
        vectors: Tensor = self.users(users)
        return vectors

    def item_vectors(self, items: Tensor) -> Tensor:
        """Vectors and offsets of items (integers B), B x T (D + 1)."""
        _check_ids("item", items, self.config.num_items)
        vectors: Tensor = self.items(items)
        return vectors

    def forward(self, users: Tensor, items: Tensor) -> MultiTaskOutput:
        """Logit of watching and predicted rating; users and items are B integers each.

        Raises:
            ValueError: as of `RecommenderNet.forward`.
        """
        _check_pairs(users, items)
        return self.of_vectors(self.user_vectors(users), self.item_vectors(items))

    def of_vectors(self, users: Tensor, items: Tensor) -> MultiTaskOutput:
        """As `forward`, from vectors."""
        outputs = self.forward_head(self._product(users, items))
        return MultiTaskOutput(outputs, Routing(outputs.new_ones(1, outputs.shape[1], 1)))

    def forward_features(self, users: Tensor, items: Tensor) -> Tensor:
        """Offsets and products of users and items, B x T."""
        _check_pairs(users, items)
        return self._product(self.user_vectors(users), self.item_vectors(items))

    def forward_head(self, features: Tensor) -> Tensor:
        """Outputs from features, B x T to B x T."""
        return _centred(features + self.bias, self.config)

    def _product(self, users: Tensor, items: Tensor) -> Tensor:
        tasks, width = len(self.config.tasks), self.config.embedding_dim + 1
        u, v = (vectors.view(vectors.shape[0], tasks, width) for vectors in (users, items))
        return (u[..., 1:] * v[..., 1:]).sum(-1) + u[..., 0] + v[..., 0]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter name patterns from input to output."""
        return {"stem": r"^(?:users|items)", "head": r"^bias"}

    def no_weight_decay(self) -> set[str]:
        """The offset."""
        return {"bias"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePairConfig:
    """Shape of an `ImagePairNet`.

    Raises:
        ValueError: a value is out of range or does not fit the others.
    """

    num_classes: int = 10
    """Classes C of each task."""
    in_channels: int = 1
    """Channels of the image."""
    size: int = 36
    """Height and width of the image."""
    num_tasks: int = 2
    """Pictures in the image, each of which is a task."""
    num_experts: int = 8
    """Number of experts n."""
    channels: tuple[int, ...] = (10, 20)
    """Output channels of the 5 x 5 convolutions of an expert, each with pooling by 2."""
    expert_widths: tuple[int, ...] = (50, 50)
    """Widths of the fully connected layers of an expert."""
    tower_widths: tuple[int, ...] = (50, 50)
    """Widths of the hidden layers of a task's tower."""
    dropout: float = 0.0
    """Dropout of the fully connected layers, in [0, 1)."""
    gate: GateConfig = _GATE
    """The gates; per example, they see the pixels."""

    def __post_init__(self) -> None:
        _check_positive(
            self,
            "num_classes",
            "in_channels",
            "size",
            "num_tasks",
            "channels",
            "expert_widths",
            "tower_widths",
        )
        if not self.expert_widths:
            raise ValueError("expert_widths is empty; an expert needs at least one layer")
        _check_dropout(self.dropout)
        self.gate.check(self.num_experts)


class ImagePairNet(MultiTaskNet):
    """Convolutional experts on an image with several pictures; each task classifies one of them.

    Args:
        config: the shape.
    """

    config: ImagePairConfig

    def __init__(self, config: ImagePairConfig) -> None:
        super().__init__()
        self.config = config
        self._build(
            ConvExperts(
                config.num_experts,
                config.in_channels,
                config.size,
                config.channels,
                config.expert_widths,
                dropout=config.dropout,
            ),
            build_gate(
                config.gate,
                config.num_experts,
                config.num_tasks,
                config.in_channels * config.size**2,
            ),
            config.tower_widths,
            config.num_classes,
            config.dropout,
        )

    def gate_input(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """The pixels."""
        self._check(images)
        return images.flatten(1)

    def _check(self, images: Tensor) -> None:
        channels, size = self.config.in_channels, self.config.size
        if images.ndim != 4 or images.shape[1:] != (channels, size, size):
            raise ValueError(
                f"expected images B x {channels} x {size} x {size}, got {tuple(images.shape)}"
            )

    def forward_features(self, images: Tensor) -> Tensor:
        """Mixed features of each task, B x T x H."""
        features: Tensor = self.moe(images, self.gate_input(images)).features
        return features

    def forward(
        self, images: Tensor, *, hard: bool = False, dispatch: Dispatch = "auto"
    ) -> MultiTaskOutput:
        """Logits of each task, B x T x C.

        Args:
            images: B x channels x size x size, normalised.
            hard: with the hardened gate.
            dispatch: see `zoo.families.dselect_k.experts.mix`.

        Raises:
            ValueError: the images have another shape.
        """
        features, routing = self.moe(images, self.gate_input(images), hard=hard, dispatch=dispatch)
        return MultiTaskOutput(self.forward_head(features), routing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """Shape of a `RegressionNet`.

    Raises:
        ValueError: a value is out of range or does not fit the others.
    """

    in_features: int = 10
    """Width of the input."""
    num_tasks: int = 8
    """Number of tasks T."""
    num_experts: int = 16
    """Number of experts n."""
    expert_width: int = 4
    """Outputs H of an expert, which is one layer."""
    gate: GateConfig = _GATE
    """The gates."""

    def __post_init__(self) -> None:
        _check_positive(self, "in_features", "num_tasks", "expert_width")
        self.gate.check(self.num_experts)


class RegressionNet(MultiTaskNet):
    """Experts ReLU(W_i x + b_i), mixed by the gates, with a linear head for each task.

    Args:
        config: the shape.
    """

    config: RegressionConfig

    def __init__(self, config: RegressionConfig) -> None:
        super().__init__()
        self.config = config
        self._build(
            MLPExperts(config.num_experts, config.in_features, (config.expert_width,)),
            build_gate(config.gate, config.num_experts, config.num_tasks, config.in_features),
            (),
            1,
            0.0,
        )

    def gate_input(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The input itself."""
        if x.ndim != 2 or x.shape[1] != self.config.in_features:
            raise ValueError(f"expected inputs B x {self.config.in_features}, got {tuple(x.shape)}")
        return x

    def forward(
        self, x: Tensor, *, hard: bool = False, dispatch: Dispatch = "auto"
    ) -> MultiTaskOutput:
        """Prediction of each task, B x T, of inputs B x in_features.

        Raises:
            ValueError: the inputs have another shape.
        """
        features, routing = self.moe(x, self.gate_input(x), hard=hard, dispatch=dispatch)
        return MultiTaskOutput(self.forward_head(features), routing)

    def forward_features(self, x: Tensor) -> Tensor:
        """Mixed features of each task, B x T x H."""
        features: Tensor = self.moe(x, self.gate_input(x)).features
        return features

    def forward_head(self, features: Tensor) -> Tensor:
        """Predictions from features, B x T x H to B x T."""
        outputs: Tensor = self.towers(features).squeeze(-1)
        return outputs
