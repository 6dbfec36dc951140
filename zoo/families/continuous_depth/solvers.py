"""Initial value problems: fixed-step Runge-Kutta methods of our own, adaptive ones of torchdiffeq.

Sources: Chen et al., "Neural Ordinary Differential Equations", NeurIPS 2018 (arXiv:1806.07366),
for the adjoint; Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I" (1993), for
the methods; Williamson, "Low-storage Runge-Kutta schemes", J. Comput. Phys. 35 (1980).

Shape notation used in this folder:

    B   batch; samples do not see each other within a field
    S   the shape of one sample's state
    d   its number of components

A field is a function of `(t, y)` with `t` a plain number and `y` of shape B x S that returns
dy/dt, B x S. Times are plain numbers, so that a fixed grid is a constant of the compiled graph;
there is no gradient with respect to them.

The fixed-step path is a plain loop without data-dependent branches: it compiles as one graph and
exports. With the gradient "discrete" it also goes through `torch.func` and double backward; with
"checkpoint" through double backward alone, and with "adjoint" through neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.errors import SolverError, nearest
from zoo.families.choices import check_choices

__all__ = [
    "ADAPTIVE_METHODS",
    "FIXED_METHODS",
    "METHODS",
    "TABLEAUS",
    "Field",
    "Solution",
    "SolverConfig",
    "Statistics",
    "Tableau",
    "runge_kutta_step",
    "solve",
    "step_grid",
]

Field = Callable[[float, Tensor], Tensor]
"""dy/dt of a time and a state."""

MethodName = Literal[
    "euler", "midpoint", "rk4", "low_storage_rk3", "dopri5", "adaptive_heun", "implicit_adams"
]
GradientMode = Literal["discrete", "checkpoint", "adjoint"]
ErrorControl = Literal["batch", "worst_sample", "each_sample"]

METHODS: tuple[str, ...] = get_args(MethodName)
"""Names of all solvers; those of torchdiffeq have its names."""

FIXED_METHODS: tuple[str, ...] = ("euler", "midpoint", "rk4", "low_storage_rk3")
"""Solvers with `steps` equal steps in each interval, of our own."""

ADAPTIVE_METHODS: tuple[str, ...] = ("dopri5", "adaptive_heun")
"""Solvers that choose their steps by `tolerance`."""

_INSIDE = 1e-9
"""Last stages are evaluated this fraction of a step before its end, and first stages of steps
backwards in time as far after their start: a field that is piecewise constant in time, each piece
with its first moment and without its last, is then seen from inside the step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How to integrate: all of it can be changed on a trained network.

    Raises:
        ValueError: the solver is unknown, a value is of another type or out of range, or two
            choices do not go together.
    """

    method: MethodName = "rk4"
    """Fixed steps: "euler", "midpoint", "rk4", "low_storage_rk3" and (by torchdiffeq)
    "implicit_adams"; adaptive steps: "dopri5", "adaptive_heun"."""
    steps: int = 4
    """Equal steps per interval between two requested times; not used by adaptive solvers."""
    tolerance: float = 1e-3
    """Relative and absolute tolerance of the local error; not used by our fixed-step solvers."""
    gradient: GradientMode = "discrete"
    """"discrete": through the steps, exact. "checkpoint": likewise, but only the state at each
    step is stored, and stages are computed again. "adjoint": an ODE solved back in time (arXiv:
    1806.07366, appendix B), which stores the requested states only and is not exact. Through an
    adjoint, ours and torchdiffeq's, there is no gradient of gradients. Both evaluate the field
    again in the backward pass, and refuse parameters that are others by then."""
    error_control: ErrorControl = "batch"
    """Adaptive solvers: the error is averaged over the batch; is that of its worst sample (steps
    are shared); or each sample is solved alone, which alone makes its result independent of the
    rest of the batch."""
    max_nfe: int = 10_000
    """Largest number of evaluations of the field in one solve; more is an error."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"no solver {self.method!r}.{nearest(str(self.method), METHODS)} "
                f"There are: {', '.join(METHODS)}"
            )
        check_choices(self)
        for name in ("steps", "max_nfe"):
            object.__setattr__(self, name, _plain_integer(getattr(self, name)))
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.steps!r}")
        tolerance: Any = self.tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
            raise ValueError(f"tolerance must be a number, got {tolerance!r}")
        if not (self.tolerance > 0 and math.isfinite(self.tolerance)):
            raise ValueError(f"tolerance must be positive, got {self.tolerance!r}")
        if type(self.max_nfe) is not int:
            raise ValueError(f"max_nfe must be an integer, got {self.max_nfe!r}")
        if self.max_nfe < 1:
            raise ValueError(f"max_nfe must be at least 1, got {self.max_nfe!r}")
        if self.gradient == "checkpoint" and self.method not in FIXED_METHODS:
            raise ValueError(
                f"gradient 'checkpoint' needs a solver of fixed steps "
                f"({', '.join(FIXED_METHODS)}), not {self.method!r}"
            )

    @property
    def is_fixed(self) -> bool:
        """Whether the number of evaluations is known beforehand and samples are independent."""
        return self.method in FIXED_METHODS

    @property
    def is_batch_dependent(self) -> bool:
        """Whether a sample's result depends, within the tolerance, on the rest of its batch."""
        return not self.is_fixed and self.error_control != "each_sample"


