"""The interface between a geometry and the rest of jdam.

Memories, energies and recall use a geometry through these methods only, and are otherwise
independent of the type of measure.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PyTree

from jdam._core.batching import batch_size, by_platform
from jdam._core.compile import float_dtype
from jdam._core.linalg import safe_sqrt
from jdam._measures.base import AnyMeasure, Measure

#: The query as prepared for comparison by `Geometry.view`: by default the query itself.
AnyView: TypeAlias = PyTree
#: Vectors Φ(X) of B measures, (B, k), with |Φ(ξ) − Φ(X)|² ≤ D(ξ, X), and at least the rounding
#: errors |vectors − Φ(X)|, (B,).
Embedding: TypeAlias = tuple[Float[Array, "_ k"], Float[Array, " _"]]


class Patterns(NamedTuple):
    """A block of B patterns of a memory; all leaves lead with (B,)."""

    #: The measures themselves.
    measures: AnyMeasure
    #: The result of `Geometry.prepare`.
    prepared: PyTree = None
    #: Warm start: `Comparison.guess` of an earlier comparison with a query close by.
    guess: PyTree = None


class Comparison(NamedTuple):
    """Result of the comparison of a query with B patterns; all leaves lead with (B,)."""

    #: D(ξ, Xᵢ).
    divergence: Float[Array, " B"]
    #: The contribution of each pattern to the step of the query.
    pull: AnyMeasure
    #: Warm start for comparisons of the same patterns with a query close by.
    guess: PyTree = None
    #: Whether an inner solver missed its tolerance.
    not_converged: Bool[Array, " B"] | None = None
    #: The transported fraction of each atom.
    inliers: Float[Array, "B n"] | None = None
    #: The `jdam.Pose` that aligns each pattern with the query.
    pose: PyTree = None


class BatchSizes(NamedTuple):
    """Numbers of queries and patterns to compare at once.

    `differentiated` is the number of patterns per query whose comparison is differentiated at
    once."""

    queries: int
    patterns: int
    differentiated: int


class Retraction(NamedTuple):
    """Coordinates about a query in which the energy has second derivatives.

    Tangents are pytrees of arrays, zero at the query."""

    masses: PyTree  # mⱼ ≥ 0 of the metric |s|² = Σ mⱼsⱼ²; coordinates of mass 0 do not move
    retract: Callable[[PyTree], AnyMeasure]  # tangent ↦ measure
    slope: Callable[[AnyView, AnyMeasure], PyTree]  # (view, average pull) ↦ ∂E/∂s


#: Lower bounds on the divergences between the query of a view and some patterns, (B,).
Bound: TypeAlias = Callable[[AnyView, Patterns], Float[Array, " B"]]


class Geometry(eqx.Module):
    """A divergence D between measures, and the step along −grad E.

    A geometry is a class with two methods, `check` and `compare`. These suffice for all of jdam:
    energy, Gibbs weights, steps that never raise the energy (shorter steps are tried), recall,
    derivatives, learning and sharding. The docstring of each other method states what overriding it
    gains.

    Methods are pure and traced, and are called for single queries, never batches. Fields are arrays
    of floats, which are traced and cast to the memory's dtype, or `equinox.field(static=True)`."""

    #: Whether `bounds` are close and cheap enough that recall uses `Certified` by default.
    bounds_pay: ClassVar[bool] = False
    #: The largest number of more cautious steps tried after a full step that raised the energy: 0
    #: if it is proved that full steps never raise it.
    max_backtracks: ClassVar[int] = 12
    #: Defaults of recall: the largest number of steps, and the depth of `Anderson`, 0 for none.
    default_steps: ClassVar[int] = 50
    default_acceleration: ClassVar[int] = 0
    #: The c with D ≥ c·|difference of means|², for `jdam.theory`; None if unknown.
    cost_scale: ClassVar[float | None] = None
    #: Whether D is c times the square of a metric.
    is_squared_metric: ClassVar[bool] = False
    #: Names of fields > 0, which `jdam.parametrize` replaces by their logarithms.
    positive: ClassVar[tuple[str, ...]] = ()
    #: Names of fields that `prepare` does not read, so that they may change without a new call.
    unprepared: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------- required

    @abstractmethod
    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        """Return `measure` converted to this geometry's type, with `batch_ndim` leading axes.

        **Raises:** `TypeError` or `ValueError`, naming the argument `name`, if that is not
        possible."""

    @abstractmethod
    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        """Compare a query with a block of patterns.

        **Arguments:**

        - `view`: the query, as prepared by `view`.
        - `patterns`: B patterns.

        **Returns:** a `Comparison` with D(ξ, Xᵢ) and the pulls, a pytree whose Gibbs average Σ
        wᵢ·pullᵢ determines the step."""

    # ------------------------------------------------------------- steps

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Float[Array, ""]) -> AnyMeasure:
        """Return ξ⁺ = ξ + τ(Σ wᵢ·pullᵢ − ξ), a descent step with step size τ; τ = 1 is the full
        step.

        Override it unless pulls are measures of the query's type and `view` is the query.

        **Arguments:**

        - `view`: the query, as prepared by `view`.
        - `pull`: the Gibbs average of the pulls.
        - `step_size`: τ."""
        change = self._change(view, pull)
        return jax.tree.map(lambda x, dx: x + step_size * dx, view, change)

    def backtrack(
        self, view: AnyView, pull: AnyMeasure, step_size: Float[Array, ""], backtracks: Any
    ) -> AnyMeasure:
        """Return a more cautious step than `move`, after `backtracks` attempts that raised the
        energy.

        By default each attempt halves the step size; for 0 it is the full step. Override it if
        something other than the length of the step makes the energy rise."""
        return self.move(view, pull, step_size * 0.5 ** jnp.asarray(backtracks, step_size.dtype))

    def masses(self, view: AnyView, pull: AnyMeasure) -> AnyMeasure | None:
        """Return the masses m of the squared length Σ mⱼsⱼ² of a change s in
        `Measure.unconstrained` coordinates, in which `Anderson` combines steps; None stands for 1.

        Coordinates of mass 0 take plain steps. Override it if coordinates have different units, or
        if some of them hardly change the energy."""
        return None

    def retraction(self, query: AnyMeasure) -> Retraction | None:
        """Return coordinates about the query for `TrustRegion`, or None if the geometry has none.

        They are worth it if steps are expensive and converge slowly."""
        return None

    def residual(self, view: AnyView, pull: AnyMeasure) -> Float[Array, ""]:
        """Return the length of the full step, a distance, which is zero at fixed points only.

        By default it is the norm of the change of all leaves. Override it together with `move`."""
        return norm(self._change(view, pull))

    def cautious_residual(
        self, view: AnyView, pull: AnyMeasure, backtracks: Any
    ) -> Float[Array, ""]:
        """Return the residual of the step that `backtrack` takes after `backtracks` attempts.

        By default it does not depend on `backtracks`. Override it if `backtrack` changes the
        direction of the step, and not its length alone."""
        return self.residual(view, pull)

    def tolerances(
        self, query: AnyMeasure, scale: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return the largest residual that counts as converged where the energy stagnates, and the
        residual at which recall stops.

        By default both are eps^0.7 times the typical norm `scale` of the patterns: 1e-5 of it in
        float32 and 1e-11 in float64."""
        tol = scale * float(jnp.finfo(scale.dtype).eps) ** 0.7
        return tol, tol

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """Project a tangent at a measure on the gauge: changes that leave the measure the same, and
        changes of parts that no step moves.

        By default it is `Measure.gauge`. `Implicit` derivatives need an override if the gauge is
        larger."""
        if isinstance(measure, Measure):
            return measure.gauge(tangent)
        return jax.tree.map(jnp.zeros_like, tangent)

    def typical_norm(
        self, patterns: AnyMeasure, weights: Float[Array, " N"] | None = None
    ) -> Float[Array, ""]:
        """Return the root mean square norm of the patterns in the units of `residual`, which scales
        the default tolerance.

        **Arguments:**

        - `patterns`: all patterns of a memory.
        - `weights`: weights of the patterns with sum 1, 0 for empty slots of a memory with
          capacity; None for equal weights."""
        rows = jax.tree.map(lambda leaf: leaf.reshape(len(leaf), -1), patterns)
        first, *rest = (jnp.vecdot(x, x) for x in jax.tree.leaves(rows))
        return safe_sqrt(average(sum(rest, first), weights))

    def energy_tolerance(
        self, patterns: AnyMeasure, weights: Float[Array, " N"] | None = None
    ) -> Float[Array, ""]:
        """Return the absolute tolerance of the energy, below which changes count as rounding
        errors.

        It is used if steps may need backtracking. By default it is 4·eps times the squared
        `typical_norm`, and 0 if `max_backtracks` is 0. Arguments as of `typical_norm`."""
        if self.max_backtracks == 0:
            return jnp.zeros((), float_dtype(patterns))
        scale = self.typical_norm(patterns, weights)
        return 4 * float(jnp.finfo(float_dtype(patterns)).eps) * scale**2

    # ------------------------------------------------------------- what is computed once

    def match(self, query: AnyMeasure, patterns: AnyMeasure) -> AnyMeasure:
        """Return the query, padded to array shapes that are compatible with the patterns'."""
        return query

    def prepare(self, patterns: AnyMeasure) -> PyTree:
        """Return what `compare` needs of the patterns besides themselves, computed once when they
        are stored.

        Leaves lead with (B,) and carry no derivative."""
        return None

    def first_guess(self, prepared: PyTree) -> PyTree:
        """Return the warm start of a first comparison."""
        return None

    def view(self, query: AnyMeasure) -> AnyView:
        """Return the query as prepared for `compare`, `move` and `residual`, computed once in each
        evaluation."""
        return query

    # ------------------------------------------------------------- correspondence

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B n m"]:
        """Return the transport plans of D(ξ, Xᵢ) between the query's atoms and each pattern's.

        `jdam.match` needs them.

        **Raises:** `TypeError` if the geometry has no plans."""
        raise TypeError(f"{type(self).__name__} has no plans")

    # ------------------------------------------------------------- speed

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        """Return functions (view, patterns) ↦ lower bounds on D, rounding included.

        The first must be cheap enough for all patterns; each following one is closer and more
        expensive, for the patterns that the previous ones do not exclude. With bounds, `Certified`
        need not compare all patterns."""
        return ()

    def embed(self, measures: AnyMeasure, prepared: PyTree = None) -> Embedding | None:
        """Return vectors Φ(X), (B, k), with |Φ(ξ) − Φ(X)|² ≤ D(ξ, X), and bounds on their rounding
        errors |vectors − Φ(X)|, (B,); or None if there are none.

        `Memory.indexed` makes cells of them, so that a search need not look at all patterns. By
        default they are √c·(mean of X), c the `cost_scale`; longer vectors bound D more closely.

        **Arguments:**

        - `measures`: B measures, patterns or queries.
        - `prepared`: of patterns, the result of `prepare`; None for queries."""
        if self.cost_scale is None:
            return None
        means = measures.mean if isinstance(measures, Measure) else measures  # type: ignore[attr-defined]
        if self.cost_scale == 1:
            return means, jnp.zeros_like(means[:, 0])
        vectors = means * self.cost_scale**0.5
        errors = 2 * float(jnp.finfo(vectors.dtype).eps) * jnp.linalg.norm(vectors, axis=-1)
        return vectors, errors

    def approximation(
        self, query: AnyMeasure, patterns: AnyMeasure, beta: Float[Array, ""]
    ) -> "tuple[Geometry, Bool[Array, '']] | None":
        """Return a geometry with the same views and pulls, whose D is cheaper and less exact, and
        whether its rounding would show in exp(−βD). None if there is no such geometry."""
        return None

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        """Return how many queries and patterns to compare at once.

        By default they are 16 queries and patterns of 2¹⁶ numbers in all, which occupy two cores,
        or 256 queries and 2¹⁸ numbers on an accelerator."""
        numbers = sum(leaf.size for leaf in jax.tree.leaves(patterns)) // batch_size(patterns)
        return batch_sizes_of(numbers)

    def _change(self, view: AnyView, pull: AnyMeasure) -> AnyMeasure:
        """Return pull − ξ, or raise `TypeError` if the two have different structures."""
        expected, actual = (jax.tree.map(jnp.shape, tree) for tree in (view, pull))
        if not eqx.tree_equal(expected, actual):
            raise TypeError(
                f"pulls of {type(self).__name__} must be measures like the query for the default "
                f"`move` and `residual`; got {pull} for {view}: override both"
            )
        return jax.tree.map(jnp.subtract, pull, view)


def batch_sizes_of(numbers: int) -> BatchSizes:
    """Return the default batch sizes for patterns of `numbers` numbers each."""
    at_once = max(1, by_platform(2**16, 2**18) // numbers)
    return BatchSizes(by_platform(16, 256), at_once, at_once)


def check_batch_ndim(name: str, measure: PyTree, batch_ndim: int) -> None:
    """Raise `ValueError` unless the `jdam.Measure` has `batch_ndim` batch axes."""
    if len(measure.batch_shape) != batch_ndim:
        expected = "(N,)" if batch_ndim else "(), one measure: use jax.vmap over a batch"
        raise ValueError(f"{name} must have batch shape {expected}; got {measure.batch_shape}")


def average(rows: Float[Array, "N ..."], weights: Float[Array, " N"] | None) -> Array:
    """Compute Σ weightsᵢ·rowsᵢ, or the mean of the rows if `weights` is None."""
    return rows.mean(0) if weights is None else jnp.tensordot(weights, rows, 1)


def norm(tree: AnyMeasure) -> Float[Array, ""]:
    """Compute √Σ|leaf|², with derivative 0 at 0."""
    first, *rest = (jnp.vdot(x, x) for x in jax.tree.leaves(tree))
    return safe_sqrt(sum(rest, first))
