"""Networks on analog hardware: quantised, clamped and noisy activations and weights.

Source of the noise model: Shah, Youngblood, "Leveraging Continuously Differentiable Activation for
Learning in Analog and Quantized Noisy Environments", IEEE JSTQE 2025 (arXiv:2402.02593), and their
AnalogVNN (arXiv:2210.10048). Around every convolution and linear layer

    input       clamp, reduce precision, add noise
    weights     clamp, reduce precision, add noise; the gradient passes as if nothing was done
    output      add noise, clamp, reduce precision; the activation that follows is digital

Precision is `p` levels per unit, that is 2 p + 1 levels on [-1, 1]. "b bits" here means p = 2^b, as
in the figures of the paper; counting all levels it is one bit more. The amount of noise is given as
an error probability: that a value on a level is read as another one.

Differences from their code: normalisation layers stay digital; values are scaled to [-1, 1] by the
largest one of the tensor, seen on images that were calibrated with, instead of being cut off there
(`scale="unit"` cuts); and noise has a generator of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.families.choices import check_choice
from zoo.families.continuous_depth.blocks import TimeVaryingConv2d
from zoo.families.continuous_depth.image_networks import TimeChannelConv2d

__all__ = [
    "AnalogConfig",
    "AnalogLayer",
    "Scale",
    "gradient_error",
    "noise_std",
    "reduce_precision",
    "to_analog",
]

Scale = Literal["calibrated", "unit"]

_FLOAT32_LEVELS = 2**22
"""Levels per unit up to which float32 has digits for half a level."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalogConfig:
    """How a network is run on analog hardware.

    Raises:
        ValueError: a value is out of range.
    """

    bits: float | None = 6.0
    """Precision: 2^bits levels per unit, a whole number. None: not reduced, and without noise."""
    noise: float = 0.0
    """Error probability, in [0, 1). Exact for values on a level, so nominal for outputs, which
    noise is added to before they are put on one."""
    inputs: bool = True
    """Whether inputs of convolutions and linear layers are analog."""
    outputs: bool = True
    """Whether their outputs are."""
    weights: bool = True
    """Whether their weights and biases are."""
    scale: Scale = "calibrated"
    """What 1 stands for: the largest value of the tensor, or 1."""

    def __post_init__(self) -> None:
        if self.bits is not None and not 0 <= self.bits <= 24:
            raise ValueError(f"bits must be from 0 to 24, got {self.bits}")
        if self.bits is not None and abs(2**self.bits - round(2**self.bits)) > 1e-6:
            raise ValueError(f"bits must give a whole number of levels 2^bits, got {self.bits}")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be an error probability in [0, 1), got {self.noise}")
        if self.bits is None and self.noise:
            raise ValueError("noise is measured in levels, so it needs bits")
        check_choice("scale", self.scale, Scale)

    @property
    def levels(self) -> int | None:
        """Levels per unit."""
        return None if self.bits is None else round(2**self.bits)


def _check_levels(levels: int) -> None:
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")


def reduce_precision(x: Tensor, levels: int) -> Tensor:
    """The nearest of `levels` values per unit, ties towards zero; the gradient passes unchanged.

    What is on a level stays there in every dtype that can tell the levels apart: the rounding is in
    float32, and in float64 where that has too few digits.

    Raises:
        ValueError: there is less than one level.
    """
    _check_levels(levels)
    least = torch.float64 if levels > _FLOAT32_LEVELS else torch.float32
    wide = x.detach().to(torch.promote_types(x.dtype, least))
    rounded = torch.sign(wide) * torch.ceil(wide.abs() * levels - 0.5) / levels
    return x + (rounded.to(x.dtype) - x).detach()


def _clamp(x: Tensor) -> Tensor:
    """To [-1, 1]. The gradient passes within, ends included, where quantised values often are;
    that of `torch.clamp` has come and gone there."""
    return torch.where(x.abs() <= 1, x, x.detach().clamp(-1, 1))