def _plain_integer(value: Any) -> Any:
    """An integer of another type, as NumPy's, as one of Python; all else as it is."""
    if isinstance(value, bool | Tensor):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


@dataclasses.dataclass
class Statistics:
    """What a solve cost. The backward figures are filled in by the backward pass.

    Attributes:
        nfe: evaluations of the field in the forward pass.
        nfe_backward: evaluations in backward passes so far, beside those kept from the forward
            pass: none for "discrete", all again for "checkpoint", those of the adjoint's solve.
        accepted: steps taken.
        rejected: steps tried in vain.
        nfe_per_sample: with error control of each sample, its evaluations; `nfe` and
            `nfe_backward` are the largest.
        batch_dependent: whether results depend on the rest of the batch, see `SolverConfig`.
    """

    nfe: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    nfe_per_sample: tuple[int, ...] = ()
    batch_dependent: bool = False

    def count_backward(self, evaluations: int = 1) -> None:
        """Add evaluations of a backward pass."""
        self.nfe_backward += evaluations


@dataclasses.dataclass
class _OfOneSample(Statistics):
    """What the solve of one sample of a batch cost."""

    of_all: Statistics = dataclasses.field(default_factory=Statistics)

    def count_backward(self, evaluations: int = 1) -> None:
        super().count_backward(evaluations)
        self.of_all.nfe_backward = max(self.of_all.nfe_backward, self.nfe_backward)


