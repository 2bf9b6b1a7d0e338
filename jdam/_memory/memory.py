"""The memory, an immutable pytree of patterns, and `store`, which creates it."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core import checks
from jdam._core.batching import batch_size
from jdam._core.compile import float_dtype, working_dtype
from jdam._core.mesh import Layout
from jdam._core.progress import check_progress
from jdam._measures.base import AnyMeasure, Measure, check_like, describe
from jdam._measures.batches import as_batch, as_row, join
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud
from jdam._memory import slots
from jdam._memory.cells import Cells, index_of
from jdam._memory.prepared import checked_prior, fingerprint, in_dtype, prepare, units
from jdam._memory.values import checked_values, values_for
from jdam.geometry import Bures, Euclidean, Geometry, MixtureWasserstein


class Memory(eqx.Module):
    """N stored measures X₁ … X_N and their geometry, made by `jdam.store`: a frozen pytree.

    `len(memory)` is N, `memory[i]` pattern i, `memory[1:3]` a batch; changes return new memories.

    **Capacity.** `jdam.store(…, capacity=C)` makes C slots, of which the first N hold patterns.
    `append`, `replace` and `remove` then change no shapes: nothing is recompiled, and they work
    inside `jax.jit` and `jax.lax.scan`. `append` prepares the new patterns only, and under
    `jax.jit(jdam.Memory.append, donate_argnums=0)` copies nothing else. `memory.reserve(200)`
    enlarges the capacity, and `memory.reserve(200, n=100)` also the slots, for clouds of up to 100
    atoms. Arrays with an entry for each pattern have one for each slot; a free slot has divergence
    ∞ and weight 0 and is never `nearest`. Inside `jax.jit` `len(memory)` raises; `memory.size` is
    the traced N. A memory that is overfilled there, emptied, or changed at free slots cannot raise:
    it becomes NaN, and every recall has `Status.NONFINITE`.

    `prepared` is valid for these patterns and this geometry. After other changes of them, by
    `eqx.tree_at` or an optimizer, it counts as NaN, and recalls have `Status.NONFINITE`;
    fingerprints of the first and last numbers of each pattern detect this. Use `jdam.fit` or
    `jdam.parametrize` to learn a memory.
    """

    patterns: AnyMeasure
    geometry: Geometry
    log_prior: Float[Array, " N"] | None = None
    #: What the geometry computed once of each pattern, and a fingerprint of its arguments.
    prepared: PyTree = None
    fingerprint: Float[Array, " N"] | None = None
    #: The devices of a sharded memory.
    layout: Layout | None = eqx.field(static=True, default=None)
    #: Sharded: `Geometry.typical_norm` and `Geometry.energy_tolerance` of all patterns.
    units: tuple[Array, Array] | None = None
    size: Int[Array, ""] | None = None  #: With a capacity: the number of patterns.
    values: PyTree = None  #: A pytree of arrays with a row for each pattern, as labels.
    cells: Cells | None = None  #: From `indexed`: cells of patterns for searches.

    def __len__(self) -> int:
        if self.size is None:
            return self.capacity
        if not checks.is_concrete(self.size):
            raise TypeError(
                "a memory with room to grow has no length inside jax.jit: memory.size is the "
                "traced number of patterns, memory.capacity that of slots"
            )
        if self.size.ndim:
            raise TypeError(f"a batch {self.size.shape} of memories has no length; index it")
        size = int(self.size)
        if size < 0:
            raise ValueError(
                "the memory was overfilled inside jax.jit, or asked for patterns that it has not: "
                "see jdam.Memory"
            )
        return size

    @property
    def capacity(self) -> int:
        """The number of slots; N for a memory without a capacity."""
        if self.layout is not None and not self.layout.inside:
            return self.layout.length
        return batch_size(self.patterns)

    @property
    def size_is_known(self) -> bool:
        """True if the number of patterns is known: with a capacity it is traced in `jax.jit`."""
        return self.size is None or checks.is_concrete(self.size)

    @property
    def length_or_capacity(self) -> int:
        """The number of patterns if it is known, else that of slots."""
        return len(self) if self.size_is_known else self.capacity

    @property
    def occupied(self) -> Bool[Array, " N"] | None:
        """A mask of the slots that hold patterns; None if all do."""
        return None if self.size is None else jnp.arange(self.capacity, dtype=jnp.int32) < self.size

    def __getitem__(self, index: Any) -> AnyMeasure:
        if isinstance(index, int | np.integer):
            slot = slots.checked_index(self, int(index))
        elif not checks.is_concrete(index):
            slot = self.from_start(index)
        else:  # shards are padded
            return jax.tree.map(lambda leaf: leaf[: len(self)][index], self.patterns)
        return jax.tree.map(lambda leaf: leaf[slot], self.patterns)

    @property
    def dtype(self) -> jnp.dtype:
        """The floating dtype of the patterns."""
        return float_dtype(self.patterns)

    @property
    def log_weights(self) -> Float[Array, " N"]:
        """The prior log πᵢ, zeros if `log_prior` is None."""
        if self.log_prior is None:
            return jnp.zeros(self.capacity, self.dtype)
        return self.log_prior

    def magnitudes(self) -> tuple[Array, Array]:
        """Return `Geometry.typical_norm` and `Geometry.energy_tolerance` of all patterns."""
        if self.units is not None:
            return self.units
        return units(self.patterns, self.geometry, self.occupied)

    def validated(self) -> "Memory":
        """Return the memory, with NaN where `prepared` or `size` is invalid."""
        if self.size is not None:
            prior = jnp.where(self.size < 0, jnp.nan, self.log_weights)
            self = dataclasses.replace(self, log_prior=prior)
        if self.fingerprint is None:
            return self
        stale = fingerprint(self.patterns, self.geometry) != self.fingerprint
        rows = jax.tree.map(
            lambda leaf: jnp.where(stale.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.nan, leaf),
            self.prepared,
        )
        cells = None if self.cells is None else self.cells.invalid_if(stale.any())
        return dataclasses.replace(self, prepared=rows, cells=cells)

    def indexed(self, num_cells: int | None = None) -> "Memory":
        """Return the memory with its patterns in cells, of which a search opens few.

        Recalls and `nearest` bound D ≥ (|Φ(ξ) − c| − r)₊² for whole cells, with centre c and radius
        r of the vectors `Geometry.embed`, and open cells in this order until what is left is proved
        negligible. Results and certificates are those of `Certified`. It pays from some 10⁵
        patterns on, if they cluster. Changes keep the cells; after many, index again.

        **Arguments:**

        - `num_cells`: about the number of cells, at most N; None for 4√N.

        **Raises:** `TypeError` for a geometry without `embed`, as `Chamfer`, `Aligned` and
        `Sinkhorn` with ρ, and a `num_cells` that is no int; `ValueError` unless it is in [1, N].
        """
        return index_of(self, num_cells)

    def append(
        self, patterns: AnyMeasure, log_prior: ArrayLike | None = None, *, values: PyTree = None
    ) -> "Memory":
        """Return a memory with `patterns` added at the end.

        **Arguments:**

        - `patterns`: a batch (M,), a list or a single measure. Smaller ones are padded, with zeros
          and atoms of weight 0; without a capacity so are the memory's own.
        - `log_prior`: (M,) or one number. If only one side has a prior, the other's is log 1 = 0.
        - `values`: (M, …), or (…) for a single measure, like the memory's.

        **Raises:** as `store`; `ValueError` for a sharded memory, unless values are given if and
        only if the memory has some, and, with a capacity, for patterns that do not fit the free
        slots.
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
            grown = store(joined, self.geometry, log_prior=prior, values=values)
            return slots.with_cells(grown, self.validated().cells, len(self))
        room = self.capacity - (len(self) if self.size_is_known else 0)
        if count > room:
            raise ValueError(
                f"patterns must be at most {room}, for which the memory has room, of its capacity "
                f"{self.capacity}; got {count}: memory.reserve({2 * self.capacity}) doubles it"
            )
        appended: Memory = slots.append(self, slots.as_large(self, patterns), values, prior)
        return appended

    def replace(
        self, indices: int | ArrayLike, patterns: AnyMeasure, *, values: PyTree = None
    ) -> "Memory":
        """Return a memory with other patterns at some indices; their prior stays.

        **Arguments:**

        - `indices`: integers (M,), or one index.
        - `patterns`: a batch (M,), or one measure.
        - `values`: new values like the memory's; None keeps the old ones.

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
        filled = slots.as_large(self, patterns)
        values = None if values is None else values_for(self, values, index.size)
        changed: Memory = slots.replace(self, index.reshape(-1), filled, values)
        return changed

    def remove(self, indices: int | ArrayLike) -> "Memory":
        """Return a memory without the patterns at `indices`, (M,) or an int; later ones move up.

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
            remaining = np.delete(np.arange(len(self)), np.asarray(drop))
            if remaining.size == 0:
                raise ValueError("indices must leave at least one pattern; got all of them")
            prior = self.log_weights
            if checks.is_concrete(prior) and (np.asarray(prior)[remaining] == -np.inf).all():
                raise ValueError("log_prior must leave a pattern on; indices have all that are")
            if self.size is None:
                rows = self.patterns, self.log_prior, self.values
                patterns, prior, values = jax.tree.map(lambda leaf: leaf[remaining], rows)
                shorter = store(patterns, self.geometry, log_prior=prior, values=values)
                remains = jnp.asarray(np.isin(np.arange(len(self)), remaining))
                cells = self.validated().cells
                return slots.with_cells(shorter, cells, len(shorter), remains)
        result: Memory = slots.remove(self, drop.reshape(-1))
        return result

    def reserve(self, capacity: int, **sizes: int) -> "Memory":
        """Return the memory with `capacity` slots, for patterns of some sizes.

        **Arguments:**

        - `capacity` ≥ N: the number of slots.
        - `sizes`: sizes to pad patterns to, which prepares them again: `n` atoms, `r` columns of
          factors, `K` components of mixtures, and other axes of `Measure.padding`.

        **Raises:** `TypeError` or `ValueError` for a capacity or sizes that are no ints or less
        than the memory's own, `ValueError` for sizes that this kind of patterns does not have.
        """
        self._check_in_one_piece()
        capacity = checks.positive_int("capacity", capacity)
        if capacity < self.length_or_capacity:
            raise ValueError(f"capacity must be ≥ N = {self.length_or_capacity}; got {capacity}")
        resized: Memory = slots.reserve(slots.enlarge(self, sizes) if sizes else self, capacity)
        return resized

    def _check_in_one_piece(self) -> None:
        if self.layout is not None:
            raise ValueError("a sharded memory is fixed: change it before jdam.shard")

    def _rows(self, patterns: AnyMeasure) -> AnyMeasure:
        """Return a batch of patterns, or one measure as one, checked against the memory."""
        patterns = as_batch(patterns)
        try:
            patterns = self.geometry.check("patterns", patterns, 1)
        except ValueError as of_batch:
            try:
                patterns = self.geometry.check("patterns", patterns, 0)
            except ValueError:
                raise of_batch from None
            patterns = as_row(patterns)
        check_like("patterns", patterns, self.patterns, "the memory")
        patterns = self.geometry.match(patterns, self.patterns)
        for leaf in jax.tree.leaves(patterns):
            checks.finite("patterns", leaf)
        return patterns

    def from_start(self, index: Any) -> Int[Array, "..."]:
        """Return traced indices; those below 0 count from the end of the stored patterns."""
        index = jnp.asarray(index, jnp.int32)
        return jnp.where(index < 0, index + slots.size_of(self), index)

    def __repr__(self) -> str:
        if not all(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(self)):
            return super().__repr__()  # leaves that are no arrays, as in a tree of specs
        num: Any = self.capacity
        if self.size is not None:
            known = checks.is_concrete(self.size) and self.size.ndim == 0
            num = f"{int(self.size) if known else '…'} of {self.capacity}"
        fields = ", log_prior" if self._has_prior() else ""
        fields += ", values" if self.values is not None else ""
        fields += f", {len(self.cells.members)} cells" if self.cells is not None else ""
        shards = f", {self.layout.parts} shards" if self.layout else ""
        kind = describe(self.patterns)
        return f"Memory({num} × {kind}, {self.geometry}, {self.dtype.name}{fields}{shards})"

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
    values: PyTree = None,
    capacity: int | None = None,
    progress: bool | None = None,
) -> Memory:
    """Return a memory of `patterns`, a batch (N,) of measures.

    **Arguments:**

    - `patterns`: measures with one batch axis, a list of single ones, or an array (N, d).
    - `geometry`: None for `Bures()` with Gaussians, `MixtureWasserstein()` with mixtures of them
      and `Euclidean()` with arrays; point clouds need one, as `Sinkhorn(epsilon)` or
      `Chamfer(epsilon)`, whose self terms, as OT_ε(Xᵢ, Xᵢ), are computed here, once.
    - `log_prior` (N,): log πᵢ of the energy −β⁻¹ log Σ πᵢ exp(−βDᵢ), up to a constant. None is 0
      for all patterns; −inf switches a pattern off.
    - `values`: an array (N, …) of numbers or booleans or a pytree of them, as `memory.values`:
      labels, indexed by `result.nearest`, or floats, which `jdam.attend` averages.
    - `capacity` ≥ N: the number of slots of a memory that grows; see `Memory`.
    - `progress`: a bar while many patterns are prepared, as in `pairwise`.

    **Raises:** `TypeError` for patterns that are not this geometry's or not floats, and for values
    that are no numbers; `ValueError` for an empty memory, wrong shapes, point clouds without a
    geometry, a capacity below N and, where values are concrete, NaN or infinity in patterns.
    """
    progress = check_progress(progress)
    patterns = as_batch(patterns)
    if geometry is None:
        geometry = _default_geometry(patterns)
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


def _default_geometry(patterns: AnyMeasure) -> Geometry:
    """Return the default geometry of these measures."""
    if isinstance(patterns, PointCloud):
        raise ValueError(
            "geometry must be given for point clouds, because it needs its epsilon: jdam.store("
            "patterns, jdam.Sinkhorn(epsilon=…)), or jdam.Chamfer(epsilon=…) for partial cues"
        )
    if isinstance(patterns, Gaussian | DiagonalGaussian):
        return Bures()
    if isinstance(patterns, GaussianMixture):
        return MixtureWasserstein()
    if isinstance(patterns, Measure):
        raise ValueError(f"geometry must be given for measures of type {type(patterns).__name__}")
    return Euclidean()


def check_memory(memory: object) -> None:
    """Raise `TypeError` unless it is a memory."""
    if not isinstance(memory, Memory):
        kind = type(memory).__name__
        how = "jdam.load reads all of it" if hasattr(memory, "paths") else "jdam.store makes one"
        raise TypeError(f"memory must be a jdam.Memory; got {kind}: {how}")
