"""The memory: patterns, their geometry and their prior, immutable."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.batching import batch_size
from jdam._core.compile import float_dtype, working_dtype
from jdam._core.mesh import Layout
from jdam._core.progress import check_progress
from jdam._measures.base import AnyMeasure, Measure, any_of, check_same_arrays, describe, dim_of
from jdam._measures.batches import as_batch, as_row, join
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud
from jdam._memory import filling, slots
from jdam._memory.prepared import checked_prior, fingerprint, in_dtype, prepare, units
from jdam._memory.values import checked_values, values_for
from jdam.geometry import Bures, Euclidean, Geometry, MixtureWasserstein


class Memory(eqx.Module):
    """N stored measures X₁…X_N, as `jdam.store` makes it: a frozen pytree.

    `len(memory)` is N, `memory[i]` the i-th pattern, `memory[1:3]` a batch of patterns;
    `append`, `replace` and `remove` return new memories.

    **Room to grow.** With `jdam.store(…, capacity=C)` a memory has C slots, of which the first N
    hold patterns. `append`, `replace` and `remove` then change values but no shapes: nothing is
    compiled again while there is room, and they work inside `jax.jit` and `jax.lax.scan`. An
    append prepares its own patterns only; with `jax.jit(jdam.Memory.append, donate_argnums=0)`
    nothing else is copied either. `memory.reserve(2 * memory.capacity)` doubles the room, and
    `memory.reserve(memory.capacity, n=100)` makes room for clouds of up to 100 atoms. What has
    an entry for each pattern has one for each place: a free slot is infinitely far, weighs 0 and
    is never `nearest`. Inside `jax.jit` the number of patterns is not known when shapes are:
    `memory.size` is it, where `len(memory)` raises. What overfills a memory there, removes its last
    pattern or names slots that hold none, cannot raise; the memory then is NaN, and every recall
    says `Status.NONFINITE`.

    What geometries compute of patterns once (`prepared`) belongs to these patterns and this
    geometry. Where they were changed behind its back, by `eqx.tree_at` or an optimizer's updates,
    as the first and last numbers of each pattern tell, it counts as NaN, which a recall reports as
    `Status.NONFINITE`. To learn a memory outside of `jdam.fit`, use `jdam.parametrize`.
    """

    patterns: AnyMeasure
    geometry: Geometry
    log_prior: Float[Array, " N"] | None = None
    #: What the geometry computed once of each pattern, and a fingerprint of what it was made of.
    prepared: Any = None
    fingerprint: Float[Array, " N"] | None = None
    #: On which devices the patterns are, if `jdam.shard` put them there.
    layout: Layout | None = eqx.field(static=True, default=None)
    #: Then also `Geometry.typical_norm` and `energy_tolerance` of all patterns.
    units: tuple[Array, Array] | None = None
    #: The number of slots that hold patterns, the first ones, if there is room for more.
    size: Int[Array, ""] | None = None
    #: A pytree of arrays with a row for each pattern, as `log_prior`: labels, descriptors, ids.
    values: Any = None

    def __len__(self) -> int:
        if self.size is None:
            return self.capacity
        if not checks.is_concrete(self.size):
            raise TypeError(
                "a memory with room to grow has no length inside jax.jit: memory.size is the "
                "traced number of patterns, memory.capacity that of slots"
            )
        if self.size.ndim:
            raise TypeError(
                f"a batch {self.size.shape} of memories has no length; index its leaves"
            )
        size = int(self.size)  # which traces nothing
        if size < 0:
            raise ValueError(
                "the memory was overfilled inside jax.jit, or asked for patterns that it has not: "
                "see jdam.Memory"
            )
        return size

    @property
    def capacity(self) -> int:
        """The number of slots for patterns: N if there is no room to grow."""
        if self.layout is not None and not self.layout.inside:
            return self.layout.length
        return batch_size(self.patterns)

    @property
    def size_is_known(self) -> bool:
        """Whether the number of patterns is: inside `jax.jit` not that of a memory with room."""
        return self.size is None or checks.is_concrete(self.size)

    @property
    def occupied(self) -> Bool[Array, " N"] | None:
        """Which places hold patterns; None if all do."""
        if self.size is None:
            return None
        return jnp.arange(self.capacity, dtype=jnp.int32) < self.size

    def __getitem__(self, index: Any) -> AnyMeasure:
        whole = isinstance(index, int | np.integer)
        if not checks.is_concrete(index) or (whole and not self.size_is_known):
            place = self.from_start(index)
            return jax.tree.map(lambda leaf: leaf[place], self.patterns)
        num = len(self)
        checks.index(index, num, "a memory")
        if whole:
            return jax.tree.map(lambda leaf: leaf[index % num], self.patterns)
        # Parts of a sharded memory are filled up.
        return jax.tree.map(lambda leaf: leaf[:num][index], self.patterns)

    @property
    def dtype(self) -> jnp.dtype:
        """The floating dtype of the patterns."""
        return float_dtype(self.patterns)

    @property
    def log_weights(self) -> Float[Array, " N"]:
        """`log_prior`, or zeros."""
        if self.log_prior is None:
            return jnp.zeros(self.capacity, self.dtype)
        return self.log_prior

    def magnitudes(self) -> tuple[Array, Array]:
        """`Geometry.typical_norm` and `Geometry.energy_tolerance` of all patterns."""
        if self.units is not None:
            return self.units
        return units(self.patterns, self.geometry, self.occupied)

    def validated(self) -> "Memory":
        """The memory with NaN for what was prepared of other patterns or another geometry."""
        if self.size is not None:
            invalid = self.size < 0
            self = dataclasses.replace(
                self, log_prior=jnp.where(invalid, jnp.nan, self.log_weights)
            )
        if self.fingerprint is None:
            return self
        stale = fingerprint(self.patterns, self.geometry) != self.fingerprint
        rows = jax.tree.map(
            lambda leaf: jnp.where(stale.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.nan, leaf),
            self.prepared,
        )
        return dataclasses.replace(self, prepared=rows)

    def append(
        self, patterns: AnyMeasure, log_prior: ArrayLike | None = None, *, values: Any = None
    ) -> "Memory":
        """A memory with `patterns`, a batch (M,), a list or a single measure, added at the end.

        Factors of lower rank are padded with zeros, smaller clouds with atoms of weight 0; without
        a capacity the memory's own are too. Where only one side has a `log_prior`, the other's is
        log 1 = 0. `log_prior` is (M,) or one number for all of them. `values` (M, …), or (…) of a
        single measure, are like the memory's. No patterns, M = 0, change nothing.

        **Raises:** as `store`; `ValueError` for a sharded memory, for values where the memory has
        none or none where it has some, and, with a capacity, for more patterns than there is room
        for, or larger ones than those it holds: `reserve` makes room for either.
        """
        self._check_in_one_piece()
        if isinstance(patterns, list | tuple) and not patterns:
            return self
        patterns = self._rows(patterns)
        count = batch_size(patterns)
        prior = None if log_prior is None else checked_prior(patterns, log_prior, some_on=False)
        if count == 0:
            return self
        values = values_for(self, values, count)
        if self.size is None:
            joined = join(self.patterns, patterns)
            values = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), self.values, values)
            if self.log_prior is not None or prior is not None:
                added = jnp.zeros(count, self.dtype) if prior is None else prior
                prior = jnp.concatenate([self.log_weights, added])
            return store(joined, self.geometry, log_prior=prior, values=values)
        room = self.capacity - (len(self) if self.size_is_known else 0)
        if count > room:
            raise ValueError(
                f"patterns must be at most {room}, for which the memory has room, of its capacity "
                f"{self.capacity}; got {count}: memory.reserve({2 * self.capacity}) doubles it"
            )
        grown: Memory = slots.append(self, filling.as_large(self, patterns), values, prior)
        return grown

    def replace(
        self, indices: int | ArrayLike, patterns: AnyMeasure, *, values: Any = None
    ) -> "Memory":
        """A memory with other `patterns`, (M,), at the integers `indices`, (M,), or with one
        measure at one index. Their prior stays, and their values unless others are given.

        **Raises:** as `append`; `IndexError` for indices at which there is no pattern.
        """
        self._check_in_one_piece()
        index = slots.checked_indices(self, indices)
        patterns = self._rows(patterns)
        if index.ndim > 1 or index.size != batch_size(patterns):
            raise ValueError(
                f"indices must be {batch_size(patterns)}, one for each of patterns; "
                f"got shape {index.shape}"
            )
        filled = filling.as_large(self, patterns)
        values = None if values is None else values_for(self, values, index.size)
        changed: Memory = slots.replace(self, index.reshape(-1), filled, values)
        return changed

    def remove(self, indices: int | ArrayLike) -> "Memory":
        """A memory without the patterns at `indices`, an int or integers (M,); later ones move up.

        **Raises:** `IndexError` for indices at which there is no pattern, `ValueError` if none
        would be left, `TypeError` inside `jax.jit` for a memory without a capacity.
        """
        self._check_in_one_piece()
        drop = slots.checked_indices(self, indices)
        if drop.size == 0:
            return self
        if not checks.is_concrete(drop) and self.size is None:
            raise TypeError(
                "indices must be known outside of jax.jit, or the memory have a capacity: "
                "jdam.store(…, capacity=…)"
            )
        if checks.is_concrete(drop) and self.size_is_known:
            keep = np.delete(np.arange(len(self)), np.asarray(drop))
            if keep.size == 0:
                raise ValueError("indices must leave at least one pattern; got all of them")
            prior = self.log_weights
            if checks.is_concrete(prior) and (np.asarray(prior)[keep] == -np.inf).all():
                raise ValueError("log_prior must leave a pattern on; indices have all that are")
            if self.size is None:
                rows = self.patterns, self.log_prior, self.values
                kept, prior, values = jax.tree.map(lambda leaf: leaf[keep], rows)
                return store(kept, self.geometry, log_prior=prior, values=values)
        shorter: Memory = slots.remove(self, drop.reshape(-1))
        return shorter

    def reserve(self, capacity: int, **sizes: int) -> "Memory":
        """The same memory with room for `capacity` patterns in all, and for larger ones.

        **Arguments:** `capacity` ≥ N. `sizes`, to which patterns are filled up without a change of
        the measures: `n` atoms of clouds, `r` columns of the factors of Gaussians and mixtures, `K`
        components of mixtures, and what other kinds have in `Measure.padding`. Without `sizes`
        nothing is prepared anew, with them all is.

        **Raises:** `TypeError` or `ValueError` for a capacity or sizes that are no ints or less
        than the memory's own, `ValueError` for sizes that this kind of patterns does not have.
        """
        self._check_in_one_piece()
        capacity = checks.positive_int("capacity", capacity)
        if capacity < length_or_capacity(self):
            raise ValueError(f"capacity must be ≥ N = {length_or_capacity(self)}; got {capacity}")
        larger = filling.enlarge(self, sizes) if sizes else self
        roomy: Memory = slots.reserve(larger, capacity)
        return roomy

    def _check_in_one_piece(self) -> None:
        if self.layout is not None:
            raise ValueError("a sharded memory is fixed: change it before jdam.shard")

    def _rows(self, patterns: AnyMeasure) -> AnyMeasure:
        """A batch of patterns, or one measure as one, that go with the memory's."""
        patterns = as_batch(patterns)
        try:
            patterns = self.geometry.check("patterns", patterns, 1)
        except ValueError as of_batch:
            try:
                patterns = self.geometry.check("patterns", patterns, 0)
            except ValueError:
                raise of_batch from None
            patterns = as_row(patterns)
        check_against(self, "patterns", any_of(patterns))
        for leaf in jax.tree.leaves(patterns):
            checks.finite("patterns", leaf)
        return patterns

    def from_start(self, index: Any) -> Int[Array, "..."]:
        """Traced indices, of which those below 0 count from the end of what is stored."""
        index = jnp.asarray(index, jnp.int32)
        return jnp.where(index < 0, index + slots.size_of(self), index)

    def __repr__(self) -> str:
        if not all(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(self)):
            return super().__repr__()  # the shape of a memory, holding something else
        num: Any = self.capacity
        if self.size is not None:
            known = checks.is_concrete(self.size) and self.size.ndim == 0
            num = f"{int(self.size) if known else '…'} of {self.capacity}"
        more = ", log_prior" if self._has_prior() else ""
        more += ", values" if self.values is not None else ""
        spread = f", {self.layout.parts} shards" if self.layout else ""
        kind = describe(self.patterns)
        return f"Memory({num} × {kind}, {self.geometry}, {self.dtype.name}{more}{spread})"

    def _has_prior(self) -> bool:
        if self.size is None or self.log_prior is None:
            return self.log_prior is not None
        if not checks.is_concrete(self.log_prior, self.size) or self.size.ndim:
            return True
        return bool(np.asarray(self.log_prior)[: int(self.size)].any())


