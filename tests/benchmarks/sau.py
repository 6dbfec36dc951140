"""What SAU costs beside GELU, PReLU and the composite expression, and what it keeps for backward.

Forward and backward of a million elements, contiguous and channels last, eager and compiled; then
a training step of the network, and the batch that it needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks._harness import Comparison, race, repeated
from zoo.data.augmentation import AugmentConfig, ImageBatch
from zoo.data.images import ImageDataModule
from zoo.data.pictures import ImageSplit
from zoo.families.sau_shufflenet import SAU, Activation, ShuffleNetConfig, ShuffleNetV2

ROUNDS = 15
AT_MOST = 1.5
AT_MOST_COMPILED = 1.2
AT_MOST_FEEDING = 0.2
"""Data come at least five times as fast as the network takes them."""
SHAPE = (128, 128, 8, 8)
"""A million elements."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
PRESETS = {"SAU": "2", "SAU as published": "published", "SAU, trained": "2-trained"}


class _Composite(nn.Module):
    """The closed form as it is written down, in operations of torch."""

    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        edge = torch.erf(b * x / math.sqrt(2))
        bump = torch.exp(-(b**2) * x**2 / 2) / (b * math.sqrt(2 * math.pi))
        return (1 + a) / 2 * x + (1 - a) / 2 * x * edge + (1 - a) * bump


def run(rounds: int) -> list[Comparison]:
    """Each preset beside GELU in each layout, eager and compiled, and the network's steps."""
    comparisons = []
    for layout, memory_format in LAYOUTS.items():
        comparisons += _layers(layout, memory_format, rounds)
    comparisons += _kept()
    return [*comparisons, *_networks(rounds), _feeding(rounds)]


def _layers(layout: str, memory_format: torch.memory_format, rounds: int) -> list[Comparison]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(SHAPE, generator=generator).contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    layers: dict[str, nn.Module] = {
        "GELU": nn.GELU(),
        "PReLU": nn.PReLU(init=0.15),
        "composite": _Composite(0.15, 2.0),
        **{name: SAU.preset(preset) for name, preset in PRESETS.items()},
    }
    compiled: dict[str, nn.Module] = {"GELU": nn.GELU()}
    compiled.update((name, SAU.preset(preset)) for name, preset in PRESETS.items())
    for layer in compiled.values():
        layer.compile()
    layers.update((f"{name}, compiled", layer) for name, layer in compiled.items())
    taken = race({n: repeated(_pass(layer, x, grad)) for n, layer in layers.items()}, rounds)

    def compare(name: str, peer: str, at_most: float | None) -> Comparison:
        return Comparison(
            name=f"forward and backward, {layout}",
            contestant=name,
            peer=peer,
            values=taken[name],
            peer_values=taken[peer],
            at_most=at_most,
        )

    return [
        *(compare(name, "GELU", AT_MOST) for name in PRESETS),
        *(compare(f"{name}, compiled", "GELU, compiled", AT_MOST_COMPILED) for name in PRESETS),
        compare("SAU", "composite", None),
        compare("SAU as published", "PReLU", None),
    ]


def _pass(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    source = x.detach().requires_grad_()

    def run() -> None:
        source.grad = None
        layer.zero_grad()
        layer(source).backward(grad)

    return run


def _kept() -> list[Comparison]:
    gelu = _bytes(nn.GELU())
    return [
        Comparison(
            name="kept for backward",
            contestant=name,
            peer="GELU",
            values=(_bytes(SAU.preset(preset)),),
            peer_values=(gelu,),
            unit="bytes",
            # Two scalars may come on top.
            at_most=1.0 + 1e-5,
        )
        for name, preset in PRESETS.items()
    ]


def _bytes(layer: nn.Module) -> float:
    """Storage of the tensors that are kept, each counted once."""
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(SHAPE).requires_grad_())
    return float(sum(kept.values()))


def _networks(rounds: int) -> list[Comparison]:
    """A training step of ShuffleNet V2 0.5x on 32 images, channels last, eager."""
    names: dict[str, Activation] = {
        "GELU": "gelu",
        "SAU": "sau-2",
        "SAU as published": "sau-published",
    }
    x = torch.randn(32, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(32, 100)
    networks = {
        name: ShuffleNetV2(ShuffleNetConfig(width=0.5, activation=activation)).to(
            memory_format=torch.channels_last
        )
        for name, activation in names.items()
    }
    taken = race({n: repeated(_pass(net, x, grad)) for n, net in networks.items()}, rounds)
    return [
        Comparison(
            name="training step of ShuffleNet V2 0.5x, 32 images",
            contestant=name,
            peer="GELU",
            values=taken[name],
            peer_values=taken["GELU"],
        )
        for name in names
        if name != "GELU"
    ]


def _feeding(rounds: int) -> Comparison:
    """A batch of noise in place of CIFAR-100, cropped and mirrored, beside the step it is for."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (len(images),), generator=generator)
    data = ImageDataModule(
        "cifar100", batch_size=128, augment=AugmentConfig(crop_padding=4, flip=True)
    )
    data._train = ImageSplit(images, labels), None
    loader = data.train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    network = ShuffleNetV2(ShuffleNetConfig(width=0.5, activation="sau-2")).to(
        memory_format=torch.channels_last
    )
    batch: ImageBatch = next(batches)

    def step() -> None:
        network.zero_grad()
        placed = batch.images.contiguous(memory_format=torch.channels_last)
        F.cross_entropy(network(placed), batch.targets).backward()

    taken = race({"feed": repeated(lambda: next(batches)), "step": repeated(step)}, rounds)
    return Comparison(
        name="128 images of 32 x 32, cropped and mirrored",
        contestant="ImageDataModule: a batch",
        peer="training step of ShuffleNet V2 0.5x on it",
        values=taken["feed"],
        peer_values=taken["step"],
        at_most=AT_MOST_FEEDING,
    )