def noise_std(error_probability: float, levels: int) -> float:
    """Standard deviation of Gaussian noise that moves a value on a level to another one with the
    given probability: 1 / (2 sqrt(2) p erfinv(1 - EP)).

    Raises:
        ValueError: the probability is not in [0, 1), or there is less than one level.
    """
    _check_levels(levels)
    if not 0 <= error_probability < 1:
        raise ValueError(f"error probability must be in [0, 1), got {error_probability}")
    if error_probability == 0:
        return 0.0
    quantile = torch.erfinv(torch.tensor(1 - error_probability, dtype=torch.float64)).item()
    return 1 / (2 * math.sqrt(2) * levels * quantile)


def _add_noise(x: Tensor, std: float, generator: torch.Generator) -> Tensor:
    if std == 0:
        return x
    # Drawn where the generator is, so that the same seed gives the same noise on all devices.
    noise = torch.randn(x.shape, generator=generator, device=generator.device)
    return x + std * noise.to(x)


class AnalogLayer(nn.Module):
    """A convolution or linear layer whose operands and result are analog.

    Noise is fresh in every call, in training and in evaluation.

    Args:
        layer: with a `weight` and perhaps a `bias`; its parameters stay the digital ones, which
            are trained.
        config: how.
        generator: source of the noise.
    """

    input_scale: Tensor
    output_scale: Tensor

    def __init__(self, layer: nn.Module, config: AnalogConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.layer, self.config, self.generator = layer, config, generator
        self.calibrating = False
        weight = layer.get_parameter("weight")
        self.register_buffer("input_scale", torch.ones((), device=weight.device))
        self.register_buffer("output_scale", torch.ones((), device=weight.device))
        self.std = 0.0
        if config.levels is not None:
            self.std = noise_std(config.noise, config.levels)

    def forward(self, *inputs: Any) -> Tensor:
        """As the layer's, which multiplies its last argument by its weights."""
        config, (*times, x) = self.config, inputs
        if self.calibrating:
            y: Tensor = self.layer(*times, x)
            self.input_scale.copy_(torch.maximum(self.input_scale, x.abs().max()))
            self.output_scale.copy_(torch.maximum(self.output_scale, y.abs().max()))
            return y
        if config.levels is None:
            return self.layer(*times, x)  # type: ignore[no-any-return]
        if config.inputs:
            x = self._enter(x / self.input_scale) * self.input_scale
        y = functional_call(self.layer, self._weights() if config.weights else {}, (*times, x))
        if config.outputs:
            noisy = _add_noise(y / self.output_scale, self.std, self.generator)
            y = reduce_precision(_clamp(noisy), config.levels) * self.output_scale
        return y

    def _enter(self, x: Tensor) -> Tensor:
        assert self.config.levels is not None
        quantised = reduce_precision(_clamp(x), self.config.levels)
        return _add_noise(quantised, self.std, self.generator)

    def _weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, value in self.layer.named_parameters():
            stored = value.detach()
            one = stored.new_ones(())
            if self.config.scale == "calibrated" and stored.any():
                one = stored.abs().max()
            weights[name] = value + (self._enter(stored / one) * one - stored)
        return weights


_ANALOG = (nn.Linear, nn.modules.conv._ConvNd, TimeVaryingConv2d, TimeChannelConv2d)
_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
"""Multiply by nothing."""


def to_analog(
    network: nn.Module,
    config: AnalogConfig,
    *,
    seed: int = 0,
    calibrate: Iterable[Tensor] = (),
) -> nn.Module:
    """A copy of a network with analog convolutions and linear layers; all else stays digital.

    Convolutions of ODE blocks, whose weights are functions of time, are among them; what is analog
    there is what is stored. A layer that occurs under several paths stays one layer. Of a network
    that is itself such a layer, it is the `AnalogLayer`.

    Args:
        network: stays as it is.
        config: how.
        seed: of the noise; the same seed gives the same noise.
        calibrate: batches of inputs whose largest values set the scales, for
            `config.scale="calibrated"`. Take training images.

    Raises:
        ValueError: there are no convolutions or linear layers, or nothing to calibrate with; or
            an `nn.MultiheadAttention`, which multiplies by the weights of its layers itself, or
            another layer with a matrix, which would stay digital.
    """
    for path, module in network.named_modules():
        where, kind = path or "the network", type(module).__name__
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"{where} is an nn.MultiheadAttention, which multiplies by the weights of its "
                "layers itself, so that they cannot be analog"
            )
        if not isinstance(module, (*_ANALOG, *_LOOKED_UP)) and _is_layer_with_matrix(module):
            raise ValueError(
                f"{where} is a {kind}, which has a matrix that cannot be made analog: only "
                "convolutions and linear layers can"
            )
    network = copy.deepcopy(network)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[nn.Module, AnalogLayer] = {}
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if not isinstance(module, _ANALOG):
            continue
        if module not in made:
            made[module] = AnalogLayer(module, config, generator)
        if not path:
            network = made[module]
            break
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, made[module])
    layers = list(made.values())
    if not layers:
        raise ValueError(f"{type(network).__name__} has no convolutions or linear layers")
    if config.scale == "calibrated" and config.levels is not None:
        _calibrate(network, layers, calibrate)
    return network


