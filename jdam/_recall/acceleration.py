"""Steps that a recall tries before the plain one, and takes where the energy does not rise."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.lapack import cholesky, solve_lower
from jdam._measures.base import AnyMeasure, constrained, unconstrained
from jdam._recall.trust_region import Quadratic, minimise

if TYPE_CHECKING:
    from jdam._recall.solver import Problem, Solver, State

#: The trust region shrinks where the energy falls by less than the share POOR of what the model
#: expects, and grows where it falls by more than the share GOOD.
POOR, GOOD = 0.25, 0.75
#: By what factors.
SHRINK, GROW = 0.25, 3.0


class Acceleration(ABC):
    """How to propose steps: settings alone. The history is a part of the recall's state."""

    @abstractmethod
    def start(self, measure: AnyMeasure, zero: Float[Array, ""]) -> Any:
        """The history before the first step."""

    @abstractmethod
    def propose(self, solver: "Solver", state: "State", problem: "Problem") -> tuple[Any, Any]:
        """The measure to try instead of the plain step `state.candidate`, and the history."""

    @abstractmethod
    def update(self, history: Any, gain: Float[Array, ""], accepted: Bool[Array, ""]) -> Any:
        """The history after a proposal was tried, at which the energy fell by at most `gain`."""


class History(NamedTuple):
    """The last plain steps, in free coordinates."""

    ends: Float[Array, "k z"]
    changes: Float[Array, "k z"]
    length: Int[Array, ""]  # how many of the rows are in use


@dataclass(frozen=True)
class Anderson(Acceleration):
    """The affine combination Σ αⱼ Φ(ξⱼ) of the last steps for which |Σ αⱼ (Φ(ξⱼ) − ξⱼ)| is least,
    in free coordinates (Anderson, J. ACM 12, 1965; Walker and Ni, SIAM J. Numer. Anal. 49, 2011).

    It costs no evaluation. For factors of covariances the combination respects rotations:
    Φ(LQ) = Φ(L)Q, and every step keeps to the Q of the one before.

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
        none = jnp.zeros((self.depth, flat.size), flat.dtype)
        return History(none, none, jnp.array(0, jnp.int32))

    def propose(self, solver: "Solver", state: "State", problem: "Problem") -> tuple[Any, Any]:
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
        roots = jnp.sqrt(jax.lax.stop_gradient(flat))  # in coordinates of one unit
        mix = _least_squares(roots[None] * differences, roots * change)
        combined = end - mix @ jnp.where(used[:, None], end[None] - old.ends, 0)
        combined = unravel(jnp.where(roots > 0, combined, end))
        # Where nothing changes, not even the last digit does.
        measure = jax.tree.map(
            lambda new, old, moved, kept: jnp.where((moved == kept).all(), old, new),
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
        """Steps from before one that failed say nothing of what comes."""
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


class Region(NamedTuple):
    """A trust region, and the last step in it."""

    radius: Float[Array, ""]  # 0 before the first step
    length: Float[Array, ""]
    expected: Float[Array, ""]  # by how much the energy should fall


@dataclass(frozen=True)
class TrustRegion(Acceleration):
    """A Newton step within a region in which the energy is nearly quadratic, by conjugate gradients
    (Steihaug, SIAM J. Numer. Anal. 20, 1983).

    For point clouds whose atoms are to be placed exactly. A product with the second derivative
    costs about as much as two evaluations. Its own derivatives would be third ones of the energy:
    recall is differentiated with it by `Implicit` and `OneStep` only.

    **Arguments:**

    - `max_products` ≥ 1: how many products with the second derivative a step may take.

    **Raises:** `TypeError` or `ValueError` for other arguments; `recall` raises `ValueError` for it
    with a geometry that has no `retraction`.
    """

    max_products: int = 24

    def __post_init__(self) -> None:
        checks.positive_int("max_products", self.max_products)

    def start(self, measure: AnyMeasure, zero: Array) -> Region:
        nothing = jnp.zeros_like(zero)
        return Region(nothing, nothing, nothing)

    def propose(self, solver: "Solver", state: "State", problem: "Problem") -> tuple[Any, Any]:
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
    retraction = problem.memory.geometry.retraction(state.measure)
    if retraction is None:
        raise ValueError(
            f"acceleration=jdam.TrustRegion() needs a retraction; got {problem.memory.geometry}"
        )
    radius = jnp.where(state.history.radius > 0, state.history.radius, state.residual)
    radius = jnp.where(solver.unfinished(state, problem), radius, 0)
    guess = solver.search.settled(problem.memory, state.evaluation.guess)

    def slope(tangent: Any) -> Any:
        found = solver.evaluate(retraction.retract(tangent), problem, guess)
        return retraction.slope(found.view, found.pull)

    still = jax.tree.map(jnp.zeros_like, retraction.masses)
    slope_here, curvature = jax.linearize(slope, still)
    flat, unravel = ravel_pytree(slope_here)
    model = Quadratic(
        flat,
        lambda tangent: ravel_pytree(curvature(unravel(tangent)))[0],
        ravel_pytree(retraction.masses)[0],
    )
    found = minimise(model, radius, settings.max_products)
    measure = retraction.retract(unravel(found.step))
    return measure, Region(radius, found.length, found.decrease)


@_newton_step.defjvp
def _newton_step_jvp(*_: Any) -> Any:
    raise ValueError(
        "jdam.TrustRegion steps have no derivatives of their own: recall with "
        "adjoint=jdam.Implicit() or jdam.OneStep(), or with another acceleration"
    )
