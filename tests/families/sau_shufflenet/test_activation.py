"""SAU against the convolution it is defined by, in many digits, and against finite differences."""

from __future__ import annotations

import copy
import math
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from zoo.families.sau_shufflenet import SAU, SAU_PRESETS, sau
from zoo.families.sau_shufflenet import activation as module

ALPHAS = (-0.3, 0.0, 0.15, 0.9)
BETAS = (0.5, 1.0, 5.0, 50.0)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def convolved(x: float, alpha: float, beta: float) -> float:
    """Leaky ReLU convolved with a normal density of standard deviation 1 / beta, by quadrature."""
    with mpmath.workdps(25):
        x, alpha, beta = mpmath.mpf(x), mpmath.mpf(alpha), mpmath.mpf(beta)

        def integrand(t: mpmath.mpf) -> mpmath.mpf:
            u = x + t / beta
            return (u if u > 0 else alpha * u) * mpmath.npdf(t)

        kink = -beta * x
        points = sorted({mpmath.mpf(-14), mpmath.mpf(14), *([kink] if abs(kink) < 14 else [])})
        return float(mpmath.quad(integrand, points))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", BETAS)
def test_value_is_the_convolution(alpha: float, beta: float) -> None:
    x = torch.tensor([-9.0, -1.5, 0.0, 0.3, 4.0]) / beta
    expected = torch.tensor([convolved(float(v), alpha, beta) for v in x], dtype=torch.float64)
    torch.testing.assert_close(sau(x.double(), alpha, beta), expected, rtol=1e-13, atol=2e-15)
    allowed = 4e-7 / min(beta, 1.0)
    torch.testing.assert_close(sau(x, alpha, beta).double(), expected, rtol=3e-7, atol=allowed)


# Alpha, beta, x, value, and derivatives in x, alpha and beta, from 40-digit quadrature.
VECTORS = [
    (0.15, 1.0, -4.0, -0.59999392653, 0.150026920556, -4.00000714526, -1.137556919e-4),
    (0.15, 1.0, -0.1, 0.283295031524, 0.541146338315, -0.450935331205, -0.337409665355),
    (0.15, 1.0, 0.0, 0.339100938341, 0.575, -0.398942280401, -0.339100938341),
    (0.15, 1.0, 4.0, 4.00000607347, 0.999973079444, -7.14525843e-6, -1.137556919e-4),
    (0.15, 4.0, -0.1, 0.0339682528513, 0.442891519631, -0.157609709237, -0.0195643512036),
    (0.25, 2.0, 0.1, 0.215085488449, 0.684444782079, -0.153447317932, -0.0733205051204),
    (0.0, 1.0, -4.0, 7.14525843e-6, 3.16712418e-5, -4.00000714526, -1.33830226e-4),
    (0.15, 20000.0, 0.0, 1.69550469e-5, 0.575, -1.99471140e-5, -8.4775e-10),
]


@pytest.mark.parametrize("vector", VECTORS)
def test_known_values_and_derivatives(vector: tuple[float, ...]) -> None:
    x, alpha, beta = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for v in (vector[2], vector[0], vector[1])
    )
    y = sau(x, alpha, beta)
    found = torch.stack([y, *torch.autograd.grad(y, (x, alpha, beta))]).detach()
    expected = torch.tensor(vector[3:], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-11)
    fixed = sau(x, vector[0], vector[1])
    (slope,) = torch.autograd.grad(fixed, x)
    torch.testing.assert_close(slope, expected[1], rtol=1e-9, atol=1e-12)


def shaped(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("beta", [0.5, 2.0, 8.0])
def test_derivatives_by_finite_differences(beta: float) -> None:
    x = shaped(2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda x: sau(x, 0.15, beta), x)
    assert torch.autograd.gradgradcheck(lambda x: sau(x, 0.15, beta), x)
    for shape in ((), (3,)):
        parameters = [torch.full(shape, v, dtype=torch.float64) for v in (0.15, beta)]
        inputs = (x, *(p.requires_grad_() for p in parameters))
        assert torch.autograd.gradcheck(sau, inputs)
        assert torch.autograd.gradgradcheck(sau, inputs)


def test_one_trained_parameter_and_one_number() -> None:
    x, alpha = shaped(3, 4), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: sau(x, a, 3.0), (x, alpha))
    beta = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: sau(x, 0.2, b), (x, beta))
    # The input may need no gradient, as that of a first layer.
    assert torch.autograd.gradcheck(lambda a: sau(x.detach(), a, 3.0), (alpha,))


