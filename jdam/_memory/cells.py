"""Cells of patterns, so that a search need not look at every pattern.

A cell holds patterns whose embeddings Φ lie in a ball of centre c and radius r. Since
|Φ(ξ) − Φ(X)|² ≤ D(ξ, X), all its patterns have D ≥ (|Φ(ξ) − c| − r)₊².
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int, PyTree

from jdam._core import checks
from jdam._core.batching import power_of_two
from jdam._core.compile import cast_floats, float_dtype, working_dtype
from jdam._core.linalg import rounding
from jdam._core.mesh import Layout, on_host
from jdam._measures.base import AnyMeasure
from jdam._measures.k_means import k_means
from jdam._memory.prepared import fingerprint
from jdam.geometry.euclidean import embedding_bound
from jdam.geometry.protocol import Embedding, Geometry

if TYPE_CHECKING:
    from jdam._memory.memory import Memory

#: Parts into which k-means cuts a large cluster, and points from which it computes their centres.
BRANCHES, SAMPLE = 32, 2048
#: Distance of strays from the centre of their group, in root mean squares of its members'.
FAR = 2.0


class Cells(eqx.Module):
    """C cells of at most B patterns each."""

    members: Int[Array, "C B"]  # indices of the patterns; −1 where there is none
    counts: Int[Array, " C"]  # of the members
    centres: Float[Array, "C k"]
    radii: Float[Array, " C"]  # rounding included

    def lower_bounds(self, query: Embedding) -> Float[Array, " C"]:
        """Return (|Φ(ξ) − c| − r)₊² of each cell, less rounding, ∞ for empty cells."""
        bounds = embedding_bound(query, (self.centres, self.radii))
        return jnp.where(self.counts > 0, bounds, jnp.inf)

    def invalid_if(self, stale: Bool[Array, ""]) -> "Cells":
        """Return the cells, with NaN for radii if they are those of other patterns."""
        return replace(self, radii=jnp.where(stale, jnp.nan, self.radii))

    def log_prior(self, log_prior: Float[Array, " N"] | None) -> Float[Array, " C"]:
        """Return log Σ π over the patterns of each cell."""
        if log_prior is None:
            return jnp.log(self.counts.astype(self.radii.dtype))
        rows = jnp.where(self.members >= 0, log_prior[self.members], -jnp.inf)
        return jax.nn.logsumexp(rows, axis=1)


def cells_of(embedding: Embedding, num_cells: int) -> Cells:
    """Return about `num_cells` cells. Until there are as many, k-means cuts the cluster of largest
    sum of squares: N patterns take N log C distances, where k-means with C centres takes N·C. A
    cluster that is too large for a cell is cut into several.
    """
    vectors, num = np.asarray(embedding[0]), len(embedding[0])
    if num == 0:  # the shard of a device that has only padding
        none, zero = np.zeros(1, np.int32), np.zeros(1, vectors.dtype)
        members, centre = none[:, None] - 1, np.zeros((1, vectors.shape[1]), vectors.dtype)
        return Cells(*map(jnp.asarray, (members, none, centre, zero)))
    clusters = [(-np.inf, 0, np.arange(num, dtype=np.int32))]
    created = itertools.count(1)  # decides between equal sums
    while len(clusters) < num_cells and clusters[0][0] < 0:
        index = heapq.heappop(clusters)[2]
        branches = BRANCHES if len(index) * num_cells > 2 * BRANCHES * num else 2
        labels = _nearest_centres(vectors[index], branches)
        groups = [index[labels == label] for label in np.unique(labels)]
        for group in groups:
            rows = vectors[group]
            squares = ((rows - rows.mean(0)) ** 2).sum() if len(groups) > 1 else 0.0
            heapq.heappush(clusters, (-float(squares), next(created), group))
    width = -(-3 * num // (2 * num_cells))
    groups = _without_strays(vectors, [group for *_, group in clusters])
    parts = [part for group in groups for part in np.array_split(group, -(-len(group) // width))]
    members = np.full((len(parts), width), -1, np.int32)
    for row, part in zip(members, parts, strict=True):
        row[: len(part)] = part
    cells: Cells = _with_balls(embedding, jnp.asarray(members))
    return cells


def _without_strays(vectors: np.ndarray, groups: list[np.ndarray]) -> list[np.ndarray]:
    """Return the groups, after patterns far from their own centre were moved to the group of
    nearest centre, if they lie in its ball. A cut through a cluster leaves a few of its patterns in
    other groups, whose radii would be large."""
    cores, centres, radii, strays = [], [], [], []
    for number, group in enumerate(groups):
        rows = vectors[group]
        lengths = np.linalg.norm(rows - rows.mean(0), axis=1)
        far = lengths > FAR * np.sqrt(np.mean(lengths**2))
        core = rows[~far]
        cores.append([group[~far]])
        centres.append(core.mean(0))
        radii.append(np.linalg.norm(core - centres[-1], axis=1).max())
        strays += [(number, index) for index in group[far]]
    all_centres = np.stack(centres)
    for own, index in strays:
        lengths = np.linalg.norm(all_centres - vectors[index], axis=1)
        nearest = int(lengths.argmin())
        cores[nearest if lengths[nearest] <= radii[nearest] else own].append(np.array([index]))
    return [np.concatenate(group) for group in cores]


def _nearest_centres(rows: np.ndarray, num: int) -> np.ndarray:
    """Return the labels of the rows among the k-means centres of a sample of them."""
    count = min(len(rows), SAMPLE)
    sample = rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]
    weights = np.zeros(SAMPLE, rows.dtype)
    weights[:count] = 1
    sample = np.concatenate([sample, np.repeat(sample[:1], SAMPLE - count, 0)])
    centres = k_means(jax.random.key(0), jnp.asarray(sample), jnp.asarray(weights), num=num)
    # Few sizes of arrays are few programs to compile.
    padded = np.zeros((power_of_two(len(rows)), rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return np.asarray(_labels(jnp.asarray(padded), centres))[: len(rows)]


@jax.jit
def _labels(rows: Float[Array, "n k"], centres: Float[Array, "c k"]) -> Int[Array, " n"]:
    squares = jnp.vecdot(centres, centres)[None] - 2 * rows @ centres.T
    labels: Array = squares.argmin(1).astype(jnp.int8)
    return labels


@jax.jit
def _with_balls(embedding: Embedding, members: Int[Array, "C B"]) -> Cells:
    """Return the cells of these members, with their centres and radii."""
    vectors, errors = jax.lax.stop_gradient(embedding)
    on = members >= 0
    rows, counts = vectors[members], on.sum(1, dtype=jnp.int32)
    sums = jnp.where(on[..., None], rows, 0).sum(1)
    centres = sums / jnp.maximum(counts, 1).astype(vectors.dtype)[:, None]
    offsets = rows - centres[:, None]
    error = rounding(vectors.shape[1], vectors.dtype)
    lengths = jnp.linalg.norm(offsets, axis=-1) * (1 + error) + errors[members]
    return Cells(members, counts, centres, jnp.where(on, lengths, 0).max(1))


def index_of(memory: "Memory", num_cells: int | None) -> "Memory":
    """Return the memory with cells; of a sharded memory each device has cells of its own."""
    num = len(memory)
    num_cells = min(num, round(4 * num**0.5)) if num_cells is None else num_cells
    num_cells = checks.positive_int("num_cells", num_cells)
    if num_cells > num:
        raise ValueError(
            f"num_cells must be at most the number of patterns, {num}; got {num_cells}"
        )
    if not checks.is_concrete(*jax.tree.leaves(memory)):
        raise TypeError("a memory is indexed outside of jax.jit; inside, its values are unknown")
    embedding = embedded(memory.geometry, memory.patterns, memory.prepared)
    if embedding is None:
        raise TypeError(
            f"cells need a geometry with an embedding, as jdam.Bures(); {memory.geometry} has none"
        )
    memory = with_fingerprint(replace(memory, cells=None))
    if memory.layout is None:
        cells = cells_of(jax.tree.map(lambda leaf: leaf[:num], embedding), num_cells)
        cells = cells if memory.size is None else widened(cells, memory.capacity)
    else:
        cells = _cells_of_shards(memory.layout, embedding, num_cells)
    return replace(memory, cells=cells)


def _cells_of_shards(layout: Layout, embedding: Embedding, num_cells: int) -> Cells:
    """Return cells of each shard's patterns, as many on each device."""
    rows = [on_host(leaf)[: layout.length] for leaf in embedding]
    size, each = -(-layout.length // layout.parts), max(1, num_cells // layout.parts)
    shards = []
    for first in range(0, size * layout.parts, size):
        vectors, errors = (jnp.asarray(leaf[first : first + size]) for leaf in rows)
        shards.append(cells_of((vectors, errors), min(each, max(1, len(errors)))))
    count = max(len(cells.members) for cells in shards)

    def put(leaf: np.ndarray) -> Array:
        return layout.put(leaf.shape, PartitionSpec(layout.axis), leaf.__getitem__)

    cells: Cells = jax.tree.map(put, joined(shards, count))
    return cells


def joined(parts: Sequence[Cells], count: int | None = None) -> Cells:
    """Return the cells of all parts, with room for as many members as the largest; each part is
    padded to `count` cells, unless that is None."""
    width = max(cells.members.shape[1] for cells in parts)

    def padded(cells: Cells) -> Cells:
        more = 0 if count is None else count - len(cells.members)
        columns = width - cells.members.shape[1]
        return Cells(
            jnp.pad(cells.members, ((0, more), (0, columns)), constant_values=-1),
            jnp.pad(cells.counts, (0, more)),
            jnp.pad(cells.centres, ((0, more), (0, 0)), mode="edge"),
            jnp.pad(cells.radii, (0, more)),
        )

    cells: Cells = jax.tree.map(lambda *leaves: np.concatenate(leaves), *map(padded, parts))
    return cells


def embedded(geometry: Geometry, measures: AnyMeasure, prepared: PyTree = None) -> Embedding | None:
    """Return `Geometry.embed`, in float32 at least: half precision over- and underflows."""
    dtype = working_dtype(float_dtype(measures))
    return geometry.embed(*cast_floats((measures, prepared), dtype))


def with_fingerprint(memory: "Memory") -> "Memory":
    """Return the memory with fingerprints, by which changes of the patterns are detected."""
    if memory.fingerprint is not None:
        return memory
    return replace(memory, fingerprint=fingerprint(memory.patterns, memory.geometry))


def widened(cells: Cells, num: int) -> Cells:
    """Return the cells with room for `num` patterns and half as many more: a pattern goes to the
    nearest cell that has room."""
    count, width = cells.members.shape
    missing = max(0, -(-num // count) + -(-num // (2 * count)) - width)
    members = jnp.pad(cells.members, ((0, 0), (0, missing)), constant_values=-1)
    return replace(cells, members=members)


def with_patterns(cells: Cells, embedding: Embedding, indices: Int[Array, " M"]) -> Cells:
    """Return the cells with more patterns, each in the cell of nearest centre that has room."""

    def add(cells: Cells, row: tuple[Array, Array, Array]) -> tuple[Cells, None]:
        vector, error, index = row
        offsets = vector[None] - cells.centres
        distances = jnp.linalg.norm(offsets, axis=-1)
        has_room = cells.counts < cells.members.shape[1]
        cell = jnp.where(has_room, distances, jnp.inf).argmin()
        slot = (cells.members[cell] < 0).argmax()
        reach = distances[cell] * (1 + rounding(vector.size, vector.dtype)) + error
        radii = cells.radii.at[cell].max(reach)
        members = cells.members.at[cell, slot].set(index)
        counts = cells.counts.at[cell].add((index >= 0).astype(jnp.int32))
        return Cells(members, counts, cells.centres, radii), None

    rows = (*jax.lax.stop_gradient(embedding), indices)
    filled: Cells = jax.lax.scan(add, cells, rows)[0]
    return filled


def without_patterns(cells: Cells, remains: Bool[Array, " N"]) -> Cells:
    """Return the cells without the patterns that do not remain."""
    on = (cells.members >= 0) & remains[cells.members]
    members = jnp.where(on, cells.members, -1)
    return replace(cells, members=members, counts=on.sum(1, dtype=jnp.int32))


def moved_up(cells: Cells, remains: Bool[Array, " N"]) -> Cells:
    """Return the cells without the patterns that do not remain, for whom later ones move up."""
    place = jnp.cumsum(remains, dtype=jnp.int32) - 1
    cells = without_patterns(cells, remains)
    return replace(cells, members=jnp.where(cells.members >= 0, place[cells.members], -1))