@dataclasses.dataclass(frozen=True)
class Solution:
    """States at the requested times, the initial one first, each B x S; and what they cost."""

    states: tuple[Tensor, ...]
    statistics: Statistics

    @property
    def last(self) -> Tensor:
        """State at the last time, B x S."""
        return self.states[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tableau:
    """Butcher's coefficients of an explicit Runge-Kutta method.

    Attributes:
        a: row i weighs stages 0..i-1 in the state at which stage i is evaluated.
        b: weights of the stages in the step.
        order: of the global error.
        storage: coefficients (A, B) of Williamson's form with two registers, where there is one:
            r <- A r + h f(y), y <- y + B r.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    storage: tuple[tuple[float, float], ...] | None = None

    @property
    def stages(self) -> int:
        """Evaluations per step."""
        return len(self.b)

    @functools.cached_property
    def c(self) -> tuple[float, ...]:
        """Times of the stages within the step."""
        return tuple(sum(row) for row in self.a)


def _from_low_storage(storage: tuple[tuple[float, float], ...], order: int) -> Tableau:
    """Butcher's coefficients of Williamson's form."""
    register = [0.0] * len(storage)
    state = [0.0] * len(storage)
    rows = []
    for stage, (keep, gain) in enumerate(storage):
        rows.append(tuple(state[:stage]))
        register = [keep * r for r in register]
        register[stage] += 1.0
        state = [y + gain * r for y, r in zip(state, register, strict=True)]
    return Tableau(a=tuple(rows), b=tuple(state), order=order, storage=storage)


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau(a=((),), b=(1.0,), order=1),
    "midpoint": Tableau(a=((), (0.5,)), b=(0.0, 1.0), order=2),
    "rk4": Tableau(
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), order=4
    ),
    "low_storage_rk3": _from_low_storage(
        ((0.0, 1 / 3), (-5 / 9, 15 / 16), (-153 / 128, 8 / 15)), 3
    ),
}
"""The fixed-step methods."""


def runge_kutta_step(tableau: Tableau, field: Field, t: float, h: float, y: Tensor) -> Tensor:
    """One explicit step from `t` to `t + h` (h may be negative); y and the result are B x S."""
    if tableau.storage is not None:
        register: Tensor | None = None
        for (keep, gain), c in zip(tableau.storage, tableau.c, strict=True):
            slope = _slope(field, _stage_time(t, h, c), y)
            register = h * slope if register is None else torch.add(keep * register, slope, alpha=h)
            y = torch.add(y, register, alpha=gain)
        return y
    stages: list[Tensor] = []
    for row, c in zip(tableau.a, tableau.c, strict=True):
        stages.append(_slope(field, _stage_time(t, h, c), _advanced(y, h, row, stages)))
    return _advanced(y, h, tableau.b, stages)


def _slope(field: Field, t: float, y: Tensor) -> Tensor:
    """The field at (t, y); one of another shape would be broadcast, and be another problem."""
    slope = field(t, y)
    if slope.shape != y.shape:
        raise ValueError(
            f"the field must return the shape of its state, {tuple(y.shape)}, got "
            f"{tuple(slope.shape)}"
        )
    return slope


def _stage_time(t: float, h: float, c: float) -> float:
    if c == 1.0:
        c -= _INSIDE
    elif c == 0.0 and h < 0:
        c = _INSIDE
    return t + c * h


def _advanced(y: Tensor, h: float, weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    for weight, stage in zip(weights, stages, strict=True):
        if weight:
            y = torch.add(y, stage, alpha=h * weight)
    return y


def step_grid(start: float, end: float, steps: int) -> Iterator[tuple[float, float]]:
    """(t, h) of equal steps from `start` to `end`."""
    h = (end - start) / steps
    for i in range(steps):
        yield start + i * h, h


def solve(
    field: Field,
    initial: Tensor,
    times: Sequence[float],
    solver: SolverConfig = SolverConfig(),
    parameters: Sequence[Tensor] | None = None,
) -> Solution:
    """Integrate dy/dt = field(t, y) from `times[0]` through the other times.

    Adaptive solvers of torchdiffeq may evaluate the field a little past the last time, and
    interpolate back; the count includes those evaluations.

    Args:
        field: the right-hand side.
        initial: state at `times[0]`, B x S, floating point.
        times: at least two, strictly increasing or strictly decreasing.
        solver: how to integrate.
        parameters: tensors that the adjoint computes gradients of; None takes `field.parameters()`.

    Raises:
        ValueError: the times are not monotone, the state is not floating point, or the field
            returns another shape than the state's.
        SolverError: a state is not finite, the step size underflows, or the cap on evaluations is
            reached.
    """
    times = _checked_times(times)
    if not initial.is_floating_point() or initial.ndim < 1:
        raise ValueError(
            f"the initial state must be floating point with a batch axis, got {initial.dtype} of "
            f"shape {tuple(initial.shape)}"
        )
    if not initial.numel() and not solver.is_fixed:
        return Solution((initial,) * len(times), Statistics())
    if not solver.is_fixed and _is_eager():
        # torchdiffeq would choose a first step of no length, and take the problem for stiff.
        broken = ~torch.isfinite(initial.detach()).reshape(len(initial), -1).all(1)
        if broken.any():
            raise SolverError(
                f"{solver.method}: the state of sample {int(broken.nonzero()[0])} is not finite at "
                f"time {times[0]:.6g}, where it starts."
            )
    # Looking for them takes as long as a small field; through the steps they are found anyway.
    needed = solver.gradient != "discrete" and torch.is_grad_enabled()
    learned = _Learned.of(field, parameters, solver.gradient) if needed else _Learned()
    if solver.is_fixed:
        solution = _solve_fixed(field, initial, times, solver, learned)
    elif solver.error_control == "each_sample":
        solution = _solve_each(field, initial, times, solver, learned)
    else:
        solution = _solve_adaptive(field, initial, times, solver, learned)
    if _is_eager() and not _all_finite(solution.last.detach()):
        _report_non_finite(field, initial, times, solver, solution)
    return solution


@dataclasses.dataclass(frozen=True)
class _Learned:
    """What a backward pass that evaluates the field again is to know of its parameters.

    Attributes:
        tensors: those that gradients are computed of.
        places: where the field, if it is a module, has each of its parameters; the parameter, and
            its version.
        gradient: the mode, for the message.
    """

    tensors: tuple[Tensor, ...] = ()
    places: tuple[tuple[dict[str, nn.Parameter | None], str, Tensor, int], ...] = ()
    gradient: str = "discrete"

    @classmethod
    def of(cls, field: Field, parameters: Sequence[Tensor] | None, gradient: str) -> _Learned:
        """These, or else the field's, as far as they need gradients."""
        if parameters is None:
            parameters = tuple(field.parameters()) if isinstance(field, nn.Module) else ()
        places: list[tuple[dict[str, nn.Parameter | None], str, Tensor, int]] = []
        # A compiled graph has them as its inputs: there none can change.
        if isinstance(field, nn.Module) and not torch.compiler.is_compiling():
            for module in field.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        places.append((module._parameters, name, parameter, _version(parameter)))
        return cls(tuple(p for p in parameters if p.requires_grad), tuple(places), gradient)

    def check(self) -> None:
        """Refuse other parameters than those of the forward pass, whose gradient it would not be.

        Raises:
            SolverError: the field has others, or one was changed in place.
        """
        again = f"gradient={self.gradient!r} evaluates the field again in the backward pass"
        for parameters, name, parameter, version in self.places:
            if parameters.get(name) is not parameter:
                raise SolverError(
                    f"{again}, where {name!r} is another parameter than in the forward pass (as "
                    "after torch.func.functional_call): use gradient='discrete'."
                )
            if _version(parameter) != version:
                raise SolverError(
                    f"{again}, but {name!r} was modified by an inplace operation since the forward "
                    "pass: go backward before parameters change."
                )


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; those of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _all_finite(state: Tensor) -> bool:
    """Whether all components are; most often their sum, at a quarter of the time, tells that.

    On the meta device there are none to look at.
    """
    if state.is_meta:
        return True
    return math.isfinite(state.sum().item()) or bool(torch.isfinite(state).all())


def _checked_times(times: Sequence[float]) -> tuple[float, ...]:
    times = tuple(float(t) for t in times)
    if len(times) < 2:
        raise ValueError(f"times must be at least two, got {len(times)}")
    if not all(map(math.isfinite, times)):
        raise ValueError(f"times must be finite, got {', '.join(f'{t:g}' for t in times)}")
    steps = [b - a for a, b in itertools.pairwise(times)]
    if not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        wrong = next(i + 1 for i, s in enumerate(steps) if not s * steps[0] > 0)
        raise ValueError(
            f"times must be strictly increasing or strictly decreasing, but times[{wrong - 1}] = "
            f"{times[wrong - 1]:g} is followed by {times[wrong]:g}"
        )
    return times


def _is_eager() -> bool:
    """Whether values can be looked at: neither compiled, exported, nor under `torch.func`."""
    # There is no public question for the second; bool() of a tensor under vmap raises.
    under_transform = torch._C._functorch.peek_interpreter_stack() is not None
    return not (torch.compiler.is_compiling() or under_transform)


# --- fixed steps ---------------------------------------------------------------------------------


def _solve_fixed(
    field: Field,
    initial: Tensor,
    times: tuple[float, ...],
    solver: SolverConfig,
    learned: _Learned,
) -> Solution:
    tableau = TABLEAUS[solver.method]
    taken = solver.steps * (len(times) - 1)
    nfe = taken * tableau.stages
    if nfe > solver.max_nfe:
        raise SolverError(
            f"{solver.method} with {solver.steps} steps in each of {len(times) - 1} intervals "
            f"needs {nfe} evaluations, more than max_nfe={solver.max_nfe}."
        )
    statistics = Statistics(nfe=nfe, accepted=taken)
    if solver.gradient == "adjoint" and torch.is_grad_enabled():
        states = _Adjoint.apply(
            field, times, solver.steps, tableau, statistics, learned, initial, *learned.tensors
        )
        return Solution((initial, *states), statistics)
    states, y = [initial], initial
    # Where nothing learns, no step keeps anything, and a checkpoint would keep its state.
    learns = initial.requires_grad or bool(learned.tensors) or not isinstance(field, nn.Module)
    recomputes = solver.gradient == "checkpoint" and torch.is_grad_enabled() and learns
    for start, end in itertools.pairwise(times):
        for t, h in step_grid(start, end, solver.steps):
            if recomputes:
                y = _checkpointed_step(tableau, field, t, h, y, statistics, learned)
            else:
                y = runge_kutta_step(tableau, field, t, h, y)
        states.append(y)
    return Solution(tuple(states), statistics)


def _checkpointed_step(
    tableau: Tableau,
    field: Field,
    t: float,
    h: float,
    y: Tensor,
    statistics: Statistics,
    learned: _Learned,
) -> Tensor:
    if torch.compiler.is_compiling():
        compiled: Tensor = checkpoint(
            runge_kutta_step, tableau, field, t, h, y, use_reentrant=False
        )
        return compiled
    calls = 0

    def step(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:  # again, for the backward pass
            learned.check()
            statistics.count_backward(tableau.stages)
        return runge_kutta_step(tableau, field, t, h, y)

    result: Tensor = checkpoint(step, y, use_reentrant=False)
    return result


def _autocast_state(device: str) -> dict[str, Any] | None:
    """What `torch.autocast` is to be given for the state that a device is in; None where it has no
    such thing."""
    if not torch.amp.is_autocast_available(device):
        return None
    return {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
    }


class _Adjoint(torch.autograd.Function):
    """Fixed steps forward, and the adjoint equations by the same method backward.

    With a = dL/dy, the backward pass integrates y' = f, a' = -a df/dy together from each requested
    time to the one before, and g' = -a df/dtheta as a quadrature beside them, since nothing
    depends on g. At each requested time y is put back to its stored value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        field: Field,
        times: tuple[float, ...],
        steps: int,
        tableau: Tableau,
        statistics: Statistics,
        learned: _Learned,
        initial: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.field, ctx.times, ctx.steps, ctx.tableau = field, times, steps, tableau
        ctx.statistics, ctx.learned = statistics, learned
        ctx.autocast = _autocast_state(initial.device.type)
        states, y = [], initial
        for start, end in itertools.pairwise(times):
            for t, h in step_grid(start, end, steps):
                y = runge_kutta_step(tableau, field, t, h, y)
            states.append(y)
        # The parameters too, since the backward pass evaluates the field again: what has changed in
        # place by then is refused, as everywhere.
        ctx.save_for_backward(*states, *parameters)
        return tuple(states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tableau: Tableau = ctx.tableau
        count = len(ctx.times) - 1
        states, parameters = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        ctx.learned.check()
        adjoint = torch.zeros_like(states[0])
        totals = [torch.zeros_like(p) for p in parameters]

        def backwards(t: float, pair: Tensor) -> Tensor:
            """d/dt of (y, a); the parameters' part is added with the weight of the stage."""
            ctx.statistics.count_backward()
            weight = next(weights)
            with torch.enable_grad():
                y = pair[0].detach().requires_grad_()
                # The field of the forward pass: there it may have run in lower precision.
                with torch.autocast(**ctx.autocast) if ctx.autocast else contextlib.nullcontext():
                    slope = ctx.field(t, y)
                products: Sequence[Tensor | None] = [None] * (1 + len(parameters))
                if slope.requires_grad:  # else it depends on the time alone
                    products = torch.autograd.grad(
                        slope, (y, *parameters), -pair[1].to(slope.dtype), allow_unused=True
                    )
            for total, product in zip(totals, products[1:], strict=True):
                if product is not None and weight:
                    total.add_(product, alpha=weight)
            pull = torch.zeros_like(y) if products[0] is None else products[0]
            return torch.stack((slope.detach().to(y.dtype), pull))

        for index in reversed(range(len(states))):
            adjoint = adjoint + gradients[index]
            pair = torch.stack((states[index], adjoint))
            for t, h in step_grid(ctx.times[index + 1], ctx.times[index], ctx.steps):
                weights = iter([h * b for b in tableau.b])
                pair = runge_kutta_step(tableau, backwards, t, h, pair)
            adjoint = pair[1]
        return (None, None, None, None, None, None, adjoint, *totals)


# --- torchdiffeq ---------------------------------------------------------------------------------


_HALF = (torch.float16, torch.bfloat16)


class _Watched(nn.Module):
    """A field that counts its evaluations, stops at a cap, and remembers how far it came.

    It is evaluated in the precision of the initial state, whatever that of the solver, and in the
    backward pass under the autocast of the forward pass.
    """

    def __init__(
        self,
        field: Field,
        initial: Tensor,
        times: tuple[float, ...],
        solver: SolverConfig,
        statistics: Statistics,
        learned: _Learned,
    ):
        super().__init__()
        # In a tuple, so that its parameters are not found here: torchdiffeq gets them from us.
        self._field, self._solver, self.statistics = (field,), solver, statistics
        self._dtype, self._learned = initial.dtype, learned
        self._autocast = _autocast_state(initial.device.type)
        self.is_backward, self.last_time = False, times[0]
        self.span = min(times), max(times)
        # The sample whose slope is not finite, and when; of steps that are chosen, in the last one.
        self.broken: tuple[int, float] | None = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        statistics, cap = self.statistics, self._solver.max_nfe
        count = statistics.nfe_backward if self.is_backward else statistics.nfe
        if count >= cap:
            raise SolverError(
                f"{self._solver.method} reached the cap of max_nfe={cap} evaluations at time "
                f"{self.last_time:.6g}: the problem is stiff or the tolerance "
                f"{self._solver.tolerance:g} too tight."
            )
        time = float(t.detach())
        if not math.isfinite(time):  # a norm is infinite, or a slope is not finite
            raise _underflow(self, self._solver, "no finite step is left to try")
        if self.is_backward:
            self._learned.check()
            statistics.count_backward()
            with torch.autocast(**self._autocast) if self._autocast else contextlib.nullcontext():
                slope = _slope(self._field[0], time, y.to(self._dtype))
        else:
            statistics.nfe += 1
            slope = _slope(self._field[0], time, y.to(self._dtype))
        if self.broken is None and (sample := _non_finite_sample(slope.detach())) is not None:
            self.broken = sample, time
        return slope.to(y.dtype)

    # torchdiffeq calls these with the time before a step, and warns of callbacks without use.

    def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.last_time = float(t)

    def callback_step_adjoint(self, t: Tensor, y: tuple[Tensor, ...], dt: Tensor) -> None:
        self.callback_step(t, y[0], dt)
        # torchdiffeq is about to assert these, within the backward pass, where nobody catches it.
        if not all(bool(torch.isfinite(part).all()) for part in y):
            raise SolverError(
                f"{self._solver.method}: the adjoint is not finite at time {float(t):.6g}."
            )
        if bool(t + dt == t) or bool(t - dt == t):
            raise _underflow(self, self._solver, f"underflow in dt {float(dt):g}")


class _WatchedSteps(_Watched):
    """The same for solvers that choose their steps."""

    def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        super().callback_step(t, y, dt)
        # A broken sample spoils the step of all, of which torchdiffeq makes one of no length. With
        # any other step a slope that was not finite is that of a trial which was given up.
        if torch.isfinite(dt) and bool(t + dt != t):
            self.broken = None

    def callback_accept_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.statistics.accepted += 1

    def callback_reject_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.statistics.rejected += 1


# The norms are detached: torchdiffeq would else differentiate its choice of the step size, of which
# only half arrives here, since fields take the time as a number.


def _mean_sample(error: Tensor) -> Tensor:
    """Root mean square over all of a state, as torchdiffeq has it, B x S to a scalar."""
    return error.detach().abs().square().mean().sqrt()


def _worst_sample(error: Tensor) -> Tensor:
    """Largest root mean square over the samples of a state, B x S to a scalar."""
    return error.detach().abs().square().reshape(len(error), -1).mean(1).sqrt().max()


def _solve_adaptive(
    field: Field,
    initial: Tensor,
    times: tuple[float, ...],
    solver: SolverConfig,
    learned: _Learned,
    statistics: Statistics | None = None,
) -> Solution:
    # Here, since most who use a fixed-step network never need it.
    import torchdiffeq

    if statistics is None:
        statistics = Statistics(batch_dependent=solver.is_batch_dependent)
    watched = _Watched(field, initial, times, solver, statistics, learned)
    options: dict[str, Any] = {}
    if solver.method in ADAPTIVE_METHODS:
        watched = _WatchedSteps(field, initial, times, solver, statistics, learned)
        worst = solver.error_control == "worst_sample"
        options["norm"] = _worst_sample if worst else _mean_sample
    else:
        options["grid_constructor"] = functools.partial(_grid, solver.steps)
        statistics.accepted = solver.steps * (len(times) - 1)
    arguments: dict[str, Any] = {
        "rtol": solver.tolerance,
        "atol": solver.tolerance,
        "method": solver.method,
        "options": options,
    }
    moments = torch.tensor(times, dtype=torch.float64, device=initial.device)
    # Squared, errors over a tolerance leave float16, and those of a step are below its last digit.
    state = initial.float() if initial.dtype in _HALF else initial
    try:
        if solver.gradient == "adjoint" and torch.is_grad_enabled():
            states = torchdiffeq.odeint_adjoint(
                watched, state, moments, adjoint_params=learned.tensors, **arguments
            )
        else:
            states = torchdiffeq.odeint(watched, state, moments, **arguments)
    except AssertionError as error:
        raise _underflow(watched, solver, error) from None
    states = states.to(initial.dtype)
    if watched.broken is not None and _is_eager() and not _all_finite(states[-1].detach()):
        raise _non_finite(*watched.broken, solver, statistics)
    watched.is_backward = True
    return Solution((initial, *states.unbind()[1:]), statistics)


def _grid(steps: int, field: Field, y: Tensor, times: Tensor) -> Tensor:
    inner = [torch.linspace(a, b, steps + 1).to(times)[1:] for a, b in itertools.pairwise(times)]
    return torch.cat([times[:1], *inner])


def _underflow(watched: _Watched, solver: SolverConfig, error: AssertionError | str) -> SolverError:
    """What torchdiffeq's assertion on the step size means."""
    where = f"after time {watched.last_time:.6g}"
    if watched.broken is not None:
        sample, time = watched.broken
        # A stage of a trial may look far beyond the end, which says nothing.
        at = f" (at {time:.6g})" if watched.span[0] <= time <= watched.span[1] else ""
        whose = _of(sample, watched.statistics)
        return SolverError(f"{solver.method}: the state{whose} is not finite {where}{at}.")
    return SolverError(
        f"{solver.method}: the step size underflows {where} ({error}); the problem is stiff there, "
        f"loosen the tolerance {solver.tolerance:g} or take another solver."
    )


def _solve_each(
    field: Field,
    initial: Tensor,
    times: tuple[float, ...],
    solver: SolverConfig,
    learned: _Learned,
) -> Solution:
    """Each sample alone."""
    parts, statistics = [], Statistics()
    for index in range(len(initial)):
        try:
            one, own = initial[index : index + 1], _OfOneSample(of_all=statistics)
            parts.append(_solve_adaptive(field, one, times, solver, learned, own))
        except SolverError as error:
            raise SolverError(f"Sample {index}: {error}") from None
    states = tuple(torch.cat(column) for column in zip(*(p.states for p in parts), strict=True))
    counts = tuple(p.statistics.nfe for p in parts)
    statistics.nfe, statistics.nfe_per_sample = max(counts), counts
    statistics.accepted = sum(p.statistics.accepted for p in parts)
    statistics.rejected = sum(p.statistics.rejected for p in parts)
    return Solution(states, statistics)


# --- what went wrong -----------------------------------------------------------------------------


def _non_finite_sample(state: Tensor | None) -> int | None:
    """Index of the first sample with a component that is not finite."""
    if state is None or state.ndim < 1:
        return None
    wrong = ~torch.isfinite(state).reshape(len(state), -1).all(1)
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None


@torch.no_grad()
def _report_non_finite(
    field: Field,
    initial: Tensor,
    times: tuple[float, ...],
    solver: SolverConfig,
    solution: Solution,
) -> None:
    """Say which sample left the finite numbers, and when, by going through the steps again."""
    bad, when = _non_finite_sample(solution.last), times[-1]
    if (first := _non_finite_sample(initial)) is not None:
        bad, when = first, times[0]
    elif solver.is_fixed:
        y, tableau = initial, TABLEAUS[solver.method]
        for t, h in (
            step
            for start, end in itertools.pairwise(times)
            for step in step_grid(start, end, solver.steps)
        ):
            y = runge_kutta_step(tableau, field, t, h, y)
            if (first := _non_finite_sample(y)) is not None:
                bad, when = first, t + h
                break
    raise _non_finite(bad, when, solver, solution.statistics)


def _non_finite(
    sample: int | None, time: float, solver: SolverConfig, statistics: Statistics
) -> SolverError:
    return SolverError(
        f"The state{_of(sample, statistics)} is not finite at time {time:.6g} ({solver.method}, "
        f"{statistics.nfe} evaluations); take more steps or a smaller learning rate."
    )


def _of(sample: int | None, statistics: Statistics) -> str:
    """Which sample of the batch a message is about; nothing where it is solved alone, since the
    message is then given its number, and here it is always the first."""
    return "" if isinstance(statistics, _OfOneSample) else f" of sample {sample}"