def test_third_derivative_with_trained_parameters() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
    derivative = sau(x, alpha, 2.0).sum()
    for _ in range(3):
        (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
    z = 2.0 * x.detach()
    expected = -0.85 * 4.0 * z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(derivative.detach(), expected)


@pytest.mark.parametrize("preset", ["2", "2-trained"])
def test_a_gradient_penalty_reaches_the_layer_below(preset: str) -> None:
    """Double backward as it is used, against the derivative of the closed form."""
    below, act = nn.Linear(4, 4).double(), SAU.preset(preset).double()
    x = shaped(5, 4)
    (gradient,) = torch.autograd.grad(act(below(x)).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    found = below.weight.grad
    assert found is not None
    below.zero_grad()
    h = below(x)
    slope = 0.15 + 0.85 * torch.special.ndtr(2.0 * h)
    (slope @ below.weight).square().sum().backward()
    torch.testing.assert_close(found, below.weight.grad)


finite = st.floats(allow_nan=False, allow_infinity=False, width=16)


@settings(deadline=None, max_examples=60)
@given(
    x=st.lists(finite, min_size=1, max_size=8),
    alpha=st.floats(-0.5, 0.95),
    log_beta=st.floats(-3, math.log(1e5)),
    dtype=st.sampled_from(DTYPES),
    trained=st.booleans(),
)
def test_finite_and_between_its_bounds(
    x: list[float], alpha: float, log_beta: float, dtype: torch.dtype, trained: bool
) -> None:
    beta = math.exp(log_beta)
    inputs = torch.tensor(x, dtype=dtype, requires_grad=True)
    a = torch.tensor(alpha, dtype=torch.float64, requires_grad=trained)
    b = torch.tensor(beta, dtype=torch.float64, requires_grad=trained)
    y = sau(inputs, a, b) if trained else sau(inputs, alpha, beta)
    y.sum().backward()
    assert y.dtype == dtype
    values, slope = y.detach().double(), inputs.grad
    assert slope is not None
    leaky = F.leaky_relu(inputs.detach().double(), alpha)
    top = (1 - alpha) / (beta * math.sqrt(2 * math.pi))
    allowed = 2 * EPS[dtype] * (1 + inputs.detach().double().abs() + top)
    assert (values >= leaky - allowed).all()
    assert (values <= leaky + top + allowed).all()
    assert (slope.double() >= alpha - 2 * EPS[dtype]).all()
    assert (slope.double() <= 1 + 2 * EPS[dtype]).all()
    if trained:
        assert a.grad is not None
        assert b.grad is not None
        assert torch.isfinite(a.grad)
        assert torch.isfinite(b.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [1.0, 20_000.0, 1e5])
def test_extreme_inputs(dtype: torch.dtype, beta: float) -> None:
    info = torch.finfo(dtype)
    ends = [info.max, info.max / 4, 3.3, 1.0, 1e-5, info.tiny, info.tiny * info.eps, 0.0]
    x = torch.tensor([*ends, *(-v for v in ends)], dtype=dtype, requires_grad=True)
    y = sau(x, 0.15, beta)
    y.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    far = x.detach().abs() * beta > 20
    torch.testing.assert_close(y[far], F.leaky_relu(x[far], 0.15), rtol=2 * EPS[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_value(dtype: torch.dtype) -> None:
    x = torch.linspace(-6, 6, 2001).to(dtype)
    for beta in (1.0, 4.0, 20_000.0):
        expected = sau(x.double(), 0.15, beta).to(dtype)
        # The nearest value, or the other neighbour where float32 has to break a tie.
        bits, wanted = (t.view(torch.int16).int() for t in (sau(x, 0.15, beta), expected))
        assert int((bits - wanted).abs().max()) <= 1
        assert (bits == wanted).float().mean() > 0.99


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [2.0, 1e5])
def test_a_trained_layer_in_half_precision(
    beta: float, dtype: torch.dtype, channels: int | None
) -> None:
    """Against float64, from the parameters as they are rounded."""
    layer = SAU(0.15, beta, train_alpha=True, train_beta=True, channels=channels).to(dtype)
    x = (torch.linspace(-3, 3, 14).view(7, 2) / beta).to(dtype).requires_grad_()
    exact, wide = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    assert isinstance(exact.beta, Tensor)
    assert exact.beta.detach().allclose(torch.tensor(beta, dtype=torch.float64), rtol=0.05)
    y, expected = layer(x), exact(wide)
    assert y.dtype == dtype
    y.sum().backward()
    expected.sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    for value, reference in zip(
        found, [expected.detach(), wide.grad, *(p.grad for p in exact.parameters())], strict=True
    ):
        assert value is not None
        assert reference is not None
        allowed = 2 * EPS[dtype] * float(reference.abs().max()) + torch.finfo(dtype).tiny
        torch.testing.assert_close(value.double(), reference, rtol=0, atol=allowed)


def test_limits() -> None:
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    leaky = F.leaky_relu(x, 0.15)
    for beta in (1e2, 1e4, 1e5):
        gap = (sau(x, 0.15, beta) - leaky).abs().max()
        assert gap <= 0.85 / (beta * math.sqrt(2 * math.pi)) * (1 + 1e-12)
    # GELU is what remains for alpha 0 and beta 1 without the Gaussian.
    gelu = sau(x, 0.0, 1.0) - torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(gelu, F.gelu(x), rtol=1e-12, atol=1e-12)
    # A tensor may pass 1, where SAU is the identity, and go on to the other side.
    torch.testing.assert_close(sau(x, torch.tensor(1.0), 2.0), x)
    beyond = sau(x, torch.tensor(1.3, dtype=torch.float64), 5.0)
    expected = torch.tensor([convolved(float(v), 1.3, 5.0) for v in x[::60]], dtype=torch.float64)
    torch.testing.assert_close(beyond[::60], expected)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_agree_with_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, trained: bool, dtype: torch.dtype
) -> None:
    def results() -> list[Tensor]:
        x = shaped(3, 5, 7, 4).detach().to(dtype).requires_grad_()
        alpha, beta = (torch.tensor(v, requires_grad=trained) for v in (0.15, 6.0))
        y = sau(x, alpha, beta) if trained else sau(x, 0.15, 6.0)
        y.backward(shaped(3, 5, 7, 4, seed=1).detach().to(dtype))
        leaves = (x, alpha, beta) if trained else (x,)
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    monkeypatch.setattr(module, "_BLOCK", 64)
    blocks = results()
    monkeypatch.setattr(module, "_by_blocks", lambda *_: False)
    plain = results()
    assert len(blocks) == (4 if trained else 2)
    for a, b in zip(blocks, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * EPS[dtype], atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("alpha", "beta", "trained"),
    [(0.15, 20_000.0, False), (0.15, 20_000.0, True), (-0.3, 1e5, True), (1.3, 6_000.0, True)],
)
def test_a_step_but_for_the_inputs_near_zero(
    alpha: float, beta: float, dtype: torch.dtype, trained: bool
) -> None:
    x = torch.randn(3 * 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = torch.linspace(-12, 12, 97, dtype=torch.float64) / beta
    x[1000:1097] = near  # in few columns of the tables that are searched; then in most of them
    spread = x.clone()
    spread[::11] *= 1 / beta
    grad = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to(dtype)
    for values in (x.to(dtype), spread.to(dtype)):
        inputs = values.clone().requires_grad_()
        a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=trained) for v in (alpha, beta))
        y = sau(inputs, a, b) if trained else sau(inputs, alpha, beta)
        y.backward(grad)
        wide, g = values.double(), grad.double()
        below = 0.5 * torch.special.erfc(beta * wide / math.sqrt(2))
        bump = torch.exp(-((beta * wide) ** 2) / 2) / (beta * math.sqrt(2 * math.pi))
        slope = 1 - (1 - alpha) * below
        expected = wide * slope + (1 - alpha) * bump
        torch.testing.assert_close(
            y.detach(), expected.to(dtype), rtol=4 * EPS[dtype], atol=16 * EPS[dtype] / beta
        )
        assert inputs.grad is not None
        torch.testing.assert_close(
            inputs.grad, (g * slope).to(dtype), rtol=4 * EPS[dtype], atol=8 * EPS[dtype]
        )
        if trained:
            assert a.grad is not None
            assert b.grad is not None
            scale = math.sqrt(len(x)) * max(EPS[dtype], EPS[torch.float32] * 1e-2)
            assert a.grad.item() == pytest.approx(
                (g * (wide * below - bump)).sum().item(), abs=4 * scale
            )
            assert b.grad.item() == pytest.approx(
                ((alpha - 1) / beta * g * bump).sum().item(), rel=1e-5, abs=1e-14
            )


@pytest.mark.parametrize("preset", ["2", "published"])
def test_any_layout(preset: str) -> None:
    base = shaped(2, 6, 5, 3).detach().float()
    weight = shaped(2, 6, 5, 3, seed=1).detach().float()
    layer = SAU.preset(preset)
    expected: list[Tensor] | None = None
    for x in (
        base,
        base.contiguous(memory_format=torch.channels_last),
        base.repeat(1, 2, 1, 1)[:, :6],
        base.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        x = x.detach().requires_grad_()
        y = layer(x)
        if x.is_contiguous(memory_format=torch.channels_last):
            assert y.is_contiguous(memory_format=torch.channels_last)
        (grad,) = torch.autograd.grad(y, x, weight)
        if expected is None:
            expected = [y.detach(), grad]
        torch.testing.assert_close([y.detach(), grad], expected)
    assert layer(base[:0]).shape == (0, 6, 5, 3)


def kept_bytes(function: nn.Module, x: Tensor) -> int:
    """Storage that is kept for backward."""
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x.detach().requires_grad_())
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", SAU_PRESETS)
def test_keeps_no_more_than_gelu(preset: str, dtype: torch.dtype) -> None:
    x = torch.randn(64, 128).to(dtype)
    allowed = kept_bytes(nn.GELU(), x)
    assert allowed == x.nbytes
    parameters = 2 * 4
    assert kept_bytes(SAU.preset(preset), x) <= allowed + parameters


def test_retained_graph_gives_the_same_gradient_twice() -> None:
    x = shaped(50)
    y = sau(x, 0.15, 2.0).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


def test_autocast_keeps_the_dtype_and_computes_in_float32() -> None:
    x = torch.linspace(-4, 4, 101).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = sau(x, 0.15, 2.0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, sau(x.double(), 0.15, 2.0).bfloat16(), rtol=EPS[x.dtype], atol=0)


def test_functional_derivatives_of_torch() -> None:
    x = torch.tensor([-0.5, 0.1], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: sau(x, 0.15, 2.0).sum(), x)
    curvature = 0.85 * 2.0 * torch.exp(-2 * x * x) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(hessian, torch.diag(curvature))
    slope = torch.func.grad(lambda x: sau(x, 0.15, 2.0))(torch.tensor(0.1))
    torch.testing.assert_close(slope, torch.tensor(0.15 + 0.85 * 0.579259709439103))


class ReturnsItsInput(TorchFunctionMode):
    """Counts calls of `to` that return the very tensor they are given."""

    found = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.found += function is Tensor.to and out is args[0]
        return out


@pytest.mark.parametrize("preset", SAU_PRESETS)
def test_nothing_that_is_compiled_returns_its_input(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of such an operation the compiler of PyTorch 2.11 makes a gradient of zero."""
    monkeypatch.setattr(module, "_by_blocks", lambda *arguments: False)
    layer = SAU.preset(preset)
    parameters = (layer.alpha, layer.beta)
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    with ReturnsItsInput() as mode:
        y = module._evaluate(x, *parameters)[0]
        trained = (isinstance(p, Tensor) for p in parameters)
        module._gradients(torch.ones_like(y), x, *parameters, (True, *trained))
        assert torch.ones(1).to(torch.float32) is not None
    assert mode.found == 1  # the one above, to show that they are seen


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["2", "published", "2-trained"])
def test_compiled_equals_eager(preset: str) -> None:
    layer = SAU.preset(preset)
    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True)
    x = shaped(4, 6, 5, 5).detach().float()
    weight = shaped(4, 6, 5, 5, seed=1).detach().float()
    results = []
    for one in (layer, compiled):
        source = x.clone().requires_grad_()
        y = one(source)
        y.backward(weight)
        grads = [p.grad for p in one.parameters()]
        results.append([y.detach(), source.grad, *grads])
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=2e-6)


def test_layer_learns_its_parameters() -> None:
    target, layer = SAU(0.4, 5.0).double(), SAU.preset("1-trained").double()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")
    x = shaped(500).detach()

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = (layer(x) - target(x)).square().sum()
        error.backward()
        return error

    optimizer.step(loss)
    assert isinstance(layer.alpha, nn.Parameter)
    assert layer.alpha.item() == pytest.approx(0.4, rel=1e-3)
    assert layer.log_beta is not None
    assert layer.log_beta.exp().item() == pytest.approx(5.0, rel=1e-3)


def test_layer_state() -> None:
    assert SAU().state_dict() == {}
    assert set(SAU.preset("published").state_dict()) == {"alpha"}
    per_channel = SAU(train_alpha=True, train_beta=True, channels=3)
    assert {n: tuple(p.shape) for n, p in per_channel.named_parameters()} == {
        "alpha": (3,),
        "log_beta": (3,),
    }
    copied = SAU(0.5, 9.0, train_alpha=True, train_beta=True, channels=3)
    copied.load_state_dict(per_channel.state_dict())
    x = torch.randn(2, 3, 4)
    assert torch.equal(copied(x), per_channel(x))
    assert repr(SAU(beta=3)) == "SAU(alpha=0.15, beta=3)"
    whole = SAU(0, 1, train_alpha=True, train_beta=True)
    assert {p.dtype for p in whole.parameters()} == {torch.get_default_dtype()}
    torch.testing.assert_close(whole(x), sau(x, 0.0, 1.0))
    assert "trained" in repr(per_channel)


def test_channels_have_their_own_parameters() -> None:
    layer = SAU(train_alpha=True, train_beta=True, channels=2)
    assert isinstance(layer.alpha, nn.Parameter)
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor([0.0, 0.5]))
    x = torch.randn(3, 2, 4)
    y = layer(x)
    torch.testing.assert_close(y[:, 0], sau(x[:, 0], 0.0, 2.0))
    torch.testing.assert_close(y[:, 1], sau(x[:, 1], 0.5, 2.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAU(alpha=1.0), r"alpha must be below 1 .* got 1.0"),
        (lambda: SAU(alpha=math.nan), "alpha must be below 1"),
        (lambda: SAU(beta=0.0), "beta must be positive and finite, got 0.0"),
        (lambda: SAU(beta=-2.0), "beta must be positive and finite, got -2.0"),
        (lambda: SAU(beta=math.inf), "beta must be positive and finite, got inf"),
        (lambda: SAU(channels=4), "train_alpha or train_beta"),
        (lambda: SAU(train_alpha=True, channels=0), "channels must be at least 1, got 0"),
        (lambda: SAU.preset("3"), "no SAU preset '3'; choose one of published, 1, 2"),
        (lambda: sau(torch.zeros(2), 1.2), "alpha must be below 1"),
        (lambda: sau(torch.zeros(2, 3), torch.zeros(4)), r"alpha has shape \(4,\)"),
        (lambda: sau(torch.zeros(3), torch.zeros(3)), r"alpha has shape \(3,\)"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"floating point tensors, got torch\.int64"):
        sau(torch.arange(3))


# --------------------------------------------------------------------- tensors without values


@pytest.mark.parametrize("preset", ["2", "published", "2-trained"])
def test_shapes_are_known_without_values(preset: str) -> None:
    with FakeTensorMode():
        x = torch.randn(4, 32, requires_grad=True)
        y = SAU.preset(preset)(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert (y.shape, grad.shape) == ((4, 32), (4, 32))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("preset", ["2", "published", "2-trained"])
def test_a_trace_is_of_any_size(preset: str) -> None:
    """Blocks, and columns near the Gaussian, are those of one input."""
    layer = SAU.preset(preset)
    with torch.no_grad():
        for rows in (2, 20_000):
            traced = torch.jit.trace(layer, torch.randn(rows, 32), check_trace=False)
            for x in (torch.randn(5, 32), torch.randn(20_000, 32), 1e-4 * torch.randn(5, 32)):
                torch.testing.assert_close(traced(x), layer(x), rtol=1e-5, atol=1e-6)


def test_a_trained_layer_without_values_is_shown() -> None:
    with torch.device("meta"):
        layer = SAU(train_alpha=True, train_beta=True)
    assert repr(layer) == "SAU(alpha=trained, beta=trained)"
