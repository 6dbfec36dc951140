"""Low-rank adapters: y = W x + b + (alpha / r) B A x with W frozen (LoRA, arXiv:2106.09685).

Adapters sit in the layers themselves: names of the network's own tensors stay as they are, and
each adapted layer has two more, `lora_a` and `lora_b`. A is drawn as PEFT draws it (uniform with
variance 1 / (3 fan-in)), B starts at zero, so that nothing changes at first. In LoRA-FA
(arXiv:2308.03303) A stays as drawn: the gradient of A needs the input x, that of B only A x.

Shape notation: in and out: features or channels of a layer, r: rank; B x T tokens.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import CheckpointError, ConfigError, nearest
from zoo.files import write_bytes
from zoo.tuning.freezing import freeze
from zoo.tuning.memory.convolutions import convolution

__all__ = [
    "Variant",
    "adaptable_layers",
    "add_lora",
    "load_lora",
    "lora_layers",
    "merge_lora",
    "remove_lora",
    "save_lora",
    "unmerge_lora",
]

Variant = Literal["lora", "lora-fa"]


class _Adapted:
    """What adapted layers have in common; they become one by a change of their class."""

    _parameters: dict[str, Any]
    lora_a: nn.Parameter
    """r x in, and for a convolution r x in x 1 x 1."""
    lora_b: nn.Parameter
    """out x r, likewise."""
    lora_scale: float
    lora_variant: Variant
    unmerged: Tensor | None
    """The weight as it was before the adapter was merged into it."""

    @property
    def weight(self) -> Tensor:
        """The weight that the layer acts with, for code that does not call the layer."""
        base: Tensor = self._parameters["weight"]
        if self.unmerged is not None:
            return base
        delta = self.lora_b.flatten(1) @ self.lora_a.flatten(1)
        return base + self.lora_scale * delta.view_as(base)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight."""
        merged, base = self.weight, self._parameters["weight"]
        self.unmerged = base.detach().clone()
        base.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take it back."""
        self._parameters["weight"].copy_(self.unmerged)
        self.unmerged = None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """A merged layer is stored as one that is not, since it has its adapter beside it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if self.unmerged is not None:
            destination[f"{prefix}weight"] = self.unmerged.to(self._parameters["weight"])

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """A merged layer stays one, of the weight and the adapter that it was given."""
        merged = self.unmerged is not None
        if merged:
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)  # type: ignore[misc]
        if merged:
            if local_metadata.get("assign_to_params_buffers", False):
                # The weight is the given tensor itself, which is not to change.
                base = self._parameters["weight"]
                self._parameters["weight"] = nn.Parameter(base.detach().clone(), base.requires_grad)
            self.merge()


class _LoRALinear(_Adapted, nn.Linear):  # type: ignore[override]
    """A linear layer with an adapter."""

    def forward(self, input: Tensor) -> Tensor:
        """... x in to ... x out."""
        y = F.linear(input, self._parameters["weight"], self.bias)
        if self.unmerged is not None:
            return y
        return y + self.lora_scale * F.linear(F.linear(input, self.lora_a), self.lora_b)


class _LoRAConv2d(_Adapted, nn.Conv2d):  # type: ignore[override]
    """A 1x1 convolution with an adapter."""

    def forward(self, input: Tensor) -> Tensor:
        """B x in x H x W to B x out x H' x W'."""
        # A convolution of torch would keep its input, though nothing but A needs it.
        y = convolution(input, self._parameters["weight"], self.bias, self.stride, self.padding)
        if self.unmerged is not None:
            return y
        low = convolution(input, self.lora_a, None, self.stride, self.padding)
        return y + self.lora_scale * convolution(low, self.lora_b)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _LoRALinear,
    nn.Conv2d: _LoRAConv2d,
}
_PLAIN = {adapted: plain for plain, adapted in _CLASSES.items()}


