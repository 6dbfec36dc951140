"""Banks of experts that are computed all at once, or only where a gate gives them weight.

Shape notation: B examples, T tasks, n experts, d input width, H output width of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.families.dselect_k.gates import (
    FixedGate,
    Gate,
    Routing,
    check_at_least_1,
    check_choice,
)

__all__ = [
    "BatchedLinear",
    "ConvExperts",
    "ExpertBank",
    "MLPExperts",
    "Mixture",
    "MixtureOfExperts",
    "Towers",
    "mix",
]

Dispatch = Literal["auto", "dense", "sparse"]

_SPARSE_BELOW = 0.6
"""Share of (example, expert) pairs in use below which sorting pays on a CPU."""


class BatchedLinear(nn.Module):
    """`num` affine maps of the same shape, computed in one product.

    Args:
        num: number of maps.
        in_features: width of the input.
        out_features: width of the output.
    """

    def __init__(self, num: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num, self.in_features, self.out_features = num, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 2 / fan_in) for a ReLU after it, offsets 0."""
        nn.init.normal_(self.weight, std=(2 / self.in_features) ** 0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Every map, of one input for all (B x d) or of one each (B x num x d): B x num x out."""
        if x.ndim == 2:
            y = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
            return y.view(-1, self.num, self.out_features)
        y = torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight.transpose(1, 2))
        return y.transpose(0, 1)

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each map. One gradient for all is made, not one for each."""
        return list(zip(self.weight.unbind(), self.bias.unbind(), strict=True))

    def keep(self, kept: Sequence[int]) -> None:
        """Drop all maps but these, in place."""
        self.num = len(kept)
        for name in ("weight", "bias"):
            old = self.get_parameter(name)
            new = nn.Parameter(old.detach()[list(kept)], requires_grad=old.requires_grad)
            self.register_parameter(name, new)


class ExpertBank(nn.Module):
    """Experts of one shape, each a function of the same input.

    Attributes:
        num_experts: number of experts n.
        out_features: width H of what each returns.
    """

    num_experts: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        """Every expert of every example, B x n x H."""
        return torch.stack(self.grouped([x] * self.num_experts), 1)

    def grouped(self, groups: Sequence[Tensor | None]) -> list[Tensor]:
        """Expert i of the examples in `groups[i]`; experts with None are left out."""
        raise NotImplementedError

    def keep(self, kept: Sequence[int]) -> None:
        """Drop all experts but these, in place."""
        self.num_experts = len(kept)
        for module in self.modules():
            if isinstance(module, BatchedLinear):
                module.keep(kept)


class MLPExperts(ExpertBank):
    """Experts of fully connected layers, each with ReLU and dropout.

    Args:
        num_experts: number of experts n.
        in_features: width d of the input.
        widths: width of each layer; the last is H.
        dropout: share of the outputs that are dropped after each layer in training.

    Raises:
        ValueError: there is no layer or no expert, or a width is below 1.
    """

    def __init__(
        self, num_experts: int, in_features: int, widths: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_at_least_1("num_experts", num_experts)
        check_at_least_1("in_features", in_features)
        if not isinstance(widths, Sequence):
            raise ValueError(f"widths must be a list of the width of each layer, got {widths!r}")
        if not widths:
            raise ValueError("experts need at least one layer, got no widths")
        for width in widths:
            check_at_least_1("a width", width)
        self.num_experts, self.out_features = num_experts, widths[-1]
        self.layers = nn.ModuleList(
            BatchedLinear(num_experts, before, after)
            for before, after in zip([in_features, *widths], widths, strict=False)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """See `ExpertBank.forward`."""
        for layer in self.layers:
            x = self.dropout(F.relu(layer(x)))
        return x

    def grouped(self, groups: Sequence[Tensor | None]) -> list[Tensor]:
        """See `ExpertBank.grouped`."""
        outputs = list(groups)
        for layer in self.layers:
            assert isinstance(layer, BatchedLinear)
            outputs = [
                None if x is None else self.dropout(F.relu(F.linear(x, weight, bias)))
                for x, (weight, bias) in zip(outputs, layer.split(), strict=True)
            ]
        return [x for x in outputs if x is not None]


class ConvExperts(ExpertBank):
    """Small convolutional experts on images: (convolution, ReLU, pooling by 2), then dense layers.

    They see images B x in_channels x size x size.

    Args:
        num_experts: number of experts n.
        in_channels: channels of the image.
        size: height and width of the image.
        channels: output channels of each convolution.
        widths: widths of the fully connected layers, each with ReLU; the last is H.
        kernel: height and width of the convolutions, without padding.
        dropout: share of the fully connected outputs that are dropped in training.

    Raises:
        ValueError: the image is too small, there is no layer or no expert, or a number is below 1.
    """

    def __init__(
        self,
        num_experts: int,
        in_channels: int,
        size: int,
        channels: Sequence[int] = (10, 20),
        widths: Sequence[int] = (50, 50),
        kernel: int = 5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least_1("num_experts", num_experts)
        check_at_least_1("in_channels", in_channels)
        check_at_least_1("kernel", kernel)
        if not channels:
            raise ValueError("experts need at least one convolution, got no channels")
        for count in channels:
            check_at_least_1("a number of channels", count)
        self.kernel = kernel
        self.convolutions = nn.ModuleList()
        for before, after in zip([in_channels, *channels], channels, strict=False):
            self.convolutions.append(BatchedLinear(num_experts, before * kernel**2, after))
            size = (size - kernel + 1) // 2
        if size < 1:
            raise ValueError(
                f"the image is too small for {len(channels)} convolutions and poolings"
            )
        self.dense = MLPExperts(num_experts, channels[-1] * size**2, widths, dropout)
        self.num_experts, self.out_features = num_experts, self.dense.out_features

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernel = weight.view(bias.shape[0], -1, self.kernel, self.kernel)
        # On a CPU the few channels of an expert take some two thirds of the time where they are
        # innermost, and so does a convolution for each expert beside a grouped one.
        x, kernel = (t.to(memory_format=torch.channels_last) for t in (x, kernel))
        # Pooling first leaves a quarter of the values to the ReLU, and the same result.
        return F.relu(F.max_pool2d(F.conv2d(x, kernel, bias), 2))

    def grouped(self, groups: Sequence[Tensor | None]) -> list[Tensor]:
        """See `ExpertBank.grouped`."""
        outputs = list(groups)
        for layer in self.convolutions:
            assert isinstance(layer, BatchedLinear)
            outputs = [
                None if x is None else self._convolve(x, weight, bias)
                for x, (weight, bias) in zip(outputs, layer.split(), strict=True)
            ]
        return self.dense.grouped([None if x is None else x.flatten(1) for x in outputs])

    def keep(self, kept: Sequence[int]) -> None:
        """See `ExpertBank.keep`."""
        super().keep(kept)
        self.dense.num_experts = len(kept)


def mix(experts: ExpertBank, x: Tensor, weights: Tensor, dispatch: Dispatch = "auto") -> Tensor:
    """y[b, t] = sum_i weights[b, t, i] expert_i(x[b]), B x T x H.

    "sparse" computes an expert on the examples that give it weight, and on no others: the output,
    and the gradients of weights that come from a gate with `exact_zeros`, are those of "dense".
    "auto" takes the one that is faster, which depends on the weights. Dropout draws other masks
    either way. Derivatives of second order need "dense": with weights from each example "sparse"
    has those of first order alone.

    Args:
        experts: the bank.
        x: B examples.
        weights: B x T x n, or 1 x T x n for all examples.
        dispatch: how to compute it.

    Raises:
        ValueError: there is no such dispatch.
    """
    if dispatch == "dense":
        # Sizes by `shape`, since `len` would fix the batch of an exported graph.
        return torch.einsum("btn,bnh->bth", weights.expand(x.shape[0], -1, -1), experts(x))
    check_choice("dispatch", dispatch, Dispatch)
    in_use = (weights != 0).any(1)
    if dispatch == "auto" and in_use.double().mean() > _SPARSE_BELOW:
        return mix(experts, x, weights, "dense")
    if len(weights) == 1:
        return _mix_static(experts, x, weights[0], in_use[0])
    return _mix_sorted(experts, x, weights, in_use)


def _mix_static(experts: ExpertBank, x: Tensor, weights: Tensor, in_use: Tensor) -> Tensor:
    used = in_use.nonzero().flatten()
    if not len(used):
        return _zeros(experts, x, weights[None])
    outputs = experts.grouped([x if use else None for use in in_use.tolist()])
    return torch.einsum("tn,bnh->bth", weights[:, used], torch.stack(outputs, 1))


def _mix_sorted(experts: ExpertBank, x: Tensor, weights: Tensor, in_use: Tensor) -> Tensor:
    expert, row = in_use.T.nonzero(as_tuple=True)  # sorted by expert
    if not len(row):
        return _zeros(experts, x, weights)
    groups = torch.split(x.index_select(0, row), in_use.sum(0).tolist())
    outputs = torch.cat(experts.grouped([group if len(group) else None for group in groups]))
    # Every (example, task) is a bag of the outputs that it weighs.
    position = row.new_zeros(in_use.shape)
    position[row, expert] = torch.arange(len(row), device=row.device)
    weighed = weights != 0
    example, _, chosen = weighed.nonzero(as_tuple=True)
    mixed = F.embedding_bag(
        position[example, chosen],
        outputs.to(weights.dtype),
        F.pad(weighed.sum(-1).flatten().cumsum(0)[:-1], (1, 0)),
        mode="sum",
        per_sample_weights=weights[weighed],
    )
    # Under autocast the experts, and the product that mixes them densely, are of lower precision.
    return mixed.view(x.shape[0], weights.shape[1], -1).to(outputs.dtype)


def _zeros(experts: ExpertBank, x: Tensor, weights: Tensor) -> Tensor:
    """B x T x H, of the type that computed experts have; gradients are zeros too, and not missing,
    as where a process has no examples in a batch."""
    none: Tensor = experts(x[:0])
    zeros = none.new_zeros(len(x), weights.shape[1], experts.out_features)
    return zeros + none.sum() + weights[:0].sum()


class Mixture(NamedTuple):
    """Features of each task, and how they were mixed."""

    features: Tensor
    """B x T x H."""
    routing: Routing


class MixtureOfExperts(nn.Module):
    """A bank of experts and one gate per task.

    Args:
        experts: the bank, n experts.
        gate: the gate of all tasks, over as many experts.

    Raises:
        ValueError: the gate has another number of experts.
    """

    def __init__(self, experts: ExpertBank, gate: Gate) -> None:
        super().__init__()
        if experts.num_experts != gate.num_experts:
            raise ValueError(
                f"the gate weighs {gate.num_experts} experts, the bank has {experts.num_experts}"
            )
        self.experts, self.gate = experts, gate

    def forward(
        self,
        x: Tensor,
        gate_input: Tensor | None = None,
        *,
        hard: bool = False,
        dispatch: Dispatch = "auto",
    ) -> Mixture:
        """Mix the experts for each task.

        Args:
            x: what the experts see, B x ...
            gate_input: what a per-example gate sees, B x p.
            hard: with the hardened gate.
            dispatch: see `mix`.

        Raises:
            ValueError: a per-example gate sees another number of examples than the experts.
        """
        if not self.gate.is_static and gate_input is not None:
            # The sizes of a compiled or exported graph are symbols, which the products compare.
            compiling = torch.compiler.is_compiling()
            if not compiling and gate_input.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"gate_input must have a row for each example of x, got shapes "
                    f"{tuple(gate_input.shape)} and {tuple(x.shape)}"
                )
        routing = self.gate(gate_input, hard=hard)
        if dispatch == "auto" and self.gate.training and not self.gate.exact_zeros:
            dispatch = "dense"
        return Mixture(mix(self.experts, x, routing.weights, dispatch), routing)

    def pruned(self, *, hard: bool = False) -> MixtureOfExperts:
        """A copy without the experts that no task uses, and with a table for a gate.

        Args:
            hard: use the hardened gate, which has at most k experts per task.

        Raises:
            ValueError: the gate is per example, where any expert may be used by some input; or it
                gives no expert any weight, as where a penalty has not driven away missing codes.
        """
        if not self.gate.is_static:
            raise ValueError(
                "only a static gate can be pruned; a per-example gate may use any expert"
            )
        was_training = self.gate.training
        with torch.no_grad():
            weights = self.gate.eval()(hard=hard).weights[0]
        self.gate.train(was_training)
        kept = (weights != 0).any(0).nonzero().flatten().tolist()
        if not kept:
            raise ValueError("no task gives any expert weight, so that pruning would leave none")
        experts = copy.deepcopy(self.experts)
        experts.keep(kept)
        gate = FixedGate(len(kept), num_tasks=self.gate.num_tasks)
        gate.table = weights[:, kept]
        return MixtureOfExperts(experts, gate).train(self.training)


class Towers(nn.Module):
    """A network of fully connected layers for each task, with ReLU between them.

    Args:
        num_tasks: number of tasks T.
        in_features: width H of the features of a task.
        widths: widths of the hidden layers; empty for a linear map.
        out_features: outputs of each task.
        dropout: share of the hidden outputs that are dropped in training.
    """

    def __init__(
        self,
        num_tasks: int,
        in_features: int,
        widths: Sequence[int],
        out_features: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [BatchedLinear(num_tasks, in_features, width), nn.ReLU(), nn.Dropout(dropout)]
            in_features = width
        self.hidden = nn.Sequential(*layers)
        self.head = BatchedLinear(num_tasks, in_features, out_features)
        with torch.no_grad():
            self.head.weight.mul_(0.5**0.5)  # no ReLU follows

    def forward(self, features: Tensor) -> Tensor:
        """B x T x H to B x T x outputs."""
        outputs: Tensor = self.head(self.hidden(features))
        return outputs
