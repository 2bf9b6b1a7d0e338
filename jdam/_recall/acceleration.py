"""Accelerations: they propose a step before the plain one, taken if the energy does not rise. The
history of an acceleration is a part of the state of the loop in `solver.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core import checks
from jdam._core.lapack import cholesky, solve_lower
from jdam._core.linalg import safe_sqrt
from jdam._core.loops import while_loop
from jdam._measures.base import AnyMeasure, constrained, unconstrained

if TYPE_CHECKING:
    from jdam._recall.solver import Problem, Solver, State

#: The trust region shrinks if the energy falls by less than POOR times the decrease that the model
#: predicts, and grows if it falls by more than GOOD times that.
POOR, GOOD = 0.25, 0.75
#: Factors by which the trust region shrinks and grows.
SHRINK, GROW = 0.25, 3.0
#: The slope of the model at which its minimisation ends, relative to that at 0.
ENOUGH = 0.1


class Acceleration(ABC):
    """Rule that proposes steps. Subclasses are frozen dataclasses of settings."""

    @abstractmethod
    def start(self, measure: AnyMeasure, zero: Float[Array, ""]) -> PyTree:
        """Return the history before the first step."""

    @abstractmethod
    def propose(
        self, solver: "Solver", state: "State", problem: "Problem"
    ) -> tuple[PyTree, PyTree]:
        """Return a measure to try instead of the plain step `state.candidate`, and the history."""

    @abstractmethod
    def update(self, history: PyTree, gain: Float[Array, ""], accepted: Bool[Array, ""]) -> PyTree:
        """Return the history after a proposal was tried; the energy fell by at most `gain`."""


class History(NamedTuple):
    """The last plain steps, in unconstrained coordinates."""

    ends: Float[Array, "k z"]
    changes: Float[Array, "k z"]
    length: Int[Array, ""]  # number of rows in use


@dataclass(frozen=True)
class Anderson(Acceleration):
    """Affine combination of the last steps, Σ αⱼ Φ(ξⱼ) with |Σ αⱼ (Φ(ξⱼ) − ξⱼ)| least.

    The coordinates are those of `Measure.unconstrained` (Anderson, J. ACM 12, 1965; Walker and Ni,
    SIAM J. Numer. Anal. 49, 2011). A proposal costs no evaluation. For factors of covariances the
    combination respects rotations: Φ(LQ) = Φ(L)Q, and all steps have the same Q.

    **Arguments:**

    - `depth` ≥ 1: how many steps are combined.
    - `delay` ≥ 0: how many plain steps come first.

    **Raises:** `TypeError` or `ValueError` for other arguments.
    """

    depth: int = 3
    delay: int = 0

    def __post_init__(self) -> None:
        checks.positive_int("depth", self.depth)
        checks.int_at_least(0, "delay", self.delay)

    def start(self, measure: AnyMeasure, zero: Array) -> History:
        flat, _ = ravel_pytree(unconstrained(measure))
        empty_rows = jnp.zeros((self.depth, flat.size), flat.dtype)
        return History(empty_rows, empty_rows, jnp.array(0, jnp.int32))

    def propose(
        self, solver: "Solver", state: "State", problem: "Problem"
    ) -> tuple[PyTree, PyTree]:
        old: History = state.history
        plain, geometry = state.candidate, problem.memory.geometry
        free = unconstrained(plain)
        end, unravel = ravel_pytree(free)
        change = end - ravel_pytree(unconstrained(state.measure))[0]
        used = jnp.arange(self.depth, dtype=jnp.int32) < old.length
        used &= state.num_steps >= self.delay
        differences = jnp.where(used[:, None], change[None] - old.changes, 0)
        masses = geometry.masses(state.evaluation.view, state.evaluation.pull)
        flat = jnp.ones_like(end) if masses is None else ravel_pytree(masses)[0]
        roots = safe_sqrt(flat)  # to scale coordinates to one unit
        mix = _least_squares(roots[None] * differences, roots * change)
        combined = end - mix @ jnp.where(used[:, None], end[None] - old.ends, 0)
        combined = unravel(jnp.where(roots > 0, combined, end))
        # An array that the combination leaves unchanged is that of the plain step, bit for bit.
        measure = jax.tree.map(
            lambda new, old, moved, unmoved: jnp.where((moved == unmoved).all(), old, new),
            constrained(plain, combined),
            plain,
            combined,
            free,
        )
        history = History(
            jnp.roll(old.ends, 1, 0).at[0].set(end),
            jnp.roll(old.changes, 1, 0).at[0].set(change),
            jnp.minimum(old.length + 1, self.depth),
        )
        return measure, history

    def update(self, history: History, gain: Array, accepted: Array) -> History:
        """Return the history; after a rejected proposal it is cut to the last step, because the
        earlier ones predict badly.
        """
        return history._replace(length=jnp.where(accepted, history.length, 1))


def _least_squares(rows: Float[Array, "k z"], target: Float[Array, " z"]) -> Float[Array, " k"]:
    """Return the c that minimises |cᵀR − t|, with 0 for rows of zeros, from regularised normal
    equations of rows scaled to length one.
    """
    squares = jnp.vecdot(rows, rows)
    on = squares > 0
    inverse = jnp.where(on, 1 / jnp.sqrt(jnp.where(on, squares, 1)), 0)
    rows = rows * inverse[:, None]
    ridge = 16 * len(rows) * float(jnp.finfo(rows.dtype).eps)
    gram = rows @ rows.T + jnp.diag(jnp.where(on, ridge, 1))

    def solve(_: PyTree, right: Array) -> Array:
        lower = jax.lax.stop_gradient(cholesky(gram))
        half = solve_lower(lower, right[:, None])
        # Reversing rows and columns makes the upper triangular matrix a lower one.
        result: Array = solve_lower(lower.T[::-1, ::-1], half[::-1])[::-1, 0]
        return result

    product = lambda c: gram @ c  # noqa: E731
    coefficients: Array = jax.lax.custom_linear_solve(product, rows @ target, solve, symmetric=True)
    return inverse * coefficients


class Region(NamedTuple):
    """A trust region, and the last step in it."""

    radius: Float[Array, ""]  # 0 before the first step
    length: Float[Array, ""]  # of the last step
    expected: Float[Array, ""]  # decrease of the energy that the model predicts


@dataclass(frozen=True)
class TrustRegion(Acceleration):
    """Newton step within a region in which the energy is nearly quadratic, by conjugate gradients.

    The method is that of Steihaug (SIAM J. Numer. Anal. 20, 1983). It suits point clouds whose
    atoms are to be placed exactly. A product with the second derivative costs about as much as two
    evaluations. Derivatives of the step would be third derivatives of the energy: use it with the
    adjoints `Implicit` and `OneStep` only.

    **Arguments:**

    - `max_products` ≥ 1: how many products with the second derivative a step may take.

    **Raises:** `TypeError` or `ValueError` for other arguments; `recall` raises `ValueError` for it
    with a geometry that has no `retraction`.
    """

    max_products: int = 24

    def __post_init__(self) -> None:
        checks.positive_int("max_products", self.max_products)

    def start(self, measure: AnyMeasure, zero: Array) -> Region:
        zeros = jnp.zeros_like(zero)
        return Region(zeros, zeros, zeros)

    def propose(
        self, solver: "Solver", state: "State", problem: "Problem"
    ) -> tuple[PyTree, PyTree]:
        return _newton_step(self, solver, state, problem)

    def update(self, history: Region, gain: Array, accepted: Array) -> Region:
        radius, length, expected = history
        poor = ~accepted | ~(gain >= POOR * expected)
        good = (gain >= GOOD * expected) & (length >= 0.99 * radius)
        grown = jnp.where(good, GROW * radius, radius)
        return history._replace(radius=jnp.where(poor, SHRINK * length, grown))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _newton_step(
    settings: TrustRegion, solver: "Solver", state: "State", problem: "Problem"
) -> tuple[AnyMeasure, Region]:
    """Return the measure at the minimiser of the quadratic model, and the trust region."""
    retraction = problem.memory.geometry.retraction(state.measure)
    if retraction is None:
        raise ValueError(
            f"acceleration=jdam.TrustRegion() needs a retraction; got {problem.memory.geometry}"
        )
    radius = jnp.where(state.history.radius > 0, state.history.radius, state.residual)
    radius = jnp.where(solver.cond_fun(state, problem), radius, 0)
    guess = state.evaluation.guess

    def slope(tangent: PyTree) -> PyTree:
        evaluation = solver.evaluate(retraction.retract(tangent), problem, guess)
        return retraction.slope(evaluation.view, evaluation.pull)

    zero_tangent = jax.tree.map(jnp.zeros_like, retraction.masses)
    slope_here, curvature = jax.linearize(slope, zero_tangent)
    flat, unravel = ravel_pytree(slope_here)
    products = lambda tangent: ravel_pytree(curvature(unravel(tangent)))[0]  # noqa: E731
    masses, _ = ravel_pytree(retraction.masses)
    minimum = minimise(flat, products, masses, radius, settings.max_products)
    measure = retraction.retract(unravel(minimum.step))
    return measure, Region(radius, minimum.length, minimum.decrease)


@_newton_step.defjvp
def _newton_step_jvp(*_: Any) -> PyTree:
    raise ValueError(
        "jdam.TrustRegion steps have no derivatives of their own: recall with "
        "adjoint=jdam.Implicit() or jdam.OneStep(), or with another acceleration"
    )


class Minimum(NamedTuple):
    """The minimiser of a quadratic model, as far as it was computed by conjugate gradients."""

    step: Float[Array, " z"]
    decrease: Float[Array, ""]  # of the model
    length: Float[Array, ""]  # |step|
    slope: Float[Array, " z"]  # of the model at the step
    direction: Float[Array, " z"]
    squares: Float[Array, ""]  # |slope|², in the dual of the norm
    along: Float[Array, ""]  # ⟨step, direction⟩
    speed: Float[Array, ""]  # |direction|²
    products: Int[Array, ""]
    ended: Bool[Array, ""]


def minimise(
    slope: Float[Array, " z"],
    curvature: Callable[[Array], Array],
    masses: Float[Array, " z"],
    radius: Float[Array, ""],
    most: int,
) -> Minimum:
    """Return the minimiser of ⟨g, s⟩ + ½⟨s, H s⟩ in a Krylov space of at most `most` dimensions,
    given the slope g and the map s ↦ H s. The norm is |s|² = Σ mⱼ sⱼ²; coordinates of mass 0 do not
    move.

    The iteration ends when the slope has fallen to a tenth, or when it leaves the radius, as it
    does along a direction of negative curvature (Steihaug, SIAM J. Numer. Anal. 20, 1983; norms by
    the recurrences of Conn, Gould and Toint, Trust-Region Methods, 2000, 7.5).
    """
    inverse = jnp.where(masses > 0, 1 / jnp.where(masses > 0, masses, 1), 0)
    raised = inverse * slope
    squares = jnp.vdot(slope, raised)
    zero = jnp.zeros_like(radius)
    start = Minimum(
        step=jnp.zeros_like(slope),
        decrease=zero,
        length=zero,
        slope=slope,
        direction=-raised,
        squares=squares,
        along=zero,
        speed=squares,
        products=jnp.array(0, jnp.int32),
        ended=~((squares > 0) & (radius > 0)),
    )
    goal = ENOUGH**2 * squares

    def cond_fun(state: Minimum) -> Array:
        return ~state.ended & (state.squares > goal) & (state.products < most)

    def body_fun(state: Minimum) -> Minimum:
        image = curvature(state.direction)
        bend = jnp.vdot(state.direction, image)
        convex = bend > 0
        newton = state.squares / jnp.where(convex, bend, 1)
        gap = jnp.maximum(radius**2 - state.length**2, 0)
        # To the boundary: |step + t·direction| = radius.
        edge = gap / (state.along + safe_sqrt(state.along**2 + state.speed * gap))
        ended = ~convex | (newton >= edge)
        t = jnp.where(ended, edge, newton)
        slope = state.slope + t * image
        raised = inverse * slope
        squares = jnp.vdot(slope, raised)
        ratio = squares / state.squares
        return Minimum(
            step=state.step + t * state.direction,
            decrease=state.decrease + t * (state.squares - t * bend / 2),
            length=safe_sqrt(state.length**2 + t * (2 * state.along + t * state.speed)),
            slope=slope,
            direction=ratio * state.direction - raised,
            squares=squares,
            along=ratio * (state.along + t * state.speed),
            speed=squares + ratio**2 * state.speed,
            products=state.products + 1,
            ended=ended,
        )

    return while_loop(cond_fun, body_fun, start, slope, masses, radius)