def _is_adaptable(module: nn.Module) -> bool:
    # Exact classes: a subclass may compute something else with its weight.
    if type(module) is nn.Conv2d:
        pointwise = module.kernel_size == (1, 1) and module.groups == 1
        return pointwise and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def adaptable_layers(network: nn.Module) -> tuple[str, ...]:
    """Names of the layers that can have an adapter: linear ones and 1x1 convolutions."""
    return tuple(name for name, module in network.named_modules() if _is_adaptable(module))


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, _Adapted)}


def add_lora(
    network: nn.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    target: str | Sequence[str] | None = None,
    variant: Variant = "lora",
    seed: int = 0,
) -> tuple[str, ...]:
    """Give layers an adapter, in place, and freeze everything else, statistics included.

    Args:
        network: any network.
        rank: r, at most the smaller side of each weight.
        alpha: the adapter's part is scaled by alpha / r; None: r, which scales by one.
        target: names of layers, or of parts of the network, or of layers in all of its parts
            ("qkv"); with shell wildcards. None: every linear layer and 1x1 convolution.
        variant: "lora" trains A and B, "lora-fa" B alone.
        seed: of A; the global random state plays no part.

    Returns:
        The names of the layers.

    Raises:
        ConfigError: an argument is out of range, there are adapters already, or a target is none
            of the layers; the text has their names.
    """
    if variant not in get_args(Variant):
        raise ConfigError(f"adapters must be one of {', '.join(get_args(Variant))}, got {variant}")
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank must be an integer of at least 1, got {rank}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ConfigError(f"alpha must be positive and finite, got {alpha}")
    if lora_layers(network):
        raise ConfigError("The network has adapters already; merge or remove them first.")
    names = _targets(network, target)
    modules = dict(network.named_modules())
    shared = _shared(network)
    for name in names:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        if id(weight) in shared:
            raise ConfigError(
                f"The weight of {name} is also that of another layer, which an adapter would change"
            )
        if rank > min(weight.shape[:2]):
            raise ConfigError(
                f"rank {rank} is above the smaller side of {name}, which is "
                f"{weight.shape[1]} to {weight.shape[0]}"
            )
    freeze(network, "*")
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        _adapt(modules[name], rank, rank if alpha is None else alpha, variant, generator)
    return names


def _targets(network: nn.Module, target: str | Sequence[str] | None) -> tuple[str, ...]:
    layers = adaptable_layers(network)
    listed = f"There are: {', '.join(layers)}." if layers else "It has none."
    kinds = "linear layers and 1x1 convolutions"
    if target is None:
        if not layers:
            raise ConfigError(f"{type(network).__name__} has no {kinds} for an adapter.")
        return layers
    found: set[str] = set()
    for pattern in [target] if isinstance(target, str) else target:
        spellings = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
        matched = {n for n in layers if any(fnmatchcase(n, one) for one in spellings)}
        if not matched:
            modules = [name for name, _ in network.named_modules() if name]
            if any(fnmatchcase(name, one) for name in modules for one in spellings[:2]):
                raise ConfigError(f"{pattern!r} has no {kinds}, which adapters are for. {listed}")
            raise ConfigError(
                f"No layer {pattern!r} for an adapter.{nearest(pattern, layers)} {listed}"
            )
        found |= matched
    return tuple(name for name in layers if name in found)