def store(
    patterns: AnyMeasure,
    geometry: Geometry | None = None,
    *,
    log_prior: ArrayLike | None = None,
    values: Any = None,
    capacity: int | None = None,
    progress: bool | None = None,
) -> Memory:
    """A memory of `patterns`, a batch (N,) of measures.

    **Arguments:**

    - `patterns`: measures with one batch axis, a list of single ones, which is stacked
      (`jdam.stack`), or an array (N, d).
    - `geometry`: if None, `Bures()` for Gaussians, `MixtureWasserstein()` for mixtures of them and
      `Euclidean()` for arrays; point clouds need a `Sinkhorn(epsilon)`, whose self terms
      OT_ε(Xᵢ, Xᵢ) are computed here, once.
    - `log_prior` (N,): log πᵢ of the energy −β⁻¹ log Σ πᵢ exp(−βDᵢ), up to a constant; πᵢ = 1 if
      None, and −inf switches a pattern off.
    - `values`: what goes with the patterns, an array (N, …) of numbers or booleans or a pytree of
      them, as `memory.values`. `memory.values[result.nearest]` is the label of the pattern that a
      recall ends at; `jdam.attend(memory, query, beta)` averages values that are floats.
    - `capacity` ≥ N: for how many patterns to make room, for a memory that grows; see `Memory`.
    - `progress`: a bar while many patterns are prepared, as of `pairwise`.

    **Raises:** `TypeError` for patterns that are not this geometry's or not floats, and for values
    that are no numbers; `ValueError` for an empty memory, wrong shapes, point clouds without a
    geometry, a capacity below N and, where values are concrete, NaN or infinity in patterns.
    """
    progress = check_progress(progress)
    patterns = as_batch(patterns)
    if geometry is None:
        geometry = _ordinary(patterns)
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry must be a jdam geometry, such as jdam.Bures(); got {geometry!r}")
    patterns = geometry.check("patterns", patterns, 1)
    if batch_size(patterns) == 0:
        raise ValueError("patterns must hold at least one measure; got 0")
    for leaf in jax.tree.leaves(patterns):
        checks.finite("patterns", leaf)
    prior = None if log_prior is None else checked_prior(patterns, log_prior)
    geometry = in_dtype(geometry, working_dtype(float_dtype(patterns)))
    values = None if values is None else checked_values(values, batch_size(patterns))
    prepared = prepare(patterns, geometry, progress)
    memory = Memory(patterns, geometry, prior, *prepared, values=values)
    return memory if capacity is None else memory.reserve(capacity)


def _ordinary(patterns: AnyMeasure) -> Geometry:
    """The geometry of these measures unless another is given."""
    if isinstance(patterns, PointCloud):
        raise ValueError(
            "geometry must be given for point clouds, because it needs its epsilon: "
            "jdam.store(patterns, jdam.Sinkhorn(epsilon=…))"
        )
    if isinstance(patterns, Gaussian | DiagonalGaussian):
        return Bures()
    if isinstance(patterns, GaussianMixture):
        return MixtureWasserstein()
    if isinstance(patterns, Measure):
        raise ValueError(f"geometry must be given for measures of type {type(patterns).__name__}")
    return Euclidean()


def check_memory(memory: object) -> None:
    """Raise unless it is a memory."""
    if not isinstance(memory, Memory):
        kind = type(memory).__name__
        raise TypeError(f"memory must be a jdam.Memory; got {kind}: jdam.store makes one")


def length_or_capacity(memory: Memory) -> int:
    """The number of patterns where it is known, that of slots where it is traced."""
    return len(memory) if memory.size_is_known else memory.capacity


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
    check_same_arrays(name, measure, memory.patterns, "the patterns have")
