"""What a geometry must know. Everything else in jdam knows only numbers and pytrees."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdam._core.batching import batch_size, by_platform
from jdam._core.compile import float_dtype
from jdam._core.linalg import safe_sqrt
from jdam._measures.base import AnyMeasure, Measure

#: What a geometry makes of a query before it is compared: by default the query itself.
AnyView: TypeAlias = Any


class Patterns(NamedTuple):
    """Some patterns of a memory, (B,) of them; all leaves lead with (B,)."""

    #: The measures themselves.
    measures: AnyMeasure
    #: What `Geometry.prepare` made of them.
    prepared: Any = None
    #: `Comparison.guess` of an earlier comparison with a query close by.
    guess: Any = None


class Comparison(NamedTuple):
    """What comparing a query with B patterns tells; all leaves lead with (B,)."""

    #: D(ξ, Xᵢ).
    divergence: Float[Array, " B"]
    #: What each asks the query to become.
    pull: AnyMeasure
    #: A start for comparing the same patterns with a query close by.
    guess: Any = None
    #: Whether an inner solver missed its tolerance.
    not_converged: Bool[Array, " B"] | None = None
    #: Which share of each atom belongs to the pattern.
    inliers: Float[Array, "B n"] | None = None
    #: The `jdam.Pose` that lays each pattern on the query.
    pose: Any = None


class BatchSizes(NamedTuple):
    """How many queries of a batch, and patterns, to compare at once; and with how many patterns to
    differentiate the comparison at once, for each query."""

    queries: int
    patterns: int
    differentiated: int


class Retraction(NamedTuple):
    """Coordinates about a query, in which the energy has second derivatives: tangents are pytrees
    of arrays, zero at the query."""

    masses: Any  # of the metric |s|² = Σ mⱼsⱼ² of tangents, ≥ 0; where it is 0 nothing moves
    retract: Callable[[Any], AnyMeasure]  # the measure at a tangent
    slope: Callable[[AnyView, AnyMeasure], Any]  # ∂E/∂s, of the view and the average pull there


#: Lower bounds on the divergences between the query of a view and some patterns, (B,).
Bound: TypeAlias = Callable[[AnyView, Patterns], Float[Array, " B"]]


class Geometry(eqx.Module):
    """A divergence D between measures and a way to move a measure along −grad E.

    A geometry is a class with two methods, `check` and `compare`. With these alone everything of
    jdam works: energy, weights, steps that never raise the energy (by trying shorter ones),
    recall, derivatives, learning, sharding. Each of the other methods says what it buys.

    Methods are pure and traced, and never see batches of queries. Fields are arrays of floats,
    which are traced and cast to the memory's dtype, or `equinox.field(static=True)`.
    """

    #: Whether `bounds` are so close and so cheap that recall relies on them unless told not to.
    bounds_pay: ClassVar[bool] = False
    #: How many ever more cautious steps to try, after the full one, until one does not raise the
    #: energy: 0 where it is proved that the full step never does.
    max_backtracks: ClassVar[int] = 12
    #: How many steps recall takes at most, and how deep it accelerates, unless told otherwise.
    default_steps: ClassVar[int] = 50
    default_acceleration: ClassVar[int] = 0
    #: For `jdam.theory`, the c for which D ≥ c·|difference of means|²; None if nothing is known.
    cost_scale: ClassVar[float | None] = None
    #: Whether D is c times the square of a metric.
    is_squared_metric: ClassVar[bool] = False
    #: Arrays that are > 0, of which `jdam.parametrize` makes logarithms.
    positive: ClassVar[tuple[str, ...]] = ()
    #: Fields that `prepare` does not read, and which may change without preparing again.
    unprepared: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------- required

    @abstractmethod
    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        """`measure` as this geometry's type with `batch_ndim` leading axes.

        Raises `TypeError` or `ValueError` naming the argument `name` otherwise.
        """

    @abstractmethod
    def compare(self, view: AnyView, patterns: Patterns, *, exact: bool = True) -> Comparison:
        """D(ξ, Xᵢ), and what each pattern asks the query to become: the pulls, a pytree whose
        Gibbs average Σ wᵢ·pullᵢ is all that `move` needs.

        Unless `exact`, D may be approximated where `approximation_errs` allows it."""

    # ------------------------------------------------------------- steps

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Float[Array, ""]) -> AnyMeasure:
        """ξ⁺ = ξ + τ(Σ wᵢ·pullᵢ − ξ), a descent step of length τ; τ = 1 is the full step.

        Override it unless pulls are measures of the query's kind and `view` is the query."""
        change = self._change(view, pull)
        return jax.tree.map(lambda x, dx: x + step_size * dx, view, change)

    def backtrack(
        self, view: AnyView, pull: AnyMeasure, step_size: Float[Array, ""], times: Any
    ) -> AnyMeasure:
        """A more cautious `move`, after this many attempts that raised the energy: half the step
        each time. Override it where something else than the length is to blame."""
        return self.move(view, pull, step_size * 0.5 ** jnp.asarray(times, step_size.dtype))

    def masses(self, view: AnyView, pull: AnyMeasure) -> AnyMeasure | None:
        """The m of the squared length Σ mⱼsⱼ² of a change s of `Measure.unconstrained` coordinates.
        `Anderson` combines steps by it; None for 1. Coordinates of mass 0 take plain steps.
        Override it where coordinates differ in units, or hardly matter to the energy."""
        return None

    def retraction(self, query: AnyMeasure) -> Retraction | None:
        """Coordinates for the Newton steps that `acceleration` then takes; without them it combines
        plain steps. Worth it where steps cost much and gain little."""
        return None

    def residual(self, view: AnyView, pull: AnyMeasure) -> Float[Array, ""]:
        """How far the full step goes, in units of distance: zero at fixed points only. By default
        the norm of its change; override it with `move`."""
        return norm(self._change(view, pull))

    def cautious_residual(self, view: AnyView, pull: AnyMeasure, times: Any) -> Float[Array, ""]:
        """`residual`, for the step that `backtrack` takes with this much caution. Override it where
        caution is for ever, as for a stiff part of the measure that moves no faster anywhere."""
        return self.residual(view, pull)

    def tolerances(
        self, query: AnyMeasure, scale: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Residuals: the one that is small enough, and the one at which recall stops, unless told
        otherwise: by default both eps^0.7 of the `scale` of the patterns, 1e-5 of it in float32 and
        1e-11 in float64."""
        tol = scale * float(jnp.finfo(scale.dtype).eps) ** 0.7
        return tol, tol

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """Of a tangent at a measure, the part that steps leave as it is, by a projection: that of
        `Measure.gauge`. `Implicit` derivatives need it where that is not all."""
        if isinstance(measure, Measure):
            return measure.gauge(tangent)
        return jax.tree.map(jnp.zeros_like, tangent)

    def typical_norm(
        self, patterns: AnyMeasure, weights: Float[Array, " N"] | None = None
    ) -> Float[Array, ""]:
        """The root mean square size of the patterns, in the units of `residual`: that of the
        default tolerance. `weights` sum to one; None for equal ones. They are given for memories
        with room to grow, in which free slots have weight 0."""
        rows = jax.tree.map(lambda leaf: leaf.reshape(len(leaf), -1), patterns)
        first, *rest = (jnp.vecdot(x, x) for x in jax.tree.leaves(rows))
        return safe_sqrt(average(sum(rest, first), weights))

    def energy_tolerance(
        self, patterns: AnyMeasure, weights: Float[Array, " N"] | None = None
    ) -> Float[Array, ""]:
        """The smallest change of energy that says anything, where steps need attempts: by default
        the rounding of the square of `scale`."""
        if self.max_backtracks == 0:
            return jnp.zeros((), float_dtype(patterns))
        scale = (
            self.typical_norm(patterns) if weights is None else self.typical_norm(patterns, weights)
        )
        return 4 * float(jnp.finfo(float_dtype(patterns)).eps) * scale**2

    # ------------------------------------------------------------- what is computed once

    def match(self, query: AnyMeasure, patterns: AnyMeasure) -> AnyMeasure:
        """The query, padded to array shapes that go together with these patterns'."""
        return query

    def prepare(self, patterns: AnyMeasure) -> Any:
        """What `compare` needs of the patterns beside themselves, computed once when they are
        stored: leaves lead with (B,) and carry no derivative."""
        return None

    def first_guess(self, prepared: Any) -> Any:
        """The `guess` for a first comparison."""
        return None

    def settled(self, guess: Any) -> Any:
        """The `guess` of a comparison, to compare the same patterns with the same query again, for
        derivatives alone. Override it where that can be known to need no iteration."""
        return guess

    def view(self, query: AnyMeasure) -> AnyView:
        """What `compare`, `move` and `residual` need of the query, computed once an evaluation."""
        return query

    # ------------------------------------------------------------- correspondence

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B n m"]:
        """The transport plans of D(ξ, Xᵢ), between the atoms of the query and those of patterns,
        with which `jdam.match` tells what belongs to what."""
        raise TypeError(f"{type(self).__name__} has no plans")

    # ------------------------------------------------------------- speed

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        """Functions (view, patterns) ↦ lower bounds on D, rounding included: the first cheap enough
        for all patterns, each next one closer and dearer, for patterns that those before do not
        settle. With them `Certified` need not compare all patterns."""
        return ()

    def approximation_errs(
        self, query: AnyMeasure, patterns: AnyMeasure, beta: Float[Array, ""]
    ) -> Bool[Array, ""] | None:
        """Whether an approximate D would show in exp(−βD); None if only the exact one will do."""
        return None

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        """How much to compare at once: by default 16 queries and 2¹⁶ numbers' worth of patterns,
        which keep two cores busy, and 64 times that on an accelerator."""
        numbers = sum(leaf.size for leaf in jax.tree.leaves(patterns)) // batch_size(patterns)
        return batch_sizes_of(numbers)

    def _change(self, view: AnyView, pull: AnyMeasure) -> AnyMeasure:
        """pull − ξ, where that makes sense."""
        wanted, got = (jax.tree.map(jnp.shape, tree) for tree in (view, pull))
        if not eqx.tree_equal(wanted, got):
            raise TypeError(
                f"pulls of {type(self).__name__} must be measures like the query for the default "
                f"`move` and `residual`; got {pull} for {view}: override both"
            )
        return jax.tree.map(jnp.subtract, pull, view)


def batch_sizes_of(numbers: int) -> BatchSizes:
    """For comparisons with patterns of so many numbers each."""
    at_once = max(1, by_platform(2**16, 2**18) // numbers)
    return BatchSizes(by_platform(16, 256), at_once, at_once)


def check_batch_ndim(name: str, measure: Any, batch_ndim: int) -> None:
    """Raise unless the `jdam.Measure` has this many batch axes."""
    if len(measure.batch_shape) != batch_ndim:
        wanted = "(N,)" if batch_ndim else "(), one measure: use jax.vmap over a batch"
        raise ValueError(f"{name} must have batch shape {wanted}; got {measure.batch_shape}")


def average(rows: Float[Array, "N ..."], weights: Float[Array, " N"] | None) -> Array:
    """Σ weightsᵢ·rowsᵢ, their mean if None."""
    return rows.mean(0) if weights is None else jnp.tensordot(weights, rows, 1)


def norm(tree: AnyMeasure) -> Float[Array, ""]:
    """√Σ|leaf|², with derivative 0 where it vanishes."""
    first, *rest = (jnp.vdot(x, x) for x in jax.tree.leaves(tree))
    return safe_sqrt(sum(rest, first))
