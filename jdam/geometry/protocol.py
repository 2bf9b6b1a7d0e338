"""What a geometry must know. Everything else in jdam knows only numbers and pytrees."""

import math
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jdam.linalg import safe_sqrt

#: A measure: an array (…, d) or a `jdam.Gaussian`, `jdam.DiagonalGaussian`, …
AnyMeasure: TypeAlias = Any
#: What a geometry makes of a query before it is compared: by default the query itself.
AnyView: TypeAlias = Any


class Comparison(NamedTuple):
    """What comparing a query with B patterns tells; all leaves lead with (B,)."""

    divergence: Float[Array, " B"]  # D(ξ, Xᵢ)
    pull: AnyMeasure  # what each asks the query to become
    guess: Any = None  # a start for comparing the same patterns with a query close by
    missed: Bool[Array, " B"] | None = None  # did an inner solver miss its tolerance?


class Geometry(eqx.Module):
    """A divergence D between measures and a way to move a measure along −grad E.

    To add a geometry, subclass and implement `check` and `compare`; override
    the rest where the default does not fit. `patterns` always carries one leading axis (B,)
    of patterns, `query` none. Methods are pure, traced, and never see batches of queries.
    """

    #: How many ever more cautious steps to try until one does not raise the energy: 1 where the
    #: full step never raises it.
    attempts: ClassVar[int] = 1
    #: For `jdam.theory`, the c for which D ≥ c·|difference of means|²; None if nothing is known.
    cost_scale: ClassVar[float | None] = None
    #: Whether D is c times the square of a metric.
    is_squared_metric: ClassVar[bool] = False

    #: Fields that `prepare` does not read, and which may change without preparing again.
    unprepared: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        """`measure` as this geometry's type with `batch_ndim` leading axes.

        Raises `TypeError` or `ValueError` naming the argument `name` otherwise.
        """

    def match(self, query: AnyMeasure, patterns: AnyMeasure) -> AnyMeasure:
        """The query, padded to array shapes that go together with these patterns'."""
        return query

    def join(self, first: AnyMeasure, second: AnyMeasure) -> AnyMeasure:
        """Two batches of patterns as one."""
        first, second = self.match(first, second), self.match(second, first)
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)

    def prepare(self, patterns: AnyMeasure) -> Any:
        """What `compare` needs of the patterns beside themselves, computed once when they are
        stored: leaves lead with (B,) and carry no derivative."""
        return None

    def first_guess(self, prepared: Any) -> Any:
        """The `guess` for a first comparison."""
        return None

    def view(self, query: AnyMeasure) -> AnyView:
        """What `compare`, `move` and `residual` need of the query, computed once a look."""
        return query

    @abstractmethod
    def compare(
        self, view: AnyView, patterns: AnyMeasure, prepared: Any, guess: Any, exact: bool
    ) -> Comparison:
        """D(ξ, Xᵢ), and what each pattern asks the query to become: the pulls, a pytree whose
        Gibbs average Σ wᵢ·pullᵢ is all that `move` needs.

        `prepared` and `guess` are what `prepare` and the last comparison said of the patterns.
        Unless `exact`, D may be approximated where `approximation_errs` allows it."""

    def bound(self, view: AnyView, patterns: AnyMeasure, prepared: Any) -> Float[Array, " B"]:
        """Lower bounds on D(ξ, Xᵢ), rounding included, cheap enough for all patterns: by default
        D itself."""
        guess = self.first_guess(prepared)
        return self.compare(view, patterns, prepared, guess, True).divergence

    def sharpenings(self, patterns: AnyMeasure) -> int:
        """How many levels of closer bounds there are."""
        return 0

    def sharpen(
        self, view: AnyView, patterns: AnyMeasure, prepared: Any, level: int
    ) -> Float[Array, " B"]:
        """Closer lower bounds at greater cost, for patterns that earlier ones do not settle:
        of level 1, 2, …, `sharpenings`."""
        raise NotImplementedError

    def approximation_errs(
        self, query: AnyMeasure, patterns: AnyMeasure, beta: Float[Array, ""]
    ) -> Bool[Array, ""] | None:
        """Whether an approximate D would show in exp(−βD); None if only the exact one will do."""
        return None

    def move(
        self, view: AnyView, pull: AnyMeasure, step_size: Float[Array, ""], attempt: Any = 0
    ) -> AnyMeasure:
        """ξ⁺ = ξ + τ(Σ wᵢ·pullᵢ − ξ), a descent step of length τ; τ = 1 is the full step.

        `attempt`, below `attempts`, counts how often more caution was asked for."""
        return jax.tree.map(lambda x, y: x + step_size * (y - x), view, pull)

    def surely_descends(
        self, view: AnyView, pull: AnyMeasure, step_size: Float[Array, ""], moved: AnyMeasure
    ) -> Bool[Array, ""]:
        """Whether it is proved that the first attempt, `moved`, does not raise the energy."""
        return jnp.array(self.attempts == 1)

    def conserved(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """Of a tangent at a measure, the part that steps leave as it is, by a projection."""
        return jax.tree.map(jnp.zeros_like, tangent)

    def resolution(self, patterns: AnyMeasure) -> Float[Array, ""]:
        """The smallest change of energy that says anything, where steps need attempts."""
        return jnp.zeros((), jax.tree.leaves(patterns)[0].dtype)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Float[Array, ""]:
        """How far the full step goes, in units of distance: zero at fixed points only."""
        return norm(jax.tree.map(lambda x, y: y - x, view, pull))

    def scale(self, patterns: AnyMeasure) -> Float[Array, ""]:
        """The root mean square size of the patterns, in the units of `residual`."""
        return norm(patterns) / math.sqrt(batch_size(patterns))

    def tile(self, patterns: AnyMeasure) -> tuple[int, int]:
        """How many queries of a batch, and how many patterns, to compare at once.

        By default 16 and 2¹⁶ numbers' worth, which keep two cores or a GPU busy.
        """
        numbers = sum(leaf.size for leaf in jax.tree.leaves(patterns)) // batch_size(patterns)
        return 16, max(1, 2**16 // numbers)

    def derivatives_at_once(self, patterns: AnyMeasure) -> int:
        """How many patterns to differentiate the comparison with at once, for each query."""
        return self.tile(patterns)[1]


def check_batch_ndim(name: str, measure: Any, batch_ndim: int) -> None:
    """Raise unless the `jdam.Measure` has this many batch axes."""
    if len(measure.batch_shape) != batch_ndim:
        wanted = "(N,)" if batch_ndim else "(), one measure: use jax.vmap over a batch"
        raise ValueError(f"{name} must have batch shape {wanted}; got {measure.batch_shape}")


def any_of(measures: AnyMeasure) -> AnyMeasure:
    """A single measure of the shape of those of a batch, which may be empty, for checks of it."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), measures)


def batch_size(patterns: AnyMeasure) -> int:
    """The length of the leading axis that all leaves share."""
    return jax.tree.leaves(patterns)[0].shape[0]


def with_leaves(measure: AnyMeasure, *leaves: Array) -> AnyMeasure:
    """A measure like `measure` of other arrays, unchecked: for values that need no check."""
    return jax.tree.unflatten(jax.tree.structure(measure), leaves)


def norm(tree: AnyMeasure) -> Float[Array, ""]:
    """√Σ|leaf|², with derivative 0 where it vanishes."""
    first, *rest = (jnp.vdot(x, x) for x in jax.tree.leaves(tree))
    return safe_sqrt(sum(rest, first))
