"""How recall loops, and with that how it is differentiated."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from jdam._batching import advance_where
from jdam._derivatives import full_precision
from jdam._gmres import gmres
from jdam._loops import scan
from jdam.geometry.protocol import AnyMeasure


class Loop(NamedTuple):
    """What recall repeats, in functions that close over nothing traced: `args` is all that is
    not state."""

    advance: Callable[[Any, Any], Any]  # (state, args) ↦ the next state
    pending: Callable[[Any, Any], Array]  # (state, args) ↦ whether it is not the last
    observe: Callable[[Any], Any]  # what to keep of every state
    measure: Callable[[Any], AnyMeasure]  # where a state is
    settle: Callable[
        [Any, AnyMeasure, Any], Any
    ]  # (state, measure, args) ↦ a state seen from there
    step: Callable[[AnyMeasure, Any], AnyMeasure]  # (measure, args) ↦ Φ(measure)
    conserved: Callable[[AnyMeasure, Any, AnyMeasure], AnyMeasure]  # `Geometry.conserved`
    length: int  # at most so many times
    at_once: int  # states of a vmapped batch that advance together

    def run(self, state: Any, args: Any) -> tuple[Any, Any]:
        """The last state, and `observe` of the state after each time, stacked."""

        def body(state: Any, _: None) -> tuple[Any, Any]:
            pending = self.pending(state, args)
            state = advance_where(self.advance, self.at_once, pending, state, args)
            return state, self.observe(state)

        return scan(body, state, None, args, length=self.length)


class Adjoint(ABC):
    """How to differentiate a recall."""

    @abstractmethod
    def run(self, loop: Loop, state: Any, args: Any) -> tuple[Any, Any]:
        """`loop.run(state, args)`, with derivatives."""


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Differentiate through the steps that were taken, in forward or reverse mode.

    Reverse mode keeps one state a step and computes the rest again; its result is the exact
    derivative of what `recall` returned, converged or not.
    """

    def run(self, loop, state, args):
        return loop.run(state, args)


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Differentiate the fixed point ξ = Φ(ξ, θ) itself, by the implicit function theorem:

        (I − ∂Φ/∂ξ) dξ = (∂Φ/∂θ) dθ.

    Memory does not depend on the number of steps, and the cost is that of one linear solve, by
    GMRES to a relative accuracy `tol` (eps^0.7 of the dtype if None, 1e-5 in float32 and 1e-11
    in float64). Right where the recall has converged, and as near as it has; `Status.MAX_STEPS`
    says that it has not.

    Where I − ∂Φ/∂ξ is singular, because Φ conserves something of the query (rotations of a
    factor, which are no part of the measure; the weights of a point cloud if κ = 0), that part of
    dξ is the query's own, as it is with `Unrolled`. Entries of the trace have derivative zero.

    **Raises:** `TypeError` or `ValueError` unless `tol` is None or a number > 0.
    """

    tol: float | None = None

    def __post_init__(self):
        if self.tol is not None and (isinstance(self.tol, bool) or not self.tol > 0):
            raise ValueError(f"tol must be None or > 0; got {self.tol!r}")

    def run(self, loop, state, args):
        return _at_fixed_point(self._solve, loop, state, args)

    def _solve(
        self, contraction: Any, conserved: Any, direct: AnyMeasure, start: AnyMeasure
    ) -> AnyMeasure:
        """dξ with dξ − J dξ = direct, J the contraction: the limit of dξ ← J dξ + direct from a
        start on, of which what is conserved stays."""

        _, unravel = ravel_pytree(start)

        def residual(d: AnyMeasure) -> AnyMeasure:
            return jax.tree.map(jnp.subtract, d, contraction(d))

        def regular(flat: Array) -> Array:  # I − J, where it is not zero
            d = unravel(flat)
            return ravel_pytree(jax.tree.map(jnp.add, residual(d), conserved(d)))[0]

        def solve(matvec: Any, right: Array) -> Array:
            eps = float(jnp.finfo(right.dtype).eps)
            return gmres(matvec, right, eps**0.7 if self.tol is None else self.tol)

        # In one array: a leaf that a step leaves as it is would have no derivative to transpose.
        right, _ = ravel_pytree(jax.tree.map(jnp.subtract, direct, residual(start)))
        found = jax.lax.custom_linear_solve(regular, right, solve, transpose_solve=solve)
        return jax.tree.map(jnp.add, start, unravel(found))


@dataclass(frozen=True)
class OneStep(Adjoint):
    """Differentiate the last step alone, as if it had started from a constant.

    The cheapest derivative, dξ = (∂Φ/∂θ) dθ: off by about the contraction factor of Φ, which at
    high β is tiny, and zero in the query (one-step differentiation: Bolte, Pauwels and Vaiter,
    arXiv:2305.13768).
    """

    def run(self, loop, state, args):
        return _at_fixed_point(_directly, loop, state, args)


def _directly(
    contraction: Any, conserved: Any, direct: AnyMeasure, start: AnyMeasure
) -> AnyMeasure:
    return direct


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _at_fixed_point(solve: Any, loop: Loop, state: Any, args: Any) -> tuple[Any, Any]:
    return loop.run(state, args)


@_at_fixed_point.defjvp
@full_precision
def _at_fixed_point_jvp(solve: Any, loop: Loop, primals: tuple, tangents: tuple) -> Any:
    end, trace = _at_fixed_point(solve, loop, *primals)
    (_, args), (dstart, dargs) = primals, tangents
    measure = loop.measure(end)

    _, contraction = jax.linearize(lambda measure: loop.step(measure, args), measure)
    direct = jax.jvp(lambda args: loop.step(measure, args), (args,), (dargs,))[1]
    conserved = partial(loop.conserved, measure, args)
    dmeasure = solve(contraction, conserved, direct, loop.measure(dstart))
    _, dend = jax.jvp(partial(loop.settle, end), (measure, args), (dmeasure, dargs))
    _, dtrace = jax.jvp(lambda: trace, (), ())
    return (end, trace), (dend, dtrace)
