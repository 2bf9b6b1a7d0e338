"""Bolder steps than that of recall, tried first and taken where the energy does not rise."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float, Int

from jdam._core.lapack import cholesky, solve_lower
from jdam._measures.base import AnyMeasure, from_free, to_free
from jdam._recall.trust_region import Quadratic, minimise

if TYPE_CHECKING:
    from jdam._recall.flow import Flow, Problem, State

#: A trust region is shrunk where energy falls by less than this share of what was expected, and
#: grows where it falls by more than that.
POOR, GOOD = 0.25, 0.75
#: By what factors.
SHRINK, GROW = 0.25, 3.0
#: Conjugate gradients keep no basis, so that a dimension is cheaper than a step that is kept.
PRODUCTS = 8


class Proposal(NamedTuple):
    """A measure to try, and what to learn from how it fares."""

    measure: AnyMeasure
    expected: Float[Array, ""]  # by how much the energy should fall
    kept: Any


@dataclass(frozen=True)
class Acceleration(ABC):
    """How to propose a step, in a space of at most `depth` dimensions beside the plain step. What
    it keeps from step to step is a part of the recall's state."""

    depth: int

    @abstractmethod
    def start(self, measure: AnyMeasure, zero: Float[Array, ""]) -> Any:
        """What is kept before the first step."""

    @abstractmethod
    def propose(self, flow: "Flow", state: "State", problem: "Problem") -> Proposal:
        """What to try from an evaluated state."""

    @abstractmethod
    def learn(self, proposal: Proposal, gain: Float[Array, ""], accepted: Bool[Array, ""]) -> Any:
        """What to keep, the energy having fallen by at most `gain`."""


class History(NamedTuple):
    """Plain steps of late: what they led to, in free coordinates, and their changes of these."""

    ends: Float[Array, "k z"]
    changes: Float[Array, "k z"]
    length: Int[Array, ""]  # how many of them there are yet


@dataclass(frozen=True)
class Anderson(Acceleration):
    """The affine combination Σ αⱼ Φ(ξⱼ) of the last steps for which Σ αⱼ (Φ(ξⱼ) − ξⱼ) is least, in
    free coordinates (Anderson, J. ACM 12, 1965; Walker and Ni, SIAM J. Numer. Anal. 49, 2011).

    For factors these respect rotations: Φ(LQ) = Φ(L)Q, and every step keeps to the Q of the one
    before. The first steps, so many, are plain."""

    after: int = 0

    def start(self, measure: AnyMeasure, zero: Array) -> History:
        flat, _ = ravel_pytree(to_free(measure))
        none = jnp.zeros((self.depth, flat.size), flat.dtype)
        return History(none, none, jnp.array(0, jnp.int32))

    def propose(self, flow: "Flow", state: "State", problem: "Problem") -> Proposal:
        old: History = state.kept
        plain = flow.move(state.measure, state.evaluation, problem, state.backtracks)
        free = to_free(plain)
        end, unravel = ravel_pytree(free)
        change = end - ravel_pytree(to_free(state.measure))[0]
        held = jnp.arange(self.depth, dtype=jnp.int32) < old.length
        held &= state.num_steps >= self.after
        differences = jnp.where(held[:, None], change[None] - old.changes, 0)
        geometry = problem.memory.geometry
        masses = geometry.masses(state.measure)
        if masses is None:
            mix = _least_squares(differences, change)
        else:  # in coordinates of one unit
            roots = jnp.sqrt(jax.lax.stop_gradient(ravel_pytree(masses)[0]))
            mix = _least_squares(roots[None] * differences, roots * change)
        combined = unravel(end - mix @ jnp.where(held[:, None], end[None] - old.ends, 0))
        # Where nothing changes, not even the last digit does.
        measure = jax.tree.map(
            lambda new, old, moved, kept: jnp.where(moved == kept, old, new),
            geometry.confined(from_free(plain, combined), plain),
            plain,
            combined,
            free,
        )
        history = History(
            jnp.roll(old.ends, 1, 0).at[0].set(end),
            jnp.roll(old.changes, 1, 0).at[0].set(change),
            jnp.minimum(old.length + 1, self.depth),
        )
        return Proposal(measure, jnp.zeros_like(problem.beta), history)

    def learn(self, proposal: Proposal, gain: Array, accepted: Array) -> History:
        """Steps from before one that failed say nothing of what comes."""
        history: History = proposal.kept
        return history._replace(length=jnp.where(accepted, history.length, 1))


