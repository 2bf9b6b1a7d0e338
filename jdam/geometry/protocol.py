"""What a geometry must know. Everything else in jdam knows only numbers and pytrees."""

import math
from abc import abstractmethod
from typing import Any, TypeAlias

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


class Geometry(eqx.Module):
    """A divergence D between measures and a way to move a measure along −grad E.

    To add a geometry, subclass and implement `check` and `compare`; override
    the rest where the default does not fit. `patterns` always carries one leading axis (B,)
    of patterns, `query` none. Methods are pure, traced, and never see batches of queries.
    """

    @abstractmethod
    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        """`measure` as this geometry's type with `batch_ndim` leading axes.

        Raises `TypeError` or `ValueError` naming the argument `name` otherwise.
        """

    def match(self, query: AnyMeasure, patterns: AnyMeasure) -> AnyMeasure:
        """The query, padded to array shapes that go together with these patterns'."""
        return query

    def view(self, query: AnyMeasure) -> AnyView:
        """What `compare`, `move` and `residual` need of the query, computed once a look."""
        return query

    @abstractmethod
    def compare(
        self, view: AnyView, patterns: AnyMeasure, exact: bool
    ) -> tuple[Float[Array, " B"], AnyMeasure]:
        """D(ξ, Xᵢ), and what each pattern asks the query to become: the pulls, a pytree whose
        leaves lead with (B,) and whose Gibbs average Σ wᵢ·pullᵢ is all that `move` needs.

        Unless `exact`, D may be approximated where `approximation_errs` allows it."""

    def approximation_errs(
        self, query: AnyMeasure, patterns: AnyMeasure, beta: Float[Array, ""]
    ) -> Bool[Array, ""] | None:
        """Whether an approximate D would show in exp(−βD); None if only the exact one will do."""
        return None

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Float[Array, ""]) -> AnyMeasure:
        """ξ⁺ = ξ + τ(Σ wᵢ·pullᵢ − ξ), a descent step of length τ; τ = 1 is the full step."""
        return jax.tree.map(lambda x, y: x + step_size * (y - x), view, pull)

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