def _shared(network: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module has."""
    seen: set[int] = set()
    twice: set[int] = set()
    for module in network.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _adapt(
    module: nn.Module, rank: int, alpha: float, variant: Variant, generator: torch.Generator
) -> None:
    weight = module._parameters["weight"]
    assert weight is not None
    rest = weight.shape[2:]
    a = torch.empty(rank, weight.shape[1])
    nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
    a = a.view(rank, -1, *rest).to(weight.device, weight.dtype)
    module.register_parameter("lora_a", nn.Parameter(a, requires_grad=variant == "lora"))
    b = weight.new_zeros(weight.shape[0], rank, *rest)
    module.register_parameter("lora_b", nn.Parameter(b))
    adapted: Any = module
    adapted.lora_scale, adapted.lora_variant, adapted.unmerged = alpha / rank, variant, None
    adapted.__class__ = _CLASSES[type(module)]


# --- merged and removed --------------------------------------------------------------------------


def merge_lora(network: nn.Module) -> None:
    """Add each adapter to the weight of its layer, in place; `unmerge_lora` takes it back.

    The merged weight is, bit for bit, what the `weight` of the adapted layer was. `state_dict` has
    the weight without the adapter all the while, beside the adapter, and can be loaded by networks
    that are merged and by those that are not; after `remove_lora` it has the merged one.
    """
    for layer in lora_layers(network).values():
        if layer.unmerged is None:
            layer.merge()


def unmerge_lora(network: nn.Module) -> None:
    """Undo `merge_lora`: weights are what they were, bit for bit."""
    for layer in lora_layers(network).values():
        if layer.unmerged is not None:
            layer.unmerge()


def remove_lora(network: nn.Module) -> None:
    """Make adapted layers plain ones; what is merged stays in their weights."""
    for layer in lora_layers(network).values():
        del layer.lora_a, layer.lora_b, layer.lora_scale, layer.lora_variant, layer.unmerged
        layer.__class__ = _PLAIN[type(layer)]


# --- files ---------------------------------------------------------------------------------------


def save_lora(
    network: nn.Module, path: str | os.PathLike[str], *, beside: Sequence[str] = ()
) -> None:
    """Write the adapters alone, as safetensors: all of the file, or nothing.

    Args:
        network: a network with adapters, merged or not.
        path: the file.
        beside: names of other tensors that belong to them, as of a new head.

    Raises:
        CheckpointError: there are no adapters, or the file cannot be written.
    """
    from safetensors.torch import save

    layers = lora_layers(network)
    if not layers:
        raise CheckpointError("The network has no adapters to save.")
    state = network.state_dict()
    wanted = [f"{name}.{part}" for name in layers for part in ("lora_a", "lora_b")]
    tensors = {name: state[name].cpu().contiguous() for name in (*wanted, *beside)}
    scales = {name: layer.lora_scale for name, layer in layers.items()}
    # One entry, since the order of several in the file is random.
    words = {"variant": next(iter(layers.values())).lora_variant, "scales": scales}
    write_bytes(Path(path), save(tensors, {"lora": json.dumps(words)}))


def load_lora(network: nn.Module, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Give a network the adapters of a file, and the tensors beside them; see `add_lora`.

    Args:
        network: a network without adapters.
        path: what `save_lora` wrote.

    Returns:
        The names of the adapted layers.

    Raises:
        CheckpointError: the file is missing, damaged, or for another network.
        ConfigError: there are adapters already.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            words = json.loads((file.metadata() or {})["lora"])
        scales = {str(name): float(scale) for name, scale in words["scales"].items()}
        variant = words["variant"]
        if variant not in get_args(Variant) or not all(map(math.isfinite, scales.values())):
            raise ValueError(f"variant {variant}, scales {scales}")
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no file of adapters: {str(error)[:200]}.") from None
    if lora_layers(network):
        raise ConfigError("The network has adapters already; merge or remove them first.")
    modules, own = dict(network.named_modules()), network.state_dict()
    layers = adaptable_layers(network)
    expected = {name: tensor.shape for name, tensor in own.items() if name in tensors}
    for name in scales:
        if name not in layers:
            raise CheckpointError(
                f"{path} has an adapter for {name!r}, which is no layer of this network."
                f"{nearest(name, layers)}"
            )
        out, into, *rest = own[f"{name}.weight"].shape
        a = tensors.get(f"{name}.lora_a")
        if a is None or a.ndim < 2 or not len(a):
            raise CheckpointError(f"{path}: tensor '{name}.lora_a' does not fit this network.")
        rank = len(a)
        expected[f"{name}.lora_a"] = torch.Size((rank, into, *rest))
        expected[f"{name}.lora_b"] = torch.Size((out, rank, *rest))
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(f"{path}: tensor {name!r} does not fit this network.")
    freeze(network, "*")
    for name, scale in scales.items():
        rank = found[f"{name}.lora_a"][0]
        _adapt(modules[name], rank, scale * rank, variant, torch.Generator())
    network.load_state_dict(tensors, strict=False)
    return tuple(scales)