def _is_layer_with_matrix(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return next(module.children(), None) is None and any(p.ndim > 1 for p in own)


@torch.no_grad()
def _calibrate(network: nn.Module, layers: list[AnalogLayer], batches: Iterable[Tensor]) -> None:
    was_training = network.training
    network.eval()
    for layer in layers:
        layer.calibrating = True
        layer.input_scale.zero_()
        layer.output_scale.zero_()
    seen = False
    for batch in batches:
        network(batch)
        seen = True
    for layer in layers:
        layer.calibrating = False
        # A layer that has seen zeros only, or was not used, keeps the scale of its kind.
        layer.input_scale.masked_fill_(layer.input_scale == 0, 1.0)
        layer.output_scale.masked_fill_(layer.output_scale == 0, 1.0)
    network.train(was_training)
    if not seen:
        raise ValueError("scale='calibrated' needs batches to calibrate with")


def gradient_error(
    activation: Any,
    *,
    levels: int = 256,
    error_probability: float = 0.5,
    largest: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """By how much noise moves the derivative of an activation behind one analog product.

    Inputs and weights run over all levels up to `largest`. Each operand is made noisy, clamped and
    quantised, as is their product; the error is |f'(noisy product) - f'(exact product)|. The
    derivative is torch's, which is 0 for ReLU at 0.

    Args:
        activation: elementwise, a layer or a function.
        levels: per unit.
        error_probability: of the noise.
        largest: of inputs and weights, in (0, 1].
        seed: of the noise.

    Returns:
        The error and the exact product, both with one row for each input and one column for each
        weight.

    Raises:
        ValueError: `levels`, `error_probability` or `largest` is out of range.
    """
    if not 0 < largest <= 1:
        raise ValueError(f"largest must be in (0, 1], got {largest}")
    generator = torch.Generator().manual_seed(seed)
    std = noise_std(error_probability, levels)
    grid = torch.arange(-levels, levels + 1, dtype=torch.float64) / levels
    grid = grid[grid.abs() <= largest + 1e-12]

    def read(x: Tensor) -> Tensor:
        return reduce_precision(_clamp(_add_noise(x, std, generator)), levels)

    exact = grid[:, None] * grid[None, :]
    shape = exact.shape
    noisy = read(read(grid[:, None].expand(shape)) * read(grid[None, :].expand(shape)))

    def derivative(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation(x).sum(), x)
        return slope

    return (derivative(noisy) - derivative(exact)).abs(), exact