def _least_squares(rows: Float[Array, "k z"], target: Float[Array, " z"]) -> Float[Array, " k"]:
    """The c with |cᵀR − t| least, 0 for rows of zeros, by regularised normal equations of rows of
    length one."""
    squares = jnp.vecdot(rows, rows)
    on = squares > 0
    inverse = jnp.where(on, 1 / jnp.sqrt(jnp.where(on, squares, 1)), 0)
    rows = rows * inverse[:, None]
    ridge = 16 * len(rows) * float(jnp.finfo(rows.dtype).eps)
    gram = rows @ rows.T + jnp.diag(jnp.where(on, ridge, 1))

    def solve(_: Any, right: Array) -> Array:
        lower = jax.lax.stop_gradient(cholesky(gram))
        half = solve_lower(lower, right[:, None])
        # An upper triangular matrix, read backwards, is a lower one.
        result: Array = solve_lower(lower.T[::-1, ::-1], half[::-1])[::-1, 0]
        return result

    product = lambda c: gram @ c  # noqa: E731
    found: Array = jax.lax.custom_linear_solve(product, rows @ target, solve, symmetric=True)
    return inverse * found


class Newton(Acceleration):
    """A Newton step, by at most 8 conjugate gradients for each of `depth`, within a region in which
    the energy is nearly quadratic (Steihaug, SIAM J. Numer. Anal. 20, 1983). Its own derivatives
    would be third ones of the energy: there are none."""

    def start(self, measure: AnyMeasure, zero: Array) -> Array:
        return zero

    def propose(self, flow: "Flow", state: "State", problem: "Problem") -> Proposal:
        return _newton_step(self, flow, state, problem)

    def learn(self, proposal: Proposal, gain: Array, accepted: Array) -> Array:
        radius, length = proposal.kept
        poor = ~accepted | ~(gain >= POOR * proposal.expected)
        bold = (gain >= GOOD * proposal.expected) & (length >= 0.99 * radius)
        grown = jnp.where(bold, GROW * radius, radius)
        return jnp.where(poor, SHRINK * length, grown)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _newton_step(newton: Newton, flow: "Flow", state: "State", problem: "Problem") -> Proposal:
    chart = problem.memory.geometry.chart(state.measure)
    assert chart is not None  # or Anderson's steps would have been chosen
    radius = jnp.where(state.kept > 0, state.kept, state.residual)
    radius = jnp.where(state.evaluated, radius, 0)  # a first proposal is not looked at
    start = state.start_from()
    start = start._replace(guess=flow.search.settled(problem.memory, start.guess))

    def slope(tangent: Any) -> Any:
        found = flow.evaluate(chart.displaced(tangent), problem, start)
        return chart.slope(found.view, found.pull)

    still = jax.tree.map(jnp.zeros_like, chart.masses)
    slope_here, curvature = jax.linearize(slope, still)
    flat, unravel = ravel_pytree(slope_here)
    model = Quadratic(
        flat,
        lambda tangent: ravel_pytree(curvature(unravel(tangent)))[0],
        ravel_pytree(chart.masses)[0],
    )
    found = minimise(model, radius, PRODUCTS * newton.depth)
    measure = chart.displaced(unravel(found.step))
    return Proposal(measure, found.decrease, (radius, found.length))


@_newton_step.defjvp
def _newton_step_jvp(*_: Any) -> Any:
    raise ValueError(
        "Newton steps, as acceleration takes them here, have no derivatives of their own: recall "
        "with adjoint=jdam.Implicit() or jdam.OneStep(), or without acceleration"
    )
