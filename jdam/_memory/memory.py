"""The memory: patterns, their geometry and their prior, immutable."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, UInt

from jdam._core import checks
from jdam._core.batching import batch_size
from jdam._core.compile import compiled, float_dtype, working_dtype
from jdam._core.mesh import Layout
from jdam._measures.base import AnyMeasure, Measure, any_of, dim_of
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.point_cloud import PointCloud
from jdam.geometry import Bures, Euclidean, Geometry


class Memory(eqx.Module):
    """N stored measures X₁…X_N, as `jdam.store` makes it: a frozen pytree.

    `len(memory)` is N, `memory[i]` the i-th pattern, `memory[1:3]` a batch of patterns;
    `append` and `remove` return new memories.

    What geometries compute of patterns once (`prepared`) belongs to these patterns and this
    geometry. Where they were changed behind its back, by `eqx.tree_at` or an optimizer's updates,
    it is not used but counts as NaN, which a recall reports as `Status.NONFINITE`. To learn a
    memory outside of `jdam.fit`, let the loss `store` the patterns: it is differentiable.
    """

    patterns: AnyMeasure
    geometry: Geometry
    log_prior: Float[Array, " N"] | None = None
    #: What the geometry computed once of each pattern, and a fingerprint of what it was made of.
    prepared: Any = None
    fingerprint: Float[Array, " N"] | None = None
    #: On which devices the patterns are, if `jdam.shard` put them there.
    layout: Layout | None = eqx.field(static=True, default=None)
    #: Then also the `Geometry.scale` and `resolution` of all patterns, of which a device has some.
    units: tuple[Array, Array] | None = None

    def __len__(self) -> int:
        if self.layout is not None and not self.layout.inside:
            return self.layout.length
        return batch_size(self.patterns)

    def __getitem__(self, index: Any) -> AnyMeasure:
        checks.index(index, len(self), "a memory")
        # Parts of a sharded memory are filled up.
        return jax.tree.map(lambda leaf: leaf[: len(self)][index], self.patterns)

    @property
    def dtype(self) -> jnp.dtype:
        """The floating dtype of the patterns."""
        return float_dtype(self.patterns)

    def units_of_patterns(self) -> tuple[Array, Array]:
        """`Geometry.scale` and `Geometry.resolution` of all patterns."""
        if self.units is not None:
            return self.units
        return _units(self.patterns, self.geometry)

    def trusted(self) -> "Memory":
        """The memory with NaN for what was prepared of other patterns or another geometry."""
        if self.fingerprint is None:
            return self
        stale = fingerprint(self.patterns, self.geometry) != self.fingerprint
        rows = jax.tree.map(
            lambda leaf: jnp.where(stale.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.nan, leaf),
            self.prepared,
        )
        return replace(self, prepared=rows)

    def append(self, patterns: AnyMeasure, *, log_prior: ArrayLike | None = None) -> "Memory":
        """A memory with `patterns`, a batch (M,) or a single measure, added at the end.

        Factors of different rank are padded with zeros, clouds with atoms of weight 0. Where
        only one side has a `log_prior`, the other's is log 1 = 0. `log_prior` is (M,) or one number
        for all of them. No patterns, M = 0, change nothing.

        **Raises:** as `store`, and `ValueError` for a sharded memory.
        """
        self._check_in_one_piece()
        try:
            patterns = self.geometry.check("patterns", patterns, 1)
        except ValueError as of_batch:
            try:
                patterns = self.geometry.check("patterns", patterns, 0)
            except ValueError:
                raise of_batch from None
            patterns = jax.tree.map(lambda leaf: leaf[None], patterns)
        check_against(self, "patterns", any_of(patterns))
        added = None if log_prior is None else _prior(patterns, log_prior)
        if batch_size(patterns) == 0:
            return self
        joined = self.geometry.join(self.patterns, patterns)
        if self.log_prior is None and added is None:
            return store(joined, self.geometry)
        prior = [_prior_or_zero(self.patterns, self.log_prior), _prior_or_zero(patterns, added)]
        return store(joined, self.geometry, log_prior=jnp.concatenate(prior))

    def remove(self, indices: int | ArrayLike) -> "Memory":
        """A memory without the patterns at `indices`, an int or integers (M,)."""
        self._check_in_one_piece()
        drop = np.asarray(indices)
        if drop.size == 0:
            return self
        if not np.issubdtype(drop.dtype, np.integer) or drop.ndim > 1:
            raise TypeError(f"indices must be an int or a list of ints; got {indices!r}")
        if not (-len(self) <= drop.min() and drop.max() < len(self)):
            raise IndexError(
                f"indices must be in [−N, N), N = {len(self)}; got {drop.min()} to {drop.max()}"
            )
        keep = np.delete(np.arange(len(self)), drop)
        if keep.size == 0:
            raise ValueError("indices must leave at least one pattern; got all of them")
        kept, prior = jax.tree.map(lambda leaf: leaf[keep], (self.patterns, self.log_prior))
        return store(kept, self.geometry, log_prior=prior)

    def _check_in_one_piece(self) -> None:
        if self.layout is not None:
            raise ValueError("a sharded memory is fixed: append and remove before jdam.shard")

    def __repr__(self) -> str:
        if not all(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(self)):
            return super().__repr__()  # the shape of a memory, holding something else
        kind = _describe(self.patterns)
        prior = "" if self.log_prior is None else ", log_prior"
        spread = f", {self.layout.parts} shards" if self.layout else ""
        return f"Memory({len(self)} × {kind}, {self.geometry}, {self.dtype.name}{prior}{spread})"


def store(
    patterns: AnyMeasure,
    geometry: Geometry | None = None,
    *,
    log_prior: ArrayLike | None = None,
) -> Memory:
    """A memory of `patterns`, a batch (N,) of measures.

    **Arguments:** `patterns`: a `Gaussian`, `DiagonalGaussian` or `PointCloud` with one batch
    axis, or an array (N, d). `geometry`: if None, `Bures()` for Gaussians and `Euclidean()` for
    arrays; point clouds need a `Sinkhorn(epsilon)`, whose self terms OT_ε(Xᵢ, Xᵢ) are computed
    here, once. `log_prior` (N,): log πᵢ of the energy −β⁻¹ log Σ πᵢ exp(−βDᵢ), up to a constant;
    πᵢ = 1 if None, and −inf switches a pattern off.

    **Raises:** `TypeError` for patterns that are not this geometry's or not floats;
    `ValueError` for an empty memory, wrong shapes, point clouds without a geometry and, where
    values are concrete, NaN or infinity.
    """
    if geometry is None and isinstance(patterns, PointCloud):
        raise ValueError(
            "geometry must be given for point clouds, because it needs its epsilon: "
            "jdam.store(patterns, jdam.Sinkhorn(epsilon=…))"
        )
    if geometry is None and isinstance(patterns, Measure) and not _is_gaussian(patterns):
        raise ValueError(f"geometry must be given for measures of type {type(patterns).__name__}")
    if geometry is None:
        geometry = Bures() if _is_gaussian(patterns) else Euclidean()
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry must be a jdam geometry, such as jdam.Bures(); got {geometry!r}")
    patterns = geometry.check("patterns", patterns, 1)
    if batch_size(patterns) == 0:
        raise ValueError("patterns must hold at least one measure; got 0")
    for leaf in jax.tree.leaves(patterns):
        checks.finite("patterns", leaf)
    prior = None if log_prior is None else _prior(patterns, log_prior)
    geometry = _in_dtype(geometry, working_dtype(float_dtype(patterns)))
    return Memory(patterns, geometry, prior, *_prepare(patterns, geometry))


def _describe(patterns: AnyMeasure) -> str:
    if isinstance(patterns, Measure):
        return patterns.describe()
    if isinstance(patterns, Array | np.ndarray):
        return f"vectors(dim={patterns.shape[-1]})"
    return type(patterns).__name__


def _is_gaussian(patterns: AnyMeasure) -> bool:
    return isinstance(patterns, Gaussian | DiagonalGaussian)


def _in_dtype(geometry: Geometry, dtype: jnp.dtype) -> Geometry:
    """The geometry with its floats as arrays of this dtype."""

    def cast(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, float):
            return jnp.asarray(leaf, dtype)
        if not isinstance(leaf, Array | np.ndarray):
            raise TypeError(
                f"geometry must have fields that are arrays of floats, or static; got {leaf!r} for "
                f"{type(geometry).__name__}{jax.tree_util.keystr(path)}: declare it with "
                "equinox.field(static=True)"
            )
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    result: Geometry = jax.tree_util.tree_map_with_path(cast, geometry)
    return result


@compiled(rounded=False)
def _units(patterns: AnyMeasure, geometry: Geometry) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return geometry.scale(patterns), geometry.resolution(patterns)


@compiled(rounded=False)
def _prepare(patterns: AnyMeasure, geometry: Geometry) -> tuple[Any, Array | None]:
    prepared = geometry.prepare(patterns)
    return prepared, None if prepared is None else fingerprint(patterns, geometry)


def fingerprint(patterns: AnyMeasure, geometry: Geometry) -> Float[Array, " N"]:
    """23 bits about each pattern and the geometry's parameters, as a number in [1, 2)."""
    read = [value for name, value in vars(geometry).items() if name not in geometry.unprepared]
    parameters = eqx.filter(read, eqx.is_inexact_array)
    leaves = [_digest(leaf.reshape(len(leaf), -1)) for leaf in jax.tree.leaves(patterns)]
    leaves += [_digest(leaf.reshape(1, -1)) for leaf in jax.tree.leaves(parameters)]
    mixed = jnp.zeros(batch_size(patterns), jnp.uint32)
    for leaf in leaves:
        mixed = mixed * jnp.uint32(0x9E3779B1) + leaf
    fraction = (mixed >> 9).astype(jnp.float32) * jnp.float32(2**-23)
    result: Array = (1 + fraction).astype(working_dtype(float_dtype(patterns)))
    return result


