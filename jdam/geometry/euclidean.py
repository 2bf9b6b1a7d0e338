"""Vectors: classical modern Hopfield memories, by distance and by inner product."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, PyTree

from jdam._core import checks
from jdam._core.batching import by_platform
from jdam._core.linalg import (
    PIECE,
    long_products,
    long_vecdot,
    rounding,
    safe_sqrt,
    squared_distances,
)
from jdam._measures.base import AnyMeasure, Measure
from jdam.geometry.protocol import (
    AnyView,
    BatchSizes,
    Bound,
    Comparison,
    Embedding,
    Geometry,
    Patterns,
)


def vector_batch_sizes() -> BatchSizes:
    """Return batch sizes for vectors, large enough for efficient matrix products."""
    patterns = by_platform(2048, 2**15)
    return BatchSizes(by_platform(512, 4096), patterns, patterns)


class Vectors(Geometry):
    """A geometry whose measures are arrays (d,) and whose pulls are the patterns."""

    max_backtracks: ClassVar[int] = 0

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        if isinstance(measure, Measure):
            raise TypeError(f"{name} must be an array for {self}; got {type(measure).__name__}")
        array = checks.float_array(name, measure)
        if array.ndim != batch_ndim + 1 or array.shape[-1] == 0:
            expected = "(N, d)" if batch_ndim else "(d,)"
            raise ValueError(f"{name} must have shape {expected}, d ≥ 1; got {array.shape}")
        return array

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        return vector_batch_sizes()


class Euclidean(Vectors):
    """D(x, y) = |x − y|² on vectors: the distance-softmax Hopfield memory.

    Its step is x⁺ = x + τ(Σ wᵢyᵢ − x) with wᵢ ∝ exp(−β|x − yᵢ|²). On patterns of equal norm
    it is `DotProduct` with 2β.
    """

    cost_scale: ClassVar[float | None] = 1.0
    is_squared_metric: ClassVar[bool] = True

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        return Comparison(squared_distances(view, patterns.measures), patterns.measures)

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        return (lambda view, block: squared_distances_less_rounding(view, block.measures),)

    def approximation(
        self, query: AnyMeasure, patterns: AnyMeasure, beta: Array
    ) -> tuple[Geometry, Array] | None:
        errs = products_err(query, patterns, beta) if type(self) is Euclidean else None
        return None if errs is None else (_ByProducts(), errs)


class Landmarks(Euclidean):
    """`Euclidean` on arrays (n, d) of n points in a known order, the landmarks of `Aligned`."""

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        if isinstance(measure, Measure):
            raise TypeError(f"{name} must be an array of landmarks; got {type(measure).__name__}")
        array = checks.float_array(name, measure)
        if array.ndim != batch_ndim + 2 or 0 in array.shape[-2:]:
            expected = "(N, n, d)" if batch_ndim else "(n, d)"
            raise ValueError(f"{name} must have shape {expected}, n, d ≥ 1; got {array.shape}")
        return array

    def match(self, query: AnyMeasure, patterns: AnyMeasure) -> AnyMeasure:
        if query.shape[-2] != patterns.shape[-2]:
            raise ValueError(
                f"measures must have n = {patterns.shape[-2]} landmarks as the patterns have; "
                f"got n = {query.shape[-2]}"
            )
        return query

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B n m"]:
        """Return identity matrices: each landmark is matched with that of the same number."""
        order = jnp.eye(len(view), dtype=view.dtype)[None]
        return jnp.repeat(order, len(patterns.measures), 0)

    def __repr__(self) -> str:
        return "Euclidean()"  # which users wrap


class _ByProducts(Euclidean):
    """`Euclidean` with distances by matrix products."""

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        distances = fast_squared_distances(view, patterns.measures)
        return Comparison(distances, patterns.measures)


class DotProduct(Vectors):
    """D(x, y) = ½|x|² − ⟨x, y⟩ on vectors: the modern Hopfield network of Ramsauer et al.

    The energy is theirs up to a constant, ½|x|² − β⁻¹ log Σᵢ exp(β⟨x, yᵢ⟩) (eq. 3 of
    arXiv:2008.02217), and the full step is attention, x⁺ = Σ softmaxᵢ(β⟨x, yᵢ⟩) yᵢ. D is no
    divergence: it may be negative, and a pattern need not be its own nearest.
    """

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        return Comparison(_energies(view, patterns.measures), patterns.measures)

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        return (_energies_less_rounding,)


def _energies(x: Float[Array, " d"], ys: Float[Array, "B d"]) -> Float[Array, " B"]:
    """Compute ½|x|² − ⟨x, yᵢ⟩."""
    return long_vecdot(x, x) / 2 - long_products(x, ys)


def _energies_less_rounding(x: Float[Array, " d"], patterns: Patterns) -> Float[Array, " B"]:
    ys = patterns.measures
    size = long_vecdot(x, x) + long_vecdot(ys, ys)
    return _energies(x, ys) - rounding(x.size, x.dtype) * size


def fast_squared_distances(x: Float[Array, " d"], ys: Float[Array, "B d"]) -> Float[Array, " B"]:
    """Compute |x − yᵢ|² by one matrix product over a batch of queries, in a fifth of the time of
    differences.

    With the centre c of the block, |x−c|² + |yᵢ−c|² − 2⟨x−c, yᵢ−c⟩ has an error of about
    eps·(|x−c|² + |yᵢ−c|²); `products_err` returns whether that is too large.
    """
    squares, crossed = _products(x, ys)
    return jnp.maximum(squares - 2 * crossed, 0)


def squared_distances_less_rounding(
    x: Float[Array, " d"], ys: Float[Array, "B d"]
) -> Float[Array, " B"]:
    """Compute lower bounds on |x − yᵢ|², rounding included, by one matrix product."""
    squares, crossed = _products(x, ys)
    return jnp.maximum(squares * (1 - rounding(ys.shape[-1], ys.dtype)) - 2 * crossed, 0)


def embedding_bound(query: Embedding, patterns: Embedding) -> Float[Array, " B"]:
    """Compute lower bounds on |Φ(ξ) − Φ(Xᵢ)|², rounding included, by one matrix product; `query`
    has one row."""
    (x, error), (ys, errors) = query, patterns
    distances = safe_sqrt(squared_distances_less_rounding(x[0], ys)) - (error + errors)
    return jnp.maximum(distances, 0) ** 2


def _products(x: Float[Array, " d"], ys: Float[Array, "B d"]) -> tuple[Array, Array]:
    """Compute |x−c|² + |yᵢ−c|² and ⟨x−c, yᵢ−c⟩, where c is the centre of the yᵢ."""
    centre = jax.lax.stop_gradient(ys.mean(0))
    x, ys = x - centre, ys - centre[None]
    return long_vecdot(x, x) + long_vecdot(ys, ys), long_products(x, ys)


def products_err(query: PyTree, patterns: PyTree, beta: Float[Array, ""]) -> Bool[Array, ""] | None:
    """Return whether `fast_squared_distances` may change a logit β|x−yᵢ|² by more than 1 %.

    In float64, which is chosen for its digits, return None: exact differences are used.
    """
    eps = float(jnp.finfo(beta.dtype).eps)
    if eps < 1e-10:
        return None
    size, sizes, dim = jnp.zeros((), beta.dtype), jnp.zeros((), beta.dtype), 0
    for x, ys in zip(jax.tree.leaves(query), jax.tree.leaves(patterns), strict=True):
        centre, dim = ys.mean(0), dim + x.size
        size = size + jnp.sum((x - centre) ** 2)
        sizes = sizes + jnp.sum((ys - centre[None]) ** 2, -1).max()
    # Of products in pieces, the rounding of a single piece dominates (measured).
    error = eps * (4 + math.sqrt(min(dim, PIECE)) / 4)
    return beta * error * (size + sizes) > 0.01
