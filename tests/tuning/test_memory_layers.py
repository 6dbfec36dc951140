"""Tests of the layers that keep less: each against the plain layer of torch, and by its bytes."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from zoo.families.continuous_depth.blocks import TimeVaryingConv2d
from zoo.families.continuous_depth.image_networks import TimeChannelConv2d
from zoo.tuning.memory import convolution, graph_bytes, restore_memory, save_memory

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
DIMENSIONS = st.sampled_from([1, 2, 3])
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
"""Relative to the largest value; of bfloat16, two units in its last place."""


def saving(layer: nn.Module) -> nn.Module:
    """A copy of a layer that saves memory, in a network where nobody keeps its output."""
    ours = copy.deepcopy(layer)
    report = save_memory(nn.Sequential(ours, frozen(nn.Linear(1, 1))))
    assert list(report.converted) == ["0"]
    assert isinstance(ours, type(layer))
    assert type(ours) is not type(layer)
    return ours


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def gradients(layer: nn.Module, x: Tensor, *, needed: bool) -> dict[str, Tensor | None]:
    """Output and all gradients of a pass, under a weighting that tells elements apart."""
    x = x.detach().clone().requires_grad_(needed)
    y = layer(x if x.is_leaf and not needed else x + 0)  # not a leaf, so that it may be overwritten
    y = y[0] if isinstance(y, tuple) else y
    found: dict[str, Tensor | None] = {"y": y.detach()}
    if y.requires_grad:
        weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        (y * weights).sum().backward()
    found["x"] = x.grad
    for name, parameter in layer.named_parameters():
        found[name] = parameter.grad
        parameter.grad = None
    return found


def assert_equal(ours: dict[str, Any], plain: dict[str, Any], *, rounding: float = 0.0) -> None:
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        if expected is None:
            assert ours[name] is None, name
            continue
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        scale = float(expected.abs().max()) if expected.numel() and rounding else 1.0
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=rounding * scale, equal_nan=True, msg=name
        )


def inputs(shape: tuple[int, ...], dtype: torch.dtype, innermost: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.to(dtype)
    innermost &= len(shape) >= 4
    return x.contiguous(memory_format=FORMATS[len(shape) - 2]) if innermost else x


def require(module: nn.Module, **needed: bool) -> nn.Module:
    for name, value in needed.items():
        if getattr(module, name, None) is not None:
            getattr(module, name).requires_grad_(value)
    return module


# --- convolution ---------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_a_convolution_equals_the_plain_one(data: st.DataObject) -> None:
    dims, groups = data.draw(DIMENSIONS), data.draw(st.sampled_from([1, 2]))
    transposed = data.draw(st.booleans())
    options: dict[str, Any] = {
        "kernel_size": tuple(data.draw(st.integers(1, 3)) for _ in range(dims)),
        "dilation": data.draw(st.integers(1, 2)),
        "groups": groups,
        "bias": data.draw(st.booleans()),
        "stride": data.draw(st.integers(1, 2)),
        "padding": data.draw(st.integers(0, 1)),
    }
    if transposed:
        options["output_padding"] = data.draw(st.integers(0, options["stride"] - 1))
    else:
        options["padding_mode"] = data.draw(
            st.sampled_from(["zeros", "circular", "reflect", "replicate"])
        )
        if data.draw(st.booleans()):
            options |= {"padding": data.draw(st.sampled_from(["same", "valid"])), "stride": 1}
    dtype = data.draw(DTYPES)
    layer = (TRANSPOSED if transposed else CONVS)[dims](4, 4, **options).to(dtype)
    if data.draw(st.booleans()) and dims > 1:
        layer.to(memory_format=FORMATS[dims])
    require(layer, weight=data.draw(st.booleans()), bias=data.draw(st.booleans()))
    shape = (4, *(data.draw(st.integers(5, 7)) for _ in range(dims)))
    batched = data.draw(st.booleans())
    x = inputs((2, *shape) if batched else shape, dtype, batched and data.draw(st.booleans()))
    needed = data.draw(st.booleans())
    ours, plain = saving(layer), layer
    found, expected = (gradients(one, x, needed=needed) for one in (ours, plain))
    bias, reference = found.pop("bias", None), expected.pop("bias", None)
    assert_equal(found, expected)
    # The plain one sums it together with the gradient of the weight, in another order.
    assert_equal({"bias": bias}, {"bias": reference}, rounding=ROUNDING[dtype])
    assert found["y"].stride() == expected["y"].stride()
    if needed:
        assert found["x"].stride() == expected["x"].stride()
    assert graph_bytes(ours, x) <= graph_bytes(plain, x)


@pytest.mark.parametrize(("for_x", "for_weight", "for_bias"), itertools.product([0, 1], repeat=3))
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_what_a_convolution_keeps(
    kind: type[nn.Module], for_x: int, for_weight: int, for_bias: int
) -> None:
    """The input where the weight is trained; weights are there anyway."""
    layer = require(kind(3, 5, 3), weight=bool(for_weight), bias=bool(for_bias))
    model = nn.Sequential(nn.Sigmoid(), layer)  # keeps its output, which is counted once
    x = torch.randn(2, 3, 8, 8, requires_grad=bool(for_x))
    kept = x.numel() * 4 * bool(for_x or for_weight)
    save_memory(model)
    assert graph_bytes(model, x) == kept
    model[0] = nn.Softshrink()  # keeps its input, which is the batch
    assert graph_bytes(model, x) == x.numel() * 4 * for_weight


def test_a_convolution_as_a_function_takes_what_that_of_torch_takes() -> None:
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    weight, bias = torch.randn(4, 3, 2, 3), torch.randn(4)
    for options in ({}, {"padding": "same"}, {"padding": (1, 2), "stride": 2}, {"dilation": 2}):
        ours = convolution(x, weight, bias, **options)  # type: ignore[arg-type]
        plain = nn.functional.conv2d(x, weight, bias, **options)  # type: ignore[arg-type]
        assert torch.equal(ours, plain)
        found, expected = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, plain))
        assert torch.equal(found, expected)


def test_what_is_not_kept_is_freed_and_what_is_goes_through_hooks_around_it() -> None:
    """Of `save_on_cpu`, of a checkpoint: they are handed weights and masks, and no inputs."""
    layers = [nn.Conv2d(3, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(3, 2, 2)]
    plain = frozen(nn.Sequential(*layers))
    ours = copy.deepcopy(plain)
    save_memory(ours)
    x = inputs((2, 3, 9, 9), torch.float32).requires_grad_()
    expected = torch.autograd.grad(plain(x).square().sum(), x)[0]
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        seen.append(tensor)
        return len(seen) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: seen[place].clone()):
        y = ours(x)
    assert [t.dtype for t in seen] == [torch.float32, torch.bool, torch.int64, torch.float32]
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)
    again = checkpoint(ours, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], expected)
    hidden = x * 2
    y, gone = ours[0](hidden), weakref.ref(hidden)
    del hidden
    assert gone() is None
    assert y.requires_grad


def test_a_weight_that_is_changed_before_the_backward_pass() -> None:
    for one in (layer := frozen(nn.Conv2d(2, 2, 1)), saving(layer)):
        y = one(torch.randn(1, 2, 3, 3, requires_grad=True))
        one.weight.mul_(2)  # type: ignore[operator]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("innermost", [False, True])
def test_an_empty_batch(innermost: bool) -> None:
    layer = require(nn.Conv2d(2, 3, 3), weight=False)
    x = inputs((0, 2, 5, 5), torch.float32, innermost)
    assert_equal(gradients(saving(layer), x, needed=True), gradients(layer, x, needed=True))


@pytest.mark.parametrize("kind", [TimeVaryingConv2d, TimeChannelConv2d])
def test_a_convolution_with_weights_of_depth(kind: Any) -> None:
    options = {"nodes": 3, "basis": "piecewise_linear"} if kind is TimeVaryingConv2d else {}
    layer = kind(2, 4, **options)
    layer.weight.requires_grad_(False)
    ours = copy.deepcopy(layer)
    save_memory(ours)
    x = inputs((2, 2, 6, 6), torch.float32).requires_grad_()
    for one in (ours, layer):
        one(0.3, one_x := x.detach().clone().requires_grad_()).square().sum().backward()
        one.found = one_x.grad, one.bias.grad  # type: ignore[union-attr]
    torch.testing.assert_close(ours.found, layer.found, rtol=1e-6, atol=1e-5)
    plane = 6 * 6 * 4
    kept = {TimeVaryingConv2d: 4 * 2 * 9 * 4, TimeChannelConv2d: plane}[kind]
    assert graph_bytes(ours, (0.3, x)) == kept, "a mean of weights, or the plane of the time"


# --- batch normalisation -------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_a_batch_normalisation_equals_the_plain_one(data: st.DataObject) -> None:
    dims, dtype = data.draw(DIMENSIONS), data.draw(DTYPES)
    layer = NORMS[dims](
        4,
        affine=data.draw(st.booleans()),
        momentum=data.draw(st.sampled_from([0.1, None])),
        track_running_stats=data.draw(st.booleans()),
    )
    if data.draw(st.booleans()):
        layer.to(dtype)  # else, as under autocasting, of float32 on another dtype
    elif dtype == torch.float64:
        return
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(1.5 + torch.rand_like(tensor) * (2 if "var" in name else -2))
    layer.train(data.draw(st.booleans()))
    require(layer, weight=data.draw(st.booleans()), bias=data.draw(st.booleans()))
    shape = (3, 4, *[3] * data.draw(st.integers(0 if dims == 1 else dims, dims)))
    x = inputs(shape, dtype, data.draw(st.booleans()))
    needed = data.draw(st.booleans())
    ours, plain = saving(layer), layer
    found, expected = (gradients(one, x, needed=needed) for one in (ours, plain))
    assert_equal(found, expected, rounding=ROUNDING[dtype])
    assert found["y"].stride() == expected["y"].stride()
    for one, other in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other), "statistics and the number of batches move alike"


def test_what_a_batch_normalisation_keeps() -> None:
    x, size = torch.randn(8, 16, 8, 8), 8 * 16 * 8 * 8 * 4
    model = nn.Sequential(nn.Conv2d(16, 16, 1), norm := nn.BatchNorm2d(16))
    frozen(norm).eval()
    assert graph_bytes(model, x) == size, "of the convolution it is the batch; the norm's is not"
    save_memory(model)
    scale = 16 * 4
    assert graph_bytes(model, x) == scale
    require(norm, bias=True)
    assert graph_bytes(model, x) == scale
    require(norm, weight=True)
    assert graph_bytes(model, x) == size
    frozen(norm).train()
    assert graph_bytes(model, x) == size + 2 * scale, "with the statistics of the batch"


def test_a_batch_normalisation_refuses_what_the_plain_one_refuses() -> None:
    ours = saving(frozen(nn.BatchNorm2d(3)).eval())
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(torch.randn(2, 3, 4, requires_grad=True))


# --- activations ---------------------------------------------------------------------------------

ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.ReLU6(inplace=True),
    nn.Hardtanh(-0.5, 2.0),
    nn.LeakyReLU(0.2),
    nn.LeakyReLU(0.2, inplace=True),
    frozen(nn.PReLU()),
    frozen(nn.PReLU(3)),
]
EDGES = [-torch.inf, torch.inf, 0.0, -0.0, 6.0, -0.5, 2.0, 1e-45, -1e-45, 3e38, -3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_an_activation_equals_the_plain_one(layer: nn.Module, dtype: torch.dtype) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    # The gradient at NaN is that of a ReLU; of the others it differs between torch's own kernels.
    last = torch.nan if type(layer) is nn.ReLU else 1.0
    x = torch.cat((torch.tensor([*EDGES, last], dtype=dtype), inputs((60,), dtype)))
    x = x.view(2, 3, 3, 4)
    ours = saving(layer)
    for view in (x, x.contiguous(memory_format=torch.channels_last), x[0]):
        found, expected = (gradients(one, view, needed=True) for one in (ours, layer))
        assert_equal(found, expected)
        assert found["y"].stride() == expected["y"].stride()


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_an_activation_keeps_a_byte_per_element(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), copy.deepcopy(layer), frozen(nn.Conv2d(3, 3, 1)))
    ours = copy.deepcopy(plain)
    save_memory(ours)
    assert graph_bytes(ours, x) == x.numel()
    for one in (plain, ours):
        one[2].requires_grad_()
    kept = graph_bytes(ours, x)
    assert kept == graph_bytes(plain, x), "what the trained convolution keeps is shared"
    assert kept >= 4 * x.numel()


def test_a_parametric_relu_that_is_trained_is_the_plain_one() -> None:
    layer = nn.PReLU(3)
    x = inputs((2, 3, 4), torch.float64).float()
    assert_equal(gradients(saving(layer), x, needed=True), gradients(layer, x, needed=True))


def test_in_place_means_in_place() -> None:
    """Who reads the input afterwards sees the result, and its gradient."""
    found = []
    for layer in (nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True)):
        for one in (layer, saving(layer)):
            x = torch.linspace(-1, 1, 8, requires_grad=True)
            shared = x * 2
            y = one(shared)
            (y * shared).sum().backward()
            assert y.data_ptr() == shared.data_ptr()
            found.append(x.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


# --- pooling -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_a_pooling_equals_the_plain_one(data: st.DataObject) -> None:
    dims, dtype, maximum = data.draw(DIMENSIONS), data.draw(DTYPES), data.draw(st.booleans())
    if dims == 3 and not maximum and dtype == torch.bfloat16:
        return  # which torch has not
    options: dict[str, Any] = {
        "kernel_size": data.draw(st.integers(2, 3)),
        "stride": data.draw(st.sampled_from([None, 1, 2])),
        "padding": data.draw(st.integers(0, 1)),
        "ceil_mode": data.draw(st.booleans()),
    }
    if maximum:
        options["dilation"] = data.draw(st.integers(1, 2))
        options["return_indices"] = data.draw(st.booleans())
    else:
        options["count_include_pad"] = data.draw(st.booleans())
        if dims > 1:
            options["divisor_override"] = data.draw(st.sampled_from([None, 3]))
    layer = (MAX_POOLS if maximum else AVG_POOLS)[dims](**options)
    shape = (3, *(data.draw(st.integers(5, 7)) for _ in range(dims)))
    batched = data.draw(st.booleans())
    x = inputs((2, *shape) if batched else shape, dtype, batched and data.draw(st.booleans()))
    ours = saving(layer)
    found, expected = (gradients(one, x, needed=True) for one in (ours, layer))
    assert_equal(found, expected)
    assert found["y"].stride() == expected["y"].stride()
    if options.get("return_indices"):
        assert torch.equal(ours(x.requires_grad_())[1], layer(x)[1])


def test_what_poolings_keep() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for pool, kept in ((nn.MaxPool2d(2), 8 * x.numel() // 4), (nn.AvgPool2d(2), 0)):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), pool)
        assert graph_bytes(model, x) == kept + 4 * x.numel()
        save_memory(model)
        assert graph_bytes(model, x) == kept


# --- all of them, under what torch can do with a layer -------------------------------------------


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """One of each, frozen, with the shape of a small input."""
    norm = nn.BatchNorm2d(2).eval()
    norm.running_mean.uniform_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return {
        "Conv1d": (nn.Conv1d(2, 3, 3), (2, 5)),
        "Conv2d": (nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2), (2, 5, 4)),
        "Conv2d, same": (nn.Conv2d(2, 3, 2, padding="same"), (2, 4, 3)),
        "Conv3d": (nn.Conv3d(2, 2, 2), (2, 3, 3, 2)),
        "ConvTranspose2d": (nn.ConvTranspose2d(2, 3, 3, 2, output_padding=1), (2, 3, 2)),
        "BatchNorm2d": (norm, (2, 3, 3)),
        "ReLU": (nn.ReLU(), (2, 3, 3)),
        "Hardtanh": (nn.Hardtanh(), (2, 3, 3)),
        "LeakyReLU": (nn.LeakyReLU(0.1), (2, 3, 3)),
        "PReLU": (nn.PReLU(2), (2, 3, 3)),
        "MaxPool1d": (nn.MaxPool1d(2), (2, 6)),
        "MaxPool2d": (nn.MaxPool2d(2, 1), (2, 3, 4)),
        "AvgPool2d": (nn.AvgPool2d(2, 1), (2, 3, 4)),
        "AvgPool3d": (nn.AvgPool3d(2), (2, 4, 2, 2)),
    }


EACH = pytest.mark.parametrize("name", layers())


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """The layer of ours, the plain one, and an input of two examples."""
    layer, shape = layers()[name]
    frozen(layer).to(dtype)
    x = inputs((2, *shape), dtype)
    return saving(layer), layer, x


@EACH
def test_derivatives_of_first_and_second_order(name: str) -> None:
    ours, _, x = pair(name)
    require(ours, bias=True)
    assert torch.autograd.gradcheck(ours, x.requires_grad_())
    assert torch.autograd.gradgradcheck(ours, x.requires_grad_())


class _WrittenOut(nn.PReLU):
    """That of torch has no third derivative in a `vmap`."""

    def forward(self, input: Tensor) -> Tensor:
        slope = self.weight.view(-1, *[1] * (input.ndim - 2))
        return torch.where(input > 0, input, slope * input)


@EACH
def test_transforms_of_functions(name: str) -> None:
    ours, plain, x = pair(name)
    if name == "PReLU":
        plain.__class__ = _WrittenOut

    def loss(layer: nn.Module) -> Any:
        return lambda one: layer(one[None]).pow(3).sum()

    for transform in (
        lambda layer: vmap(layer)(x[:, None]),
        lambda layer: vmap(grad(loss(layer)))(x),
        lambda layer: grad(lambda some: vmap(loss(layer))(some).sum())(x),
        lambda layer: vmap(jacrev(grad(loss(layer))))(x),
        lambda layer: jvp(layer, (x,), (x.cos(),))[1],
        lambda layer: jacfwd(loss(layer))(x[0]),
        lambda layer: jacfwd(grad(loss(layer)))(x[0]),
    ):
        torch.testing.assert_close(transform(ours), transform(plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "BatchNorm2d", "PReLU"])
def test_weights_of_an_ensemble_of_layers(name: str) -> None:
    """Within `vmap` a weight does not look as if it had a gradient, when one is taken outside."""
    ours, plain, x = pair(name)
    stacked = {n: torch.stack((p, 2 * p)) for n, p in plain.named_parameters()}

    def loss(layer: nn.Module) -> Any:
        def total(weights: dict[str, Tensor]) -> Tensor:
            outputs = vmap(lambda one: functional_call(layer, one, (x,)))(weights)
            return outputs.square().sum()

        return total

    found, expected = grad(loss(ours))(stacked), grad(loss(plain))(stacked)
    assert any(bool(value.abs().max() > 0) for value in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@EACH
def test_autocasting(name: str) -> None:
    ours, plain, x = pair(name, torch.float32)
    require(ours, bias=True)
    require(plain, bias=True)
    found, expected = {}, {}
    for one, result in ((ours, found), (plain, expected)):
        with torch.autocast("cpu", torch.bfloat16):
            result.update(gradients(one, x, needed=True))
    assert_equal(found, expected, rounding=ROUNDING[torch.bfloat16])


def test_compiling_without_a_break() -> None:
    """All kinds in one network, with gradients of what is trained."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.BatchNorm2d(4).eval(),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 4, 2),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU6(),
        nn.AvgPool2d(2),
        nn.PReLU(),
    )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    ours = copy.deepcopy(network)
    save_memory(ours)
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found, expected = gradients(compiled, x, needed=True), gradients(network, x, needed=True)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_equal(found, expected, rounding=1e-5)
    assert compiled(x.requires_grad_()).grad_fn is not None
    assert graph_bytes(compiled, x) < graph_bytes(network, x) / 2


def test_hooks_and_subclasses_and_parametrizations() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    network = nn.Sequential(
        nn.Conv2d(2, 2, 1),
        Doubled(2, 2, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
    )
    seen: list[str] = []
    network[0].register_forward_hook(lambda *_: seen.append("forward"))
    network[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    network[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    expected = network(x).detach()
    classes = [type(module) for module in network]
    assert save_memory(network).converted == {"0": "Conv2d"}
    assert [type(module) for module in network][1:] == classes[1:]
    seen.clear()
    y = network(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert seen == ["before", "forward", "backward"]
    restore_memory(network)
    assert [type(module) for module in network] == classes