def _digest(rows: Float[Array, "N k"]) -> UInt[Array, " N"]:
    """A hash of the bits of each row; of −0 as of 0, which differ in nothing else."""
    values = jnp.where(rows == 0, 0, jax.lax.stop_gradient(rows))
    words = jax.lax.bitcast_convert_type(values, jnp.uint32).reshape(len(rows), -1)
    words = (words ^ (words >> 15)) * jnp.uint32(0x85EBCA6B)
    odd = 2 * jnp.arange(words.shape[1], dtype=jnp.uint32) + jnp.uint32(0x9E3779B1)
    return jnp.sum((words ^ (words >> 13)) * odd[None], axis=1, dtype=jnp.uint32)


def _prior(patterns: AnyMeasure, log_prior: ArrayLike) -> Float[Array, " N"]:
    num = batch_size(patterns)
    if np.ndim(log_prior) == 0 and not isinstance(log_prior, str):
        log_prior = jnp.full(num, log_prior, float_dtype(patterns))
    prior = checks.float_array("log_prior", log_prior)
    checks.same_dtype(patterns=jax.tree.leaves(patterns)[0], log_prior=prior)
    if prior.shape != (num,):
        raise ValueError(f"log_prior must have shape (N,) = ({num},); got {prior.shape}")
    if checks.is_concrete(prior):
        values = np.asarray(prior)
        if np.isnan(values).any() or (values == np.inf).any():
            raise ValueError("log_prior must be finite or −inf; got NaN or +inf")
        if num and (values == -np.inf).all():
            raise ValueError("log_prior must leave a pattern on; got −inf for all of them")
    return prior


def _prior_or_zero(patterns: AnyMeasure, log_prior: Array | None) -> Float[Array, " N"]:
    return (
        jnp.zeros(batch_size(patterns), float_dtype(patterns)) if log_prior is None else log_prior
    )


def check_against(memory: Memory, name: str, measure: AnyMeasure) -> None:
    """Raise unless the single measure has the memory's type, dtype and dimension."""
    if type(measure) is not type(memory.patterns) and isinstance(measure, Measure):
        raise TypeError(
            f"{name} must be a {type(memory.patterns).__name__} like the memory's patterns; "
            f"got {type(measure).__name__}"
        )
    if float_dtype(measure) != memory.dtype:
        raise TypeError(
            f"{name} must have the memory's dtype {memory.dtype}; got {float_dtype(measure)}: "
            "convert one"
        )
    wanted, got = dim_of(memory.patterns), dim_of(measure)
    if got != wanted:
        raise ValueError(f"{name} must have the memory's dimension d = {wanted}; got {got}")
